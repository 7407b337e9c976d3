"""The front door's Anthropic dialect: Messages over any vendor that can be asked in chat completions."""

from __future__ import annotations

import re
from functools import partial

from app.dialects.anthropic_messages.answer import MessagesEvents, response
from app.dialects.anthropic_messages.counting import estimated
from app.dialects.anthropic_messages.counting import read as read_count
from app.dialects.anthropic_messages.errors import error_body, error_frames, rate_headers
from app.dialects.anthropic_messages.models import model, models
from app.dialects.anthropic_messages.request import chat, read
from app.providers.translator import Stamp, StreamReader, Translator

__all__ = [
    "ID_HEADERS",
    "RELAYED",
    "error_body",
    "error_frames",
    "model",
    "models",
    "over",
    "rate_headers",
    "read",
    "read_count",
]

_FEATURE = r"[a-z0-9]{1,32}(?:-[a-z0-9]{1,32}){0,12}-20\d\d-?\d\d-?\d\d"
RELAYED = {b"anthropic-beta": re.compile(rf"{_FEATURE}(?:, ?{_FEATURE}){{0,31}}")}
"""Names of features that are not general yet, each with the date that it began at. The API's version is ours to say."""
ID_HEADERS = (b"request-id", b"x-request-id")
"""Anthropic's own name, and the one that every answer of the gateway has."""


def over(inner: Translator) -> Translator:
    """Speaks Messages over a translator of chat completions."""
    return Translator(
        chat=partial(chat, inner),
        sign=inner.sign,
        response=partial(response, inner),
        stream=partial(_events, inner),
        error=inner.error,
        request_id_header=inner.request_id_header,
        count=estimated,
    )


def _events(inner: Translator, stamp: Stamp) -> StreamReader:
    return MessagesEvents(inner.stream(stamp), stamp)
