"""Routes beside chat and embeddings: what is read of a request, what goes out, what the answer tells the ledger."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import MOST_IMAGES, Usage, cost, estimate
from app.dialects import ROUTES, translator
from app.dialects.passed import AUDIO_BYTES_PER_SECOND, READERS
from app.errors import InvalidRequest, VendorBroke, VendorCannot, VendorError
from app.providers import PROVIDERS
from app.providers.translator import Kind
from app.wire import PassedRequest, Units
from loadtest.simulator import others
from loadtest.simulator.http import Request
from tests.test_anthropic_provider import pieces
from tests.translation import PRICE, STAMP, target

PASSED = translator(ROUTES["/v1/completions"], "openai")
NAMES = st.from_regex(r"[a-z]{1,8}(\[\])?", fullmatch=True)


def form(fields: dict[str, Any], files: list[tuple[str, tuple[str, bytes]]] | None = None) -> bytes:
    """As the official SDK's HTTP client writes it."""
    files = files or [("file", ("speech.wav", b"RIFF" * 2_000))]
    return httpx.Request("POST", "http://g", data=fields, files=files).read()


def read(route: str, body: bytes | dict[str, Any]) -> PassedRequest:
    return READERS["/v1" + route](body if isinstance(body, bytes) else json.dumps(body).encode())


def stamp(request: PassedRequest) -> Any:
    return msgspec.structs.replace(STAMP, request=request)


def parsed(sent: Any) -> dict[str, Any]:
    """The fields of what goes out, as another reader finds them."""
    headers = dict(sent.headers)
    return others.form(Request("POST", "", {}, headers, sent.body, 0, ""))


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_in_json_goes_on_as_it_came_with_the_target_s_model() -> None:
    body = b'{"model":"voice", "input":"caf\\u00e9","x":[1, 2]}'
    sent = PASSED.outgoing(read("/audio/speech", body), target("openai"))
    assert sent.body == b'{"model":"model-2026-01-01","input":"caf\\u00e9","x":[1, 2]}'
    assert sent.url == "https://openai.example/v1/audio/speech"


def test_a_form_goes_on_field_by_field_with_the_target_s_model() -> None:
    sent = PASSED.outgoing(read("/audio/transcriptions", form({"model": "ears", "language": "de"})), target("openai"))
    assert parsed(sent) == {"model": "model-2026-01-01", "language": "de", "file": b"RIFF" * 2_000}
    assert b'filename="speech.wav"' in sent.body
    assert b"ears" not in sent.body


@given(st.dictionaries(NAMES, st.text(max_size=20), max_size=4), st.binary(max_size=200))
def test_any_form_arrives_as_it_was_sent(fields: dict[str, str], content: bytes) -> None:
    fields = {name: value for name, value in fields.items() if name not in ("model", "file", "stream")}
    written = form(fields | {"model": "ears"}, [("file", ("a.wav", content))])
    sent = PASSED.outgoing(read("/audio/transcriptions", written), target("openai"))
    names = [field.name for field in READERS["/v1/audio/transcriptions"](sent.body).form]
    assert sorted(names) == sorted([*fields, "model", "file"])
    for field in READERS["/v1/audio/transcriptions"](sent.body).form:
        expected = {"model": b"model-2026-01-01", "file": content}
        assert field.value == expected.get(field.name, fields.get(field.name, "").encode())


def test_a_file_that_holds_our_boundary_gets_another() -> None:
    content = b"--gateway-form\r\n--gateway-form-\r\n"
    sent = PASSED.outgoing(
        read("/audio/transcriptions", form({"model": "ears"}, [("file", ("a.wav", content))])), target("openai")
    )
    assert parsed(sent)["file"] == content


def part(head: str, value: str = "ears") -> bytes:
    return f"--b\r\n{head}\r\n\r\n{value}\r\n".encode()


