"""What a size of traffic needs, by constants that were measured; pure. And the tables that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

DAY_SECONDS = 86_400
BUSY = 0.6
"""Of a core, at most: above it waits grow faster than the load, and one replica in three may be lost."""
SHARED_SECONDS = 0.005
"""Calls so near to each other share what waking up costs: a turn of the event loop, a sync of the spool, a round trip;
in Redis, a turn of its loop and a write to its log. One figure for both, of runs at nine sizes, 30 to 4,300 calls/s."""


class Constants(Struct, frozen=True):
    """What one call costs. `_us` is CPU time of one core; a call's are without its chunks; bytes are of a 1 KB call.

    A wake is what calls that come together share. What stands is of each second in which there are calls at all:
    looks at Redis, the shipper's rounds.
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
    spool_bytes: float
    row_bytes: float
    wal_bytes: float
    replica_bytes: float
    stream_bytes: float
    counters_bytes: float


MEANS = {
    "standing_us": "the replica's core with its shipper, a second",
    "wake_us": "the replica's core, a wake",
    "call_us": "the replica's core, a call",
    "chunk_us": "the replica's core, a chunk of a stream",
    "ship_us": "the shipper, a row",
    "redis_scripts": "scripts in Redis, a call",
    "redis_standing_us": "Redis's core, a second",
    "redis_wake_us": "Redis's core, a wake",
    "redis_us": "Redis's core, a call",
    "postgres_standing_us": "PostgreSQL, a second of each replica",
    "postgres_us": "PostgreSQL, a row",
    "spool_bytes": "the replica's disk, a row until it is shipped",
    "row_bytes": "the ledger with its indexes, a row",
    "wal_bytes": "PostgreSQL's log, a row",
    "replica_bytes": "a replica and its shipper without calls",
    "stream_bytes": "the replica's memory, an open stream",
    "counters_bytes": "Redis's memory, the counters of a tenant with two limits",
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
    """What a traffic needs. Cores are those of work alone; replicas and masters have room (BUSY)."""

    replica_cores: float
    replicas: int
    replica_bytes: float
    open_streams: float
    stream_bytes: float
    redis_scripts: float
    redis_cores: float
    redis_masters: int
    rows_a_day: float
    row_bytes_a_day: float
    spool_bytes: float
    wal_bytes: float
    postgres_cores: float


def wakes(calls: float) -> float:
    """How often so many calls a second wake who serves them: each while they are few, 200 times at most."""
    return calls / (1 + calls * SHARED_SECONDS)


def busy(constants: Constants, traffic: Traffic, replicas: int) -> float:
    """What of its core each of so many replicas needs, with its shipper."""
    calls = traffic.calls / replicas
    chunks = calls * traffic.streamed * traffic.chunks
    work = calls * (constants.call_us + constants.ship_us) + chunks * constants.chunk_us
    return (constants.standing_us + wakes(calls) * constants.wake_us + work) / 1e6


def redis_busy(constants: Constants, calls: float, masters: int) -> float:
    """What of its core each of so many masters needs."""
    calls /= masters
    return (constants.redis_standing_us + wakes(calls) * constants.redis_wake_us + calls * constants.redis_us) / 1e6


def need(constants: Constants, traffic: Traffic, replicas: int = 0, masters: int = 0) -> Need:
    """`replicas` and `masters` where they are given, else as many as keep each of them below BUSY; two replicas at
    least, so that one may go.
    """
    replicas = replicas or fewest(2, lambda count: busy(constants, traffic, count) <= BUSY)
    masters = masters or fewest(1, lambda count: redis_busy(constants, traffic.calls, count) <= BUSY)
    open_streams = traffic.calls * traffic.streamed * traffic.stream_seconds
    rows_a_day = traffic.calls * traffic.average * DAY_SECONDS
    return Need(
        replica_cores=replicas * busy(constants, traffic, replicas),
        replicas=replicas,
        replica_bytes=constants.replica_bytes + open_streams / replicas * constants.stream_bytes,
        open_streams=open_streams,
        stream_bytes=open_streams * constants.stream_bytes,
        redis_scripts=traffic.calls * constants.redis_scripts,
        redis_cores=masters * redis_busy(constants, traffic.calls, masters),
        redis_masters=masters,
        rows_a_day=rows_a_day,
        row_bytes_a_day=rows_a_day * constants.row_bytes,
        spool_bytes=rows_a_day / replicas * constants.spool_bytes,
        wal_bytes=traffic.calls * constants.wal_bytes,
        postgres_cores=(traffic.calls * constants.postgres_us + replicas * constants.postgres_standing_us) / 1e6,
    )


def fewest(least: int, enough: Callable[[int], bool]) -> int:
    most = least
    while not enough(most):
        most *= 2
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle + 1, most)
    return most


def most(carries: Callable[[float], bool]) -> float:
    """How much is carried just so; to a thousandth."""
    some, more = 1.0, 2.0
    while carries(more):
        some, more = more, more * 2
    while more / some > 1.001:
        middle = math.sqrt(some * more)
        some, more = (middle, more) if carries(middle) else (some, middle)
    return some


