"""What rests for a while, on every replica: targets, vendors' keys, and a key at one target.

A target that fails too often rests too, by its circuit breaker. When that rest is over, one call of each replica finds
out whether the target works again; until it has, the others pass it over. A rest is told to every replica, and so are
those that follow where such a call has failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from msgspec import Struct

from app.ambient import Ambient
from app.config import Target, VendorKey, WrittenBreaker
from app.control import Control, Entry
from app.errors import (
    VendorBroke,
    VendorError,
    VendorFailed,
    VendorMisconfigured,
    VendorThrottled,
    VendorTimeout,
    VendorUnreachable,
)
from app.redis_pipe import RedisAway, RedisRefused

log = logging.getLogger("gateway")

COOLDOWN = "cooldown"
"""The kind of the control channel's entries."""
MAX_SECONDS = 3600.0
"""A vendor that asks for longer is asked again after this: it may have been a mistake of its own."""
BREAKER = "breaker"
"""Why a target rests that failed too often."""
COUNTED = (VendorFailed, VendorUnreachable, VendorBroke, VendorTimeout)
"""What says that a target does not work. A throttle says that it does; a refusal is of a credential or a request."""
FINDING_OUT_SECONDS = 60.0
"""A call that finds out and is never heard of again is given up after this, and the next one finds out."""
DOUBTS = 20
"""So many 403 or 404 in a row, of a target that has answered others before, are of the target. A vendor may say so of a
request alone, for a prompt that it moderates or a file that it does not have; else one tenant could send the target to
rest for all."""
FORGOTTEN_SECONDS = 60.0
"""What a target that works met so long ago is forgotten, so that calls need not look it up."""


class _Trouble(Struct):
    """Of a target that has failed: how it did since `since`, unix seconds, and how often in a row it had to rest."""

    since: float
    failures: int = 0
    successes: int = 0
    rests: int = 0


class Cooldowns:
    """Until when names rest, in unix seconds; the latest deadline wins, whichever replica set it.

    A name is `target:<target>`, `key:<provider>:<key>`, or `key:<provider>:<key>:<target>` for a key at that target.
    """

    def __init__(self, ambient: Ambient, control: Control | None = None, replica: str = "") -> None:
        self._ambient = ambient
        self._control = control
        self._replica = replica
        self._until: dict[str, float] = {}
        self._broken: set[str] = set()
        self._finding_out: dict[str, float] = {}
        self._troubled: dict[str, _Trouble] = {}
        self._answered: set[str | tuple[str, str]] = set()
        self._doubts: dict[str | tuple[str, str], int] = {}
        self._telling: set[asyncio.Task[None]] = set()

    def resting(self) -> frozenset[str]:
        if not self._until and not self._finding_out:
            return frozenset()
        now = self._ambient.now()
        for name in [name for name, until in self._until.items() if until <= now]:
            del self._until[name]
            if name in self._broken:
                self._broken.discard(name)
                self._finding_out[name] = 0.0
        found_out = {name for name, until in self._finding_out.items() if until > now}
        return frozenset(self._until) | found_out if found_out else frozenset(self._until)

    # --- the circuit breaker ------------------------------------------------------------------------------------------

    def asks(self, target: Target) -> None:
        """A call goes to a target: if that has just rested by its breaker, the others wait for what it finds."""
        if self._finding_out and (name := f"target:{target.name}") in self._finding_out:
            self._finding_out[name] = self._ambient.now() + FINDING_OUT_SECONDS

    def is_broken(self, target: Target) -> bool:
        """Whether a target rests by its breaker."""
        return bool(self._broken) and f"target:{target.name}" in self._broken

    def given_up(self, target: Target) -> None:
        """The call ended without finding out: the next one may."""
        if self._finding_out and (name := f"target:{target.name}") in self._finding_out:
            self._finding_out[name] = 0.0

    def worked(self, target: Target, key: VendorKey | None = None) -> None:
        """A target has answered, to that key."""
        asked = target.name if key is None else (target.name, key.name)
        self._answered.add(asked)
        if self._doubts:
            self._doubts.pop(asked, None)
        if not self._troubled and not self._finding_out:
            return
        name = f"target:{target.name}"
        self._finding_out.pop(name, None)
        trouble = self._troubled.get(name)
        if trouble is not None:
            trouble.successes += 1
            trouble.rests = 0
            if self._ambient.now() - trouble.since > FORGOTTEN_SECONDS:
                del self._troubled[name]

    def failed(self, target: Target, error: VendorError, breaker: WrittenBreaker) -> bool:
        """A target has not. True where that was once too often, and it rests now.

        At least `failures`, and that share of what it was asked `within_seconds`; one that has just rested need fail
        only once more, and rests twice as long as before.
        """
        if not breaker.failures or not isinstance(error, COUNTED):
            self.given_up(target)
            return False
        name, now = f"target:{target.name}", self._ambient.now()
        trouble = self._troubled.get(name)
        if trouble is None or (now - trouble.since > breaker.within_seconds and name not in self._finding_out):
            trouble = self._troubled[name] = _Trouble(now, rests=0 if trouble is None else trouble.rests)
        trouble.failures += 1
        again = self._finding_out.pop(name, None) is not None
        share = trouble.failures / (trouble.failures + trouble.successes)
        if not again and (trouble.failures < breaker.failures or share * 100 < breaker.percent):
            return False
        if name in self._until:
            return False
        seconds = min(breaker.longest_rest_seconds, breaker.rest_seconds * 2**trouble.rests)
        self._troubled[name] = _Trouble(now + seconds, rests=min(trouble.rests + 1, 20))
        self._broken.add(name)
        self.rest(name, seconds, BREAKER)
        return True

    def doubtful(self, target: Target, key: VendorKey | None, error: VendorMisconfigured) -> bool:
        """Whether that may be of the request alone: see `DOUBTS`. Not of one that has never answered."""
        asked = target.name if key is None else (target.name, key.name)
        if error.vendor_status not in (403, 404) or asked not in self._answered:
            return False
        doubts = self._doubts[asked] = self._doubts.get(asked, 0) + 1
        if doubts < DOUBTS:
            return True
        del self._doubts[asked]
        self._answered.discard(asked)
        return False

    # --- rests --------------------------------------------------------------------------------------------------------

    def rest(self, name: str, seconds: float, why: str) -> None:
        """From now on, here at once and on the other replicas within a second."""
        until = self._ambient.now() + min(seconds, MAX_SECONDS)
        if until <= self._until.get(name, 0.0):
            return
        self._until[name] = until
        if self._control is not None:
            telling = asyncio.ensure_future(self._tell(self._control, name, until, why))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    def heard(self, name: str, entry: Entry) -> None:
        """What another replica, or this one, told the channel; a value that was taken back ends the rest."""
        if entry.value is None:
            for kept in (self._until, self._finding_out, self._troubled):
                kept.pop(name, None)
            self._broken.discard(name)
            return
        if entry.value == BREAKER:
            self._broken.add(name)
        if entry.until is not None:
            self._finding_out.pop(name, None)
            self._until[name] = max(entry.until, self._until.get(name, 0.0))

    async def _tell(self, control: Control, name: str, until: float, why: str) -> None:
        try:
            await control.put(COOLDOWN, name, why, self._replica, until)
        except (RedisAway, RedisRefused) as error:  # the others will find out for themselves
            log.warning("the other replicas were not told that %s rests: %s", name, error)


