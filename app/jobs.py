"""`gateway jobs`: a process that does the scheduled work, with metrics of it. Several may run; one at a time works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct

from app import admin
from app.ambient import Ambient
from app.archive import Archive, ArchiveError
from app.config import Secret
from app.reports.drift_report import latest
from app.reports.period import MAX_SPENDERS, Spend, spending
from app.reports.schedule import Schedule, standard_jobs
from app.server import Server
from app.telemetry import JsonLog, Lines, Telemetry

log = logging.getLogger("gateway")

LOOK_SECONDS = 30.0
"""How often due jobs are looked for, and the figures of spend and drift are read anew."""
WORK_SECONDS = 600.0
LOCK_SECONDS = 6 * 3_600.0
"""How long one round of jobs may take: then the lock is let go, and another process may begin."""


class JobsOptions(Struct, frozen=True):
    """`gateway jobs`' options."""

    database_url: str
    host: str
    port: int
    admin_token: Secret | None
    reports: Path | None
    invoices: Path | None
    rollup_seconds: float
    retention_months: int | None = None


class JobsProcess:
    """Runs the schedule until it is told to stop. Raises `InvalidDatabaseUrl` when it is made."""

    def __init__(self, options: JobsOptions, ambient: Ambient, lines: Lines) -> None:
        self._options = options
        self._ambient = ambient
        self._archive = Archive(options.database_url, ambient, WORK_SECONDS)
        self._lock = Archive(options.database_url, ambient, LOCK_SECONDS)
        jobs = standard_jobs(options.reports, options.invoices, options.rollup_seconds, options.retention_months)
        self._schedule = Schedule(jobs, self._archive, self._lock, ambient)
        self._telemetry = Telemetry(lines, None, ambient)
        self._spends: dict[str, Spend] = {}
        self._drifts: dict[str, float] = {}
        self._up = False
        for job in jobs:
            self._telemetry.gauge(
                "gateway_job_missed", "1 when a job has not succeeded for twice its interval.",
                lambda job=job: self._schedule.missed(job), name=job.name,
            )  # fmt: skip
        self._telemetry.gauge(
            "gateway_spend_spikes", "Tenants whose spend today is above 120 % of the average of the days before.",
            lambda: sum(spend.spike for spend in self._spends.values()),
        )  # fmt: skip
        states = self._telemetry.states
        states(
            "gateway_tenant_spend_today_usd", "Spend since midnight UTC, as of the last rollup.", ("tenant",),
            lambda: [((tenant,), spend.today / 1e9) for tenant, spend in self._spends.items()],
        )  # fmt: skip
        states(
            "gateway_tenant_spend_average_usd", "Average spend of the seven days before; 0 without one.", ("tenant",),
            lambda: [((tenant,), (spend.average or 0) / 1e9) for tenant, spend in self._spends.items()],
        )  # fmt: skip
        states(
            "gateway_reconcile_drift_ratio", "Drift of the last reconciliation, as a share of the whole.", ("vendor",),
            lambda: [((vendor,), ratio) for vendor, ratio in self._drifts.items()],
        )  # fmt: skip
        self._telemetry.gauge(
            "gateway_dependency_up", "1 when the dependency answers.", lambda: self._up, name="postgres"
        )

    async def run_once(self) -> list[str]:
        """One round: the jobs that are due, then the figures. Raises `ArchiveError`."""
        done = await self._schedule.run_once()
        await self._read_figures()
        return done

    @property
    def failed(self) -> bool:
        """Whether a job's last run failed."""
        return any(state.error is not None for state in self._schedule.states.values())

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        options = self._options
        door = admin.app(options.admin_token, self._telemetry, self._status)
        port = Server(door, options.host, options.port, self._ambient)
        await port.start()
        log.info("jobs run; metrics on %s:%s", options.host, options.port)
        try:
            while not stop.is_set():
                round_ = asyncio.ensure_future(self._round())
                stopped = asyncio.ensure_future(stop.wait())
                await asyncio.wait({round_, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not round_.done():
                    round_.cancel()  # what was not committed is done again by the next process
                    await asyncio.wait({round_})
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopped, LOOK_SECONDS)
        finally:
            await self.close()
            await port.close()

    def scrape(self) -> bytes:
        """Its metrics as Prometheus text."""
        return self._telemetry.scrape()

    async def close(self) -> None:
        await self._archive.close()
        await self._lock.close()

    async def _round(self) -> None:
        try:
            await self.run_once()
            self._up = True
        except ArchiveError as error:
            if self._up:
                log.error("jobs wait: %s", error)
            self._up = False

    async def _read_figures(self) -> None:
        today = datetime.fromtimestamp(self._ambient.now(), UTC).date()
        self._spends = {spend.tenant: spend for spend in await spending(self._archive, today, MAX_SPENDERS)}
        self._drifts = {vendor: ratio for vendor, (ratio, _) in (await latest(self._archive)).items()}

    def _status(self) -> dict[str, object]:
        return {
            "postgres": "up" if self._up else "down",
            "jobs": {
                job.name: {
                    "every_seconds": job.every_seconds,
                    "missed": self._schedule.missed(job),
                    "state": self._schedule.states.get(job.name),
                }
                for job in self._schedule.jobs
            },
        }


def serve(options: JobsOptions, *, once: bool) -> int:
    """Runs the jobs to their end: 0, or 1 after a sentence. With `once` the jobs that are due, and no metrics."""
    ambient, lines = Ambient(), Lines()
    logging.basicConfig(level="INFO", handlers=[JsonLog(lines, ambient)], force=True)

    async def run() -> int:
        process = JobsProcess(options, ambient, lines)
        if not once:
            await process.run()
            return 0
        try:
            await process.run_once()
            return 1 if process.failed else 0
        finally:
            await process.close()

    try:
        return asyncio.run(run())
    except (ArchiveError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        lines.close()
