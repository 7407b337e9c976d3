"""The translator of AWS Bedrock: what it sends and signs, what it makes of any answer; and every recorded answer."""

from __future__ import annotations

import base64
import json
import os
import random
import sys
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.eventstream import EventStreamBuffer
from hypothesis import given
from hypothesis import strategies as st

from app.config import Credential, Secret
from app.core import Usage
from app.dialects import openai_chat, openai_embeddings
from app.errors import (
    InvalidRequest,
    VendorBroke,
    VendorCannot,
    VendorError,
    VendorFailed,
    VendorMisconfigured,
    VendorRefused,
    VendorThrottled,
)
from app.providers.bedrock import BEDROCK
from app.providers.bedrock.models import EFFORTS, has_json_schema
from app.providers.bedrock.signing import sign
from app.providers.translator import Answer, Outgoing
from tests import recordings
from tests.recordings import Exchange
from tests.translation import STAMP, StreamOutcome, event_stream, read_stream, sdk_answer, sdk_stream, target

CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
NOVA = "eu.amazon.nova-micro-v1:0"

# --- requests -------------------------------------------------------------------------------------------------------


def sent(model: str = CLAUDE, drop: set[str] | None = None, **members: Any) -> dict[str, Any]:
    """The body of the vendor's request."""
    asked = {"model": "a", "messages": [{"role": "user", "content": "hi"}]} | members
    at = msgspec.structs.replace(target("bedrock", model), drop_params=frozenset(drop or ()))
    return json.loads(BEDROCK.chat(openai_chat.read(json.dumps(asked).encode()), at).body)


def refused(model: str = CLAUDE, **members: Any) -> str | None:
    """The parameter that cannot be carried."""
    with pytest.raises(VendorCannot) as raised:
        sent(model, **members)
    return raised.value.param


@pytest.mark.parametrize(
    ("model", "quoted"),
    [
        (CLAUDE, "us.anthropic.claude-sonnet-4-5-20250929-v1%3A0"),
        (
            "arn:aws:bedrock:eu-west-1:1:application-inference-profile/x1",
            "arn%3Aaws%3Abedrock%3Aeu-west-1%3A1%3Aapplication-inference-profile%2Fx1",
        ),
        ("odd id?&#", "odd%20id%3F%26%23"),
    ],
)
@pytest.mark.parametrize(("streamed", "operation"), [(False, "converse"), (True, "converse-stream")])
def test_the_model_id_is_one_segment_of_the_path(model: str, quoted: str, streamed: bool, operation: str) -> None:
    asked = openai_chat.read(b'{"model":"a","messages":[],"stream":%b}' % (b"true" if streamed else b"false"))
    url = BEDROCK.chat(asked, target("bedrock", model)).url
    assert url == f"https://bedrock.example/v1/model/{quoted}/{operation}"


TOOLS = [{"type": "function", "function": {"name": "now"}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
CALLED = [
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
]


def test_messages_of_one_role_in_a_row_become_one() -> None:
    messages = sent(messages=[*CALLED, {"role": "user", "content": "And now?"}], tools=TOOLS)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [list(block) for block in messages[2]["content"]] == [["toolResult"], ["text"]]


def test_empty_text_is_left_out() -> None:
    parts = [{"type": "text", "text": ""}, {"type": "text", "text": "hi"}]
    assert sent(messages=[{"role": "user", "content": parts}])["messages"][0]["content"] == [{"text": "hi"}]
    assert sent(messages=CALLED, tools=TOOLS)["messages"][1]["content"][0]["toolUse"]["input"] == {}


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "none", "tools": TOOLS}])
def test_a_conversation_with_calls_is_refused_without_their_tools(choice: dict[str, Any]) -> None:
    assert refused(messages=CALLED, **choice) == ("tool_choice" if choice else "tools")


def test_documents_of_one_name_get_numbers() -> None:
    part = {"type": "file", "file": {"filename": "a/Invoice_№7.pdf", "file_data": "data:application/pdf;base64,JVBE"}}
    blocks = sent(messages=[{"role": "user", "content": [part, part, part]}])["messages"][0]["content"]
    assert [block["document"]["name"] for block in blocks] == ["Invoice 7", "Invoice 7 2", "Invoice 7 3"]


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "https://images.example/1.png"}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": "s3://bucket/1.png"}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AAAA"}}, "image_url"),
        ({"type": "file", "file": {"file_data": "data:application/zip;base64,AAAA"}}, "file.file_data"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "tape"}}, "input_audio.format"),
    ],
)
def test_what_bedrock_cannot_take_is_refused_by_its_place(part: dict[str, Any], param: str) -> None:
    assert refused(messages=[{"role": "user", "content": [part]}]) == f"messages[0].content[0].{param}"


SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "object", "properties": {}}}}


def test_a_schema_goes_to_a_model_without_structured_output_as_a_tool() -> None:
    config = sent(NOVA, response_format=SCHEMA)["toolConfig"]
    assert config["toolChoice"] == {"tool": {"name": "answer_in_json"}}
    assert config["tools"][0]["toolSpec"]["inputSchema"] == {"json": SCHEMA["json_schema"]["schema"]}


def test_beside_tools_a_schema_s_tool_is_one_that_the_model_may_choose() -> None:
    config = sent(NOVA, response_format=SCHEMA, tools=TOOLS)["toolConfig"]
    assert [tool["toolSpec"]["name"] for tool in config["tools"]] == ["now", "answer_in_json"]
    assert config["toolChoice"] == {"any": {}}


def test_the_name_of_the_schema_s_tool_is_not_a_client_s() -> None:
    tools = [*TOOLS, {"type": "function", "function": {"name": "answer_in_json"}}]
    assert refused(tools=tools) == "tools[1].function.name"


@pytest.mark.parametrize(
    ("model", "native"),
    [
        (CLAUDE, True),
        ("anthropic.claude-opus-4-6-v1", True),
        ("anthropic.claude-opus-5", True),
        ("openai.gpt-oss-120b-1:0", True),
        ("anthropic.claude-opus-4-1-20250805-v1:0", False),
        ("anthropic.claude-sonnet-4-20250514-v1:0", False),
        ("anthropic.claude-3-7-sonnet-20250219-v1:0", False),
        ("anthropic.claude-v2", False),
        (NOVA, False),
        ("arn:aws:bedrock:eu-west-1:1:application-inference-profile/x1", False),
    ],
)
def test_which_models_have_structured_output(model: str, native: bool) -> None:
    assert has_json_schema(model) is native
    assert ("outputConfig" in sent(model, response_format=SCHEMA)) is native


@pytest.mark.parametrize(
    ("model", "effort", "fields"),
    [
        ("anthropic.claude-3-7-sonnet-20250219-v1:0", "low", {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        ("anthropic.claude-sonnet-4-20250514-v1:0", "high", {"thinking": {"type": "enabled", "budget_tokens": 8000}}),
        (CLAUDE, "minimal", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        (CLAUDE, "none", None),
        (
            "global.anthropic.claude-opus-4-6-v1",
            "max",
            {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "max"}},
        ),
        ("us.amazon.nova-2-lite-v1:0", "low", {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "low"}}),
        ("us.amazon.nova-2-lite-v1:0", "none", None),
        ("openai.gpt-oss-20b-1:0", "high", {"reasoning_effort": "high"}),
        ("us.openai.gpt-5.6-sol", "none", {"reasoning": {"effort": "none"}}),
    ],
)
def test_effort_is_spelled_the_model_s_way(model: str, effort: str, fields: dict[str, Any] | None) -> None:
    asked = sent(model, reasoning_effort=effort, max_completion_tokens=10_000)
    assert asked.get("additionalModelRequestFields") == fields


def test_every_spelling_of_effort_is_in_use() -> None:
    models = ["openai.gpt-oss-1", "openai.gpt-5", "amazon.nova-2-lite", CLAUDE, "anthropic.claude-opus-5"]
    assert [next(e for e in EFFORTS if e.models.search(model)) for model in models] == list(EFFORTS)


@pytest.mark.parametrize(
    ("model", "members"),
    [
        (NOVA, {}),
        ("anthropic.claude-3-5-sonnet-20240620-v1:0", {}),
        (CLAUDE, {"max_tokens": 1024}),
        ("us.amazon.nova-2-lite-v1:0", {"reasoning_effort": "xhigh"}),
        ("anthropic.claude-opus-5", {"reasoning_effort": "minimal"}),
    ],
)
def test_effort_that_a_model_does_not_know_is_refused(model: str, members: dict[str, Any]) -> None:
    assert refused(model, **{"reasoning_effort": "low"} | members) == "reasoning_effort"


def test_a_claude_that_thinks_by_a_budget_is_not_forced_to_a_tool() -> None:
    assert refused(reasoning_effort="low", tools=TOOLS, tool_choice="required") == "tool_choice"
    old = "anthropic.claude-sonnet-4-20250514-v1:0"
    assert refused(old, reasoning_effort="low", response_format=SCHEMA) == "response_format"
    assert sent(reasoning_effort="low", tools=TOOLS, tool_choice="auto")["toolConfig"]["toolChoice"] == {"auto": {}}


def test_bedrock_s_own_members_pass_as_they_are() -> None:
    own = {"guardrailConfig": {"guardrailIdentifier": "g", "guardrailVersion": "1"}}
    own |= {"performanceConfig": {"latency": "optimized"}, "additionalModelRequestFields": {"top_k": 5}}
    asked = sent(reasoning_effort="low", **own)
    assert asked["additionalModelRequestFields"].keys() == {"thinking", "top_k"}
    assert {name: asked[name] for name in ("guardrailConfig", "performanceConfig")}.items() <= own.items()


def test_a_dropped_member_of_bedrock_s_own_is_not_sent() -> None:
    assert "guardrailConfig" not in sent(drop={"guardrailConfig", "seed"}, guardrailConfig={"x": 1}, seed=1)


@pytest.mark.parametrize(
    "members",
    [
        {"tool_choice": "required"},
        {"additionalModelRequestFields": [1]},
        {"response_format": {"type": "json_schema"}},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
                }
            ]
        },
    ],
)
def test_what_openai_would_refuse_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        sent(**members)


