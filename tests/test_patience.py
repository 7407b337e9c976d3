"""One timer for all of a call's waits: when it cancels, and when it lets be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from app.ambient import Patience

LONG = 60.0
SHORT = 0.02


def run(scenario: Callable[[Patience], Awaitable[None]]) -> None:
    async def whole() -> None:
        await scenario(Patience())

    asyncio.run(whole())


async def waits(patience: Patience, seconds: float = LONG) -> bool:
    """True when the limit ended the wait."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        if not patience.over():
            raise
        return True
    return False


def test_a_wait_beyond_the_limit_is_ended() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(SHORT)
        assert await waits(patience)

    run(scenario)


def test_a_lifted_limit_ends_nothing() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(SHORT)
        patience.lift()
        assert not await waits(patience, 3 * SHORT)

    run(scenario)


def test_a_later_limit_replaces_an_earlier_one() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(SHORT)
        patience.limit(LONG)
        assert not await waits(patience, 3 * SHORT)

    run(scenario)


def test_an_earlier_limit_replaces_a_later_one() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(LONG)
        patience.limit(SHORT)
        assert await waits(patience)

    run(scenario)


def test_a_limit_after_one_that_passed_is_kept_too() -> None:
    async def scenario(patience: Patience) -> None:
        for _ in range(2):
            patience.limit(SHORT)
            assert await waits(patience)

    run(scenario)


def test_a_limit_that_was_extended_still_ends_the_wait() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(SHORT)
        patience.limit(3 * SHORT)
        assert await waits(patience)

    run(scenario)


def test_the_task_is_not_left_cancelled() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(SHORT)
        await waits(patience)
        assert asyncio.current_task().cancelling() == 0

    run(scenario)


def test_a_cancellation_by_another_is_not_taken_for_the_limit() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(LONG)
        asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
        await waits(patience)

    with pytest.raises(asyncio.CancelledError):
        run(scenario)


def test_a_cancellation_by_another_at_the_same_moment_wins() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(SHORT)
        asyncio.get_running_loop().call_later(SHORT, asyncio.current_task().cancel)
        await asyncio.sleep(0)
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            asyncio.current_task().cancel()  # however the two timers fell
            if not patience.over():
                raise

    with pytest.raises(asyncio.CancelledError):
        run(scenario)


def test_an_ended_patience_ends_nothing() -> None:
    async def scenario(patience: Patience) -> None:
        patience.limit(SHORT)
        patience.end()
        assert not await waits(patience, 3 * SHORT)

    run(scenario)
