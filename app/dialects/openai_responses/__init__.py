"""The front door's Responses dialect: OpenAI's newer API, over any vendor that can be asked in chat completions."""

from __future__ import annotations

from functools import partial

import msgspec

from app.dialects import openai_chat
from app.dialects.openai_responses.answer import ResponsesEvents, response
from app.dialects.openai_responses.request import chat, read
from app.errors import GatewayError
from app.providers.translator import Stamp, StreamReader, Translator
from app.sse import frame

__all__ = ["error_frames", "over", "read"]

_encode = msgspec.json.encode
_decode = msgspec.json.decode


def over(inner: Translator) -> Translator:
    """Speaks Responses over a translator of chat completions."""
    return Translator(
        chat=partial(chat, inner),
        sign=inner.sign,
        response=partial(response, inner),
        stream=partial(_events, inner),
        error=inner.error,
        request_id_header=inner.request_id_header,
    )


def _events(inner: Translator, stamp: Stamp) -> StreamReader:
    return ResponsesEvents(inner.stream(stamp), stamp)


def error_frames(error: GatewayError, _: str | None = None) -> bytes:
    """The one error event that ends a stream: flat, as the reference has it, and as the envelope that SDKs raise on."""
    envelope = _decode(openai_chat.error_body(error))["error"]
    event = {"type": "error", **{name: envelope[name] for name in ("code", "message", "param")}, "error": envelope}
    return frame(_encode(event), "error")
