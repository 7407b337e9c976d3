"""Vendors that speak OpenAI's chat completions, each by its row in `app/vendors.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.config import Credential, Target
from app.errors import VendorError, VendorMisconfigured, VendorRefused
from app.providers import openai
from app.providers.chat_shape import asks_nothing, cannot, rewritten, rewritten_frames
from app.providers.openai import OPENAI, OpenAIStream
from app.providers.translator import Answer, Frame, Outgoing, Stamp, Translator
from app.vendors import Vendor
from app.wire import ChatRequest

_TYPED = re.compile(rb'"content"\s*:\s*\[')


def compatible(vendor: Vendor) -> Translator:
    """The translator of a vendor that differs from OpenAI as its row says."""
    return replace(
        OPENAI,
        chat=partial(chat, vendor),
        sign=sign,
        response=response if vendor.typed_content else OPENAI.response,
        stream=TypedStream if vendor.typed_content else OPENAI.stream,
        error=partial(error, vendor),
        request_id_header=vendor.request_id_header,
        extras=vendor.extras,
    )


def chat(vendor: Vendor, request: ChatRequest, target: Target) -> Outgoing:
    """The client's members as they came, under the vendor's names. Raises VendorCannot."""
    fields: Mapping[str, Raw] = request.fields
    if vendor.uncarried or vendor.renamed:
        fields = _spelled(vendor, request, target)
    return openai.outgoing(request, fields, target, stream_options=vendor.stream_options)


def _spelled(vendor: Vendor, request: ChatRequest, target: Target) -> dict[str, Raw]:
    """Under two names for one thing the client's newer one counts, as it does for its reservation.

    A member that the vendor cannot carry is left out where it asks for what happens anyway.
    """
    spelled: dict[str, Raw] = {}
    for name, value in request.fields.items():
        if name in target.drop_params:
            continue
        if name in vendor.uncarried:
            if not asks_nothing(name, value):
                raise cannot(name, target)
            continue
        known = vendor.renamed.get(name, name)
        if known != name and bytes(value) == b"null":
            continue
        if known != name or known not in spelled:
            spelled[known] = value
    return spelled


def sign(outgoing: Outgoing, credential: Credential, at: float) -> Outgoing:
    """A server of one's own may have no key."""
    return openai.sign(outgoing, credential, at) if credential.secret.reveal() else outgoing


def error(vendor: Vendor, status: int, headers: Mapping[str, str], body: bytes) -> VendorError:
    told = OPENAI.error(status, headers, body)
    if vendor.bad_key and isinstance(told, VendorRefused) and told.message.startswith(vendor.bad_key):
        return VendorMisconfigured("the vendor refused the key", vendor_status=status, vendor_code=told.vendor_code)
    return told


# --- content as a list of typed parts: Mistral, where a model reasons -------------------------------------------------


class TypedStream(OpenAIStream):
    """Writes the lists that `delta.content` may be as OpenAI's clients expect them: text, and reasoning beside it."""

    __slots__ = ()

    def plain(self, chunk: bytes) -> bool:
        return super().plain(chunk) and not _TYPED.search(chunk)

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        for kind, frames in super().feed(chunk):
            yield kind, rewritten_frames(frames, _untype) if _TYPED.search(frames) else frames


def response(body: bytes, stamp: Stamp) -> Answer:
    answer = OPENAI.response(body, stamp)
    return replace(answer, body=rewritten(body, _untype)) if _TYPED.search(body) else answer


def _untype(choice: dict[str, Any]) -> None:
    """Parts of another type than text and thinking (references, say) have no other place: such content stays a list."""
    message = choice.get("message") or choice.get("delta")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return
    try:
        parts = msgspec.convert(content, list[_Part])
    except msgspec.ValidationError:
        return
    texts = [part.text for part in parts if part.type == "text"]
    thoughts = [one.text for part in parts for one in part.thinking]
    message["content"] = "".join(texts) if texts or not thoughts else None
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)


class _Thought(Struct):
    text: str
    type: Literal["text"]


class _Part(Struct):
    type: Literal["text", "thinking"]
    text: str = ""
    thinking: list[_Thought] = []
