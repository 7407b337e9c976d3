"""Daily and monthly counters over trouble with Redis: what was used without it is paid in, what it lost is rebuilt.

Redis says that its counters are whole by the key WHOLE. Where that is missing, Redis was emptied, or is new: one
replica sums the ledger up to a second, the epoch, restores the counters, and sets WHOLE to it; until then the policies
for Redis away hold. What calls used that began before the epoch comes from the ledger, also from rows that arrive
later; what later calls used is charged by their settlements, and by each replica for calls that it judged by itself.

A Redis Cluster may lose a part: there each slot has a mark of its own beside the one of all, and a script that finds
its slot's gone has the rebuilding begin. Counters that were not lost stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

from app.ambient import Ambient
from app.config import Config, Quota
from app.limits.scopes import BUDGETS, EMPTIED, WHOLE, Limit, Scope, budgets_of, period, whole_mark
from app.redis_cluster import SLOTS, slot_of
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused

log = logging.getLogger(__name__)

EPOCH = "rl:{_global}:epoch"
"""The epoch of a rebuilding that has begun: who goes on with it goes on with the same."""
REBUILDING = "rl:{_global}:rebuilding"
CHECK_SECONDS = 1.0
"""How often a replica looks whether Redis still has its counters, and pays in what it owes."""
HELD_SECONDS = 6
"""A replica that dies over the rebuilding is replaced after that long; while it lives it renews its mark."""
LATE_SECONDS = (15, 60, 300)
"""When the ledger is asked again after a rebuilding, for rows that came later; once more after the longest call."""
KEPT_SECONDS = 600
"""Of so many seconds it is known in which of them what is owed was used; what is older counts as that old."""
_AT_ONCE = 500
_LOST = "redis has no budgets: they are rebuilt from the ledger; until then the policies for redis away hold"
_CANNOT = "redis has no budgets, and the ledger cannot be read yet: the policies for redis away hold"


class Spent(Struct, frozen=True, gc=False):
    """What the ledger has of one owner's calls: since its zone's midnight, and since the first of its month."""

    owner: Literal["tenant", "key"]
    id: str
    time_zone: str
    day_tokens: int
    day_nanos: int
    month_nanos: int

    def of(self, limit: Limit) -> int:
        return {"daily_tokens": self.day_tokens, "daily_usd": self.day_nanos, "monthly_usd": self.month_nanos}[
            limit.kind
        ]


ReadSpent = Callable[[int, Mapping[str, tuple[int, int]]], Awaitable[list[Spent] | None]]
"""Sums of all owners' calls before a unix second, by time zone; a zone's pair is where its day and month began.

