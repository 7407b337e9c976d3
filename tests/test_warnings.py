"""Warnings of budgets nearly used up, on a real Redis, to a real receiver; downgrades; both through the stack."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml

from app.ambient import Ambient, Patience
from app.auth import goes_on
from app.config import Config, Secret, Tenant
from app.core import Dialect, Exchange, Intent, Reservation, interrupted
from app.dialects import ROUTES, openai_responses
from app.limits import Limits
from app.limits.scopes import Limit
from app.providers import stored
from app.redis_pipe import RedisPipe
from app.warnings import BACKOFF_SECONDS, CLAIM_SECONDS, GIVE_UP_SECONDS, MAX_WAITING, Warnings, client
from tests import gateway_parts
from tests.gateway_parts import STREAM, Clock, Rooms, ScriptedAnswer, completion, headers_of, request
from tests.journey import Journey, chat
from tests.journey import until as until_now
from tests.ledger_parts import an_intent
from tests.limits_parts import (
    SHARE,
    Caller,
    Counters,
    a_config,
    a_key,
    a_tenant,
    not_just_before_midnight,
    pipe_to,
    today,
    whole,
)
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running, until
from tests.test_config import faults_of, with_overlay
from tests.translation import target
from tests.webhook import Webhook

EACH_BUDGET = pytest.mark.parametrize("budget", ["daily_tokens", "daily_nanos", "monthly_nanos"])
DAY_SECONDS = 86_400


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """An empty Redis, and no midnight within the test."""
    not_just_before_midnight(10)
    shared.client.flushall()
    return whole(shared)


@pytest.fixture
def receiver() -> Iterator[Webhook]:
    receiver = Webhook()
    yield receiver
    receiver.close()


# --- when: the limits notice ------------------------------------------------------------------------------------------


class Heard:
    """What the limits of one replica tell."""

    def __init__(self, limits: Limits) -> None:
        self.told: list[tuple[str, int]] = []
        limits.on_nearly_used.append(lambda limit, left: self.told.append((limit.name, left)))


def on(server: RedisServer, tenant: Tenant, scenario: Callable[[Caller, Heard], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            return await scenario(Caller(limits, tenant, **options), Heard(limits))

    return run(main())


@EACH_BUDGET
def test_budget_is_nearly_used_up_at_80_percent_and_told_once(server: RedisServer, budget: str) -> None:
    async def scenario(caller: Caller, heard: Heard) -> list[int]:
        counts = []
        for amount in (790, 9, 1, 1, 199):
            await caller.reserve(amount, amount)
            counts.append(len(heard.told))
        assert [left for _, left in heard.told] == [200]
        return counts

    assert on(server, a_tenant(**{budget: 1000}), scenario) == [0, 0, 1, 1, 1]


def test_each_budget_of_tenant_and_key_is_told(server: RedisServer) -> None:
    async def scenario(caller: Caller, heard: Heard) -> list[str]:
        await caller.reserve(900, 900)
        return [name for name, _ in heard.told]

    tenant, key = a_tenant(daily_tokens=1000, daily_nanos=1000, monthly_nanos=10_000), a_key(daily_tokens=1000)
    assert on(server, tenant, scenario, key=key) == ["tenant_daily_tokens", "tenant_daily_usd", "key_daily_tokens"]


def test_rates_are_no_budgets(server: RedisServer) -> None:
    async def scenario(caller: Caller, heard: Heard) -> list[Any]:
        await caller.reserve(1000)
        return heard.told

    assert on(server, a_tenant(rpm=1, tpm=1000, concurrency=1), scenario) == []


def test_call_that_is_refused_tells_of_a_budget_that_settlements_used_up(server: RedisServer) -> None:
    async def scenario(caller: Caller, heard: Heard) -> list[Any]:
        caller.limits.settle(await caller.reserve(10), 850, 0)
        await until(lambda: Counters(server).day_tokens == 850)
        assert heard.told == []
        await caller.refusal(500)
        return heard.told

    assert on(server, a_tenant(daily_tokens=1000), scenario) == [("tenant_daily_tokens", 150)]


def test_share_of_a_budget_that_is_nearly_used_up_tells_while_redis_is_away(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        async with running(pipe_to(RedisServer(tmp_path)), up=False) as pipe:
            limits = Limits(pipe, AMBIENT)
            caller, heard = Caller(limits, a_tenant(daily_tokens=1000), away=SHARE, replicas=2), Heard(limits)
            await caller.reserve(390)
            assert heard.told == []
            await caller.reserve(10)
            await caller.reserve(10)
            return heard.told

    assert run(main()) == [("tenant_daily_tokens", 200)]


# --- who and how: the room --------------------------------------------------------------------------------------------


def nearly(ends_in: float = 3600.0, tenant: str = "acme-corp") -> Limit:
    ends = int(time.time() + ends_in)
    key = f"rl:{{{tenant}}}:daily_tokens:{today()}"
    return Limit("tenant_daily_tokens", "daily_tokens", key, 1000, f"Tenant {tenant}", "local_share", ends, "UTC", 200)


def told_by(url: str | None) -> Callable[[], Config]:
    base = a_config()
    webhook = None if url is None else Secret(url)
    config = msgspec.structs.replace(base, settings=msgspec.structs.replace(base.settings, warnings_webhook=webhook))
    return lambda: config


@contextlib.asynccontextmanager
async def room(pipe: RedisPipe, receiver: Webhook, ambient: Ambient = AMBIENT) -> AsyncIterator[Warnings]:
    room = Warnings(told_by(receiver.url), pipe, client, ambient)
    try:
        yield room
    finally:
        await room.close()


class Waits(Clock):
    """A clock that remembers what was waited."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)
        await super().sleep(seconds)


