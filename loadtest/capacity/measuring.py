"""Takes the constants of the model, and what it is held against, from a replica with everything on."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import uvloop
from msgspec import Struct
from redis import Redis

from loadtest.bench.parts import TENANT, Parts, Subject, usage
from loadtest.capacity.model import Checked, Constants, Traffic, busy, fitted, need, redis_busy, wakes
from loadtest.capacity.replay import Replay, scripts_of
from loadtest.load import request_bytes, run_load
from loadtest.mock_vendor import STREAM_CHUNKS
from loadtest.services import StackError

CHUNK_INTERVAL_MS = 50.0
FITTED = (150, 1_200)
"""Calls a second that a replica's constants are taken at, beside none at all."""
CHECKED = (500, 2_000)
"""Calls a second that the model is held against: between those, and beyond them, at half a core or more."""
STREAMING = (100, 600)
"""Streams at once that the cost of their chunks is taken at."""
STREAMS_CHECKED = 300
"""Streams at once that the model is held against."""
STREAMS = 400
"""Streams at once, for their memory."""
REDIS_FITTED = (300, 5_000)
REDIS_CHECKED = (1_500, 9_000)
"""Of calls a second from many connections, the same: Redis's 60 % is far beyond what one replica asks."""
CONNECTIONS = 64
REACHED = 0.75
"""Of a size, at least."""
SECONDS = 4.0
SHIPPED_SECONDS = 120
STREAM_SECONDS = STREAM_CHUNKS * CHUNK_INTERVAL_MS / 1000
TWO_STREAMS_SECONDS = STREAM_SECONDS * 1.5
"""When each connection is in its second stream, and begins no third."""
BOTH_SECONDS = STREAM_SECONDS * 2


class Spent(Struct, frozen=True):
    """What had been spent at a moment, in seconds of CPU, in bytes and in counts. The replica's loop `ran` and
    `waited` for its core so many seconds; both 0 where the kernel does not say.
    """

    calls: float
    replica: float
    shipper: float
    redis: float
    postgres: float
    scripts: float
    wal_bytes: float
    rows: float
    ran: float
    waited: float
    seconds: float

    def since(self, before: Spent) -> Spent:
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(before), strict=True)
        return Spent(*(now - then for now, then in pairs))

    @property
    def waits(self) -> float:
        """Seconds for each that it ran."""
        return self.waited / (self.ran or 1.0)


class Asked(Struct, frozen=True):
    """Redis alone: calls a second as they were, what of its core it took for them, and how long it waited for that."""

    calls: float
    core: float
    waited: float


class Taken(Struct, frozen=True):
    """All that was measured: of each size the reading that had to wait the least for its core, as what others take of a
    core changes what is left of it.
    """

    idle: Spent
    loads: dict[int, Spent]
    streams: dict[int, Spent]
    redis: dict[int, Asked]
    spool_bytes: float
    row_bytes: float
    replica_bytes: float
    stream_bytes: float
    counters_bytes: float

    @property
    def unreached(self) -> list[str]:
        """Sizes that were not come to. Answers were waited for there: what they cost says nothing of that size."""
        loads = [(rate, load.calls / SECONDS, "") for rate, load in self.loads.items()]
        alone = [(rate, asked.calls, " of Redis alone") for rate, asked in self.redis.items()]
        return [
            f"{calls:,.0f} calls/s{what} and not {rate:,}"
            for rate, calls, what in loads + alone
            if calls < rate * REACHED
        ]

    @property
    def waited(self) -> float:
        """How long the replica waited for its core for each second that it ran."""
        loads = list(self.loads.values())
        return sum(load.waited for load in loads) / (sum(load.ran for load in loads) or 1.0)


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
        ran, waited = scheduled(self._gateway.pid)
        return Spent(
            calls=self._expected,
            replica=mine.cpu_seconds,
            shipper=mine.children_cpu_seconds,
            redis=told["used_cpu_user"] + told["used_cpu_sys"],
            postgres=usage(self._postgres).cpu_seconds,
            scripts=told.get("cmdstat_evalsha", {}).get("calls", 0),
            wal_bytes=self._asked("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"),
            rows=rows,
            ran=ran,
            waited=waited,
            seconds=time.monotonic(),
        )

    def row_bytes(self) -> float:
        return self._asked(
            "SELECT (SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('ledger'))"
            " / (SELECT count(*) FROM ledger)"
        )

    def _asked(self, query: str) -> float:
        with psycopg.connect(self._parts.postgres_url, autocommit=True) as connection:
            return float(connection.execute(query).fetchone()[0])

    def counters_bytes(self) -> float:
        """Of the one tenant that calls, without those of single calls, which go with them."""
        keys = self._redis.scan_iter(f"rl:{{{TENANT}}}:*", 1000)
        return float(sum(self._redis.memory_usage(key) or 0 for key in keys if b":call:" not in key))

    def scripts(self) -> list[bytes]:
        """What a call asks of Redis."""
        before = self._redis.config_get("slowlog-log-slower-than")
        self._redis.config_set("slowlog-log-slower-than", 0)
        self._run(False, 1, count=1)
        time.sleep(1.0)  # its limits are settled after its answer
        scripts = scripts_of(self._redis)
        self._redis.config_set("slowlog-log-slower-than", before["slowlog-log-slower-than"])
        return scripts

    def idle(self) -> Spent:
        """What is spent without calls."""
        before = self.spent()
        time.sleep(SECONDS)
        return self.spent().since(before)

    def load(self, stream: bool, connections: int, seconds: float, per_second: float = 0.0) -> Spent:
        """What so many calls a second spent; 0: as many as are answered."""
        before = self.spent()
        interval = connections / per_second if per_second else 0.0
        self._run(stream, connections, interval_seconds=interval, duration_seconds=seconds)
        return self.spent().since(before)

    def open_streams(self, count: int) -> float:
        """Bytes that each of so many open streams takes."""
        before, with_them = usage(self._gateway).memory_bytes, 0

        async def look() -> None:
            nonlocal with_them
            await asyncio.sleep(STREAM_SECONDS * 0.7)
            with_them = usage(self._gateway).memory_bytes

        self._run(True, count, look(), count=count)
        return max(0.0, (with_them - before) / count)

    def _run(self, stream: bool, connections: int, *beside: Any, **how: Any) -> None:
        body: dict[str, Any] = {"model": "support-fast", "messages": [{"role": "user", "content": "?" * 900}]}
        asked = request_bytes(
            self._gateway.url,
            {"content-type": "application/json", **self._gateway.headers},
            json.dumps(body | ({"stream": True} if stream else {})).encode(),
        )

        async def main() -> Any:
            load = run_load(self._gateway.url, asked, concurrency=connections, **how)
            return (await asyncio.gather(load, *beside))[0]

        result = uvloop.run(main())
        if result.errors:
            raise StackError(f"Calls failed under the load: {result.errors}")
        self._expected += result.completed + result.late


