"""The spool: what is written is there, whatever happens to the process, the disk or the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import WrittenSpool
from app.core import Intent, LedgerEvent
from app.errors import LedgerUnavailable
from app.ledger import Line, Spool, encode_line, parse_segment_name, read_lines, segment_name, take_lock
from tests.ledger_parts import AMBIENT, an_event, an_intent

PAYLOADS = st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b" ")), min_size=1, max_size=6)


@contextlib.contextmanager
def spool_in(folder: Path, **settings: int) -> Iterator[Spool]:
    spool = Spool(folder, "r1", WrittenSpool(**{"reserve_bytes": 0, **settings}), AMBIENT)
    spool.open()
    try:
        yield spool
    finally:
        spool.close()


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


def lines(path: Path) -> list[Line]:
    return list(read_lines(path.read_bytes(), final=True))


def kinds(path: Path) -> str:
    return "".join(line.kind for line in lines(path))


def lock_is_free(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    try:
        return take_lock(fd)
    finally:
        os.close(fd)


# --- the form of a line ---


@given(PAYLOADS)
def test_lines_read_back_as_they_were_written(payloads: list[bytes]) -> None:
    data = b"".join(encode_line(b"E", payload) for payload in payloads)
    assert [(line.kind, line.payload) for line in read_lines(data)] == [("E", payload) for payload in payloads]


@given(PAYLOADS)
def test_a_tail_torn_at_any_byte_costs_only_the_line_it_is_in(payloads: list[bytes]) -> None:
    encoded = [encode_line(b"E", payload) for payload in payloads]
    data = b"".join(encoded)
    for cut in range(len(data) + 1):
        whole, end = [], 0
        for payload, line in zip(payloads, encoded, strict=True):
            if end + len(line) > cut:
                break
            whole.append(payload)
            end += len(line)
        assert [line.payload for line in read_lines(data[:cut])] == whole
        torn = [line.payload for line in read_lines(data[:cut], final=True) if line.kind == "?"]
        assert torn == ([data[end:cut]] if cut > end else [])


@given(PAYLOADS, st.data())
def test_a_changed_byte_costs_no_line_but_its_own_and_the_one_it_runs_into(
    payloads: list[bytes], draw: st.DataObject
) -> None:
    encoded = [encode_line(b"E", payload) for payload in payloads]
    data = bytearray(b"".join(encoded))
    place = draw.draw(st.integers(0, len(data) - 1))
    data[place] = draw.draw(st.integers(0, 255).filter(lambda byte: byte != data[place]))
    read = list(read_lines(bytes(data), final=True))
    assert b"".join(data[line.start : line.end] for line in read) == data
    end = 0
    for payload, line in zip(payloads, encoded, strict=True):
        start, end = end, end + len(line)
        if not start - 1 <= place < end:
            assert any(found.kind == "E" and found.start == start and found.payload == payload for found in read)


@given(PAYLOADS, st.integers(1, 60))
def test_places_count_from_the_start_of_the_segment(payloads: list[bytes], start: int) -> None:
    data = b"".join(encode_line(b"I", payload) for payload in payloads)
    assert [data[line.start - start : line.end - start] for line in read_lines(data, start)] == [
        encode_line(b"I", payload) for payload in payloads
    ]


def test_a_segment_name_tells_replica_and_sequence() -> None:
    assert parse_segment_name(segment_name("gw-0-1", 1_764_000_000)) == ("gw-0-1", 1_764_000_000)


def test_other_files_are_no_segments() -> None:
    names = ["a-0000000001.spool.offset", "a-0000000001.spool.dead-letter", "0000000001.spool", "../a-0000000001.spool"]
    assert [parse_segment_name(name) for name in names] == [None] * 4


def test_a_replica_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a replica"):
        Spool(tmp_path, "../r1", WrittenSpool(), AMBIENT)


# --- writing ---


def test_an_event_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    event = an_event()
    with spool_in(tmp_path) as spool:
        spool.append(event)
        (line,) = lines(segments(tmp_path)[0])
    assert msgspec.json.decode(line.payload, type=LedgerEvent) == event


def test_an_intent_reads_back_whole(tmp_path: Path) -> None:
    intent = an_intent()
    with spool_in(tmp_path) as spool:
        spool.intend(intent)
        (line,) = lines(segments(tmp_path)[0])
    assert msgspec.json.decode(line.payload, type=Intent) == intent


def test_an_event_closes_its_intent(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        intent = an_intent()
        spool.intend(intent)
        spool.intend(an_intent())
        spool.append(an_event(intent.event_id))
        assert spool.open_intents == 1


def test_a_newline_in_a_field_does_not_end_the_line(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event(feature="a\nb"))
        assert kinds(segments(tmp_path)[0]) == "E"


def test_a_closed_segment_is_sealed_and_its_lock_free(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        held = not lock_is_free(segments(tmp_path)[0])
    (path,) = segments(tmp_path)
    assert (held, kinds(path), lock_is_free(path)) == (True, "ES", True)


def test_a_segment_closed_under_an_open_intent_is_not_sealed(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        spool.intend(an_intent())
    assert kinds(segments(tmp_path)[0]) == "I"


def test_a_closed_spool_refuses(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        pass
    with pytest.raises(LedgerUnavailable):
        spool.append(an_event())


def test_two_spools_of_one_name_write_two_segments(tmp_path: Path) -> None:
    with spool_in(tmp_path) as one, spool_in(tmp_path) as other:
        one.append(an_event())
        other.append(an_event())
        assert [kinds(path) for path in segments(tmp_path)] == ["E", "E"]


def test_a_killed_process_loses_no_appended_event(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from app.config import WrittenSpool
        from app.ledger import Spool
        from tests.ledger_parts import AMBIENT, an_event
        spool = Spool(Path(sys.argv[1]), "r1", WrittenSpool(reserve_bytes=0), AMBIENT)
        spool.open()
        while True:
            event = an_event()
            spool.append(event)
            print(event.event_id, flush=True)
    """)
    writer = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout as output:
        told = [output.readline().strip() for _ in range(200)]
        writer.send_signal(signal.SIGKILL)
        told += [line.strip() for line in output if line.endswith("\n")]
    writer.wait()
    (path,) = segments(tmp_path)
    kept = [msgspec.json.decode(line.payload)["event_id"] for line in lines(path) if line.kind == "E"]
    assert kept[: len(told)] == told


