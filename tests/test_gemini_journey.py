"""Gemini through the whole stack, at both fronts: apps speak OpenAI's chat completions, and cannot tell."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import openai
import pytest

from tests.journey import Journey, chat, decoded

TOOL = {
    "type": "function",
    "function": {"name": "order_status", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}},
}
FRONTS = pytest.mark.parametrize("front", ["gemini", "vertex"])


@FRONTS
def test_a_stream_accumulates_to_the_unary_answer(journey: Journey, front: str) -> None:
    client = journey.openai()
    asked = chat("tokens=9 reasoning=3", model=front, reasoning_effort="low")
    unary = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        whole = stream.get_final_completion()
    one, other = unary.choices[0].message, whole.choices[0].message
    assert one.content == other.content
    assert one.model_extra["reasoning_content"] == other.model_extra["reasoning_content"]
    assert (unary.usage, unary.model) == (whole.usage, "gemini-2.5-flash")


def test_signed_calls_go_back_as_the_sdk_keeps_them(journey: Journey) -> None:
    """The message is sent back as it came: the vendor refuses an unsigned call."""
    client = journey.openai()
    asked = chat("tools=2", model="gemini-later", tools=[TOOL])
    with client.chat.completions.stream(**asked) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["order_status"] * 2
    answer = choice.message.to_dict()
    for call in answer["tool_calls"]:
        call["function"].pop("parsed_arguments", None)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sent"} for call in calls]
    asked["messages"] += [{name: answer[name] for name in answer if name != "parsed"}, *results]
    assert client.chat.completions.create(**asked).choices[0].finish_reason == "stop"
    turns = journey.asked("gemini")[-1]["body"]["contents"]
    signatures = [part.get("thoughtSignature") for part in turns[1]["parts"]]
    assert signatures == [choice.message.model_extra["reasoning_details"][0]["data"], None]


def test_calls_of_another_vendor_go_on_where_a_signature_is_wanted(journey: Journey) -> None:
    asked = chat("tools=1", model="one-target", tools=[TOOL])
    answer = journey.post(asked).json()["choices"][0]["message"]
    (call,) = answer["tool_calls"]
    asked["messages"] += [answer, {"role": "tool", "tool_call_id": call["id"], "content": "sent"}]
    assert journey.post(asked | {"model": "gemini-later"}).status_code == 200


@FRONTS
def test_row_has_every_usage_class_at_its_price(journey: Journey, front: str) -> None:
    asked = chat("tokens=5 reasoning=3 cached=4", model=front)
    unary = journey.post(asked)
    with journey.stream(asked) as streamed:
        chunks = decoded(streamed.iter_lines())
    assert chunks[-1] == "[DONE]"
    events = journey.rows([unary.headers["x-request-id"], streamed.headers["x-request-id"]])
    one, other = (events[answer.headers["x-request-id"]] for answer in (unary, streamed))
    classes = {name: tokens for name, tokens in one["usage"]["classes"].items() if tokens}
    assert (classes["cache_read"], classes["output"], classes["reasoning"]) == (4, 5, 3)
    assert (one["provider"], one["usage_source"], one["cost_status"]) == (front, "vendor", "priced")
    assert one["vendor_request_id"] == unary.json()["id"]
    cost = Decimal("0.3") * classes["input"] + Decimal("0.03") * 4 + Decimal("2.5") * 8
    assert Decimal(str(one["cost_usd"]["total"])) == cost / 1_000_000
    assert (one["usage"], one["cost_usd"]) == (other["usage"], other["cost_usd"])


def test_ai_studio_gets_its_key_and_vertex_a_token(journey: Journey) -> None:
    for front in ("gemini", "vertex"):
        assert journey.post(chat(model=front)).status_code == 200
    (studio,) = journey.asked("gemini")
    vertex = [request for request in journey.asked("vertex") if request["path"] != "/token"][-1]
    assert studio["path"] == "/v1beta/models/gemini-2.5-flash:generateContent"
    assert (studio["headers"]["x-goog-api-key"], "authorization" in studio["headers"]) == ("simulator", False)
    where = "/v1/projects/simulated/locations/simulated/publishers/google/models/gemini-2.5-flash:generateContent"
    assert vertex["path"] == where
    assert vertex["headers"]["authorization"].startswith("Bearer ya29.simulated-")


def test_a_replica_asks_for_one_token(journey: Journey) -> None:
    for _ in range(6):
        assert journey.post(chat(model="vertex")).status_code == 200
    tokens = {request["headers"]["authorization"] for request in journey.asked("vertex") if request["path"] != "/token"}
    assert len(tokens) <= len(journey.stack.replicas)


@pytest.mark.parametrize("alias", ["embed-gemini", "embed-vertex"])
def test_embeddings(journey: Journey, alias: str) -> None:
    client = journey.openai()
    found = client.embeddings.create(model=alias, input=["Where is order 7?", "Thanks."], dimensions=64)
    assert [len(one.embedding) for one in found.data] == [64, 64]


@FRONTS
def test_answer_as_json_by_schema(journey: Journey, front: str) -> None:
    schema = {"type": "object", "properties": {"state": {"type": "string"}}, "required": ["state"]}
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    answer = journey.post(chat(model=front, response_format=form)).json()
    assert answer["choices"][0]["message"]["content"].startswith('{"state":')


def test_a_blocked_prompt_is_a_refusal(journey: Journey) -> None:
    answer = journey.openai().chat.completions.create(**chat("blocked=1", model="gemini"))
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("content_filter", None)
    assert "PROHIBITED_CONTENT" in choice.message.refusal


def test_what_the_vendor_cannot_carry_is_refused_before_it_is_asked(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        journey.openai().chat.completions.create(**chat(model="gemini", logit_bias={"7": -100}))
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "logit_bias")
    assert journey.asked("gemini") == []


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503},
        {"kind": "throttle", "retry_after": 48},
        {"kind": "status", "status": 404},
        {"kind": "cut", "after_chunks": 0},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_a_vendor_that_fails_is_fallen_back_from(journey: Journey, fault: dict[str, Any]) -> None:
    journey.fault("gemini", **fault)
    with journey.stream(chat(model="gemini-first")) as streamed:
        assert decoded(streamed.iter_lines())[-1] == "[DONE]"
    assert (streamed.status_code, streamed.headers["x-gateway-provider"]) == (200, "openai")


def test_an_error_amid_a_stream_is_one_error_event(journey: Journey) -> None:
    journey.fault("gemini", kind="error_event", after_chunks=6)
    with journey.stream(chat("tokens=20", model="gemini")) as streamed:
        chunks = decoded(streamed.iter_lines())
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert [chunk for chunk in chunks if "error" in chunk] == chunks[-2:-1]
    assert chunks[-1] == "[DONE]"
    assert journey.row(streamed.headers["x-request-id"])["status"] == "error"