def scheduled(pid: int) -> tuple[float, float]:
    """Seconds that a process's first thread has run, and has waited for a core."""
    try:
        ran, waited, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(ran) / 1e9, int(waited) / 1e9


def taken(meter: Meter, parts: Parts, gateway: Subject, spool: Path, rounds: int, show: Callable[[str], None]) -> Taken:
    """Measures each size once in each of so many rounds, so that what the machine does besides meets all of them."""
    show("an idle replica")
    time.sleep(2.0)
    still = usage(gateway)
    warm = meter.load(False, 16, 1.0)
    spool_bytes = sum(file.stat().st_size for file in spool.rglob("*") if file.is_file()) / warm.calls
    show(f"{STREAMS} streams")
    stream_bytes = meter.open_streams(STREAMS)  # first: later ones live in what these have left
    replay = Replay(parts.redis_url, parts.pid("redis"), meter.scripts(), os.sched_getaffinity(gateway.pid))
    idle: list[Spent] = []
    loads: dict[int, list[Spent]] = {}
    streams: dict[int, list[Spent]] = {}
    redis: dict[int, list[Asked]] = {}
    for number in range(rounds):
        of = f"round {number + 1} of {rounds}: "
        show(of + "no calls")
        idle.append(meter.idle())
        for rate in sorted((*FITTED, *CHECKED)):
            show(f"{of}{rate:,} calls/s")
            loads.setdefault(rate, []).append(meter.load(False, CONNECTIONS, SECONDS, rate))
        for count in sorted((*STREAMING, STREAMS_CHECKED)):
            show(f"{of}{count} streams")
            streams.setdefault(count, []).append(meter.load(True, count, TWO_STREAMS_SECONDS))
        for rate in sorted((*REDIS_FITTED, *REDIS_CHECKED)):
            show(f"{of}{rate:,} calls/s of Redis alone")
            redis.setdefault(rate, []).append(ask(replay, rate))
    return Taken(
        idle=min(idle, key=lambda spent: spent.waits),
        loads={rate: min(found, key=lambda spent: spent.waits) for rate, found in loads.items()},
        streams={count: min(found, key=lambda spent: spent.waits) for count, found in streams.items()},
        redis={rate: min(found, key=lambda asked: asked.waited) for rate, found in redis.items()},
        spool_bytes=spool_bytes,
        row_bytes=meter.row_bytes(),
        replica_bytes=float(still.memory_bytes + still.children_memory_bytes),
        stream_bytes=stream_bytes,
        counters_bytes=meter.counters_bytes(),
    )


