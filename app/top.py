"""`gateway top`: what the replicas do just now, from their admin ports, in a terminal. Needs the extra `top` (rich)."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct, field
from prometheus_client.parser import text_string_to_metric_families

from app.ambient import Ambient
from app.terminal import Command, address, fail, interval

if TYPE_CHECKING:
    import httpx

ASK_SECONDS = 2.0
"""A replica that has not answered by then is shown as away."""
WINDOW_SECONDS = 60.0
"""p95 and rates are of so many seconds, or of what has been seen."""
MOST_ROWS = 12

Labels = frozenset[tuple[str, str]]


class Seen(Struct, frozen=True):
    """One look at one replica: the samples of its scrape, and its status. None where it did not answer."""

    at: float
    samples: Mapping[tuple[str, Labels], float] = {}
    status: Mapping[str, object] | None = None


class Row(Struct):
    """One line of a table: what it is of, and its figures."""

    name: str
    rate: float = 0.0
    share: float = 0.0
    more: str = ""


class View(Struct):
    """What is shown. Rates are per second, shares from 0 to 1."""

    replicas: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    calls: float = 0.0
    failed: float = 0.0
    refused: float = 0.0
    hits: float = 0.0
    fallbacks: float = 0.0
    p95_seconds: float | None = None
    usd_per_hour: float = 0.0
    usd_per_1000: float = 0.0
    in_flight: int = 0
    tenants: list[Row] = field(default_factory=list)
    providers: list[Row] = field(default_factory=list)
    targets: list[tuple[str, str]] = field(default_factory=list)


# --- from two looks to a view: pure -----------------------------------------------------------------------------------


def samples(text: str) -> dict[tuple[str, Labels], float]:
    """The samples of a scrape in Prometheus text."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def view(before: Mapping[str, Seen], now: Mapping[str, Seen]) -> View:
    """What happened between two looks at the same replicas, by their addresses, summed over those that answered."""
    grown: dict[tuple[str, Labels], float] = {}
    seconds = 0.0
    for url, seen in now.items():
        earlier = before.get(url)
        if seen.status is None or earlier is None or earlier.status is None:
            continue
        seconds = max(seconds, seen.at - earlier.at)
        for key, value in seen.samples.items():
            growth = value - earlier.samples.get(key, 0.0)
            grown[key] = grown.get(key, 0.0) + (growth if growth >= 0 else value)  # a replica that began anew

    def total(name: str, **labels: str | tuple[str, ...]) -> float:
        return sum(grown[key] for key in grown if key[0] == name and _has(key[1], labels))

    shown = View(replicas=[(url, _state(seen)) for url, seen in now.items()], seconds=seconds)
    statuses = [seen.status for seen in now.values() if seen.status is not None]
    shown.in_flight = sum(int(status.get("in_flight", 0)) for status in statuses)
    shown.targets = _targets(statuses)
    if not seconds:
        return shown
    calls, usd = total("gateway_requests_total"), total("gateway_cost_usd_total")
    asked = total("gateway_cache_results_total")
    shown.calls = calls / seconds
    shown.failed = _share(total("gateway_requests_total", status=("error", "timeout", "interrupted")), calls)
    shown.refused = _share(total("gateway_requests_total", status=("rate_limited",)), calls)
    shown.hits = _share(asked - total("gateway_cache_results_total", result=("miss",)), asked)
    shown.fallbacks = _share(total("gateway_fallback_total"), calls)
    shown.usd_per_hour, shown.usd_per_1000 = usd / seconds * 3600, _share(usd, calls) * 1000
    shown.p95_seconds = _quantile(0.95, _buckets(grown, "gateway_request_seconds_bucket"))
    for tenant, count in _by(grown, "gateway_requests_total", "tenant"):
        refused = total("gateway_requests_total", tenant=(tenant,), status=("rate_limited",))
        spent = total("gateway_cost_usd_total", tenant=(tenant,)) / seconds * 3600
        shown.tenants.append(Row(tenant or "-", count / seconds, _share(refused, count), f"{spent:.2f} $/h"))
    for provider, count in _by(grown, "gateway_attempts_total", "provider"):
        good = total("gateway_attempts_total", provider=(provider,), outcome=("success",))
        shown.providers.append(Row(provider, count / seconds, _share(count - good, count)))
    return shown


def _has(labels: Labels, wanted: Mapping[str, str | tuple[str, ...]]) -> bool:
    found = dict(labels)
    return all(found.get(name) in values for name, values in wanted.items())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _by(grown: Mapping[tuple[str, Labels], float], name: str, label: str) -> list[tuple[str, float]]:
    """A counter's growth by one label, the largest first; what did not grow is left out."""
    sums: dict[str, float] = {}
    for (metric, labels), value in grown.items():
        if metric == name and value:
            of = dict(labels).get(label, "")
            sums[of] = sums.get(of, 0.0) + value
    return sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_ROWS]


