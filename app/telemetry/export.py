"""Spans on their way to a receiver, by OpenTelemetry's own exporter, which is imported only where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Thread

from msgspec import Struct
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import INVALID_SPAN_ID, INVALID_TRACE_ID, SpanContext, TraceFlags

from app.telemetry.otlp import request, resource


class _Spans(Struct, frozen=True):
    """Of one call; what BatchSpanProcessor takes for one span."""

    data: bytes
    context: SpanContext = SpanContext(INVALID_TRACE_ID, INVALID_SPAN_ID, False, TraceFlags(TraceFlags.SAMPLED))


class _Exporter(OTLPSpanExporter):
    def __init__(self, resource: bytes) -> None:
        super().__init__()
        self._of = resource

    def export(self, spans: Sequence[_Spans]) -> SpanExportResult:
        sent = self._client.export(request(self._of, [each.data for each in spans]))
        return SpanExportResult.SUCCESS if sent.success else SpanExportResult.FAILURE


class Export:
    """Sends spans in batches, by OpenTelemetry's variables, on a thread of its own. What is too much is dropped."""

    def __init__(self, attributes: Mapping[str, object]) -> None:
        self._processor = BatchSpanProcessor(_Exporter(resource(attributes)))

    def put(self, spans: bytes) -> None:
        """Those of one call. Never waits."""
        self._processor.on_end(_Spans(spans))

    def close(self, flush_ms: int) -> None:
        """Exports what waits, for so long at most: OpenTelemetry itself waits a minute for a receiver that hangs."""
        closing = Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(flush_ms / 1000)
