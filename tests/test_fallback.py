"""A vendor that fails: until the first good content retries and fallbacks show in headers and rows only."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.journey import Journey, chat, events, text, until

BLOCKED: dict[str, dict[str, Any]] = {
    "failing": {"kind": "status", "status": 500},
    "overloaded": {"kind": "status", "status": 529},
    "throttling": {"kind": "throttle", "retry_after": 30},
    "resetting": {"kind": "reset"},
    "hanging": {"kind": "hang"},
    "answering html": {"kind": "status", "status": 502, "body": "<html>bad gateway</html>"},
    "refusing our key": {"kind": "status", "status": 401},
    "not knowing our model": {"kind": "status", "status": 404},
}
SILENT = ("hanging", "stalled before content")


def impatient(mood: str) -> str:
    """The alias for a vendor with this mood: of short deadlines, which a busy machine may miss, where it needs them."""
    return "quick" if mood in SILENT else "support-fast"


BROKEN_STREAMS: dict[str, dict[str, Any]] = {
    "empty": {"kind": "empty"},
    "without a word": {"kind": "empty", "done": False},
    "an error first": {"kind": "error_event", "after_chunks": 0},
    "cut before content": {"kind": "cut", "after_chunks": 1},
    "garbage first": {"kind": "malformed", "after_chunks": 0},
    "stalled before content": {"kind": "stall", "after_chunks": 1},
}


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("mood", BLOCKED)
def test_secondary_answers_when_the_primary_is(journey: Journey, mood: str, streamed: bool) -> None:
    journey.fault("openai", **BLOCKED[mood])
    body = chat("tokens=6", model=impatient(mood))
    with journey.stream(body) if streamed else posted(journey, body) as answer:
        assert answer.status_code == 200
        assert text(events(answer)) if streamed else answer.json()["choices"]
    assert answer.headers["x-gateway-fallback"] == "true"
    assert answer.headers["x-gateway-provider"] == "openrouter"
    event = journey.row(answer.headers["x-request-id"])
    assert event["status"] == "success"
    assert event["fallback_used"] is True
    assert event["attempts"][0]["outcome"] != "success"
    assert int(answer.headers["x-gateway-attempts"]) == len(event["attempts"]) <= 3


@pytest.mark.parametrize("mood", BROKEN_STREAMS)
def test_stream_falls_back_when_its_start_is(journey: Journey, mood: str) -> None:
    journey.fault("openai", **BROKEN_STREAMS[mood])
    with journey.stream(chat("tokens=6", model=impatient(mood))) as answer:
        chunks = events(answer)
    assert answer.headers["x-gateway-provider"] == "openrouter"
    assert chunks[-1] == "[DONE]"
    assert sum(choice["delta"].get("role") == "assistant" for c in chunks[:1] for choice in c["choices"]) == 1
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1


def test_primary_is_tried_again_before_the_secondary(journey: Journey) -> None:
    journey.fault("openai", kind="status", status=503, times=1)
    answer = journey.post(chat("tokens=4"))
    assert answer.headers["x-gateway-provider"] == "openai"
    assert answer.headers["x-gateway-attempts"] == "2"
    assert answer.headers["x-gateway-fallback"] == "false"


@pytest.mark.parametrize("mood", ["hanging", "failing"])
def test_what_a_silent_vendor_may_charge_stands_with_its_attempt_alone(journey: Journey, mood: str) -> None:
    journey.fault("openai", **BLOCKED[mood])
    answer = journey.post(chat("tokens=4 " + "word " * 400, model=impatient(mood)))
    event = journey.row(answer.headers["x-request-id"])
    lost = [attempt["estimated_usd"] for attempt in event["attempts"]]
    assert (lost[0] > 0) == (mood == "hanging")
    assert lost[-1] == 0
    assert event["usage"]["input_tokens"] == answer.json()["usage"]["prompt_tokens"]


def test_retry_waits_as_long_as_the_vendor_asks(journey: Journey) -> None:
    journey.fault("openai", kind="throttle", retry_after=1, times=1)
    answer = journey.post(chat("tokens=4", model="one-target"))
    assert answer.status_code == 200
    first, second = journey.row(answer.headers["x-request-id"])["attempts"]
    assert second["started_ms"] - first["started_ms"] - first["duration_ms"] >= 990


def test_all_attempts_spent_is_503_and_no_more_retries(journey: Journey) -> None:
    journey.fault("openai", kind="status", status=500)
    answer = journey.post(chat(model="one-target"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
    assert answer.headers["x-should-retry"] == "false"
    assert int(answer.headers["retry-after"]) >= 1
    event = journey.row(answer.headers["x-request-id"])
    assert (event["status"], event["usage"]["total_tokens"], event["cost_usd"]["total"]) == ("error", 0, 0)
    assert len(event["attempts"]) == 3
    assert len(journey.asked()) == 3


def test_vendor_saying_that_the_request_is_wrong_goes_to_the_client_at_once(journey: Journey) -> None:
    journey.fault(
        "openai", kind="status", status=400, message="Too long.", type="invalid_request_error",
        code="context_length_exceeded",
    )  # fmt: skip
    answer = journey.post(chat())
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["message"] == "Too long."
    assert len(journey.asked("openai")) == 1
    assert journey.asked("openrouter") == []
    assert journey.row(answer.headers["x-request-id"])["error_code"] == "context_length_exceeded"


def test_refused_credential_rests_the_target_for_later_calls(journey: Journey) -> None:
    journey.fault("openai", kind="status", status=401, times=2)
    answers = [journey.post(chat("tokens=2")) for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    refused = [request for request in journey.asked("openai") if request["status"] == 401]
    assert len(refused) in (1, 2)  # one, or one a replica before it hears of the other's


@pytest.mark.parametrize("status", [403, 404])
def test_what_one_tenant_s_request_met_at_a_vendor_sends_no_target_to_rest_for_others(
    journey: Journey, status: int
) -> None:
    journey.each(chat("tokens=2"))  # who has seen the target answer
    for _ in range(3):
        journey.fault("openai", kind="status", status=status, times=1)
        met = journey.post(chat("tokens=2"), x_tenant_id="spender")
        assert (met.status_code, met.headers["x-gateway-fallback"]) == (200, "true")
        journey.clear()
        others = [journey.post(chat("tokens=2")).headers["x-gateway-provider"] for _ in range(4)]
        assert others == ["openai"] * 4
    assert journey.admin("/status").json()["resting"] == []


def test_refused_credential_everywhere_is_502(journey: Journey) -> None:
    journey.fault("openai", kind="status", status=401)
    journey.fault("openrouter", kind="status", status=403)
    answer = journey.post(chat())
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_misconfigured")


def test_deadline_holds_over_all_attempts(journey: Journey) -> None:
    journey.fault("openai", kind="hang")
    answer = journey.post(chat(model="hasty"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    event = journey.row(answer.headers["x-request-id"])
    assert event["status"] == "timeout"
    assert 500 < event["latency_ms"]["total"] < 30_000  # an attempt alone would have had a minute


@pytest.mark.parametrize(
    "fault", [{"kind": "cut"}, {"kind": "malformed"}, {"kind": "error_event"}, {"kind": "stall"}], ids=str
)
def test_failure_in_mid_stream_is_one_error_event_and_a_charged_row(journey: Journey, fault: dict[str, Any]) -> None:
    journey.fault("openai", **fault, after_chunks=5)
    model = "quick" if fault["kind"] == "stall" else "support-fast"
    with journey.stream(chat("tokens=20", model=model)) as answer:
        chunks = events(answer)
    errors = [chunk for chunk in chunks if "error" in chunk]
    assert [error["error"]["code"] for error in errors] == ["upstream_unavailable"]
    assert chunks[-2:] == [errors[0], "[DONE]"]
    assert text(chunks)
    assert journey.asked("openrouter") == []
    event = journey.row(answer.headers["x-request-id"])
    assert (event["status"], event["error_code"], event["usage_source"]) == (
        "error", "upstream_unavailable", "estimated",
    )  # fmt: skip
    assert event["usage"]["output_tokens"] > 0
    assert event["cost_usd"]["total"] > 0


def test_fallback_is_counted_by_from_to_and_reason(journey: Journey) -> None:
    journey.fault("openai", kind="throttle", retry_after=30)
    journey.post(chat("tokens=2"))
    scrapes = journey.admin("/metrics", 0).text + journey.admin("/metrics", 1).text
    labels = 'from="openai/gpt-4o-mini",reason="throttled",to="openrouter/gpt-4o-mini"'
    assert f"gateway_fallback_total{{{labels}}}" in scrapes


def test_lines_about_a_call_name_its_request_and_its_trace(journey: Journey) -> None:
    journey.fault("openai", kind="status", status=401)
    answer = journey.post(chat("tokens=2"))
    row = journey.row(answer.headers["x-request-id"])

    def said() -> list[dict[str, Any]]:
        logs = [journey.stack.log_dir / f"{replica.name}.log" for replica in journey.stack.replicas]
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.startswith("{")]
        found = [line for line in lines if line.get("request_id") == row["request_id"]]
        return found if len(found) == 2 else []

    refused, left = until(said)
    assert (refused["level"], refused["message"].partition(" with ")[0]) == (
        "error", "openai/gpt-4o-mini refused our credential or model",
    )  # fmt: skip
    assert (left["level"], left["message"]) == (
        "warning", "fallback from openai/gpt-4o-mini to openrouter/gpt-4o-mini (misconfigured)",
    )  # fmt: skip
    assert {line["trace_id"] for line in (refused, left)} == {row["trace_id"]}


@contextlib.contextmanager
def posted(journey: Journey, body: dict[str, Any]) -> Iterator[httpx.Response]:
    """A unary call in the shape of a stream's."""
    yield journey.post(body)
