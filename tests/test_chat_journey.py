"""Chat completions by the official SDK through Traefik over every vendor: what the vendors' own files do not show."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from tests.journey import Journey, chat, until
from tests.test_responses_journey import ALIASES

over_every_vendor = pytest.mark.parametrize("alias", ALIASES)


class Order(BaseModel):
    state: str
    parcels: int


def streamed(client: openai.OpenAI, asked: dict[str, Any]) -> ChatCompletion:
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        return stream.get_final_completion()


@over_every_vendor
def test_an_answer_by_schema_is_parsed_by_the_sdk_streamed_and_not(journey: Journey, alias: str) -> None:
    client = journey.openai()
    asked = chat("Which?", model=alias, response_format=Order)
    whole = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(whole, Order)
    assert streamed(client, asked).choices[0].message.parsed == whole


@over_every_vendor
def test_a_client_that_leaves_amid_a_stream_ends_the_vendor_s_work(journey: Journey, alias: str) -> None:
    asked = chat("tokens=400 chunk_ms=20", model=alias, stream=True)
    with journey.openai().chat.completions.with_streaming_response.create(**asked) as response:
        next(line for line in response.iter_lines() if '"content":"' in line.replace('"content":""', ""))
        request_id = response.headers["x-request-id"]
    assert journey.row(request_id)["status"] == "client_closed"
    until(lambda: journey.counts(ALIASES[alias]).get("aborted"))


@over_every_vendor
def test_an_error_amid_a_stream_is_raised_by_the_sdk(journey: Journey, alias: str) -> None:
    journey.fault(ALIASES[alias], kind="cut", after_chunks=8)
    with pytest.raises(openai.APIError) as raised:
        list(journey.openai().chat.completions.create(**chat("tokens=40", model=alias, stream=True)))
    assert raised.value.code == "upstream_unavailable"


def test_a_rate_that_is_used_up_is_429_with_retry_after(journey: Journey) -> None:
    client = journey.openai().with_options(default_headers={"X-Tenant-Id": "tenant-few-chat"})
    for _ in range(5):
        client.chat.completions.create(**chat("tokens=2", model="claude"))
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**chat("tokens=2", model="claude"))
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert (raised.value.type, raised.value.code) == ("rate_limit_error", "rate_limit_exceeded")


@over_every_vendor
def test_a_vendor_s_throttle_is_429_only_where_no_other_can_answer(journey: Journey, alias: str) -> None:
    """Our own limit is 429; a vendor's, once all are tried, is 503, with the time that the vendor asked for."""
    journey.fault(ALIASES[alias], kind="throttle", retry_after=7)
    with pytest.raises(openai.InternalServerError) as raised:
        journey.openai().chat.completions.create(**chat(model=alias))
    assert raised.value.status_code == 503
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 7
