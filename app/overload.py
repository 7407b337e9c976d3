"""Overload: a replica that has more to do than it can do well refuses early, and the least urgent tenants first."""

from __future__ import annotations

from collections.abc import Callable

from app.ambient import Ambient
from app.config import PRIORITIES, Config, WrittenOverload
from app.errors import Overloaded

TICK_SECONDS = 0.05
WINDOW_TICKS = 10
"""The loop counts as late where its most punctual tick of so many was late: one long step, a collection for instance,
is no overload, a queue that never empties is (CoDel, "Controlling Queue Delay", 2012, by the minimum of a window). That
begins the shedding of a class; how much of it goes, each tick tells: by windows the loop was three times as late."""
RISE, FALL = 0.1, 0.025
"""Of a class, per tick: half a second more of being late sheds one class more, two seconds of punctuality one less. Let
in as fast as it was shut out, the load that was too much would be back at once."""
ROUNDING = 1e-9
SHARES = (0.7, 0.85, 1.0)
"""Of `max_calls`, by priority: what is left above them is for those who matter more."""
LATE_SHARES = (0.2, 0.5, 1.0)
"""Of `max_delay_ms`, by the priority that would be shed next: a refusal waits for its turn as all else does, so the
first ones are made before turns are long."""
RETRY_SECONDS = 5.0
"""A refused client is told to wait up to this; each another time, or they would all come back together."""


class Overload:
    """Who is let in. `calls` is how many are; `level` how many classes are shed by the event loop's delay.

    A call of priority p (0 is the lowest) is shed with the chance `level - p`: between two whole numbers a part of a
    class goes, so that what is admitted is about what can be served.
    """

    def __init__(self, config: Callable[[], Config], ambient: Ambient, woke: Callable[[float, float], None]) -> None:
        """`woke` is told of every look at the event loop: how late it woke, and how long it was to sleep."""
        self._config = config
        self._ambient = ambient
        self._woke = woke
        self.calls = 0
        self.level = 0.0
        self.delay_seconds = 0.0
        """How late the most punctual tick of the last window was."""
        self.shed = [0] * len(PRIORITIES)
        self._late: list[float] = []

    def admit(self, priority: int, limits: WrittenOverload) -> None:
        """Counts one call in; `leave` counts it out. Raises Overloaded."""
        if self.calls >= limits.max_calls * SHARES[priority]:
            raise self._refusal(priority, "serves as many calls as it can")
        if self.level > priority and self._ambient.random() < self.level - priority:
            raise self._refusal(priority, "is too busy")
        self.calls += 1

    def leave(self) -> None:
        self.calls -= 1

    def _refusal(self, priority: int, why: str) -> Overloaded:
        self.shed[priority] += 1
        wait = 1.0 + (RETRY_SECONDS - 1.0) * self._ambient.random()
        return Overloaded(
            f"This gateway replica {why}, and lets calls of more urgent tenants go first. Send the call again.",
            retry_after_seconds=wait,
        )

    def tick(self, late_seconds: float, max_delay_seconds: float) -> None:
        """One look at the event loop: how late it came back from a sleep."""
        self._late.append(late_seconds)
        if len(self._late) > WINDOW_TICKS:
            del self._late[0]
        self.delay_seconds = min(self._late)
        whole = int(self.level + ROUNDING)  # classes that are shed
        bearable = max_delay_seconds * LATE_SHARES[min(whole, len(PRIORITIES) - 1)]
        if self.level - whole < ROUNDING:
            late_seconds = self.delay_seconds if len(self._late) == WINDOW_TICKS else 0.0
        if late_seconds > bearable:
            self.level = min(whole + 1.0, self.level + RISE, float(len(PRIORITIES)))
        elif self.level:
            self.level = max(0.0, self.level - FALL)

    async def run(self) -> None:
        while True:
            await self.run_once()

    async def run_once(self) -> int:
        """Sleeps for a tick and looks at how late it woke; returns 1 while calls are shed."""
        slept = self._ambient.monotonic()
        await self._ambient.sleep(TICK_SECONDS)
        late = max(0.0, self._ambient.monotonic() - slept - TICK_SECONDS)
        self.tick(late, self._config().settings.overload.max_delay_ms / 1000)
        self._woke(late, TICK_SECONDS)
        return int(self.level > 0)
