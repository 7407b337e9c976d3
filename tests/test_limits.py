"""The limits room on a real Redis: exact, all or nothing, corrected once, and each owner's own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.ambient import Ambient
from app.config import NAME, Tenant
from app.core import Fetch, Rates, Reservation
from app.errors import BudgetExceeded, LimitError, RateLimitExceeded
from app.limits import Limits
from app.limits.scopes import LEASE_MS, RECORD_SECONDS, WHOLE, period
from app.redis_pipe import RedisPipe
from tests.limits_parts import (
    DAY_SECONDS,
    KEY_ID,
    OPEN,
    START_SECOND,
    Caller,
    Counters,
    Script,
    a_key,
    a_tenant,
    not_just_before_midnight,
    pipe_to,
    records,
    today,
    whole,
)
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running, until

EVERYTHING = {
    "rpm": 10,
    "tpm": 1000,
    "concurrency": 10,
    "daily_tokens": 1000,
    "daily_nanos": 10_000,
    "monthly_nanos": 10_000,
}
EACH_LIMIT = pytest.mark.parametrize("limit", EVERYTHING)
NAMES = {kind: kind.replace("nanos", "usd") for kind in EVERYTHING}
"""Of a quota's field in a limit's name."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def replicas() -> Iterator[ProcessPoolExecutor]:
    """Three processes."""
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as three:
        yield three


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """An empty Redis, and no midnight within the test."""
    not_just_before_midnight(10)
    shared.client.flushall()
    return whole(shared)


def on(server: RedisServer, tenant: Tenant, scenario: Callable[[Caller], Any], **options: Any) -> Any:
    """What `scenario` returns of a caller for `tenant`."""

    async def main() -> Any:
        async with running(pipe_to(server)) as pipe:
            return await scenario(Caller(Limits(pipe, AMBIENT), tenant, **options))

    return run(main())


# --- exactness ---


def admitted_of_200(url: str, replica: int, tenant: Tenant, tokens: int, nanos: int, options: dict[str, Any]) -> int:
    """One replica's part: 200 parallel calls in a process of its own."""

    async def main() -> int:
        pipe = RedisPipe(url, Ambient(), timeout_ms=10_000)
        caller = Caller(Limits(pipe, Ambient()), tenant, **options)

        async def call(n: int) -> bool:
            try:
                reservation = await caller.reserve(tokens, nanos, f"{replica}-{n}")
            except LimitError:
                return False
            assert reservation.held
            return True

        async with running(pipe):
            return sum(await asyncio.gather(*(call(n) for n in range(200))))

    return run(main())


@pytest.mark.parametrize(
    ("tenant", "options"),
    [
        (a_tenant(rpm=137), {}),
        (a_tenant(tpm=137 * 100 + 99), {}),
        (a_tenant(concurrency=137), {}),
        (a_tenant(daily_tokens=137 * 100 + 99), {}),
        (a_tenant(daily_nanos=137 * 3_000_000_001), {}),
        (a_tenant(monthly_nanos=138 * 3_000_000_001 - 1), {}),
        (a_tenant(), {"key": a_key(rpm=137)}),
        (a_tenant(), {"key": a_key(monthly_nanos=137 * 3_000_000_001)}),
        (a_tenant(), {"rpm": 137}),
        (a_tenant(), {"tpm": 137 * 100 + 99}),
        (a_tenant(rpm=150, daily_nanos=140 * 3_000_000_001), {"key": a_key(concurrency=137), "tpm": 14_500}),
    ],
    ids=["rpm", "tpm", "concurrency", "day", "day USD", "month USD", "key", "key USD", "global", "global tpm", "all"],
)
def test_three_replicas_with_room_for_137_of_600_parallel_calls_admit_137(
    server: RedisServer, replicas: ProcessPoolExecutor, tenant: Tenant, options: dict[str, Any]
) -> None:
    parts = [replicas.submit(admitted_of_200, server.url, n, tenant, 100, 3_000_000_001, options) for n in range(3)]
    assert sum(part.result() for part in parts) == 137


