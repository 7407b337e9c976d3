"""Reserve, settle, renew: the limits of a call over all replicas, and what holds while Redis is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct

from app.ambient import Ambient
from app.config import Config, Quota, ServiceKey, Tenant, VendorKey
from app.core import Call, Fetch, Rates, Reservation
from app.errors import LimitsUnavailable, VendorKeyFull
from app.limits.budgets import Budgets, ReadSpent
from app.limits.scopes import (
    ANSWERED,
    EMPTIED,
    LEASE_MS,
    MOST,
    Limit,
    Scope,
    Scripts,
    grant_scope,
    make_scope,
    owner_of,
    rates,
    refusal,
)
from app.limits.share import Share
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused, RedisUnasked

log = logging.getLogger(__name__)

_REFUSED, _TAKEN, _OTHER_DAY = 0, 1, 2
"""What a reserve script's answer begins with, or EMPTIED."""
_LOG_SECONDS = 60.0
"""A script that fails does so for every call: one line in so many seconds says it."""
RENEW_SECONDS = LEASE_MS / 3000
"""Two renewals may be missed before a lease lapses."""
_RENEWED_AT_ONCE = 500
_HEARD = 50_000
"""Budgets of which it is kept what was left: without it a share is of the whole."""
_SCOPES = 10_000
"""Scopes that are kept ready: one for each tenant and service key that call."""


class Held(Reservation, frozen=True, gc=False):
    """A reservation with what it was taken from; `held` is False where this process took it from its own share.

    That was in unix second `second`; the call had come in `began`.
    """

    nanos: int = 0
    scope: Scope | None = None
    second: int = 0
    began: int = 0


class _Known(Struct):
    """A scope that is ready, and what it was made of."""

    config: Config
    tenant_quota: Quota
    key_quota: Quota
    scope: Scope | None


