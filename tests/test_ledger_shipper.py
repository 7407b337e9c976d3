"""From the spool to PostgreSQL: each row once, whatever dies, and nothing lost while the database is away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from app.archive import Archive, ArchiveAway, InvalidDatabaseUrl
from app.config import WrittenSpool
from app.ledger import Spool, encode_line, segment_name
from app.ledger_shipper import Report, Shipper
from app.sql import parse
from tests.ledger_parts import AMBIENT, Postgres, an_event, an_intent, query, running_postgres, wait_until

NOWHERE = "postgresql://gateway:s3cret@127.0.0.1:1/gateway"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


@contextlib.contextmanager
def spool_in(folder: Path, replica: str = "r1", **settings: int) -> Iterator[Spool]:
    spool = Spool(folder, replica, WrittenSpool(**{"reserve_bytes": 0, **settings}), AMBIENT)
    spool.open()
    try:
        yield spool
    finally:
        spool.close()


def ship(folder: Path, url: str, replica: str = "r1", rounds: int = 1, deadline_seconds: float = 15.0) -> Report:
    """A shipper's `run_once`, `rounds` times; each looks for orphans."""

    async def work() -> Report:
        archive = Archive(url, AMBIENT, deadline_seconds)
        shipper = Shipper(folder, replica, archive, AMBIENT, adopt_seconds=0)
        try:
            for _ in range(rounds):
                await shipper.run_once()
        finally:
            await archive.close()
        return shipper.report

    return asyncio.run(work())


