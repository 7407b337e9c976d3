"""What was used in a span of days: the numbers of `GET /v1/usage` and of the usage page.

Days that the rollups hold whole come from them, the days since from the ledger's rows: right with rollups, without
them, and while they are behind. A row that arrives for a day that is already summed shows from the next rollup on.
"""

from __future__ import annotations

import asyncio
import calendar
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Literal
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.archive import Archive, ArchiveAway
from app.config import Tenant
from app.reports.money import nanos
from app.sql import statements

DEADLINE_SECONDS = 10.0
STATEMENT_SHARE = 0.8
"""Of the deadline, after which a statement's connection is cut: a statement that is cancelled instead first has psycopg
ask the server to cancel it, and a frozen one is silent for another 5 s."""
"""How long a page waits for PostgreSQL. One tenant's month is a fraction of a second."""
SPIKE = (6, 5)
"""A day that costs above 6/5, that is 120 %, of the average of the seven days before it is an anomaly."""
AVERAGED_DAYS = 7
MAX_SPENDERS = 200
"""Tenants whose trend is shown one by one; those whose spend has jumped come first."""


class Figures(Struct, frozen=True, kw_only=True):
    """Sums of calls. `errors` are errors, timeouts and interrupted calls; `refused` blocked ones too."""

    requests: int = 0
    success: int = 0
    errors: int = 0
    rate_limited: int = 0
    refused: int = 0
    client_closed: int = 0
    cache_hits: int = 0
    fallbacks: int = 0
    unpriced: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cost_nanos: int = 0
    saved_nanos: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


NOTHING = Figures()


class Model(Struct, frozen=True, order=True):
    """An alias, the vendor's model that it became and who served it; all None for calls refused before that."""

    alias: str | None
    resolved: str | None
    provider: str | None


class Period(Struct, frozen=True, kw_only=True):
    """A span of UTC days, both included. `days` has each of them; the other sums are by falling cost."""

    tenant: str | None
    environment: str | None
    first: date
    last: date
    total: Figures
    days: Mapping[date, Figures]
    features: Mapping[str | None, Figures]
    models: Mapping[Model, Figures]
    tenants: Mapping[str | None, Figures]


class Budget(Struct, frozen=True, kw_only=True):
    """A tenant's limit on a day's or month's tokens or nano-dollars, and what its rows have used of it."""

    unit: Literal["tokens", "usd"]
    window: Literal["day", "month"]
    time_zone: str
    limit: int
    used: int

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)


class Trend(Struct, frozen=True, kw_only=True):
    """Nano-dollars: today so far, the average of up to seven full days before it, this month so far and at its end.

    `average` is None where no earlier day has spend. Days before the first with spend are not counted as empty ones.
    """

    today: int
    average: int | None
    month: int
    forecast: int

    @property
    def spike(self) -> bool:
        return self.average is not None and is_spike(self.today, self.average)


class Spend(Struct, frozen=True, kw_only=True):
    """A tenant's nano-dollars of today so far, and the average as in `Trend`: both from the rollups."""

    tenant: str
    today: int
    average: int | None

    @property
    def spike(self) -> bool:
        return self.average is not None and is_spike(self.today, self.average)


def is_spike(today_nanos: int, average_nanos: int) -> bool:
    over, under = SPIKE
    return average_nanos > 0 and today_nanos * under > average_nanos * over


class Usage(Struct, frozen=True, kw_only=True):
    """All that the page shows."""

    period: Period
    trend: Trend
    budgets: tuple[Budget, ...] = ()
    spikes: tuple[Spend, ...] = ()


