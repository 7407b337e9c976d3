"""The figures of a scrape: what calls, vendors and the event loop leave in them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.ambient import Patience
from app.core import Exchange
from app.telemetry import MAX_TENANTS, Lines, Telemetry
from app.vitals import bounded
from loadtest.stack import Stack
from tests.gateway_parts import (
    STREAM,
    Clock,
    Rooms,
    ScriptedAnswer,
    call,
    completion,
    config,
    departed,
    request,
)
from tests.journey import Journey, chat, events, until

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figures(text: str) -> Figures:
    """Every sample of a scrape by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def at(found: Figures, name: str, /, **labels: str) -> float:
    """The sum over a name's samples that have these labels; fails where there is none."""
    values = [value for (named, has), value in found.items() if named == name and set(labels.items()) <= has]
    assert values, f"{name} {labels}"
    return sum(values)


class Told:
    """A gateway whose telemetry is real: `calls` serves, `scrape` reads."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self.lines = Lines()
        self.telemetry = Telemetry(self.lines, None, rooms.ambient)
        rooms.gateway.telemetry = rooms.gateway.dialogue.telemetry = self.telemetry

    def serve(self, *, stream: bool = False) -> Exchange:
        async def served() -> Exchange:
            exchange = Exchange(call=call(request(stream=stream), self.rooms.ambient), patience=Patience())

            def sent(_: bytes) -> None:
                if stream:
                    self.rooms.ambient.ahead += 0.02

            await departed(self.rooms.gateway, exchange, sent)
            return exchange

        return asyncio.run(served())

    def scrape(self) -> Figures:
        return figures(self.telemetry.scrape().decode())


Make = Callable[..., Told]


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Make]:
    made: list[Told] = []

    def make(*script: ScriptedAnswer) -> Told:
        made.append(Told(Rooms(tmp_path, *script, ambient=Clock())))
        return made[-1]

    yield make
    for each in made:
        each.rooms.spool.close()
        each.lines.close()


def test_attempts_are_counted_by_outcome_and_retries_by_target(told: Make) -> None:
    seen = told(ScriptedAnswer(b"{}", status=500), ScriptedAnswer(completion()))
    exchange = seen.serve()
    target = exchange.event.attempts[0].target
    found = seen.scrape()
    assert at(found, "gateway_attempts_total", target=target, outcome="failed") == 1
    assert at(found, "gateway_attempts_total", target=target, outcome="success") == 1
    assert at(found, "gateway_retries_total", target=target) == 1


def test_gaps_between_a_streams_chunks_are_a_histogram(told: Make) -> None:
    seen = told(ScriptedAnswer(*STREAM))
    exchange = seen.serve(stream=True)
    found = seen.scrape()
    gaps = exchange.pace.chunks - 1
    assert gaps >= 1
    assert at(found, "gateway_interchunk_seconds_count") == gaps
    assert at(found, "gateway_interchunk_seconds_bucket", le="0.01") == 0
    assert at(found, "gateway_interchunk_seconds_sum") == pytest.approx(gaps * 0.02, rel=0.5)


def test_tenants_beyond_the_bound_are_summed_up_as_other(told: Make) -> None:
    seen = told(ScriptedAnswer(completion()))
    exchange = seen.serve()
    for number in range(MAX_TENANTS + 50):
        event = msgspec.structs.replace(exchange.event, tenant_id=f"tenant-{number}", limit_tripped="tenant_rpm")
        seen.telemetry.record(exchange, event, b"{}")
    found = seen.scrape()
    for metric in ("gateway_requests_total", "gateway_ratelimit_rejections_total"):
        tenants = {dict(labels)["tenant"] for name, labels in found if name == metric}
        assert len(tenants) <= MAX_TENANTS + 1
        assert at(found, metric, tenant="other") == 51  # the first was the call's own
        assert at(found, metric) >= MAX_TENANTS + 50


@pytest.mark.parametrize("sums", [True, False])
def test_figures_of_tenants_beyond_the_bound_are_summed_up_as_other_where_they_have_a_sum(sums: bool) -> None:
    figures = [((f"tenant-{number}", "alias"), 2.0) for number in range(MAX_TENANTS + 50)]
    told = dict(bounded(lambda: figures + figures[:0], sums)())
    assert told.pop(("other", "alias"), None) == (100.0 if sums else None)
    assert told == dict(figures[:MAX_TENANTS])


def test_what_alerts_count_from_begins_at_zero(told: Make) -> None:
    seen = told()
    snapshot = config()
    seen.telemetry.config_loaded(snapshot)
    found = seen.scrape()
    for target in snapshot.targets.values():
        assert at(found, "gateway_target_misconfigured_total", target=target.name) == 0
        assert at(found, "gateway_unpriced_total", provider=target.provider.name) == 0


def test_refused_files_show_until_they_are_mended(told: Make) -> None:
    telemetry = told().telemetry
    telemetry.config_loaded(config())
    telemetry.config_refused()
    assert at(figures(telemetry.scrape().decode()), "gateway_config_refused") == 1
    assert at(figures(telemetry.scrape().decode()), "gateway_config_reload_failures_total") == 1
    telemetry.config_restored()
    assert at(figures(telemetry.scrape().decode()), "gateway_config_refused") == 0


def test_late_event_loop_shows_with_the_ticks_that_it_slept_through(told: Make) -> None:
    telemetry = told().telemetry
    telemetry.woke(0.0, 0.05)
    telemetry.woke(0.17, 0.05)  # and 0.12, 0.07, 0.02 of those that should have been
    found = figures(telemetry.scrape().decode())
    bounds = {
        bound: at(found, "gateway_event_loop_delay_seconds_bucket", le=bound) for bound in ("0.05", "0.1", "0.25")
    }
    assert bounds == {"0.05": 2, "0.1": 3, "0.25": 5}
    assert at(found, "gateway_event_loop_delay_seconds_sum") == pytest.approx(0.38)


class Live(NamedTuple):
    """What a real stack's replicas told, summed, before and after calls of every kind; and their answers."""

    before: Figures
    after: Figures
    cost_usd: float
    refused: int
    certificates: Figures

    def grew(self, name: str, /, **labels: str) -> float:
        return total(self.after, name, **labels) - total(self.before, name, **labels)


