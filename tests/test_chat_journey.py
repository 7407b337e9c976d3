"""Chat completions by the official SDK through Traefik over every vendor: what the vendors' own files do not show."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from tests.journey import Journey, chat
from tests.test_responses_journey import ALIASES, PIXEL

over_every_vendor = pytest.mark.parametrize("alias", ALIASES)
SEVERAL = pytest.mark.parametrize("alias", ["one-target", "azure", "gemini", "vertex"])
"""Vendors that give several answers, and log probabilities."""


class Order(BaseModel):
    state: str
    parcels: int


def streamed(client: openai.OpenAI, asked: dict[str, Any]) -> ChatCompletion:
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        return stream.get_final_completion()


def said(answer: ChatCompletion) -> list[Any]:
    choices = [
        (choice.index, choice.message.content, choice.finish_reason, choice.logprobs and choice.logprobs.content)
        for choice in answer.choices
    ]
    return [*sorted(choices, key=lambda choice: choice[0]), answer.usage.total_tokens]


@over_every_vendor
def test_an_empty_list_of_tools_asks_for_none(journey: Journey, alias: str) -> None:
    client = journey.openai()
    asked = chat("tokens=5", model=alias, tools=[])
    assert said(streamed(client, asked)) == said(client.chat.completions.create(**asked))


@over_every_vendor
def test_an_answer_by_schema_is_parsed_by_the_sdk_streamed_and_not(journey: Journey, alias: str) -> None:
    client = journey.openai()
    asked = chat("Which?", model=alias, response_format=Order)
    whole = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(whole, Order)
    assert streamed(client, asked).choices[0].message.parsed == whole


@over_every_vendor
def test_images_are_seen(journey: Journey, alias: str) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    turn = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}
    answer = journey.openai().chat.completions.create(model=alias, messages=[turn])
    assert answer.choices[0].message.content
    assert PIXEL in str(journey.asked(ALIASES[alias])[-1]["body"])


@SEVERAL
def test_several_answers_are_told_apart(journey: Journey, alias: str) -> None:
    client = journey.openai()
    asked = chat("tokens=5", model=alias, n=3)
    whole = client.chat.completions.create(**asked)
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert said(streamed(client, asked)) == said(whole)


@SEVERAL
def test_log_probabilities_are_of_each_token(journey: Journey, alias: str) -> None:
    client = journey.openai()
    asked = chat("tokens=4", model=alias, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked)
    assert [len(token.top_logprobs) for token in whole.choices[0].logprobs.content] == [2] * 4
    assert said(streamed(client, asked)) == said(whole)


@over_every_vendor
def test_a_vendor_s_throttle_is_429_only_where_no_other_can_answer(journey: Journey, alias: str) -> None:
    """Our own limit is 429; a vendor's, once all are tried, is 503, with the time that the vendor asked for."""
    journey.fault(ALIASES[alias], kind="throttle", retry_after=7)
    with pytest.raises(openai.InternalServerError) as raised:
        journey.openai().chat.completions.create(**chat(model=alias))
    assert raised.value.status_code == 503
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 7
