"""Vendors of OpenAI's shape that differ in something: Azure, and the rows of `app/vendors.py`."""

from __future__ import annotations

import json
import os
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from app.config import Credential, Secret
from app.dialects import openai_chat
from app.errors import VendorCannot, VendorError, VendorMisconfigured, VendorRefused
from app.providers import PROVIDERS
from app.providers.translator import Outgoing
from app.vendors import COMPATIBLE
from tests import recordings
from tests.recordings import Exchange
from tests.test_openai_provider import pieces
from tests.translation import STAMP, read_stream, target

MISTRAL, AZURE = PROVIDERS["mistral"], PROVIDERS["azure"]
HOSTS = {
    "api.deepseek.com": "deepseek", "api.groq.com": "groq", "api.mistral.ai": "mistral", "api.x.ai": "xai",
    "ollama.com": "ollama", "openrouter.ai": "openrouter",
}  # fmt: skip


def asked(**members: object) -> Any:
    return openai_chat.read(json.dumps({"model": "a", "messages": []} | members).encode())


def sent(vendor: str, **members: object) -> dict[str, Any]:
    return json.loads(PROVIDERS[vendor].chat(asked(**members), target("openai_compatible")).body)


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "member"), [(name, member) for name, vendor in COMPATIBLE.items() for member in sorted(vendor.uncarried)]
)
def test_what_a_vendor_cannot_carry_is_refused_by_name(vendor: str, member: str) -> None:
    with pytest.raises(VendorCannot) as raised:
        PROVIDERS[vendor].chat(asked(**{member: 7}), target("openai_compatible"))
    assert raised.value.param == member


def test_what_asks_for_nothing_is_left_out_where_the_vendor_would_refuse_it() -> None:
    body = sent("mistral", store=False, logprobs=None, service_tier="auto", temperature=0)
    assert body == {"model": "model-2026-01-01", "messages": [], "temperature": 0}


def test_a_limit_is_sent_under_the_name_that_the_vendor_knows() -> None:
    assert sent("mistral", max_completion_tokens=7)["max_tokens"] == 7


@pytest.mark.parametrize("order", [("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")])
def test_of_two_limits_the_one_that_was_reserved_is_sent(order: tuple[str, str]) -> None:
    members = {name: 7 if name == "max_completion_tokens" else 9 for name in order}
    body = sent("mistral", **members)
    assert body["max_tokens"] == asked(**members).max_output_tokens == 7


def test_a_null_limit_does_not_hide_the_other() -> None:
    assert sent("mistral", max_tokens=9, max_completion_tokens=None)["max_tokens"] == 9


def test_a_vendor_that_takes_no_stream_options_gets_none() -> None:
    assert "stream_options" not in sent("mistral", stream=True, stream_options={"include_usage": True})


def test_dropped_members_are_not_refused() -> None:
    at = msgspec.structs.replace(target("openai_compatible"), drop_params=frozenset({"n"}))
    assert b'"n"' not in PROVIDERS["groq"].chat(asked(n=2), at).body


def test_without_a_key_no_authorization_is_sent() -> None:
    outgoing = Outgoing("http://h/v1", (), b"")
    assert PROVIDERS["vllm"].sign(outgoing, Credential(Secret("")), 0.0) == outgoing


def test_azure_without_a_version_names_the_deployment_in_the_body() -> None:
    at = target("azure")
    at = msgspec.structs.replace(at, provider=msgspec.structs.replace(at.provider, api_version=None))
    outgoing = AZURE.chat(asked(), at)
    assert outgoing.url == "https://azure.example/v1/openai/v1/chat/completions"
    assert json.loads(outgoing.body)["model"] == "model-2026-01-01"


# --- errors -----------------------------------------------------------------------------------------------------------

BAD_KEY = b'{"code":"invalid-argument","error":"Incorrect API key provided: ab***yz. Get one."}'


def test_a_bad_key_in_a_400_rests_the_target() -> None:
    assert isinstance(PROVIDERS["xai"].error(400, {}, BAD_KEY), VendorMisconfigured)


def test_another_vendors_400_of_those_words_is_the_requests_fault() -> None:
    assert isinstance(PROVIDERS["groq"].error(400, {}, BAD_KEY), VendorRefused)


def test_other_bad_arguments_are_the_requests_fault() -> None:
    body = b'{"code":"invalid-argument","error":"Argument not supported: stop"}'
    assert isinstance(PROVIDERS["xai"].error(400, {}, body), VendorRefused)


def test_a_prompt_that_moderation_flagged_does_not_rest_the_target_for_all() -> None:
    body = b'{"error":{"code":403,"message":"Flagged.","metadata":{"reasons":["hate"],"flagged_input":"x"}}}'
    told = PROVIDERS["openrouter"].error(403, {}, body)
    assert isinstance(told, VendorRefused)
    assert told.vendor_code == "content_filter"


# --- answers that are rewritten ---------------------------------------------------------------------------------------

PART = st.builds(lambda text: {"type": "text", "text": text}, st.text(min_size=1)) | st.builds(
    lambda text: {"type": "thinking", "thinking": [{"type": "text", "text": text}]}, st.text(min_size=1)
)
CONTENTS = st.lists(st.text(min_size=1) | st.lists(PART, min_size=1, max_size=3), min_size=1, max_size=5)


