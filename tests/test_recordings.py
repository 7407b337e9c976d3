"""The simulator's answers have the structure of recorded ones: member names, their order, nulls, types, sequence.

Runs where the environment variable RECORDINGS names the folder of recordings. Each recorded request is sent to the
simulator as it is, with directives that ask for what the vendor happened to do (how many tools it called).
"""

import gzip
import json
import os
from base64 import b64encode
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from loadtest.simulator.inprocess import running
from tests import recordings
from tests.recordings import Exchange
from tests.simulation import http, put_fault, say

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
EXCHANGES = recordings.load(FOLDER) if FOLDER else []

# OpenAI-shaped recordings that the simulator does not answer alike, by a part of their name or by their host.
NOT_SIMULATED = {
    "/v1/responses": "the responses API",
    "gpt-4o-audio-preview": "audio models have usage classes of their own",
    "llm__test_tools_streaming_variant": "OpenRouter's chunks of 2025; its order of members has changed since",
    "api.deepseek.com": "DeepSeek's own shape (reasoning_content)",
    "api.mistral.ai": "Mistral's own shape (typed content, padding, other errors)",
    "api.groq.com": "Groq's own shape (x_groq, channels, error events)",
    "ollama.com": "Ollama's own shape (reasoning, no fingerprint of the model)",
}
VENDORS = {"api.openai.com": "openai", "openrouter.ai": "openrouter"}
# Members that OpenAI sends by now, and did not when the recordings with this prefix were made (2024 to May 2025).
ADDED_SINCE = {"otel__": {"service_tier", "obfuscation", "annotations"}}
# What the vendor of a model adds behind OpenRouter: the signature of its reasoning.
PROVIDER_ONLY = {"signature"}
# A block that the vendor adds on request, as a chunk of its own.
LEFT_OUT_CHUNKS = {"moderation"}
COMPARED_HEADERS = ("openai-", "x-ratelimit-", "x-request-id", "x-generation-id", "content-type", "www-authenticate")


def reason_left_out(exchange: Exchange) -> str | None:
    """Why the simulator does not answer like this recording; None when it does."""
    where = f"{exchange.request.uri} {exchange.name} {request_of(exchange).get('model')}"
    return next((reason for part, reason in NOT_SIMULATED.items() if part in where), None)


def request_of(exchange: Exchange) -> dict[str, Any]:
    return exchange.request.json() if exchange.request.body else {}


OPENAI_SHAPED = [exchange for exchange in EXCHANGES if exchange.vendor in ("openai", "openai-compatible")]
SIMULATED = [exchange for exchange in OPENAI_SHAPED if not reason_left_out(exchange)]
GOOD = [exchange for exchange in SIMULATED if exchange.response.status == 200]
STREAMS = [exchange for exchange in GOOD if exchange.response.streamed and "error" not in exchange.file]
UNARY = [exchange for exchange in GOOD if not exchange.response.streamed]
FAILED = [exchange for exchange in SIMULATED if exchange.response.status != 200]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    http("DELETE", f"{server}/_sim/faults").raise_for_status()
    return server


def structure(value: Any, ordered: bool, without: frozenset[str] | set[str] = frozenset()) -> Any:
    """Names and types of a JSON value; a list's items count once where neighbours are alike."""
    if isinstance(value, dict):
        members = [(name, structure(one, ordered, without)) for name, one in value.items() if name not in without]
        return tuple(members if ordered else sorted(members, key=lambda member: member[0]))
    if isinstance(value, list):
        return [item for item, _ in groupby(structure(one, ordered, without) for one in value)]
    return "number" if isinstance(value, float) else type(value).__name__


def stream_structure(body: str, without: set[str]) -> list[Any]:
    """The lines of a stream in order, neighbours alike counted once: comments, structures of data, `[DONE]`."""
    lines: list[Any] = []
    for line in body.replace("\r\n", "\n").split("\n"):
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            if not LEFT_OUT_CHUNKS & set(chunk):
                lines.append(structure(chunk, True, without))
        elif line:
            lines.append(line)
    return [line for line, _ in groupby(lines)]


def added_since(exchange: Exchange) -> set[str]:
    return next((names for prefix, names in ADDED_SINCE.items() if exchange.file.startswith(prefix)), set())


def tool_calls_in(exchange: Exchange) -> int:
    """How many tools the vendor called at once."""
    if not exchange.response.streamed:
        choices = exchange.response.json().get("choices") or [{}]
        return len((choices[0].get("message") or {}).get("tool_calls") or ())
    indexes = {
        call["index"]
        for event in exchange.response.events()
        if event.startswith("{")
        for choice in json.loads(event)["choices"]
        for call in choice["delta"].get("tool_calls") or ()
    }
    return len(indexes)