def test_hidden_reasoning_goes_back_as_bedrock_gave_it() -> None:
    blob = base64.b64encode(b"EtkECkgIBx").decode()
    whole = {"content": [{"reasoningContent": {"redactedContent": blob}}]}
    stamp = msgspec.structs.replace(STAMP, model=CLAUDE)
    body = {"output": {"message": whole}, "stopReason": "end_turn"}
    message = json.loads(BEDROCK.response(json.dumps(body).encode(), stamp).body)["choices"][0]["message"]
    assert message["reasoning_details"][0]["data"] == "EtkECkgIBx"  # Anthropic's own form
    returned = sent(messages=[{"role": "assistant", "reasoning_details": message["reasoning_details"]}])
    assert returned["messages"] == [whole | {"role": "assistant"}]


# --- signatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "session-token"])
def test_a_signature_is_botocore_s_own_for_that_second(token: str | None) -> None:
    url = "https://bedrock-runtime.eu-central-1.amazonaws.com/model/eu.amazon.nova-micro-v1%3A0/converse"
    headers, body = {"content-type": "application/json", "accept": "application/json"}, b'{"messages":[]}'
    request = AWSRequest("POST", url, dict(headers), body)
    SigV4Auth(Credentials("AKIDEXAMPLE", "secret", token), "bedrock", "eu-central-1").add_auth(request)
    at = datetime.strptime(request.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    credential = Credential(Secret("secret"), "AKIDEXAMPLE", Secret(token) if token else None, "eu-central-1")
    signed = dict(sign(Outgoing(url, tuple(headers.items()), body), credential, at + 0.75).headers)
    assert signed["authorization"] == request.headers["Authorization"]
    assert signed.get("x-amz-security-token") == token


def test_a_bedrock_api_key_is_a_bearer_token() -> None:
    outgoing = Outgoing("https://bedrock.example/x", (("accept", "a/b"),), b"{}")
    signed = sign(outgoing, Credential(Secret("ABSK-key")), 0.0)
    assert signed.headers == (("accept", "a/b"), ("authorization", "Bearer ABSK-key"))


@pytest.mark.parametrize("missing", ["botocore.auth", "botocore.eventstream"])
def test_without_botocore_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    credential = Credential(Secret("secret"), "AKIDEXAMPLE", None, "eu-central-1")
    with pytest.raises(VendorMisconfigured, match=r"llm-gateway\[bedrock\]"):
        sign(Outgoing("https://x/", (), b""), credential, 0.0) if "auth" in missing else BEDROCK.stream(STAMP)


# --- answers ----------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3)
ARGUMENTS = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2)
BLOCKS = st.one_of(
    st.tuples(st.just("text"), TEXTS),
    st.tuples(st.just("reasoning"), TEXTS, st.none() | st.just("c2lnbmVk")),
    st.tuples(st.just("redacted"), st.just("aGlkZGVu")),
    st.tuples(st.just("call"), st.sampled_from(["now", "order_status"]), ARGUMENTS),
)


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    """The facts of one answer, to be written whole or streamed."""
    blocks = draw(st.lists(BLOCKS, min_size=1, max_size=4))
    calls = any(block[0] == "call" for block in blocks)
    stop = "tool_use" if calls else draw(st.sampled_from(["end_turn", "max_tokens", "guardrail_intervened"]))
    count = st.integers(0, 999)
    names = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")
    return {"blocks": blocks, "stop": stop, "usage": {name: draw(count) for name in names}}


