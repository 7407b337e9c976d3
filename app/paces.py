"""How long targets take, as this replica has seen it lately: what `order: latency` goes by."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from app.ambient import Ambient
from app.config import Target

WEIGHT = 0.2
"""Of one call in what is known: the last five or so decide, so that a target that has become slow is left soon."""
STALE_SECONDS = 60.0
"""What is known is as old as this at most: then one call finds out anew, or a slow target was never asked again."""
FINDING_OUT_SECONDS = 10.0
"""So long the others wait for what that call finds."""


class _Pace(Struct):
    """`known` is the mean in seconds; `until` the time, of the monotonic clock, up to which it counts."""

    known: float
    until: float


class Paces:
    """Seconds to a stream's first content, and to a whole answer, by target. Targets are the configuration's."""

    def __init__(self, ambient: Ambient) -> None:
        self._ambient = ambient
        self._paces: dict[tuple[str, bool], _Pace] = {}

    def took(self, target: Target, stream: bool, seconds: float) -> None:
        """An attempt's time: to the answer, or to where it was given up."""
        until = self._ambient.monotonic() + STALE_SECONDS
        pace = self._paces.get((target.name, stream))
        if pace is None:
            self._paces[target.name, stream] = _Pace(seconds, until)
        else:
            pace.known += WEIGHT * (seconds - pace.known)
            pace.until = until

    def reader(self, stream: bool) -> Callable[[Target], float]:
        """Reads a target's pace: 0 where nothing is known, for one call each ten seconds."""

        def pace(target: Target) -> float:
            known = self._paces.get((target.name, stream))
            now = self._ambient.monotonic()
            if known is None:
                return 0.0
            if now >= known.until:
                known.until = now + FINDING_OUT_SECONDS
                return 0.0
            return known.known

        return pace
