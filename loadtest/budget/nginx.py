"""What nginx takes for the same call, in machine instructions: a plain proxy, kept-alive connections, under callgrind.

It answers one call after the other, so none shares a turn of its event loop with another, however busy the machine is;
and it is counted twice, with so many calls and with twice as many, so that start and end fall out.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import uvloop

from loadtest.bench.__main__ import chat_request
from loadtest.bench.parts import Parts, nginx_program, versions
from loadtest.budget import instructions
from loadtest.load import request_bytes, run_load
from loadtest.processes import ROOT

CALLS = 500
END_SECONDS = 30
"""It takes a fifth of a second to end and to write what was counted."""


def missing() -> str | None:
    """Why it cannot be counted here, as a sentence; None where it can."""
    return instructions.missing() or (None if nginx_program() else "nginx is not installed here")


def version() -> str:
    return versions(["nginx"])["nginx"]


def count(case: str = "unary") -> int:
    """Machine instructions of one call. Raises RuntimeError and `StackError`."""
    cores = os.sched_getaffinity(0)
    with (
        tempfile.TemporaryDirectory(prefix="gateway-nginx-") as name,
        Parts(Path(name), ROOT / "config", min(cores), cores) as parts,
    ):
        parts.start_mock(0.0)
        once, twice = (_counted(parts, Path(name) / f"calls-{calls}", case, calls) for calls in (CALLS, 2 * CALLS))
    return round((twice - once) / CALLS)


def _counted(parts: Parts, dump: Path, case: str, calls: int) -> int:
    """From its first instruction to its last, with so many calls between."""
    nginx = parts.start_nginx(instructions.callgrind(dump), ("-g", "master_process off;"))
    request = request_bytes(nginx.url, {"content-type": "application/json"}, chat_request(case))
    load = uvloop.run(run_load(nginx.url, request, concurrency=1, count=calls))
    if load.completed != calls:
        raise RuntimeError(f"nginx: {load.completed} of {calls} answers were whole: {load.errors}")
    parts.stop(nginx, END_SECONDS)
    return instructions.total(dump)
