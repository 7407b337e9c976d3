"""Azure OpenAI and compatible vendors through the whole stack: the official SDK cannot tell who answers."""

from __future__ import annotations

import re
from decimal import Decimal

import openai
import pytest

from tests.journey import Journey, chat, decoded

ALIASES = ("azure", "groq", "mistral")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "order_status",
            "parameters": {"type": "object", "properties": {"id": {"type": "string"}}},
        },
    }
]


@pytest.mark.parametrize("alias", ALIASES)
def test_a_stream_accumulates_to_the_unary_answer(journey: Journey, alias: str) -> None:
    client = journey.openai()
    unary = client.chat.completions.create(**chat("tokens=9 reasoning=3", model=alias))
    with client.chat.completions.stream(
        **chat("tokens=9 reasoning=3", model=alias), stream_options={"include_usage": True}
    ) as stream:
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == unary.choices[0].message.content
    assert isinstance(whole.choices[0].message.content, str)
    assert whole.choices[0].finish_reason == unary.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == unary.usage.total_tokens


@pytest.mark.parametrize("alias", ALIASES)
def test_tools_are_called_streamed_and_not(journey: Journey, alias: str) -> None:
    client = journey.openai()
    asked = chat("tools=2", model=alias, tools=TOOLS)
    unary = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        whole = stream.get_final_completion().choices[0]
    assert unary.finish_reason == whole.finish_reason == "tool_calls"
    called = [call.function.arguments for call in unary.message.tool_calls]
    assert len(called) == 2
    assert [call.function.arguments for call in whole.message.tool_calls] == called


@pytest.mark.parametrize(
    ("alias", "model", "price"),
    [
        ("azure", "gpt-4o-mini-2024-07-18", ("0.15", "0.60")),
        ("groq", "openai/gpt-oss-120b", ("0.15", "0.60")),
        ("mistral", "mistral-small-2506", ("0.1", "0.3")),
    ],
)
def test_row_has_the_vendors_usage_id_and_price(
    journey: Journey, alias: str, model: str, price: tuple[str, str]
) -> None:
    answer = journey.post(chat("tokens=11", model=alias))
    usage = answer.json()["usage"]
    event = journey.row(answer.headers["x-request-id"])
    assert (event["provider"], event["model_resolved"], event["usage_source"]) == (alias, model, "vendor")
    assert (event["usage"]["input_tokens"], event["usage"]["output_tokens"]) == (usage["prompt_tokens"], 11)
    assert re.fullmatch(r"[0-9a-f-]{32,36}", event["vendor_request_id"])
    (row,) = journey.query("SELECT cost_usd FROM ledger WHERE request_id = %s", answer.headers["x-request-id"])
    expected = (Decimal(price[0]) * usage["prompt_tokens"] + Decimal(price[1]) * 11) / 1_000_000
    assert row["cost_usd"] == expected.quantize(Decimal("1e-9"))


@pytest.mark.parametrize("alias", ALIASES)
def test_row_of_a_stream_has_the_usage_of_the_unary_answer(journey: Journey, alias: str) -> None:
    unary = journey.post(chat("tokens=7", model=alias))
    with journey.stream(chat("tokens=7", model=alias)) as streamed:
        chunks = decoded(streamed.iter_lines())
    found = journey.rows([unary.headers["x-request-id"], streamed.headers["x-request-id"]])
    one, other = found.values()
    assert chunks[-1] == "[DONE]"
    assert one["usage"] == other["usage"]
    assert one["cost_usd"] == other["cost_usd"]


def test_azure_gets_its_deployment_its_version_and_its_key(journey: Journey) -> None:
    journey.post(chat(model="azure"))
    (request,) = journey.asked("azure")
    assert request["path"] == "/openai/deployments/gpt-4o-mini-2024-07-18/chat/completions"
    assert "api-key" in request["headers"]
    assert "authorization" not in request["headers"]


def test_azures_filter_leaves_a_message_for_clients_to_read(journey: Journey) -> None:
    client = journey.openai()
    unary = client.chat.completions.create(**chat("filtered=1", model="azure")).choices[0]
    assert (unary.finish_reason, unary.message.content) == ("content_filter", None)
    assert unary.model_extra["content_filter_results"]["violence"]["filtered"]
    chunks = list(client.chat.completions.create(**chat("filtered=1", model="azure"), stream=True))
    assert chunks[0].model_extra["prompt_filter_results"]
    assert [choice.delta for chunk in chunks for choice in chunk.choices][-1].content is None
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_a_prompt_that_azure_refuses_is_refused_to_the_client(journey: Journey) -> None:
    journey.fault("azure", kind="status", status=400, code="content_filter", message="Filtered.")
    with pytest.raises(openai.BadRequestError) as raised:
        journey.openai().chat.completions.create(**chat(model="azure-first"))
    assert raised.value.code == "content_filter"
    assert journey.asked("openai") == []


def test_a_throttled_deployment_falls_back_to_openai(journey: Journey) -> None:
    journey.fault("azure", kind="throttle", retry_after=30, retry_after_ms=30_000)
    answer = journey.post(chat(model="azure-first"))
    assert (answer.status_code, answer.headers["x-gateway-provider"]) == (200, "openai")
    assert journey.row(answer.headers["x-request-id"])["attempts"][0]["outcome"] == "throttled"


def test_embeddings_of_a_deployment(journey: Journey) -> None:
    vectors = journey.openai().embeddings.create(model="embed-azure", input=["a b", "c d"], dimensions=32)
    assert [len(one.embedding) for one in vectors.data] == [32, 32]
    assert journey.asked("azure")[0]["path"].endswith("/deployments/text-embedding-3-small/embeddings")


def test_a_parameter_that_no_target_can_carry_is_named(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        journey.openai().chat.completions.create(**chat(model="mistral"), logprobs=True)
    assert (raised.value.code, raised.value.param) == ("unsupported_parameter", "logprobs")
    assert journey.asked("mistral") == []


def test_a_parameter_that_one_target_cannot_carry_goes_to_the_next(journey: Journey) -> None:
    answer = journey.post(chat(model="mistral-first", logprobs=True))
    assert (answer.status_code, answer.headers["x-gateway-provider"]) == (200, "openai")


def test_parameters_of_openai_reach_mistral_under_its_own_names(journey: Journey) -> None:
    answer = journey.post(chat(model="mistral", max_completion_tokens=5, seed=7, store=False))
    assert answer.status_code == 200
    body = journey.asked("mistral")[0]["body"]
    assert (body["max_tokens"], body["random_seed"]) == (5, 7)
    assert not {"max_completion_tokens", "seed", "store"} & set(body)


def test_reasoning_of_mistral_stands_beside_its_text(journey: Journey) -> None:
    message = journey.post(chat("tokens=4 reasoning=3", model="mistral")).json()["choices"][0]["message"]
    assert isinstance(message["content"], str)
    assert message["reasoning_content"]


def test_groqs_error_event_ends_a_stream_with_one_error(journey: Journey) -> None:
    journey.fault("groq", kind="error_event", after_chunks=4)
    with pytest.raises(openai.APIError):
        list(journey.openai().chat.completions.create(**chat("tokens=20", model="groq"), stream=True))
