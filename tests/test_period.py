"""Usage of a span: the same with rollups, without them and with old ones; trends; and how figures are written."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.ambient import Ambient
from app.config import Tenant
from app.core import Cost, LedgerEvent
from app.core import Usage as Tokens
from app.reports.charts import Series, bars, style
from app.reports.markup import document, el
from app.reports.page import View, money, share, usage
from app.reports.period import Budget, Figures, Period, Trend, Usage, UsageReader, spending, trend, window_start
from app.reports.rollup import Rollups
from tests.ledger_parts import Postgres, an_event, query, running_postgres
from tests.test_rollup import DAY, DAY_SECONDS, EVENTS, NOON, record, roll, working

ACME = Tenant("acme-corp", "p", "p", None)


class Noon(Ambient):
    """The clock stands at noon of DAY."""

    def now(self) -> float:
        return NOON


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


def read(url: str, tenant: Tenant | None = ACME, environment: str | None = None) -> Usage:
    async def run() -> Usage:
        reader = UsageReader(url, Noon())
        try:
            return await reader.usage(tenant, DAY - timedelta(3), DAY + timedelta(2), environment)
        finally:
            await reader.close()

    return asyncio.run(run())


def period(url: str, tenant: Tenant | None = ACME, environment: str | None = None) -> Period:
    return read(url, tenant, environment).period


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(EVENTS, min_size=1, max_size=20),
    late=st.lists(EVENTS, max_size=6),
    tenant=st.sampled_from([ACME, None]),
)
def test_usage_is_the_same_from_rows_from_rollups_and_from_both(
    postgres: Postgres, events: list[LedgerEvent], late: list[LedgerEvent], tenant: Tenant | None
) -> None:
    url = postgres.database()
    record(url, events)
    without = period(url, tenant)
    roll(url)
    assert period(url, tenant) == without
    query(url, "UPDATE rollup_state SET complete_at = %s", datetime(2025, 11, 24, 9, tzinfo=UTC))
    assert period(url, tenant) == without
    record(url, late)
    roll(url)
    wanted = [event for event in events + late if tenant is None or event.tenant_id == tenant.id]
    assert period(url, tenant).total.requests == len(wanted)
    assert period(url, tenant).total.cost_nanos == sum(nanos(event) for event in wanted)


def nanos(event: LedgerEvent) -> int:
    return round(float(bytes(event.cost_usd.total)) * 10**9)


def test_one_environment_can_be_chosen(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON, environment="prod"), an_event(at=NOON, environment="staging")])
    assert period(url, environment="prod").total.requests == 1


def test_a_tenant_sees_nothing_of_tenants_whose_names_are_alike(postgres: Postgres) -> None:
    url = postgres.database()
    alike = ["acme_corp", "ACME-corp", "acme-corp2", "acme.corp", "acme", None]
    record(url, [an_event(at=NOON, tenant=tenant, cost=Cost(1_000, 0)) for tenant in [ACME.id, *alike]])
    rows = read(url)
    assert (rows.period.total.requests, rows.trend.today, list(rows.period.tenants)) == (1, 1_000, [ACME.id])
    roll(url)
    assert read(url) == rows


def test_an_adjustment_is_money_and_no_call(postgres: Postgres) -> None:
    url = postgres.database()
    call = an_event(at=NOON, cost=Cost(1_000, 0))
    adjusts = {"adjusts": call.event_id, "usage_source": "none", "cost_status": "repriced"}
    adjustment = an_event(at=NOON, usage=Tokens(), cost=Cost(500, 0))
    record(url, [call, msgspec.structs.replace(adjustment, **adjusts)])
    without = period(url).total
    assert (without.requests, without.success, without.cost_nanos) == (1, 1, 1_500)
    roll(url)
    assert period(url).total == without


def test_the_trend_is_the_same_from_rows_and_from_rollups(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON - back * DAY_SECONDS, cost=Cost(100, back)) for back in range(5)])
    record(url, [an_event(at=NOON, tenant="acme-corp2", cost=Cost(7, 0))])
    without = read(url).trend
    assert (without.today, without.average, without.month) == (100, 102, 510)
    roll(url)
    assert read(url).trend == without


# --- trends -----------------------------------------------------------------------------------------------------------


def spent(*costs: int) -> dict[date, int]:
    """Days that end with DAY, the 24th of a month of 30."""
    return {DAY - timedelta(back): cost for back, cost in enumerate(reversed(costs))}


def test_a_steady_spender_is_forecast_the_same_for_the_rest_of_the_month() -> None:
    found = trend(spent(*[10] * 30), DAY)
    assert found == Trend(today=10, average=10, month=240, forecast=300)


def test_a_day_above_120_percent_of_the_week_before_is_a_spike() -> None:
    assert not trend(spent(*[100] * 7, 120), DAY).spike
    assert trend(spent(*[100] * 7, 121), DAY).spike


def test_days_before_the_first_spend_do_not_lower_the_average() -> None:
    assert trend(spent(0, 0, 0, 0, 0, 90, 110, 50), DAY).average == 100


def test_quiet_days_after_the_first_spend_do() -> None:
    assert trend(spent(0, 0, 0, 0, 90, 0, 0, 50), DAY).average == 30


def test_a_first_day_is_no_spike() -> None:
    assert trend(spent(500), DAY) == Trend(today=500, average=None, month=500, forecast=3500)


def test_the_rollups_name_those_whose_spend_has_jumped_first(postgres: Postgres) -> None:
    url = postgres.database()
    plan = {"steady": [100, 100, 100], "jumps": [10, 10, 13], "new": [0, 0, 50], "small": [1, 1, 1]}
    record(
        url,
        [
            an_event(at=NOON - (2 - back) * DAY_SECONDS, tenant=tenant, cost=Cost(cost, 0))
            for tenant, costs in plan.items()
            for back, cost in enumerate(costs)
            if cost
        ],
    )
    roll(url)
    found = working(url, lambda archive: spending(archive, DAY, 3))
    assert [(each.tenant, each.today, each.average, each.spike) for each in found] == [
        ("jumps", 13, 10, True), ("steady", 100, 100, False), ("new", 50, None, False),
    ]  # fmt: skip


def test_a_budgets_day_begins_at_midnight_of_its_own_zone() -> None:
    late = datetime(2026, 3, 1, 2, 30, tzinfo=UTC).timestamp()
    assert window_start("day", "America/New_York", late) == datetime(2026, 2, 28, 5, tzinfo=UTC)
    assert window_start("month", "America/New_York", late) == datetime(2026, 2, 1, 5, tzinfo=UTC)
    assert window_start("month", "UTC", late) == datetime(2026, 3, 1, tzinfo=UTC)


def test_rollups_need_not_exist(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=NOON)])
    assert period(url, None).total.requests == 1
    working(url, lambda archive: Rollups(archive).prepare())
    assert period(url, None).total.requests == 1


# --- how it is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "$0.00"), (1, "$0.000000001"), (463_000, "$0.000463"), (9_999_999, "$0.009999999"), (10_000_000, "$0.01"),
        (1_994_999_999, "$1.99"), (1_995_000_000, "$2.00"), (1_234_567_890_000_000, "$1,234,567.89"),
    ],
)  # fmt: skip
def test_money_is_written_in_cents_and_what_is_less_in_full(nanos: int, text: str) -> None:
    assert money(nanos) == text


def test_a_share_of_nothing_is_a_dash() -> None:
    assert (share(1, 3), share(0, 0), share(5, 4)) == ("33.3 %", "-", "125.0 %")


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"])))
def test_text_and_attributes_never_become_markup(text: str) -> None:
    seen = Seen(document(el("p", text, el("b"), text, title=text)))
    assert seen.tags == [("p", [("title", text)]), ("b", [])]
    assert seen.text == "\n" + text + text


@given(st.lists(st.tuples(*[st.integers(0, 10**15)] * 3), min_size=1, max_size=100))
def test_bars_are_as_high_as_their_values_and_stay_within_their_chart(values: list[tuple[int, ...]]) -> None:
    days = [DAY + timedelta(number) for number in range(len(values))]
    series = [Series(f"part {place}", f"s{place + 1}", [each[place] for each in values]) for place in range(3)]
    drawing = bars("Spend", days, series, str)
    rows = list(drawing.iter("tr"))
    heights = [[int(part.get("class").partition(" h")[2]) for part in row] for row in rows]
    highest = max(map(sum, values))
    tallest = max(map(sum, heights))
    assert (400 <= tallest <= 1000) if highest else tallest == 0
    for parts, high in zip(values, heights, strict=True):
        for value, height in zip(parts, high, strict=True):
            assert abs(height * highest - value * tallest) <= 2 * max(highest, tallest)
    assert {name for row in rows for part in row for name in part.get("class").split()} <= STYLED


STYLED = {name.decode() for name in re.findall(rb"\.([sh]\d+) ?\{", style())}


def test_empty_days_are_a_chart_that_says_so() -> None:
    drawn = document(bars("Spend", [DAY], [Series("Spend", "s1", [0])], str)).decode()
    assert "Spend: nothing in these days." in drawn


@pytest.mark.parametrize(
    ("forecast", "says"),
    [
        (80, "At this pace $80.00 at the month's end, 80.0 % of it."),
        (120, "At this pace $120.00 at the month's end, 120.0 % of it. The budget will be spent before then."),
    ],
)
def test_the_forecast_stands_beside_the_months_budget(forecast: int, says: str) -> None:
    nothing: dict[Any, Figures] = {}
    shown = Usage(
        period=Period(
            tenant="acme-corp", environment=None, first=DAY, last=DAY, total=Figures(), days={DAY: Figures()},
            features=nothing, models=nothing, tenants=nothing,
        ),
        trend=Trend(today=0, average=None, month=0, forecast=forecast * 10**9),
        budgets=(Budget(unit="usd", window="month", time_zone="UTC", limit=100 * 10**9, used=40 * 10**9),),
    )  # fmt: skip
    view = View(today=DAY, tenant="acme-corp", tenants=["acme-corp"], days=30, everyone=False, service="finance")
    text = Seen(usage(shown, view)).text
    assert "$40.00 of $100.00 used, $60.00 left" in text
    assert says in text
