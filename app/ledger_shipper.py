"""From the spool to PostgreSQL: a child process of the replica, so that the database never shares the hot loop.

    python -m app.ledger_shipper --spool-dir DIR --replica NAME        with DATABASE_URL in the environment

and LEDGER_LAKE_URL, LEDGER_LAKE_FORMAT (parquet, jsonl) where segments are to become files of a lake as well.

It ships the events of its replica's segments as they are written, and of every segment whose lock is free: those are
complete, or their process is dead. Then an intent without its event becomes an `interrupted` row. The ledger ignores
a row that it has, so shipping anything twice changes nothing; that is why a crash at any line here is harmless.

Standard input is a pipe from the replica. Its end means that the replica drains or is dead: the shipper ships what it
can in 10 seconds and exits. SIGINT and SIGTERM are ignored, for they reach whole process groups while the replica
still has calls to finish. Each second a JSON line on standard output tells how things are (`Report`).

Everything here is asynchronous for the sake of deadlines: a frozen PostgreSQL holds no await for longer than
`archive.DEADLINE_SECONDS`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from app import heap
from app.ambient import Ambient
from app.archive import Archive, ArchiveError
from app.core import interrupted
from app.lake import FORMATS, Lake, LakeError, LakeShipper, hand_over
from app.ledger import parse_segment_name, take_lock
from app.ledger_segment import BATCH_BYTES, BATCH_ROWS, Batch, Segment, row
from app.shipping import LakeReport, Report

POLL_SECONDS = 0.1
BACKOFF_SECONDS = 5.0

_encode = msgspec.json.Encoder().encode


class Shipper:
    """Moves rows from `spool_dir` to the archive. `report` is up to date after each `run_once`."""

    def __init__(
        self,
        spool_dir: Path,
        replica: str,
        archive: Archive,
        ambient: Ambient,
        adopt_seconds: float = 10.0,
        lake: LakeReport | None = None,
        keep_free_bytes: int = 0,
    ) -> None:
        """With a `lake` segments are handed over to it, as long as so much of the disk is free, instead of deleted."""
        self.report = Report(lake=lake)
        self._lake = lake
        self._keep_free_bytes = keep_free_bytes
        self._spool_dir = spool_dir
        self._replica = replica
        self._archive = archive
        self._ambient = ambient
        self._adopt_seconds = adopt_seconds
        self._adopt_at = 0.0
        self._tails: dict[str, Segment] = {}
        self._orphan_bytes = 0
        self._max_rows = BATCH_ROWS
        self._faults: list[str] = []
        self._caught_up = False
        self._caught_up_at = ambient.monotonic()

    async def run(self, draining: asyncio.Event) -> None:
        """Ships until `draining` is set and nothing of this replica is left; then returns."""
        failures = 0
        while True:
            if draining.is_set():
                self._adopt_at = 0.0
            shipped = 0
            try:
                shipped = await self.run_once()
                failures = 0
                self._max_rows = min(BATCH_ROWS, self._max_rows * 2)
                if draining.is_set() and not self._own():
                    return
            except ArchiveError as error:
                self.report.postgres = "down"
                self.report.error = str(error)
                self._adopt_at = 0.0  # begins by seeing whether PostgreSQL answers
                self._max_rows = max(1, self._max_rows // 2)  # one that is too slow for a batch gets through a smaller
                failures += 1
            except OSError as error:
                self.report.error = f"the spool cannot be read: {error}"
                failures += 1
            if failures:
                backoff_seconds = min(BACKOFF_SECONDS, POLL_SECONDS * 2**failures)
                await self._pause(backoff_seconds * (0.5 + self._ambient.random() / 2), draining)
            elif not shipped or (self._caught_up and not draining.is_set()):
                await self._pause(POLL_SECONDS, draining)  # then there is a batch; at once there would be a row or two

    async def run_once(self) -> int:
        """Ships what there is; adopts when that is due. Returns the rows that were new to the ledger.

        Raises `ArchiveAway`: nothing is lost, call again. Raises `OSError` where the spool cannot be listed; a single
        segment that cannot be read is left where it is, and reported.
        """
        before = self.report.shipped_rows
        self._faults.clear()
        self._open_tails()
        try:
            if self._ambient.monotonic() >= self._adopt_at:
                await self._adopt()
                self._adopt_at = self._ambient.monotonic() + self._adopt_seconds
            self._caught_up = await self._follow()
            if self._caught_up:
                self._caught_up_at = self._ambient.monotonic()
        finally:
            self._measure()
        self.report.error = next(iter(self._faults), self._archive.warning)
        return self.report.shipped_rows - before

    async def _pause(self, seconds: float, draining: asyncio.Event) -> None:
        if draining.is_set():
            await self._ambient.sleep(min(seconds, POLL_SECONDS))
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(draining.wait(), seconds)

    @contextlib.contextmanager
    def _noting(self, path: Path) -> Iterator[None]:
        """One segment that the disk refuses does not keep the others from being shipped."""
        try:
            yield
        except FileNotFoundError:
            pass  # shipped and deleted by another replica
        except OSError as error:
            self._faults.append(f"{path.name} stays in the spool: {error.strerror or error}")

    def _names(self) -> list[str]:
        """Segments in the order in which they were written."""
        found = [(parsed, name) for name in os.listdir(self._spool_dir) if (parsed := parse_segment_name(name))]
        return [name for _, name in sorted(found)]

    def _own(self) -> list[str]:
        return [name for name in self._names() if name.rpartition("-")[0] == self._replica]

    def _measure(self) -> None:
        tails = sum(max(0, tail.size - tail.shipped) for tail in self._tails.values())
        self.report.backlog_bytes = self._orphan_bytes + tails
        if not self.report.backlog_bytes:
            self._caught_up_at = self._ambient.monotonic()
        waited = self._ambient.monotonic() - self._caught_up_at
        self.report.lag_seconds = round(waited, 3) if waited > POLL_SECONDS else 0.0

    # --- this replica's segments, while it writes them ---

    async def _follow(self) -> bool:
        """Ships a batch of each own segment. True when everything that stood there has been shipped."""
        self._open_tails()
        caught_up = True
        for tail in self._tails.values():
            with self._noting(tail.path):
                size = tail.size
                batch = tail.read(tail.shipped, final=False, max_rows=self._max_rows)
                await self._ship(tail, batch)
                caught_up = caught_up and len(batch.events) < self._max_rows and size - batch.end < BATCH_BYTES
                if tail.sealed and tail.shipped == tail.size:
                    self._finish(tail)
        return caught_up

    def _open_tails(self) -> None:
        names = self._own()
        for name in self._tails.keys() - set(names):
            self._tails.pop(name).close()
        for name in names:
            path = self._spool_dir / name
            if name not in self._tails:
                with self._noting(path):
                    self._tails[name] = Segment(path)

    async def _ship(self, segment: Segment, batch: Batch) -> None:
        new, unfit = await self._archive.insert(batch.events)
        damaged = batch.damaged + [batch.events[place].encode() for place in unfit]
        segment.bury(damaged)
        segment.advance(batch.end)
        self.report.shipped_rows += new
        self.report.dead_letters += len(damaged)
        if batch.events:
            self.report.postgres = "up"

    # --- segments that nobody writes any more ---

    async def _adopt(self) -> None:
        """Ships and deletes every segment whose lock is free, this replica's own included.

        Rows of interrupted calls come last, after the events of all segments: a call whose intent stands in an
        unsealed segment may have ended in the next one, and of two rows with one id the ledger keeps the first. Among
        them the newest segment is first, for it has a call's last intent.
        """
        with contextlib.ExitStack() as taken:
            orphans = list(self._take(taken))
            foreign = [segment for segment in orphans if segment.path.name not in self._tails]
            self._orphan_bytes = sum(max(0, segment.size - segment.shipped) for segment in foreign)
            await self._archive.prepare()
            self.report.postgres = "up"
            unsealed: list[Segment] = []
            for segment in orphans:
                with self._noting(segment.path):
                    await self._ship_whole(segment)
                    if segment.sealed:
                        self._finish(segment)
                        self.report.adopted_segments += 1
                    else:
                        unsealed.append(segment)
            for segment in reversed(unsealed):
                with self._noting(segment.path):
                    events = [_encode(interrupted(intent)) for intent in segment.intents.values()]
                    for start in range(0, len(events), BATCH_ROWS):
                        rows = [row(event) for event in events[start : start + BATCH_ROWS]]
                        await self._ship(segment, Batch(rows, end=segment.shipped))
                    self._finish(segment, events)
                    self.report.adopted_segments += 1
            self._orphan_bytes = 0

    def _finish(self, segment: Segment, interrupted: Sequence[bytes] = ()) -> None:
        """PostgreSQL has all of it: the segment goes to the lake with the rows of its open intents, or is deleted."""
        lake = self._lake
        if lake is not None:
            segment.complete(interrupted)
            if hand_over(segment.path, self._keep_free_bytes):
                segment.checkpoint.unlink(missing_ok=True)
                return
            lake.dropped_segments += 1
        segment.remove()

    async def _ship_whole(self, segment: Segment) -> None:
        """Reads from the beginning, for the intents; ships from the checkpoint on."""
        place = 0
        while (batch := segment.read(place, final=True, max_rows=self._max_rows)).end > place:
            await self._ship(segment, batch)
            place = batch.end

    def _take(self, taken: contextlib.ExitStack) -> Iterator[Segment]:
        names = self._names()
        for path in self._spool_dir.glob("*.spool.offset*"):
            if path.name.partition(".spool")[0] + ".spool" not in names:
                path.unlink(missing_ok=True)
        for name in names:
            path = self._spool_dir / name
            with self._noting(path):
                segment = Segment(path)
                if take_lock(segment.fd):
                    taken.callback(segment.close)
                    yield segment
                else:
                    segment.close()


async def _tell(report: Report, ambient: Ambient) -> None:
    """A line a second. A replica that does not read them misses some; it does not hold the shipper up."""
    while True:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(1, _encode(report) + b"\n")
        await ambient.sleep(1.0)


def _watch_replica(loop: asyncio.AbstractEventLoop, draining: asyncio.Event, drain_seconds: float) -> None:
    """In a thread: waits for the end of standard input. The process then ends in time, whatever holds it up."""
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(draining.set)
    threading.Event().wait(drain_seconds)
    os._exit(0)


def _lake(environ: Mapping[str, str]) -> Lake | LakeError | None:
    """What the environment says of a lake. One that cannot be opened is told; PostgreSQL gets its rows all the same."""
    url = environ.get("LEDGER_LAKE_URL")
    try:
        return Lake(url, environ.get("LEDGER_LAKE_FORMAT", FORMATS[0])) if url else None
    except LakeError as error:
        print(error, file=sys.stderr)
        return error


async def _main(options: argparse.Namespace, archive: Archive, lake: Lake | LakeError | None, ambient: Ambient) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if stat.S_ISFIFO(os.fstat(1).st_mode):
        os.set_blocking(1, False)
    draining = asyncio.Event()
    to_lake = LakeShipper(options.spool_dir, lake) if isinstance(lake, Lake) else None
    shipper = Shipper(
        options.spool_dir, options.replica, archive, ambient, options.adopt_seconds,
        to_lake.report if to_lake else None, options.keep_free_bytes,
    )  # fmt: skip
    if isinstance(lake, LakeError):
        shipper.report.lake = LakeReport(error=str(lake))
    watched = (asyncio.get_running_loop(), draining, options.drain_seconds)
    threading.Thread(target=_watch_replica, args=watched, daemon=True).start()
    telling = asyncio.create_task(_tell(shipper.report, ambient))
    filling = asyncio.create_task(to_lake.run()) if to_lake else None
    try:
        await shipper.run(draining)
    finally:
        telling.cancel()
        if filling is not None:
            filling.cancel()  # what waits is for the next shipper on this disk
        await archive.close()
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(1, _encode(shipper.report) + b"\n")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """0 after a drain; 2 with a sentence on standard error when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m app.ledger_shipper", description="Ships the spool to PostgreSQL.")
    parser.add_argument("--spool-dir", type=Path, required=True)
    parser.add_argument("--replica", required=True, help="whose segments to follow while they are written")
    parser.add_argument("--adopt-seconds", type=float, default=10.0, help="how often to look for orphaned segments")
    parser.add_argument("--drain-seconds", type=float, default=10.0, help="how long to go on after standard input ends")
    parser.add_argument("--keep-free-bytes", type=int, default=0, help="with less free disk nothing waits for the lake")
    options = parser.parse_args(arguments)
    heap.share_one()
    heap.give_back_large()
    ambient = Ambient()
    try:
        archive = Archive(environ.get("DATABASE_URL", ""), ambient)
    except ArchiveError as error:
        print(error, file=sys.stderr)
        return 2
    asyncio.run(_main(options, archive, _lake(environ), ambient))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
