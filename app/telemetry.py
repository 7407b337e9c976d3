"""What is seen of a call: metrics, one access line, spans. Reads the ledger's event; the only home of opentelemetry.

Everything here happens after the answer's last frame was released. Lines go out through a thread, so that a stalled
log consumer never stops the event loop. Spans are built afterwards with explicit times: a tenth of the cost of
building them along the way (measured: +5..46 µs a call at 10 % sampling against +82..155).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from app.ambient import Ambient, timestamp
from app.audit import audit_line
from app.core import Attempt, Exchange, LedgerEvent
from app.errors import GatewayError, VendorError

MAX_TENANTS = 200
"""Tenants with a label value of their own in metrics; later ones share `other`, so that the scrape stays bounded."""
MAX_WAITING_LINES = 20_000
LINES_SECONDS = 0.05
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)
_OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)

_TIMINGS = {
    "request": "Whole call.",
    "provider": "The vendor's part.",
    "overhead": "The gateway's own part.",
    "ttft": "Time to a stream's first content.",
}

log = logging.getLogger("gateway")


class Lines:
    """Lines to standard output by a thread of their own. When the consumer stalls, lines are dropped and counted.

    The thread looks every LINES_SECONDS instead of being woken by each line: a wake-up costs more than a line.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._waiting: list[bytes] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        if len(self._waiting) < MAX_WAITING_LINES:
            self._waiting.append(line)
        else:
            self.dropped += 1

    def close(self) -> None:
        """Waits until what was written is out, at most a second."""
        self._closed.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closed.wait(LINES_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if not lines:
            return
        try:
            sys.stdout.buffer.write(b"\n".join(lines) + b"\n")
            sys.stdout.buffer.flush()
        except (OSError, ValueError):
            self.dropped += len(lines)


class JsonLog(logging.Handler):
    """The rest of the log, in the same form and through the same thread."""

    def __init__(self, lines: Lines, ambient: Ambient) -> None:
        super().__init__()
        self._lines = lines
        self._ambient = ambient

    def emit(self, record: logging.LogRecord) -> None:
        entry = {
            "time": timestamp(self._ambient.now()),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
        }
        if record.exc_info:
            entry["traceback"] = logging.Formatter().formatException(record.exc_info)
        self._lines.write(msgspec.json.encode(entry))


class _Histogram:
    """Counts by upper bound. prometheus_client's own costs ten times as much for each observation."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the text format wants them."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


class _Timings:
    """Histograms of calls by alias, provider and status; tenants share them, or the scrape would not be bounded."""

    __slots__ = ("overhead", "provider", "request", "ttft")

    def __init__(self) -> None:
        self.request = _Histogram(_SECONDS)
        self.provider = _Histogram(_SECONDS)
        self.overhead = _Histogram(_OVERHEAD_SECONDS)
        self.ttft = _Histogram(_SECONDS)


class _Cells:
    """The figures of calls by tenant, alias, provider and status."""

    __slots__ = ("cost_usd", "input_tokens", "output_tokens", "requests", "timings")

    def __init__(self, timings: _Timings) -> None:
        self.requests = self.input_tokens = self.output_tokens = 0
        self.cost_usd = 0.0
        self.timings = timings

    def count(self, event: LedgerEvent) -> None:
        latency, usage, timings = event.latency_ms, event.usage, self.timings
        self.requests += 1
        timings.request.observe(latency.total / 1000)
        timings.overhead.observe(latency.gateway / 1000)
        if event.attempts:
            timings.provider.observe(latency.provider / 1000)
        if usage.total_tokens:
            self.input_tokens += usage.input_tokens
            self.output_tokens += usage.output_tokens
            self.cost_usd += float(bytes(event.cost_usd.total))
        if event.ttft_ms is not None:
            timings.ttft.observe(event.ttft_ms / 1000)


class Telemetry:
    """Metrics, lines and spans of one replica."""

    def __init__(self, lines: Lines, spans: Spans | None, ambient: Ambient) -> None:
        self._lines = lines
        self._spans = spans
        self._ambient = ambient
        self._encode = msgspec.json.encode
        self._cells: dict[tuple[str | None, ...], _Cells] = {}
        self._labelled: dict[tuple[str, str, str, str], _Cells] = {}
        self._timings: dict[tuple[str, str, str], _Timings] = {}
        self._tenants: set[str] = set()
        self._gauges: dict[str, Gauge] = {}
        self.registry = registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._unpriced = Counter("gateway_unpriced", "Calls at the ceiling price.", ("provider",), registry=registry)
        self._limited = Counter(
            "gateway_ratelimit_rejections", "Calls that a limit refused.", ("tenant", "limit"), registry=registry
        )
        self._fallback = Counter(
            "gateway_fallback", "Steps to the next target.", ("from", "to", "reason"), registry=registry
        )
        self._vendor_errors = Counter(
            "gateway_vendor_errors", "Failed attempts.", ("provider", "class"), registry=registry
        )
        self._misconfigured = Counter(
            "gateway_target_misconfigured",
            "A vendor refused our credential or model.",
            ("target", "rests"),
            registry=registry,
        )
        self._downgraded = Counter(
            "gateway_downgrades", "Calls served by a cheaper alias.", ("tenant", "from", "to"), registry=registry
        )
        self._config = Gauge("gateway_config_info", "The snapshot in force.", ("version",), registry=registry)
        self._config_failures = Counter(
            "gateway_config_reload_failures", "Configurations that were refused.", registry=registry
        )
        self._unidentified = Counter(
            "gateway_unidentified", "Requests without a valid credential.", ("code",), registry=registry
        )

    def gauge(self, metric: str, help: str, read: Callable[[], float], **labels: str) -> None:
        """A gauge that is read when it is scraped."""
        if metric not in self._gauges:
            self._gauges[metric] = Gauge(metric, help, tuple(labels), registry=self.registry)
        cell = self._gauges[metric].labels(**labels) if labels else self._gauges[metric]
        cell.set_function(read)

    def config_loaded(self, version: str) -> None:
        self._config.clear()
        self._config.labels(version).set(1)

    def config_refused(self) -> None:
        self._config_failures.inc()

    def scrape(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)

    def unidentified(self, error: GatewayError) -> None:
        """A request that never became a call: it has no row, so it is counted here."""
        self._unidentified.labels(error.code).inc()

    def audit(self, who: str, action: str, **what: object) -> None:
        """An administrative action, or an attempt at what only another may do: one line."""
        self._lines.write(audit_line(timestamp(self._ambient.now()), who, action, what))

    def fell_back(self, exchange: Exchange, source: str, target: str, reason: str) -> None:
        self._fallback.labels(source, target, reason).inc()
        log.warning("fallback from %s to %s (%s) request %s", source, target, reason, exchange.call.request_id)

    def vendor_error(self, provider: str, error: VendorError) -> None:
        self._vendor_errors.labels(provider, error.fault).inc()

    def misconfigured(self, what: str, target: str, error: VendorError) -> None:
        """`what` rests now: a target, or one of its provider's keys."""
        self._misconfigured.labels(target, what).inc()
        log.error(
            "%s refused our credential or model with status %s; %s rests now: check the provider's key, account, model",
            target,
            error.vendor_status,
            what,
        )

    def record(self, exchange: Exchange, event: LedgerEvent, row: bytes | None) -> None:
        """A settled call. Called once a call. `row` is the event as JSON: the access line is the row itself.

        Without a row the spool could not take it; the line is written all the same.
        """
        key = (event.tenant_id, event.model_alias if exchange.authorized else "", event.provider, event.status)
        cells = self._cells.get(key)
        if cells is None:
            cells = self._cells[key] = self._make_cells(*key)
        cells.count(event)
        if event.cost_status == "unpriced":
            self._unpriced.labels(event.provider).inc()
        if event.limit_tripped:
            self._limited.labels(self._tenant(event.tenant_id), event.limit_tripped).inc()
        if event.alias_requested:
            self._downgraded.labels(self._tenant(event.tenant_id), event.alias_requested, event.model_alias).inc()
        if row is None:
            row = self._encode(event)
        self._lines.write(b'{"time":"%b","message":"call","event":%b}' % (timestamp(self._ambient.now()).encode(), row))
        if self._spans is not None:
            self._spans.record(exchange, event)

    def collect(self) -> Iterator[Metric]:
        """For the registry: the calls' figures. An alias that is not ours was left empty, a label is never text of a
        client; tenants beyond MAX_TENANTS are summed up as `other`.
        """
        call = ("tenant", "alias", "provider", "status")
        requests = CounterMetricFamily("gateway_requests", "Calls, by outcome.", labels=call)
        tokens = CounterMetricFamily("gateway_tokens", "Tokens.", labels=(*call, "direction"))
        cost = CounterMetricFamily("gateway_cost_usd", "Cost in USD.", labels=call)
        for labels, cells in self._labelled.items():
            requests.add_metric(labels, cells.requests)
            tokens.add_metric((*labels, "input"), cells.input_tokens)
            tokens.add_metric((*labels, "output"), cells.output_tokens)
            cost.add_metric(labels, cells.cost_usd)
        yield from (requests, tokens, cost)
        for part, help in _TIMINGS.items():
            family = HistogramMetricFamily(f"gateway_{part}_seconds", help, labels=call[1:])
            for labels, timings in self._timings.items():
                histogram: _Histogram = getattr(timings, part)
                family.add_metric(labels, histogram.buckets(), histogram.total)
            yield family

    def _make_cells(self, tenant: str | None, alias: str | None, provider: str | None, status: str) -> _Cells:
        timed = (alias or "", provider or "", status)
        timings = self._timings.setdefault(timed, _Timings())
        return self._labelled.setdefault((self._tenant(tenant), *timed), _Cells(timings))

    def _tenant(self, tenant: str | None) -> str:
        if tenant is None:
            return ""
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return "other"
            self._tenants.add(tenant)
        return tenant


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