None: the ledger cannot be read just now.
"""


class Budgets:
    """`run` looks, rebuilds and pays.

    `whole` is False while Redis lacks what was used; `made_good` says that it has all, this replica's part too.
    """

    def __init__(
        self, pipe: RedisPipe, ambient: Ambient, current: Callable[[], Config] | None, read_spent: ReadSpent | None
    ) -> None:
        here = Path(__file__)
        self._charge = pipe.script(here.with_name("charge.lua").read_text())
        self._restore = pipe.script(here.with_name("restore.lua").read_text())
        self._pipe = pipe
        self._ambient = ambient
        self._current = current
        self._read_spent = read_spent
        self._owed: dict[int, dict[str, int]] = {}
        self._late: deque[float] = deque()
        self._epoch = 0
        self._doubted: set[str] = set()
        self._wake = asyncio.Event()
        self._said: str | None = None
        self.whole = True
        self.on_whole: list[Callable[[], None]] = []
        """Called when Redis has the counters again, with all that this replica knows of."""
        self.made_good = False
        pipe.on_return.append(self._returned)

    def emptied(self, scope: Scope) -> None:
        """A script found no counter, and no mark that there was none to find."""
        self._doubt(each.whole for each in (scope, *scope.apart))

    def _doubt(self, marks: Iterable[str]) -> None:
        self._doubted.update(marks)
        self.whole = self.made_good = False
        self._wake.set()

    def _returned(self) -> None:
        self.made_good = False
        self._wake.set()

    def owe(self, scope: Scope, tokens: int, nanos: int, second: int) -> None:
        """Notes what a call that began in `second` took without Redis, or, later, used above it (below zero: less)."""
        amounts = self._owed.setdefault(second, {})
        for limit in scope.limits:
            if limit.kind in BUDGETS:
                amounts[limit.key] = amounts.get(limit.key, 0) + limit.amount(tokens, nanos)

    async def run(self) -> None:
        while True:
            with contextlib.suppress(RedisAway, RedisRefused):
                await self.run_once()
            self._compact()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._wake.wait()
            self._wake.clear()

    async def run_once(self) -> int:
        """Returns how many counters were written. Raises RedisAway, RedisRefused."""
        if not self._pipe.up:
            return 0
        for mark in list(self._doubted):
            if not await self._pipe.execute("EXISTS", mark):
                await self._pipe.execute("DEL", WHOLE)
            self._doubted.discard(mark)
        whole = await self._pipe.execute("GET", WHOLE)
        written = 0
        if whole is None:
            self.whole = self.made_good = False
            written = await self._rebuild()
            whole = await self._pipe.execute("GET", WHOLE)
            if whole is None:
                return written
        self._epoch = int(whole)
        if self._late and self._ambient.now() >= self._late[0]:
            self._late.popleft()
            written += await self._restore_all(self._epoch, ended=True) or 0
        written += await self._pay()
        if self._doubted:  # seen meanwhile: not before they are looked at
            return written
        if not self.whole:
            self.whole = True
            self._say("budgets are whole again in redis")
        if not self.made_good:
            self.made_good = True
            for each in self.on_whole:
                each()
        return written

    # --- what was used without Redis ---

    async def _pay(self) -> int:
        """Returns how many counters were charged."""
        owed, self._owed = self._owed, {}
        by_key: dict[str, dict[int, int]] = {}
        for second, amounts in owed.items():
            for key, amount in amounts.items():
                # What is older is in the ledger, and comes from there for a counter that was lost: with one Redis, all.
                if second >= self._epoch or self._pipe.apart:
                    by_key.setdefault(key, {})[second] = amount
        return sum(await asyncio.gather(*(self._charge_to(*debt) for debt in by_key.items())))

    async def _charge_to(self, key: str, amounts: dict[int, int]) -> bool:
        """Charges a counter; what may not have been charged stays owed: twice is better than never."""
        amount = sum(amount for second, amount in amounts.items() if second >= self._epoch)
        before = sum(amounts.values()) - amount
        mark = self._mark_of(key)
        keys = key, f"{key}:{self._epoch}", mark
        try:
            charged = await self._pipe.execute(
                "EVALSHA", self._charge, len(keys), *keys, amount, before, keep_seconds(key)
            )
        except RedisRefused as error:
            log.error("redis refuses the charge script: %s", error)
            return False
        except RedisAway:
            charged = 0
        if charged == EMPTIED:
            self._doubt([mark])
        if charged != 1:
            for second, part in amounts.items():
                again = self._owed.setdefault(second, {})
                again[key] = again.get(key, 0) + part
        return charged == 1

    def _mark_of(self, key: str) -> str:
        return whole_mark(slot_of(key)) if self._pipe.apart else WHOLE

    def _compact(self) -> None:
        if len(self._owed) <= 2 * KEPT_SECONDS:
            return
        oldest = int(self._ambient.now()) - KEPT_SECONDS
        together = self._owed.setdefault(oldest, {})
        for second in [second for second in self._owed if second < oldest]:
            for key, amount in self._owed.pop(second).items():
                together[key] = together.get(key, 0) + amount

    # --- what Redis lost ---

    async def _rebuild(self) -> int:
        """By the one replica that takes the mark; returns how many counters it restored."""
        if self._read_spent is None:
            self._say("no ledger is configured: budgets begin at what redis has")
            await self._mark(0)
            return 0
        if self._said != _CANNOT:
            self._say(_LOST)
        if not await self._pipe.execute("SET", REBUILDING, 1, "NX", "EX", HELD_SECONDS):
            return 0
        holding = asyncio.create_task(self._hold())
        try:
            now = int((await self._pipe.execute("TIME"))[0])
            await self._pipe.execute("SET", EPOCH, now + 1, "NX")
            epoch = int(await self._pipe.execute("GET", EPOCH))
            await self._ambient.sleep(max(0, epoch - now))
            restored = await self._restore_all(epoch)
            if restored is None:
                self._say(_CANNOT)
                return 0
            await self._mark(epoch)
            await self._pipe.execute("DEL", EPOCH)
            longest = self._current().settings.longest_seconds
            self._late = deque(epoch + seconds for seconds in (*LATE_SECONDS, LATE_SECONDS[-1] + longest))
            return restored
        finally:
            holding.cancel()
            with contextlib.suppress(RedisAway):
                self._pipe.send("DEL", REBUILDING)

    async def _hold(self) -> None:
        """Where the mark lapsed all the same, and another replica rebuilds too, both come to the same counters."""
        while True:
            await self._ambient.sleep(HELD_SECONDS / 3)
            with contextlib.suppress(RedisAway, RedisRefused):
                await self._pipe.execute("EXPIRE", REBUILDING, HELD_SECONDS)

    async def _mark(self, epoch: int) -> None:
        """Says that all counters are whole, of a cluster last of all."""
        if self._pipe.apart:
            for start in range(0, SLOTS, _AT_ONCE):
                slots = range(start, min(start + _AT_ONCE, SLOTS))
                await asyncio.gather(*(self._pipe.execute("SET", whole_mark(slot), epoch) for slot in slots))
        await self._pipe.execute("SET", WHOLE, epoch)

    async def _restore_all(self, epoch: int, ended: bool = False) -> int | None:
        """None when the ledger cannot be read. What was restored before is put right, not added again.

        `ended`: the rebuilding is over, and this is for rows that came late, unless there was another since.
        """
        config = self._current()
        quotas = dict(_owners(config))
        token_quota = _token_quota(config)
        zones = {quota.time_zone for quota in (*quotas.values(), token_quota)}
        starts = {zone: (period(False, zone, epoch)[1], period(True, zone, epoch)[1]) for zone in zones}
        found = await self._read_spent(epoch, starts)
        if found is None:
            return None
        spent = {(each.owner, each.id, each.time_zone): each for each in found}
        for each in found:
            if each.owner == "tenant" and each.id not in config.tenants:
                quotas[each.owner, each.id] = token_quota
        commands = [
            (limit.key, 0 if sums is None else sums.of(limit))
            for (owner, id), quota in quotas.items()
            for sums in [spent.get((owner, id, quota.time_zone))]
            for limit in budgets_of(owner, id, quota, epoch)
        ]
        for start in range(0, len(commands), _AT_ONCE):
            some = commands[start : start + _AT_ONCE]
            await asyncio.gather(
                *(
                    self._pipe.execute(
                        "EVALSHA",
                        self._restore,
                        3,
                        key,
                        f"{key}:{epoch}",
                        self._mark_of(key),
                        amount,
                        keep_seconds(key),
                        epoch if ended else "",
                    )
                    for key, amount in some
                )
            )
        return len(commands)

    def _say(self, what: str) -> None:
        """One log line per change."""
        if what != self._said:
            self._said = what
            log.warning(what)


def keep_seconds(key: str) -> int:
    """How long a counter is kept: longer than its period, with time for a call over its end to be settled on it."""
    return 2_937_600 if ":monthly_usd:" in key else 259_200


def _owners(config: Config) -> Iterator[tuple[tuple[str, str], Quota]]:
    for tenant in config.tenants.values():
        yield ("tenant", tenant.id), tenant.quota
    for key in config.keys.values():
        yield ("key", key.id), key.quota


def _token_quota(config: Config) -> Quota:
    """Budgets of tenants that only tokens name: every counter that a plan may count, by the zone that plans share."""
    zones = {plan.quota.time_zone for plan in config.plans.values()}
    return Quota(daily_tokens=1, daily_nanos=1, monthly_nanos=1, time_zone=zones.pop() if len(zones) == 1 else "UTC")