def whole(answer: dict[str, Any]) -> bytes:
    blocks = []
    for place, block in enumerate(answer["blocks"]):
        match block:
            case "text", texts:
                blocks.append({"text": "".join(texts)})
            case "reasoning", texts, signature:
                signed = {} if signature is None else {"signature": signature}
                blocks.append({"reasoningContent": {"reasoningText": {"text": "".join(texts)} | signed}})
            case "redacted", blob:
                blocks.append({"reasoningContent": {"redactedContent": blob}})
            case "call", name, arguments:
                blocks.append({"toolUse": {"toolUseId": f"tooluse_{place}", "name": name, "input": arguments}})
    message = {"role": "assistant", "content": blocks}
    return msgspec.json.encode({"output": {"message": message}, "stopReason": answer["stop"], "usage": answer["usage"]})


def streamed(answer: dict[str, Any]) -> bytes:
    lines = ['messageStart {"role":"assistant"}']

    def event(kind: str, **members: Any) -> None:
        lines.append(f"{kind} {msgspec.json.encode(members).decode()}")

    for place, block in enumerate(answer["blocks"]):
        deltas: list[dict[str, Any]] = []
        match block:
            case "text", texts:
                deltas = [{"text": text} for text in texts]
            case "reasoning", texts, signature:
                deltas = [{"reasoningContent": {"text": text}} for text in texts]
                deltas += [] if signature is None else [{"reasoningContent": {"signature": signature}}]
            case "redacted", blob:
                deltas = [{"reasoningContent": {"redactedContent": blob}}]
            case "call", name, arguments:
                use = {"toolUse": {"toolUseId": f"tooluse_{place}", "name": name}}
                event("contentBlockStart", contentBlockIndex=place, start=use)
                written = msgspec.json.encode(arguments).decode() if arguments else ""
                deltas = [{"toolUse": {"input": written[:3]}}, {"toolUse": {"input": written[3:]}}]
        for delta in deltas:
            event("contentBlockDelta", contentBlockIndex=place, delta=delta, p="abc")
        event("contentBlockStop", contentBlockIndex=place)
    event("messageStop", stopReason=answer["stop"])
    event("metadata", usage=answer["usage"], metrics={"latencyMs": 1})
    return event_stream("\n".join(lines))


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(ends)]


def read(data: bytes, places: list[int] | None = None) -> StreamOutcome:
    return read_stream(BEDROCK, pieces(data, places or []))


@given(answers(), st.lists(st.integers(0), max_size=20))
def test_a_streamed_answer_folds_to_the_whole_one(answer: dict[str, Any], places: list[int]) -> None:
    unary, stream = BEDROCK.response(whole(answer), STAMP), read(streamed(answer), places)
    assert stream.error is None
    assert (stream.usage, stream.finish_reason) == (unary.usage, unary.finish_reason)
    assert sdk_stream(stream.frames) == sdk_answer(unary.body)
    assert stream.kinds[-2:] == ("USAGE", "DONE")


@given(answers(), st.lists(st.integers(0), max_size=20))
def test_any_split_of_the_bytes_gives_the_same_frames(answer: dict[str, Any], places: list[int]) -> None:
    data = streamed(answer)
    assert read(data, places) == read(data)


@given(answers())
def test_usage_classes_sum_to_what_the_vendor_counts(answer: dict[str, Any]) -> None:
    usage = BEDROCK.response(whole(answer), STAMP).usage
    assert usage is not None
    assert usage.total == sum(answer["usage"].values())
    assert usage.cache_read == answer["usage"]["cacheReadInputTokens"]


