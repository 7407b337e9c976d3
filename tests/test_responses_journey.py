"""OpenAI's official SDK and its Responses through Traefik, over every vendor of the simulator."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.journey import Journey, until

ALIASES = {
    "one-target": "openai",
    "azure": "azure",
    "claude": "anthropic",
    "claude-at-aws": "bedrock",
    "gemini": "gemini",
    "vertex": "vertex",
    "groq": "groq",
    "mistral": "mistral",
}
"""An alias for each vendor that answers in a shape of its own."""
REASONING = {"claude": "signature", "claude-at-aws": "signature", "gemini": "thoughtSignature", "mistral": ""}
"""Those whose models show here how they reason, and under which name they take back what they sealed."""
TOOL = {
    "type": "function",
    "name": "order_status",
    "description": "Where an order is.",
    "parameters": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    "strict": False,
}
READ = TypeAdapter(ResponseStreamEvent)
"""An event, as strictly as the SDK's types are."""
over_every_vendor = pytest.mark.parametrize("alias", ALIASES)


class Order(BaseModel):
    state: str
    parcels: int


def asked(prompt: str, alias: str, **members: Any) -> dict[str, Any]:
    return {"model": alias, "max_output_tokens": 2_000, "input": prompt, **members}


def streamed(client: openai.OpenAI, request: dict[str, Any]) -> Response:
    """As the SDK accumulates the events; they are numbered from 0 on."""
    with client.responses.stream(**request) as stream:
        assert [event.sequence_number for event in stream if hasattr(event, "sequence_number")][:3] == [0, 1, 2]
        return stream.get_final_response()


def said(response: Response) -> dict[str, Any]:
    """What a response says, strictly read, without what each has anew: ids, and what is sealed."""
    told = Response.model_validate(response.to_dict()).to_dict()
    for item in told["output"]:
        for name in ("id", "call_id", "encrypted_content", "parsed_arguments", "status"):
            item.pop(name, None)
        if "arguments" in item:  # the vendor's own JSON, spaced as it pleases
            item["arguments"] = json.loads(item["arguments"])
        for part in item.get("content") or ():
            part.pop("parsed", None)
    names = ("model", "output", "status", "usage", "incomplete_details", "tools", "text", "instructions")
    return {name: told.get(name) for name in names}


@over_every_vendor
def test_a_stream_accumulates_to_the_whole_answer(journey: Journey, alias: str) -> None:
    client = journey.openai()
    request = asked("tokens=9 cached=4", alias, instructions="Be brief.", tools=[])
    whole = client.responses.create(**request)
    assert said(streamed(client, request)) == said(whole)
    assert (whole.status, whole.usage.output_tokens, whole.usage.input_tokens_details.cached_tokens) == (
        "completed", 9, 4,
    )  # fmt: skip
    assert whole.output_text
    assert whole.instructions == "Be brief."


