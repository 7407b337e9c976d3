"""The usage page as HTML: what one tenant used, or all together. Pure: figures in, bytes out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, timedelta
from functools import cache
from typing import Any
from urllib.parse import urlencode
from xml.etree.ElementTree import Element

from msgspec import Struct

from app.reports.charts import Series, bars, style
from app.reports.markup import Child, document, el
from app.reports.period import Budget, Figures, Spend, Trend, Usage

MAX_LINES = 100
"""Lines of a table; the rest is added up in one."""
SPANS_DAYS = (7, 30, 90)


class View(Struct, frozen=True, kw_only=True):
    """What the visitor chose, and may choose. `tenant` None shows all together, where `everyone` allows it."""

    today: date
    tenant: str | None
    tenants: Sequence[str]
    days: int
    everyone: bool
    service: str


def sign_in(problem: str | None = None, *, admin: bool = False) -> bytes:
    """The form that asks for the key, or on the admin port for its token."""
    what = "Admin token" if admin else "Gateway key"
    return _page(
        "Sign in",
        el(
            "main",
            el("h1", "Usage"),
            el("p", problem, class_="problem", role="alert") if problem else None,
            el(
                "form",
                el("input", name="username", value="gateway", autocomplete="username", hidden=True),
                el("label", what, for_="key"),
                el(
                    "input",
                    type="password",
                    id="key",
                    name="key",
                    required=True,
                    autocomplete="current-password",
                    autofocus=True,
                    maxlength=200,
                ),
                el(
                    "p",
                    "It is exchanged for a session of 30 minutes, and not kept."
                    if admin
                    else "One with the role “usage”. It is exchanged for a session of 30 minutes, and not kept.",
                    class_="hint",
                ),
                el("button", "Sign in", type="submit"),
                method="post",
                action="/usage/sign-in",
                class_="sign-in",
            ),
            id="content",
        ),
    )


def failure(title: str, message: str) -> bytes:
    """A page that says what went wrong."""
    back = el("p", el("a", "Back to usage", href="/usage"))
    return _page(title, el("main", el("h1", title), el("p", message, role="alert"), back, id="content"))


def usage(shown: Usage, view: View) -> bytes:
    """The page with everything on it."""
    period = shown.period
    who = view.tenant or "all tenants"
    days = list(period.days)
    figures = list(period.days.values())
    main = el(
        "main",
        el("h1", f"Usage of {who}"),
        _choices(view),
        el(
            "p",
            f"{period.first} to {period.last}, days in UTC. The ledger is usually seconds behind the calls.",
            class_="hint",
        ),
        _spikes(shown.spikes) if view.tenant is None else None,
        _spike(shown.trend),
        _tiles(period.total, shown.trend),
        _budgets(shown.budgets, shown.trend),
        el(
            "section",
            el("h2", "Day by day"),
            bars("Spend", days, [Series("Spend", "s1", [day.cost_nanos for day in figures])], money),
            bars(
                "Requests",
                days,
                [
                    Series("Answered by a vendor", "s1", [_answered(day) for day in figures]),
                    Series("Answered by the cache", "s2", [day.cache_hits for day in figures]),
                    Series("Refused or limited", "s3", [day.refused + day.rate_limited for day in figures]),
                    Series("Errors", "s4", [day.errors for day in figures]),
                ],
                count,
            ),
            bars(
                "Tokens",
                days,
                [
                    Series("Read", "s1", [day.total_tokens - day.output_tokens for day in figures]),
                    Series("Written", "s2", [day.output_tokens for day in figures]),
                ],
                count,
            ),
            el(
                "details",
                el("summary", "Every day as a table"),
                _table("By day", "Day", [(str(day), sums) for day, sums in reversed(period.days.items())], limit=400),
            ),
        ),
        _grouped("Features", "Feature", period.features, lambda feature: feature or "(none named)"),
        _grouped("Models", "Model", period.models, _model),
        _grouped(
            "Tenants",
            "Tenant",
            period.tenants,
            lambda tenant: tenant or "(no valid tenant)",
            link=lambda tenant: _link(view, tenant) if tenant in view.tenants else None,
        )
        if view.tenant is None
        else None,
        id="content",
    )
    return _page(f"Usage of {who}", main, signed_in=view.service)


def _page(title: str, main: Element, signed_in: str | None = None) -> bytes:
    header = None
    if signed_in is not None:
        header = el(
            "header",
            el("span", "LLM gateway", class_="brand"),
            el(
                "form",
                el("span", f"Signed in as {signed_in}"),
                el("button", "Sign out", type="submit"),
                method="post",
                action="/usage/sign-out",
            ),
        )
    return document(
        el(
            "html",
            el(
                "head",
                el("meta", charset="utf-8"),
                el("meta", name="viewport", content="width=device-width, initial-scale=1"),
                el("meta", name="color-scheme", content="light dark"),
                el("title", f"{title} - LLM gateway"),
                el("link", rel="stylesheet", href=_style_address()),
            ),
            el("body", el("a", "Skip to content", href="#content", class_="skip"), header, main),
            lang="en",
        )
    )


@cache
def _style_address() -> str:
    """With a digest, so that no browser draws a new page by the style sheet of the old one."""
    return "/usage/usage.css?" + hashlib.sha256(style()).hexdigest()[:12]


# --- parts ------------------------------------------------------------------------------------------------------------


def _choices(view: View) -> Element:
    spans = el("nav", aria_label="Span")
    for days in SPANS_DAYS:
        here = "page" if days == view.days else None
        spans.append(el("a", f"{days} days", href=_link(view, view.tenant, days), aria_current=here))
    if len(view.tenants) < 2 and not view.everyone:
        return el("div", spans, class_="choices")
    chosen = el("select", id="tenant", name="tenant")
    if view.everyone:
        chosen.append(el("option", "All tenants", value="", selected=view.tenant is None))
    for tenant in view.tenants:
        chosen.append(el("option", tenant, value=tenant, selected=tenant == view.tenant))
    form = el(
        "form",
        el("label", "Tenant", for_="tenant"),
        chosen,
        el("input", type="hidden", name="days", value=view.days),
        el("button", "Show", type="submit"),
        method="get",
        action="/usage",
    )
    return el("div", form, spans, class_="choices")


def _link(view: View, tenant: str | None, days: int | None = None) -> str:
    return "/usage?" + urlencode({"tenant": tenant or "", "days": days or view.days})


_TILE_CHARACTERS = 9
"""What is longer is written smaller, or it would leave its tile: $0.000012345, $1,234,567.89."""


def _tiles(total: Figures, trend: Trend) -> Element:
    tiles = (
        ("Spend", money(total.cost_nanos), _unpriced(total)),
        ("This month", money(trend.month), f"{money(trend.forecast)} forecast at its end"),
        ("Requests", count(total.requests), f"{count(total.fallbacks)} by a fallback"),
        ("Tokens", count(total.total_tokens), f"{count(total.output_tokens)} written"),
        ("Cache hits", share(total.cache_hits, total.requests), f"{money(total.saved_nanos)} saved"),
        ("Errors", share(total.errors, total.requests), f"{count(total.rate_limited)} over a limit"),
    )
    listed = el("dl", class_="tiles")
    for name, value, note in tiles:
        listed.append(
            el(
                "div",
                el("dt", name),
                el("dd", value, class_="long" if len(value) > _TILE_CHARACTERS else None),
                el("dd", note, class_="note"),
            )
        )
    return listed


def _unpriced(total: Figures) -> str:
    return f"{count(total.unpriced)} calls at the ceiling price" if total.unpriced else "every call has a price"


def _spike(trend: Trend) -> Child:
    if not trend.spike or trend.average is None:
        return None
    return el(
        "p",
        f"Spend today is {money(trend.today)}, {share(trend.today, trend.average)} of the average of the days before "
        f"({money(trend.average)}).",
        class_="problem",
        role="status",
    )


def _spikes(spikes: Sequence[Spend]) -> Child:
    if not spikes:
        return None
    listed = el("ul")
    for each in spikes[:10]:
        ratio = share(each.today, each.average or 0)
        listed.append(el("li", f"{each.tenant}: {money(each.today)}, {ratio} of the average of the days before"))
    more = f", the first 10 of {len(spikes)}" if len(spikes) > 10 else ""
    return el("section", el("h2", f"Spend above 120 % of the usual{more}"), listed, class_="problem")


def _budgets(budgets: Iterable[Budget], trend: Trend) -> Child:
    section = el("section", el("h2", "Budgets"), class_="budgets")
    for number, budget in enumerate(budgets):
        write: Callable[[int], str] = money if budget.unit == "usd" else count
        unit = "" if budget.unit == "usd" else " tokens"
        name = f"{'Dollars' if budget.unit == 'usd' else 'Tokens'} a {budget.window} ({budget.time_zone})"
        section.append(
            el(
                "div",
                el("label", name, for_=f"budget-{number}"),
                el(
                    "meter",
                    share(budget.used, budget.limit),
                    id=f"budget-{number}",
                    min=0,
                    max=100,
                    low=80,
                    high=99,
                    optimum=0,
                    value=min(100, budget.used * 100 // budget.limit),
                ),
                el("p", f"{write(budget.used)} of {write(budget.limit)}{unit} used, {write(budget.left)} left"),
                _pace(budget, trend),
            )
        )
    return section if len(section) > 1 else None


def _pace(budget: Budget, trend: Trend) -> Child:
    """Where a month's dollars will end, as things go."""
    if (budget.unit, budget.window) != ("usd", "month"):
        return None
    says = f"At this pace {money(trend.forecast)} at the month's end, {share(trend.forecast, budget.limit)} of it."
    over = trend.forecast > budget.limit
    return el(
        "p", f"{says} The budget will be spent before then." if over else says, class_="problem" if over else None
    )


