"""Anthropic's answers, whole and streamed, as chat completions; its usage; its errors.

Blocks of tools that Anthropic runs itself (web search and the like) have no place in a chat completion; a request in
that form cannot ask for them.
Source: Anthropic API reference, Messages, Streaming Messages and Errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime

import msgspec
from msgspec import Raw

from app.core import Usage
from app.errors import VendorBroke, VendorError, VendorFailed, VendorMisconfigured, VendorRefused, VendorThrottled
from app.providers import openai
from app.providers.anthropic.request import REASONING_FORMAT
from app.providers.anthropic.wire import AnswerBlock, ErrorBody, Event, EventDelta, Message, MessagesUsage
from app.providers.chat_shape import (
    WrittenChoice,
    WrittenMessage,
    WrittenToolCall,
    chunk,
    completion,
    usage_chunk,
)
from app.providers.translator import Answer, Frame, Kind, Stamp, StreamReader, split
from app.sse import DONE, FrameSplitter, data_of

_message = msgspec.json.Decoder(Message)
_event = msgspec.json.Decoder(Event)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
"""A reason that is not here is new, and reads `stop`."""


# --- usage ------------------------------------------------------------------------------------------------------------


def usage_of(usage: MessagesUsage | None) -> Usage | None:
    """Disjoint classes. What the cache gave and took stands beside the input, what was thought inside the output."""
    if usage is None or usage.input_tokens is None or usage.output_tokens is None:
        return None
    fresh, made = usage.input_tokens, usage.output_tokens
    read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
    if not all(0 <= tokens <= openai.MAX_TOKENS for tokens in (fresh, made, read, written)):
        return None
    details, lives = usage.output_tokens_details, usage.cache_creation
    thought = min(max(details.thinking_tokens or 0, 0), made) if details else 0
    hour = min(max(lives.ephemeral_1h_input_tokens or 0, 0), written) if lives else 0
    return Usage(
        input=fresh,
        cache_read=read,
        cache_write=written - hour,
        cache_write_1h=hour,
        output=made - thought,
        reasoning=thought,
    )


def updated(first: MessagesUsage | None, last: MessagesUsage | None) -> MessagesUsage | None:
    """The figures of a stream: those of its start where its end does not repeat them."""
    if first is None or last is None:
        return last or first
    told = {name: value for name, value in msgspec.structs.asdict(last).items() if value is not None}
    return msgspec.structs.replace(first, **told)


# --- whole answers ----------------------------------------------------------------------------------------------------


def response(body: bytes, stamp: Stamp) -> Answer:
    message = _read(body)
    told = _told(message, body)
    choice = WrittenChoice(0, _written(message), told.finish_reason or "stop")
    if message.id:
        stamp = msgspec.structs.replace(stamp, id=message.id)
    return msgspec.structs.replace(told, body=completion(stamp, message.model, [choice], told.usage))


def relayed(body: bytes, stamp: Stamp) -> Answer:
    """The answer as it came, for clients that speak Messages themselves."""
    return _told(_read(body), body)


def _read(body: bytes) -> Message:
    try:
        answer = _message.decode(body)
    except _UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not a message") from error
    if answer.error is not None:
        raise error_in_answer(answer.error)
    if answer.content is None or answer.stop_reason is None:
        raise VendorBroke("the vendor's answer has no content or no end")
    return answer


def _told(answer: Message, body: bytes) -> Answer:
    """What a message tells the ledger."""
    usage = usage_of(answer.usage)
    return Answer(
        body=body,
        model=answer.model,
        usage=usage,
        finish_reason=FINISH_REASONS.get(answer.stop_reason or "", "stop"),
        text_bytes=0 if usage else sum(map(_text_bytes, answer.content or ())),
        service_tier=answer.usage.service_tier if answer.usage else None,
    )


def _written(answer: Message) -> WrittenMessage:
    blocks = answer.content or []
    texts = [block.text or "" for block in blocks if block.type == "text"]
    thoughts = [block for block in blocks if block.type in ("thinking", "redacted_thinking")]
    calls = [
        WrittenToolCall(
            id=block.id,
            type="function",
            function={"name": block.name or "", "arguments": _arguments(block.input)},
        )
        for block in blocks
        if block.type == "tool_use"
    ]
    details = [_detail(block, place) for place, block in enumerate(thoughts)]
    thought = "".join(block.thinking or "" for block in thoughts)
    return WrittenMessage(
        role="assistant",
        content="".join(texts) if texts else None,
        refusal=_refusal(answer),
        reasoning_content=thought or msgspec.UNSET,
        reasoning_details=details or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


def _text_bytes(block: AnswerBlock) -> int:
    return len((block.text or block.thinking or "").encode()) + len(bytes(block.input))


def _arguments(written: Raw) -> str:
    try:
        return bytes(written).decode() or "{}"
    except UnicodeDecodeError as error:
        raise VendorBroke("the vendor's tool call is not UTF-8") from error


def _detail(block: AnswerBlock, place: int) -> dict[str, object]:
    """A thought as it goes back to the vendor, unchanged."""
    if block.type == "redacted_thinking":
        return {"type": "reasoning.encrypted", "data": block.data or "", "format": REASONING_FORMAT, "index": place}
    detail = {"type": "reasoning.text", "text": block.thinking or "", "format": REASONING_FORMAT, "index": place}
    return detail | ({"signature": block.signature} if block.signature else {})


def _refusal(of: Message | EventDelta) -> str | None:
    return of.stop_details.explanation if of.stop_details and of.stop_reason == "refusal" else None


# --- streams ----------------------------------------------------------------------------------------------------------


class MessagesStream(StreamReader):
    """Every event becomes a chunk as it comes; the end and the usage are told with the last event."""

    __slots__ = (
        "_calls", "_last", "_open", "_splitter", "_stamp", "_thoughts",
        "finish_reason", "model", "prompt", "service_tier", "usage",
    )  # fmt: skip

    def __init__(self, stamp: Stamp) -> None:
        self.usage = None
        self.prompt = None
        self.model = None
        self.finish_reason = None
        self.service_tier = None
        self._stamp = stamp
        self._splitter = FrameSplitter()
        self._last = Message()
        self._thoughts = self._calls = 0
        self._open: dict[int | None, tuple[int, Raw | None]] = {}
        """Open blocks of thoughts and calls: their place, and the arguments of a call that has not told any."""

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        for frame in split(self._splitter, chunk):
            data = data_of(frame)
            if not data:
                continue
            try:
                event = _event.decode(data)
            except _UNREADABLE as error:
                raise VendorBroke("the vendor sent an event that cannot be decoded") from error
            yield from self._read(event)

    def _read(self, event: Event) -> Iterator[Frame]:
        match event.type:
            case "message_start" if event.message is not None:
                yield self._start(event.message)
            case "content_block_start" if event.content_block is not None:
                yield from self._open_block(event.index, event.content_block)
            case "content_block_delta" if event.delta is not None:
                yield from self._delta(event.index, event.delta)
            case "content_block_stop":
                yield from self._close_block(event.index)
            case "message_delta" if event.delta is not None:
                self._note_end(event.delta, event.usage)
            case "message_stop":
                yield from self.end()
            case "error":
                raise error_in_answer(event.error or ErrorBody())

    def _start(self, message: Message) -> Frame:
        self._last = message
        self.model = message.model
        self.service_tier = message.usage.service_tier if message.usage else None
        if (told := usage_of(message.usage)) is not None:
            self.prompt = msgspec.structs.replace(told, output=0, reasoning=0)
        if message.id:
            self._stamp = msgspec.structs.replace(self._stamp, id=message.id)
        return Kind.START, chunk(self._stamp, self.model, WrittenMessage(role="assistant"))

    def _open_block(self, index: int | None, block: AnswerBlock) -> Iterator[Frame]:
        if block.type == "text" and block.text:
            yield self._content(WrittenMessage(content=block.text))
        elif block.type in ("thinking", "redacted_thinking"):
            self._open[index] = (self._thoughts, None)
            delta = WrittenMessage(reasoning_details=[_detail(block, self._thoughts)])
            if block.thinking:
                delta.reasoning_content = block.thinking
            self._thoughts += 1
            yield self._content(delta)
        elif block.type == "tool_use":
            self._open[index] = (self._calls, block.input)
            function = {"name": block.name or "", "arguments": ""}
            call = WrittenToolCall(self._calls, block.id, "function", function)
            self._calls += 1
            yield self._content(WrittenMessage(tool_calls=[call]))

    def _delta(self, index: int | None, delta: EventDelta) -> Iterator[Frame]:
        place, _ = self._open.get(index, (None, None))
        if delta.text:
            yield self._content(WrittenMessage(content=delta.text))
        elif place is None:
            return  # a block of a tool that the vendor runs
        elif delta.thinking:
            detail = {"type": "reasoning.text", "text": delta.thinking, "index": place}
            yield self._content(WrittenMessage(reasoning_content=delta.thinking, reasoning_details=[detail]))
        elif delta.signature:
            detail = {"type": "reasoning.text", "signature": delta.signature, "index": place}
            yield self._content(WrittenMessage(reasoning_details=[detail]))
        elif delta.partial_json:
            self._open[index] = (place, None)
            yield self._call_arguments(place, delta.partial_json)

    def _close_block(self, index: int | None) -> Iterator[Frame]:
        place, untold = self._open.pop(index, (0, None))
        if untold is not None:
            yield self._call_arguments(place, _arguments(untold))

    def _note_end(self, delta: EventDelta, usage: MessagesUsage | None) -> None:
        self._last = msgspec.structs.replace(
            self._last,
            stop_reason=delta.stop_reason,
            stop_details=delta.stop_details,
            usage=updated(self._last.usage, usage),
        )
        self.usage = usage_of(self._last.usage)
        if delta.stop_reason is not None:
            self.finish_reason = FINISH_REASONS.get(delta.stop_reason, "stop")

    def end(self) -> Iterator[Frame]:
        if self.finish_reason is None:
            raise VendorBroke("the vendor ended its stream without a reason")
        if refusal := _refusal(self._last):
            yield self._content(WrittenMessage(refusal=refusal))
        yield Kind.CONTENT, chunk(self._stamp, self.model, WrittenMessage(), finish_reason=self.finish_reason)
        if self.usage is not None:
            yield Kind.USAGE, usage_chunk(self._stamp, self.model, self.usage)
        yield Kind.DONE, DONE

    def _content(self, delta: WrittenMessage) -> Frame:
        return Kind.CONTENT, chunk(self._stamp, self.model, delta)

    def _call_arguments(self, place: int, text: str) -> Frame:
        return self._content(WrittenMessage(tool_calls=[WrittenToolCall(place, function={"arguments": text})]))

    def text_bytes(self, frame: bytes) -> int:
        return openai.text_bytes(frame)


# --- errors -----------------------------------------------------------------------------------------------------------

_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_TOO_LONG = re.compile(r"prompt is too long: \d+ tokens > \d+ maximum")
"""The vendor's whole sentence for a context that is full: it has no code for it, and apps act on OpenAI's."""
_LIMITS = ("requests", "tokens", "input-tokens", "output-tokens")


def error(status: int, headers: Mapping[str, str], body: bytes) -> VendorError:
    """Status decides first, then the vendor's type of error."""
    try:
        written = _message.decode(body).error or ErrorBody()
    except _UNREADABLE:
        written = ErrorBody()
    return _error_by_status(status, written, _wait_seconds(headers))


