"""Rollups equal the sum of the ledger's rows, however the rows arrive; and what is exported says the same."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import msgspec
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.archive import Archive
from app.cli import main
from app.core import Cost, LedgerEvent, Usage
from app.reports import rollup as rollup_module
from app.reports.export import Exports, NotRolledUp, Selection
from app.reports.focus import COLUMNS, focus
from app.reports.rollup import LedgerShrank, Rollups, write_daily
from app.reports.tables import Table, write
from tests.ledger_parts import AMBIENT, Postgres, an_event, query, running_postgres
from tests.test_readme import ROOT, parses

T = TypeVar("T")
NOON = datetime(2025, 11, 24, 12, tzinfo=UTC).timestamp()
DAY_SECONDS = 86_400.0
DAY = date(2025, 11, 24)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


def working(url: str, work: Callable[[Archive], Awaitable[T]]) -> T:
    """What `work` returns, on an archive that is closed after it."""

    async def run() -> T:
        archive = Archive(url, AMBIENT)
        try:
            return await work(archive)
        finally:
            await archive.close()

    return asyncio.run(run())


def record(url: str, events: list[LedgerEvent]) -> None:
    async def work(archive: Archive) -> None:
        await archive.prepare()
        await archive.insert([msgspec.json.encode(event).decode() for event in events])

    working(url, work)


def roll(url: str) -> list[date]:
    """The days that were summed."""

    async def work(archive: Archive) -> list[date]:
        rollups = Rollups(archive)
        await rollups.prepare()
        return [day.day for day in await rollups.run_once()]

    return working(url, work)


def settle(url: str) -> None:
    """Lets the minute pass in which a row that was recorded may become visible."""
    query(url, "UPDATE ledger SET recorded_at = recorded_at - interval '2 minutes'")


def rolled(url: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    lines = query(
        url,
        "SELECT day, tenant_id, feature_id, model_alias, model_resolved, provider, environment, requests, success,"
        " error, refused, rate_limited, blocked, client_closed, interrupted, timeout, cache_hits, fallbacks, unpriced,"
        " input_tokens, output_tokens, total_tokens, cost_input_usd, cost_output_usd, cost_usd, saved_usd FROM rollup",
    )
    assert len({line[:7] for line in lines}) == len(lines)
    return {line[:7]: line[7:] for line in lines}


STATUSES = ("success", "error", "refused", "rate_limited", "blocked", "client_closed", "interrupted", "timeout")


def summed(events: list[LedgerEvent]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """The same by plain addition."""
    groups: dict[tuple[Any, ...], list[LedgerEvent]] = defaultdict(list)
    for event in events:
        groups[
            date.fromisoformat(event.timestamp[:10]), event.tenant_id, event.feature_id, event.model_alias,
            event.model_resolved, event.provider, event.environment,
        ].append(event)  # fmt: skip
    return {key: _sums(group) for key, group in groups.items()}


def _sums(group: list[LedgerEvent]) -> tuple[Any, ...]:
    def dollars(values: list[msgspec.Raw]) -> Decimal:
        return sum((Decimal(bytes(value).decode()) for value in values), Decimal(0))

    return (
        len(group),
        *(sum(event.status == status for event in group) for status in STATUSES),
        sum(event.cache_hit for event in group),
        sum(event.fallback_used for event in group),
        sum(event.cost_status == "unpriced" for event in group),
        sum(event.usage.input_tokens for event in group),
        sum(event.usage.output_tokens for event in group),
        sum(event.usage.total_tokens for event in group),
        dollars([event.cost_usd.input for event in group]),
        dollars([event.cost_usd.output for event in group]),
        dollars([event.cost_usd.total for event in group]),
        dollars([event.saved_usd for event in group]),
    )


def made(
    event_id: UUID | None, seconds: float, tenant: str | None, feature: str | None, alias: str | None, status: str,
    read: int, said: int, nanos: int, hit: bool, environment: str,
) -> LedgerEvent:  # fmt: skip
    event = an_event(
        event_id=event_id and str(event_id),
        at=NOON + seconds,
        tenant=tenant,
        feature=feature,
        alias=alias,
        status=status,
        usage=Usage(input=read, output=said),
        cost=Cost(nanos, nanos // 3, nanos % 5 != 0),
        environment=environment,
        saved_nanos=nanos if hit else 0,
    )
    return msgspec.structs.replace(
        event, cache_hit=hit, fallback_used=read % 2 == 1, model_resolved=alias and f"{alias}-1"
    )


EVENTS = st.builds(
    made,
    st.uuids(),
    st.floats(-1.6 * DAY_SECONDS, 1.6 * DAY_SECONDS),
    st.sampled_from(["acme-corp", "other-inc", None]),
    st.sampled_from(["support", "search", None]),
    st.sampled_from(["support-fast", "support-quality", None]),
    st.sampled_from(STATUSES),
    st.integers(0, 3_000_000),
    st.integers(0, 3_000_000),
    st.integers(0, 10**13),
    st.booleans(),
    st.sampled_from(["prod", "staging"]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(EVENTS, max_size=12), min_size=1, max_size=4))
def test_rollups_are_the_exact_sums_of_the_rows_however_they_arrive(
    postgres: Postgres, batches: list[list[LedgerEvent]]
) -> None:
    url = postgres.database()
    for number in range(len(batches)):
        record(url, batches[number])
        roll(url)
        assert rolled(url) == summed([event for batch in batches[: number + 1] for event in batch])


def test_a_second_rollup_of_a_day_changes_nothing(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON), an_event(at=NOON)])
    roll(url)
    before = rolled(url)
    working(url, lambda archive: Rollups(archive).sum_day(DAY))
    assert rolled(url) == before


def test_only_days_with_new_rows_are_summed_again(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON), an_event(at=NOON + DAY_SECONDS)])
    settle(url)
    assert roll(url) == [DAY, date(2025, 11, 25)]
    record(url, [an_event(at=NOON + DAY_SECONDS)])
    assert roll(url) == [date(2025, 11, 25)]


def test_nothing_new_is_nothing_to_do(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON)])
    settle(url)
    roll(url)
    assert roll(url) == []


def test_a_row_that_arrives_months_late_is_in_its_day(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON)])
    settle(url)
    roll(url)
    late = an_event(at=NOON - 200 * DAY_SECONDS)
    record(url, [late])
    roll(url)
    assert summed([late]).items() <= rolled(url).items()


def test_a_row_that_became_visible_after_the_look_is_not_missed(postgres: Postgres) -> None:
    """Its transaction began before the rollup's and ended after it, so that its time is the older one."""
    url = postgres.database()
    record(url, [an_event(at=NOON)])
    roll(url)
    late = an_event(at=NOON)
    record(url, [late])
    query(url, "UPDATE ledger SET recorded_at = now() - interval '14 seconds' WHERE event_id = %s", late.event_id)
    assert roll(url) == [DAY]


