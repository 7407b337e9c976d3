"""Daily sums of the ledger, per tenant, feature, alias, model, provider and environment: `gateway rollup`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from itertools import groupby
from pathlib import Path

import msgspec
from msgspec import Raw, Struct

from app.archive import Archive, ArchiveError
from app.config import NAME
from app.core import GATEWAY_TENANT, usd
from app.reports.money import nanos
from app.sql import statements

_TABLES = ("create_rollup", "create_tenant_index", "create_rollup_day", "create_rollup_state", "create_recorded_index")


class LedgerShrank(ArchiveError):
    """A day has fewer rows than its rollup was made from: retention dropped them. The rollup is kept as it is."""


class DayRolled(Struct, frozen=True):
    """A day that was summed: rows of the ledger, and lines that they became."""

    day: date
    rows: int
    lines: int


class DailyTotals(Struct, frozen=True):
    """A feature's day, with the names of the daily report. `usd` has at most nine decimals."""

    tokens: int
    usd: Raw
    requests: int


class Rollups:
    """Makes and remakes the rollups. A day is summed whole in one transaction, so that doing it twice changes nothing.

    Every method raises `archive.ArchiveError`.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._sql = statements("rollup.sql")

    async def prepare(self) -> None:
        """Sees to it that the tables exist."""
        async with self._archive.transaction() as run:
            await run(self._sql["lock"])
            for name in _TABLES:
                await run(self._sql[name])

    async def run_once(self, progress: Callable[[DayRolled, int], None] = lambda day, left: None) -> list[DayRolled]:
        """Sums the days with rows that their rollup has not seen; `progress` hears of each, and how many are left.

        Broken off, the next run begins where this one stopped: the days that are done are not due.
        """
        async with self._archive.transaction() as run:
            found = await run(self._sql["complete_at"])
            since: datetime | None = found[0][0] if found else None
            ((clock,),) = await run(self._sql["clock"])
            due: list[date] = [row[0] for row in await run(self._sql["due_days"], {"since": since})]
        done = []
        for place, day in enumerate(due):
            done.append(await self.sum_day(day))
            progress(done[-1], len(due) - place - 1)
        async with self._archive.transaction() as run:
            await run(self._sql["complete"], {"complete_at": clock})
        return done

    async def sum_day(self, day: date) -> DayRolled:
        """Sums one day. Raises `LedgerShrank`, and keeps what there is, when rows of that day have gone."""
        async with self._archive.transaction() as run:
            await run(self._sql["lock_day"], {"day": day})
            await run(self._sql["clear_day"], {"day": day})
            await run(self._sql["sum_day"], {"day": day})
            ((rows, lines, before),) = await run(self._sql["note_day"], {"day": day})
            if before is not None and rows < before:
                raise LedgerShrank(
                    f"The ledger holds {rows:,} rows of {day}, its rollup was made from {before:,}: the rest was "
                    "dropped by retention, and the rollup is kept."
                )
        return DayRolled(day, rows, lines)

    async def daily(self, day: date) -> dict[str, dict[str, DailyTotals]]:
        """A day's totals by tenant, then by `tenant:feature`; calls without a feature count as `unknown`."""
        async with self._archive.transaction() as run:
            rows = await run(self._sql["daily"], {"day": day})
        return {
            tenant: {
                f"{tenant}:{feature}": DailyTotals(tokens, usd(nanos(cost)), requests)
                for _, feature, tokens, cost, requests in group
            }
            for tenant, group in groupby(rows, lambda row: row[0])
        }


def write_daily(folder: Path, totals: dict[str, dict[str, DailyTotals]]) -> list[Path]:
    """Writes `{folder}/{tenant}/daily.json` for each tenant, each whole or not at all; returns the files.

    A tenant that has a file from another day and no calls on this one gets an empty report.
    """
    silent = {path.parent.name: {} for path in folder.glob("*/daily.json")}
    written = []
    for tenant, features in sorted((silent | totals).items()):
        if tenant != GATEWAY_TENANT and not NAME.fullmatch(tenant):
            continue  # no path is made of a name that configuration would not take
        file = folder / tenant / "daily.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(".daily.json.new")
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(features), indent=2) + b"\n")
        beside.replace(file)
        written.append(file)
    return written
