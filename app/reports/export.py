"""What leaves for other systems: the ledger's rows, its daily sums, FOCUS, and the hand-off for fine-tuning."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime
from typing import Any

from msgspec import Raw, Struct

from app.archive import Archive, ArchiveError
from app.core import usd
from app.reports.money import nanos
from app.reports.tables import Column, Table
from app.sql import statements

PAGE_ROWS = 5_000
"""Rows read at a time: a page is some MB, and far from the archive's deadline."""

_LEDGER = (
    Column("timestamp", "time"), Column("event_id"), Column("request_id"), Column("trace_id"), Column("tenant_id"),
    Column("feature_id"), Column("key_id"), Column("purpose"), Column("environment"), Column("model_alias"),
    Column("model_resolved"), Column("provider"), Column("vendor_request_id"), Column("status"), Column("error_code"),
    Column("cache_hit", "boolean"), Column("fallback_used", "boolean"), Column("input_tokens", "integer"),
    Column("output_tokens", "integer"), Column("total_tokens", "integer"), Column("cost_input_usd", "usd"),
    Column("cost_output_usd", "usd"), Column("cost_usd", "usd"), Column("saved_usd", "usd"), Column("cost_status"),
    Column("usage_source"), Column("price_table_version"), Column("config_version"), Column("prompt_version"),
    Column("adjusts"), Column("event"),
)  # fmt: skip
"""The statement `ledger_page`, in its order."""

_ROLLUP = (
    Column("day", "day"), Column("tenant_id"), Column("feature_id"), Column("model_alias"), Column("model_resolved"),
    Column("provider"), Column("environment"),
    *(
        Column(name, "integer")
        for name in (
            "requests", "success", "error", "refused", "rate_limited", "blocked", "client_closed", "interrupted",
            "timeout", "cache_hits", "fallbacks", "unpriced", "input_tokens", "output_tokens", "total_tokens",
        )
    ),
    Column("cost_input_usd", "usd"), Column("cost_output_usd", "usd"), Column("cost_usd", "usd"),
    Column("saved_usd", "usd"),
)  # fmt: skip
"""The statement `rollup_page`, in its order."""

_HANDOFF = (
    "timestamp", "request_id", "tenant_id", "feature_id", "environment", "model_alias", "model_resolved", "provider",
    "prompt_version", "status", "cache_hit", "input_tokens", "output_tokens", "cost_usd",
)  # fmt: skip


class NotRolledUp(ArchiveError):
    """Days that are asked for have no rollup yet: `gateway rollup` makes it."""


class Selection(Struct, frozen=True, kw_only=True):
    """UTC days, both included; None means every tenant, every environment."""

    first: date
    last: date
    tenant: str | None = None
    environment: str | None = None


class FeatureTotals(Struct, frozen=True):
    """What one feature of a tenant cost in the hand-off's calls."""

    tenant_id: str | None
    feature_id: str | None
    requests: int
    cost_usd: Raw


class Handoff(Struct, frozen=True, kw_only=True):
    """What goes with the hand-off's calls. `eval_baseline` is the file that was given, as it is."""

    first: date
    last: date
    tenant_id: str | None
    environment: str | None
    requests: int
    cache_hits_left_out: int
    cost_by_feature: tuple[FeatureTotals, ...]
    eval_baseline: Raw | None