def test_the_service_tier_is_the_vendor_s_word() -> None:
    body = b'{"output":{"message":{"content":[]}},"stopReason":"end_turn","serviceTier":{"type":"flex"}}'
    assert BEDROCK.response(body, STAMP).service_tier == "flex"
    reader = BEDROCK.stream(STAMP)
    list(reader.feed(event_stream('metadata {"serviceTier":{"type":"flex"}}')))
    assert reader.service_tier == "flex"


@given(answers(), st.integers(0))
def test_a_cut_stream_is_unfinished_until_the_vendor_said_why_it_stopped(answer: dict[str, Any], end: int) -> None:
    data = streamed(answer)
    prefix = data[: end % (len(data) + 1)]
    stream = read(prefix)
    events = EventStreamBuffer()
    events.add_data(prefix)
    assert stream.error is None
    assert stream.finished == any(event.headers[":event-type"] == "messageStop" for event in events)


@given(answers(), st.data())
def test_mutated_bytes_of_a_stream_raise_only_vendor_errors(answer: dict[str, Any], data: st.DataObject) -> None:
    mutated = read(mutate(streamed(answer), data))
    assert mutated.error is None or isinstance(mutated.error, VendorBroke)


@given(answers(), st.data())
def test_mutated_bytes_of_an_answer_raise_only_vendor_errors(answer: dict[str, Any], data: st.DataObject) -> None:
    raises_only_vendor_errors(mutate(whole(answer), data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = st.sampled_from(["contentBlockIndex", "delta", "start", "stopReason", "usage", "trace", "text", "toolUse"])
EVENTS = st.sampled_from(
    ["messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop", "metadata", "x", "!x"]
)


@given(st.lists(st.tuples(EVENTS, st.dictionaries(MEMBERS, JSON | st.dictionaries(MEMBERS, JSON)) | JSON)))
def test_events_of_any_content_raise_only_vendor_errors(events: list[tuple[str, Any]]) -> None:
    read(event_stream("\n".join(f"{kind} {json.dumps(members)}" for kind, members in events)))


@given(st.binary() | JSON.map(msgspec.json.encode))
def test_an_answer_of_any_bytes_raises_only_vendor_errors(body: bytes) -> None:
    raises_only_vendor_errors(body)
    read(body)
    assert isinstance(BEDROCK.error(400, {}, body), VendorRefused)


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@pytest.mark.parametrize("body", [DEEP, b"[" * 100_000, b'{"output":{"message":{"content":' + DEEP + b"}}}"])
def test_deep_nesting_raises_only_vendor_errors(body: bytes) -> None:
    raises_only_vendor_errors(body)
    assert isinstance(read(event_stream(f"metadata {body.decode()}")).error, VendorBroke)
    assert isinstance(BEDROCK.error(500, {}, body), VendorError)


def test_an_event_without_end_breaks_the_stream() -> None:
    huge = event_stream(f'contentBlockDelta {{"delta":{{"text":"{"x" * 5_000_000}"}}}}')
    assert isinstance(read(huge[:-1], list(range(0, len(huge), 65_536))).error, VendorBroke)


def raises_only_vendor_errors(body: bytes) -> None:
    try:
        BEDROCK.response(body, STAMP)
    except VendorError:
        return


def mutate(data: bytes, draw: st.DataObject) -> bytes:
    place = draw.draw(st.integers(0, len(data) - 1))
    length = draw.draw(st.integers(0, 4))
    return data[:place] + draw.draw(st.binary(max_size=4)) + data[place + length :]


# --- embeddings -------------------------------------------------------------------------------------------------------


def embed(model: str, **members: Any) -> dict[str, Any]:
    asked = openai_embeddings.read(json.dumps({"model": "a", "input": ["a", "b"]} | members).encode())
    return json.loads(BEDROCK.outgoing(asked, target("bedrock", model)).body)


def test_cohere_takes_many_texts_and_is_told_what_they_are_for() -> None:
    assert embed("cohere.embed-multilingual-v3") == {"texts": ["a", "b"], "input_type": "search_document"}
    asked = embed("eu.cohere.embed-v4:0", dimensions=256, input_type="search_query")
    assert asked == {"texts": ["a", "b"], "input_type": "search_query", "output_dimension": 256}


@pytest.mark.parametrize(
    ("model", "members", "param"),
    [
        ("amazon.titan-embed-text-v2:0", {}, "input"),
        ("amazon.titan-embed-text-v2:0", {"input": [1, 2]}, "input"),
        ("cohere.embed-english-v3", {"dimensions": 256}, "dimensions"),
        (NOVA, {}, "model"),
    ],
)
def test_embeddings_that_a_model_cannot_make_are_refused(model: str, members: dict[str, Any], param: str) -> None:
    with pytest.raises(VendorCannot) as raised:
        embed(model, **members)
    assert raised.value.param == param


def embedded(body: dict[str, Any], headers: dict[str, str], texts: list[str]) -> Answer:
    asked = openai_embeddings.read(json.dumps({"model": "a", "input": texts}).encode())
    return BEDROCK.answer(json.dumps(body).encode(), asked, STAMP, headers)


@pytest.mark.parametrize(
    ("headers", "tokens"),
    [
        ({"x-amzn-bedrock-input-token-count": "7"}, 7),
        ({"x-amzn-bedrock-input-token-count": "many"}, None),
        ({"x-amzn-bedrock-input-token-count": "99999999999"}, None),
        ({}, None),
    ],
)
def test_the_tokens_of_an_embedding_may_stand_in_a_header(headers: dict[str, str], tokens: int | None) -> None:
    answer = embedded({"embeddings": [[0.5], [1.0]], "response_type": "embeddings_floats"}, headers, ["a", "b"])
    assert answer.usage == (None if tokens is None else Usage(embedding=tokens))


TOO_LONG = "Input is too long for requested model."


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        (TOO_LONG, 400, "context_length_exceeded"),
        (TOO_LONG.rstrip("."), 400, "context_length_exceeded"),
        (TOO_LONG, 413, "context_length_exceeded"),
        (f"Your prompt says: {TOO_LONG}", 400, "ValidationException"),
        (f"{TOO_LONG} Or not.", 400, "ValidationException"),
        ("Malformed input request: it is too long.", 400, "ValidationException"),
        ("", 400, "ValidationException"),
    ],
)
def test_only_the_whole_sentence_for_a_full_context_has_the_code_that_apps_know(
    message: str, status: int, code: str
) -> None:
    named = {"x-amzn-errortype": "ValidationException:http://internal.amazon.com/coral/"}
    error = BEDROCK.error(status, named, msgspec.json.encode({"message": message}))
    assert (type(error), error.vendor_code) == (VendorRefused, code)
    assert str(error) == (message or f"The vendor refused the request with status {status}.")


