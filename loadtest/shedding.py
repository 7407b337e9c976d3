"""An overload: what tenants of low priority are told, how soon, what it leaves to those of high priority, and health.

One replica on a core of its own, everything on, before the mock vendor; a plain client and a client through Traefik as
shipped. What it can do is measured first. Then tenants of high priority ask for a part of that, tenants of low priority
for more than all of it, and come back at once when they are refused; /health is asked all the time.

Exit code: 0, or 1 when a refusal took longer than it may (95th percentile), a call of high priority was refused or
failed more often than one in a hundred times, or health was not green. Through Traefik times are told and not judged
where there are two cores: Traefik, load and vendor share one. Nor are they where others ran on the replica's core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import ssl
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvloop
from msgspec import Struct

from loadtest.bench.parts import PATIENT, URGENT, Parts, Subject, usage
from loadtest.load import LoadResult, request_bytes, run_load
from loadtest.mock_vendor import AT_ONCE
from loadtest.processes import ROOT
from loadtest.services import StackError

REFUSED_MS = 50.0
"""Within which 95 of 100 refusals have to be at their client."""
QUIET = 0.8
"""Of its core a replica has, that is asked for twice what it can do, where nothing else runs. With less of it,
times are told and not judged: they are of what others did there."""
FAILED = 0.01
URGENT_SHARE, PATIENT_SHARE = 0.5, 1.5
"""Of what the replica can do: twice as much as that in all."""
CONNECTIONS = 64
"""Of each tenant."""
RAMP_SECONDS = 3.0
"""Until the shedding has found its measure; not part of the figures."""


class Seen(Struct, frozen=True):
    """What one load met. `capacity` is in calls per second."""

    way: str
    core: float
    """What the replica had of its core while it was overloaded: less than all means that others ran there."""
    capacity: float
    urgent: LoadResult
    refused: LoadResult
    health: LoadResult

    @property
    def served(self) -> int:
        """Calls of low priority that were answered."""
        return self.refused.errors.get("status 200", 0)

    def text(self) -> str:
        low, high, health = self.refused.latency, self.urgent.latency, self.health.latency
        asked = self.refused.completed + sum(self.refused.errors.values())
        busy = "" if self.core >= QUIET else ", where others ran too: times are not judged"
        return (
            f"{self.way}: {self.capacity:,.0f}/s can be served; the replica had {self.core:.0%} of its core{busy}. "
            f"Low priority: {asked / self.refused.seconds:,.0f}/s asked, {self.refused.completed / max(1, asked):.0%} "
            f"refused, after p50 {low.p50_us / 1000:.0f}, p95 {low.p95_us / 1000:.0f}, p99 {low.p99_us / 1000:.0f} ms. "
            f"High priority: {self.urgent.per_second:,.0f}/s answered, after p50 {high.p50_us / 1000:.0f}, "
            f"p95 {high.p95_us / 1000:.0f} ms, errors {self.urgent.errors or 'none'}. "
            f"Health: {self.health.completed} times green, p95 {health.p95_us / 1000:.0f} ms, "
            f"errors {self.health.errors or 'none'}."
        )

    def faults(self, timed: bool) -> list[str]:
        found = []
        others = {kind: count for kind, count in self.refused.errors.items() if kind != "status 200"}
        if others:
            found.append(f"{self.way}: calls of low priority ended in {others}")
        if self.refused.completed < 100:
            found.append(f"{self.way}: only {self.refused.completed} calls were refused, which is no overload")
        if timed and self.core >= QUIET and self.refused.latency.p95_us > REFUSED_MS * 1000:
            found.append(f"{self.way}: the 95th percentile of refusals is above {REFUSED_MS:g} ms")
        failed = sum(self.urgent.errors.values())
        if failed > FAILED * (failed + self.urgent.completed):
            found.append(f"{self.way}: of high priority {failed} calls failed")
        if self.health.errors or not self.health.completed:
            found.append(f"{self.way}: health was not green")
        return found


def body() -> bytes:
    """A stream of Messages from a vendor that speaks chat completions: of all calls the most work for a replica, and
    little for what shares the other core."""
    question = f"Where is my parcel, and when will it come? {AT_ONCE.decode()}"
    asked = {"model": "support-fast", "max_tokens": 256, "stream": True}
    return json.dumps(asked | {"messages": [{"role": "user", "content": question}]}).encode()


async def overload(
    way: str, subject: Subject, replica: Subject, seconds: float, tls: ssl.SSLContext | None = None
) -> Seen:
    url = subject.url.replace("/chat/completions", "/messages")

    def asks(tenant: str) -> bytes:
        return request_bytes(
            url, {**subject.headers, "content-type": "application/json", "x-tenant-id": tenant}, body()
        )

    await run_load(url, asks(URGENT), concurrency=8, duration_seconds=0.5, tls=tls)
    able = await run_load(url, asks(URGENT), concurrency=16, duration_seconds=2.0, tls=tls)
    capacity = able.per_second

    async def load(tenant: str, share: float, expected: int, seconds: float) -> LoadResult:
        return await run_load(
            url,
            asks(tenant),
            concurrency=CONNECTIONS,
            duration_seconds=seconds,
            expected=expected,
            interval_seconds=CONNECTIONS / (capacity * share),
            tls=tls,
        )

    health = request_bytes(url.replace("/v1/messages", "/health"), {}, b"").replace(b"POST", b"GET", 1)
    watched = asyncio.ensure_future(
        run_load(url, health, concurrency=2, duration_seconds=RAMP_SECONDS + seconds, interval_seconds=0.1, tls=tls)
    )
    used = 0.0
    for lasting in (RAMP_SECONDS, seconds):
        used = usage(replica).cpu_seconds
        urgent, refused = await asyncio.gather(
            load(URGENT, URGENT_SHARE, 200, lasting), load(PATIENT, PATIENT_SHARE, 503, lasting)
        )
    core = (usage(replica).cpu_seconds - used) / refused.seconds
    return Seen(way, core, capacity, urgent, refused, await watched)


def run(options: argparse.Namespace) -> int:
    cores = sorted(os.sched_getaffinity(0))
    others = set(cores[1:] or cores)
    os.sched_setaffinity(0, others)
    folder = Path(tempfile.mkdtemp(prefix="gateway-shedding-"))
    try:
        with Parts(folder, options.config, cores[0], others, overload=json.loads(options.overload)) as parts:
            parts.start_mock(1.0)
            parts.start_backing_services()
            gateway, _ = parts.start_gateway(1)
            seen = [uvloop.run(overload("straight", gateway, gateway, options.seconds))]
            print(seen[0].text())
            edge = parts.start_edge(gateway)
            trusted = ssl.create_default_context(cafile=str(parts.ca_file))
            seen.append(uvloop.run(overload("through Traefik", edge, gateway, options.seconds, trusted)))
            print(seen[1].text())
    except StackError as error:
        print(error, f"\nThe logs are in {folder / 'log'}.", file=sys.stderr)
        return 1
    finally:
        os.sched_setaffinity(0, set(cores))
    shutil.rmtree(folder, ignore_errors=True)
    faults = seen[0].faults(True) + seen[1].faults(len(cores) > 2)
    print("\n".join(faults or ["The least urgent were refused, in time."]))
    return 1 if faults else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.shedding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each overload (default 10)")
    parser.add_argument("--overload", default="{}", metavar="JSON", help="gateway.overload in the place of the default")
    parser.add_argument("--config", type=Path, default=ROOT / "config", metavar="DIR", help="(default ./config)")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
