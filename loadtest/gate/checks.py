"""The gates: each runs its checks against a target and says what it found. All raise `NotRun`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psycopg
from msgspec import Struct

from app.lint_apps import direct_calls
from loadtest.gate import k6
from loadtest.gate.settings import Evals, Fallback, Load
from loadtest.gate.target import NotRun, Target
from loadtest.processes import ROOT

SMOKE = ROOT / "loadtest" / "gateway_smoke.sh"
SMOKE_SECONDS = 60
SHIPPED_SECONDS = 60
"""How long rows may take into PostgreSQL."""


class Found(Struct, frozen=True):
    """What a gate found: a sentence, and details to look at when it did not pass."""

    passed: bool
    measured: str
    details: list[str] = []
    loads: dict[str, k6.Load] = {}
    """The loads behind it, by what they were."""


def smoke(target: Target) -> Found:
    missing = [program for program in ("bash", "curl", "jq") if not shutil.which(program)]
    if missing:
        raise NotRun(f"needs {' and '.join(missing)} on this machine.")
    given = {"LLM_GATEWAY_URL": target.url, "HELLO_SHIP_GATEWAY_KEY": target.key}
    if target.ca_file:
        given["CURL_CA_BUNDLE"] = str(target.ca_file)
    ran = subprocess.run(
        ["bash", "-x", str(SMOKE)],
        env=dict(os.environ) | given,
        capture_output=True,
        text=True,
        timeout=SMOKE_SECONDS,
    )
    if ran.returncode == 0:
        return Found(True, "every step passed")
    trace = [line for line in ran.stderr.splitlines() if target.key not in line]
    return Found(False, f"a step failed, exit code {ran.returncode}", trace[-8:])


def direct(apps: list[Path]) -> Found:
    if not apps:
        raise NotRun("needs the app's source: --apps FOLDER.")
    found = [str(call) for folder in apps for call in direct_calls(folder)]
    return Found(not found, f"{len(found)} found", found)


def rows(target: Target, sent: dict[str, int], seconds: float = SHIPPED_SECONDS) -> Found:
    """sent: how many calls were made under each run's name, with request ids that begin with it."""
    if target.database_url is None:
        raise NotRun("needs the ledger: --database-url, or DATABASE_URL.")
    calls = sum(sent.values())
    if not calls:
        raise NotRun("no call was made whose row could be looked for.")
    deadline = time.monotonic() + seconds
    while True:
        with psycopg.connect(target.database_url) as connection:
            counted = connection.execute(
                "SELECT split_part(request_id, '.', 1), count(*), count(DISTINCT request_id) FROM ledger"
                " WHERE split_part(request_id, '.', 1) = ANY(%s) AND occurred_at > now() - interval '1 day' GROUP BY 1",
                [list(sent)],
            ).fetchall()
        found = {run: (total, distinct) for run, total, distinct in counted}
        wrong = [
            f"{run}: {number} calls, {found.get(run, (0, 0))[0]} rows of {found.get(run, (0, 0))[1]} calls"
            for run, number in sent.items()
            if found.get(run) != (number, number)
        ]
        if not wrong or time.monotonic() > deadline:
            return Found(not wrong, f"{sum(total for total, _ in found.values())} rows of {calls} calls", wrong)
        time.sleep(0.5)


def fallback(target: Target, settings: Fallback, run: str) -> Found:
    """Each way of failing under a load of its own, which the secondary has to answer and the alert to see."""
    loads: dict[str, k6.Load] = {}
    shares: dict[str, float] = {}
    for name, fault in settings.faults.items():
        before = _fallbacks(target, settings)
        target.simulator("PUT", f"faults/{settings.primary}", fault)
        try:
            loads[name] = k6.load(target, f"{run}{name}", settings.model, settings.rpm, settings.seconds)
        finally:
            target.simulator("DELETE", f"faults/{settings.primary}")
        after = _fallbacks(target, settings)
        if before is not None and after is not None:
            shares[name] = (after - before) / max(1, len(loads[name].calls))
    good = {name: sum(call.outcome == "ok" and call.fallback for call in load.calls) for name, load in loads.items()}
    passed = all(load.calls and good[name] == len(load.calls) and not load.unsent for name, load in loads.items())
    measured = ", ".join(f"{name} {good[name]}/{len(load.calls) + load.unsent}" for name, load in loads.items())
    details = [f"{name}: {_errors(load)}" for name, load in loads.items() if load.errors]
    if shares:
        bound = _alert_share()
        silent = [name for name, share in shares.items() if share <= bound]
        told = ", ".join(f"{share:.0%}" for share in shares.values())
        measured += f"; {ALERT} sees {told} of calls leave, it fires above {bound:.0%}"
        passed = passed and not silent
        details += [f"{name}: {ALERT} would be silent" for name in silent]
    return Found(passed, measured, details, loads)


ALERT = "GatewayFallsBack"


def _alert_share() -> float:
    """The share of calls above which the alert of a provider outage fires."""
    rules = (ROOT / "config" / "observability" / "alerts.yml").read_text()
    return float(re.search(rf"alert: {ALERT}\n\s+expr: .*gateway_fallback_total.* > ([\d.]+)\n", rules)[1])


def _fallbacks(target: Target, settings: Fallback) -> float | None:
    return target.counted("gateway_fallback", **{"from": f"{settings.primary}/"})


def load(target: Target, settings: Load, run: str) -> Found:
    """Vendor limits are looked at where the vendors are simulated; elsewhere a fallback tells of one."""
    if target.simulator_url:
        grant = {"rpm": settings.vendor_rpm, "tpm": settings.vendor_tpm}
        target.simulator("PUT", "grants", grant)
    try:
        seen = k6.load(target, run, settings.model, settings.rpm, settings.seconds, settings.stream_share)
        refused = _refused(target) if target.simulator_url else 0
    finally:
        if target.simulator_url:
            target.simulator("DELETE", "grants")
    passed = bool(
        seen.calls
        and seen.p95_seconds < settings.p95_seconds
        and seen.error_share < settings.error_share
        and not refused
        and not seen.fallbacks
    )
    measured = (
        f"{len(seen.calls)} calls at {settings.rpm}/min: p95 {seen.p95_seconds:.3f} s, "
        f"errors {seen.error_share:.2%}, {refused} refused by the vendor, {seen.fallbacks} fallbacks"
    )
    return Found(passed, measured, [_errors(seen)] if seen.errors else [], {"load": seen})


def _refused(target: Target) -> int:
    counts: dict[str, Any] = target.simulator("GET", "counts")
    return sum(vendor["refused"] for vendor in counts.values())


def _errors(load: k6.Load) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in load.errors.most_common())


def evals(target: Target, settings: Evals, run: str) -> Found:
    failed = []
    with target.client() as client:
        for number, case in enumerate(settings.cases):
            body = {"model": settings.model, "messages": [{"role": "user", "content": case.ask}], "temperature": 0}
            try:
                answer = client.post("/v1/chat/completions", json=body, headers={"x-request-id": f"{run}.{number}"})
                said = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else None
            except httpx.TransportError as error:
                failed.append(f"{case.ask!r}: {error!r}")
                continue
            if not re.fullmatch(case.expect, (said or "").strip(), re.IGNORECASE):
                failed.append(f"{case.ask!r}: {answer.status_code}, {said!r} is not {case.expect!r}")
    share = 1 - len(failed) / len(settings.cases)
    return Found(share >= settings.baseline, f"{share:.0%} passed, the baseline is {settings.baseline:.0%}", failed)