def total(found: Figures, name: str, /, **labels: str) -> float:
    return sum(value for (named, has), value in found.items() if named == name and set(labels.items()) <= has)


@pytest.fixture(scope="module")
def live(stack: Stack) -> Iterator[Live]:
    def scraped() -> Figures:
        found: Figures = {}
        for replica in range(len(stack.replicas)):
            for key, value in figures(journey.admin("/metrics", replica).text).items():
                found[key] = found.get(key, 0.0) + value
        return found

    with Journey(stack) as journey:
        journey.clear()
        replicas = range(len(stack.replicas))
        until(lambda: all(journey.admin("/status", number).json()["postgres"] == "up" for number in replicas))
        before = scraped()
        answers = [journey.post(chat("tokens=7", "one-target"))]
        journey.fault("openai", kind="status", status=500, times=1)
        answers.append(journey.post(chat("tokens=2", "one-target")))  # the second try is good
        journey.fault("openai", kind="status", status=500)
        answers.append(journey.post(chat("tokens=2")))  # the second target is
        journey.clear()
        with journey.stream(chat("tokens=9 chunk_ms=5", "one-target")) as answer:
            events(answer)
        refused = [journey.post(chat("tokens=2"), x_tenant_id="tenant-few-metrics").status_code for _ in range(7)]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        name = "traefik_tls_certs_not_after"  # Traefik reads it some time after its start
        traefik = until(
            lambda: found if name in (found := httpx.get(stack.traefik_metrics_url, timeout=60).text) else ""
        )
        calls = total(before, "gateway_requests_total") + len(answers) + 1 + len(refused)
        after = until(lambda: found if total(found := scraped(), "gateway_requests_total") >= calls else None)
        cost = sum(float(answer.headers["x-gateway-cost-usd"]) for answer in answers)
        yield Live(before, after, cost, refused.count(429), figures(traefik))
        journey.clear()


def test_calls_their_tokens_and_their_cost_are_counted(live: Live) -> None:
    of = {"tenant": "tenant-a", "alias": "one-target", "provider": "openai", "status": "success"}
    assert live.grew("gateway_requests_total", **of) == 3
    assert live.grew("gateway_tokens_total", **of, direction="output") == 7 + 2 + 9
    assert live.grew("gateway_tokens_total", **of, direction="input") > 0
    assert live.grew("gateway_cost_usd_total", tenant="tenant-a") > live.cost_usd  # and of the stream
    assert live.grew("gateway_requests_total", tenant="tenant-few-metrics", status="rate_limited") == live.refused > 0


@pytest.mark.parametrize("part", ["request", "provider", "overhead"])
def test_whole_calls_the_vendors_part_and_ours_are_histograms(live: Live, part: str) -> None:
    assert live.grew(f"gateway_{part}_seconds_count", alias="one-target", status="success") == 3
    assert live.grew(f"gateway_{part}_seconds_sum", alias="one-target", status="success") > 0
    assert live.grew(f"gateway_{part}_seconds_bucket", alias="one-target", status="success", le="+Inf") == 3


