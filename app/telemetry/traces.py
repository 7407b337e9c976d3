"""Spans of a call, built when it is over with explicit times: a tenth of the cost of building them along the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from app.core import FIRST_ATTEMPT, Attempt, Exchange, LedgerEvent, span_id
from app.telemetry.conventions import PROVIDER_NAMES, conventions
from app.telemetry.otlp import CLIENT, INTERNAL, SERVER, Value, span

Attributes = dict[str, Value]

_FAILED = ("error", "timeout", "interrupted")
"""What is exported though nobody sampled it, and what makes a span one of an error: a refusal is none of ours."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_MS = 3000
"""How long a replica that stops waits for the receiver to take what is left."""
AUTH, LIMITS, CACHE, ROUTE = 1, 2, 3, 4
"""Places of a call's spans, which make their ids: `core.span_id`."""


def open_spans(replica: str, environment: str) -> Spans | None:
    """Spans where an OTLP endpoint is configured by the standard variables, else None: then they cost nothing."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return Spans(replica, environment) if not off and any(os.environ.get(name) for name in _ENDPOINTS) else None


class Spans:
    """OpenTelemetry spans of a call: the request's own and, below it, one for each station that the call reached.

    Exported over OTLP/HTTP by OpenTelemetry's own variables. A call is sampled by its parent, else by the configured
    ratio; errors and fallbacks are exported always. Never waits: what the receiver does not take in time is dropped.
    """

    def __init__(self, replica: str, environment: str) -> None:
        from opentelemetry.sdk.resources import Resource

        from app.telemetry.export import Export

        resource = Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", "llm-gateway"),
                "service.instance.id": replica,
                "deployment.environment.name": environment,
            }
        )
        self._names = conventions(os.environ.get("OTEL_SEMCONV_STABILITY_OPT_IN"))
        self._export = Export(resource.attributes)

    def close(self) -> None:
        """Exports what waits; blocks for a few seconds at most."""
        self._export.close(FLUSH_MS)

    def record(self, exchange: Exchange, event: LedgerEvent) -> None:
        """A settled call, by its event and what the journey noted of times."""
        call = exchange.call
        if call.sampled or event.fallback_used or event.status in _FAILED:
            self._export.put(b"".join(self._spans(exchange, event)))

    def _spans(self, exchange: Exchange, event: LedgerEvent) -> Iterator[bytes]:
        call = exchange.call
        trace, state = bytes.fromhex(call.trace_id), (call.trace_state or "").encode()
        root = span_id(call.event_id, 0).to_bytes(8, "big")
        parent = b"" if call.parent_span_id is None else call.parent_span_id.to_bytes(8, "big")
        offset = call.received_at - call.started

        def one(name: str, place: int, start: float, end: float, attributes: Attributes, kind: int = INTERNAL) -> bytes:
            """`start` and `end` on the monotonic clock."""
            id = span_id(call.event_id, place).to_bytes(8, "big")
            of = root if place else parent
            start_ns, end_ns = int((offset + start) * 1e9), int((offset + end) * 1e9)
            return span(name, trace, id, of, of is not root, state, kind, start_ns, end_ns, attributes)

        ended = call.started + event.latency_ms.total / 1000
        yield one("gateway.request", 0, call.started, ended, request_attributes(event), SERVER)
        if not exchange.authorized:
            yield one("gateway.auth", AUTH, call.started, ended, auth_attributes(event, False))
            return
        yield one("gateway.auth", AUTH, call.started, exchange.authorized, auth_attributes(event, True))
        passed = exchange.authorized
        if looking := exchange.looking:
            looked = looking + exchange.cache_seconds if exchange.cache_seconds else ended
            yield one("gateway.cache", CACHE, looking, looked, cache_attributes(exchange, event))
            if not (exchange.reserved or exchange.cache_seconds):
                return  # what its Idempotency-Key came to is known before anything is reserved
            if event.cache_kind == "idempotent":
                passed = looked
        reserved = exchange.reserved or ended
        yield one("gateway.limits", LIMITS, passed, reserved, limits_attributes(exchange, event))
        if event.fallback_chain:
            planned = looked if looking else reserved
            started = event.attempts[0].started_ms / 1000 + call.started if event.attempts else ended
            yield one("gateway.route", ROUTE, planned, started, route_attributes(event))
        for place, attempt in enumerate(event.attempts, FIRST_ATTEMPT):
            start = call.started + attempt.started_ms / 1000
            last = place - FIRST_ATTEMPT == exchange.served % len(event.attempts)
            end = ended if last and exchange.first_token else start + attempt.duration_ms / 1000
            attributes = provider_attributes(self._names, exchange, event, attempt, last)
            yield one("gateway.provider", place, start, end, attributes, CLIENT)


def request_attributes(event: LedgerEvent) -> Attributes:
    """Of the whole call. No prompt, no answer, no credential, and nothing that a client sent but what was checked."""
    attributes: Attributes = {
        "request_id": event.request_id,
        "tenant_id": event.tenant_id or "",
        "feature_id": event.feature_id or "",
        "model_alias": event.model_alias or "",
        "model_resolved": event.model_resolved or "",
        "cache_hit": event.cache_hit,
        "fallback_used": event.fallback_used,
        "status": event.status,
        "cost_usd": float(bytes(event.cost_usd.total)),
        "config_version": event.config_version,
        "gateway.overhead_ms": event.latency_ms.gateway,
    }
    if event.user_id_hash:
        attributes["user.id"] = event.user_id_hash
    if event.error_code:
        attributes["error_code"] = event.error_code
    if event.status in _FAILED:
        attributes["error.type"] = event.error_code or event.status
    return attributes


def auth_attributes(event: LedgerEvent, granted: bool) -> Attributes:
    attributes: Attributes = {"tenant_id": event.tenant_id or "", "key_id": event.key_id, "granted": granted}
    if not granted and event.error_code:
        attributes["error_code"] = event.error_code
    return attributes


def limits_attributes(exchange: Exchange, event: LedgerEvent) -> Attributes:
    attributes: Attributes = {
        "tokens_reserved": exchange.input_tokens_estimate + exchange.output_tokens_estimate,
        "by": "replica" if exchange.reservation is not None and not exchange.reservation.held else "redis",
    }
    if event.limit_tripped:
        attributes["limit_tripped"] = event.limit_tripped
    return attributes


def cache_attributes(exchange: Exchange, event: LedgerEvent) -> Attributes:
    """`semantic`: questions that mean the same were looked for, after no answer to the same words was there."""
    attributes: Attributes = {
        "cache_hit": event.cache_hit,
        "saved_usd": float(bytes(event.saved_usd)),
        "semantic": exchange.memory.seen is not None,
    }
    if event.cache_kind:
        attributes["cache_kind"] = event.cache_kind
    if event.similarity is not None:
        attributes["similarity"] = event.similarity
    return attributes


def route_attributes(event: LedgerEvent) -> Attributes:
    attributes: Attributes = {
        "chain": event.fallback_chain,
        "attempts": len(event.attempts),
        "fallback_used": event.fallback_used,
    }
    if event.alias_requested:
        attributes["alias_requested"] = event.alias_requested
    return attributes


def provider_attributes(
    names: Mapping[str, str], exchange: Exchange, event: LedgerEvent, attempt: Attempt, last: bool
) -> Attributes:
    """Of one request to a vendor; what it answered stands on the last one, where it did."""
    target = exchange.call.config.targets.get(attempt.target)
    attributes: Attributes = {
        names["operation"]: event.operation,
        names["provider"]: PROVIDER_NAMES.get(target.provider.kind if target else "", attempt.provider),
        names["request_model"]: attempt.target.partition("/")[2],
        names["stream"]: event.stream,
        "target": attempt.target,
        "outcome": attempt.outcome,
    }
    if attempt.status is not None:
        attributes["http.response.status_code"] = attempt.status
    if attempt.key is not None:
        attributes["vendor_key"] = attempt.key
    if attempt.vendor_request_id is not None:
        attributes["vendor_request_id"] = attempt.vendor_request_id
    if attempt.outcome != "success":
        attributes["error.type"] = attempt.outcome
    if not last or not (attempt.outcome == "success" or exchange.first_token):
        return attributes
    classes = event.usage.classes
    attributes |= {
        names["response_model"]: event.model_resolved or "",
        names["finish_reasons"]: (event.finish_reason or "",),
        names["input_tokens"]: event.usage.input_tokens + event.usage.embedding_tokens,
        names["output_tokens"]: event.usage.output_tokens,
        names["cache_read_tokens"]: classes.cache_read,
        names["cache_write_tokens"]: classes.cache_write + classes.cache_write_1h,
        names["reasoning_tokens"]: classes.reasoning,
        names["cost"]: float(bytes(event.cost_usd.total)),
    }
    if event.ttft_ms is not None:
        attributes[names["first_chunk"]] = round((event.ttft_ms - attempt.started_ms) / 1000, 6)
    if exchange.pace is not None:
        attributes["stream.chunks"] = exchange.pace.chunks
        attributes["stream.longest_gap_ms"] = round(exchange.pace.longest_gap * 1000, 3)
    if event.status in ("client_closed", *_FAILED):
        attributes["abort_reason"] = exchange.cut or event.error_code or event.status
        attributes["error.type"] = event.error_code or event.status
    return attributes
