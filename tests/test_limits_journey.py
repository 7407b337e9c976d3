"""Limits as clients meet them through Traefik: what refusals and answers say, and what is charged in the end."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest
import redis

from app.limits.scopes import period
from tests.journey import LIMITED_KEY, Journey, chat, events, until
from tests.limits_parts import not_just_before_midnight

RATES = [f"x-ratelimit-{figure}-{of}" for of in ("requests", "tokens") for figure in ("limit", "remaining", "reset")]


def refused(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["limit"]


def test_a_call_above_its_tpm_is_told_that_trying_again_does_not_help(journey: Journey) -> None:
    answer = journey.post(chat(max_tokens=5_000), x_tenant_id="limit-tpm")
    assert refused(answer) == (429, "rate_limit_exceeded", "tenant_tpm")
    assert (answer.headers["x-should-retry"], int(answer.headers["retry-after"]) >= 1) == ("false", True)


def test_a_used_up_tpm_says_when_its_window_has_room(journey: Journey) -> None:
    def call() -> httpx.Response:  # of 1,500 tokens that are reserved a third is given back
        return journey.post(chat("tokens=1000", max_tokens=1_500), x_tenant_id="limit-tpm")

    *_, answer = answers = journey.until_refused(call, 12)
    assert len(answers) > 1
    assert refused(answer) == (429, "rate_limit_exceeded", "tenant_tpm")
    assert "x-should-retry" not in answer.headers
    assert 1 <= int(answer.headers["retry-after"]) <= 61


def test_a_stream_holds_its_place_until_it_ends(journey: Journey) -> None:
    journey.fault(kind="hold")
    with journey.stream(chat("tokens=9"), x_tenant_id="limit-concurrency") as running:
        lines = running.iter_lines()
        next(lines)
        meanwhile = journey.post(chat("tokens=2"), x_tenant_id="limit-concurrency")
        journey.release()
        list(lines)
    assert refused(meanwhile) == (429, "rate_limit_exceeded", "tenant_concurrency")
    assert meanwhile.headers["retry-after"] == "1"
    until(lambda: journey.post(chat("tokens=2"), x_tenant_id="limit-concurrency").status_code == 200)


@pytest.mark.parametrize(
    ("tenant", "limit", "monthly", "zone"),
    [
        ("limit-day", "tenant_daily_usd", False, "Asia/Tokyo"),
        ("limit-month", "tenant_monthly_usd", True, "UTC"),
        ("tenant-poor", "tenant_daily_tokens", False, "UTC"),
    ],
)
def test_a_used_up_budget_says_when_its_day_or_month_ends_and_not_to_try_again(
    journey: Journey, tenant: str, limit: str, monthly: bool, zone: str
) -> None:
    not_just_before_midnight(30, zone)
    asked = time.time()
    answer = journey.post(chat(max_tokens=5_000), x_tenant_id=tenant)
    answered = time.time()
    assert refused(answer) == (429, "budget_exceeded", limit)
    ends = period(monthly, zone, asked)[2]
    assert ends - answered - 2 <= int(answer.headers["retry-after"]) <= ends - asked + 2
    assert answer.headers["x-should-retry"] == "false"
    assert journey.row(answer.headers["x-request-id"])["limit_tripped"] == limit


def test_a_service_key_has_limits_of_its_own(journey: Journey) -> None:
    mine = {"authorization": f"Bearer {LIMITED_KEY}", "x_tenant_id": "limit-key"}
    answers = [journey.post(chat("tokens=2"), **mine) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert refused(answers[2])[2] == "key_rpm"
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_tells_how_its_limits_stand(journey: Journey, stream: bool) -> None:
    answer = journey.post(chat("tokens=2", stream=stream), x_tenant_id="spender")
    assert answer.status_code == 200
    assert [name for name in RATES if name not in answer.headers] == []
    assert answer.headers["x-ratelimit-limit-requests"] == "600"
    assert answer.headers["x-ratelimit-limit-tokens"] == "10000000"


def test_a_refusal_tells_how_its_limits_stand(journey: Journey) -> None:
    answer = journey.post(chat(max_tokens=100_000), x_tenant_id="tenant-poor")
    assert [name for name in RATES if name not in answer.headers] == []
    assert answer.headers["x-ratelimit-limit-tokens"] == "3000"


@pytest.mark.parametrize(
    ("body", "sent", "status"),
    [
        (chat(model="no-such", max_tokens=5), {}, 404),
        (b"no json", {}, 400),
        (chat(), {"x_feature_id": "not/a/name"}, 400),
        (chat(model="support-quality", max_tokens=5), {"x_tenant_id": "tenant-narrow"}, 403),
    ],
)
def test_a_refusal_that_reserved_nothing_tells_how_limits_stand(
    journey: Journey, body: Any, sent: dict[str, str], status: int
) -> None:
    answer = journey.post(body, **sent)
    assert answer.status_code == status
    assert [name for name in RATES if name not in answer.headers] == []
    messages = journey.post(body, path="/v1/messages", **sent)
    assert messages.status_code == status
    assert "anthropic-ratelimit-requests-remaining" in messages.headers


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/support-fast"])
def test_the_list_of_models_tells_how_limits_stand_and_takes_nothing(journey: Journey, path: str) -> None:
    seen = [journey.http.get(path, headers=journey.headers(x_tenant_id="limit-day")) for _ in range(2)]
    assert [answer.status_code for answer in seen] == [200, 200]
    names = [name for name in RATES if not name.startswith("x-ratelimit-reset")]
    told = [{name: answer.headers.get(name) for name in names} for answer in seen]
    assert told[0] == told[1]
    assert [name for name in RATES if name in seen[0].headers] != []


def test_an_app_that_the_sdk_retries_for_is_left_alone_after_a_budget_block(journey: Journey) -> None:
    client = journey.openai().with_options(max_retries=3)
    journey.clear()
    before = len(journey.query("SELECT 1 FROM ledger WHERE tenant_id = 'limit-month'"))
    with pytest.raises(openai.RateLimitError, match="budget of"):
        client.chat.completions.create(**chat(), extra_headers={"X-Tenant-Id": "limit-month"})
    marker = journey.post(chat("tokens=2"))
    journey.row(marker.headers["x-request-id"])
    until(lambda: len(journey.query("SELECT 1 FROM ledger WHERE tenant_id = 'limit-month'")) > before)
    assert len(journey.query("SELECT 1 FROM ledger WHERE tenant_id = 'limit-month'")) == before + 1


def test_what_is_charged_in_the_end_is_what_the_rows_say(journey: Journey) -> None:
    """Unary, streamed, of two choices, after a retry, a fallback, and a hang-up."""
    not_just_before_midnight(45)
    tenant: dict[str, Any] = {"x_tenant_id": "spender"}
    journey.post(chat("tokens=30"), **tenant)
    journey.post(chat("tokens=20", n=2), **tenant)
    with journey.stream(chat("tokens=25"), **tenant) as streamed:
        events(streamed)
    journey.fault("openai", kind="status", status=500, times=1)
    journey.post(chat("tokens=10"), **tenant)
    journey.fault("openai", kind="status", status=500, times=10)
    fallen = journey.post(chat("tokens=10"), **tenant)
    assert fallen.headers["x-gateway-fallback"] == "true"
    with (
        httpx.Client(base_url=journey.stack.url, verify=journey.stack.tls(), timeout=60) as client,
        journey.stream(chat("tokens=400 chunk_ms=20"), client, **tenant) as hung_up,
    ):
        next(hung_up.iter_lines())
    journey.row(hung_up.headers["x-request-id"])
    today = datetime.now(UTC)
    counters = redis.Redis.from_url(journey.stack.redis_url, decode_responses=True)

    def spent() -> tuple[int, ...]:
        (row,) = journey.query(
            "SELECT coalesce(sum(total_tokens), 0)::bigint AS tokens, coalesce(sum(cost_usd), 0) AS usd FROM ledger "
            "WHERE tenant_id = 'spender' AND occurred_at >= %s",
            today.replace(hour=0, minute=0, second=0, microsecond=0),
        )
        return row["tokens"], int(Decimal(row["usd"]).scaleb(9))

    def charged() -> tuple[int, ...]:
        prefix = "rl:{spender}:"
        names = (f"daily_tokens:{today:%Y%m%d}", f"daily_usd:{today:%Y%m%d}", f"monthly_usd:{today:%Y%m}")
        tokens, day, month = (int(counters.get(prefix + name) or 0) for name in names)
        assert day == month
        return tokens, day

    until(lambda: counters.zcard("rl:{spender}:concurrency") == 0)
    until(lambda: spent() == charged())
    assert charged() > (100, 1000)
