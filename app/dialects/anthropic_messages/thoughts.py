"""Reasoning of any vendor as blocks of thinking, and back again unchanged.

A vendor wants its own reasoning back as it sent it (`reasoning_details` of the internal form); a client of Messages
sends thinking back with its `signature`, and redacted thinking with its `data`. So what Anthropic signed stands there
as it is, and what another vendor wants back is packed into them, behind a mark of ours.
"""

from __future__ import annotations

from typing import Any

import msgspec

from app.dialects.anthropic_messages.wire import RedactedThinking, Thinking
from app.providers.anthropic.relay import FOREIGN
from app.providers.anthropic.request import REASONING_FORMAT

Detail = dict[str, Any]
_encode = msgspec.json.encode
_detail = msgspec.json.Decoder(Detail)
_MARK = FOREIGN.decode()


def text_of(detail: Detail) -> str:
    """What a detail says in words; an encrypted one says nothing."""
    text = detail.get("text") or detail.get("summary")
    return text if isinstance(text, str) else ""


def is_hidden(detail: Detail) -> bool:
    return detail.get("type") == "reasoning.encrypted"


def is_anthropic_s(detail: Detail) -> bool:
    return detail.get("format") == REASONING_FORMAT


def signature(detail: Detail) -> str:
    """What stands for a detail, apart from its text, in a block of thinking; of no detail (`{}`) the mark alone."""
    written = detail.get("signature")
    if isinstance(written, str) and is_anthropic_s(detail):
        return written
    return _packed({name: value for name, value in detail.items() if name not in ("text", "summary")})


def data(detail: Detail) -> str:
    """What stands for an encrypted detail in a block of redacted thinking."""
    written = detail.get("data")
    return written if isinstance(written, str) and is_anthropic_s(detail) else _packed(detail)


def _packed(detail: Detail) -> str:
    """Base64 of its JSON, the same whatever the order in which its parts came."""
    told = {name: value for name, value in detail.items() if value is not None and name != "index"}
    return _MARK + (_encode(_encode(told, order="sorted"))[1:-1].decode() if told else "")


def detail_of(block: Thinking | RedactedThinking, place: int) -> Detail | None:
    """The detail that a block stands for; None for thinking that nobody signed, and for what no one can have packed."""
    if isinstance(block, Thinking):
        said, sealed = {"text": block.thinking}, {"type": "reasoning.text", "signature": block.signature}
        written = block.signature
    else:
        said, sealed = {}, {"type": "reasoning.encrypted", "data": block.data}
        written = block.data
    if not written.startswith(_MARK):
        return sealed | said | {"format": REASONING_FORMAT, "index": place}
    try:
        packed = _detail.decode(msgspec.convert(written.removeprefix(_MARK), bytes))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if packed.get("type") == "reasoning.summary":
        said = {"summary": said.get("text", "")}
    return packed | said | {"index": place}
