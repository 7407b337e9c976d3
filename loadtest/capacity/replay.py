"""What one call asks of Redis, asked again by many connections: Redis's core at sizes that one replica cannot reach."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from urllib.parse import urlsplit

import uvloop
from hiredis import pack_command
from redis import Redis

from loadtest.bench.parts import cpu_seconds
from loadtest.services import StackError

CONNECTIONS = 50
"""As many replicas, each with a connection of its own and nothing to send together."""
_ID = b"#" * 36
"""Where a command has this, the call's id stands in its place: each call is another one."""
_CALL = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def scripts_of(redis: Redis) -> list[bytes]:
    """The scripts of the last call, as they go over the wire. What was slower than nothing must be in the slow log."""
    asked = [entry["command"].decode() for entry in redis.slowlog_get(128)]  # the last one first
    scripts = [command for command in reversed(asked) if command.startswith("EVALSHA")]
    if not scripts or not (found := _CALL.search(scripts[-1])):
        raise StackError("The replica asked Redis for no script: its limits are not counted there.")
    last = found[0]
    return [
        pack_command(tuple(word.replace(last.encode(), _ID) for word in command.encode().split(b" ")))
        for command in scripts
        if last in command
    ]


class _Caller(asyncio.Protocol):
    """One connection: sends a call's scripts one after the other, and the next call's when that is due."""

    def __init__(self, replay: Replay, interval: float) -> None:
        self._replay = replay
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + random.random() * interval
        self._left: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._transport.write(pack_command(("AUTH", self._replay.password)))

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"-"):
            self._replay.refused = data.decode(errors="replace").strip()
        if self._left:
            self._transport.write(self._left.pop())
            return
        self._replay.calls += 1  # AUTH too, before the measuring begins
        self._loop.call_at(self._due, self._next)
        self._due = max(self._due + self._interval, self._loop.time())

    def _next(self) -> None:
        if self._transport.is_closing():
            return
        number = b"%036d" % random.getrandbits(100)
        first, *others = (script.replace(_ID, number) for script in self._replay.scripts)
        self._left = others[::-1]
        self._transport.write(first)


class Replay:
    """`pid` is that of the Redis at `url`. It is asked from other `cores`: else both would take turns, and Redis find
    much to do whenever it is its own.
    """

    def __init__(self, url: str, pid: int, scripts: list[bytes], cores: set[int]) -> None:
        parts = urlsplit(url)
        self.password = parts.password or ""
        self.scripts = scripts
        self.calls = 0
        self.refused = ""
        self._address = parts.hostname, parts.port
        self.pid = pid
        self._cores = cores

    def measured(self, per_second: float, seconds: float) -> tuple[float, float]:
        """Calls a second as they were, and what of its core Redis took for them."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores)
        try:
            return uvloop.run(self._measured(per_second, seconds))
        finally:
            os.sched_setaffinity(0, before)

    async def _measured(self, per_second: float, seconds: float) -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        interval = CONNECTIONS / per_second
        made = [
            await loop.create_connection(lambda: _Caller(self, interval), *self._address) for _ in range(CONNECTIONS)
        ]
        await asyncio.sleep(0.3)
        calls, cpu, began = self.calls, cpu_seconds(self.pid), time.monotonic()
        await asyncio.sleep(seconds)
        took = time.monotonic() - began
        calls, cpu = self.calls - calls, cpu_seconds(self.pid) - cpu
        for transport, _ in made:
            transport.abort()
        await asyncio.sleep(0.1)
        if self.refused:
            raise StackError(f"Redis refused what the replica had asked: {self.refused}")
        return calls / took, cpu / took