def ask(url: str, exchange: Exchange, reasoning: int = 0) -> httpx.Response:
    """The simulator's answer to a recorded request."""
    request = request_of(exchange)
    if "messages" in request and (tool_calls_in(exchange) or reasoning):
        directives = f"tools={tool_calls_in(exchange)} reasoning={reasoning}"
        # Before a role=tool message the directive would not count: the turn is the model's again.
        request["messages"] = [*request["messages"], {"role": "user", "content": directives}]
    parts = urlsplit(exchange.request.uri)
    path = parts.path.removeprefix("/api")
    return http(
        exchange.request.method,
        f"{url}/{VENDORS[parts.hostname]}{path}",
        json=request,
        headers={"authorization": "Bearer any-key"},
    )


def named(exchanges: list[Exchange]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exchange", exchanges, ids=[exchange.name for exchange in exchanges])


@needs_recordings
@named(STREAMS)
def test_a_stream_is_built_like_the_recorded_one(url: str, exchange: Exchange) -> None:
    reasoned = b'"reasoning":"' in exchange.response.body
    answer = ask(url, exchange, reasoning=4 if reasoned else 0)
    recorded = stream_structure(exchange.response.body.decode(), without=set())
    without = added_since(exchange)
    ours = stream_structure(answer.text, without)
    assert ours == [line for line in recorded if not is_provider_only(line)]


def is_provider_only(line: Any) -> bool:
    """A chunk with what only the model's own vendor can make."""
    return any(f"('{name}'," in repr(line) for name in PROVIDER_ONLY)


@needs_recordings
@named(UNARY)
def test_a_unary_answer_is_built_like_the_recorded_one(url: str, exchange: Exchange) -> None:
    ordered = exchange.response.ordered
    ours = structure(ask(url, exchange).json(), ordered, added_since(exchange))
    assert ours == structure(exchange.response.json(), ordered)


@needs_recordings
@named([exchange for exchange in UNARY if exchange.response.ordered])
def test_a_unary_answer_is_indented_like_the_recorded_one(url: str, exchange: Exchange) -> None:
    recorded, ours = exchange.response.body.decode(), ask(url, exchange).text
    assert (ours.startswith("{\n  "), ours[-1]) == (recorded.startswith("{\n  "), recorded[-1])


@needs_recordings
@named(GOOD)
def test_an_answer_has_the_headers_of_the_recorded_one(url: str, exchange: Exchange) -> None:
    ours = ask(url, exchange).headers
    wanted = {name for name in exchange.response.headers if name.startswith(COMPARED_HEADERS)}
    assert wanted - set(ours) == set()
    assert ours["content-type"] == exchange.response.header("content-type")


def failing(url: str, exchange: Exchange) -> httpx.Response:
    """An answer of the simulator that fails as the recorded one did."""
    vendor = VENDORS[urlsplit(exchange.request.uri).hostname]
    if exchange.response.status == 429:
        put_fault(url, vendor, kind="throttle")
    return ask(url, exchange)


@needs_recordings
@named(FAILED)
def test_an_error_is_built_like_the_recorded_one(url: str, exchange: Exchange) -> None:
    answer = failing(url, exchange)
    ordered = exchange.response.ordered
    assert answer.status_code == exchange.response.status
    assert structure(answer.json(), ordered) == structure(exchange.response.json(), ordered)
    assert answer.headers["content-type"] == exchange.response.header("content-type")


@needs_recordings
@named([exchange for exchange in FAILED if "code" in exchange.response.json()["error"]])
def test_an_error_has_the_code_of_the_recorded_one(url: str, exchange: Exchange) -> None:
    ours, recorded = failing(url, exchange).json()["error"], exchange.response.json()["error"]
    assert [ours.get(name) for name in ("code", "type", "param")] == [
        recorded.get(name) for name in ("code", "type", "param")
    ]


# Errors that were recorded on the responses API and are the same on chat completions, but for the name of `param`.
RESPONSES_ERRORS = {
    "raises_appropriate_auth_error": ("bad-key", say("x")),
    "handles_context_length_exceeded_errors": ("any-key", say("x" * 40_000, model="gpt-4")),
}


@needs_recordings
@pytest.mark.parametrize("part", RESPONSES_ERRORS)
def test_an_error_recorded_on_the_responses_api_is_built_alike(url: str, part: str) -> None:
    (exchange,) = [one for one in EXCHANGES if one.vendor == "openai" and part in one.file]
    key, request = RESPONSES_ERRORS[part]
    path = f"{url}/openai/v1/chat/completions"
    answer = http("POST", path, json=request, headers={"authorization": f"Bearer {key}"})
    recorded = exchange.response.json()
    assert structure(answer.json(), True) == structure(recorded, True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (exchange.response.status, recorded["error"]["code"])


@needs_recordings
def test_an_error_in_an_openrouter_stream_is_built_like_the_recorded_one(url: str) -> None:
    (exchange,) = [one for one in GOOD if "openrouter_stream_error" in one.file]
    put_fault(url, "openrouter", kind="error_event", after_chunks=1)
    # Usage has grown since that recording.
    recorded, ours = (
        structure(next(json.loads(event) for event in events if '"error"' in event), True, {"usage"})
        for events in (exchange.response.events(), data_of(ask(url, exchange)))
    )
    assert ours == recorded


@needs_recordings
def test_an_openrouter_stream_goes_on_to_done_after_its_error(url: str) -> None:
    (exchange,) = [one for one in GOOD if "openrouter_stream_error" in one.file]
    put_fault(url, "openrouter", kind="error_event", after_chunks=1)
    assert data_of(ask(url, exchange))[-1] == exchange.response.events()[-1] == "[DONE]"


def data_of(answer: httpx.Response) -> list[str]:
    return [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]


@needs_recordings
def test_every_reason_to_leave_a_recording_out_is_needed() -> None:
    used = {reason_left_out(exchange) for exchange in OPENAI_SHAPED} - {None}
    assert used == set(NOT_SIMULATED.values())


@needs_recordings
@named(EXCHANGES)
def test_every_recording_can_be_read(exchange: Exchange) -> None:
    assert exchange.response.status >= 200
    assert exchange.response.body
    if exchange.response.streamed:
        assert exchange.response.events()
    elif (exchange.response.header("content-type") or "").startswith("application/json"):
        exchange.response.json()


# The reader, on recordings of our own


def write(folder: Path, document: str) -> Exchange:
    (folder / "vendor").mkdir()
    (folder / "vendor" / "one.yaml").write_text(document)
    (exchange,) = recordings.load(folder)
    return exchange


def test_a_vcrpy_recording_with_a_compressed_body_is_read(tmp_path: Path) -> None:
    packed = b64encode(gzip.compress(b'{"b": 1, "a": 2}')).decode()
    exchange = write(
        tmp_path,
        f"""
interactions:
- request: {{method: post, uri: "https://vendor/v1", headers: {{Accept: ["*/*"]}}, body: '{{"x": "é"}}'}}
  response:
    status: {{code: 200, message: OK}}
    headers: {{Content-Type: [application/json], Content-Encoding: [gzip]}}
    body:
      string: !!binary {packed}
""",
    )
    assert (exchange.vendor, exchange.request.method, exchange.request.json()) == ("vendor", "POST", {"x": "é"})
    assert (exchange.response.body, exchange.response.ordered) == (b'{"b": 1, "a": 2}', True)
    assert exchange.response.header("content-type") == "application/json"


def test_a_recording_with_parsed_bodies_is_read(tmp_path: Path) -> None:
    exchange = write(
        tmp_path,
        """
interactions:
- request: {method: POST, uri: "https://vendor/v1", headers: {}, parsed_body: {model: m}}
  response: {status: {code: 404, message: No}, headers: {}, parsed_body: {error: {code: null}}}
""",
    )
    assert (exchange.request.json(), exchange.response.json()) == ({"model": "m"}, {"error": {"code": None}})
    assert (exchange.response.status, exchange.response.ordered) == (404, False)


def test_a_ruby_recording_is_read(tmp_path: Path) -> None:
    exchange = write(
        tmp_path,
        f"""
http_interactions:
- request: {{method: get, uri: "https://vendor/v1", body: {{encoding: UTF-8, string: ''}}, headers: {{}}}}
  response:
    status: {{code: 200, message: OK}}
    headers: {{Content-Type: [text/event-stream]}}
    body: {{encoding: ASCII-8BIT, string: !binary {b64encode(b": hi" + bytes([10]) + b"data: 1").decode()}}}
  recorded_at: Mon, 10 Aug 2026 23:04:32 GMT
""",
    )
    assert (exchange.request.method, exchange.response.events()) == ("GET", ["1"])


def test_an_older_vcrpy_recording_is_read(tmp_path: Path) -> None:
    exchange = write(
        tmp_path,
        """
interactions:
- request: {method: POST, uri: "https://vendor/v1", headers: {}, body: ''}
  response: {status_code: 200, http_version: HTTP/1.1, headers: {}, content: "text"}
""",
    )
    assert (exchange.response.status, exchange.response.body) == (200, b"text")
