"""Where calls go, from the front door to the row: rules, and what comes after an answer that will not do."""

from __future__ import annotations

import pytest

from tests.journey import Journey, chat, events, text, until

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


# --- second thoughts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cut_answer_is_escalated_and_both_are_in_one_row(journey: Journey, streamed: bool) -> None:
    body = chat("tokens=9", "cascaded", max_tokens=3)
    if streamed:
        with journey.stream(body) as answer:
            chunks = events(answer)
        assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    else:
        answer = journey.post(body)
    assert answer.status_code == 200
    assert (answer.headers["x-gateway-escalation"], answer.headers["x-gateway-provider"]) == ("length", "openrouter")
    event = journey.row(answer.headers["x-request-id"])
    first, second = event["attempts"]
    assert (first["outcome"], first["doubt"], second["outcome"]) == ("doubtful", "length", "success")
    assert event["usage"]["output_tokens"] == 6
    assert event["cost_usd"]["total"] > first["cost_usd"]["total"] > 0
    assert [len(journey.asked(vendor)) for vendor in ("openai", "openrouter")] == [1, 1]


def test_an_answer_without_doubt_is_not_escalated_nor_told_of_its_judgement(journey: Journey) -> None:
    answer = journey.post(chat("tokens=4", "cascaded"))
    assert (answer.headers["x-gateway-provider"], answer.json()["choices"][0].get("logprobs")) == ("openai", None)
    assert journey.asked("openrouter") == []


def test_a_slow_first_word_is_outrun_and_its_vendor_cancelled(journey: Journey) -> None:
    journey.fault("openai", kind="hang")
    with journey.stream(chat("tokens=4", "hedged")) as answer:
        chunks = events(answer)
    assert (answer.headers["x-gateway-hedge"], answer.headers["x-gateway-provider"]) == ("true", "openrouter")
    assert (text(chunks) != "", chunks[-1]) == (True, "[DONE]")
    until(lambda: journey.counts()["aborted"] == 1)
    event = journey.row(answer.headers["x-request-id"])
    assert [attempt["outcome"] for attempt in event["attempts"]] == ["outrun", "success"]
    assert event["cost_usd"]["total"] > event["attempts"][0]["cost_usd"]["total"] > 0


def test_a_hang_up_in_a_race_cancels_both_vendors(journey: Journey) -> None:
    for vendor in ("openai", "openrouter"):
        journey.fault(vendor, kind="hang")
    headers = journey.headers()
    vendors = ("openai", "openrouter")
    with journey.unread(chat(model="hedged"), headers):
        until(lambda: [journey.counts(vendor).get("requests") for vendor in vendors] == [1, 1])
    until(lambda: [journey.counts(vendor)["aborted"] for vendor in vendors] == [1, 1])
    event = journey.row(headers["x-request-id"])
    assert (event["status"], event["usage_source"]) == ("client_closed", "estimated")
    assert [attempt["outcome"] for attempt in event["attempts"]] == ["cancelled", "cancelled"]


# --- shadows ----------------------------------------------------------------------------------------------------------


def test_a_call_is_mirrored_for_the_gateway_s_account(journey: Journey) -> None:
    answer = journey.post(chat("tokens=3", "shadowed"))
    assert answer.headers["x-gateway-shadow"] == "true"
    client, shadow = (journey.row(prefix + answer.headers["x-request-id"]) for prefix in ("", "shadow_"))
    assert (client["tenant_id"], client["purpose"], client["provider"]) == ("tenant-a", "client", "openai")
    assert (shadow["tenant_id"], shadow["purpose"], shadow["provider"]) == ("_gateway", "shadow", "openrouter")
    assert shadow["cost_usd"]["total"] > 0
    scrapes = journey.admin("/metrics", 0).text + journey.admin("/metrics", 1).text
    assert 'gateway_shadows_total{alias="shadowed",outcome="sent",target="openrouter/gpt-4o-mini"}' in scrapes
