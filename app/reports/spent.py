"""What every tenant and service key has spent of its budgets, from the ledger: for a Redis that lost its counters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from app.ambient import Ambient
from app.archive import Archive, ArchiveError, NoLedger
from app.limits.budgets import Spent
from app.reports.money import nanos
from app.sql import statements

log = logging.getLogger("gateway")

DEADLINE_SECONDS = 120.0
"""A month of some ten million rows is summed in that time; no call waits for it."""


class SpentReader:
    """Sums the ledger of one environment, as `limits.budgets.ReadSpent` asks for it."""

    def __init__(self, database_url: str, environment: Callable[[], str], ambient: Ambient) -> None:
        """Raises `archive.InvalidDatabaseUrl`."""
        self._archive = Archive(database_url, ambient, DEADLINE_SECONDS)
        self._environment = environment
        self._sql = statements("limits.sql")["spent"]
        self._said: str | None = None

    async def __call__(self, before: int, starts: Mapping[str, tuple[int, int]]) -> list[Spent] | None:
        found: list[Spent] = []
        try:
            for zone, (day, month) in starts.items():
                asked = {"day": day, "month": month, "before": before, "environment": self._environment()}
                for owner, id, tokens, day_usd, month_usd in await self._archive.rows(self._sql, asked):
                    found.append(Spent(owner, id, zone, tokens, nanos(day_usd), nanos(month_usd)))
        except NoLedger:
            return []  # no call was ever recorded
        except ArchiveError as error:
            if str(error) != self._said:
                self._said = str(error)
                log.error("what was spent cannot be read: %s", error)
            return None
        finally:
            await self._archive.close()
        self._said = None
        return found
