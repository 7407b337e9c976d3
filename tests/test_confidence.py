"""What an answer has to be for a cascade to trust it: schemas against the reference, and bytes of any kind."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from app.confidence import MOST_STEPS, _Check, asking, doubt, fits, read, without
from app.config import Cascade
from app.dialects.openai_chat import read as read_request
from app.wire import ChatRequest
from tests.gateway_parts import DONE, chunk, completion

EVERY = Cascade((), frozenset({"schema", "refusal", "length"}), -0.5)


def wanting(schema: Any) -> ChatRequest:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    return read_request(json.dumps({"model": "m", "messages": [], "response_format": wanted}).encode())


PLAIN = read_request(b'{"model":"m","messages":[]}')

# --- schemas ----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0]) | st.sampled_from(["", "a", "bc"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
TYPES = st.sampled_from(["object", "array", "string", "boolean", "null", "integer", "number"])


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES | st.lists(TYPES, min_size=1, max_size=2, unique=True),
            "properties": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            "required": st.lists(st.sampled_from("ab"), max_size=2, unique=True),
            "additionalProperties": st.booleans() | inner,
            "items": inner,
            "enum": st.lists(VALUES, min_size=1, max_size=2),
            "const": VALUES,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxLength": st.integers(0, 2),
            "minimum": st.integers(-2, 2),
            "$ref": st.just("#/$defs/d"),
        },
    )


SCHEMAS = st.recursive(st.just({}), _schemas, max_leaves=4)


@given(SCHEMAS, SCHEMAS, VALUES)
def test_a_value_meets_a_schema_where_the_reference_says_so(schema: Any, definition: Any, value: Any) -> None:
    definition.pop("$ref", None)  # one that refers to itself alone has no end in the reference
    if "#/$defs/d" in json.dumps(definition):
        return
    whole = schema | {"$defs": {"d": definition}}
    assert _Check(whole).meets(value, whole, 0) is jsonschema.Draft202012Validator(whole).is_valid(value)


@pytest.mark.parametrize("parts", ["anyOf", "allOf", "oneOf"])
def test_a_schema_without_end_ends(parts: str) -> None:
    endless = {parts: [{"$ref": "#"}] * 20, "properties": {"a": {"$ref": "#"}}}
    check = _Check(endless)
    began = time.process_time()
    check.meets({"a": {"a": 1}}, endless, 0)
    assert check._left >= -MOST_STEPS
    assert time.process_time() - began < 10  # without a bound it would be years


@given(st.text() | VALUES.map(json.dumps), VALUES)
def test_a_format_of_any_shape_is_only_judged(text: str, wanted: Any) -> None:
    request = ChatRequest(b"", "m", {"response_format": Raw(json.dumps(wanted).encode())})
    assert fits(request, text) in (True, False)


# --- answers ----------------------------------------------------------------------------------------------------------


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_an_answer_of_any_bytes_is_only_judged(answer: bytes) -> None:
    doubt(EVERY, PLAIN, True, "stop", answer)
    doubt(EVERY, wanting({"type": "object"}), True, None, b"{" + answer)
    without(answer)


def logged(*values: float) -> dict[str, Any]:
    return {"content": [{"token": "x", "logprob": value} for value in values]}


def test_a_stream_is_judged_as_the_whole_answer_it_makes() -> None:
    frames = [chunk('{"a"'), chunk(":1}"), chunk(finish_reason="stop"), DONE]
    (told,) = read(b"".join(frames))
    assert (told.text, told.refused, told.called) == ('{"a":1}', False, False)
    schema = {"type": "object", "required": ["b"]}
    assert doubt(EVERY, wanting(schema), True, "stop", b"".join(frames)) == "schema"


def test_the_mean_is_over_all_tokens_of_all_choices() -> None:
    choices = [
        {"index": 0, "message": {"content": "a"}, "logprobs": logged(-0.1, -0.1, -0.1)},
        {"index": 1, "message": {"content": "b"}, "logprobs": logged(-1.5)},
    ]
    assert doubt(EVERY, PLAIN, True, "stop", completion(choices=choices)) is None
    choices[1]["logprobs"] = logged(-1.9)
    assert doubt(EVERY, PLAIN, True, "stop", completion(choices=choices)) == "low_confidence"


@pytest.mark.parametrize(
    ("doubts", "finish_reason", "found"),
    [(set(), "length", None), ({"refusal"}, "length", None), ({"length"}, "length", "length")],
)
def test_only_what_the_cascade_names_is_doubted(doubts: set[str], finish_reason: str, found: str | None) -> None:
    cascade = Cascade((), frozenset(doubts), None)
    assert doubt(cascade, PLAIN, True, finish_reason, completion()) == found


def test_of_other_dialects_the_finish_reason_alone_is_read() -> None:
    assert doubt(EVERY, wanting({"type": "object"}), False, "stop", completion()) is None
    assert doubt(EVERY, PLAIN, False, "length", b"") == "length"


def test_a_request_asks_for_log_probabilities_and_keeps_the_rest() -> None:
    asked = asking(read_request(b'{"model":"m","messages":[],"x_new":[1, 2.50]}'))
    assert json.loads(asked.body) == {"model": "m", "messages": [], "x_new": [1, 2.5], "logprobs": True}
    assert bytes(asked.fields["x_new"]) == b"[1, 2.50]"
