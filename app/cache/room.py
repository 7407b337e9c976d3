"""The room of answers from before, as the journey sees it: `ask`, look, keep, once, and what was invalidated."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.cache.entry import MAX_ENTRY_BYTES, Entry, opened, sealed
from app.cache.epochs import Epochs, Scope
from app.cache.flight import Flight
from app.cache.once import KEPT_SECONDS, MARK_MS, Kept, Marks, Once
from app.cache.partition import NO_WISHES, Ask, ask, prefix, revision
from app.config import Alias, TenantCache
from app.control import Control
from app.core import FETCH_LEASE_MS, Exchange, Fetch, Usage
from app.dialects.replay import REPLAYS
from app.redis_pipe import Argument, RedisAway, RedisPipe, RedisRefused

log = logging.getLogger("gateway")

RENEW_SECONDS = FETCH_LEASE_MS / 4000
_LOG_SECONDS = 60.0


class Seen(Struct, frozen=True):
    """What a look for questions that mean the same found.

    `entry` and its exact `key` where an answer is to be served, with its `similarity`; None: ask the vendor. `notes`
    are the finder's own, for `Semantic.observe`. `check`: what is served is to be asked again behind the caller's back.
    """

    entry: Entry | None = None
    key: str = ""
    similarity: float | None = None
    notes: Any = None
    check: bool = False


class Semantic(Protocol):
    """Who finds questions that mean the same. `ask.turn.text` is the question, `ask.partition` where it may look."""

    async def find(self, ask: Ask) -> Seen:
        """One round trip, within its own deadline. Never raises: what fails is a miss."""

    def observe(self, ask: Ask, seen: Seen | None, key: str, entry: Entry) -> None:
        """The vendor answered what was not served: `entry` is on its way to Redis under `key`. Never waits or raises.

        Every miss that had a neighbour shows here whether the neighbour's answer would have been right.
        """

    def reverified(self, ask: Ask, seen: Seen, entry: Entry) -> None:
        """What the vendor says to a question that was answered by `seen`: `entry` is not kept."""

    def forget(self, tenant_id: str, alias: str | None) -> None:
        """What is kept of a tenant (an alias of its) is deleted. Never waits or raises."""


class Cache:
    """Answers from before. `lost` counts what could not be kept, `damaged` entries that were none."""

    def __init__(self, pipe: RedisPipe, control: Control, ambient: Ambient, semantic: Semantic | None = None) -> None:
        here = Path(__file__)
        self._look, self._keep, self._hold, self._forget = (
            pipe.script(here.with_name(f"{name}.lua").read_text()) for name in ("look", "keep", "hold", "forget")
        )
        self._pipe = pipe
        self._ambient = ambient
        self.semantic = semantic
        self.epochs = Epochs(control, ambient)
        self.marks = Marks(pipe)
        self.flights: dict[tuple[str, bool, bool], Flight] = {}
        self._held: dict[str, tuple[str, int]] = {}
        self._sweeping: set[asyncio.Task[int]] = set()
        self._logged = float("-inf")
        self.lost = self.damaged = self.evicted = 0

    # --- what a call asks ---

    def ask(self, exchange: Exchange, alias: Alias) -> Ask:
        """What a call asks of the cache. Nothing is waited for."""
        call, tenant = exchange.call, exchange.tenant
        wishes = call.wishes or NO_WISHES
        known = revision(wishes, alias.cache) if alias.cache else ""
        scope = tenant.id, alias.name, known
        tags = {tag: self.epochs.of_tag(*scope, tag) for tag in wishes.tags}
        asked = ask(call, exchange.request, tenant, alias, exchange.rule, self.epochs.of(*scope), tags)
        if asked.why_not is None and not self.epochs.known:
            return msgspec.structs.replace(asked, why_not="unknown")
        return asked

    def fetch(self, ask: Ask) -> Fetch | None:
        """What the reservation is to bring along; None where no answer from before will do."""
        return Fetch(ask.key, _lease(ask.key), _used(ask.tenant_id)) if ask.look else None

    # --- looking ---

    def opened(self, ask: Ask, data: bytes, key: str | None = None) -> Entry | None:
        """The entry in these bytes, if it may answer the call. One that is damaged or invalidated is deleted.

        `key` is where it lay, where that is not under the call's own words.
        """
        key = key or ask.key
        entry = opened(key, data)
        if entry is None:
            self.damaged += 1
        elif all(self._tag(ask, tag) == epoch for tag, epoch in entry.tags.items()):
            most = ask.wishes.max_age
            return entry if most is None or self.age_seconds(entry) <= most else None
        self._send("UNLINK", key)
        return None

    def _tag(self, ask: Ask, tag: str) -> str:
        return self.epochs.of_tag(ask.tenant_id, ask.alias, revision(ask.wishes, ask.policy), tag)

    def age_seconds(self, entry: Entry) -> float:
        return max(0.0, self._ambient.now() - entry.kept_at)

    async def look(self, ask: Ask, call_id: str) -> bytes | bool | None:
        """As `Reservation.fetched`: bytes of an entry, else whether the lease is this call's; None: Redis is away."""
        try:
            found = await self._pipe.execute(
                "EVALSHA", self._look, 3, ask.key, _lease(ask.key), _used(ask.tenant_id), call_id, FETCH_LEASE_MS
            )
        except (RedisAway, RedisRefused):
            return None
        return found == 1 if isinstance(found, int) else found

    # --- keeping ---

    def kept(self, ask: Ask, exchange: Exchange, body: bytes) -> Entry | None:
        """The entry of an answer that was good to its end; None where such an answer is not told again."""
        usage = exchange.usage or Usage()
        text = REPLAYS[ask.dialect].text(body)
        if text is None or exchange.target is None or len(body) > MAX_ENTRY_BYTES:
            return None
        return Entry(
            body=body,
            provider=exchange.target.provider.name,
            model=exchange.model_resolved or exchange.target.model,
            usage=usage,
            kept_at=self._ambient.now(),
            question=ask.turn.text if ask.turn else "",
            tags=dict(ask.tags),
        )

    def keep(self, ask: Ask, seen: Seen | None, entry: Entry) -> None:
        """Never waits, never raises."""
        self._put(ask.key, entry, ask.tenant_id, ask.tenant, ask.policy.ttl_seconds)
        if self.semantic is not None and ask.turn is not None:
            self.semantic.observe(ask, seen, ask.key, entry)

    def finish(self, once: Once, tenant_id: str, tenant: TenantCache, answer: Kept | None) -> None:
        """An idempotency key's call is done: its answer is kept where the tenant's answers are, its mark in any case.

        None: it may be tried again, as if nothing had been.
        """
        if answer is None:
            self.let_go(once.mark)
            return
        self._held.pop(once.mark, None)
        if tenant.store and answer.body is not None and len(answer.body) <= MAX_ENTRY_BYTES:
            entry = Entry(msgspec.msgpack.encode(answer), None, None, Usage(), self._ambient.now())
            self._put(once.answer, entry, tenant_id, tenant, KEPT_SECONDS)
        self._send(*self.marks.done(once))

    def _put(self, key: str, entry: Entry, tenant_id: str, tenant: TenantCache, ttl_seconds: float) -> None:
        self._send(
            "EVALSHA", self._keep, 4, key, _used(tenant_id), *_books(tenant_id),
            sealed(key, entry), int(ttl_seconds * 1000), tenant.max_bytes,
        )  # fmt: skip

    # --- leases and marks ---

    def hold_lease(self, ask: Ask, call_id: str) -> None:
        """From now on the lease is renewed until it is let go."""
        self._held[_lease(ask.key)] = call_id, FETCH_LEASE_MS

    def hold_mark(self, once: Once) -> None:
        self._held[once.mark] = once.running, MARK_MS

    def let_go_lease(self, ask: Ask) -> None:
        self.let_go(_lease(ask.key))

    def let_go(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            self._send("EVALSHA", self._hold, 1, name, held[0], 0)

    async def run(self) -> None:
        """Renews until cancelled."""
        while True:
            await self._ambient.sleep(RENEW_SECONDS)
            self.run_once()

    def run_once(self) -> int:
        """Renews the leases and marks of running calls; returns how many."""
        for name, (value, milliseconds) in self._held.items():
            self._send("EVALSHA", self._hold, 1, name, value, milliseconds)
        return len(self._held)

    # --- invalidation ---

    async def invalidate(self, scope: Scope, by: str, epoch: str | None = None) -> str:
        """From now on, here at once and within a second everywhere, nothing of `scope` that was kept is found.

        What is of a whole tenant or alias is deleted too. Raises RedisAway, RedisRefused.
        """
        epoch = await self.epochs.begin(scope, by, epoch)
        if scope.revision is None and scope.tag is None and scope.tenant is not None:
            self._sweep(scope.tenant, scope.alias)
        return epoch

    def _sweep(self, tenant: str, alias: str | None) -> None:
        sweeping = asyncio.ensure_future(self.sweep(tenant, alias))
        self._sweeping.add(sweeping)
        sweeping.add_done_callback(self._sweeping.discard)

    async def sweep(self, tenant: str, alias: str | None) -> int:
        """Deletes what is kept of a tenant, or of one alias of its; returns how much that was."""
        begins = f"sc:{{{tenant}}}:" if alias is None else prefix(tenant, alias)
        at, deleted = b"0", 0
        if self.semantic is not None:
            self.semantic.forget(tenant, alias)
        try:
            while True:
                at, some = await self._pipe.execute(
                    "EVALSHA", self._forget, 3, _used(tenant), *_books(tenant), begins, at
                )
                deleted += some
                if at == b"0":
                    return deleted
        except (RedisAway, RedisRefused) as error:  # nobody finds it, and it ends by itself
            self._complain("forget", error)
            return deleted

    # --- Redis ---

    def _send(self, *command: Argument) -> None:
        try:
            self._pipe.send(*command, on_error=partial(self._failed, str(command[0])))
        except RedisAway:
            self.lost += 1

    def _failed(self, what: str, error: Exception) -> None:
        self.lost += 1
        if isinstance(error, RedisRefused):
            self._complain(what, error)

    def _complain(self, what: str, error: Exception) -> None:
        now = self._ambient.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            log.error("redis does not do what the cache asks (%s): %s", what, error)


def _lease(key: str) -> str:
    return key + ":lease"


def _used(tenant_id: str) -> str:
    return f"sc:{{{tenant_id}}}:_used"


def _books(tenant_id: str) -> tuple[str, str]:
    """By when entries end, and their bytes."""
    return f"sc:{{{tenant_id}}}:_ends", f"sc:{{{tenant_id}}}:_bytes"
