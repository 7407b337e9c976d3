"""What the cache did over some days: hits and savings by the ledger, right and wrong by what was asked again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from xml.etree.ElementTree import Element

import msgspec
from msgspec import Struct

from app.archive import Archive
from app.cache.learning import MISSES
from app.core import usd
from app.reports.charts import Series, bars, style
from app.reports.markup import Child, document, el
from app.reports.money import nanos
from app.reports.page import count, money, share
from app.sql import statements

KINDS = ("exact", "semantic", "coalesced", "idempotent")
_LABELS = {
    "exact": "same request",
    "semantic": "same meaning",
    "coalesced": "at the same time",
    "idempotent": "same key",
}


class Line(Struct, frozen=True):
    """Answered calls of a day and alias: all, those that the cache answered by kind, nano-dollars saved and spent."""

    day: date
    alias: str
    calls: int
    hits: Mapping[str, int]
    saved_nanos: int
    spent_nanos: int


class Judged(Struct, frozen=True):
    """Questions that mean the same, of a day and alias. Of `hits`, `checks` were asked again and `wrong` were wrong.

    `shadow_right` and `shadow_wrong`: what would have been served and was asked instead. `veto:` by guard;
    `vetoed_right` of these would have been right.
    """

    day: date
    tenant: str
    alias: str
    figures: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.figures.get(name, 0)


class Wrong(Struct, frozen=True):
    """An entry whose answer was found wrong so many times."""

    tenant: str
    alias: str
    digest: str
    times: int
    question: str


class CacheReport(Struct, frozen=True, kw_only=True):
    first: date
    last: date
    tenant: str | None
    lines: list[Line]
    judged: list[Judged] = []
    worst: list[Wrong] = []

    @property
    def days(self) -> list[date]:
        return [self.first + timedelta(days=n) for n in range((self.last - self.first).days + 1)]


async def lines(archive: Archive, first: date, last: date, tenant: str | None) -> list[Line]:
    """Raises `archive.ArchiveError`."""
    sql = statements("cache.sql")["results"]
    found: dict[tuple[date, str], list[tuple[str | None, int, int, int]]] = {}
    for day, alias, kind, calls, saved, spent in await archive.rows(
        sql, {"first": first, "last": last, "tenant": tenant}
    ):
        found.setdefault((day, alias), []).append((kind, calls, nanos(saved), nanos(spent)))
    return [
        Line(
            day,
            alias,
            sum(calls for _, calls, _, _ in parts),
            {kind: calls for kind, calls, _, _ in parts if kind is not None},
            sum(saved for _, _, saved, _ in parts),
            sum(spent for _, _, _, spent in parts),
        )
        for (day, alias), parts in found.items()
    ]


def interval(share: float, of: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if of <= 0:
        return 0.0, 1.0
    z = 1.96
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


# --- showing it -------------------------------------------------------------------------------------------------------


def as_json(report: CacheReport) -> bytes:
    return msgspec.json.encode(
        {
            "from": report.first,
            "to": report.last,
            "tenant": report.tenant,
            "days": [
                {
                    "day": line.day,
                    "alias": line.alias,
                    "calls": line.calls,
                    "hits": dict(line.hits),
                    "saved_usd": usd(line.saved_nanos),
                    "spent_usd": usd(line.spent_nanos),
                }
                for line in report.lines
            ],
            "judged": [
                {"day": each.day, "tenant": each.tenant, "alias": each.alias, **each.figures} for each in report.judged
            ],
            "worst": report.worst,
        }
    )


def as_text(report: CacheReport) -> str:
    """For a terminal."""
    written = [_title(report), ""]
    written += [
        f"  {name:<32} {count(calls):>9} calls  {share(hits, calls):>6} hits  {money(saved):>12} saved"
        for name, calls, hits, saved, _ in _by_alias(report)
    ]
    if not report.lines:
        written.append("  No calls in these days.")
    if report.judged:
        written += ["", f"Same meaning: {_precision(report.judged)}"]
        for tenant, alias, served, _, right, per_hit, per_request, _ in _alias_precision(report.judged):
            said = f"right {right}, wrong per hit {per_hit}, per request {per_request}"
            written.append(f"  {tenant:<24} {alias:<24} {served:>15} served, {said}")
    written += [f"  wrong {w.times} times: {w.tenant} {w.alias} {w.digest} {w.question[:80]}" for w in report.worst]
    return "\n".join(written)


def as_html(report: CacheReport) -> bytes:
    """A page that stands alone."""
    by_day: dict[date, Counter[str]] = {day: Counter() for day in report.days}
    saved: Counter[date] = Counter()
    for line in report.lines:
        by_day[line.day].update(line.hits)
        by_day[line.day]["asked"] += line.calls - sum(line.hits.values())
        saved[line.day] += line.saved_nanos
    series = [
        Series(f"Answered: {_LABELS[kind]}", f"s{2 + place}", [by_day[day][kind] for day in report.days])
        for place, kind in enumerate(KINDS)
    ]
    asked = Series("Asked a vendor", "s1", [by_day[day]["asked"] for day in report.days])
    title = _title(report)
    body = el(
        "main",
        el("h1", title),
        bars("Calls by who answered", report.days, [asked, *series], count),
        bars("Saved", report.days, [Series("Saved", "s2", [saved[day] for day in report.days])], money),
        _table(
            "By alias",
            ("Alias", "Calls", "Hits", *(_LABELS[kind] for kind in KINDS), "Saved", "Spent"),
            _alias_rows(report),
        ),
        el("h2", "Same meaning: right and wrong"),
        el("p", _precision(report.judged) if report.judged else "Nothing was judged in these days."),
        _table("By tenant and alias, with 95 % intervals", _PRECISION, _alias_precision(report.judged))
        if report.judged
        else None,
        _table("Why there was none", _MISSED, _misses(report.judged)) if report.judged else None,
        _table("By day", ("Day", "Tenant", "Alias", *_JUDGED.values()), _judged_rows(report.judged))
        if report.judged
        else None,
        _table("Worst entries", ("Tenant", "Alias", "Entry", "Wrong", "Question"), _worst_rows(report.worst))
        if report.worst
        else None,
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width"),
        el("title", title),
        el("style", style().decode()),
    )
    return document(el("html", head, el("body", body), lang="en"))


_JUDGED = {
    "looks": "Looked",
    "hits": "Served",
    "checks": "Asked again",
    "wrong": "Wrong",
    "shadow_right": "Would be right",
    "shadow_wrong": "Would be wrong",
    "vetoed_right": "Vetoed, right",
}


def _title(report: CacheReport) -> str:
    whose = f" of {report.tenant}" if report.tenant else ""
    return f"Answers from before{whose}, {report.first} to {report.last}"


def _by_alias(report: CacheReport) -> list[tuple[str, int, int, int, int]]:
    """Alias, calls, hits, saved, spent; the most saved first."""
    sums: dict[str, list[int]] = {}
    for line in report.lines:
        known = sums.setdefault(line.alias, [0, 0, 0, 0])
        for place, value in enumerate((line.calls, sum(line.hits.values()), line.saved_nanos, line.spent_nanos)):
            known[place] += value
    return sorted(((name, *known) for name, known in sums.items()), key=lambda row: -row[3])


def _alias_rows(report: CacheReport) -> Iterable[tuple[str, ...]]:
    for name, calls, hits, saved, spent in _by_alias(report):
        kinds = [sum(line.hits.get(kind, 0) for line in report.lines if line.alias == name) for kind in KINDS]
        yield (name, count(calls), share(hits, calls), *map(count, kinds), money(saved), money(spent))


def _precision(judged: list[Judged]) -> str:
    """How many of those that were asked again were right, and what that is of all requests that looked."""
    looks, hits, checks, wrong = (sum(each[name] for each in judged) for name in ("looks", "hits", "checks", "wrong"))
    if not checks:
        return f"{count(hits)} of {count(looks)} served, none of them asked again yet."
    return (
        f"{count(hits)} of {count(looks)} served; {count(checks)} of them were asked again, {count(wrong)} were wrong: "
        f"{share(checks - wrong, checks)} right, {_likely(wrong, checks, hits / looks if looks else 0.0)} of requests "
        "answered wrongly (95 % interval)."
    )


_PRECISION = (
    "Tenant", "Alias", "Served", "Found wrong", "Right", "Wrong per hit", "Wrong per request", "Wrong, if served",
)  # fmt: skip


def _alias_precision(judged: list[Judged]) -> Iterable[tuple[str, ...]]:
    """Each tenant's and alias's days together, in `_PRECISION`'s columns; the last is of `shadow`. A dash: unknown."""
    for (tenant, alias), n in sorted(_by_tenant_and_alias(judged).items()):
        looks, hits, checks, wrong = n["looks"], n["hits"], n["checks"], n["wrong"]
        yield (
            tenant,
            alias,
            f"{count(hits)} of {count(looks)}",
            f"{count(wrong)} of {count(checks)}",
            _likely(checks - wrong, checks),
            _likely(wrong, checks),
            _likely(wrong, checks, hits / looks if looks else 0.0),
            _likely(n["shadow_wrong"], n["shadow_right"] + n["shadow_wrong"]),
        )


