"""Chat completions as a dialect reads them that says the same in other words: whole answers, and chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
from msgspec import Raw, Struct

from app.core import Usage
from app.dialects import thoughts
from app.dialects.thoughts import Detail
from app.errors import VendorBroke
from app.providers.translator import Frame, Stamp, StreamReader
from app.sse import FrameSplitter, data_of

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Function(Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class ToolCall(Struct, frozen=True):
    index: int | None = None
    id: str | None = None
    function: Function = Function()


class Said(Struct, frozen=True):
    """A message, or a delta of one. Vendors call reasoning as text by either of two names."""

    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[Detail] | None = None
    tool_calls: list[ToolCall] | None = None
    annotations: list[dict[str, Any]] | None = None

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
        found = [detail for detail in self.reasoning_details or () if not is_late(detail)]
        if self.thought and not any(map(thoughts.text_of, found)):
            return [*found, {"text": self.thought}]
        return found

    @property
    def late(self) -> list[Detail]:
        return [detail for detail in self.reasoning_details or () if is_late(detail)]


class Logprobs(Struct, frozen=True):
    content: list[Raw] | None = None


class Choice(Struct, frozen=True):
    message: Said = Said()
    delta: Said | None = None
    logprobs: Logprobs | None = None

    @property
    def tokens(self) -> list[Raw]:
        """The text's tokens with their log probabilities, where they were asked for."""
        return [] if self.logprobs is None else self.logprobs.content or []


class Completion(Struct, frozen=True):
    """A `chat.completion`, or a chunk of one."""

    id: str | None = None
    model: str | None = None
    choices: list[Choice] | None = None


_completion = msgspec.json.Decoder(Completion)


def whole(body: bytes) -> Completion:
    """Raises VendorBroke."""
    try:
        return _completion.decode(body)
    except UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not of its shape") from error


def chunk(data: bytes) -> Completion:
    """Raises VendorBroke."""
    try:
        return _completion.decode(data)
    except UNREADABLE as error:
        raise VendorBroke("the vendor sent an event that is not of its shape") from error


def is_late(detail: Detail) -> bool:
    """What another vendor sealed has nothing to show, and stands last: apps look for text in the first block."""
    return thoughts.is_hidden(detail) and not thoughts.is_anthropic_s(detail)


def joined(details: list[Detail]) -> list[Detail]:
    """Details with one index are parts of one thought."""
    joined: list[Detail] = []
    for detail in details:
        if joined and is_same_thought(joined[-1], detail):
            add(joined[-1], detail)
        else:
            joined.append(dict(detail))
    return joined


def is_same_thought(one: Detail, other: Detail) -> bool:
    return thoughts.is_hidden(one) == thoughts.is_hidden(other) and one.get("index") == other.get("index")


def add(to: Detail, part: Detail) -> None:
    """Adds a part of a thought: its words and sealed data are added to those before, all else is told once."""
    for name, value in part.items():
        if name in ("text", "summary", "signature", "data") and isinstance(value, str):
            to[name] = (to.get(name) or "") + value
        elif value is not None:
            to[name] = value


def sealed(detail: Detail) -> Detail:
    """Nothing, where the vendor wants nothing back."""
    return {} if detail.keys() <= {"text", "index"} else detail


def begins(open_call: ToolCall | None, delta: ToolCall) -> bool:
    """Whether a delta begins a call. Raises VendorBroke where it goes on with one that is done."""
    if (
        open_call is not None
        and delta.id in (None, "", open_call.id)
        and (delta.index is None or delta.index == open_call.index)
    ):
        return False
    if not (delta.id or delta.function.name):
        raise VendorBroke("the vendor went on with a call after another part of its answer began")
    return True


class WrappedStream(StreamReader):
    """A reader that says in other words what `inner` reads. What it tells the ledger is what `inner` tells."""

    keep_alive: ClassVar[bytes]
    """What a comment becomes, by which a vendor keeps the connection alive."""

    def __init__(self, inner: StreamReader, stamp: Stamp) -> None:
        self._inner = inner
        self._stamp = stamp
        self._begun = False

    @property
    def usage(self) -> Usage | None:  # type: ignore[override]
        return self._inner.usage

    @property
    def prompt(self) -> Usage | None:  # type: ignore[override]
        return self._inner.prompt

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

    def _told(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        raise NotImplementedError

    def _events(self, frames: bytes) -> Iterator[bytes]:
        for one in FrameSplitter().feed(frames):
            data = data_of(one)
            if not data:
                yield from [self.keep_alive] if self._begun else []
                continue
            told = chunk(data)
            if told.choices:
                yield from self._begin(told)
                yield from self._grow(told.choices[0])

    def _begin(self, chunk: Completion) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            yield from self._opening(chunk)

    def _opening(self, chunk: Completion) -> Iterator[bytes]:
        """The events before all others."""
        raise NotImplementedError

    def _grow(self, choice: Choice) -> Iterator[bytes]:
        """What a part of the answer becomes."""
        raise NotImplementedError