def test_a_rollup_that_was_broken_off_goes_on_where_it_stopped(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON + number * DAY_SECONDS) for number in range(3)])
    settle(url)

    async def broken_off(archive: Archive) -> None:
        def stop(day: rollup_module.DayRolled, left: int) -> None:
            if left == 1:
                raise KeyboardInterrupt

        rollups = Rollups(archive)
        await rollups.prepare()
        await rollups.run_once(stop)

    with pytest.raises(KeyboardInterrupt):
        working(url, broken_off)
    assert roll(url) == [date(2025, 11, 26)]


def test_a_day_whose_rows_retention_dropped_keeps_its_rollup(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON), an_event(at=NOON)])
    roll(url)
    before = rolled(url)
    query(url, "DELETE FROM ledger")
    with pytest.raises(LedgerShrank, match="holds 0 rows of 2025-11-24, its rollup was made from 2"):
        working(url, lambda archive: Rollups(archive).sum_day(DAY))
    assert rolled(url) == before


# --- the daily report, as the guide has it -----------------------------------------------------------------------


def guides_rollup(path: Path, day: str) -> dict[str, dict[str, Any]]:
    """The rollup that readers of the ledger run on an export: from the guide that LLM_GATEWAY_GUIDE names, in place;
    without one, the same sums in our words."""
    guide = os.environ.get("LLM_GATEWAY_GUIDE")
    if guide is None:
        totals: dict[str, Counter[str]] = defaultdict(Counter)
        for event in map(json.loads, path.read_text().splitlines()):
            if event["timestamp"].startswith(day):
                tokens, dollars = event["usage"]["total_tokens"], event["cost_usd"]["total"]
                name = f"{event['tenant_id']}:{event.get('feature_id', 'unknown')}"
                totals[name].update({"tokens": tokens, "usd": dollars, "requests": 1})
        return {name: dict(total) for name, total in totals.items()}
    text = Path(guide).read_text()
    source = re.search(r'"""Aggregate cost ledger JSONL.*?^return \{f"\{t\}:\{f\}".*?$', text, re.DOTALL | re.MULTILINE)
    assert source, "the guide has no rollup()"
    namespace: dict[str, Any] = {}
    exec(_indented(source[0]), namespace)
    return namespace["rollup"](path, day)