# --- rotation ---


def test_a_full_segment_is_sealed_and_its_open_intents_go_on_in_the_next(tmp_path: Path) -> None:
    with spool_in(tmp_path, segment_bytes=4000) as spool:
        intent = an_intent()
        spool.intend(intent)
        while len(segments(tmp_path)) == 1:
            spool.append(an_event())
        old, new = segments(tmp_path)
        carried = [msgspec.json.decode(line.payload, type=Intent) for line in lines(new)]
        assert (kinds(old)[-1], carried) == ("S", [intent])


def test_the_intent_that_fills_a_segment_goes_on_in_the_next(tmp_path: Path) -> None:
    with spool_in(tmp_path, segment_bytes=1) as spool:
        spool.intend(an_intent())
        assert [kinds(path) for path in segments(tmp_path)] == ["IS", "I"]


def test_the_event_that_fills_a_segment_leaves_no_intent_in_the_next(tmp_path: Path) -> None:
    with spool_in(tmp_path, segment_bytes=1000) as spool:
        intent = an_intent()
        spool.intend(intent)
        spool.append(an_event(intent.event_id))
        assert [kinds(path) for path in segments(tmp_path)] == ["IES", ""]


def test_the_last_intent_of_a_call_is_the_one_carried_on(tmp_path: Path) -> None:
    with spool_in(tmp_path, segment_bytes=4000) as spool:
        first = an_intent(model="primary")
        spool.intend(first)
        spool.intend(an_intent(first.event_id, model="fallback"))
        while len(segments(tmp_path)) == 1:
            spool.append(an_event())
        (line,) = lines(segments(tmp_path)[1])
        assert msgspec.json.decode(line.payload, type=Intent).model == "fallback"


def test_a_rotated_segment_keeps_its_lock_until_it_is_on_the_disk(tmp_path: Path) -> None:
    with spool_in(tmp_path, segment_bytes=1000) as spool:
        spool.append(an_event())
        before = lock_is_free(segments(tmp_path)[0])
        asyncio.run(spool.run_once())
        assert (before, lock_is_free(segments(tmp_path)[0])) == (False, True)