def test_of_two_replicas_one_warns(server: RedisServer, receiver: Webhook) -> None:
    async def main() -> list[int]:
        async with (
            running(pipe_to(server)) as one,
            running(pipe_to(server)) as other,
            room(one, receiver) as first,
            room(other, receiver) as second,
        ):
            for each in (first, second):
                each.take(nearly(), 180)
            await asyncio.gather(first.run_once(), second.run_once())
            return sorted([first.sent, second.sent, first.left, second.left])

    assert run(main()) == [0, 0, 1, 1]
    assert len(receiver.texts) == 1


def test_warning_says_whose_budget_how_much_and_until_when(server: RedisServer, receiver: Webhook) -> None:
    limit = msgspec.structs.replace(nearly(), ends=1_796_083_200)

    async def main() -> None:
        async with running(pipe_to(server)) as pipe, room(pipe, receiver) as warnings:
            warnings.take(limit, 180)
            await warnings.run_once()

    run(main())
    assert receiver.texts == [
        "Tenant acme-corp (dev) has used 82 % of its budget of 1000 tokens per day: 180 tokens left until "
        "2026-12-01T00:00Z. Calls that need more are refused with `budget_exceeded`."
    ]


def test_what_was_told_is_remembered_to_the_window_s_end_and_no_claim_is(
    server: RedisServer, receiver: Webhook
) -> None:
    """A replica that dies before the receiver has it keeps the others silent for a while only."""
    claim = f"warned:{{acme-corp}}:daily_tokens:{today()}"
    receiver.refusals = [(500, "")]
    claimed: list[int] = []

    class Looks(Clock):
        async def sleep(self, seconds: float) -> None:
            claimed.append(server.client.ttl(claim))

    async def main() -> None:
        async with running(pipe_to(server)) as pipe, room(pipe, receiver, Looks()) as warnings:
            warnings.take(nearly(ends_in=DAY_SECONDS), 180)
            await warnings.run_once()
            await until(lambda: server.client.ttl(claim) > DAY_SECONDS)

    run(main())
    assert 0 < claimed[0] <= CLAIM_SECONDS


def test_receiver_that_fails_is_asked_again_with_longer_waits(server: RedisServer, receiver: Webhook) -> None:
    receiver.refusals = [(500, ""), (503, ""), (429, "30"), (404, "")]
    ambient = Waits()

    async def main() -> tuple[int, int, int]:
        async with running(pipe_to(server)) as pipe, room(pipe, receiver, ambient) as warnings:
            warnings.take(nearly(), 180)
            await warnings.run_once()
            return warnings.sent, warnings.failed, warnings.dropped

    assert run(main()) == (1, 4, 0)
    assert len(receiver.texts) == 1
    assert ambient.waited == [BACKOFF_SECONDS, 2 * BACKOFF_SECONDS, 30.0, 8 * BACKOFF_SECONDS]


def test_receiver_that_is_not_there_is_given_up_and_the_loss_counted(server: RedisServer, receiver: Webhook) -> None:
    receiver.close()
    ambient = Waits()

    async def main() -> tuple[int, int]:
        async with running(pipe_to(server)) as pipe, room(pipe, receiver, ambient) as warnings:
            warnings.take(nearly(), 180)
            await warnings.run_once()
            return warnings.sent, warnings.dropped

    try:
        assert run(main()) == (0, 1)
        assert GIVE_UP_SECONDS / 2 < sum(ambient.waited) < GIVE_UP_SECONDS
    finally:
        receiver.__init__()


