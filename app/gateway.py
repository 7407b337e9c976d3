"""THE JOURNEY. Every call goes through `Gateway.serve`; read it first."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec

from app import dialects
from app.ambient import TIMER_SECONDS, Ambient
from app.auth import allow, authorize, require, substitute
from app.config import UNLIMITED, Alias, Credential, Target, Tenant, VendorKey
from app.cooldowns import Cooldowns, another, pick, rests
from app.core import (
    Attempt,
    Cost,
    EventLatency,
    Exchange,
    Intent,
    LedgerEvent,
    Reply,
    Usage,
    charge,
    estimate,
    event_cost,
    event_usage,
    usd,
)
from app.credentials import Credentials
from app.errors import (
    GatewayError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    LimitError,
    TenantNotAllowed,
    VendorBroke,
    VendorError,
    VendorMisconfigured,
    VendorRefused,
    VendorTimeout,
)
from app.estimate import Estimates
from app.ledger import Spool
from app.limits import Limits
from app.prompt_size import BYTES_PER_TOKEN
from app.providers.translator import Answer, Frame, Kind, Stamp, StreamReader
from app.routing import after, plan, sum_up
from app.telemetry import Telemetry
from app.upstream import Upstream, VendorAnswer

MAX_ANSWER_BYTES = 67_108_864
"""A vendor's unary answer beyond this is broken: it would be held in memory whole."""
MAX_ERROR_BYTES = 65_536
KEPT_BYTES = 8_192
"""How much of a stream's frames is kept to estimate its tokens if the client hangs up; beyond it, extrapolated."""


