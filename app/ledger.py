"""The spool: where a call's row is safe before its answer ends. Here is the writing side, and the form of a line.

A process writes one segment file at a time, `{replica}-{sequence}.spool`, and holds `flock` on it for as long as it
lives; a segment whose lock is free is complete, or its process is dead. Lines are

    {payload's length, 8 hex} {CRC-32 of the rest, 8 hex} {kind} {payload}\\n

with one of these kinds: `I` an intent (JSON of `core.Intent`), `E` an event (JSON of `core.LedgerEvent`), `S` the seal
(nothing follows, and calls still open went on in the next segment), `P` a probe of the disk. JSON holds no newline, so
a damaged line ends at the next newline and costs nothing but itself.

A line is one `write` into the page cache: killing the process loses nothing. `run` makes lines durable every
`fsync_ms`; that much a power loss may cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.config import WrittenSpool
from app.core import Intent, LedgerEvent
from app.errors import LedgerUnavailable

_SEGMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})-([0-9]{10})\.spool")
_HEAD_BYTES = 20
CHECKPOINT_SUFFIX = ".offset"
_CHECK_SECONDS = 1.0
_PROBE = b" " * 4096
"""A row is smaller than this: a disk that takes the probe takes a row."""
_ROTATE_AGAIN_BYTES = 1_048_576
"""How much more goes into a segment that could not be rotated, before the next try."""


# --- the form of a line -------------------------------------------------------------------------------------------


class Line(Struct, frozen=True, gc=False):
    """One line of a segment, from byte `start` to before `end`. A damaged one is of kind `?`, its payload all of it."""

    kind: str
    payload: bytes
    start: int
    end: int


_SEEDS = {kind: crc32(kind + b" ") for kind in (b"I", b"E", b"S", b"P")}


def encode_line(kind: bytes, payload: bytes) -> bytes:
    return b"%08x %08x %b %b\n" % (len(payload), crc32(payload, _SEEDS[kind]), kind, payload)


_SEAL = encode_line(b"S", b"")


def read_lines(data: bytes, start: int = 0, *, final: bool = False) -> Iterator[Line]:
    """The lines of `data`, whose first byte is byte `start` of the segment.

    A last piece without a newline is left for later; with `final` it is a damaged line.
    """
    place = 0
    while place < len(data):
        newline = data.find(b"\n", place)
        if newline < 0:
            if final:
                yield Line("?", data[place:], start + place, start + len(data))
            return
        piece = data[place:newline]
        end = newline + 1
        if piece[18:20] in (b"I ", b"E ", b"S ", b"P ") and piece[:18] == b"%08x %08x " % (
            len(piece) - _HEAD_BYTES,
            crc32(piece[18:]),
        ):
            yield Line(chr(piece[18]), piece[_HEAD_BYTES:], start + place, start + end)
        else:
            yield Line("?", data[place:end], start + place, start + end)
        place = end


def segment_name(replica: str, sequence: int) -> str:
    return f"{replica}-{sequence:010d}.spool"


def parse_segment_name(name: str) -> tuple[str, int] | None:
    """Replica and sequence of a segment's file name; None for any other file."""
    match = _SEGMENT.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def shipped_bytes(path: Path) -> int:
    """How much of a segment the checkpoint beside it says is shipped; 0 without one, or with a torn one."""
    try:
        return int(path.with_name(path.name + CHECKPOINT_SUFFIX).read_bytes())
    except (FileNotFoundError, ValueError):
        return 0


def backlog(folder: Path) -> dict[str, int]:
    """Bytes that are not shipped, by segment, in the order in which they were written."""
    segments = sorted(filter(parse_segment_name, os.listdir(folder)), key=parse_segment_name)
    sizes = {name: (folder / name).stat().st_size - shipped_bytes(folder / name) for name in segments}
    return {name: size for name, size in sizes.items() if size > 0}


