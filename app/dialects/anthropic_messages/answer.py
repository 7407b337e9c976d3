"""Chat completions as Messages: whole answers, and the events of a stream.

The order of blocks is the same in both: thinking, text, calls; then what a vendor wants back and has no words for.
Source: Anthropic API reference, Messages and Streaming Messages. Its SDKs take a block's signature from the last delta
that has one, and want every block started, filled and stopped before the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from app.core import Usage
from app.dialects import completions
from app.dialects.anthropic_messages import thinking
from app.dialects.completions import (
    UNREADABLE,
    Completion,
    Said,
    ToolCall,
    WrappedStream,
    add,
    is_same_thought,
    joined,
    sealed,
)
from app.dialects.thoughts import Detail, is_hidden, text_of
from app.errors import VendorBroke
from app.providers.anthropic.relay import STOP, text_bytes
from app.providers.translator import Answer, Frame, Kind, Stamp, StreamReader, Translator
from app.sse import frame

Block = dict[str, Any]
_encode = msgspec.json.encode
_PING = frame(b'{"type":"ping"}', "ping")
_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
"""A reason that is not here is new, and reads `end_turn`. No vendor tells which stop word it met."""


# --- whole answers ----------------------------------------------------------------------------------------------------


def response(inner: Translator, body: bytes, stamp: Stamp) -> Answer:
    answer = inner.response(body, stamp)
    completion = completions.whole(answer.body)
    said = completion.choices[0].message if completion.choices else Said()
    blocks = [_thinking(detail) for detail in joined(said.details)]
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


def _thinking(detail: Detail) -> Block:
    if is_hidden(detail):
        return _redacted(detail)
    return {"type": "thinking", "thinking": text_of(detail), "signature": thinking.signature(sealed(detail))}


def _redacted(detail: Detail) -> Block:
    return {"type": "redacted_thinking", "data": thinking.data(detail)}


def _call(call: ToolCall, place: int, stamp: Stamp) -> Block:
    """The call without its input. A vendor that gives its calls no id gets one of ours."""
    own = f"toolu_{stamp.id.removeprefix('chatcmpl-')}_{place}"
    return {"type": "tool_use", "id": call.id or own, "name": call.function.name or "", "input": {}}


def _input(call: ToolCall) -> object:
    """What the call is for: an object. Raises VendorBroke for arguments that are none, cut ones say."""
    written = (call.function.arguments or "").strip()
    if written in ("", "null"):
        return {}
    try:
        return msgspec.json.decode(written, type=dict[str, msgspec.Raw])
    except UNREADABLE as error:
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


class MessagesEvents(WrappedStream):
    """Every chunk becomes events as it comes. What is true of the whole answer is told with the last ones."""

    keep_alive = _PING

    def __init__(self, inner: StreamReader, stamp: Stamp) -> None:
        super().__init__(inner, stamp)
        self._index = -1
        self._open: str | None = None
        """Type of the block that is open."""
        self._thought: Detail = {}
        self._call: ToolCall = ToolCall()
        self._calls = 0
        self._refusal = ""
        self._late: list[Detail] = []

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

    def _opening(self, chunk: Completion) -> Iterator[bytes]:
        message = _message(chunk.id, chunk.model or self.model, self._stamp)
        yield _event("message_start", message=message)

    def _grow(self, choice: completions.Choice) -> Iterator[bytes]:
        said = choice.delta or Said()
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
        if self._open in ("thinking", "redacted_thinking") and is_same_thought(self._thought, detail):
            add(self._thought, detail)
        elif is_hidden(detail):
            yield from self._stop()
            self._open, self._thought = "redacted_thinking", dict(detail)
        else:
            yield from self._start({"type": "thinking", "thinking": "", "signature": ""})
            self._thought = dict(detail)
        if text := text_of(detail):
            yield self._delta("thinking_delta", thinking=text)

    def _grow_call(self, call: ToolCall) -> Iterator[bytes]:
        if completions.begins(self._call if self._open == "tool_use" else None, call):
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
            yield self._delta("signature_delta", signature=thinking.signature(sealed(self._thought)))
        elif kind == "redacted_thinking":
            yield from self._start(_redacted(self._thought))
            self._open = None
        if kind is not None:
            yield _event("content_block_stop", index=self._index)

    def _ending(self) -> Iterator[bytes]:
        yield from self._begin(Completion())
        for detail in self._late:
            yield from self._stop()
            self._open, self._thought = "redacted_thinking", detail
        yield from self._stop()
        delta = _end(self.finish_reason, self._refusal, self._calls > 0)
        yield _event("message_delta", delta=delta, usage=usage_of(self.usage))


def _event(type: str, **members: object) -> bytes:
    return frame(_encode({"type": type, **members}), type)
