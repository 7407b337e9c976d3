"""Chaos drills: parts are killed, frozen, slowed, filled and cut under load. `make drills`; not part of `make test`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from loadtest.load import request_bytes, run_load
from loadtest.processes import ROOT
from loadtest.stack import Stack
from tests.journey import OVERLAY, Journey, chat, events, until
from tests.traffic import Traffic, p95

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

POSTGRES_AWAY_SECONDS = float(os.environ.get("DRILL_POSTGRES_SECONDS", "120"))
STREAMS = 100
LORIS = 200
AT_ONCE = 20_000


def running(traffic: Traffic, calls: int = 40) -> None:
    """Waits until so many more calls have been made."""
    before = len(traffic.calls)
    until(lambda: len(traffic.calls) >= before + calls, 60)


# --- replicas -------------------------------------------------------------------------------------------------------


def test_killed_replica_costs_only_the_calls_that_it_had(whole: Journey) -> None:
    with Traffic(whole) as traffic:
        running(traffic)
        killed = time.monotonic()
        os.kill(whole.stack.replicas[0].pid, signal.SIGKILL)
        time_left_by = killed + 3  # Traefik looks every second and waits 0.8 s for an answer
        until(lambda: time.monotonic() > time_left_by, 10)
        running(traffic, 100)
    late = traffic.since(time_left_by)
    assert {call.outcome for call in late} == {"whole"}
    assert {event["status"] for event in whole.rows(traffic.whole()).values()} == {"success"}


def test_rolling_restart_truncates_none_of_a_hundred_streams(whole: Journey) -> None:
    ids = [whole.headers()["x-request-id"] for _ in range(STREAMS)]

    def stream(request_id: str) -> list[Any]:
        with httpx.Client(base_url=whole.stack.url, verify=whole.stack.tls(), timeout=120) as client:
            headers = whole.headers(x_request_id=request_id)
            body = chat("tokens=150 chunk_ms=100", stream=True)
            with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                return events(answer)

    before = [replica.pid for replica in whole.stack.replicas]
    with ThreadPoolExecutor(STREAMS) as pool, Traffic(whole, clients=4) as traffic:
        streams = [pool.submit(stream, request_id) for request_id in ids]
        until(lambda: whole.counts().get("open", 0) >= STREAMS, 60)
        for number, pid in enumerate(before):  # the next one goes when the one before is back
            os.kill(pid, signal.SIGTERM)
            until(lambda number=number: whole.stack.replicas[number].pid not in before, 120)
            until(lambda number=number: _serves(whole, number), 60)
        answers = [done.result(120) for done in streams]
    assert {chunks[-1] for chunks in answers} == {"[DONE]"}
    assert traffic.outcomes() == {"whole"}
    assert {event["status"] for event in whole.rows(ids).values()} == {"success"}


def _serves(journey: Journey, number: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(journey.stack.replicas[number].url + "/health/ready", timeout=60).status_code == 200
    return False


# --- Traefik --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "alias", "status"), [("tokens=20000", "remembered", 200), ("", "nobody", 404)])
def test_traefik_cuts_no_answer_that_is_there_at_once(whole: Journey, prompt: str, alias: str, status: int) -> None:
    """Large ones from before, in pieces: unheld, one in 20,000 was cut, of a bare server one in 3,000. And refusals."""
    body = chat(prompt, alias)
    if status == 200:
        until(lambda: whole.post(body).headers["x-cache"] == "HIT (exact)")
        assert len(whole.post(body).content) > 65_536  # of fewer, sent at once, none was ever cut
    url = whole.stack.url + "/v1/chat/completions"
    asking = request_bytes(url, whole.headers(x_request_id=""), json.dumps(body).encode())
    load = run_load(  # no faster than Traefik lets one key call
        url, asking, concurrency=16, count=AT_ONCE, expected=status, interval_seconds=0.01, tls=whole.stack.tls()
    )
    done = asyncio.run(load)
    assert (done.completed, done.errors) == (AT_ONCE, {})


# --- Redis ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kill", "freeze"])
def test_redis_that_goes_and_comes_back_fails_no_call(whole: Journey, way: str) -> None:
    with Traffic(whole) as traffic:
        running(traffic)
        getattr(whole.stack, way)("redis")
        until(lambda: whole.admin("/status").json()["redis"] == "down", 30)
        running(traffic, 200)
        whole.stack.start("redis") if way == "kill" else whole.stack.thaw("redis")
        until(lambda: whole.admin("/status").json()["redis"] == "up", 30)
        running(traffic)
    assert traffic.outcomes() == {"whole"}
    assert p95(traffic.calls) < 2


def test_slow_redis_slows_calls_by_no_more_than_its_deadline_and_fails_none(whole: Journey) -> None:
    slowing = threading.Event()

    def slow() -> None:
        with redis.Redis.from_url(whole.stack.redis_url) as client:
            while not slowing.is_set():
                client.execute_command("CLIENT", "PAUSE", 200, "ALL")
                slowing.wait(0.21)

    with Traffic(whole) as traffic:
        running(traffic)
        thread = threading.Thread(target=slow)
        thread.start()
        began = time.monotonic()
        running(traffic, 200)
        slowing.set()
        thread.join()
    assert traffic.outcomes() == {"whole"}
    assert p95(traffic.since(began)) < OVERLAY["gateway"]["redis"]["timeout_ms"] / 1000


# --- the ledger -----------------------------------------------------------------------------------------------------


def test_postgres_away_for_minutes_loses_no_row_and_slows_nobody(whole: Journey) -> None:
    with Traffic(whole, clients=2) as traffic:
        running(traffic)
        whole.stack.stop("postgres")
        until(lambda: time.monotonic() > traffic.calls[0].began + POSTGRES_AWAY_SECONDS, POSTGRES_AWAY_SECONDS + 30)
        whole.stack.start("postgres")
    assert traffic.outcomes() == {"whole"}
    assert p95(traffic.calls) < 2
    ids = traffic.whole()
    until(lambda: _shipped(whole, ids) == len(ids), 120)


def _shipped(journey: Journey, ids: list[str]) -> int:
    (row,) = journey.query("SELECT count(*) AS rows FROM ledger WHERE request_id = ANY(%s)", ids)
    return row["rows"]


@pytest.fixture
def nearly_full(tmp_path: Path) -> Iterator[tuple[Stack, Path, int]]:
    """A stack whose spool's reserve is six sevenths of what is free now, and how large a file makes that too little.

    Room is taken again when there is an eighth more than the reserve: a little less than what is free now.
    """
    free = shutil.disk_usage(tmp_path).free
    reserve = int(free * 0.86)
    environ = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_ACCESS_KEY"))}
    overlay = {"gateway": {"spool": {"reserve_bytes": reserve}}}
    with Stack(tmp_path / "state", overlay=overlay, environ=environ) as stack:
        yield stack, tmp_path / "filling", int(free * 0.15)


def test_full_spool_disk_refuses_new_calls_and_takes_them_again_when_there_is_room(
    nearly_full: tuple[Stack, Path, int],
) -> None:
    stack, filling, size = nearly_full
    headers = {"authorization": f"Bearer {stack.key}", "x-tenant-id": stack.tenant}
    with httpx.Client(base_url=stack.url, verify=stack.tls(), headers=headers, timeout=60) as client:

        def call() -> httpx.Response:
            return client.post("/v1/chat/completions", json=chat("tokens=2"))

        def codes() -> set[str]:
            answers = [call() for _ in range(6)]
            return {"" if answer.is_success else answer.json()["error"]["code"] for answer in answers}

        until(lambda: codes() == {""})
        body = chat("tokens=60 chunk_ms=50", stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as under_way:
            lines = under_way.iter_lines()
            next(lines)
            with filling.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            until(lambda: codes() == {"ledger_unavailable"})
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert httpx.get(stack.replicas[0].url + "/health/live", timeout=60).status_code == 200
        filling.unlink()
        until(lambda: codes() == {""})


# --- streams and clients ----------------------------------------------------------------------------------------------


def test_cut_streams_end_in_one_error_event_and_leave_their_rows(whole: Journey) -> None:
    for vendor in ("openai", "openrouter"):
        whole.fault(vendor, kind="cut", after_chunks=6, probability=0.5)
    with Traffic(whole, prompt="tokens=30", stream=True) as traffic:
        running(traffic, 200)
    assert traffic.outcomes() == {"whole", "error event"}
    rows = whole.rows([call.request_id for call in traffic.calls])
    wrong = [
        (call.outcome, rows[call.request_id]["status"])
        for call in traffic.calls
        if (call.outcome == "whole") != (rows[call.request_id]["status"] == "success")
    ]
    assert wrong == []


@pytest.mark.parametrize("part", ["headers", "body"])
def test_slow_loris_takes_nothing_from_others(whole: Journey, part: str) -> None:
    """Clients that send a byte at a time hold their connections; calls of others are as fast as ever."""
    host, port = "127.0.0.1", whole.stack.port
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n"
    if part == "body":
        lines = "".join(f"{name}: {value}\r\n" for name, value in whole.headers().items())
        head += f"{lines}content-type: application/json\r\ncontent-length: 100000\r\n\r\n{{"
    context = whole.stack.tls()
    with contextlib.ExitStack() as connections:
        held: list[ssl.SSLSocket] = []
        for _ in range(LORIS):
            plain = connections.enter_context(socket.create_connection((host, port), timeout=10))
            connection = connections.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
            connection.sendall(head.encode())
            held.append(connection)
        with Traffic(whole, clients=4) as traffic:
            for _ in range(20):
                for connection in held:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"x")
                running(traffic, 10)
        assert traffic.outcomes() == {"whole"}
        assert p95(traffic.calls) < 2
    until(lambda: all(whole.admin("/status", n).json()["in_flight"] == 0 for n in range(2)), 60)


def test_readers_that_do_not_read_hold_no_memory(whole: Journey) -> None:
    def memory() -> int:
        pids = [replica.pid for replica in whole.stack.replicas]
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
        return sum(int(text.partition("VmRSS:")[2].split()[0]) * 1024 for text in texts)

    before = memory()
    with contextlib.ExitStack() as held:
        for _ in range(40):
            client = held.enter_context(httpx.Client(base_url=whole.stack.url, verify=whole.stack.tls(), timeout=60))
            held.enter_context(whole.stream(chat("tokens=20000"), client))
        with Traffic(whole, clients=4) as traffic:
            running(traffic, 100)
        grown = memory() - before
    assert traffic.outcomes() == {"whole"}
    assert grown < 150_000_000


# --- overload -------------------------------------------------------------------------------------------------------


def test_the_least_urgent_are_refused_within_50_ms_and_health_stays_green() -> None:
    """A replica on a core of its own, asked for twice what it can do; on a machine that does nothing else."""
    ran = subprocess.run([sys.executable, "-m", "loadtest.shedding"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
