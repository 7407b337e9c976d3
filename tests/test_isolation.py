"""What one tenant or service key does changes nothing for another: against a model of each owner by itself.

A case is one reservation or settlement, compared with what its own owners' history alone says. `make drills` runs ten
times as many as `make test`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import Struct, field

from app.config import NAME, Quota, ServiceKey, Tenant
from app.core import Rates, Reservation
from app.errors import LimitError
from app.limits import Limits
from app.limits.scopes import WHOLE
from tests.limits_parts import SHARE, Caller, Counters, not_just_before_midnight, pipe_to, whole
from tests.redis_parts import AMBIENT, RedisServer, redis_server, running

CASES = int(os.environ.get("ISOLATION_CASES", "10000"))
ROUND = 250
"""Cases of one set of owners: over long before the first leaves a window of 60 seconds."""
SECONDS_OF_A_ROUND = 30.0
ALIKE = [
    *("a", "A", "a.b", "a-b", "a_b", "a.b.c", "ab", "aa", "a.", "a-", "0", "00", "0.0", "global", "key.a", "rpm"),
    *("a.rpm", "a.call", "a.daily_tokens", "a.concurrency", "x" * 63, "x" * 64, "k3f9a0b1c2d4", "key.k3f9a0b1c2d4"),
]
"""Names that are parts, prefixes or neighbours of one another, of keys, and of other owners' tags."""


class Owner(Struct):
    """A tenant or a key by itself: what it may use, and what its own calls have taken."""

    quota: Quota
    requests: int = 0
    tokens: int = 0
    nanos: int = 0
    running: set[str] = field(default_factory=set)

    def admits(self, tokens: int, nanos: int) -> bool:
        quota = self.quota
        wanted = [
            (quota.rpm, self.requests + 1),
            (quota.tpm, self.tokens + tokens),
            (quota.concurrency, len(self.running) + 1),
            (quota.daily_tokens, self.tokens + tokens),
            (quota.daily_nanos, self.nanos + nanos),
            (quota.monthly_nanos, self.nanos + nanos),
        ]
        return all(limit is None or amount <= limit for limit, amount in wanted)

    def take(self, call_id: str, tokens: int, nanos: int) -> None:
        self.requests += 1
        self.tokens += tokens
        self.nanos += nanos
        self.running.add(call_id)

    def end(self, call_id: str, tokens: int, nanos: int) -> None:
        self.tokens += tokens
        self.nanos += nanos
        self.running.discard(call_id)

    @property
    def counted(self) -> tuple[int, ...]:
        """As `Counters.all` has it: what is not limited is not counted."""
        quota = self.quota
        return tuple(
            0 if limit is None else amount
            for limit, amount in (
                (quota.rpm, self.requests),
                (quota.tpm, self.tokens),
                (quota.concurrency, len(self.running)),
                (quota.daily_tokens, self.tokens),
                (quota.daily_nanos, self.nanos),
                (quota.monthly_nanos, self.nanos),
            )
        )

    def remaining(self) -> tuple[int | None, int | None]:
        quota = self.quota
        tokens = [limit - self.tokens for limit in (quota.tpm, quota.daily_tokens) if limit is not None]
        return None if quota.rpm is None else quota.rpm - self.requests, min(tokens, default=None)


def a_quota(chance: random.Random) -> Quota:
    def limit(most: int) -> int | None:
        return chance.choice([None, chance.randint(1, most)])

    return Quota(limit(40), limit(4000), limit(12), limit(6000), limit(60_000), limit(60_000))


