"""Bar charts by Charts.css (vendored/): a table that a style sheet draws as columns, so no script runs on the page.

Each day says its values to those who point at it. The same numbers stand in a table below, which is what screen readers
are sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from importlib.resources import files
from xml.etree.ElementTree import Element

from msgspec import Struct

from app.reports.markup import el

_STEPS = 4
_PARTS = 1000


class Series(Struct, frozen=True):
    """One colour of the bars: a label, its class in usage.css, and a value a day, none below zero."""

    label: str
    style: str
    values: Sequence[int]


def bars(title: str, days: Sequence[date], series: Sequence[Series], show: Callable[[int], str]) -> Element:
    """A figure with a bar a day, the series on top of each other; `show` writes a value."""
    totals = [sum(one.values[place] for one in series) for place in range(len(days))]
    top = _round_up(max(totals, default=0))
    body = el("tbody")
    for place, day in enumerate(days):
        said = [f"{day.isoformat()}: {show(totals[place])}"]
        row = el("tr")
        below = 0
        for one in series:
            ends = below + one.values[place]
            # Between two ends that are rounded, so that the parts of a bar are as high as the bar.
            height = ends * _PARTS // top - below * _PARTS // top
            row.append(el("td", class_=f"{one.style} h{height}"))
            below = ends
            if len(series) > 1:
                said.append(f"{one.label} {show(one.values[place])}")
        row.set("title", "\n".join(said))  # of the row, which is as high as the chart: low bars can be pointed at too
        body.append(row)
    stacked = " multiple stacked" if len(series) > 1 else ""
    kind = f"charts-css column{stacked} show-primary-axis show-{_STEPS}-secondary-axes"
    drawing = el("table", body, class_=kind, role="img", aria_label=_summary(title, days, totals, show))
    values = el("ol", class_="values", aria_hidden="true")
    for line in range(_STEPS, -1, -1):
        values.append(el("li", show(top * line // _STEPS)))
    shown_days = el("ol", class_="days", aria_hidden="true")
    for place in sorted({0, len(days) // 2, len(days) - 1}) if days else ():
        shown_days.append(el("li", days[place].isoformat()))
    legend = None
    if len(series) > 1:
        legend = el("ul", class_="legend")
        for one in series:
            legend.append(el("li", el("span", class_=f"key {one.style}", aria_hidden="true"), one.label))
    chart = el("div", values, drawing, shown_days, class_="chart")
    return el("figure", el("figcaption", title), legend, chart)


@cache
def style() -> bytes:
    """The page's style sheet: Charts.css, a class for each height, as the policy forbids style attributes, and ours."""
    folder = files("app.reports")
    heights = "".join(f".h{part}{{--size:{part / _PARTS:g}}}" for part in range(_PARTS + 1))
    vendored = folder.joinpath("vendored", "charts.min.css").read_text()
    return "\n".join((vendored, heights, folder.joinpath("usage.css").read_text())).encode()


def _summary(title: str, days: Sequence[date], totals: Sequence[int], show: Callable[[int], str]) -> str:
    if not any(totals):
        return f"{title}: nothing in these days."
    highest = max(range(len(days)), key=lambda place: totals[place])
    return (
        f"{title}, {days[0]} to {days[-1]}: {show(sum(totals))} in all, at most {show(totals[highest])} on "
        f"{days[highest]}. The table of days has every value."
    )


def _round_up(value: int) -> int:
    """The next of 4, 8, 12, 20, 40, 60, 80 ... at or above the value: what four steps divide well."""
    power = 1
    while True:
        for first in (4, 8, 12, 20, 40):
            if first * power >= value:
                return first * power
        power *= 10
