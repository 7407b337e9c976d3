"""Where calls go, from the front door to the row: rules, and what comes after an answer that will not do."""

from __future__ import annotations

import pytest

from tests.journey import Journey, chat

# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "feature", "rule", "provider"),
    [
        ("short", "", None, "openai"),
        ("short", "beta", "beta", "openrouter"),
        ("long " * 1000, "", "long", "openrouter"),
        ("long " * 1000, "beta", "long", "openrouter"),
    ],
)
def test_a_call_goes_by_the_first_rule_that_holds(
    journey: Journey, prompt: str, feature: str, rule: str | None, provider: str
) -> None:
    answer = journey.post(chat(prompt + " tokens=2", model="ruled"), x_feature_id=feature)
    assert answer.status_code == 200
    assert answer.headers.get("x-gateway-rule") == rule
    assert answer.headers["x-gateway-provider"] == provider
    assert answer.headers["x-gateway-fallback"] == "false"
    event = journey.row(answer.headers["x-request-id"])
    assert (event["rule"], event["provider"], event["model_alias"]) == (rule, provider, "ruled")


def test_a_chain_that_a_rule_chose_falls_back_within_itself(journey: Journey) -> None:
    journey.fault("openrouter", kind="status", status=500)
    answer = journey.post(chat("tokens=2", model="ruled"), x_feature_id="beta")
    assert (answer.headers["x-gateway-rule"], answer.headers["x-gateway-provider"]) == ("beta", "openai")
    event = journey.row(answer.headers["x-request-id"])
    assert (event["fallback_used"], event["fallback_chain"][0]) == (True, "openrouter/gpt-4o-mini")
