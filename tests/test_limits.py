"""The limits room on a real Redis: exact, all or nothing, corrected once, and bounded when Redis is in trouble."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.ambient import Ambient, timestamp
from app.config import NAME, Tenant, WrittenRedis
from app.core import Reservation
from app.errors import BudgetExceeded, LimitError, LimitsUnavailable, RateLimitExceeded
from app.limits import Limits
from app.redis_pipe import RedisPipe
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running, until

OPEN = WrittenRedis(away="open", timeout_ms=100, probe_seconds=0.05)
CLOSED = WrittenRedis(away="closed", timeout_ms=100, probe_seconds=0.05)
DAY_SECONDS = 86_400


def not_just_before_midnight(seconds: float) -> None:
    while DAY_SECONDS - time.time() % DAY_SECONDS < seconds:
        time.sleep(0.5)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """An empty Redis, and no midnight within the test."""
    not_just_before_midnight(10)
    shared.client.flushall()
    return shared


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of one's own, to freeze and kill."""
    with redis_server(tmp_path) as server:
        yield server


def a_tenant(name: str = "acme-corp", rpm: int | None = None, daily_token_cap: int | None = None) -> Tenant:
    return Tenant(name, "standard", "standard", None, rpm, daily_token_cap)


def pipe_to(server: RedisServer, timeout_ms: float = 5000) -> RedisPipe:
    return RedisPipe(server.url, AMBIENT, timeout_ms=timeout_ms, probe_seconds=0.05)


def today() -> str:
    return timestamp(time.time())[:10].replace("-", "")


def day_tokens(server: RedisServer, tenant: str = "acme-corp") -> int:
    return int(server.client.get(f"rl:{{{tenant}}}:tokens:{today()}") or 0)


def window(server: RedisServer, key: str) -> int:
    return sum(int(amount) for field, amount in server.client.hgetall(key).items() if field.isdigit())


def rpm(server: RedisServer, tenant: str = "acme-corp") -> int:
    return window(server, f"rl:{{{tenant}}}:rpm")


def tpm(server: RedisServer) -> int:
    return window(server, "rl:{_global}:tpm")


def leases(server: RedisServer) -> list[str]:
    return server.client.keys("rl:*:call:*")


async def refusal(limits: Limits, call_id: str, tenant: Tenant, tokens: int, global_tpm: int | None) -> LimitError:
    with pytest.raises(LimitError) as caught:
        await limits.reserve(call_id, tenant, tokens, global_tpm, OPEN)
    return caught.value


# --- exactness ---


def admitted_of_200(url: str, replica: int, tenant: Tenant, tokens: int, global_tpm: int | None) -> int:
    """One replica's part: 200 parallel calls in a process of its own."""

    async def main() -> int:
        pipe = RedisPipe(url, Ambient(), timeout_ms=10_000)
        limits = Limits(pipe, Ambient())

        async def call(n: int) -> bool:
            try:
                reservation = await limits.reserve(f"{replica}-{n}", tenant, tokens, global_tpm, CLOSED)
            except LimitError:
                return False
            assert reservation.held
            return True

        async with running(pipe):
            return sum(await asyncio.gather(*(call(n) for n in range(200))))

    return run(main())


