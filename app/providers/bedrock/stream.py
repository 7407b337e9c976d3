"""A ConverseStream answer, in AWS's binary event stream, as chat completion chunks."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from app.errors import VendorBroke, VendorMisconfigured
from app.providers.bedrock.errors import event_error
from app.providers.bedrock.models import reasoning_format
from app.providers.bedrock.response import detail, finish_reason_of
from app.providers.bedrock.signing import MISSING
from app.providers.bedrock.wire import (
    ANSWER_TOOL,
    UNREADABLE,
    Delta,
    Event,
    Reasoning,
    ToolUse,
    annotation_of,
    model_of,
    tier_of,
    usage_of,
)
from app.providers.chat_shape import WrittenMessage, WrittenToolCall, chunk, usage_chunk
from app.providers.openai import text_bytes
from app.providers.translator import MAX_FRAME_BYTES, Frame, Kind, Stamp, StreamReader
from app.sse import DONE

_event = msgspec.json.Decoder(Event)
_NAMES = {"event": ":event-type", "exception": ":exception-type", "error": ":error-code"}
"""The header that names what a message of each type is."""


class ConverseStream(StreamReader):
    """Frames leave with the bytes that complete a vendor's event. Raises VendorMisconfigured without botocore."""

    def __init__(self, stamp: Stamp) -> None:
        try:
            from botocore.eventstream import EventStreamBuffer, ParserError
        except ImportError as error:
            raise VendorMisconfigured(MISSING) from error
        # What the decoder raises on bytes that are no events, its checks of lengths and checksums included.
        self._not_events = (ParserError, struct.error, KeyError, UnicodeDecodeError)
        self._buffer = EventStreamBuffer()
        self._pending_bytes = 0
        self._stamp = stamp
        self._calls: dict[int, int] = {}
        """The index of a tool call by its content block's."""
        self._reasoning: dict[int, int] = {}
        """The index of a reasoning detail by its content block's."""
        self._answer: int | None = None
        """The content block that holds a schema's answer."""
        self._silent: set[int] = set()
        """Content blocks of calls without arguments so far."""
        self._annotations = 0

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        self._buffer.add_data(chunk)
        self._pending_bytes += len(chunk)
        while True:
            try:
                message = next(self._buffer, None)
                if message is None:
                    break
                kind = message.headers[":message-type"]
                name = str(message.headers[_NAMES[kind]])
                event = _event.decode(message.payload) if kind == "event" else None
            except (*self._not_events, *UNREADABLE) as error:
                raise VendorBroke("the vendor sent bytes that are not events") from error
            self._pending_bytes -= message.prelude.total_length
            if event is None:
                raise event_error(name, message.payload)
            yield from self._frames(name, event)
        if self._pending_bytes > MAX_FRAME_BYTES:
            raise VendorBroke("the vendor sent an event without end")

    def _frames(self, name: str, event: Event) -> Iterator[Frame]:
        place = event.content_block_index
        match name:
            case "messageStart":
                yield Kind.START, self._chunk(WrittenMessage(role="assistant"))
            case "contentBlockStart" if event.start is not None and event.start.tool_use is not None:
                yield from self._call(place, event.start.tool_use)
            case "contentBlockDelta" if event.delta is not None:
                yield from self._delta(place, event.delta)
            case "contentBlockStop" if place in self._silent:
                yield Kind.CONTENT, self._arguments(place, "{}")
            case "messageStop":
                self.finish_reason = finish_reason_of(event.stop_reason or "", calls=bool(self._calls))
                yield Kind.CONTENT, self._chunk(WrittenMessage(), self.finish_reason)
            case "metadata":
                self.model = model_of(event.trace)
                self.service_tier = tier_of(event.service_tier)
                self.usage = usage_of(event.usage)
                if self.usage is not None:
                    yield Kind.USAGE, usage_chunk(self._stamp, self.model, self.usage)
                if self.finished:
                    yield Kind.DONE, DONE

    def _call(self, place: int, use: ToolUse) -> Iterator[Frame]:
        if use.is_bedrocks_own:
            return
        if use.name == ANSWER_TOOL:
            self._answer = place
            return
        self._calls[place] = index = len(self._calls)
        self._silent.add(place)
        function = {"name": use.name, "arguments": ""}
        call = WrittenToolCall(index=index, id=use.tool_use_id, type="function", function=function)
        yield Kind.CONTENT, self._chunk(WrittenMessage(tool_calls=[call]))

    def _delta(self, place: int, delta: Delta) -> Iterator[Frame]:
        if delta.text:
            yield Kind.CONTENT, self._chunk(WrittenMessage(content=delta.text))
        elif delta.tool_use is not None:
            fragment = delta.tool_use.input
            if fragment and place == self._answer:
                yield Kind.CONTENT, self._chunk(WrittenMessage(content=fragment))
            elif fragment and place in self._calls:
                yield Kind.CONTENT, self._arguments(place, fragment)
        elif (reasoning := delta.reasoning_content) is not None:
            yield Kind.CONTENT, self._chunk(self._reasoned(place, reasoning))
        elif delta.citation is not None:
            annotation = annotation_of(delta.citation) | {"index": self._annotations}
            self._annotations += 1
            yield Kind.CONTENT, self._chunk(WrittenMessage(annotations=[annotation]))

    def _reasoned(self, place: int, reasoning: Reasoning) -> WrittenMessage:
        """`format` stands in a detail's first delta alone: SDKs join the texts of deltas."""
        begun = place in self._reasoning
        index = self._reasoning.setdefault(place, len(self._reasoning))
        written = detail(reasoning, index, self._stamp.model)
        if not begun:
            written["format"] = reasoning_format(self._stamp.model)
        return WrittenMessage(reasoning_content=reasoning.text or msgspec.UNSET, reasoning_details=[written])

    def _arguments(self, place: int, fragment: str) -> bytes:
        self._silent.discard(place)
        call = WrittenToolCall(index=self._calls[place], function={"arguments": fragment})
        return self._chunk(WrittenMessage(tool_calls=[call]))

    def _chunk(self, delta: WrittenMessage, finish_reason: str | None = None) -> bytes:
        return chunk(self._stamp, self.model, delta, finish_reason=finish_reason)

    def text_bytes(self, frame: bytes) -> int:
        return text_bytes(frame)
