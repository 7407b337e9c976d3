"""How many tokens a prompt has: the vendor's own count where it speaks Messages, elsewhere the gateway's estimate.

Source: Anthropic API reference, Token counting.
"""

from __future__ import annotations

import msgspec

from app import prompt_size
from app.config import Target
from app.core import Usage
from app.dialects.openai_chat import alias_of, members
from app.errors import InvalidRequest
from app.providers.translator import Answer
from app.wire import CountRequest

_encode = msgspec.json.encode
_COUNTED = ("messages", "system", "tools")


def read(body: bytes) -> CountRequest:
    """The request in `body`. Raises InvalidRequest."""
    fields = members(body)
    alias = alias_of(fields)
    if memoryview(fields.get("messages", b""))[:1] != b"[":
        raise InvalidRequest("`messages` must be a list.", param="messages")
    return CountRequest(body, alias, fields)


def estimated(request: CountRequest, target: Target) -> Answer:
    """By size, as what a call reserves is: `estimated` is ours beside Anthropic's member."""
    prompt = b"".join(bytes(request.fields.get(name, b"")) for name in _COUNTED)
    body = _encode({"input_tokens": prompt_size.tokens(prompt), "estimated": True})
    return Answer(body=body, model=target.model, usage=Usage(), finish_reason=None, text_bytes=0)
