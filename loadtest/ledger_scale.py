"""How the ledger behaves at size, by hand; run it with `nice`:

    python -m loadtest.ledger_scale months --rows 50000000     a tenant's month among many rows: 20 GB of disk
    python -m loadtest.ledger_scale ship --rows 200000         rows/s from the spool to PostgreSQL, all on one core

Both start a PostgreSQL of their own, in a folder that is deleted at the end, and print a table.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg

from app.ambient import Ambient, timestamp
from app.archive import Archive
from app.config import WrittenSpool
from app.core import Attempt, Cost, EventLatency, LedgerEvent, Usage, event_cost, event_usage, usd
from app.ledger import Spool
from app.sql import statements

from .processes import ROOT, Child, free_port
from .services import plain_environment, postgres, postgres_url

PASSWORD = "measured"
DATABASE = "ledger"
LOADING = {"fsync": "off", "wal_level": "minimal", "max_wal_senders": "0", "max_wal_size": "8GB", "autovacuum": "off",
           "maintenance_work_mem": "512MB", "shared_buffers": "4GB"}  # fmt: skip
"""What makes the filling quick. Queries run under it too; of these only `shared_buffers` matters to them."""
SHIPPING = {"shared_buffers": "256MB"}
MONTH_DAYS = 28
"""Rows are spread over so many days of each month, so that every month has them."""
_FILL = """
INSERT INTO {table} (
    occurred_at, event_id, request_id, trace_id, tenant_id, feature_id, key_id, purpose, environment, model_alias,
    model_resolved, provider, status, cache_hit, fallback_used, input_tokens, output_tokens, total_tokens,
    cost_input_usd, cost_output_usd, cost_usd, saved_usd, cost_status, usage_source, price_table_version,
    config_version, event)
SELECT
    %(starts)s::timestamptz + n * %(step_seconds)s::float8 * interval '1 second', md5(n::text)::uuid, 'r', 't',
    't' || lpad((n * 7919 %% %(tenants)s)::text, 4, '0'), 'f' || n %% 5, 'k', 'client', 'prod', 'a' || n %% 3,
    'm' || n %% 3, 'openai', 'success', false, false, 100, 50, 150, 0.000015, 0.00003, 0.000045, 0, 'priced', 'vendor',
    'v', 'c', '{{}}'
FROM generate_series(0::bigint, %(rows)s - 1) AS n
"""
"""Tenants take turns, so that each row of a tenant is on a page of its own: the worst order for reading one tenant."""


# --- a tenant's month among many rows ---


async def fill(url: str, *, rows: int, tenants: int, months: int, now: datetime) -> None:
    """Makes the ledger in an empty database, and narrow rows in the `months` months before this one."""

    class Clock(Ambient):
        def now(self) -> float:
            return now.timestamp()

    archive = Archive(url, Clock())
    await archive.prepare()
    await archive.close()
    with psycopg.connect(url, autocommit=True) as connection:
        month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        for number in range(months):
            ends, month = month, (month - timedelta(days=1)).replace(day=1)
            table = f"ledger_{month:%Y_%m}"
            share = rows // months + (number < rows % months)
            parameters = {
                "starts": month, "rows": share, "tenants": tenants, "step_seconds": MONTH_DAYS * 86_400 / max(1, share),
            }  # fmt: skip
            connection.execute(f"CREATE UNLOGGED TABLE {table} (LIKE ledger INCLUDING DEFAULTS)".encode())
            connection.execute(_FILL.format(table=table).encode(), parameters)
            connection.execute(
                f"ALTER TABLE ledger ATTACH PARTITION {table} FOR VALUES FROM ('{month}') TO ('{ends}')".encode()
            )
        connection.execute("ANALYZE ledger")


def months(options: argparse.Namespace) -> None:
    """Fills, then times tenants' months that nobody has asked for before."""
    needed = options.rows * 450
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        sys.exit(
            f"{options.rows:,} rows take up to {needed / 1e9:.0f} GB; {options.folder} has {free / 1e9:.0f} GB free."
        )
    now = datetime.now(UTC)
    with _server(options.folder, LOADING) as url:
        started = time.monotonic()
        asyncio.run(fill(url, rows=options.rows, tenants=options.tenants, months=12, now=now))
        took = time.monotonic() - started
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM ledger")  # as autovacuum does in time: no read has to mark rows as committed
            size = connection.execute(
                "SELECT sum(pg_total_relation_size(inhrelid))::bigint FROM pg_inherits"
                " WHERE inhparent = 'ledger'::regclass"
            ).fetchone()
        made = f"{options.rows:,} rows of {options.tenants:,} tenants in 12 months"
        print(f"{made}: {size[0] / 1e9:.1f} GB, {took:.0f} s to make")
        print(f"{'query':<34}{'runs':>6}{'first ms':>10}{'p50 ms':>9}{'p95 ms':>9}{'max ms':>9}")
        for name, statement, span_days in (
            ("a tenant's month, from its rows", statements("period.sql")["ledger_sums"], MONTH_DAYS),
            ("a tenant's day, from its rows", statements("usage.sql")["usage"], 1),
        ):
            _report(name, asyncio.run(_timed(url, statement, span_days, options.tenants, now, options.runs)))


async def _timed(url: str, statement: str, days: int, tenants: int, now: datetime, runs: int) -> list[float]:
    """Milliseconds of each run, the round trip included; each asks for another tenant and month."""
    chance = random.Random(20261101)
    archive = Archive(url, Ambient())
    taken = []
    try:
        for _ in range(runs):
            first = (now.replace(day=1) - timedelta(days=28 * chance.randint(1, 11))).date().replace(day=1)
            tenant = f"t{chance.randrange(tenants):04d}"
            span = {"first": first, "last": first + timedelta(days=days - 1), "day": first}
            started = time.perf_counter()
            await archive.rows(statement, {"tenant": tenant, "environment": None, **span})
            taken.append((time.perf_counter() - started) * 1000)
    finally:
        await archive.close()
    return taken


