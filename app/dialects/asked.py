"""A dialect's request on its way into chat completions: what the dialects' readers share.

What it reads is named in the client's own words: a refusal has the place where the member stood there.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from msgspec import Raw

from app.config import Target
from app.errors import VendorCannot
from app.providers.chat_shape import cannot
from app.providers.translator import Outgoing, Translator
from app.wire import ChatRequest

T = TypeVar("T")
Fields = dict[str, Raw]
Part = dict[str, object]
_encode = msgspec.json.encode


class Asked:
    """One request.

    `origins` has, for each message written, the place that it came from, and that of each of its parts.
    """

    def __init__(self, request: ChatRequest, target: Target, extras: frozenset[str]) -> None:
        self.request = request
        self.target = target
        self.extras = extras
        dropped = target.drop_params
        self.fields: Fields = {name: value for name, value in request.fields.items() if name not in dropped}
        self.origins: list[tuple[str, list[str]]] = []

    def said(self) -> Part:
        """The members of the request in chat completions; those that are None are left out. Raises VendorCannot."""
        raise NotImplementedError

    def own_member(self, param: str) -> str:
        """The member of the dialect that became `param`, which is no message and no tool."""
        raise NotImplementedError

    def as_chat(self) -> ChatRequest:
        said = self.said()
        streamed = True if self.request.stream else None
        said = {"model": self.request.alias, "messages": said["messages"], "stream": streamed, **said}
        fields = {name: Raw(_encode(value)) for name, value in said.items() if value is not None}
        return ChatRequest(
            body=_encode(fields),
            alias=self.request.alias,
            fields=fields,
            stream=self.request.stream,
            max_output_tokens=self.request.max_output_tokens,
        )

    def own_name(self, param: str) -> str:
        """The place in the client's request that became `param` of the internal form."""
        if found := re.match(r"messages\[(\d+)\](?:\.content\[(\d+)\])?", param):
            where, parts = self.origins[int(found[1])]
            return parts[int(found[2])] if found[2] and int(found[2]) < len(parts) else where
        if found := re.match(r"tools\[\d+\]", param):
            return found[0]
        return self.own_member(param)

    def wrote(self, where: str, message: Part, parts: list[str] | None = None) -> Part:
        self.origins.append((where, parts or []))
        return message

    def member(self, name: str, shape: msgspec.json.Decoder[T]) -> T | None:
        written = self.fields.get(name)
        return None if written is None or bytes(written) == b"null" else self.read(shape, written, name)

    def read(self, shape: msgspec.json.Decoder[T], written: Raw, where: str) -> T:
        try:
            return shape.decode(written)
        except (msgspec.DecodeError, RecursionError) as error:
            raise cannot(where, self.target, str(error)) from None


def chat(asked: type[Asked], inner: Translator, request: ChatRequest, target: Target) -> Outgoing:
    """The vendor's request, by way of chat completions. Refusals name the dialect's own member. Raises VendorCannot."""
    read = asked(request, target, inner.extras)
    written = read.as_chat()
    try:
        return inner.chat(written, target)
    except VendorCannot as error:
        own = read.own_name(error.param or "")
        raise VendorCannot(error.message.replace(f"`{error.param}`", f"`{own}`"), param=own) from None
