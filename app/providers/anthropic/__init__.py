"""Anthropic's Messages API."""

from __future__ import annotations

from app.providers.anthropic.answer import MessagesStream, error, response
from app.providers.anthropic.relay import RELAYED
from app.providers.anthropic.request import chat, sign
from app.providers.translator import Translator

__all__ = ["ANTHROPIC", "RELAYED"]

ANTHROPIC = Translator(
    chat=chat,
    sign=sign,
    response=response,
    stream=MessagesStream,
    error=error,
    request_id_header="request-id",
)