def _indented(source: str) -> str:
    """The guide's text lost its indentation; every line of the function's body is found by how it begins."""
    depths = {"totals": 1, "for": 1, "ev =": 2, "if not": 2, "continue": 3, "key =": 2, "totals[key]": 2, "return": 1}
    lines = []
    for line in source.splitlines():
        starts = [depth for start, depth in depths.items() if line.startswith(start)]
        lines.append("    " * (max(starts) if starts else 0) + line)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def filled(postgres: Postgres) -> tuple[str, list[LedgerEvent]]:
    """A database with some calls, summed."""
    url = postgres.database()
    events = [
        made(None, number * 3_001.0 - DAY_SECONDS, tenant, feature, "support-fast" if number % 3 else "support-quality",
             "error" if number % 7 == 0 else "success", number, 2 * number, 1_000_003 * number, number % 5 == 0,
             "prod" if number % 2 else "staging")
        for tenant, feature in (("acme-corp", "support"), ("acme-corp", "search"), ("other-inc", "support"))
        for number in range(60)
    ]  # fmt: skip
    record(url, events)
    roll(url)
    return url, events


def exported(url: str, table: Callable[[Exports], Table], format: Any) -> bytes:
    async def work(archive: Archive) -> bytes:
        out = io.BytesIO()
        await write(table(Exports(archive, page_rows=7)), format, out)
        return out.getvalue()

    return working(url, work)


WHOLE = Selection(first=date(2025, 11, 20), last=date(2025, 11, 30))


def test_the_guides_rollup_of_an_export_says_what_the_daily_reports_say(
    tmp_path: Path, filled: tuple[str, list[LedgerEvent]]
) -> None:
    url, _ = filled
    export = tmp_path / "ledger.jsonl"
    export.write_bytes(exported(url, lambda exports: exports.ledger(WHOLE, whole_events=True), "jsonl"))
    reports = working(url, lambda archive: Rollups(archive).daily(DAY))
    files = write_daily(tmp_path / "reports" / "cost", reports)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "reports/cost/acme-corp/daily.json", "reports/cost/other-inc/daily.json",
    ]  # fmt: skip
    said: dict[str, dict[str, Any]] = {}
    for file in files:
        said |= json.loads(file.read_text())
    by_guide = guides_rollup(export, "2025-11-24")
    assert len(said) == 3
    assert {name: (total["tokens"], total["requests"]) for name, total in by_guide.items()} == {
        name: (total["tokens"], total["requests"]) for name, total in said.items()
    }
    # It adds floats, so its dollars agree to the nano-dollar, not to the bit.
    assert {name: round(total["usd"], 9) for name, total in by_guide.items()} == {
        name: round(total["usd"], 9) for name, total in said.items()
    }


def test_a_tenant_without_calls_does_not_keep_another_days_report(tmp_path: Path) -> None:
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "daily.json").write_text('{"quiet:support": {}}')
    write_daily(tmp_path, {})
    assert json.loads((tmp_path / "quiet" / "daily.json").read_text()) == {}


def test_no_report_is_written_outside_its_folder(tmp_path: Path) -> None:
    assert write_daily(tmp_path / "cost", {"../evil": {}}) == []


