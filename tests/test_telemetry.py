"""What is seen of a call: spans at a real OTLP receiver, metrics in a scrape, one access line."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from app.core import Pace
from app.telemetry.conventions import PROVIDER_NAMES, conventions
from app.vendors import COMPATIBLE_KIND, KINDS
from loadtest.stack import Stack
from tests.journey import OVERLAY, Journey, chat, events, pool_providers, until
from tests.ledger_parts import conforming


class Receiver:
    """An OTLP/HTTP receiver that keeps the spans it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        receiver = self

        class Take(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        receiver.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Take)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def of(self, trace_id: str) -> dict[str, Any]:
        return {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """A stack of one replica that exports its spans."""
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    folder = tmp_path_factory.mktemp("traced")

    def overlay(simulator_url: str) -> dict[str, Any]:
        providers = pool_providers(folder, simulator_url)
        meant = {"mode": "static", "threshold": 0.8, "max_temperature": 1, "reverify_percent": 0}
        meant |= {"embedder_timeout_ms": 10_000}
        return OVERLAY | {
            "providers": providers | {"pooled": providers["pooled"] | {"trace_context": True}},
            "aliases": OVERLAY["aliases"] | {"meant": {"targets": ["openai/gpt-4o-mini"], "cache": meant}},
        }

    with (
        Stack(folder, replicas=1, overlay=overlay, environ=environ) as stack,
        Journey(stack) as journey,
    ):
        until(lambda: journey.query("SELECT to_regclass('ledger') AS made")[0]["made"])
        until(lambda: journey.post(chat(model="remembered")).headers["x-cache"] != "BYPASS")  # the channel was heard
        yield journey


TRACE = "0af7651916cd43dd8448eb211c80319c"


def attributes(span: Any) -> dict[str, Any]:
    values = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        values[pair.key] = getattr(pair.value, kind)
    return values


STATIONS = ["gateway.auth", "gateway.limits", "gateway.route", "gateway.provider"]


def spans_of(receiver: Receiver, trace: str) -> dict[str, Any]:
    """The spans of a call that was tried once, the request's and its stations', once all are there."""
    return until(lambda: found if {"gateway.request", *STATIONS} <= set(found := receiver.of(trace)) else None)


def test_every_station_of_a_call_is_a_span_under_the_callers_trace(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "1" + TRACE[1:]
    answer = traced.post(
        chat("tokens=5"),
        traceparent=f"00-{trace}-b7ad6b7169203331-01",
        tracestate="rojo=00f067aa0ba902b7",
        x_feature_id="support",
        x_user_id_hash="u-1",
    )
    spans = spans_of(receiver, trace)
    root, provider = spans["gateway.request"], spans["gateway.provider"]
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.trace_state for span in spans.values()} == {"rojo=00f067aa0ba902b7"}
    stations = [span for name, span in spans.items() if name != "gateway.request"]
    assert {span.parent_span_id for span in stations} == {root.span_id}
    assert len({span.span_id for span in spans.values()}) == len(spans)
    times = [at for name in STATIONS for at in (spans[name].start_time_unix_nano, spans[name].end_time_unix_nano)]
    assert times == sorted(times)
    assert root.start_time_unix_nano <= times[0]
    assert times[-1] <= root.end_time_unix_nano
    assert attributes(root)["user.id"] == "u-1"
    assert attributes(root)["cost_usd"] == attributes(provider)["gen_ai.usage.cost"] > 0
    assert attributes(spans["gateway.limits"])["tokens_reserved"] > 5
    said = attributes(provider)
    assert said["gen_ai.provider.name"] == "openai"
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.response.model"] == "gpt-4o-mini-2024-07-18"
    assert said["gen_ai.usage.output_tokens"] == 5
    assert attributes(root)["tenant_id"] == "tenant-a"
    assert traced.row(answer.headers["x-request-id"])["trace_id"] == trace


ASKED = {"gateway.request", "gateway.auth", "gateway.limits", "gateway.cache"}
"""The spans of a call that is answered from before; where a vendor is asked there are STATIONS besides."""


def remembered(traced: Journey, receiver: Receiver, trace: str, prompt: str, model: str, **headers: str) -> Any:
    """A call that the cache is asked for: its answer's x-cache, its spans once all of them are there.

    Without spans where the cache was not asked: a replica that heard of no invalidation for a second does not.
    """
    answer = traced.post(chat(prompt, model), traceparent=f"00-{trace}-b7ad6b7169203331-01", **headers)
    assert answer.status_code == 200
    if answer.headers["x-cache"] == "BYPASS":
        return "BYPASS", {}
    expected = ASKED if answer.headers["x-cache"].startswith("HIT") else {*ASKED, *STATIONS}
    spans = until(lambda: found if expected <= (found := receiver.of(trace)).keys() else None)
    root, cache = spans["gateway.request"], spans["gateway.cache"]
    assert cache.parent_span_id == root.span_id
    assert root.start_time_unix_nano <= cache.start_time_unix_nano < cache.end_time_unix_nano
    assert cache.end_time_unix_nano <= root.end_time_unix_nano + 1_000  # a total of whole microseconds
    return answer.headers["x-cache"], spans


def trace_of(number: int) -> str:
    return f"{number:x}".rjust(4, "e") + TRACE[4:]


def test_cache_that_is_asked_is_a_span_of_its_own(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    numbers = iter(range(500, 600))

    def asked() -> Any:
        told = remembered(traced, receiver, trace_of(next(numbers)), "Seen by spans? tokens=4", "remembered")
        return told if told[0] != "BYPASS" else None

    told, spans = until(asked)
    assert told == "MISS"
    assert attributes(spans["gateway.cache"]) == {"cache_hit": False, "saved_usd": 0, "semantic": False}
    assert set(spans) == {*ASKED, *STATIONS}
    order = ["gateway.auth", "gateway.limits", "gateway.cache", "gateway.route", "gateway.provider"]
    ends = [spans[name].end_time_unix_nano for name in order]
    starts = [spans[name].start_time_unix_nano for name in order]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_answer_from_before_is_the_cache_s_span_and_no_vendor_s(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    asked, numbers = ("Seen again by spans? tokens=4", "remembered"), iter(range(2, 200))
    traced.post(chat(*asked))

    def hit() -> Any:
        told, spans = remembered(traced, receiver, trace_of(next(numbers)), *asked)
        return spans if told == "HIT (exact)" else None

    spans = until(hit)
    said = attributes(spans["gateway.cache"])
    assert (said["cache_hit"], said["cache_kind"], said["semantic"]) == (True, "exact", False)
    assert said["saved_usd"] > 0
    assert set(spans) == ASKED


def test_question_that_means_the_same_tells_its_similarity_in_the_cache_s_span(
    traced: Journey, receiver: Receiver
) -> None:
    traced.clear()
    numbers = iter(range(1_000, 4_000))

    def asked(prompt: str) -> Any:
        return remembered(traced, receiver, trace_of(next(numbers)), prompt, "meant")

    def looked() -> Any:
        """Nobody has asked the same; the first ones may have to do without the model, which is loading."""
        told, spans = asked(f"How do I get a refund for order {next(numbers)}? tokens=4")
        return spans if told == "MISS" and attributes(spans["gateway.cache"])["semantic"] else None

    seen = attributes(until(looked)["gateway.cache"])
    assert seen == {"cache_hit": False, "saved_usd": 0, "semantic": True}
    until(lambda: asked("How do I get a refund for my order? tokens=4")[0].startswith("HIT"))

    def hit() -> Any:
        marks = "?" * (1 + next(numbers) % 9)  # not the same words, should it be missed before the first is remembered
        told, spans = asked(f"How can I get a refund for my order{marks} tokens=4")
        return spans if told == "HIT (semantic)" else None

    said = attributes(until(hit)["gateway.cache"])
    assert (said["cache_hit"], said["cache_kind"], said["semantic"]) == (True, "semantic", True)
    assert 0.8 <= said["similarity"] < 1
    assert said["saved_usd"] > 0


def test_answer_to_the_same_key_is_looked_up_before_anything_is_reserved(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    key = {"idempotency_key": "seen-by-spans"}
    traced.post(chat("Once only. tokens=4"), **key)
    answer = traced.post(chat("Once only. tokens=4"), traceparent=f"00-{trace_of(400)}-b7ad6b7169203331-01", **key)
    assert answer.headers["x-cache"] == "HIT (idempotent)"
    spans = until(lambda: found if len(found := receiver.of(trace_of(400))) == 4 else None)
    cache, limits = spans["gateway.cache"], spans["gateway.limits"]
    assert attributes(cache)["cache_kind"] == "idempotent"
    assert cache.end_time_unix_nano <= limits.start_time_unix_nano
    other = traced.post(chat("Another."), traceparent=f"00-{trace_of(401)}-b7ad6b7169203331-01", **key)
    assert other.json()["error"]["code"] == "idempotency_mismatch"
    spans = until(lambda: found if len(found := receiver.of(trace_of(401))) == 3 else None)
    assert set(spans) == {"gateway.request", "gateway.auth", "gateway.cache"}


def test_span_of_a_stream_ends_with_its_last_byte(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "2" + TRACE[1:]
    with traced.stream(chat("tokens=20 chunk_ms=20"), traceparent=f"00-{trace}-b7ad6b7169203331-01") as answer:
        events(answer)
    spans = spans_of(receiver, trace)
    provider = spans["gateway.provider"]
    assert provider.end_time_unix_nano - provider.start_time_unix_nano >= 19 * 20 * 1_000_000
    said = attributes(provider)
    whole_seconds = (provider.end_time_unix_nano - provider.start_time_unix_nano) / 1e9
    assert 0 < said["gen_ai.response.time_to_first_chunk"] < whole_seconds - 0.3  # 18 more came after it
    assert said["stream.longest_gap_ms"] >= 20
    assert said["gen_ai.request.stream"]
    assert "abort_reason" not in said


def test_hung_up_stream_says_why_its_span_ended(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "3" + TRACE[1:]
    with (
        httpx.Client(base_url=traced.stack.url, verify=traced.stack.tls(), timeout=60) as client,
        traced.stream(chat("tokens=99 chunk_ms=50"), client, traceparent=f"00-{trace}-b7ad6b7169203331-01") as answer,
    ):
        next(answer.iter_lines())
    spans = spans_of(receiver, trace)
    assert attributes(spans["gateway.provider"])["abort_reason"] == "client_closed"


def test_stream_that_its_vendor_cut_says_why_its_span_ended(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "f" + TRACE[1:]
    traced.fault("openai", kind="cut", after_chunks=4)
    with traced.stream(chat("tokens=9", "one-target"), traceparent=f"00-{trace}-b7ad6b7169203331-01") as answer:
        events(answer)
    said = attributes(spans_of(receiver, trace)["gateway.provider"])
    assert said["abort_reason"] == said["error.type"] == "upstream_unavailable"
    assert said["stream.chunks"] > 0


def test_each_attempt_is_a_span_and_the_failed_one_says_so(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "4" + TRACE[1:]
    traced.fault("openai", kind="status", status=500, times=1)
    traced.post(chat("tokens=5"), traceparent=f"00-{trace}-b7ad6b7169203331-01")
    spans_of(receiver, trace)
    tries = [s for s in receiver.spans if s.trace_id.hex() == trace and s.name == "gateway.provider"]
    assert [attributes(span).get("error.type") for span in tries] == ["failed", None]


def test_caller_that_is_not_sampled_is_not_exported(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    silent, seen = "5" + TRACE[1:], "6" + TRACE[1:]
    traced.post(chat("tokens=2"), traceparent=f"00-{silent}-b7ad6b7169203331-00")
    traced.post(chat("tokens=2"), traceparent=f"00-{seen}-b7ad6b7169203331-01")
    until(lambda: receiver.of(seen))
    assert receiver.of(silent) == {}


def test_error_is_exported_though_its_caller_is_not_sampled(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "9" + TRACE[1:]
    traced.fault("openai", kind="status", status=500)
    traced.post(chat("tokens=2", "one-target"), traceparent=f"00-{trace}-b7ad6b7169203331-00")
    root = spans_of(receiver, trace)["gateway.request"]
    assert (root.status.code, attributes(root)["error.type"]) == (Status.STATUS_CODE_ERROR, "upstream_unavailable")


def test_fallback_is_exported_though_its_caller_is_not_sampled(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "a" + TRACE[1:]
    traced.fault("openai", kind="status", status=500)
    traced.post(chat("tokens=2"), traceparent=f"00-{trace}-b7ad6b7169203331-00")
    spans = spans_of(receiver, trace)
    assert attributes(spans["gateway.request"])["fallback_used"]
    assert spans["gateway.request"].status.code == Status.STATUS_CODE_UNSET
    assert attributes(spans["gateway.provider"])["gen_ai.provider.name"] == "openrouter"


def test_refusal_is_no_error_and_ends_at_the_station_that_refused(traced: Journey, receiver: Receiver) -> None:
    trace = "b" + TRACE[1:]
    traced.post(chat(), traceparent=f"00-{trace}-b7ad6b7169203331-01", x_tenant_id="nobody")
    spans = until(lambda: found if len(found := receiver.of(trace)) == 2 else None)
    assert not attributes(spans["gateway.auth"])["granted"]
    assert attributes(spans["gateway.auth"])["error_code"] == "tenant_not_allowed"
    assert spans["gateway.request"].status.code == Status.STATUS_CODE_UNSET


def test_vendor_is_told_the_context_of_its_own_attempt_where_configured(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "c" + TRACE[1:]
    context = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "tracestate": "rojo=1"}
    traced.post(chat("tokens=2", "pooled"), **context)
    provider = spans_of(receiver, trace)["gateway.provider"]
    (told,) = [asked["headers"] for asked in traced.asked("pooled")]
    assert told["traceparent"] == f"00-{trace}-{provider.span_id.hex()}-01"
    assert told["tracestate"] == "rojo=1"


def test_vendor_is_told_no_context_unless_configured(traced: Journey) -> None:
    traced.clear()
    traced.post(chat("tokens=2"), traceparent=f"00-d{TRACE[1:]}-b7ad6b7169203331-01", tracestate="rojo=1")
    (told,) = [asked["headers"] for asked in traced.asked()]
    assert {"traceparent", "tracestate"} & set(told) == set()


def test_names_follow_the_version_that_is_opted_in_to() -> None:
    now, latest = conventions(None), conventions("http,gen_ai_latest_experimental")
    assert now["cache_write_tokens"] == "gen_ai.usage.cache_creation.input_tokens"
    assert latest["cache_write_tokens"] == "gen_ai.usage.cache_write.input_tokens"
    assert set(now) == set(latest)


def test_every_kind_of_provider_has_its_name_in_the_conventions() -> None:
    assert set(KINDS) - {COMPATIBLE_KIND} <= set(PROVIDER_NAMES)


def test_pace_counts_the_gaps_between_chunks() -> None:
    pace = Pace(10.0)
    for now in (10.5, 10.52, 13.02, 13.03):
        pace.chunk(now)
    assert (pace.chunks, sum(pace.gaps)) == (4, 3)
    assert (pace.longest_gap, pace.gaps_seconds) == (pytest.approx(2.5), pytest.approx(2.53))


def test_spans_hold_no_prompt_and_no_answer(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "7" + TRACE[1:]
    answer = traced.post(chat("canary-prompt tokens=8"), traceparent=f"00-{trace}-b7ad6b7169203331-01")
    spans = spans_of(receiver, trace)
    written = str([attributes(span) for span in spans.values()])
    assert "canary-prompt" not in written
    assert answer.json()["choices"][0]["message"]["content"] not in written


def test_spans_hold_no_credential(traced: Journey, receiver: Receiver) -> None:
    traced.clear()
    trace = "8" + TRACE[1:]
    planted = {"x_user_id": "canary-user", "cookie": "canary-cookie", "x_api_key": "canary-key"}
    traced.post(chat("tokens=8"), traceparent=f"00-{trace}-b7ad6b7169203331-01", **planted)
    spans = spans_of(receiver, trace)
    written = str(list(spans.values()))
    for secret in (traced.key, traced.stack.admin_token, *planted.values()):
        assert secret not in written


def test_access_line_is_the_row_itself(journey: Journey) -> None:
    answer = journey.post(chat("tokens=6"))
    request_id = answer.headers["x-request-id"]

    def lines() -> list[dict[str, Any]]:
        logs = [path.read_text() for path in journey.stack.log_dir.glob("replica-*.log")]
        return [json.loads(line) for log in logs for line in log.splitlines() if request_id in line]

    (line,) = until(lines)
    assert conforming(line["event"]) == journey.row(request_id)


def test_metrics_want_the_admin_token(journey: Journey) -> None:
    url = journey.stack.replicas[0].admin_url
    for path in ("/metrics", "/status"):
        assert httpx.get(url + path, timeout=60).status_code == 401
        forbidden = httpx.get(url + path, headers={"authorization": f"Bearer {journey.key}"}, timeout=60)
        assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (403, "admin_forbidden")
    assert httpx.get(url + "/health", timeout=60).text == "ok"


def test_overhead_is_told_apart_from_the_vendors_time(journey: Journey) -> None:
    answer = journey.post(chat("tokens=2 latency_ms=300"))
    timing = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
    assert float(timing["provider"]) >= 300
    assert float(timing["gateway"]) < 150
    event = journey.row(answer.headers["x-request-id"])
    assert event["latency_ms"]["provider"] == float(timing["provider"])
    scrapes = [journey.admin("/metrics", number).text for number in range(len(journey.stack.replicas))]
    assert any("gateway_overhead_seconds_bucket" in scrape for scrape in scrapes)  # of whoever answered
