"""Messages relayed to Anthropic: the client's bytes in, the vendor's bytes out.

Only `model` is spliced into a request, and thinking of another vendor is taken out of it. Of an answer's frames those
that are mere content are told by their bytes; the others are decoded, for the ledger.
Source: Anthropic API reference, Messages, Streaming Messages and Token counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw

from app.config import Target
from app.core import Usage
from app.errors import VendorBroke
from app.providers.anthropic.answer import FINISH_REASONS, error, error_in_answer, relayed, updated, usage_of
from app.providers.anthropic.request import STREAMED, WHOLE, sign
from app.providers.anthropic.wire import ErrorBody, Event, MessagesUsage, TokensCounted
from app.providers.translator import PACKED, Answer, Frame, Kind, Outgoing, Stamp, StreamReader, Translator, split
from app.sse import FrameSplitter, data_of, event_of, frame
from app.wire import ChatRequest, CountRequest

_encode = msgspec.json.encode
_decode = msgspec.json.decode
_counted = msgspec.json.Decoder(TokensCounted)
_event = msgspec.json.Decoder(Event)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_DELTA = b"event: content_block_delta\ndata: {"
STOP = frame(b'{"type":"message_stop"}', "message_stop")


def chat(request: ChatRequest, target: Target) -> Outgoing:
    """The client's members as they came; `model` becomes the target's."""
    return _outgoing(request, target, "/messages")


def count(request: CountRequest, target: Target) -> Outgoing:
    return _outgoing(request, target, "/messages/count_tokens")


def _outgoing(request: ChatRequest | CountRequest, target: Target, path: str) -> Outgoing:
    members = {name: value for name, value in request.fields.items() if name not in target.drop_params}
    members["model"] = Raw(_encode(target.model))
    if PACKED in bytes(members["messages"]):
        members["messages"] = _without_foreign_thinking(members["messages"])
    return Outgoing(
        url=target.provider.base_url + path,
        headers=(*(STREAMED if request.stream else WHOLE), *request.headers),
        body=b"{" + b",".join(b"%b:%b" % (_encode(name), value) for name, value in members.items()) + b"}",
    )


def _without_foreign_thinking(messages: Raw) -> Raw:
    turns = _decode(messages)
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            turn["content"] = [block for block in content if not _is_foreign(block)]
    return Raw(_encode(turns))


def _is_foreign(block: Any) -> bool:
    if not isinstance(block, dict) or block.get("type") not in ("thinking", "redacted_thinking"):
        return False
    seal = block.get("signature") or block.get("data")
    return isinstance(seal, str) and seal.startswith(PACKED.decode())


def counted(body: bytes, stamp: Stamp) -> Answer:
    """The figure stands in the body alone: counting uses no tokens."""
    try:
        answer = _counted.decode(body)
    except _UNREADABLE as fault:
        raise VendorBroke("the vendor's answer is not a count of tokens") from fault
    if answer.error is not None:
        raise error_in_answer(answer.error)
    return Answer(body=body, model=None, usage=Usage(), finish_reason=None, text_bytes=0)


class RelayedStream(StreamReader):
    """Frames as they came."""

    __slots__ = ("_splitter", "_told", "finish_reason", "model", "service_tier", "started", "usage")

    def __init__(self, stamp: Stamp) -> None:
        self.usage = None
        self.model = None
        self.finish_reason = None
        self.service_tier = None
        self.started = False
        self._splitter = FrameSplitter()
        self._told: MessagesUsage | None = None

    def plain(self, chunk: bytes) -> bool:
        return self.started and not self._splitter.rest and _is_plain(chunk)

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        if self.plain(chunk):
            yield Kind.CONTENT, chunk
            return
        for one in split(self._splitter, chunk):
            yield self._scan(one), one

    def _scan(self, one: bytes) -> Kind:
        if not (self.started and _is_plain(one)) and (data := data_of(one)):
            try:
                event = _event.decode(data)
            except _UNREADABLE as fault:
                raise VendorBroke("the vendor sent an event that cannot be decoded") from fault
            if event.type == "message_stop":
                if self.finish_reason is None:
                    raise VendorBroke("the vendor ended its stream without a reason")
                return Kind.DONE
            self._note(event)
        return Kind.CONTENT if self.started else Kind.START

    def _note(self, event: Event) -> None:
        match event.type:
            case "message_start" if event.message is not None:
                self.model = event.message.model
                self._told = event.message.usage
                self.service_tier = self._told.service_tier if self._told else None
            case "content_block_start" if event.content_block is not None:
                block = event.content_block
                self.started = self.started or block.type != "text" or bool(block.text)
            case "content_block_delta":
                self.started = True
            case "message_delta" if event.delta is not None:
                self.started = True
                self._told = updated(self._told, event.usage)
                self.usage = usage_of(self._told)
                if event.delta.stop_reason is not None:
                    self.finish_reason = FINISH_REASONS.get(event.delta.stop_reason, "stop")
            case "error":
                raise error_in_answer(event.error or ErrorBody())

    def end(self) -> Iterator[Frame]:
        yield Kind.DONE, STOP

    def text_bytes(self, frame: bytes) -> int:
        return text_bytes(frame)


def _is_plain(frames: bytes) -> bool:
    """Whether these are whole frames of deltas; the bytes alone tell."""
    return (
        frames.startswith(_DELTA)
        and frames.endswith(b"}\n\n")
        and frames.count(b"\n\n") == frames.count(b"}\n\n" + _DELTA) + 1
        and frames.find(b"\r") == -1
    )


def text_bytes(frames: bytes) -> int:
    """Size of the text, thinking and arguments that frames of a Messages stream carry."""
    size = 0
    for one in FrameSplitter().feed(frames):
        if event_of(one) != "content_block_delta":
            continue
        try:
            delta = _event.decode(data_of(one)).delta
        except _UNREADABLE:
            continue
        if delta is not None:
            size += len((delta.text or delta.thinking or delta.partial_json or "").encode())
    return size


RELAYED = Translator(
    chat=chat,
    sign=sign,
    response=relayed,
    stream=RelayedStream,
    error=error,
    request_id_header="request-id",
    count=count,
    counted=counted,
)
