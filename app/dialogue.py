"""The dialogue with an alias's vendors: attempts, retries, fallbacks, second thoughts until the first good answer."""

from __future__ import annotations

import asyncio

import msgspec

from app import dialects
from app.allowance import Allowance
from app.ambient import TIMER_SECONDS, Ambient, Patience
from app.confidence import asking, doubt, unasked, without
from app.config import UNLIMITED, Alias, Cascade, Target, VendorKey
from app.cooldowns import COUNTED, Cooldowns, another, is_resting, pick, rests
from app.core import (
    FIRST_ATTEMPT,
    Attempt,
    Call,
    Cost,
    Exchange,
    Reservation,
    Role,
    Usage,
    charge,
    estimate,
    event_cost,
    event_usage,
    span_id,
    usd,
)
from app.credentials import Credentials
from app.errors import (
    GatewayError,
    OwnFault,
    VendorBroke,
    VendorCannot,
    VendorError,
    VendorMisconfigured,
    VendorRefused,
    VendorTimeout,
)
from app.ledger import Spool
from app.limits import Limits
from app.paces import Paces
from app.prompt_size import BYTES_PER_TOKEN
from app.providers.translator import Answer, Outgoing, Stamp, Translator
from app.relay import FILTERED, Stream
from app.routing import after, detour, plan, sum_up
from app.settlement import intent_of, ms, word
from app.telemetry import Telemetry
from app.upstream import Upstream, VendorAnswer

MAX_ANSWER_BYTES = 67_108_864
"""A vendor's unary answer beyond this is broken: it would be held in memory whole."""
MAX_ERROR_BYTES = 65_536
HELD_BYTES = 1_048_576
"""A stream that a cascade judges is held back up to this; a longer one is sent on without a judgement."""
RETRIES = 20.0
RETRIES_PER_SECOND = 2.0
"""A replica with few calls may retry so often all the same; the figures are of the order of Finagle's retry budget."""


class Good(msgspec.Struct):
    """An answer that is good as far as it was read, and what is to be noted of it if it is the one that is taken.

    `place` is that of its attempt; -1 where no vendor was asked. `at` is when a stream's first content was there.
    """

    place: int
    target: Target
    answer: VendorAnswer | None
    relay: Stream | bytes
    whole: Answer | None = None
    request_id: str | None = None
    at: float = 0.0
    grant: Reservation | None = None

    @property
    def finish_reason(self) -> str | None:
        return self.relay.reader.finish_reason if self.whole is None else self.whole.finish_reason

    @property
    def said(self) -> bytes | None:
        """All of it; None while a stream goes on."""
        return self.relay.held if isinstance(self.relay, Stream) else self.relay


