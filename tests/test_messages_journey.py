"""Anthropic's official SDK through Traefik, over every vendor of the simulator."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from tests.journey import Journey, until
from tests.test_responses_journey import ALIASES

THINKING = {"claude": "signature", "claude-at-aws": "signature", "gemini": "thoughtSignature"}
"""Those whose models think here as they are asked, and under which name they take back what they sealed."""
TOOL = {
    "name": "order_status",
    "description": "Where an order is.",
    "input_schema": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
}
over_every_vendor = pytest.mark.parametrize("alias", ALIASES)


class Order(BaseModel):
    state: str
    parcels: int


def asked(prompt: str, alias: str, **members: Any) -> dict[str, Any]:
    return {
        "model": alias,
        "max_tokens": 2_000,
        "messages": [{"role": "user", "content": prompt}],
        **members,
    }


def streamed(client: anthropic.Anthropic, request: dict[str, Any]) -> anthropic.types.Message:
    with client.messages.stream(**request) as stream:
        return stream.get_final_message()


def said(message: anthropic.types.Message) -> dict[str, Any]:
    """What an answer says, without what each has anew: ids, and what is sealed."""
    told = message.to_dict()
    for block in told["content"]:
        block.pop("id", None)
        block.pop("signature", None)
        block.pop("data", None)
        block.pop("parsed_output", None)
    usage = {name: told["usage"].get(name) for name in ("input_tokens", "output_tokens", "cache_read_input_tokens")}
    return {name: told.get(name) for name in ("role", "model", "content", "stop_reason", "stop_details")} | usage


@over_every_vendor
def test_a_stream_accumulates_to_the_whole_answer(journey: Journey, alias: str) -> None:
    client = journey.anthropic()
    request = asked("tokens=9 cached=4", alias, system="Be brief.", stop_sequences=["END"])
    whole = client.messages.create(**request)
    assert said(streamed(client, request)) == said(whole)
    assert (whole.content[0].type, whole.stop_reason, whole.usage.output_tokens) == ("text", "end_turn", 9)
    assert whole.usage.cache_read_input_tokens == 4


@over_every_vendor
def test_tools_are_called_in_parallel_and_their_results_go_back(journey: Journey, alias: str) -> None:
    client = journey.anthropic()
    request = asked("tools=2", alias, tools=[TOOL], tool_choice={"type": "auto"})
    whole, stream = client.messages.create(**request), streamed(client, request)
    assert said(stream) == said(whole)
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert ([call.name for call in calls], whole.stop_reason) == (["order_status"] * 2, "tool_use")
    assert all(isinstance(call.input["id"], str) for call in calls)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sent", "is_error": False} for call in calls]
    request["messages"] += [
        whole.to_param(),
        {"role": "user", "content": [*results, {"type": "text", "text": "Well?"}]},
    ]
    assert client.messages.create(**request).stop_reason == "end_turn"


@over_every_vendor
def test_a_forced_tool_is_called_once(journey: Journey, alias: str) -> None:
    choice = {"type": "tool", "name": "order_status"}
    message = journey.anthropic().messages.create(**asked("Go.", alias, tools=[TOOL], tool_choice=choice))
    assert [block.type for block in message.content if block.type != "redacted_thinking"] == ["tool_use"]


@over_every_vendor
def test_an_answer_by_schema_is_parsed_by_the_sdk(journey: Journey, alias: str) -> None:
    message = journey.anthropic().messages.parse(**asked("Which?", alias), output_format=Order)
    assert isinstance(message.parsed_output, Order)


@pytest.mark.parametrize("alias", THINKING)
def test_thinking_is_streamed_and_goes_back_with_its_signature(journey: Journey, alias: str) -> None:
    client = journey.anthropic()
    thinking = {"type": "enabled", "budget_tokens": 1_024}
    request = asked("tools=1 reasoning=3", alias, thinking=thinking, tools=[TOOL])
    whole, stream = client.messages.create(**request), streamed(client, request)
    assert said(stream) == said(whole)
    assert [block.type for block in stream.content][:2] == ["thinking", "tool_use"]
    result = {"type": "tool_result", "tool_use_id": stream.content[1].id, "content": "sent"}
    request["messages"] += [stream.to_param(), {"role": "user", "content": [result]}]
    assert client.messages.create(**request).stop_reason == "end_turn"
    assert THINKING[alias] in str(journey.asked(ALIASES[alias])[-1]["body"])


@over_every_vendor
def test_a_client_that_leaves_amid_a_stream_ends_the_vendor_s_work(journey: Journey, alias: str) -> None:
    with journey.anthropic().messages.stream(**asked("tokens=400 chunk_ms=20", alias)) as stream:
        next(iter(stream.text_stream))
        request_id = stream.response.headers["request-id"]
    row = journey.row(request_id)
    told = {"estimated", "vendor"} if alias in ("gemini", "vertex") else {"estimated"}  # they tell usage all the time
    assert row["status"] == "client_closed"
    assert row["usage_source"] in told
    until(lambda: journey.counts(ALIASES[alias]).get("aborted"))


@over_every_vendor
def test_an_error_amid_a_stream_is_raised_by_the_sdk(journey: Journey, alias: str) -> None:
    journey.fault(ALIASES[alias], kind="cut", after_chunks=8)
    with pytest.raises(anthropic.APIStatusError) as raised:
        streamed(journey.anthropic(), asked("tokens=40", alias))
    assert raised.value.body["error"]["code"] == "upstream_unavailable"
    assert raised.value.body["request_id"].startswith("req_")


@over_every_vendor
def test_rows_say_what_the_vendor_counted(journey: Journey, alias: str) -> None:
    client = journey.anthropic()
    whole = client.messages.with_raw_response.create(**asked("tokens=5", alias))
    with client.messages.stream(**asked("tokens=5", alias)) as stream:
        stream.until_done()
        streamed_id = stream.response.headers["request-id"]
    rows = journey.rows([whole.headers["request-id"], streamed_id])
    one, other = rows.values()
    message = whole.parse()
    assert one["usage"] == other["usage"]
    assert one["usage"]["output_tokens"] == message.usage.output_tokens == 5
    assert (one["status"], one["finish_reason"], one["usage_source"]) == ("success", "stop", "vendor")
    assert one["provider"] == whole.headers["x-gateway-provider"]


# --- counting ---------------------------------------------------------------------------------------------------------


def prompt(alias: str) -> dict[str, Any]:
    return {"model": alias, "system": "Be brief.", "messages": [{"role": "user", "content": "word " * 100}]}


def test_tokens_are_counted_by_anthropic_where_it_answers(journey: Journey) -> None:
    client = journey.anthropic()
    counted = client.messages.count_tokens(**prompt("claude"))
    answer = client.messages.create(**prompt("claude"), max_tokens=9)
    assert counted.to_dict() == {"input_tokens": answer.usage.input_tokens}


@pytest.mark.parametrize("alias", ["one-target", "azure", "mistral"])
def test_elsewhere_tokens_are_estimated_and_said_to_be(journey: Journey, alias: str) -> None:
    client = journey.anthropic()
    counted = client.messages.count_tokens(**prompt(alias)).to_dict()
    assert (100 <= counted["input_tokens"] <= 200, counted["estimated"]) == (True, True)
    assert journey.asked(ALIASES[alias]) == []


@pytest.mark.parametrize("alias", ["claude", "one-target"])
def test_counting_is_free_and_leaves_a_row(journey: Journey, alias: str) -> None:
    answer = journey.anthropic().messages.with_raw_response.count_tokens(**prompt(alias))
    row = journey.row(answer.headers["request-id"])
    assert (row["operation"], row["status"], row["model_alias"]) == ("count_tokens", "success", alias)
    assert (row["usage"]["total_tokens"], row["cost_usd"]["total"]) == (0, 0)


def test_a_count_that_anthropic_does_not_give_is_estimated_by_the_next_target(journey: Journey) -> None:
    journey.fault("anthropic", kind="status", status=529)
    assert journey.anthropic().messages.count_tokens(**prompt("claude-first")).to_dict()["estimated"] is True


# --- limits and refusals ----------------------------------------------------------------------------------------------


def test_limits_have_anthropic_s_names(journey: Journey) -> None:
    began = datetime.now(UTC)
    headers = journey.anthropic().messages.with_raw_response.create(**asked("tokens=2", "claude")).headers
    assert int(headers["anthropic-ratelimit-requests-remaining"]) < int(headers["anthropic-ratelimit-requests-limit"])
    reset = datetime.strptime(headers["anthropic-ratelimit-tokens-reset"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert reset > began
    assert not [name for name in headers if name.startswith("x-ratelimit")]
    assert headers["request-id"] == headers["x-request-id"]


def test_a_rate_that_is_used_up_is_429_with_retry_after(journey: Journey) -> None:
    client = journey.anthropic().with_options(default_headers={"X-Tenant-Id": "tenant-few-messages"})
    for _ in range(5):
        client.messages.create(**asked("tokens=2", "claude"))
    with pytest.raises(anthropic.RateLimitError) as raised:
        client.messages.create(**asked("tokens=2", "claude"))
    error = raised.value
    assert int(error.response.headers["retry-after"]) >= 1
    assert (error.type, error.body["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error.body["request_id"] == error.request_id


@over_every_vendor
def test_a_vendor_s_throttle_is_told_with_its_wait_where_no_other_can_answer(journey: Journey, alias: str) -> None:
    journey.fault(ALIASES[alias], kind="throttle", retry_after=7)
    with pytest.raises(anthropic.InternalServerError) as raised:
        journey.anthropic().messages.create(**asked("Hi", alias))
    assert (raised.value.status_code, raised.value.type) == (503, "overloaded_error")
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 7


def test_what_the_vendor_cannot_carry_is_refused_by_its_name(journey: Journey) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        journey.anthropic().messages.create(**asked("Hi", "one-target"), extra_body={"top_k": 5})
    inside = raised.value.body["error"]
    assert (inside["type"], inside["code"], inside["param"]) == (
        "invalid_request_error", "unsupported_parameter", "top_k",
    )  # fmt: skip
    assert journey.asked("openai") == []


def test_a_block_that_the_vendor_cannot_carry_is_refused_by_its_place(journey: Journey) -> None:
    linked = {"type": "image", "source": {"type": "url", "url": "https://images.example/a.png"}}
    request = asked("", "claude-at-aws")
    request["messages"] = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, linked]}]
    with pytest.raises(anthropic.BadRequestError) as raised:
        journey.anthropic().messages.create(**request)
    assert raised.value.body["error"]["param"] == "messages[0].content[1]"


def test_what_one_vendor_cannot_carry_goes_to_the_next(journey: Journey) -> None:
    answer = journey.anthropic().messages.with_raw_response.create(
        **asked("Hi", "openai-then-claude"), extra_body={"top_k": 5}
    )
    assert answer.headers["x-gateway-provider"] == "anthropic"


def test_a_vendor_that_fails_is_fallen_back_from_in_mid_conversation(journey: Journey) -> None:
    journey.fault("anthropic", kind="status", status=529)
    answer = journey.anthropic().messages.with_raw_response.create(**asked("Hi", "claude-first"))
    assert answer.headers["x-gateway-provider"] == "openai"
    assert answer.parse().type == "message"


@pytest.mark.parametrize(
    ("members", "error", "type"),
    [
        ({"model": "nothing"}, anthropic.NotFoundError, "not_found_error"),
        ({"extra_body": {"max_tokens": 0}}, anthropic.BadRequestError, "invalid_request_error"),
        ({"extra_headers": {"X-Tenant-Id": "tenant-b"}}, anthropic.PermissionDeniedError, "permission_error"),
        ({"extra_headers": {"anthropic-beta": "x\\y"}}, anthropic.BadRequestError, "invalid_request_error"),
    ],
)
def test_refusals_are_anthropic_s_own(journey: Journey, members: dict[str, Any], error: Any, type: str) -> None:
    with pytest.raises(error) as raised:
        journey.anthropic().messages.create(**(asked("Hi", "claude") | members))
    assert raised.value.type == type


def test_a_key_that_is_not_ours_is_refused(journey: Journey) -> None:
    with pytest.raises(anthropic.AuthenticationError) as raised:
        journey.anthropic().with_options(api_key="sk-ant-api03-theirs").messages.create(**asked("Hi", "claude"))
    assert raised.value.type == "authentication_error"


def test_an_overlong_prompt_is_refused_in_the_vendor_s_words(journey: Journey) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        journey.anthropic().messages.create(**asked("word " * 200_000, "claude"))
    assert raised.value.body["error"]["message"].startswith("prompt is too long")


def test_features_that_are_not_general_yet_reach_anthropic_alone(journey: Journey) -> None:
    beta = {"anthropic-beta": "context-1m-2025-08-07,claude-code-20250219"}
    for alias in ("claude", "one-target"):
        journey.anthropic().messages.create(**asked("Hi", alias), extra_headers=beta)
    assert journey.asked("anthropic")[-1]["headers"]["anthropic-beta"] == beta["anthropic-beta"]
    assert "anthropic-beta" not in journey.asked("openai")[-1]["headers"]


def test_a_request_reaches_anthropic_as_the_client_wrote_it(journey: Journey) -> None:
    hint = {"type": "ephemeral", "ttl": "1h"}
    request = asked("Hi", "claude", metadata={"user_id": "u-1"}, cache_control=hint)
    journey.anthropic().messages.create(**request, extra_body={"top_k": 3})
    (sent,) = journey.asked("anthropic")
    assert sent["body"] == request | {"top_k": 3, "model": "claude-haiku-4-5-20251001"}
    assert sent["headers"]["anthropic-version"] == "2023-06-01"


# --- beside messages --------------------------------------------------------------------------------------------------


def test_models_are_listed_in_either_shape(journey: Journey) -> None:
    ours = [model.id for model in journey.anthropic().models.list()]
    assert ours == [model.id for model in journey.openai().models.list()]
    assert "claude" in ours


def test_one_model_is_told_in_either_shape(journey: Journey) -> None:
    assert journey.anthropic().models.retrieve("claude").created_at == datetime.fromtimestamp(0, UTC)
    assert journey.openai().models.retrieve("claude").object == "model"


def test_a_model_that_is_not_there_or_not_allowed_is_refused_in_either_shape(journey: Journey) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        journey.anthropic().models.retrieve("nothing")
    assert raised.value.type == "not_found_error"
    narrow = journey.anthropic().with_options(default_headers={"X-Tenant-Id": "tenant-narrow"})
    with pytest.raises(anthropic.PermissionDeniedError):
        narrow.models.retrieve("claude")


def test_a_route_that_is_not_there_answers_in_anthropic_s_envelope(journey: Journey) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        journey.anthropic().beta.files.list()
    assert (raised.value.type, raised.value.body["type"]) == ("not_found_error", "error")


def test_another_method_than_post_is_refused_in_anthropic_s_envelope(journey: Journey) -> None:
    answer = journey.http.get("/v1/messages", headers=journey.headers())
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")
