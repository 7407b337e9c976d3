"""What the notes on a call become: its intent, its ledger event, its price. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from app.core import (
    NOTHING,
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


_NOTHING_SAID = LedgerEvent(
    event_id="",
    timestamp="",
    request_id="",
    trace_id="",
    tenant_id=None,
    feature_id=None,
    user_id_hash=None,
    model_alias=None,
    model_resolved=None,
    provider=None,
    region=None,
    cache_hit=False,
    usage=event_usage(Usage()),
    cost_usd=event_cost(Cost(), ""),
    latency_ms=EventLatency(0.0, 0.0, 0.0, 0.0),
    status="success",
    fallback_chain=(),
    fallback_used=False,
    rate_limit_tier=None,
    prompt_version=None,
    guardrail_blocked=False,
    purpose="client",
    key_id="",
    environment="",
    config_version="",
    stream=False,
    attempts=(),
    usage_source="vendor",
    cost_status="priced",
    saved_usd=NOTHING,
    operation="chat",
)
"""What an event says of its own accord; `event_of` puts in what a call has to say."""


def event_of(exchange: Exchange, now: float) -> LedgerEvent:
    """What became of a call; `now` is the monotonic clock. Notes on the exchange what it is charged.

    An event is filled in in steps of at most 14 members: Python hands more keywords than that over in a dict, and takes
    four times as long for all of them.
    """
    call, request, tenant, target = exchange.call, exchange.request, exchange.tenant, exchange.target
    config, error, recalled = call.config, exchange.error, exchange.recalled
    model, provider, region = exchange.model_resolved, None, None
    if target is not None:
        model, provider, region = model or target.model, target.provider.name, target.provider.region
    elif recalled is not None:
        model, provider = recalled.model, recalled.provider
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
    asked = replace(
        _NOTHING_SAID,
        event_id=call.event_id,
        timestamp=call.occurred_at,
        request_id=call.request_id,
        trace_id=call.trace_id,
        tenant_id=None if tenant is None else tenant.id,
        rate_limit_tier=None if tenant is None else tenant.tier,
        feature_id=call.feature_id,
        user_id_hash=call.user_id_hash,
        prompt_version=call.prompt_version,
        model_alias=None if request is None else request.alias or None,
        stream=request is not None and request.stream,
        key_id=call.key.id,
        environment=config.environment,
        config_version=config.version,
    )
    event = replace(
        asked,
        model_resolved=model,
        provider=provider,
        region=region,
        usage=event_usage(usage),
        cost_usd=event_cost(cost, config.price_version),
        latency_ms=_latency(now - call.started, exchange.provider_seconds, exchange.cache_seconds),
        status=status,
        fallback_chain=exchange.chain,
        finish_reason=exchange.finish_reason,
        vendor_request_id=exchange.vendor_request_id,
        attempts=tuple(exchange.attempts),
        usage_source=source,
        cost_status="none" if source == "none" else "priced" if cost.priced else "unpriced",
        service_tier=exchange.service_tier,
    )
    members = _unusual(exchange, event)
    return replace(event, **members) if members else event


def _latency(total: float, provider: float, cache: float) -> EventLatency:
    """Of seconds. What we added is what is left: the parts add up."""
    total_us, provider_us = int(total * 1_000_000 + 0.5), int(provider * 1_000_000 + 0.5)
    cache_us = int(cache * 1_000_000 + 0.5) if cache else 0
    own_us = total_us - provider_us - cache_us
    return EventLatency(own_us / 1000 if own_us > 0 else 0.0, cache_us / 1000, provider_us / 1000, total_us / 1000)


def _unusual(exchange: Exchange, event: LedgerEvent) -> dict[str, object]:
    """What only some calls have to say: streams, what was not chat, was answered from before, or not at all."""
    call, request, error, recalled = exchange.call, exchange.request, exchange.error, exchange.recalled
    members: dict[str, object] = {}
    if exchange.first_token:
        members["ttft_ms"] = ms(exchange.first_token - call.started)
    if request is not None and request.operation != "chat":
        members["operation"] = request.operation
    if exchange.purpose != "client":
        members["purpose"] = exchange.purpose
    if exchange.rule is not None:
        members["rule"] = exchange.rule
    if exchange.alias_requested is not None:
        members["alias_requested"] = exchange.alias_requested
    if fell_back(exchange):
        members["fallback_used"] = True
    if recalled is not None:
        spared = exchange.spared
        members |= {"cache_hit": error is None, "cache_kind": recalled.kind, "similarity": recalled.similarity}
        if recalled.usage is not None and exchange.target is None and spared is not None:
            members["saved_usd"] = usd(saved_nanos(recalled.usage, spared, event.tenant_id, call.received_at))
    if error is not None:
        members |= {"error_code": error_code(error), "guardrail_blocked": isinstance(error, GuardrailBlocked)}
        if isinstance(error, LimitError):
            members["limit_tripped"] = error.limit
        if exchange.tenant is None:
            members["tenant_claimed"] = call.tenant_claimed
    return members


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
        return replace(exchange.prompt, output=written), "estimated"
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
    config, expected = call.config, exchange.expected
    input_tokens, output_tokens = exchange.input_tokens_estimate, exchange.output_tokens_estimate
    if expected is not None and expected.target is target:
        reserved = expected.cost
    else:
        usage = estimate(request.operation, input_tokens, output_tokens, request.units)
        reserved = charge(usage, target, tenant.id, None, call.received_at)
    for used, cost in exchange.beside:
        reserved += cost
        input_tokens, output_tokens = input_tokens + used.total_input, output_tokens + used.total_output
    return Intent(  # by place: in names, so many would come as a dict, and take six times as long
        call.event_id,
        call.occurred_at,
        call.request_id,
        call.trace_id,
        tenant.id,
        call.feature_id,
        call.user_id_hash,
        request.alias,
        target.model,
        target.provider.name,
        target.provider.region,
        tenant.tier,
        call.prompt_version,
        call.key.id,
        config.environment,
        config.version,
        request.stream,
        input_tokens,
        output_tokens,
        reserved.input_nanos,
        reserved.output_nanos,
        reserved.priced,
        config.price_version,
        exchange.chain,
        request.operation,
        exchange.alias_requested,
        exchange.purpose,
    )


def word(text: str | None) -> str | None:
    """A vendor's word as far as it can stand in a header and a row: printable ASCII, at most 128 characters."""
    if text is None or (len(text) <= 128 and text.isascii() and text.isprintable()):
        return text
    return "".join(c for c in text[:128] if c.isascii() and c.isprintable()) or None


def ms(seconds: float) -> float:
    """Milliseconds, with three decimals; `seconds` are not negative. A third of what `round` takes."""
    return int(seconds * 1_000_000 + 0.5) / 1000


def fell_back(exchange: Exchange) -> bool:
    """Whether another target answers than the first, which was at fault: not where it was doubted, or outrun."""
    if exchange.target is None or exchange.target.name == exchange.chain[0]:
        return False
    return not exchange.attempts or exchange.attempts[exchange.served].role not in ("escalation", "hedge")


def error_code(error: GatewayError) -> str:
    return (word(error.vendor_code) or "invalid_request") if isinstance(error, VendorRefused) else error.code
