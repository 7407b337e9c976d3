"""The figures of calls, kept as plain numbers: prometheus_client's own cost ten times as much for each observation."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from itertools import accumulate

from app.core import GAP_SECONDS, LedgerEvent, Pace

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)
_OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)


class Histogram:
    """Counts by upper bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, counts: list[int], total: float) -> None:
        """Adds what was counted elsewhere by the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the text format wants them."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


class Timings:
    """Histograms of calls by alias, provider and status; tenants share them, or the scrape would not be bounded."""

    __slots__ = ("interchunk", "overhead", "provider", "request", "ttft")

    def __init__(self) -> None:
        self.request = Histogram(_SECONDS)
        self.provider = Histogram(_SECONDS)
        self.overhead = Histogram(_OVERHEAD_SECONDS)
        self.ttft = Histogram(_SECONDS)
        self.interchunk = Histogram(GAP_SECONDS)


class Cells:
    """The figures of calls by tenant, alias, provider and status."""

    __slots__ = ("cached", "input_tokens", "nanos", "output_tokens", "requests", "saved_usd", "timings")

    def __init__(self, timings: Timings) -> None:
        self.requests = self.input_tokens = self.output_tokens = self.nanos = 0
        self.saved_usd = 0.0
        self.cached: Tally[str] = Tally()
        """Calls by what the cache said: `miss`, or the kind of hit. Those that no cache was asked for are none."""
        self.timings = timings

    def count(self, event: LedgerEvent, nanos: int, pace: Pace | None) -> None:
        """`nanos` are what the event's cost is in nano-dollars; `pace` is the stream's, where the answer was one."""
        latency, usage, timings = event.latency_ms, event.usage, self.timings
        self.requests += 1
        timings.request.observe(latency.total / 1000)
        timings.overhead.observe(latency.gateway / 1000)
        if event.attempts:
            timings.provider.observe(latency.provider / 1000)
        if usage.total_tokens:
            self.input_tokens += usage.input_tokens
            self.output_tokens += usage.output_tokens
            self.nanos += nanos
        if event.ttft_ms is not None:
            timings.ttft.observe(event.ttft_ms / 1000)
        if event.cache_hit:
            self.cached[event.cache_kind or "exact"] += 1
            self.saved_usd += float(bytes(event.saved_usd))
        elif latency.cache_lookup:
            self.cached["miss"] += 1
        if pace is not None:
            timings.interchunk.merge(pace.gaps, pace.gaps_seconds)
