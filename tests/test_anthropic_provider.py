"""The translator of Anthropic's Messages: what a request becomes, what any answer becomes; and every recorded one."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import Usage
from app.dialects import openai_chat
from app.errors import InvalidRequest, VendorBroke, VendorCannot, VendorError, VendorMisconfigured, VendorRefused
from app.providers.anthropic import ANTHROPIC
from app.providers.anthropic.answer import FINISH_REASONS
from tests import recordings
from tests.recordings import Exchange
from tests.translation import STAMP, StreamOutcome, read_stream, sdk_answer, sdk_stream, target

ASK = {"role": "user", "content": "Where is order 7?"}
CALL = {"id": "call_7", "type": "function", "function": {"name": "order_status", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "order_status", "parameters": {"type": "object"}}}
BAD_CALL = {"id": "call_7", "type": "function", "function": {"name": "order_status", "arguments": "[1"}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://images.example/a.png"}}
M = "claude-sonnet-4-6"
BUDGET_MODELS = [
    "claude-3-7-sonnet-20250219",
    "claude-sonnet-4-20250514",
    "claude-opus-4-1",
    "claude-haiku-4-5-20251001",
]
ADAPTIVE_MODELS = ["claude-sonnet-4-6", "claude-opus-4-7", "claude-opus-5-20260601", "claude-mythos-preview"]


def sent(model: str = M, **members: Any) -> dict[str, Any]:
    request = openai_chat.read(json.dumps({"model": "alias", "messages": [ASK], **members}).encode())
    return json.loads(ANTHROPIC.chat(request, target("anthropic", model)).body)


def file(data: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "file", "file": {"file_data": data}}]}


def refused(model: str = M, **members: Any) -> str | None:
    """The parameter that the refusal names."""
    with pytest.raises(VendorCannot) as refusal:
        sent(model, **members)
    return refusal.value.param


# --- requests: thinking, sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", BUDGET_MODELS)
def test_effort_is_a_share_of_the_answer_s_length_at_models_that_think_by_a_budget(model: str) -> None:
    body = sent(model, reasoning_effort="medium", max_completion_tokens=10_000)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 5_000}
    assert "output_config" not in body


@pytest.mark.parametrize("model", ADAPTIVE_MODELS)
def test_effort_is_the_vendor_s_own_word_at_models_that_think_as_they_need(model: str) -> None:
    body = sent(model, reasoning_effort="xhigh")
    assert body["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert body["output_config"] == {"effort": "xhigh"}


def test_effort_and_schema_share_the_output_configuration() -> None:
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = sent(reasoning_effort="low", response_format=form)
    assert body["output_config"] == {"effort": "low", "format": {"type": "json_schema", "schema": schema}}


def test_a_budget_is_never_below_the_vendor_s_least() -> None:
    body = sent("claude-sonnet-4-5", reasoning_effort="minimal", max_tokens=1_025)
    assert body["thinking"]["budget_tokens"] == 1_024


@given(st.sampled_from(["minimal", "low", "medium", "high", "xhigh"]), st.integers(1_025, 200_000))
def test_a_budget_leaves_room_for_an_answer(effort: str, length: int) -> None:
    body = sent("claude-sonnet-4-5", reasoning_effort=effort, max_tokens=length)
    assert 1_024 <= body["thinking"]["budget_tokens"] < length


@pytest.mark.parametrize(
    ("model", "members"),
    [
        ("claude-3-5-haiku-20241022", {"reasoning_effort": "low"}),
        ("claude-sonnet-4-5", {"reasoning_effort": "low", "max_tokens": 1_024}),
        ("claude-sonnet-4-5", {"reasoning_effort": "enormous"}),
        ("claude-opus-4-7", {"reasoning_effort": "minimal"}),
        ("claude-sonnet-4-5", {
            "reasoning_effort": "low",
            "messages": [ASK, {"role": "assistant", "tool_calls": [CALL]},
                         {"role": "tool", "tool_call_id": "call_7", "content": "sent"}],
        }),
    ],
)  # fmt: skip
def test_reasoning_that_the_model_cannot_do_as_asked_is_refused(model: str, members: dict[str, Any]) -> None:
    assert refused(model, **members) == "reasoning_effort"


def test_a_model_without_thinking_takes_none() -> None:
    assert "thinking" not in sent("claude-3-5-haiku-20241022", reasoning_effort="none")


@pytest.mark.parametrize(
    ("model", "members", "param"),
    [
        ("claude-opus-4-7", {"temperature": 0.2}, "temperature"),
        ("claude-opus-4-7", {"top_p": 0.9}, "top_p"),
        ("claude-sonnet-4-5", {"temperature": 0.2, "reasoning_effort": "low"}, "temperature"),
        ("claude-sonnet-4-5", {"top_p": 0.5, "reasoning_effort": "low"}, "top_p"),
        ("claude-sonnet-4-5", {"tools": [TOOL], "tool_choice": "required", "reasoning_effort": "low"}, "tool_choice"),
        (M, {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        (M, {"messages": [{"role": "system", "content": [IMAGE]}, ASK]}, "messages[0].content"),
        (M, {"messages": [ASK, {"role": "tool", "content": "sent"}]}, "messages[1].tool_call_id"),
        (M, {"messages": [file("data:video/mp4;base64,AAAA")]}, "messages[0].content[0].file.file_data"),
        (M, {"messages": [file("data:text/plain;base64,/w==")]}, "messages[0].content[0].file.file_data"),
        (M, {"messages": [ASK, {"role": "assistant", "tool_calls": [BAD_CALL]}]},
         "messages[1].tool_calls[0].function.arguments"),
        (M, {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
         "tools[0].function.parameters"),
    ],
)  # fmt: skip
def test_what_has_no_place_there_is_refused_by_its_name(model: str, members: dict[str, Any], param: str) -> None:
    assert refused(model, **members) == param


def test_the_length_is_the_target_s_where_the_request_names_none() -> None:
    at = msgspec.structs.replace(target("anthropic"), max_output_tokens=64_000)
    body = json.loads(ANTHROPIC.chat(openai_chat.read(b'{"model":"a","messages":[]}'), at).body)
    assert body["max_tokens"] == 64_000


def test_a_dropped_parameter_is_not_sent_and_not_refused() -> None:
    at = msgspec.structs.replace(target("anthropic"), drop_params=frozenset({"seed", "temperature"}))
    request = openai_chat.read(b'{"model":"a","messages":[],"seed":7,"temperature":1.5}')
    assert set(json.loads(ANTHROPIC.chat(request, at).body)) == {"model", "max_tokens", "messages"}


def test_the_key_goes_into_the_vendor_s_own_header() -> None:
    at = target("anthropic")
    unsigned = ANTHROPIC.chat(openai_chat.read(b'{"model":"a","messages":[]}'), at)
    signed = ANTHROPIC.sign(unsigned, at.provider.credential, 0.0)
    assert set(signed.headers) - set(unsigned.headers) == {("x-api-key", "vendor-key")}


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_ids_of_calls_fit_the_vendor_s_alphabet_and_still_tie_results_to_calls(one: str, other: str) -> None:
    calls = [{**CALL, "id": one}, {**CALL, "id": other}]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in calls]
    try:
        body = sent(messages=[ASK, {"role": "assistant", "tool_calls": calls}, *results])
    except InvalidRequest:  # lone surrogates
        return
    ids = [block["id"] for block in body["messages"][1]["content"]]
    assert ids == [block["tool_use_id"] for block in body["messages"][2]["content"]]
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for name in ids)


def test_a_stream_s_reasoning_collected_in_pieces_goes_back_whole() -> None:
    details = [
        {"type": "reasoning.text", "text": "", "format": "anthropic-claude-v1", "index": 0},
        {"type": "reasoning.text", "text": "Look ", "index": 0},
        {"type": "reasoning.text", "text": "it up.", "index": 0},
        {"type": "reasoning.text", "signature": "c2ln", "index": 0},
    ]
    body = sent(messages=[ASK, {"role": "assistant", "content": "Sent.", "reasoning_details": details}])
    thought = {"type": "thinking", "thinking": "Look it up.", "signature": "c2ln"}
    assert body["messages"][1]["content"] == [thought, {"type": "text", "text": "Sent."}]


# --- answers ----------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
COUNTS = st.integers(0, 999)
STARTS = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    match draw(st.sampled_from(["text", "thinking", "redacted_thinking", "tool_use", "server_tool_use"])):
        case "text":
            return {"type": "text", "text": "".join(draw(st.lists(WORDS, min_size=1, max_size=3)))}
        case "thinking":
            return {"type": "thinking", "thinking": draw(WORDS), "signature": draw(WORDS)}
        case "redacted_thinking":
            return {"type": "redacted_thinking", "data": draw(WORDS)}
        case kind:
            arguments = draw(st.dictionaries(WORDS, WORDS, max_size=2))
            return {"type": kind, "id": "toolu_" + draw(WORDS), "name": draw(WORDS), "input": arguments}


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    thought, hour, minutes = draw(COUNTS), draw(COUNTS), draw(COUNTS)
    reason = draw(st.sampled_from(sorted(FINISH_REASONS)))
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-6",
        "content": draw(st.lists(blocks(), max_size=4)),
        "stop_reason": reason,
        "stop_sequence": None,
        "stop_details": {"type": "refusal", "explanation": draw(WORDS)} if reason == "refusal" else None,
        "usage": {
            "input_tokens": draw(COUNTS),
            "cache_creation_input_tokens": minutes + hour,
            "cache_read_input_tokens": draw(COUNTS),
            "cache_creation": {"ephemeral_5m_input_tokens": minutes, "ephemeral_1h_input_tokens": hour},
            "output_tokens": thought + draw(COUNTS),
            "output_tokens_details": {"thinking_tokens": thought},
            "service_tier": draw(st.sampled_from(["standard", "priority"])),
        },
    }


def written(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def streamed(answer: dict[str, Any]) -> bytes:
    """The answer as the vendor streams it: padding inside the objects, pings between the events."""
    events: list[dict[str, Any]] = []
    usage = answer["usage"]
    told = {name: usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")}
    start = told | {name: usage[name] for name in ("cache_creation", "service_tier")} | {"output_tokens": 1}
    opening = answer | {"content": [], "stop_reason": None, "stop_details": None, "usage": start}
    events.append({"type": "message_start", "message": opening})
    for index, block in enumerate(answer["content"]):
        kind = block["type"]
        bare = STARTS.get(kind) or (block | {"input": {}} if "input" in block else block)
        events.append({"type": "content_block_start", "index": index, "content_block": bare})
        events.append({"type": "ping"})
        for delta in deltas(block):
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": answer["stop_reason"], "stop_sequence": None, "stop_details": answer["stop_details"]}
    last = told | {"output_tokens": usage["output_tokens"], "output_tokens_details": usage["output_tokens_details"]}
    events += [{"type": "message_delta", "delta": delta, "usage": last}, {"type": "message_stop"}]
    frames = [f"event: {event['type']}\ndata: ".encode() + written(event)[:-1] + b"   }\n\n" for event in events]
    return b"".join(frames)


def deltas(block: dict[str, Any]) -> list[dict[str, Any]]:
    if block["type"] == "text":
        return [{"type": "text_delta", "text": part} for part in halves(block["text"])]
    if block["type"] == "thinking":
        parts = [{"type": "thinking_delta", "thinking": part} for part in halves(block["thinking"])]
        return [*parts, {"type": "signature_delta", "signature": block["signature"]}]
    if "input" in block:
        text = written(block["input"]).decode() if block["input"] else ""
        return [{"type": "input_json_delta", "partial_json": part} for part in ("", *halves(text))]
    return []


def halves(text: str) -> list[str]:
    return [text[: len(text) // 2], text[len(text) // 2 :]]


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    cuts = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(cuts)]


def read(data: bytes, places: list[int] | None = None) -> StreamOutcome:
    return read_stream(ANTHROPIC, pieces(data, places or []))


@given(answers())
def test_a_folded_stream_equals_the_unary_answer(answer: dict[str, Any]) -> None:
    whole = ANTHROPIC.response(written(answer), STAMP)
    stream = read(streamed(answer))
    assert sdk_stream(stream.frames) == sdk_answer(whole.body)
    assert (stream.usage, stream.finish_reason, stream.model) == (whole.usage, whole.finish_reason, whole.model)
    assert (stream.kinds[0], stream.kinds[-2:]) == ("START", ("USAGE", "DONE"))


@given(answers())
def test_the_prompt_s_tokens_are_known_from_the_first_event_on(answer: dict[str, Any]) -> None:
    data = streamed(answer)
    reader = ANTHROPIC.stream(STAMP)
    list(reader.feed(data[: data.index(b"\n\n") + 2]))
    whole = ANTHROPIC.response(written(answer), STAMP).usage
    assert whole is not None
    assert reader.prompt == msgspec.structs.replace(whole, output=0, reasoning=0)


@given(answers())
def test_the_service_tier_is_told_by_both(answer: dict[str, Any]) -> None:
    reader = ANTHROPIC.stream(STAMP)
    list(reader.feed(streamed(answer)))
    whole = ANTHROPIC.response(written(answer), STAMP)
    assert reader.service_tier == whole.service_tier == answer["usage"]["service_tier"]


@given(answers(), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_of_a_stream_gives_the_same_frames(answer: dict[str, Any], places: list[int]) -> None:
    data = streamed(answer)
    assert read(data, places) == read(data)


@given(answers(), st.integers(0, 10_000))
def test_any_prefix_of_a_stream_is_read_without_error_and_is_finished_only_with_its_reason(
    answer: dict[str, Any], place: int
) -> None:
    data = streamed(answer)
    outcome = read(data[: place % len(data)])
    assert outcome.error is None
    assert outcome.finished == (outcome.finish_reason is not None) == ("DONE" in outcome.kinds)


@given(answers(), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_mutated_bytes_raise_only_our_errors(answer: dict[str, Any], place: int, noise: bytes) -> None:
    for data, made in ((streamed(answer), read), (written(answer), lambda body: ANTHROPIC.response(body, STAMP))):
        at = place % len(data)
        try:
            made(data[:at] + noise + data[at + len(noise) :])
        except VendorError:
            continue


@given(answers())
def test_usage_classes_sum_to_the_vendor_s_total(answer: dict[str, Any]) -> None:
    usage = answer["usage"]
    found = ANTHROPIC.response(written(answer), STAMP).usage
    assert found is not None
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert found.total_input == sum(usage[name] for name in names)
    assert found.cache_write_1h == usage["cache_creation"]["ephemeral_1h_input_tokens"]
    assert found.reasoning == usage["output_tokens_details"]["thinking_tokens"]
    assert found.total_output == usage["output_tokens"]


def test_a_stream_that_ends_after_its_reason_gets_the_end_that_it_lacks() -> None:
    answer = {"content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn", "stop_details": None}
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 2}
    untold = dict.fromkeys(("cache_creation", "output_tokens_details", "service_tier"))
    data = streamed(answer | {"usage": usage | untold})
    reader = ANTHROPIC.stream(STAMP)
    for _ in reader.feed(data[: data.index(b"event: message_stop")]):
        pass
    assert reader.finished
    assert [kind.name for kind, _ in reader.end()] == ["CONTENT", "USAGE", "DONE"]


def test_an_event_without_end_is_broken() -> None:
    with pytest.raises(VendorBroke):
        list(ANTHROPIC.stream(STAMP).feed(b"data: {" + b" " * 5_000_000))


# --- every recorded answer --------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
MESSAGES = [
    exchange
    for exchange in (recordings.load(FOLDER) if FOLDER else [])
    if exchange.vendor == "anthropic" and exchange.request.uri.partition("?")[0].endswith("/v1/messages")
]
STREAMED = [exchange for exchange in MESSAGES if exchange.response.streamed]
WHOLE = [exchange for exchange in MESSAGES if exchange.response.status == 200 and not exchange.response.streamed]
FAILED = [exchange for exchange in MESSAGES if exchange.response.status != 200]
ERRORS = {400: VendorRefused, 401: VendorMisconfigured, 404: VendorMisconfigured}


def each(exchanges: list[Exchange]) -> Any:
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


def total(usage: dict[str, Any]) -> int:
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    return sum(usage[name] for name in names)


def folded(exchange: Exchange) -> dict[str, Any]:
    """The recorded stream as the message that it makes, folded here and not by the translator."""
    events = [json.loads(data) for data in exchange.response.events()]
    message = next(event["message"] for event in events if event["type"] == "message_start")
    for event in events:
        if event["type"] == "content_block_start":
            message["content"].append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            block = message["content"][event["index"]]
            for name, member in (("text", "text"), ("thinking", "thinking"), ("signature", "signature"),
                                 ("partial_json", "json")):  # fmt: skip
                if name in event["delta"]:
                    block[member] = block.get(member, "") + event["delta"][name]
        elif event["type"] == "message_delta":
            message["usage"] |= event["usage"]
            message["stop_reason"] = event["delta"]["stop_reason"]
    for block in message["content"]:
        if block.pop("json", ""):
            block["input"] = None
    return message


def assert_nothing_is_lost(message: dict[str, Any], answer: dict[str, Any]) -> None:
    found = answer["choices"][0]["message"]
    by_type = {kind: [block for block in message["content"] if block["type"] == kind] for kind in
               ("text", "thinking", "redacted_thinking", "tool_use")}  # fmt: skip
    assert found.get("content", "") == "".join(block["text"] for block in by_type["text"])
    assert found.get("reasoning_content", "") == "".join(block["thinking"] for block in by_type["thinking"])
    kept = {(detail.get("text"), detail.get("signature"), detail.get("data")) for detail in
            found.get("reasoning_details", [])}  # fmt: skip
    assert {(block["thinking"], block["signature"], None) for block in by_type["thinking"]} <= kept
    assert {(None, None, block["data"]) for block in by_type["redacted_thinking"]} <= kept
    calls = [(call["id"], call["function"]["name"]) for call in found.get("tool_calls", [])]
    assert calls == [(block["id"], block["name"]) for block in by_type["tool_use"]]
    for call, block in zip(found.get("tool_calls", []), by_type["tool_use"], strict=True):
        arguments = json.loads(call["function"]["arguments"])
        assert block["input"] in (None, arguments)


@needs_recordings
@each(WHOLE)
def test_a_recorded_answer_loses_nothing(exchange: Exchange) -> None:
    message = exchange.response.json()
    answer = ANTHROPIC.response(exchange.response.body, STAMP)
    assert_nothing_is_lost(message, sdk_answer(answer.body))
    assert answer.usage is not None
    assert (answer.usage.total, answer.model) == (total(message["usage"]), message["model"])


@needs_recordings
@each(STREAMED)
def test_a_recorded_stream_loses_nothing(exchange: Exchange) -> None:
    message = folded(exchange)
    outcome = read(exchange.response.body)
    assert outcome.error is None
    assert_nothing_is_lost(message, sdk_stream(outcome.frames))
    assert outcome.usage is not None
    assert (outcome.usage.total, outcome.model) == (total(message["usage"]), message["model"])
    assert outcome.finish_reason == FINISH_REASONS[message["stop_reason"]]


@needs_recordings
@each(STREAMED)
def test_a_recorded_stream_cut_anywhere_gives_the_same_frames(exchange: Exchange) -> None:
    body = exchange.response.body
    assert read(body, list(range(0, len(body), 7))) == read(body)


@needs_recordings
@each(FAILED)
def test_a_recorded_error_has_its_place_in_the_tree(exchange: Exchange) -> None:
    response = exchange.response
    headers = {name: values[0] for name, values in response.headers.items()}
    error = ANTHROPIC.error(response.status, headers, response.body)
    assert type(error) is ERRORS[response.status]


@needs_recordings
def test_the_recorded_context_error_has_the_code_that_apps_know() -> None:
    (exchange,) = [exchange for exchange in FAILED if exchange.response.status == 400]
    assert ANTHROPIC.error(400, {}, exchange.response.body).vendor_code == "context_length_exceeded"  # type: ignore[attr-defined]


@needs_recordings
@each([exchange for exchange in MESSAGES if len(exchange.request.json()["messages"]) > 1])
def test_a_recorded_conversation_is_sent_as_it_was(exchange: Exchange) -> None:
    """The answer that a recorded request brings back, told as the SDK tells it, becomes the same turn again."""
    earlier = [turn for turn in exchange.request.json()["messages"] if turn["role"] == "assistant"]
    for turn in earlier:
        whole = {"content": turn["content"], "stop_reason": "end_turn", "usage": None}
        message = sdk_answer(ANTHROPIC.response(written(whole), STAMP).body)["choices"][0]["message"]
        assert sent(messages=[ASK, message])["messages"][1]["content"] == turn["content"]


def test_usage_without_figures_is_none() -> None:
    assert ANTHROPIC.response(b'{"content":[],"stop_reason":"end_turn","usage":{}}', STAMP).usage is None


def test_thoughts_above_the_output_are_the_output() -> None:
    usage = b'{"input_tokens":1,"output_tokens":2,"output_tokens_details":{"thinking_tokens":9}}'
    body = b'{"content":[],"stop_reason":"end_turn","usage":%b}' % usage
    assert ANTHROPIC.response(body, STAMP).usage == Usage(input=1, reasoning=2)
