"""The vendor simulator's answers and refusals, as the vendor's own SDK reads them."""

import base64
import json
from array import array
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from loadtest.simulator import content
from loadtest.simulator.inprocess import running
from tests.simulation import DEADLINE_SECONDS, http, post, say

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "kelvin"]}},
            "required": ["city", "unit"],
        },
    },
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    yield from client(f"{url}/openai/v1")


@pytest.fixture(scope="module")
def router(url: str) -> Iterator[openai.OpenAI]:
    yield from client(f"{url}/openrouter/v1")


def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=base_url,
        api_key="any-key",
        max_retries=0,
        timeout=DEADLINE_SECONDS,
        _strict_response_validation=True,
    ) as made:
        yield made


def events(sdk: openai.OpenAI, **fields: Any) -> list[Any]:
    return list(sdk.chat.completions.create(stream=True, **fields))


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


# Answers


@pytest.mark.parametrize(
    "request_",
    [
        say("hello"),
        say("hello tokens=200"),
        say("hello tokens=9", model="gpt-5"),
        say("hello reasoning=30 cached=4", model="o4-mini"),
        say("a list", response_format={"type": "json_object"}),
        say("hello tokens=50", max_tokens=7),
    ],
    ids=lambda request: request["messages"][0]["content"],
)
def test_streamed_text_and_usage_equal_the_unary_ones(sdk: openai.OpenAI, request_: dict[str, Any]) -> None:
    whole = sdk.chat.completions.create(**request_)
    chunks = events(sdk, stream_options={"include_usage": True}, **request_)
    assert (text_of(chunks), chunks[-1].usage) == (whole.choices[0].message.content, whole.usage)


def test_equal_requests_get_equal_text(sdk: openai.OpenAI) -> None:
    texts = {sdk.chat.completions.create(**say("the same")).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1


def test_different_prompts_get_different_text(sdk: openai.OpenAI) -> None:
    answers = [sdk.chat.completions.create(**say(prompt)) for prompt in ("one", "two")]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content


def test_completion_tokens_count_the_pieces_of_the_stream(sdk: openai.OpenAI) -> None:
    chunks = events(sdk, **say("tokens=123", stream_options={"include_usage": True}))
    pieces = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert chunks[-1].usage.completion_tokens == len(pieces) == 123


def test_a_stream_without_include_usage_never_mentions_usage(url: str) -> None:
    assert '"usage"' not in post(url, **say("hello", stream=True)).text


def test_a_stream_with_include_usage_has_null_usage_until_the_last_chunk(url: str) -> None:
    answer = post(url, **say("hello", stream=True, stream_options={"include_usage": True}))
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_the_usage_chunk_has_no_choices(sdk: openai.OpenAI) -> None:
    assert events(sdk, **say("hello", stream_options={"include_usage": True}))[-1].choices == []


def test_several_choices_are_interleaved(sdk: openai.OpenAI) -> None:
    chunks = events(sdk, **say("tokens=3", n=2))
    assert [chunk.choices[0].index for chunk in chunks] == [0, 0, 1, 1, 0, 1, 0, 1, 0, 1]


def test_several_choices_differ_and_equal_the_unary_ones(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(**say("tokens=30", n=3))
    chunks = events(sdk, **say("tokens=30", n=3))
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [text_of(chunks, index) for index in range(3)]
    assert len(set(texts)) == 3


def test_a_limit_on_tokens_finishes_with_length(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**say("tokens=50", max_completion_tokens=5))
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


def test_parallel_tool_calls_are_streamed_in_fragments(sdk: openai.OpenAI) -> None:
    request = say("tools=2", tools=[WEATHER])
    calls: dict[int, list[str]] = {}
    for chunk in events(sdk, **request):
        for call in chunk.choices[0].delta.tool_calls or ():
            calls.setdefault(call.index, []).append(call.function.arguments)
    whole = sdk.chat.completions.create(**request).choices[0].message.tool_calls
    assert ["".join(fragments) for fragments in calls.values()] == [call.function.arguments for call in whole]
    assert all(len(fragments) > 2 for fragments in calls.values())


def test_tool_arguments_fit_the_schema_of_the_tool(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**say("now", tools=[WEATHER], tool_choice="required"))
    arguments = json.loads(answer.choices[0].message.tool_calls[0].function.arguments)
    assert (answer.choices[0].finish_reason, set(arguments)) == ("tool_calls", {"city", "unit"})
    assert arguments["unit"] in ("celsius", "kelvin")


def test_tools_are_not_called_unasked(sdk: openai.OpenAI) -> None:
    assert sdk.chat.completions.create(**say("hello", tools=[WEATHER])).choices[0].finish_reason == "stop"


def test_a_tool_result_is_answered_with_text(sdk: openai.OpenAI) -> None:
    request = say("tools=1", tools=[WEATHER])
    asked = sdk.chat.completions.create(**request).choices[0].message
    request["messages"] += [
        asked.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "12 degrees"},
    ]
    assert sdk.chat.completions.create(**request).choices[0].finish_reason == "stop"


def test_structured_output_fits_its_schema(sdk: openai.OpenAI) -> None:
    schema = {
        "$defs": {"tag": {"type": "string", "enum": ["red", "blue"]}},
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "size": {"type": "integer", "minimum": 10},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 2},
            "note": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
        },
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    thing = json.loads(sdk.chat.completions.create(**say("x", response_format=wanted)).choices[0].message.content)
    assert {name: type(value) for name, value in thing.items()} == {
        "name": str,
        "size": int,
        "tags": list,
        "note": bool,
    }
    assert thing["size"] >= 10
    assert set(thing["tags"]) <= {"red", "blue"}


