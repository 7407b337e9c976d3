"""A reconciliation as text, JSON and HTML; and the reading and keeping of it in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any
from xml.etree.ElementTree import Element

import msgspec
from msgspec import Struct

from app.archive import Archive
from app.core import usd
from app.reports.invoices import InvoiceLine
from app.reports.markup import document, el
from app.reports.money import nanos
from app.reports.page import count, money
from app.reports.reconcile import ALARM_RATIO, CAUSES, Difference, Drift, LedgerLine, reconcile, span
from app.sql import statements

PAGE_ROWS = 10_000
SHOWN = 50
"""Differences that text and HTML list; JSON has all."""


class Reconciliation(Struct, frozen=True, kw_only=True):
    """One invoice, compared."""

    vendor: str
    first: date
    last: date
    threshold: float
    drift: Drift

    @property
    def alarm(self) -> bool:
        return self.drift.ratio > self.threshold


async def compare(
    archive: Archive,
    vendor: str,
    lines: Sequence[InvoiceLine],
    *,
    providers: Sequence[str],
    days: tuple[date, date] | None = None,
    models: Mapping[str, str] | None = None,
    keys: Mapping[str, str] | None = None,
    threshold: float = ALARM_RATIO,
) -> Reconciliation:
    """Compares an invoice that has lines with the ledger's rows of `providers`, on the days that the invoice spans.

    Raises `archive.ArchiveError`.
    """
    first, last = days or span(lines)
    lines = [line for line in lines if first <= line.day <= last]
    by_call = any(line.request_id is not None for line in lines)
    ours = await _ledger_lines(archive, first, last, providers, by_call)
    return Reconciliation(
        vendor=vendor, first=first, last=last, threshold=threshold, drift=reconcile(ours, lines, models, keys)
    )


async def keep(archive: Archive, found: Reconciliation) -> None:
    """Notes a reconciliation in the table `reconciliation`, where the alert looks."""
    sql = statements("reconcile.sql")
    async with archive.transaction() as run:
        await run(sql["create_reconciliation"])
        await run(
            sql["keep"],
            {
                "vendor": found.vendor,
                "first": found.first,
                "last": found.last,
                "ratio": found.drift.ratio,
                "found": as_json(found).decode(),
            },
        )


async def latest(archive: Archive) -> dict[str, tuple[float, float]]:
    """By vendor the drift of the last reconciliation, and when it was made in unix seconds."""
    sql = statements("reconcile.sql")
    async with archive.transaction() as run:
        await run(sql["create_reconciliation"])
        return {vendor: (ratio, made_at) for vendor, ratio, made_at in await run(sql["latest"])}


async def _ledger_lines(
    archive: Archive, first: date, last: date, providers: Sequence[str], by_call: bool
) -> list[LedgerLine]:
    sql = statements("reconcile.sql")
    chosen = {"first": first, "last": last, "providers": list(providers)}
    found = [_line(row) for row in await archive.rows(sql["beside"], chosen)]
    if not by_call:
        return found + [_line(row) for row in await archive.rows(sql["by_group"], chosen)]
    after_at, after_id = datetime(1970, 1, 1, tzinfo=UTC), "00000000-0000-0000-0000-000000000000"
    while True:
        after = {"after_at": after_at, "after_id": after_id, "rows": PAGE_ROWS}
        rows = await archive.rows(sql["by_call"], chosen | after)
        found += [_line(row[:9]) for row in rows]
        if len(rows) < PAGE_ROWS:
            return found
        after_at, after_id = rows[-1][9], rows[-1][10]


def _line(row: tuple[Any, ...]) -> LedgerLine:
    day, model, provider, request_id, requests, read, written, read_usd, written_usd = row
    return LedgerLine(
        day=day,
        model=model or "unknown",
        key=provider,
        request_id=request_id,
        requests=requests,
        input_tokens=read,
        output_tokens=written,
        input_nanos=nanos(read_usd),
        output_nanos=nanos(written_usd),
    )


# --- showing it -------------------------------------------------------------------------------------------------------


def as_json(found: Reconciliation) -> bytes:
    """Everything, with dollars as JSON numbers."""
    drift = found.drift
    return msgspec.json.encode(
        {
            "vendor": found.vendor,
            "from": found.first,
            "to": found.last,
            "ledger_usd": usd(drift.ledger_nanos),
            "invoice_usd": usd(drift.invoice_nanos) if drift.priced else None,
            "drift_usd": usd(drift.gross_nanos),
            "drift_ratio": drift.ratio,
            "threshold": found.threshold,
            "alarm": found.alarm,
            "matched": drift.matched,
            "by_cause": {
                cause: {"differences": number, "usd": usd(total)} for cause, (number, total) in drift.by_cause().items()
            },
            "differences": [
                {name: getattr(each, name) for name in each.__struct_fields__ if name != "nanos"}
                | {"usd": usd(each.nanos)}
                for each in drift.differences
            ],
        }
    )


def as_text(found: Reconciliation) -> str:
    """For a terminal: the verdict, the causes, and the largest differences."""
    drift = found.drift
    lines = [*_verdict(found), ""]
    for cause, (number, total) in drift.by_cause().items():
        lines.append(f"  {CAUSES[cause]:<34} {number:>7,}  {_signed(total):>16}")
    if drift.differences:
        lines += ["", "Largest differences (invoice less ledger):"]
    for each in drift.differences[:SHOWN]:
        lines.append("  " + "  ".join(_cells(each)))
    if len(drift.differences) > SHOWN:
        lines.append(f"  and {len(drift.differences) - SHOWN:,} more: --json has all")
    return "\n".join(lines)


_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{text-align:left;padding:.25rem 1rem .25rem 0;"
    "border-bottom:1px solid #8888}td.number{text-align:right;font-variant-numeric:tabular-nums}"
)


def as_html(found: Reconciliation) -> bytes:
    """A page that stands alone."""
    causes = el("tbody")
    for cause, (number, total) in found.drift.by_cause().items():
        causes.append(
            el(
                "tr",
                el("th", CAUSES[cause], scope="row"),
                el("td", count(number), class_="number"),
                el("td", _signed(total), class_="number"),
            )
        )
    largest = el("tbody")
    for each in found.drift.differences[:SHOWN]:
        row = el("tr")
        for cell in _cells(each):
            row.append(el("td", cell.strip()))
        largest.append(row)
    title = f"Reconciliation of {found.vendor}, {found.first} to {found.last}"
    body = el("body", el("h1", title))
    for line in _verdict(found):
        body.append(el("p", line))
    body.append(_titled("Causes", ("Cause", "Differences", "Dollars"), causes))
    body.append(_titled("Largest differences, invoice less ledger", _HEADS, largest))
    head = el("head", el("meta", charset="utf-8"), el("title", title), el("style", _STYLE))
    return document(el("html", head, body, lang="en"))


_HEADS = ("Cause", "Day", "Model", "Key", "Request", "Dollars", "Tokens read", "Tokens written", "Calls")


def _titled(caption: str, heads: Sequence[str], body: Element) -> Element:
    row = el("tr")
    for head in heads:
        row.append(el("th", head, scope="col"))
    return el("table", el("caption", caption), el("thead", row), body)


def _verdict(found: Reconciliation) -> list[str]:
    drift = found.drift
    says = money(drift.invoice_nanos) if drift.priced else "no amounts, only tokens"
    return [
        f"{found.vendor}, {found.first} to {found.last}: the ledger has {money(drift.ledger_nanos)}, "
        f"the invoice {says}; {drift.matched:,} lines matched.",
        f"Drift {money(drift.gross_nanos)}, {drift.ratio:.2%} of the whole: "
        + (f"ABOVE {found.threshold:.0%}, investigate." if found.alarm else f"within {found.threshold:.0%}."),
    ]


def _cells(each: Difference) -> tuple[str, ...]:
    return (
        f"{each.cause:<13}",
        each.day.isoformat(),
        each.model,
        each.key or "-",
        each.request_id or "-",
        _signed(each.nanos),
        f"{each.input_tokens:+,}",
        f"{each.output_tokens:+,}",
        f"{each.requests:+,}",
    )


def _signed(value: int) -> str:
    return ("-" if value < 0 else "+") + money(abs(value))
