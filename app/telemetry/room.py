"""What is seen of a call: metrics, one access line, spans. Reads the ledger's event; the only home of opentelemetry.

Everything here happens after the answer's last frame was released.
"""

from __future__ import annotations

import logging
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from app.ambient import Ambient, timestamp
from app.audit import audit_line
from app.config import Config
from app.core import GATEWAY_TENANT, Exchange, LedgerEvent
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
    "interchunk": "From one chunk of a stream to the next.",
}
_LATE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

States = Callable[[], Iterable[tuple[tuple[str, ...], float]]]
"""Reads a family of gauges: pairs of label values and figure."""

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
        self._states: list[tuple[str, str, tuple[str, ...], States]] = []
        self._attempts: Tally[tuple[str, str, str]] = Tally()
        self._retries: Tally[tuple[str, str]] = Tally()
        self._late = Histogram(_LATE_SECONDS)
        self.registry = registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        self._unpriced = Counter("gateway_unpriced", "Calls at the ceiling price.", ("provider",), registry=registry)
        self._limited = Counter(
            "gateway_ratelimit_rejections", "Calls that a limit refused.", ("tenant", "limit"), registry=registry
        )
        self._fallback = Counter(
            "gateway_fallback", "Steps to the next target.", ("from", "to", "reason"), registry=registry
        )
        self._escalations = Counter(
            "gateway_escalations", "Answers not taken.", ("from", "to", "reason"), registry=registry
        )
        self._hedges = Counter("gateway_hedges", "Second targets asked.", ("from", "to"), registry=registry)
        self._shadows = Counter(
            "gateway_shadows", "Copies of calls.", ("alias", "target", "outcome"), registry=registry
        )
        self._breakers = Counter(
            "gateway_breaker_opened", "Rests after too many failures.", ("target",), registry=registry
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
        self._guarded = Counter(
            "gateway_guardrail_checks", "What guardrails said.", ("guardrail", "stage", "outcome"), registry=registry
        )
        self._config = Gauge("gateway_config_info", "The snapshot in force.", ("version",), registry=registry)
        self._config_loaded = Gauge(
            "gateway_config_loaded_timestamp_seconds", "When it took effect, unix seconds.", registry=registry
        )
        self._config_refused = Gauge(
            "gateway_config_refused", "1 while the files on disk are not what is served.", registry=registry
        )
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

    def states(self, metric: str, help: str, labels: tuple[str, ...], read: States) -> None:
        """Figures whose labels are known only when they are scraped: counters where the name ends in `_total`."""
        self._states.append((metric, help, labels, read))

    def config_loaded(self, config: Config) -> None:
        """A snapshot took effect. What an alert counts from begins at 0: a counter's first step is seen as none."""
        self._config.clear()
        self._config.labels(config.version).set(1)
        self._config_loaded.set(self._ambient.now())
        self._config_refused.set(0)
        for target in config.targets.values():
            self._unpriced.labels(target.provider.name)
            self._misconfigured.labels(target.name, f"target:{target.name}")
            for key in target.provider.keys:
                self._misconfigured.labels(target.name, f"key:{key.name}")
                self._misconfigured.labels(target.name, f"key:{key.name}:{target.name}")

    def config_refused(self) -> None:
        self._config_refused.set(1)
        self._config_failures.inc()

    def config_restored(self) -> None:
        """The files are again what is served."""
        self._config_refused.set(0)

    def woke(self, late_seconds: float, tick_seconds: float) -> None:
        """The event loop came back so late from a sleep of a tick. The ticks that it slept through were late too: one
        long step counts as often as calls would have met it ("coordinated omission", Gil Tene).
        """
        self._late.observe(late_seconds)
        while (late_seconds := late_seconds - tick_seconds) > 0:
            self._late.observe(late_seconds)

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
        log.warning("fallback from %s to %s (%s)", source, target, reason, extra=exchange.call.named)

    def escalated(self, exchange: Exchange, source: str, target: str, reason: str) -> None:
        """An answer is not taken, and another target is asked for a better one."""
        self._escalations.labels(source, target, reason).inc()

    def hedged(self, exchange: Exchange, source: str, target: str) -> None:
        """A second target is asked beside a first that says nothing."""
        self._hedges.labels(source, target).inc()

    def shadowed(self, alias: str, target: str, outcome: str) -> None:
        """A copy of a call was sent, or dropped because too many are under way."""
        self._shadows.labels(alias, target, outcome).inc()

    def broke_off(self, exchange: Exchange, target: str, error: VendorError) -> None:
        """A target failed too often, and rests now."""
        self._breakers.labels(target).inc()
        log.error(
            "%s has failed too often, the last time by %s; it rests now on every replica",
            target,
            error.fault,
            extra=exchange.call.named,
        )

    def vendor_error(self, provider: str, error: VendorError) -> None:
        self._vendor_errors.labels(provider, error.fault).inc()

    def vendor_errors(self) -> dict[str, dict[str, int]]:
        """Failed attempts since the start, by provider and class."""
        found: dict[str, dict[str, int]] = {}
        for sample in next(iter(self._vendor_errors.collect())).samples:
            if sample.name.endswith("_total"):
                found.setdefault(sample.labels["provider"], {})[sample.labels["class"]] = int(sample.value)
        return found

    def guarded(self, guardrail: str, stage: str, outcome: str) -> None:
        self._guarded.labels(guardrail, stage, outcome).inc()

    def misconfigured(self, exchange: Exchange, what: str, target: str, error: VendorError) -> None:
        """`what` rests now: a target, or one of its provider's keys."""
        self._misconfigured.labels(target, what).inc()
        log.error(
            "%s refused our credential or model with status %s; %s rests now: check the provider's key, account, model",
            target,
            error.vendor_status,
            what,
            extra=exchange.call.named,
        )

    def record(self, exchange: Exchange, event: LedgerEvent, row: bytes | None) -> None:
        """A settled call. Called once a call. `row` is the event as JSON: the access line is the row itself.

        Without a row the spool could not take it; the line is written all the same.
        """
        status = event.status if event.purpose == "client" else event.purpose
        key = (event.tenant_id, event.model_alias if exchange.authorized else "", event.provider, status)
        cells = self._cells.get(key)
        if cells is None:
            cells = self._cells[key] = self._make_cells(*key)
        cells.count(event, exchange.charged.total_nanos, exchange.pace)
        for attempt in event.attempts:
            self._attempts[attempt.provider, attempt.target, attempt.outcome] += 1
        if len(event.attempts) > 1:
            for before, attempt in pairwise(event.attempts):
                if attempt.target == before.target:
                    self._retries[attempt.provider, attempt.target] += 1
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
        saved = CounterMetricFamily("gateway_saved_usd", "What cache hits saved, in USD.", labels=call[:2])
        cached = CounterMetricFamily(
            "gateway_cache_results", "Calls by what the cache said.", labels=(*call[:2], "result")
        )
        savings: Tally[tuple[str, ...]] = Tally()
        results: Tally[tuple[str, ...]] = Tally()
        for labels, cells in self._labelled.items():
            requests.add_metric(labels, cells.requests)
            tokens.add_metric((*labels, "input"), cells.input_tokens)
            tokens.add_metric((*labels, "output"), cells.output_tokens)
            cost.add_metric(labels, cells.nanos / 1e9)
            savings[labels[:2]] += cells.saved_usd
            for result, count in cells.cached.items():
                results[*labels[:2], result] += count
        for labels, usd in savings.items():
            saved.add_metric(labels, usd)
        for labels, count in results.items():
            cached.add_metric(labels, count)
        yield from (requests, tokens, cost, saved, cached)
        for part, help in _TIMINGS.items():
            family = HistogramMetricFamily(f"gateway_{part}_seconds", help, labels=call[1:])
            for labels, timings in self._timings.items():
                histogram: Histogram = getattr(timings, part)
                family.add_metric(labels, histogram.buckets(), histogram.total)
            yield family
        attempts = CounterMetricFamily(
            "gateway_attempts", "Requests to vendors, by what became of them.", labels=("provider", "target", "outcome")
        )
        for labels, count in self._attempts.items():
            attempts.add_metric(labels, count)
        retries = CounterMetricFamily("gateway_retries", "Attempts at a target anew.", labels=("provider", "target"))
        for labels, count in self._retries.items():
            retries.add_metric(labels, count)
        late = HistogramMetricFamily("gateway_event_loop_delay_seconds", "How late the event loop wakes.")
        if any(self._late.counts):  # in a process that looks
            late.add_metric((), self._late.buckets(), self._late.total)
        yield from (attempts, retries, late)
        for metric, help, names, read in self._states:
            kind = CounterMetricFamily if metric.endswith("_total") else GaugeMetricFamily
            family = kind(metric, help, labels=names)
            for labels, value in read():
                family.add_metric(labels, value)
            yield family

    def _make_cells(self, tenant: str | None, alias: str | None, provider: str | None, status: str) -> Cells:
        timed = (alias or "", provider or "", status)
        if tenant == GATEWAY_TENANT:  # what no client waits for is no latency of the alias
            return self._labelled.setdefault((tenant, *timed), Cells(Timings()))
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
