"""The benchmark's report as one HTML page: bars drawn as inline SVG, and the table; nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loadtest.bench import report as reporting
from loadtest.bench.report import Report, Row

COLOURS = {
    "mock": "#9aa0a6",
    "gateway": "#1a73e8",
    "gateway-bare": "#8ab4f8",
    "traefik": "#f29900",
    "traefik-tls": "#fdd663",
    "nginx": "#188038",
}
WIDTH, BAR_HEIGHT, GAP, LABEL_WIDTH, VALUE_WIDTH = 720, 16, 12, 130, 90
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #202124 }
pre { overflow-x: auto; background: #f6f7f8; padding: 1rem; font-size: 12px }
svg { max-width: 100%; height: auto } text { font: 12px system-ui, sans-serif; fill: #202124 }
"""


def page(report: Report, titles: dict[str, str]) -> str:
    """A whole HTML document. `titles` has a sentence for each case."""
    parts = [f"<p>{escape(report.facts.on)}<br>{escape(report.facts.machine)}</p>"]
    for case in dict.fromkeys(row.case for row in report.rows):
        rows = [row for row in report.rows if row.case == case]
        parts.append(f"<h2>{escape(case)}: {escape(titles[case])}</h2>")
        parts.append("<h3>Answers per second that one core carries, by the CPU time of each (more is better)</h3>")
        carried = [row for row in rows if row.subject != reporting.BASELINE]
        parts.append(bars([(row, row.per_core, f"{row.per_core:,.0f}") for row in carried]))
        parts.append("<h3>Answers per second as they came (more is better)</h3>")
        parts.append(bars([(row, row.per_second, f"{row.per_second:,.0f}") for row in rows]))
        added = [(row, row.added_us / 1000, f"{row.added_us / 1000:,.2f} ms") for row in rows if row.added_us]
        if added:
            parts.append("<h3>Added to the bare mock at the median (less is better)</h3>")
            parts.append(bars(added))
    parts.append(f"<pre>{escape(reporting.table(report, titles))}</pre>")
    head = f"<meta charset='utf-8'><title>LLM gateway benchmark</title><style>{_STYLE}</style>"
    body = f"<h1>LLM gateway benchmark</h1>{''.join(parts)}"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def bars(values: Sequence[tuple[Row, float, str]]) -> str:
    """Horizontal bars in groups by concurrency: (row, length, what stands beside the bar)."""
    longest = max((value for _, value, _ in values), default=0) or 1
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    drawn, y, concurrency = [], 0, None
    for row, value, label in values:
        if row.concurrency != concurrency:
            y += GAP if concurrency is not None else 0
            concurrency = row.concurrency
            drawn.append(f"<text x='0' y='{y + 12}'>c = {concurrency}</text>")
        width = max(1.0, max(value, 0) / longest * room)
        drawn.append(
            f"<text x='50' y='{y + 12}'>{escape(row.subject)}</text>"
            f"<rect x='{LABEL_WIDTH}' y='{y + 1}' width='{width:.1f}' height='{BAR_HEIGHT - 3}' "
            f"fill='{COLOURS.get(row.subject, '#5f6368')}'/>"
            f"<text x='{LABEL_WIDTH + width + 6:.1f}' y='{y + 12}'>{escape(label)}</text>"
        )
        y += BAR_HEIGHT
    return f"<svg viewBox='0 0 {WIDTH} {y}' width='{WIDTH}' role='img'>{''.join(drawn)}</svg>"
