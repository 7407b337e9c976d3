"""What a size of traffic needs: constants measured here, a model of them, and the model held against two sizes.

    python -m loadtest.capacity                      measures, holds the model against two rates, prints the tables
    python -m loadtest.capacity --page runbooks/capacity.md     works the page's tables out anew from its own constants

The replica has one core, with its shipper; Redis, PostgreSQL, the mock vendor and the load share the others. On a
shared machine the constants are worth what the machine is: take your own.

Exit code: 0, or 1 when something could not be started, or the model misses a measurement by more than half of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import uvloop
from msgspec import Struct
from redis import Redis

from loadtest.bench.parts import Parts, Subject, usage
from loadtest.load import request_bytes, run_load
from loadtest.mock_vendor import STREAM_CHUNKS
from loadtest.processes import ROOT
from loadtest.services import StackError

DAY_SECONDS = 86_400
BUSY = 0.6
"""Of a core, at most: above it waits grow faster than the load, and one replica in three may be lost."""
CHUNK_INTERVAL_MS = 100.0
SYNC_SECONDS = 0.01
"""How often the spool is synced at most (`gateway.spool.fsync_ms`): calls in between share what a wake costs."""
FITTED = (30, 600)
"""Calls a second that constants are taken at, beside none at all."""
CHECKED = (150, 0)
"""Calls a second that the model is held against: between those, and beyond them, as many as are answered (0)."""
STREAMING = (64, 256)
"""Streams at once, for what grows with their chunks."""
SECONDS = 7.0
STREAMS = 400
MISSES_BY = 0.35
SHIPPED_SECONDS = 120


class Constants(Struct, frozen=True):
    """What one call costs. `_us` is CPU time of one core; a call's are without its chunks; bytes are of a 1 KB call.

    A wake is what calls that come together share: a sync of the spool, a turn of the event loop, a round trip. What
    stands is of each second in which there are calls at all: looks at Redis, the shipper's rounds.
    """

    standing_us: float
    wake_us: float
    call_us: float
    chunk_us: float
    ship_us: float
    redis_scripts: float
    redis_standing_us: float
    redis_wake_us: float
    redis_us: float
    postgres_standing_us: float
    postgres_us: float
    row_bytes: float
    wal_bytes: float
    replica_bytes: float
    stream_bytes: float


MEANS = {
    "standing_us": "the replica's core with its shipper, a second",
    "wake_us": "the replica's core, a wake",
    "call_us": "the replica's core, a call",
    "chunk_us": "the replica's core, a chunk of a stream",
    "ship_us": "the shipper, a row",
    "redis_scripts": "scripts in Redis, a call",
    "redis_standing_us": "Redis's core, a second",
    "redis_wake_us": "Redis's core, a replica's wake",
    "redis_us": "Redis's core, a call",
    "postgres_standing_us": "PostgreSQL, a second of each replica",
    "postgres_us": "PostgreSQL, a row",
    "row_bytes": "the ledger with its indexes, a row",
    "wal_bytes": "PostgreSQL's log, a row",
    "replica_bytes": "a replica and its shipper without calls",
    "stream_bytes": "an open stream",
}


class Traffic(Struct, frozen=True):
    """Calls a second at the peak; the share of them that is streamed, and how long and in how many chunks. `average`:
    a day's calls a second over the peak's.
    """

    calls: float
    streamed: float = 0.7
    chunks: int = 200
    stream_seconds: float = 10.0
    average: float = 0.4


class Need(Struct, frozen=True):
    """What a traffic needs. Cores are those of work alone; replicas and nodes have room (BUSY)."""

    replica_cores: float
    replicas: int
    open_streams: float
    stream_memory_bytes: float
    redis_scripts: float
    redis_cores: float
    redis_masters: int
    rows_a_day: float
    row_bytes_a_day: float
    wal_bytes: float
    postgres_cores: float


def wakes(calls: float) -> float:
    """How often a replica wakes in a second of so many calls: alone for each while they are few."""
    return calls / (1 + calls * SYNC_SECONDS)


def busy(constants: Constants, traffic: Traffic, replicas: int) -> float:
    """What of its core each of so many replicas needs, with its shipper."""
    calls = traffic.calls / replicas
    chunks = calls * traffic.streamed * traffic.chunks
    work = calls * (constants.call_us + constants.ship_us) + chunks * constants.chunk_us
    return (constants.standing_us + wakes(calls) * constants.wake_us + work) / 1e6


def need(constants: Constants, traffic: Traffic, replicas: int = 0, masters: int = 0) -> Need:
    """`replicas` and `masters` where they are given, else as many as keep each of them below BUSY; two replicas at
    least, so that one may go.
    """
    if not replicas:
        enough = 2
        while busy(constants, traffic, enough) > BUSY:
            enough *= 2
        some = range(2, enough + 1)
        replicas = some[bisect_left(some, True, key=lambda count: busy(constants, traffic, count) <= BUSY)]
    woken = replicas * wakes(traffic.calls / replicas)
    redis_work = (traffic.calls * constants.redis_us + woken * constants.redis_wake_us) / 1e6
    redis_standing = constants.redis_standing_us / 1e6
    masters = masters or math.ceil(redis_work / (BUSY - redis_standing))
    open_streams = traffic.calls * traffic.streamed * traffic.stream_seconds
    rows_a_day = traffic.calls * traffic.average * DAY_SECONDS
    return Need(
        replica_cores=replicas * busy(constants, traffic, replicas),
        replicas=replicas,
        open_streams=open_streams,
        stream_memory_bytes=open_streams * constants.stream_bytes,
        redis_scripts=traffic.calls * constants.redis_scripts,
        redis_cores=redis_work + masters * redis_standing,
        redis_masters=masters,
        rows_a_day=rows_a_day,
        row_bytes_a_day=rows_a_day * constants.row_bytes,
        wal_bytes=traffic.calls * constants.wal_bytes,
        postgres_cores=(traffic.calls * constants.postgres_us + replicas * constants.postgres_standing_us) / 1e6,
    )


WORKED = (Traffic(100), Traffic(1_000), Traffic(10_000), Traffic(100_000))


# --- tables -----------------------------------------------------------------------------------------------------------


def figure(value: float) -> str:
    """Two digits that count, with a unit of a thousand each."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{float(f'{value / size:.2g}'):g}{unit}"
    return f"{float(f'{value:.2g}'):g}"


