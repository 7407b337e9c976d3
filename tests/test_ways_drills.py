"""Breaker, hedges and cascade under load, on a stack whose breaker is easily tripped. `make drills`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import httpx
import pytest

from app.config import Price, load
from app.control import POLL_SECONDS
from loadtest.load import percentile
from loadtest.processes import ROOT
from loadtest.stack import Stack
from tests.journey import OVERLAY, Journey, chat, until
from tests.traffic import Traffic

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

FIRST, SECOND, DEAR = "openai/gpt-4o-mini", "openrouter/gpt-4o-mini", "openrouter/gpt-4o"
FAILURES, REST_SECONDS = 5, 3.0
HEDGED_PERCENT = 10
SLOW_MS = 3_000


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    overlay: dict[str, Any] = {
        "gateway": OVERLAY["gateway"]
        | {
            "retry": {"backoff_base_seconds": 0.02, "backoff_cap_seconds": 0.1},
            "breaker": {"failures": FAILURES, "rest_seconds": REST_SECONDS, "longest_rest_seconds": 2 * REST_SECONDS},
        },
        "aliases": {
            "broken": {"targets": [FIRST, SECOND]},
            "patient": {"targets": [FIRST, SECOND]},
            "hedged": {"targets": [FIRST, SECOND], "hedge": {"after_seconds": 0.5, "percent": HEDGED_PERCENT}},
            "cascaded": {"targets": [FIRST], "cascade": {"targets": [DEAR]}},
        },
        "tenants": {"tenant-a": OVERLAY["tenants"]["tenant-a"]},
        "service_keys": {"suitekey0001": OVERLAY["service_keys"]["suitekey0001"] | {"tenants": ["tenant-a"]}},
    }
    with Stack(tmp_path_factory.mktemp("ways"), overlay=overlay, environ={}, report=lambda line: None) as stack:
        yield stack


@pytest.fixture
def here(own_stack: Stack) -> Iterator[Journey]:
    with Journey(own_stack) as journey:
        until(lambda: all(journey.admin("/status", n).json()["budgets"] == "whole" for n in range(2)))
        journey.clear()
        yield journey
        journey.clear()


def at_replica(journey: Journey, number: int, model: str) -> httpx.Response:
    url = journey.stack.replicas[number].url
    return httpx.post(f"{url}/v1/chat/completions", json=chat("tokens=2", model), headers=journey.headers(), timeout=30)


def resting(journey: Journey, number: int) -> bool:
    return f"target:{FIRST}" in journey.admin("/status", number).json()["resting"]


def reads_until_it_rests(journey: Journey, number: int) -> int:
    """How often a replica reads the control channel before it passes the target over. Seconds are the machine's too."""
    ages: list[float] = []

    def rests() -> bool:
        status = journey.admin("/status", number).json()
        ages.append(status["control_age_seconds"])
        return f"target:{FIRST}" in status["resting"]

    until(rests)
    return sum(after < before for before, after in pairwise(ages))


def asked(journey: Journey, vendor: str = "openai") -> int:
    return journey.counts(vendor).get("requests", 0)


def served_by(answer: httpx.Response) -> tuple[str, str]:
    return answer.headers["x-gateway-provider"], answer.headers["x-gateway-attempts"]


def run_for(traffic: Traffic, calls: int) -> None:
    before = len(traffic.calls)
    until(lambda: len(traffic.calls) >= before + calls, 120)


# --- the breaker ----------------------------------------------------------------------------------------------------


def test_what_one_replica_broke_is_passed_over_by_the_other_within_a_second(here: Journey) -> None:
    here.fault("openai", kind="status", status=503)
    until(lambda: at_replica(here, 0, "broken").status_code == 200 and resting(here, 0))
    assert reads_until_it_rests(here, 1) * POLL_SECONDS <= 1.0
    before = asked(here)
    assert served_by(at_replica(here, 1, "broken")) == ("openrouter", "1")
    assert asked(here) == before


