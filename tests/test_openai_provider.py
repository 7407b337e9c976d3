"""The translator of OpenAI's shape: what it sends, what it makes of any answer; and every recorded answer."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from app.core import Usage
from app.dialects import openai_chat
from app.errors import VendorBroke, VendorError, VendorFailed, VendorMisconfigured, VendorRefused, VendorThrottled
from app.providers.openai import MAX_TOKENS, OPENAI, OpenAIStream, usage_of
from app.providers.translator import Kind
from app.sse import FrameSplitter
from app.wire import CompletionDetails, OpenAIUsage, PromptDetails
from tests import recordings
from tests.recordings import Exchange
from tests.translation import STAMP, StreamOutcome, read_stream, target

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
COUNTS = st.none() | st.integers(-3, 300)

# --- requests -------------------------------------------------------------------------------------------------------


def written(members: dict[str, Any], spaces: bool, ascii_only: bool) -> bytes:
    separators = (" , ", " : ") if spaces else (",", ":")
    return json.dumps(members, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "stream"), JSON),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_what_is_sent_differs_from_the_request_in_model_and_stream_options_alone(
    unknown: dict[str, Any], spaces: bool, ascii_only: bool, streamed: bool
) -> None:
    members = unknown | {"model": "support-fast", "messages": [{"role": "user", "content": "é ☂ \\u00e9"}]}
    members |= {"max_tokens": 5, "max_completion_tokens": 5, "n": 1, "stream": streamed, "stream_options": None}
    try:
        body = written(members, spaces, ascii_only)
        sent = OPENAI.chat(openai_chat.read(body), target("openai")).body
    except (openai_chat.InvalidRequest, UnicodeError):  # lone surrogates: not JSON that a vendor would take
        return
    expected = members | {"model": "model-2026-01-01"}
    if streamed:
        expected["stream_options"] = {"include_usage": True}
    assert json.loads(sent) == expected
    values = msgspec.json.decode(body, type=dict[str, Raw])
    kept = [value for name, value in values.items() if name not in ("model", "stream_options")]
    assert all(bytes(value) in sent for value in kept)


def test_members_keep_the_order_of_the_client() -> None:
    body = b'{"z":1,"model":"support-fast","a":2,"messages":[],"m":3}'
    sent = OPENAI.chat(openai_chat.read(body), target("openai")).body
    assert list(json.loads(sent)) == ["z", "model", "a", "messages", "m"]


def test_a_model_id_is_written_as_a_json_string() -> None:
    sent = OPENAI.chat(openai_chat.read(b'{"model":"a","messages":[]}'), target("openai", 'odd"\\é')).body
    assert json.loads(sent)["model"] == 'odd"\\é'


# --- usage ----------------------------------------------------------------------------------------------------------

USAGES = st.builds(
    OpenAIUsage,
    st.none() | st.integers(0, 300),
    st.none() | st.integers(0, 300),
    COUNTS,
    st.none() | st.builds(PromptDetails, COUNTS, COUNTS, COUNTS),
    st.none() | st.builds(CompletionDetails, COUNTS, COUNTS),
)


@given(USAGES)
def test_usage_classes_sum_to_the_vendor_s_totals(usage: OpenAIUsage) -> None:
    found = usage_of(usage)
    if usage.prompt_tokens is None:
        assert found is None
        return
    completion = usage.completion_tokens or 0
    assert found is not None
    assert found.total_input == usage.prompt_tokens
    assert found.total_output in (completion, (usage.total_tokens or 0) - usage.prompt_tokens)
    assert all(tokens >= 0 for tokens in msgspec.structs.astuple(found))


@given(USAGES)
def test_usage_whose_parts_fit_is_split_as_the_vendor_splits_it(usage: OpenAIUsage) -> None:
    prompt = usage.prompt_tokens_details or PromptDetails()
    parts = [prompt.cached_tokens or 0, prompt.cache_write_tokens or 0, prompt.audio_tokens or 0]
    found = usage_of(usage)
    if found is not None and min(parts) >= 0 and sum(parts) <= found.total_input:
        assert [found.cache_read, found.cache_write, found.audio_input] == parts


@pytest.mark.parametrize(
    "usage",
    [
        OpenAIUsage(prompt_tokens=-1, completion_tokens=1),
        OpenAIUsage(prompt_tokens=1, completion_tokens=-1),
        OpenAIUsage(prompt_tokens=MAX_TOKENS + 1),
        OpenAIUsage(prompt_tokens=1, completion_tokens=10**30),
        OpenAIUsage(total_tokens=7),
    ],
)
def test_figures_that_are_no_counts_are_no_usage(usage: OpenAIUsage) -> None:
    assert usage_of(usage) is None


def test_reasoning_that_the_vendor_counts_beside_the_answer_is_charged() -> None:
    details = CompletionDetails(reasoning_tokens=94)
    usage = OpenAIUsage(32, 9, 135, None, details)
    assert usage_of(usage) == Usage(input=32, output=9, reasoning=94)


# --- answers ----------------------------------------------------------------------------------------------------------


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    """The facts of one answer, to be written whole or streamed."""
    return {
        "texts": draw(st.lists(st.text(min_size=1), min_size=1, max_size=3)),
        "finish": draw(st.sampled_from(["stop", "length", "content_filter"])),
        "prompt": draw(st.integers(0, 999)),
        "completion": draw(st.integers(0, 999)),
    }


def usage_member(answer: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_tokens": answer["prompt"], "completion_tokens": answer["completion"], "prompt_tokens_details": None}


def whole(answer: dict[str, Any]) -> bytes:
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": answer["finish"]}
        for index, text in enumerate(answer["texts"])
    ]
    return msgspec.json.encode({"model": "m-1", "choices": choices, "usage": usage_member(answer)})


def streamed(answer: dict[str, Any], end: bytes = b"\n") -> bytes:
    def frame(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {"object": "chat.completion.chunk", "model": "m-1", "choices": choices, "usage": usage}
        return b"data: " + msgspec.json.encode(chunk) + end * 2

    def choice(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": finish}

    frames = []
    for index, text in enumerate(answer["texts"]):
        frames.append(frame([choice(index, {"role": "assistant", "content": ""})]))
        frames += [frame([choice(index, {"content": character})]) for character in text]
        frames.append(frame([choice(index, {}, answer["finish"])]))
    return b"".join([b": keep-alive" + end * 2, *frames, frame([], usage_member(answer)), b"data: [DONE]" + end * 2])


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(ends)]


def read(data: bytes, places: list[int] | None = None) -> StreamOutcome:
    return read_stream(OPENAI, pieces(data, places or []))


@given(answers(), st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0), max_size=20))
def test_a_streamed_answer_says_the_same_as_the_whole_one(
    answer: dict[str, Any], end: bytes, places: list[int]
) -> None:
    unary, stream = OPENAI.response(whole(answer), STAMP), read(streamed(answer, end), places)
    assert stream.error is None
    assert (stream.model, stream.usage, stream.finish_reason) == (unary.model, unary.usage, unary.finish_reason)
    assert stream.finished
    assert stream.kinds[-2:] == ("USAGE", "DONE")


@given(answers())
def test_the_bytes_of_a_streamed_text_are_counted(answer: dict[str, Any]) -> None:
    characters = [character for text in answer["texts"] for character in text]
    assert read(streamed(answer)).text_bytes == sum(len(msgspec.json.encode(c)) - 2 for c in characters)


@given(answers(), st.integers(0), st.lists(st.integers(0), max_size=5))
def test_a_cut_stream_is_unfinished_until_the_vendor_said_why_it_stopped(
    answer: dict[str, Any], end: int, places: list[int]
) -> None:
    data = streamed(answer)
    prefix = data[: end % (len(data) + 1)]
    stream = read(prefix, places)
    assert stream.error is None
    assert stream.finished == (
        f'"finish_reason":"{answer["finish"]}"'.encode() in b"".join(FrameSplitter().feed(prefix))
    )


@given(answers(), st.data())
def test_mutated_bytes_of_a_stream_raise_only_vendor_errors(answer: dict[str, Any], data: st.DataObject) -> None:
    mutated = mutate(streamed(answer), data)
    assert all(chunk in ("START", "CONTENT", "USAGE", "DONE") for chunk in read(mutated).kinds)


@given(answers(), st.data())
def test_mutated_bytes_of_an_answer_raise_only_vendor_errors(answer: dict[str, Any], data: st.DataObject) -> None:
    raises_only_vendor_errors(mutate(whole(answer), data))


@given(st.binary() | JSON.map(lambda value: written(value, False, True)))
def test_an_answer_of_any_bytes_raises_only_vendor_errors(body: bytes) -> None:
    raises_only_vendor_errors(body)
    assert isinstance(OPENAI.error(400, {}, body), VendorRefused)
    read(b"data: " + body + b"\n\n")
    read(b"event: error\ndata: " + body + b"\n\n")
    read(b'data: {"choices":[{"delta":{"content":' + body + b"}}]}\n\n")


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@pytest.mark.parametrize("body", [DEEP, b'{"error":' + DEEP + b"}", b"[" * 100_000])
def test_deep_nesting_raises_only_vendor_errors(body: bytes) -> None:
    raises_only_vendor_errors(body)
    assert isinstance(OPENAI.error(500, {}, body), VendorFailed)
    assert isinstance(read(b"data: " + body + b"\n\n").error, VendorError)
    assert isinstance(read(b"event: error\ndata: " + body + b"\n\n").error, VendorError)


def raises_only_vendor_errors(body: bytes) -> None:
    try:
        OPENAI.response(body, STAMP)
    except VendorError:
        return


def mutate(data: bytes, draw: st.DataObject) -> bytes:
    place = draw.draw(st.integers(0, len(data) - 1))
    length = draw.draw(st.integers(0, 4))
    return data[:place] + draw.draw(st.binary(max_size=4)) + data[place + length :]


# --- frames -----------------------------------------------------------------------------------------------------------

CONTENT = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'


def started() -> OpenAIStream:
    scan = OpenAIStream(STAMP)
    assert scan.scan(CONTENT) is Kind.CONTENT
    return scan


def test_frames_of_mere_content_that_came_together_are_relayed_together() -> None:
    stream = OpenAIStream(STAMP)
    list(stream.feed(CONTENT))
    assert list(stream.feed(CONTENT * 3)) == [(Kind.CONTENT, CONTENT * 3)]


def test_a_chunk_is_plain_where_it_would_be_relayed_as_it_is() -> None:
    stream = OpenAIStream(STAMP)
    assert not stream.plain(CONTENT)  # the first content is looked at
    list(stream.feed(CONTENT))
    assert stream.plain(CONTENT)
    list(stream.feed(CONTENT[:9]))
    assert not stream.plain(CONTENT)


@pytest.mark.parametrize("other", [b": alive\n\n", b'data: {"error":{"message":"x"}}\n\n', b"event: x\ndata: {}\n\n"])
def test_frames_among_which_is_another_are_read_one_by_one(other: bytes) -> None:
    stream = OpenAIStream(STAMP)
    list(stream.feed(CONTENT))
    assert next(stream.feed(CONTENT + other + CONTENT)) == (Kind.CONTENT, CONTENT)


@pytest.mark.parametrize(
    "delta",
    [
        b'{"content":"a"}',
        b'{"content":" "}',
        b'{"content":[{"type":"text","text":"a"}]}',
        b'{"tool_calls":[{"index":0,"function":{"name":"f","arguments":""}}]}',
        b'{"function_call":{"name":"f"}}',
        b'{"reasoning":"a"}',
        b'{"reasoning_content":"a"}',
        b'{"refusal":"a"}',
        b'{"audio":{"id":"a"}}',
    ],
)
def test_content_starts_a_stream(delta: bytes) -> None:
    frame = b'data: {"choices":[{"delta":%b,"finish_reason":null}]}\n\n' % delta
    assert OpenAIStream(STAMP).scan(frame) is Kind.CONTENT


@pytest.mark.parametrize(
    "frame",
    [
        b": keep-alive\n\n",
        b"\n\n",
        b"retry: 3\n\n",
        b"data: {}\n\n",
        b'data: {"choices":[]}\n\n',
        b'data: {"choices":null,"usage":null,"error":null}\n\n',
        b'data: {"choices":[{"delta":null}]}\n\n',
        b'data: {"choices":[{"delta":{"role":"assistant","content":"","refusal":null,"tool_calls":[]}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":null},"finish_reason":""}]}\n\n',
    ],
)
def test_what_is_not_content_leaves_a_stream_unstarted(frame: bytes) -> None:
    assert OpenAIStream(STAMP).scan(frame) is Kind.START


def test_a_finish_reason_of_one_choice_is_seen_beside_an_unfinished_one() -> None:
    scan = started()
    scan.scan(b'data: {"choices":[{"finish_reason":null,"delta":{"content":"b"}},{"finish_reason":"stop"}]}\n\n')
    assert scan.finished


def test_a_usage_is_seen_beside_a_null_one() -> None:
    scan = started()
    scan.scan(b'data: {"x":{"usage":null},"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n')
    assert scan.usage == Usage(input=3, output=1)


def test_content_that_quotes_the_words_of_the_scan_is_content() -> None:
    text = json.dumps('"usage":{} "error" "finish_reason":"stop" [DONE] event: error')
    scan = started()
    frame = b'data: {"choices":[{"delta":{"content":%b},"finish_reason":null}],"usage":null}\n\n' % text.encode()
    assert scan.scan(frame) is Kind.CONTENT
    assert (scan.finished, scan.usage) == (False, None)


@pytest.mark.parametrize(
    "frame", [b"data: x\n\n", b'data: {"choices":5}\n\n', b'data: {"choices":[}\n\n', b"data: []\n\n"]
)
def test_a_frame_that_is_not_a_chunk_breaks_an_unstarted_stream(frame: bytes) -> None:
    with pytest.raises(VendorBroke):
        OpenAIStream(STAMP).scan(frame)


@pytest.mark.parametrize(
    "frame",
    [
        b"event: error\ndata: {}\n\n",
        b"event: error\n\n",
        b"data: {}\nevent: error\n\n",
        b'data: {"error":{"message":"no"}}\n\n',
        b'data: {"error":"no"}\n\n',
        b'data: {"error":{"code":12.5}}\n\n',
        b'data: {"choices":[{"delta":{"content":"b"}}],"error":{"code":500}}\n\n',
    ],
)
def test_an_error_in_mid_stream_is_raised(frame: bytes) -> None:
    with pytest.raises(VendorFailed):
        started().scan(frame)


def test_the_usage_beside_an_error_is_kept() -> None:
    scan = started()
    with pytest.raises(VendorRefused):
        scan.scan(b'data: {"error":{"code":400},"choices":[],"usage":{"prompt_tokens":43,"completion_tokens":10}}\n\n')
    assert scan.usage == Usage(input=43, output=10)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("429", VendorThrottled),
        ('"429"', VendorThrottled),
        ('"rate_limit_exceeded"', VendorThrottled),
        ("400", VendorRefused),
        ("402", VendorMisconfigured),
        ("502", VendorFailed),
        ("1", VendorFailed),
        ('"server_error"', VendorFailed),
        ("null", VendorFailed),
    ],
)
def test_an_error_in_an_answer_is_classed_by_its_code(code: str, error: type[VendorError]) -> None:
    with pytest.raises(VendorError) as raised:
        OPENAI.response(b'{"error":{"message":"m","code":%b}}' % code.encode(), STAMP)
    assert type(raised.value) is error


@pytest.mark.parametrize("status", [*range(300, 309), *range(400, 600)])
def test_every_status_is_classed(status: int) -> None:
    error = OPENAI.error(status, {}, b"")
    assert error.vendor_status == status
    expected: type[VendorError] = VendorRefused
    if status in (401, 402, 403, 404):
        expected = VendorMisconfigured
    elif status == 429:
        expected = VendorThrottled
    elif status in (408, 409) or status >= 500 or status < 400:
        expected = VendorFailed
    assert type(error) is expected


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "0", "retry-after": "1"}, 1.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "99999999"}, None),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:07 GMT", "date": "Thu, 01 Jan 2026 00:00:00 GMT"}, 7.0),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:00 GMT", "date": "Thu, 01 Jan 2026 00:00:07 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:07 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:07 GMT", "date": "now"}, None),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:07", "date": "Thu, 01 Jan 2026 00:00:00 GMT"}, None),
    ],
)
def test_the_wait_that_a_vendor_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert OPENAI.error(429, headers, b"").retry_after_seconds == seconds


# --- recorded traffic -------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
EXCHANGES = [
    exchange
    for exchange in (recordings.load(FOLDER) if FOLDER else [])
    if exchange.vendor in ("openai", "openai-compatible", "azure-openai")
]
CHATS = [exchange for exchange in EXCHANGES if "chat/completions" in exchange.request.uri]
STREAMS = [exchange for exchange in CHATS if exchange.response.status == 200 and exchange.response.streamed]
UNARY = [exchange for exchange in CHATS if exchange.response.status == 200 and not exchange.response.streamed]
FAILED = [exchange for exchange in EXCHANGES if exchange.response.status != 200]


def recorded(exchanges: list[Exchange]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


def vendor_totals(usages: list[dict[str, Any]]) -> tuple[int, int] | None:
    return (usages[-1]["prompt_tokens"], usages[-1]["completion_tokens"]) if usages else None


def totals(usage: Usage | None) -> tuple[int, int] | None:
    return None if usage is None else (usage.total_input, usage.total_output)


@needs_recordings
@recorded(STREAMS)
def test_a_recorded_stream_is_read(exchange: Exchange) -> None:
    chunks = [json.loads(data) for data in exchange.response.events() if data != "[DONE]"]
    stream = read(exchange.response.body)
    assert isinstance(stream.error, VendorError) == any(chunk.get("error") for chunk in chunks)
    assert totals(stream.usage) == vendor_totals([chunk["usage"] for chunk in chunks if chunk.get("usage")])
    finishes = [
        choice["finish_reason"]
        for chunk in chunks
        for choice in chunk.get("choices", ())
        if choice.get("finish_reason")
    ]
    assert stream.finish_reason == (finishes[-1] if finishes else None)
    assert stream.model == next(chunk["model"] for chunk in chunks if chunk["model"])


@needs_recordings
@recorded(STREAMS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_a_recorded_stream_cut_anywhere_is_relayed_byte_for_byte(exchange: Exchange, end: bytes) -> None:
    body = exchange.response.body.replace(b"\n", end)
    chance = random.Random(exchange.name)
    cuts = [list(range(0, len(body), size)) for size in (1, 2, 3, 7)]
    cuts += [[chance.randrange(len(body)) for _ in range(chance.randrange(1, 60))] for _ in range(20)]
    for places in cuts:
        splitter = FrameSplitter()
        frames = [frame for chunk in pieces(body, places) for frame in splitter.feed(chunk)]
        assert b"".join(frames) + splitter.rest == body
        assert frames == FrameSplitter().feed(body)


@needs_recordings
@recorded(UNARY)
def test_a_recorded_answer_is_read(exchange: Exchange) -> None:
    said = exchange.response.json()
    answer = OPENAI.response(exchange.response.body, STAMP)
    assert totals(answer.usage) == vendor_totals([said["usage"]])
    assert (answer.model, answer.finish_reason) == (said["model"], said["choices"][0]["finish_reason"])


@needs_recordings
@recorded(FAILED)
def test_a_recorded_error_is_classed_and_keeps_the_vendor_s_words(exchange: Exchange) -> None:
    status = exchange.response.status
    headers = {name: values[0] for name, values in exchange.response.headers.items()}
    error = OPENAI.error(status, headers, exchange.response.body)
    expected = {400: VendorRefused, 401: VendorMisconfigured, 404: VendorMisconfigured, 429: VendorThrottled}[status]
    assert type(error) is expected
    if isinstance(error, VendorRefused):
        assert json.dumps(error.message) in json.dumps(exchange.response.json())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 360.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-remaining-requests": "9", "x-ratelimit-reset-requests": "120ms"}, None),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s", "retry-after": "2"}, 2.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "soon"}, 0.0),
    ],
)
def test_without_a_wait_the_reset_of_what_is_used_up_counts(headers: dict[str, str], seconds: float | None) -> None:
    assert OPENAI.error(429, headers, b"{}").retry_after_seconds == seconds
