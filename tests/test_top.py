"""`gateway top`: from two looks at replicas to what is shown, and the command against a real stack."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.top import Seen, samples, view
from app.top_screen import render
from tests.journey import Journey, chat, until

BEFORE = """
# TYPE gateway_requests_total counter
gateway_requests_total{tenant="a",alias="x",provider="openai",status="success"} 100
gateway_requests_total{tenant="a",alias="x",provider="openai",status="rate_limited"} 10
# TYPE gateway_cost_usd_total counter
gateway_cost_usd_total{tenant="a",alias="x",provider="openai",status="success"} 1.0
"""
AFTER = """
# TYPE gateway_requests_total counter
gateway_requests_total{tenant="a",alias="x",provider="openai",status="success"} 170
gateway_requests_total{tenant="a",alias="x",provider="openai",status="rate_limited"} 20
gateway_requests_total{tenant="b",alias="x",provider="openai",status="error"} 20
# TYPE gateway_cost_usd_total counter
gateway_cost_usd_total{tenant="a",alias="x",provider="openai",status="success"} 1.5
# TYPE gateway_fallback_total counter
gateway_fallback_total{from="x",to="y",reason="failed"} 5
# TYPE gateway_cache_results_total counter
gateway_cache_results_total{tenant="a",alias="x",result="miss"} 30
gateway_cache_results_total{tenant="a",alias="x",result="exact"} 10
# TYPE gateway_attempts_total counter
gateway_attempts_total{provider="openai",target="openai/m",outcome="success"} 90
gateway_attempts_total{provider="openai",target="openai/m",outcome="failed"} 10
# TYPE gateway_request_seconds histogram
gateway_request_seconds_bucket{alias="x",le="1"} 50
gateway_request_seconds_bucket{alias="x",le="2"} 90
gateway_request_seconds_bucket{alias="x",le="+Inf"} 100
"""
STATUS = {"in_flight": 3, "mode": "normal", "targets": {"openai/m": "ok"}, "resting": []}


def seen(text: str, at: float, **status: object) -> Seen:
    return Seen(at, samples(text), STATUS | status)


def test_rates_and_shares_are_of_what_happened_between_two_looks() -> None:
    shown = view({"u": seen(BEFORE, 10.0)}, {"u": seen(AFTER, 20.0)})
    assert (shown.seconds, shown.calls, shown.in_flight) == (10.0, 10.0, 3)
    assert (shown.refused, shown.failed, shown.fallbacks) == (0.1, 0.2, 0.05)
    assert shown.hits == 0.25
    assert shown.usd_per_hour == pytest.approx(180.0)
    assert shown.usd_per_1000 == pytest.approx(5.0)
    assert [(row.name, row.rate) for row in shown.tenants] == [("a", 8.0), ("b", 2.0)]
    assert [(row.name, row.share) for row in shown.providers] == [("openai", 0.1)]


def test_quantile_is_prometheus_own() -> None:
    text = AFTER.replace(' 90\ngateway_request_seconds_bucket{alias="x",le="+Inf"} 100', " 100\n" + "")
    text += 'gateway_request_seconds_bucket{alias="x",le="+Inf"} 100\n'
    shown = view({"u": seen(BEFORE, 10.0)}, {"u": seen(text, 20.0)})
    assert shown.p95_seconds == pytest.approx(1.9)
    assert view({"u": seen(BEFORE, 10.0)}, {"u": seen(AFTER, 20.0)}).p95_seconds == 2.0


def test_replicas_are_summed_and_one_that_is_away_says_so() -> None:
    before = {"u": seen(BEFORE, 10.0), "v": seen(BEFORE, 10.0), "w": seen(BEFORE, 10.0)}
    now = {"u": seen(AFTER, 20.0), "v": seen(AFTER, 20.0), "w": Seen(20.0)}
    shown = view(before, now)
    assert shown.calls == 20.0
    assert shown.replicas == [("u", "normal"), ("v", "normal"), ("w", "away")]


def test_replica_that_began_anew_counts_from_nothing() -> None:
    assert view({"u": seen(AFTER, 10.0)}, {"u": seen(BEFORE, 20.0)}).calls == 11.0


def test_what_rests_on_any_replica_comes_first() -> None:
    resting = {"targets": {"openai/m": "resting", "azure/m": "ok"}, "resting": ["key:openai:main", "target:openai/m"]}
    shown = view({}, {"u": seen(BEFORE, 1.0), "v": seen(BEFORE, 1.0, **resting)})
    assert shown.targets == [("key:openai:main", "resting"), ("openai/m", "resting"), ("azure/m", "ok")]


def test_states_of_a_replica_are_named() -> None:
    status = {"mode": "cache_only", "draining": True, "redis": "down", "config_fault": "a fault"}
    shown = view({}, {"u": seen(BEFORE, 1.0, **status)})
    assert shown.replicas == [("u", "cache_only, draining, redis down, configuration refused")]


def test_screen_shows_every_figure() -> None:
    out = io.StringIO()
    Console(file=out, width=160, force_terminal=False).print(
        render(view({"u": seen(BEFORE, 10.0)}, {"u": seen(AFTER, 20.0)}))
    )
    for wanted in ("10.0", "20.00%", "10.0%", "25%", "5.0%", "180.00", "openai/m", "normal", "last 10 s"):
        assert wanted in out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 110])
def test_every_figure_has_its_whole_name_on_a_narrow_terminal(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(
        render(view({"u": seen(BEFORE, 10.0)}, {"u": seen(AFTER, 20.0)}))
    )
    for name in ("calls/s", "p95", "failed", "429", "cache hits", "fallbacks", "$/h", "$/1,000", "in flight"):
        assert name in out.getvalue()
    assert "…" not in out.getvalue()


@pytest.mark.parametrize(("resting", "rows", "last"), [(1, 5, "ok"), (7, 7, "ok"), (30, 20, "10 resting")])
def test_targets_that_rest_are_shown_and_the_rest_are_counted(resting: int, rows: int, last: str) -> None:
    targets = {f"vendor/rests-{n:02}": "resting" for n in range(resting)} | {
        f"vendor/ok-{n:02}": "ok" for n in range(9)
    }
    out = io.StringIO()
    Console(file=out, width=110, force_terminal=False).print(
        render(view({}, {"u": seen(BEFORE, 1.0, targets=targets)}))
    )
    shown = out.getvalue()
    assert (shown.count("vendor/rests"), shown.count("vendor/")) == (min(resting, 20), rows)
    assert re.search(rf"and {resting + 9 - rows} more +{last} ", shown)


def test_command_shows_a_stack_that_is_called(journey: Journey) -> None:
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            journey.post(chat("tokens=2"))

    caller = threading.Thread(target=call)
    caller.start()
    urls = [word for replica in journey.stack.replicas for word in ("--admin-url", replica.admin_url)]

    def shown_now() -> Any:
        command = [sys.executable, "-m", "app.cli", "top", "--once", "--json", "--every", "1", *urls]
        environ = os.environ | {"GATEWAY_ADMIN_TOKEN": journey.stack.admin_token}
        return json.loads(subprocess.check_output(command, env=environ, text=True))

    try:
        shown = until(lambda: told if (told := shown_now())["calls"] > 0 else None)
    finally:
        stop.set()
        caller.join()
    assert [state for _, state in shown["replicas"]] == ["normal", "normal"]
    assert "openai/gpt-4o-mini" in dict(shown["targets"])


def test_command_says_what_it_needs(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("ADMIN_URLS", "GATEWAY_ADMIN_TOKEN")}
    ran = subprocess.run([sys.executable, "-m", "app.cli", "top"], env=environ, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.count("--admin-url")) == (1, 1)