def left_by_a_dead_process(folder: Path, *lines: bytes, replica: str = "dead", sequence: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / segment_name(replica, sequence)
    path.write_bytes(b"".join(lines))
    return path


def event_line(*arguments: Any, **fields: Any) -> bytes:
    return encode_line(b"E", msgspec.json.encode(an_event(*arguments, **fields)))


def intent_line(*arguments: Any, **fields: Any) -> bytes:
    return encode_line(b"I", msgspec.json.encode(an_intent(*arguments, **fields)))


SEAL = encode_line(b"S", b"")


def ids(url: str) -> list[str]:
    return sorted(str(row[0]) for row in query(url, "SELECT event_id FROM ledger"))


def statuses(url: str) -> list[str]:
    return [row[0] for row in query(url, "SELECT status FROM ledger ORDER BY status")]


# --- a row ---


def test_the_row_holds_the_whole_event(tmp_path: Path, url: str) -> None:
    event = an_event()
    with spool_in(tmp_path) as spool:
        spool.append(event)
        ship(tmp_path, url)
    ((kept,),) = query(url, "SELECT event FROM ledger")
    assert kept == json.loads(msgspec.json.encode(event))


def test_the_columns_say_what_the_event_says(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event("01932b3c-0000-7000-8000-000000000001", saved_nanos=7))
        ship(tmp_path, url)
    columns = (
        "occurred_at::text, event_id::text, tenant_id, feature_id, model_alias, status, purpose, cache_hit,"
        " input_tokens, output_tokens, total_tokens, cost_input_usd::text, cost_usd::text, saved_usd::text, cost_status"
    )
    (row,) = query(url, f"SELECT {columns} FROM (SELECT set_config('TimeZone', 'UTC', false)) AS _, ledger")
    assert row == (
        "2025-11-24 16:00:00+00", "01932b3c-0000-7000-8000-000000000001", "acme-corp", "support", "support-fast",
        "success", "client", False, 150, 50, 200, "0.000018000", "0.000108001", "0.000000007", "priced",
    )  # fmt: skip


def test_a_call_without_a_tenant_is_a_row(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event(tenant=None, alias=None, status="refused"))
        ship(tmp_path, url)
    assert statuses(url) == ["refused"]


def test_a_nul_character_does_not_cost_the_row(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event(feature="a\0b\\u0000"))
        ship(tmp_path, url)
    assert query(url, "SELECT feature_id FROM ledger") == [("a\ufffdb\\u0000",)]


# --- a living replica's segment ---


def test_rows_arrive_while_the_segment_is_written(tmp_path: Path, url: str) -> None:
    events = [an_event() for _ in range(3)]
    with spool_in(tmp_path) as spool:
        for event in events:
            spool.append(event)
        report = ship(tmp_path, url)
    assert (ids(url), report.shipped_rows) == (sorted(event.event_id for event in events), 3)


def test_a_running_call_is_not_called_interrupted(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.intend(an_intent())
        ship(tmp_path, url, rounds=3)
    assert ids(url) == []


def test_a_line_still_being_written_is_waited_for(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        with next(tmp_path.glob("*.spool")).open("ab") as half:
            half.write(b"0000")
        assert ship(tmp_path, url).dead_letters == 0


def test_another_living_replicas_segment_is_left_alone(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path, "r2") as spool:
        spool.append(an_event())
        ship(tmp_path, url, "r1")
        assert ids(url) == []


def test_a_replica_whose_name_begins_like_ours_is_another(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path, "r1-2") as spool:
        spool.append(an_event())
        ship(tmp_path, url, "r1")
        assert ids(url) == []


def test_a_new_shipper_goes_on_at_the_checkpoint(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        ship(tmp_path, url)
        query(url, "TRUNCATE ledger")
        spool.append(an_event())
        ship(tmp_path, url)
    assert len(ids(url)) == 1


def test_shipping_a_segment_twice_changes_nothing(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        ship(tmp_path, url)
        before = query(url, "SELECT * FROM ledger")
        next(tmp_path.glob("*.offset")).unlink()
        report = ship(tmp_path, url)
    assert (query(url, "SELECT * FROM ledger"), report.shipped_rows) == (before, 0)


def test_a_torn_checkpoint_starts_again_from_the_beginning(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        ship(tmp_path, url)
        next(tmp_path.glob("*.offset")).write_bytes(b"\0\0")
        spool.append(an_event())
        ship(tmp_path, url)
    assert len(ids(url)) == 2


def test_rotated_segments_are_shipped_and_deleted(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path, segment_bytes=5000) as spool:
        for _ in range(20):
            spool.append(an_event())
        ship(tmp_path, url, rounds=2)
        assert (len(ids(url)), len(list(tmp_path.glob("*.spool")))) == (20, 1)


def test_an_open_call_survives_rotation_as_one_row(tmp_path: Path, url: str) -> None:
    intent = an_intent()
    with spool_in(tmp_path, segment_bytes=3000) as spool:
        spool.intend(intent)
        for _ in range(5):
            spool.append(an_event(status="error"))
            ship(tmp_path, url)
        spool.append(an_event(intent.event_id))
    ship(tmp_path, url)
    assert statuses(url) == ["error"] * 5 + ["success"]


def test_nothing_is_left_of_a_drained_replica(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
    ship(tmp_path, url)
    assert list(tmp_path.iterdir()) == []


# --- a dead replica's segment ---


def test_a_dead_process_leaves_its_events_and_interrupted_rows(tmp_path: Path, url: str) -> None:
    done = an_intent()
    left_by_a_dead_process(
        tmp_path,
        encode_line(b"I", msgspec.json.encode(done)), event_line(done.event_id), intent_line(),
    )  # fmt: skip
    ship(tmp_path, url)
    assert statuses(url) == ["interrupted", "success"]


def test_an_interrupted_row_is_charged_at_the_estimate(tmp_path: Path, url: str) -> None:
    left_by_a_dead_process(tmp_path, intent_line())
    ship(tmp_path, url)
    assert query(url, "SELECT total_tokens, cost_usd::text, usage_source FROM ledger") == [
        (1224, "0.000644400", "estimated")
    ]


def test_the_last_intent_of_a_call_names_the_interrupted_target(tmp_path: Path, url: str) -> None:
    first = an_intent(model="primary")
    left_by_a_dead_process(
        tmp_path, encode_line(b"I", msgspec.json.encode(first)), intent_line(first.event_id, model="fallback")
    )
    ship(tmp_path, url)
    assert query(url, "SELECT model_resolved FROM ledger") == [("fallback",)]


def test_a_sealed_segment_makes_no_interrupted_row(tmp_path: Path, url: str) -> None:
    left_by_a_dead_process(tmp_path, intent_line(), SEAL)
    ship(tmp_path, url)
    assert ids(url) == []


def test_dying_in_a_rotation_leaves_one_interrupted_row(tmp_path: Path, url: str) -> None:
    line = intent_line()
    left_by_a_dead_process(tmp_path, line, sequence=1)
    left_by_a_dead_process(tmp_path, line, sequence=2)
    ship(tmp_path, url)
    assert statuses(url) == ["interrupted"]


def test_an_event_in_the_next_segment_beats_the_interrupted_row(tmp_path: Path, url: str) -> None:
    intent = an_intent()
    line = encode_line(b"I", msgspec.json.encode(intent))
    left_by_a_dead_process(tmp_path, line, sequence=1)  # its seal did not reach the disk
    left_by_a_dead_process(tmp_path, line, event_line(intent.event_id), sequence=2)
    ship(tmp_path, url)
    assert statuses(url) == ["success"]


def test_the_intent_in_the_newest_segment_names_the_interrupted_target(tmp_path: Path, url: str) -> None:
    first = an_intent(model="primary")
    line = encode_line(b"I", msgspec.json.encode(first))
    left_by_a_dead_process(tmp_path, line, sequence=1)
    left_by_a_dead_process(tmp_path, line, intent_line(first.event_id, model="fallback"), sequence=2)
    ship(tmp_path, url)
    assert query(url, "SELECT model_resolved FROM ledger") == [("fallback",)]


def test_an_intent_before_the_checkpoint_is_not_forgotten(tmp_path: Path, url: str) -> None:
    event = event_line()
    path = left_by_a_dead_process(tmp_path, intent_line(), event)
    path.with_name(path.name + ".offset").write_bytes(b"%d" % path.stat().st_size)
    ship(tmp_path, url)
    assert statuses(url) == ["interrupted"]


def test_an_adopted_segment_is_deleted_with_its_checkpoint(tmp_path: Path, url: str) -> None:
    left_by_a_dead_process(tmp_path, event_line(), intent_line())
    report = ship(tmp_path, url)
    assert (list(tmp_path.iterdir()), report.adopted_segments) == ([], 1)


def test_a_checkpoint_without_its_segment_is_cleared_away(tmp_path: Path, url: str) -> None:
    (tmp_path / "dead-0000000001.spool.offset").write_bytes(b"10")
    ship(tmp_path, url)
    assert list(tmp_path.iterdir()) == []


def test_two_adopters_make_each_row_once(tmp_path: Path, url: str) -> None:
    for sequence in range(1, 9):
        left_by_a_dead_process(tmp_path, *(event_line() for _ in range(50)), intent_line(), sequence=sequence)

    async def race() -> list[int]:
        archives = [Archive(url, AMBIENT), Archive(url, AMBIENT)]
        shippers = [Shipper(tmp_path, f"r{n}", archive, AMBIENT, 0) for n, archive in enumerate(archives)]
        try:
            return await asyncio.gather(*(shipper.run_once() for shipper in shippers))
        finally:
            for archive in archives:
                await archive.close()

    shipped = asyncio.run(race())
    assert (sum(shipped), len(ids(url)), list(tmp_path.iterdir())) == (408, 408, [])


def test_a_partition_that_is_made_while_rows_wait_for_it_takes_them(url: str) -> None:
    async def main() -> int:
        archive = Archive(url, AMBIENT)
        await archive.prepare()
        try:
            with psycopg.connect(url) as other:
                other.execute("CREATE TABLE made_meanwhile (LIKE ledger INCLUDING ALL)")
                month = "FOR VALUES FROM ('2025-11-01') TO ('2025-12-01')"
                other.execute(f"ALTER TABLE ledger ATTACH PARTITION made_meanwhile {month}")
                waiting = asyncio.create_task(archive.insert([msgspec.json.encode(an_event()).decode()]))
                waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                while not query(url, waits):  # noqa: ASYNC110 - the database tells nobody
                    await asyncio.sleep(0.01)
                other.commit()
            return (await waiting)[0]
        finally:
            await archive.close()

    assert (asyncio.run(main()), query(url, "SELECT count(*) FROM made_meanwhile")) == (1, [(1,)])


def test_a_killed_writer_leaves_every_appended_row_and_an_interrupted_one(tmp_path: Path, url: str) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from app.config import WrittenSpool
        from app.ledger import Spool
        from tests.ledger_parts import AMBIENT, an_event, an_intent
        spool = Spool(Path(sys.argv[1]), "r9", WrittenSpool(reserve_bytes=0, segment_bytes=100_000), AMBIENT)
        spool.open()
        spool.intend(an_intent())
        while True:
            intent = an_intent()
            spool.intend(intent)
            spool.append(an_event(intent.event_id))
            print(intent.event_id, flush=True)
    """)
    writer = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout as output:
        told = {output.readline().strip() for _ in range(500)}
        writer.send_signal(signal.SIGKILL)
        told |= {line.strip() for line in output if line.endswith("\n")}
    writer.wait()
    ship(tmp_path, url)
    assert told <= {row[0] for row in query(url, "SELECT event_id::text FROM ledger WHERE status = 'success'")}
    assert "interrupted" in statuses(url)


# --- damage ---


def test_a_damaged_line_is_set_aside_and_the_rest_shipped(tmp_path: Path, url: str) -> None:
    broken = bytearray(event_line())
    broken[100] ^= 1
    path = left_by_a_dead_process(tmp_path, event_line(), bytes(broken), event_line(), SEAL)
    report = ship(tmp_path, url)
    assert (len(ids(url)), report.dead_letters) == (2, 1)
    assert path.with_name(path.name + ".dead-letter").read_bytes() == bytes(broken)


def test_a_torn_tail_is_set_aside(tmp_path: Path, url: str) -> None:
    whole, torn = event_line(), event_line()[:-200]
    path = left_by_a_dead_process(tmp_path, whole, torn)
    ship(tmp_path, url)
    assert (len(ids(url)), path.with_name(path.name + ".dead-letter").read_bytes()) == (1, torn + b"\n")


def test_a_line_that_is_not_json_is_set_aside(tmp_path: Path, url: str) -> None:
    left_by_a_dead_process(tmp_path, encode_line(b"E", b"{nonsense"), encode_line(b"I", b"[1]"), event_line(), SEAL)
    assert (ship(tmp_path, url).dead_letters, len(ids(url))) == (2, 1)


def test_an_event_that_cannot_be_a_row_does_not_hold_the_others_up(tmp_path: Path, url: str) -> None:
    left_by_a_dead_process(tmp_path, *(event_line() for _ in range(5)), event_line("not-a-uuid"), event_line(), SEAL)
    assert (ship(tmp_path, url).dead_letters, len(ids(url))) == (1, 6)


def test_damage_before_the_checkpoint_is_set_aside_only_once(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool:
        with next(tmp_path.glob("*.spool")).open("ab") as file:
            file.write(b"garbage\n")
        spool.append(an_event())
        first = ship(tmp_path, url).dead_letters
    assert (first, ship(tmp_path, url).dead_letters) == (1, 0)


# --- PostgreSQL away ---


def test_rows_written_while_postgres_was_down_are_all_there(tmp_path: Path, postgres: Postgres, url: str) -> None:
    with spool_in(tmp_path, segment_bytes=20_000) as spool:
        spool.append(an_event())
        ship(tmp_path, url)
        postgres.stop()
        try:
            for _ in range(100):
                spool.append(an_event())
            with pytest.raises(ArchiveAway):
                ship(tmp_path, url)
        finally:
            postgres.start()
        ship(tmp_path, url, rounds=2)
    assert len(ids(url)) == 101


def test_a_restarted_postgres_is_used_again_by_the_same_shipper(tmp_path: Path, postgres: Postgres, url: str) -> None:
    async def work(spool: Spool) -> int:
        archive = Archive(url, AMBIENT)
        shipper = Shipper(tmp_path, "r1", archive, AMBIENT)
        await shipper.run_once()
        postgres.stop()
        postgres.start()
        spool.append(an_event())
        with pytest.raises(ArchiveAway):
            await shipper.run_once()
        shipped = await shipper.run_once()
        await archive.close()
        return shipped

    with spool_in(tmp_path) as spool:
        assert asyncio.run(work(spool)) == 1


def test_a_frozen_postgres_holds_the_shipper_only_until_the_deadline(
    tmp_path: Path, postgres: Postgres, url: str
) -> None:
    async def work(spool: Spool) -> int:
        archive = Archive(url, AMBIENT, deadline_seconds=0.5)
        shipper = Shipper(tmp_path, "r1", archive, AMBIENT)
        await shipper.run_once()
        postgres.freeze()
        try:
            spool.append(an_event())
            for _ in range(2):  # once in a statement, once while connecting
                async with asyncio.timeout(12):  # without it, a statement would have had 15
                    with pytest.raises(ArchiveAway):
                        await shipper.run_once()
        finally:
            postgres.thaw()
        async with asyncio.timeout(90):
            while not await ship_if_up(shipper):
                pass
        await archive.close()
        return shipper.report.shipped_rows

    async def ship_if_up(shipper: Shipper) -> int:
        with contextlib.suppress(ArchiveAway):
            await shipper.run_once()
        return len(ids(url))

    with spool_in(tmp_path) as spool:
        asyncio.run(work(spool))
    assert len(ids(url)) == 1


def test_what_waits_for_postgres_is_counted(tmp_path: Path) -> None:
    async def work() -> Report:
        shipper = Shipper(tmp_path, "r1", Archive(NOWHERE, AMBIENT), AMBIENT)
        with pytest.raises(ArchiveAway):
            await shipper.run_once()
        return shipper.report

    orphan = left_by_a_dead_process(tmp_path, event_line())
    with spool_in(tmp_path) as spool:
        spool.append(an_event())
        assert asyncio.run(work()).backlog_bytes == orphan.stat().st_size + spool.bytes_written


def test_an_outage_is_told_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(ArchiveAway, match=r"127\.0\.0\.1:1 .*Connection refused") as caught:
        ship(tmp_path, NOWHERE)
    assert "s3cret" not in str(caught.value)


def test_an_unreadable_url_is_refused_without_the_password() -> None:
    with pytest.raises(InvalidDatabaseUrl) as caught:
        Archive("postgres//gateway:s3cret@db/ledger", AMBIENT)
    assert "s3cret" not in str(caught.value)


# --- the table ---


def partitions(url: str) -> list[str]:
    return [
        row[0]
        for row in query(
            url, "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'ledger'::regclass ORDER BY 1"
        )
    ]


def test_this_month_and_the_next_two_have_partitions(tmp_path: Path, url: str) -> None:
    ship(tmp_path, url)
    ((expected,),) = query(
        url,
        "SELECT array_agg(to_char(month, '\"ledger_\"YYYY_MM')) FROM generate_series("
        "date_trunc('month', now() AT TIME ZONE 'UTC'), now() AT TIME ZONE 'UTC'"
        " + interval '2 months', '1 month') AS month",
    )
    assert partitions(url) == [*expected, "ledger_default"]


def test_a_row_of_a_month_without_a_partition_goes_to_the_default_one(tmp_path: Path, url: str) -> None:
    left_by_a_dead_process(tmp_path, event_line(at=946_684_800.0))
    ship(tmp_path, url)
    assert query(url, "SELECT tableoid::regclass::text FROM ledger") == [("ledger_default",)]


def test_a_partition_made_later_takes_its_rows_out_of_the_default_one(tmp_path: Path, url: str) -> None:
    left_by_a_dead_process(tmp_path, event_line(at=946_684_800.0), event_line(at=949_363_200.0))
    ship(tmp_path, url)
    query(url, "SELECT ledger_make_partition('2000-01-01')")
    assert query(url, "SELECT tableoid::regclass::text FROM ledger ORDER BY occurred_at") == [
        ("ledger_2000_01",),
        ("ledger_default",),
    ]


def test_a_row_moved_to_its_partition_is_still_there_only_once(tmp_path: Path, url: str) -> None:
    line = event_line(at=946_684_800.0)
    left_by_a_dead_process(tmp_path, line)
    ship(tmp_path, url)
    query(url, "SELECT ledger_make_partition('2000-01-01')")
    left_by_a_dead_process(tmp_path, line)
    ship(tmp_path, url)
    assert len(ids(url)) == 1


def test_shippers_that_start_together_make_one_table(url: str) -> None:
    async def prepare() -> None:
        archives = [Archive(url, AMBIENT) for _ in range(6)]
        try:
            await asyncio.gather(*(archive.prepare() for archive in archives))
        finally:
            for archive in archives:
                await archive.close()

    asyncio.run(prepare())
    assert len(partitions(url)) == 4


def test_a_role_that_may_not_create_tables_ships_all_the_same(tmp_path: Path, url: str) -> None:
    ship(tmp_path, url)
    role = f"writer_{AMBIENT.key_id()}"
    query(url, f"CREATE ROLE {role} LOGIN")
    query(url, f"GRANT INSERT, SELECT ON ledger TO {role}")
    left_by_a_dead_process(tmp_path, event_line())
    ship(tmp_path, url.replace("postgres@", f"{role}@"))
    assert len(ids(url)) == 1


def test_a_statement_without_its_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match="sentence"):
        parse("-- name: one\n-- It counts.\nSELECT 1;\n\n-- name: other\nSELECT 2;")


# --- the process ---


@contextlib.contextmanager
def shipper_process(folder: Path, url: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "app.ledger_shipper", "--spool-dir", folder, "--replica", "r1", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "DATABASE_URL": url},
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_the_process_ships_while_the_replica_writes(tmp_path: Path, url: str) -> None:
    with spool_in(tmp_path) as spool, shipper_process(tmp_path, url):
        spool.append(an_event())
        wait_until(lambda: query(url, "SELECT to_regclass('ledger')") != [(None,)] and ids(url), "the row is there")


def test_the_end_of_standard_input_ships_what_the_dead_replica_left(tmp_path: Path, url: str) -> None:
    ship(tmp_path, url)
    with spool_in(tmp_path) as spool, shipper_process(tmp_path, url) as process:
        spool.append(an_event())
        spool.intend(an_intent())
        wait_until(lambda: ids(url), "the first row is there")
        spool.close()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    assert statuses(url) == ["interrupted", "success"]


def test_a_drain_without_postgres_ends_in_time_and_keeps_the_segment(tmp_path: Path) -> None:
    left_by_a_dead_process(tmp_path, event_line(), replica="r1")
    with shipper_process(tmp_path, NOWHERE, "--drain-seconds", "1") as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r1-0000000001.spool"]


def test_signals_for_the_whole_group_do_not_end_the_shipper_before_the_replica(tmp_path: Path, url: str) -> None:
    with shipper_process(tmp_path, url) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        left_by_a_dead_process(tmp_path, event_line(), replica="r1")
        wait_until(lambda: query(url, "SELECT to_regclass('ledger')") != [(None,)] and ids(url), "the row is there")


def test_each_status_line_is_a_report(tmp_path: Path) -> None:
    with shipper_process(tmp_path, NOWHERE) as process:
        assert process.stdout is not None
        reports = [msgspec.json.decode(process.stdout.readline(), type=Report) for _ in range(2)]
    assert reports[1].postgres == "down"
    assert "Connection refused" in str(reports[1].error)
    assert "s3cret" not in str(reports)


def test_a_missing_database_url_is_a_sentence(tmp_path: Path) -> None:
    with shipper_process(tmp_path, "") as process:
        _, told = process.communicate(timeout=90)
    assert (process.returncode, told.count("\n"), "DATABASE_URL is not set" in told) == (2, 1, True)
