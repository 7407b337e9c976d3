"""Embeddings by InvokeModel, where each vendor of models has a body of its own: Amazon's Titan and Cohere.

Titan embeds one text a request. Cohere wants to know what the vectors are for: `search_document`, unless the client
says otherwise in `input_type`, Cohere's own member. Cohere counts tokens in a header alone.
Source: Bedrock user guide, "Inference request parameters and response fields for foundation models".
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Raw, Struct

from app.config import Target
from app.errors import VendorBroke
from app.providers import embed_shape
from app.providers.bedrock.request import model_url
from app.providers.bedrock.wire import MAX_TOKENS, UNREADABLE
from app.providers.chat_shape import cannot
from app.providers.translator import Answer, Outgoing, Stamp
from app.wire import EmbedRequest

_encode = msgspec.json.encode
_HEADERS = (("content-type", "application/json"), ("accept", "application/json"))
TOKENS_HEADER = "x-amzn-bedrock-input-token-count"


class Vectors(Struct, rename="camel"):
    """Titan answers with `embedding`, Cohere with `embeddings`, which may be by type."""

    embedding: list[float] | None = None
    embeddings: list[list[float]] | dict[str, list[list[float]]] | None = None
    input_text_token_count: int | None = None


_vectors = msgspec.json.Decoder(Vectors)


def embed(request: EmbedRequest, target: Target) -> Outgoing:
    """Raises VendorCannot."""
    model = target.model
    if "amazon.titan-embed" in model:
        body = _titan(embed_shape.texts(request, target, frozenset({"dimensions"})), request.dimensions, target)
    elif "cohere.embed" in model:
        sized = "embed-v4" in model  # v3 has one size
        carried = frozenset({"dimensions", "input_type"} if sized else {"input_type"})
        body = _cohere(embed_shape.texts(request, target, carried), request, target)
    else:
        raise cannot("model", target, "the embeddings of this model are not known; Titan's and Cohere's are")
    return Outgoing(url=model_url(target) + "/invoke", headers=_HEADERS, body=_encode(body))


def _titan(texts: list[str], dimensions: int | None, target: Target) -> dict[str, object]:
    if len(texts) != 1:
        raise cannot("input", target, "Titan embeds one text a request")
    body: dict[str, object] = {"inputText": texts[0]}
    if dimensions is not None and "dimensions" not in target.drop_params:
        body["dimensions"] = dimensions
    return body


def _cohere(texts: list[str], request: EmbedRequest, target: Target) -> dict[str, object]:
    fields = {name: value for name, value in request.fields.items() if name not in target.drop_params}
    body: dict[str, object] = {"texts": texts, "input_type": fields.get("input_type", Raw(b'"search_document"'))}
    if request.dimensions is not None and "dimensions" in fields:
        body["output_dimension"] = request.dimensions
    return body


def embedded(body: bytes, request: EmbedRequest, stamp: Stamp, headers: Mapping[str, str]) -> Answer:
    try:
        answer = _vectors.decode(body)
    except UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not an embedding") from error
    vectors = answer.embeddings.get("float") if isinstance(answer.embeddings, dict) else answer.embeddings
    if vectors is None:
        vectors = [] if answer.embedding is None else [answer.embedding]
    return embed_shape.answer(request, stamp, None, vectors, _tokens(answer.input_text_token_count, headers))


def _tokens(counted: int | None, headers: Mapping[str, str]) -> int | None:
    if counted is None:
        written = headers.get(TOKENS_HEADER, "")
        counted = int(written) if written.isdecimal() and len(written) <= 10 else None
    return counted if counted is not None and 0 <= counted <= MAX_TOKENS else None
