"""The limits while a real Redis is dead, frozen, slow, full or broken: each limit's policy, and all made good after."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.config import Tenant, WrittenAway
from app.core import Reservation
from app.errors import LimitError, LimitsUnavailable
from app.limits import Limits
from app.redis_pipe import RedisPipe
from tests.limits_parts import (
    BRIEFLY_MS,
    CLOSED,
    DAY_SECONDS,
    OPEN,
    SHARE,
    Caller,
    Counters,
    a_key,
    a_tenant,
    limits_on,
    not_just_before_midnight,
    pipe_to,
    records,
    whole,
)
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running, until, wire

EVERYTHING = {
    "rpm": 10,
    "tpm": 1000,
    "concurrency": 10,
    "daily_tokens": 1000,
    "daily_nanos": 10_000,
    "monthly_nanos": 10_000,
}


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of one's own, to freeze and kill."""
    not_just_before_midnight(15)
    with redis_server(tmp_path) as server:
        yield whole(server)


def without_redis(folder: Path, tenant: Tenant, scenario: Callable[[Caller], Any], **options: Any) -> Any:
    """What `scenario` returns of a caller whose process started without Redis."""

    async def main() -> Any:
        async with running(pipe_to(RedisServer(folder)), up=False) as pipe:
            return await scenario(Caller(Limits(pipe, AMBIENT), tenant, **options))

    return run(main())


async def away(caller: Caller, server: RedisServer) -> None:
    """Freezes Redis; a call that meets it finds out."""
    server.freeze()
    await Caller(caller.limits, a_tenant("finds-out", rpm=10), away=OPEN).reserve()


# --- the policies ---


