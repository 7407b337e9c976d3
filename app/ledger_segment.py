"""A segment of the spool being read: its lines as batches for the archive, and how far they are shipped."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from app.core import Intent
from app.dead_letters import bury
from app.ledger import CHECKPOINT_SUFFIX, encode_line, read_lines, shipped_bytes

BATCH_ROWS = 2000
BATCH_BYTES = 4_194_304
"""About 3,000 rows: large enough that the round trip vanishes, small enough for PostgreSQL to take in a moment."""

_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
_decode_intent = msgspec.json.Decoder(Intent).decode


class _EventId(Struct, gc=False):
    event_id: str


_decode_event_id = msgspec.json.Decoder(_EventId).decode


class Batch(Struct):
    """What was read up to byte `end`: events as the archive takes them, and lines that cannot be a row."""

    events: list[str] = []
    damaged: list[bytes] = []
    end: int = 0


def row(event: bytes) -> str:
    """An event as the archive takes it. PostgreSQL's text holds no NUL character: U+FFFD stands for it."""
    text = event.decode()
    return _NUL.sub(r"\1\\ufffd", text) if "\\" in text else text


class Segment:
    """A segment being read. Everything before byte `shipped` is in the ledger or in the dead-letter file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # writable: some file systems lock only such
        self.checkpoint = path.with_name(path.name + CHECKPOINT_SUFFIX)
        shipped = shipped_bytes(path)  # not yet, or torn by a power loss: from the start, which changes nothing
        self.shipped = shipped if 0 <= shipped <= self.size else 0
        self.intents: dict[str, Intent] = {}
        self.sealed = False

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def read(self, start: int, *, final: bool, max_rows: int = BATCH_ROWS) -> Batch:
        """From byte `start`, as far as the lines are complete or a batch is full; `final` when nothing will follow.

        With `final`, `intents` follows along; without, it is not kept: the adopter reads from the beginning.
        """
        wanted = BATCH_BYTES
        while True:
            data = os.pread(self.fd, wanted, start)
            if len(data) < wanted or b"\n" in data:
                break
            wanted *= 2
        batch = Batch(end=start)
        for line in read_lines(data, start, final=final and len(data) < wanted):
            batch.end = line.end
            news = line.start >= self.shipped
            try:
                if line.kind == "E":
                    if final:
                        self.intents.pop(_decode_event_id(line.payload).event_id, None)
                    if news:
                        batch.events.append(row(line.payload))
                elif line.kind == "I" and final:
                    intent = _decode_intent(line.payload)
                    self.intents[intent.event_id] = intent
                elif line.kind == "S":
                    self.sealed = True
                elif line.kind == "?" and news:
                    batch.damaged.append(line.payload)
            except (msgspec.DecodeError, UnicodeDecodeError):
                if news:
                    batch.damaged.append(line.payload)
            if len(batch.events) == max_rows:
                break
        return batch

    def bury(self, damaged: Sequence[bytes]) -> None:
        """Keeps what cannot be a row. After a crash before the checkpoint it is kept twice."""
        bury(self.path.with_name(self.path.name + ".dead-letter"), damaged)

    def advance(self, end: int) -> None:
        """Notes that everything before `end` is done. Only ever called after the commit."""
        if end > self.shipped:
            self.shipped = end
            written = self.checkpoint.with_name(self.checkpoint.name + ".new")
            written.write_bytes(b"%d" % end)
            written.replace(self.checkpoint)

    def complete(self, events: Sequence[bytes]) -> None:
        """Adds events at the end, as lines of the spool; on a line of their own, for the last one may be torn."""
        if events:
            torn = os.pread(self.fd, 1, self.size - 1) not in (b"\n", b"")
            lines = [encode_line(b"E", event) for event in events]
            os.pwrite(self.fd, b"".join([b"\n"] * torn + lines), self.size)

    def remove(self) -> None:
        """The checkpoint first: left behind alone, it would be wrong about a segment of that name."""
        self.checkpoint.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Also gives the lock back, if it was taken."""
        os.close(self.fd)