NAMED = 'Content-Disposition: form-data; name="%s"'
MODEL = part(NAMED % "model")
FILE = part(NAMED % "file" + '; filename="a.wav"', "RIFF")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"preamble\r\n" + MODEL + FILE + b"--b--\r\n",
        MODEL + FILE,
        MODEL + FILE + b"--b--\r\nepilogue",
        MODEL + MODEL + FILE + b"--b--\r\n",
        MODEL + FILE + FILE + b"--b--\r\n",
        MODEL + b"--b--\r\n",
        FILE + b"--b--\r\n",
        part('Content-Disposition: form-data; name="model"; filename="x"') + FILE + b"--b--\r\n",
        part('Content-Disposition: form-data; name="model"; name="x"') + FILE + b"--b--\r\n",
        part('Content-Disposition: attachment; name="model"') + FILE + b"--b--\r\n",
        part('Content-Disposition: form-data; name="model"\r\nX-Other: 1') + FILE + b"--b--\r\n",
        part(f'{NAMED % "a"}\r\n{NAMED % "model"}') + FILE + b"--b--\r\n",
        MODEL.replace(b"\r\n\r\n", b"\r\n") + FILE + b"--b--\r\n",
        part('Content-Disposition: form-data; name="model"', "../x") + FILE + b"--b--\r\n",
        MODEL.replace(b"ears", b"\xff") + FILE + b"--b--\r\n",
    ],
)  # fmt: skip
def test_a_form_that_two_readers_could_take_for_two_things_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read("/audio/transcriptions", body)


