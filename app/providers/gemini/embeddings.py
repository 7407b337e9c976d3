"""Embeddings: `batchEmbedContents` at AI Studio, `predict` at Vertex AI.

Sources: Gemini API reference (models.batchEmbedContents), Vertex AI reference (text embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from app.config import Target
from app.errors import VendorBroke
from app.providers import embed_shape
from app.providers.gemini.request import Front, model_path
from app.providers.gemini.wire import UsageMetadata
from app.providers.openai import MAX_TOKENS
from app.providers.translator import Answer, Outgoing, Stamp
from app.wire import EmbedRequest

_encode = msgspec.json.encode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_HEADERS = (("content-type", "application/json"), ("accept", "application/json"))
_CARRIED = frozenset({"dimensions"})


class _Statistics(Struct):
    token_count: float | None = None  # Vertex writes it as a float


class _Values(Struct):
    values: list[float]
    statistics: _Statistics | None = None


class _Batch(Struct, rename="camel"):
    embeddings: list[_Values]
    usage_metadata: UsageMetadata | None = None


class _Prediction(Struct):
    embeddings: _Values


class _Predictions(Struct):
    predictions: list[_Prediction]


_batch = msgspec.json.Decoder(_Batch)
_predictions = msgspec.json.Decoder(_Predictions)


def batch(front: Front, request: EmbedRequest, target: Target) -> Outgoing:
    """One request of AI Studio for all inputs. Raises VendorCannot."""
    path = model_path(front, target)
    options = _dimensions(request, target)
    asked = [
        {"model": path, "content": {"parts": [{"text": text}]}} | options
        for text in embed_shape.texts(request, target, _CARRIED)
    ]
    return _outgoing(target, f"{path}:batchEmbedContents", {"requests": asked})


def batched(body: bytes, request: EmbedRequest, stamp: Stamp, headers: Mapping[str, str]) -> Answer:
    """Older models do not say how many tokens they read."""
    try:
        answer = _batch.decode(body)
    except _UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not a list of embeddings") from error
    usage = answer.usage_metadata
    tokens = None if usage is None else usage.prompt_token_count
    return embed_shape.answer(request, stamp, None, [one.values for one in answer.embeddings], _count(tokens))


def predict(front: Front, request: EmbedRequest, target: Target) -> Outgoing:
    """One request of Vertex for all inputs; some models take one input only. Raises VendorCannot.

    A text that is too long is refused, as OpenAI does: Vertex would cut it otherwise, and not say so.
    """
    asked = [{"content": text} for text in embed_shape.texts(request, target, _CARRIED)]
    parameters = {"autoTruncate": False} | _dimensions(request, target)
    return _outgoing(target, f"{model_path(front, target)}:predict", {"instances": asked, "parameters": parameters})


def predicted(body: bytes, request: EmbedRequest, stamp: Stamp, headers: Mapping[str, str]) -> Answer:
    try:
        found = [one.embeddings for one in _predictions.decode(body).predictions]
    except _UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not a list of embeddings") from error
    counts = [None if one.statistics is None else one.statistics.token_count for one in found]
    tokens = None if None in counts else sum(count or 0 for count in counts)
    return embed_shape.answer(request, stamp, None, [one.values for one in found], _count(tokens))


def _dimensions(request: EmbedRequest, target: Target) -> dict[str, Any]:
    if request.dimensions is None or "dimensions" in target.drop_params:
        return {}
    return {"outputDimensionality": request.dimensions}


def _outgoing(target: Target, path: str, sent: dict[str, Any]) -> Outgoing:
    return Outgoing(f"{target.provider.base_url}/{path}", _HEADERS, _encode(sent))


def _count(tokens: float | None) -> int | None:
    return None if tokens is None or not 0 <= tokens <= MAX_TOKENS else round(tokens)
