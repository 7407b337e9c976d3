"""The simulated Bedrock: who may ask, what it refuses, and answers built like the recorded ones."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import httpx
import msgspec
import pytest
from botocore.eventstream import EventStreamBuffer

from app.ambient import Ambient
from app.config import Credential, Secret, Target
from app.dialects import openai_chat, openai_embeddings
from app.errors import VendorBroke, VendorError, VendorFailed, VendorThrottled
from app.http1 import Http1
from app.providers.bedrock import BEDROCK
from app.providers.translator import Outgoing
from app.upstream import Engine
from app.upstream_httpx import Httpx
from loadtest.simulator.inprocess import running
from tests import recordings
from tests.recordings import Exchange
from tests.simulation import http, put_fault
from tests.translation import STAMP, StreamOutcome, read_stream, sdk_answer, sdk_stream, target

CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
KEY = Credential(Secret("simulator"), "AKIDSIMULATED", Secret("a-session"), "eu-central-1")
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Never used: all is plain HTTP here."""
TOOLS = [
    {
        "type": "function",
        "function": {"name": "city", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}},
    }
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    http("DELETE", f"{server}/_sim/faults").raise_for_status()
    return server


def at(url: str, model: str = CLAUDE) -> Target:
    there = target("bedrock", model)
    return msgspec.structs.replace(there, provider=msgspec.structs.replace(there.provider, base_url=f"{url}/bedrock"))


def asked(url: str, text: str = "Say something. tokens=9", model: str = CLAUDE, **members: Any) -> Outgoing:
    body = {"model": "a", "messages": [{"role": "user", "content": text}]} | members
    return BEDROCK.chat(openai_chat.read(json.dumps(body).encode()), at(url, model))


def post(outgoing: Outgoing, credential: Credential = KEY, seconds: float = 0.0) -> httpx.Response:
    signed = BEDROCK.sign(outgoing, credential, time.time() + seconds)
    return http("POST", signed.url, headers=dict(signed.headers), content=signed.body)


def stream_of(response: httpx.Response) -> StreamOutcome:
    return read_stream(BEDROCK, [response.content])


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [CLAUDE, "arn:aws:bedrock:eu-west-1:1:application-inference-profile/x1"])
@pytest.mark.parametrize("credential", [KEY, Credential(Secret("ABSK-any"))], ids=["signature", "api-key"])
def test_a_good_credential_gets_an_answer(url: str, model: str, credential: Credential) -> None:
    assert post(asked(url, model=model), credential).status_code == 200


@pytest.mark.parametrize("engine", [lambda: Http1(PLAIN, Ambient()), lambda: Httpx(PLAIN)], ids=["http1", "httpx"])
@pytest.mark.parametrize("model", [CLAUDE, "arn:aws:bedrock:eu-west-1:1:application-inference-profile/x1"])
def test_what_the_gateway_sends_keeps_its_signature(url: str, engine: Callable[[], Engine], model: str) -> None:
    async def status() -> int:
        sending = engine()
        answer = await sending.open(BEDROCK.sign(asked(url, model=model), KEY, time.time()), 5.0)
        await answer.read(1_000_000)
        await answer.close(ended=True)
        await sending.close()
        return answer.status

    assert asyncio.run(status()) == 200


def test_a_signature_with_another_secret_is_refused(url: str) -> None:
    assert kind(post(asked(url), msgspec.structs.replace(KEY, secret=Secret("other")))) == "InvalidSignatureException"


@pytest.mark.parametrize("seconds", [-600, 600])
def test_a_signature_of_another_time_is_refused(url: str, seconds: float) -> None:
    assert kind(post(asked(url), seconds=seconds)) == "InvalidSignatureException"


def test_a_body_that_is_not_the_signed_one_is_refused(url: str) -> None:
    signed = BEDROCK.sign(asked(url), KEY, time.time())
    assert kind(post_as_is(signed, signed.body + b" ")) == "InvalidSignatureException"


def test_a_session_token_that_is_not_the_signed_one_is_refused(url: str) -> None:
    signed = BEDROCK.sign(asked(url), KEY, time.time())
    headers = dict(signed.headers) | {"x-amz-security-token": "another"}
    response = http("POST", signed.url, headers=headers, content=signed.body)
    assert kind(response) == "InvalidSignatureException"