def killed_in_mid_call(url: str, tenant: Tenant) -> None:
    """A replica that reserves for a call, and is no more."""

    async def main() -> None:
        async with running(RedisPipe(url, Ambient(), timeout_ms=10_000)) as pipe:
            await Caller(Limits(pipe, Ambient()), tenant).reserve(100, 1000, "killed")
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())


def test_a_replica_that_is_killed_in_mid_call_leaks_no_place_and_gets_nothing_back(server: RedisServer) -> None:
    tenant = a_tenant(**EVERYTHING | {"concurrency": 1})
    process = multiprocessing.get_context("spawn").Process(target=killed_in_mid_call, args=(server.url, tenant))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert Counters(server).all == (1, 100, 1, 100, 1000, 1000)
    server.client.zadd("rl:{acme-corp}:concurrency", {"killed": time.time() * 1000})  # 30 seconds later

    async def scenario(caller: Caller) -> bool:
        return await caller.admitted(1, 1)

    assert on(server, tenant, scenario)
    assert Counters(server).all == (2, 101, 1, 101, 1001, 1001)


SECONDS = st.integers(0, 3_000_000) | st.integers(55_000_000, 65_000_000) | st.integers(0, 70_000_000)

ID_BEGINS = len("call:") + 1


class Window:
    """One `tpm` limit under the test's clock, and the model: every charge with its exact time."""

    def __init__(self, server: RedisServer, limit: int) -> None:
        server.client.flushall()
        self.limit = limit
        self.now_us = START_SECOND * 1_000_000 + 999_000
        self._reserve = Script(server, "reserve.lua")
        self._settle = Script(server, "settle.lua")
        self.charges: list[list[int]] = []
        self.calls: list[list[int]] = []

    def reserve(self, amount: int) -> list[int]:
        n = len(self.calls)
        fixed = (RECORD_SECONDS, LEASE_MS, amount, 0, 0, 2 * START_SECOND)
        answer = self._reserve(self.now_us, [f"call:{n}", "window", "whole"], ID_BEGINS, *fixed, "tpm", self.limit)
        if answer[0] == 1:
            self.charges.append([self.now_us, amount])
            self.calls.append(self.charges[-1])
        return answer

    def settle(self, n: int, used: int) -> None:
        """A refund belongs to the moment of the reservation, what was used above it to now."""
        if not self._settle(self.now_us, [f"call:{n}", "window"], ID_BEGINS, 1, used, 0, "tpm"):
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
            wait_ms = answer[3]
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