def test_a_recursive_schema_has_an_example() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    }
    assert "next" in content.example(node, 1)


def test_logprobs_cover_every_piece(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**say("tokens=6", logprobs=True, top_logprobs=2)).choices[0]
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content
    assert [len(entry.top_logprobs) for entry in answer.logprobs.content] == [2] * 6


def test_streams_are_obfuscated_unless_asked_not_to(url: str) -> None:
    plain = post(url, **say("x", stream=True, stream_options={"include_obfuscation": False})).text
    assert ("obfuscation" in post(url, **say("x", stream=True)).text, "obfuscation" in plain) == (True, False)


def test_embeddings_are_the_same_numbers_in_both_encodings(url: str, sdk: openai.OpenAI) -> None:
    request = {"model": "text-embedding-3-small", "input": ["hello", "naïve"], "dimensions": 64}
    floats = sdk.embeddings.create(**request, encoding_format="float").data
    # The SDK decodes base64 only after its strict validation, which therefore refuses it.
    packed = http(
        "POST",
        f"{url}/openai/v1/embeddings",
        json=request | {"encoding_format": "base64"},
        headers={"authorization": "Bearer any-key"},
    ).json()["data"]
    for item, other in zip(floats, packed, strict=True):
        assert item.embedding == pytest.approx(array("f", base64.b64decode(other["embedding"])), abs=1e-6)


def test_texts_that_share_words_are_nearer_than_texts_that_do_not(sdk: openai.OpenAI) -> None:
    texts = ["how do I reset my password", "how can I reset my password please", "the weather in Lima"]
    answer = sdk.embeddings.create(model="text-embedding-3-small", input=texts, encoding_format="float")
    vectors = [item.embedding for item in answer.data]

    def cosine(left: list[float], right: list[float]) -> float:
        return sum(one * other for one, other in zip(left, right, strict=True))

    assert cosine(vectors[0], vectors[1]) > 0.6 > 0.3 > cosine(vectors[0], vectors[2])


def test_models_are_listed_and_found_by_id(sdk: openai.OpenAI) -> None:
    listed = [model.id for model in sdk.models.list()]
    assert "gpt-4o-mini" in listed
    assert sdk.models.retrieve("gpt-4o-mini").id == "gpt-4o-mini"


def test_rate_limit_headers_count_down(sdk: openai.OpenAI) -> None:
    first, second = (sdk.chat.completions.with_raw_response.create(**say("x")).headers for _ in range(2))
    remaining = [int(headers["x-ratelimit-remaining-requests"]) for headers in (first, second)]
    # The window may have turned between the two.
    assert remaining[1] in (remaining[0] - 1, 9999)


# Refusals


def test_a_bad_key_is_refused(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as refusal:
        sdk.with_options(api_key="bad-key").chat.completions.create(**say("x"))
    assert refusal.value.code == "invalid_api_key"


def test_a_missing_key_is_refused(url: str) -> None:
    assert http("POST", f"{url}/openai/v1/chat/completions", json=say("x")).status_code == 401


def test_an_unknown_model_is_not_found(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        sdk.chat.completions.create(**say("x", model="gpt-none-such"))
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", None)


@pytest.mark.parametrize(
    ("request_", "param", "code"),
    [
        (say("x", model="gpt-5", max_tokens=5), "max_tokens", "unsupported_parameter"),
        (say("x" * 40_000, model="gpt-4"), "messages", "context_length_exceeded"),
        ({"model": "gpt-4o"}, "messages", "missing_required_parameter"),
        ({"messages": []}, None, None),
        (say("x", n=0), "n", "integer_out_of_range"),
        (say("x", stream_options={"include_usage": True}), "stream_options", None),
        (say("x", messages=[{"role": "user", "content": 5}]), "messages[0].content", "invalid_type"),
        (say("x", web_search_options={}), "web_search_options", None),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_a_bad_request_is_refused(url: str, request_: dict[str, Any], param: str | None, code: str | None) -> None:
    answer = post(url, **request_)
    assert (answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]) == (400, param, code)


def test_a_body_that_is_not_json_is_refused(url: str) -> None:
    answer = http("POST", f"{url}/openai/v1/chat/completions", content=b"{", headers={"authorization": "Bearer k"})
    assert answer.status_code == 400


# OpenRouter


def test_openrouter_sends_comments_before_its_first_event(url: str) -> None:
    answer = post(url, "openrouter", **say("hello latency_ms=20", model="openai/gpt-4o-mini", stream=True))
    assert answer.text.startswith(": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\ndata: {")


def test_openrouter_sends_usage_unasked(router: openai.OpenAI) -> None:
    request = say("hello", model="anthropic/claude-haiku-4.5")
    chunks = events(router, **request)
    whole = router.chat.completions.create(**request)
    assert (text_of(chunks), chunks[-1].usage) == (whole.choices[0].message.content, whole.usage)


def test_openrouter_errors_have_the_status_as_code(router: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        router.chat.completions.create(**say("x"))
    assert refusal.value.body["code"] == 400


def test_openrouter_streams_reasoning(router: openai.OpenAI) -> None:
    chunks = events(router, **say("reasoning=3 tokens=2", model="anthropic/claude-haiku-4.5"))
    assert sum("reasoning_details" in chunk.choices[0].delta.model_extra for chunk in chunks) == 3


def test_a_vendor_without_a_shape_of_its_own_speaks_openai(url: str) -> None:
    assert post(url, "some-vendor", **say("x")).json()["object"] == "chat.completion"
