"""How `gateway top` looks: the only home of rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from app.top import View

P95_SECONDS, REFUSED, FALLBACKS, FAILED, VENDOR_FAILS = 3.0, 0.05, 0.1, 0.001, 0.01
"""Above these a figure is red: the alerts' own thresholds (config/observability/alerts.yml)."""
FEW_TARGETS, MOST_TARGETS = 5, 20
"""Rows of targets: so few fit below the rest of a small terminal. Those that rest come first, and get more."""


def show(shown: View) -> None:
    Console().print(render(shown))


@contextmanager
def screen() -> Iterator[Callable[[View], None]]:
    """The whole terminal, until the context ends; what it yields draws a view."""
    with Live(Text("asking the replicas ..."), screen=True, auto_refresh=False) as live:
        yield lambda shown: live.update(render(shown), refresh=True)


def render(shown: View) -> RenderableType:
    p95 = "-" if shown.p95_seconds is None else _seconds(shown.p95_seconds)
    cells = [
        ("calls/s", f"{shown.calls:.1f}", False),
        ("p95", p95, (shown.p95_seconds or 0) > P95_SECONDS),
        ("failed", f"{shown.failed:.2%}", shown.failed > FAILED),
        ("429", f"{shown.refused:.1%}", shown.refused > REFUSED),
        ("cache hits", f"{shown.hits:.0%}", False),
        ("fallbacks", f"{shown.fallbacks:.1%}", shown.fallbacks > FALLBACKS),
        ("$/h", f"{shown.usd_per_hour:.2f}", False),
        ("$/1,000", f"{shown.usd_per_1000:.3f}", False),
        ("in flight", str(shown.in_flight), False),
    ]
    figures = Columns(
        [
            Text.assemble((f"{name}\n", "dim"), (value, "bold red" if bad else "bold"), justify="right")
            for name, value, bad in cells
        ],
        padding=(0, 3),
    )
    replicas = Table.grid(padding=(0, 2))
    for url, state in shown.replicas:
        style = "red" if state == "away" else "green" if state == "normal" else "yellow"
        replicas.add_row(url, Text(state, style=style))
    title = f"LLM gateway, last {shown.seconds:.0f} s" if shown.seconds else "LLM gateway"
    return Group(
        Panel(figures, title=title, title_align="left"),
        Panel(replicas, title="replicas", title_align="left"),
        Columns(
            [
                _panel("tenants", ("tenant", "calls/s", "429", "spend"), _tenants(shown)),
                _panel("providers", ("provider", "requests/s", "failed"), _providers(shown)),
                _panel("targets", ("target", "state"), _targets(shown)),
            ]
        ),
    )


def _panel(title: str, heads: tuple[str, ...], rows: Iterator[tuple[str | Text, ...]]) -> Panel:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place and head != "state" else "left", header_style="dim")
    for row in rows:
        table.add_row(*row)
    return Panel(table, title=title, title_align="left")


def _tenants(shown: View) -> Iterator[tuple[str | Text, ...]]:
    for row in shown.tenants:
        yield (
            row.name,
            f"{row.rate:.1f}",
            Text(f"{row.share:.0%}", style="red" if row.share > REFUSED else ""),
            row.more,
        )


def _providers(shown: View) -> Iterator[tuple[str | Text, ...]]:
    for row in shown.providers:
        yield row.name, f"{row.rate:.1f}", Text(f"{row.share:.1%}", style="red" if row.share > VENDOR_FAILS else "")


def _targets(shown: View) -> Iterator[tuple[str | Text, ...]]:
    rows = max(FEW_TARGETS, min(MOST_TARGETS, sum(state != "ok" for _, state in shown.targets)))
    for name, state in shown.targets[:rows]:
        yield name, Text(state, style="green" if state == "ok" else "bold red")
    if more := shown.targets[rows:]:
        rest = sum(state != "ok" for _, state in more)
        yield f"and {len(more)} more", Text(f"{rest} resting", style="bold red") if rest else Text("ok", style="green")


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
