"""Reasoning that a vendor wants back as it sent it (`reasoning_details` of the internal form), packed for clients.

A client of another dialect has one place for what is sealed: it gets there what the vendor wants back, behind a mark of
ours, and sends it back with its next request.
"""

from __future__ import annotations

from typing import Any

import msgspec

from app.providers.anthropic.request import REASONING_FORMAT
from app.providers.translator import PACKED

Detail = dict[str, Any]
_encode = msgspec.json.encode
_detail = msgspec.json.Decoder(Detail)
_MARK = PACKED.decode()


def text_of(detail: Detail) -> str:
    """What a detail says in words; an encrypted one says nothing."""
    text = detail.get("text") or detail.get("summary")
    return text if isinstance(text, str) else ""


def is_hidden(detail: Detail) -> bool:
    return detail.get("type") == "reasoning.encrypted"


def is_anthropic_s(detail: Detail) -> bool:
    return detail.get("format") == REASONING_FORMAT


def packed(detail: Detail) -> str:
    """Base64 of its JSON, the same whatever the order in which its parts came."""
    told = {name: value for name, value in detail.items() if value is not None and name != "index"}
    return _MARK + (_encode(_encode(told, order="sorted"))[1:-1].decode() if told else "")


def unpacked(written: str) -> Detail | None:
    """What was packed; None for what no one can have packed."""
    try:
        return _detail.decode(msgspec.convert(written.removeprefix(_MARK), bytes)) if is_packed(written) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def is_packed(written: str) -> bool:
    return written.startswith(_MARK)