def take_lock(fd: int) -> bool:
    """Locks the segment open as `fd`. False when another process has it, or has deleted it meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(fd).st_nlink > 0


# --- writing ------------------------------------------------------------------------------------------------------


class _Segment:
    """A segment open for writing, and locked."""

    __slots__ = ("fd", "path", "size", "synced", "torn")

    def __init__(self, path: Path) -> None:
        """Raises `FileExistsError` where the name is taken, or an adopter was quicker than our lock."""
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.torn = False
        self.synced = False
        try:
            locked = take_lock(self.fd)
        except OSError:
            os.close(self.fd)
            raise
        if not locked:
            os.close(self.fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    def write(self, data: bytes) -> None:
        """All of `data`, or nothing of it and an `OSError`."""
        if self.torn:
            data = b"\n" + data
        size, written = len(data), os.write(self.fd, data)
        if written < size:
            self._write_rest(data, written)
        self.size += size
        self.torn = False

    def _write_rest(self, data: bytes, written: int) -> None:
        try:
            while written < len(data):
                written += os.write(self.fd, data[written:])
        except OSError:
            self._withdraw(written)
            raise

    def _withdraw(self, written: int) -> None:
        try:
            os.ftruncate(self.fd, self.size)
        except OSError:
            self.size += written
            self.torn = True  # the next line begins with a newline, where readers find their feet again


class Spool:
    """Takes intents and events of this process. `intend` and `append` are one `write` each and never wait for a sync.

    `settings` may be set at any time: they count from the next sync, look at the disk and segment on. For metrics:
    `bytes_written`, `rows`, `open_intents`, `available`, `last_error`, `write_failures`,
    `unsynced_seconds`.
    """

    def __init__(self, directory: Path, replica: str, settings: WrittenSpool, ambient: Ambient) -> None:
        """`replica` names the segments: letters, digits, `.`, `_`, `-`, at most 64. Raises `ValueError` otherwise."""
        if parse_segment_name(segment_name(replica, 0)) is None:
            raise ValueError(f"{replica!r} cannot name a replica: letters, digits, '.', '_' and '-', at most 64")
        self.bytes_written = 0
        self.rows = 0
        self.write_failures = 0
        self.last_error: str | None = None
        self.available = False
        self._directory = directory
        self._replica = replica
        self.settings = settings
        self._ambient = ambient
        self._encode = msgspec.json.Encoder().encode
        self._intents: dict[str, bytes] = {}
        self._segment: _Segment | None = None
        self._sealed: list[_Segment] = []
        self._left: list[_Segment] = []
        self._rotate_at = settings.segment_bytes
        self._rotate_after = 0.0
        self._sequence = 0
        self._named = False
        self._unsynced_since: float | None = None
        self._check_at = 0.0
        self._full = False
        self._fault = False
        self._unsound = False
        self._thread: ThreadPoolExecutor | None = None

    @property
    def open_intents(self) -> int:
        return len(self._intents)

    @property
    def unsynced_seconds(self) -> float:
        """Age of the oldest line that a power loss would take."""
        since = self._unsynced_since
        return 0.0 if since is None else max(0.0, self._ambient.monotonic() - since)

    def open(self) -> None:
        """Makes the directory and the first segment. Raises `OSError` when it cannot; waits for the disk."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._segment = self._create()
        self._sync_directory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._look(self._free_bytes())

    def admit(self) -> None:
        """Raises `LedgerUnavailable` while a new call might find no room for its row."""
        if not self.available:
            raise _unavailable()

    def intend(self, intent: Intent) -> None:
        """Writes what a call is about to do; the last intent of a call stands. Raises `LedgerUnavailable`."""
        line = encode_line(b"I", self._encode(intent))
        size = self._write(line)
        self._intents[intent.event_id] = line
        if size >= self._rotate_at:
            self._rotate()

    def append(self, event: LedgerEvent) -> bytes:
        """Writes a call's row; returns it as JSON. Raises `LedgerUnavailable`: the call's intent then stays open.

        It may be tried again. Left alone, the call becomes an `interrupted` row after this process has ended.
        """
        payload = self._encode(event)
        size = self._write(encode_line(b"E", payload))
        self._intents.pop(event.event_id, None)
        self.rows += 1
        if size >= self._rotate_at:
            self._rotate()
        return payload

    def _write(self, line: bytes) -> int:
        """Returns how large the segment is now."""
        segment = self._segment
        if segment is None:
            raise _unavailable()
        try:
            segment.write(line)
        except OSError as error:
            self._fault = True
            self._note(error)
            raise _unavailable() from error
        self.bytes_written += len(line)
        if self._unsynced_since is None:
            self._unsynced_since = self._ambient.monotonic()
        return segment.size

    def _note(self, error: OSError) -> None:
        self.write_failures += 1
        self.last_error = f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')})"
        self.available = not (self._full or self._fault)

    # --- segments ---

    def _create(self) -> _Segment:
        """A new segment. Sequences begin at the unix second, so the name of a deleted segment does not come back."""
        names = map(parse_segment_name, os.listdir(self._directory))
        taken = [name[1] for name in names if name and name[0] == self._replica]
        self._sequence = max([int(self._ambient.now()), self._sequence + 1, *(number + 1 for number in taken)])
        while True:
            try:
                segment = _Segment(self._directory / segment_name(self._replica, self._sequence))
            except FileExistsError:
                self._sequence += 1
            else:
                self._named = False
                self._rotate_after = self._ambient.monotonic() + self.settings.segment_seconds
                return segment

    def _rotate(self) -> None:
        """Goes on in a new segment, with the open intents; the old one is sealed last.

        Dying on the way leaves an open intent in both, and twice the same interrupted row. When a step fails, the old
        segment stays in use: letting go of it without a seal would call running calls interrupted.
        """
        old = self._segment
        assert old is not None
        carried = b"".join(self._intents.values())
        new = None
        try:
            new = self._create()
            new.write(carried)
            old.write(_SEAL)
        except OSError as error:
            self._note(error)
            self._rotate_at = old.size + _ROTATE_AGAIN_BYTES
            if new is not None:
                with contextlib.suppress(OSError):
                    new.path.unlink()
                os.close(new.fd)
            return
        self.bytes_written += len(carried) + len(_SEAL)
        self._sealed.append(old)  # unlocked after it is synced
        self._segment = new
        self._rotate_at = len(carried) + self.settings.segment_bytes

    # --- the disk ---

    async def run(self) -> None:
        """Makes lines durable and watches the disk until cancelled."""
        while True:
            await self._ambient.sleep(self.settings.fsync_ms / 1000)
            await self.run_once()

    async def run_once(self) -> int:
        """Makes durable what is written, and looks at the disk once a second. Returns the bytes synced, all told."""
        now = self._ambient.monotonic()
        check = now >= self._check_at
        if check:
            self._check_at = now + _CHECK_SECONDS
            if self._fault:
                self._probe()
            elif self._segment is not None and self._segment.size and now >= self._rotate_after:
                self._rotate()
        if self._segment is None or self._thread is None or not (check or self._unsynced_since is not None):
            return 0
        written, pending = self.bytes_written, self._unsynced_since
        loop = asyncio.get_running_loop()
        try:
            free_bytes = await loop.run_in_executor(self._thread, self._sync, check)
        except OSError as error:
            self._fault = self._unsound = True
            self._note(error)
            return 0
        if pending is not None:
            self._unsynced_since = None if self.bytes_written == written else now
        if free_bytes is not None:
            self._look(free_bytes)
        return written if pending is not None else 0

    def _sync(self, check: bool) -> int | None:
        """In the spool's thread: everything here may wait for the disk. Returns the free bytes when asked.

        Only this thread closes a segment, and it asks for the current one after it has closed the sealed ones.
        """
        while self._sealed:
            old = self._sealed.pop(0)
            try:
                os.fdatasync(old.fd)
            finally:
                os.close(old.fd)
        if not self._named:
            self._sync_directory()
        segment = self._segment
        if segment is not None:
            if check and not os.fstat(segment.fd).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "somebody deleted the segment")
            os.fdatasync(segment.fd)
            segment.synced = True
        return self._free_bytes() if check else None

    def _sync_directory(self) -> None:
        self._named = True
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    def _look(self, free_bytes: int) -> None:
        """Refuses calls below the reserve, and takes them again an eighth above it, so that it does not flutter."""
        reserve = self.settings.reserve_bytes
        self._full = free_bytes < (reserve + reserve // 8 if self._full else reserve)
        if self._full:
            self.last_error = f"{free_bytes} bytes free, {reserve} are reserved"
        self.available = not (self._full or self._fault)

    def _probe(self) -> None:
        """After a failure: calls are taken again once the disk takes a line, and syncs it.

        Where this file does not, another may: the old one was deleted, say, or is on a disk that was mounted anew. It
        is not left before it was good once, so that a disk which is beyond help does not get a file a second.
        """
        if not self._unsound:
            with contextlib.suppress(LedgerUnavailable):
                self._write(encode_line(b"P", _PROBE))
                self._fault = False
                return
        segment = self._segment
        self._unsound = False
        if segment is not None and segment.synced:
            self._leave(segment)

    def _leave(self, old: _Segment) -> None:
        """Goes on in a new segment though the old one takes no seal.

        It stays locked while this process lives, so nobody calls its open calls interrupted: they go on in the new one.
        """
        lines = [*self._intents.values(), encode_line(b"P", _PROBE)]
        new = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            new = self._create()
            new.write(b"".join(lines))
        except OSError as error:
            self._note(error)
            if new is not None:
                with contextlib.suppress(OSError):
                    new.path.unlink()
                os.close(new.fd)
            return
        self._left.append(old)
        self._segment = new
        self._rotate_at = new.size + self.settings.segment_bytes
        self._fault = False

    def close(self) -> None:
        """Makes all durable, seals the segment and lets go of it; waits for the disk. End `run` first.

        With an intent still open there is no seal: whoever adopts the segment writes that call's interrupted row.
        """
        self.available = False
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        segment, self._segment = self._segment, None
        for last in [*self._sealed, *([segment] if segment else [])]:
            try:
                if last is segment and not self._intents:
                    last.write(_SEAL)
                os.fdatasync(last.fd)
            except OSError as error:
                self._note(error)
            finally:
                os.close(last.fd)
        self._sealed = []
        for left in self._left:  # last: whoever adopts them has to find the calls that went on
            os.close(left.fd)
        self._left = []
        self._unsynced_since = None


def _unavailable() -> LedgerUnavailable:
    return LedgerUnavailable(
        "This replica cannot record calls just now, so it takes none. Try again in a moment.", retry_after_seconds=1.0
    )
