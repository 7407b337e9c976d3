"""Warnings: a budget that is nearly used up is told to a webhook, once per window over all replicas.

Each replica notices for itself, and claims the warning in Redis before it sends: who finds it claimed leaves it to the
other. Nothing here is on the way of a call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from app.ambient import Ambient, timestamp
from app.config import Config, Secret
from app.limits.scopes import Limit
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

SEND_SECONDS = 10.0
"""For one attempt, connection included."""
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 1.0, 60.0
GIVE_UP_SECONDS = 3600.0
"""A warning that could not be told for so long is dropped; every replica has logged it."""
CLAIM_SECONDS = 180
"""A claim of a replica that died lapses: longer than an attempt and the longest wait after it."""
MAX_WAITING = 1000
_EARLIER_SECONDS = 3600
"""How much longer than its window a told warning is remembered: clocks differ."""


def client() -> httpx.AsyncClient:
    """The address is the configuration's, so no redirect leads elsewhere."""
    import httpx

    return httpx.AsyncClient(follow_redirects=False, timeout=SEND_SECONDS)


class _Warning(Struct, frozen=True):
    limit: Limit
    left: int

    @property
    def claim(self) -> str:
        """One per owner, limit and window, as the budget's own key is; on the same cluster slot."""
        return "warned:" + self.limit.key.removeprefix("rl:")

    def text(self, environment: str) -> str:
        limit = self.limit
        used = limit.value - self.left
        return (
            f"{limit.whose} ({environment}) has used {used * 100 // limit.value} % of its budget of "
            f"{limit.figure(limit.value)} per {limit.period}: {limit.figure(max(0, self.left))} left until "
            f"{timestamp(limit.ends)[:16]}Z. Calls that need more are refused with `budget_exceeded`."
        )


class Warnings:
    """Sends in Slack's incoming-webhook format (api.slack.com/messaging/webhooks): POST `{"text": …}`, 2xx is taken.

    Counts for metrics: `sent`; `failed` attempts; `dropped` warnings, that nobody was told; `left` to another replica.
    The configuration is asked at each attempt, so a mended address reaches what waits.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        pipe: RedisPipe,
        open_client: Callable[[], httpx.AsyncClient],
        ambient: Ambient,
    ) -> None:
        self._config = config
        self._pipe = pipe
        self._open_client = open_client
        self._client: httpx.AsyncClient | None = None
        self._ambient = ambient
        self._waiting: asyncio.Queue[_Warning] = asyncio.Queue(MAX_WAITING)
        self.sent = self.failed = self.dropped = self.left = 0

    def take(self, limit: Limit, left: int) -> None:
        """Hands a warning over. Never waits."""
        warning = _Warning(limit, left)
        config = self._config()
        log.warning("%s", warning.text(config.environment))
        if config.settings.warnings_webhook is None:
            return
        try:
            self._waiting.put_nowait(warning)
        except asyncio.QueueFull:
            self.dropped += 1

    async def run(self) -> None:
        while True:
            await self.run_once()

    async def run_once(self) -> int:
        """Tells the next warning, or sees that another replica does; returns how many were sent."""
        warning = await self._waiting.get()
        before = self.sent
        if await self._claimed(warning):
            await self._tell(warning)
        else:
            self.left += 1
        return self.sent - before

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _tell(self, warning: _Warning) -> None:
        """Until it is taken, with waits that double, or as the receiver asks for them, both up to the cap."""
        give_up = self._ambient.monotonic() + GIVE_UP_SECONDS
        backoff = BACKOFF_SECONDS
        while (webhook := self._config().settings.warnings_webhook) is not None:
            fault, asked = await self._post(webhook, warning.text(self._config().environment))
            if fault is None:
                self.sent += 1
                ends = warning.limit.ends - self._ambient.now()
                self._hold(warning, max(0, int(ends)) + _EARLIER_SECONDS)
                return
            self.failed += 1
            log.error("the warnings' webhook %s", fault)
            wait_seconds = min(BACKOFF_CAP_SECONDS, max(backoff, asked))
            if self._ambient.monotonic() + wait_seconds >= give_up:
                break
            backoff *= 2
            await self._ambient.sleep(wait_seconds)
            self._hold(warning, CLAIM_SECONDS)
        self.dropped += 1

    async def _post(self, webhook: Secret, text: str) -> tuple[str | None, float]:
        """What went wrong, never with the address, and the seconds that the receiver asks us to wait."""
        import httpx

        if self._client is None:
            self._client = self._open_client()
        try:
            async with asyncio.timeout(SEND_SECONDS):
                answer = await self._client.post(
                    webhook.reveal(),
                    content=msgspec.json.encode({"text": text}),
                    headers={"content-type": "application/json"},
                )
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            return f"cannot be reached ({type(error).__name__})", 0.0
        if answer.is_success:
            return None, 0.0
        asked = answer.headers.get("retry-after", "")
        return f"answered {answer.status_code}", float(asked) if asked.isascii() and asked.isdigit() else 0.0

    # --- who tells ---

    async def _claimed(self, warning: _Warning) -> bool:
        """Whether this replica is the one to tell. With Redis away each is."""
        try:
            return await self._pipe.execute("SET", warning.claim, "1", "NX", "EX", CLAIM_SECONDS) is not None
        except (RedisAway, RedisRefused):
            return True

    def _hold(self, warning: _Warning, seconds: int) -> None:
        try:
            self._pipe.send("SET", warning.claim, "1", "EX", seconds)
        except RedisAway:
            log.warning("redis is away: another replica may send the same warning")
