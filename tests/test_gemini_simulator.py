"""The simulator as Gemini: the translator reads it, its refusals and faults are the vendor's, its shape recorded.

Recorded shapes are compared where the environment variable RECORDINGS names the folder of recordings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import httpx
import jwt
import pytest

from app.errors import VendorBroke, VendorFailed, VendorMisconfigured, VendorRefused, VendorThrottled
from app.providers.gemini import GEMINI
from loadtest.simulator.inprocess import running
from loadtest.stack.service_account import key_file
from tests import recordings
from tests.recordings import Exchange
from tests.simulation import http, put_fault
from tests.test_recordings import structure
from tests.translation import STAMP, StreamOutcome, read_stream, sdk_answer, sdk_stream

HEADERS = {"x-goog-api-key": "any-key"}
TOOLS = [{"functionDeclarations": [{"name": "weather", "parametersJsonSchema": {"type": "object", "properties": {}}}]}]
THOUGHTS = {"thinkingConfig": {"includeThoughts": True}}
MODEL = "gemini-2.5-flash"
VERTEX = f"/vertex/v1/projects/p/locations/l/publishers/google/models/{MODEL}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    http("DELETE", f"{server}/_sim/faults").raise_for_status()
    return server


def ask(prompt: str = "Hello", **members: Any) -> dict[str, Any]:
    return {"contents": [{"role": "user", "parts": [{"text": prompt}]}], **members}


def post(
    url: str,
    request: dict[str, Any],
    method: str = "generateContent",
    model: str = "gemini-2.5-flash",
    key: str = "any",
) -> httpx.Response:
    path = f"{url}/gemini/v1beta/models/{model}:{method}"
    return http("POST", path, json=request, headers={"x-goog-api-key": key})


def stream(url: str, request: dict[str, Any]) -> StreamOutcome:
    return read_stream(GEMINI, [post(url, request, "streamGenerateContent?alt=sse").content])


@pytest.mark.parametrize(
    "request_",
    [
        ask(),
        ask("tokens=3", generationConfig={"maxOutputTokens": 2}),
        ask("tools=2", tools=TOOLS),
        ask("reasoning=5", generationConfig=THOUGHTS),
        ask("reasoning=5", generationConfig=THOUGHTS | {"maxOutputTokens": 5}),
        ask("cached=2 what was said before, at some length"),
        ask(generationConfig={"candidateCount": 2}),
        ask(generationConfig={"responseLogprobs": True, "logprobs": 2}),
        ask("blocked=1"),
        ask(generationConfig={"responseMimeType": "application/json", "responseJsonSchema": {"type": "object"}}),
    ],
)
def test_a_streamed_answer_equals_the_unary_one(url: str, request_: dict[str, Any]) -> None:
    whole = GEMINI.response(post(url, request_).content, STAMP)
    streamed = stream(url, request_)
    assert (streamed.usage, streamed.finish_reason, streamed.error) == (whole.usage, whole.finish_reason, None)
    told = sdk_answer(whole.body)["choices"], sdk_stream(streamed.frames)["choices"]
    for choices in told:  # what is unique to an answer
        choices[0]["message"].pop("reasoning_details", None)
        for call in choices[0]["message"].get("tool_calls", []):
            call.pop("id")
    assert told[0] == told[1]


def test_thoughts_are_counted_and_hidden_where_they_are_not_asked_for(url: str) -> None:
    outcome = stream(url, ask("tokens=3 reasoning=5"))
    assert outcome.usage is not None
    assert (outcome.usage.output, outcome.usage.reasoning) == (3, 5)
    assert "reasoning_content" not in outcome.frames.decode()


def test_a_call_that_comes_back_unsigned_is_refused_from_gemini_3_on(url: str) -> None:
    turns = [
        {"role": "user", "parts": [{"text": "tools=1"}]},
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"output": "sunny"}}}]},
    ]
    request = {"contents": turns, "tools": TOOLS}
    statuses = [post(url, request, model=model).status_code for model in ("gemini-2.5-flash", "gemini-3-pro")]
    assert statuses == [200, 400]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "contents"),
        (ask() | {"contents": []}, "contents is not specified"),
        (ask() | {"contents": [{"role": "user", "parts": []}]}, "at least one part"),
        (ask(temperature=1), "unknown field"),
        (ask(generationConfig={"thinkingConfig": {"thinkingBudget": 1, "thinkingLevel": "low"}}), "only one of"),
        (ask(tools=TOOLS, toolConfig={"functionCallingConfig": {"mode": "SOME"}}), "mode"),
        (ask("word " * 900_000), "exceeds the maximum number of tokens"),
    ],
)
def test_what_the_vendor_refuses_is_refused(url: str, request_: dict[str, Any], message: str) -> None:
    answer = post(url, request_)
    error = GEMINI.error(answer.status_code, {}, answer.content)
    assert isinstance(error, VendorRefused)
    assert message in error.message


@pytest.mark.parametrize(
    "path", ["/v1beta/models/gpt-4o:generateContent", "/v1beta/models/gemini-2.5-flash:sing", "/x"]
)
def test_another_path_is_not_found(url: str, path: str) -> None:
    answer = http("POST", f"{url}/gemini{path}", json=ask(), headers=HEADERS)
    assert isinstance(GEMINI.error(answer.status_code, {}, answer.content), VendorMisconfigured)
    assert answer.status_code == 404


def test_a_bad_key_is_a_400(url: str) -> None:
    answer = post(url, ask(), key="bad-key")
    assert answer.status_code == 400
    assert isinstance(GEMINI.error(400, {}, answer.content), VendorMisconfigured)


def test_a_throttle_tells_its_wait_in_the_body_alone(url: str) -> None:
    put_fault(url, "gemini", kind="throttle", retry_after=7)
    answer = post(url, ask())
    error = GEMINI.error(answer.status_code, dict(answer.headers), answer.content)
    assert isinstance(error, VendorThrottled)
    assert (error.retry_after_seconds, "retry-after" in answer.headers) == (7.0, False)


@pytest.mark.parametrize("status", [500, 503, 504])
def test_a_status_is_the_vendor_s(url: str, status: int) -> None:
    put_fault(url, "gemini", kind="status", status=status)
    answer = post(url, ask())
    assert isinstance(GEMINI.error(answer.status_code, {}, answer.content), VendorFailed)


def test_an_error_event_is_the_vendor_s(url: str) -> None:
    put_fault(url, "gemini", kind="error_event", after_chunks=2)
    outcome = stream(url, ask("tokens=9"))
    assert isinstance(outcome.error, VendorFailed)
    assert outcome.error.vendor_code == "UNAVAILABLE"
    assert outcome.kinds.count("CONTENT") == 2


@pytest.mark.parametrize("kind", ["malformed", "error_event"])
def test_a_broken_unary_answer_is_no_answer(url: str, kind: str) -> None:
    put_fault(url, "gemini", kind=kind)
    with pytest.raises((VendorBroke, VendorFailed)):
        GEMINI.response(post(url, ask()).content, STAMP)


# --- Vertex -----------------------------------------------------------------------------------------------------------


def assertion(**claims: Any) -> dict[str, str]:
    account = json.loads(key_file())
    said = {"iss": account["client_email"], "scope": "s", "aud": "x", "exp": 4_000_000_000} | claims
    signed = jwt.encode(said, account["private_key"], algorithm="RS256")
    return {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": signed}


def test_an_assertion_is_exchanged_for_a_token_that_is_good(url: str) -> None:
    token = http("POST", f"{url}/vertex/token", data=assertion()).json()
    assert (token["token_type"], token["expires_in"]) == ("Bearer", 3600)
    headers = {"authorization": f"Bearer {token['access_token']}"}
    assert http("POST", f"{url}{VERTEX}:generateContent", json=ask(), headers=headers).status_code == 200


@pytest.mark.parametrize("form", [{}, {"assertion": "x"}, assertion(exp=1), assertion(iss="bad-account")])
def test_another_assertion_is_refused(url: str, form: dict[str, str]) -> None:
    answer = http("POST", f"{url}/vertex/token", data=form)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")


def test_vertex_wants_a_token(url: str) -> None:
    answer = http("POST", f"{url}{VERTEX}:generateContent", json=ask(), headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["status"]) == (401, "UNAUTHENTICATED")


# --- recorded shapes --------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
EXCHANGES = [one for one in (recordings.load(FOLDER) if FOLDER else []) if one.vendor == "gemini"]
LATE = {
    "serviceTier",
    "trafficType",
    "createTime",
    "avgLogprobs",
    "candidatesTokensDetails",
    "finishMessage",
    "metadata",
}
"""What some recordings have and others do not, by their age and front."""
COMPARED = {
    "pydantic-ai__test_google_recursive_schema": ask(
        generationConfig={"responseMimeType": "application/json", "responseJsonSchema": {"type": "object"}}
    ),
    "pydantic-ai__test_google_model_max_tokens": ask("reasoning=9", generationConfig={"maxOutputTokens": 5}),
    "pydantic-ai__test_tool_choice_matrix-required": ask(
        "reasoning=9", tools=TOOLS, toolConfig={"functionCallingConfig": {"mode": "ANY"}}
    ),
    "pydantic-ai__test_google_vertex_logprobs": ask(
        "reasoning=9", generationConfig={"responseLogprobs": True, "logprobs": 5}
    ),
    "ruby_llm__chat_gemini_token_accounting": ask("reasoning=9"),
    "pydantic-ai__test_google_model_thinking_part_iter": ask("reasoning=9", generationConfig=THOUGHTS),
}
UNARY = [name for name in COMPARED if "iter" not in name and "accounting" not in name]


def recorded(name: str) -> Exchange:
    (exchange,) = [one for one in EXCHANGES if one.file.startswith(name)]
    return exchange


@needs_recordings
@pytest.mark.parametrize("name", UNARY)
def test_a_unary_answer_is_built_like_the_recorded_one(url: str, name: str) -> None:
    ours, theirs = post(url, COMPARED[name]).json(), recorded(name).response.json()
    for answer in (ours, theirs):
        for candidate in answer["candidates"]:
            candidate["index"] = 0
            for part in candidate["content"].get("parts", []):
                part.get("functionCall", {}).pop("args", None)
    assert structure(ours, False, LATE) == structure(theirs, False, LATE)


@needs_recordings
@pytest.mark.parametrize("name", [name for name in COMPARED if name not in UNARY])
def test_the_events_of_a_stream_are_built_like_the_recorded_ones(url: str, name: str) -> None:
    def kinds(body: bytes) -> list[Any]:
        events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]
        return [kind for kind, _ in groupby(structure(one, False, LATE) for one in events)]

    ours = post(url, COMPARED[name], "streamGenerateContent?alt=sse").content
    theirs = recorded(name).response.body
    # The vendor may put its last text and the reason into one event; every kind of event of ours is one of its.
    assert [kind for kind in kinds(ours)[:-1] if kind not in kinds(theirs)] == []
    assert kinds(ours)[-1] in kinds(theirs)


@needs_recordings
@pytest.mark.parametrize("part", ["raises_appropriate_auth_error", "model_name_suggestion"])
def test_an_error_is_built_like_the_recorded_one(url: str, part: str) -> None:
    (exchange,) = [one for one in EXCHANGES if part in one.file]
    bad = exchange.response.status == 400
    ours = post(url, ask(), key="bad-") if bad else post(url, ask(), model="gemma")
    theirs = exchange.response.json()
    for error in (ours.json()["error"], theirs["error"]):
        assert {"code", "message", "status"} <= set(error)
    assert [ours.json()["error"][name] for name in ("code", "status")] == [
        theirs["error"][name] for name in ("code", "status")
    ]