def _report(name: str, taken: Sequence[float]) -> None:
    cuts = statistics.quantiles(taken, n=20)
    print(f"{name:<34}{len(taken):>6}{taken[0]:>10.1f}{cuts[9]:>9.1f}{cuts[18]:>9.1f}{max(taken):>9.1f}")


# --- from the spool to PostgreSQL ---


def ship(options: argparse.Namespace) -> None:
    """Fills a spool as a replica would, then lets the real shipper process empty it, with PostgreSQL on its core."""
    os.sched_setaffinity(0, {options.core})
    with _server(options.folder, SHIPPING) as url, tempfile.TemporaryDirectory(dir=options.folder) as spool_dir:
        _fill_spool(Path(spool_dir), options.rows)
        size = sum(file.stat().st_size for file in Path(spool_dir).iterdir())
        started = time.monotonic()
        shipper = subprocess.Popen(
            [sys.executable, "-m", "app.ledger_shipper", "--spool-dir", spool_dir, "--replica", "measured",
             "--drain-seconds", "600"],
            cwd=ROOT, env=plain_environment(os.environ) | {"DATABASE_URL": url}, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        shipper.stdin.close()  # it drains: ships what there is, and ends
        _, _, used = os.wait4(shipper.pid, 0)
        took = time.monotonic() - started
        with psycopg.connect(url) as connection:
            (shipped,) = connection.execute("SELECT count(*) FROM ledger").fetchone()
        cpu = used.ru_utime + used.ru_stime
        print(f"{shipped:,} rows ({size / shipped:.0f} bytes each) in {took:.1f} s: {shipped / took:,.0f} rows/s")
        print(
            f"shipper and PostgreSQL on core {options.core}; the shipper's own part {cpu / shipped * 1e6:.0f} µs a row"
        )


def _fill_spool(folder: Path, rows: int) -> None:
    ambient = Ambient()
    spool = Spool(folder, "measured", WrittenSpool(reserve_bytes=0), ambient)
    spool.open()
    at = ambient.now()
    for number in range(rows):
        spool.append(_event(ambient.event_id(at), timestamp(at - (rows - number) / 1000), number))
    spool.close()


def _event(event_id: str, moment: str, number: int) -> LedgerEvent:
    """A row as long as those of an ordinary call."""
    return LedgerEvent(
        event_id=event_id,
        timestamp=moment,
        request_id=f"req-{number:020d}",
        trace_id="0af7651916cd43dd8448eb211c80319c",
        tenant_id=f"tenant-{number % 1000:04d}",
        feature_id="support-chat",
        user_id_hash="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        model_alias="support-fast",
        model_resolved="gpt-4o-mini-2024-07-18",
        provider="openai",
        region="us",
        cache_hit=False,
        usage=event_usage(Usage(input=1200, cache_read=300, output=250)),
        cost_usd=event_cost(Cost(202_500, 150_000), "2026-11-01"),
        latency_ms=EventLatency(0.61, 0.0, 812.5, 813.1),
        status="success",
        fallback_chain=("openai/gpt-4o-mini", "openrouter/gpt-4o-mini"),
        fallback_used=False,
        rate_limit_tier="enterprise",
        prompt_version="v12",
        guardrail_blocked=False,
        purpose="client",
        key_id="k3f9a0b1c2d4",
        environment="prod",
        config_version="0123456789ab",
        stream=True,
        ttft_ms=340.2,
        finish_reason="stop",
        vendor_request_id="req_011CTnzWkV2wbNbwMXZtHGHz",
        attempts=(Attempt("openai/gpt-4o-mini", "openai", "success", 200, 0.6, 812.5, "req_011CTnzWkV2wbNbwMXZtHGHz"),),
        usage_source="vendor",
        cost_status="priced",
        saved_usd=usd(0),
        operation="chat",
    )


# --- the server ---


@contextmanager
def _server(folder: Path, settings: dict[str, str]) -> Iterator[str]:
    """A PostgreSQL of its own; yields the URL of an empty database. Its data is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="ledger-scale-", dir=folder) as own, ThreadPoolExecutor(1) as spawner:
        os.chmod(own, 0o755)  # for the user that PostgreSQL runs as where we are root
        port = free_port(set())
        service = postgres(Path(own) / "data", port, PASSWORD, DATABASE)
        extra = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        server = Child(replace(service, argv=[*service.argv, *extra]), Path(own), spawner)
        server.start()
        try:
            deadline = time.monotonic() + 30
            while not server.answers():
                if time.monotonic() > deadline:
                    sys.exit(f"PostgreSQL does not start:\n{server.log.read_text()}")
                time.sleep(0.1)
            yield postgres_url(port, PASSWORD, DATABASE)
        finally:
            server.end()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.ledger_scale", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True)
    for name, run, rows in (("months", months, 50_000_000), ("ship", ship, 200_000)):
        action = actions.add_parser(name, help=run.__doc__)
        action.set_defaults(run=run)
        action.add_argument("--rows", type=int, default=rows)
        action.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the data goes")
        if name == "months":
            action.add_argument("--tenants", type=int, default=1000)
            action.add_argument("--runs", type=int, default=200)
        else:
            action.add_argument("--core", type=int, default=0, help="the core that everything shares")
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