def test_calls_pass_where_every_limit_is_open(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> tuple[list[bool], int]:
        return [(await caller.reserve(10**6, 10**9)).held for _ in range(5)], caller.limits.local_calls

    got = without_redis(tmp_path, a_tenant(**EVERYTHING), scenario, away=OPEN)
    assert got == ([False] * 5, 5)


@pytest.mark.parametrize(
    ("policy", "tenant", "key", "shared"),
    [
        ({"rpm": "closed"}, {"rpm": 1}, {}, {}),
        ({"tpm": "closed"}, {"tpm": 1}, {}, {}),
        ({"concurrency": "closed"}, {}, {"concurrency": 1}, {}),
        ({"daily_token_cap": "closed"}, {"daily_tokens": 1}, {}, {}),
        ({"daily_usd": "closed"}, {}, {"daily_nanos": 1}, {}),
        ({"monthly_usd": "closed"}, {"rpm": 1, "monthly_nanos": 1}, {}, {}),
        ({"global_rpm": "closed"}, {}, {}, {"rpm": 1}),
        ({"global_tpm": "closed"}, {}, {}, {"tpm": 1}),
    ],
)
def test_a_call_under_a_closed_limit_is_told_to_come_back(
    tmp_path: Path, policy: dict[str, Any], tenant: dict[str, int], key: dict[str, int], shared: dict[str, int]
) -> None:
    async def scenario(caller: Caller) -> LimitsUnavailable:
        with pytest.raises(LimitsUnavailable) as caught:
            await caller.reserve()
        return caught.value

    only = msgspec.structs.replace(OPEN, **policy)
    error = without_redis(tmp_path, a_tenant(**tenant), scenario, away=only, key=a_key(**key), **shared)
    assert (error.retry_after_seconds, error.status) == (1.0, 503)


def test_a_call_without_the_closed_limit_passes(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> bool:
        return await caller.admitted()

    only = WrittenAway(monthly_usd="closed")
    assert without_redis(tmp_path, a_tenant(rpm=10), scenario, away=only)


@pytest.mark.parametrize(
    ("quota", "tokens", "nanos", "admitted"),
    [
        ({"rpm": 7}, 1, 0, 2),
        ({"tpm": 100}, 10, 0, 3),
        ({"concurrency": 7}, 1, 0, 2),
        ({"daily_tokens": 100}, 10, 0, 3),
        ({"daily_nanos": 100}, 1, 10, 3),
        ({"monthly_nanos": 100}, 1, 10, 3),
        ({"rpm": 2}, 1, 0, 1),
    ],
    ids=str,
)
def test_one_of_three_replicas_admits_its_share(
    tmp_path: Path, quota: dict[str, int], tokens: int, nanos: int, admitted: int
) -> None:
    async def scenario(caller: Caller) -> int:
        return sum([await caller.admitted(tokens, nanos) for _ in range(10)])

    assert without_redis(tmp_path, a_tenant(**quota), scenario, away=SHARE, replicas=3) == admitted


def test_a_look_tells_of_the_share(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> list[int | None]:
        await caller.reserve(10)
        call = caller.call()
        seen = [await caller.limits.look(call.config, caller.tenant, call.key) for _ in range(3)]
        return [rates.remaining_requests for rates in seen]

    assert without_redis(tmp_path, a_tenant(rpm=8), scenario, away=SHARE) == [3, 3, 3]


def test_a_share_is_every_call_s_of_the_tenant_whatever_its_key(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> int:
        other = Caller(caller.limits, caller.tenant, key=a_key(rpm=100), away=SHARE)
        return sum([await each.admitted() for each in (caller, other) * 5])

    assert without_redis(tmp_path, a_tenant(rpm=8), scenario, away=SHARE) == 4


def test_a_share_that_is_used_up_is_refused_with_its_name_and_a_wait(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> list[LimitError]:
        errors = []
        for quota in ({"rpm": 2}, {"daily_tokens": 2}):
            one = Caller(caller.limits, a_tenant("of-" + next(iter(quota)).replace("_", "-"), **quota), away=SHARE)
            await one.reserve()
            errors.append(await one.refusal())
        return errors

    rate, budget = without_redis(tmp_path, a_tenant(), scenario)
    assert (rate.limit, rate.should_retry, 55 < rate.retry_after_seconds <= 61) == ("tenant_rpm", None, True)
    assert (budget.limit, budget.should_retry, budget.retry_after_seconds) == ("tenant_daily_tokens", None, 5.0)
    assert "a share of it while Redis is away" in budget.message


def test_a_local_refusal_takes_nothing(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> int:
        for _ in range(5):
            await caller.refusal(400)
        return sum([await caller.admitted(10) for _ in range(10)])

    assert without_redis(tmp_path, a_tenant(rpm=8, tpm=600), scenario, away=SHARE) == 4


def test_what_a_call_did_not_use_is_its_share_s_again(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> list[bool]:
        caller.limits.settle(await caller.reserve(450, 4500), 50, 500)
        return [await caller.admitted(450, 4500), await caller.admitted(450, 4500)]

    quota = EVERYTHING | {"concurrency": 2}
    assert without_redis(tmp_path, a_tenant(**quota), scenario, away=SHARE) == [True, False]


def test_what_a_call_used_above_its_estimate_is_its_share_s_loss(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> bool:
        caller.limits.settle(await caller.reserve(10, 100), 450, 4500)
        return await caller.admitted(60, 100)

    assert not without_redis(tmp_path, a_tenant(**EVERYTHING), scenario, away=SHARE)


def test_the_share_of_a_budget_is_of_what_was_left_when_redis_was_last_heard(frail: RedisServer) -> None:
    async def main() -> int:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(monthly_nanos=1000), away=SHARE)
            caller.limits.settle(await caller.reserve(1, 880), 1, 880)
            await away(caller, frail)
            admitted = sum([await caller.admitted(1, 10) for _ in range(20)])
            frail.thaw()
            return admitted

    assert run(main()) == 6


def test_calls_that_run_already_count_in_the_share_of_concurrency(frail: RedisServer) -> None:
    async def main() -> list[bool]:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(concurrency=6), away=SHARE)
            first = await caller.reserve()
            await caller.reserve()
            await away(caller, frail)
            admitted = [await caller.admitted(), await caller.admitted()]
            caller.limits.settle(first, 1, 0)
            admitted.append(await caller.admitted())
            frail.thaw()
            return admitted

    assert run(main()) == [True, False, True]


# --- made good ---


@pytest.mark.parametrize("policy", [OPEN, SHARE], ids=["open", "local_share"])
def test_what_was_used_without_redis_is_charged_to_the_budgets_on_its_return(
    frail: RedisServer, policy: WrittenAway
) -> None:
    async def main() -> None:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(**EVERYTHING), key=a_key(**EVERYTHING), away=policy)
            caller.limits.settle(await caller.reserve(100, 1000), 10, 100)
            await limits.pipe.execute("PING")
            await away(caller, frail)
            caller.limits.settle(await caller.reserve(100, 1000), 30, 300)
            lasting = await caller.reserve(100, 1000)
            frail.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: Counters(frail).day_tokens == 140)  # what still runs is charged at its estimate
            caller.limits.settle(lasting, 5, 50)
            await until(lambda: Counters(frail).day_tokens == 45)

    run(main())
    for counters in (Counters(frail), Counters(frail, "_key.k3f9a0b1c2d4")):
        assert (counters.day_tokens, counters.day_nanos, counters.month_nanos) == (45, 450, 450)
        assert counters.running == 0


def test_what_was_charged_on_return_expires_like_any_counter(frail: RedisServer) -> None:
    async def main() -> None:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(**EVERYTHING), away=OPEN)
            await away(caller, frail)
            caller.limits.settle(await caller.reserve(100, 1000), 30, 300)
            frail.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: Counters(frail).month_nanos == 300)

    run(main())
    ttl = {key: frail.client.ttl(key) for key in frail.client.keys("rl:{acme-corp}:*")}
    assert {key for key in ttl if ttl[key] < DAY_SECONDS} == set()
    assert any(ttl[key] > 31 * DAY_SECONDS for key in ttl if "monthly" in key)


def test_a_running_call_that_redis_has_not_heard_of_gets_its_lease_on_return(frail: RedisServer) -> None:
    async def main() -> list[int]:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(concurrency=6), away=SHARE)
            held = await caller.reserve()
            await away(caller, frail)
            local = await caller.reserve()
            frail.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: Counters(frail).running == 2)
            for reservation in (held, local):
                caller.limits.settle(reservation, 1, 0)
            await limits.pipe.execute("PING")
            return [Counters(frail).running, caller.limits.run_once()]

    assert run(main()) == [0, 0]


