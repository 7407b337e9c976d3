"""What rests, until when, and which of a vendor's keys is asked meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.ambient import Ambient
from app.config import UNLIMITED, Credential, Secret, Target, VendorKey, WrittenBreaker
from app.control import Control, Entry
from app.cooldowns import BREAKER, DOUBTS, FORGOTTEN_SECONDS, MAX_SECONDS, Cooldowns, another, is_resting, pick, rests
from app.errors import VendorError, VendorFailed, VendorMisconfigured, VendorRefused, VendorThrottled, VendorTimeout
from app.redis_pipe import RedisPipe
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running, until
from tests.translation import target


class Clock(Ambient):
    at = 1_000.0

    def now(self) -> float:
        return self.at


def key(name: str, weight: int = 1) -> VendorKey:
    return VendorKey(f"openai:{name}", Credential(Secret(name)), weight, UNLIMITED)


def pooled(*keys: VendorKey) -> Target:
    made = target("openai", "gpt")
    return replace(made, provider=replace(made.provider, keys=keys))


MAIN, SPARE = key("main"), key("spare")
POOL = pooled(MAIN, SPARE)


# --- until when -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cooldowns(clock: Clock) -> Cooldowns:
    return Cooldowns(clock)


def test_a_name_rests_until_its_time(cooldowns: Cooldowns, clock: Clock) -> None:
    cooldowns.rest("target:a", 10.0, "failed")
    clock.at += 9.9
    assert cooldowns.resting() == {"target:a"}
    clock.at += 0.1
    assert cooldowns.resting() == frozenset()


def test_the_later_end_of_two_rests_counts(cooldowns: Cooldowns, clock: Clock) -> None:
    cooldowns.rest("target:a", 10.0, "failed")
    cooldowns.rest("target:a", 5.0, "failed")
    clock.at += 7.0
    assert cooldowns.resting() == {"target:a"}


def test_what_another_replica_told_counts_where_it_ends_later(cooldowns: Cooldowns, clock: Clock) -> None:
    cooldowns.rest("target:a", 5.0, "failed")
    cooldowns.heard("target:a", Entry(value="throttled", by="other", at="", until=clock.at + 10.0))
    cooldowns.heard("target:a", Entry(value="throttled", by="third", at="", until=clock.at + 1.0))
    clock.at += 7.0
    assert cooldowns.resting() == {"target:a"}


def test_a_rest_that_is_taken_back_ends(cooldowns: Cooldowns) -> None:
    cooldowns.rest("target:a", 10.0, "failed")
    cooldowns.heard("target:a", Entry(value=None, by="operator", at=""))
    assert cooldowns.resting() == frozenset()


def test_a_vendor_cannot_put_itself_to_sleep_for_long(cooldowns: Cooldowns, clock: Clock) -> None:
    cooldowns.rest("target:a", 10 * MAX_SECONDS, "throttled")
    clock.at += MAX_SECONDS
    assert cooldowns.resting() == frozenset()


# --- what rests after which failure -----------------------------------------------------------------------------------

AT = "openai/gpt"


@pytest.mark.parametrize(
    ("error", "alone", "of_pool"),
    [
        (VendorMisconfigured("x", vendor_status=401), (f"target:{AT}", 30.0), ("key:openai:main", 30.0)),
        (VendorMisconfigured("x", vendor_status=402), (f"target:{AT}", 30.0), ("key:openai:main", 30.0)),
        (VendorMisconfigured("x", vendor_status=403), (f"target:{AT}", 30.0), (f"key:openai:main:{AT}", 30.0)),
        (VendorMisconfigured("x", vendor_status=404), (f"target:{AT}", 30.0), (f"target:{AT}", 30.0)),
        (VendorThrottled("x", retry_after_seconds=7.0), (f"target:{AT}", 7.0), (f"key:openai:main:{AT}", 7.0)),
        (VendorThrottled("x"), ("", 0.0), ("", 0.0)),
        (VendorFailed("x", retry_after_seconds=7.0), ("", 0.0), ("", 0.0)),
        (VendorTimeout("x"), ("", 0.0), ("", 0.0)),
    ],
)
def test_what_rests_after_a_failure(error: VendorError, alone: tuple[str, float], of_pool: tuple[str, float]) -> None:
    assert rests(error, target("openai", "gpt"), None, 30.0) == alone
    assert rests(error, POOL, MAIN, 30.0) == of_pool


FORBIDDEN, UNKNOWN, REFUSED = (VendorMisconfigured("x", vendor_status=status) for status in (403, 404, 401))


@pytest.mark.parametrize("error", [FORBIDDEN, UNKNOWN])
@pytest.mark.parametrize("key", [None, MAIN])
def test_what_a_request_may_have_met_alone_is_held_against_no_target_that_answers(
    cooldowns: Cooldowns, error: VendorMisconfigured, key: VendorKey | None
) -> None:
    cooldowns.worked(POOL, key)
    for _ in range(5):
        assert [cooldowns.doubtful(POOL, key, error) for _ in range(DOUBTS - 1)] == [True] * (DOUBTS - 1)
        cooldowns.worked(POOL, key)


def test_many_in_a_row_are_of_the_target_and_so_is_each_one_after(cooldowns: Cooldowns) -> None:
    cooldowns.worked(POOL, MAIN)
    assert [cooldowns.doubtful(POOL, MAIN, UNKNOWN) for _ in range(DOUBTS + 3)] == [True] * (DOUBTS - 1) + [False] * 4


def test_a_target_that_never_answered_gets_no_benefit_of_the_doubt(cooldowns: Cooldowns) -> None:
    cooldowns.worked(POOL, SPARE)
    assert [cooldowns.doubtful(POOL, MAIN, UNKNOWN), cooldowns.doubtful(POOL, None, UNKNOWN)] == [False, False]


def test_a_credential_that_is_refused_is_beyond_doubt(cooldowns: Cooldowns) -> None:
    cooldowns.worked(POOL, MAIN)
    assert not cooldowns.doubtful(POOL, MAIN, REFUSED)


@pytest.mark.parametrize(
    ("resting", "whole"),
    [
        ({"key:openai:main"}, False),
        ({"key:openai:main", "key:openai:spare"}, True),
        ({"key:openai:main", f"key:openai:spare:{AT}"}, True),
        ({"key:openai:main", "key:openai:spare:openai/other"}, False),
        ({f"target:{AT}"}, True),
    ],
)
def test_a_target_rests_with_the_last_of_its_keys(resting: set[str], whole: bool) -> None:
    assert is_resting(POOL, frozenset(resting)) is whole


# --- which key --------------------------------------------------------------------------------------------------------


def test_keys_are_asked_by_weight() -> None:
    weighted = pooled(key("main", 3), key("spare", 1))
    picked = [pick(weighted, frozenset(), [], chance).name for chance in (0.0, 0.74, 0.76, 0.99)]
    assert picked == ["openai:main", "openai:main", "openai:spare", "openai:spare"]


def test_a_resting_key_is_not_asked() -> None:
    assert pick(POOL, frozenset({"key:openai:main"}), [], 0.0) is SPARE


def test_a_key_that_was_tried_is_not_asked_again_while_another_is_left() -> None:
    assert pick(POOL, frozenset(), ["openai:main"], 0.0) is SPARE


def test_where_all_were_tried_one_that_does_not_rest_is_asked_again() -> None:
    assert pick(POOL, frozenset({"key:openai:main"}), ["openai:main", "openai:spare"], 0.0) is SPARE


def test_where_all_rest_one_is_asked_all_the_same() -> None:
    assert pick(POOL, frozenset({"key:openai:main", "key:openai:spare"}), [], 0.0) is MAIN


@given(st.floats(0, 1, exclude_max=True), st.lists(st.integers(1, 1000), min_size=1, max_size=5))
def test_a_pool_always_gives_a_key(chance: float, weights: list[int]) -> None:
    keys = [key(f"k{place}", weight) for place, weight in enumerate(weights)]
    assert pick(pooled(*keys), frozenset(), [], chance) in keys


@pytest.mark.parametrize(
    ("resting", "tried", "left"),
    [
        (set(), ["openai:main"], True),
        (set(), ["openai:main", "openai:spare"], False),
        ({"key:openai:spare"}, ["openai:main"], False),
    ],
)
def test_another_key_is_one_that_neither_rests_nor_was_tried(resting: set[str], tried: list[str], left: bool) -> None:
    assert another(POOL, frozenset(resting), tried) is left


# --- the circuit breaker ----------------------------------------------------------------------------------------------

GPT = target("openai", "gpt")
THREE = WrittenBreaker(failures=3, percent=50, within_seconds=10, rest_seconds=10, longest_rest_seconds=35)


def failing(cooldowns: Cooldowns, times: int, breaker: WrittenBreaker = THREE) -> list[bool]:
    return [cooldowns.failed(GPT, VendorFailed("x"), breaker) for _ in range(times)]


def test_a_target_rests_after_so_many_failures(cooldowns: Cooldowns) -> None:
    assert failing(cooldowns, 3) == [False, False, True]
    assert cooldowns.resting() == {f"target:{AT}"}
    assert cooldowns.is_broken(GPT)


def test_failures_that_are_few_among_what_was_asked_are_none(cooldowns: Cooldowns) -> None:
    failing(cooldowns, 2)
    for _ in range(10):
        cooldowns.worked(GPT)
    assert failing(cooldowns, 7) == [False] * 7
    assert failing(cooldowns, 1) == [True]


def test_failures_long_ago_do_not_count(cooldowns: Cooldowns, clock: Clock) -> None:
    failing(cooldowns, 2)
    clock.at += 10.1
    assert failing(cooldowns, 2) == [False, False]


@pytest.mark.parametrize("error", [VendorThrottled("x"), VendorMisconfigured("x"), VendorRefused("x")])
def test_what_says_that_a_target_works_does_not_break_it(cooldowns: Cooldowns, error: VendorError) -> None:
    assert [cooldowns.failed(GPT, error, THREE) for _ in range(9)] == [False] * 9


def test_without_failures_in_the_configuration_nothing_breaks(cooldowns: Cooldowns) -> None:
    assert failing(cooldowns, 99, WrittenBreaker(failures=0)) == [False] * 99


def test_after_its_rest_one_call_finds_out_and_the_others_pass_it_over(cooldowns: Cooldowns, clock: Clock) -> None:
    failing(cooldowns, 3)
    clock.at += 10
    assert cooldowns.resting() == frozenset()
    cooldowns.asks(GPT)
    assert cooldowns.resting() == {f"target:{AT}"}
    cooldowns.worked(GPT)
    assert cooldowns.resting() == frozenset()
    assert failing(cooldowns, 2) == [False, False]


def test_a_call_that_ends_without_finding_out_leaves_it_to_the_next(cooldowns: Cooldowns, clock: Clock) -> None:
    failing(cooldowns, 3)
    clock.at += 10
    cooldowns.resting()
    cooldowns.asks(GPT)
    cooldowns.given_up(GPT)
    assert cooldowns.resting() == frozenset()


def test_one_more_failure_after_a_rest_is_a_rest_of_twice_the_time(cooldowns: Cooldowns, clock: Clock) -> None:
    failing(cooldowns, 3)
    lasted = []
    for _ in range(4):
        began = clock.at
        while cooldowns.resting():
            clock.at += 1
        lasted.append(clock.at - began)
        cooldowns.asks(GPT)
        assert failing(cooldowns, 1) == [True]
    assert lasted == [10, 20, 35, 35]


def test_a_replica_that_hears_of_a_rest_finds_out_for_itself_too(cooldowns: Cooldowns, clock: Clock) -> None:
    cooldowns.heard(f"target:{AT}", Entry(value=BREAKER, by="other", at="", until=clock.at + 10))
    assert cooldowns.resting() == {f"target:{AT}"}
    clock.at += 10
    assert cooldowns.resting() == frozenset()
    cooldowns.asks(GPT)
    assert cooldowns.resting() == {f"target:{AT}"}
    assert failing(cooldowns, 1) == [True]


def test_an_operator_who_takes_a_rest_back_closes_the_breaker(cooldowns: Cooldowns) -> None:
    failing(cooldowns, 3)
    cooldowns.heard(f"target:{AT}", Entry(value=None, by="operator", at=""))
    assert (cooldowns.resting(), cooldowns.is_broken(GPT)) == (frozenset(), False)
    assert failing(cooldowns, 2) == [False, False]


def test_a_target_that_is_well_for_a_while_is_forgotten(cooldowns: Cooldowns, clock: Clock) -> None:
    failing(cooldowns, 1)
    clock.at += FORGOTTEN_SECONDS + 1
    cooldowns.worked(GPT)
    assert cooldowns._troubled == {}


def test_the_other_replica_hears_of_it_over_redis(tmp_path: Path) -> None:
    async def scenario(server: RedisServer) -> bool:
        pipes = [RedisPipe(server.url, AMBIENT, timeout_ms=5_000, probe_seconds=0.02) for _ in range(2)]
        async with running(pipes[0]), running(pipes[1]):
            first, second = Cooldowns(AMBIENT, Control(pipes[0], AMBIENT), "r1"), Cooldowns(AMBIENT)
            there = Control(pipes[1], AMBIENT, lambda kind, name, entry: second.heard(name, entry))
            failing(first, 3)
            await until(lambda: not first._telling)
            await there.run_once()
            return second.is_broken(GPT) and is_resting(GPT, second.resting())

    with redis_server(tmp_path) as server:
        assert run(scenario(server))
