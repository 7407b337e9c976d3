"""The simulator as Anthropic: the translator reads it, its refusals and faults are the vendor's, its shape recorded.

Recorded shapes are compared where the environment variable RECORDINGS names the folder of recordings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import httpx
import pytest

from app.core import Usage
from app.errors import VendorBroke, VendorFailed, VendorMisconfigured, VendorRefused, VendorThrottled
from app.providers.anthropic import ANTHROPIC
from loadtest.simulator.inprocess import running
from tests import recordings
from tests.recordings import Exchange
from tests.simulation import http, put_fault
from tests.translation import STAMP, StreamOutcome, read_stream, sdk_answer, sdk_stream

HEADERS = {"x-api-key": "any-key", "anthropic-version": "2023-06-01"}
TOOL = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
THINKING = {"type": "adaptive"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    http("DELETE", f"{server}/_sim/faults").raise_for_status()
    return server


def ask(prompt: str = "Hello", **members: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "claude-sonnet-4-6", "max_tokens": 1_000, "messages": messages, **members}


def post(url: str, request: dict[str, Any], **headers: str) -> httpx.Response:
    return http("POST", f"{url}/anthropic/v1/messages", json=request, headers=HEADERS | headers)


def stream(url: str, request: dict[str, Any]) -> StreamOutcome:
    return read_stream(ANTHROPIC, [post(url, request | {"stream": True}).content])


@pytest.mark.parametrize(
    "request_",
    [
        ask(),
        ask("tokens=3", max_tokens=2),
        ask("tools=2", tools=[TOOL, {"name": "now", "input_schema": {"type": "object"}}]),
        ask("reasoning=5", thinking=THINKING),
        ask("cached=2 what was said before, at some length"),
        ask(output_config={"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}),
    ],
)
def test_a_streamed_answer_equals_the_unary_one(url: str, request_: dict[str, Any]) -> None:
    whole = ANTHROPIC.response(post(url, request_).content, STAMP)
    streamed = stream(url, request_)
    assert (streamed.usage, streamed.finish_reason, streamed.error) == (whole.usage, whole.finish_reason, None)
    told = sdk_answer(whole.body)["choices"], sdk_stream(streamed.frames)["choices"]
    for choices in told:  # what is unique to an answer
        for entry in choices[0]["message"].get("reasoning_details", []):
            entry.pop("signature")
        for call in choices[0]["message"].get("tool_calls", []):
            call.pop("id")
    assert told[0] == told[1]


def test_thinking_is_counted_inside_the_output(url: str) -> None:
    usage = stream(url, ask("tokens=3 reasoning=5", thinking=THINKING)).usage
    assert usage is not None
    assert (usage.output, usage.reasoning) == (3, 5)


def test_nothing_is_thought_where_thinking_is_not_asked_for(url: str) -> None:
    usage = stream(url, ask("tokens=3 reasoning=5")).usage
    assert usage is not None
    assert usage.total_output == 3


def test_hinted_blocks_are_written_to_the_cache_for_as_long_as_they_say(url: str) -> None:
    blocks = [
        {"type": "text", "text": "x" * 400, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"type": "text", "text": "y" * 80, "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "tokens=3"},
    ]
    usage = stream(url, ask(messages=[{"role": "user", "content": blocks}])).usage
    assert isinstance(usage, Usage)
    assert (usage.cache_write_1h, usage.cache_write, usage.output) == (100, 20, 3)


def test_a_tool_s_result_is_answered_with_text(url: str) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
    turns = [
        {"role": "user", "content": "tools=1"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}]},
    ]
    assert post(url, ask(messages=turns, tools=[TOOL])).json()["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": "claude-sonnet-4-6", "messages": []}, "max_tokens"),
        (ask(messages=[]), "at least one message"),
        (ask(seed=1), "seed"),
        (ask(temperature=1.5), "temperature"),
        (ask(messages=[{"role": "system", "content": "x"}]), "role"),
        (ask(messages=[{"role": "user", "content": [{"type": "text", "text": ""}]}]), "non-empty"),
        (ask(thinking={"type": "enabled", "budget_tokens": 1_000}), "budget_tokens"),
        (ask(max_tokens=4_000, thinking={"type": "enabled", "budget_tokens": 2_000}, tools=[TOOL],
             tool_choice={"type": "any"}), "tool_choice"),
        (ask("word " * 200_000), "prompt is too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_request_is_refused(url: str, request_: dict[str, Any], message: str) -> None:
    answer = post(url, request_)
    error = ANTHROPIC.error(answer.status_code, dict(answer.headers), answer.content)
    assert isinstance(error, VendorRefused)
    assert message in error.message


@pytest.mark.parametrize("key", ["", "bad-key"])
def test_a_bad_key_is_refused(url: str, key: str) -> None:
    answer = post(url, ask(), **{"x-api-key": key})
    assert answer.json()["error"]["type"] == "authentication_error"
    assert isinstance(ANTHROPIC.error(answer.status_code, {}, answer.content), VendorMisconfigured)


def test_an_unknown_model_is_not_found(url: str) -> None:
    assert post(url, ask(model="gpt-4o")).json()["error"]["type"] == "not_found_error"


def test_models_are_listed_in_the_vendor_s_shape(url: str) -> None:
    listed = http("GET", f"{url}/anthropic/v1/models", headers=HEADERS).json()
    assert (listed["has_more"], listed["data"][0]["type"]) == (False, "model")


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "kind"),
    [
        ({"kind": "throttle", "retry_after": 7}, VendorThrottled, "rate_limit_error"),
        ({"kind": "throttle", "code": "insufficient_quota"}, VendorMisconfigured, "billing_error"),
        ({"kind": "status", "status": 529}, VendorFailed, "overloaded_error"),
        ({"kind": "status", "status": 500}, VendorFailed, "api_error"),
        ({"kind": "status", "status": 400}, VendorRefused, "invalid_request_error"),
    ],
)
def test_an_error_is_in_the_vendor_s_form(url: str, fault: dict[str, Any], error: type, kind: str) -> None:
    put_fault(url, "anthropic", **fault)
    answer = post(url, ask())
    read = ANTHROPIC.error(answer.status_code, dict(answer.headers), answer.content)
    assert (type(read), answer.json()["error"]["type"]) == (error, kind)
    assert read.retry_after_seconds == fault.get("retry_after", read.retry_after_seconds)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"kind": "error_event", "code": "overloaded_error"}, VendorFailed),
        ({"kind": "error_event", "code": "rate_limit_error"}, VendorThrottled),
        ({"kind": "malformed"}, VendorBroke),
        ({"kind": "empty"}, VendorBroke),
    ],
)
def test_a_fault_amid_a_stream_is_met_as_that(url: str, fault: dict[str, Any], error: type) -> None:
    put_fault(url, "anthropic", **fault)
    assert type(stream(url, ask()).error) is error


def test_a_unary_error_event_is_an_error_under_200(url: str) -> None:
    put_fault(url, "anthropic", kind="error_event")
    answer = post(url, ask())
    assert answer.status_code == 200
    with pytest.raises(VendorFailed):
        ANTHROPIC.response(answer.content, STAMP)


# --- the recorded shapes ----------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
LEFT_OUT = {
    "web_search": "a tool that the vendor runs",
    "redacted": "thinking that the vendor hides",
    "count_tokens": "its first exchange is another route",
    "stop_sequences": "what the simulator says has no stop words",
}
# Members that the vendor sends by now, and did not in all of the recordings; and one that its reference has.
ADDED_SINCE = {"stop_details", "caller", "inference_geo", "output_tokens_details"}
ALIKE = [
    exchange
    for exchange in (recordings.load(FOLDER) if FOLDER else [])
    if exchange.vendor == "anthropic" and not any(part in exchange.file for part in LEFT_OUT)
]
GOOD = [exchange for exchange in ALIKE if exchange.response.status == 200]


def structure(value: Any) -> Any:
    """Names and types; a list's items count once where neighbours are alike."""
    if isinstance(value, dict):
        return {name: structure(one) for name, one in value.items() if name not in ADDED_SINCE and name != "input"}
    if isinstance(value, list):
        return [item for item, _ in groupby(structure(one) for one in value)]
    return type(value).__name__


