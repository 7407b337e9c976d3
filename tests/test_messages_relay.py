"""Messages relayed to Anthropic: the bytes that go out, the bytes that come back, what the ledger learns of them."""

from __future__ import annotations

import json
import os
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import Usage
from app.dialects import anthropic_messages
from app.errors import VendorBroke, VendorError, VendorFailed
from app.providers.anthropic import ANTHROPIC, RELAYED
from app.providers.translator import Kind
from tests import recordings
from tests.recordings import Exchange
from tests.test_anthropic_provider import answers, pieces, streamed, written
from tests.translation import STAMP, StreamOutcome, read_stream, target

ASK = {"role": "user", "content": "Hi"}
PLACES = st.lists(st.integers(0, 10_000), max_size=12)


def read(data: bytes, places: list[int] | None = None) -> StreamOutcome:
    return read_stream(RELAYED, pieces(data, places or []))


# --- requests ---------------------------------------------------------------------------------------------------------


def sent(body: bytes) -> bytes:
    return RELAYED.chat(anthropic_messages.read(body), target("anthropic")).body


def test_only_the_model_is_spliced_into_a_request() -> None:
    body = b'{"max_tokens":5,"model":"claude","messages":[ {"role":"user","content":"\\u00e9"} ],"new":{"a":1.0}}'
    assert sent(body) == body.replace(b'"claude"', b'"claude-sonnet-4-6"')


def test_a_member_that_the_target_drops_is_left_out() -> None:
    at = msgspec.structs.replace(target("anthropic"), drop_params=frozenset({"top_k"}))
    request = anthropic_messages.read(b'{"model":"a","max_tokens":5,"messages":[],"top_k":3}')
    assert set(json.loads(RELAYED.chat(request, at).body)) == {"model", "max_tokens", "messages"}


def test_headers_of_the_client_go_on_after_ours() -> None:
    request = anthropic_messages.read(b'{"model":"a","max_tokens":5,"messages":[]}')
    request = msgspec.structs.replace(request, headers=(("anthropic-beta", "context-1m-2025-08-07"),))
    headers = dict(RELAYED.chat(request, target("anthropic")).headers)
    assert headers["anthropic-beta"] == "context-1m-2025-08-07"
    assert headers["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize(
    "block",
    [
        {"type": "thinking", "thinking": "Hm.", "signature": "gateway1:"},
        {"type": "redacted_thinking", "data": "gateway1:e30="},
    ],
)
def test_thinking_of_another_vendor_is_left_out(block: dict[str, Any]) -> None:
    own = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    turns = [ASK, {"role": "assistant", "content": [block, own, {"type": "text", "text": "gateway1: is a mark"}]}, ASK]
    body = json.loads(sent(json.dumps({"model": "a", "max_tokens": 5, "messages": turns}).encode()))
    assert body["messages"][1]["content"] == turns[1]["content"][1:]


def test_a_text_with_the_mark_in_it_is_sent_as_it_is() -> None:
    turns = [{"role": "user", "content": "gateway1:"}]
    assert (
        json.loads(sent(json.dumps({"model": "a", "max_tokens": 5, "messages": turns}).encode()))["messages"] == turns
    )


# --- answers ----------------------------------------------------------------------------------------------------------


@given(answers())
def test_an_answer_is_relayed_and_tells_the_ledger_what_a_translated_one_does(answer: dict[str, Any]) -> None:
    body = written(answer)
    relayed, translated = RELAYED.response(body, STAMP), ANTHROPIC.response(body, STAMP)
    assert relayed == msgspec.structs.replace(translated, body=body)


@given(answers(), PLACES)
def test_a_stream_is_relayed_byte_for_byte_however_it_is_cut(answer: dict[str, Any], places: list[int]) -> None:
    data = streamed(answer)
    outcome = read(data, places)
    assert (outcome.frames, outcome.error, outcome.kinds[-1]) == (data, None, "DONE")


@given(answers(), PLACES)
def test_a_stream_tells_the_ledger_what_a_translated_one_does(answer: dict[str, Any], places: list[int]) -> None:
    data = streamed(answer)
    relayed, translated = read(data, places), read_stream(ANTHROPIC, [data])
    assert (relayed.usage, relayed.model, relayed.finish_reason) == (
        translated.usage, translated.model, translated.finish_reason,
    )  # fmt: skip


@given(answers())
def test_the_service_tier_is_told(answer: dict[str, Any]) -> None:
    reader = RELAYED.stream(STAMP)
    list(reader.feed(streamed(answer)))
    assert reader.service_tier == RELAYED.response(written(answer), STAMP).service_tier