@over_every_vendor
def test_tools_are_called_in_parallel_and_their_results_go_back(journey: Journey, alias: str) -> None:
    client = journey.openai()
    request = asked("tools=2", alias, tools=[TOOL], tool_choice="auto")
    whole, stream = client.responses.create(**request), streamed(client, request)
    assert said(stream) == said(whole)
    calls = [item for item in stream.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["order_status"] * 2
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sent"} for call in calls]
    sent_back = [item.model_dump(exclude={"parsed_arguments"}, exclude_none=True) for item in stream.output]
    turns = [{"role": "user", "content": "tools=2"}, *sent_back, *results]
    assert client.responses.create(**(request | {"input": turns})).output_text


@over_every_vendor
def test_a_forced_tool_is_called_once(journey: Journey, alias: str) -> None:
    choice = {"type": "function", "name": "order_status"}
    response = journey.openai().responses.create(**asked("Go.", alias, tools=[TOOL], tool_choice=choice))
    assert [item.type for item in response.output if item.type != "reasoning"] == ["function_call"]


@over_every_vendor
def test_an_answer_by_schema_is_parsed_by_the_sdk(journey: Journey, alias: str) -> None:
    response = journey.openai().responses.parse(**asked("Which?", alias), text_format=Order)
    assert isinstance(response.output_parsed, Order)


@pytest.mark.parametrize("alias", REASONING)
def test_reasoning_is_streamed_and_goes_back_sealed(journey: Journey, alias: str) -> None:
    client = journey.openai()
    effort = {} if alias == "mistral" else {"reasoning": {"effort": "low"}}
    request = asked("tools=1 reasoning=3", alias, tools=[TOOL], **effort)
    whole, stream = client.responses.create(**request), streamed(client, request)
    assert said(stream) == said(whole)
    assert [item.type for item in stream.output][:2] == ["reasoning", "function_call"]
    assert stream.output[0].summary[0].text
    assert stream.usage.output_tokens_details.reasoning_tokens == whole.usage.output_tokens_details.reasoning_tokens
    sent_back = [item.model_dump(exclude={"parsed_arguments"}, exclude_none=True) for item in stream.output]
    result = {"type": "function_call_output", "call_id": stream.output[1].call_id, "output": "sent"}
    turns = [{"role": "user", "content": "tools=1 reasoning=3"}, *sent_back, result]
    assert client.responses.create(**(request | {"input": turns})).output_text
    assert REASONING[alias] in str(journey.asked(ALIASES[alias])[-1]["body"])


@over_every_vendor
def test_an_answer_that_is_cut_short_says_so(journey: Journey, alias: str) -> None:
    client = journey.openai()
    request = asked("tokens=40", alias) | {"max_output_tokens": 16}
    whole, *_, last = client.responses.create(**request), *client.responses.create(**request, stream=True)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert last.type == "response.incomplete"
    assert said(last.response) == said(whole)


@over_every_vendor
def test_a_client_that_leaves_amid_a_stream_ends_the_vendor_s_work(journey: Journey, alias: str) -> None:
    request = asked("tokens=400 chunk_ms=20", alias)
    with journey.openai().responses.with_streaming_response.create(**request, stream=True) as response:
        next(line for line in response.iter_lines() if "output_text.delta" in line)
        request_id = response.headers["x-request-id"]
    row = journey.row(request_id)
    told = {"estimated", "vendor"} if alias in ("gemini", "vertex") else {"estimated"}  # they tell usage all the time
    assert row["status"] == "client_closed"
    assert row["usage_source"] in told
    until(lambda: journey.counts(ALIASES[alias]).get("aborted"))


@over_every_vendor
def test_an_error_amid_a_stream_is_raised_by_the_sdk(journey: Journey, alias: str) -> None:
    journey.fault(ALIASES[alias], kind="cut", after_chunks=8)
    with pytest.raises(openai.APIError) as raised:
        list(journey.openai().responses.create(**asked("tokens=40", alias), stream=True))
    assert raised.value.code == "upstream_unavailable"


@over_every_vendor
def test_the_error_that_ends_a_stream_is_the_next_of_its_numbered_events(journey: Journey, alias: str) -> None:
    journey.fault(ALIASES[alias], kind="cut", after_chunks=8)
    with journey.openai().responses.with_streaming_response.create(**asked("tokens=40", alias), stream=True) as raw:
        told = [READ.validate_json(line[6:]) for line in raw.iter_lines() if line.startswith("data: ")]
    assert told[-1].type == "error"
    assert [event.sequence_number for event in told] == list(range(len(told)))


@over_every_vendor
def test_rows_say_what_the_vendor_counted(journey: Journey, alias: str) -> None:
    client = journey.openai()
    whole = client.responses.with_raw_response.create(**asked("tokens=5", alias))
    stream = client.responses.with_raw_response.create(**asked("tokens=5", alias), stream=True)
    list(stream.parse())
    one, other = journey.rows([whole.headers["x-request-id"], stream.headers["x-request-id"]]).values()
    assert one["usage"] == other["usage"]
    assert one["usage"]["output_tokens"] == whole.parse().usage.output_tokens == 5
    assert (one["status"], one["finish_reason"], one["usage_source"]) == ("success", "stop", "vendor")
    assert one["provider"] == whole.headers["x-gateway-provider"]


# --- limits and refusals ----------------------------------------------------------------------------------------------


def test_a_rate_that_is_used_up_is_429_with_retry_after(journey: Journey) -> None:
    client = journey.openai().with_options(default_headers={"X-Tenant-Id": "tenant-few-responses"})
    for _ in range(5):
        client.responses.create(**asked("tokens=2", "claude"))
    with pytest.raises(openai.RateLimitError) as raised:
        client.responses.create(**asked("tokens=2", "claude"))
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert (raised.value.type, raised.value.code) == ("rate_limit_error", "rate_limit_exceeded")


@over_every_vendor
def test_a_vendor_s_throttle_is_told_with_its_wait_where_no_other_can_answer(journey: Journey, alias: str) -> None:
    journey.fault(ALIASES[alias], kind="throttle", retry_after=7)
    with pytest.raises(openai.InternalServerError) as raised:
        journey.openai().responses.create(**asked("Hi", alias))
    assert (raised.value.status_code, raised.value.code) == (503, "upstream_unavailable")
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 7


def test_a_vendor_that_throttles_is_fallen_back_from(journey: Journey) -> None:
    journey.fault("anthropic", kind="throttle", retry_after=30)
    answer = journey.openai().responses.with_raw_response.create(**asked("Hi", "claude-first"))
    assert answer.headers["x-gateway-provider"] == "openai"


def test_what_no_vendor_can_carry_is_refused_by_its_name(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        journey.openai().responses.create(**asked("Hi", "claude", tools=[{"type": "web_search"}]))
    assert (raised.value.code, raised.value.param) == ("unsupported_parameter", "tools[0]")
    assert journey.asked("anthropic") == []


# --- answers that the vendor keeps ------------------------------------------------------------------------------------


def test_a_kept_answer_is_gone_on_from_by_its_tenant_and_no_other(journey: Journey) -> None:
    client = journey.openai()
    first = client.responses.create(**asked("Hi", "one-target", store=True))
    with client.responses.stream(**asked("And?", "one-target"), previous_response_id=first.id, store=True) as stream:
        second = stream.get_final_response()
    third = client.responses.create(**asked("And?", "one-target"), previous_response_id=second.id)
    told = [request["body"].get("previous_response_id") for request in journey.asked("openai")]
    assert told == [None, first.id.partition("-")[0], second.id.partition("-")[0]]
    assert [second.previous_response_id, third.previous_response_id] == [first.id, second.id]
    other = client.with_options(default_headers={"X-Tenant-Id": "spender"})
    for asking, name in ((other, first.id), (client, first.id.partition("-")[0]), (client, third.id)):
        with pytest.raises(openai.BadRequestError) as raised:
            asking.responses.create(**asked("And?", "one-target"), previous_response_id=name)
        assert (raised.value.code, raised.value.param) == ("unsupported_parameter", "previous_response_id")
    assert len(journey.asked("openai")) == 3


@pytest.mark.parametrize("alias", ["one-target", "azure"])
def test_a_kept_answer_is_told_and_deleted_to_its_tenant_and_no_other(journey: Journey, alias: str) -> None:
    client = journey.openai()
    before = client.responses.create(**asked("Hi", alias, store=True))
    kept = client.responses.create(**asked("And?", alias, store=True, previous_response_id=before.id))
    other = client.with_options(default_headers={"X-Tenant-Id": "spender"})
    raw = kept.id.rpartition("-")[0]
    for asking, name in ((other, kept.id), (client, raw), (client, kept.id[:-1] + "_"), (client, "resp_1")):
        for call in (asking.responses.retrieve, asking.responses.delete, asking.responses.input_items.list):
            with pytest.raises(openai.NotFoundError) as raised:
                call(name)
            assert raised.value.code == "not_found"
    refused = journey.row(raised.value.response.headers["x-request-id"])
    assert (refused["status"], refused["operation"], refused["model_alias"]) == ("refused", "retrieve", None)
    told = client.responses.with_raw_response.retrieve(kept.id)
    assert told.parse().to_dict() == kept.to_dict()
    assert [item.content[0] for item in client.responses.input_items.list(kept.id)]
    gone = client.responses.with_raw_response.delete(kept.id)
    assert gone.http_response.json() == {"id": kept.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.retrieve(kept.id)
    assert raised.value.code == "not_found"
    assert client.responses.retrieve(before.id).id == before.id  # the target does not rest for what was deleted
    names = [answer.headers["x-request-id"] for answer in (told, gone)]
    found = journey.rows(names)
    rows = [found[name] for name in names]
    assert [row["operation"] for row in rows] == ["retrieve", "delete"]
    assert {
        (row["status"], row["provider"], row["usage"]["total_tokens"], row["cost_usd"]["total"]) for row in rows
    } == {("success", ALIASES[alias], 0, 0)}


def test_what_is_not_offered_of_kept_answers_is_refused_clearly(journey: Journey) -> None:
    client = journey.openai()
    kept = client.responses.create(**asked("Hi", "one-target", store=True))
    for call, says in (
        (lambda: client.responses.cancel(kept.id), "background"),
        (lambda: client.responses.retrieve(kept.id, stream=True), "stream"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            call()
    for method, path, status in (
        ("PATCH", "", 405),
        ("POST", "", 405),
        ("DELETE", "/input_items", 405),
        ("GET", "/x", 404),
    ):
        answer = journey.http.request(method, f"/v1/responses/{kept.id}{path}", headers=journey.headers())
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_chain_goes_on_where_the_answer_is_kept(journey: Journey) -> None:
    client = journey.openai()
    first = client.responses.create(**asked("Hi", "one-target", store=True))
    answer = client.responses.with_raw_response.create(**asked("And?", "claude-first"), previous_response_id=first.id)
    assert answer.headers["x-gateway-provider"] == "openai"
    assert journey.asked("anthropic") == []


@pytest.mark.parametrize("alias", ["claude", "gemini", "groq"])
def test_a_vendor_that_keeps_nothing_refuses_by_name(journey: Journey, alias: str) -> None:
    for members, param in (({"store": True}, "store"), ({"previous_response_id": "resp_1"}, "previous_response_id")):
        with pytest.raises(openai.BadRequestError) as raised:
            journey.openai().responses.create(**asked("Hi", alias, **members))
        assert (raised.value.code, raised.value.param) == ("unsupported_parameter", param)
