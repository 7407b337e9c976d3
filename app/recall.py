"""The part of the journey that remembers: the answer from before, the one that is on its way, the one kept for a key.

It comes with the budget, for both are one round trip: what was answered before costs a request and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from msgspec import Struct

from app.ambient import TIMER_SECONDS, Ambient
from app.cache import Ask, Cache, Entry, Flight, Kept, Once, Seen, kept, once
from app.config import Alias
from app.config.caching import LOCAL_EMBEDDERS
from app.core import Exchange, Fetch, Recalled, Usage
from app.dialects.replay import REPLAYS
from app.errors import (
    GatewayError,
    IdempotencyDone,
    IdempotencyInProgress,
    IdempotencyMismatch,
    LedgerUnavailable,
    UpstreamError,
    VendorBroke,
    VendorRefused,
    VendorTimeout,
)
from app.limits import Limits
from app.routing import sum_up

FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.02, 0.25
"""How often it is looked whether another has the answer by now: soon at first, then less and less."""
OF_VENDORS = (UpstreamError, VendorRefused)
"""What a leader's failure says of the request or its vendors, and so to everyone who asked the same."""


class Memory(Struct, kw_only=True, eq=False):
    """What one call has to do with answers from before.

    `flight` is its own answer on its way, `way` the name by which others find it; `follows` the flight of another.
    `leased`: other replicas wait for its answer. `once` is its idempotency key, `key_state` what became of that; `said`
    the answer from before that it is given, to be given again. `asks`: a vendor may be asked on its way.
    """

    ask: Ask
    asks: bool = True
    flight: Flight | None = None
    way: tuple[str, bool, bool] | None = None
    follows: Flight | None = None
    leased: bool = False
    seen: Seen | None = None
    once: Once | None = None
    key_state: str = ""
    said: bytes | None = None


class Said(Struct, frozen=True):
    """An answer from before, as it goes to the client. `code` is the vendor's where it was an error."""

    status: int
    stream: bool
    body: bytes
    code: str | None = None
    content_type: bytes = b"application/json"


