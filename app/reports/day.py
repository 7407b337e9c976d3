"""A tenant's day, in calls, tokens and dollars: `gateway usage`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from itertools import groupby
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.ambient import Ambient
from app.archive import Archive
from app.core import usd
from app.reports.money import nanos
from app.sql import statements


class Totals(Struct, frozen=True, kw_only=True):
    """`unpriced` counts calls charged at the ceiling, because their model has no price. USD with at most 9 decimals."""

    requests: int
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cost_usd: Raw
    saved_usd: Raw
    unpriced: int


class ModelUsage(Totals, frozen=True, kw_only=True):
    """One alias on one vendor model. Both are null for calls that were refused before they had one."""

    model_alias: str | None
    model_resolved: str | None


class UsageReport(Struct, frozen=True, kw_only=True):
    """One UTC day of one tenant, in one environment or in all (null)."""

    tenant_id: str
    day: date
    environment: str | None
    total: Totals
    by_status: dict[str, int]
    by_model: tuple[ModelUsage, ...]

    def json(self) -> str:
        """The report as indented JSON; USD are numbers with at most nine decimals."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def text(self) -> str:
        """The report as a table for a terminal."""
        return _table(self)


class _Row(Struct, frozen=True, array_like=True):
    """A line of the statement `usage`, in its order."""

    model_alias: str | None
    model_resolved: str | None
    status: str
    cost_status: str
    requests: int
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cost_usd: Decimal
    saved_usd: Decimal
    unpriced: int


async def usage(database_url: str, tenant: str, day: date, environment: str | None = None) -> UsageReport:
    """A tenant's day; a day without calls is a report of zeros.

    Raises `archive.ArchiveError`, a sentence: the URL is wrong, PostgreSQL is away, or holds no ledger.
    """
    archive = Archive(database_url, Ambient())
    try:
        found = await archive.rows(
            statements("usage.sql")["usage"], {"tenant": tenant, "day": day, "environment": environment}
        )
    finally:
        await archive.close()
    rows = [_Row(*row) for row in found]
    by_status: Counter[str] = Counter()
    for row in rows:
        by_status[row.status] += row.requests
    return UsageReport(
        tenant_id=tenant,
        day=day,
        environment=environment,
        total=Totals(**_sums(rows)),
        by_status=dict(sorted(by_status.items())),
        by_model=tuple(
            ModelUsage(model_alias=alias, model_resolved=model, **_sums(list(group)))
            for (alias, model), group in groupby(rows, lambda row: (row.model_alias, row.model_resolved))
        ),
    )


def _sums(rows: Sequence[_Row]) -> dict[str, Any]:
    return {
        "requests": sum(row.requests for row in rows),
        "input_tokens": sum(row.input_tokens for row in rows),
        "output_tokens": sum(row.output_tokens for row in rows),
        "total_tokens": sum(row.total_tokens for row in rows),
        "cost_usd": _usd(row.cost_usd for row in rows),
        "saved_usd": _usd(row.saved_usd for row in rows),
        "unpriced": sum(row.unpriced for row in rows),
    }


def _usd(dollars: Iterable[Decimal]) -> Raw:
    return usd(sum(nanos(part) for part in dollars))


# --- showing it ---------------------------------------------------------------------------------------------------


def _table(report: UsageReport) -> str:
    where = f", environment {report.environment}" if report.environment else ""
    heading = f"{report.tenant_id} on {report.day.isoformat()} (UTC{where})"
    if not report.total.requests:
        return f"{heading}: no calls in the ledger."
    statuses = ", ".join(f"{count:,} {status}" for status, count in report.by_status.items())
    header = ("alias", "model", "requests", "input", "output", "tokens", "cost USD", "saved USD")
    body = [(line.model_alias or "-", line.model_resolved or "-", *_cells(line)) for line in report.by_model]
    lines = [header, *body, ("total", "", *_cells(report.total))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * len(max(table, key=len))
    text = [heading, f"{report.total.requests:,} calls: {statuses}", "", table[0], rule, *table[1:-1], rule, table[-1]]
    if report.total.unpriced:
        text += ["", f"{report.total.unpriced:,} calls are charged at the ceiling: their model has no price."]
    return "\n".join(text)


def _cells(line: Totals) -> tuple[str, ...]:
    return (
        f"{line.requests:,}",
        f"{line.input_tokens:,}",
        f"{line.output_tokens:,}",
        f"{line.total_tokens:,}",
        bytes(line.cost_usd).decode(),
        bytes(line.saved_usd).decode(),
    )
