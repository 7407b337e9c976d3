"""Gemini's translator: what it sends, what it makes of any answer, whole or streamed; and every recorded answer."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Embedding

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
from app.providers import PROVIDERS
from app.providers.gemini import GEMINI, VERTEX
from app.providers.gemini.answer import BLOCKED, MISFIRED, usage_of
from app.providers.gemini.request import SIGNATURE_FORMAT, SKIP_SIGNATURE
from app.providers.gemini.wire import ModalityTokens, UsageMetadata
from tests import recordings
from tests.recordings import Exchange
from tests.translation import STAMP, StreamOutcome, read_stream, sdk_answer, sdk_stream, target

Json = dict[str, Any]

# --- requests ---------------------------------------------------------------------------------------------------------


def sent(members: Json, kind: str = "gemini", model: str = "gemini-3-pro") -> Json:
    body = json.dumps({"model": "support-fast", "messages": [{"role": "user", "content": "hi"}]} | members).encode()
    return json.loads(PROVIDERS[kind].chat(openai_chat.read(body), target(kind, model)).body)


def called(*calls: Json, **more: Any) -> Json:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)} | more


def call(id: str, name: str = "order_status", arguments: str = "{}") -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(id: str, content: str) -> Json:
    return {"role": "tool", "tool_call_id": id, "content": content}


@pytest.mark.parametrize(
    ("kind", "model", "stream", "url"),
    [
        ("gemini", "gemini-3-pro", False, "/models/gemini-3-pro:generateContent"),
        ("gemini", "gemini-3-pro", True, "/models/gemini-3-pro:streamGenerateContent?alt=sse"),
        ("gemini", "tunedModels/ours-1", False, "/tunedModels/ours-1:generateContent"),
        ("vertex", "gemini-3-pro", True, "/publishers/google/models/gemini-3-pro:streamGenerateContent?alt=sse"),
        ("vertex", "endpoints/123", False, "/endpoints/123:generateContent"),
    ],
)
def test_a_model_has_its_path_at_its_front(kind: str, model: str, stream: bool, url: str) -> None:
    body = json.dumps({"model": "a", "messages": [], "stream": stream}).encode()
    assert PROVIDERS[kind].chat(openai_chat.read(body), target(kind, model)).url == f"https://{kind}.example/v1{url}"


def test_ai_studio_gets_the_key_in_a_header_and_vertex_a_bearer_token() -> None:
    request = openai_chat.read(b'{"model":"a","messages":[]}')
    at = target("gemini")
    signed = [one.sign(one.chat(request, at), at.provider.credential, 0.0) for one in (GEMINI, VERTEX)]
    assert [one.headers[-1] for one in signed] == [
        ("x-goog-api-key", "vendor-key"),
        ("authorization", "Bearer vendor-key"),
    ]
    assert not any("vendor-key" in one.url for one in signed)


def test_results_of_parallel_calls_go_back_in_the_order_of_the_calls() -> None:
    messages = [called(call("a", "first"), call("b", "second")), result("b", "2"), result("a", "1")]
    turn = sent({"messages": messages})["contents"][-1]
    assert [part["functionResponse"]["name"] for part in turn["parts"]] == ["first", "second"]


def test_vertex_gets_no_ids_of_calls() -> None:
    assert '"id"' not in json.dumps(sent({"messages": [called(call("a")), result("a", "1")]}, "vertex"))


def test_a_result_without_its_call_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        sent({"messages": [result("a", "1")]})
    assert refused.value.param == "messages[0].tool_call_id"


@pytest.mark.parametrize("arguments", ["[]", "{", "7", '{"a":}'])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sent({"messages": [called(call("a", arguments=arguments))]})
    assert refused.value.param == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize("arguments", ["", "null", "{}"])
def test_arguments_of_nothing_are_an_empty_object(arguments: str) -> None:
    (turn,) = sent({"messages": [called(call("a", arguments=arguments))]})["contents"]
    assert turn["parts"][0]["functionCall"]["args"] == {}


def detail(data: str, **more: Any) -> Json:
    return {"type": "reasoning.encrypted", "data": data, "format": SIGNATURE_FORMAT, "index": 0} | more


def test_a_signature_goes_back_on_the_call_that_it_came_with() -> None:
    message = called(call("a"), call("b"), reasoning_details=[detail("c2ln", id="b")])
    parts = sent({"messages": [message]})["contents"][0]["parts"]
    assert [part.get("thoughtSignature") for part in parts] == [SKIP_SIGNATURE, "c2ln"]


def test_a_signature_of_a_text_goes_back_on_the_text() -> None:
    message = {"role": "assistant", "content": "Sent.", "reasoning_details": [detail("c2ln"), detail("bW9yZQ==")]}
    assert sent({"messages": [message]})["contents"][0]["parts"] == [
        {"text": "Sent.", "thoughtSignature": "c2ln"},
        {"text": "", "thoughtSignature": "bW9yZQ=="},
    ]


def test_a_signature_of_another_vendor_is_not_sent() -> None:
    message = {"role": "assistant", "content": "Sent.", "reasoning_details": [detail("eA==", format="other-v1")]}
    assert "thoughtSignature" not in json.dumps(sent({"messages": [message]}))


@pytest.mark.parametrize(("model", "skips"), [("gemini-2.5-pro", False), ("gemini-3-pro", True), ("endpoints/1", True)])
def test_a_call_without_its_signature_is_marked_where_the_model_wants_one(model: str, skips: bool) -> None:
    assert (SKIP_SIGNATURE in json.dumps(sent({"messages": [called(call("a"))]}, model=model))) is skips


@pytest.mark.parametrize(
    ("model", "effort", "config"),
    [
        ("gemini-2.5-flash", "none", {"thinkingBudget": 0, "includeThoughts": False}),
        ("gemini-2.5-flash", "low", {"thinkingBudget": 1024, "includeThoughts": True}),
        ("gemini-2.5-pro", "high", {"thinkingBudget": 24576, "includeThoughts": True}),
        ("gemini-3-flash", "medium", {"thinkingLevel": "medium", "includeThoughts": True}),
    ],
)
def test_effort_is_a_budget_or_a_level_by_the_model(model: str, effort: str, config: Json) -> None:
    assert sent({"reasoning_effort": effort}, model=model)["generationConfig"]["thinkingConfig"] == config


@pytest.mark.parametrize(("model", "effort"), [("gemini-2.5-pro", "xhigh"), ("gemini-3-pro", "none")])
def test_an_effort_that_a_model_has_no_word_for_is_refused(model: str, effort: str) -> None:
    with pytest.raises(VendorCannot) as refused:
        sent({"reasoning_effort": effort}, model=model)
    assert refused.value.param == "reasoning_effort"


def image(url: str, detail: str | None = None) -> Json:
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("data:image/webp;base64,AAAA", {"inlineData": {"mimeType": "image/webp", "data": "AAAA"}}),
        ("data:text/plain;charset=utf-8;base64,AAAA", {"inlineData": {"mimeType": "text/plain", "data": "AAAA"}}),
        ("https://x.example/a.JPG?b=c.d", {"fileData": {"mimeType": "image/jpeg", "fileUri": "https://x.example/a.JPG?b=c.d"}}),
        ("https://x.example/a", {"fileData": {"fileUri": "https://x.example/a"}}),
        ("gs://ours/a.pdf", {"fileData": {"mimeType": "application/pdf", "fileUri": "gs://ours/a.pdf"}}),
    ],
)  # fmt: skip
def test_an_image_goes_inline_or_by_its_name(url: str, part: Json) -> None:
    assert sent({"messages": [{"role": "user", "content": [image(url)]}]})["contents"][0]["parts"] == [part]


@pytest.mark.parametrize("url", ["data:image/png,abc", "file:///etc/passwd", "ftp://x/a.png", "AAAA", ""])
def test_another_kind_of_url_is_refused(url: str) -> None:
    with pytest.raises(VendorCannot) as refused:
        sent({"messages": [{"role": "user", "content": [image(url)]}]})
    assert refused.value.param == "messages[0].content[0].image_url"


def test_two_details_in_one_request_are_refused() -> None:
    images = [image("gs://a", "high"), image("gs://b", "auto"), image("gs://c", "low")]
    with pytest.raises(VendorCannot) as refused:
        sent({"messages": [{"role": "user", "content": images}]})
    assert refused.value.param == "messages[0].content[2].image_url.detail"


# --- usage ------------------------------------------------------------------------------------------------------------

COUNTS = st.none() | st.integers(0, 300)
DETAILS = st.none() | st.lists(
    st.builds(ModalityTokens, st.sampled_from(["TEXT", "IMAGE", "AUDIO", "VIDEO", "NEW"]), COUNTS), max_size=4
)


@given(
    st.builds(UsageMetadata, st.integers(0, 300), COUNTS, COUNTS, COUNTS, COUNTS, st.none(), *[DETAILS] * 4),
    st.booleans(),
    st.integers(0, 50),
)
def test_usage_classes_sum_to_the_vendor_s_total(usage: UsageMetadata, thoughts_inside: bool, hidden: int) -> None:
    answer = usage.candidates_token_count or 0
    usage.thoughts_token_count = min(usage.thoughts_token_count or 0, answer) if thoughts_inside else None
    given_tokens = (usage.prompt_token_count or 0) + (usage.tool_use_prompt_token_count or 0)
    usage.total_token_count = given_tokens + answer + (0 if thoughts_inside else hidden)
    found = usage_of(usage)
    assert found is not None
    assert (found.total_input, found.total) == (given_tokens, usage.total_token_count)
    assert all(tokens >= 0 for tokens in msgspec.structs.astuple(found))


@pytest.mark.parametrize(
    "usage",
    [None, UsageMetadata(), UsageMetadata(prompt_token_count=-1), UsageMetadata(total_token_count=10**30)],
)
def test_figures_that_are_no_counts_are_no_usage(usage: UsageMetadata | None) -> None:
    assert usage_of(usage) is None


def test_a_stream_that_has_not_counted_its_answer_yet_has_no_usage() -> None:
    reader = GEMINI.stream(STAMP)
    list(reader.feed(event({"candidates": [{"content": {"parts": [{"text": "a"}]}}]} | {"usageMetadata": counted(9)})))
    assert reader.usage is None


def test_a_stream_that_counts_as_it_goes_has_its_usage_so_far() -> None:
    reader = GEMINI.stream(STAMP)
    candidate = {"content": {"parts": [{"text": "a"}]}}
    list(reader.feed(event({"candidates": [candidate], "usageMetadata": counted(9, 1)})))
    assert reader.usage == Usage(input=9, output=1)


# --- answers ----------------------------------------------------------------------------------------------------------


def counted(prompt: int, answer: int | None = None, thoughts: int = 0) -> Json:
    usage = {"promptTokenCount": prompt, "totalTokenCount": prompt + (answer or 0) + thoughts}
    if answer is not None:
        usage |= {"candidatesTokenCount": answer, "thoughtsTokenCount": thoughts}
    return usage


def event(value: Json, end: bytes = b"\r\n") -> bytes:
    return b"data: " + msgspec.json.encode(value) + end * 2


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
ARGUMENTS = st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=2)
SIGNATURES = st.none() | st.sampled_from(["c2ln", "bW9yZQ=="])
PARTS = st.one_of(
    st.builds(lambda text: {"text": text}, TEXTS | st.just("")),
    st.builds(lambda text: {"text": text, "thought": True}, TEXTS),
    st.builds(lambda name, args: {"functionCall": {"name": name, "args": args}}, TEXTS, ARGUMENTS),
    st.builds(lambda name: {"functionCall": {"name": name, "id": "fc-" + name}}, TEXTS),
    st.just({"inlineData": {"mimeType": "image/png", "data": "AAAA"}}),
)


@st.composite
def answers(draw: st.DrawFn) -> Json:
    """One answer: parts by candidate, each with its end; what was used."""
    candidates = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(PARTS, max_size=5))
        for part in parts:
            if signature := draw(SIGNATURES):
                part["thoughtSignature"] = signature
        candidates.append({"parts": parts, "finish": draw(st.sampled_from(["STOP", "MAX_TOKENS", "SAFETY"]))})
    return {"candidates": candidates, "usage": counted(draw(st.integers(0, 99)), draw(st.integers(0, 99)), 7)}


def whole(answer: Json) -> bytes:
    candidates = [
        {"content": {"parts": one["parts"]}, "finishReason": one["finish"], "index": index}
        for index, one in enumerate(answer["candidates"])
    ]
    return msgspec.json.encode(about() | {"candidates": candidates, "usageMetadata": answer["usage"]})


def about() -> Json:
    return {"modelVersion": "gemini-3-pro", "responseId": "r-1"}


def streamed(answer: Json, end: bytes = b"\r\n") -> bytes:
    """One part an event; the last event ends all."""
    events = [
        {"candidates": [{"content": {"parts": [part], "role": "model"}, "index": index}]}
        for index, one in enumerate(answer["candidates"])
        for part in one["parts"]
    ]
    ends = [{"finishReason": one["finish"], "index": index} for index, one in enumerate(answer["candidates"])]
    events.append({"candidates": ends, "usageMetadata": answer["usage"]})
    return b"".join(event(about() | one, end) for one in events)


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(ends)]


def read(data: bytes, places: list[int] | None = None) -> StreamOutcome:
    return read_stream(GEMINI, pieces(data, places or []))


@given(answers(), st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0), max_size=20))
def test_a_stream_split_anywhere_gives_the_same_frames(answer: Json, end: bytes, places: list[int]) -> None:
    data = streamed(answer, end)
    assert read(data, places) == read(data)


@given(answers())
def test_a_folded_stream_is_the_whole_answer(answer: Json) -> None:
    unary, stream = GEMINI.response(whole(answer), STAMP), read(streamed(answer))
    assert stream.error is None
    assert sdk_stream(stream.frames) == sdk_answer(unary.body)
    assert (stream.model, stream.usage, stream.finish_reason) == (unary.model, unary.usage, unary.finish_reason)
    assert stream.kinds[-2:] == ("USAGE", "DONE")


@given(answers())
def test_signatures_and_calls_come_back_as_they_were_given(answer: Json) -> None:
    said = json.loads(GEMINI.response(whole(answer), STAMP).body)["choices"][0]["message"]
    said.pop("images", None)
    parts = sent({"messages": [said]}, model="gemini-2.5-pro")["contents"][0]["parts"]
    ours = answer["candidates"][0]["parts"]
    given_calls = [
        (part["functionCall"]["name"], part["functionCall"].get("args", {}), part.get("thoughtSignature"))
        for part in ours
        if "functionCall" in part
    ]
    back = [part for part in parts if "functionCall" in part]
    assert [
        (part["functionCall"]["name"], part["functionCall"]["args"], part.get("thoughtSignature")) for part in back
    ] == deduplicated(ours, given_calls)
    loose = [part["thoughtSignature"] for part in ours if "functionCall" not in part and "thoughtSignature" in part]
    assert [part["thoughtSignature"] for part in parts if "thoughtSignature" in part and part not in back] == loose


def deduplicated(parts: list[Json], calls: list[Any]) -> list[Any]:
    """Calls of one id share a signature, the last one: ids are one of a kind at real vendors."""
    last: dict[str, str] = {}
    ids = [part["functionCall"].get("id") for part in parts if "functionCall" in part]
    for id, (_, _, signature) in zip(ids, calls, strict=True):
        if id and signature:
            last[id] = signature
    return [(name, args, last.get(id, signature)) for id, (name, args, signature) in zip(ids, calls, strict=True)]


@given(answers(), st.integers(0), st.lists(st.integers(0), max_size=5))
def test_a_cut_stream_is_unfinished_until_the_vendor_said_why_it_stopped(
    answer: Json, end: int, places: list[int]
) -> None:
    data = streamed(answer)
    stream = read(data[: end % (len(data) + 1)], places)
    assert stream.error is None
    assert stream.finished == (end % (len(data) + 1) == len(data))


@given(answers(), st.data())
def test_mutated_bytes_raise_only_vendor_errors(answer: Json, draw: st.DataObject) -> None:
    for data in (whole(answer), streamed(answer)):
        place, length = draw.draw(st.integers(0, 10_000)) % len(data), draw.draw(st.integers(0, 4))
        mutated = data[:place] + draw.draw(st.binary(max_size=4)) + data[place + length :]
        raises_only_vendor_errors(mutated)


@given(st.binary() | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["candidates", "content", "parts", "text", "usageMetadata", "error", "code", "details"]), x,
)).map(msgspec.json.encode))  # fmt: skip
def test_any_bytes_raise_only_vendor_errors(body: bytes) -> None:
    raises_only_vendor_errors(body)


@pytest.mark.parametrize("body", [b'{"a":' * 100_000, b"[" * 100_000, b'{"error":' + b'{"a":' * 100_000])
def test_deep_nesting_raises_only_vendor_errors(body: bytes) -> None:
    raises_only_vendor_errors(body)


def raises_only_vendor_errors(body: bytes) -> None:
    read(body)
    read(b"data: " + body + b"\n\n")
    assert isinstance(GEMINI.error(400, {}, body), VendorError)
    try:
        GEMINI.response(body, STAMP)
    except VendorError:
        return


def ended(reason: str, *parts: Json) -> bytes:
    return msgspec.json.encode({"candidates": [{"content": {"parts": parts}, "finishReason": reason}]})


@pytest.mark.parametrize("reason", sorted(BLOCKED))
def test_a_filter_of_the_vendor_is_a_refusal_that_names_it(reason: str) -> None:
    (choice,) = json.loads(GEMINI.response(ended(reason), STAMP).body)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", None)
    assert reason in choice["message"]["refusal"]


@pytest.mark.parametrize("reason", sorted(MISFIRED))
def test_an_answer_that_misfired_is_a_failure_even_after_text(reason: str) -> None:
    with pytest.raises(VendorFailed) as failed:
        GEMINI.response(ended(reason, {"text": "Let me see."}), STAMP)
    assert failed.value.vendor_code == reason


def test_an_end_that_is_new_to_us_after_text_is_an_end() -> None:
    assert GEMINI.response(ended("NEW_REASON", {"text": "Sent."}), STAMP).finish_reason == "stop"


def test_an_end_that_is_new_to_us_before_anything_is_a_failure() -> None:
    with pytest.raises(VendorFailed):
        GEMINI.response(ended("NEW_REASON"), STAMP)


def test_the_vendor_s_own_id_is_the_answer_s_and_the_ledger_s() -> None:
    answer = GEMINI.response(msgspec.json.encode(about() | json.loads(ended("STOP", {"text": "a"}))), STAMP)
    assert (json.loads(answer.body)["id"], answer.request_id) == ("r-1", "r-1")


def test_calls_without_ids_get_ones_of_their_own() -> None:
    parts = [{"functionCall": {"name": "f"}}, {"functionCall": {"name": "f"}}]
    message = json.loads(GEMINI.response(ended("STOP", *parts), STAMP).body)["choices"][0]["message"]
    assert [one["id"] for one in message["tool_calls"]] == ["call_1_0_0", "call_1_0_1"]


@pytest.mark.parametrize(
    ("delay", "header", "seconds"),
    [("48s", None, 48.0), ("0.25s", None, 0.25), ("2s", "5", 5.0), ("soon", None, None), ("-3s", None, None)],
)
def test_the_wait_stands_in_the_body(delay: str, header: str | None, seconds: float | None) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
    body = msgspec.json.encode({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": details}})
    assert GEMINI.error(429, {"retry-after": header} if header else {}, body).retry_after_seconds == seconds


TOO_LONG = "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576)."


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        (TOO_LONG, 400, "context_length_exceeded"),
        (TOO_LONG.replace("(", "").replace(")", "").rstrip("."), 400, "context_length_exceeded"),
        (TOO_LONG, 413, "context_length_exceeded"),
        (f"Your prompt says: {TOO_LONG}", 400, "INVALID_ARGUMENT"),
        (f"{TOO_LONG} Or not.", 400, "INVALID_ARGUMENT"),
        (TOO_LONG.replace("1048577", "so many"), 400, "INVALID_ARGUMENT"),
        ("", 400, "INVALID_ARGUMENT"),
    ],
)
def test_only_the_whole_sentence_for_a_full_context_has_the_code_that_apps_know(
    message: str, status: int, code: str
) -> None:
    body = msgspec.json.encode({"error": {"code": status, "status": "INVALID_ARGUMENT", "message": message}})
    error = GEMINI.error(status, {}, body)
    assert (type(error), error.vendor_code) == (VendorRefused, code)
    assert str(error) == (message or f"The vendor refused the request with status {status}.")


@pytest.mark.parametrize(("status", "kind"), [(429, VendorThrottled), (503, VendorFailed), (403, VendorMisconfigured)])
def test_the_status_goes_before_the_sentence_for_a_full_context(status: int, kind: type[VendorError]) -> None:
    body = msgspec.json.encode({"error": {"code": status, "status": "ANY", "message": TOO_LONG}})
    error = GEMINI.error(status, {}, body)
    assert (type(error), error.vendor_code) == (kind, "ANY")


# --- recorded traffic -------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
EXCHANGES = [one for one in (recordings.load(FOLDER) if FOLDER else []) if one.vendor == "gemini"]
CHATS = [one for one in EXCHANGES if one.response.status == 200 and "enerateContent" in one.request.uri]
FAILED = [one for one in EXCHANGES if one.response.status != 200]


def recorded(exchanges: list[Exchange]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


def events_of(exchange: Exchange) -> list[Json]:
    """The answer's events: one of a whole answer; some streams were recorded as a JSON array."""
    if exchange.response.streamed:
        return [json.loads(data) for data in exchange.response.events()]
    said = exchange.response.json()
    return said if isinstance(said, list) else [said]