def rests(error: VendorError, target: Target, key: VendorKey | None, cooldown_seconds: float) -> tuple[str, float]:
    """What rests after a failed attempt, and for how many seconds; 0 for nothing.

    A credential that a vendor does not accept is good nowhere; one that it forbids something may be good elsewhere, and
    a model that it does not have is wrong for every key. A throttled key rests at that target as long as it was told.
    """
    if isinstance(error, VendorMisconfigured):
        if key is None or error.vendor_status == 404:
            return f"target:{target.name}", cooldown_seconds
        if error.vendor_status == 403:
            return f"key:{key.name}:{target.name}", cooldown_seconds
        return f"key:{key.name}", cooldown_seconds
    if isinstance(error, VendorThrottled) and error.retry_after_seconds:
        name = f"target:{target.name}" if key is None else f"key:{key.name}:{target.name}"
        return name, error.retry_after_seconds
    return "", 0.0


def is_resting(target: Target, resting: frozenset[str]) -> bool:
    """Whether a target rests itself, or every key that it could be asked with."""
    if f"target:{target.name}" in resting:
        return True
    keys = target.provider.keys
    return bool(keys) and all(_rests(key, target, resting) for key in keys)


def _rests(key: VendorKey, target: Target, resting: frozenset[str]) -> bool:
    return f"key:{key.name}" in resting or f"key:{key.name}:{target.name}" in resting


def pick(target: Target, resting: frozenset[str], tried: Sequence[str], chance: float) -> VendorKey | None:
    """The key to ask with: by weight among those that neither rest nor were tried for this call.

    Where there is none of these, one that was tried, and at last one that rests: trying beats certain failure. None
    where the provider has no pool. `chance` is uniform in [0, 1).
    """
    keys = target.provider.keys
    if not keys:
        return None
    awake = [key for key in keys if not _rests(key, target, resting)]
    pool = [key for key in awake if key.name not in tried] or awake or keys
    place = chance * sum(key.weight for key in pool)
    for key in pool:
        place -= key.weight
        if place < 0:
            return key
    return pool[-1]


def another(target: Target, resting: frozenset[str], tried: Sequence[str]) -> bool:
    """Whether a key is left that neither rests nor was tried."""
    return any(key.name not in tried and not _rests(key, target, resting) for key in target.provider.keys)