@given(st.lists(st.integers(0, 400), max_size=3), st.binary(min_size=1, max_size=3))
def test_a_form_with_noise_is_read_or_refused(places: list[int], noise: bytes) -> None:
    body = form({"model": "ears", "prompt": "names"}, [("file", ("a.wav", b"RIFF"))])
    for place in places:
        body = body[:place] + noise + body[place + 1 :]
    try:
        sent = PASSED.outgoing(read("/audio/transcriptions", body), target("openai"))
    except InvalidRequest:
        return
    assert b'name="model"\r\n\r\nmodel-2026-01-01\r\n' in sent.body


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/completions", {"prompt": "Hi"}, "model"),
        ("/completions", {"model": "a", "prompt": 1}, "prompt"),
        ("/completions", {"model": "a", "n": 1_000}, "n"),
        ("/moderations", {"model": "a"}, "input"),
        ("/audio/speech", {"model": "a"}, "input"),
        ("/audio/speech", {"model": "a", "input": 7}, "input"),
        ("/images/generations", {"model": "a"}, "prompt"),
        ("/images/generations", {"model": "a", "prompt": "p", "n": 0}, "n"),
        ("/images/edits", form({"model": "a", "prompt": "p", "n": "many"}), "n"),
    ],
)
def test_what_no_vendor_could_take_is_refused_by_name(route: str, body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(route, body)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("route", "body", "units", "choices"),
    [
        ("/completions", {"model": "a", "prompt": "Hi", "n": 2, "best_of": 3}, None, 3),
        ("/completions", {"model": "a", "prompt": ["Hi", "Ho"], "n": 2}, None, 4),
        ("/completions", {"model": "a", "prompt": [1, 2, 3]}, None, 1),
        ("/moderations", {"model": "a", "input": "Hi"}, Units(), 1),
        ("/audio/speech", {"model": "a", "input": "Hi é"}, Units(characters=4), 1),
        ("/audio/transcriptions", form({"model": "a"}), Units(seconds=-(-8_000 // AUDIO_BYTES_PER_SECOND)), 1),
        ("/images/generations", {"model": "a", "prompt": "p", "n": 3}, Units(images=3), 1),
        ("/images/edits", form({"model": "a", "prompt": "p", "n": "2"}), Units(images=2), 1),
        ("/images/edits", {"model": "a", "prompt": "p"}, Units(images=1), 1),
    ],
)
def test_what_a_call_reserves_is_in_its_request(route: str, body: Any, units: Any, choices: int) -> None:
    request = read(route, body)
    assert (request.units, request.choices) == (units, choices)


def test_azure_has_them_under_its_deployments_but_no_moderations() -> None:
    azure = translator(ROUTES["/v1/moderations"], "azure")
    sent = azure.outgoing(read("/audio/transcriptions", form({"model": "a"})), target("azure"))
    assert "/openai/deployments/model-2026-01-01/audio/transcriptions?api-version=" in sent.url
    with pytest.raises(VendorCannot):
        azure.outgoing(read("/moderations", {"model": "a", "input": "Hi"}), target("azure"))


@pytest.mark.parametrize("kind", ["anthropic", "bedrock", "gemini", "vertex"])
@pytest.mark.parametrize("route", READERS)
def test_a_vendor_without_them_is_no_target(kind: str, route: str) -> None:
    bodies = {"/v1/audio/transcriptions": form({"model": "a"}), "/v1/audio/translations": form({"model": "a"})}
    body = bodies.get(route, b'{"model":"a","input":"Hi","prompt":"p"}')
    with pytest.raises(VendorCannot):
        translator(ROUTES[route], kind).outgoing(READERS[route](body), target(kind))


def test_members_that_the_target_drops_are_left_out() -> None:
    at = msgspec.structs.replace(target("openai"), drop_params=frozenset({"language", "user"}))
    sent = PASSED.outgoing(read("/audio/transcriptions", form({"model": "a", "language": "de"})), at)
    assert set(parsed(sent)) == {"model", "file"}
    drawn = PASSED.outgoing(read("/images/generations", {"model": "a", "prompt": "p", "user": "u"}), at)
    assert set(json.loads(drawn.body)) == {"model", "prompt"}


# --- answers ----------------------------------------------------------------------------------------------------------

SPEECH = {"model": "a", "input": "Hello"}
IMAGES = {"model": "a", "prompt": "p", "n": 2}
TOKENS = {"input_tokens": 30, "output_tokens": 5, "total_tokens": 35}


@pytest.mark.parametrize(
    ("route", "asked", "told", "usage"),
    [
        ("/completions", {"model": "a", "prompt": "Hi"}, {"choices": [{"text": "Ho", "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, Usage(input=3, output=2)),
        ("/moderations", {"model": "a", "input": "Hi"}, {"results": []}, Usage()),
        ("/images/generations", IMAGES, {"data": [{}, {}]}, Usage(images=2)),
        ("/images/generations", IMAGES, {"data": [{}], "usage": TOKENS | {"input_tokens_details":
         {"text_tokens": 10, "image_tokens": 20}}}, Usage(input=10, image_input=20, output=5)),
        ("/audio/transcriptions", form({"model": "a"}), {"text": "t", "usage": TOKENS | {"type": "tokens",
         "input_token_details": {"audio_tokens": 30, "text_tokens": 0}}}, Usage(audio_input=30, output=5)),
        ("/audio/transcriptions", form({"model": "a"}), {"text": "t", "usage": {"type": "duration", "seconds": 9}},
         Usage(seconds=9)),
        ("/audio/transcriptions", form({"model": "a"}), {"text": "t", "duration": 8.47}, Usage(seconds=9)),
        ("/audio/translations", form({"model": "a"}), {"text": "t"}, None),
        ("/images/generations", IMAGES, {"data": [{}], "usage": {"input_tokens": -1}}, Usage(images=1)),
    ],
)  # fmt: skip
def test_an_answer_tells_what_it_is_paid_by(route: str, asked: Any, told: Any, usage: Usage | None) -> None:
    request = read(route, asked)
    body = json.dumps(told).encode()
    answer = PASSED.answer(body, request, stamp(request), {"content-type": "application/json"})
    assert (answer.body, answer.usage) == (body, usage)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("audio/mpeg", "audio/mpeg"),
        ("text/html", "application/octet-stream"),
        ("audio/x\r\na: b", "application/octet-stream"),
    ],
)  # fmt: skip
def test_sound_keeps_its_type_and_is_paid_by_the_character(kind: str, known: str) -> None:
    request = read("/audio/speech", SPEECH)
    answer = PASSED.answer(b"ID3", request, stamp(request), {"content-type": kind})
    assert (answer.usage, answer.content_type) == (Usage(characters=5), known.encode())


@pytest.mark.parametrize("body", [b"", b"<", b'{"error":{"code":"x"}}'])
def test_an_answer_that_is_none_is_an_error(body: bytes) -> None:
    request = read("/audio/speech", SPEECH)
    with pytest.raises(VendorError):
        PASSED.answer(body, request, stamp(request), {"content-type": "application/json"})


EVENTS = {
    "/completions": ({"model": "a", "prompt": "Hi", "stream": True}, [
        {"model": "m", "choices": [{"text": "Ho", "finish_reason": None}]},
        {"model": "m", "choices": [{"text": "", "finish_reason": "stop"}]},
        {"model": "m", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}],
        Usage(input=3, output=2)),
    "/audio/speech": (SPEECH | {"stream_format": "sse"}, [
        {"type": "speech.audio.delta", "audio": "AAAA"}, {"type": "speech.audio.done", "usage": TOKENS}],
        Usage(input=30, audio_output=5)),
    "/images/generations": (IMAGES | {"stream": True}, [
        {"type": "image_generation.partial_image", "b64_json": "AA"},
        {"type": "image_generation.completed", "b64_json": "AA", "usage": TOKENS}], Usage(input=30, output=5)),
    "/audio/transcriptions": (form({"model": "a", "stream": "true"}), [
        {"type": "transcript.text.delta", "delta": "Ho"},
        {"type": "transcript.text.done", "text": "Ho", "usage": {"type": "duration", "seconds": 4}}], Usage(seconds=4)),
}  # fmt: skip


@given(st.sampled_from(sorted(EVENTS)), st.lists(st.integers(0, 500), max_size=8))
def test_a_stream_is_relayed_wherever_it_is_cut(route: str, places: list[int]) -> None:
    asked, events, usage = EVENTS[route]
    data = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)
    request = read(route, asked)
    reader = PASSED.stream(stamp(request))
    assert request.stream
    assert not reader.finished
    frames = [frame for chunk in pieces(data, places) for _, frame in reader.feed(chunk)]
    assert b"".join(frames) == data
    assert (reader.usage, reader.finished) == (usage, True)
    assert [kind for kind, _ in reader.end()] == [Kind.DONE]


@pytest.mark.parametrize(
    "event", [b'data: {"error":{"message":"No."}}\n\n', b"data: {\n\n", b"event: error\ndata: {}\n\n"]
)
def test_a_failure_in_a_stream_is_an_error(event: bytes) -> None:
    reader = PASSED.stream(stamp(read("/images/generations", IMAGES)))
    with pytest.raises(VendorError):
        list(reader.feed(event))


def test_the_text_of_a_hung_up_stream_is_measured() -> None:
    reader = PASSED.stream(stamp(read("/completions", {"model": "a", "prompt": "Hi"})))
    assert reader.text_bytes(b'data: {"choices":[{"text":"Hello"}]}\n\ndata: {"delta":"you"}\n\n') == 8


# --- money ------------------------------------------------------------------------------------------------------------


def test_units_are_charged_at_their_price_and_at_a_ceiling_without_one() -> None:
    price = msgspec.structs.replace(PRICE, images=40_000_000_000_000, seconds=-1)
    assert cost(Usage(images=2), price).total_nanos == 80_000_000
    assert cost(Usage(images=2), price).priced
    unknown = msgspec.structs.replace(PRICE, images=-1)
    assert cost(Usage(images=1), unknown).total_nanos == MOST_IMAGES // 1_000_000
    assert not cost(Usage(images=1), unknown).priced
    assert cost(Usage(input=1), unknown).priced


def test_units_are_no_tokens() -> None:
    assert Usage(images=2, seconds=3, characters=4).total == 0
    assert estimate("speech", 10, 5, Units(characters=7)) == Usage(characters=7)
    assert estimate("moderations", 10, 5, Units()) == Usage()


def test_a_discount_leaves_an_unknown_price_unknown() -> None:
    price = msgspec.structs.replace(PRICE, images=1_000, seconds=-1).less(5_000)
    assert (price.images, price.seconds) == (500, -1)


def test_only_openai_s_shape_has_them() -> None:
    assert [kind for kind in PROVIDERS if translator(ROUTES["/v1/completions"], kind).passed] == [
        kind for kind in PROVIDERS if kind not in ("anthropic", "bedrock", "gemini", "vertex")
    ]


def test_an_empty_stream_of_bytes_is_broken() -> None:
    request = read("/audio/speech", SPEECH)
    with pytest.raises(VendorBroke):
        PASSED.answer(b"", request, stamp(request), {})