def test_without_redis_each_replica_warns_and_none_twice(tmp_path: Path, receiver: Webhook) -> None:
    async def main() -> None:
        async with running(pipe_to(RedisServer(tmp_path)), up=False) as pipe, room(pipe, receiver) as warnings:
            limits = Limits(pipe, AMBIENT)
            limits.on_nearly_used.append(warnings.take)
            caller = Caller(limits, a_tenant(daily_tokens=1000), away=SHARE, replicas=1)
            for _ in range(3):
                await caller.reserve(300)
            await caller.reserve(50)
            telling = asyncio.create_task(warnings.run())
            await until(lambda: receiver.texts)
            await caller.reserve(50)
            warnings.take(nearly(tenant="last"), 10)
            await until(lambda: receiver.of("last"))
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    run(main())
    assert len(receiver.of("acme-corp")) == 1


def test_handing_over_never_waits_and_counts_what_has_no_place(server: RedisServer, receiver: Webhook) -> None:
    async def main() -> int:
        async with running(pipe_to(server)) as pipe, room(pipe, receiver) as warnings:
            for _ in range(MAX_WAITING + 3):
                warnings.take(nearly(), 180)
            return warnings.dropped

    assert run(main()) == 3


def test_address_stays_out_of_the_log(server: RedisServer, receiver: Webhook, caplog: pytest.LogCaptureFixture) -> None:
    receiver.refusals = [(404, "")]
    with caplog.at_level(logging.INFO, "app"):
        run(failing_once(server, receiver))
    assert "the warnings' webhook answered 404" in caplog.text
    assert "canary" not in caplog.text


async def failing_once(server: RedisServer, receiver: Webhook) -> None:
    async with running(pipe_to(server)) as pipe, room(pipe, receiver, Waits()) as warnings:
        warnings.take(nearly(), 180)
        await warnings.run_once()