def test_the_largest_amounts_are_counted_to_the_last_nano_dollar(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> int:
        caller.limits.settle(await caller.reserve(1, 8_999_999_999_999_998), 1, 8_999_999_999_999_997)
        await until(lambda: records(server) == [])
        await caller.reserve(1, 3)
        error = await caller.refusal(1, 1)
        assert error.limit == "tenant_monthly_usd"
        return Counters(server).month_nanos

    assert on(server, a_tenant(monthly_nanos=9_000_000 * 10**9), scenario) == 9_000_000 * 10**9


# --- what a reservation says ---


def test_a_reservation_tells_limits_what_remains_and_when_they_are_whole_again(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> Rates | None:
        await caller.reserve(100)
        return (await caller.reserve(150)).rates

    got = on(server, a_tenant(rpm=5, daily_tokens=1000), scenario, tpm=5000)
    assert (got.limit_requests, got.remaining_requests) == (5, 3)
    assert (got.limit_tokens, got.remaining_tokens) == (1000, 750)
    assert 60 < got.reset_requests_seconds <= 61
    assert abs(got.reset_tokens_seconds - (DAY_SECONDS - time.time() % DAY_SECONDS)) < 10


def test_a_look_tells_what_remains_and_takes_nothing(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> tuple[Rates | None, tuple[int, ...], list[str], int]:
        await caller.reserve(150, call_id="one")
        before, kept = Counters(server).all, records(server)
        call = caller.call()
        for _ in range(9):
            seen = await caller.limits.look(call.config, caller.tenant, call.key)
        assert (Counters(server).all, records(server)) == (before, kept)
        return seen

    got = on(server, a_tenant(rpm=5, concurrency=2, daily_tokens=1000, monthly_nanos=9), scenario)
    assert (got.limit_requests, got.remaining_requests) == (5, 4)
    assert (got.limit_tokens, got.remaining_tokens) == (1000, 850)


def test_a_look_where_nothing_is_limited_or_nothing_is_left(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> tuple[Rates | None, Rates | None]:
        call = caller.call()
        await caller.reserve(10)
        return await caller.limits.look(call.config, caller.tenant, call.key), await caller.limits.look(
            call.config, a_tenant(), call.key
        )

    used_up, unlimited = on(server, a_tenant(rpm=1), scenario)
    assert (used_up.remaining_requests, unlimited) == (0, None)


@pytest.mark.parametrize(
    ("tenant", "key", "shown"),
    [
        ({"rpm": 5}, {"rpm": 3}, (3, 2, None, None)),
        ({"rpm": 2}, {"rpm": 3}, (2, 1, None, None)),
        ({"tpm": 100, "daily_tokens": 1000}, {}, (None, None, 100, 90)),
        ({"tpm": 5000, "daily_tokens": 1000}, {"tpm": 300}, (None, None, 300, 290)),
        ({"monthly_nanos": 5}, {}, (None, None, None, None)),
    ],
)
def test_the_tightest_limit_is_the_one_that_is_shown(
    server: RedisServer, tenant: dict[str, int], key: dict[str, int], shown: tuple[int | None, ...]
) -> None:
    async def scenario(caller: Caller) -> Rates | None:
        return (await caller.reserve(10)).rates

    got = on(server, a_tenant(**tenant), scenario, key=a_key(**key), rpm=1, tpm=20)
    assert (got.limit_requests, got.remaining_requests, got.limit_tokens, got.remaining_tokens) == shown


def test_limits_that_are_not_set_are_none_and_cost_no_command(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> Reservation:
        server.client.config_resetstat()
        return await caller.reserve(100)

    got = on(server, a_tenant(), scenario)
    assert (got.held, got.rates) == (True, None)
    assert "cmdstat_evalsha" not in server.client.info("commandstats")


def test_no_budget_set_means_no_budget_error(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> None:
        for _ in range(20):
            await caller.reserve(10**9, 10**15)

    on(server, a_tenant(rpm=100, concurrency=100), scenario)


# --- refusals ---


@EACH_LIMIT
@pytest.mark.parametrize("owner", ["tenant", "key"])
def test_a_used_up_limit_is_refused_by_its_name(server: RedisServer, owner: str, limit: str) -> None:
    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve(1, 1)
        return await caller.refusal(1, 1)

    quotas = {"tenant": {}, "key": {}} | {owner: {limit: 1}}
    error = on(server, a_tenant(**quotas["tenant"]), scenario, key=a_key(**quotas["key"]))
    budget = limit.startswith(("daily", "monthly"))
    assert type(error) is (BudgetExceeded if budget else RateLimitExceeded)
    assert (error.limit, error.should_retry) == (f"{owner}_{NAMES[limit]}", False if budget else None)
    assert (KEY_ID if owner == "key" else "acme-corp") in error.message


@pytest.mark.parametrize("limit", ["rpm", "tpm"])
def test_a_used_up_global_limit_is_refused_by_its_name_for_every_tenant(server: RedisServer, limit: str) -> None:
    async def main() -> LimitError:
        async with running(pipe_to(server)) as pipe:
            limits = Limits(pipe, AMBIENT)
            await Caller(limits, a_tenant("one"), **{limit: 1}).reserve()
            return await Caller(limits, a_tenant("other"), **{limit: 1}).refusal()

    error = run(main())
    assert (type(error), error.limit) == (RateLimitExceeded, f"global_{limit}")
    assert error.message.startswith("All tenants together have ")


@pytest.mark.parametrize(
    ("quota", "tokens", "nanos", "sentence"),
    [
        ({"rpm": 1}, 1, 0, "Tenant acme-corp has used its limit of 1 requests in any 60 seconds. Send it again in "),
        ({"tpm": 100}, 60, 0, "limit of 100 tokens in any 60 seconds with 40 left; this call may need 60. Send it"),
        ({"concurrency": 1}, 1, 0, "has its limit of 1 calls at once running. Send it again when one of them has"),
        ({"daily_tokens": 100}, 60, 0, "100 tokens per day (UTC) with 40 tokens left; this call may need 60 tokens. L"),
        ({"daily_nanos": 10**9}, 1, 6 * 10**8, "1 USD per day (UTC) with 0.4 USD left; this call may need 0.6 USD. L"),
        ({"monthly_nanos": 10**9}, 1, 6 * 10**8, "1 USD per month (UTC) with 0.4 USD left"),
        ({"daily_tokens": 100, "time_zone": "Asia/Kolkata"}, 60, 0, "100 tokens per day (Asia/Kolkata) with 40 tok"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_limit_its_value_and_what_to_do(
    server: RedisServer, quota: dict[str, Any], tokens: int, nanos: int, sentence: str
) -> None:
    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve(tokens, nanos)
        return await caller.refusal(tokens, nanos)

    assert sentence in on(server, a_tenant(**quota), scenario).message


@pytest.mark.parametrize("limit", ["rpm", "tpm"])
def test_a_used_up_rate_says_when_enough_of_its_window_has_left(server: RedisServer, limit: str) -> None:
    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve()
        return await caller.refusal()

    wait_seconds = on(server, a_tenant(**{limit: 1}), scenario).retry_after_seconds
    assert 55 < wait_seconds <= 61


@pytest.mark.parametrize("limit", ["daily_tokens", "daily_nanos", "monthly_nanos"])
@pytest.mark.parametrize("time_zone", ["UTC", "America/New_York", "Asia/Kathmandu"])
def test_a_used_up_budget_says_when_its_day_or_month_ends(server: RedisServer, limit: str, time_zone: str) -> None:
    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve(1, 1)
        return await caller.refusal(1, 1)

    ended = ends = 0.0
    while ended >= ends:  # once more where midnight came in between
        _, _, ends = period(limit == "monthly_nanos", time_zone, began := time.time())
        wait_seconds = on(server, a_tenant(**{limit: 1}, time_zone=time_zone), scenario).retry_after_seconds
        ended = time.time()
    assert ends - ended - 1 <= wait_seconds <= ends - began + 1


@pytest.mark.parametrize("limit", ["tpm", "daily_tokens", "daily_nanos", "monthly_nanos"])
def test_a_call_above_the_limit_itself_is_told_that_waiting_does_not_help(server: RedisServer, limit: str) -> None:
    async def scenario(caller: Caller) -> LimitError:
        return await caller.refusal(101, 101)

    error = on(server, a_tenant(**{limit: 100}), scenario)
    assert error.should_retry is False
    assert "Waiting does not help" in error.message


def test_the_limit_that_lasts_longest_is_the_one_that_is_named(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve(10)
        return await caller.refusal(10)

    not_just_before_midnight(70)
    assert on(server, a_tenant(rpm=1, concurrency=1, daily_tokens=10), scenario).limit == "tenant_daily_tokens"


def test_a_limit_that_the_call_is_above_is_named_before_one_that_lasts(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve(10, 10)
        return await caller.refusal(30, 10)

    assert on(server, a_tenant(tpm=20, monthly_nanos=10), scenario).limit == "tenant_tpm"


def test_an_answer_from_before_is_refused_by_requests_alone(server: RedisServer) -> None:
    """It would take no tokens: a budget that has not enough of them is not in its way."""
    fetch = Fetch("sc:{acme-corp}:a:x:1", "sc:{acme-corp}:a:x:1:lease", "sc:{acme-corp}:_used")
    server.client.set(fetch.entry, "an answer")

    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve(10)
        with pytest.raises(LimitError) as caught:
            await caller.limits.reserve(caller.call(), caller.tenant, 95, 0, fetch)
        return caught.value

    refused = on(server, a_tenant(rpm=1, concurrency=1, daily_tokens=100), scenario)
    assert (refused.limit, refused.should_retry) == ("tenant_rpm", None)


def test_a_refusal_tells_how_the_limits_stand(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> LimitError:
        await caller.reserve(10)
        return await caller.refusal(10)

    got = on(server, a_tenant(rpm=1, daily_tokens=100), scenario).rates
    assert (got.limit_requests, got.remaining_requests) == (1, 0)
    assert (got.limit_tokens, got.remaining_tokens) == (100, 90)
    assert 55 < got.reset_requests_seconds <= 61


@EACH_LIMIT
def test_a_refusal_takes_nothing_from_any_limit(server: RedisServer, limit: str) -> None:
    least = 1 if limit in ("rpm", "concurrency") else 150
    quota = EVERYTHING | {limit: least}

    async def scenario(caller: Caller) -> None:
        await caller.reserve(100, 100)
        for _ in range(20):
            assert (await caller.refusal(100, 100)).limit == f"tenant_{NAMES[limit]}"

    on(server, a_tenant(**quota), scenario, key=a_key(**EVERYTHING), tpm=10_000)
    assert Counters(server).all == Counters(server, f"_key.{KEY_ID}").all == (1, 100, 1, 100, 100, 100)
    assert Counters(server, "_global").tpm == 100
    assert len(records(server)) == 1


# --- settlement ---


def settled(server: RedisServer, *used: tuple[int, int]) -> Counters:
    """One call that reserves 100 tokens and 1000 nano-dollars of everything, settled once for each of `used`."""

    async def scenario(caller: Caller) -> None:
        reservation = await caller.reserve(100, 1000)
        for tokens, nanos in used:
            caller.limits.settle(reservation, tokens, nanos)

    on(server, a_tenant(**EVERYTHING), scenario, key=a_key(**EVERYTHING), tpm=1000)
    assert Counters(server).all == Counters(server, f"_key.{KEY_ID}").all
    assert Counters(server).tpm == Counters(server, "_global").tpm
    return Counters(server)


def test_settling_gives_back_what_was_not_used(server: RedisServer) -> None:
    assert settled(server, (30, 400)).all == (1, 30, 0, 30, 400, 400)


def test_settling_charges_what_was_used_above_the_estimate(server: RedisServer) -> None:
    assert settled(server, (170, 1500)).all == (1, 170, 0, 170, 1500, 1500)


def test_a_second_settlement_of_a_call_changes_nothing(server: RedisServer) -> None:
    assert settled(server, (30, 400), (30, 400), (500, 9000)).all == (1, 30, 0, 30, 400, 400)


def test_a_settled_call_leaves_no_record(server: RedisServer) -> None:
    settled(server, (30, 400))
    assert records(server) == []


def test_a_call_is_settled_once(server: RedisServer) -> None:
    settle = Script(server, "settle.lua")
    reserve = Script(server, "reserve.lua")
    now_us = START_SECOND * 1_000_000
    fixed = (ID_BEGINS, RECORD_SECONDS, LEASE_MS, 100, 900, 0, 2 * START_SECOND)
    reserve(now_us, ["call:a", "t", "whole"], *fixed, "tpm", 1000)
    answers = [settle(now_us, ["call:a", "t"], ID_BEGINS, 1, 130, 400, "tpm") for _ in range(2)]
    assert answers == [1, 0]
    assert server.client.hget("t", "sum") == "130"


def test_a_call_that_was_never_settled_stays_charged_at_its_estimate(server: RedisServer) -> None:
    counters = settled(server)
    server.client.delete(*records(server))
    assert counters.all == (1, 100, 1, 100, 1000, 1000)


def test_a_settlement_after_its_record_ran_out_leaves_the_estimate_and_ends_the_lease(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> None:
        reservation = await caller.reserve(100, 1000)
        server.client.delete(*records(server))
        caller.limits.settle(reservation, 30, 300)

    on(server, a_tenant(**EVERYTHING), scenario)
    assert Counters(server).all == (1, 100, 0, 100, 1000, 1000)


def test_a_call_over_midnight_is_settled_on_the_day_of_its_reservation(server: RedisServer) -> None:
    reserve, settle = Script(server, "reserve.lua"), Script(server, "settle.lua")
    midnight = (START_SECOND // DAY_SECONDS + 1) * DAY_SECONDS
    fixed = (ID_BEGINS, RECORD_SECONDS, LEASE_MS, 100, 0, midnight - DAY_SECONDS, midnight)
    reserve((midnight - 5) * 1_000_000, ["call:a", "first day", WHOLE], *fixed, "daily_tokens", 1000)
    settle((midnight + 5) * 1_000_000, ["call:a", "first day"], ID_BEGINS, 1, 30, 0, "daily_tokens")
    assert server.client.get("first day") == "30"
    assert server.client.ttl("first day") > 2 * DAY_SECONDS


@EACH_LIMIT
def test_counters_that_somebody_deleted_are_not_refunded_below_zero(server: RedisServer, limit: str) -> None:
    async def scenario(caller: Caller) -> None:
        reservation = await caller.reserve(100, 1000)
        server.client.delete(*server.client.keys(f"rl:{{acme-corp}}:{NAMES[limit]}*"))
        caller.limits.settle(reservation, 30, 300)
        await until(lambda: records(server) == [])
        caller.limits.settle(await caller.reserve(5, 50), 5, 50)

    on(server, a_tenant(**EVERYTHING), scenario)
    whole = {
        "rpm": 2, "tpm": 35, "concurrency": 0, "daily_tokens": 35, "daily_nanos": 350, "monthly_nanos": 350,
    }  # fmt: skip
    rest = {"rpm": 1, "tpm": 5, "concurrency": 0, "daily_tokens": 5, "daily_nanos": 50, "monthly_nanos": 50}
    assert Counters(server).all == tuple((whole | {limit: rest[limit]}).values())


@settings(max_examples=20, deadline=None)
@given(used=st.lists(st.integers(0, 300), min_size=1, max_size=30))
def test_counters_end_at_what_all_calls_used(shared: RedisServer, used: list[int]) -> None:
    not_just_before_midnight(5)
    shared.client.flushall()
    whole(shared)
    quota = {"rpm": 10_000, "tpm": 10**6, "concurrency": 10_000, "daily_tokens": 10**6, "daily_nanos": 10**15}

    async def scenario(caller: Caller) -> None:
        async def call(tokens: int) -> None:
            caller.limits.settle(await caller.reserve(100, 1000), tokens, tokens * 7)

        await asyncio.gather(*(call(tokens) for tokens in used))

    on(shared, a_tenant(**quota), scenario)
    total = sum(used)
    assert Counters(shared).all == (len(used), total, 0, total, 7 * total, 0)


# --- concurrency ---


def test_a_call_that_ended_makes_room_for_another_at_once(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> bool:
        first = await caller.reserve()
        assert not await caller.admitted()
        caller.limits.settle(first, 1, 0)
        return await caller.admitted()

    assert on(server, a_tenant(concurrency=1), scenario)


def test_a_lapsed_lease_gives_its_concurrency_back_and_keeps_its_charges(server: RedisServer) -> None:
    reserve = Script(server, "reserve.lua")
    keys = ["calls", "tokens", WHOLE]

    def call(name: str, now_ms: int) -> int:
        fixed = (ID_BEGINS, RECORD_SECONDS, LEASE_MS, 100, 0, 0, 2 * START_SECOND)
        arguments = ("concurrency", 1, "daily_tokens", 1000)
        return reserve((START_SECOND * 1000 + now_ms) * 1000, [f"call:{name}", *keys], *fixed, *arguments)[0]

    assert [call("a", 0), call("b", LEASE_MS - 1), call("c", LEASE_MS + 1)] == [1, 0, 1]
    assert (server.client.zrange("calls", 0, -1), server.client.get("tokens")) == (["c"], "200")


def test_a_call_keeps_its_place_for_as_long_as_its_replica_renews_it(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> tuple[int, float]:
        await caller.reserve()
        server.client.zadd("rl:{acme-corp}:concurrency", {"acme-corp-1": 1})  # about to lapse
        renewed = caller.limits.run_once()
        await until(lambda: server.client.zscore("rl:{acme-corp}:concurrency", "acme-corp-1") > 1)
        assert not await caller.admitted()
        return renewed, server.client.zscore("rl:{acme-corp}:concurrency", "acme-corp-1")

    renewed, lapses_ms = on(server, a_tenant(concurrency=1), scenario)
    assert renewed == 1
    assert abs(lapses_ms - time.time() * 1000 - LEASE_MS) < 5000


def test_a_call_that_ended_is_not_renewed(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> int:
        caller.limits.settle(await caller.reserve(), 1, 0)
        return caller.limits.run_once()

    assert on(server, a_tenant(concurrency=1), scenario) == 0


# --- budget days and months ---


@pytest.mark.parametrize(
    ("monthly", "time_zone", "now", "name", "begins", "ends"),
    [
        (False, "UTC", "2026-11-23T23:59:59Z", "20261123", "2026-11-23T00:00Z", "2026-11-24T00:00Z"),
        (False, "Asia/Kolkata", "2026-11-23T18:30Z", "20261124", "2026-11-23T18:30Z", "2026-11-24T18:30Z"),
        (True, "UTC", "2026-12-31T23:59:59Z", "202612", "2026-12-01T00:00Z", "2027-01-01T00:00Z"),
        (True, "America/New_York", "2026-11-01T03:59:59Z", "202610", "2026-10-01T04:00Z", "2026-11-01T04:00Z"),
        # 25 and 23 hours: clocks go back and forth.
        (False, "Europe/Berlin", "2026-10-25T12:00Z", "20261025", "2026-10-24T22:00Z", "2026-10-25T23:00Z"),
        (False, "Europe/Berlin", "2026-03-29T12:00Z", "20260329", "2026-03-28T23:00Z", "2026-03-29T22:00Z"),
        # Midnight itself is skipped: the day begins with the change.
        (False, "Africa/Cairo", "2026-04-24T12:00Z", "20260424", "2026-04-23T22:00Z", "2026-04-24T21:00Z"),
    ],
)  # fmt: skip
def test_a_budget_period_begins_and_ends_at_midnight_in_its_zone(
    monthly: bool, time_zone: str, now: str, name: str, begins: str, ends: str
) -> None:
    at, *both = (datetime.fromisoformat(text).timestamp() for text in (now, begins, ends))
    assert period(monthly, time_zone, at) == (name, *both)


@settings(max_examples=300, deadline=None)
@given(
    now=st.integers(1_700_000_000, 2_000_000_000),
    time_zone=st.sampled_from(["UTC", "Africa/Cairo", "America/Havana", "Asia/Beirut", "Australia/Lord_Howe"]),
    monthly=st.booleans(),
)
def test_periods_follow_each_other_without_gap_or_overlap(now: int, time_zone: str, monthly: bool) -> None:
    name, starts, ends = period(monthly, time_zone, now)
    assert starts <= now < ends
    assert period(monthly, time_zone, starts) == period(monthly, time_zone, ends - 1) == (name, starts, ends)
    assert period(monthly, time_zone, ends)[1] == ends


# --- keys ---


def test_every_key_expires(server: RedisServer) -> None:
    settled(server)
    settled(server, (170, 3000))
    assert {key for key in server.client.keys("*") if server.client.ttl(key) < 0} == {WHOLE}


names = st.from_regex(NAME, fullmatch=True)


@settings(max_examples=20, deadline=None)
@given(mine=names, other=names)
def test_no_key_of_one_tenant_is_touched_by_another(shared: RedisServer, mine: str, other: str) -> None:
    not_just_before_midnight(5)
    assume(mine != other)
    shared.client.flushall()
    whole(shared)
    quota = dict.fromkeys(EVERYTHING, 100) | {"rpm": 1}

    def of(tenant: str) -> dict[str, Any]:
        keys = [key for key in shared.client.keys("*") if key.startswith(f"rl:{{{tenant}}}:")]
        return {key: shared.client.dump(key) for key in keys}

    async def main() -> None:
        async with running(pipe_to(shared)) as pipe:
            limits = Limits(pipe, AMBIENT)
            held = await Caller(limits, a_tenant(mine, **quota)).reserve(90)
            before = of(mine)
            assert len(before) == 7
            stranger = Caller(limits, a_tenant(other, **quota))
            theirs = await stranger.reserve(90)
            assert theirs.rates.remaining_requests == 0
            limits.settle(theirs, 10, 0)
            await stranger.refusal(90)
            assert of(mine) == before
            assert set(shared.client.keys("*")) == {*of(mine), *of(other), WHOLE}
            limits.settle(held, 90, 0)

    run(main())


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
            ambient = Elsewhere(ahead_seconds)
            caller = Caller(Limits(pipe, ambient), a_tenant(rpm=9, daily_tokens=900), tpm=900)
            for _ in range(3):
                caller.limits.settle(await caller.reserve(100), 50, 0)

    run(main())
    assert (Counters(server).rpm, Counters(server).day_tokens, Counters(server, "_global").tpm) == (3, 150, 150)
    assert server.client.keys("rl:*:daily_tokens:*") == [f"rl:{{acme-corp}}:daily_tokens:{today()}"]


# --- the way there and back ---


def test_a_call_costs_one_round_trip_before_and_one_after(server: RedisServer) -> None:
    async def main() -> tuple[int, int]:
        async with running(pipe_to(server)) as pipe:
            caller = Caller(Limits(pipe, AMBIENT), a_tenant(**EVERYTHING), key=a_key(**EVERYTHING), tpm=10_000)
            caller.limits.settle(await caller.reserve(100), 50, 0)
            await pipe.execute("PING")
            before = server.client.info("stats")["total_reads_processed"]
            reservation = await caller.reserve(100)
            between = server.client.info("stats")["total_reads_processed"]
            caller.limits.settle(reservation, 50, 0)
            await until(lambda: records(server) == [])
            return between - before, len(records(server))

    # One read is the INFO's own.
    assert run(main()) == (2, 0)


def test_scripts_that_redis_forgot_are_back_within_the_call(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> None:
        caller.limits.settle(await caller.reserve(100, 100), 50, 50)
        server.client.script_flush()
        caller.limits.settle(await caller.reserve(100, 100), 50, 50)

    on(server, a_tenant(**EVERYTHING), scenario)
    assert Counters(server).all == (2, 100, 0, 100, 100, 100)


@pytest.mark.parametrize("turns", range(4))
def test_a_caller_who_hangs_up_during_the_reservation_leaves_nothing_reserved(server: RedisServer, turns: int) -> None:
    async def scenario(caller: Caller) -> None:
        call = asyncio.create_task(caller.reserve(100, 100))
        for _ in range(turns):
            await asyncio.sleep(0)
        if not call.cancel():  # Redis was quicker
            caller.limits.give_back(call.result())
        await asyncio.gather(call, return_exceptions=True)

    on(server, a_tenant(**EVERYTHING), scenario, away=OPEN, tpm=10_000)
    assert (*Counters(server).all, Counters(server, "_global").tpm, records(server)) == (0,) * 7 + ([],)


def test_a_thousand_calls_at_once_are_all_answered(server: RedisServer) -> None:
    async def scenario(caller: Caller) -> list[int | None]:
        reservations = await asyncio.gather(*(caller.reserve(10) for _ in range(1000)))
        return [reservation.rates.remaining_requests for reservation in reservations]

    remaining = on(server, a_tenant(rpm=1000, daily_tokens=10**6), scenario, tpm=10**6)
    assert sorted(remaining) == list(range(1000))
