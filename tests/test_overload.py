"""Overload: who is let in, who is refused first, how the event loop's delay is told from one long step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from app.ambient import Ambient, Patience
from app.api import FrontDoor, app
from app.auth import Callers
from app.config import PRIORITIES, WrittenOverload, load
from app.core import Exchange, Reply
from app.errors import Overloaded
from app.overload import FALL, RETRY_SECONDS, RISE, WINDOW_TICKS, Overload
from loadtest.processes import ROOT
from tests.gateway_parts import Clock, Rooms, ScriptedAnswer, call, completion, config, departed, headers_of, request
from tests.test_auth import NoTokens
from tests.test_front_door import Client, Source, headers, visit

LOW, NORMAL, HIGH = range(len(PRIORITIES))
LIMITS = WrittenOverload(max_calls=100, max_delay_ms=50)


class Chance(Clock):
    """Chance is what the test says."""

    said = 0.5

    def random(self) -> float:
        return self.said


@pytest.fixture
def chance() -> Chance:
    return Chance()


@pytest.fixture
def overload(chance: Chance) -> Overload:
    return Overload(config, chance, lambda late, tick: None)


def admits(overload: Overload, priority: int) -> bool:
    try:
        overload.admit(priority, LIMITS)
    except Overloaded:
        return False
    overload.leave()
    return True


# --- by how many there are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "admitted"),
    [
        (0, {LOW, NORMAL, HIGH}),
        (69, {LOW, NORMAL, HIGH}),
        (70, {NORMAL, HIGH}),
        (85, {HIGH}),
        (99, {HIGH}),
        (100, set()),
    ],
)
def test_the_least_urgent_are_refused_first(overload: Overload, calls: int, admitted: set[int]) -> None:
    overload.calls = calls
    assert {priority for priority in (LOW, NORMAL, HIGH) if admits(overload, priority)} == admitted


def test_refusals_are_counted_by_priority(overload: Overload) -> None:
    overload.calls = 80
    assert not admits(overload, LOW)
    assert overload.shed == [1, 0, 0]


def test_refused_clients_are_told_to_come_back_at_different_times(overload: Overload, chance: Chance) -> None:
    overload.calls = 100
    waits = []
    for chance.said in (0.0, 0.5, 0.999):
        with pytest.raises(Overloaded) as refused:
            overload.admit(HIGH, LIMITS)
        waits.append(refused.value.retry_after_seconds)
    assert waits == sorted(set(waits))
    assert 1 <= waits[0] < waits[-1] <= RETRY_SECONDS


def test_even_the_smallest_limit_lets_one_call_in(overload: Overload) -> None:
    overload.admit(LOW, WrittenOverload(max_calls=1))
    assert overload.calls == 1


# --- by how late the loop is ------------------------------------------------------------------------------------------


def late(overload: Overload, ticks: int, seconds: float = 0.2) -> None:
    for _ in range(ticks):
        overload.tick(seconds, 0.05)


def test_one_long_step_sheds_nobody(overload: Overload) -> None:
    late(overload, 1, 5.0)
    late(overload, 100, 0.001)
    assert overload.level == 0


def test_a_loop_that_is_late_for_a_whole_window_sheds_a_part_of_the_lowest(overload: Overload, chance: Chance) -> None:
    late(overload, WINDOW_TICKS + 2)
    assert 0 < overload.level < 1
    chance.said = 0.99
    assert admits(overload, LOW)
    chance.said = 0.0
    assert (admits(overload, LOW), admits(overload, NORMAL)) == (False, True)


def test_a_loop_that_stays_late_sheds_one_class_after_the_other(overload: Overload, chance: Chance) -> None:
    chance.said = 0.0
    seen = []
    for _ in range(60):
        late(overload, 1)
        shed = [priority for priority in (LOW, NORMAL, HIGH) if not admits(overload, priority)]
        if not seen or shed != seen[-1]:
            seen.append(shed)
    assert seen == [[], [LOW], [LOW, NORMAL], [LOW, NORMAL, HIGH]]


def test_no_class_more_is_shed_for_one_long_step(overload: Overload, chance: Chance) -> None:
    late(overload, 200, 0.02)
    assert overload.level == pytest.approx(1.0, abs=0.05)
    late(overload, 1, 5.0)
    chance.said = 0.0
    assert admits(overload, NORMAL)


def test_once_it_has_begun_each_late_tick_sheds_more_and_a_punctual_one_less(overload: Overload) -> None:
    late(overload, WINDOW_TICKS)
    before = overload.level
    for _ in range(5):  # every second tick is punctual, and yet the queue is there
        late(overload, 1)
        late(overload, 1, 0.001)
    assert overload.level == pytest.approx(before + 5 * (RISE - FALL))


@pytest.mark.parametrize(
    ("milliseconds", "shed"), [(9, []), (11, [LOW]), (26, [LOW, NORMAL]), (51, [LOW, NORMAL, HIGH])]
)
def test_the_less_urgent_are_shed_before_turns_are_long(
    overload: Overload, chance: Chance, milliseconds: float, shed: list[int]
) -> None:
    chance.said = 0.0
    late(overload, 200, milliseconds / 1000)
    assert [priority for priority in (LOW, NORMAL, HIGH) if not admits(overload, priority)] == shed


def test_a_loop_that_is_punctual_again_lets_all_in_again(overload: Overload, chance: Chance) -> None:
    late(overload, 60)
    late(overload, 200, 0.001)
    chance.said = 0.0
    assert all(admits(overload, priority) for priority in (LOW, NORMAL, HIGH))


def test_a_blocked_loop_is_noticed() -> None:
    """On a real loop: something that holds it for longer than the limit, time and again."""

    told: list[float] = []

    async def scenario() -> float:
        at = config()
        eager = msgspec.structs.replace(at.settings, overload=WrittenOverload(max_delay_ms=5))
        overload = Overload(
            lambda: msgspec.structs.replace(at, settings=eager), Ambient(), lambda late, tick: told.append(late)
        )
        task = asyncio.ensure_future(overload.run())
        while overload.level == 0:
            time.sleep(0.06)  # noqa: ASYNC251 - holding the loop is the point
            await asyncio.sleep(0)
        task.cancel()
        return overload.delay_seconds

    assert asyncio.run(asyncio.wait_for(scenario(), 30)) > 0.005
    assert max(told) > 0.005  # the histogram has it too


# --- on the way of a call ---------------------------------------------------------------------------------------------


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Rooms]:
    made = Rooms(tmp_path, ScriptedAnswer(completion()), ambient=Ambient())
    yield made
    made.spool.close()


def test_refused_call_is_told_when_to_retry_and_leaves_a_row(rooms: Rooms) -> None:
    rooms.overload.calls = 2000

    async def scenario() -> Reply:
        exchange = Exchange(call=call(request(), rooms.ambient), patience=Patience())
        return await departed(rooms.gateway, exchange)

    reply = asyncio.run(scenario())
    assert (reply.status, b'"code":"gateway_overloaded"' in reply.first) == (503, True)
    assert 1 <= int(headers_of(reply)["retry-after"]) <= RETRY_SECONDS
    row = rooms.row()
    assert (row["error_code"], row["attempts"], row["tenant_id"]) == ("gateway_overloaded", [], "acme-corp")


def test_refusal_waits_for_nothing(rooms: Rooms) -> None:
    """Neither for Redis nor for a vendor or the disk: where turns are long, a refusal takes one of them."""
    rooms.overload.calls = 2000
    client = Client(request(), headers())

    async def scenario() -> None:
        serving = client.visit(FrontDoor(Source(config()), rooms.gateway, Callers(NoTokens()), rooms.ambient))
        with pytest.raises(StopIteration):
            serving.send(None)

    asyncio.run(scenario())
    assert client.status == 503


def test_refused_call_takes_nothing_of_limits_and_room(rooms: Rooms) -> None:
    rooms.overload.calls = 2000
    visit(rooms, Client(request(), headers()))
    assert (rooms.limits.reserved, rooms.overload.calls) == ([], 2000)


@pytest.mark.parametrize("body", [request(), b"{"], ids=["answered", "refused"])
def test_call_gives_its_place_back(rooms: Rooms, body: bytes) -> None:
    visit(rooms, Client(body, headers()))
    assert rooms.overload.calls == 0


def test_health_stays_green(rooms: Rooms) -> None:
    rooms.overload.calls, rooms.overload.level = 10_000, 3.0
    door = FrontDoor(Source(config()), rooms.gateway, Callers(NoTokens()), rooms.ambient)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app(door))
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return [(await client.get(path)).status_code for path in ("/health", "/health/live", "/health/ready")]

    assert asyncio.run(ask()) == [200, 200, 200]


def test_priority_is_the_tenant_s_or_its_plan_s() -> None:
    tenants = load(ROOT / "config", "prod", require_secrets=False).tenants
    assert [tenants[name].priority for name in ("acme-free-trial", "acme-staging", "acme-corp")] == [LOW, NORMAL, HIGH]
