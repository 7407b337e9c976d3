"""The front door's OpenAI dialect for embeddings: requests in. Errors are those of chat.

Source: OpenAI API reference, embeddings. The official SDKs ask for base64 unless told otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.dialects.openai_chat import alias_of, member, members
from app.errors import InvalidRequest
from app.wire import EmbedRequest

_Token = Annotated[int, Meta(ge=0)]
_input = msgspec.json.Decoder(str | list[str | _Token | list[_Token]])
_encoding = msgspec.json.Decoder(Literal["float", "base64"] | None)
_dimensions = msgspec.json.Decoder(Annotated[int, Meta(ge=1)] | None)


def read(body: bytes) -> EmbedRequest:
    """The request in `body`; the members we do not act on stay as the client wrote them.

    Raises InvalidRequest.
    """
    fields = members(body)
    alias = alias_of(fields)
    if "input" not in fields:
        raise InvalidRequest("`input` is required: a text, or a list of texts.", param="input")
    inputs = _inputs(member(fields, "input", _input))
    return EmbedRequest(
        body=body,
        alias=alias,
        fields=fields,
        inputs=inputs,
        input_tokens=sum(len(tokens) for tokens in inputs if isinstance(tokens, list)),
        encoding=member(fields, "encoding_format", _encoding) or "float",
        dimensions=member(fields, "dimensions", _dimensions),
    )


def _inputs(written: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    """One input is a list of one. Raises InvalidRequest for none, for an empty one, and for kinds that are mixed."""
    listed = written if isinstance(written, list) else [written]
    kinds = {type(one) for one in listed}
    if kinds == {int}:
        return [listed]
    if len(kinds) != 1:
        raise InvalidRequest("`input` must be a text, token numbers, or a list of one kind of these.", param="input")
    if not all(listed):
        raise InvalidRequest("`input` holds an empty text or no tokens.", param="input")
    return listed