class Recall:
    """Who remembers."""

    def __init__(self, limits: Limits, cache: Cache, ambient: Ambient) -> None:
        self.limits = limits
        self.cache = cache
        self.ambient = ambient

    async def look(self, exchange: Exchange, alias: Alias, tokens: int, nanos: int, asks: bool) -> Said | Flight | None:
        """Reserves, and finds an answer from before, or a stream to follow; None: a vendor is to be asked.

        `asks`: one may be, for a vector too. Raises GatewayError.
        """
        ask = self.cache.ask(exchange, alias)
        exchange.memory = memory = Memory(ask=ask, asks=asks)
        exchange.spared = alias.targets[0]
        if ask.wishes.idempotency_key is not None:
            exchange.looking = self.ambient.monotonic()
            said = await self._once(exchange, memory, alias, ask.wishes.idempotency_key)
            if said is not None:
                exchange.cache_seconds = self.ambient.monotonic() - exchange.looking
                await self._reserve(exchange, 0, 0)
                return said
            exchange.looking = 0.0
        await self._reserve(exchange, tokens, nanos, self.cache.fetch(ask))
        if ask.look:
            exchange.looking = self.ambient.monotonic()
            try:
                found = await self._found(exchange, memory, alias, tokens, nanos)
            finally:
                exchange.cache_seconds = self.ambient.monotonic() - exchange.looking
            if found is not None:
                return found
        elif ask.keep or memory.once is not None:
            memory.flight = Flight(exchange)
        return None

    async def _reserve(self, exchange: Exchange, tokens: int, nanos: int, fetch: Fetch | None = None) -> None:
        held = await self.limits.reserve(exchange.call, exchange.tenant, tokens, nanos, fetch)
        exchange.reservation, exchange.rates = held, held.rates
        exchange.reserved = self.ambient.monotonic()

    # --- the same words -----------------------------------------------------------------------------------------------

    async def _found(
        self, exchange: Exchange, memory: Memory, alias: Alias, tokens: int, nanos: int
    ) -> Said | Flight | None:
        """An answer from before; else one that another call is about to have; else one to a question that means the
        same.
        """
        ask, call, request = memory.ask, exchange.call, exchange.request
        fetched = exchange.reservation.fetched
        if isinstance(fetched, bytes):
            if said := self._opened(exchange, ask, fetched, "exact"):
                return said
            self.limits.give_back(exchange.reservation)  # it was of a request that costs nothing
            await self._reserve(exchange, tokens, nanos)
            fetched = None
        elif fetched is None:  # nothing is limited, or by this replica's share alone
            fetched = await self.cache.look(ask, call.event_id)
            if isinstance(fetched, bytes):
                if said := self._opened(exchange, ask, fetched, "exact"):
                    return said
                fetched = None
        memory.way = way = (ask.key, request.stream, request.include_usage)
        while True:
            self._note_lease(memory, fetched, call.event_id)
            flight = self.cache.flights.get(way)
            if flight is not None and flight.joinable:
                if await self._join(exchange, memory, alias, flight):
                    return self._landed(exchange, flight) if not request.stream else flight
                fetched = await self.cache.look(ask, call.event_id)
            elif fetched is False:
                fetched = await self._await_other(ask, alias, call.event_id, call.started)
            else:
                break
            if isinstance(fetched, bytes):
                if said := self._opened(exchange, ask, fetched, "coalesced"):
                    return said
                fetched = None
        memory.flight = self.cache.flights[way] = Flight(exchange)
        embeds = memory.asks or ask.policy.embedder in LOCAL_EMBEDDERS
        if self.cache.semantic is not None and ask.turn is not None and embeds:
            memory.seen = seen = await self.cache.semantic.find(ask)
            if seen.entry is not None:
                return self._hit(exchange, "semantic", seen.entry, seen.similarity)
        return None

    def _note_lease(self, memory: Memory, fetched: bytes | bool | None, call_id: str) -> None:
        if fetched is True and not memory.leased:
            memory.leased = True
            self.cache.hold_lease(memory.ask, call_id)

    def _opened(self, exchange: Exchange, ask: Ask, data: bytes, kind: str) -> Said | None:
        entry = self.cache.opened(ask, data)
        return None if entry is None else self._hit(exchange, kind, entry)

    def _hit(self, exchange: Exchange, kind: str, entry: Entry, similarity: float | None = None) -> Said:
        """The answer in the client's dialect, as a stream where it wants one."""
        request = exchange.request
        age_seconds = self.cache.age_seconds(entry)
        exchange.recalled = Recalled(kind, entry.provider, entry.model, entry.usage, age_seconds, similarity)
        body = entry.body
        if request.stream:
            body = REPLAYS[exchange.call.dialect.name].stream(body, request.include_usage)
        return Said(200, request.stream, body)

    # --- the same words at the same time ------------------------------------------------------------------------------

    async def _await_other(self, ask: Ask, alias: Alias, call_id: str, started: float) -> bytes | bool | None:
        """What another replica's call for the same found; True where that one is gone and the lease is this call's.

        None: it takes too long, or Redis is away, and this call goes on alone.
        """
        now = self.ambient.monotonic()
        ends = min(now + alias.timeouts.first_token / 2, started + alias.timeouts.total)
        wait = FIRST_LOOK_SECONDS
        while now + wait < ends:
            await self.ambient.sleep(wait)
            fetched = await self.cache.look(ask, call_id)
            if fetched is not False:
                return fetched
            wait = min(wait * 1.5, LONGEST_LOOK_SECONDS)
            now = self.ambient.monotonic()
        return None

    async def _join(self, exchange: Exchange, memory: Memory, alias: Alias, flight: Flight) -> bool:
        """Listens until a stream has begun, or a whole answer is there. False: the leader left without one.

        Raises GatewayError: the leader's, where it is of the vendors; DeadlineExceeded.
        """
        flight.listeners += 1
        memory.follows = flight
        streamed, patience = exchange.request.stream, exchange.patience
        deadline = exchange.call.started + alias.timeouts.total
        try:
            while not (flight.landed or (streamed and flight.begun)):
                patience.limit(deadline - self.ambient.monotonic())
                await flight.change()
        except asyncio.CancelledError:
            if not patience.over():
                raise
            raise sum_up([], True) from None
        finally:
            patience.lift()
        if flight.over or (streamed and flight.begun):
            self._note_leader(exchange, flight)
            return True
        self._leave(memory)
        if flight.error is not None:
            self._note_leader(exchange, flight)
            raise flight.error
        return False

    def _note_leader(self, exchange: Exchange, flight: Flight) -> None:
        leader = flight.leader
        provider = None if leader.target is None else leader.target.provider.name
        model = leader.model_resolved or (None if leader.target is None else leader.target.model)
        exchange.recalled = Recalled("coalesced", provider, model, leader.usage if flight.over else None)
        exchange.finish_reason = leader.finish_reason

    def _leave(self, memory: Memory) -> None:
        flight, memory.follows = memory.follows, None
        if flight is not None:
            flight.leave()

    def _landed(self, exchange: Exchange, flight: Flight) -> Said:
        return Said(200, exchange.request.stream, b"".join(flight.frames or ()))

    async def follow(
        self, exchange: Exchange, alias: Alias, flight: Flight, settle: Callable[[Exchange], object]
    ) -> AsyncGenerator[bytes, None]:
        """The leader's frames, as they come. The last ones are released after this call's row is in the spool."""
        patience, at = exchange.patience, 0
        deadline = exchange.call.started + alias.timeouts.total
        exchange.first_token = self.ambient.monotonic()
        error: GatewayError
        try:
            while True:
                ready = b"".join(flight.frames[at:])
                at = len(flight.frames)
                if flight.over:
                    self._note_leader(exchange, flight)
                    exchange.done = True
                    settle(exchange)
                    yield ready
                    return
                if flight.landed:
                    error = flight.error or sum_up([VendorBroke("the leader's stream was cut")], False, True)
                    break
                if ready:
                    yield ready
                    continue
                patience.limit(min(alias.timeouts.idle, deadline - self.ambient.monotonic()))
                await flight.change()
                patience.lift()
        except asyncio.CancelledError:
            if not patience.over():
                raise
            late = self.ambient.monotonic() >= deadline - TIMER_SECONDS
            error, ready = sum_up([] if late else [VendorTimeout("the vendor fell silent")], late, True), b""
        except LedgerUnavailable as fault:
            error, ready = fault, b""
        patience.lift()
        exchange.error, exchange.done = error, False
        if exchange.event is None:
            try:
                settle(exchange)
            except LedgerUnavailable as fault:
                error = fault
        yield ready + exchange.call.dialect.error_frames(error, exchange.call.request_id, exchange.sent + ready)

    # --- the same key -------------------------------------------------------------------------------------------------

    async def _once(self, exchange: Exchange, memory: Memory, alias: Alias, key: str) -> Said | None:
        """What the first call of an idempotency key was answered; None: this is the first.

        Raises IdempotencyMismatch, IdempotencyInProgress, IdempotencyDone.
        """
        call = exchange.call
        mine = once(call, exchange.request.operation, exchange.tenant.id, key)
        deadline = call.started + alias.timeouts.total
        wait = FIRST_LOOK_SECONDS
        while True:
            claim = await self.cache.marks.claim(mine)
            if claim == "mine":
                memory.once, memory.key_state = mine, "new"
                self.cache.hold_mark(mine)
                return None
            if claim == "away":
                memory.key_state = "unavailable"
                return None
            if claim == "other":
                raise IdempotencyMismatch(
                    "This Idempotency-Key came with another request before: use a new key for a new request.",
                    param="Idempotency-Key",
                )
            if claim != "running":
                answer = None if claim is None else kept(claim)
                if answer is None:
                    raise IdempotencyDone(
                        "The call with this Idempotency-Key is done, and its answer was not kept: use a new key to ask "
                        "again.",
                        param="Idempotency-Key",
                        should_retry=False,
                    )
                memory.key_state = "replayed"
                exchange.recalled = Recalled("idempotent", age_seconds=self.cache.age_seconds(claim))
                return Said(answer.status, answer.stream, answer.body, answer.error_code, answer.content_type)
            if self.ambient.monotonic() + wait >= deadline:
                raise IdempotencyInProgress(
                    "The first call with this Idempotency-Key still runs: send it again later.",
                    param="Idempotency-Key",
                    retry_after_seconds=1.0,
                )
            await self.ambient.sleep(wait)
            wait = min(wait * 1.5, LONGEST_LOOK_SECONDS)

    # --- 8 settlement -------------------------------------------------------------------------------------------------

    def settled(self, exchange: Exchange) -> None:
        """The call has its row: others hear how it ended, and what may be kept is, once the answer has gone out."""
        memory: Memory = exchange.memory
        flight, error = memory.flight, exchange.error
        good = exchange.done and error is None
        if flight is not None:
            if memory.way is not None and self.cache.flights.get(memory.way) is flight:
                del self.cache.flights[memory.way]
            flight.end(error if isinstance(error, OF_VENDORS) else None, over=good and exchange.recalled is None)
        keeps = good and memory.ask.keep and exchange.recalled is None and flight is not None and not exchange.doubted
        if keeps or memory.once is not None:
            heard = memory.follows or flight
            said = memory.said
            if said is None and heard is not None and heard.frames is not None:
                said = b"".join(heard.frames)
            asyncio.get_running_loop().call_soon(self._keep, exchange, memory, good, keeps, said)
        elif memory.leased:
            self.cache.let_go_lease(memory.ask)
        self._leave(memory)

    def doubted(self, exchange: Exchange) -> bool:
        """Whether an answer from before is to be asked again."""
        seen = None if exchange.memory is None else exchange.memory.seen
        return seen is not None and seen.check and exchange.row is not None

    def reverified(self, exchange: Exchange, copy: Exchange, said: bytes) -> None:
        """What a vendor says now to a call that was answered from before."""
        ask, seen = exchange.memory.ask, exchange.memory.seen
        whole = REPLAYS[ask.dialect].fold(said, copy.usage or Usage()) if copy.request.stream else said
        entry = None if whole is None else self.cache.kept(ask, copy, whole)
        if entry is not None:
            self.cache.semantic.reverified(ask, seen, entry)

    def _keep(self, exchange: Exchange, memory: Memory, good: bool, keeps: bool, said: bytes | None) -> None:
        ask, stream = memory.ask, exchange.request.stream
        if keeps and said is not None:
            whole = REPLAYS[ask.dialect].fold(said, exchange.usage or Usage()) if stream else said
            entry = None if whole is None else self.cache.kept(ask, exchange, whole)
            if entry is not None:
                self.cache.keep(ask, memory.seen, entry)
        if memory.leased:
            self.cache.let_go_lease(ask)
        if memory.once is not None:
            self.cache.finish(memory.once, ask.tenant_id, ask.tenant, self._to_replay(exchange, good, said))

    def _to_replay(self, exchange: Exchange, good: bool, said: bytes | None) -> Kept | None:
        """What another call of the same key gets: good answers, and a vendor's own refusal of the request."""
        error, call = exchange.error, exchange.call
        if good:
            return Kept(200, exchange.request.stream, None, said, exchange.content_type)
        if isinstance(error, VendorRefused) and error.vendor_status is not None:
            body = call.dialect.error_body(error, call.request_id)
            return Kept(error.vendor_status, False, error.vendor_code, body)
        return None


def cache_headers(memory: Memory, recalled: Recalled | None) -> list[tuple[bytes, bytes]]:
    """Where the answer came from, how old and how similar it is, and what became of an idempotency key."""
    ask = memory.ask
    headers = []
    if recalled is not None:
        headers = [(b"x-cache", b"HIT (%b)" % recalled.kind.encode()), (b"age", b"%d" % recalled.age_seconds)]
        if recalled.similarity is not None:
            headers.append((b"x-cache-similarity", b"%.4f" % recalled.similarity))
    elif ask.why_not != "off":
        headers = [(b"x-cache", b"MISS" if ask.look else b"BYPASS")]
    if memory.key_state:
        headers.append((b"x-gateway-idempotency", memory.key_state.encode()))
    return headers
