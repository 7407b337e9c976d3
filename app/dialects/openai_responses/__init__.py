"""The front door's Responses dialect: OpenAI's newer API, over any vendor that can be asked in chat completions."""

from __future__ import annotations

import contextlib
from functools import partial

import msgspec
from msgspec import Struct

from app.dialects import openai_chat
from app.dialects.openai_responses.answer import ResponsesEvents, response
from app.dialects.openai_responses.kept import METHODS, nothing, read_kept
from app.dialects.openai_responses.request import chat, read
from app.errors import GatewayError
from app.providers.translator import Stamp, StreamReader, Translator
from app.sse import FrameSplitter, data_of, frame

__all__ = ["METHODS", "error_frames", "nothing", "over", "read", "read_kept"]

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


class _Numbered(Struct):
    sequence_number: int


_numbered = msgspec.json.Decoder(_Numbered)


def error_frames(error: GatewayError, request_id: str | None = None, sent: bytes = b"") -> bytes:
    """The one error event that ends a stream: flat, as the reference has it, and as the envelope that SDKs raise on.

    Its number follows that of the last event sent.
    """
    envelope = _decode(openai_chat.error_body(error))["error"]
    event = {"type": "error", **{name: envelope[name] for name in ("code", "message", "param")}}
    return frame(_encode(event | {"sequence_number": _number_after(sent), "error": envelope}), "error")


def _number_after(sent: bytes) -> int:
    for one in reversed(FrameSplitter().feed(sent)):
        if data := data_of(one):
            with contextlib.suppress(msgspec.DecodeError):
                return _numbered.decode(data).sequence_number + 1
    return 0