def typed_stream(contents: list[Any]) -> bytes:
    """Mistral's stream of these contents, and its end."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]} for content in contents]
    chunks.append({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]})
    base = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m-1"}
    return b"".join(b"data: " + msgspec.json.encode(base | chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def said(contents: list[Any], kind: str) -> str:
    lists = [[{"type": "text", "text": content}] if isinstance(content, str) else content for content in contents]
    parts = [part for parts in lists for part in parts]
    return "".join(
        part["text"] if kind == "text" else part["thinking"][0]["text"] for part in parts if part["type"] == kind
    )


def deltas(frames: bytes) -> list[dict[str, Any]]:
    chunks = [json.loads(one[6:]) for one in frames.split(b"\n\n")[:-1] if one != b"data: [DONE]"]
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


@given(CONTENTS, st.lists(st.integers(0), max_size=12))
def test_typed_content_becomes_text_and_reasoning_however_it_is_cut(contents: list[Any], places: list[int]) -> None:
    outcome = read_stream(MISTRAL, pieces(typed_stream(contents), places))
    found = deltas(outcome.frames)
    assert outcome.error is None
    assert "".join(delta.get("content") or "" for delta in found) == said(contents, "text")
    assert "".join(delta.get("reasoning_content") or "" for delta in found) == said(contents, "thinking")


@given(CONTENTS, st.data())
def test_mutated_bytes_of_typed_content_raise_only_vendor_errors(contents: list[Any], data: st.DataObject) -> None:
    whole = bytearray(typed_stream(contents))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    read_stream(MISTRAL, [bytes(whole)])
    read_stream(AZURE, [bytes(whole)])


@given(st.lists(PART, min_size=1, max_size=4))
def test_a_whole_answer_says_what_its_stream_says(parts: list[Any]) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
    answer = json.loads(MISTRAL.response(msgspec.json.encode({"model": "m-1", "choices": [choice]}), STAMP).body)
    message = answer["choices"][0]["message"]
    assert (message["content"] or "") == said([parts], "text")
    assert message.get("reasoning_content", "") == said([parts], "thinking")


def test_content_with_parts_of_another_type_stays_as_it_came() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "reference", "reference_ids": [1]}]
    choice = {"index": 0, "message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
    body = msgspec.json.encode({"model": "m-1", "choices": [choice]})
    assert json.loads(MISTRAL.response(body, STAMP).body)["choices"][0]["message"]["content"] == parts


def test_text_that_quotes_typed_content_is_relayed_byte_for_byte() -> None:
    stream = typed_stream(['see "content":[{"type":"text"}]'])
    assert read_stream(MISTRAL, [stream]).frames == stream


def test_each_of_several_choices_gets_the_message_that_azures_filter_left_out() -> None:
    good = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}}
    filtered = {"index": 1, "finish_reason": "content_filter"}
    body = msgspec.json.encode({"model": "m-1", "choices": [good, filtered]})
    completed = json.loads(AZURE.response(body, STAMP).body)["choices"]
    assert completed[0] == good
    assert completed[1]["message"] == {"role": "assistant", "content": None, "refusal": None}


# --- recorded answers through the official SDK ------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
CHATS = [
    exchange
    for exchange in (recordings.load(FOLDER) if FOLDER else [])
    if exchange.vendor in ("azure-openai", "openai-compatible") and "chat/completions" in exchange.request.uri
]
GOOD = [exchange for exchange in CHATS if exchange.response.status == 200]
STREAMS = [e for e in GOOD if e.response.streamed and b'"error"' not in e.response.body]
UNARY = [exchange for exchange in GOOD if not exchange.response.streamed]


def translator(exchange: Exchange) -> Any:
    if exchange.vendor == "azure-openai":
        return AZURE
    return PROVIDERS[HOSTS.get(exchange.request.uri.split("/")[2], "openai")]


def recorded(exchanges: list[Exchange]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


def texts_of(value: Any) -> str:
    """The text of a content that is text, or a list of typed parts."""
    if isinstance(value, list):
        return "".join(texts_of(part.get("text") or part.get("thinking")) for part in value)
    return value or ""


@needs_recordings
@recorded(STREAMS)
def test_the_sdk_accumulates_a_recorded_stream_and_nothing_of_it_is_lost(exchange: Exchange) -> None:
    outcome = read_stream(translator(exchange), [exchange.response.body])
    chunks = [json.loads(one[6:]) for one in outcome.frames.split(b"\n\n") if one.startswith(b"data: {")]
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.construct(**chunk))
    whole = state.current_completion_snapshot
    recorded_deltas = [
        choice["delta"]
        for event in exchange.response.events()
        if event != "[DONE]"
        for choice in json.loads(event).get("choices", ())
        if choice.get("delta")
    ]
    assert (outcome.error, outcome.kinds[-1]) == (None, "DONE")
    message = whole.choices[0].message
    reasoning = "".join(choice["delta"].get("reasoning_content") or "" for c in chunks for choice in c["choices"])
    spoken = (message.content or "") + (reasoning if translator(exchange) is MISTRAL else "")
    wanted = "".join(texts_of(delta.get("content")) for delta in recorded_deltas)
    assert sorted(spoken) == sorted(wanted)
    calls = {call["id"] for delta in recorded_deltas for call in delta.get("tool_calls") or () if call.get("id")}
    assert {call.id for call in message.tool_calls or ()} == calls


@needs_recordings
@recorded(UNARY)
def test_the_sdk_reads_a_recorded_answer(exchange: Exchange) -> None:
    told = translator(exchange).response(exchange.response.body, STAMP)
    parsed = ChatCompletion.construct(**json.loads(told.body))
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.choices[0].finish_reason == told.finish_reason
    assert told.usage is not None
    assert told.usage.total == parsed.usage.total_tokens


@needs_recordings
@recorded([exchange for exchange in CHATS if exchange.response.status != 200])
def test_a_recorded_error_is_an_error_of_ours(exchange: Exchange) -> None:
    headers = {name: values[0] for name, values in exchange.response.headers.items()}
    told = translator(exchange).error(exchange.response.status, headers, exchange.response.body)
    assert isinstance(told, VendorError)
    assert told.vendor_status == exchange.response.status
