"""What the notes on a call become: its intent, its ledger event, its price. Pure."""

from __future__ import annotations

import msgspec

from app.core import (
    Cost,
    EventLatency,
    Exchange,
    Intent,
    LedgerEvent,
    Usage,
    charge,
    estimate,
    event_cost,
    event_usage,
    saved_nanos,
    usd,
)
from app.errors import GatewayError, GuardrailBlocked, LimitError, VendorRefused, VendorTimeout
from app.prompt_size import BYTES_PER_TOKEN

_CUT_STATUS = {"client_closed": "client_closed", "deadline": "timeout", "drain": "interrupted", None: "interrupted"}


def event_of(exchange: Exchange, now: float) -> LedgerEvent:
    """What became of a call; `now` is the monotonic clock. Notes on the exchange what it is charged."""
    call, request, tenant, target = exchange.call, exchange.request, exchange.tenant, exchange.target
    error, recalled = exchange.error, exchange.recalled
    model, provider, saved = exchange.model_resolved, None, 0
    if target is not None:
        model, provider = model or target.model, target.provider.name
    elif recalled is not None:
        model, provider = recalled.model, recalled.provider
        if recalled.usage is not None and exchange.spared is not None:
            saved = saved_nanos(recalled.usage, exchange.spared, tenant.id, call.received_at)
    if error is not None:
        status = error.outcome
    elif exchange.done:
        status = "client_closed" if exchange.left else "success"
    else:
        status = _CUT_STATUS[exchange.cut]
    usage, source = usage_of(exchange)
    cost = charged(exchange, usage)
    for also_used, also_cost in exchange.beside:
        usage, cost, source = usage + also_used, cost + also_cost, "vendor" if source == "none" else source
    exchange.charged = cost
    total = now - call.started
    return LedgerEvent(
        event_id=call.event_id,
        timestamp=call.occurred_at,
        request_id=call.request_id,
        trace_id=call.trace_id,
        tenant_id=None if tenant is None else tenant.id,
        feature_id=call.feature_id,
        user_id_hash=call.user_id_hash,
        model_alias=None if request is None else request.alias or None,
        model_resolved=model,
        provider=provider,
        region=None if target is None else target.provider.region,
        cache_hit=recalled is not None and error is None,
        cache_kind=None if recalled is None else recalled.kind,
        similarity=None if recalled is None else recalled.similarity,
        saved_usd=usd(saved),
        usage=event_usage(usage),
        cost_usd=event_cost(cost, call.config.price_version),
        latency_ms=EventLatency(
            gateway=ms(max(0.0, total - exchange.provider_seconds - exchange.cache_seconds)),
            cache_lookup=ms(exchange.cache_seconds),
            provider=ms(exchange.provider_seconds),
            total=ms(total),
        ),
        status=status,
        fallback_chain=exchange.chain,
        fallback_used=fell_back(exchange),
        rate_limit_tier=None if tenant is None else tenant.tier,
        prompt_version=call.prompt_version,
        guardrail_blocked=isinstance(error, GuardrailBlocked),
        tenant_claimed=call.tenant_claimed if tenant is None else None,
        key_id=call.key.id,
        environment=call.config.environment,
        config_version=call.config.version,
        stream=request is not None and request.stream,
        ttft_ms=ms(exchange.first_token - call.started) if exchange.first_token else None,
        finish_reason=exchange.finish_reason,
        vendor_request_id=exchange.vendor_request_id,
        attempts=tuple(exchange.attempts),
        usage_source=source,
        cost_status="none" if source == "none" else "priced" if cost.priced else "unpriced",
        service_tier=exchange.service_tier,
        error_code=None if error is None else error_code(error),
        limit_tripped=error.limit if isinstance(error, LimitError) else None,
        operation="chat" if request is None else request.operation,
        alias_requested=exchange.alias_requested,
        rule=exchange.rule,
        purpose=exchange.purpose,
    )


def usage_of(exchange: Exchange) -> tuple[Usage, str]:
    """Of the attempt that answers: the vendor's figures; else, where a vendor worked, an estimate; else nothing.

    A vendor that answered with an error has charged nothing. One that was cut off had read the prompt, and had
    written what was relayed. An answer from before used nothing.
    """
    if exchange.recalled is not None:
        return Usage(), "none"
    if exchange.usage is not None:
        return exchange.usage, "vendor"
    worked = exchange.first_token or (
        exchange.attempts
        and exchange.attempts[exchange.served].outcome in ("success", "cancelled", VendorTimeout.fault)
    )
    if not worked:
        return Usage(), "none"
    written = -(-exchange.text_bytes // BYTES_PER_TOKEN)
    if exchange.prompt is not None:
        return msgspec.structs.replace(exchange.prompt, output=written), "estimated"
    request = exchange.request
    return estimate(request.operation, exchange.input_tokens_estimate, written, request.units), "estimated"


def charged(exchange: Exchange, usage: Usage) -> Cost:
    """What the call costs its tenant where it went."""
    tenant, target = exchange.tenant, exchange.target
    if tenant is None or target is None:
        return Cost()
    return charge(usage, target, tenant.id, exchange.service_tier, exchange.call.received_at)


def intent_of(exchange: Exchange) -> Intent:
    """What a row is made of if this process dies before the call ends."""
    call, request, tenant, target = exchange.call, exchange.request, exchange.tenant, exchange.target
    expected = estimate(
        request.operation, exchange.input_tokens_estimate, exchange.output_tokens_estimate, request.units
    )
    reserved = charged(exchange, expected)
    input_tokens, output_tokens = exchange.input_tokens_estimate, exchange.output_tokens_estimate
    for used, cost in exchange.beside:
        reserved += cost
        input_tokens, output_tokens = input_tokens + used.total_input, output_tokens + used.total_output
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
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_nanos=reserved.input_nanos,
        output_nanos=reserved.output_nanos,
        priced=reserved.priced,
        price_version=call.config.price_version,
        chain=exchange.chain,
        operation=request.operation,
        alias_requested=exchange.alias_requested,
        purpose=exchange.purpose,
    )


def word(text: str | None) -> str | None:
    """A vendor's word as far as it can stand in a header and a row: printable ASCII, at most 128 characters."""
    if text is None or (len(text) <= 128 and text.isascii() and text.isprintable()):
        return text
    return "".join(c for c in text[:128] if c.isascii() and c.isprintable()) or None


def ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def fell_back(exchange: Exchange) -> bool:
    """Whether another target answers than the first, which was at fault: not where it was doubted, or outrun."""
    if exchange.target is None or exchange.target.name == exchange.chain[0]:
        return False
    return not exchange.attempts or exchange.attempts[exchange.served].role not in ("escalation", "hedge")


def error_code(error: GatewayError) -> str:
    return (word(error.vendor_code) or "invalid_request") if isinstance(error, VendorRefused) else error.code