def parts_of(exchange: Exchange) -> list[Json]:
    return [
        part
        for one in events_of(exchange)
        for candidate in one["candidates"]
        for part in candidate.get("content", {}).get("parts", [])
    ]


def answer_of(exchange: Exchange) -> tuple[Json, StreamOutcome]:
    """The message as the SDK accumulates it; every answer is read as a stream."""
    body = exchange.response.body
    if not exchange.response.streamed:
        body = b"".join(event(one) for one in events_of(exchange))
    outcome = read(body)
    assert outcome.error is None
    assert outcome.finished
    return sdk_stream(outcome.frames), outcome


@needs_recordings
@recorded(CHATS)
def test_nothing_of_a_recorded_answer_is_lost(exchange: Exchange) -> None:
    parts = parts_of(exchange)
    message = answer_of(exchange)[0]["choices"][0]["message"]
    assert message.get("content", "") == "".join(p["text"] for p in parts if "text" in p and not p.get("thought"))
    assert message.get("reasoning_content", "") == "".join(p["text"] for p in parts if p.get("thought"))
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]
    assert calls == [(p["functionCall"]["name"], p["functionCall"]["args"]) for p in parts if "functionCall" in p]
    signatures = [detail["data"] for detail in message.get("reasoning_details", [])]
    assert signatures == [part["thoughtSignature"] for part in parts if "thoughtSignature" in part]


