"""The limits room: what a call may need is reserved before it and settled after it, one Redis round trip each.

A scope is a set of limits on one cluster slot: a tenant's (requests in 60 seconds, tokens per UTC day) and the one
that all tenants share (tokens in 60 seconds). A call takes from every limit of its scopes or from none.
The arithmetic is in `limits_reserve.lua` and `limits_settle.lua`, on Redis's clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from msgspec import Struct

from app.ambient import Ambient, timestamp
from app.config import Tenant, WrittenRedis
from app.core import Reservation
from app.errors import BudgetExceeded, LimitError, LimitsUnavailable, RateLimitExceeded
from app.redis_pipe import Argument, RedisAway, RedisPipe, RedisRefused

log = logging.getLogger(__name__)

_REFUSED, _TAKEN, _OTHER_DAY = 0, 1, 2
"""What a reserve script's answer begins with."""
_DAY_SECONDS = 86_400
_LOG_SECONDS = 60.0
"""A script that fails does so for every call: one line in so many seconds says it."""


class Limit(Struct, frozen=True, gc=False):
    """One limit. `window` is in the scripts' words."""

    name: Literal["tenant_rpm", "tenant_daily_tokens", "global_tpm"]
    counts: Literal["requests", "tokens"]
    window: Literal["60s", "day"]
    key: str
    value: int


class Scope(Struct, frozen=True, gc=False):
    """Limits that a call takes from with one script; what it took is noted under `lease` and the call's id.

    `day` is the UTC day in days since 1970, the one that the keys of day limits are named after.
    """

    day: int
    lease: str
    limits: tuple[Limit, ...]
    keys: tuple[str, ...]

    def reserve(self, sha: str, call_id: str, tokens: int, lease_seconds: int) -> list[Argument]:
        command = ["EVALSHA", sha, len(self.keys) + 1, self.lease + call_id, *self.keys, lease_seconds, self.day]
        for limit in self.limits:
            command += (limit.window, limit.value, tokens if limit.counts == "tokens" else 1)
        return command

    def settle(self, sha: str, call_id: str, requests: int, tokens: int) -> list[Argument]:
        command = ["EVALSHA", sha, len(self.keys) + 1, self.lease + call_id, *self.keys]
        for limit in self.limits:
            command += (limit.window, tokens if limit.counts == "tokens" else requests)
        return command


class Held(Reservation, frozen=True, gc=False):
    """A reservation with the scopes that hold it, or, with `held` False, that may: Redis went away over it."""

    scopes: tuple[Scope, ...] = ()