def test_open_intents_larger_than_a_segment_do_not_rotate_without_end(tmp_path: Path) -> None:
    with spool_in(tmp_path, segment_bytes=500) as spool:
        for _ in range(40):
            spool.intend(an_intent())
        assert len(segments(tmp_path)) < 40


def test_a_segment_that_cannot_be_rotated_stays_in_use_without_a_seal(tmp_path: Path) -> None:
    with spool_in(tmp_path / "spool", segment_bytes=1000) as spool:
        spool.intend(an_intent())
        (tmp_path / "spool").rename(tmp_path / "away")
        spool.append(an_event())
        spool.append(an_event())
        found = [kinds(path) for path in segments(tmp_path / "away")]
        (tmp_path / "away").rename(tmp_path / "spool")
    assert (found, spool.write_failures > 0) == (["IEE"], True)


@contextlib.contextmanager
def thread_held(spool: Spool) -> Iterator[None]:
    """The spool's thread is busy: a sync handed to it begins when the block ends."""
    go_on = threading.Event()
    spool._thread.submit(go_on.wait, 10)
    try:
        yield
    finally:
        go_on.set()


@pytest.mark.parametrize("rotations", [1, 3])
def test_rotating_before_a_sync_has_begun_does_not_make_the_spool_unavailable(tmp_path: Path, rotations: int) -> None:
    async def scenario(spool: Spool) -> None:
        spool.append(an_event())
        with thread_held(spool):
            sync = asyncio.ensure_future(spool.run_once())
            await asyncio.sleep(0)  # it has read what is written, and waits for the thread
            while len(segments(tmp_path)) <= rotations:
                spool.append(an_event())
        await sync

    with spool_in(tmp_path, segment_bytes=2000) as spool:
        asyncio.run(scenario(spool))
        assert (spool.available, spool.write_failures, spool.last_error) == (True, 0, None)


def test_what_was_written_while_a_sync_waited_is_synced_by_the_next(tmp_path: Path) -> None:
    async def scenario(spool: Spool) -> None:
        spool.append(an_event())
        with thread_held(spool):
            sync = asyncio.ensure_future(spool.run_once())
            await asyncio.sleep(0)
            while len(segments(tmp_path)) == 1:
                spool.append(an_event())
        await sync
        waiting = spool.unsynced_seconds
        await spool.run_once()
        assert waiting > 0 == spool.unsynced_seconds

    with spool_in(tmp_path, segment_bytes=2000) as spool:
        asyncio.run(scenario(spool))


def test_rotations_under_a_running_sync_cost_neither_rows_nor_calls(tmp_path: Path) -> None:
    async def scenario(spool: Spool) -> int:
        syncing = asyncio.ensure_future(spool.run())
        rows = 0
        while len(segments(tmp_path)) <= 200:
            spool.admit()
            spool.append(an_event())
            rows += 1
            await asyncio.sleep(0)
        syncing.cancel()
        await asyncio.wait({syncing})
        assert syncing.cancelled()
        return rows

    with spool_in(tmp_path, segment_bytes=2000, fsync_ms=1) as spool:
        rows = asyncio.run(scenario(spool))
        assert (spool.available, spool.write_failures, spool.last_error) == (True, 0, None)
    assert "".join(kinds(path) for path in segments(tmp_path)).count("E") == rows


# --- the disk ---