@pytest.mark.parametrize(
    ("kind", "status", "type_"),
    [
        ("ThrottlingException", 400, VendorThrottled),
        ("ModelErrorException", 424, VendorFailed),
        ("AccessDeniedException", 400, VendorMisconfigured),
        ("ValidationException", 503, VendorFailed),
    ],
)
def test_status_and_type_go_before_the_sentence_for_a_full_context(
    kind: str, status: int, type_: type[VendorError]
) -> None:
    error = BEDROCK.error(status, {"x-amzn-errortype": kind}, msgspec.json.encode({"message": TOO_LONG}))
    assert (type(error), error.vendor_code) == (type_, kind)


def test_a_full_context_that_is_found_inside_a_stream_has_the_code_too() -> None:
    error = read(event_stream("!validationException " + json.dumps({"message": TOO_LONG}))).error
    assert (type(error), error.vendor_code) == (VendorRefused, "context_length_exceeded")


# --- recorded traffic -------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
EXCHANGES = [one for one in (recordings.load(FOLDER) if FOLDER else []) if one.vendor == "bedrock"]
CHATS = [one for one in EXCHANGES if "/converse" in one.request.uri]
GOOD = [one for one in CHATS if one.response.status == 200]
UNARY = [one for one in GOOD if one.request.uri.endswith("/converse")]
STREAMS = [one for one in GOOD if one.request.uri.endswith("/converse-stream")]
FAILED = [one for one in CHATS if one.response.status != 200]
EMBEDDED = [one for one in EXCHANGES if one.request.uri.endswith("/invoke")]