def test_a_second_settlement_of_a_local_call_changes_nothing(frail: RedisServer) -> None:
    async def main() -> None:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(daily_tokens=1000), away=OPEN)
            await away(caller, frail)
            local = await caller.reserve(100)
            for used in (30, 30, 90):
                caller.limits.settle(local, used, 0)
            frail.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: Counters(frail).day_tokens)

    run(main())
    assert Counters(frail).day_tokens == 30


@pytest.mark.parametrize("policy", [OPEN, CLOSED, SHARE], ids=["open", "closed", "local_share"])
def test_a_reservation_that_a_frozen_redis_makes_late_is_undone(frail: RedisServer, policy: WrittenAway) -> None:
    """Redis reads what was sent when it thaws: only what calls used of its budgets is charged in the end."""

    async def main() -> None:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(**EVERYTHING), away=policy)
            caller.limits.settle(await caller.reserve(100, 1000), 5, 50)
            await limits.pipe.execute("PING")
            frail.freeze()
            if policy is CLOSED:
                with pytest.raises(LimitsUnavailable):
                    await caller.reserve(100, 1000)
            else:
                reservation = await caller.reserve(100, 1000)
                assert not reservation.held
                caller.limits.settle(reservation, 30, 300)
            frail.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: records(frail) == [])
            await until(lambda: Counters(frail).all[3] == used)  # budgets are charged when they are known to be whole

    used = 5 if policy is CLOSED else 35
    run(main())
    assert Counters(frail).all == (1, 5, 0, used, 10 * used, 10 * used)


def test_a_settlement_without_redis_is_made_up_for_when_it_is_back(frail: RedisServer) -> None:
    async def main() -> None:
        async with limits_on(frail, BRIEFLY_MS) as limits:
            caller = Caller(limits, a_tenant(**EVERYTHING), away=OPEN)
            early, late = await caller.reserve(100, 1000), await caller.reserve(100, 1000)
            frail.freeze()
            caller.limits.settle(early, 30, 300)
            await until(lambda: not limits.pipe.up)
            caller.limits.settle(late, 40, 400)
            frail.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: records(frail) == [])

    run(main())
    assert Counters(frail).all == (2, 70, 0, 70, 700, 700)


def test_no_more_settlements_are_kept_than_the_limit_says(frail: RedisServer) -> None:
    async def main() -> int:
        async with limits_on(frail, BRIEFLY_MS, unsettled_limit=3) as limits:
            caller = Caller(limits, a_tenant(daily_tokens=1000), away=OPEN)
            held = [await caller.reserve(100) for _ in range(5)]
            await away(caller, frail)
            for reservation in held:
                caller.limits.settle(reservation, 0, 0)
            frail.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: len(records(frail)) == 3)
            return caller.limits.lost_settlements

    assert run(main()) == 3  # the two oldest, and what undid the call that found out
    assert Counters(frail).day_tokens == 200


