"""Chat completions as Messages: whole answers, and the events of a stream.

The order of blocks is the same in both: thinking, text, calls; then what a vendor wants back and has no words for.
Source: Anthropic API reference, Messages and Streaming Messages. Its SDKs take a block's signature from the last delta
that has one, and want every block started, filled and stopped before the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from app.core import Usage
from app.dialects.anthropic_messages import thoughts
from app.dialects.anthropic_messages.thoughts import Detail
from app.errors import VendorBroke
from app.providers.anthropic.relay import STOP, text_bytes
from app.providers.translator import Answer, Frame, Kind, Stamp, StreamReader, Translator
from app.sse import FrameSplitter, data_of, frame

Block = dict[str, Any]
_encode = msgspec.json.encode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_PING = frame(b'{"type":"ping"}', "ping")
_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
"""A reason that is not here is new, and reads `end_turn`. No vendor tells which stop word it met."""


class _Function(Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(Struct, frozen=True):
    index: int | None = None
    id: str | None = None
    function: _Function = _Function()


class _Said(Struct, frozen=True):
    """A message, or a delta of one. Vendors call reasoning as text by either of two names."""

    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[Detail] | None = None
    tool_calls: list[_ToolCall] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):  # typed parts, which some vendors write
            return "".join(text for part in self.content if isinstance(text := part.get("text"), str))
        return self.content or ""

    @property
    def thought(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    @property
    def details(self) -> list[Detail]:
        """Details with words, or signed by Anthropic; without any, the reasoning that came as mere text."""
        found = [detail for detail in self.reasoning_details or () if not _is_late(detail)]
        if self.thought and not any(map(thoughts.text_of, found)):
            return [*found, {"text": self.thought}]
        return found

    @property
    def late(self) -> list[Detail]:
        return [detail for detail in self.reasoning_details or () if _is_late(detail)]


class _Choice(Struct, frozen=True):
    message: _Said = _Said()
    delta: _Said | None = None


class _Completion(Struct, frozen=True):
    """A `chat.completion`, or a chunk of one."""

    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None


_completion = msgspec.json.Decoder(_Completion)


def _is_late(detail: Detail) -> bool:
    """What another vendor sealed has nothing to show, and stands last: apps look for text in the first block."""
    return thoughts.is_hidden(detail) and not thoughts.is_anthropic_s(detail)


# --- whole answers ----------------------------------------------------------------------------------------------------


def response(inner: Translator, body: bytes, stamp: Stamp) -> Answer:
    answer = inner.response(body, stamp)
    try:
        completion = _completion.decode(answer.body)
    except _UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not of its shape") from error
    said = completion.choices[0].message if completion.choices else _Said()
    blocks = [_thinking(detail) for detail in _joined(said.details)]
    if said.text:
        blocks.append({"type": "text", "text": said.text})
    blocks += [_call(call, place, stamp) | {"input": _input(call)} for place, call in enumerate(said.tool_calls or ())]
    blocks += [_redacted(detail) for detail in said.late]
    message = _message(completion.id, answer.model, stamp) | {
        "content": blocks,
        "usage": usage_of(answer.usage),
        **_end(answer.finish_reason, said.refusal, bool(said.tool_calls)),
    }
    return msgspec.structs.replace(answer, body=_encode(message))


def _joined(details: list[Detail]) -> list[Detail]:
    """Details with one index are parts of one thought."""
    joined: list[Detail] = []
    for detail in details:
        if joined and _is_same_thought(joined[-1], detail):
            _add(joined[-1], detail)
        else:
            joined.append(dict(detail))
    return joined


def _is_same_thought(one: Detail, other: Detail) -> bool:
    return thoughts.is_hidden(one) == thoughts.is_hidden(other) and one.get("index") == other.get("index")


def _add(to: Detail, part: Detail) -> None:
    """Adds a part of a thought: its words and sealed data are added to those before, all else is told once."""
    for name, value in part.items():
        if name in ("text", "summary", "signature", "data") and isinstance(value, str):
            to[name] = (to.get(name) or "") + value
        elif value is not None:
            to[name] = value


def _thinking(detail: Detail) -> Block:
    if thoughts.is_hidden(detail):
        return _redacted(detail)
    return {"type": "thinking", "thinking": thoughts.text_of(detail), "signature": thoughts.signature(_sealed(detail))}


def _sealed(detail: Detail) -> Detail:
    """Nothing, where the vendor wants nothing back."""
    return {} if detail.keys() <= {"text", "index"} else detail


def _redacted(detail: Detail) -> Block:
    return {"type": "redacted_thinking", "data": thoughts.data(detail)}


def _call(call: _ToolCall, place: int, stamp: Stamp) -> Block:
    """The call without its input. A vendor that gives its calls no id gets one of ours."""
    own = f"toolu_{stamp.id.removeprefix('chatcmpl-')}_{place}"
    return {"type": "tool_use", "id": call.id or own, "name": call.function.name or "", "input": {}}


def _input(call: _ToolCall) -> object:
    """What the call is for: an object. Raises VendorBroke for arguments that are none, cut ones say."""
    written = (call.function.arguments or "").strip()
    if written in ("", "null"):
        return {}
    try:
        return msgspec.json.decode(written, type=dict[str, msgspec.Raw])
    except _UNREADABLE as error:
        raise VendorBroke("the arguments of the model's call are not a JSON object") from error


def _message(id: str | None, model: str | None, stamp: Stamp) -> Block:
    return {
        "id": "msg_" + (id or stamp.id).removeprefix("chatcmpl-").removeprefix("msg_"),
        "type": "message",
        "role": "assistant",
        "model": model or stamp.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": usage_of(None),
    }


def _end(finish_reason: str | None, refusal: str | None, called: bool) -> Block:
    """Why the answer stopped; a vendor may say `stop` where it called tools, or refuse in so many words."""
    reason = _STOP_REASONS.get(finish_reason or "", "end_turn")
    if refusal:
        reason = "refusal"
    elif called and reason == "end_turn":
        reason = "tool_use"
    details = {"type": "refusal", "category": None, "explanation": refusal or None} if reason == "refusal" else None
    return {"stop_reason": reason, "stop_sequence": None, "stop_details": details}


def usage_of(usage: Usage | None) -> Block:
    """Anthropic's figures: what the cache gave or took stands beside the input. Zeros where no vendor told any."""
    usage = usage or Usage()
    written = usage.cache_write + usage.cache_write_1h
    told: Block = {
        "input_tokens": usage.total_input - usage.cache_read - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": usage.cache_read,
        "output_tokens": usage.total_output,
    }
    return told | ({"output_tokens_details": {"thinking_tokens": usage.reasoning}} if usage.reasoning else {})


