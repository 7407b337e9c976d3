"""A soak: many calls through the whole stack, some hung up, some failed by the vendor; afterwards nothing has grown.

Every fifth call is a stream whose client leaves in the middle; of the primary vendor's answers one in twenty is a 500.
Memory, tasks, sockets and open files of each replica are read at rest after a warm-up and again at the end, under the
same load each time, and on the way for the plot. Every call must have left its row.

Exit code: 0, or 1 when something grew, a row is missing, or a call that was not hung up failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import httpx
import msgspec
import psycopg
import uvloop
from msgspec import Struct

from app.reports.markup import document, el
from loadtest.bench.parts import NO_SHEDDING, Subject, usage
from loadtest.gate.report import STYLE, line
from loadtest.load import NUMBER, Asked, request_bytes, run_load
from loadtest.processes import family
from loadtest.stack import Stack
from loadtest.stack.stack import Replica

ABORTED = 5
"""Every n-th call is hung up."""
HUNG_UP_AFTER = 2
"""Events of its stream."""
VENDOR_ERRORS = 0.05
WARM_UP = 0.2
"""Of the calls, or of the time: until then buffers, pools and caches may grow to their size."""
SAMPLES = 200
GROWTH = {"memory": (0.08, 4_000_000), "tasks": (0, 3), "sockets": (0, 64), "files": (0, 4)}
"""What each may grow by from the warm-up on: a share, and a number beside it. A leak of 30 bytes a call is 12 MB in the
800,000 calls after it, of which half fall to each replica. Connections to Traefik and to vendors are kept for a minute
after a call: so many calls are under way at once, so many more or less are no leak."""
REST_SECONDS = 90.0
SHIPPED_SECONDS = 300.0


class Sample(Struct, frozen=True):
    """One replica at one moment. Memory is bytes of proportional set size with its shipper's; files are without
    sockets."""

    calls: int
    memory: int
    tasks: int
    sockets: int
    files: int


def sample(replica: Replica, admin_token: str, calls: int) -> Sample:
    answer = httpx.get(f"{replica.admin_url}/metrics", headers={"authorization": f"Bearer {admin_token}"}, timeout=30)
    tasks = re.search(r"^gateway_tasks (\S+)", answer.text, re.MULTILINE)
    pids = [replica.pid, *(pid for pid, _ in family(replica.pid))]
    opened = [_link(file) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = sum(link.startswith("socket:") for link in opened)
    return Sample(calls, sum(map(_memory, pids)), int(float(tasks[1])), sockets, len(opened) - sockets)


def _link(file: Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""


def _memory(pid: int) -> int:
    rolled = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+)", rolled, re.MULTILINE)[1]) * 1024


def grown(before: Sample, after: Sample) -> list[str]:
    """What grew by more than GROWTH allows, in sentences."""
    found = []
    for name, (share, number) in GROWTH.items():
        old, new = getattr(before, name), getattr(after, name)
        if new > old * (1 + share) + number:
            found.append(f"{name} grew from {old:,} to {new:,} in {after.calls - before.calls:,} calls")
    return found


def requests(stack: Stack, run: str) -> list[Asked]:
    """What is asked in turn: whole answers and streams alternate, and every ABORTED-th is a stream that is hung up.

    Each has its number in its id and in its prompt, so that no two are alike.
    """
    asked = []
    for number in range(2 * ABORTED):
        hangs_up = number % ABORTED == 0
        words = "tokens=60 chunk_ms=20" if hangs_up else "tokens=10"
        headers = {
            "authorization": f"Bearer {stack.key}",
            "x-tenant-id": stack.tenant,
            "content-type": "application/json",
            "x-request-id": f"{run}.{NUMBER.decode()}",
        }
        body = {
            "model": "support-fast",
            "messages": [{"role": "user", "content": f"Call {NUMBER.decode()}. {words}"}],
            "stream": hangs_up or number % 2 == 0,
        }
        request = request_bytes(f"{stack.url}/v1/chat/completions", headers, json.dumps(body).encode())
        asked.append(Asked(request, HUNG_UP_AFTER if hangs_up else 0))
    return asked


class Soak:
    """The calls of one run. `outcomes` counts what came of them."""

    def __init__(self, stack: Stack, run: str, concurrency: int) -> None:
        self._stack = stack
        self._asked = requests(stack, run)
        self._tls = stack.tls()
        self._concurrency = concurrency
        self.outcomes: Counter[str] = Counter()
        self.begun = 0

    def calls(self, until: int) -> None:
        """Goes on to the `until`-th call and waits for the last of them."""
        load = run_load(
            self._stack.url,
            self._asked,
            concurrency=self._concurrency,
            count=until - self.begun,
            sent_before=self.begun,
            tls=self._tls,
        )
        result = uvloop.run(load)
        self.outcomes.update({"whole": result.completed, "hung up": result.hung_up} | result.errors)
        self.begun = until


def cpu_seconds(stack: Stack) -> dict[str, float]:
    """Of each part of the stack with its children, and of the load itself, since it began."""
    spent = {name: usage(Subject(name, "", {}, pid)).cpu_seconds for name, pid in stack.ready()["pids"].items()}
    return spent | {"load": time.process_time()}


def at_rest(stack: Stack, calls: int) -> list[Sample]:
    """Each replica once it serves nothing, and its shipper has nothing left to do."""
    deadline = time.monotonic() + REST_SECONDS
    for replica in stack.replicas:
        while True:
            headers = {"authorization": f"Bearer {stack.admin_token}"}
            status = httpx.get(f"{replica.admin_url}/status", headers=headers, timeout=30).json()
            if status["in_flight"] == 0 and status["spool"]["open_intents"] == 0:
                break
            if time.monotonic() > deadline:
                sys.exit(f"{replica.name} still serves {status['in_flight']} calls after {REST_SECONDS:g} s.")
            time.sleep(0.2)
    return [sample(replica, stack.admin_token, calls) for replica in stack.replicas]


def rows(stack: Stack, run: str, calls: int) -> Counter[str]:
    """The rows of a run by status, once there are `calls` of them or too much time has passed."""
    deadline = time.monotonic() + SHIPPED_SECONDS
    while True:
        with psycopg.connect(stack.postgres_url) as connection:
            counted = connection.execute(
                "SELECT status, count(*) FROM ledger WHERE split_part(request_id, '.', 1) = %s GROUP BY 1", [run]
            ).fetchall()
        found = Counter(dict(counted))
        if found.total() >= calls or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def page(samples: dict[str, list[Sample]], text: Sequence[str]) -> bytes:
    shown = (("memory", 1e6, "{:.0f} MB"), ("tasks", 1, "{:.0f}"), ("sockets", 1, "{:.0f}"), ("files", 1, "{:.0f}"))

    def plots(taken: list[Sample]) -> list[Element]:
        marks = [False] * len(taken)
        last = f"{taken[-1].calls:,} calls"
        return [
            line(name, [getattr(one, name) / unit for one in taken], marks, shape, last) for name, unit, shape in shown
        ]

    sections = [el("section", el("h2", replica), *plots(taken)) for replica, taken in samples.items()]
    head = el("head", el("meta", charset="utf-8"), el("title", "Soak"), el("style", STYLE))
    return document(
        el(
            "html",
            head,
            el("body", el("h1", "Soak"), el("pre", "\n".join(text), style="white-space: pre-wrap"), *sections),
            lang="en",
        )
    )


def soak(stack: Stack, calls: int, minutes: float, concurrency: int, report: Path) -> int:
    names = [replica.name for replica in stack.replicas]
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    fault = {"kind": "status", "status": 500, "probability": VENDOR_ERRORS}
    httpx.put(f"{stack.simulator_url}/_sim/faults/openai", json=fault).raise_for_status()
    run = f"soak{uuid.uuid4().hex[:12]}"
    load = Soak(stack, run, concurrency)
    began, spent_before = time.monotonic(), cpu_seconds(stack)
    before: list[Sample] = []
    for step in range(1, SAMPLES + 1):
        load.calls(calls * step // SAMPLES)
        for replica in stack.replicas:
            samples[replica.name].append(sample(replica, stack.admin_token, load.begun))
        done = max(load.begun / calls, (time.monotonic() - began) / 60 / minutes)
        if not before and done >= WARM_UP:
            before = at_rest(stack, load.begun)
        print(f"\r  {load.begun:,} of {calls:,} calls", end="", flush=True)
        if done >= 1:
            break
    seconds = time.monotonic() - began
    print()
    calls = load.begun
    shipped = rows(stack, run, calls)
    spent = {name: (now - spent_before[name]) / calls * 1e6 for name, now in cpu_seconds(stack).items()}
    after = at_rest(stack, calls)
    faults = [f"{name}: {said}" for name, a, b in zip(names, before, after, strict=True) for said in grown(a, b)]
    failed = Counter({kind: count for kind, count in load.outcomes.items() if kind not in ("whole", "hung up")})
    if failed:
        faults.append(f"calls failed: {dict(failed)}")
    if shipped.total() != calls:
        faults.append(f"{calls:,} calls left {shipped.total():,} rows")
    text = [
        f"{calls:,} calls in {seconds:.0f} s, {concurrency} at once: {dict(load.outcomes)}",
        f"rows: {dict(shipped)}",
        "CPU a call, µs: " + ", ".join(f"{name} {each:,.0f}" for name, each in spent.items()),
        *(
            f"{name} at rest, after {a.calls:,} calls and at the end: "
            + ", ".join(f"{field} {getattr(a, field):,} and {getattr(b, field):,}" for field in GROWTH)
            for name, a, b in zip(names, before, after, strict=True)
        ),
        *(faults or ["Nothing grew, no row is missing."]),
    ]
    print("\n".join(text))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_bytes(page(samples, text))
    report.with_suffix(".json").write_bytes(msgspec.json.encode(samples))
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end then with the calls there were (no limit)")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--report", type=Path, default=Path("build/soak.html"), help="HTML page; JSON beside it")
    options = parser.parse_args()
    environ = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_ACCESS_KEY"))}
    overlay = {"gateway": {"overload": NO_SHEDDING}}  # on a busy machine too every call is served
    with (
        tempfile.TemporaryDirectory(prefix="gateway-soak-") as folder,
        Stack(Path(folder), environ=environ, overlay=overlay) as stack,
    ):
        return soak(stack, options.calls, options.minutes, options.concurrency, options.report)


if __name__ == "__main__":
    sys.exit(main())