def constants_table(constants: Constants) -> str:
    lines = ["| constant | value | of what |", "|---|---|---|"]
    for name, value in msgspec.structs.asdict(constants).items():
        lines.append(f"| `{name}` | {float(f'{value:.3g}'):.10g} | {MEANS[name]} |")
    return "\n".join(lines)


def constants_of(page: str) -> Constants:
    """Those in a page's table. Raises ValueError where one is missing."""
    found = {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE)}
    try:
        return Constants(**{name: found[name] for name in Constants.__struct_fields__})
    except KeyError as missing:
        raise ValueError(f"the page's table has no {missing}") from None


def worked_table(constants: Constants, sizes: Sequence[Traffic] = WORKED) -> str:
    needs = [need(constants, traffic) for traffic in sizes]
    rows: Mapping[str, Sequence[str]] = {
        "replicas, one core each": [f"{each.replicas}" for each in needs],
        "of their cores busy": [figure(each.replica_cores) for each in needs],
        "open streams": [figure(each.open_streams) for each in needs],
        "their memory, all replicas": [figure(each.stream_memory_bytes) + "B" for each in needs],
        "scripts in Redis a second": [figure(each.redis_scripts) for each in needs],
        "Redis masters": [f"{each.redis_masters}" for each in needs],
        "ledger rows a day": [figure(each.rows_a_day) for each in needs],
        "ledger bytes a day": [figure(each.row_bytes_a_day) + "B" for each in needs],
        "PostgreSQL's log a second": [figure(each.wal_bytes) + "B" for each in needs],
        "PostgreSQL's cores": [figure(each.postgres_cores) for each in needs],
    }
    head = ["calls a second", *(figure(traffic.calls) for traffic in sizes)]
    lines = [head, *([name, *values] for name, values in rows.items())]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([drawn[0], "|---" * len(head) + "|", *drawn[1:]])


# --- measuring --------------------------------------------------------------------------------------------------------


class Spent(Struct, frozen=True):
    """What had been spent at a moment, in seconds of CPU and in counts."""

    replica: float
    shipper: float
    redis: float
    postgres: float
    scripts: float
    wal_bytes: float
    rows: int
    seconds: float

    def since(self, before: Spent) -> Spent:
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(before), strict=True)
        return Spent(*(now - then for now, then in pairs))


