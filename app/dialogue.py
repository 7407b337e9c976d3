"""The dialogue with an alias's vendors: attempts, retries and fallbacks until the first good answer."""

from __future__ import annotations

import asyncio

import msgspec

from app import dialects
from app.ambient import TIMER_SECONDS, Ambient
from app.config import UNLIMITED, Alias, Credential, Target, VendorKey
from app.cooldowns import Cooldowns, another, pick, rests
from app.core import FIRST_ATTEMPT, Attempt, Call, Exchange, estimate, span_id, usd
from app.credentials import Credentials
from app.errors import VendorBroke, VendorError, VendorMisconfigured, VendorRefused, VendorTimeout
from app.ledger import Spool
from app.limits import Limits
from app.paces import Paces
from app.providers.translator import Answer, Outgoing, Stamp
from app.relay import Stream
from app.routing import after, plan, sum_up
from app.settlement import charged, intent_of, ms, word
from app.telemetry import Telemetry
from app.upstream import Upstream, VendorAnswer

MAX_ANSWER_BYTES = 67_108_864
"""A vendor's unary answer beyond this is broken: it would be held in memory whole."""
MAX_ERROR_BYTES = 65_536


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

    async def first_good(self, exchange: Exchange, alias: Alias) -> tuple[VendorAnswer | None, Stream | bytes]:
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
    ) -> tuple[VendorAnswer | None, Stream | bytes]:
        """One request to one target, unless its translator answers by itself.

        Raises VendorError; the attempt is noted whatever becomes of it.
        """
        call, request, limits = exchange.call, exchange.request, alias.timeouts
        translator = dialects.translator(call.dialect, target.provider.kind)
        outgoing = translator.outgoing(request, target)
        if isinstance(outgoing, Answer):
            exchange.target = target
            note_answer(exchange, outgoing)
            return None, outgoing.body
        stamp = Stamp("chatcmpl-" + call.event_id, int(call.received_at), target.model, request, target.name)
        if key is not None and key.quota != UNLIMITED:
            attempt_id = f"{call.event_id}:{len(exchange.attempts)}:{key.name}"
            tokens = exchange.input_tokens_estimate + exchange.output_tokens_estimate
            exchange.grant = await self.limits.grant(key, attempt_id, tokens)
        exchange.target = target
        self.spool.intend(intent_of(exchange))
        started = self.ambient.monotonic()
        limit = limits.first_token if request.stream else limits.answer
        answer: VendorAnswer | None = None
        request_id: str | None = None
        outcome = "cancelled"
        exchange.patience.limit(min(limit, deadline - started))
        try:
            credential = await self._credential(target, key)
            signed = translator.sign(outgoing, credential, self.ambient.now())
            if target.provider.trace_context:
                signed = traced(signed, call, len(exchange.attempts))
            answer = await self.upstream.open(signed, limits.connect)
            request_id = word(answer.headers.get(translator.request_id_header))
            if not 200 <= answer.status < 300:
                raise translator.error(answer.status, answer.headers, await _error_body(answer))
            exchange.vendor_request_id = request_id
            if request.stream:
                stream = Stream(
                    translator.stream(stamp),
                    call.config.settings.start_buffer_bytes,
                    withhold_usage=not request.include_usage,
                )
                await stream.begin(answer)
                exchange.first_token = self.ambient.monotonic()
                exchange.model_resolved = word(stream.reader.model)
                exchange.vendor_request_id = request_id = request_id or word(stream.reader.request_id)
                outcome = "success"
                return answer, stream
            whole = translator.answer(await answer.read(MAX_ANSWER_BYTES), request, stamp, answer.headers)
            note_answer(exchange, whole)
            exchange.vendor_request_id = request_id = request_id or word(whole.request_id)
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
            if alias.order == "latency" and outcome in ("success", VendorTimeout.fault):
                self.paces.took(target, request.stream, ended - started)
            exchange.attempts.append(
                Attempt(
                    target=target.name,
                    provider=target.provider.name,
                    outcome=outcome,
                    status=None if answer is None else answer.status,
                    started_ms=ms(started - exchange.call.started),
                    duration_ms=ms(ended - started),
                    vendor_request_id=request_id,
                    key=None if key is None else key.name,
                )
            )
            if outcome != "success":
                self.settle_grant(exchange, 0)
                if answer is not None:
                    await answer.close()

    async def _credential(self, target: Target, key: VendorKey | None) -> Credential:
        """What signs the request. Waits only where it has to be fetched. Raises VendorError."""
        if key is not None:
            return key.credential
        account = target.provider.account
        return target.provider.credential if account is None else await self.credentials.of(account)

    def settle_grant(self, exchange: Exchange, tokens: int) -> None:
        """What the vendor counts for its key: an attempt that failed was a request without tokens."""
        if exchange.grant is not None:
            self.limits.settle(exchange.grant, tokens, 0)
            exchange.grant = None

    def _note_lost(self, exchange: Exchange) -> None:
        """The vendor had read the prompt, and may charge for it; the tenant pays for the answer that it gets."""
        lost = charged(exchange, estimate(exchange.request.operation, exchange.input_tokens_estimate, 0))
        exchange.attempts[-1] = msgspec.structs.replace(exchange.attempts[-1], estimated_usd=usd(lost.total_nanos))


def note_answer(exchange: Exchange, answer: Answer) -> None:
    exchange.model_resolved = word(answer.model)
    exchange.finish_reason = word(answer.finish_reason)
    exchange.done = True
    exchange.service_tier = word(answer.service_tier)
    exchange.usage = answer.usage
    exchange.text_bytes = answer.text_bytes


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