@needs_recordings
@recorded(CHATS)
def test_usage_of_a_recorded_answer_is_the_vendor_s(exchange: Exchange) -> None:
    completion, outcome = answer_of(exchange)
    said = events_of(exchange)[-1]["usageMetadata"]
    assert outcome.usage is not None
    assert outcome.usage.total == said["totalTokenCount"] == completion["usage"]["total_tokens"]
    assert outcome.usage.total_input == said["promptTokenCount"]
    assert outcome.usage.reasoning == said.get("thoughtsTokenCount", 0)
    images = [one["tokenCount"] for one in said["promptTokensDetails"] if one["modality"] == "IMAGE"]
    assert outcome.usage.image_input == sum(images)


@needs_recordings
@recorded([one for one in CHATS if not one.response.streamed and isinstance(one.response.json(), dict)])
def test_a_recorded_whole_answer_is_the_same_as_its_stream(exchange: Exchange) -> None:
    unary = GEMINI.response(msgspec.json.encode(exchange.response.json()), STAMP)
    assert sdk_answer(unary.body) == answer_of(exchange)[0]


@needs_recordings
@recorded(CHATS)
def test_a_recorded_turn_goes_back_with_its_signatures(exchange: Exchange) -> None:
    message = answer_of(exchange)[0]["choices"][0]["message"]
    parts = sent({"messages": [message]})["contents"][0]["parts"]
    back = [
        part["thoughtSignature"] for part in parts if part.get("thoughtSignature", SKIP_SIGNATURE) != SKIP_SIGNATURE
    ]
    assert back == [part["thoughtSignature"] for part in parts_of(exchange) if "thoughtSignature" in part]


