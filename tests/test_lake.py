"""The lake: every event that PostgreSQL has, as files under tenant and day, in a folder and in a bucket."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import duckdb
import msgspec
import pyarrow.parquet
import pytest
from moto.server import ThreadedMotoServer

from app.archive import Archive
from app.cli import main
from app.config import WrittenSpool
from app.core import Cost, LedgerEvent
from app.lake import COLUMNS, FOLDER, InvalidLakeUrl, Lake, LakeError, LakeReport, LakeShipper, fill
from app.ledger import Spool
from app.ledger_shipper import Shipper
from app.reports.export import _LEDGER
from tests.journey import Journey
from tests.ledger_parts import AMBIENT, Postgres, an_event, an_intent, query, running_postgres
from tests.test_ledger_shipper import event_line, intent_line, left_by_a_dead_process
from tests.test_readme import ROOT, parses
from tests.test_rollup import record

PAGE = (ROOT / "runbooks" / "lake.md").read_text()
NOON = 1_763_985_600.0  # 2025-11-24T12:00:00Z
DAY_SECONDS = 86_400.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


def ship(spool_dir: Path, url: str, replica: str = "r1", keep_free_bytes: int = 0) -> LakeReport:
    """Once from the spool to PostgreSQL, handing over what is whole."""

    async def work() -> LakeReport:
        archive = Archive(url, AMBIENT)
        lake = LakeReport()
        try:
            await Shipper(spool_dir, replica, archive, AMBIENT, 0, lake, keep_free_bytes).run_once()
        finally:
            await archive.close()
        return lake

    return asyncio.run(work())


def to_lake(spool_dir: Path, lake: Lake) -> int:
    """Once from the handed-over segments to the lake; returns the files."""
    return asyncio.run(LakeShipper(spool_dir, lake).run_once())


def spooled(spool_dir: Path, *events: LedgerEvent) -> None:
    """A segment with these events, written and sealed by a replica that has ended."""
    spool = Spool(spool_dir, "gone", WrittenSpool(reserve_bytes=0), AMBIENT)
    spool.open()
    for event in events:
        spool.append(event)
    spool.close()


def written(event: LedgerEvent) -> str:
    return msgspec.json.encode(event).decode()


def names(folder: Path) -> list[str]:
    return sorted(re.sub(r"gone-\d+", "SEGMENT", str(path.relative_to(folder))) for path in folder.rglob("*.*"))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted(folder.rglob("*.parquet"))
        for row in pyarrow.parquet.ParquetFile(path).read().to_pylist()
    ]


# --- from the spool to the lake ---


def test_events_are_files_by_tenant_and_day(tmp_path: Path, url: str) -> None:
    spooled(
        tmp_path / "spool",
        an_event(at=NOON), an_event(at=NOON + 1), an_event(at=NOON + DAY_SECONDS), an_event(at=NOON, tenant="other"),
        an_event(at=NOON, tenant=None),
    )  # fmt: skip
    ship(tmp_path / "spool", url)
    assert to_lake(tmp_path / "spool", Lake(str(tmp_path / "lake"))) == 4
    assert names(tmp_path / "lake") == [
        "tenant_id=__HIVE_DEFAULT_PARTITION__/day=2025-11-24/SEGMENT.parquet",
        "tenant_id=acme-corp/day=2025-11-24/SEGMENT.parquet",
        "tenant_id=acme-corp/day=2025-11-25/SEGMENT.parquet",
        "tenant_id=other/day=2025-11-24/SEGMENT.parquet",
    ]


def test_a_file_has_the_columns_of_an_export_with_exact_dollars(tmp_path: Path, url: str) -> None:
    event = an_event(at=NOON, cost=Cost(100_000_001, 333_333_333))
    spooled(tmp_path / "spool", event)
    ship(tmp_path / "spool", url)
    to_lake(tmp_path / "spool", Lake(str(tmp_path / "lake")))
    (row,) = rows(tmp_path / "lake")
    assert (row["event_id"], row["cost_usd"], row["timestamp"].timestamp()) == (
        event.event_id,
        Decimal("0.433333334"),
        NOON,
    )
    assert json.loads(row["event"])["tenant_id"] == "acme-corp"


def test_the_lake_has_the_export_s_columns() -> None:
    assert [column for column in _LEDGER if column.name != "tenant_id"] == list(COLUMNS)


def test_json_lines_are_the_events_themselves(tmp_path: Path, url: str) -> None:
    event = an_event(at=NOON)
    spooled(tmp_path / "spool", event)
    ship(tmp_path / "spool", url)
    to_lake(tmp_path / "spool", Lake(str(tmp_path / "lake"), "jsonl"))
    (file,) = (tmp_path / "lake").rglob("*.jsonl")
    ((kept,),) = query(url, "SELECT event FROM ledger")
    assert [json.loads(line) for line in file.read_text().splitlines()] == [kept]


def test_calls_of_a_dead_process_are_in_the_lake_as_interrupted(tmp_path: Path, url: str) -> None:
    torn = event_line(at=NOON)[:50]
    left_by_a_dead_process(tmp_path, event_line(at=NOON), intent_line(at=NOON), torn)
    ship(tmp_path, url)
    to_lake(tmp_path, Lake(str(tmp_path / "files")))
    assert sorted(row["status"] for row in rows(tmp_path / "files")) == ["interrupted", "success"]


def test_a_crash_between_completing_and_handing_over_makes_no_dead_letter(tmp_path: Path, url: str) -> None:
    intent = an_intent(at=NOON)
    path = left_by_a_dead_process(tmp_path, intent_line(intent.event_id, NOON))
    ship(tmp_path, url)
    (tmp_path / FOLDER / path.name).replace(path)  # as if it had not been handed over
    assert list(tmp_path.glob("*.dead-letter")) == []
    ship(tmp_path, url)
    assert query(url, "SELECT count(*) FROM ledger") == [(1,)]
    assert list(tmp_path.glob("*.dead-letter")) == []


def test_a_segment_is_handed_over_only_when_postgres_has_it(tmp_path: Path) -> None:
    spooled(tmp_path, an_event())
    with pytest.raises(Exception, match="PostgreSQL at"):
        ship(tmp_path, "postgresql://gateway@127.0.0.1:1/gateway")
    assert not (tmp_path / FOLDER).exists()


def test_a_living_replica_s_rotated_segment_goes_to_the_lake(tmp_path: Path, url: str) -> None:
    spool = Spool(tmp_path, "r1", WrittenSpool(reserve_bytes=0, segment_bytes=1), AMBIENT)
    spool.open()
    spool.append(an_event(at=NOON))
    asyncio.run(spool.run_once())
    ship(tmp_path, url)
    assert to_lake(tmp_path, Lake(str(tmp_path / "files"))) == 1
    spool.close()


def test_a_segment_is_sealed_when_it_is_old_enough_for_the_lake(tmp_path: Path, url: str) -> None:
    spool = Spool(tmp_path, "r1", WrittenSpool(reserve_bytes=0, segment_seconds=0.0), AMBIENT)
    spool.open()
    spool.append(an_event(at=NOON))
    asyncio.run(spool.run_once())
    asyncio.run(spool.run_once())
    ship(tmp_path, url)
    assert to_lake(tmp_path, Lake(str(tmp_path / "files"))) == 1
    spool.close()


def test_an_empty_segment_is_not_sealed_for_its_age(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "r1", WrittenSpool(reserve_bytes=0, segment_seconds=0.0), AMBIENT)
    spool.open()
    asyncio.run(spool.run_once())
    assert len(list(tmp_path.glob("*.spool"))) == 1
    spool.close()


def test_where_the_disk_is_short_nothing_waits_for_the_lake(tmp_path: Path, url: str) -> None:
    spooled(tmp_path, an_event())
    assert ship(tmp_path, url, keep_free_bytes=1 << 60).dropped_segments == 1
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_written_waits_and_is_written_once_it_can(tmp_path: Path, url: str) -> None:
    spooled(tmp_path / "spool", an_event(at=NOON))
    ship(tmp_path / "spool", url)
    (tmp_path / "lake").write_text("a file where the lake should be")
    with pytest.raises(LakeError, match="takes no files"):
        to_lake(tmp_path / "spool", Lake(str(tmp_path / "lake")))
    (tmp_path / "lake").unlink()
    assert to_lake(tmp_path / "spool", Lake(str(tmp_path / "lake"))) == 1
    assert list((tmp_path / "spool" / FOLDER).iterdir()) == []


def test_a_segment_that_another_shipper_has_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    path = left_by_a_dead_process(tmp_path / FOLDER, event_line(at=NOON))
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert to_lake(tmp_path, Lake(str(tmp_path / "files"))) == 0
    assert to_lake(tmp_path, Lake(str(tmp_path / "files"))) == 1


def test_the_shipper_process_fills_the_lake(tmp_path: Path, url: str) -> None:
    spool_dir = tmp_path / "spool"
    spooled(spool_dir, an_event(at=NOON))
    environ = os.environ | {"DATABASE_URL": url, "LEDGER_LAKE_URL": str(tmp_path / "lake")}
    command = [sys.executable, "-m", "app.ledger_shipper", "--spool-dir", str(spool_dir), "--replica", "r1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, cwd=ROOT) as shipper:
        said = next(line for line in shipper.stdout if json.loads(line)["lake"]["files"])
        shipper.stdin.close()
        assert shipper.wait(60) == 0
    assert json.loads(said)["lake"] == {"files": 1, "backlog_bytes": 0, "dropped_segments": 0, "error": None}


def test_a_lake_that_cannot_be_opened_does_not_keep_postgres_from_its_rows(tmp_path: Path, url: str) -> None:
    spooled(tmp_path, an_event())
    environ = os.environ | {"DATABASE_URL": url, "LEDGER_LAKE_URL": "ftp://nowhere"}
    command = [sys.executable, "-m", "app.ledger_shipper", "--spool-dir", str(tmp_path), "--replica", "r1"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environ, cwd=ROOT, timeout=200)
    report = json.loads(ended.stdout.splitlines()[-1])
    assert (report["shipped_rows"], report["lake"]["error"][:9]) == (1, "A lake is")
    assert b"Traceback" not in ended.stderr


# --- a bucket ---


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    name = f"ledger-{AMBIENT.key_id()}"
    made = boto3.resource("s3", endpoint_url=s3, region_name="us-east-1").Bucket(name)
    made.create()
    return made


def test_events_are_objects_in_a_bucket(tmp_path: Path, url: str, s3: str, bucket: Any) -> None:
    spooled(tmp_path, an_event(at=NOON), an_event(at=NOON, tenant="other"))
    ship(tmp_path, url)
    lake = Lake(f"s3://{bucket.name}/ledger?region=us-east-1&endpoint={s3}")
    assert to_lake(tmp_path, lake) == 2
    keys = sorted(re.sub(r"gone-\d+", "SEGMENT", item.key) for item in bucket.objects.all())
    assert keys == [
        "ledger/tenant_id=acme-corp/day=2025-11-24/SEGMENT.parquet",
        "ledger/tenant_id=other/day=2025-11-24/SEGMENT.parquet",
    ]
    content = next(iter(bucket.objects.filter(Prefix="ledger/tenant_id=other"))).get()["Body"].read()
    assert pyarrow.parquet.read_table(pyarrow.BufferReader(content)).num_rows == 1


def test_writing_a_segment_twice_leaves_the_same_objects(tmp_path: Path, s3: str, bucket: Any) -> None:
    lake = Lake(f"s3://{bucket.name}?region=us-east-1&endpoint={s3}")
    event = written(an_event(at=NOON))
    for _ in range(2):
        asyncio.run(lake.put("gone-0000000001", [event]))
    assert len(list(bucket.objects.all())) == 1


def test_a_bucket_that_is_not_there_is_a_sentence(tmp_path: Path, s3: str, bucket: Any) -> None:
    lake = Lake(f"s3://{bucket.name}-not?region=us-east-1&endpoint={s3}")
    with pytest.raises(LakeError, match=r"^s3://.*-not takes no files \(.*\): see that it is there"):
        asyncio.run(lake.put("x-0000000001", [written(an_event())]))


# --- the rest ---


@pytest.mark.parametrize(
    "wrong", ["ftp://x", "relative/folder", "s3://", "s3://key:secret@bucket", "s3://b?zone=1", "s3://b?endpoint=x", ""]
)
def test_a_url_that_is_no_lake_is_a_sentence_without_its_secrets(wrong: str) -> None:
    with pytest.raises(InvalidLakeUrl) as raised:
        Lake(wrong)
    assert "secret" not in str(raised.value)


def test_without_the_extra_the_sentence_says_how_to_get_it() -> None:
    missing = "sys.modules['pyarrow'] = sys.modules['pyarrow.fs'] = None"
    code = f"import sys; {missing}\nfrom app.lake import Lake\nLake('/x')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr.splitlines()[-1].endswith("The lake needs the extra `lake`: pip install 'llm-gateway[lake]'.")


def test_a_day_s_files_are_made_from_postgres_adjustments_included(tmp_path: Path, url: str) -> None:
    call = an_event(at=NOON)
    correction = msgspec.structs.replace(an_event(at=NOON), adjusts=call.event_id)
    record(url, [call, correction, an_event(at=NOON + DAY_SECONDS)])

    async def work() -> tuple[int, int]:
        archive = Archive(url, AMBIENT)
        try:
            return await fill(archive, Lake(str(tmp_path)), date(2025, 11, 24))
        finally:
            await archive.close()

    assert asyncio.run(work()) == (2, 1)
    assert sorted(row["adjusts"] or "" for row in rows(tmp_path)) == ["", call.event_id]


def test_the_command_fills_a_span_of_days(tmp_path: Path, url: str, capsys: Any) -> None:
    record(url, [an_event(at=NOON), an_event(at=NOON + DAY_SECONDS)])
    command = ["ledger", "fill-lake", "--from", "2025-11-24", "--to", "2025-11-25", "--database-url", url]
    assert main([*command, "--lake", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["2025-11-24: 1 rows in 1 files", "2025-11-25: 1 rows in 1 files"]


def test_duckdb_reads_the_lake_as_the_page_says_each_event_once(tmp_path: Path, url: str) -> None:
    event = an_event("01932b3c-0000-7000-8000-000000000001", at=1_793_880_000.0)  # 2026-11-05
    again = an_event(event.event_id, at=1_793_880_000.0, status="interrupted", cost=Cost(7, 7))
    lake = Lake(str(tmp_path / "lake"))
    for number, one in enumerate((again, event, event, an_event(at=1_793_880_000.0, tenant=None))):
        asyncio.run(lake.put(f"gone-{number:010d}", [written(one)]))
    view, sums = re.search(r"^```sql\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1].replace(
        "/srv/lake", str(tmp_path / "lake")
    ).strip().split("\n\n")  # fmt: skip
    with duckdb.connect() as database:
        database.execute(view)
        assert database.execute(sums).fetchall() == [("acme-corp", "support", Decimal("0.000108001"), 1)]
        assert database.execute("SELECT count(*) FROM ledger WHERE tenant_id IS NULL").fetchone() == (1,)


def test_the_commands_of_the_lake_page_are_ones() -> None:
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)).splitlines()
    assert commands
    assert [line for line in commands if not parses(line)] == []


def test_the_metrics_and_settings_of_the_lake_page_are_there(journey: Journey) -> None:
    scraped = set(re.findall(r"^# TYPE (\S+)", journey.admin("/metrics").text, re.MULTILINE))
    assert set(re.findall(r"`(gateway_[a-z_]+)`", PAGE)) <= scraped
    settings = {name for _, name in re.findall(r"`(gateway\.spool\.)([a-z_]+)`", PAGE)}
    assert settings <= set(WrittenSpool.__struct_fields__)


def test_what_waits_for_the_lake_is_listed(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / FOLDER).mkdir()
    left_by_a_dead_process(tmp_path / FOLDER, event_line())
    assert main(["spool", "list", "--spool-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("1 segments wait for the lake: ")