@pytest.mark.parametrize(
    ("credential", "expected"),
    [
        (msgspec.structs.replace(KEY, access_key_id="BADKEY"), "UnrecognizedClientException"),
        (Credential(Secret("bad-key")), "AccessDeniedException"),
    ],
)
def test_a_credential_that_is_not_known_is_refused(url: str, credential: Credential, expected: str) -> None:
    assert kind(post(asked(url), credential)) == expected


def test_a_request_without_credential_is_refused(url: str) -> None:
    outgoing = asked(url)
    assert kind(post_as_is(outgoing, outgoing.body)) == "MissingAuthenticationTokenException"


def post_as_is(outgoing: Outgoing, body: bytes) -> httpx.Response:
    return http("POST", outgoing.url, headers=dict(outgoing.headers), content=body)


def kind(response: httpx.Response) -> str:
    assert response.status_code in (400, 403)
    return response.headers["x-amzn-errortype"].partition(":")[0]


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "text": "tools=2 and all"},
        {"text": "Think first. tokens=5 reasoning=6 cached=3"},
        {"max_tokens": 4},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "object"}}}},
        {
            "model": "eu.amazon.nova-micro-v1:0",
            "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "object"}}},
        },
    ],
)
def test_a_stream_says_what_the_whole_answer_says(url: str, members: dict[str, Any]) -> None:
    whole = BEDROCK.response(post(asked(url, **members)).content, STAMP)
    stream = stream_of(post(asked(url, stream=True, **members)))
    assert stream.error is None
    assert (stream.usage, stream.finish_reason) == (whole.usage, whole.finish_reason)
    ours, theirs = (without_chance(said) for said in (sdk_stream(stream.frames), sdk_answer(whole.body)))
    assert ours == theirs


def without_chance(completion: dict[str, Any]) -> dict[str, Any]:
    """Without ids and signatures, which are of each answer alone."""
    message = completion["choices"][0]["message"]
    for part in (*message.get("tool_calls", ()), *message.get("reasoning_details", ())):
        part.pop("id", None)
        part.pop("signature", None)
    return message


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "I begin."}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "long " * 300_000}],
    ],
)
def test_what_bedrock_refuses_is_refused(url: str, messages: list[dict[str, Any]]) -> None:
    assert kind(post(asked(url, messages=messages))) == "ValidationException"


def test_an_unknown_model_is_refused_as_bedrock_does(url: str) -> None:
    assert kind(post(asked(url, model="us.does-not-exist-v1"))) == "ValidationException"


@pytest.mark.parametrize(
    ("model", "inputs", "size"),
    [
        ("amazon.titan-embed-text-v2:0", ["a river"], 256),
        ("eu.cohere.embed-v4:0", ["a river", "stone"], 256),
        ("cohere.embed-english-v3", ["a river", "stone"], None),
    ],
)
def test_embeddings_are_answered(url: str, model: str, inputs: list[str], size: int | None) -> None:
    members = {"model": "a", "input": inputs} | ({"dimensions": size} if size else {})
    request = openai_embeddings.read(json.dumps(members).encode())
    response = post(BEDROCK.outgoing(request, at(url, model)))
    answer = BEDROCK.answer(response.content, request, STAMP, response.headers)
    vectors = [one["embedding"] for one in json.loads(answer.body)["data"]]
    assert [len(vector) for vector in vectors] == [size or 1024] * len(inputs)
    assert answer.usage is not None
    assert answer.usage.total == int(response.headers["x-amzn-bedrock-input-token-count"]) > 0


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"kind": "error_event", "after_chunks": 3}, VendorFailed),
        ({"kind": "error_event", "after_chunks": 3, "code": "throttlingException"}, VendorThrottled),
        ({"kind": "malformed", "after_chunks": 3}, VendorBroke),
    ],
)
def test_a_fault_in_mid_stream_is_an_error(url: str, fault: dict[str, Any], expected: type[VendorError]) -> None:
    put_fault(url, "bedrock", **fault)
    stream = stream_of(post(asked(url, stream=True)))
    assert type(stream.error) is expected
    assert stream.kinds == ("START", "CONTENT", "CONTENT")


@pytest.mark.parametrize("done", [True, False])
def test_an_empty_stream_is_unfinished(url: str, done: bool) -> None:
    put_fault(url, "bedrock", kind="empty", done=done)
    stream = stream_of(post(asked(url, stream=True)))
    assert not stream.finished


