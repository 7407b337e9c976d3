"""What the tests of the limits share: owners, calls, and a look at the counters in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.ambient import Ambient, timestamp
from app.config import UNLIMITED, Config, Quota, ServiceKey, Tenant, WrittenAway, WrittenRedis
from app.core import Call, Reservation
from app.errors import LimitError
from app.limits import Limits
from app.limits.scopes import WHOLE, period
from app.redis_pipe import RedisPipe
from tests import gateway_parts
from tests.redis_parts import AMBIENT, RedisServer, running

LIMITS = ("rpm", "tpm", "concurrency", "daily_token_cap", "daily_usd", "monthly_usd", "global_rpm", "global_tpm")
OPEN, CLOSED, SHARE = (WrittenAway(**dict.fromkeys(LIMITS, policy)) for policy in ("open", "closed", "local_share"))
DAY_SECONDS = 86_400
KEY_ID = "k3f9a0b1c2d4"
START_SECOND = 4_102_444_800
"""Where the clock of tests begins that have one of their own: so far ahead that nothing expires by the real one."""


def a_tenant(name: str = "acme-corp", **quota: Any) -> Tenant:
    return Tenant(name, "standard", "standard", None, Quota(**quota))


def a_key(**quota: Any) -> ServiceKey:
    return ServiceKey(KEY_ID, "support-bot", None, None, quota=Quota(**quota))


KEY = a_key()


def a_config(away: WrittenAway = CLOSED, shared: Quota = UNLIMITED, replicas: int = 2) -> Config:
    base = gateway_parts.config()
    redis = WrittenRedis(away=away, replicas=replicas, timeout_ms=100, probe_seconds=0.05)
    return msgspec.structs.replace(
        base, settings=msgspec.structs.replace(base.settings, redis=redis), global_quota=shared
    )


def whole(server: RedisServer) -> RedisServer:
    """Marks an empty Redis as one that has lost nothing."""
    server.client.set(WHOLE, 0)
    return server


@contextlib.asynccontextmanager
async def limits_on(server: RedisServer, timeout_ms: float = 20_000, **options: Any) -> AsyncIterator[Limits]:
    """Limits as they run in a replica, on a pipe of their own; `pipe` is it."""
    async with running(pipe_to(server, timeout_ms)) as pipe:
        limits = Limits(pipe, AMBIENT, **options)
        limits.pipe = pipe
        task = asyncio.create_task(limits.budgets.run())
        try:
            yield limits
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Caller:
    """Calls under one configuration, numbered, or named by the test."""

    def __init__(
        self,
        limits: Limits,
        tenant: Tenant,
        *,
        key: ServiceKey = KEY,
        away: WrittenAway = CLOSED,
        replicas: int = 2,
        ambient: Ambient = AMBIENT,
        **shared: Any,
    ) -> None:
        self.limits = limits
        self.tenant = tenant
        config = a_config(away, Quota(**shared) if shared else UNLIMITED, replicas)
        self._call = gateway_parts.call(b"{}", ambient, config=config, key=key)
        self._made = 0

    def call(self, call_id: str | None = None) -> Call:
        self._made += 1
        now = self._call.received_at if call_id is None else AMBIENT.now()
        return msgspec.structs.replace(
            self._call, event_id=call_id or f"{self.tenant.id}-{self._made}", received_at=now
        )

    async def reserve(self, tokens: int = 1, nanos: int = 0, call_id: str | None = None) -> Reservation:
        return await self.limits.reserve(self.call(call_id), self.tenant, tokens, nanos)

    async def refusal(self, tokens: int = 1, nanos: int = 0) -> LimitError:
        with pytest.raises(LimitError) as caught:
            await self.reserve(tokens, nanos)
        return caught.value

    async def admitted(self, tokens: int = 1, nanos: int = 0) -> bool:
        try:
            await self.reserve(tokens, nanos)
        except LimitError:
            return False
        return True


BRIEFLY_MS = 400
"""How long a Redis that a test freezes is waited for; where it answers before, it must within that."""


def not_just_before_midnight(seconds: float, zone: str = "UTC") -> None:
    """Waits for it where it would come amid a test that asks what a day or a month has had."""
    while period(False, zone, time.time())[2] - time.time() < seconds:
        time.sleep(0.5)


def pipe_to(server: RedisServer, timeout_ms: float = 20_000) -> RedisPipe:
    return RedisPipe(server.url, AMBIENT, timeout_ms=timeout_ms, probe_seconds=0.05, probation_seconds=0)


def today() -> str:
    return timestamp(time.time())[:10].replace("-", "")


class Counters:
    """An owner's counters as they stand in Redis."""

    def __init__(self, server: RedisServer, tag: str = "acme-corp") -> None:
        self._client = server.client
        self._prefix = f"rl:{{{tag}}}:"

    def _window(self, kind: str) -> int:
        fields = self._client.hgetall(f"{self._prefix}{kind}")
        return sum(int(amount) for field, amount in fields.items() if field.isdigit())

    def _counter(self, key: str) -> int:
        return int(self._client.get(self._prefix + key) or 0)

    @property
    def rpm(self) -> int:
        return self._window("rpm")

    @property
    def tpm(self) -> int:
        return self._window("tpm")

    @property
    def running(self) -> int:
        return self._client.zcard(f"{self._prefix}concurrency")

    @property
    def day_tokens(self) -> int:
        return self._counter(f"daily_tokens:{today()}")

    @property
    def day_nanos(self) -> int:
        return self._counter(f"daily_usd:{today()}")

    @property
    def month_nanos(self) -> int:
        return self._counter(f"monthly_usd:{today()[:6]}")

    @property
    def all(self) -> tuple[int, ...]:
        return self.rpm, self.tpm, self.running, self.day_tokens, self.day_nanos, self.month_nanos


def records(server: RedisServer) -> list[str]:
    return server.client.keys("rl:*:call:*")


class Script:
    """A script of the product under a clock of the test: its one reading of Redis's TIME is given instead.

    Everything else is as it runs in production.
    """

    def __init__(self, server: RedisServer, name: str) -> None:
        text = (Path(__file__).parents[1] / "app" / "limits" / name).read_text()
        assert text.count("call('TIME')") == 1
        self._client = server.client
        self._sha = server.client.script_load(text.replace("call('TIME')", "{ARGV[#ARGV - 1], ARGV[#ARGV]}"))

    def __call__(self, now_us: int, keys: list[str], *arguments: str | int) -> Any:
        return self._client.evalsha(self._sha, len(keys), *keys, *arguments, *divmod(now_us, 1_000_000))