def fitted(of: Sequence[tuple[float, float]], idle: float) -> tuple[float, float]:
    """What a wake and what a call costs, from two pairs of calls a second and CPU a second, beside what is `idle`.

    Raises ValueError where no costs explain them.
    """
    (few, low), (many, high) = of
    determinant = wakes(few) * many - wakes(many) * few
    wake = ((low - idle) * many - (high - idle) * few) / determinant
    call = (wakes(few) * (high - idle) - wakes(many) * (low - idle)) / determinant
    if wake < 0 or call <= 0:
        raise ValueError(f"{many:,.0f} calls/s cost {high:,.0f} µs a second where {few:,.0f} cost {low:,.0f}")
    return wake, call


class Checked(Struct, frozen=True):
    """One measurement that no constant is taken from: cores or bytes a second, as predicted and as found. What is not
    `held` is told, and fails nothing.
    """

    size: str
    what: str
    predicted: float
    found: float
    held: bool = True

    @property
    def misses_by(self) -> float:
        return abs(self.predicted - self.found) / max(self.predicted, self.found)


# --- tables -----------------------------------------------------------------------------------------------------------

WORKED = (Traffic(100), Traffic(1_000), Traffic(10_000), Traffic(100_000), Traffic(1_000_000))
CHUNKS_A_SECOND = 20
"""Of a stream, as of most models."""


def figure(value: float) -> str:
    """Two digits that count, with a unit of a thousand each."""
    for size, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{float(f'{value / size:.2g}'):g}{unit}"
    return f"{float(f'{value:.2g}'):g}"


def size(value: float) -> str:
    """Bytes, so."""
    return figure(value) + ("B" if value >= 1e3 else " B")


def drawn(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def constants_table(constants: Constants) -> str:
    values = msgspec.structs.asdict(constants).items()
    lines = [(f"`{name}`", f"{float(f'{value:.3g}'):.10g}", MEANS[name]) for name, value in values]
    return drawn([("constant", "value", "of what"), *lines])


def constants_of(page: str) -> Constants:
    """Those in a page's table. Raises ValueError where one is missing."""
    found = {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE)}
    try:
        return Constants(**{name: found[name] for name in Constants.__struct_fields__})
    except KeyError as missing:
        raise ValueError(f"the page's table has no {missing}") from None


def checked_table(rows: Sequence[Checked]) -> str:
    lines = []
    for row in rows:
        shown = size if "bytes" in row.what else figure
        lines.append(
            (
                row.size,
                row.what,
                shown(row.predicted),
                shown(row.found),
                f"{row.misses_by:.0%}" + ("" if row.held else ", not held"),
            )
        )
    return drawn([("size", "what", "predicted", "measured", "apart"), *lines])


def carried_table(constants: Constants) -> str:
    """What one of each carries when it is as busy as it may be."""

    def streams(count: float) -> Traffic:
        return Traffic(count / 10.0, 1.0, 10 * CHUNKS_A_SECOND, 10.0)

    calls = most(lambda calls: busy(constants, Traffic(calls, streamed=0.0), 1) <= BUSY)
    opened = most(lambda count: busy(constants, streams(count), 1) <= BUSY)
    redis_calls = most(lambda calls: redis_busy(constants, calls, 1) <= BUSY)
    rows = BUSY * 1e6 / constants.postgres_us
    of = f"{BUSY:.0%} of a core"
    return drawn(
        [
            (f"{of} of", "carries", "and takes"),
            ("a replica", f"{figure(calls)} calls/s, not streamed", size(constants.replica_bytes) + " of memory"),
            (
                "a replica",
                f"{figure(opened)} open streams, {CHUNKS_A_SECOND} chunks a second each",
                f"{size(constants.replica_bytes + opened * constants.stream_bytes)} of memory; "
                f"{size(1000 * constants.stream_bytes)} for 1,000 open streams",
            ),
            (
                "Redis",
                f"{figure(redis_calls)} calls/s, {figure(redis_calls * constants.redis_scripts)} scripts/s",
                f"{size(1000 * constants.counters_bytes)} of memory for 1,000 tenants' counters",
            ),
            (
                "PostgreSQL",
                f"{figure(rows)} rows/s",
                f"{size(rows * constants.wal_bytes)}/s of log, {size(1e6 * constants.row_bytes)} of disk for a million",
            ),
        ]
    )


def worked_table(constants: Constants) -> str:
    needs = [need(constants, traffic) for traffic in WORKED]
    rows = [
        ("replicas, one core each", [f"{each.replicas:,}" for each in needs]),
        ("of their cores busy", [figure(each.replica_cores) for each in needs]),
        ("memory of each", [size(each.replica_bytes) for each in needs]),
        ("open streams", [figure(each.open_streams) for each in needs]),
        ("their memory, all replicas", [size(each.stream_bytes) for each in needs]),
        ("scripts in Redis a second", [figure(each.redis_scripts) for each in needs]),
        ("Redis masters", [f"{each.redis_masters}" for each in needs]),
        ("of their cores busy", [figure(each.redis_cores) for each in needs]),
        ("ledger rows a day", [figure(each.rows_a_day) for each in needs]),
        ("ledger bytes a day", [size(each.row_bytes_a_day) for each in needs]),
        ("spool of a replica, a day of it", [size(each.spool_bytes) for each in needs]),
        ("PostgreSQL's log a second", [size(each.wal_bytes) for each in needs]),
        ("PostgreSQL's cores", [figure(each.postgres_cores) for each in needs]),
    ]
    head = ["calls a second", *(figure(traffic.calls) for traffic in WORKED)]
    return drawn([head, *([name, *values] for name, values in rows)])