def test_limits_hold_again_after_redis_was_killed_and_restarted(frail: RedisServer) -> None:
    async def main() -> None:
        async with limits_on(frail) as limits:
            caller = Caller(limits, a_tenant(rpm=1), away=OPEN)
            frail.kill()
            await until(lambda: not limits.pipe.up)
            await caller.reserve()
            await asyncio.to_thread(frail.start)
            await until(lambda: limits.pipe.up)
            assert (await caller.reserve()).held
            await caller.refusal()

    run(main())


# --- Redis answers, and not as it should ---


def test_limits_hold_when_redis_memory_is_full(frail: RedisServer) -> None:
    frail.client.config_set("maxmemory", "1")

    async def main() -> list[Reservation]:
        async with limits_on(frail) as limits:
            caller = Caller(limits, a_tenant(**EVERYTHING | {"rpm": 1}), tpm=100)
            first = await caller.reserve(10)
            caller.limits.run_once()
            caller.limits.settle(first, 20, 0)
            await caller.refusal(10)
            return [first]

    assert run(main())[0].held


def test_a_script_that_redis_refuses_follows_the_policy_and_is_logged_once(
    frail: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app.limits")
    frail.client.set("rl:{acme-corp}:rpm", "not a hash")

    async def main() -> int:
        async with limits_on(frail) as limits:
            caller = Caller(limits, a_tenant(rpm=1), away=OPEN, tpm=1000)
            for _ in range(10):
                caller.limits.settle(await caller.reserve(10), 5, 0)
            with pytest.raises(LimitsUnavailable):
                await Caller(caller.limits, caller.tenant, away=CLOSED, tpm=1000).reserve(10)
            return caller.limits.local_calls

    assert run(main()) == 10
    assert ["WRONGTYPE" in record.getMessage() for record in caplog.records] == [True]
    assert Counters(frail, "_global").tpm == 0  # one script for all limits: where one of them fails, none is taken


# --- what trouble adds to a call ---


async def waited_ms(caller: Caller, seconds: float) -> list[float]:
    """How long calls waited for their reservations, about 200 a second, in milliseconds."""
    taken: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        held = await caller.reserve(10, 10)
        taken.append((time.perf_counter() - began) * 1000)
        caller.limits.settle(held, 9, 9)

    until_then = time.monotonic() + seconds
    async with asyncio.TaskGroup() as calls:
        while time.monotonic() < until_then:
            calls.create_task(one())
            await asyncio.sleep(0.005)
    return taken


@contextlib.asynccontextmanager
async def trouble(kind: str, server: RedisServer, slow: Callable[[float], None]) -> AsyncIterator[None]:
    async def flap() -> None:
        while True:
            server.freeze()
            await asyncio.sleep(1)
            server.thaw()
            await asyncio.sleep(1)

    flapping = asyncio.create_task(flap()) if kind == "flapping" else None
    if kind == "dead":
        server.kill()
    elif kind == "frozen":
        server.freeze()
    elif kind == "slow":
        slow(0.5)
    elif kind == "emptied":
        server.client.flushall()
    yield
    if flapping is not None:
        flapping.cancel()
        await asyncio.gather(flapping, return_exceptions=True)
    if kind != "dead":
        server.thaw()
    slow(0.0)


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["dead", "frozen", "slow", "flapping", "emptied"])
def test_two_seconds_into_trouble_redis_adds_less_than_50_ms_to_a_call(frail: RedisServer, kind: str) -> None:
    """With the settings that ship. Other work of the machine only adds: one quiet stretch of three is enough."""
    delay = 0.0

    def slow(seconds: float) -> None:
        nonlocal delay
        delay = seconds

    async def main() -> tuple[float, list[float]]:
        async with (
            wire(frail.port, lambda: delay) as port,
            running(RedisPipe(f"redis://127.0.0.1:{port}", AMBIENT)) as pipe,
        ):
            limits = Limits(pipe, AMBIENT)
            caller = Caller(limits, a_tenant(**dict.fromkeys(EVERYTHING, 10**12)), away=SHARE, replicas=1)
            loops = [asyncio.create_task(loop()) for loop in (limits.run, limits.budgets.run)]
            quiet = p99(await waited_ms(caller, 1))
            async with trouble(kind, frail, slow):
                await waited_ms(caller, 2)
                stretches = [p99(await waited_ms(caller, 2)) for _ in range(3)]
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            return quiet, stretches

    quiet, stretches = run(main())
    print(f"{kind}: p99 {quiet:.1f} ms before, then {', '.join(f'{taken:.1f}' for taken in stretches)} ms")
    assert min(stretches) - quiet < 50


def p99(taken: list[float]) -> float:
    return sorted(taken)[len(taken) * 99 // 100]