def test_first_content_and_what_lies_between_chunks_are_histograms_of_streams(live: Live) -> None:
    assert live.grew("gateway_ttft_seconds_count", alias="one-target") == 1
    assert live.grew("gateway_interchunk_seconds_count", alias="one-target") >= 1


def test_tries_anew_and_steps_along_a_chain_are_told_apart(live: Live) -> None:
    target = "openai/gpt-4o-mini"
    assert live.grew("gateway_retries_total", provider="openai", target=target) >= 1
    step = {"from": target, "to": "openrouter/gpt-4o-mini", "reason": "failed"}
    assert live.grew("gateway_fallback_total", **step) == 1
    assert live.grew("gateway_attempts_total", target=target, outcome="failed") >= 2


def test_limit_that_refused_is_named(live: Live) -> None:
    assert (
        live.grew("gateway_ratelimit_rejections_total", tenant="tenant-few-metrics", limit="tenant_rpm") == live.refused
    )


def test_state_of_a_replica_and_of_what_it_needs_is_told(live: Live, stack: Stack) -> None:
    replicas = len(stack.replicas)
    for name in ("redis", "postgres"):
        assert at(live.after, "gateway_dependency_up", name=name) == replicas
    assert at(live.after, "gateway_config_info") == replicas
    assert at(live.after, "gateway_config_refused") == 0
    assert at(live.after, "gateway_spool_available") == replicas
    for name in ("gateway_spool_bytes", "gateway_spool_unsynced_seconds", "gateway_ledger_lag_seconds"):
        assert at(live.after, name) >= 0
    assert at(live.after, "gateway_event_loop_delay_seconds_count") > 0


def test_end_of_the_front_doors_certificate_is_told(live: Live) -> None:
    assert at(live.certificates, "traefik_tls_certs_not_after") > time.time()


def test_stream_that_is_open_is_in_flight(journey: Journey) -> None:
    with journey.stream(chat("tokens=400 chunk_ms=50", "one-target")) as answer:
        lines = answer.iter_lines()  # held: one that is let go of closes its answer
        next(lines)
        scrapes = [figures(journey.admin("/metrics", number).text) for number in range(len(journey.stack.replicas))]
        assert sum(at(found, "gateway_inflight") for found in scrapes) >= 1


def test_budgets_targets_and_keys_tell_their_state(journey: Journey) -> None:
    journey.clear()
    # Both: one that has only refused a call has heard of a budget that nobody used.
    answers = journey.each(chat("tokens=2", max_tokens=20), x_tenant_id="tenant-poor")
    assert [answer.status_code for answer in answers] == [200, 200]
    scrapes = [figures(journey.admin("/metrics", replica).text) for replica in range(len(answers))]
    used = [
        value
        for found in scrapes
        for (name, labels), value in found.items()
        if name == "gateway_budget_used_ratio" and ("tenant", "tenant-poor") in labels
    ]
    assert len(used) == len(answers)
    assert all(0 < value <= 1 for value in used)
    assert at(scrapes[0], "gateway_target_up", target="openai/gpt-4o-mini") == 1
    assert at(scrapes[0], "gateway_vendor_key_up", key="half-bad:good") == 1


def test_key_that_its_vendor_refused_shows_as_down(journey: Journey) -> None:
    journey.clear()

    def down() -> bool:
        journey.post(chat("tokens=2", "half-bad"))
        found = figures(journey.admin("/metrics").text)
        return at(found, "gateway_vendor_key_up", key="half-bad:bad-one") == 0

    until(down)


def test_misses_hits_and_savings_of_the_cache_are_counted(journey: Journey) -> None:
    journey.clear()
    prompt = chat("A question about metrics. tokens=7", "remembered", temperature=0)

    def counted(result: str) -> float:
        scrapes = [figures(journey.admin("/metrics", replica).text) for replica in range(len(journey.stack.replicas))]
        wanted = {("alias", "remembered"), ("tenant", "tenant-a"), ("result", result)}
        name = "gateway_cache_results_total"
        return sum(
            value for found in scrapes for (named, has), value in found.items() if named == name and wanted <= has
        )

    before = counted("miss"), counted("exact")
    until(lambda: journey.post(prompt).headers["x-cache"] == "HIT (exact)")
    until(lambda: counted("miss") > before[0] and counted("exact") > before[1])
    scrapes = [figures(journey.admin("/metrics", replica).text) for replica in range(len(journey.stack.replicas))]
    assert max(at(found, "gateway_saved_usd_total") for found in scrapes) > 0