def error_in_answer(written: ErrorBody) -> VendorError:
    """An error under a 200: the event that ends a stream."""
    return _error_by_status(_STATUSES.get(written.type or "", 500), written, None)


def _error_by_status(status: int, written: ErrorBody, wait_seconds: float | None) -> VendorError:
    facts = {"vendor_status": status, "vendor_code": written.type}
    if status in (401, 402, 403, 404):
        return VendorMisconfigured(f"the vendor answered {status}", **facts)
    if status == 429:
        return VendorThrottled("the vendor throttled", retry_after_seconds=wait_seconds, **facts)
    if status in (408, 409) or status >= 500 or status < 400:
        return VendorFailed(f"the vendor answered {status}", retry_after_seconds=wait_seconds, **facts)
    message = written.message or f"The vendor refused the request with status {status}."
    code = "context_length_exceeded" if _TOO_LONG.fullmatch(message) else None
    if status == 413:
        code = "request_too_large"
    return VendorRefused(message, kind=written.type, vendor_status=status, vendor_code=code)


def _wait_seconds(headers: Mapping[str, str]) -> float | None:
    """`Retry-After`; where it is missing, the time until the limits that are used up are full again.

    Those are told as RFC 3339 times; the answer's own `Date` says what they are counted from.
    """
    told = openai.retry_after(headers)
    if told is not None:
        return told
    try:
        now = datetime.strptime(headers["date"], "%a, %d %b %Y %H:%M:%S %Z")
        resets = [
            datetime.strptime(headers[f"anthropic-ratelimit-{name}-reset"], "%Y-%m-%dT%H:%M:%SZ")
            for name in _LIMITS
            if headers.get(f"anthropic-ratelimit-{name}-remaining") == "0"
        ]
    except (KeyError, ValueError):
        return None
    waits = [(reset - now).total_seconds() for reset in resets]
    return max((wait for wait in waits if 0 <= wait < 86_400), default=None)
