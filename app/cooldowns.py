"""What rests for a while, on every replica: targets, vendors' keys, and a key at one target."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from app.ambient import Ambient
from app.config import Target, VendorKey
from app.control import Control, Entry
from app.errors import VendorError, VendorMisconfigured, VendorThrottled
from app.redis_pipe import RedisAway, RedisRefused

log = logging.getLogger("gateway")

COOLDOWN = "cooldown"
"""The kind of the control channel's entries."""
MAX_SECONDS = 3600.0
"""A vendor that asks for longer is asked again after this: it may have been a mistake of its own."""


class Cooldowns:
    """Until when names rest, in unix seconds; the latest deadline wins, whichever replica set it.

    A name is `target:<target>`, `key:<provider>:<key>`, or `key:<provider>:<key>:<target>` for a key at that target.
    """

    def __init__(self, ambient: Ambient, control: Control | None = None, replica: str = "") -> None:
        self._ambient = ambient
        self._control = control
        self._replica = replica
        self._until: dict[str, float] = {}
        self._telling: set[asyncio.Task[None]] = set()

    def resting(self) -> frozenset[str]:
        if not self._until:
            return frozenset()
        now = self._ambient.now()
        self._until = {name: until for name, until in self._until.items() if until > now}
        return frozenset(self._until)

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
            self._until.pop(name, None)
        elif entry.until is not None:
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
