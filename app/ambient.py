"""Clock, chance and ids: the only home of time, random, uuid and secrets. Tests pass their own."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

_KEY_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_UUID_7, _UUID_CHANCE = 0x7000_8000_0000_0000_0000, 0x0FFF_3FFF_FFFF_FFFF_FFFF
"""Of a UUID's last 80 bits: its version and variant, and what is left to chance."""

TIMER_SECONDS = 0.005
"""The event loop's timers go in steps of a millisecond, and may fire that much early."""
NEVER = float("inf")


class Ambient:
    """The world outside the process, as far as it is not I/O."""

    now = staticmethod(time.time)
    """Unix time in seconds."""
    monotonic = staticmethod(time.perf_counter)
    """Seconds of a clock that never jumps, for durations."""
    random = staticmethod(random.random)
    """Uniform in [0, 1)."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def event_id(self, now: float) -> str:
        """A UUIDv7 (RFC 9562): 48 bits of unix milliseconds, then chance; sorts by time."""
        bits = int(now * 1000) << 80 | _UUID_7 | random.getrandbits(80) & _UUID_CHANCE
        digits = bits.to_bytes(16, "big").hex()
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

    def trace_id(self) -> str:
        """128 random bits, never zero, as 32 hexadecimal digits (W3C trace context)."""
        return (random.getrandbits(128) or 1).to_bytes(16, "big").hex()

    def key_id(self) -> str:
        """The public part of a service key: 12 characters of [a-z0-9]."""
        return "".join(secrets.choice(_KEY_ALPHABET) for _ in range(12))

    def key_secret(self) -> str:
        """The secret part of a service key: 32 random bytes as 43 url-safe characters."""
        return secrets.token_urlsafe(32)


class Patience:
    """How long a task waits, as a call goes from one wait to the next, with one timer for all of them.

    `asyncio.timeout` makes and drops a timer for each wait, which costs as much as reading a chunk of a stream. Here
    setting a limit is an assignment; the timer, when it fires too early, is set again. It outlives the call, so that
    the next one on the same connection need not set it.

        patience.limit(seconds)
        try:
            await …
        except CancelledError:
            if not patience.over():
                raise
            …  # the limit passed
        finally:
            patience.lift()
    """

    __slots__ = ("_last", "_loop", "_on_last", "_over", "_task", "_timer", "_timer_at", "_until")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """For the current task; with a `loop`, for that of `begin`."""
        self._loop = loop or asyncio.get_running_loop()
        self._task = asyncio.current_task() if loop is None else None
        self._until = self._last = NEVER
        self._on_last: Callable[[], object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER
        self._over = False

    def begin(self, task: asyncio.Task[None]) -> None:
        """From now on it is about this task."""
        self._task = task
        self._over = False

    def limit(self, seconds: float) -> None:
        """From now on the task is cancelled after `seconds`, until the next `limit` or `lift`."""
        self._until = until = self._loop.time() + seconds
        if until < self._timer_at:
            self._set(until)

    def lift(self) -> None:
        self._until = NEVER

    def over(self) -> bool:
        """Whether the cancellation that the task has just met was the limit's alone; it is taken back then."""
        over, self._over = self._over, False
        return over and self._task.uncancel() == 0

    def last(self, seconds: float, call: Callable[[], object]) -> None:
        """Whatever the limits say: after `seconds` this is called, once."""
        self._last, self._on_last = self._loop.time() + seconds, call
        if self._last < self._timer_at:
            self._set(self._last)

    def end(self) -> None:
        """Nothing is waited for any more."""
        self._until = self._last = NEVER
        self._task = self._on_last = None

    def close(self) -> None:
        """Nor will there be a next call."""
        self.end()
        if self._timer is not None:
            self._timer.cancel()

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._fire)

    def _fire(self) -> None:
        self._timer, self._timer_at = None, NEVER
        now = self._loop.time() + TIMER_SECONDS
        if self._last <= now:
            self._last = NEVER
            self._on_last()
        if self._until <= now:
            self._until = NEVER
            self._over = True
            self._task.cancel()
        soonest = min(self._until, self._last)
        if soonest < NEVER:
            self._set(soonest)


_second = (-1_000_000, "")


def timestamp(now: float) -> str:
    """Unix seconds as RFC 3339 in UTC with microseconds: `2026-06-07T14:32:01.123456Z`."""
    global _second  # when the last second began, and its text: every call asks twice, and formatting it costs more
    micros = int(now * 1_000_000)
    began, text = _second
    if not 0 <= micros - began < 1_000_000:
        whole = micros // 1_000_000
        text = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        began = whole * 1_000_000
        _second = began, text
    return f"{text}.{str(1_000_000 + micros - began)[1:]}Z"  # with its zeros: `:06d` takes twice as long


def same(left: bytes, right: bytes) -> bool:
    """Equality in constant time."""
    return secrets.compare_digest(left, right)
