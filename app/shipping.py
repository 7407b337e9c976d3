"""The shipper's keeper: the process that ships rows to PostgreSQL is a child of the replica, kept alive from here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from app import children
from app.ambient import Ambient

log = logging.getLogger("gateway")

SHIP_SECONDS = 10.0
"""How long the drain waits for the shipper; what remains is adopted by a living replica."""


class LakeReport(Struct):
    """How shipping to the lake is: what waits, and what was let go for want of disk."""

    files: int = 0
    backlog_bytes: int = 0
    dropped_segments: int = 0
    error: str | None = None


class Report(Struct):
    """How the shipper is: a line of JSON on its standard output. `lag_seconds`: for how long something has waited.

    `error` holds no secret.
    """

    postgres: str = "down"
    shipped_rows: int = 0
    dead_letters: int = 0
    backlog_bytes: int = 0
    lag_seconds: float = 0.0
    adopted_segments: int = 0
    error: str | None = None
    lake: LakeReport | None = None


class Shipper:
    """Keeps `ledger_shipper` running as a child, so that PostgreSQL never shares the hot loop."""

    def __init__(self, spool_dir: Path, name: str, ambient: Ambient, keep_free_bytes: int) -> None:
        """`name` is the replica's. Below `keep_free_bytes` of free disk no segment waits for the lake."""
        self.status = Report()
        self._keep_free_bytes = keep_free_bytes
        self._spool_dir, self._name = spool_dir, name
        self._ambient = ambient
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = self._renewing = False

    async def run(self) -> None:
        while not self._stopping:
            await self.run_once()
            if self._renewing:
                self._renewing = False
            elif not self._stopping:
                self.status = Report(error="the shipper process ended")
                log.error("the shipper process ended; it is started again")
                await self._ambient.sleep(1.0)

    async def run_once(self) -> int:
        """One life of the child: returns how many status lines it wrote."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.ledger_shipper",
            "--spool-dir", str(self._spool_dir), "--replica", self._name,
            "--keep-free-bytes", str(self._keep_free_bytes),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        lines = 0
        async for line in self._process.stdout:
            with contextlib.suppress(msgspec.DecodeError):
                self.status = msgspec.json.decode(line, type=Report)
                lines += 1
        await self._process.wait()
        return lines

    def keep_free(self, keep_free_bytes: int) -> None:
        """Has the child begin anew where it changes; it ends as in a drain."""
        if keep_free_bytes != self._keep_free_bytes:
            self._keep_free_bytes = keep_free_bytes
            self._renewing = True
            if self._process is not None and self._process.returncode is None:
                self._process.stdin.close()

    async def stop(self) -> None:
        """Closes its standard input: it ships what it can and exits; past the limit it is ended."""
        self._stopping = True
        await children.end(self._process, SHIP_SECONDS + 1)
