"""The faults that a vendor can be told to have, and the list of those it has now."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

Milliseconds = Annotated[float, Meta(ge=0, le=3_600_000)]
Count = Annotated[int, Meta(ge=0)]


class Fault(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Fields that every fault has."""

    times: Annotated[int, Meta(ge=1)] | None = None
    """The fault ends after this many requests; without it, when it is deleted."""
    probability: Annotated[float, Meta(gt=0, le=1)] = 1.0
    model: str | None = None
    """Only requests for this model, as the vendor names it."""
    latency_ms: Milliseconds = 0
    """Waited before the first byte, and before the fault itself where there is none."""
    chunk_ms: Milliseconds | None = None
    """Waited between the chunks of a stream; replaces what the prompt asks for."""


class Latency(Fault, frozen=True, kw_only=True, tag="latency"):
    """A good answer, late: `latency_ms` before the first byte, `chunk_ms` between chunks."""


class Slow(Fault, frozen=True, kw_only=True, tag="slow"):
    """A good stream, slowly: 1 s between chunks unless `chunk_ms` says otherwise."""

    chunk_ms: Milliseconds | None = 1_000


class Throttle(Fault, frozen=True, kw_only=True, tag="throttle"):
    """429 with `retry-after` (left out when null) and, when given, `retry-after-ms`."""

    retry_after_seconds: Annotated[float, Meta(ge=0)] | None = msgspec.field(name="retry_after", default=1)
    retry_after_ms: Annotated[int, Meta(ge=0)] | None = None
    code: str = "rate_limit_exceeded"
    """Or `insufficient_quota`: an account without money, which waiting does not cure."""


class Status(Fault, frozen=True, kw_only=True, tag="status"):
    """Any 4xx or 5xx, in the vendor's error shape or, with `body`, as these very bytes."""

    status: Annotated[int, Meta(ge=400, le=599)]
    message: str = "The simulator was told to fail this request."
    type: str | None = None
    code: str | None = None
    body: str | None = None
    content_type: str = "text/html"
    """Of `body`."""


class Reset(Fault, frozen=True, kw_only=True, tag="reset"):
    """TCP reset without an answer."""


class Hang(Fault, frozen=True, kw_only=True, tag="hang"):
    """Never an answer; the connection stays until the client leaves."""


class _Midway(Fault, frozen=True, kw_only=True):
    """Something happens after `after_chunks` data events of a stream. A unary answer breaks halfway its body."""

    after_chunks: Count = 3


class Stall(_Midway, frozen=True, kw_only=True, tag="stall"):
    """Silence in the middle of the answer, until the client leaves."""


class Hold(_Midway, frozen=True, kw_only=True, tag="hold"):
    """Silence in the middle of a stream until the vendor's faults are replaced or deleted; then the rest of it."""


class Cut(_Midway, frozen=True, kw_only=True, tag="cut"):
    """The connection closes in the middle of the answer, without the terminating chunk."""


class Malformed(_Midway, frozen=True, kw_only=True, tag="malformed"):
    """A data line that is not JSON, then the rest of the stream. A unary body is not JSON at all."""


class ErrorEvent(_Midway, frozen=True, kw_only=True, tag="error_event"):
    """200, then the vendor's error event in the stream, which ends there. A unary body is an error under 200."""

    message: str = "The simulator was told to fail in the middle of this stream."
    code: str | None = None


class Empty(Fault, frozen=True, kw_only=True, tag="empty"):
    """200 without content: a stream of only `[DONE]`, or of nothing with `done` false. A unary body is empty."""

    done: bool = True


class Wrong(Fault, frozen=True, kw_only=True, tag="wrong"):
    """A good answer to another question: the prompt's `Reply with exactly: ...` is not heeded."""


AnyFault = (
    Latency | Slow | Throttle | Status | Reset | Hang | Stall | Hold | Cut | Malformed | ErrorEvent | Empty | Wrong
)  # fmt: skip


class BadFault(Exception):
    """The fault document is wrong; the text is a sentence for who sent it."""


def decode(document: bytes) -> list[Any]:
    """Faults from JSON: one document or a list of them. Raises `BadFault`."""
    many = document.lstrip()[:1] == b"["
    try:
        faults = msgspec.json.decode(document, type=list[AnyFault] if many else AnyFault)
    except msgspec.DecodeError as error:
        raise BadFault(f"The fault cannot be read: {error}.") from None
    for fault in faults if many else [faults]:
        if isinstance(fault, Latency) and not fault.latency_ms and fault.chunk_ms is None:
            raise BadFault("The fault latency needs `latency_ms` or `chunk_ms`.")
    return list(faults) if many else [faults]


class Faults:
    """The faults in force for one vendor. The first in the list that fits a request is the one it meets."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self._active: list[list[Any]] = []  # pairs of fault and times left
        self.replaced = asyncio.Event()
        """Set when those in force now no longer are; what comes then has an event of its own."""

    def put(self, faults: list[Any]) -> None:
        """Replace what was in force."""
        self.replaced.set()
        self.replaced = asyncio.Event()
        self._active = [[fault, fault.times] for fault in faults]

    def take(self, model: str) -> Any | None:
        """The fault that this request meets, None for a good answer."""
        for entry in self._active:
            fault, left = entry
            if fault.model is not None and fault.model != model:
                continue
            if fault.probability < 1 and self._chance() >= fault.probability:
                continue
            if left is not None:
                entry[1] = left - 1
                if entry[1] == 0:
                    self._active.remove(entry)
            return fault
        return None

    def listing(self) -> list[dict[str, Any]]:
        """What is in force, with `times` counted down."""
        return [msgspec.to_builtins(fault) | ({} if left is None else {"times": left}) for fault, left in self._active]
