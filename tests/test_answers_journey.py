"""The answers of the tables in `runbooks/dialects.md` through Traefik, by the official SDKs: what they say is so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from loadtest.stack import Stack
from tests.journey import Journey
from tests.test_answer_matrix import CASES, answered, outcome, plain
from tests.test_responses_journey import ALIASES


@pytest.fixture(scope="module")
def clients(stack: Stack) -> Iterator[dict[str, Any]]:
    """By dialect. What they ask leaves nothing to be put back."""
    with Journey(stack) as journey:
        journey.clear()
        ours = journey.openai()
        yield {"chat": ours, "responses": ours, "messages": journey.anthropic()}


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize(("dialect", "feature"), CASES)
def test_a_stream_accumulates_to_the_whole_answer(
    clients: dict[str, Any], dialect: str, feature: str, alias: str
) -> None:
    word, *_ = outcome(dialect, feature, ALIASES[alias])
    if word.startswith("refused"):
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as raised:
            answered(clients[dialect], dialect, feature, alias)
        assert raised.value.response.json()["error"]["param"] in word
        return
    seen, whole, streamed = answered(clients[dialect], dialect, feature, alias)
    assert seen == word
    assert plain(streamed) == plain(whole)