class Meter:
    def __init__(self, parts: Parts, gateway: Subject) -> None:
        self._parts = parts
        self._gateway = gateway
        self._redis = Redis.from_url(parts.redis_url)
        self._postgres = Subject("postgres", "", {}, parts.pid("postgres"))
        self._expected = 0

    def close(self) -> None:
        self._redis.close()

    def spent(self) -> Spent:
        """When the ledger has every row of the calls so far."""
        rows = self._parts.ledger_rows(self._expected, SHIPPED_SECONDS)
        time.sleep(0.5)
        mine, told = usage(self._gateway), self._redis.info("all")
        with psycopg.connect(self._parts.postgres_url, autocommit=True) as connection:
            wal = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        return Spent(
            replica=mine.cpu_seconds,
            shipper=mine.children_cpu_seconds,
            redis=told["used_cpu_user"] + told["used_cpu_sys"],
            postgres=usage(self._postgres).cpu_seconds,
            scripts=told.get("cmdstat_evalsha", {}).get("calls", 0),
            wal_bytes=float(wal[0]),
            rows=rows,
            seconds=time.monotonic(),
        )

    def row_bytes(self) -> float:
        query = (
            "SELECT (SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('ledger'))"
            " / (SELECT count(*) FROM ledger)"
        )
        with psycopg.connect(self._parts.postgres_url, autocommit=True) as connection:
            return float(connection.execute(query).fetchone()[0])

    def idle(self, seconds: float) -> Spent:
        """What is spent without calls."""
        before = self.spent()
        time.sleep(seconds)
        return self.spent().since(before)

    def load(self, stream: bool, connections: int, seconds: float, per_second: float = 0.0) -> tuple[Spent, int]:
        """What so many calls spent, and how many they were. `per_second` 0: as fast as they are answered."""
        before = self.spent()
        asked = request_bytes(self._gateway.url, self._headers(), _body(stream))
        interval = connections / per_second if per_second else 0.0
        result = uvloop.run(
            run_load(
                self._gateway.url, asked, concurrency=connections, duration_seconds=seconds, interval_seconds=interval
            )
        )
        if result.errors:
            raise StackError(f"Calls failed under the load: {result.errors}")
        calls = result.completed + result.late
        self._expected += calls
        return self.spent().since(before), calls

    def open_streams(self, count: int) -> float:
        """Bytes that each of so many open streams takes."""
        before = usage(self._gateway)
        asked = request_bytes(self._gateway.url, self._headers(), _body(True))
        seen = 0

        async def hold() -> int:
            load = asyncio.ensure_future(
                run_load(self._gateway.url, asked, concurrency=count, count=count, duration_seconds=60)
            )
            await asyncio.sleep(STREAM_CHUNKS * CHUNK_INTERVAL_MS / 1000 * 0.7)
            during = usage(self._gateway)
            result = await load
            nonlocal seen
            seen = result.completed + result.late
            return during.memory_bytes - before.memory_bytes

        grown = uvloop.run(hold())
        self._expected += seen
        return max(0.0, grown / count)

    def _headers(self) -> dict[str, str]:
        return {"content-type": "application/json", **self._gateway.headers}


def _body(stream: bool) -> bytes:
    body: dict[str, Any] = {"model": "support-fast", "messages": [{"role": "user", "content": "?" * 900}]}
    return json.dumps(body | ({"stream": True} if stream else {})).encode()


def fitted(of: Sequence[tuple[float, float]], idle: float) -> tuple[float, float]:
    """What a wake and what a call costs, from two pairs of calls a second and CPU a second, beside what is `idle`."""
    (few, low), (many, high) = of
    determinant = wakes(few) * many - wakes(many) * few
    wake = ((low - idle) * many - (high - idle) * few) / determinant
    call = (wakes(few) * (high - idle) - wakes(many) * (low - idle)) / determinant
    return max(0.0, wake), max(0.0, call)


