"""What a call is in work: how many steps the interpreter takes for it, from the request's bytes to the answer's.

A replica is put together as `gateway serve` does it, and its three wires, to client, vendor and Redis, end in memory.
So nothing depends on the machine, on what else it does, or on time: two runs count the same, and the suite holds every
change to the figures in `loadtest/work.json` (tests/test_work.py).

Counted are the interpreter's instructions and its calls of compiled functions. What goes on inside those is not seen:
`--time` measures it along, in CPU time, which swings by a third with what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import hiredis
import msgspec
import uvloop
import yaml

from app.ambient import Ambient
from app.asgi import Options, Replica
from app.config import ConfigSource
from app.http1 import Http1, Origin, _Connection
from app.redis_pipe import _Line
from app.telemetry import Lines
from app.visits import Connection
from loadtest import mock_vendor
from loadtest.bench.__main__ import chat_request
from loadtest.load import request_bytes
from loadtest.processes import ROOT
from loadtest.services import REFERENCE

KEPT = Path(__file__).with_suffix(".json")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The interpreter's instructions differ from one version to the next, so figures are kept by version."""
MARGIN = 0.1
"""A change may cost so much more than what is kept, and save so much less: then it is to be kept anew."""
CASES = ("unary", "large", "stream")
WARM_UP, COUNTED, TIMED = 20, 10, 200
TENANT, SERVICE_KEY = "work", "sk-gw-workworkwork-" + "w" * 43
MOST = 1_000_000_000
"""Of every limit, and what it has left, as this Redis tells it."""


class Work(msgspec.Struct, frozen=True):
    """Of one call. `writes` are those to the three wires."""

    instructions: int
    compiled_calls: int
    writes: int


