"""A Redis that was emptied in mid-month, or is new: its daily and monthly counters come back from the ledger."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.config import Config, Quota, Tenant
from app.core import Cost, Usage
from app.limits import Limits
from app.limits.budgets import EPOCH, HELD_SECONDS, LATE_SECONDS, REBUILDING, Spent
from app.limits.scopes import WHOLE, period
from app.reports.spent import SpentReader
from tests.ledger_parts import Postgres, an_event, running_postgres
from tests.limits_parts import (
    BRIEFLY_MS,
    OPEN,
    SHARE,
    Caller,
    Counters,
    a_config,
    a_key,
    a_tenant,
    limits_on,
    not_just_before_midnight,
    whole,
)
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, until
from tests.test_rollup import record

BUDGETS = {"daily_tokens": 1000, "daily_nanos": 10_000, "monthly_nanos": 10_000}
ACME = a_tenant(**BUDGETS)


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[RedisServer]:
    """An empty Redis without the mark that it is whole."""
    not_just_before_midnight(15)
    with redis_server(tmp_path) as server:
        yield server


class Ledger:
    """What was spent before a moment, as the test says; `asked` has the moments."""

    def __init__(self, *spent: Spent, away: bool = False) -> None:
        self.spent = list(spent)
        self.away = away
        self.asked: list[int] = []

    async def __call__(self, before: int, starts: Mapping[str, tuple[int, int]]) -> list[Spent] | None:
        self.asked.append(before)
        return None if self.away else self.spent


def spent(
    tokens: int, day: int, month: int, *, owner: str = "tenant", id: str = "acme-corp", time_zone: str = "UTC"
) -> Spent:
    return Spent(owner, id, time_zone, tokens, day, month)  # type: ignore[arg-type]


def configured(*tenants: Tenant, plans: Mapping[str, Tenant] | None = None, **key: Any) -> Callable[[], Config]:
    keys = {b"": a_key(**key)}
    config = msgspec.structs.replace(
        a_config(), tenants={tenant.id: tenant for tenant in tenants}, keys=keys, plans=plans or {}
    )
    return lambda: config


async def rebuilt(limits: Limits, server: RedisServer) -> None:
    await until(lambda: server.client.exists(WHOLE))
    await until(lambda: limits.budgets.made_good)


def budgets(server: RedisServer, tag: str = "acme-corp") -> tuple[int, int, int]:
    counters = Counters(server, tag)
    return counters.day_tokens, counters.day_nanos, counters.month_nanos


# --- from the ledger ---


def test_a_redis_that_is_emptied_in_mid_month_gets_its_budgets_back(frail: RedisServer) -> None:
    ledger = Ledger(spent(900, 5000, 9990), spent(7, 70, 700, owner="key", id="k3f9a0b1c2d4"))

    async def main() -> str | None:
        async with limits_on(frail, current=configured(ACME, **BUDGETS), read_spent=ledger) as limits:
            await rebuilt(limits, frail)
            caller = Caller(limits, ACME, key=a_key(**BUDGETS), away=SHARE)
            frail.client.flushall()
            await caller.admitted(1, 1)
            await rebuilt(limits, frail)
            return (await caller.refusal(1, 11)).limit

    assert run(main()) == "tenant_monthly_usd"
    assert len(ledger.asked) == 2
    assert budgets(frail, "_key.k3f9a0b1c2d4") >= (7, 70, 700)


def test_until_the_budgets_are_back_the_policy_for_redis_away_holds(frail: RedisServer) -> None:
    ledger = Ledger(away=True)

    async def main() -> tuple[list[bool], list[bool]]:
        async with limits_on(frail, current=configured(ACME), read_spent=ledger) as limits:
            await until(lambda: ledger.asked)
            without = Caller(limits, a_tenant("no-budgets", rpm=10), away=SHARE)
            held = [(await without.reserve()).held]
            caller = Caller(limits, ACME, away=SHARE)
            return [await caller.admitted(200) for _ in range(4)], held

    assert run(main()) == ([True, True, False, False], [True])


def test_a_ledger_that_is_away_is_asked_again_and_logged_once(
    frail: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app.limits")
    ledger = Ledger(spent(900, 0, 0), away=True)

    async def main() -> None:
        async with limits_on(frail, current=configured(ACME), read_spent=ledger) as limits:
            await until(lambda: len(ledger.asked) == 2)
            ledger.away = False
            await rebuilt(limits, frail)

    run(main())
    assert Counters(frail).day_tokens == 900
    assert [line.getMessage()[:43] for line in caplog.records] == [
        "redis has no budgets: they are rebuilt from",
        "redis has no budgets, and the ledger cannot",
        "budgets are whole again in redis",
    ]


def test_without_a_ledger_budgets_begin_at_nothing(frail: RedisServer) -> None:
    async def main() -> bool:
        async with limits_on(frail) as limits:
            await rebuilt(limits, frail)
            return (await Caller(limits, ACME).reserve()).held

    assert run(main())


def test_of_many_replicas_one_rebuilds(frail: RedisServer) -> None:
    ledger = Ledger(spent(900, 0, 0))

    async def main() -> None:
        options = {"current": configured(ACME), "read_spent": ledger}
        async with limits_on(frail, **options) as one, limits_on(frail, **options) as two, limits_on(frail, **options):
            await rebuilt(one, frail)
            await rebuilt(two, frail)

    run(main())
    assert (len(ledger.asked), Counters(frail).day_tokens) == (1, 900)


def test_a_replica_that_died_over_the_rebuilding_is_replaced(frail: RedisServer) -> None:
    ledger = Ledger(spent(900, 0, 0))
    epoch = int(time.time()) - 5
    frail.client.set(REBUILDING, 1, px=1500)
    frail.client.set(EPOCH, epoch)

    async def main() -> None:
        async with limits_on(frail, current=configured(ACME), read_spent=ledger) as limits:
            await rebuilt(limits, frail)

    run(main())
    assert (ledger.asked, Counters(frail).day_tokens) == ([epoch], 900)
    assert (frail.client.get(WHOLE), frail.client.exists(EPOCH)) == (str(epoch), 0)


def test_a_replica_that_rebuilds_for_long_keeps_its_mark(frail: RedisServer) -> None:
    class Slow(Ledger):
        async def __call__(self, before: int, starts: Mapping[str, tuple[int, int]]) -> list[Spent] | None:
            frail.client.expire(REBUILDING, HELD_SECONDS // 2)
            await until(lambda: frail.client.ttl(REBUILDING) > HELD_SECONDS // 2)
            return await super().__call__(before, starts)

    async def main() -> None:
        async with limits_on(frail, current=configured(ACME), read_spent=Slow(spent(900, 0, 0))) as limits:
            await rebuilt(limits, frail)
            await until(lambda: not frail.client.exists(REBUILDING))

    run(main())
    assert Counters(frail).day_tokens == 900


def test_a_counter_that_an_operator_deletes_with_the_mark_is_counted_from_the_ledger(frail: RedisServer) -> None:
    ledger = Ledger(spent(900, 70, 700))

    async def main() -> None:
        async with limits_on(frail, current=configured(ACME), read_spent=ledger) as limits:
            await rebuilt(limits, frail)
            limits.settle(await Caller(limits, ACME).reserve(50, 5), 50, 5)
            await limits.pipe.execute("PING")
            await asyncio.sleep(1.1)  # an epoch is a second, and the next rebuilding has another
            ledger.spent = [spent(950, 75, 705)]
            frail.client.delete(f"rl:{{acme-corp}}:monthly_usd:{datetime.now(UTC):%Y%m}", WHOLE)
            await rebuilt(limits, frail)

    run(main())
    assert budgets(frail) == (950, 75, 705)


def test_a_redis_that_lost_nothing_is_left_as_it_is(frail: RedisServer) -> None:
    ledger = Ledger(spent(900, 0, 0))

    async def main() -> None:
        async with limits_on(whole(frail), current=configured(ACME), read_spent=ledger) as limits:
            await Caller(limits, ACME).reserve(10)
            await limits.budgets.run_once()

    run(main())
    assert (ledger.asked, Counters(frail).day_tokens) == ([], 10)


def test_a_counter_that_survived_is_not_added_to(frail: RedisServer) -> None:
    frail.client.set(f"rl:{{acme-corp}}:daily_tokens:{datetime.now(UTC):%Y%m%d}", 950)

    async def main() -> None:
        async with limits_on(frail, current=configured(ACME), read_spent=Ledger(spent(900, 70, 700))) as limits:
            await rebuilt(limits, frail)

    run(main())
    assert budgets(frail) == (950, 70, 700)


def test_budgets_come_back_by_the_days_of_their_time_zone(frail: RedisServer) -> None:
    tenants = [a_tenant("east", **BUDGETS, time_zone="Pacific/Kiritimati"), a_tenant("west", **BUDGETS)]
    ledger = Ledger(
        spent(1, 10, 100, id="east", time_zone="Pacific/Kiritimati"),
        spent(9, 90, 900, id="east"),
        spent(2, 20, 200, id="west"),
    )

    async def main() -> None:
        async with limits_on(frail, current=configured(*tenants), read_spent=ledger) as limits:
            await rebuilt(limits, frail)

    run(main())
    east = period(False, "Pacific/Kiritimati", time.time())[0]
    assert frail.client.get(f"rl:{{east}}:daily_tokens:{east}") == "1"
    assert budgets(frail, "west") == (2, 20, 200)


def test_a_tenant_that_only_tokens_name_gets_its_budgets_back_too(frail: RedisServer) -> None:
    plans = {"free": Tenant("free", "free", "free", None, Quota(**BUDGETS))}

    async def main() -> None:
        current = configured(plans=plans)
        async with limits_on(frail, current=current, read_spent=Ledger(spent(5, 50, 500, id="stranger"))) as limits:
            await rebuilt(limits, frail)

    run(main())
    assert budgets(frail, "stranger") == (5, 50, 500)


# --- nothing twice, nothing never ---


def test_rows_that_come_later_are_added_once(frail: RedisServer) -> None:
    ledger = Ledger(spent(900, 70, 700))

    async def main() -> None:
        async with limits_on(frail, current=configured(ACME), read_spent=ledger) as limits:
            await rebuilt(limits, frail)
            caller = Caller(limits, ACME)
            limits.settle(await caller.reserve(10, 10), 20, 20)
            ledger.spent = [spent(930, 75, 705)]
            for _ in range(3):
                limits.budgets._late.appendleft(0.0)
                await limits.budgets.run_once()
            assert len(limits.budgets._late) == len(LATE_SECONDS) + 1

    run(main())
    assert budgets(frail) == (950, 95, 725)


def test_late_rows_of_one_rebuilding_are_not_put_into_a_redis_that_was_emptied_again(frail: RedisServer) -> None:
    class Emptying(Ledger):
        """Redis loses all while the late rows are summed, and nobody has rebuilt it yet."""

        async def __call__(self, before: int, starts: Mapping[str, tuple[int, int]]) -> list[Spent] | None:
            if self.asked:
                frail.client.flushall()
                frail.client.set(REBUILDING, 1)
            return await super().__call__(before, starts)

    ledger = Emptying(spent(900, 70, 700))

    async def main() -> None:
        async with limits_on(frail, current=configured(ACME), read_spent=ledger) as limits:
            await rebuilt(limits, frail)
            limits.budgets._late.appendleft(0.0)
            await limits.budgets.run_once()

    run(main())
    assert len(ledger.asked) == 2
    assert budgets(frail) == (0, 0, 0)


@pytest.mark.parametrize("ahead_seconds", [-5, 5])
def test_a_call_without_redis_is_charged_by_its_replica_or_by_the_ledger_and_never_by_both(
    frail: RedisServer, ahead_seconds: int
) -> None:
    """A call that began before the epoch is in the ledger's sums, or will be; a later one is its replica's to pay."""

    async def main() -> None:
        async with limits_on(frail, BRIEFLY_MS, read_spent=Ledger(), current=configured(ACME)) as limits:
            await rebuilt(limits, frail)
            frail.freeze()
            caller = Caller(limits, ACME, away=OPEN)
            for _ in range(2):
                limits.settle(await caller.reserve(100, 100), 30, 40)
            began = int(caller.call().received_at)
            frail.thaw()
            frail.client.set(WHOLE, began - ahead_seconds)
            await until(lambda: limits.pipe.up)
            await limits.budgets.run_once()
            await limits.pipe.execute("PING")

    run(main())
    assert budgets(frail) == ((60, 80, 80) if ahead_seconds > 0 else (0, 0, 0))


def test_a_call_that_redis_forgot_with_everything_else_is_the_ledger_s(frail: RedisServer) -> None:
    async def main() -> None:
        ledger = Ledger()
        async with limits_on(frail, current=configured(ACME), read_spent=ledger) as limits:
            await rebuilt(limits, frail)
            held = await Caller(limits, ACME).reserve(100, 100)
            frail.client.flushall()
            ledger.spent = [spent(40, 50, 60)]
            await limits.budgets.run_once()
            limits.settle(held, 40, 50)
            await limits.pipe.execute("PING")

    run(main())
    assert budgets(frail) == (40, 50, 60)


# --- the sums themselves, on a real PostgreSQL ---


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


MIDNIGHT = 1_764_028_800.0  # 2025-11-25T00:00Z


def read(url: str, before: float, zones: Mapping[str, tuple[int, int]]) -> set[Spent] | None:
    found = asyncio.run(SpentReader(url, lambda: "dev", AMBIENT)(int(before), zones))
    return None if found is None else set(found)


def test_the_ledger_is_summed_by_tenant_and_key_for_the_day_and_the_month(postgres: Postgres) -> None:
    url = postgres.database()
    each = {"usage": Usage(input=30, output=10), "cost": Cost(1, 2)}
    record(
        url,
        [
            an_event(at=MIDNIGHT + 5, **each),
            an_event(at=MIDNIGHT + 6, tenant="other", **each),
            an_event(at=MIDNIGHT - 1, **each),  # yesterday
            an_event(at=MIDNIGHT - 30 * 86_400, **each),  # last month
            an_event(at=MIDNIGHT + 100, **each),  # after the moment
            an_event(at=MIDNIGHT + 7, environment="prod", **each),
            an_event(at=MIDNIGHT + 8, tenant=None, **each),  # nobody's
        ],
    )
    utc = {"UTC": (int(MIDNIGHT), int(MIDNIGHT) - 24 * 86_400)}
    assert read(url, MIDNIGHT + 100, utc) == {
        spent(40, 3, 6),
        spent(40, 3, 3, id="other"),
        spent(80, 6, 9, owner="key", id="k3f9a0b1c2d4"),
    }


def test_each_time_zone_has_its_own_sums(postgres: Postgres) -> None:
    url = postgres.database()
    record(url, [an_event(at=MIDNIGHT - 3600, usage=Usage(input=5), cost=Cost(1, 0))])
    zones = {
        zone: (period(False, zone, MIDNIGHT)[1], period(True, zone, MIDNIGHT)[1]) for zone in ("UTC", "Asia/Tokyo")
    }
    found = read(url, MIDNIGHT, zones)
    assert {(each.time_zone, each.day_tokens) for each in found if each.owner == "tenant"} == {
        ("UTC", 0),
        ("Asia/Tokyo", 5),
    }


def test_a_database_without_a_ledger_has_no_spending(postgres: Postgres) -> None:
    assert read(postgres.database(), MIDNIGHT, {"UTC": (0, 0)}) == set()


def test_a_database_that_is_away_is_not_taken_for_an_empty_one(caplog: pytest.LogCaptureFixture) -> None:
    url = "postgresql://u:hush@127.0.0.1:1/d"
    assert read(url, MIDNIGHT, {"UTC": (0, 0)}) is None
    assert "hush" not in caplog.text