class Limits:
    """Counts for metrics: `local_calls` were judged by this process alone; `lost_settlements` stay at the estimate.

    Each of `on_nearly_used` is told, once per budget and window, that a budget is nearly used up and what it has left;
    calls wait for it, so it must not.
    """

    def __init__(
        self,
        pipe: RedisPipe,
        ambient: Ambient,
        current: Callable[[], Config] | None = None,
        read_spent: ReadSpent | None = None,
        *,
        unsettled_limit: int = 10_000,
    ) -> None:
        """`read_spent` sums the ledger for the owners of `current` where Redis lost its counters; None: no ledger."""
        here = Path(__file__)
        self._scripts = Scripts(
            pipe.script(here.with_name("reserve.lua").read_text()),
            pipe.script(here.with_name("settle.lua").read_text()),
            pipe.apart,
        )
        self._renew = pipe.script(here.with_name("renew.lua").read_text())
        self._pipe = pipe
        self._ambient = ambient
        self._unsettled_limit = unsettled_limit
        self._unsettled: deque[tuple[str, bytes]] = deque()
        self._clock_ahead = 0.0
        self._known: dict[tuple[str, str], _Known] = {}
        self._granting: dict[str, tuple[VendorKey, Scope]] = {}
        self._share = Share()
        self._heard: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._local: set[str] = set()
        self._running: dict[str, set[str]] = {}
        self._logged = float("-inf")
        self.local_calls = 0
        self.lost_settlements = 0
        self.on_nearly_used: list[Callable[[Limit, int], None]] = []
        pipe.on_return.append(self._returned)
        self.budgets = Budgets(pipe, ambient, current, read_spent)
        self.budgets.on_whole.append(self._whole)

    async def reserve(
        self, call: Call, tenant: Tenant, tokens: int, nanos: int, fetch: Fetch | None = None
    ) -> Reservation:
        """Takes one request, `tokens` and `nanos` (nano-dollars; both at least 0) from all limits of the call.

        One round trip, which brings an answer from before along where `fetch` says so: then one request is taken, and
        nothing else. Raises `RateLimitExceeded` or `BudgetExceeded` and takes nothing. With Redis away each limit's
        policy holds: `LimitsUnavailable` where one of them says `closed`. A caller that is cancelled leaves nothing
        reserved.
        """
        call_id, at = call.event_id, call.received_at + self._clock_ahead
        if tokens > MOST or nanos > MOST:
            tokens, nanos = min(tokens, MOST), min(nanos, MOST)
        for _ in range(2):  # a second time only where Redis is in another budget day than this replica's clock
            scope = self._scope(call.config, tenant, call.key, at)
            if scope is None:
                return Held(call_id, tenant.id, tokens)
            if scope.budgets and not self.budgets.whole:
                break
            try:
                if scope.apart:
                    status, now_ms, *left = await self._reserve_apart(scope, call_id, tokens, nanos, fetch)
                else:
                    command = scope.reserve(call_id, tokens, nanos, fetch)
                    status, now_ms, *left = await self._pipe.ask(command, scope.record)
            except RedisUnasked:
                break
            except (asyncio.CancelledError, RedisAway, RedisRefused) as error:
                if not scope.apart:
                    self._undo(scope, call_id)
                if isinstance(error, asyncio.CancelledError):
                    raise
                if isinstance(error, RedisRefused):
                    self._complain("reserve", error)
                break
            if status == _TAKEN:
                fetched: bytes | bool | None = None
                if fetch is not None:
                    fetched = left.pop()
                    if isinstance(fetched, int):
                        fetched = fetched == 1
                    else:  # an answer from before, for one request and nothing else
                        tokens = nanos = 0
                if scope.budgets:
                    self._hear(scope, left)
                if scope.running and not isinstance(fetched, bytes):
                    self._begin(scope, call_id)
                return Held(call_id, tenant.id, tokens, True, rates(scope, left, now_ms), fetched, nanos, scope)
            if status == _REFUSED:
                half = len(left) // 2
                if half < len(scope.limits):
                    scope = scope.first(half)
                self._hear(scope, left)
                raise refusal(scope, left[:half], left[half:], tokens, nanos, now_ms)
            if status == EMPTIED:
                self.budgets.emptied(scope)
                break
            at = now_ms / 1000
            self._clock_ahead = at - self._ambient.now()
        return self._take_locally(call, tenant, scope, tokens, nanos)

    async def _ask(self, scope: Scope, call_id: str, tokens: int, nanos: int, fetch: Fetch | None = None) -> list[Any]:
        """What reserve.lua answers. Where its answer did not come, what it may have taken is given back."""
        try:
            return await self._pipe.ask(scope.reserve(call_id, tokens, nanos, fetch), scope.record)
        except RedisUnasked:
            raise
        except (asyncio.CancelledError, RedisAway, RedisRefused):
            self._undo(scope, call_id)
            raise

    async def _reserve_apart(
        self, scope: Scope, call_id: str, tokens: int, nanos: int, fetch: Fetch | None
    ) -> list[Any]:
        """In a cluster: the scripts of all owners, answered as one would be; of a refusal, for the limits asked.

        All or nothing, one after another: what a tenant is refused by its own limits takes nothing from what all share.
        """
        status, now_ms, *left = await self._ask(scope, call_id, tokens, nanos, fetch)
        if status != _TAKEN:
            return [status, now_ms, *left]
        fetched = [left.pop()] if fetch is not None else []
        if fetched and not isinstance(fetched[0], int):
            tokens = ANSWERED
        took = [scope]
        try:
            for other in scope.apart:
                status, now_ms, *more = await self._ask(other, call_id, tokens, nanos)
                if status == _REFUSED:
                    half = len(more) // 2
                    before = _before(scope, left, tokens, nanos)
                    return [status, now_ms, *before, *more[:half], *(-1 for _ in left), *more[half:]]
                if status != _TAKEN:
                    return [status, now_ms]
                took.append(other)
                left += more
            return [status, now_ms, *left, *fetched]
        finally:
            if len(took) <= len(scope.apart):
                for each in took:
                    self._undo(each, call_id)
                if fetched == [1]:
                    with contextlib.suppress(RedisAway):  # it lapses by itself
                        self._pipe.send("DEL", fetch.lease)

    async def grant(self, key: VendorKey, attempt_id: str, tokens: int) -> Reservation:
        """Takes one request and `tokens` from what a vendor grants one of its keys; settled as any reservation.

        Raises `VendorKeyFull` and takes nothing. Without Redis everything passes: the vendor counts for itself.
        """
        scope = self._grant_scope(key)
        tokens = min(tokens, MOST)
        try:
            status, now_ms, *left = await self._ask(scope, attempt_id, tokens, 0)
        except (RedisAway, RedisRefused) as error:
            if isinstance(error, RedisRefused):
                self._complain("reserve", error)
            return Held(attempt_id, "", tokens)
        if status == _REFUSED:
            half = len(scope.limits)
            full = refusal(scope, left[:half], left[half:], tokens, 0, now_ms)
            raise VendorKeyFull(full.message, retry_after_seconds=full.retry_after_seconds)
        return Held(attempt_id, "", tokens, True, None, None, 0, scope)

    def give_back(self, reservation: Reservation) -> None:
        """Undoes a reservation, the request included. Never waits, never raises."""
        if isinstance(reservation, Held) and reservation.scope is not None:
            self._end(reservation.scope, reservation.call_id)
            if reservation.held:
                self._put(reservation.scope, reservation.call_id, 0, 0, 0)

    async def look(self, config: Config, tenant: Tenant, key: ServiceKey) -> Rates | None:
        """How the limits stand that a call would take from, with nothing taken: for answers to what reserves nothing.

        One round trip; with Redis away this process's share. None where nothing is limited, or nothing is known.
        """
        scope = self._scope(config, tenant, key, self._ambient.now() + self._clock_ahead)
        if scope is None:
            return None
        try:
            if scope.budgets and not self.budgets.whole:
                raise RedisAway
            status, now_ms, *left = await self._pipe.ask(scope.reserve("", 0, 0), scope.record)
            for other in scope.apart:
                seen, now_ms, *more = await self._pipe.ask(other.reserve("", 0, 0), other.record)
                status, left = seen if status == _TAKEN else status, left + more
        except RedisAway:
            now = self._ambient.now()
            replicas = config.settings.redis.replicas
            left = self._share.left(scope, replicas, self._running, self._heard, int(now))
            return rates(scope, left, int(now * 1000))
        except RedisRefused as error:
            self._complain("reserve", error)
            return None
        return rates(scope, left, now_ms) if status == _TAKEN else None

    def settle(self, reservation: Reservation, tokens: int, nanos: int) -> None:
        """Charges what the call used in the place of what it had reserved. Never waits, never raises; idempotent.

        With Redis away the settlement is kept (up to `unsettled_limit` of them, the oldest give way) and sent when it
        is back; the counters hold the estimate until then.
        """
        if not isinstance(reservation, Held) or reservation.scope is None:
            return
        scope, call_id = reservation.scope, reservation.call_id
        if not (0 <= tokens <= MOST and 0 <= nanos <= MOST):
            tokens, nanos = min(max(0, tokens), MOST), min(max(0, nanos), MOST)
        if scope.running:
            self._end(scope, call_id)
        if reservation.held:
            self._put(scope, call_id, 1, tokens, nanos)
            if self._told:
                self._correct_heard(scope, tokens - reservation.tokens, nanos - reservation.nanos)
        elif call_id in self._local:
            self._local.discard(call_id)
            tokens, nanos = tokens - reservation.tokens, nanos - reservation.nanos
            self.budgets.owe(scope, tokens, nanos, reservation.began)
            self._share.correct(scope, tokens, nanos, reservation.second, int(self._ambient.now()))
            if scope.running:  # a renewal may have made it a lease
                self._put(scope, call_id, 0, 0, 0)

    def _put(self, scope: Scope, call_id: str, requests: int, tokens: int, nanos: int) -> None:
        self._send(scope.record, scope.settle(call_id, requests, tokens, nanos))
        for other in scope.apart:
            self._send(other.record, other.settle(call_id, requests, tokens, nanos))

    def _undo(self, scope: Scope, call_id: str) -> None:
        """Undoes what one script took, the request included; where that is nothing, nothing happens."""
        self._send(scope.record, scope.settle(call_id, 0, 0, 0))

    def _send(self, record: str, settlement: bytes) -> None:
        """`record` is how the name of one of its keys begins: what is in braces there says where they lie."""
        try:
            self._pipe.tell(settlement, record, partial(self._not_settled, record, settlement))
        except RedisAway:
            self._queue(record, settlement)

    def _queue(self, record: str, settlement: bytes) -> None:
        if len(self._unsettled) >= self._unsettled_limit:
            self._unsettled.popleft()
            self.lost_settlements += 1
        self._unsettled.append((record, settlement))

    def _send_settlements(self) -> None:
        """Those that were kept. One whose node of a cluster is still away is kept on."""
        for _ in range(len(self._unsettled)):
            self._send(*self._unsettled.popleft())

    def _not_settled(self, record: str, settlement: bytes, error: Exception) -> None:
        if isinstance(error, RedisAway):
            # It may have been executed: then its record is gone, and the second time changes nothing.
            self._queue(record, settlement)
        else:
            self.lost_settlements += 1
            self._complain("settle", error)

    def _complain(self, script: str, error: Exception) -> None:
        now = self._ambient.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            log.error("redis refuses the %s script: %s", script, error)

    def _scope(self, config: Config, tenant: Tenant, key: ServiceKey, now: float) -> Scope | None:
        known = self._known.get((tenant.id, key.id))
        if (
            known is not None
            and known.config is config
            and known.tenant_quota is tenant.quota
            and known.key_quota is key.quota
            and (known.scope is None or known.scope.starts <= now < known.scope.ends)
        ):
            return known.scope
        if len(self._known) >= _SCOPES:
            self._known.clear()
        scope = make_scope(config, tenant, key, now, self._scripts)
        self._known[tenant.id, key.id] = _Known(config, tenant.quota, key.quota, scope)
        return scope

    def _grant_scope(self, key: VendorKey) -> Scope:
        known = self._granting.get(key.name)
        if known is None or known[0] is not key:
            self._granting[key.name] = known = key, grant_scope(key, self._scripts)
        return known[1]

    # --- budgets that are nearly used up ---

    def nearly_used(self, call: Call, tenant: Tenant) -> bool:
        """Whether a budget that the call would take from is nearly used up, as this replica last heard. Never waits."""
        if not self._told:
            return False
        scope = self._scope(call.config, tenant, call.key, call.received_at + self._clock_ahead)
        return scope is not None and any(
            limit.key in self._told and self._heard.get(limit.key, 0) <= limit.nearly for limit in scope.limits
        )

    def budgets_used(self) -> list[tuple[str, str, float]]:
        """Whose budgets, which, and how much of each is used, of those that callers met; 1 is all. The fullest first.

        As this replica last heard: what running calls have reserved counts as used.
        """
        now = self._ambient.now() + self._clock_ahead
        used = {
            (owner_of(limit), limit.name): 1 - self._heard[limit.key] / limit.value
            for known in self._known.values()
            if known.scope is not None
            for limit in known.scope.limits
            if limit.ends > now and limit.key in self._heard and limit.value
        }
        return sorted(((*whose, ratio) for whose, ratio in used.items()), key=lambda found: -found[2])

    def _hear(self, scope: Scope, left: list[int]) -> None:
        for place, limit in scope.budgets:
            self._heard[limit.key] = remaining = left[place]
            if remaining <= limit.nearly:
                self._tell(limit, remaining)

    def _correct_heard(self, scope: Scope, tokens: int, nanos: int) -> None:
        """`tokens` and `nanos` more than were reserved have been used; below zero for less."""
        for limit in scope.limits:
            if limit.key in self._told and limit.key in self._heard:
                self._heard[limit.key] -= limit.amount(tokens, nanos)

    def _tell(self, limit: Limit, left: int) -> None:
        if limit.key in self._told:
            return
        now = self._ambient.now() + self._clock_ahead
        self._told = {key: ends for key, ends in self._told.items() if ends > now}
        self._told[limit.key] = limit.ends
        for told in self.on_nearly_used:
            told(limit, left)

    # --- concurrency: leases ---

    def _begin(self, scope: Scope, call_id: str) -> None:
        for key in scope.running:
            self._running.setdefault(key, set()).add(call_id)

    def _end(self, scope: Scope, call_id: str) -> None:
        for key in scope.running:
            running = self._running.get(key)
            if running is not None:
                running.discard(call_id)
                if not running:
                    del self._running[key]

    async def run(self) -> None:
        """Renews leases until cancelled."""
        while True:
            await self._ambient.sleep(RENEW_SECONDS)
            self.run_once()

    def run_once(self) -> int:
        """Renews the leases of all running calls; returns how many. Settlements that wait are tried again."""
        self._send_settlements()
        if len(self._heard) > _HEARD:  # days and months go by
            self._heard.clear()
        renewed = 0
        for key, running in self._running.items():
            call_ids = list(running)
            for start in range(0, len(call_ids), _RENEWED_AT_ONCE):
                some = call_ids[start : start + _RENEWED_AT_ONCE]
                try:
                    self._pipe.send(
                        "EVALSHA", self._renew, 1, key, LEASE_MS, *some, on_error=partial(self._complain, "renew")
                    )
                except RedisAway:
                    break
                renewed += len(some)
        return renewed

    # --- while Redis is away ---

    def _take_locally(self, call: Call, tenant: Tenant, scope: Scope, tokens: int, nanos: int) -> Held:
        """By each limit's policy. Raises LimitsUnavailable, LimitError."""
        closed = [limit.name for limit in scope.limits if limit.away == "closed"]
        if closed:
            raise LimitsUnavailable(
                f"The gateway cannot check {closed[0]} just now. Send the call again in a second.",
                retry_after_seconds=1.0,
            )
        settings = call.config.settings.redis
        now = self._ambient.now()
        second = int(now)
        left = self._share.left(scope, settings.replicas, self._running, self._heard, second)
        if any(limit.amount(tokens, nanos) > remaining for limit, remaining in zip(scope.limits, left, strict=True)):
            waits_ms = self._share.waits_ms(scope, left, tokens, nanos, second)
            raise refusal(scope, left, waits_ms, tokens, nanos, int(now * 1000), share=True)
        self._share.take(scope, tokens, nanos, second)
        for limit, remaining in zip(scope.limits, left, strict=True):
            # Where the other replicas use as much of their shares.
            together = (remaining - limit.amount(tokens, nanos)) * settings.replicas
            if together <= limit.nearly:
                self._tell(limit, together)
        began = int(call.received_at)
        self.budgets.owe(scope, tokens, nanos, began)
        self._begin(scope, call.event_id)
        self._local.add(call.event_id)
        self.local_calls += 1
        after = [
            remaining - limit.amount(tokens, nanos) if remaining < MOST else MOST
            for limit, remaining in zip(scope.limits, left, strict=True)
        ]
        shown = rates(scope, after, int(now * 1000))
        return Held(call.event_id, tenant.id, tokens, False, shown, None, nanos, scope, second, began)

    def _returned(self) -> None:
        self.run_once()

    def _whole(self) -> None:
        self._share.end(self._heard, int(self._ambient.now()))


def _before(scope: Scope, left: list[int], tokens: int, nanos: int) -> list[int]:
    """What the first of a scope's limits had left before a call took from them: it is given back."""
    answered = tokens == ANSWERED
    return [
        remaining + (0 if answered and limit.kind != "rpm" else limit.amount(tokens, nanos))
        for remaining, limit in zip(left, scope.limits, strict=False)
    ]