class Dialogue:
    """Who speaks with vendors, and what that takes."""

    def __init__(
        self,
        *,
        limits: Limits,
        spool: Spool,
        credentials: Credentials,
        cooldowns: Cooldowns,
        upstream: Upstream,
        telemetry: Telemetry,
        ambient: Ambient,
    ) -> None:
        self.limits = limits
        self.spool = spool
        self.credentials = credentials
        self.cooldowns = cooldowns
        self.upstream = upstream
        self.telemetry = telemetry
        self.ambient = ambient
        self.paces = Paces(ambient)
        self.retries = Allowance(ambient, RETRIES, RETRIES_PER_SECOND)
        self.hedges: dict[str, Allowance] = {}

    async def first_good(self, exchange: Exchange, alias: Alias) -> tuple[VendorAnswer | None, Stream | bytes]:
        """The first good answer of the chain: a whole body, or a stream up to its first content.

        Retries and fallbacks happen here, before anything is sent. Raises VendorRefused, UpstreamError,
        LedgerUnavailable.
        """
        exchange.chain = alias.chain
        self.retries.earn(exchange.call.config.settings.retry.budget_percent)
        good = await self._answered(exchange, alias)
        if alias.cascade is not None or alias.on_content_filter:
            good = await self._second_thoughts(exchange, alias, good)
        return self._taken(exchange, good)

    async def once(self, exchange: Exchange, alias: Alias, role: Role) -> tuple[VendorAnswer | None, Stream | bytes]:
        """The answer of the alias's first target, asked once; raises its VendorError, or LedgerUnavailable."""
        (target, *_) = alias.targets
        exchange.chain = alias.chain
        deadline = exchange.call.started + alias.timeouts.total
        key = self._key(target, [])
        return self._taken(
            exchange, await self._attempt(exchange, alias, target, key, deadline, role, exchange.patience)
        )

    def _taken(self, exchange: Exchange, good: Good) -> tuple[VendorAnswer | None, Stream | bytes]:
        """Notes whose answer it is that the call gets."""
        exchange.target, exchange.served, exchange.grant = good.target, good.place, good.grant
        exchange.vendor_request_id = good.request_id
        if good.whole is not None:
            note_answer(exchange, good.whole)
        else:
            exchange.first_token = good.at
            exchange.model_resolved = word(good.relay.reader.model)
        return good.answer, good.relay

    # --- along a chain ------------------------------------------------------------------------------------------------

    async def _answered(self, exchange: Exchange, alias: Alias, role: Role = "chain") -> Good:
        """The first good answer along the alias's targets, and those for a refusal. Raises as `first_good`."""
        targets = alias.targets
        if resting := self.cooldowns.resting():
            targets = plan(alias, resting)
            if targets[0] is not alias.targets[0]:
                self.telemetry.fell_back(exchange, alias.chain[0], targets[0].name, "resting")
        deadline = exchange.call.started + alias.timeouts.total
        errors: list[VendorError] = []
        refusal: VendorRefused | None = None
        tried: list[str] = []
        index = tries_here = 0
        while True:
            target = targets[index]
            tries_here += 1
            key = self._key(target, tried) if target.provider.keys else None
            try:
                if alias.hedge is not None and index + 1 < len(targets):
                    return await self._raced(exchange, alias, target, key, targets[index + 1], deadline, role)
                return await self._attempt(exchange, alias, target, key, deadline, role, exchange.patience)
            except VendorRefused as refused:
                kind, others = detour(alias, refused, {attempt.target for attempt in exchange.attempts})
                if refusal is not None or not others:
                    raise refusal or refused from None
                refusal, role = refused, kind
                targets = (*targets[: index + 1], *plan(alias.along(others), self.cooldowns.resting()))
                self.telemetry.fell_back(exchange, target.name, targets[index + 1].name, kind)
                index, tries_here = index + 1, 0
                tried.clear()
                continue
            except VendorError as error:
                errors.append(error)
            now = self.ambient.monotonic()
            error = errors[-1]
            if key is not None:
                tried.append(key.name)
            step = after(
                error,
                index=index,
                targets=len(targets),
                attempts=len(exchange.attempts),
                tries_here=tries_here,
                retry=exchange.call.config.settings.retry,
                chance=self.ambient.random(),
                other_key=another(target, self.cooldowns.resting(), tried),
                rests=self.cooldowns.is_broken(target),
                may_retry=self.retries.has(),
            )
            late = now + (step.wait_seconds if step else 0.0) >= deadline - TIMER_SECONDS
            if step is None or late:
                raise refusal or sum_up(errors, late)
            if isinstance(error, VendorTimeout | VendorBroke):
                self._note_lost(exchange, target)
            if step.index == index and not step.other_key:
                self.retries.spend()
            if step.wait_seconds:
                await self.ambient.sleep(step.wait_seconds)
                exchange.provider_seconds += step.wait_seconds  # the vendor made us wait: no overhead of ours
            if step.index != index:
                self.telemetry.fell_back(exchange, target.name, targets[step.index].name, error.fault)
                index, tries_here = step.index, 0
                tried.clear()

    def _key(self, target: Target, tried: list[str]) -> VendorKey | None:
        """The one of the provider's keys to sign with; None where it has one credential."""
        if not target.provider.keys:
            return None
        return pick(target, self.cooldowns.resting(), tried, self.ambient.random())

    # --- second thoughts ----------------------------------------------------------------------------------------------

    async def _second_thoughts(self, exchange: Exchange, alias: Alias, first: Good) -> Good:
        """The answer, or a better one where it was filtered or is to be doubted. Raises LedgerUnavailable."""
        request, chat = exchange.request, exchange.call.dialect.name == "chat"
        if alias.on_content_filter and first.finish_reason == FILTERED:
            return await self._instead(exchange, alias.on_content_filter, alias, first, FILTERED, "content_filter")
        cascade = alias.cascade
        if cascade is None or request.operation != "chat" or first.said is None:
            return first
        why = doubt(cascade, request, chat, first.finish_reason, first.said)
        if why is not None:
            return await self._instead(exchange, cascade.targets, alias, first, why, "escalation")
        self._tidy(exchange, alias, first)
        return first

    async def _instead(
        self, exchange: Exchange, targets: tuple[Target, ...], alias: Alias, first: Good, why: str, role: Role
    ) -> Good:
        """The answer of other targets in place of the first, which is paid for too; the first where they have none."""
        usage, cost = self._put_aside(exchange, first, "doubtful", why)
        self.telemetry.escalated(exchange, first.target.name, targets[0].name, why)
        if first.answer is not None:
            await first.answer.close(ended=True)
        exchange.escalated = why
        others = msgspec.structs.replace(alias.along(targets), cascade=None, on_content_filter=())
        try:
            return await self._answered(exchange, others, role)
        except GatewayError as error:
            if isinstance(error, OwnFault):
                raise
        exchange.escalated, exchange.doubted = None, True
        exchange.beside.remove((usage, cost))
        kept = exchange.attempts[first.place]
        exchange.attempts[first.place] = msgspec.structs.replace(kept, outcome="success", usage=None, cost_usd=None)
        first.grant = None
        self._tidy(exchange, alias, first)
        return first

    def _tidy(self, exchange: Exchange, alias: Alias, good: Good) -> None:
        """Takes out of an answer what was asked for its judgement alone."""
        if alias.cascade is None or not unasked(alias.cascade, exchange.request, exchange.call.dialect.name == "chat"):
            return
        if isinstance(good.relay, Stream):
            good.relay.rewrite(without)
        else:
            good.relay = without(good.relay)

    def _put_aside(self, exchange: Exchange, good: Good, outcome: str, why: str | None = None) -> tuple[Usage, Cost]:
        """An answer that is not taken: the vendor charges for it, and so does the row. The caller closes it."""
        told = good.relay.reader if good.whole is None else good.whole
        usage, text_bytes = told.usage, good.relay.text_bytes() if good.whole is None else good.whole.text_bytes
        if usage is None:
            written = -(-text_bytes // BYTES_PER_TOKEN)
            request = exchange.request
            usage = estimate(request.operation, exchange.input_tokens_estimate, written, request.units)
        if good.grant is not None:
            self.limits.settle(good.grant, usage.total, 0)
        facts = {"doubt": why, "model": word(told.model), "service_tier": word(told.service_tier)}
        return self._pay(exchange, good.place, good.target, usage, outcome, **facts)

    def _pay(
        self,
        exchange: Exchange,
        place: int,
        target: Target,
        usage: Usage,
        outcome: str,
        *,
        doubt: str | None = None,
        model: str | None = None,
        service_tier: str | None = None,
    ) -> tuple[Usage, Cost]:
        """Notes what an attempt costs the tenant whose answer it does not get."""
        call = exchange.call
        cost = charge(usage, target, exchange.tenant.id, service_tier, call.received_at)
        exchange.beside.append((usage, cost))
        if place >= 0:
            exchange.attempts[place] = msgspec.structs.replace(
                exchange.attempts[place],
                outcome=outcome,
                doubt=doubt,
                model=model or target.model,
                service_tier=service_tier,
                usage=event_usage(usage),
                cost_usd=event_cost(cost, call.config.price_version),
            )
        return usage, cost

    # --- hedges -------------------------------------------------------------------------------------------------------

    async def _raced(
        self,
        exchange: Exchange,
        alias: Alias,
        target: Target,
        key: VendorKey | None,
        other: Target,
        deadline: float,
        role: Role,
    ) -> Good:
        """One attempt, and where it says nothing for a while a second one beside it: the first good answer of the two.

        Raises the first one's VendorError where there is none. Both have ended when it returns or raises; the one that
        was outrun is paid for.
        """
        began, before = self.ambient.monotonic(), len(exchange.attempts)
        hedges = self.hedges.setdefault(alias.name, Allowance(self.ambient, 1.0))
        hedges.earn(alias.hedge.percent)
        first = asyncio.ensure_future(self._alone(exchange, alias, target, key, deadline, role))
        racing = [first]
        good: Good | None = None
        try:
            await asyncio.wait(racing, timeout=alias.hedge.after_seconds)
            if not first.done() and not is_resting(other, self.cooldowns.resting()) and hedges.spend():
                exchange.hedged = True
                self.telemetry.hedged(exchange, target.name, other.name)
                second = self._alone(exchange, alias, other, self._key(other, []), deadline, "hedge")
                racing.append(asyncio.ensure_future(second))
            running = set(racing)
            while running and good is None:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                good = next((one.result() for one in racing if one in done and one.exception() is None), None)
            if good is None:
                raise first.exception()
            return good
        finally:
            for one in racing:
                one.cancel()
            await asyncio.gather(*racing, return_exceptions=True)
            exchange.provider_seconds += self.ambient.monotonic() - began
            await self._end_race(exchange, racing, good, before)

    async def _end_race(
        self, exchange: Exchange, racing: list[asyncio.Future[Good]], good: Good | None, before: int
    ) -> None:
        """Pays for those that were outrun, and for those that were cancelled but the one that the row itself is of."""
        for one in racing:
            if not one.cancelled() and one.exception() is None and (late := one.result()) is not good:
                self._put_aside(exchange, late, "outrun")
                if late.answer is not None:
                    await late.answer.close()
        request = exchange.request
        prompt = estimate(request.operation, exchange.input_tokens_estimate, 0, request.units)
        own = len(exchange.attempts) - 1 if good is None else -1
        for place in range(before, len(exchange.attempts)):
            attempt = exchange.attempts[place]
            if attempt.outcome == CANCELLED and place != own:
                target = exchange.call.config.targets[attempt.target]
                self._pay(exchange, place, target, prompt, CANCELLED if good is None else "outrun")

    async def _alone(
        self, exchange: Exchange, alias: Alias, target: Target, key: VendorKey | None, deadline: float, role: Role
    ) -> Good:
        """An attempt in a task of its own, with a patience of its own."""
        patience = Patience()
        try:
            return await self._attempt(exchange, alias, target, key, deadline, role, patience)
        finally:
            patience.end()

    # --- one attempt --------------------------------------------------------------------------------------------------

    async def _attempt(
        self,
        exchange: Exchange,
        alias: Alias,
        target: Target,
        key: VendorKey | None,
        deadline: float,
        role: Role,
        patience: Patience,
    ) -> Good:
        """One request to one target, unless its translator answers by itself.

        Raises VendorError; the attempt is noted whatever becomes of it.
        """
        call, request, limits, provider = exchange.call, exchange.request, alias.timeouts, target.provider
        translator = dialects.translator(call.dialect, provider.kind)
        if alias.cascade is None:
            outgoing = translator.outgoing(request, target)
        else:
            outgoing = _to_be_judged(translator, exchange, alias.cascade, target)
        if isinstance(outgoing, Answer):
            return Good(-1, target, None, outgoing.body, outgoing)
        stamp = Stamp("chatcmpl-" + call.event_id, int(call.received_at), target.model, request, target.name)
        grant: Reservation | None = None
        if key is not None and key.quota != UNLIMITED:
            attempt_id = f"{call.event_id}:{len(exchange.attempts)}:{key.name}"
            tokens = exchange.input_tokens_estimate + exchange.output_tokens_estimate
            grant = await self.limits.grant(key, attempt_id, tokens)
        exchange.target = target
        self.spool.intend(intent_of(exchange))
        started = self.ambient.monotonic()
        place = len(exchange.attempts)
        exchange.attempts.append(UNDER_WAY)
        counts = request.operation not in OF_KEPT
        if counts:
            self.cooldowns.asks(target)
        held = request.stream and alias.cascade is not None
        limit = limits.first_token if request.stream and not held else limits.answer
        answer: VendorAnswer | None = None
        request_id: str | None = None
        outcome = CANCELLED
        patience.limit(min(limit, deadline - started))
        try:
            if key is None and provider.account is not None:
                credential = await self.credentials.of(provider.account)
            else:
                credential = (key or provider).credential
            signed = translator.sign(outgoing, credential, self.ambient.now())
            if provider.trace_context:
                signed = traced(signed, call, place)
            answer = await self.upstream.open(signed, limits.connect)
            request_id = word(answer.headers.get(translator.request_id_header))
            gone = False
            if not 200 <= answer.status < 300:
                gone = answer.status == 404 and _may_be_deleted(exchange)
                if not gone:
                    raise translator.error(answer.status, answer.headers, await _error_body(answer))
            if request.stream:
                stream = Stream(
                    translator.stream(stamp),
                    call.config.settings.start_buffer_bytes,
                    withhold_usage=not request.include_usage,
                )
                await stream.begin(answer)
                if held:
                    await stream.hold(answer, HELD_BYTES)
                request_id = request_id or word(stream.reader.request_id)
                good = Good(place, target, answer, stream, None, request_id, self.ambient.monotonic(), grant)
            else:
                said = b"" if gone else await answer.read(MAX_ANSWER_BYTES)
                whole = translator.answer(said, request, stamp, answer.headers)
                request_id = request_id or word(whole.request_id)
                good = Good(place, target, answer, whole.body, whole, request_id, 0.0, grant)
            outcome = "success"
            if counts:
                self.cooldowns.worked(target, key)
            return good
        except asyncio.CancelledError:
            if not patience.over():
                if counts:
                    self.cooldowns.given_up(target)
                raise
            outcome = VendorTimeout.fault
            error = VendorTimeout("the vendor did not answer in time")
            self.failed(exchange, target, key, error)
            raise error from None
        except VendorError as error:
            outcome = error.fault
            self.telemetry.vendor_error(provider.name, error)
            self.failed(exchange, target, key, error)
            raise
        finally:
            patience.lift()
            ended = self.ambient.monotonic()
            if patience is exchange.patience:  # in a race the time is that of the whole race
                exchange.provider_seconds += ended - started
            if alias.order == "latency" and outcome in ("success", VendorTimeout.fault):
                self.paces.took(target, request.stream, ended - started)
            exchange.attempts[place] = Attempt(
                target=target.name,
                provider=provider.name,
                outcome=outcome,
                status=None if answer is None else answer.status,
                started_ms=ms(started - exchange.call.started),
                duration_ms=ms(ended - started),
                vendor_request_id=request_id,
                key=None if key is None else key.name,
                role=role,
            )
            if outcome != "success":
                if grant is not None:  # what the vendor counts for its key: a request without tokens
                    self.limits.settle(grant, 0, 0)
                if answer is not None:
                    await answer.close()

    def failed(self, exchange: Exchange, target: Target, key: VendorKey | None, error: VendorError) -> None:
        """What a failure means for the calls after this one: who rests, who is told."""
        if exchange.request.operation in OF_KEPT:
            return
        settings = exchange.call.config.settings
        if isinstance(error, VendorRefused):
            self.cooldowns.worked(target, key)
            return
        if isinstance(error, VendorMisconfigured) and self.cooldowns.doubtful(target, key, error):
            return
        if self.cooldowns.failed(target, error, settings.breaker):
            self.telemetry.broke_off(exchange, target.name, error)
        name, seconds = rests(error, target, key, settings.retry.cooldown_seconds)
        if seconds:
            self.cooldowns.rest(name, seconds, error.fault)
        if isinstance(error, VendorMisconfigured):
            self.telemetry.misconfigured(exchange, name, target.name, error)

    def _note_lost(self, exchange: Exchange, target: Target) -> None:
        """The vendor had read the prompt, and may charge for it; the tenant pays for the answer that it gets."""
        call, request = exchange.call, exchange.request
        prompt = estimate(request.operation, exchange.input_tokens_estimate, 0, request.units)
        lost = charge(prompt, target, exchange.tenant.id, None, call.received_at)
        place = max(place for place, attempt in enumerate(exchange.attempts) if attempt.target == target.name)
        kept = exchange.attempts[place]
        exchange.attempts[place] = msgspec.structs.replace(kept, estimated_usd=usd(lost.total_nanos))


OF_KEPT = ("retrieve", "delete")
"""What they meet says nothing of how a target makes answers: a key may be kept from them, or have a rate for them of
its own; and that an answer is told shows no target to work again that makes none."""
CANCELLED = "cancelled"
"""The outcome of an attempt that nobody waits for any more."""
UNDER_WAY = Attempt("", "", CANCELLED, None, 0.0, 0.0)
"""Holds the place of an attempt until it has ended: they stand in the order in which they began."""


def _may_be_deleted(exchange: Exchange) -> bool:
    """Whether an attempt before may have deleted what is not there any more, its answer lost."""
    lost = {error.fault for error in COUNTED}
    return exchange.request.operation == "delete" and any(each.outcome in lost for each in exchange.attempts)


def _to_be_judged(translator: Translator, exchange: Exchange, cascade: Cascade, target: Target) -> Outgoing | Answer:
    """The request to a vendor for a cascade: with log probabilities, where the vendor has them. Raises VendorCannot."""
    request = exchange.request
    if unasked(cascade, request, exchange.call.dialect.name == "chat"):
        try:
            return translator.outgoing(asking(request), target)
        except VendorCannot as cannot:
            if cannot.param != "logprobs":
                raise
    return translator.outgoing(request, target)


def note_answer(exchange: Exchange, answer: Answer) -> None:
    exchange.model_resolved = word(answer.model)
    exchange.finish_reason = word(answer.finish_reason)
    exchange.done = True
    exchange.service_tier = word(answer.service_tier)
    exchange.usage = answer.usage
    exchange.text_bytes = answer.text_bytes
    exchange.content_type = answer.content_type


async def _error_body(answer: VendorAnswer) -> bytes:
    """What a vendor says of its failure; nothing where that is cut or too large, as the status says enough."""
    try:
        return await answer.read(MAX_ERROR_BYTES)
    except VendorBroke:
        return b""


def traced(outgoing: Outgoing, call: Call, attempt: int) -> Outgoing:
    """With W3C trace context: its parent is the span of this attempt, which is built when the call is over."""
    parent = span_id(call.event_id, FIRST_ATTEMPT + attempt)
    headers = [("traceparent", f"00-{call.trace_id}-{parent:016x}-{call.sampled:02x}")]
    if call.trace_state is not None:
        headers.append(("tracestate", call.trace_state))
    return msgspec.structs.replace(outgoing, headers=(*outgoing.headers, *headers))