class Gateway:
    """The rooms of a replica, and the way of a call through them."""

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
        self.upstream = upstream
        self.telemetry = telemetry
        self.ambient = ambient
        self.cooldowns = cooldowns
        self.estimates = Estimates()

    @asynccontextmanager
    async def serve(self, exchange: Exchange) -> AsyncIterator[Reply]:
        """One call from its authorisation to its row. The body is sent inside the context.

        Success, refusal, vendor failure, hang-up and drain all reach `settle`, which never waits and so cannot be
        cancelled. The last frame of an answer is released only after its row is in the spool.
        """
        call = exchange.call
        answer: VendorAnswer | None = None
        try:
            try:
                exchange.tenant = tenant = authorize(call.config, call.key, call.tenant_claimed)  # 2 permission
                require(call.key, "call")
                if call.fault is not None:
                    raise call.fault
                self.spool.admit()
                request = call.dialect.read(call.body)
                if call.relayed:
                    request = msgspec.structs.replace(request, headers=call.relayed)
                exchange.request = request
                alias = allow(call.config, tenant, request.alias)
                if alias.serves != request.serves:
                    raise InvalidRequest(f"{alias.name!r} serves {alias.serves}, not this route.", param="model")
                exchange.authorized = self.ambient.monotonic()
                if tenant.downgrade:
                    alias = self._downgraded(exchange, tenant, alias)
                tokens, nanos = self.estimates.need(exchange, alias)
                exchange.reservation = held = await self.limits.reserve(call, tenant, tokens, nanos)  # 3 budget
                exchange.rates = held.rates
                answer, relay = await self._dialogue(exchange, alias)  # 5 plan, 6 dialogue
                if request.stream:
                    reply = self._streamed(exchange, alias, answer, relay)
                else:
                    reply = self._unary(exchange, relay)
            except GatewayError as error:
                if isinstance(error, TenantNotAllowed):
                    self.telemetry.audit(call.key.id, "tenant.forge", tenant=call.tenant_claimed, call=call.request_id)
                if isinstance(error, LimitError):
                    exchange.rates = error.rates
                reply = self._refused(exchange, error)
            yield reply  # 7 departure
        except Exception as defect:
            exchange.error = exchange.error or InternalError("The gateway has a defect.")
            raise defect
        finally:
            try:
                if answer is not None:
                    await answer.close(ended=exchange.done)
            finally:
                with contextlib.suppress(LedgerUnavailable):  # counted; the intent stands for the row
                    self.settle(exchange)  # 8 settlement, where it has not been

    def _downgraded(self, exchange: Exchange, tenant: Tenant, alias: Alias) -> Alias:
        """What the tenant's policy has in the alias's place while a budget is nearly used up, noted; else the alias."""
        cheaper = substitute(exchange.call.config, tenant, alias)
        if cheaper is None or not self.limits.nearly_used(exchange.call, tenant):
            return alias
        exchange.alias_requested = alias.name
        exchange.request = msgspec.structs.replace(exchange.request, alias=cheaper.name)
        return cheaper

    # --- 5 plan, 6 dialogue -------------------------------------------------------------------------------------------

    async def _dialogue(self, exchange: Exchange, alias: Alias) -> tuple[VendorAnswer | None, _Stream | bytes]:
        """The first good answer of the chain: a whole body, or a stream up to its first content.

        Retries and fallbacks happen here, before anything is sent. Raises VendorRefused, UpstreamError,
        LedgerUnavailable.
        """
        targets = plan(alias, self.cooldowns.resting())
        retry = exchange.call.config.settings.retry
        deadline = exchange.call.started + alias.timeouts.total
        exchange.chain = alias.chain
        if targets[0] is not alias.targets[0]:
            self.telemetry.fell_back(exchange, alias.chain[0], targets[0].name, "resting")
        errors: list[VendorError] = []
        tried: list[str] = []
        index = tries_here = 0
        while True:
            target = targets[index]
            tries_here += 1
            key = pick(target, self.cooldowns.resting(), tried, self.ambient.random()) if target.provider.keys else None
            try:
                return await self._attempt(exchange, alias, target, key, deadline)
            except VendorRefused:
                raise
            except VendorError as error:
                errors.append(error)
            now = self.ambient.monotonic()
            error = errors[-1]
            if key is not None:
                tried.append(key.name)
            name, seconds = rests(error, target, key, retry.cooldown_seconds)
            if seconds:
                self.cooldowns.rest(name, seconds, error.fault)
            if isinstance(error, VendorMisconfigured):
                self.telemetry.misconfigured(name, target.name, error)
            step = after(
                error,
                index=index,
                targets=len(targets),
                attempts=len(exchange.attempts),
                tries_here=tries_here,
                retry=retry,
                chance=self.ambient.random(),
                other_key=another(target, self.cooldowns.resting(), tried),
            )
            late = now + (step.wait_seconds if step else 0.0) >= deadline - TIMER_SECONDS
            if step is None or late:
                raise sum_up(errors, late)
            if isinstance(error, VendorTimeout | VendorBroke):
                self._note_lost(exchange)
            if step.wait_seconds:
                await self.ambient.sleep(step.wait_seconds)
                exchange.provider_seconds += step.wait_seconds  # the vendor made us wait: no overhead of ours
            if step.index != index:
                self.telemetry.fell_back(exchange, target.name, targets[step.index].name, error.fault)
                index, tries_here = step.index, 0
                tried.clear()

    async def _attempt(
        self, exchange: Exchange, alias: Alias, target: Target, key: VendorKey | None, deadline: float
    ) -> tuple[VendorAnswer | None, _Stream | bytes]:
        """One request to one target, unless its translator answers by itself.

        Raises VendorError; the attempt is noted whatever becomes of it.
        """
        call, request, limits = exchange.call, exchange.request, alias.timeouts
        translator = dialects.translator(call.dialect, target.provider.kind)
        outgoing = translator.outgoing(request, target)
        if isinstance(outgoing, Answer):
            exchange.target = target
            self._note_answer(exchange, outgoing)
            return None, outgoing.body
        stamp = Stamp("chatcmpl-" + call.event_id, int(call.received_at), target.model)
        if key is not None and key.quota != UNLIMITED:
            attempt_id = f"{call.event_id}:{len(exchange.attempts)}:{key.name}"
            tokens = exchange.input_tokens_estimate + exchange.output_tokens_estimate
            exchange.grant = await self.limits.grant(key, attempt_id, tokens)
        exchange.target = target
        self.spool.intend(self._intent(exchange))
        started = self.ambient.monotonic()
        limit = limits.first_token if request.stream else limits.answer
        answer: VendorAnswer | None = None
        request_id: str | None = None
        outcome = "cancelled"
        exchange.patience.limit(min(limit, deadline - started))
        try:
            credential = await self._credential(target, key)
            signed = translator.sign(outgoing, credential, self.ambient.now())
            answer = await self.upstream.open(signed, limits.connect)
            request_id = _word(answer.headers.get(translator.request_id_header))
            if not 200 <= answer.status < 300:
                raise translator.error(answer.status, answer.headers, await _error_body(answer))
            exchange.vendor_request_id = request_id
            if request.stream:
                stream = _Stream(
                    translator.stream(stamp),
                    call.config.settings.start_buffer_bytes,
                    withhold_usage=not request.include_usage,
                )
                await stream.begin(answer)
                exchange.first_token = self.ambient.monotonic()
                exchange.model_resolved = _word(stream.reader.model)
                exchange.vendor_request_id = request_id = request_id or _word(stream.reader.request_id)
                outcome = "success"
                return answer, stream
            whole = translator.answer(await answer.read(MAX_ANSWER_BYTES), request, stamp, answer.headers)
            self._note_answer(exchange, whole)
            exchange.vendor_request_id = request_id = request_id or _word(whole.request_id)
            outcome = "success"
            return answer, whole.body
        except asyncio.CancelledError:
            if not exchange.patience.over():
                raise
            outcome = VendorTimeout.fault
            raise VendorTimeout("the vendor did not answer in time") from None
        except VendorError as error:
            outcome = error.fault
            self.telemetry.vendor_error(target.provider.name, error)
            raise
        finally:
            exchange.patience.lift()
            ended = self.ambient.monotonic()
            exchange.provider_seconds += ended - started
            exchange.attempts.append(
                Attempt(
                    target=target.name,
                    provider=target.provider.name,
                    outcome=outcome,
                    status=None if answer is None else answer.status,
                    started_ms=_ms(started - exchange.call.started),
                    duration_ms=_ms(ended - started),
                    vendor_request_id=request_id,
                    key=None if key is None else key.name,
                )
            )
            if outcome != "success":
                self._settle_grant(exchange, 0)
                if answer is not None:
                    await answer.close()

    async def _credential(self, target: Target, key: VendorKey | None) -> Credential:
        """What signs the request. Waits only where it has to be fetched. Raises VendorError."""
        if key is not None:
            return key.credential
        account = target.provider.account
        return target.provider.credential if account is None else await self.credentials.of(account)

    def _settle_grant(self, exchange: Exchange, tokens: int) -> None:
        """What the vendor counts for its key: an attempt that failed was a request without tokens."""
        if exchange.grant is not None:
            self.limits.settle(exchange.grant, tokens, 0)
            exchange.grant = None

    def _note_lost(self, exchange: Exchange) -> None:
        """The vendor had read the prompt, and may charge for it; the tenant pays for the answer that it gets."""
        lost = self._charge(exchange, estimate(exchange.request.operation, exchange.input_tokens_estimate, 0))
        exchange.attempts[-1] = msgspec.structs.replace(exchange.attempts[-1], estimated_usd=usd(lost.total_nanos))

    def _note_answer(self, exchange: Exchange, answer: Answer) -> None:
        exchange.model_resolved = _word(answer.model)
        exchange.finish_reason = _word(answer.finish_reason)
        exchange.done = True
        exchange.service_tier = _word(answer.service_tier)
        exchange.usage = answer.usage
        exchange.text_bytes = answer.text_bytes

    # --- 7 departure --------------------------------------------------------------------------------------------------

    def _unary(self, exchange: Exchange, body: bytes) -> Reply:
        """A whole answer: its row first, then its only frame. Raises LedgerUnavailable."""
        event = self.settle(exchange)
        headers = self._headers(exchange, b"application/json")
        headers += [
            (b"content-length", b"%d" % len(body)),
            (b"x-usage-total-tokens", b"%d" % event.usage.total_tokens),
            (b"x-gateway-cost-usd", bytes(event.cost_usd.total)),
            (
                b"server-timing",
                b"gateway;dur=%.3f, provider;dur=%.3f" % (event.latency_ms.gateway, event.latency_ms.provider),
            ),
        ]
        return Reply(200, headers, body)

    def _streamed(self, exchange: Exchange, alias: Alias, answer: VendorAnswer, stream: _Stream) -> Reply:
        headers = self._headers(exchange, b"text/event-stream; charset=utf-8")
        overhead = exchange.first_token - exchange.call.started - exchange.provider_seconds
        headers += [
            (b"cache-control", b"no-cache"),
            (b"server-timing", b"gateway;dur=%.3f" % (overhead * 1000)),
        ]
        return Reply(200, headers, b"", self._relay(exchange, alias, answer, stream))

    async def _relay(
        self, exchange: Exchange, alias: Alias, answer: VendorAnswer, stream: _Stream
    ) -> AsyncGenerator[bytes, None]:
        """The stream's frames as the vendor sent them, each chunk at once; a failure is one error event.

        The frames that end the stream are released after the row is in the spool.
        """
        deadline = exchange.call.started + alias.timeouts.total
        relay_started = self.ambient.monotonic()
        patience = exchange.patience
        try:
            while True:
                ready, done = stream.take()
                if done:
                    exchange.done = True
                    self._end_stream(exchange, stream, relay_started)
                    yield ready
                    return
                if ready:
                    yield ready
                patience.limit(min(alias.timeouts.idle, deadline - self.ambient.monotonic()))
                await stream.more(answer)
                patience.lift()
        except asyncio.CancelledError:  # hang-up, drain or our own patience
            if not patience.over():
                if exchange.event is None:
                    self._note_stream(exchange, stream, relay_started)  # what was relayed is charged
                raise
            if self.ambient.monotonic() >= deadline - TIMER_SECONDS:
                error: GatewayError = sum_up([], True)
            else:
                error = sum_up([VendorTimeout("the vendor fell silent in mid-stream")], False)
        except VendorError as fault:
            self.telemetry.vendor_error(exchange.target.provider.name, fault)
            error = sum_up([fault], False)
        except LedgerUnavailable as fault:
            error = fault
        except BaseException:  # a defect, or a reader that went away: what was relayed is charged
            if exchange.event is None:
                self._note_stream(exchange, stream, relay_started)
            raise
        patience.lift()
        exchange.error = error
        exchange.done = False
        last = exchange.attempts[-1]
        exchange.attempts[-1] = msgspec.structs.replace(
            last,
            outcome=VendorBroke.fault if exchange.event is None else last.outcome,
            duration_ms=_ms(self.ambient.monotonic() - exchange.call.started) - last.started_ms,
        )
        tail = stream.ready()
        if exchange.event is None:
            with contextlib.suppress(LedgerUnavailable):  # the client gets its error event all the same
                self._end_stream(exchange, stream, relay_started)
        yield tail + exchange.call.dialect.error_frames(error, exchange.call.request_id)

    def _end_stream(self, exchange: Exchange, stream: _Stream, relay_started: float) -> None:
        """Notes what the stream told, and settles. Raises LedgerUnavailable."""
        self._note_stream(exchange, stream, relay_started)
        self.settle(exchange)

    def _note_stream(self, exchange: Exchange, stream: _Stream, relay_started: float) -> None:
        exchange.service_tier = _word(stream.reader.service_tier)
        exchange.usage = stream.reader.usage
        exchange.finish_reason = _word(stream.reader.finish_reason)
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
        headers = self._headers(exchange, b"application/json")
        headers.append((b"content-length", b"%d" % len(body)))
        headers += retry_headers(error, status)
        return Reply(status, headers, body)

    def _headers(self, exchange: Exchange, content_type: bytes) -> list[tuple[bytes, bytes]]:
        """What every answer says of itself."""
        call = exchange.call
        request_id = call.request_id.encode()
        headers = [
            (b"content-type", content_type),
            (b"x-gateway-config-version", call.config.version.encode()),
            *[(name, request_id) for name in call.dialect.id_headers],
        ]
        if exchange.target is not None:
            model = exchange.model_resolved or exchange.target.model
            headers += [
                (b"x-gateway-model-resolved", model.encode("latin-1", "replace")),
                (b"x-gateway-provider", exchange.target.provider.name.encode()),
                (b"x-gateway-attempts", b"%d" % len(exchange.attempts)),
                (b"x-gateway-fallback", b"true" if _fell_back(exchange) else b"false"),
            ]
        if exchange.alias_requested is not None:
            headers.append((b"x-gateway-downgraded-from", exchange.alias_requested.encode()))
        if exchange.rates is not None:
            headers += call.dialect.rate_headers(exchange.rates, self.ambient.now())
        return headers

    # --- 8 settlement -------------------------------------------------------------------------------------------------

    def settle(self, exchange: Exchange) -> LedgerEvent:
        """The one place that builds a ledger event: spool, limits and telemetry read the same. Never waits.

        Raises LedgerUnavailable when the spool cannot take the row; the intent then stands for it.
        """
        if exchange.event is not None:
            return exchange.event
        exchange.event = event = self._event(exchange)
        row: bytes | None = None
        try:
            row = self.spool.append(event)  # → 9 archive: ledger_shipper.py
        except LedgerUnavailable as fault:
            exchange.error, exchange.done = fault, False
            exchange.event = event = self._event(exchange)
            raise
        finally:
            if exchange.reservation is not None:
                self.limits.settle(exchange.reservation, event.usage.total_tokens, exchange.charged.total_nanos)
                self.estimates.learn(exchange)
            self._settle_grant(exchange, event.usage.total_tokens)
            self.telemetry.record(exchange, event, row)
        return event

    def _event(self, exchange: Exchange) -> LedgerEvent:
        call, request, tenant, target = exchange.call, exchange.request, exchange.tenant, exchange.target
        error = exchange.error
        if error is not None:
            status = error.outcome
        elif exchange.done:
            status = "success"
        else:
            status = _CUT_STATUS[exchange.cut]
        usage, source = self._usage(exchange)
        exchange.charged = charged = self._charge(exchange, usage)
        total = self.ambient.monotonic() - call.started
        return LedgerEvent(
            event_id=call.event_id,
            timestamp=call.occurred_at,
            request_id=call.request_id,
            trace_id=call.trace_id,
            tenant_id=None if tenant is None else tenant.id,
            feature_id=call.feature_id,
            user_id_hash=call.user_id_hash,
            model_alias=None if request is None else request.alias,
            model_resolved=None if target is None else exchange.model_resolved or target.model,
            provider=None if target is None else target.provider.name,
            region=None if target is None else target.provider.region,
            usage=event_usage(usage),
            cost_usd=event_cost(charged, call.config.price_version),
            latency_ms=EventLatency(
                gateway=_ms(max(0.0, total - exchange.provider_seconds)),
                cache_lookup=0.0,
                provider=_ms(exchange.provider_seconds),
                total=_ms(total),
            ),
            status=status,
            fallback_chain=exchange.chain,
            fallback_used=_fell_back(exchange),
            rate_limit_tier=None if tenant is None else tenant.tier,
            prompt_version=call.prompt_version,
            tenant_claimed=call.tenant_claimed if tenant is None else None,
            key_id=call.key.id,
            environment=call.config.environment,
            config_version=call.config.version,
            stream=request is not None and request.stream,
            ttft_ms=_ms(exchange.first_token - call.started) if exchange.first_token else None,
            finish_reason=exchange.finish_reason,
            vendor_request_id=exchange.vendor_request_id,
            attempts=tuple(exchange.attempts),
            usage_source=source,
            cost_status="none" if source == "none" else "priced" if charged.priced else "unpriced",
            service_tier=exchange.service_tier,
            error_code=None if error is None else _error_code(error),
            limit_tripped=error.limit if isinstance(error, LimitError) else None,
            operation="chat" if request is None else request.operation,
            alias_requested=exchange.alias_requested,
        )

    def _usage(self, exchange: Exchange) -> tuple[Usage, str]:
        """The vendor's figures; else, where a vendor worked for this call, an estimate; else nothing.

        A vendor that answered with an error has charged nothing. One that was cut off had read the prompt, and had
        written what was relayed.
        """
        if exchange.usage is not None:
            return exchange.usage, "vendor"
        worked = exchange.first_token or (
            exchange.attempts and exchange.attempts[-1].outcome in ("success", "cancelled", VendorTimeout.fault)
        )
        if not worked:
            return Usage(), "none"
        written = -(-exchange.text_bytes // BYTES_PER_TOKEN)
        if exchange.prompt is not None:
            return msgspec.structs.replace(exchange.prompt, output=written), "estimated"
        return estimate(exchange.request.operation, exchange.input_tokens_estimate, written), "estimated"

    def _charge(self, exchange: Exchange, usage: Usage) -> Cost:
        """What the call costs its tenant where it went."""
        tenant, target = exchange.tenant, exchange.target
        if tenant is None or target is None:
            return Cost()
        return charge(usage, target, tenant.id, exchange.service_tier, exchange.call.received_at)

    def _intent(self, exchange: Exchange) -> Intent:
        call, request, tenant, target = exchange.call, exchange.request, exchange.tenant, exchange.target
        reserved = self._charge(
            exchange, estimate(request.operation, exchange.input_tokens_estimate, exchange.output_tokens_estimate)
        )
        return Intent(
            event_id=call.event_id,
            timestamp=call.occurred_at,
            request_id=call.request_id,
            trace_id=call.trace_id,
            tenant_id=tenant.id,
            feature_id=call.feature_id,
            user_id_hash=call.user_id_hash,
            alias=request.alias,
            model=target.model,
            provider=target.provider.name,
            region=target.provider.region,
            tier=tenant.tier,
            prompt_version=call.prompt_version,
            key_id=call.key.id,
            environment=call.config.environment,
            config_version=call.config.version,
            stream=request.stream,
            input_tokens=exchange.input_tokens_estimate,
            output_tokens=exchange.output_tokens_estimate,
            input_nanos=reserved.input_nanos,
            output_nanos=reserved.output_nanos,
            priced=reserved.priced,
            price_version=call.config.price_version,
            chain=exchange.chain,
            operation=request.operation,
            alias_requested=exchange.alias_requested,
        )


class _Stream:
    """A vendor's stream between its chunks: what is ready to relay, and what it told so far."""

    def __init__(self, reader: StreamReader, start_buffer_bytes: int, *, withhold_usage: bool) -> None:
        self.reader = reader
        self._withhold_usage = withhold_usage
        self._start_buffer_bytes = start_buffer_bytes
        self._kept: list[bytes] = []
        self._kept_bytes = self._relayed_bytes = 0
        self._ready: list[bytes] = []
        self._started = self._done = False
        self._fault: VendorError | None = None

    async def begin(self, answer: VendorAnswer) -> None:
        """Reads up to the first content, or until the start buffer is full. Raises VendorError."""
        size = 0
        while not self._started and size <= self._start_buffer_bytes:
            chunk = await answer.chunk()
            if chunk is None:
                raise VendorBroke("the vendor's stream ended before any content")
            size += len(chunk)
            self._take(self.reader.feed(chunk))
            if self._fault and not self._started:
                raise self._fault
            if self._done and not self._started:
                raise VendorBroke("the vendor's stream is empty")

    async def more(self, answer: VendorAnswer) -> None:
        """Waits for the next bytes and reads them."""
        chunk = await answer.chunk()
        if chunk is not None:
            self._take(self.reader.feed(chunk))
        elif self.reader.finished:
            self._take(self.reader.end())
        else:
            self._fault = VendorBroke("the vendor cut its stream")

    def _take(self, frames: Iterator[Frame]) -> None:
        ready = self._ready
        try:
            for kind, frame in frames:
                if kind is Kind.CONTENT:
                    self._started = True
                    self._relayed_bytes += len(frame)
                    if self._kept_bytes < KEPT_BYTES:
                        self._kept.append(frame)
                        self._kept_bytes += len(frame)
                elif kind is Kind.DONE:
                    self._done = True
                elif kind is Kind.USAGE and self._withhold_usage:
                    continue
                ready.append(frame)
                if self._done:
                    return
        except VendorError as fault:
            self._fault = fault

    def take(self) -> tuple[bytes, bool]:
        """What may be sent now, and whether it ends the stream. Raises VendorError; `ready()` has what came before."""
        if self._fault is not None:
            raise self._fault
        return self.ready(), self._done

    def ready(self) -> bytes:
        """What has been taken and not sent."""
        out = self._ready
        data = out[0] if len(out) == 1 else b"".join(out)
        self._ready = []
        return data

    def text_bytes(self) -> int:
        """Size of the text relayed so far: read from the frames that were kept, extrapolated beyond them."""
        kept = sum(self.reader.text_bytes(frame) for frame in self._kept)
        return kept * self._relayed_bytes // self._kept_bytes if self._kept_bytes else 0


_CUT_STATUS = {"client_closed": "client_closed", "deadline": "timeout", "drain": "interrupted", None: "interrupted"}


async def _error_body(answer: VendorAnswer) -> bytes:
    """What a vendor says of its failure; nothing where that is cut or too large, as the status says enough."""
    try:
        return await answer.read(MAX_ERROR_BYTES)
    except VendorBroke:
        return b""


def _word(text: str | None) -> str | None:
    """A vendor's word as far as it can stand in a header and a row: printable ASCII, at most 128 characters."""
    if text is None or (len(text) <= 128 and text.isascii() and text.isprintable()):
        return text
    return "".join(c for c in text[:128] if c.isascii() and c.isprintable()) or None


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _fell_back(exchange: Exchange) -> bool:
    return exchange.target is not None and exchange.target.name != exchange.chain[0]


def _error_code(error: GatewayError) -> str:
    return (_word(error.vendor_code) or "invalid_request") if isinstance(error, VendorRefused) else error.code


def retry_headers(error: GatewayError, status: int) -> list[tuple[bytes, bytes]]:
    """When to try again, for the client's SDK: every 429 and 503 says so."""
    headers = []
    if status in (429, 503):
        wait = max(1, -int(-(error.retry_after_seconds or 1.0) // 1))
        headers.append((b"retry-after", b"%d" % wait))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    return headers
