"""A call in CPU time beside nginx's: through real sockets, real Redis and PostgreSQL, everything on, in the same run.

What no count of instructions sees is in it: the kernel, caches, the shipper. A shared machine's speed swings by a
third, and what others do on a core makes us slower and nginx hardly. So it is a sequential test: rounds of a third of a
second, each ours and then nginx's; a round in which we had to wait for our core does not count; more are run
until it is sure that the ratio is within the budget or that it is not, or the time is up, and then nobody knows.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec
import uvloop

from loadtest.bench.__main__ import chat_request
from loadtest.bench.parts import Parts, Subject, cpu_seconds, nginx_program
from loadtest.load import request_bytes, run_load
from loadtest.processes import ROOT, family

BUDGET = 0.1
"""So much more than what is kept is a loss."""
OURS, NGINX = (64, 0.25), (8, 0.1)
"""Connections, and seconds of a round. With 64 nginx takes 17 to 23 us a call, by how many come at once; with 8, which
keep it no queue, its cost was within 4 % over a run in which ours went from 240 to 303 us with what others did."""
WAITED = 0.25
"""Of our CPU time our main thread may have waited for its core in a round that counts. The shipper and the thread that
makes rows durable have 27 us a call of that core, and the least that was seen is 0.13; beside a busy loop it waits as
long as it runs. nginx's is not looked at: it hardly mattered where that was measured (runbooks/speed.md)."""
LEAST, SURE = 24, 2.5
"""Rounds before it may be sure, and how many standard errors that takes: it is asked after each round."""
SECONDS, KEEPING_SECONDS = 45.0, 85.0
WARM_UP_SECONDS = 1.0
NEAR = 0.03
"""Bounds of a ratio that may be kept."""


class Round(msgspec.Struct, frozen=True):
    """CPU microseconds of a call. `waited`: how long we waited for our core, as a share of our CPU time."""

    ours_us: float
    nginx_us: float
    waited: float


class Verdict(StrEnum):
    HELD = "held"
    LOST = "lost"
    UNSURE = "not sure"


class Ratio(msgspec.Struct, frozen=True):
    """The median of the rounds that count, and its bounds; of none, no number."""

    rounds: int
    counted: int
    ratio: float
    low: float
    high: float

    def is_near(self) -> bool:
        """Whether its bounds are so near that it may be kept."""
        return self.counted >= LEAST and self.high <= self.ratio * (1 + NEAR)

    def text(self) -> str:
        if not self.counted:
            return f"none of {self.rounds} rounds counts: others ran on the core"
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f}, {self.counted} of {self.rounds} rounds)"


def ratio(rounds: Sequence[Round]) -> Ratio:
    """Of logarithms, as a machine that is slower by a share is so in both; a median's standard error is 1.253 times a
    mean's, and 1.483 times the median deviation is a deviation that outliers do not touch.
    """
    found = [math.log(one.ours_us / one.nginx_us) for one in rounds if one.waited <= WAITED]
    if len(found) < 2:
        return Ratio(len(rounds), 0, math.nan, 0.0, math.inf)
    middle = statistics.median(found)
    deviation = 1.483 * statistics.median(abs(one - middle) for one in found)
    error = SURE * 1.253 * deviation / math.sqrt(len(found))
    return Ratio(len(rounds), len(found), *(math.exp(middle + by) for by in (0.0, -error, error)))


def judge(found: Ratio, kept: float) -> Verdict:
    most = kept * (1 + BUDGET)
    if found.counted < LEAST or found.low <= most < found.high:
        return Verdict.UNSURE
    return Verdict.HELD if found.high <= most else Verdict.LOST


def missing() -> str | None:
    """Why nothing can be measured here, as a sentence; None where it can."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        return "it takes two cores, and Linux"
    return None if nginx_program() else "nginx is not installed here"


def machine() -> str:
    """What the ratio depends on besides Python: two processors differ in what they do well."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    words = [facts.get(name, "").strip() for name in ("model name", "cpu family", "model", "stepping", "cache size")]
    return f"{' '.join(words)}, Linux {'.'.join(os.uname().release.split('.')[:2])}"


def measured(over: Callable[[Ratio], bool], seconds: float = SECONDS) -> Ratio:
    """Rounds with processes of their own, until they are `over` or the time is up. Raises `StackError`."""
    cores = os.sched_getaffinity(0)
    core, *others = sorted(cores)
    os.sched_setaffinity(0, others)
    rounds: list[Round] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="gateway-budget-") as folder,
            Parts(Path(folder), ROOT / "config", core, set(others)) as parts,
        ):
            parts.start_mock(0.0)
            parts.start_backing_services()
            ours, nginx = parts.start_gateway(1)[0], parts.start_nginx()
            for subject, (connections, _) in ((ours, OURS), (nginx, NGINX)):
                _answers(subject, connections, WARM_UP_SECONDS)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                rounds.append(_round(ours, nginx))
                if len(rounds) >= LEAST and over(ratio(rounds)):
                    break
    finally:
        os.sched_setaffinity(0, cores)
    return ratio(rounds)


def _round(ours: Subject, nginx: Subject) -> Round:
    both = [_family(subject.pid) for subject in (ours, nginx)]
    began = [_used(pids) for pids in both]
    waited, used = _waited_seconds(ours.pid), cpu_seconds(ours.pid)
    calls = [_answers(ours, *OURS)]
    waited, used = _waited_seconds(ours.pid) - waited, cpu_seconds(ours.pid) - used
    calls.append(_answers(nginx, *NGINX))
    # Ours until the round's end: the shipper goes on with our rows while nginx answers.
    spent = [_used(pids) - before for pids, before in zip(both, began, strict=True)]
    return Round(spent[0] / calls[0] * 1e6, spent[1] / calls[1] * 1e6, waited / used)


def _answers(subject: Subject, connections: int, seconds: float) -> int:
    headers = {"content-type": "application/json", **subject.headers}
    request = request_bytes(subject.url, headers, chat_request("unary"))
    load = uvloop.run(run_load(subject.url, request, concurrency=connections, duration_seconds=seconds))
    if load.errors:
        raise RuntimeError(f"{subject.name}: answers that were not whole: {load.errors}")
    return load.completed + load.late


def _family(pid: int) -> list[int]:
    return [pid, *(child for child, _ in family(pid))]


def _used(pids: Sequence[int]) -> float:
    return sum(map(cpu_seconds, pids))


def _waited_seconds(pid: int) -> float:
    """How long its main thread waited for a core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