# --- streams ----------------------------------------------------------------------------------------------------------


class MessagesEvents(StreamReader):
    """Every chunk becomes events as it comes. What is true of the whole answer is told with the last ones."""

    def __init__(self, inner: StreamReader, stamp: Stamp) -> None:
        self._inner = inner
        self._stamp = stamp
        self._begun = False
        self._index = -1
        self._open: str | None = None
        """Type of the block that is open."""
        self._thought: Detail = {}
        self._call: _ToolCall = _ToolCall()
        self._calls = 0
        self._refusal = ""
        self._late: list[Detail] = []

    @property
    def usage(self) -> Usage | None:  # type: ignore[override]
        return self._inner.usage

    @property
    def model(self) -> str | None:  # type: ignore[override]
        return self._inner.model

    @property
    def finish_reason(self) -> str | None:  # type: ignore[override]
        return self._inner.finish_reason

    @property
    def service_tier(self) -> str | None:  # type: ignore[override]
        return self._inner.service_tier

    @property
    def request_id(self) -> str | None:  # type: ignore[override]
        return self._inner.request_id

    @property
    def finished(self) -> bool:
        return self._inner.finished

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        return self._told(self._inner.feed(chunk))

    def end(self) -> Iterator[Frame]:
        return self._told(self._inner.end())

    def text_bytes(self, frame: bytes) -> int:
        return text_bytes(frame)

    def _told(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for kind, data in frames:
            if kind is Kind.DONE:
                yield Kind.CONTENT, b"".join(self._ending())
                yield Kind.DONE, STOP
                return
            events = b"".join(self._events(data))
            if events:
                yield Kind.START if self._index < 0 else Kind.CONTENT, events

    def _events(self, frames: bytes) -> Iterator[bytes]:
        for one in FrameSplitter().feed(frames):
            data = data_of(one)
            if not data:  # a comment, by which a vendor keeps the connection alive
                yield from [_PING] if self._begun else []
                continue
            try:
                chunk = _completion.decode(data)
            except _UNREADABLE as error:
                raise VendorBroke("the vendor sent an event that is not of its shape") from error
            if chunk.choices:
                yield from self._begin(chunk)
                yield from self._grow(chunk.choices[0].delta or _Said())

    def _begin(self, chunk: _Completion) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            message = _message(chunk.id, chunk.model or self.model, self._stamp)
            yield _event("message_start", message=message)

    def _grow(self, said: _Said) -> Iterator[bytes]:
        for detail in said.details:
            yield from self._think(detail)
        if said.text:
            if self._open != "text":
                yield from self._start({"type": "text", "text": ""})
            yield self._delta("text_delta", text=said.text)
        for call in said.tool_calls or ():
            yield from self._grow_call(call)
        self._refusal += said.refusal or ""
        self._late += said.late

    def _think(self, detail: Detail) -> Iterator[bytes]:
        """A thought is open until another begins: its signature is told with its end, its sealed data is all it has."""
        if self._open in ("thinking", "redacted_thinking") and _is_same_thought(self._thought, detail):
            _add(self._thought, detail)
        elif thoughts.is_hidden(detail):
            yield from self._stop()
            self._open, self._thought = "redacted_thinking", dict(detail)
        else:
            yield from self._start({"type": "thinking", "thinking": "", "signature": ""})
            self._thought = dict(detail)
        if text := thoughts.text_of(detail):
            yield self._delta("thinking_delta", thinking=text)

    def _grow_call(self, call: _ToolCall) -> Iterator[bytes]:
        new = bool(call.id and call.id != self._call.id) or (call.index is not None and call.index != self._call.index)
        if self._open != "tool_use" or new:
            if not (call.id or call.function.name):
                raise VendorBroke("the vendor went on with a call after the next block began")
            self._call = call
            yield from self._start(_call(call, self._calls, self._stamp))
            self._calls += 1
        if call.function.arguments:
            yield self._delta("input_json_delta", partial_json=call.function.arguments)

    def _start(self, block: Block) -> Iterator[bytes]:
        yield from self._stop()
        self._index += 1
        self._open = block["type"]
        yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, type: str, **said: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": type, **said})

    def _stop(self) -> Iterator[bytes]:
        kind, self._open = self._open, None
        if kind == "thinking":
            yield self._delta("signature_delta", signature=thoughts.signature(_sealed(self._thought)))
        elif kind == "redacted_thinking":
            yield from self._start(_redacted(self._thought))
            self._open = None
        if kind is not None:
            yield _event("content_block_stop", index=self._index)

    def _ending(self) -> Iterator[bytes]:
        yield from self._begin(_Completion())
        for detail in self._late:
            yield from self._stop()
            self._open, self._thought = "redacted_thinking", detail
        yield from self._stop()
        delta = _end(self.finish_reason, self._refusal, self._calls > 0)
        yield _event("message_delta", delta=delta, usage=usage_of(self.usage))


def _event(type: str, **members: object) -> bytes:
    return frame(_encode({"type": type, **members}), type)
