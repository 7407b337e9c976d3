"""THE JOURNEY. Every call goes through `Gateway.serve`; read it first."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

import msgspec

from app.ambient import TIMER_SECONDS, Ambient
from app.answer_headers import head_of, retry_headers
from app.auth import allow, authorize, goes_on, keeper, require, substitute
from app.cache import Cache, Flight
from app.config import Alias, Tenant
from app.core import Exchange, LedgerEvent, Pace, Reply, written
from app.dialogue import OF_KEPT, Dialogue
from app.errors import (
    GatewayError,
    GuardrailBlocked,
    GuardrailUnavailable,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    LimitError,
    TenantNotAllowed,
    VendorBroke,
    VendorError,
    VendorRefused,
    VendorTimeout,
)
from app.estimate import Estimates
from app.guardrails import Guarding, Guardrails
from app.ledger import Spool
from app.limits import Limits
from app.modes import Modes
from app.overload import Overload
from app.providers import stored
from app.recall import Recall, Said
from app.relay import Stream
from app.routing import Facts, choose, needs, place, sum_up
from app.settlement import event_of, ms, word
from app.shadows import Shadows
from app.telemetry import Telemetry
from app.upstream import VendorAnswer

EVENT_STREAM = b"text/event-stream; charset=utf-8"
UNCACHED = b"cache-control: no-cache\r\n"
Departure = Callable[[Reply], Awaitable[None]]


class Gateway:
    """The rooms of a replica, and the way of a call through them."""

    def __init__(
        self,
        *,
        modes: Modes,
        overload: Overload,
        guardrails: Guardrails,
        dialogue: Dialogue,
        limits: Limits,
        cache: Cache,
        spool: Spool,
        telemetry: Telemetry,
        ambient: Ambient,
    ) -> None:
        self.modes = modes
        self.overload = overload
        self.guardrails = guardrails
        self.dialogue = dialogue
        self.recall = Recall(limits, cache, ambient)
        self.limits = limits
        self.spool = spool
        self.telemetry = telemetry
        self.ambient = ambient
        self.estimates = Estimates()
        self.shadows = Shadows(self.own, telemetry, ambient)

    async def serve(self, exchange: Exchange, depart: Departure) -> None:
        """One call from its authorisation to its row. `depart` sends the reply, to its last frame.

        Success, refusal, vendor failure, hang-up and drain all reach `settle`, which never waits and so cannot be
        cancelled. The last frame of an answer is released only after its row is in the spool; what else reads the
        event, limits and telemetry, does so when the answer is away.
        """
        call = exchange.call
        answer: VendorAnswer | None = None
        admitted = False
        try:
            try:
                exchange.tenant = tenant = authorize(call.config, call.key, call.tenant_claimed)  # 2 permission
                require(call.key, "call")
                if call.fault is not None:
                    raise call.fault
                mode = self.modes.of(call.config, tenant.id)
                if mode == "read_only":
                    raise self.modes.refusal(call.config, tenant.id, mode)
                self.overload.admit(tenant.priority, call.config.settings.overload)
                admitted = True
                self.spool.admit()
                request = call.dialect.read(call.body)
                if call.relayed:
                    request = msgspec.structs.replace(request, headers=call.relayed)
                if request.stored:
                    salt = call.config.settings.user_id_salt.reveal()
                    request = msgspec.structs.replace(request, owner=stored.owner(salt, tenant.id))
                exchange.request = request
                if request.alias:
                    alias = allow(call.config, tenant, request.alias)
                else:  # what a vendor keeps, by its name
                    alias = keeper(call.config, tenant, request)
                    exchange.request = request = msgspec.structs.replace(request, alias=alias.name)
                if alias.serves != request.serves:
                    raise InvalidRequest(f"{alias.name!r} serves {alias.serves}, not this route.", param="model")
                exchange.authorized = self.ambient.monotonic()
                if tenant.downgrade and request.operation not in OF_KEPT:
                    alias = self._downgraded(exchange, tenant, alias)
                if alias.routed:
                    alias = self._routed(exchange, tenant, alias)
                tokens, nanos = self.estimates.need(exchange, alias)
                before: Said | Flight | None = None
                if (alias.cache is None and call.wishes is None) or request.operation in OF_KEPT:
                    exchange.reservation = held = await self.limits.reserve(call, tenant, tokens, nanos)  # 3 budget
                    exchange.reserved = self.ambient.monotonic()
                    exchange.rates = held.rates
                else:
                    before = await self.recall.look(
                        exchange, alias, tokens, nanos, mode == "normal"
                    )  # 3 budget, 4 memory
                guarding: Guarding | None = None
                if alias.guardrails or tenant.guardrails:
                    guarding = self.guardrails.over(exchange, alias, tenant)
                    await guarding.prompt()
                if before is not None:
                    reply = self._recalled(exchange, alias, before)
                elif mode == "cache_only":
                    raise self.modes.refusal(call.config, tenant.id, mode)
                else:
                    answer, relay = await self.dialogue.first_good(exchange, alias)  # 5 plan, 6 dialogue
                    if alias.shadow is not None and request.operation != "count_tokens" and not request.stored:
                        exchange.shadowed = self.shadows.picks(alias)
                    if request.stream:
                        reply = self._streamed(exchange, alias, answer, relay, guarding)
                        if guarding is not None and guarding.holds_streams:
                            reply = msgspec.structs.replace(reply, frames=await _begun(reply.frames))
                    else:
                        if guarding is not None:
                            await self._judged(guarding, relay)
                        reply = self._unary(exchange, relay)
            except GatewayError as error:
                if isinstance(error, TenantNotAllowed):
                    self.telemetry.audit(call.key.id, "tenant.forge", tenant=call.tenant_claimed, call=call.request_id)
                if isinstance(error, LimitError):
                    exchange.rates = error.rates
                elif exchange.rates is None and exchange.tenant is not None and error.status < 500:
                    exchange.error = error  # a hang-up meanwhile changes nothing of it
                    exchange.rates = await self.limits.look(call.config, exchange.tenant, call.key)
                reply = self._refused(exchange, error)
            await depart(reply)  # 7 departure
        except Exception as defect:
            exchange.error = exchange.error or InternalError("The gateway has a defect.")
            raise defect
        finally:
            if admitted:
                self.overload.leave()
            try:
                if answer is not None:
                    await answer.close(ended=exchange.done)
            finally:
                self.close(exchange)  # 8 settlement, as far as it has not been
                if exchange.shadowed and exchange.row is not None:
                    self.shadows.begin(exchange, alias)
                if exchange.recalled is not None and mode == "normal" and self.recall.doubted(exchange):
                    self.shadows.again(exchange, alias, partial(self.recall.reverified, exchange))

    def _downgraded(self, exchange: Exchange, tenant: Tenant, alias: Alias) -> Alias:
        """What the tenant's policy has in the alias's place while a budget is nearly used up, noted; else the alias."""
        cheaper = substitute(exchange.call.config, tenant, alias)
        if cheaper is None:
            return alias
        if not goes_on(exchange.request, alias, cheaper, self.limits.nearly_used(exchange.call, tenant)):
            return alias
        exchange.alias_requested = alias.name
        exchange.request = msgspec.structs.replace(exchange.request, alias=cheaper.name)
        return cheaper

    def _routed(self, exchange: Exchange, tenant: Tenant, alias: Alias) -> Alias:
        """The way that the alias's rules have for this call, the rule noted. Raises UnsupportedParameter."""
        call = exchange.call
        self.estimates.size(exchange, alias)
        facts = Facts(
            tenant=tenant.id,
            plan=tenant.plan,
            input_tokens=exchange.input_tokens_estimate,
            output_tokens=exchange.output_tokens_estimate,
            at=call.received_at,
            headers=call.metadata,
            needs=needs(call.body),
            place=place(alias.name, call.user_id_hash or call.event_id),
        )
        exchange.rule, way = choose(alias, facts, self.dialogue.paces.reader(exchange.request.stream))
        return way

    async def _judged(self, guarding: Guarding, body: bytes) -> None:
        """Lets a whole answer pass. Raises GuardrailBlocked, GuardrailUnavailable, UpstreamUnavailable."""
        try:
            await guarding.answer(body)
        except VendorBroke as fault:
            raise sum_up([fault], False) from None

    async def own(self, exchange: Exchange, alias: Alias) -> bytes | None:
        """The journey of a copy, or of a call that the gateway makes for itself: its row is the gateway's own.

        Gives a good answer, but for a copy to a shadow: nobody reads that. Where calls wait for an incident to end, so
        do these: nothing is asked.
        """
        if self.modes.of(exchange.call.config, exchange.tenant.id) != "normal":
            return None
        answer: VendorAnswer | None = None
        checks = exchange.purpose != "shadow"
        said: list[bytes] = []
        try:
            if exchange.purpose in ("judge", "embedding"):
                answer, relay = await self.dialogue.first_good(exchange, alias)
            else:
                answer, relay = await self.dialogue.once(exchange, alias, "chain" if checks else "shadow")
            if exchange.request.stream:
                async with contextlib.aclosing(self._relay(exchange, alias, answer, relay, None)) as frames:
                    async for frame in frames:
                        if checks:
                            said.append(frame)
            else:
                said.append(relay)
            return b"".join(said) if checks and exchange.error is None else None
        except VendorError as error:
            exchange.error = error if isinstance(error, VendorRefused) else sum_up([error], False)
        except GatewayError as error:
            exchange.error = error
        except asyncio.CancelledError:
            exchange.cut = "drain"
            raise
        finally:
            if answer is not None:
                await answer.close(ended=exchange.done)
            self.close(exchange)
        return None

    # --- 7 departure --------------------------------------------------------------------------------------------------

    def _recalled(self, exchange: Exchange, alias: Alias, before: Said | Flight) -> Reply:
        """An answer from before, its row first; or one that is on its way to another. Raises LedgerUnavailable."""
        if isinstance(before, Flight):
            head = head_of(exchange, EVENT_STREAM, self.ambient.now()) + UNCACHED
            return Reply(200, head, b"", self.recall.follow(exchange, alias, before, self.settle))
        if before.status == 200:
            exchange.done, exchange.memory.said = True, before.body
        else:
            exchange.error = VendorRefused("", vendor_status=before.status, vendor_code=before.code)
        event = self.settle(exchange)
        latency = event.latency_ms
        head = b"%bcontent-length: %d\r\nserver-timing: gateway;dur=%.3f, cache;dur=%.3f\r\n%b" % (
            head_of(exchange, EVENT_STREAM if before.stream else before.content_type, self.ambient.now()),
            len(before.body),
            latency.gateway,
            latency.cache_lookup,
            UNCACHED if before.stream else b"x-usage-total-tokens: 0\r\nx-gateway-cost-usd: 0\r\n",
        )
        return Reply(before.status, head, before.body)

    def _unary(self, exchange: Exchange, body: bytes) -> Reply:
        """A whole answer: its row first, then its only frame. Raises LedgerUnavailable."""
        if exchange.memory is not None and exchange.memory.flight is not None:
            exchange.memory.flight.add(body)
        event = self.settle(exchange)
        latency = event.latency_ms
        head = _UNARY % (
            head_of(exchange, exchange.content_type, self.ambient.now()),
            len(body),
            event.usage.total_tokens,
            event.cost_usd.total,
            latency.gateway,
            latency.provider,
        )
        return Reply(200, head, body)

    def _streamed(
        self, exchange: Exchange, alias: Alias, answer: VendorAnswer, stream: Stream, guarding: Guarding | None
    ) -> Reply:
        overhead = exchange.first_token - exchange.call.started - exchange.provider_seconds
        head = b"%b%bserver-timing: gateway;dur=%.3f\r\n" % (
            head_of(exchange, EVENT_STREAM, self.ambient.now()),
            UNCACHED,
            overhead * 1000,
        )
        return Reply(200, head, b"", self._relay(exchange, alias, answer, stream, guarding))

    async def _relay(
        self,
        exchange: Exchange,
        alias: Alias,
        answer: VendorAnswer,
        stream: Stream,
        guarding: Guarding | None,
    ) -> AsyncGenerator[bytes, None]:
        """The stream's frames as the vendor sent them, each chunk at once; a failure is one error event.

        The frames that end the stream are released after the row is in the spool. Where guardrails look at it, frames
        wait until they have passed, and what goes wrong before the first of them is raised.
        """
        sent = guards = False
        if guarding is not None:
            guards = guarding.holds_streams
        deadline, idle = exchange.call.started + alias.timeouts.total, alias.timeouts.idle
        monotonic = self.ambient.monotonic
        relay_started = monotonic()
        exchange.pace = pace = Pace(relay_started)
        patience, send = exchange.patience, exchange.send
        flight: Flight | None = None if exchange.memory is None else exchange.memory.flight

        def passes(chunk: bytes) -> bool:
            """What comes while the relay waits leaves at once, without a step of its task.

            False at the end, and where the client has to read first: whoever sends frames waits for that.
            """
            ready = stream.passing(chunk)
            if ready is None:
                return False
            now = monotonic()
            patience.limit(min(idle, deadline - now))
            if not ready:
                return True
            if flight is not None:
                flight.add(ready)
            pace.chunk(now)
            return send(ready)

        full = False
        try:
            while True:
                ready, done = stream.take()
                if guards:
                    asked = self.ambient.monotonic()
                    ready = await guarding.passed(ready, done)
                    relay_started += self.ambient.monotonic() - asked  # no time of the vendor's
                    sent = sent or done or bool(ready)
                if flight is not None and ready:
                    flight.add(ready)
                if done:
                    exchange.done = True
                    self._end_stream(exchange, stream, relay_started)
                    yield ready
                    return
                if ready or full:  # also nothing, where the client has to read first: whoever sends it waits for that
                    yield ready
                now = self.ambient.monotonic()
                if ready:
                    pace.chunk(now)
                patience.limit(min(idle, deadline - now))
                if send is None or guards:
                    await stream.more(answer)
                else:
                    full = await stream.pour(answer, passes)
                patience.lift()
        except asyncio.CancelledError:  # hang-up, drain or our own patience
            if not patience.over():
                if exchange.event is None:
                    self._note_stream(exchange, stream, relay_started)  # what was relayed is charged
                raise
            if self.ambient.monotonic() >= deadline - TIMER_SECONDS:
                error: GatewayError = sum_up([], True, begun=True)
            else:
                error = sum_up([VendorTimeout("the vendor fell silent in mid-stream")], False, begun=True)
        except VendorError as fault:
            self.telemetry.vendor_error(exchange.target.provider.name, fault)
            self.dialogue.failed(exchange, exchange.target, None, fault)
            error = sum_up([fault], False, begun=True)
        except (LedgerUnavailable, GuardrailBlocked, GuardrailUnavailable) as fault:
            error = fault
        except BaseException:  # a defect, or a reader that went away: what was relayed is charged
            if exchange.event is None:
                self._note_stream(exchange, stream, relay_started)
            raise
        patience.lift()
        if guards and not sent:
            self._note_stream(exchange, stream, relay_started)
            raise error
        exchange.error = error
        exchange.done = False
        last = exchange.attempts[exchange.served]
        exchange.attempts[exchange.served] = msgspec.structs.replace(
            last,
            outcome=VendorBroke.fault if exchange.event is None and not isinstance(error, _OURS) else last.outcome,
            duration_ms=ms(self.ambient.monotonic() - exchange.call.started) - last.started_ms,
        )
        tail = b"" if guards or stream.done else stream.ready()  # its end may come in the turn in which we gave up
        if exchange.event is None:
            with contextlib.suppress(LedgerUnavailable):  # the client gets its error event all the same
                self._end_stream(exchange, stream, relay_started)
        yield tail + exchange.call.dialect.error_frames(error, exchange.call.request_id, exchange.sent + tail)

    def _end_stream(self, exchange: Exchange, stream: Stream, relay_started: float) -> None:
        """Notes what the stream told, and settles. Raises LedgerUnavailable."""
        self._note_stream(exchange, stream, relay_started)
        self.settle(exchange)

    def _note_stream(self, exchange: Exchange, stream: Stream, relay_started: float) -> None:
        exchange.service_tier = word(stream.reader.service_tier)
        exchange.usage = stream.reader.usage
        exchange.finish_reason = word(stream.reader.finish_reason)
        exchange.prompt = stream.reader.prompt
        exchange.text_bytes = 0 if stream.reader.usage else stream.text_bytes()
        exchange.provider_seconds += self.ambient.monotonic() - relay_started

    def _refused(self, exchange: Exchange, error: GatewayError) -> Reply:
        """An error in the client's dialect, its row written before."""
        exchange.error = error
        try:
            self.settle(exchange)
        except LedgerUnavailable as fault:
            error = fault
        body = exchange.call.dialect.error_body(error, exchange.call.request_id)
        status = error.vendor_status if isinstance(error, VendorRefused) else error.status
        more = written([(b"content-length", b"%d" % len(body)), *retry_headers(error, status)])
        return Reply(status, head_of(exchange, b"application/json", self.ambient.now()) + more, body)

    # --- 8 settlement -------------------------------------------------------------------------------------------------

    def settle(self, exchange: Exchange) -> LedgerEvent:
        """The one place that builds a ledger event, and writes the row. Never waits.

        Raises LedgerUnavailable when the spool cannot take the row; the intent then stands for it.
        """
        if exchange.event is not None:
            return exchange.event
        exchange.event = event = event_of(exchange, self.ambient.monotonic())
        try:
            exchange.row = self.spool.append(event)  # → 9 archive: ledger_shipper.py
        except LedgerUnavailable as fault:
            exchange.error, exchange.done = fault, False
            exchange.event = event_of(exchange, self.ambient.monotonic())
            raise
        finally:
            if exchange.memory is not None:
                self.recall.settled(exchange)
        return event

    def close(self, exchange: Exchange) -> None:
        """A call is over: limits and telemetry read the event that the row was made of. Once a call; never waits."""
        if exchange.event is None:
            with contextlib.suppress(LedgerUnavailable):  # counted; the intent stands for the row
                self.settle(exchange)
        event = exchange.event
        if exchange.reservation is not None:
            self.limits.settle(exchange.reservation, event.usage.total_tokens, exchange.charged.total_nanos)
            self.estimates.learn(exchange)
        if exchange.grant is not None:  # what the vendor counts for its key, of the attempt that answers
            also = sum(usage.total for usage, _ in exchange.beside)
            self.limits.settle(exchange.grant, event.usage.total_tokens - also, 0)
        self.telemetry.record(exchange, event, exchange.row)


_UNARY = b"""\
%bcontent-length: %d\r
x-usage-total-tokens: %d\r
x-gateway-cost-usd: %b\r
server-timing: gateway;dur=%.3f, provider;dur=%.3f\r
"""
_OURS = (GuardrailBlocked, GuardrailUnavailable)
"""What ends a stream that its vendor sent well."""


async def _begun(frames: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same frames, the first of them there: what keeps it from coming is raised here. Raises GatewayError."""
    first = await anext(frames)

    async def all_of_them() -> AsyncGenerator[bytes, None]:
        async with aclosing(frames):
            yield first
            async for frame in frames:
                yield frame

    return all_of_them()
