"""The internal form of embeddings, OpenAI's: for translators of vendors that speak otherwise, and base64 for all."""

from __future__ import annotations

import struct

import msgspec
from msgspec import Raw, Struct

from app.config import Target
from app.core import Usage
from app.errors import VendorBroke
from app.providers.chat_shape import asks_nothing, cannot
from app.providers.translator import Answer, Stamp
from app.wire import EmbedRequest

_encode = msgspec.json.encode
_vector = msgspec.json.Decoder(list[float])
_READ = frozenset({"model", "input", "encoding_format"})


class _Embedding(Struct):
    index: int
    embedding: Raw
    object: str = "embedding"


class _Embeddings(Struct):
    data: list[_Embedding]
    model: str
    usage: dict[str, int] | None
    object: str = "list"


def texts(request: EmbedRequest, target: Target, carried: frozenset[str]) -> list[str]:
    """The inputs of a vendor that embeds texts only.

    `carried` names the members beside `input` that it can carry (`dimensions`, `user`). Raises VendorCannot for another
    one that the target's `drop_params` do not name, and for token numbers.
    """
    for name, value in request.fields.items():
        if name in _READ or name in carried or name in target.drop_params:
            continue
        if not asks_nothing(name, value):
            raise cannot(name, target)
    if request.input_tokens:
        raise cannot("input", target, "it reads texts, not token numbers")
    return request.inputs  # type: ignore[return-value]


def answer(
    request: EmbedRequest, stamp: Stamp, model: str | None, vectors: list[list[float]], tokens: int | None
) -> Answer:
    """The vendor's vectors, in the order of the inputs, as the client asked for them.

    `tokens` is None where the vendor does not count. Raises VendorBroke where an input has no vector.
    """
    if len(vectors) != len(request.inputs):
        raise VendorBroke(f"the vendor answered {len(request.inputs)} inputs with {len(vectors)} vectors")
    whole = _Embeddings(
        data=[
            _Embedding(place, Raw(in_base64(vector) if request.encoding == "base64" else _encode(vector)))
            for place, vector in enumerate(vectors)
        ],
        model=model or stamp.model,
        usage=None if tokens is None else {"prompt_tokens": tokens, "total_tokens": tokens},
    )
    return Answer(
        body=_encode(whole),
        model=whole.model,
        usage=None if tokens is None else Usage(embedding=tokens),
        finish_reason=None,
        text_bytes=0,
    )


def in_base64(vector: list[float] | Raw) -> bytes:
    """A JSON string: the floats as little-endian binary32 in base64, as OpenAI writes them. Raises VendorBroke."""
    try:
        numbers = _vector.decode(vector) if isinstance(vector, Raw) else vector
        return _encode(struct.pack(f"<{len(numbers)}f", *numbers))
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        raise VendorBroke("the vendor sent an embedding that is not a list of numbers") from error
