"""The ledger as it grows: months as partitions, what retention drops, plans that prune, and the published schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jsonschema
import msgspec
import pytest

from app.ambient import Ambient
from app.archive import Archive, Maintained
from app.cli import main
from app.core import LedgerEvent, Usage, interrupted
from app.ledger_schema import ledger_schema
from app.reports.schedule import standard_jobs
from app.sql import statements
from loadtest import ledger_scale
from tests.ledger_parts import AMBIENT, SCHEMA, Postgres, an_event, an_intent, conforming, query, running_postgres

pytestmark = pytest.mark.timeout(600)
"""Two million rows take half a minute on a busy machine."""
NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


class Clock(Ambient):
    """Stands still at `NOW`, or where a test puts it."""

    at = NOW

    def now(self) -> float:
        return self.at.timestamp()


def maintained(url: str, retention_months: int | None = None, *rows: datetime, at: datetime = NOW) -> Maintained:
    """A ledger with a row at each of these times, after its maintenance."""

    async def work() -> Maintained:
        clock = Clock()
        clock.at = at
        archive = Archive(url, clock)
        try:
            await archive.prepare()
            events = [msgspec.json.encode(an_event(at=moment.timestamp())).decode() for moment in rows]
            await archive.insert(events)
            return await archive.maintain(retention_months)
        finally:
            await archive.close()

    return asyncio.run(work())


def places(url: str) -> dict[str, int]:
    """Rows by partition."""
    return dict(query(url, "SELECT tableoid::regclass::text, count(*) FROM ledger GROUP BY 1 ORDER BY 1"))


def partitions(url: str) -> list[str]:
    inherits = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'ledger'::regclass ORDER BY 1"
    return [name for (name,) in query(url, inherits)]


# --- partitions ---


def test_stragglers_are_moved_into_the_partition_of_their_month(url: str) -> None:
    maintained(url, None, NOW, NOW - timedelta(days=90), NOW - timedelta(days=91), NOW - timedelta(days=400))
    assert places(url) == {"ledger_2025_02": 1, "ledger_2025_12": 2, "ledger_2026_03": 1}


def test_the_next_look_of_a_shipper_moves_stragglers_too(url: str) -> None:
    maintained(url, None)
    query(url, "INSERT INTO ledger_default SELECT (jsonb_populate_record(NULL::ledger_default, %s::jsonb)).*", a_row())

    async def look() -> None:
        archive = Archive(url, Clock())
        await archive.prepare()
        await archive.close()

    asyncio.run(look())
    assert places(url) == {"ledger_2025_06": 1}


def a_row() -> str:
    """A row of June 2025, as the table has it."""
    columns = {
        "occurred_at": "2025-06-01T00:00:00Z", "event_id": AMBIENT.event_id(0), "cache_hit": False,
        "fallback_used": False, "event": {}, "recorded_at": "2026-03-01T00:00:00Z",
        **dict.fromkeys(("request_id", "trace_id", "key_id", "purpose", "environment", "status", "cost_status"), "x"),
        **dict.fromkeys(("usage_source", "price_table_version", "config_version"), "x"),
        **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0),
        **dict.fromkeys(("cost_input_usd", "cost_output_usd", "cost_usd", "saved_usd"), 0),
    }  # fmt: skip
    return json.dumps(columns)


def test_rows_of_a_clock_that_is_wrong_get_no_partition_and_are_counted(url: str) -> None:
    done = maintained(url, None, datetime(1999, 1, 1, tzinfo=UTC), datetime(2055, 1, 1, tzinfo=UTC))
    assert (done.default_rows, partitions(url)) == (
        2, ["ledger_2026_03", "ledger_2026_04", "ledger_2026_05", "ledger_default"]
    )  # fmt: skip


def test_a_moved_straggler_is_shipped_again_as_no_second_row(url: str) -> None:
    moment = NOW - timedelta(days=90)
    maintained(url, None, moment)
    event = query(url, "SELECT event::text FROM ledger")[0][0]

    async def again() -> int:
        archive = Archive(url, AMBIENT)
        new, _ = await archive.insert([event])
        await archive.close()
        return new

    assert asyncio.run(again()) == 0


# --- retention ---


def test_retention_drops_whole_months_before_those_it_keeps(url: str) -> None:
    done = maintained(url, 2, *(datetime(year, month, 1, tzinfo=UTC) for year, month in
                                ((2025, 11), (2025, 12), (2026, 1), (2026, 2), (2026, 3))))  # fmt: skip
    assert done.dropped == ("ledger_2025_11", "ledger_2025_12")
    assert places(url) == {"ledger_2026_01": 1, "ledger_2026_02": 1, "ledger_2026_03": 1}


def test_retention_takes_stragglers_of_dropped_months_too(url: str) -> None:
    maintained(url, 2, datetime(1999, 1, 1, tzinfo=UTC))
    assert places(url) == {}


def test_without_retention_nothing_is_dropped(url: str) -> None:
    assert maintained(url, None, NOW - timedelta(days=3000)).dropped == ()
    assert sum(places(url).values()) == 1


def test_the_last_moment_of_a_dropped_month_and_the_first_that_stays(url: str) -> None:
    first_kept = datetime(2026, 2, 1, tzinfo=UTC)
    maintained(url, 1, first_kept - timedelta(microseconds=1), first_kept)
    assert places(url) == {"ledger_2026_02": 1}


def test_the_command_keeps_as_many_months_as_it_is_told(url: str, capsys: Any) -> None:
    maintained(url, None, NOW)
    command = ["ledger", "maintain", "--database-url", url, "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == []
    assert main([*command, "--retention-months", "1"]) == 0
    assert "ledger_2026_03" in json.loads(capsys.readouterr().out)["dropped"]


def test_the_scheduled_job_drops_what_is_past_retention(url: str) -> None:
    maintained(url, None, NOW)

    async def work() -> str:
        archive = Archive(url, AMBIENT)
        try:
            return await standard_jobs(None, None, 900.0, 1)[0].run(archive)
        finally:
            await archive.close()

    assert "ledger_2026_03" in asyncio.run(work())


# --- two million rows ---


@pytest.fixture(scope="module")
def large(postgres: Postgres) -> str:
    """A year of 1,000 tenants, made as the measurement makes fifty million."""
    url = postgres.database()
    asyncio.run(ledger_scale.fill(url, rows=2_000_000, tenants=1000, months=12, now=NOW))
    query(url, "VACUUM ledger")  # as autovacuum does in time
    return url


def plan(url: str, statement: str, **parameters: object) -> dict[str, Any]:
    """The plan as PostgreSQL says that it ran."""

    async def explain() -> dict[str, Any]:
        archive = Archive(url, AMBIENT)
        try:
            ((found,),) = await archive.rows(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            return found[0]["Plan"]
        finally:
            await archive.close()

    return asyncio.run(explain())


def scans(node: dict[str, Any]) -> dict[str, str]:
    """Partitions that were read, and how."""
    found = {node["Relation Name"]: node["Node Type"]} if "Relation Name" in node else {}
    for child in node.get("Plans", []):
        found |= scans(child)
    return found


SPAN = {"first": "2025-08-01", "last": "2025-08-31"}


def test_a_tenant_s_month_reads_the_tenant_s_index_of_one_partition_and_no_row(large: str) -> None:
    found = plan(large, statements("period.sql")["ledger_sums"], tenant="t0042", environment=None, **SPAN)
    assert scans(found) == {"ledger_2025_08": "Index Only Scan"}


def test_a_tenant_s_day_reads_the_tenant_s_index_of_one_partition_and_no_row(large: str) -> None:
    found = plan(large, statements("usage.sql")["usage"], tenant="t0042", environment=None, day="2025-08-07")
    assert scans(found) == {"ledger_2025_08": "Index Only Scan"}


def test_a_span_over_two_months_reads_two_partitions(large: str) -> None:
    span = {"first": "2025-08-31", "last": "2025-09-01"}
    found = plan(large, statements("period.sql")["ledger_sums"], tenant="t0042", environment=None, **span)
    assert sorted(scans(found)) == ["ledger_2025_08", "ledger_2025_09"]


def test_the_year_is_spread_over_its_months_and_tenants(large: str) -> None:
    months, tenants = query(large, "SELECT count(DISTINCT tableoid), count(DISTINCT tenant_id) FROM ledger")[0]
    assert (months, tenants, query(large, "SELECT count(*) FROM ledger")) == (12, 1000, [(2_000_000,)])


# --- the published schema ---


def test_the_published_schema_is_the_event_s() -> None:
    assert SCHEMA.read_text() == ledger_schema()


def test_the_command_prints_the_published_schema(capsys: Any) -> None:
    assert main(["ledger", "schema"]) == 0
    assert capsys.readouterr().out == SCHEMA.read_text()


@pytest.mark.parametrize(
    "event",
    [an_event(), an_event(tenant=None, alias=None, status="refused", usage=Usage()), interrupted(an_intent())],
    ids=["success", "refused", "interrupted"],
)
def test_events_fit_the_schema(event: LedgerEvent) -> None:
    assert conforming(json.loads(msgspec.json.encode(event)))


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("event_id", "1"), ("timestamp", "2026-01-01"), ("status", "ok"), ("cost_usd", 1), ("tenant_id", 3),
        ("$schema", "cost-ledger-v2"), ("adjusts", "x"), ("saved_usd", "0"),
    ],
)  # fmt: skip
def test_what_is_no_event_does_not_fit_the_schema(member: str, value: object) -> None:
    event = json.loads(msgspec.json.encode(an_event()))
    with pytest.raises(jsonschema.ValidationError):
        conforming(event | {member: value})


def test_what_says_nothing_is_left_out_and_the_schema_says_what_it_is() -> None:
    written = json.loads(msgspec.json.encode(an_event(usage=Usage(input=3))))
    assert written["usage"]["classes"] == {"input": 3}
    assert not {"error_code", "cache_kind", "ttft_ms", "rule"} & written.keys()
    assert {"tenant_id", "user_id_hash", "prompt_version", "cache_hit", "fallback_chain"} <= written.keys()
    whole = conforming(written)
    assert (whole["error_code"], whole["usage"]["classes"]["cache_read"]) == (None, 0)
    assert msgspec.json.decode(json.dumps(whole), type=LedgerEvent) == msgspec.json.decode(
        json.dumps(written), type=LedgerEvent
    )


def test_an_event_without_a_member_does_not_fit_the_schema() -> None:
    event = json.loads(msgspec.json.encode(an_event()))
    del event["usage"]
    with pytest.raises(jsonschema.ValidationError):
        conforming(event)
