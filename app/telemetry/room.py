"""What is seen of a call: metrics, one access line, spans. Reads the ledger's event; the only home of opentelemetry.

Everything here happens after the answer's last frame was released.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from app.ambient import Ambient, timestamp
from app.audit import audit_line
from app.core import Exchange, LedgerEvent
from app.errors import GatewayError, VendorError
from app.telemetry.figures import Cells, Histogram, Timings
from app.telemetry.lines import Lines
from app.telemetry.traces import Spans

MAX_TENANTS = 200
"""Tenants with a label value of their own in metrics; later ones share `other`, so that the scrape stays bounded."""

_TIMINGS = {
    "request": "Whole call.",
    "provider": "The vendor's part.",
    "overhead": "The gateway's own part.",
    "ttft": "Time to a stream's first content.",
}

log = logging.getLogger("gateway")


class Telemetry:
    """Metrics, lines and spans of one replica."""

    def __init__(self, lines: Lines, spans: Spans | None, ambient: Ambient) -> None:
        self._lines = lines
        self._spans = spans
        self._ambient = ambient
        self._encode = msgspec.json.encode
        self._cells: dict[tuple[str | None, ...], Cells] = {}
        self._labelled: dict[tuple[str, str, str, str], Cells] = {}
        self._timings: dict[tuple[str, str, str], Timings] = {}
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
                histogram: Histogram = getattr(timings, part)
                family.add_metric(labels, histogram.buckets(), histogram.total)
            yield family

    def _make_cells(self, tenant: str | None, alias: str | None, provider: str | None, status: str) -> Cells:
        timed = (alias or "", provider or "", status)
        timings = self._timings.setdefault(timed, Timings())
        return self._labelled.setdefault((self._tenant(tenant), *timed), Cells(timings))

    def _tenant(self, tenant: str | None) -> str:
        if tenant is None:
            return ""
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return "other"
            self._tenants.add(tenant)
        return tenant
