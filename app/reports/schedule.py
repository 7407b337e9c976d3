"""What is done to the ledger on a schedule: rollups, partitions, reconciliation. One process at a time does it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from app.ambient import Ambient
from app.archive import Archive, ArchiveError
from app.reports.drift_report import compare, keep, latest
from app.reports.invoices import READERS, InvoiceLine, UnreadableInvoice, read
from app.reports.rollup import Rollups, write_daily
from app.sql import statements

log = logging.getLogger("gateway")

RETRY_SECONDS = 300.0
"""A job that failed is tried again after this, or after its interval if that is shorter."""
INVOICE_SECONDS = 3_600.0
"""How often a reconciliation that is due looks for an invoice: people bring them, so not sooner."""
MISSED_INTERVALS = 2
"""A job is missed when it has not succeeded for so many of its intervals."""
HOUR, WEEK = 3_600.0, 604_800.0


class Job(Struct, frozen=True):
    """`run` does the work and returns a sentence on it; it raises `ArchiveError`, OSError or `UnreadableInvoice`."""

    name: str
    every_seconds: float
    run: Callable[[Archive], Awaitable[str]]
    retry_seconds: float = RETRY_SECONDS


class JobState(Struct, frozen=True):
    """Seconds since a job began, succeeded and failed; None for never."""

    started: float | None = None
    succeeded: float | None = None
    failed: float | None = None
    error: str | None = None

    def due(self, job: Job) -> bool:
        if self.succeeded is not None and self.succeeded < job.every_seconds:
            return False
        return self.failed is None or self.failed >= min(job.retry_seconds, job.every_seconds)

    def missed(self, job: Job, watched_seconds: float) -> bool:
        """Whether it has not succeeded for too long; one that never did counts from when it was first looked for."""
        waited = watched_seconds if self.succeeded is None else self.succeeded
        return waited > MISSED_INTERVALS * job.every_seconds


class Schedule:
    """The jobs of one process. `states` is what PostgreSQL says of them, whichever process ran them."""

    def __init__(self, jobs: Sequence[Job], archive: Archive, lock: Archive, ambient: Ambient) -> None:
        """`lock` is a connection of its own: the lock is a transaction on it, held open while jobs run on `archive`."""
        self.jobs = jobs
        self.states: dict[str, JobState] = {}
        self._archive = archive
        self._lock = lock
        self._ambient = ambient
        self._since = ambient.monotonic()
        self._sql = statements("jobs.sql")

    def missed(self, job: Job) -> bool:
        return self.states.get(job.name, JobState()).missed(job, self._ambient.monotonic() - self._since)

    async def run_once(self) -> list[str]:
        """Runs the jobs that are due, unless another process does; returns the names of those that succeeded.

        Raises `ArchiveError` when PostgreSQL is away. A job that fails is noted and logged, and the others run.
        """
        async with self._archive.transaction() as run:
            await run(self._sql["create_job"])
        done = []
        async with self._lock.transaction() as lock:
            await self._look()
            if (await lock(self._sql["try_lock"])) != [(True,)]:
                return []
            for job in self.jobs:
                if self.states.get(job.name, JobState()).due(job) and await self._run(job):
                    done.append(job.name)
        await self._look()
        return done

    async def _run(self, job: Job) -> bool:
        await self._note("started", job)
        try:
            said = await job.run(self._archive)
        except (ArchiveError, OSError, UnreadableInvoice) as error:
            log.error("the job %s failed: %s", job.name, error)
            await self._note("failed", job, error=str(error)[:500])
            return False
        log.info("the job %s: %s", job.name, said)
        await self._note("succeeded", job)
        return True

    async def _note(self, what: str, job: Job, **more: str) -> None:
        async with self._archive.transaction() as run:
            await run(self._sql[what], {"name": job.name, **more})

    async def _look(self) -> None:
        async with self._archive.transaction() as run:
            self.states = {name: JobState(*rest) for name, *rest in await run(self._sql["ages"])}


def standard_jobs(
    reports: Path | None, invoices: Path | None, rollup_seconds: float, retention_months: int | None = None
) -> list[Job]:
    """Partitions every hour, rollups every `rollup_seconds`; with a folder of invoices reconciliation every week."""

    async def rollup(archive: Archive) -> str:
        rollups = Rollups(archive)
        await rollups.prepare()
        days = await rollups.run_once()
        if reports is not None and days:
            write_daily(reports, await rollups.daily(days[-1].day))
        return f"{len(days)} days summed"

    async def partitions(archive: Archive) -> str:
        done = await archive.maintain(retention_months)
        if done.warning:
            raise ArchiveError(done.warning)
        return f"they are there; dropped: {', '.join(done.dropped) or 'none'}"

    async def reconcile(archive: Archive) -> str:
        assert invoices is not None
        before = await latest(archive)
        said = []
        for vendor, lines in await asyncio.to_thread(_new_invoices, invoices, before):
            found = await compare(archive, vendor, lines, providers=[vendor])
            await keep(archive, found)
            said.append(f"{vendor} drifts by {found.drift.ratio:.2%}")
        if not said:
            raise ArchiveError(
                f"No new invoice in {invoices}: put vendors' exports into {invoices}/VENDOR/, a folder for each of "
                f"{', '.join(READERS)}."
            )
        return "; ".join(said)

    # In this order: the ledger's table is made before it is summed.
    jobs = [Job("partitions", HOUR, partitions), Job("rollup", rollup_seconds, rollup)]
    return jobs if invoices is None else [*jobs, Job("reconcile", WEEK, reconcile, INVOICE_SECONDS)]


def _new_invoices(folder: Path, before: Mapping[str, tuple[float, float]]) -> list[tuple[str, list[InvoiceLine]]]:
    """By vendor the lines of the files that came since its last reconciliation, where there are any."""
    found = []
    for vendor in READERS:
        since = before[vendor][1] if vendor in before else 0.0
        files = [file for file in sorted(folder.glob(f"{vendor}/*")) if file.is_file() and file.stat().st_mtime > since]
        if lines := [line for file in files for line in read(vendor, file.read_bytes())]:
            found.append((vendor, lines))
    return found