def ask(replay: Replay, rate: float) -> Asked:
    ran, waited = scheduled(replay.pid)
    calls, core = replay.measured(rate, SECONDS / 2)
    then_ran, then_waited = scheduled(replay.pid)
    return Asked(calls, core, (then_waited - waited) / ((then_ran - ran) or 1.0))


def each_second(spent: Spent, idle: Spent, name: str, seconds: float = SECONDS) -> float:
    """CPU microseconds of a second of the load, without those of the idle time in which rows were waited for."""
    still = getattr(idle, name) / idle.seconds
    return (getattr(spent, name) - still * (spent.seconds - seconds)) / seconds * 1e6


def constants_from(found: Taken) -> Constants:
    """Raises StackError where no constants explain what was measured."""
    idle, (low, high) = found.idle, (found.loads[rate] for rate in FITTED)
    thin, thick = low.calls / SECONDS, high.calls / SECONDS

    def standing(name: str) -> float:
        return getattr(idle, name) / idle.seconds * 1e6

    def a_line(name: str) -> tuple[float, float]:
        """What stands while there are calls, and what a call adds: for those that work in rounds."""
        less, more = (each_second(spent, idle, name) for spent in (low, high))
        slope = max(0.0, (more - less) / (thick - thin))
        return max(0.0, less - thin * slope), slope

    try:
        wake_us, call_us = fitted(
            [(thin, each_second(low, idle, "replica")), (thick, each_second(high, idle, "replica"))],
            standing("replica"),
        )
        alone = [(asked.calls, asked.core * 1e6) for asked in (found.redis[rate] for rate in REDIS_FITTED)]
        redis_wake_us, redis_us = fitted(alone, standing("redis"))
    except ValueError as error:
        raise StackError(f"No constants explain what was measured: {error}. The machine is too busy.") from error
    shipper_us, ship_us = a_line("shipper")
    postgres_us_standing, postgres_us = a_line("postgres")
    few, many = (found.streams[count] for count in STREAMING)
    grown = each_second(many, idle, "replica", BOTH_SECONDS) - each_second(few, idle, "replica", BOTH_SECONDS)
    woken = wakes(many.calls / BOTH_SECONDS) - wakes(few.calls / BOTH_SECONDS)
    a_stream = (grown - woken * wake_us) * BOTH_SECONDS / (many.calls - few.calls)
    return Constants(
        standing_us=standing("replica") + shipper_us,
        wake_us=wake_us,
        call_us=call_us,
        chunk_us=max(0.0, (a_stream - call_us) / STREAM_CHUNKS),
        ship_us=ship_us,
        redis_scripts=high.scripts / high.calls,
        redis_standing_us=standing("redis"),
        redis_wake_us=redis_wake_us,
        redis_us=redis_us,
        postgres_standing_us=postgres_us_standing,
        postgres_us=postgres_us,
        spool_bytes=found.spool_bytes,
        row_bytes=found.row_bytes,
        wal_bytes=high.wal_bytes / high.rows,
        replica_bytes=found.replica_bytes,
        stream_bytes=found.stream_bytes,
        counters_bytes=found.counters_bytes,
    )


def checks(found: Taken, constants: Constants) -> list[Checked]:
    """The model held against each size that no constant is taken from."""
    rows = []
    for rate in CHECKED:
        spent = found.loads[rate]
        calls = spent.calls / SECONDS
        told = need(constants, Traffic(calls, streamed=0.0), replicas=1, masters=1)
        cores = (each_second(spent, found.idle, "replica") + each_second(spent, found.idle, "shipper")) / 1e6
        size = f"one replica, {calls:,.0f} calls/s"
        rows += [
            Checked(size, "the replica's core", told.replica_cores, cores),
            Checked(
                size,
                "Redis's core",
                told.redis_cores,
                each_second(spent, found.idle, "redis") / 1e6,
                held=rate < max(CHECKED),  # a replica near its limit sends in heaps, as many replicas do not
            ),
            Checked(size, "PostgreSQL's log, bytes a second", told.wal_bytes, spent.wal_bytes / SECONDS),
        ]
    spent = found.streams[STREAMS_CHECKED]
    streams = Traffic(spent.calls / BOTH_SECONDS, 1.0, STREAM_CHUNKS, STREAM_SECONDS)
    parts = (each_second(spent, found.idle, part, BOTH_SECONDS) for part in ("replica", "shipper"))
    size = f"one replica, {STREAMS_CHECKED} streams at once"
    rows.append(Checked(size, "the replica's core", busy(constants, streams, 1), sum(parts) / 1e6))
    for rate in REDIS_CHECKED:
        asked = found.redis[rate]
        size = f"Redis alone, {asked.calls:,.0f} calls/s"
        rows.append(Checked(size, "Redis's core", redis_busy(constants, asked.calls, 1), asked.core))
    return rows