@pytest.mark.parametrize("fault", ["malformed", "error_event", "empty"])
def test_a_whole_answer_with_a_fault_is_broken(url: str, fault: str) -> None:
    put_fault(url, "bedrock", kind=fault)
    with pytest.raises(VendorBroke):
        BEDROCK.response(post(asked(url)).content, STAMP)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"kind": "throttle"}, "ThrottlingException"),
        ({"kind": "status", "status": 424}, "ModelErrorException"),
        ({"kind": "status", "status": 503}, "ServiceUnavailableException"),
        ({"kind": "status", "status": 500}, "InternalServerException"),
        ({"kind": "status", "status": 429, "code": "ModelNotReadyException"}, "ModelNotReadyException"),
    ],
)
def test_a_refusal_names_its_type(url: str, fault: dict[str, Any], expected: str) -> None:
    put_fault(url, "bedrock", **fault)
    assert post(asked(url)).headers["x-amzn-errortype"].startswith(expected + ":")


# --- recorded traffic -------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
NOT_SIMULATED = {
    "code_execution_tool": "tools that Bedrock runs itself",
    "citations": "citations",
    "guardrail": "the trace of a guardrail",
    "redacted": "reasoning that is hidden",
    "empty_text_delta": "an empty block of text first",
    "otel__": "answers of 2025, before `serverToolUsage`",
    "iter_stream": "answers of 2025, before `serverToolUsage`",
    "thinking_part_stream": "answers of 2025, before `serverToolUsage`",
    "anthropic_tool_with_thinking": "answers of 2025, before `serverToolUsage`",
}
CHATS = [
    one
    for one in (recordings.load(FOLDER) if FOLDER else [])
    if one.vendor == "bedrock"
    and "/converse" in one.request.uri
    and not any(part in one.file for part in NOT_SIMULATED)
]
GOOD = [one for one in CHATS if one.response.status == 200]


def replayed(url: str, exchange: Exchange) -> httpx.Response:
    """The simulator's answer to a recorded request, with as many calls as the vendor made."""
    request, path = exchange.request.json(), exchange.request.uri.partition(".com")[2]
    calls = exchange.response.body.count(b'"toolUseId"') if b"contentBlock" in exchange.response.body else 0
    if calls:
        request["messages"][-1]["content"].append({"text": f"tools={calls}"})
    body = json.dumps(request).encode()
    return post(Outgoing(f"{url}/bedrock{path}", (("content-type", "application/json"),), body))


def structure(value: Any) -> Any:
    """Names and types; a list's items count once where neighbours are alike."""
    if isinstance(value, dict):
        return {name: structure(inner) for name, inner in sorted(value.items())}
    if isinstance(value, list):
        return [item for item, _ in groupby(structure(inner) for inner in value)]
    return type(value).__name__


def events(body: bytes) -> list[Any]:
    """Headers and structure of each event in order, neighbours alike counted once."""
    buffer = EventStreamBuffer()
    buffer.add_data(body)
    found = [[event.headers, structure(json.loads(event.payload))] for event in buffer]
    return [event for event, _ in groupby(found)]


@needs_recordings
@pytest.mark.parametrize("exchange", GOOD, ids=lambda exchange: exchange.name)
def test_an_answer_is_built_like_the_recorded_one(url: str, exchange: Exchange) -> None:
    ours = replayed(url, exchange)
    assert ours.headers["content-type"] == exchange.response.header("content-type")
    if "eventstream" in ours.headers["content-type"]:
        assert events(ours.content) == events(exchange.response.body)
        return
    recorded, said = exchange.response.json(), ours.json()
    for answer in (recorded, said):  # how much is said differs: a tool, or text
        blocks = answer["output"]["message"].pop("content")
        assert {name for block in blocks for name in block} <= {"text", "toolUse"}
        answer["stopReason"] = ""
    assert structure(said) == structure(recorded)


@needs_recordings
@pytest.mark.parametrize(
    "exchange", [one for one in CHATS if one.response.status == 400], ids=lambda exchange: exchange.name
)
def test_an_error_is_built_like_the_recorded_one(url: str, exchange: Exchange) -> None:
    if b"MASSIVE_TEXT" in exchange.request.body:
        outgoing = asked(url, "long " * 300_000)
        answer = post(outgoing)
    else:
        answer = replayed(url, exchange)
    assert answer.status_code == exchange.response.status
    assert structure(answer.json()) == structure(exchange.response.json())
    recorded = exchange.response.header("x-amzn-errortype")
    assert recorded is None or answer.headers["x-amzn-errortype"] == recorded