def measured(meter: Meter, idle_bytes: int) -> Constants:
    meter.load(False, 16, 1.0)  # warm
    stream_bytes = meter.open_streams(STREAMS)  # first: later ones live in what these have left
    idle = meter.idle(SECONDS)
    loads = [meter.load(False, 32, SECONDS, rate) for rate in FITTED]
    high, many = loads[-1]

    def each_second(name: str) -> list[tuple[float, float]]:
        """Calls and CPU microseconds, without those of the idle time in which rows were waited for."""
        still = getattr(idle, name) / idle.seconds
        return [
            (calls / SECONDS, (getattr(spent, name) - still * (spent.seconds - SECONDS)) / SECONDS * 1e6)
            for spent, calls in loads
        ]

    def a_line(name: str) -> tuple[float, float]:
        """What stands while there are calls, and what a call adds: for those that work in rounds."""
        (thin, less), (thick, more) = each_second(name)
        slope = max(0.0, (more - less) / (thick - thin))
        return max(0.0, less - thin * slope), slope

    replica_idle, redis_idle = (getattr(idle, name) / idle.seconds * 1e6 for name in ("replica", "redis"))
    wake_us, call_us = fitted(each_second("replica"), replica_idle)
    redis_wake_us, redis_us = fitted(each_second("redis"), redis_idle)
    shipper_us, ship_us = a_line("shipper")
    postgres_standing_us, postgres_us = a_line("postgres")

    (thin, thin_streams), (thick, thick_streams) = (meter.load(True, count, SECONDS) for count in STREAMING)
    streams = thick_streams - thin_streams
    woken = (wakes(thick_streams / SECONDS) - wakes(thin_streams / SECONDS)) * SECONDS
    a_stream = ((thick.replica - thin.replica) * 1e6 - woken * wake_us) / streams
    return Constants(
        standing_us=replica_idle + shipper_us,
        wake_us=wake_us,
        call_us=call_us,
        chunk_us=max(0.0, (a_stream - call_us) / STREAM_CHUNKS),
        ship_us=ship_us,
        redis_scripts=high.scripts / many,
        redis_standing_us=redis_idle,
        redis_wake_us=redis_wake_us,
        redis_us=redis_us,
        postgres_standing_us=postgres_standing_us,
        postgres_us=postgres_us,
        row_bytes=meter.row_bytes(),
        wal_bytes=high.wal_bytes / high.rows,
        replica_bytes=float(idle_bytes),
        stream_bytes=stream_bytes,
    )


class Checked(Struct, frozen=True):
    """A rate that was measured: cores of the replica and of Redis, log bytes a second, as predicted and as found."""

    calls: float
    predicted: tuple[float, float, float]
    found: tuple[float, float, float]

    @property
    def misses_by(self) -> float:
        pairs = zip(self.predicted, self.found, strict=True)
        return max(abs(told - seen) / max(told, seen) for told, seen in pairs)


def checked(meter: Meter, constants: Constants, rate: float) -> Checked:
    spent, calls = meter.load(False, 64, SECONDS, rate)
    traffic = Traffic(calls / SECONDS, streamed=0.0)
    told = need(constants, traffic, replicas=1, masters=1)
    found = (spent.replica + spent.shipper, spent.redis, spent.wal_bytes)
    return Checked(
        traffic.calls,
        (told.replica_cores, told.redis_cores, told.wal_bytes),
        tuple(value / SECONDS for value in found),  # type: ignore[arg-type]
    )


def checked_table(rows: Sequence[Checked]) -> str:
    lines = ["| calls a second | replica, cores | Redis, cores | PostgreSQL's log a second |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"{told:.2g} / {seen:.2g}" for told, seen in zip(row.predicted[:2], row.found[:2], strict=True)]
        cells.append(f"{figure(row.predicted[2])}B / {figure(row.found[2])}B")
        lines.append(f"| {row.calls:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run() -> int:
    cores = sorted(os.sched_getaffinity(0))
    subject, others = cores[0], set(cores[1:] or cores)
    os.sched_setaffinity(0, others)
    folder = Path(tempfile.mkdtemp(prefix="gateway-capacity-"))
    try:
        with Parts(folder, ROOT / "config", subject, others) as parts:
            parts.start_mock(CHUNK_INTERVAL_MS)
            parts.start_backing_services()
            gateway, _ = parts.start_gateway(1)
            time.sleep(2.0)
            idle = usage(gateway)
            meter = Meter(parts, gateway)
            try:
                constants = measured(meter, idle.memory_bytes + idle.children_memory_bytes)
                rows = [checked(meter, constants, rate) for rate in CHECKED]
            finally:
                meter.close()
    except StackError as error:
        print(error, f"\nThe logs are in {folder / 'log'}.", file=sys.stderr)
        return 1
    finally:
        os.sched_setaffinity(0, set(cores))
    shutil.rmtree(folder, ignore_errors=True)
    print(constants_table(constants), checked_table(rows), worked_table(constants), sep="\n\n")
    missed = [row for row in rows if row.misses_by > MISSES_BY]
    for row in missed:
        print(f"At {row.calls:.0f} calls a second the model misses by {row.misses_by:.0%}.", file=sys.stderr)
    return 1 if missed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.capacity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, metavar="PATH", help="work out the tables of this page's constants")
    options = parser.parse_args(arguments)
    if options.page:
        print(worked_table(constants_of(options.page.read_text())))
        return 0
    return run()


if __name__ == "__main__":
    sys.exit(main())
