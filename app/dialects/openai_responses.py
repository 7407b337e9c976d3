"""The front door's Responses dialect: OpenAI's newer API, relayed to the vendors that speak it.

What a vendor keeps for its account (answers, conversations, prompts) belongs to no tenant of ours, so nothing is kept
there and nothing kept there can be named.
Source: OpenAI API reference, Responses. The official SDKs raise on an event with `error` in it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct
from msgspec.structs import replace

from app.config import Target
from app.dialects import openai_chat
from app.dialects.openai_chat import MAX_OUTPUT_TOKENS, alias_of, member, members
from app.errors import GatewayError, InvalidRequest, VendorCannot
from app.providers.translator import Outgoing, Translator
from app.sse import frame
from app.wire import ChatRequest

_encode = msgspec.json.encode
_decode = msgspec.json.decode
_flag = msgspec.json.Decoder(bool | None)
_tokens = msgspec.json.Decoder(Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)] | None)


class _Item(Struct):
    """An item of the input, as far as it tells whether it is one or only names one."""

    type: str | None = None
    role: str | None = None


_input = msgspec.json.Decoder(str | list[_Item])
_KEPT = {
    "previous_response_id": "send the turns before as items of `input`",
    "conversation": "send the turns before as items of `input`",
    "prompt": "send its text as `instructions`",
}
"""Members that name what a vendor keeps for its account, and what does instead."""


def read(body: bytes) -> ChatRequest:
    """The request in `body`, with `store` switched off; the other members stay as the client wrote them.

    Raises InvalidRequest.
    """
    fields = members(body)
    alias = alias_of(fields)
    for name, instead in _KEPT.items():
        if bytes(fields.get(name, b"null")) != b"null":
            raise InvalidRequest(
                f"`{name}` names what is kept at a vendor, where tenants share: {instead}.", param=name
            )
    if member(fields, "store", _flag):
        raise InvalidRequest("`store` keeps answers at a vendor, where tenants share: leave it out.", param="store")
    if member(fields, "background", _flag):
        raise InvalidRequest("`background` needs stored answers: leave it out, and stream.", param="background")
    if "input" not in fields:
        raise InvalidRequest("`input` is required: a text, or a list of items.", param="input")
    written = member(fields, "input", _input)
    if not isinstance(written, str) and any(map(_is_reference, written)):
        raise InvalidRequest("`input` names an item that a vendor keeps: send the item itself.", param="input")
    return ChatRequest(
        body=body,
        alias=alias,
        fields=fields | {"store": Raw(b"false")},
        stream=member(fields, "stream", _flag) or False,
        include_usage=True,
        max_output_tokens=member(fields, "max_output_tokens", _tokens),
    )


def _is_reference(item: _Item) -> bool:
    """A message may have no type, and a reference neither; a message has a role."""
    return item.role is None and item.type in (None, "item_reference")


def over(inner: Translator) -> Translator:
    """Refuses for a vendor that does not speak Responses, so that a fallback that does can answer."""
    return replace(inner, chat=_refuse)


def _refuse(_: ChatRequest, target: Target) -> Outgoing:
    raise VendorCannot(
        f"{target.name} cannot be asked in Responses: use /v1/chat/completions or /v1/messages, or another model.",
        param="model",
    )


def error_frames(error: GatewayError, _: str | None = None) -> bytes:
    """The one error event that ends a stream: flat, as the reference has it, and as the envelope that SDKs raise on."""
    envelope = _decode(openai_chat.error_body(error))["error"]
    event = {"type": "error", **{name: envelope[name] for name in ("code", "message", "param")}, "error": envelope}
    return frame(_encode(event), "error")
