"""The spool under pressure: a disk that is full, dead letters that become rows after all. Drilled on the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from app.archive import Archive
from app.cli import main
from app.config import WrittenSpool
from app.dead_letters import Replayed, bury, files, replay
from app.errors import LedgerUnavailable
from app.ledger import Spool, encode_line, read_lines
from tests.journey import KEY, Journey, chat, until
from tests.ledger_parts import AMBIENT, Postgres, an_event, query, running_postgres
from tests.test_ledger_shipper import ids, ship, spool_in
from tests.test_readme import ROOT, parses

PAGE = (ROOT / "runbooks" / "ledger.md").read_text()


# --- a full disk: tmpfs where this process may mount one ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("a file system can be mounted by root only, and not in every container")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextlib.contextmanager
def opened(folder: Path, reserve_bytes: int) -> Iterator[Spool]:
    spool = Spool(folder, "r1", WrittenSpool(reserve_bytes=reserve_bytes), AMBIENT)
    spool.open()
    try:
        yield spool
    finally:
        spool.close()


def rows_in(folder: Path) -> list[str]:
    lines = [line for path in folder.glob("*.spool") for line in read_lines(path.read_bytes(), final=True)]
    assert [line for line in lines if line.kind == "?"] == []
    return [json.loads(line.payload)["event_id"] for line in lines if line.kind == "E"]


def fill(file: Path) -> None:
    """Takes all that is left of the disk."""
    with file.open("wb", buffering=0) as out, pytest.raises(OSError, match="No space left"):
        out.writelines(bytes(4096) for _ in range(10_000))


def test_a_disk_that_fills_up_keeps_every_row_it_took(small_disk: Path) -> None:
    kept = []
    with opened(small_disk, 0) as spool, contextlib.suppress(LedgerUnavailable):
        for event in (an_event() for _ in range(100_000)):
            spool.append(event)
            kept.append(event.event_id)
    assert rows_in(small_disk) == kept
    assert 500 < len(kept) < 100_000


def test_a_full_disk_refuses_calls_until_there_is_room_again(small_disk: Path) -> None:
    with opened(small_disk, 0) as spool:
        fill(small_disk / "other")
        with contextlib.suppress(LedgerUnavailable):
            for _ in range(10):  # what is left of the last page
                spool.append(an_event())
        with pytest.raises(LedgerUnavailable):
            spool.admit()
        (small_disk / "other").unlink()
        asyncio.run(spool.run_once())
        spool.admit()
        spool.append(an_event())


def test_calls_under_way_have_the_reserve_to_write_their_rows_into(small_disk: Path) -> None:
    with opened(small_disk, 1_000_000) as spool:
        taken = 0
        with contextlib.suppress(LedgerUnavailable):
            while True:
                spool.admit()
                spool.append(an_event())
                taken += 1
                if taken % 50 == 0:  # a look at the disk is due every second
                    spool._look(spool._free_bytes())
        for _ in range(300):
            spool.append(an_event())
    assert len(rows_in(small_disk)) == taken + 300


# --- a full disk under a living replica: the kernel's limit on the size of its files ---


@contextlib.contextmanager
def full_for(pid: int) -> Iterator[None]:
    """For this process the disk takes a hundred bytes a file, and so neither this segment's next line nor another's."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def test_a_replica_with_a_full_disk_refuses_before_it_asks_a_vendor_and_goes_on_afterwards(journey: Journey) -> None:
    replica = journey.stack.replicas[0]

    def ask() -> httpx.Response:
        headers = {
            "authorization": f"Bearer {KEY}", "x-tenant-id": "tenant-a", "x-request-id": f"full-{uuid.uuid4().hex}"
        }  # fmt: skip
        return httpx.post(f"{replica.url}/v1/chat/completions", json=chat("tokens=2"), headers=headers, timeout=60)

    before = ask()
    with full_for(replica.pid):
        until(lambda: ask().status_code == 503)
        asked = len(journey.asked())
        refused = ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert refused.headers["retry-after"] == "1"
        assert len(journey.asked()) == asked
        assert httpx.get(f"{replica.url}/health/live", timeout=60).status_code == 200
        assert "gateway_spool_available 0.0" in journey.admin("/metrics").text
    answers = [before, until(lambda: (answer := ask()).status_code == 200 and answer)]
    rows = journey.rows([answer.headers["x-request-id"] for answer in answers])
    assert [row["status"] for row in rows.values()] == ["success", "success"]


# --- dead letters ---


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


def replayed(folder: Path, url: str) -> list[Replayed]:
    async def work() -> list[Replayed]:
        archive = Archive(url, AMBIENT)
        try:
            await archive.prepare()
            return [await replay(path, archive) for path in files(folder)]
        finally:
            await archive.close()

    return asyncio.run(work())


def dead(folder: Path, *lines: bytes) -> Path:
    path = folder / "r1-0000000001.spool.dead-letter"
    bury(path, lines)
    return path