@pytest.mark.parametrize(
    ("tenant", "tokens", "global_tpm", "limit"),
    [
        (a_tenant(rpm=137), 10, None, "tenant_rpm"),
        (a_tenant(daily_token_cap=137 * 100 + 99), 100, None, "tenant_daily_tokens"),
        (a_tenant(), 100, 137 * 100 + 99, "global_tpm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_three_replicas_with_room_for_137_of_600_parallel_calls_admit_137(
    server: RedisServer, tenant: Tenant, tokens: int, global_tpm: int | None, limit: str
) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as replicas:
        parts = [replicas.submit(admitted_of_200, server.url, n, tenant, tokens, global_tpm) for n in range(3)]
        assert sum(part.result() for part in parts) == 137


class Script:
    """A script of the product under a clock of the test: its one reading of Redis's TIME is given instead.

    Everything else is as it runs in production. The years are far ahead, so that nothing expires by the real clock.
    """

    def __init__(self, server: RedisServer, name: str) -> None:
        text = (Path(__file__).parents[1] / "app" / name).read_text()
        assert text.count("call('TIME')") == 1
        self._client = server.client
        self._sha = server.client.script_load(text.replace("call('TIME')", "{ARGV[#ARGV - 1], ARGV[#ARGV]}"))

    def __call__(self, now_us: int, keys: list[str], *arguments: str | int) -> Any:
        return self._client.evalsha(self._sha, len(keys), *keys, *arguments, *divmod(now_us, 1_000_000))


START_SECOND = 4_102_444_800
SECONDS = st.integers(0, 3_000_000) | st.integers(55_000_000, 65_000_000) | st.integers(0, 70_000_000)


class Window:
    """One `60s` limit under the test's clock, and the model: every charge with its exact time."""

    def __init__(self, server: RedisServer, limit: int) -> None:
        server.client.flushall()
        self.limit = limit
        self.now_us = START_SECOND * 1_000_000 + 999_000
        self._reserve = Script(server, "limits_reserve.lua")
        self._settle = Script(server, "limits_settle.lua")
        self.charges: list[list[int]] = []
        self.calls: list[list[int]] = []

    def reserve(self, amount: int) -> list[int]:
        n = len(self.calls)
        day = self.now_us // 1_000_000 // DAY_SECONDS
        answer = self._reserve(self.now_us, [f"call:{n}", "window"], 7200, day, "60s", self.limit, amount)
        if answer[0] == 1:
            self.charges.append([self.now_us, amount])
            self.calls.append(self.charges[-1])
        return answer

    def settle(self, n: int, used: int) -> None:
        """A refund belongs to the moment of the reservation, what was used above it to now."""
        if self._settle(self.now_us, [f"call:{n}", "window"], "60s", used) == 0:
            return
        charge = self.calls[n]
        if used > charge[1]:
            self.charges.append([self.now_us, used - charge[1]])
        elif charge[0] // 1_000_000 >= self.now_us // 1_000_000 - 60:
            charge[1] = used

    def charged_within_us(self, span_us: int) -> int:
        return sum(amount for at, amount in self.charges if at >= self.now_us - span_us)


steps = st.lists(
    st.tuples(SECONDS, st.sampled_from(["reserve", "reserve", "settle"]), st.integers(0, 12), st.integers(0, 30)),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(limit=st.integers(1, 12), steps=steps)
def test_no_interval_of_60_seconds_admits_more_than_the_limit(
    shared: RedisServer, limit: int, steps: list[tuple[int, str, int, int]]
) -> None:
    window = Window(shared, limit)
    for passed_us, step, amount, which in steps:
        window.now_us += passed_us
        if step == "settle" and window.calls:
            window.settle(which % len(window.calls), amount)
        elif step == "reserve":
            # What a settlement charges above its reservation was used already: it counts, but cannot be refused.
            before = window.charged_within_us(60_000_000)
            taken = window.reserve(amount)[0] == 1
            assert not taken or before + amount <= limit


@settings(max_examples=150, deadline=None)
@given(limit=st.integers(1, 12), steps=steps)
def test_nothing_is_refused_that_61_seconds_have_room_for(
    shared: RedisServer, limit: int, steps: list[tuple[int, str, int, int]]
) -> None:
    window = Window(shared, limit)
    for passed_us, step, amount, which in steps:
        window.now_us += passed_us
        if step == "settle" and window.calls:
            window.settle(which % len(window.calls), amount)
        elif step == "reserve":
            room = limit - window.charged_within_us(61_000_000)
            assert window.reserve(amount)[0] == 1 or amount > room


@settings(max_examples=150, deadline=None)
@given(limit=st.integers(1, 12), steps=steps)
def test_whoever_waits_out_the_refusal_is_admitted_and_not_before(
    shared: RedisServer, limit: int, steps: list[tuple[int, str, int, int]]
) -> None:
    window = Window(shared, limit)
    for passed_us, step, amount, which in steps:
        window.now_us += passed_us
        if step == "settle" and window.calls:
            window.settle(which % len(window.calls), amount)
            continue
        answer = window.reserve(amount)
        if answer[0] == 0 and amount <= limit:
            wait_ms = answer[2]
            window.now_us += (wait_ms - 1) * 1000 - 1
            assert window.reserve(amount)[0] == 0
            window.now_us += 1001
            assert window.reserve(amount)[0] == 1


def test_the_window_does_not_admit_double_at_its_edge(server: RedisServer) -> None:
    window = Window(server, 10)
    window.now_us = (START_SECOND + 59) * 1_000_000 + 900_000
    assert [window.reserve(1)[0] for _ in range(11)] == [1] * 10 + [0]
    window.now_us += 200_000
    assert window.reserve(1)[0] == 0


def test_a_refund_is_not_given_again_when_its_second_leaves_the_window(server: RedisServer) -> None:
    window = Window(server, 10)
    window.reserve(8)
    window.now_us += 30_000_000
    window.settle(0, 0)
    window.now_us += 40_000_000
    assert [window.reserve(5)[0] for _ in range(3)] == [1, 1, 0]


def test_what_was_used_above_the_estimate_stays_counted_for_a_minute_from_its_settlement(server: RedisServer) -> None:
    window = Window(server, 10)
    window.reserve(5)
    server.client.expire("window", 5)
    window.now_us += 50_000_000
    window.settle(0, 8)
    assert server.client.ttl("window") > 60


def test_a_clock_that_is_set_back_far_does_not_lock_the_window(server: RedisServer) -> None:
    window = Window(server, 1)
    window.reserve(1)
    window.now_us -= 7_200_000_000
    assert window.reserve(1)[0] == 1


def test_a_window_that_somebody_deleted_is_not_refunded_below_zero(server: RedisServer) -> None:
    window = Window(server, 10)
    window.reserve(8)
    server.client.delete("window")
    window.settle(0, 0)
    assert [window.reserve(5)[0] for _ in range(3)] == [1, 1, 0]


# --- what a reservation says ---


def test_a_reservation_tells_limits_what_remains_and_when_they_are_whole_again(server: RedisServer) -> None:
    async def main() -> Reservation:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            await limits.reserve("a", a_tenant(rpm=5, daily_token_cap=1000), 100, 5000, OPEN)
            return await limits.reserve("b", a_tenant(rpm=5, daily_token_cap=1000), 150, 5000, OPEN)

    got = run(main())
    assert (got.held, got.limit_requests, got.remaining_requests) == (True, 5, 3)
    assert (got.limit_tokens, got.remaining_tokens) == (1000, 750)
    assert 60 < got.reset_requests_seconds <= 61
    assert abs(got.reset_tokens_seconds - (DAY_SECONDS - time.time() % DAY_SECONDS)) < 10


def test_limits_that_are_not_set_are_none_and_cost_no_command(server: RedisServer) -> None:
    async def main() -> Reservation:
        async with running(pipe_to(server)) as pipe:
            server.client.config_resetstat()
            return await Limits(pipe, AMBIENT).reserve("a", a_tenant(), 100, None, OPEN)

    got = run(main())
    assert (got.limit_requests, got.remaining_requests, got.limit_tokens, got.remaining_tokens) == (None,) * 4
    assert "cmdstat_evalsha" not in server.client.info("commandstats")


def test_no_budget_set_means_no_budget_error(server: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            for n in range(20):
                await limits.reserve(str(n), a_tenant(rpm=100), 10**9, None, OPEN)

    run(main())


# --- refusals ---


def test_a_used_up_rpm_is_refused_with_its_name_value_and_wait(server: RedisServer) -> None:
    async def main() -> LimitError:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            await limits.reserve("a", a_tenant(rpm=1), 1, None, OPEN)
            return await refusal(limits, "b", a_tenant(rpm=1), 1, None)

    error = run(main())
    assert isinstance(error, RateLimitExceeded)
    assert (error.limit, error.should_retry) == ("tenant_rpm", None)
    assert "its limit of 1 requests" in error.message
    assert error.retry_after_seconds is not None
    assert 55 < error.retry_after_seconds <= 61


def test_a_used_up_day_is_refused_until_midnight_and_not_to_be_retried(server: RedisServer) -> None:
    async def main() -> LimitError:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            await limits.reserve("a", a_tenant(daily_token_cap=100), 60, None, OPEN)
            return await refusal(limits, "b", a_tenant(daily_token_cap=100), 60, None)

    error = run(main())
    assert isinstance(error, BudgetExceeded)
    assert (error.limit, error.should_retry) == ("tenant_daily_tokens", False)
    assert "100 tokens per UTC day with 40 left" in error.message
    assert error.retry_after_seconds is not None
    assert abs(error.retry_after_seconds - (DAY_SECONDS - time.time() % DAY_SECONDS)) < 10


def test_a_used_up_global_tpm_is_refused_with_its_name(server: RedisServer) -> None:
    async def main() -> LimitError:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            await limits.reserve("a", a_tenant("one"), 60, 100, OPEN)
            return await refusal(limits, "b", a_tenant("other"), 60, 100)

    error = run(main())
    assert isinstance(error, RateLimitExceeded)
    assert (error.limit, error.should_retry) == ("global_tpm", None)
    assert "100 tokens in any 60 seconds" in error.message


def test_a_call_above_the_limit_itself_is_told_that_waiting_does_not_help(server: RedisServer) -> None:
    async def main() -> LimitError:
        async with running(pipe_to(server)) as pipe:
            return await refusal(Limits(pipe, AMBIENT), "a", a_tenant(), 101, 100)

    error = run(main())
    assert error.should_retry is False
    assert "Waiting does not help" in error.message


def test_the_limit_that_lasts_longest_is_the_one_that_is_named(server: RedisServer) -> None:
    tenant = a_tenant(rpm=1, daily_token_cap=10)

    async def main() -> LimitError:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            await limits.reserve("a", tenant, 10, None, OPEN)
            return await refusal(limits, "b", tenant, 10, None)

    not_just_before_midnight(70)
    assert run(main()).limit == "tenant_daily_tokens"


@pytest.mark.parametrize(
    ("tenant", "global_tpm"),
    [
        (a_tenant(rpm=1, daily_token_cap=10_000), 10_000),
        (a_tenant(rpm=10, daily_token_cap=150), 10_000),
        (a_tenant(rpm=10, daily_token_cap=10_000), 150),
    ],
    ids=["tenant_rpm", "tenant_daily_tokens", "global_tpm"],
)
def test_a_refusal_takes_nothing_from_any_limit(server: RedisServer, tenant: Tenant, global_tpm: int) -> None:
    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            await limits.reserve("a", tenant, 100, global_tpm, OPEN)
            for n in range(20):
                await refusal(limits, f"b{n}", tenant, 100, global_tpm)

    run(main())
    assert (rpm(server), day_tokens(server), tpm(server)) == (1, 100, 100)
    assert len(leases(server)) == 1


# --- settlement ---


def settled(server: RedisServer, *used: int, reserved: int = 100) -> None:
    """One call of everything, settled once for each of `used`."""

    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            reservation = await limits.reserve("a", a_tenant(rpm=10, daily_token_cap=1000), reserved, 1000, OPEN)
            for tokens in used:
                limits.settle(reservation, tokens)

    run(main())


def test_settling_gives_back_what_was_not_used(server: RedisServer) -> None:
    settled(server, 30)
    assert (rpm(server), day_tokens(server), tpm(server)) == (1, 30, 30)


def test_settling_charges_what_was_used_above_the_estimate(server: RedisServer) -> None:
    settled(server, 170)
    assert (rpm(server), day_tokens(server), tpm(server)) == (1, 170, 170)


def test_a_second_settlement_of_a_call_changes_nothing(server: RedisServer) -> None:
    settled(server, 30, 30, 500)
    assert (rpm(server), day_tokens(server), tpm(server)) == (1, 30, 30)


def test_a_settled_call_leaves_no_lease(server: RedisServer) -> None:
    settled(server, 30)
    assert leases(server) == []


def test_a_call_that_was_never_settled_stays_charged_at_its_estimate(server: RedisServer) -> None:
    settled(server)
    server.client.delete(*leases(server))
    assert (day_tokens(server), tpm(server)) == (100, 100)


def test_a_settlement_after_its_lease_ran_out_leaves_the_estimate(server: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            reservation = await limits.reserve("a", a_tenant(daily_token_cap=1000), 100, 1000, OPEN)
            server.client.delete(*leases(server))
            limits.settle(reservation, 30)

    run(main())
    assert (day_tokens(server), tpm(server)) == (100, 100)


def test_a_call_over_midnight_is_settled_on_the_day_of_its_reservation(server: RedisServer) -> None:
    reserve, settle = Script(server, "limits_reserve.lua"), Script(server, "limits_settle.lua")
    midnight = (START_SECOND // DAY_SECONDS + 1) * DAY_SECONDS
    day = midnight // DAY_SECONDS - 1
    reserve((midnight - 5) * 1_000_000, ["call:a", "first day"], 7200, day, "day", 1000, 100)
    settle((midnight + 5) * 1_000_000, ["call:a", "first day"], "day", 30)
    assert server.client.get("first day") == "30"
    assert server.client.expiretime("first day") == midnight + DAY_SECONDS


def test_a_day_counter_that_somebody_deleted_is_not_refunded_below_zero(server: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            reservation = await limits.reserve("a", a_tenant(daily_token_cap=1000), 100, None, OPEN)
            server.client.delete(f"rl:{{acme-corp}}:tokens:{today()}")
            limits.settle(reservation, 30)

    run(main())
    assert day_tokens(server) == 0


@settings(max_examples=20, deadline=None)
@given(used=st.lists(st.integers(0, 300), min_size=1, max_size=30))
def test_counters_end_at_what_all_calls_used(shared: RedisServer, used: list[int]) -> None:
    not_just_before_midnight(5)
    shared.client.flushall()

    async def main() -> None:
        async with running(pipe_to(shared)) as pipe:
            limits = Limits(pipe, AMBIENT)

            async def call(n: int, tokens: int) -> None:
                tenant = a_tenant(rpm=10_000, daily_token_cap=10**6)
                limits.settle(await limits.reserve(str(n), tenant, 100, 10**6, OPEN), tokens)

            await asyncio.gather(*(call(n, tokens) for n, tokens in enumerate(used)))

    run(main())
    assert (rpm(shared), day_tokens(shared), tpm(shared)) == (len(used), sum(used), sum(used))


# --- keys ---


def test_every_key_expires(server: RedisServer) -> None:
    settled(server)
    settled(server, 170, reserved=100)
    assert {key for key in server.client.keys("*") if server.client.ttl(key) < 0} == set()


names = st.from_regex(NAME, fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(mine=names, other=names)
def test_no_key_of_one_tenant_is_touched_by_another(shared: RedisServer, mine: str, other: str) -> None:
    not_just_before_midnight(5)
    assume(mine != other)
    shared.client.flushall()

    def of(tenant: str) -> dict[str, Any]:
        keys = [key for key in shared.client.keys("*") if key.startswith(f"rl:{{{tenant}}}:")]
        return {key: shared.client.dump(key) for key in keys}

    async def main() -> None:
        async with running(pipe_to(shared)) as pipe:
            limits = Limits(pipe, AMBIENT)
            held = await limits.reserve("a", a_tenant(mine, rpm=1, daily_token_cap=100), 90, None, OPEN)
            before = of(mine)
            assert len(before) == 3
            theirs = await limits.reserve("a", a_tenant(other, rpm=1, daily_token_cap=100), 90, None, OPEN)
            assert theirs.remaining_requests == 0
            limits.settle(theirs, 10)
            await refusal(limits, "b", a_tenant(other, rpm=1, daily_token_cap=100), 90, None)
            assert of(mine) == before
            assert set(shared.client.keys("*")) == {*of(mine), *of(other)}
            limits.settle(held, 90)

    run(main())


def test_limits_hold_when_redis_memory_is_full(frail: RedisServer) -> None:
    frail.client.config_set("maxmemory", "1")

    async def main() -> bool:
        async with running(pipe_to(frail)) as pipe:
            limits = Limits(pipe, AMBIENT)
            limits.settle(await limits.reserve("a", a_tenant(rpm=1, daily_token_cap=100), 10, 100, CLOSED), 20)
            await refusal(limits, "b", a_tenant(rpm=1), 10, None)
            return True

    assert run(main())


class Elsewhere(Ambient):
    """A replica whose clock is wrong."""

    def __init__(self, ahead_seconds: float) -> None:
        self.ahead_seconds = ahead_seconds

    def now(self) -> float:
        return time.time() + self.ahead_seconds


@pytest.mark.parametrize("ahead_seconds", [-2 * DAY_SECONDS, DAY_SECONDS])
def test_a_replica_whose_clock_is_wrong_charges_the_day_of_redis(server: RedisServer, ahead_seconds: float) -> None:
    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, Elsewhere(ahead_seconds))
            for n in range(3):
                limits.settle(await limits.reserve(str(n), a_tenant(rpm=9, daily_token_cap=900), 100, 900, CLOSED), 50)

    run(main())
    assert (rpm(server), day_tokens(server), tpm(server)) == (3, 150, 150)
    assert server.client.keys("rl:*:tokens:*") == [f"rl:{{acme-corp}}:tokens:{today()}"]


# --- the way there and back ---


def test_a_call_costs_one_round_trip_before_and_one_after(server: RedisServer) -> None:
    tenant = a_tenant(rpm=100, daily_token_cap=10_000)

    async def main() -> tuple[int, int]:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            limits.settle(await limits.reserve("warm", tenant, 100, 10_000, OPEN), 50)
            await pipe.execute("PING")
            before = server.client.info("stats")["total_reads_processed"]
            reservation = await limits.reserve("a", tenant, 100, 10_000, OPEN)
            between = server.client.info("stats")["total_reads_processed"]
            limits.settle(reservation, 50)
            await until(lambda: leases(server) == [])
            return between - before, len(leases(server))

    # One read is the INFO's own.
    assert run(main()) == (2, 0)


def test_scripts_that_redis_forgot_are_back_within_the_call(server: RedisServer) -> None:
    tenant = a_tenant(rpm=100, daily_token_cap=10_000)

    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            limits.settle(await limits.reserve("a", tenant, 100, 10_000, CLOSED), 50)
            server.client.script_flush()
            limits.settle(await limits.reserve("b", tenant, 100, 10_000, CLOSED), 50)

    run(main())
    assert (rpm(server), day_tokens(server), tpm(server)) == (2, 100, 100)


@pytest.mark.parametrize("turns", range(4))
def test_a_caller_who_hangs_up_during_the_reservation_leaves_nothing_reserved(server: RedisServer, turns: int) -> None:
    async def main() -> None:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            tenant = a_tenant(rpm=100, daily_token_cap=10_000)
            call = asyncio.create_task(limits.reserve("a", tenant, 100, 10_000, OPEN))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(main())
    assert (rpm(server), day_tokens(server), tpm(server), leases(server)) == (0, 0, 0, [])


def test_a_thousand_calls_at_once_are_all_answered(server: RedisServer) -> None:
    async def main() -> list[int | None]:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            tenant = a_tenant(rpm=1000, daily_token_cap=10**6)
            calls = [limits.reserve(str(n), tenant, 10, 10**6, CLOSED) for n in range(1000)]
            return [reservation.remaining_requests for reservation in await asyncio.gather(*calls)]

    assert sorted(run(main())) == list(range(1000))


# --- Redis in trouble ---


def test_without_redis_calls_pass_unmetered_when_open(tmp_path: Path) -> None:
    async def main() -> tuple[bool, int]:
        async with running(pipe_to(RedisServer(tmp_path)), up=False) as pipe:
            limits = Limits(pipe, AMBIENT)
            reservation = await limits.reserve("a", a_tenant(rpm=1), 10, None, OPEN)
            limits.settle(reservation, 10)
            return reservation.held, limits.unmetered_calls

    assert run(main()) == (False, 1)


def test_without_redis_calls_are_refused_when_closed(tmp_path: Path) -> None:
    async def main() -> LimitsUnavailable:
        async with running(pipe_to(RedisServer(tmp_path)), up=False) as pipe:
            with pytest.raises(LimitsUnavailable) as caught:
                await Limits(pipe, AMBIENT).reserve("a", a_tenant(rpm=1), 10, None, CLOSED)
            return caught.value

    error = run(main())
    assert (error.retry_after_seconds, error.status) == (1.0, 503)


@pytest.mark.parametrize("policy", [OPEN, CLOSED], ids=["open", "closed"])
def test_a_reservation_that_a_frozen_redis_makes_late_is_corrected(frail: RedisServer, policy: WrittenRedis) -> None:
    """Redis reads what was sent when it thaws: what the call then used, or nothing if it was refused, is charged."""

    async def main() -> None:
        async with running(pipe_to(frail, timeout_ms=100)) as pipe:
            limits = Limits(pipe, AMBIENT)
            tenant = a_tenant(rpm=10, daily_token_cap=1000)
            limits.settle(await limits.reserve("before", tenant, 100, 1000, policy), 5)
            await pipe.execute("PING")
            frail.freeze()
            if policy.away == "open":
                reservation = await limits.reserve("frozen", tenant, 100, 1000, policy)
                assert not reservation.held
                limits.settle(reservation, 30)
            else:
                with pytest.raises(LimitsUnavailable):
                    await limits.reserve("frozen", tenant, 100, 1000, policy)
            frail.thaw()
            await until(lambda: pipe.up)

    run(main())
    calls, tokens = (2, 35) if policy.away == "open" else (1, 5)
    assert (rpm(frail), day_tokens(frail), tpm(frail), leases(frail)) == (calls, tokens, tokens, [])


def test_a_settlement_without_redis_is_made_up_for_when_it_is_back(frail: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(frail, timeout_ms=100)) as pipe:
            limits = Limits(pipe, AMBIENT)
            tenant = a_tenant(rpm=10, daily_token_cap=1000)
            early = await limits.reserve("a", tenant, 100, 1000, OPEN)
            late = await limits.reserve("b", tenant, 100, 1000, OPEN)
            frail.freeze()
            limits.settle(early, 30)
            await until(lambda: not pipe.up)
            limits.settle(late, 40)
            frail.thaw()
            await until(lambda: pipe.up)

    run(main())
    assert (rpm(frail), day_tokens(frail), tpm(frail), leases(frail)) == (2, 70, 70, [])


def test_no_more_settlements_are_kept_than_the_limit_says(frail: RedisServer) -> None:
    async def main() -> int:
        async with running(pipe_to(frail, timeout_ms=100)) as pipe:
            limits = Limits(pipe, AMBIENT, unsettled_limit=3)
            tenant = a_tenant(daily_token_cap=1000)
            held = [await limits.reserve(str(n), tenant, 100, None, OPEN) for n in range(5)]
            frail.freeze()
            await limits.reserve("frozen", tenant, 0, None, OPEN)
            for reservation in held:
                limits.settle(reservation, 0)
            frail.thaw()
            await until(lambda: pipe.up)
            return limits.lost_settlements

    assert run(main()) == 2
    # The two oldest stay charged at their estimate.
    assert day_tokens(frail) == 200


def test_limits_hold_again_after_redis_was_killed_and_restarted(frail: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(frail)) as pipe:
            limits = Limits(pipe, AMBIENT)
            frail.kill()
            await until(lambda: not pipe.up)
            await limits.reserve("a", a_tenant(rpm=1), 10, None, OPEN)
            await asyncio.to_thread(frail.start)
            await until(lambda: pipe.up)
            assert (await limits.reserve("b", a_tenant(rpm=1), 10, None, OPEN)).held
            await refusal(limits, "c", a_tenant(rpm=1), 10, None)

    run(main())


def test_a_script_that_redis_refuses_follows_the_policy_and_is_logged_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app.limits")
    server.client.set("rl:{acme-corp}:rpm", "not a hash")

    async def main() -> int:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            for n in range(10):
                limits.settle(await limits.reserve(str(n), a_tenant(rpm=1), 10, 1000, OPEN), 5)
            with pytest.raises(LimitsUnavailable):
                await limits.reserve("closed", a_tenant(rpm=1), 10, 1000, CLOSED)
            return limits.unmetered_calls

    assert run(main()) == 10
    assert ["WRONGTYPE" in record.getMessage() for record in caplog.records] == [True]
    assert tpm(server) == 0  # one script for all limits: where one of them fails, none is taken