@needs_recordings
@recorded(FAILED)
def test_a_recorded_error_is_classed(exchange: Exchange) -> None:
    headers = {name: values[0] for name, values in exchange.response.headers.items()}
    error = GEMINI.error(exchange.response.status, headers, exchange.response.body)
    expected = {400: VendorMisconfigured, 404: VendorMisconfigured}
    assert type(error) is expected.get(exchange.response.status, type(error))
    if exchange.response.status == 429:
        assert (type(error).__name__, error.retry_after_seconds) == ("VendorThrottled", 48.0)


def test_a_body_that_is_no_answer_is_broken() -> None:
    with pytest.raises(VendorBroke):
        GEMINI.response(b"upstream connect error", STAMP)


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemini", "vertex"])
def test_dropped_dimensions_are_not_sent(kind: str) -> None:
    request = openai_embeddings.read(b'{"model":"a","input":"hi","dimensions":8}')
    at = msgspec.structs.replace(target(kind), drop_params=frozenset({"dimensions"}))
    assert b"outputDimensionality" not in PROVIDERS[kind].outgoing(request, at).body


@pytest.mark.parametrize("kind", ["gemini", "vertex"])
@given(st.binary())
def test_an_answer_of_any_bytes_to_an_embedding_raises_only_vendor_errors(kind: str, body: bytes) -> None:
    request = openai_embeddings.read(b'{"model":"a","input":"hi"}')
    with pytest.raises(VendorBroke):
        PROVIDERS[kind].answer(body, request, STAMP)


@needs_recordings
@recorded([one for one in EXCHANGES if "mbedContent" in one.request.uri])
def test_a_recorded_embedding_is_carried_whole(exchange: Exchange) -> None:
    said = exchange.response.json()["embeddings"]
    texts = [one["content"]["parts"][0]["text"] for one in exchange.request.json()["requests"]]
    request = openai_embeddings.read(json.dumps({"model": "a", "input": texts}).encode())
    carried = json.loads(GEMINI.answer(exchange.response.body, request, STAMP).body)["data"]
    assert [Embedding.model_validate(one).embedding for one in carried] == [one["values"] for one in said]