def test_under_load_a_broken_target_is_asked_by_probes_alone_and_comes_back(here: Journey) -> None:
    here.fault("openai", kind="status", status=503)
    with Traffic(here, clients=8, model="broken") as traffic:
        until(lambda: resting(here, 0) and resting(here, 1), 30)
        run_for(traffic, 8)  # what was under way
        before, began, calls = asked(here), time.monotonic(), len(traffic.calls)
        until(lambda: time.monotonic() > began + 4 * REST_SECONDS, 60)
        probes, calls = asked(here) - before, len(traffic.calls) - calls
        here.fault("openai", kind="latency", latency_ms=1)
        until(lambda: not resting(here, 0) and not resting(here, 1), 30)
        run_for(traffic, 8)
        found_out = asked(here)
        run_for(traffic, 50)
        assert asked(here) - found_out >= 40
    assert traffic.outcomes() == {"whole"}
    assert 1 <= probes <= 2 * 5  # of each replica one at the end of each rest
    assert probes < calls / 5


# --- hedges ---------------------------------------------------------------------------------------------------------


def p99_ms(rows: list[dict[str, Any]]) -> float:
    return percentile(sorted(row["ttft_ms"] for row in rows), 990)


def asked_beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if any(attempt["role"] == "hedge" for attempt in row["attempts"])]


def test_hedges_cut_the_slowest_first_words_within_their_budget(here: Journey) -> None:
    seen: list[dict[str, Any]] = []

    def rows(model: str, calls: int) -> list[dict[str, Any]]:
        with Traffic(here, clients=6, prompt="tokens=3", model=model, stream=True) as traffic:
            run_for(traffic, calls)
        assert traffic.outcomes() == {"whole"}
        return list(here.rows([call.request_id for call in traffic.calls]).values())

    seen += rows("hedged", 100)  # a hedge is earned by the calls before it
    here.fault("openai", kind="latency", latency_ms=SLOW_MS, probability=0.04)
    unhedged = rows("patient", 300)
    hedged = rows("hedged", 300)
    seen += hedged
    assert p99_ms(hedged) < p99_ms(unhedged) / 2
    assert p99_ms(unhedged) >= SLOW_MS

    here.fault("openai", kind="latency", latency_ms=SLOW_MS)  # far more often than the budget has
    seen += rows("hedged", 40)
    beside = asked_beside(seen)
    assert 10 < len(beside) <= 2 + len(seen) * HEDGED_PERCENT / 100  # a replica may ask once before it has earned it

    outrun = [row["attempts"][0] for row in beside if row["provider"] == "openrouter"]
    assert {attempt["outcome"] for attempt in outrun} == {"outrun"}
    until(lambda: here.counts()["aborted"] == len(outrun), 10)
    mini = prices()[FIRST]
    for row in beside:
        lost = [attempt for attempt in row["attempts"] if attempt["outcome"] == "outrun"]
        assert all(nanos(attempt) == of(attempt["usage"], mini) > 0 for attempt in lost)
        assert nanos(row) == of(row["usage"], mini)  # both targets have one price


# --- the cascade ----------------------------------------------------------------------------------------------------


def test_cascade_under_load_leaves_one_row_with_both_attempts_and_their_exact_sum(here: Journey) -> None:
    with Traffic(here, clients=8, prompt="tokens=9", model="cascaded", max_tokens=3) as traffic:
        run_for(traffic, 200)
    assert traffic.outcomes() == {"whole"}
    rows = here.rows([call.request_id for call in traffic.calls])
    of_target = prices()
    for row in rows.values():
        first, second = row["attempts"]
        assert [(a["target"], a["outcome"]) for a in (first, second)] == [(FIRST, "doubtful"), (DEAR, "success")]
        rest = {name: row["usage"][name] - first["usage"][name] for name in ("input_tokens", "output_tokens")}
        assert rest["output_tokens"] == first["usage"]["output_tokens"] == 3
        assert nanos(first) == of(first["usage"], of_target[FIRST])
        assert nanos(row) == nanos(first) + of(rest, of_target[DEAR])
    assert [asked(here, vendor) for vendor in ("openai", "openrouter")] == [len(rows)] * 2


def prices() -> dict[str, Price]:
    config = load(ROOT / "config", "prod", require_secrets=False)
    return {name: config.targets[name].price for name in (FIRST, SECOND, DEAR)}


def nanos(charged: dict[str, Any]) -> int:
    return round(Fraction(str(charged["cost_usd"]["total"])) * 10**9)


def of(usage: dict[str, Any], price: Price) -> int:
    """What tokens cost that nothing of was cached or thought: each class rounded once, half to even."""
    classes = ((usage["input_tokens"], price.input), (usage["output_tokens"], price.output))
    return sum(round(Fraction(tokens * each, 10**6)) for tokens, each in classes)
