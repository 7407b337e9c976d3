"""Anthropic through the whole stack: apps speak OpenAI's chat completions, and cannot tell."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import openai
import pytest

from tests.journey import Journey, chat, decoded, until

TOOL = {
    "type": "function",
    "function": {"name": "order_status", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}},
}
HINTED = {
    "role": "system",
    "content": [{"type": "text", "text": "h" * 400, "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
}


def sent(journey: Journey) -> dict[str, Any]:
    """The one request that the vendor got."""
    (request,) = journey.asked("anthropic")
    return request


def test_a_stream_accumulates_to_the_unary_answer(journey: Journey) -> None:
    client = journey.openai()
    asked = chat("tokens=9 reasoning=3", model="claude", reasoning_effort="low", max_completion_tokens=2_000)
    unary = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        whole = stream.get_final_completion()
    one, other = unary.choices[0].message, whole.choices[0].message
    assert one.content == other.content
    assert one.model_extra["reasoning_content"] == other.model_extra["reasoning_content"]
    assert (unary.usage, unary.model) == (whole.usage, "claude-haiku-4-5-20251001")


def test_tools_are_called_in_parallel_and_their_results_go_back_with_the_thinking(journey: Journey) -> None:
    client = journey.openai()
    asked = chat(
        "tools=2 reasoning=3", model="claude", tools=[TOOL], reasoning_effort="low", max_completion_tokens=2_000
    )
    with client.chat.completions.stream(**asked) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["order_status"] * 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sent"} for call in calls]
    answer = {
        "role": "assistant",
        "reasoning_details": choice.message.model_extra["reasoning_details"],
        "tool_calls": [
            call.model_dump(include={"id": True, "type": True, "function": {"name", "arguments"}}) for call in calls
        ],
    }
    asked["messages"] += [answer, *results]
    assert client.chat.completions.create(**asked).choices[0].finish_reason == "stop"
    turns = journey.asked("anthropic")[-1]["body"]["messages"]
    assert [block["type"] for block in turns[1]["content"]] == ["thinking", "tool_use", "tool_use"]
    assert [block["type"] for block in turns[2]["content"]] == ["tool_result", "tool_result"]


def test_row_has_every_usage_class_at_its_price(journey: Journey) -> None:
    asked = chat("tokens=5 reasoning=3 cached=4", model="claude", reasoning_effort="low", max_completion_tokens=2_000)
    asked["messages"].insert(0, HINTED)
    unary = journey.post(asked)
    with journey.stream(asked) as streamed:
        chunks = decoded(streamed.iter_lines())
    assert chunks[-1] == "[DONE]"
    events = journey.rows([unary.headers["x-request-id"], streamed.headers["x-request-id"]])
    one, other = events.values()
    classes = {name: tokens for name, tokens in one["usage"]["classes"].items() if tokens}
    assert (classes["cache_read"], classes["cache_write_1h"], classes["output"], classes["reasoning"]) == (4, 100, 5, 3)
    assert (one["provider"], one["usage_source"], one["cost_status"]) == ("anthropic", "vendor", "priced")
    assert one["vendor_request_id"].startswith("req_")
    cost = Decimal(classes["input"]) + Decimal("0.1") * 4 + 2 * 100 + 5 * 8
    assert Decimal(str(one["cost_usd"]["total"])) == cost / 1_000_000
    assert (one["usage"], one["cost_usd"]) == (other["usage"], other["cost_usd"])


def test_vendor_gets_its_own_headers_and_a_length(journey: Journey) -> None:
    journey.post(chat(model="claude"))
    request = sent(journey)
    assert request["path"] == "/v1/messages"
    assert request["headers"]["anthropic-version"] == "2023-06-01"
    assert "authorization" not in request["headers"]
    assert request["body"]["max_tokens"] == 8192


def test_answer_as_json_by_schema(journey: Journey) -> None:
    schema = {"type": "object", "properties": {"state": {"type": "string"}}, "required": ["state"]}
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    answer = journey.post(chat(model="claude", response_format=form)).json()
    assert answer["choices"][0]["message"]["content"].startswith('{"state":')


def test_what_the_vendor_cannot_carry_is_refused_before_it_is_asked(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        journey.openai().chat.completions.create(**chat(model="claude", seed=7))
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "seed")
    assert journey.asked("anthropic") == []


def test_what_the_vendor_cannot_carry_goes_to_one_that_can(journey: Journey) -> None:
    answer = journey.post(chat(model="claude-first", seed=7))
    assert (answer.status_code, answer.headers["x-gateway-provider"]) == (200, "openai")
    event = journey.row(answer.headers["x-request-id"])
    assert (event["fallback_used"], [attempt["provider"] for attempt in event["attempts"]]) == (True, ["openai"])


def test_an_overloaded_vendor_is_fallen_back_from(journey: Journey) -> None:
    journey.fault("anthropic", kind="status", status=529)
    answer = journey.post(chat(model="claude-first"))
    assert (answer.status_code, answer.headers["x-gateway-provider"]) == (200, "openai")


def test_a_prompt_that_is_too_long_has_the_code_that_apps_know(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        journey.openai().chat.completions.create(**chat("word " * 200_000, model="claude-first"))
    assert refusal.value.code == "context_length_exceeded"


def test_an_error_amid_a_stream_is_one_error_event(journey: Journey) -> None:
    journey.fault("anthropic", kind="error_event", after_chunks=6, code="overloaded_error")
    with journey.stream(chat("tokens=20", model="claude")) as streamed:
        chunks = decoded(streamed.iter_lines())
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert [chunk for chunk in chunks if "error" in chunk] == chunks[-2:-1]
    assert chunks[-1] == "[DONE]"
    assert journey.row(streamed.headers["x-request-id"])["status"] == "error"


def test_a_hung_up_stream_keeps_what_the_vendor_told_of_the_prompt(journey: Journey) -> None:
    journey.fault("anthropic", kind="hold", after_chunks=9)
    with journey.stream(chat("tokens=400 cached=4", model="claude")) as streamed:
        lines = streamed.iter_lines()
        for _ in range(12):
            next(lines)
    until(lambda: journey.counts("anthropic")["aborted"] == 1)
    event = journey.row(streamed.headers["x-request-id"])
    assert (event["status"], event["usage_source"]) == ("client_closed", "estimated")
    assert event["usage"]["classes"]["cache_read"] == 4
    assert 0 < event["usage"]["output_tokens"] < 100
