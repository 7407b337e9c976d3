"""How far a limit can be exceeded at worst: the formulas of runbooks/limits.md, as properties."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core import Reservation
from app.errors import LimitError
from app.limits import Limits
from app.limits.scopes import Scripts, make_scope
from app.limits.share import Share
from app.redis_pipe import Argument, OnError, RedisAway, RedisPipe
from tests.limits_parts import (
    KEY,
    SHARE,
    Caller,
    Counters,
    a_config,
    a_tenant,
    not_just_before_midnight,
    pipe_to,
    whole,
)
from tests.redis_parts import AMBIENT, RedisServer, redis_server, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Calls:
    """Calls against one budget: what they reserved and used, and how far it could have been exceeded."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.running: dict[int, tuple[Caller, Reservation, int, int]] = {}
        self.spent = 0
        self.bound = 0
        """The budget, and what the calls that ran at the last admission used above their reservations."""
        self.above = 0
        """What all calls used above their reservations."""
        self._made = 0

    async def begin(self, caller: Caller, reserved: int, used: int) -> None:
        self._made += 1
        number = self._made
        try:
            held = await caller.reserve(1, reserved, f"call-{number}")
        except LimitError:
            return
        self.running[number] = caller, held, reserved, used
        self.above += max(0, used - reserved)
        above = sum(max(0, used - reserved) for _, _, reserved, used in self.running.values())
        self.bound = max(self.bound, self.budget + above)

    def end(self, which: int) -> None:
        if self.running:
            caller, held, _, used = self.running.pop(list(self.running)[which % len(self.running)])
            caller.limits.settle(held, 1, used)
            self.spent += used


STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 120), st.integers(0, 99)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(budget=st.integers(1, 200), steps=STEPS)
def test_a_budget_is_exceeded_at_most_by_what_running_calls_use_above_their_reservations(
    server: RedisServer, budget: int, steps: list[tuple[bool, int, int, int]]
) -> None:
    not_just_before_midnight(5)
    server.client.flushall()
    whole(server)

    async def main() -> Calls:
        calls = Calls(budget)
        async with running(pipe_to(server)) as pipe:
            callers = [Caller(Limits(pipe, AMBIENT), a_tenant(monthly_nanos=budget)) for _ in range(3)]
            for begins, reserved, used, which in steps:
                if begins:
                    await calls.begin(callers[which % 3], reserved, used)
                else:
                    calls.end(which)
            while calls.running:
                calls.end(0)
            await pipe.execute("PING")
        return calls

    calls = asyncio.run(main())
    assert calls.spent <= calls.bound
    assert Counters(server).month_nanos == calls.spent


def test_the_formula_is_reached_so_it_cannot_be_lower(server: RedisServer) -> None:
    """Four calls run when the budget is reached, and each uses 30 above what it reserved."""
    server.client.flushall()
    whole(server)

    async def main() -> Calls:
        calls = Calls(100)
        async with running(pipe_to(server)) as pipe:
            caller = Caller(Limits(pipe, AMBIENT), a_tenant(monthly_nanos=100))
            for _ in range(5):
                await calls.begin(caller, 25, 55)
            while calls.running:
                calls.end(0)
        return calls

    calls = asyncio.run(main())
    assert (calls.spent, calls.bound) == (220, 100 + 4 * 30)


def test_calls_that_keep_to_their_reservations_never_exceed_a_budget(server: RedisServer) -> None:
    server.client.flushall()
    whole(server)

    async def main() -> Calls:
        calls = Calls(1000)
        async with running(pipe_to(server)) as pipe:
            caller = Caller(Limits(pipe, AMBIENT), a_tenant(monthly_nanos=1000))
            await asyncio.gather(*(calls.begin(caller, 37, 37) for _ in range(200)))
            while calls.running:
                calls.end(0)
        return calls

    assert asyncio.run(main()).spent == 27 * 37 <= 1000


# --- while Redis is away ---