def recorded(exchanges: list[Exchange]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


def events_of(exchange: Exchange) -> list[dict[str, Any]]:
    events = EventStreamBuffer()
    events.add_data(exchange.response.body)
    return [json.loads(event.payload) for event in events]


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every plain value under a name, the order kept."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, key)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner, name)]
    return [(name, value)]


def said(blocks: list[Any]) -> dict[str, str]:
    """What the vendor's blocks or deltas say, joined by kind; what its own tools did is not for the client."""
    found = {"content": "", "reasoning_content": "", "signature": "", "data": "", "name": "", "arguments": ""}
    served: set[int] = set()
    for block in blocks:
        inner = block.get("delta") or block.get("start") or block
        reasoning, use = inner.get("reasoningContent", {}), inner.get("toolUse", {})
        if use.get("type") == "server_tool_use":
            served.add(block.get("contentBlockIndex", -1))
        elif use and block.get("contentBlockIndex") not in served:
            found["name"] += use.get("name", "")
            arguments = use.get("input", "")
            found["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        found["content"] += inner.get("text", "")
        text = reasoning.get("reasoningText", reasoning)
        found["reasoning_content"] += text.get("text", "")
        found["signature"] += text.get("signature", "")
        found["data"] += reasoning.get("redactedContent", "")
    return found


def kept(message: dict[str, Any]) -> dict[str, str]:
    found = dict.fromkeys(["content", "reasoning_content", "signature", "data", "name", "arguments"], "")
    for name, value in leaves(message):
        if name in found and value:
            found[name] += value
    found["arguments"] = "".join(call["function"]["arguments"] for call in message.get("tool_calls", []))
    return found


def same(ours: dict[str, str], vendor_s: dict[str, str]) -> None:
    squeezed = [found | {"arguments": "".join(found["arguments"].split())} for found in (ours, vendor_s)]
    assert squeezed[0] == squeezed[1]


def same_usage(usage: Usage | None, vendor_s: dict[str, int]) -> None:
    assert usage is not None
    assert usage.total == vendor_s["totalTokens"]
    assert (usage.input, usage.output) == (vendor_s["inputTokens"], vendor_s["outputTokens"])
    assert usage.cache_read == vendor_s.get("cacheReadInputTokens", 0)
    assert usage.cache_write == vendor_s.get("cacheWriteInputTokens", 0)


@needs_recordings
@recorded(UNARY)
def test_of_a_recorded_answer_nothing_is_lost(exchange: Exchange) -> None:
    vendor_s = exchange.response.json()
    answer = BEDROCK.response(exchange.response.body, STAMP)
    same(kept(sdk_answer(answer.body)["choices"][0]["message"]), said(vendor_s["output"]["message"]["content"]))
    same_usage(answer.usage, vendor_s["usage"])


@needs_recordings
@recorded(STREAMS)
def test_of_a_recorded_stream_nothing_is_lost_wherever_it_is_cut(exchange: Exchange) -> None:
    events, body = events_of(exchange), exchange.response.body
    chance = random.Random(exchange.name)
    for places in ([], range(len(body)), [chance.randrange(len(body)) for _ in range(40)]):
        stream = read(body, list(places))
        assert stream.error is None
        assert stream.kinds[-1] == "DONE"
        message = json.loads(json.dumps(sdk_stream(stream.frames)))["choices"][0]["message"]
        citations = [event["delta"]["citation"] for event in events if "citation" in event.get("delta", {})]
        cited = [annotation["document_citation"] for annotation in message.pop("annotations", [])]
        assert cited == citations
        same(kept(message), said(events))
        same_usage(stream.usage, events[-1]["usage"])


@needs_recordings
@recorded(FAILED)
def test_a_recorded_error_is_classed_and_keeps_the_vendor_s_words(exchange: Exchange) -> None:
    headers = {name: values[0] for name, values in exchange.response.headers.items()}
    error = BEDROCK.error(exchange.response.status, headers, exchange.response.body)
    assert type(error) is {400: VendorRefused, 403: VendorMisconfigured}[exchange.response.status]
    if isinstance(error, VendorRefused):
        assert error.message == exchange.response.json()["message"]


@needs_recordings
@recorded(EMBEDDED)
def test_a_recorded_embedding_is_read(exchange: Exchange) -> None:
    vendor_s = exchange.response.json()
    answer = embedded(vendor_s, {}, ["a"])
    assert json.loads(answer.body)["data"][0]["embedding"] == vendor_s["embedding"]
    counted = int(exchange.response.header("x-amzn-bedrock-input-token-count") or 0)
    assert answer.usage == Usage(embedding=counted)
