"""Embeddings on their way through a gateway with a scripted vendor: what is read, sent, answered and charged."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse

from app.ambient import Ambient
from app.config import Config
from app.core import Intent, Usage, interrupted
from app.dialects import ROUTES
from app.dialects.openai_embeddings import read
from app.errors import InvalidRequest, VendorBroke, VendorCannot, VendorError
from app.ledger import read_lines
from app.providers import embed_shape
from app.providers.openai import OPENAI
from tests import recordings
from tests.gateway_parts import ALIAS, Rooms, ScriptedAnswer, config, request
from tests.recordings import Exchange
from tests.test_gateway import serve
from tests.translation import STAMP, target

FOLDER = os.environ.get("RECORDINGS")
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8)


def body(**members: object) -> bytes:
    return json.dumps({"model": ALIAS, "input": "hello"} | members).encode()


def answer(*vectors: object, **members: object) -> bytes:
    data = [{"object": "embedding", "embedding": vector, "index": place} for place, vector in enumerate(vectors)]
    written = {"object": "list", "data": data, "model": "text-embedding-3-small"}
    return json.dumps(written | {"usage": {"prompt_tokens": 5, "total_tokens": 5}} | members).encode()


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "inputs", "tokens"),
    [
        ("hello", ["hello"], 0),
        (["hello", "you"], ["hello", "you"], 0),
        ([9906, 11], [[9906, 11]], 2),
        ([[9906, 11], [1917]], [[9906, 11], [1917]], 3),
    ],
    ids=["a text", "texts", "tokens", "lists of tokens"],
)
def test_an_input_is_texts_or_lists_of_tokens(written: object, inputs: object, tokens: int) -> None:
    asked = read(body(input=written))
    assert (asked.inputs, asked.input_tokens) == (inputs, tokens)


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [[1], 2]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"model": None}, "model"),
        ({"model": "a/b"}, "model"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "256"}, "dimensions"),
    ],
)
def test_a_malformed_request_is_refused_with_the_member_at_fault(members: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(body(**members))
    assert raised.value.param == param


def test_a_request_without_input_says_what_is_missing() -> None:
    with pytest.raises(InvalidRequest, match="`input` is required"):
        read(b'{"model":"embed-small"}')


def test_members_that_we_do_not_know_reach_a_vendor_of_the_same_shape_as_they_came() -> None:
    asked = read(b'{"input" : [ "h\\u00e9" ],"model":"embed-small","x_new":{"a" : 1.50}}')
    assert OPENAI.outgoing(asked, target("openai")).body == (
        b'{"input":[ "h\\u00e9" ],"model":"model-2026-01-01","x_new":{"a" : 1.50}}'
    )


def test_dropped_members_stay_here() -> None:
    at = msgspec.structs.replace(target("openai"), drop_params=frozenset({"user"}))
    assert b"user" not in OPENAI.outgoing(read(body(user="u")), at).body


# --- answers ----------------------------------------------------------------------------------------------------------


@given(st.lists(FLOATS, min_size=1, max_size=3))
def test_numbers_and_base64_are_the_same_vectors(vectors: list[list[float]]) -> None:
    written = answer(*vectors, x_new=[1, 2.50])
    asked = read(body(encoding_format="base64"))
    answered = json.loads(OPENAI.answer(written, asked, STAMP).body)
    unpacked = [
        list(struct.unpack(f"<{len(vector)}f", base64.b64decode(item["embedding"])))
        for item, vector in zip(answered["data"], vectors, strict=True)
    ]
    assert unpacked == vectors
    assert answered["x_new"] == [1, 2.50]


def test_an_answer_in_the_encoding_asked_for_is_relayed_byte_by_byte() -> None:
    written = answer("AAAAPw==", "AACAPw==")
    assert OPENAI.answer(written, read(body(encoding_format="base64")), STAMP).body == written


def test_vectors_of_another_vendor_become_the_same_form() -> None:
    asked = read(body(input=["a", "b"]))
    told = embed_shape.answer(asked, STAMP, "titan-v2", [[0.5, 1.0], [0.25, -1.0]], 7)
    assert told.usage == Usage(embedding=7)
    assert json.loads(told.body) == {
        "object": "list",
        "model": "titan-v2",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, 1.0]},
            {"object": "embedding", "index": 1, "embedding": [0.25, -1.0]},
        ],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


def test_an_input_without_a_vector_breaks_the_answer() -> None:
    with pytest.raises(VendorBroke):
        embed_shape.answer(read(body(input=["a", "b"])), STAMP, None, [[0.5]], 7)


@pytest.mark.parametrize(
    ("members", "param"), [({"input": [1, 2]}, "input"), ({"dimensions": 8}, "dimensions"), ({"user": "u"}, "user")]
)
def test_what_a_vendor_of_texts_cannot_carry_is_refused_by_name(members: dict[str, object], param: str) -> None:
    with pytest.raises(VendorCannot) as raised:
        embed_shape.texts(read(body(**members)), target("openai"), frozenset())
    assert raised.value.param == param


def test_what_a_vendor_of_texts_can_carry_passes() -> None:
    asked = read(body(input=["a"], dimensions=8, encoding_format="base64", user=None))
    assert embed_shape.texts(asked, target("openai"), frozenset({"dimensions"})) == ["a"]


@given(st.binary(max_size=200) | st.builds(lambda cut: answer([0.5, 1.0])[:cut], st.integers(0, 120)))
def test_bytes_that_are_no_answer_raise_our_errors_only(written: bytes) -> None:
    with contextlib.suppress(VendorError):
        OPENAI.answer(written, read(body(encoding_format="base64")), STAMP)


# --- the journey ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Any]:
    made: list[Rooms] = []

    def make(*script: ScriptedAnswer) -> Rooms:
        made.append(Rooms(tmp_path, *script, ambient=Ambient()))
        return made[-1]

    yield make
    for one in made:
        one.spool.close()


def embedding(serves: str = "embeddings") -> Config:
    """A configuration whose alias serves embeddings."""
    known = config()
    alias = msgspec.structs.replace(known.aliases[ALIAS], serves=serves)
    return msgspec.structs.replace(known, aliases={ALIAS: alias})


def call_with(rooms: Rooms, written: bytes, serves: str = "embeddings") -> tuple[Any, bytes]:
    return serve(rooms, written, dialect=ROUTES["/v1/embeddings"], config=embedding(serves))


def test_a_row_has_the_tokens_as_embedding_tokens(rooms: Any) -> None:
    at = rooms(ScriptedAnswer(answer([0.5])))
    reply, sent = call_with(at, body())
    row = at.row()
    assert (reply.status, sent) == (200, answer([0.5]))
    assert (row["operation"], row["usage"]["embedding_tokens"], row["usage"]["total_tokens"]) == ("embeddings", 5, 5)
    assert (row["usage"]["input_tokens"], row["usage"]["output_tokens"], row["stream"]) == (0, 0, False)
    assert row["usage_source"] == "vendor"


def test_tokens_that_the_vendor_does_not_count_are_estimated_as_embedding_tokens(rooms: Any) -> None:
    at = rooms(ScriptedAnswer(answer([0.5], usage=None)))
    call_with(at, body(input=[list(range(10, 500))]))
    row = at.row()
    assert row["usage_source"] == "estimated"
    assert (row["usage"]["embedding_tokens"], row["usage"]["input_tokens"]) == (row["usage"]["total_tokens"], 0)
    assert row["usage"]["total_tokens"] >= 490


def test_a_call_whose_process_died_is_charged_as_embeddings(rooms: Any) -> None:
    at = rooms(ScriptedAnswer(answer([0.5])))
    call_with(at, body())
    lines = [line for path in at.folder.glob("*.spool") for line in read_lines(path.read_bytes())]
    (intent,) = [line.payload for line in lines if line.kind == "I"]
    row = interrupted(msgspec.json.decode(intent, type=Intent))
    assert row.operation == "embeddings"
    assert row.usage.embedding_tokens == row.usage.total_tokens > 0


@pytest.mark.parametrize(
    ("route", "written", "serves"),
    [("/v1/embeddings", body(), "chat"), ("/v1/chat/completions", request(), "embeddings")],
)
def test_an_alias_is_refused_on_the_route_that_it_does_not_serve(
    rooms: Any, route: str, written: bytes, serves: str
) -> None:
    at = rooms()
    reply, sent = serve(at, written, dialect=ROUTES[route], config=embedding(serves))
    assert (reply.status, json.loads(sent)["error"]["param"]) == (400, "model")
    assert at.row()["attempts"] == []


def test_a_vendor_without_embeddings_is_an_unsupported_parameter() -> None:
    without = msgspec.structs.replace(OPENAI, embed=None)
    with pytest.raises(VendorCannot, match="has no embeddings"):
        without.outgoing(read(body()), target("openai"))


# --- recorded answers -------------------------------------------------------------------------------------------------

RECORDED = recordings.load(FOLDER) if FOLDER else []
EMBEDDED = [e for e in RECORDED if "/embeddings" in e.request.uri and e.response.status == 200]


@pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
@pytest.mark.parametrize("exchange", EMBEDDED, ids=lambda e: e.name)
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_recorded_answer_is_understood(exchange: Exchange, encoding: str) -> None:
    asked = read(msgspec.json.encode(exchange.request.json() | {"model": ALIAS, "encoding_format": encoding}))
    told = OPENAI.answer(exchange.response.body, asked, STAMP)
    recorded = exchange.response.json()
    parsed = CreateEmbeddingResponse.model_construct(**json.loads(told.body))
    assert told.usage == Usage(embedding=recorded["usage"]["total_tokens"])
    assert told.model == recorded["model"]
    assert len(parsed.data) == len(asked.inputs)
    if not isinstance(recorded["data"][0]["embedding"], str) and encoding == "base64":
        first = base64.b64decode(json.loads(told.body)["data"][0]["embedding"])
        assert list(struct.unpack(f"<{len(first) // 4}f", first)) == pytest.approx(recorded["data"][0]["embedding"])
