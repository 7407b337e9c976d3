"""Prompts and answers of tenants that asked to have them kept, on their way to a process that redacts them.

Kept nowhere else: not in logs, rows, spans or metrics. What the writer does not take in time is dropped and counted,
for no call waits for it. As it is redacted in a child process, its searches never share the hot loop.
"""

from __future__ import annotations

import asyncio
import logging
import sys

import msgspec
from msgspec import Struct

from app import children
from app.ambient import Ambient
from app.config import WrittenContent
from app.core import Exchange

log = logging.getLogger("gateway")

MAX_BYTES = 262_144
"""Of a request and of an answer: what is longer is cut there."""
MAX_WAITING_BYTES = 16_777_216
"""On their way to the writer; above it content is dropped."""
STOP_SECONDS = 5.0
LENGTH_BYTES = 4


class Captured(Struct, frozen=True, array_like=True):
    """One call's content as its client sent and got it. `answer` is a body, or a stream's frames."""

    event_id: str
    time: str
    request_id: str
    trace_id: str
    tenant: str
    alias: str | None
    model: str | None
    status: str
    stream: bool
    request: bytes
    answer: bytes


class Kept:
    """What a call's client has got so far, up to a bound."""

    __slots__ = ("parts", "size")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        if self.size <= MAX_BYTES:
            self.parts.append(part)
            self.size += len(part)


class Content:
    """Keeps `content_writer` running as a child, and hands it what was captured. Counts what it could not take."""

    def __init__(self, settings: WrittenContent, replica: str, ambient: Ambient) -> None:
        """`settings` names a folder."""
        self.dropped = 0
        self.taken = 0
        self._arguments = [settings.folder, replica, str(settings.keep_days), *settings.phone_regions]
        self._ambient = ambient
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    def take(self, exchange: Exchange, kept: Kept) -> None:
        """Never waits."""
        process, event, call = self._process, exchange.event, exchange.call
        if event is None or event.tenant_id is None:
            return
        if process is None or process.returncode is not None or self._waiting(process) > MAX_WAITING_BYTES:
            self.dropped += 1
            return
        line = msgspec.msgpack.encode(
            Captured(
                event.event_id,
                event.timestamp,
                event.request_id,
                event.trace_id,
                event.tenant_id,
                event.model_alias,
                event.model_resolved,
                event.status,
                event.stream,
                call.body[: MAX_BYTES + 1],
                b"".join(kept.parts)[: MAX_BYTES + 1],
            )
        )
        process.stdin.write(len(line).to_bytes(LENGTH_BYTES, "big") + line)
        self.taken += 1

    def _waiting(self, process: asyncio.subprocess.Process) -> int:
        return process.stdin.transport.get_write_buffer_size()

    async def run(self) -> None:
        while not self._stopping:
            await self.run_once()
            if not self._stopping:
                log.error("the content writer ended; it is started again, and what it had not written is lost")
                await self._ambient.sleep(1.0)

    async def run_once(self) -> int:
        """One life of the child: returns what it ended with."""
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.content_writer", *self._arguments,
            stdin=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        return await process.wait()

    async def stop(self) -> None:
        """Closes its standard input: it writes what it has, and exits; past the limit it is ended."""
        self._stopping = True
        await children.end(self._process, STOP_SECONDS)