# --- a replica between wires ------------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A connection's near end; `hears` gets what is written to it."""

    def __init__(self, hears: Callable[[bytes], None]) -> None:
        super().__init__()
        self._hears = hears
        self.writes = 0

    def write(self, data: bytes) -> None:
        self.writes += 1
        self._hears(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass

    close = pause_reading = resume_reading = abort


class Engine(Http1):
    """Its connections lead to `vendor`."""

    vendor: Wire
    connection: _Connection

    async def _connect(self, origin: Origin, connect_seconds: float) -> _Connection:
        self.connection = connection = _Connection(self, origin, asyncio.get_running_loop())
        connection.connection_made(self.vendor)
        return connection


class Unread(Lines):
    """Log lines that nobody reads."""

    def write(self, line: bytes) -> None:
        pass


class Rig:
    """A replica, and one client's connection to it."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        ambient, self._lines = Ambient(), Unread()
        overlay = folder / "work.yaml"
        overlay.write_text(yaml.safe_dump(_overlay()))
        self.replica = replica = Replica(
            Options(
                host="127.0.0.1", port=0, admin_port=0, config=ROOT / "config", environment="dev", overlays=(overlay,),
                spool_dir=folder / "spool", name="work", redis_url=None, database_url=None, admin_token=None,
            ),
            ConfigSource(ROOT / "config", "dev", (overlay,), _secrets()),
            ambient,
            self._lines,
        )  # fmt: skip
        replica.spool.open()
        self._engine = replica.gateway.dialogue.upstream = Engine(None, ambient)
        self._engine.vendor = Wire(self._ask_vendor)
        self._redis, self._commands = Wire(self._ask_redis), hiredis.Reader()
        replica.pipe._line = self._line = _Line(replica.pipe, self._redis)
        self._server, _ = replica.doors()
        self._server.loop = self._loop
        self._client = Wire(self._answered)
        self._connection = Connection(self._server)
        self._connection.connection_made(self._client)
        self._over: asyncio.Future[bytes]
        self._said: list[bytes] = []
        self._events: list[bytes] = []

    @property
    def writes(self) -> int:
        return self._client.writes + self._engine.vendor.writes + self._redis.writes

    async def call(self, request: bytes, streams: bool) -> bytes:
        """Sends it and gives the answer, once the replica has nothing left to do for it."""
        self._over = self._loop.create_future()
        self._said = []
        self._events = [*mock_vendor.PACED[True]] if streams else [mock_vendor.UNARY]
        self._connection.data_received(request)
        answer = await self._over
        while self._server.tasks or self._line.waiting:  # noqa: ASYNC110 - a turn of the loop or two
            await asyncio.sleep(0)
        return answer

    def close(self) -> None:
        self._connection.connection_lost(None)
        self._engine.connection.connection_lost(None)
        self.replica.pipe._closed = True
        self._line.lose("the end")
        self.replica.spool.close()
        self._lines.close()

    def _answered(self, data: bytes) -> None:
        self._said.append(data)
        if b"\r\ncontent-length: " in data or data.endswith(b"0\r\n\r\n"):
            self._over.set_result(b"".join(self._said))

    def _ask_vendor(self, data: bytes) -> None:
        self._loop.call_soon(self._next_event)

    def _next_event(self) -> None:
        self._engine.connection.data_received(self._events.pop(0))
        if self._events:
            self._loop.call_soon(self._next_event)

    def _ask_redis(self, data: bytes) -> None:
        """Every command is taken for a reservation, which is granted."""
        self._commands.feed(data)
        answers = []
        while command := self._commands.gets():
            limits = int(command[2]) - 2  # its keys are one for each, its record, and the mark that budgets are whole
            numbers = (1, time.time_ns() // 1_000_000, *[MOST] * limits)
            answers.append(b"*%d\r\n" % len(numbers) + b"".join([b":%d\r\n" % number for number in numbers]))
        self._loop.call_soon(self._line.data_received, b"".join(answers))


def _overlay() -> Mapping[str, object]:
    digest = f"sha256:{hashlib.sha256(SERVICE_KEY.encode()).hexdigest()}"
    return {
        "service_keys": {SERVICE_KEY[6:18]: {"digest": digest, "service": "work", "tenants": [TENANT]}},
        "plans": {"work": {"allowed_models": ["*"]}},
        "tenants": {TENANT: {"plan": "work", "rpm": MOST, "daily_token_cap": MOST}},
        "global": {"tpm": MOST},
        "gateway": {"trace_sample_ratio": 0.0},
    }


def _secrets() -> Mapping[str, str]:
    """Something for every secret that the configuration refers to."""
    texts = [path.read_text() for path in (ROOT / "config").rglob("*.yaml")]
    return {name: "https://w.example/" + "w" * 43 for text in texts for name in REFERENCE.findall(text)}


# --- counting ---------------------------------------------------------------------------------------------------------


class Counter:
    """Counts what runs in this thread, less the rig's own part."""

    def __init__(self) -> None:
        self.instructions = self.compiled_calls = 0

    def __enter__(self) -> Counter:
        sys.setprofile(self._profile)
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        sys.setprofile(None)

    def _enter(self, frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, _: object) -> Callable[..., object]:
        if event == "opcode":
            self.instructions += 1
        return self._step

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "c_call" and frame.f_code.co_filename != __file__:
            self.compiled_calls += 1


async def count(case: str, folder: Path, change: Callable[[Replica], None] = lambda _: None) -> Work:
    """What a call of `case` is in work: the median of COUNTED, after a `change` of the replica."""
    rig = Rig(folder)
    change(rig.replica)
    try:
        request, streams = request_of(case), case == "stream"
        for _ in range(WARM_UP):
            whole(case, await rig.call(request, streams))
        found = []
        for _ in range(COUNTED):
            before = rig.writes
            with Counter() as counter:
                await rig.call(request, streams)
            found.append((counter.instructions, counter.compiled_calls, rig.writes - before))
    finally:
        rig.close()
    return Work(*(statistics.median_low(column) for column in zip(*found, strict=True)))


async def timed(case: str, folder: Path, rounds: int) -> list[float]:
    """CPU microseconds of a call of `case`, the rig's own part with it, of each round."""
    rig = Rig(folder)
    try:
        request, streams = request_of(case), case == "stream"
        figures = []
        for _ in range(1 + rounds):
            began = time.thread_time()
            for _ in range(TIMED):
                await rig.call(request, streams)
            figures.append((time.thread_time() - began) / TIMED * 1e6)
    finally:
        rig.close()
    return figures[1:]


def whole(case: str, answer: bytes) -> None:
    """Raises RuntimeError where it is not."""
    if not answer.startswith(b"HTTP/1.1 200 ") or b'"usage"' not in answer:
        raise RuntimeError(f"{case}: no whole answer: {answer[:1000]!r}")


def request_of(case: str) -> bytes:
    headers = {"content-type": "application/json", "authorization": f"Bearer {SERVICE_KEY}", "x-tenant-id": TENANT}
    return request_bytes("http://gateway/v1/chat/completions", headers, chat_request(case))


def kept() -> dict[str, Work]:
    """The figures that a change is held to, by case; none for a version of Python that nobody counted with."""
    return msgspec.json.decode(KEPT.read_bytes(), type=dict[str, dict[str, Work]]).get(VERSION, {})


def faults(case: str, now: Work, before: Work) -> list[str]:
    """What a call takes too much of, or so little that the kept figures would hide the next loss, in sentences."""
    found = []
    for name in Work.__struct_fields__:
        new, old = getattr(now, name), getattr(before, name)
        if new > old * (1 + MARGIN):
            found.append(f"{case}: {new:,} {name} a call, {new / old - 1:+.0%} of the {old:,} that are kept")
        elif new < old * (1 - MARGIN):
            found.append(f"{case}: {new:,} {name} a call instead of {old:,}: keep them, python -m loadtest.work --keep")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.work", description=__doc__)
    parser.add_argument("--keep", action="store_true", help=f"write what is counted into {KEPT.name}")
    parser.add_argument(
        "--time", type=int, default=0, metavar="ROUNDS", help=f"measure CPU time, of {TIMED} calls each"
    )
    options = parser.parse_args(arguments)
    before, now, said = kept(), {}, []

    def run(work: Callable[[Path], Coroutine[Any, Any, Any]]) -> Any:
        with tempfile.TemporaryDirectory(prefix="gateway-work-") as folder:
            return uvloop.run(work(Path(folder)))

    for case in CASES:
        now[case] = run(lambda folder: count(case, folder))  # noqa: B023
        line = ", ".join(f"{getattr(now[case], name):,} {name}" for name in Work.__struct_fields__)
        if options.time:
            taken = run(lambda folder: timed(case, folder, options.time))  # noqa: B023
            line += f"; CPU at least {min(taken):.0f} us, median {statistics.median(taken):.0f} us"
        print(f"{case}: {line}")
        said += faults(case, now[case], before[case]) if case in before else [f"{case}: nothing is kept for {VERSION}"]
    if options.keep:
        every = msgspec.json.decode(KEPT.read_bytes(), type=dict[str, Any]) if KEPT.exists() else {}
        KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(every | {VERSION: now})) + b"\n")
        return 0
    for sentence in said:
        print(sentence)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
