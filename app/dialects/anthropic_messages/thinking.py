"""Reasoning of any vendor as blocks of thinking, and back again unchanged.

A client of Messages sends thinking back with its `signature`, and redacted thinking with its `data`. So what Anthropic
signed stands there as it is, and what another vendor wants back is packed into them.
"""

from __future__ import annotations

from app.dialects.anthropic_messages.wire import RedactedThinking, Thinking
from app.dialects.thoughts import Detail, is_anthropic_s, is_packed, packed, unpacked
from app.providers.anthropic.request import REASONING_FORMAT


def signature(detail: Detail) -> str:
    """What stands for a detail, apart from its text, in a block of thinking; of no detail (`{}`) the mark alone."""
    written = detail.get("signature")
    if isinstance(written, str) and is_anthropic_s(detail):
        return written
    return packed({name: value for name, value in detail.items() if name not in ("text", "summary")})


def data(detail: Detail) -> str:
    """What stands for an encrypted detail in a block of redacted thinking."""
    written = detail.get("data")
    return written if isinstance(written, str) and is_anthropic_s(detail) else packed(detail)


def detail_of(block: Thinking | RedactedThinking, place: int) -> Detail | None:
    """The detail that a block stands for; None for thinking that nobody signed, and for what no one can have packed."""
    if isinstance(block, Thinking):
        said, sealed = {"text": block.thinking}, {"type": "reasoning.text", "signature": block.signature}
        written = block.signature
    else:
        said, sealed = {}, {"type": "reasoning.encrypted", "data": block.data}
        written = block.data
    if not is_packed(written):
        return sealed | said | {"format": REASONING_FORMAT, "index": place}
    detail = unpacked(written)
    if detail is None:
        return None
    if detail.get("type") == "reasoning.summary":
        said = {"summary": said.get("text", "")}
    return detail | said | {"index": place}