def test_without_a_webhook_the_log_tells(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        async with running(pipe_to(server)) as pipe:
            warnings = Warnings(told_by(None), pipe, client, AMBIENT)
            warnings.take(nearly(), 180)
            return warnings.dropped

    assert run(main()) == 0
    assert "Tenant acme-corp (dev) has used 82 %" in caplog.text


# --- downgrades -------------------------------------------------------------------------------------------------------


def test_budget_that_settlements_bring_back_is_not_nearly_used_up(server: RedisServer) -> None:
    async def scenario(caller: Caller, _: Heard) -> list[bool]:
        def now() -> bool:
            return caller.limits.nearly_used(caller.call(), caller.tenant)

        seen = [now()]
        held: Reservation = await caller.reserve(850)
        seen.append(now())
        caller.limits.settle(held, 400, 0)
        seen.append(now())
        await caller.reserve(450)
        return [*seen, now()]

    assert on(server, a_tenant(daily_tokens=1000), scenario) == [False, True, False, True]


def downgrading(folder: Path, answer: ScriptedAnswer, *, nearly: bool = True) -> tuple[Rooms, Config]:
    rooms = Rooms(folder, answer, ambient=Clock())
    rooms.limits.nearly = nearly
    config = gateway_parts.config()
    dear = msgspec.structs.replace(config.aliases["support-fast"], name="support-quality")
    tenant = msgspec.structs.replace(
        config.tenants["acme-corp"], allowed_models=None, downgrade={"support-quality": "support-fast"}
    )
    return rooms, msgspec.structs.replace(
        config, aliases={**config.aliases, dear.name: dear}, tenants={**config.tenants, tenant.id: tenant}
    )


def served(
    rooms: Rooms, config: Config, dialect: Dialect = ROUTES["/v1/chat/completions"], **fields: object
) -> dict[str, str]:
    """Headers of the answer to a call for `support-quality`."""

    async def main() -> dict[str, str]:
        body = request(model="support-quality", **fields)
        call = gateway_parts.call(body, rooms.ambient, config=config, dialect=dialect)
        patience = Patience()
        try:
            reply = await gateway_parts.departed(rooms.gateway, Exchange(call=call, patience=patience))
        finally:
            patience.close()
            rooms.spool.close()
        return headers_of(reply)

    return asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_downgraded_call_says_so_in_its_answer_and_its_row(tmp_path: Path, stream: bool) -> None:
    rooms, config = downgrading(tmp_path, ScriptedAnswer(*(STREAM if stream else [completion()])))
    headers = served(rooms, config, stream=stream)
    assert headers["x-gateway-downgraded-from"] == "support-quality"
    row = rooms.row()
    assert (row["status"], row["model_alias"], row["alias_requested"]) == ("success", "support-fast", "support-quality")


def test_call_is_not_downgraded_while_its_budgets_have_room(tmp_path: Path) -> None:
    rooms, config = downgrading(tmp_path, ScriptedAnswer(completion()), nearly=False)
    assert "x-gateway-downgraded-from" not in served(rooms, config)
    assert (rooms.row()["model_alias"], rooms.row()["alias_requested"]) == ("support-quality", None)


def test_call_is_not_downgraded_out_of_its_tenant_s_regions(tmp_path: Path) -> None:
    rooms, config = downgrading(tmp_path, ScriptedAnswer(completion()))
    (target,) = config.aliases["support-fast"].targets
    abroad = msgspec.structs.replace(target, provider=msgspec.structs.replace(target.provider, region="us"))
    here = msgspec.structs.replace(target, provider=msgspec.structs.replace(target.provider, region="eu"))
    aliases = {
        name: msgspec.structs.replace(alias, targets=(here if name == "support-quality" else abroad,))
        for name, alias in config.aliases.items()
    }
    tenant = msgspec.structs.replace(config.tenants["acme-corp"], residency=frozenset({"eu"}))
    config = msgspec.structs.replace(config, aliases=aliases, tenants={**config.tenants, tenant.id: tenant})
    assert "x-gateway-downgraded-from" not in served(rooms, config)


def test_a_first_turn_that_is_to_be_kept_is_downgraded_like_any_other(tmp_path: Path) -> None:
    answer = {"id": "resp_1", "model": "m", "status": "completed", "output": [], "usage": None}
    rooms, config = downgrading(tmp_path, ScriptedAnswer(msgspec.json.encode(answer)))
    call = {"input": "Hi", "store": True}
    assert served(rooms, config, ROUTES["/v1/responses"], **call)["x-gateway-downgraded-from"] == "support-quality"


@pytest.mark.parametrize(
    ("kept_by", "nearly", "cheaper"),
    [
        ("dear", True, False),
        ("dear", False, False),
        ("cheap", True, True),
        ("cheap", False, True),
        ("both", True, True),
        ("both", False, False),
        ("nobody", True, False),
    ],
)
def test_a_conversation_goes_on_where_it_began(kept_by: str, nearly: bool, cheaper: bool) -> None:
    alias = gateway_parts.config().aliases["support-fast"]
    dear, cheap, both, nobody = (alias.along((target("openai", name),)) for name in ("dear", "cheap", "both", "nobody"))
    at = {"dear": dear, "cheap": cheap, "both": both, "nobody": nobody}[kept_by].targets[0].name
    body = {"model": "a", "input": "Hi", "previous_response_id": stored.named("resp_1", b"owner", at)}
    request = msgspec.structs.replace(openai_responses.read(msgspec.json.encode(body)), owner=b"owner")
    ways = [each.along(each.targets + both.targets) for each in (dear, cheap)]
    assert goes_on(request, *ways, nearly) == cheaper


def test_row_of_a_replica_that_died_says_what_was_asked_for() -> None:
    intent: Intent = msgspec.structs.replace(an_intent(), alias_requested="support-quality")
    again = msgspec.json.decode(msgspec.json.encode(intent), type=Intent)
    assert interrupted(again).alias_requested == "support-quality"


# --- as it is written -------------------------------------------------------------------------------------------------


def test_a_downgrade_is_inherited_overridden_and_taken_away(tmp_path: Path) -> None:
    plans = {
        "base": {"allowed_models": ["*"], "downgrade": {"support-quality": "support-fast"}},
        "more": {"extends": "base"},
    }
    tenants = {"a": {"plan": "more"}, "b": {"plan": "more", "downgrade": {}}}
    config = with_overlay(tmp_path, {"plans": plans, "tenants": tenants})
    assert [dict(config.tenants[name].downgrade) for name in tenants] == [{"support-quality": "support-fast"}, {}]
    assert config.plans["more"].downgrade == {"support-quality": "support-fast"}


@pytest.mark.parametrize(
    ("downgrade", "fault"),
    [
        ({"support-quality": "nowhere"}, "tenants.a.downgrade.support-quality: no alias 'nowhere'"),
        ({"nowhere": "support-fast"}, "tenants.a.downgrade.nowhere: no alias 'nowhere'"),
        ({"support-fast": "support-fast"}, "names the alias itself"),
        ({"support-fast": "support-quality"}, "'support-quality' is not among the allowed_models"),
        ({"support-quality": "embed-small"}, "'embed-small' serves something else"),
    ],
)
def test_downgrade_that_cannot_be_is_a_fault(tmp_path: Path, downgrade: dict[str, str], fault: str) -> None:
    tenant = {"plan": "free", "allowed_models": ["support-fast", "embed-small"], "downgrade": downgrade}
    faults = faults_of(lambda: with_overlay(tmp_path, {"tenants": {"a": tenant}}))
    assert any(fault in said for said in faults)


@pytest.mark.parametrize("percent", [0, 100])
def test_warning_comes_before_the_refusal(tmp_path: Path, percent: int) -> None:
    (fault,) = faults_of(lambda: with_overlay(tmp_path, {"gateway": {"warnings": {"at_percent": percent}}}))
    assert "gateway.warnings.at_percent: must be from 1 to 99" in fault


def test_webhook_is_a_reference_to_an_address(tmp_path: Path) -> None:
    (tmp_path / "hook").write_text("hooks.example/canary")
    overlay = {"gateway": {"warnings": {"webhook": f"file:{tmp_path / 'hook'}"}}}
    (fault,) = faults_of(lambda: with_overlay(tmp_path, overlay))
    assert "gateway.warnings.webhook" in fault
    assert "canary" not in fault


def test_at_percent_moves_the_warning(server: RedisServer) -> None:
    async def main() -> list[Any]:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            heard = Heard(limits)
            base = a_config()
            settings = msgspec.structs.replace(base.settings, warn_at_percent=50)
            call = gateway_parts.call(b"{}", AMBIENT, config=msgspec.structs.replace(base, settings=settings))
            await limits.reserve(call, a_tenant(daily_tokens=1000), 500, 0)
            return heard.told

    assert run(main()) == [("tenant_daily_tokens", 500)]


# --- through the stack ------------------------------------------------------------------------------------------------


def spend(journey: Journey) -> list[httpx.Response]:
    """Calls of `tenant-low` for `azure` on both replicas, past 80 % of its 4000 tokens a day and not to the end."""
    answers = [journey.post(chat("x" * 13_200, "azure", max_tokens=20), x_tenant_id="tenant-low")]
    for _ in range(3):
        answers += journey.each(chat("hi", "azure", max_tokens=20), x_tenant_id="tenant-low")
    return answers


@pytest.fixture(scope="module")
def spent(stack: Any) -> list[httpx.Response]:
    with Journey(stack) as journey:
        journey.clear()
        return spend(journey)


def outcomes(journey: Journey, name: str) -> float:
    lines = "\n".join(journey.admin("/metrics", replica).text for replica in (0, 1)).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_two_replicas_send_one_warning(journey: Journey, spent: list[httpx.Response], webhook: Webhook) -> None:
    assert [answer.status_code for answer in spent] == [200] * 7
    until_now(lambda: outcomes(journey, 'gateway_budget_warnings{outcome="left"}'))
    assert len(webhook.of("tenant-low")) == 1


def test_calls_after_it_are_served_by_the_cheaper_alias(journey: Journey, spent: list[httpx.Response]) -> None:
    downgraded = [answer for answer in spent if "x-gateway-downgraded-from" in answer.headers]
    assert len(downgraded) >= 4
    assert {answer.headers["x-gateway-downgraded-from"] for answer in downgraded} == {"azure"}
    row = journey.row(downgraded[-1].headers["x-request-id"])
    assert (row["model_alias"], row["alias_requested"], row["provider"]) == ("one-target", "azure", "openai")
    assert outcomes(journey, 'gateway_downgrades_total{from="azure",tenant="tenant-low",to="one-target"}') >= 4


# --- as the page says -------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "runbooks" / "limits.md").read_text()


def test_metrics_of_the_page_are_scraped(journey: Journey) -> None:
    scraped = journey.admin("/metrics").text
    for name in ("gateway_budget_warnings", "gateway_webhook_failures", "gateway_downgrades_total"):
        assert f"`{name}`" in PAGE
        assert f"# TYPE {name} " in scraped


def test_figures_of_the_page_are_those_of_the_code() -> None:
    text = " ".join(PAGE.split())
    assert f"for {GIVE_UP_SECONDS / 60:g} minutes" in text
    assert f"`{CLAIM_SECONDS}` seconds" in text


def test_configuration_of_the_page_loads(tmp_path: Path) -> None:
    (tmp_path / "webhook").write_text("https://hooks.example/services/T/B/x")
    (block,) = [part.partition("```")[0] for part in PAGE.split("```yaml\n")[1:]]
    overlay = yaml.safe_load(block.replace("/run/secrets", str(tmp_path)))
    config = with_overlay(tmp_path, overlay)
    assert config.settings.warnings_webhook == Secret("https://hooks.example/services/T/B/x")
    assert config.tenants["acme-corp"].downgrade == {"support-quality": "support-fast"}
