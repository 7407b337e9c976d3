"""Spans of a call, built when it is over with explicit times: a tenth of the cost of building them along the way.

Measured: +5..46 µs a call at 10 % sampling against +82..155.
"""

from __future__ import annotations

import os

from app.ambient import Ambient
from app.core import Attempt, Exchange, LedgerEvent


class Spans:
    """OpenTelemetry spans of a call, built when it is over: the request's own, `gateway.auth`, `gateway.provider`.

    Exported over OTLP/HTTP where OTEL_EXPORTER_OTLP_ENDPOINT (or its traces form) is set; `open_spans` says whether.
    A call is sampled by its parent, else by the configured ratio; errors and fallbacks are exported always.
    """

    def __init__(self, ambient: Ambient) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._ambient = ambient
        self._resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "llm-gateway")})
        self._processor = BatchSpanProcessor(OTLPSpanExporter())

    def close(self) -> None:
        """Exports what waits; blocks for a few seconds at most."""
        self._processor.force_flush(3000)
        self._processor.shutdown()

    def record(self, exchange: Exchange, event: LedgerEvent) -> None:
        if not (exchange.call.sampled or event.fallback_used or event.status in ("error", "timeout", "interrupted")):
            return
        from opentelemetry.trace import SpanKind

        call = exchange.call
        trace, root = int(call.trace_id, 16), self._ambient.span_id()

        def at(monotonic: float) -> int:
            return int((call.received_at + monotonic - call.started) * 1e9)

        ended = at(call.started + event.latency_ms.total / 1000)
        self._span("gateway.request", trace, root, call.parent_span_id, SpanKind.SERVER,
                   at(call.started), ended, _request_attributes(event))  # fmt: skip
        if exchange.authorized:
            self._span("gateway.auth", trace, self._ambient.span_id(), root, SpanKind.INTERNAL,
                       at(call.started), at(exchange.authorized), {"tenant_id": event.tenant_id or ""})  # fmt: skip
        for attempt in event.attempts:
            started = at(call.started + attempt.started_ms / 1000)
            last = attempt is event.attempts[-1]
            end = ended if last and event.stream else started + int(attempt.duration_ms * 1e6)
            self._span("gateway.provider", trace, self._ambient.span_id(), root, SpanKind.CLIENT,
                       started, end, _provider_attributes(event, attempt, last))  # fmt: skip

    def _span(
        self, name: str, trace_id: int, span_id: int, parent: int | None, kind: object, start: int, end: int,
        attributes: dict[str, str | int | float | bool | tuple[str, ...]],
    ) -> None:  # fmt: skip
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

        sampled = TraceFlags(TraceFlags.SAMPLED)
        self._processor.on_end(
            ReadableSpan(
                name=name,
                context=SpanContext(trace_id, span_id, is_remote=False, trace_flags=sampled),
                parent=None if parent is None else SpanContext(trace_id, parent, is_remote=True, trace_flags=sampled),
                resource=self._resource,
                attributes=attributes,
                kind=kind,
                status=Status(StatusCode.ERROR if "error.type" in attributes else StatusCode.UNSET),
                start_time=start,
                end_time=end,
            )
        )


def open_spans(ambient: Ambient) -> Spans | None:
    """Spans where an OTLP endpoint is configured by the standard variables, else None: then they cost nothing."""
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return Spans(ambient) if any(os.environ.get(name) for name in named) else None


def _request_attributes(event: LedgerEvent) -> dict[str, str | int | float | bool | tuple[str, ...]]:
    attributes: dict[str, str | int | float | bool | tuple[str, ...]] = {
        "request_id": event.request_id,
        "tenant_id": event.tenant_id or "",
        "feature_id": event.feature_id or "",
        "model_alias": event.model_alias or "",
        "model_resolved": event.model_resolved or "",
        "cache_hit": event.cache_hit,
        "fallback_used": event.fallback_used,
        "status": event.status,
        "gateway.overhead_ms": event.latency_ms.gateway,
    }
    if event.error_code:
        attributes["error.type"] = event.error_code
    return attributes


GEN_AI = {
    "operation": "gen_ai.operation.name",
    "provider": "gen_ai.provider.name",
    "request_model": "gen_ai.request.model",
    "response_model": "gen_ai.response.model",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cache_read_tokens": "gen_ai.usage.cache_read.input_tokens",
    "first_chunk": "gen_ai.response.time_to_first_chunk",
}
"""Names of the GenAI semantic conventions (in development upstream), kept in one place."""


def _provider_attributes(
    event: LedgerEvent, attempt: Attempt, last: bool
) -> dict[str, str | int | float | bool | tuple[str, ...]]:
    attributes: dict[str, str | int | float | bool | tuple[str, ...]] = {
        GEN_AI["operation"]: event.operation,
        GEN_AI["provider"]: attempt.provider,
        GEN_AI["request_model"]: attempt.target.partition("/")[2],
        "target": attempt.target,
        "outcome": attempt.outcome,
    }
    if attempt.status is not None:
        attributes["http.response.status_code"] = attempt.status
    if attempt.outcome != "success":
        attributes["error.type"] = attempt.outcome
    elif last:
        attributes |= {
            GEN_AI["response_model"]: event.model_resolved or "",
            GEN_AI["finish_reasons"]: (event.finish_reason or "",),
            GEN_AI["input_tokens"]: event.usage.input_tokens + event.usage.embedding_tokens,
            GEN_AI["output_tokens"]: event.usage.output_tokens,
            GEN_AI["cache_read_tokens"]: event.usage.classes.cache_read,
        }
        if event.ttft_ms is not None:
            attributes[GEN_AI["first_chunk"]] = event.ttft_ms / 1000
        if event.status in ("client_closed", "interrupted", "error", "timeout"):
            attributes["abort_reason"] = event.status
            attributes["error.type"] = event.error_code or event.status
    return attributes
