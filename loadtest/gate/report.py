"""What the gates found: a table for the terminal, one HTML page with plots, the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

import msgspec
from msgspec import Struct

from app.reports.markup import document as html
from app.reports.markup import el
from loadtest.gate.k6 import Call, Load
from loadtest.gate.settings import Gate
from loadtest.load import percentile

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 180, 60, 22
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #202124 }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
svg { max-width: 100%; height: auto } text { font: 12px system-ui, sans-serif; fill: #202124 }
.passed { color: #137333 } .missed { color: #b3261e; font-weight: 600 }
.line { fill: none; stroke: #1a73e8; stroke-width: 2 }
pre { white-space: pre-wrap }
.dot { fill: #b3261e } .grid { stroke: #ddd }
"""


class Result(Struct, frozen=True):
    """A gate and what it found. `name` is its key in gates.yaml."""

    name: str
    gate: Gate
    passed: bool
    measured: str
    details: list[str]
    loads: dict[str, Load]

    @property
    def verdict(self) -> str:
        return "passed" if self.passed else "MISSED" if self.gate.blocking else "missed, a warning"


def shippable(results: Sequence[Result]) -> bool:
    return all(result.passed or not result.gate.blocking for result in results)


def table(results: Sequence[Result]) -> str:
    """For a terminal."""
    head = ("gate", "threshold", "blocking", "measured", "")
    lines = [
        (r.gate.title, r.gate.threshold, "yes" if r.gate.blocking else "no", r.measured, r.verdict) for r in results
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    ]
    text += [f"  {result.name}: {line}" for result in results if not result.passed for line in result.details]
    text.append("Ship." if shippable(results) else "Do not ship: a blocking gate was missed.")
    return "\n".join(text)


def document(url: str, results: Sequence[Result]) -> bytes:
    """The same as JSON; a load is summed up, not listed."""
    return msgspec.json.encode(
        {
            "target": url,
            "passed": shippable(results),
            "gates": [
                {
                    "name": r.name,
                    "threshold": r.gate.threshold,
                    "blocking": r.gate.blocking,
                    "passed": r.passed,
                    "measured": r.measured,
                    "details": r.details,
                    "loads": {name: _figures(load) for name, load in r.loads.items()},
                }
                for r in results
            ],
        }
    )


def _figures(load: Load) -> dict[str, object]:
    return {
        "calls": len(load.calls),
        "p50_seconds": percentile(sorted(call.seconds for call in load.calls), 500),
        "p95_seconds": load.p95_seconds,
        "errors": dict(load.errors),
        "fallbacks": load.fallbacks,
    }


def page(url: str, results: Sequence[Result]) -> bytes:
    """One HTML document, nothing loaded from anywhere."""
    head = el("tr", *(el("th", word) for word in ("Gate", "Threshold", "Blocking", "Measured", "")))
    body = [
        el(
            "tr",
            el("td", r.gate.title),
            el("td", r.gate.threshold),
            el("td", "yes" if r.gate.blocking else "no"),
            el("td", r.measured, *(el("div", detail) for detail in r.details)),
            el("td", r.verdict, class_="passed" if r.passed else "missed"),
        )
        for r in results
    ]
    plots = [
        el("section", el("h2", f"{r.gate.title}: {name}"), *_plots(load.calls))
        for r in results
        for name, load in r.loads.items()
        if load.calls
    ]
    verdict = "Ship" if shippable(results) else "Do not ship"
    return html(
        el(
            "html",
            el("head", el("meta", charset="utf-8"), el("title", f"{verdict}: {url}"), el("style", STYLE)),
            el("body", el("h1", f"{verdict}: {url}"), el("table", head, *body), *plots),
            lang="en",
        )
    )


def _plots(calls: Sequence[Call]) -> list[Element]:
    """A second a point: what was answered, the 95th percentile of how long it took, and where there were errors."""
    seconds = range(int(max(call.at_seconds for call in calls)) + 1)
    per_second = [[call for call in calls if int(call.at_seconds) == second] for second in seconds]
    slowest = [percentile(sorted(call.seconds for call in own), 950) for own in per_second]
    errors = [any(call.outcome != "ok" for call in own) for own in per_second]
    return [
        line("Answers in each second", [float(len(own)) for own in per_second], errors, "{:.0f}"),
        line("95th percentile, seconds", slowest, errors, "{:.2f}"),
    ]


def line(title: str, values: Sequence[float], marks: Sequence[bool], shape: str, last: str = "") -> Element:
    """A figure with a line through the values, one a step, and a dot at those that are marked; `last` names the end."""
    top = max(values) or 1.0
    width, height = WIDTH - LEFT - 10, HEIGHT - BOTTOM - 10
    xs = [LEFT + width * place / max(1, len(values) - 1) for place in range(len(values))]
    ys = [10 + height * (1 - value / top) for value in values]
    drawing = el("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, role="img", aria_label=title)
    for share in (0.0, 0.5, 1.0):
        y = f"{10 + height * (1 - share):.1f}"
        drawing.append(el("line", x1=LEFT, x2=WIDTH - 10, y1=y, y2=y, class_="grid"))
        drawing.append(el("text", shape.format(top * share), x=4, y=y))
    drawing.append(
        el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True)), class_="line")
    )
    for x, y, marked in zip(xs, ys, marks, strict=True):
        if marked:
            drawing.append(el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_="dot"))
    drawing.append(el("text", f"0 to {last or len(values) - 1}", x=LEFT, y=HEIGHT - 4))
    return el("figure", el("figcaption", title), drawing)