@contextlib.contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    """A disk that is full: writes beyond `size_bytes` of a file are short, then fail (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(spool: Spool, path: Path) -> int:
    """Appends until the disk refuses; returns how many rows it took."""
    with files_end_at(5000):
        for taken in range(5000):
            try:
                spool.append(an_event())
            except LedgerUnavailable:
                assert path.stat().st_size <= 5000
                return taken
    raise AssertionError("the disk took everything")


def test_a_row_that_does_not_fit_leaves_nothing_of_itself(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        taken = fill(spool, segments(tmp_path)[0])
        assert kinds(segments(tmp_path)[0]) == "E" * taken


def test_a_failing_disk_turns_calls_away(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        fill(spool, segments(tmp_path)[0])
        with pytest.raises(LedgerUnavailable):
            spool.admit()


def test_calls_are_still_turned_away_while_the_disk_takes_no_line(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        fill(spool, segments(tmp_path)[0])
        with files_end_at(1000):
            asyncio.run(spool.run_once())
        assert not spool.available
        assert len(segments(tmp_path)) == 1


def test_calls_are_taken_again_once_the_disk_takes_a_line(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        taken = fill(spool, segments(tmp_path)[0])
        asyncio.run(spool.run_once())
        spool.admit()
        spool.append(an_event())
        assert kinds(segments(tmp_path)[0]) == "E" * taken + "PE"


def look(spool: Spool, times: int = 2) -> None:
    """What the spool does in so many seconds."""
    for _ in range(times):
        spool._check_at = 0.0
        asyncio.run(spool.run_once())


def test_a_file_that_takes_nothing_any_more_is_left_for_another(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        look(spool)
        lasting = an_intent()
        spool.intend(lasting)
        first = spool._segment
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), first.fd)  # as where the disk is gone: every write fails
        with pytest.raises(LedgerUnavailable):
            spool.append(an_event())
        look(spool)
        spool.admit()
        spool.append(an_event())
        old, new = segments(tmp_path)
        assert (kinds(old), kinds(new)) == ("I", "IPE")
        assert spool.open_intents == 1
        look(spool, 5)
        assert segments(tmp_path) == [old, new]


def test_a_segment_that_somebody_deletes_is_noticed(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        look(spool)
        shutil.rmtree(tmp_path)
        look(spool, 1)
        assert (spool.available, spool.last_error) == (False, "somebody deleted the segment (ENOENT)")
        look(spool)
        spool.admit()
        spool.append(an_event())
        assert [kinds(path) for path in segments(tmp_path)] == ["PE"]


class DiskThatDoesNotSync(Spool):
    """A spool whose disk takes lines and makes none durable."""

    broken = False

    def _sync(self, check: bool) -> int | None:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super()._sync(check)


def test_a_disk_that_syncs_nothing_gets_no_file_a_second(tmp_path: Path) -> None:
    spool = DiskThatDoesNotSync(tmp_path, "r1", WrittenSpool(reserve_bytes=0), AMBIENT)
    spool.open()
    look(spool)
    spool.broken = True
    look(spool, 9)
    assert (spool.available, len(segments(tmp_path))) == (False, 2)
    spool.broken = False
    look(spool)
    spool.admit()
    spool.close()


def test_a_left_segment_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        look(spool)
        spool._unsound = spool._fault = True
        look(spool)
        old, new = segments(tmp_path)
        assert [lock_is_free(path) for path in (old, new)] == [False, False]
    assert [lock_is_free(path) for path in (old, new)] == [True, True]


def test_settings_count_without_a_restart(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        spool.settings = WrittenSpool(reserve_bytes=2**60, segment_seconds=0.0)
        look(spool, 1)
        with pytest.raises(LedgerUnavailable):
            spool.admit()
        spool.settings = WrittenSpool(reserve_bytes=0)
        look(spool, 1)
        spool.admit()


class DiskWithRoomFor(Spool):
    """A spool on a disk with as much room as the test says."""

    free_bytes = 0

    def _free_bytes(self) -> int:
        return self.free_bytes


def test_below_the_reserve_calls_are_turned_away_and_rows_still_taken(tmp_path: Path) -> None:
    spool = DiskWithRoomFor(tmp_path, "r1", WrittenSpool(reserve_bytes=8000), AMBIENT)
    spool.free_bytes = 7999
    spool.open()
    spool.append(an_event())
    with pytest.raises(LedgerUnavailable):
        spool.admit()
    spool.close()


def test_calls_are_taken_again_an_eighth_above_the_reserve(tmp_path: Path) -> None:
    spool = DiskWithRoomFor(tmp_path, "r1", WrittenSpool(reserve_bytes=8000), AMBIENT)
    seen = []
    for free_bytes in (8000, 7999, 8000, 8999, 9000, 8000):
        spool.free_bytes = free_bytes
        spool._look(spool._free_bytes())
        seen.append(spool.available)
    assert seen == [True, False, False, False, True, True]


def test_a_sync_tells_how_many_bytes_it_made_durable(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        assert asyncio.run(spool.run_once()) == segments(tmp_path)[0].stat().st_size


def test_nothing_is_left_unsynced_after_a_sync(tmp_path: Path) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        waiting = spool.unsynced_seconds
        asyncio.run(spool.run_once())
        assert waiting > 0 == spool.unsynced_seconds