# --- exports ------------------------------------------------------------------------------------------------------


def test_exported_events_are_the_events(filled: tuple[str, list[LedgerEvent]]) -> None:
    url, events = filled
    lines = exported(url, lambda exports: exports.ledger(WHOLE, whole_events=True), "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == [
        json.loads(msgspec.json.encode(event)) for event in sorted(events, key=lambda e: (e.timestamp, e.event_id))
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_has_every_row_and_the_exact_dollars(filled: tuple[str, list[LedgerEvent]], kind: str) -> None:
    url, events = filled
    content = exported(url, lambda exports: exports.ledger(WHOLE, whole_events=False), kind)
    if kind == "csv":
        costs = [Decimal(row["cost_usd"]) for row in csv.DictReader(io.StringIO(content.decode()))]
    elif kind == "jsonl":
        costs = [json.loads(line, parse_float=Decimal)["cost_usd"] for line in content.splitlines()]
    else:
        costs = pyarrow.parquet.read_table(io.BytesIO(content))["cost_usd"].to_pylist()
    assert len(costs) == len(events)
    assert sum(costs) == sum(Decimal(bytes(event.cost_usd.total).decode()) for event in events)


def test_an_export_holds_one_tenants_rows_only_where_asked(filled: tuple[str, list[LedgerEvent]]) -> None:
    url, _ = filled
    chosen = msgspec.structs.replace(WHOLE, tenant="acme-corp", environment="prod")
    lines = exported(url, lambda exports: exports.ledger(chosen, whole_events=True), "jsonl").splitlines()
    assert {(event["tenant_id"], event["environment"]) for event in map(json.loads, lines)} == {("acme-corp", "prod")}


def test_the_daily_sums_are_exported_exactly(filled: tuple[str, list[LedgerEvent]]) -> None:
    url, events = filled
    lines = exported(url, lambda exports: exports.daily(WHOLE), "jsonl").splitlines()
    rows = [json.loads(line, parse_float=Decimal) for line in lines]
    assert {(row["day"], row["tenant_id"], row["feature_id"], row["environment"]) for row in rows}
    assert sum(row["requests"] for row in rows) == len(events)
    assert sum(row["cost_usd"] for row in rows) == sum(Decimal(bytes(e.cost_usd.total).decode()) for e in events)


def test_days_that_are_not_summed_are_not_exported_as_if_they_were_empty(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON - 5 * DAY_SECONDS)])
    roll(url)
    record(url, [an_event(at=NOON)])
    with pytest.raises(NotRolledUp, match="no rollup of 2025-11-24 yet: run `gateway rollup` first"):
        exported(url, lambda exports: exports.daily(WHOLE), "csv")


def test_text_that_a_spreadsheet_would_run_is_defused(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [msgspec.structs.replace(an_event(at=NOON), prompt_version="=HYPERLINK(1)")])
    content = exported(url, lambda exports: exports.ledger(WHOLE, whole_events=False), "csv").decode()
    assert next(csv.DictReader(io.StringIO(content)))["prompt_version"] == "'=HYPERLINK(1)"


def test_focus_charges_sum_up_to_the_ledger(filled: tuple[str, list[LedgerEvent]]) -> None:
    url, events = filled
    content = exported(url, lambda exports: focus(exports, WHOLE, "our-company"), "csv").decode()
    charges = list(csv.DictReader(io.StringIO(content)))
    assert sum(Decimal(charge["BilledCost"]) for charge in charges) == sum(
        Decimal(bytes(event.cost_usd.total).decode()) for event in events
    )
    assert sum(int(charge["ConsumedQuantity"]) for charge in charges) == sum(e.usage.total_tokens for e in events)


MANDATORY = [
    "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart",
    "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd", "ChargePeriodStart", "ContractedCost",
    "EffectiveCost", "InvoiceIssuerName", "ListCost", "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName",
    "ServiceCategory", "ServiceName",
]  # fmt: skip
"""Of FOCUS 1.2; ChargeClass is null where a charge corrects none."""