class Cut(RedisPipe):
    """A pipe that the test cuts and joins."""

    cut = False

    def ask(self, command: bytes, key: Argument = "") -> asyncio.Future[Any]:
        self._reach()
        return super().ask(command, key)

    def tell(self, command: bytes, key: Argument = "", on_error: OnError | None = None) -> None:
        self._reach()
        super().tell(command, key, on_error)

    def _reach(self) -> None:
        if self.cut:
            raise RedisAway("cut")


@contextlib.asynccontextmanager
async def replicas(server: RedisServer, count: int, budget: int) -> AsyncIterator[list[tuple[Cut, Caller]]]:
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            pipe = await stack.enter_async_context(running(Cut(server.url, AMBIENT, timeout_ms=5000)))
            tenant = a_tenant(monthly_nanos=budget)
            made.append((pipe, Caller(Limits(pipe, AMBIENT), tenant, away=SHARE, replicas=count)))
        yield made


@settings(max_examples=100, deadline=None)
@given(
    budget=st.integers(1, 200),
    count=st.integers(1, 3),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["begin", "begin", "begin", "end", "cut", "join"]),
            st.integers(0, 60),
            st.integers(0, 120),
            st.integers(0, 99),
        ),
        max_size=60,
    ),
)
def test_each_outage_adds_at_most_the_shares_of_what_the_replicas_last_heard_was_left(
    server: RedisServer, budget: int, count: int, steps: list[tuple[str, int, int, int]]
) -> None:
    not_just_before_midnight(5)
    server.client.flushall()
    whole(server)

    async def main() -> tuple[int, int]:
        calls, shares = Calls(budget), 0
        async with replicas(server, count, budget) as made:
            for step, reserved, used, which in steps:
                pipe, caller = made[which % count]
                if step == "begin":
                    await calls.begin(caller, reserved, used)
                elif step == "end":
                    calls.end(which)
                elif step == "cut" and not pipe.cut:
                    pipe.cut = True
                    left = min(caller.limits._heard.values(), default=budget)
                    shares += max(0, left) // count
                elif step == "join" and pipe.cut:
                    await join(pipe, caller)
            while calls.running:
                calls.end(0)
            for pipe, caller in made:
                await join(pipe, caller)
                await pipe.execute("PING")
        return calls.spent, budget + calls.above + shares

    async def join(pipe: Cut, caller: Caller) -> None:
        pipe.cut = False
        for callback in pipe.on_return:
            callback()
        await caller.limits.budgets.run_once()

    spent, bound = asyncio.run(main())
    assert spent <= bound
    assert Counters(server).month_nanos == spent


@settings(max_examples=200, deadline=None)
@given(
    limit=st.integers(1, 30),
    count=st.integers(1, 4),
    kind=st.sampled_from(["rpm", "tpm"]),
    calls=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25), st.integers(1, 9)), max_size=80),
)
def test_replicas_without_redis_admit_together_at_most_a_rate_s_limit_in_60_seconds(
    limit: int, count: int, kind: str, calls: list[tuple[int, int, int]]
) -> None:
    """One each where there are more replicas than the limit has room for."""
    scope = make_scope(a_config(SHARE, replicas=count), a_tenant(**{kind: limit}), KEY, 0.0, Scripts(b"", b""))
    shares = [Share() for _ in range(count)]
    admitted: list[tuple[int, int]] = []
    second = 1000
    for which, passed, tokens in calls:
        second += passed
        share = shares[which % count]
        amount = 1 if kind == "rpm" else tokens
        if share.left(scope, count, {}, {}, second)[0] >= amount:
            share.take(scope, tokens, 0, second)
            admitted.append((second, amount))
        within = sum(amount for at, amount in admitted if at >= second - 60)
        assert within <= max(limit, count)


def test_a_process_that_starts_without_redis_has_a_share_of_the_whole(tmp_path: Path) -> None:
    async def main() -> int:
        caller = Caller(Limits(pipe_to(RedisServer(tmp_path)), AMBIENT), a_tenant(monthly_nanos=100), away=SHARE)
        return sum([await caller.admitted(1, 10) for _ in range(10)])

    assert asyncio.run(main()) == 5