def simulated(url: str, exchange: Exchange) -> httpx.Response:
    """The answer to the recorded request, told to do what the vendor happened to do."""
    request = exchange.request.json()
    recorded = exchange.response.body.decode()
    if "toolu_" in recorded or "signature" in recorded:
        wanted = f"tools={recorded.count('toolu_')} reasoning={3 * ('signature' in recorded)}"
        request["messages"].append({"role": "user", "content": wanted})
    return post(url, request)


def shapes_of(body: str) -> list[Any]:
    """Structures of a stream's events in order, pings left out."""
    data = [json.loads(line[5:]) for line in body.splitlines() if line.startswith("data:")]
    shapes = [structure(event) | {"type": event["type"]} for event in data if event["type"] != "ping"]
    return [shape for shape, _ in groupby(shapes)]


@needs_recordings
@pytest.mark.parametrize("exchange", [e for e in GOOD if e.response.streamed], ids=lambda exchange: exchange.name)
def test_a_stream_has_the_recorded_structure(url: str, exchange: Exchange) -> None:
    assert shapes_of(simulated(url, exchange).text) == shapes_of(exchange.response.body.decode())


@needs_recordings
@pytest.mark.parametrize("exchange", [e for e in GOOD if not e.response.streamed], ids=lambda exchange: exchange.name)
def test_an_answer_has_the_recorded_structure(url: str, exchange: Exchange) -> None:
    made, recorded = simulated(url, exchange).json(), exchange.response.json()
    for answer in (made, recorded):  # whether text comes before a call is the model's choice
        kinds = {block["type"] for block in answer["content"]}
        answer["content"] = [block for block in answer["content"] if block["type"] != "text" or "tool_use" not in kinds]
    assert structure(made) == structure(recorded)


@needs_recordings
@pytest.mark.parametrize("exchange", [e for e in ALIKE if e not in GOOD], ids=lambda exchange: exchange.name)
def test_an_error_has_the_recorded_structure(url: str, exchange: Exchange) -> None:
    put_fault(url, "anthropic", kind="status", status=exchange.response.status)
    answer = post(url, ask())
    assert structure(answer.json()) == structure(exchange.response.json())
    assert answer.json()["error"]["type"] == exchange.response.json()["error"]["type"]