class Exports:
    """Reads tables out of the archive, a page at a time. Every page may raise `archive.ArchiveError`."""

    def __init__(self, archive: Archive, page_rows: int = PAGE_ROWS) -> None:
        self._archive = archive
        self._page_rows = page_rows
        self._sql = statements("export.sql")

    def ledger(self, selection: Selection, *, whole_events: bool) -> Table:
        """Every row, in the order of time; as whole events in the schema `cost-ledger-v1`, or as columns."""
        pages = self._ledger_pages(selection)
        if whole_events:
            return Table(_LEDGER[-1:], _picked(pages, (len(_LEDGER) - 1,)), documents=True)
        return Table(_LEDGER[:-1], _picked(pages, range(len(_LEDGER) - 1)))

    def daily(self, selection: Selection) -> Table:
        """The rollups. Raises `NotRolledUp` at its first page."""
        return Table(_ROLLUP, self._rollup_pages(selection))

    async def rollups(self, selection: Selection) -> AsyncIterator[dict[str, Any]]:
        """The rollups, each by column name. Raises `NotRolledUp` before the first."""
        async for page in self._rollup_pages(selection):
            for row in page:
                yield {column.name: value for column, value in zip(_ROLLUP, row, strict=True)}

    def handoff(self, selection: Selection, *, cache_hits: bool) -> tuple[Table, dict[tuple[Any, Any], list[int]]]:
        """Clients' calls for fine-tuning, and their requests and nano-dollars by tenant and feature.

        The totals are complete once the table has been read to its end.
        """
        places = [[column.name for column in _LEDGER].index(name) for name in _HANDOFF]
        totals: dict[tuple[Any, Any], list[int]] = {}

        async def counted() -> AsyncIterator[Sequence[Sequence[Any]]]:
            pages = self._ledger_pages(selection, purpose="client", cache_hits=cache_hits)
            async for page in _picked(pages, places):
                for row in page:
                    named = dict(zip(_HANDOFF, row, strict=True))
                    sums = totals.setdefault((named["tenant_id"], named["feature_id"]), [0, 0])
                    sums[0] += 1
                    sums[1] += nanos(named["cost_usd"])
                yield page

        return Table(tuple(_LEDGER[place] for place in places), counted()), totals

    async def summary(
        self,
        selection: Selection,
        totals: dict[tuple[Any, Any], list[int]],
        *,
        cache_hits: bool,
        eval_baseline: Raw | None = None,
    ) -> Handoff:
        """What goes with a hand-off whose table has been read."""
        left_out = 0
        if not cache_hits:
            ((left_out,),) = await self._archive.rows(self._sql["cache_hits"], _parameters(selection))
        by_cost = sorted(totals.items(), key=lambda item: (-item[1][1], str(item[0])))
        return Handoff(
            first=selection.first,
            last=selection.last,
            tenant_id=selection.tenant,
            environment=selection.environment,
            requests=sum(requests for requests, _ in totals.values()),
            cache_hits_left_out=left_out,
            cost_by_feature=tuple(
                FeatureTotals(tenant, feature, requests, usd(cost)) for (tenant, feature), (requests, cost) in by_cost
            ),
            eval_baseline=eval_baseline,
        )

    async def _ledger_pages(
        self, selection: Selection, purpose: str | None = None, cache_hits: bool = True
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        after_at, after_id = datetime(1970, 1, 1, tzinfo=UTC), "00000000-0000-0000-0000-000000000000"
        while True:
            rows = await self._archive.rows(
                self._sql["ledger_page"],
                _parameters(selection)
                | {"after_at": after_at, "after_id": after_id, "rows": self._page_rows}
                | {"purpose": purpose, "cache_hits": cache_hits},
            )
            if rows:
                after_at, after_id = rows[-1][0], rows[-1][1]
                yield [(row[0], str(row[1]), *row[2:]) for row in rows]
            if len(rows) < self._page_rows:
                return

    async def _rollup_pages(self, selection: Selection) -> AsyncIterator[list[tuple[Any, ...]]]:
        missing = await self._archive.rows(self._sql["unrolled_days"], _parameters(selection))
        if missing:
            raise NotRolledUp(f"There is no rollup of {missing[0][0]} yet: run `gateway rollup` first.")
        offset = 0
        while True:
            rows = await self._archive.rows(
                self._sql["rollup_page"], _parameters(selection) | {"offset": offset, "rows": self._page_rows}
            )
            if rows:
                yield rows
            if len(rows) < self._page_rows:
                return
            offset += len(rows)


def _parameters(selection: Selection) -> dict[str, object]:
    return {
        "first": selection.first,
        "last": selection.last,
        "tenant": selection.tenant,
        "environment": selection.environment,
    }


async def _picked(
    pages: AsyncIterator[Sequence[Sequence[Any]]], places: Sequence[int]
) -> AsyncIterator[Sequence[Sequence[Any]]]:
    async for page in pages:
        yield [[row[place] for place in places] for row in page]
