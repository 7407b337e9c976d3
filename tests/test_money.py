"""Money: whole nano-dollars, rounded once a class, and the same sums wherever they are read."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.archive import Archive, ArchiveAway, NoLedger
from app.config import Price
from app.core import Cost, LedgerEvent, Usage, cost, event_cost, event_usage, usd
from app.reports.day import usage
from tests.ledger_parts import AMBIENT, Postgres, an_event, query, running_postgres

TOKENS = st.integers(0, 2_000_000)
NANOS_PER_MILLION = st.integers(0, 500_000_000_000)
USAGES = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, TOKENS))
PRICES = st.builds(Price, **dict.fromkeys(Price.__struct_fields__, NANOS_PER_MILLION))


def charge(tokens: int, nanos_per_million: int) -> int:
    exact = Decimal(tokens) * Decimal(nanos_per_million) / Decimal(1_000_000)
    return int(exact.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


# --- one call ---


@given(USAGES, PRICES)
def test_each_class_is_rounded_once_half_to_even(used: Usage, price: Price) -> None:
    charged = cost(used, price)
    assert charged.input_nanos == (
        charge(used.input, price.input)
        + charge(used.cache_read, price.cache_read)
        + charge(used.cache_write, price.cache_write)
        + charge(used.cache_write_1h, price.cache_write_1h)
        + charge(used.audio_input, price.audio_input)
        + charge(used.image_input, price.image_input)
        + charge(used.embedding, price.embedding)
    )
    assert charged.output_nanos == (
        charge(used.output, price.output)
        + charge(used.reasoning, price.reasoning)
        + charge(used.audio_output, price.audio_output)
        + charge(used.images, price.images)
        + charge(used.seconds, price.seconds)
        + charge(used.characters, price.characters)
    )


@pytest.mark.parametrize(("nanos_per_million", "charged"), [(500_000, 0), (1_500_000, 2), (2_500_000, 2), (500_001, 1)])
def test_half_a_nano_dollar_goes_to_the_even_side(nanos_per_million: int, charged: int) -> None:
    price = Price(**dict.fromkeys(Price.__struct_fields__, nanos_per_million))
    assert cost(Usage(input=1), price).input_nanos == charged


@given(USAGES, PRICES)
def test_the_total_is_the_sum_of_its_parts(used: Usage, price: Price) -> None:
    charged = cost(used, price)
    assert charged.total_nanos == charged.input_nanos + charged.output_nanos


@given(USAGES)
def test_the_classes_add_up_to_the_total(used: Usage) -> None:
    units = {"images", "seconds", "characters"}
    assert used.total == sum(getattr(used, name) for name in Usage.__struct_fields__ if name not in units)


@given(USAGES)
def test_the_events_totals_are_those_of_its_classes(used: Usage) -> None:
    event = event_usage(used)
    assert event.total_tokens == event.input_tokens + event.output_tokens + event.embedding_tokens


@given(st.integers(-(10**30), 10**30))
def test_dollars_are_written_exactly(nanos: int) -> None:
    assert Fraction(bytes(usd(nanos)).decode()) == Fraction(nanos, 1_000_000_000)


@given(st.integers(-(10**18), 10**18))
def test_dollars_are_a_json_number_of_at_most_nine_decimals(nanos: int) -> None:
    text = bytes(usd(nanos)).decode()
    assert json.loads(text) == pytest.approx(nanos / 1e9)
    assert len(text.partition(".")[2]) <= 9


@given(st.integers(0, 10**18), st.integers(0, 10**18))
def test_an_events_total_is_the_exact_sum_of_input_and_output(input_nanos: int, output_nanos: int) -> None:
    written = event_cost(Cost(input_nanos, output_nanos), "2026-11-01")
    parts = [Decimal(bytes(part).decode()) for part in (written.input, written.output, written.total)]
    assert parts[0] + parts[1] == parts[2]


# --- many calls ---


@dataclass
class Ledger:
    """A ledger with a day of calls, and the same calls as we made them."""

    server: Postgres
    url: str
    events: list[LedgerEvent]


DAY = 1_763_942_400.0  # 2025-11-24T00:00:00Z


def calls() -> list[LedgerEvent]:
    """Calls of two tenants around one day, with costs that no binary fraction holds."""
    return [
        an_event(
            at=DAY + seconds,
            tenant=tenant,
            feature=feature,
            alias="support-fast" if number % 3 else "support-quality",
            status="error" if number % 7 == 0 else "success",
            usage=Usage(input=number, output=2 * number),
            cost=Cost(100_000_001 * number, 333_333_333 * number, number % 11 != 0),
            environment="prod" if number % 2 else "staging",
            saved_nanos=number,
        )
        for tenant, feature in (("acme-corp", "support"), ("acme-corp", "search"), ("other-inc", "support"))
        for number, seconds in enumerate([-0.000001, 0.0, *range(600, 86_400, 4000), 86_399.999999, 86_400.0])
    ]


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    async def fill(url: str, events: list[LedgerEvent]) -> None:
        archive = Archive(url, AMBIENT)
        try:
            await archive.prepare()
            await archive.insert([msgspec.json.encode(event).decode() for event in events])
        finally:
            await archive.close()

    with running_postgres() as server:
        filled = Ledger(server, server.database(), calls())
        asyncio.run(fill(filled.url, filled.events))
        yield filled


def report(ledger: Ledger, tenant: str = "acme-corp", **options: Any) -> dict[str, Any]:
    found = asyncio.run(usage(ledger.url, tenant, date(2025, 11, 24), **options))
    return json.loads(found.json(), parse_float=Decimal)


def rollup(path: Path, day: str) -> dict[str, dict[str, float]]:
    """The rollup that finance runs on an export: JSON lines to tokens, dollars and requests a tenant and feature."""
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: {"tokens": 0, "usd": 0.0, "requests": 0})
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if not event["timestamp"].startswith(day):
            continue
        total = totals[event["tenant_id"], event.get("feature_id", "unknown")]
        total["tokens"] += event["usage"]["total_tokens"]
        total["usd"] += event["cost_usd"]["total"]
        total["requests"] += 1
    return {f"{tenant}:{feature}": total for (tenant, feature), total in totals.items()}


def test_a_rollup_of_exported_events_agrees_with_sql(tmp_path: Path, ledger: Ledger) -> None:
    export = tmp_path / "ledger.jsonl"
    export.write_text("\n".join(row[0] for row in query(ledger.url, "SELECT event::text FROM ledger")))
    by_sql = query(
        ledger.url,
        "SELECT tenant_id || ':' || feature_id, sum(total_tokens), sum(cost_usd), count(*) FROM ledger"
        " WHERE occurred_at >= '2025-11-24T00:00Z' AND occurred_at < '2025-11-25T00:00Z' GROUP BY 1",
    )
    rolled = rollup(export, "2025-11-24")
    assert {key: (total["tokens"], total["requests"]) for key, total in rolled.items()} == {
        key: (tokens, requests) for key, tokens, _, requests in by_sql
    }
    # The rollup adds floats, so its dollars agree to the nano-dollar, not to the bit.
    assert {key: round(Decimal(total["usd"]), 9) for key, total in rolled.items()} == {
        key: dollars for key, _, dollars, _ in by_sql
    }


def of_the_day(ledger: Ledger, **fields: Any) -> list[LedgerEvent]:
    return [
        event
        for event in ledger.events
        if event.timestamp.startswith("2025-11-24") and all(getattr(event, key) == fields[key] for key in fields)
    ]


def dollars(events: list[LedgerEvent]) -> Decimal:
    return sum((Decimal(bytes(event.cost_usd.total).decode()) for event in events), Decimal(0))


def test_a_tenants_day_is_the_exact_sum_of_its_rows(ledger: Ledger) -> None:
    mine = of_the_day(ledger, tenant_id="acme-corp")
    total = report(ledger)["total"]
    assert (total["requests"], total["total_tokens"], total["cost_usd"]) == (
        len(mine),
        sum(event.usage.total_tokens for event in mine),
        dollars(mine),
    )


def test_the_models_add_up_to_the_day(ledger: Ledger) -> None:
    found = report(ledger)
    assert sum(Decimal(line["cost_usd"]) for line in found["by_model"]) == found["total"]["cost_usd"]


def test_calls_are_counted_by_status(ledger: Ledger) -> None:
    failed = of_the_day(ledger, tenant_id="acme-corp", status="error")
    assert report(ledger)["by_status"]["error"] == len(failed)


def test_an_environment_can_be_left_out(ledger: Ledger) -> None:
    mine = of_the_day(ledger, tenant_id="acme-corp", environment="prod")
    assert report(ledger, environment="prod")["total"]["cost_usd"] == dollars(mine)


def test_calls_without_a_price_are_counted(ledger: Ledger) -> None:
    mine = of_the_day(ledger, tenant_id="acme-corp", cost_status="unpriced")
    assert report(ledger)["total"]["unpriced"] == len(mine) > 0


def test_a_tenant_without_calls_has_a_day_of_zeros(ledger: Ledger) -> None:
    assert report(ledger, "nobody")["total"]["requests"] == 0


def test_the_table_shows_the_exact_dollars(ledger: Ledger) -> None:
    text = asyncio.run(usage(ledger.url, "acme-corp", date(2025, 11, 24))).text()
    total = str(dollars(of_the_day(ledger, tenant_id="acme-corp"))).rstrip("0")
    assert text.splitlines()[-3].split()[0] == "total"
    assert total in text.splitlines()[-3]


def test_a_day_without_calls_is_a_sentence(ledger: Ledger) -> None:
    text = asyncio.run(usage(ledger.url, "acme-corp", date(2020, 1, 1))).text()
    assert text == "acme-corp on 2020-01-01 (UTC): no calls in the ledger."


def test_a_database_that_is_away_is_a_sentence() -> None:
    with pytest.raises(ArchiveAway, match=r"^PostgreSQL at 127\.0\.0\.1:1 .* see that it runs"):
        asyncio.run(usage("postgresql://gateway@127.0.0.1:1/gateway", "acme-corp", date(2025, 11, 24)))


def test_a_database_without_a_ledger_is_a_sentence(ledger: Ledger) -> None:
    with pytest.raises(NoLedger, match="no replica has shipped to it"):
        asyncio.run(usage(ledger.server.database(), "acme-corp", date(2025, 11, 24)))