def as_json(**fields: Any) -> bytes:
    return msgspec.json.encode(an_event(**fields))


def test_a_row_that_postgres_once_refused_is_replayed_once_it_takes_it(tmp_path: Path, url: str) -> None:
    ship(tmp_path, url)
    query(url, "ALTER TABLE ledger ADD CONSTRAINT no_acme CHECK (tenant_id <> 'acme-corp') NOT VALID")
    query(url, "ALTER TABLE ledger ALTER COLUMN feature_id SET NOT NULL")
    with spool_in(tmp_path) as spool:
        spool.append(an_event(tenant="other", feature=None))
        assert ship(tmp_path, url).dead_letters == 1
    query(url, "ALTER TABLE ledger ALTER COLUMN feature_id DROP NOT NULL")
    assert [done.rows for done in replayed(tmp_path, url)] == [1]
    assert len(ids(url)) == 1
    assert list(tmp_path.glob("*.dead-letter*")) == []


def test_what_is_still_no_row_stays_with_its_reason(tmp_path: Path, url: str) -> None:
    path = dead(tmp_path, b"damaged", as_json(event_id="no-uuid"), as_json(), b'{"event_id":"1"}')
    (done,) = replayed(tmp_path, url)
    assert done.rows == 1
    assert [reason.partition(":")[2].strip()[:22] for reason in done.left] == [
        "it is damaged, and no ", "PostgreSQL refused it ", "it is no event: Object"
    ]  # fmt: skip
    assert len(path.read_bytes().splitlines()) == 3


def test_a_line_that_was_mended_by_hand_is_taken(tmp_path: Path, url: str) -> None:
    whole = encode_line(b"E", as_json())
    path = dead(tmp_path, whole[:40] + b"#" + whole[41:])
    assert [done.rows for done in replayed(tmp_path, url)] == [0]
    path.write_bytes(as_json() + b"\n\n")
    assert [done.rows for done in replayed(tmp_path, url)] == [1]


def test_a_whole_line_of_the_spool_is_taken_too(tmp_path: Path, url: str) -> None:
    dead(tmp_path, encode_line(b"E", as_json()))
    assert [done.rows for done in replayed(tmp_path, url)] == [1]


def test_replaying_twice_makes_one_row(tmp_path: Path, url: str) -> None:
    event = as_json()
    for _ in range(2):
        dead(tmp_path, event)
        replayed(tmp_path, url)
    assert len(ids(url)) == 1


def test_a_replay_that_broke_off_is_taken_up_by_the_next(tmp_path: Path, url: str) -> None:
    path = dead(tmp_path, as_json())
    path.replace(path.with_name(path.name + ".replaying"))
    dead(tmp_path, as_json())
    assert sum(done.rows for done in replayed(tmp_path, url)) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_replay_while_postgres_is_away_loses_nothing(tmp_path: Path) -> None:
    dead(tmp_path, as_json())
    command = ["spool", "replay", "--spool-dir", str(tmp_path), "--database-url", "postgresql://g@127.0.0.1:1/g"]
    assert main(command) == 1
    assert len(b"".join(path.read_bytes() for path in tmp_path.iterdir()).splitlines()) == 1


def test_burying_while_a_replay_takes_the_file_away_loses_nothing(tmp_path: Path, url: str) -> None:
    path = dead(tmp_path, as_json())
    with path.open("ab"):  # a shipper that has just opened it
        replayed(tmp_path, url)
        dead(tmp_path, as_json())
    assert [done.rows for done in replayed(tmp_path, url)] == [1]
    assert len(ids(url)) == 2


def test_the_list_says_what_waits_and_why(tmp_path: Path, capsys: Any) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        dead(tmp_path, b"damaged", as_json())
        assert main(["spool", "list", "--spool-dir", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [size > 0 for size in said["segments"].values()] == [True]
    assert list(said["dead_letters"].values()) == [
        ["it is damaged, and no line of the spool any more", "it can be tried again"]
    ]


def test_an_empty_spool_says_so(tmp_path: Path, capsys: Any) -> None:
    assert main(["spool", "list", "--spool-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} is empty: every row is shipped.\n"


def test_a_spool_that_is_not_there_is_a_sentence(tmp_path: Path, capsys: Any) -> None:
    assert main(["spool", "list", "--spool-dir", str(tmp_path / "none")]) == 1
    assert "--spool-dir names the replica's spool" in capsys.readouterr().err


# --- what the page says ---


def test_the_commands_of_the_ledger_page_are_ones() -> None:
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)).splitlines()
    assert len(commands) > 4
    assert [line for line in commands if not parses(line)] == []


def test_the_metrics_of_the_ledger_page_are_scraped(journey: Journey) -> None:
    named = set(re.findall(r"`(gateway_[a-z_]+)`", PAGE))
    scraped = set(re.findall(r"^# TYPE (\S+)", journey.admin("/metrics").text, re.MULTILINE))
    assert named
    assert named <= scraped
