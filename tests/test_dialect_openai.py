"""The front door's OpenAI dialect: what is read of a request, and what is refused with which words."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dialects import openai_chat
from app.dialects.openai_chat import MAX_CHOICES, MAX_OUTPUT_TOKENS, error_body, error_frames, read
from app.errors import GatewayError, InvalidRequest, RateLimitExceeded, UpstreamUnavailable, VendorRefused
from app.sse import FrameSplitter, data_of


def body(**members: object) -> bytes:
    return json.dumps({"model": "support-fast", "messages": [{"role": "user", "content": "hi"}]} | members).encode()


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000

MALFORMED: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", None),
    "not JSON": (b"model=support-fast", None),
    "cut": (body()[:-1], None),
    "two documents": (body() + body(), None),
    "a list": (b"[]", None),
    "a string": (b'"hi"', None),
    "null": (b"null", None),
    "NaN": (b'{"model":"a","messages":[],"temperature":NaN}', None),
    "Infinity": (b'{"model":"a","messages":[],"temperature":-Infinity}', None),
    "a byte order mark": (b"\xef\xbb\xbf" + body(), None),
    "not UTF-8 in a value": (b'{"model":"a","messages":["\xff"]}', None),
    "not UTF-8 in a name": (b'{"model":"a","messages":[],"\xff":1}', None),
    "half a surrogate in a name": (b'{"model":"a","messages":[],"\\ud800":1}', None),
    "half a surrogate in the model": (b'{"model":"\\ud800","messages":[]}', None),
    "deep nesting": (DEEP, None),
    "deep nesting in the messages": (b'{"model":"a","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "no model": (b'{"messages":[]}', "model"),
    "model null": (body(model=None), "model"),
    "model a number": (body(model=5), "model"),
    "model empty": (body(model=""), "model"),
    "model with a slash": (body(model="openai/gpt-4o"), "model"),
    "model with a line break": (body(model="a\n"), "model"),
    "model too long": (body(model="a" * 65), "model"),
    "no messages": (b'{"model":"a"}', "messages"),
    "messages null": (body(messages=None), "messages"),
    "messages a string": (body(messages="hi"), "messages"),
    "messages an object": (body(messages={}), "messages"),
    "stream a string": (body(stream="true"), "stream"),
    "stream a number": (body(stream=1), "stream"),
    "stream_options a string": (body(stream=True, stream_options="usage"), "stream_options"),
    "include_usage a string": (body(stream=True, stream_options={"include_usage": "yes"}), "stream_options"),
    "max_tokens a string": (body(max_tokens="5"), "max_tokens"),
    "max_tokens a fraction": (body(max_tokens=1.5), "max_tokens"),
    "max_tokens huge": (body(max_tokens=10**400), "max_tokens"),
    "max_tokens beyond any model": (body(max_tokens=MAX_OUTPUT_TOKENS + 1), "max_tokens"),
    "max_completion_tokens huge": (body(max_completion_tokens=10**30), "max_completion_tokens"),
    "max_completion_tokens below zero": (body(max_completion_tokens=-1), "max_completion_tokens"),
    "n a string": (body(n="2"), "n"),
    "n huge": (body(n=MAX_CHOICES + 1), "n"),
    "n zero": (body(n=0), "n"),
    "n below zero": (body(n=-1), "n"),
    "duplicate model, the last one wrong": (b'{"model":"a","messages":[],"model":5}', "model"),
}


@pytest.mark.parametrize(("malformed", "param"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_body_is_refused_with_a_sentence_and_its_place(malformed: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(malformed)
    assert raised.value.param == param
    assert raised.value.message.endswith(".")
    if param is not None:
        assert f"`{param}`" in raised.value.message


def test_the_place_of_a_byte_that_is_not_utf8_is_named() -> None:
    with pytest.raises(InvalidRequest, match="not UTF-8 at byte 26"):
        read(b'{"model":"a","messages":["\xff"]}')


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(arbitrary: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(arbitrary)


@given(st.integers(0, len(body(stream=True, n=2, max_tokens=5))), st.integers(0, 5), st.binary(max_size=5))
def test_a_mutated_body_is_read_or_refused(place: int, length: int, put: bytes) -> None:
    good = body(stream=True, n=2, max_tokens=5)
    try:
        read(good[:place] + put + good[place + length :])
    except InvalidRequest:
        return


def test_the_members_are_kept_as_the_client_wrote_them() -> None:
    request = read(b' { "model" : "a" , "messages" : [ 1 , 2.50 ] ,\n "x" : {"y" : 1e2 } } ')
    assert {name: bytes(value) for name, value in request.fields.items()} == {
        "model": b'"a"',
        "messages": b"[ 1 , 2.50 ]",
        "x": b'{"y" : 1e2 }',
    }


@pytest.mark.parametrize(
    ("members", "name", "value"),
    [
        ({}, "alias", "support-fast"),
        ({}, "stream", False),
        ({"stream": None}, "stream", False),
        ({"stream": True}, "stream", True),
        ({"stream": True}, "include_usage", False),
        ({"stream": True, "stream_options": None}, "include_usage", False),
        ({"stream": True, "stream_options": {}}, "include_usage", False),
        ({"stream": True, "stream_options": {"include_usage": None}}, "include_usage", False),
        ({"stream": True, "stream_options": {"include_usage": True, "x": 1}}, "include_usage", True),
        ({"stream_options": {"include_usage": True}}, "include_usage", False),
        ({"stream_options": "left to the vendor"}, "include_usage", False),
        ({}, "max_output_tokens", None),
        ({"max_tokens": None}, "max_output_tokens", None),
        ({"max_tokens": 0}, "max_output_tokens", 0),
        ({"max_tokens": 5}, "max_output_tokens", 5),
        ({"max_completion_tokens": 7}, "max_output_tokens", 7),
        ({"max_completion_tokens": 7, "max_tokens": 5}, "max_output_tokens", 7),
        ({"max_completion_tokens": None, "max_tokens": 5}, "max_output_tokens", 5),
        ({}, "choices", 1),
        ({"n": None}, "choices", 1),
        ({"n": 3}, "choices", 3),
    ],
)
def test_what_is_read_of_a_request(members: dict[str, object], name: str, value: object) -> None:
    assert getattr(read(body(**members)), name) == value


def test_the_last_of_two_members_of_one_name_counts() -> None:
    request = read(b'{"model":"a","messages":[],"model":"b"}')
    assert (request.alias, list(request.fields)) == ("b", ["model", "messages"])


def test_an_error_is_written_in_openai_s_envelope() -> None:
    error = InvalidRequest("`n`: no.", param="n")
    assert json.loads(error_body(error)) == {
        "error": {"message": "`n`: no.", "type": "invalid_request_error", "param": "n", "code": "invalid_request"}
    }


def test_a_limit_that_tripped_is_named() -> None:
    error = RateLimitExceeded("Wait.", limit="tenant_rpm", retry_after_seconds=3)
    assert json.loads(error_body(error))["error"]["limit"] == "tenant_rpm"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (VendorRefused("No.", vendor_code="context_length_exceeded", kind="bad"), "bad", "context_length_exceeded"),
        (VendorRefused("No."), "invalid_request_error", "invalid_request"),
    ],
)
def test_a_vendor_s_refusal_keeps_the_vendor_s_words(error: VendorRefused, kind: str, code: str) -> None:
    inside = json.loads(error_body(error))["error"]
    assert (inside["message"], inside["type"], inside["code"]) == ("No.", kind, code)


def test_an_error_in_a_stream_is_one_event_and_the_terminator() -> None:
    error = UpstreamUnavailable('Said "no"\nand ☂.')
    frames = FrameSplitter().feed(error_frames(error))
    assert [data_of(frame) for frame in frames] == [error_body(error), b"[DONE]"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (InvalidRequest("No.", param="n"), openai.BadRequestError),
        (RateLimitExceeded("Wait.", limit="tenant_rpm"), openai.RateLimitError),
        (UpstreamUnavailable("Later."), openai.InternalServerError),
    ],
)
def test_the_openai_sdk_reads_the_error(error: GatewayError, raised: type[openai.APIStatusError]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(error.status, content=error_body(error), headers={"content-type": "application/json"})

    http_client = httpx.Client(transport=httpx.MockTransport(answer))
    with openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http_client, max_retries=0) as client:
        with pytest.raises(raised) as caught:
            client.chat.completions.create(model="a", messages=[])
        assert (caught.value.code, caught.value.param, caught.value.type) == (error.code, error.param, error.type)


def test_the_openai_sdk_raises_on_an_error_in_a_stream() -> None:
    content = openai_chat.error_frames(UpstreamUnavailable("Later."))

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=content, headers={"content-type": "text/event-stream"})

    http_client = httpx.Client(transport=httpx.MockTransport(answer))
    with openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http_client, max_retries=0) as client:
        stream = client.chat.completions.create(model="a", messages=[], stream=True)
        with pytest.raises(openai.APIError, match=r"Later\."):
            list(stream)