def _likely(part: int, of: int, scale: float = 1.0) -> str:
    """A sampled share with its 95 % interval, both times `scale`: the share of hits, which is counted."""
    if not of:
        return "-"
    low, high = interval(part / of, of)
    return f"{part / of * scale * 100:.2f} % [{low * scale * 100:.2f}, {high * scale * 100:.2f}]"


_MISSED = ("Tenant", "Alias", *(name.replace("_", " ").capitalize() for name in MISSES), "Vetoed")


def _misses(judged: list[Judged]) -> Iterable[tuple[str, ...]]:
    """Each tenant's and alias's misses, by reason; those of guards by guard."""
    for (tenant, alias), n in sorted(_by_tenant_and_alias(judged).items()):
        vetoes = ", ".join(
            f"{name.removeprefix('veto:')} {count(times)}"
            for name, times in sorted(n.items())
            if name.startswith("veto:")
        )
        yield (tenant, alias, *(count(n[name]) for name in MISSES), vetoes or "0")


def _by_tenant_and_alias(judged: list[Judged]) -> dict[tuple[str, str], Counter[str]]:
    sums: dict[tuple[str, str], Counter[str]] = {}
    for each in judged:
        sums.setdefault((each.tenant, each.alias), Counter()).update(each.figures)
    return sums


def _judged_rows(judged: list[Judged]) -> Iterable[tuple[str, ...]]:
    for each in judged:
        yield (each.day.isoformat(), each.tenant, each.alias, *(count(each[name]) for name in _JUDGED))


def _worst_rows(worst: list[Wrong]) -> Iterable[tuple[str, ...]]:
    for each in worst:
        yield each.tenant, each.alias, each.digest[:12], count(each.times), each.question or "(ended)"


def _table(caption: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Element:
    head = el("tr")
    for name in heads:
        head.append(el("th", name, scope="col"))
    body = el("tbody")
    for row in rows:
        line = el("tr")
        cells: list[Child] = [*row]
        for place, cell in enumerate(cells):
            line.append(el("th", cell, scope="row") if place == 0 else el("td", cell))
        body.append(line)
    table = el("table", el("caption", caption), el("thead", head), body)
    return el("div", table, class_="wide")
