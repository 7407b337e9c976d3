"""Scheduled work: done when it is due, by one process at a time, and missed aloud."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.archive import Archive, ArchiveError
from app.core import Cost
from app.reports.rollup import Rollups
from app.reports.schedule import Job, JobState, Schedule, standard_jobs
from loadtest.processes import free_port
from tests.ledger_parts import AMBIENT, Postgres, an_event, query, running_postgres, wait_until
from tests.limits_parts import not_just_before_midnight
from tests.test_rollup import DAY_SECONDS, NOON, record

TOKEN = "jobs-token"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


def scheduled(url: str, jobs: list[Job], work: Callable[[Schedule], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        archive, lock = Archive(url, AMBIENT), Archive(url, AMBIENT)
        try:
            return await work(Schedule(jobs, archive, lock, AMBIENT))
        finally:
            await archive.close()
            await lock.close()

    return asyncio.run(run())


def run_once(url: str, jobs: list[Job]) -> list[str]:
    return scheduled(url, jobs, Schedule.run_once)


def counting(name: str = "count", every_seconds: float = 3600.0, error: str | None = None) -> tuple[Job, list[int]]:
    """A job, and a list that gets longer with each of its runs."""
    runs: list[int] = []

    async def run(archive: Archive) -> str:
        runs.append(1)
        if error:
            raise ArchiveError(error)
        return "done"

    return Job(name, every_seconds, run), runs


def test_a_new_database_gets_its_ledger_partitions_and_rollups(url: str) -> None:
    assert run_once(url, standard_jobs(None, None, 900.0)) == ["partitions", "rollup"]
    month = datetime.now(UTC).strftime("ledger_%Y_%m")
    assert query(url, "SELECT to_regclass(%s) IS NOT NULL, to_regclass('rollup') IS NOT NULL", month) == [(True, True)]


def test_a_job_runs_again_when_it_is_due_and_not_before(url: str) -> None:
    job, runs = counting()
    run_once(url, [job])
    run_once(url, [job])
    assert len(runs) == 1
    query(url, "UPDATE job SET succeeded_at = succeeded_at - interval '1 hour'")
    run_once(url, [job])
    assert len(runs) == 2


def test_a_job_that_fails_is_noted_and_tried_again_and_holds_up_no_other(url: str) -> None:
    (failing, failures), (other, runs) = counting("failing", error="the disk is full"), counting("other")
    assert run_once(url, [failing, other]) == ["other"]
    assert query(url, "SELECT name, error FROM job ORDER BY name") == [("failing", "the disk is full"), ("other", None)]
    run_once(url, [failing, other])
    assert (len(failures), len(runs)) == (1, 1)
    query(url, "UPDATE job SET failed_at = failed_at - interval '5 minutes'")
    run_once(url, [failing, other])
    assert (len(failures), len(runs)) == (2, 1)


def test_one_process_at_a_time_works(url: str) -> None:
    """The second one looks while the first is in the middle of its job."""
    outer: list[list[str]] = []
    inner_job, inner_runs = counting("inner")

    async def meanwhile(archive: Archive) -> str:
        outer.append(await asyncio.to_thread(run_once, url, [inner_job]))
        return "done"

    assert run_once(url, [Job("outer", 3600.0, meanwhile)]) == ["outer"]
    assert outer == [[]]
    assert inner_runs == []


@pytest.mark.parametrize(
    ("state", "watched", "missed"),
    [
        (JobState(succeeded=7_000.0), 0.0, False),
        (JobState(succeeded=7_201.0), 0.0, True),
        (JobState(), 10.0, False),
        (JobState(failed=5.0), 7_201.0, True),
    ],
)
def test_a_job_is_missed_after_twice_its_interval(state: JobState, watched: float, missed: bool) -> None:
    assert state.missed(counting()[0], watched) == missed


def test_a_missing_invoice_is_looked_for_each_hour_and_no_sooner(tmp_path: Path) -> None:
    (reconcile,) = (job for job in standard_jobs(None, tmp_path, 900.0) if job.name == "reconcile")
    assert not JobState(failed=3_599.0).due(reconcile)
    assert JobState(failed=3_600.0).due(reconcile)


def test_reports_of_the_last_day_are_written(url: str, tmp_path: Path) -> None:
    record(url, [an_event(at=NOON)])
    run_once(url, standard_jobs(tmp_path, None, 900.0))
    assert json.loads((tmp_path / "acme-corp" / "daily.json").read_text())["acme-corp:support"]["requests"] == 1


INVOICE = "request_id,day,model,input_tokens,output_tokens,cost_usd\nv-1,2025-11-24,m,1000,100,0.5\n"


def test_new_invoices_are_reconciled_once(url: str, tmp_path: Path) -> None:
    record(url, [an_event(at=NOON)])
    jobs = [job for job in standard_jobs(None, tmp_path, 900.0) if job.name == "reconcile"]
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "november.csv").write_text(INVOICE)
    assert run_once(url, jobs) == ["reconcile"]
    assert query(url, "SELECT vendor, first, ratio FROM reconciliation") == [("calls", date(2025, 11, 24), 1.0)]
    query(url, "UPDATE job SET succeeded_at = NULL")
    assert run_once(url, jobs) == []
    assert "put vendors' exports into" in query(url, "SELECT error FROM job")[0][0]


# --- the process ------------------------------------------------------------------------------------------------------


def command(url: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "app.cli", "jobs", "--database-url", url, *map(str, arguments)]


def test_once_runs_what_is_due_and_exits(url: str) -> None:
    ran = subprocess.run(command(url, "--once"), capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert {row[0] for row in query(url, "SELECT name FROM job WHERE succeeded_at IS NOT NULL")} == {
        "partitions", "rollup",
    }  # fmt: skip


def test_once_says_that_the_database_is_away() -> None:
    ran = subprocess.run(
        command("postgresql://g:hush@127.0.0.1:1/d", "--once"), capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 1
    assert "PostgreSQL at 127.0.0.1:1 does not take part" in ran.stderr
    assert "hush" not in ran.stderr + ran.stdout


@pytest.fixture
def process(url: str, postgres: Postgres, tmp_path: Path) -> Iterator[str]:
    """The metrics' address of a running process, on a ledger where one tenant's spend has jumped."""
    not_just_before_midnight(60)
    now = AMBIENT.now()
    costs = {"steady": [100, 100, 100], "jumps": [100, 100, 150]}
    record(
        url,
        [
            an_event(at=now - (2 - number) * DAY_SECONDS, tenant=tenant, cost=Cost(cost * 10**7, 0))
            for tenant, days in costs.items()
            for number, cost in enumerate(days)
        ],
    )
    port = free_port()
    with (tmp_path / "jobs.log").open("wb") as log:
        running = subprocess.Popen(
            command(url, "--port", port), stdout=log, stderr=log, env=os.environ | {"GATEWAY_ADMIN_TOKEN": TOKEN}
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: "gateway_tenant_spend_today_usd{" in scrape(address), "the first round is over")
        yield address
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0, (tmp_path / "jobs.log").read_text()


def scrape(address: str) -> str:
    try:
        return httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {TOKEN}"}, timeout=60).text
    except httpx.TransportError:
        return ""


def metric(text: str, family: str, **labels: str) -> float:
    written = ",".join(f'{label}="{value}"' for label, value in labels.items())
    sample = rf"^{family}{{{re.escape(written)}}} (\S+)$" if labels else rf"^{family} (\S+)$"
    return float(re.search(sample, text, re.M)[1])


def test_the_process_tells_what_it_did_and_who_spends_more_than_usual(process: str) -> None:
    text = scrape(process)
    assert metric(text, "gateway_job_missed", name="rollup") == 0
    assert metric(text, "gateway_spend_spikes") == 1
    for tenant, today in (("steady", 1.0), ("jumps", 1.5)):
        assert metric(text, "gateway_tenant_spend_today_usd", tenant=tenant) == today
        assert metric(text, "gateway_tenant_spend_average_usd", tenant=tenant) == 1.0


def test_its_figures_are_for_the_administrator(process: str) -> None:
    assert httpx.get(f"{process}/metrics", timeout=60).status_code == 401
    assert httpx.get(f"{process}/status", headers={"authorization": "Bearer wrong"}, timeout=60).status_code == 403
    assert httpx.get(f"{process}/health", timeout=60).text == "ok"


def test_a_rollup_by_hand_beside_the_jobs_changes_nothing(url: str) -> None:
    record(url, [an_event(at=NOON), an_event(at=NOON)])
    jobs = standard_jobs(None, None, 0.001)
    run_once(url, jobs)

    async def by_hand(archive: Archive) -> None:
        for _ in range(5):
            await Rollups(archive).sum_day(date(2025, 11, 24))

    async def both(schedule: Schedule) -> None:
        archive = Archive(url, AMBIENT)
        try:
            await asyncio.gather(schedule.run_once(), by_hand(archive))
        finally:
            await archive.close()

    scheduled(url, jobs, both)
    assert query(url, "SELECT sum(requests) FROM rollup") == [(2,)]
