"""Bar charts as SVG, drawn here: no script runs on the page, and each bar says its value to those who point at it.

The same numbers stand in a table below, which is what screen readers are sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from xml.etree.ElementTree import Element

from msgspec import Struct

from app.reports.markup import el

WIDTH, HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 8, 10, 26
_STEPS = 4


class Series(Struct, frozen=True):
    """One colour of the bars: a label, its class in usage.css, and a value a day, none below zero."""

    label: str
    style: str
    values: Sequence[int]


def bars(title: str, days: Sequence[date], series: Sequence[Series], show: Callable[[int], str]) -> Element:
    """A figure with a bar a day, the series on top of each other; `show` writes a value."""
    totals = [sum(one.values[place] for one in series) for place in range(len(days))]
    top = _round_up(max(totals, default=0))
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    step = inner_width / max(1, len(days))
    drawing = el(
        "svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=_summary(title, days, totals, show),
        preserveAspectRatio="xMidYMid meet",
    )  # fmt: skip
    for line in range(_STEPS + 1):
        y = _TOP + inner_height * (1 - line / _STEPS)
        drawing.append(el("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_n(y), y2=_n(y), class_="grid"))
        drawing.append(el("text", show(top * line // _STEPS), x=_LEFT - 6, y=_n(y + 4), class_="axis end"))
    for place, day in enumerate(days):
        base = float(_TOP + inner_height)
        group = el("g", class_="bar")
        said = [f"{day.isoformat()}: {show(totals[place])}"]
        for one in series:
            tall = inner_height * one.values[place] / top
            base -= tall
            if tall:
                group.append(
                    el(
                        "rect",
                        x=_n(_LEFT + place * step + step * 0.12),
                        y=_n(base),
                        width=_n(step * 0.76),
                        height=_n(tall),
                        class_=one.style,
                    )
                )
            if len(series) > 1:
                said.append(f"{one.label} {show(one.values[place])}")
        # As wide and high as the chart, so that low bars can be pointed at too.
        group.append(el("rect", x=_n(_LEFT + place * step), y=_TOP, width=_n(step), height=inner_height, class_="hit"))
        group.insert(0, el("title", "\n".join(said)))
        drawing.append(group)
    for place in sorted({0, len(days) // 2, len(days) - 1}) if days else ():
        x = _LEFT + (place + 0.5) * step
        ends = "start" if place == 0 and len(days) > 1 else "end" if place == len(days) - 1 and place else "middle"
        drawing.append(el("text", days[place].isoformat(), x=_n(x), y=HEIGHT - 8, class_=f"axis {ends}"))
    legend = None
    if len(series) > 1:
        legend = el("ul", class_="legend")
        for one in series:
            legend.append(el("li", el("span", class_=f"key {one.style}", aria_hidden="true"), one.label))
    return el("figure", el("figcaption", title), legend, drawing)


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


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