def _grouped(
    title: str,
    head: str,
    groups: Mapping[Any, Figures],
    name: Callable[[Any], str],
    link: Callable[[Any], str | None] = lambda key: None,
) -> Element:
    lines = [(el("a", name(key), href=to) if (to := link(key)) else name(key), sums) for key, sums in groups.items()]
    return el("section", el("h2", title), _table(title, head, lines))


_COLUMNS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("Requests", lambda sums: count(sums.requests)),
    ("Errors", lambda sums: count(sums.errors)),
    ("Limited", lambda sums: count(sums.rate_limited)),
    ("Cache hits", lambda sums: share(sums.cache_hits, sums.requests)),
    ("Read", lambda sums: count(sums.total_tokens - sums.output_tokens)),
    ("Written", lambda sums: count(sums.output_tokens)),
    ("Saved", lambda sums: money(sums.saved_nanos)),
    ("Spend", lambda sums: money(sums.cost_nanos)),
)


def _table(caption: str, head: str, lines: Sequence[tuple[Element | str, Figures]], limit: int = MAX_LINES) -> Element:
    if not lines:
        return el("p", "No calls in these days.")
    shown = list(lines[:limit])
    if len(lines) > limit:
        rest = Figures()
        for _, sums in lines[limit:]:
            rest += sums
        shown.append((f"{len(lines) - limit} others", rest))
    heads = el("tr", el("th", head, scope="col"))
    for title, _ in _COLUMNS:
        heads.append(el("th", title, scope="col", class_="number"))
    body = el("tbody")
    for name, sums in shown:
        row = el("tr", el("th", name, scope="row"))
        for _, write in _COLUMNS:
            row.append(el("td", write(sums), class_="number"))
        body.append(row)
    table = el("table", el("caption", caption, class_="unseen"), el("thead", heads), body)
    return el("div", table, class_="wide", role="region", aria_label=f"{caption}, a table", tabindex=0)