@given(answers(), st.integers(0, 10_000))
def test_any_prefix_of_a_stream_is_finished_only_with_its_reason(answer: dict[str, Any], place: int) -> None:
    data = streamed(answer)
    outcome = read(data[: place % len(data)])
    assert outcome.error is None
    assert outcome.finished == (outcome.finish_reason is not None)


@given(answers(), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_mutated_bytes_raise_only_our_errors(answer: dict[str, Any], place: int, noise: bytes) -> None:
    for data, made in ((streamed(answer), read), (written(answer), lambda body: RELAYED.response(body, STAMP))):
        at = place % len(data)
        try:
            made(data[:at] + noise + data[at + len(noise) :])
        except VendorError:
            continue


def event(kind: str, **members: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n".encode()


TEXT = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "né"})
START = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
END = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})


def test_nothing_is_content_before_the_first_words() -> None:
    kinds = read(event("message_start", message={}) + event("ping") + START + TEXT).kinds
    assert kinds == ("START", "START", "START", "CONTENT")


def test_a_call_begins_the_content() -> None:
    assert read(event("content_block_start", index=0, content_block={"type": "tool_use"})).kinds == ("CONTENT",)


def test_text_is_measured_for_an_estimate() -> None:
    assert read(START + TEXT * 2 + event("ping")).text_bytes == 6


def test_an_event_that_is_new_is_relayed() -> None:
    assert read(TEXT + event("something_new", index=0)).frames == TEXT + event("something_new", index=0)


def test_an_error_event_is_raised_after_the_frames_before_it() -> None:
    outcome = read(TEXT + event("error", error={"type": "overloaded_error", "message": "Overloaded"}))
    assert (outcome.frames, type(outcome.error)) == (TEXT, VendorFailed)


def test_a_stream_that_stops_without_a_reason_is_broken() -> None:
    assert type(read(TEXT + event("message_stop")).error) is VendorBroke


def test_a_stream_that_ends_after_its_reason_gets_the_end_that_it_lacks() -> None:
    outcome = read(TEXT + END)
    assert outcome.frames.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert outcome.kinds[-1] == Kind.DONE.name


# --- counts -----------------------------------------------------------------------------------------------------------


def test_a_count_is_relayed_and_free() -> None:
    answer = RELAYED.counted(b'{"input_tokens": 14}', STAMP)
    assert (answer.body, answer.usage) == (b'{"input_tokens": 14}', Usage())


@pytest.mark.parametrize("body", [b"", b"[]", b'{"input_tokens":"x"}', b'{"error":{"type":"api_error"}}'])
def test_a_count_that_is_none_is_the_vendor_s_failure(body: bytes) -> None:
    with pytest.raises(VendorError):
        RELAYED.counted(body, STAMP)


# --- every recorded answer --------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
RECORDED = [exchange for exchange in (recordings.load(FOLDER) if FOLDER else []) if exchange.vendor == "anthropic"]
MESSAGES = [exchange for exchange in RECORDED if exchange.request.uri.partition("?")[0].endswith("/v1/messages")]
GOOD = [exchange for exchange in MESSAGES if exchange.response.status == 200]


def each(exchanges: list[Exchange]) -> Any:
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


@needs_recordings
@each([exchange for exchange in GOOD if exchange.response.streamed])
def test_a_recorded_stream_is_relayed_byte_for_byte(exchange: Exchange) -> None:
    body = exchange.response.body
    whole, cut = read(body), read(body, list(range(0, len(body), 7)))
    assert whole.frames == cut.frames == body
    assert (whole.usage, whole.finish_reason) == (cut.usage, cut.finish_reason)
    translated = read_stream(ANTHROPIC, [body])
    assert (whole.usage, whole.model) == (translated.usage, translated.model)


@needs_recordings
@each([exchange for exchange in GOOD if not exchange.response.streamed])
def test_a_recorded_answer_is_relayed_byte_for_byte(exchange: Exchange) -> None:
    answer = RELAYED.response(exchange.response.body, STAMP)
    assert answer.body == exchange.response.body
    assert answer.usage == ANTHROPIC.response(exchange.response.body, STAMP).usage


@needs_recordings
@each(MESSAGES)
def test_a_recorded_request_is_relayed_but_for_its_model(exchange: Exchange) -> None:
    request = exchange.request.json()
    body = exchange.request.body.replace(json.dumps(request["model"]).encode(), b'"alias"')
    assert json.loads(sent(body)) == request | {"model": "claude-sonnet-4-6"}


@needs_recordings
@each([exchange for exchange in RECORDED if "count_tokens" in exchange.request.uri])
def test_a_recorded_count_is_relayed(exchange: Exchange) -> None:
    assert RELAYED.counted(exchange.response.body, STAMP).body == exchange.response.body
