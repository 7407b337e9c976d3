"""What apps do with the gateway by the frameworks that they are built with. Prints JSON: what became of each scenario.

Runs in an environment of its own (`make frameworks`), as these packages want other versions than the product's.
"""

from __future__ import annotations

import asyncio
import json
import os
import traceback
from collections.abc import Callable

from pydantic import BaseModel

URL, KEY, TENANT = os.environ["GATEWAY_URL"], os.environ["GATEWAY_KEY"], os.environ["GATEWAY_TENANT"]
HEADERS = {"X-Tenant-Id": TENANT}
ALIASES = ("one-target", "claude", "gemini", "claude-at-aws", "mistral")
SCENARIOS: dict[str, Callable[[str], object]] = {}


class Order(BaseModel):
    state: str
    parcels: int


def scenario(run: Callable[[str], object]) -> Callable[[str], object]:
    SCENARIOS[run.__name__] = run
    return run


def order_status(id: str) -> str:
    """Where an order is."""
    return "sent"


# --- openai-agents ----------------------------------------------------------------------------------------------------


def _agent(alias: str, model: type) -> None:
    from agents import Agent, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)

    async def run() -> None:
        client = AsyncOpenAI(base_url=URL + "/v1", api_key=KEY, default_headers=HEADERS)
        agent = Agent(
            name="a",
            instructions="Be brief.",
            model=model(model=alias, openai_client=client),
            tools=[function_tool(order_status)],
        )
        whole = await Runner.run(agent, "tools=2 tokens=7")
        assert len([item for item in whole.new_items if item.type == "tool_call_output_item"]) == 2
        assert whole.final_output
        streamed = Runner.run_streamed(agent, "tools=2 tokens=7")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output
        parsed = await Runner.run(agent.clone(output_type=Order, tools=[]), "Which?")
        assert isinstance(parsed.final_output, Order)

    asyncio.run(run())


@scenario
def openai_agents_by_responses(alias: str) -> None:
    from agents import OpenAIResponsesModel

    _agent(alias, OpenAIResponsesModel)


@scenario
def openai_agents_by_chat(alias: str) -> None:
    from agents import OpenAIChatCompletionsModel

    _agent(alias, OpenAIChatCompletionsModel)


# --- langchain --------------------------------------------------------------------------------------------------------


def _chain(model: object) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    bound = model.bind_tools([tool(order_status)])
    asked = [HumanMessage("tools=2")]
    answer = bound.invoke(asked)
    assert [call["name"] for call in answer.tool_calls] == ["order_status"] * 2
    streamed = None
    for chunk in bound.stream(asked):
        streamed = chunk if streamed is None else streamed + chunk
    assert [call["args"] for call in streamed.tool_calls] == [call["args"] for call in answer.tool_calls]
    results = [ToolMessage("sent", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert bound.invoke([*asked, answer, *results]).text
    assert isinstance(model.with_structured_output(Order).invoke("Which?"), Order)
    assert model.invoke("tokens=5").usage_metadata["output_tokens"] == 5


@scenario
def langchain_openai_by_chat(alias: str) -> None:
    from langchain_openai import ChatOpenAI

    _chain(ChatOpenAI(model=alias, base_url=URL + "/v1", api_key=KEY, default_headers=HEADERS))


@scenario
def langchain_openai_by_responses(alias: str) -> None:
    from langchain_openai import ChatOpenAI

    _chain(ChatOpenAI(model=alias, base_url=URL + "/v1", api_key=KEY, default_headers=HEADERS, use_responses_api=True))


@scenario
def langchain_anthropic(alias: str) -> None:
    from langchain_anthropic import ChatAnthropic

    _chain(ChatAnthropic(model=alias, base_url=URL, api_key=KEY, default_headers=HEADERS, max_tokens=1_000))


# --- instructor -------------------------------------------------------------------------------------------------------


@scenario
def instructor_by_schema_and_by_tools(alias: str) -> None:
    import instructor
    from openai import OpenAI

    client = OpenAI(base_url=URL + "/v1", api_key=KEY, default_headers=HEADERS)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        made = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=alias, response_model=Order, messages=[{"role": "user", "content": "Which?"}], max_retries=0
        )
        assert isinstance(made, Order)


# --- pydantic-ai ------------------------------------------------------------------------------------------------------


def _pydantic(model: object) -> None:
    from pydantic_ai import Agent

    agent = Agent(model, tools=[order_status])
    whole = agent.run_sync("tools=2 tokens=7")
    assert whole.output

    async def run() -> str:
        async with agent.run_stream("tools=2 tokens=7") as streamed:
            return await streamed.get_output()

    assert asyncio.run(run())
    assert isinstance(Agent(model, output_type=Order).run_sync("Which?").output, Order)


@scenario
def pydantic_ai_by_chat(alias: str) -> None:
    from openai import AsyncOpenAI
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    client = AsyncOpenAI(base_url=URL + "/v1", api_key=KEY, default_headers=HEADERS)
    _pydantic(OpenAIChatModel(alias, provider=OpenAIProvider(openai_client=client)))


@scenario
def pydantic_ai_by_responses(alias: str) -> None:
    from openai import AsyncOpenAI
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    client = AsyncOpenAI(base_url=URL + "/v1", api_key=KEY, default_headers=HEADERS)
    _pydantic(OpenAIResponsesModel(alias, provider=OpenAIProvider(openai_client=client)))


# --- llama-index ------------------------------------------------------------------------------------------------------


@scenario
def llama_index(alias: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=alias, api_base=URL + "/v1", api_key=KEY, default_headers=HEADERS, is_chat_model=True, max_retries=0
    )
    asked = [ChatMessage(role="user", content="tokens=9")]
    whole = model.chat(asked).message.content
    assert whole
    assert list(model.stream_chat(asked))[-1].message.content == whole


def main() -> None:
    seen = {}
    for name, run in SCENARIOS.items():
        for alias in ALIASES:
            try:
                run(alias)
                seen[f"{name} {alias}"] = "ok"
            except Exception:
                seen[f"{name} {alias}"] = traceback.format_exc()[-1_500:]
    print(json.dumps(seen))


main()