def _model(model: Any) -> str:
    if model.alias is None:
        return "(refused before one was chosen)"
    if model.resolved is None:
        return model.alias
    return f"{model.alias}: {model.resolved} at {model.provider}"


def _answered(day: Figures) -> int:
    """Calls that a vendor worked on: hang-ups too."""
    return max(0, day.requests - day.cache_hits - day.refused - day.rate_limited - day.errors)


# --- figures as text --------------------------------------------------------------------------------------------------


def money(nanos: int) -> str:
    """Dollars and cents; below a cent as many digits as it takes to be seen, at most nine."""
    if 0 < nanos < 10_000_000:
        return "$" + f"0.{nanos:09d}".rstrip("0")
    cents = (nanos + 5_000_000) // 10_000_000
    return f"${cents // 100:,}.{cents % 100:02d}"


def count(value: int) -> str:
    return f"{value:,}"


def share(part: int, whole: int) -> str:
    """Per cent with one decimal, of nothing a dash."""
    if whole <= 0:
        return "-"
    tenths = (part * 1000 + whole // 2) // whole
    return f"{tenths // 10:,}.{tenths % 10} %"


def span(today: date, days: int) -> tuple[date, date]:
    """The first and last day of the `days` that end today."""
    return today - timedelta(days - 1), today