class UsageReader:
    """Reads usage over one connection, one reader at a time. Raises `archive.ArchiveError` within the deadline."""

    def __init__(self, database_url: str, ambient: Ambient, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Raises `archive.InvalidDatabaseUrl`."""
        self._archive = Archive(database_url, ambient, deadline_seconds * STATEMENT_SHARE)
        self._deadline_seconds = deadline_seconds
        self._ambient = ambient
        self._turn = asyncio.Lock()
        self._sql = statements("period.sql")

    def today(self) -> date:
        return datetime.fromtimestamp(self._ambient.now(), UTC).date()

    async def usage(self, tenant: Tenant | None, first: date, last: date, environment: str | None = None) -> Usage:
        """One tenant's usage with its budgets, or everyone's with those whose spend has jumped today."""
        name = tenant.id if tenant else None
        try:
            async with asyncio.timeout(self._deadline_seconds), self._turn:
                period = await self._period(name, first, last, environment)
                recent = await self._recent_costs(name)
                budgets = await self._budgets(tenant) if tenant else ()
                spikes = () if tenant else await self._spikes()
        except TimeoutError:
            raise ArchiveAway(
                f"PostgreSQL at {self._archive.where} did not answer within {self._deadline_seconds:g} s: ask for "
                "fewer days, or later."
            ) from None
        return Usage(period=period, trend=trend(recent, self.today()), budgets=budgets, spikes=spikes)

    async def close(self) -> None:
        await self._archive.close()

    async def _recent_costs(self, tenant: str | None) -> dict[date, int]:
        """Nano-dollars of the days that a trend is made of: those of this month, and seven before today."""
        today = self.today()
        first = min(today.replace(day=1), today - timedelta(AVERAGED_DAYS))
        rows = await self._rows("costs", first, today, {"tenant": tenant})
        return {day: nanos(cost) for day, cost in rows}

    async def _period(self, tenant: str | None, first: date, last: date, environment: str | None) -> Period:
        rows = await self._rows("sums", first, last, {"tenant": tenant, "environment": environment})
        return await asyncio.to_thread(_gathered, rows, tenant, first, last, environment)  # may be thousands

    async def _rows(
        self, what: str, first: date, last: date, chosen: Mapping[str, str | None]
    ) -> list[tuple[Any, ...]]:
        """What `rollup_{what}` has of the days that the rollups hold whole, then what `ledger_{what}` has since."""
        live_from = await self._live_from(first)
        rows: list[tuple[Any, ...]] = []
        if first < live_from:
            span = {"first": first, "last": min(last, live_from - timedelta(1))}
            rows += await self._archive.rows(self._sql[f"rollup_{what}"], {**chosen, **span})
        if last >= live_from:
            span = {"first": max(first, live_from), "last": last}
            rows += await self._archive.rows(self._sql[f"ledger_{what}"], {**chosen, **span})
        return rows

    async def _live_from(self, first: date) -> date:
        """The first day that has to be read from the ledger's rows."""
        if (await self._archive.rows(self._sql["has_rollups"], {})) == [(True,)]:
            found = await self._archive.rows(self._sql["complete_until"], {})
            if found:
                return found[0][0]
        return first

    async def _spikes(self) -> tuple[Spend, ...]:
        if (await self._archive.rows(self._sql["has_rollups"], {})) != [(True,)]:
            return ()
        found = await spending(self._archive, self.today(), MAX_SPENDERS)
        return tuple(each for each in found if each.spike)

    async def _budgets(self, tenant: Tenant) -> tuple[Budget, ...]:
        budgets = []
        for unit, window, zone, limit in limits_of(tenant):
            since = window_start(window, zone, self._ambient.now())
            ((tokens, dollars),) = await self._archive.rows(
                self._sql["spent_since"], {"tenant": tenant.id, "since": since}
            )
            used = tokens if unit == "tokens" else nanos(dollars)
            budgets.append(Budget(unit=unit, window=window, time_zone=zone, limit=limit, used=used))
        return tuple(budgets)


async def spending(archive: Archive, today: date, tenants: int) -> list[Spend]:
    """At most `tenants` tenants by what the rollups have of today: first those whose spend has jumped, then by cost."""
    rows = await archive.rows(
        statements("period.sql")["spending"],
        {"today": today, "since": today - timedelta(AVERAGED_DAYS), "tenants": tenants},
    )
    return [
        Spend(tenant=tenant, today=nanos(cost), average=None if average is None else int(average * 1_000_000_000))
        for tenant, cost, average in rows
    ]


def limits_of(tenant: Tenant) -> list[tuple[Literal["tokens", "usd"], Literal["day", "month"], str, int]]:
    """The budgets that a tenant has: unit, window, the zone of its midnights, tokens or nano-dollars."""
    found: list[tuple[Literal["tokens", "usd"], Literal["day", "month"], str, int]] = []
    quota = tenant.quota
    if quota.daily_tokens is not None:
        found.append(("tokens", "day", quota.time_zone, quota.daily_tokens))
    if quota.daily_nanos is not None:
        found.append(("usd", "day", quota.time_zone, quota.daily_nanos))
    if quota.monthly_nanos is not None:
        found.append(("usd", "month", quota.time_zone, quota.monthly_nanos))
    return found


def window_start(window: Literal["day", "month"], zone: str, now: float) -> datetime:
    """When the day or month that `now` (unix seconds) is in began in the zone."""
    local = datetime.fromtimestamp(now, ZoneInfo(zone)).date()
    return datetime.combine(local if window == "day" else local.replace(day=1), time(), ZoneInfo(zone))


def trend(spent: Mapping[date, int], today: date) -> Trend:
    """Where spend is going, by each day's nano-dollars.

    The rest of today and of the month is taken to be like the average of the days before.
    """
    before = [spent.get(today - timedelta(back), 0) for back in range(AVERAGED_DAYS, 0, -1)]
    while before and before[0] == 0:
        del before[0]
    average = sum(before) // len(before) if before else None
    so_far = spent.get(today, 0)
    month = sum(cost for day, cost in spent.items() if day.replace(day=1) == today.replace(day=1))
    days_after = calendar.monthrange(today.year, today.month)[1] - today.day
    usual = so_far if average is None else average
    forecast = month - so_far + max(so_far, usual) + usual * days_after
    return Trend(today=so_far, average=average, month=month, forecast=forecast)


_FIELDS = (
    "requests", "success", "errors", "rate_limited", "refused", "client_closed", "cache_hits", "fallbacks", "unpriced",
    "input_tokens", "output_tokens", "total_tokens", "cost_nanos", "saved_nanos",
)  # fmt: skip
_BY_ALL, _BY_DAY, _BY_FEATURE, _BY_MODEL, _BY_TENANT = 0b1111, 0b1011, 0b1101, 0b1110, 0b0111
"""SQL's grouping(tenant_id, day, feature_id, provider): a bit is set for each that is not grouped by."""


def _gathered(
    rows: Sequence[tuple[Any, ...]], tenant: str | None, first: date, last: date, environment: str | None
) -> Period:
    """The rows of one or two statements, added up by what they are grouped by."""
    groups: dict[int, dict[Any, Figures]] = {
        kind: {} for kind in (_BY_ALL, _BY_DAY, _BY_FEATURE, _BY_MODEL, _BY_TENANT)
    }
    for kind, day, owner, feature, alias, model, provider, *sums in rows:
        values = [nanos(value) if isinstance(value, Decimal) else value for value in sums]
        figures = Figures(**dict(zip(_FIELDS, values, strict=True)))
        key = {
            _BY_ALL: None, _BY_DAY: day, _BY_FEATURE: feature, _BY_MODEL: Model(alias, model, provider),
            _BY_TENANT: owner,
        }[kind]  # fmt: skip
        groups[kind][key] = groups[kind].get(key, NOTHING) + figures
    span = [first + timedelta(number) for number in range((last - first).days + 1)]
    return Period(
        tenant=tenant,
        environment=environment,
        first=first,
        last=last,
        total=groups[_BY_ALL].get(None, NOTHING),
        days={day: groups[_BY_DAY].get(day, NOTHING) for day in span},
        features=_by_cost(groups[_BY_FEATURE]),
        models=_by_cost(groups[_BY_MODEL]),
        tenants=_by_cost(groups[_BY_TENANT]),
    )


def _by_cost(groups: Mapping[Any, Figures]) -> dict[Any, Figures]:
    """By falling cost, then by name; groups without a call are left out."""
    used = [(key, figures) for key, figures in groups.items() if figures.requests or figures.cost_nanos]
    return dict(sorted(used, key=lambda item: (-item[1].cost_nanos, msgspec.json.encode(item[0]))))