def test_focus_has_the_mandatory_columns_filled(filled: tuple[str, list[LedgerEvent]]) -> None:
    url, _ = filled
    content = exported(url, lambda exports: focus(exports, WHOLE, "our-company"), "csv").decode()
    for charge in csv.DictReader(io.StringIO(content)):
        assert [name for name in MANDATORY if name != "ChargeClass" and not charge[name]] == []
    assert {column.name for column in COLUMNS} >= set(MANDATORY)


def test_focus_periods_are_the_day_and_its_month(filled: tuple[str, list[LedgerEvent]]) -> None:
    url, _ = filled
    chosen = Selection(first=DAY, last=DAY)
    charge = json.loads(exported(url, lambda exports: focus(exports, chosen, "us"), "jsonl").splitlines()[0])
    assert [charge[name] for name in (
        "BillingPeriodStart", "ChargePeriodStart", "ChargePeriodEnd", "BillingPeriodEnd"
    )] == [f"2025-{day}T00:00:00.000000Z" for day in ("11-01", "11-24", "11-25", "12-01")]  # fmt: skip


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_hand_off_has_what_fine_tuning_asks_for(tmp_path: Path, filled: tuple[str, list[LedgerEvent]]) -> None:
    url, events = filled
    (tmp_path / "baseline.json").write_text('{"support-fast": {"pass_rate": 0.93}}')
    arguments = ["--from", "2025-11-20", "--to", "2025-11-30", "--out", str(tmp_path / "calls.jsonl")]
    choices = ["--without-cache-hits", "--eval-baseline", str(tmp_path / "baseline.json")]
    assert main(["export", "fine-tuning", *arguments, *choices, "--database-url", url]) == 0
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "calls.jsonl.summary.json").read_text(), parse_float=Decimal)
    missed = [event for event in events if not event.cache_hit]
    assert calls[0].keys() >= {"model_alias", "model_resolved", "tenant_id", "feature_id", "cache_hit", "cost_usd"}
    assert len(calls) == len(missed) == summary["requests"]
    assert not any(call["cache_hit"] for call in calls)
    assert summary["cache_hits_left_out"] == len(events) - len(missed)
    assert summary["eval_baseline"] == {"support-fast": {"pass_rate": Decimal("0.93")}}
    assert sum(Decimal(feature["cost_usd"]) for feature in summary["cost_by_feature"]) == sum(
        Decimal(bytes(event.cost_usd.total).decode()) for event in missed
    )


def test_cache_hits_are_handed_off_unless_they_are_left_out(
    tmp_path: Path, filled: tuple[str, list[LedgerEvent]]
) -> None:
    url, events = filled
    out = tmp_path / "calls.csv"
    arguments = ["--from", "2025-11-20", "--to", "2025-11-30", "--format", "csv", "--out", str(out)]
    assert main(["export", "fine-tuning", *arguments, "--database-url", url]) == 0
    assert len(list(csv.DictReader(io.StringIO(out.read_text())))) == len(events)


def test_the_rollup_command_shows_its_progress_and_writes_the_reports(
    tmp_path: Path, postgres: Postgres, capsys: pytest.CaptureFixture[str]
) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON), an_event(at=NOON + DAY_SECONDS)])
    settle(url)
    command = ["rollup", "--reports", str(tmp_path), "--database-url", url]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "2025-11-24: 1 rows in 1 lines; 1 days left", "2025-11-25: 1 rows in 1 lines; 0 days left",
    ]  # fmt: skip
    assert json.loads((tmp_path / "acme-corp" / "daily.json").read_text()) == {
        "acme-corp:support": {"tokens": 200, "usd": 0.000108001, "requests": 1}
    }
    assert main(command) == 0
    assert capsys.readouterr().out == "Every day is summed already.\n"


def test_the_commands_of_the_money_page_are_ones() -> None:
    page = (ROOT / "runbooks" / "money.md").read_text()
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)).splitlines()
    assert len(commands) > 5
    assert [line for line in commands if not parses(line)] == []


def test_a_broken_export_leaves_no_half_file(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON)])
    arguments = ["--from", "2025-11-24", "--out", str(tmp_path / "daily.csv"), "--database-url", url]
    assert main(["export", "daily", "--format", "csv", *arguments]) == 1
    assert list(tmp_path.iterdir()) == []
