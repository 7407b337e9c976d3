"""A load at a fixed rate, by k6: the package `k6` carries the program, else one on PATH is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from loadtest.gate.target import NotRun, Target
from loadtest.load import percentile

SCRIPT = Path(__file__).with_name("load.js")
SLACK_SECONDS = 60
"""Beyond the load's own time: k6's start, and calls that end late."""


class Call(Struct, frozen=True):
    """One call: when it ended (seconds since the first did), how long it took, what came of it (`ok` or an error)."""

    at_seconds: float
    seconds: float
    outcome: str
    fallback: bool


class Load(Struct, frozen=True):
    """What a load saw. `unsent` calls were due, and k6 could not begin them: the calls before took too long."""

    run: str
    calls: list[Call]
    unsent: int

    @property
    def p95_seconds(self) -> float:
        return percentile(sorted(call.seconds for call in self.calls), 950)

    @property
    def errors(self) -> Counter[str]:
        found = Counter(call.outcome for call in self.calls if call.outcome != "ok")
        return found + Counter({"not sent": self.unsent})

    @property
    def error_share(self) -> float:
        return self.errors.total() / max(1, len(self.calls) + self.unsent)

    @property
    def fallbacks(self) -> int:
        return sum(call.fallback for call in self.calls)


class _Data(Struct):
    time: datetime
    value: float
    tags: dict[str, str] = {}


class _Point(Struct):
    metric: str
    type: str
    data: msgspec.Raw


def program() -> str:
    """Raises `NotRun` where there is no k6."""
    found = shutil.which("k6", path=str(Path(sys.executable).parent)) or shutil.which("k6")
    if not found:
        raise NotRun("k6 is not installed here: `make test` installs it, or see k6.io.")
    return found


def load(target: Target, run: str, model: str, rpm: int, seconds: int, stream_share: float = 0.5) -> Load:
    """Sends `rpm` calls a minute for `seconds`; their request ids are `run` and a number. Raises `NotRun`."""
    given = {"URL": target.url, "KEY": target.key, "TENANT": target.tenant, "RUN": run, "MODEL": model}
    given |= {"RPM": str(rpm), "SECONDS": str(seconds), "STREAM_SHARE": str(stream_share)}
    if target.ca_file:
        given["SSL_CERT_FILE"] = str(target.ca_file)  # Go's variable; k6 has no option for it
    with tempfile.TemporaryDirectory() as folder:
        points = Path(folder) / "points.json"
        ran = subprocess.run(
            [program(), "run", "--quiet", "--no-usage-report", "--no-summary", "--out", f"json={points}", str(SCRIPT)],
            env=dict(os.environ) | given,
            capture_output=True,
            text=True,
            timeout=seconds + SLACK_SECONDS,
        )
        if ran.returncode or not points.exists():
            raise NotRun(f"k6 failed ({ran.returncode}): {(ran.stderr or ran.stdout).strip()[-400:]}")
        return read(run, points)


def read(run: str, points: Path) -> Load:
    """A load from k6's JSON lines."""
    calls: list[tuple[datetime, _Data]] = []
    unsent = 0
    with points.open("rb") as lines:
        for line in lines:
            point = msgspec.json.decode(line, type=_Point)
            if point.type != "Point" or point.metric not in ("call", "dropped_iterations"):
                continue
            data = msgspec.json.decode(point.data, type=_Data)
            if point.metric == "call":
                calls.append((data.time, data))
            else:
                unsent += int(data.value)
    began = min((time for time, _ in calls), default=None)
    return Load(
        run,
        [
            Call((time - began).total_seconds(), d.value / 1000, d.tags["outcome"], d.tags["fallback"] == "true")
            for time, d in calls
        ],
        unsent,
    )
