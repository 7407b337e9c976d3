"""Bedrock through the real stack: Traefik, the official SDK, signatures that the vendor checks, and the rows."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.journey import Journey, chat, events, text

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "city", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}},
    }
]


def paid(row: dict[str, Any]) -> bool:
    return row["cost_status"] == "priced" and row["cost_usd"]["total"] > 0


def test_a_call_is_answered_and_accounted(journey: Journey) -> None:
    raw = journey.openai().chat.completions.with_raw_response.create(
        **chat("Say hello. tokens=9 cached=3", "claude-at-aws")
    )
    answer, row = raw.parse(), journey.row(raw.headers["x-request-id"])
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert (row["provider"], row["region"], row["finish_reason"]) == ("bedrock", "eu-central-1", "stop")
    assert row["usage"]["total_tokens"] == answer.usage.total_tokens
    assert (row["usage"]["classes"]["cache_read"], row["usage"]["classes"]["output"]) == (3, 9)
    assert row["vendor_request_id"]
    assert paid(row)


def test_a_stream_says_what_the_whole_answer_says(journey: Journey) -> None:
    client, asked = journey.openai(), chat("Think. tokens=20 reasoning=5", "claude-at-aws")
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert streamed.choices[0].message.reasoning_content == whole.choices[0].message.reasoning_content
    assert (streamed.usage, streamed.choices[0].finish_reason) == (whole.usage, whole.choices[0].finish_reason)


def test_the_row_of_a_stream_has_its_usage(journey: Journey) -> None:
    with journey.stream(chat("Say hello. tokens=30", "claude-at-aws")) as response:
        chunks = events(response)
    row = journey.row(response.headers["x-request-id"])
    assert chunks[-1] == "[DONE]"
    assert (row["status"], row["stream"], row["usage"]["output_tokens"]) == ("success", True, 30)
    assert paid(row)


def test_tools_are_called_and_their_results_taken(journey: Journey) -> None:
    client, asked = journey.openai(), chat("Where? tools=2", "claude-at-aws", tools=TOOLS)
    message = client.chat.completions.create(**asked).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["city", "city"]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Graz"} for call in message.tool_calls]
    asked["messages"] += [message.model_dump(exclude_none=True), *results]
    assert client.chat.completions.create(**asked).choices[0].message.content


def test_an_exception_in_mid_stream_is_one_error_event(journey: Journey) -> None:
    journey.fault("bedrock", kind="error_event", after_chunks=4)
    with journey.stream(chat("Say hello. tokens=30", "claude-at-aws")) as response:
        chunks = events(response)
    row = journey.row(response.headers["x-request-id"])
    assert text(chunks[:-2])
    assert chunks[-2]["error"]["code"] == "upstream_unavailable"
    assert (row["status"], row["attempts"][-1]["outcome"]) == ("error", "broke")


def test_a_throttled_target_is_left_for_the_next_vendor(journey: Journey) -> None:
    journey.fault("bedrock", kind="throttle", retry_after=30)
    response = journey.post(chat("Say hello.", "aws-first"))
    assert response.headers["x-gateway-provider"] == "openai"
    assert journey.row(response.headers["x-request-id"])["attempts"][0]["outcome"] == "throttled"


def test_what_bedrock_cannot_carry_goes_to_a_vendor_that_can(journey: Journey) -> None:
    assert journey.post(chat("Say hello.", "aws-first", seed=7)).headers["x-gateway-provider"] == "openai"
    assert journey.asked("bedrock") == []


def test_what_no_vendor_of_the_chain_can_carry_is_refused_by_name(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        journey.openai().chat.completions.create(**chat("Say hello.", "claude-at-aws", seed=7))
    assert (raised.value.code, raised.value.param) == ("unsupported_parameter", "seed")


def test_the_vendor_s_refusal_reaches_the_client_in_its_words(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError, match="start with a user message"):
        journey.openai().chat.completions.create(
            model="claude-at-aws", messages=[{"role": "assistant", "content": "I begin."}]
        )


def test_embeddings_are_answered_and_accounted(journey: Journey) -> None:
    raw = journey.openai().embeddings.with_raw_response.create(model="titan", input="a river", dimensions=256)
    answer, row = raw.parse(), journey.row(raw.headers["x-request-id"])
    assert len(answer.data[0].embedding) == 256
    assert row["usage"]["embedding_tokens"] == answer.usage.total_tokens > 0
    assert paid(row)


def test_the_key_s_secret_is_not_sent(journey: Journey) -> None:
    journey.post(chat("Say hello.", "claude-at-aws"))
    (request,) = journey.asked("bedrock")
    assert request["headers"]["authorization"].startswith("AWS4-HMAC-SHA256 Credential=simulator/")