class Limits:
    """Counts for metrics: `unmetered_calls` passed without limits; `lost_settlements` stay charged at the estimate.

    `lease_seconds` must be above the longest call. A call that is settled later, or never because its process died,
    stays charged at what it had reserved.
    """

    def __init__(
        self, pipe: RedisPipe, ambient: Ambient, *, lease_seconds: int = 7200, unsettled_limit: int = 10_000
    ) -> None:
        here = Path(__file__)
        self._reserve = pipe.script(here.with_name("limits_reserve.lua").read_text())
        self._settle = pipe.script(here.with_name("limits_settle.lua").read_text())
        self._pipe = pipe
        self._ambient = ambient
        self._lease_seconds = lease_seconds
        self._unsettled_limit = unsettled_limit
        self._unsettled: deque[list[Argument]] = deque()
        self._clock_ahead = 0.0
        self._known: dict[str, tuple[Tenant, int | None, int, tuple[Scope, ...]]] = {}
        self._logged = float("-inf")
        self.unmetered_calls = 0
        self.lost_settlements = 0
        pipe.on_return.append(self._send_settlements)

    async def reserve(
        self, call_id: str, tenant: Tenant, tokens: int, global_tpm: int | None, redis: WrittenRedis
    ) -> Reservation:
        """Takes one request and `tokens` (at least 0) from all limits of the call, in one round trip.

        Raises `RateLimitExceeded` or `BudgetExceeded` and takes nothing; with Redis away gives an unheld reservation
        or raises `LimitsUnavailable`, as `redis.away` says. A caller that is cancelled leaves nothing reserved.
        """
        sent: list[Scope] = []
        try:
            return await self._take(call_id, tenant, tokens, global_tpm, sent)
        except asyncio.CancelledError:
            self._give_back(call_id, sent)
            raise
        except (RedisAway, RedisRefused) as error:
            # What was sent may have been taken, or will be when Redis gets to it: it is settled like any other.
            if isinstance(error, RedisRefused):
                self._complain("reserve", error)
            if redis.away == "closed":
                self._give_back(call_id, sent)
                raise LimitsUnavailable(
                    "The gateway cannot check its limits just now. Send the call again in a second.",
                    retry_after_seconds=1.0,
                ) from error
            self.unmetered_calls += 1
            return Held(call_id, tenant.id, tokens, held=False, scopes=tuple(sent))

    async def _take(
        self, call_id: str, tenant: Tenant, tokens: int, global_tpm: int | None, sent: list[Scope]
    ) -> Reservation:
        # A second time only where Redis is in another UTC day than this replica's clock.
        for _ in range(2):
            now = self._ambient.now()
            scopes = self._scopes(tenant, global_tpm, int(now + self._clock_ahead) // _DAY_SECONDS)
            answers = await self._ask(call_id, tokens, scopes, sent)
            untaken = [n for n, answer in enumerate(answers) if answer[0] != _TAKEN]
            if not untaken:
                return _held(call_id, tenant, tokens, scopes, answers)
            self._give_back(call_id, [scope for n, scope in enumerate(scopes) if n not in untaken])
            refusals = [
                _refusal(tenant, scopes[n].limits[which - 1], tokens, wait_ms, remaining)
                for n in untaken
                if answers[n][0] == _REFUSED
                for _, which, wait_ms, remaining in [answers[n]]
            ]
            if refusals:
                raise max(refusals, key=lambda error: error.retry_after_seconds or 0.0)
            self._clock_ahead = answers[untaken[0]][1] - now
        raise RedisRefused("its UTC day changed twice within a call")

    async def _ask(self, call_id: str, tokens: int, scopes: tuple[Scope, ...], sent: list[Scope]) -> list[list[int]]:
        """One script for each scope, all in one pipeline. `sent` gets the scopes that Redis has or may have seen."""
        answers: list[asyncio.Future[list[int]]] = []
        sent.clear()
        try:
            for scope in scopes:
                command = scope.reserve(self._reserve, call_id, tokens, self._lease_seconds)
                answers.append(self._pipe.execute(*command))
                sent.append(scope)
            return [await answer for answer in answers]
        except BaseException:
            for answer in answers:
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()  # looked at, or asyncio would report it as forgotten
            raise

    def settle(self, reservation: Reservation, used_tokens: int) -> None:
        """Charges `used_tokens` instead of what was reserved. Never waits, never raises; a second time changes nothing.

        With Redis away the settlement is kept (up to `unsettled_limit` of them, the oldest give way) and sent when it
        is back; the counters hold the estimate until then, and for good once the lease has run out.
        """
        if isinstance(reservation, Held):
            for scope in reservation.scopes:
                self._queue(scope.settle(self._settle, reservation.call_id, 1, max(0, used_tokens)))
            self._send_settlements()

    def _give_back(self, call_id: str, scopes: Sequence[Scope]) -> None:
        """Undoes a reservation, requests included; where there is none, nothing happens."""
        for scope in scopes:
            self._queue(scope.settle(self._settle, call_id, 0, 0))
        self._send_settlements()

    def _queue(self, settlement: list[Argument]) -> None:
        if len(self._unsettled) >= self._unsettled_limit:
            self._unsettled.popleft()
            self.lost_settlements += 1
        self._unsettled.append(settlement)

    def _send_settlements(self) -> None:
        while self._unsettled:
            settlement = self._unsettled[0]
            try:
                self._pipe.send(*settlement, on_error=partial(self._not_settled, settlement))
            except RedisAway:
                return
            self._unsettled.popleft()

    def _not_settled(self, settlement: list[Argument], error: Exception) -> None:
        if isinstance(error, RedisAway):
            # It may have been executed: then its lease is gone, and the second time changes nothing.
            self._queue(settlement)
        else:
            self.lost_settlements += 1
            self._complain("settle", error)

    def _complain(self, script: str, error: Exception) -> None:
        now = self._ambient.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            log.error("redis refuses the %s script: %s", script, error)

    def _scopes(self, tenant: Tenant, global_tpm: int | None, day: int) -> tuple[Scope, ...]:
        known = self._known.get(tenant.id)
        if known is None or known[0] is not tenant or known[1:3] != (global_tpm, day):
            known = self._known[tenant.id] = tenant, global_tpm, day, tuple(_scopes(tenant, global_tpm, day))
        return known[3]


def _scopes(tenant: Tenant, global_tpm: int | None, day: int) -> Iterator[Scope]:
    """All limits of a call in one scope: one script, all or nothing. A Redis Cluster would need the global limit in a
    scope of its own, as its key is on another slot; the callers take any number of them.

    The braces make the tenant the keys' hash tag: its keys share a cluster slot. Names hold no braces.
    """
    own = f"rl:{{{tenant.id}}}:"
    limits = []
    if tenant.rpm is not None:
        limits.append(Limit("tenant_rpm", "requests", "60s", f"{own}rpm", tenant.rpm))
    if tenant.daily_token_cap is not None:
        date = timestamp(day * _DAY_SECONDS)[:10].replace("-", "")
        limits.append(Limit("tenant_daily_tokens", "tokens", "day", f"{own}tokens:{date}", tenant.daily_token_cap))
    if global_tpm is not None:
        limits.append(Limit("global_tpm", "tokens", "60s", "rl:{_global}:tpm", global_tpm))
    if limits:
        yield Scope(day, f"{own}call:", tuple(limits), tuple(limit.key for limit in limits))


def _held(
    call_id: str, tenant: Tenant, tokens: int, scopes: tuple[Scope, ...], answers: list[list[int]]
) -> Reservation:
    remaining_requests = remaining_tokens = None
    reset_requests_ms = reset_tokens_ms = 0
    if tenant.rpm is not None:
        remaining_requests, reset_requests_ms = answers[0][1:3]
    if tenant.daily_token_cap is not None:
        at = 1 if tenant.rpm is None else 3
        remaining_tokens, reset_tokens_ms = answers[0][at : at + 2]
    return Held(
        call_id,
        tenant.id,
        tokens,
        True,
        tenant.rpm,
        remaining_requests,
        reset_requests_ms / 1000,
        tenant.daily_token_cap,
        remaining_tokens,
        reset_tokens_ms / 1000,
        scopes,
    )


def _refusal(tenant: Tenant, limit: Limit, tokens: int, wait_ms: int, remaining: int) -> LimitError:
    wait_seconds = wait_ms / 1000
    if limit.name == "tenant_rpm":
        text = f"Tenant {tenant.id} has used its limit of {limit.value} requests in any 60 seconds."
    elif limit.name == "global_tpm":
        text = (
            f"All tenants together have a limit of {limit.value} tokens in any 60 seconds; "
            f"this call may need {tokens}, more than is left."
        )
    else:
        text = (
            f"Tenant {tenant.id} has a budget of {limit.value} tokens per UTC day with {remaining} left; "
            f"this call may need {tokens}."
        )
    above = limit.counts == "tokens" and tokens > limit.value
    if above:
        text += " Waiting does not help: lower max_tokens or shorten the prompt."
    elif limit.window == "day":
        text += f" Lower max_tokens, or wait until midnight UTC, in {wait_seconds:.0f} seconds."
    else:
        text += f" Send it again in {wait_seconds:.1f} seconds."
    kind = BudgetExceeded if limit.window == "day" else RateLimitExceeded
    return kind(
        text,
        limit=limit.name,
        retry_after_seconds=wait_seconds,
        should_retry=False if above or limit.window == "day" else None,
    )