def _buckets(grown: Mapping[tuple[str, Labels], float], name: str) -> list[tuple[float, float]]:
    """A histogram's cumulative counts by upper bound."""
    sums: dict[float, float] = {}
    for (metric, labels), value in grown.items():
        if metric == name:
            bound = float(dict(labels)["le"])
            sums[bound] = sums.get(bound, 0.0) + value
    return sorted(sums.items())


def _quantile(share: float, buckets: list[tuple[float, float]]) -> float | None:
    """As Prometheus' histogram_quantile: straight within a bucket, the last finite bound above all."""
    if not buckets or not buckets[-1][1]:
        return None
    wanted, low, below = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            return low if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


def _state(seen: Seen) -> str:
    if seen.status is None:
        return "away"
    words = [str(seen.status.get("mode", "normal"))]
    words += ["draining"] if seen.status.get("draining") else []
    words += [f"{name} down" for name in ("redis", "postgres") if seen.status.get(name) == "down"]
    words += ["configuration refused"] if seen.status.get("config_fault") else []
    return ", ".join(words)


def _targets(statuses: Iterable[Mapping[str, object]]) -> list[tuple[str, str]]:
    """Each target's worst state over the replicas; those that rest come first."""
    worst: dict[str, str] = {}
    for status in statuses:
        for name, state in dict(status.get("targets") or {}).items():
            if worst.get(name, "ok") == "ok":
                worst[name] = str(state)
        for name in status.get("resting") or ():
            if str(name).startswith("key:"):
                worst[str(name)] = "resting"
    return sorted(worst.items(), key=lambda pair: (pair[1] == "ok", pair[0]))


# --- looking ----------------------------------------------------------------------------------------------------------


async def look(client: httpx.AsyncClient, urls: Iterable[str], ambient: Ambient) -> dict[str, Seen]:
    """One look at every replica at once; one that is away has no status."""
    import httpx

    async def at(url: str) -> Seen:
        try:
            metrics, status = await asyncio.gather(client.get(f"{url}/metrics"), client.get(f"{url}/status"))
            metrics.raise_for_status()
            status.raise_for_status()
            return Seen(ambient.monotonic(), samples(metrics.text), msgspec.json.decode(status.content))
        except (httpx.HTTPError, ValueError):
            return Seen(ambient.monotonic())

    urls = list(urls)
    return dict(zip(urls, await asyncio.gather(*map(at, urls)), strict=True))


def add(command: Command) -> None:
    top = command("top", run, "A live view of the replicas: calls, p95, 429, hits, fallbacks, spend, targets.")
    urls = os.environ.get("ADMIN_URLS", "").split()
    help = "a replica's admin port; repeatable (ADMIN_URLS)"
    top.add_argument("--admin-url", type=address, action="append", metavar="URL", default=[], help=help)
    top.add_argument("--admin-token", default=os.environ.get("GATEWAY_ADMIN_TOKEN"), help="GATEWAY_ADMIN_TOKEN")
    top.add_argument("--every", type=interval, default=2.0, metavar="SECONDS", help="how often replicas are asked (2)")
    top.add_argument("--once", action="store_true", help="show one view of --every seconds, and exit")
    top.add_argument("--json", action="store_true", help="with --once: the view as JSON")
    top.set_defaults(environ_urls=urls)


def run(arguments: argparse.Namespace) -> int:
    urls = [url.rstrip("/") for url in arguments.admin_url or arguments.environ_urls]
    if not urls or not arguments.admin_token:
        return fail("Name the replicas' admin ports (--admin-url or ADMIN_URLS) and GATEWAY_ADMIN_TOKEN.")
    import httpx

    try:
        from app import top_screen
    except ImportError:
        return fail("`gateway top` needs a terminal library: pip install llm-gateway[top]")

    async def watch() -> int:
        ambient = Ambient()
        headers = {"authorization": f"Bearer {arguments.admin_token}"}
        async with httpx.AsyncClient(headers=headers, timeout=ASK_SECONDS) as client:
            looks = [await look(client, urls, ambient)]
            if arguments.once:
                await ambient.sleep(arguments.every)
                looks.append(await look(client, urls, ambient))
                shown = view(*looks)
                if arguments.json:
                    sys.stdout.write(msgspec.json.encode(shown).decode() + "\n")
                else:
                    top_screen.show(shown)
                return 0 if any(seen.status is not None for seen in looks[-1].values()) else 1
            with top_screen.screen() as update:
                while True:
                    update(view(looks[0], looks[-1]))
                    await ambient.sleep(arguments.every)
                    looks.append(await look(client, urls, ambient))
                    while len(looks) > 2 and _at(looks[-1]) - _at(looks[1]) >= WINDOW_SECONDS:
                        looks.pop(0)

    try:
        return asyncio.run(watch())
    except KeyboardInterrupt:
        return 0


def _at(seen: Mapping[str, Seen]) -> float:
    return max(each.at for each in seen.values())
