"""The way through a chain: which targets, how often, after what wait, and what is said when all failed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import Alias, Timeouts, WrittenRetry
from app.errors import (
    DeadlineExceeded,
    UnsupportedParameter,
    UpstreamMisconfigured,
    UpstreamUnavailable,
    VendorBroke,
    VendorCannot,
    VendorError,
    VendorFailed,
    VendorMisconfigured,
    VendorRefused,
    VendorThrottled,
    VendorTimeout,
    VendorUnreachable,
)
from app.routing import Next, after, plan, sum_up
from tests.translation import target

HERE = [VendorThrottled, VendorFailed, VendorUnreachable, VendorBroke]
NEXT = [VendorTimeout, VendorMisconfigured, VendorCannot]
RETRY = WrittenRetry(max_attempts=3, backoff_base_seconds=0.2, backoff_cap_seconds=2.0)


def alias(*names: str) -> Alias:
    targets = tuple(target("openai", name) for name in names)
    return Alias("support-fast", targets, tuple(t.name for t in targets), 1024, Timeouts(1, 1, 1, 1, 1))


def step(error: VendorError, **facts: float) -> Next | None:
    defaults = {"index": 0, "targets": 1, "attempts": 1, "tries_here": 1, "chance": 0.5}
    return after(error, retry=RETRY, **(defaults | facts))


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resting", "planned"),
    [
        (set(), ["a", "b", "c"]),
        ({"target:openai/a"}, ["b", "c"]),
        ({"target:openai/b"}, ["a", "c"]),
        ({"target:openai/a", "target:openai/b"}, ["c"]),
        ({"target:openai/a", "target:openai/b", "target:openai/c"}, ["a", "b", "c"]),
        ({"target:openai/other"}, ["a", "b", "c"]),
    ],
)
def test_resting_targets_are_left_out_unless_all_rest(resting: set[str], planned: list[str]) -> None:
    assert [t.model for t in plan(alias("a", "b", "c"), frozenset(resting))] == planned


# --- after ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", HERE)
def test_a_transient_error_is_tried_again_here(error: type[VendorError]) -> None:
    assert step(error("x")) == Next(0, pytest.approx(0.1))


@pytest.mark.parametrize("error", NEXT)
def test_an_error_that_waiting_does_not_cure_leads_to_the_next_target_at_once(error: type[VendorError]) -> None:
    assert step(error("x"), targets=2) == Next(1, 0.0)


@pytest.mark.parametrize("error", NEXT)
def test_without_a_next_target_such_an_error_ends_the_call(error: type[VendorError]) -> None:
    assert step(error("x"), targets=2, index=1, attempts=2) is None


@pytest.mark.parametrize("targets", [1, 3])
def test_a_refusal_ends_the_call(targets: int) -> None:
    assert step(VendorRefused("x"), targets=targets) is None


@pytest.mark.parametrize(
    ("targets", "index", "attempts", "tries_here", "expected"),
    [
        (1, 0, 1, 1, 0),
        (1, 0, 2, 2, 0),
        (1, 0, 3, 3, None),
        (2, 0, 1, 1, 0),
        (2, 0, 2, 2, 1),
        (2, 1, 2, 1, 1),
        (2, 1, 3, 2, None),
        (3, 0, 1, 1, 1),
        (3, 1, 2, 1, 2),
        (3, 2, 3, 1, None),
        (5, 0, 1, 1, 1),
        (5, 3, 4, 1, 4),
        (5, 4, 5, 1, None),
    ],
)
def test_retries_are_spent_only_while_every_target_keeps_its_attempt(
    targets: int, index: int, attempts: int, tries_here: int, expected: int | None
) -> None:
    found = step(VendorFailed("x"), targets=targets, index=index, attempts=attempts, tries_here=tries_here)
    assert (None if found is None else found.index) == expected


@pytest.mark.parametrize(
    ("asked", "targets", "expected"),
    [
        (None, 1, Next(0, 0.1)),
        (0.05, 1, Next(0, 0.1)),
        (1.5, 1, Next(0, 1.5)),
        (2.0, 2, Next(0, 2.0)),
        (2.1, 2, Next(1, 0.0)),
        (30.0, 1, None),
    ],
)
def test_the_wait_that_a_vendor_asks_for_is_kept_or_the_target_left(
    asked: float | None, targets: int, expected: Next | None
) -> None:
    assert step(VendorThrottled("x", retry_after_seconds=asked), targets=targets) == expected


@given(st.integers(1, 10), st.floats(0, 1, exclude_max=True), st.floats(0, 5), st.floats(0, 5))
def test_the_wait_is_jittered_within_its_bound(tries_here: int, chance: float, base: float, cap: float) -> None:
    retry = WrittenRetry(max_attempts=10, backoff_base_seconds=base, backoff_cap_seconds=cap)
    found = after(VendorFailed("x"), index=0, targets=1, attempts=1, tries_here=tries_here, retry=retry, chance=chance)
    assert found is not None
    assert found.wait_seconds == min(cap, base * 2 ** (tries_here - 1)) * chance


ERRORS = st.builds(
    lambda error, asked: error("x", retry_after_seconds=asked),
    st.sampled_from([*HERE, *NEXT]),
    st.none() | st.floats(0, 100),
)


def walk(errors: list[VendorError], targets: int, max_attempts: int, chance: float) -> tuple[list[int], list[float]]:
    """The targets that a call meets which fails as `errors` say, and the waits between."""
    retry = WrittenRetry(max_attempts=max_attempts)
    visited, waits = [0], []
    for attempts, error in enumerate(errors, 1):
        found = after(
            error,
            index=visited[-1],
            targets=targets,
            attempts=attempts,
            tries_here=visited.count(visited[-1]),
            retry=retry,
            chance=chance,
        )
        if found is None:
            return visited, waits
        visited.append(found.index)
        waits.append(found.wait_seconds)
    raise AssertionError("the call did not end")


@given(
    st.lists(ERRORS, min_size=30, max_size=30),
    st.integers(1, 12),
    st.integers(1, 10),
    st.floats(0, 1, exclude_max=True),
)
def test_a_call_that_always_fails_tries_every_target_and_no_more_than_allowed(
    errors: list[VendorError], targets: int, max_attempts: int, chance: float
) -> None:
    visited, waits = walk(errors, targets, max_attempts, chance)
    assert list(dict.fromkeys(visited)) == list(range(targets))
    assert visited == sorted(visited)
    assert len(visited) <= max(max_attempts, targets)
    assert all(0 <= wait <= 2.0 for wait in waits)


@given(st.integers(1, 12), st.integers(1, 10))
def test_a_call_that_always_fails_for_a_moment_uses_all_its_attempts(targets: int, max_attempts: int) -> None:
    visited, _ = walk([VendorFailed("x")] * 30, targets, max_attempts, 0.5)
    assert len(visited) == max(max_attempts, targets)


# --- sum_up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "deadline_passed", "summed"),
    [
        ([], True, DeadlineExceeded),
        ([VendorMisconfigured("x")], True, DeadlineExceeded),
        ([], False, UpstreamUnavailable),
        ([VendorMisconfigured("x"), VendorMisconfigured("y")], False, UpstreamMisconfigured),
        ([VendorMisconfigured("x"), VendorFailed("y")], False, UpstreamUnavailable),
        ([VendorTimeout("x")], False, UpstreamUnavailable),
    ],
)
def test_the_error_that_sums_up_the_chain(errors: list[VendorError], deadline_passed: bool, summed: type) -> None:
    assert type(sum_up(errors, deadline_passed)) is summed


@pytest.mark.parametrize(
    ("asked", "seconds"), [([], 1.0), ([None], 1.0), ([0.2], 1.0), ([7.0, None], 7.0), ([7.0, 30.0], 30.0)]
)
def test_the_client_is_told_the_longest_wait_that_a_vendor_asked_for(asked: list[float | None], seconds: float) -> None:
    errors = [VendorThrottled("x", retry_after_seconds=wait) for wait in asked]
    assert sum_up(errors, False).retry_after_seconds == seconds


@pytest.mark.parametrize("deadline_passed", [True, False])
def test_the_client_should_not_add_retries_of_its_own(deadline_passed: bool) -> None:
    assert sum_up([VendorFailed("x")], deadline_passed).should_retry is False


@pytest.mark.parametrize("late", [True, False])
def test_who_has_a_part_of_the_answer_is_not_told_that_nobody_answered(late: bool) -> None:
    whole, part = sum_up([VendorBroke("x")], late), sum_up([VendorBroke("x")], late, begun=True)
    assert type(whole) is type(part)
    assert "No target" in whole.message
    assert "not complete" in part.message
    assert "fallen back" not in part.message


def test_a_vendor_s_words_do_not_reach_the_client() -> None:
    assert "secret" not in sum_up([VendorFailed("secret")], False).message


def test_a_parameter_that_no_target_carries_is_the_requests_fault() -> None:
    summed = sum_up([VendorCannot("`n` cannot be carried.", param="n"), VendorCannot("x", param="seed")], False)
    assert (type(summed), summed.param, summed.message) == (UnsupportedParameter, "n", "`n` cannot be carried.")


def test_a_parameter_that_only_the_fallback_cannot_carry_is_not_the_requests_fault() -> None:
    assert type(sum_up([VendorFailed("x"), VendorCannot("x", param="n")], False)) is UpstreamUnavailable