class Round:
    """Some owners, and cases among them."""

    def __init__(self, chance: random.Random, limits: Limits) -> None:
        self.chance = chance
        self.limits = limits
        self.tenants = {name: Owner(a_quota(chance)) for name in chance.sample(ALIKE, 5)}
        self.keys = {
            id: Owner(a_quota(chance)) for id in chance.sample(["k3f9a0b1c2d4", "a" * 12, "0" * 12, "key000000000"], 2)
        }
        self.callers = {
            (tenant, key): Caller(
                limits,
                Tenant(tenant, "p", "p", None, self.tenants[tenant].quota),
                key=ServiceKey(key, "s", None, None, quota=self.keys[key].quota),
                away=SHARE,
                replicas=1,
            )
            for tenant in self.tenants
            for key in self.keys
        }
        self.open: list[tuple[str, str, str, Reservation, int, int]] = []

    async def case(self, number: int) -> None:
        chance = self.chance
        if self.open and chance.random() < 0.4:
            self.settle(*self.open.pop(chance.randrange(len(self.open))))
            return
        (tenant, key), caller = chance.choice(list(self.callers.items()))
        owners = self.tenants[tenant], self.keys[key]
        call_id, tokens, nanos = f"call-{number}", chance.randint(0, 400), chance.randint(0, 4000)
        expected = all(owner.admits(tokens, nanos) for owner in owners)
        held = None
        with contextlib.suppress(LimitError):
            held = await caller.reserve(tokens, nanos, call_id)
        assert (held is not None) == expected, f"{tenant} by {key}: {tokens} tokens and {nanos} nano-dollars"
        if held is None:
            return
        for owner in owners:
            owner.take(call_id, tokens, nanos)
        self.see(held.rates, owners)
        self.open.append((tenant, key, call_id, held, tokens, nanos))

    def see(self, rates: Rates | None, owners: tuple[Owner, ...]) -> None:
        """None is told where there is no limit at all."""
        for place, told in enumerate((rates.remaining_requests, rates.remaining_tokens) if rates else (None, None)):
            left = [left for owner in owners if (left := owner.remaining()[place]) is not None]
            assert told == (max(0, min(left)) if left else None)

    def settle(self, tenant: str, key: str, call_id: str, held: Reservation, tokens: int, nanos: int) -> None:
        used_tokens, used_nanos = self.chance.randint(0, 500), self.chance.randint(0, 5000)
        self.limits.settle(held, used_tokens, used_nanos)
        for owner in (self.tenants[tenant], self.keys[key]):
            owner.end(call_id, used_tokens - tokens, used_nanos - nanos)

    @property
    def tags(self) -> dict[str, Owner]:
        return self.tenants | {f"_key.{id}": owner for id, owner in self.keys.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def test_names_that_are_alike_are_names() -> None:
    assert [name for name in ALIKE if not NAME.fullmatch(name)] == []


@pytest.mark.timeout(3600)
def test_each_owner_is_admitted_by_its_own_history_alone(server: RedisServer) -> None:
    seed = random.randrange(2**32)

    async def rounds() -> None:
        pipe = pipe_to(server)
        Limits(pipe, AMBIENT)  # scripts that are known are loaded on connecting; else what is sent later overtakes them
        async with running(pipe):
            for number in range(0, CASES, ROUND):
                not_just_before_midnight(SECONDS_OF_A_ROUND)
                server.client.flushall()
                whole(server)
                limits = Limits(pipe, AMBIENT)
                pipe.on_return.clear()  # those of the rounds before
                chance = random.Random(seed + number)
                round = Round(chance, limits)
                for case in range(ROUND):
                    await round.case(case)
                await pipe.execute("PING")
                for tag, owner in round.tags.items():
                    assert Counters(server, tag).all == owner.counted, tag
                prefixes = tuple(f"rl:{{{tag}}}:" for tag in round.tags)
                assert {key for key in server.client.keys("*") if not key.startswith(prefixes)} == {WHOLE}

    try:
        asyncio.run(rounds())
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.timeout(3600)
def test_without_redis_too_each_owner_is_admitted_by_its_own_history_alone(tmp_path: Path) -> None:
    """The only replica's share is the whole, so that the same model holds."""
    seed = random.randrange(2**32)

    async def rounds() -> None:
        for number in range(0, CASES, ROUND):
            not_just_before_midnight(SECONDS_OF_A_ROUND)
            round = Round(random.Random(seed + number), Limits(pipe_to(RedisServer(tmp_path)), AMBIENT))
            for case in range(ROUND):
                await round.case(case)

    try:
        asyncio.run(rounds())
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
