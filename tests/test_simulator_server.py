"""What the vendor simulator counts and keeps, the HTTP that it reads, and how it is started."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.simulator.inprocess import running
from tests.simulation import DEADLINE_SECONDS, counts, eventually, http, post, put_fault, raw, read_until, say

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    """The simulator without faults and without memory of earlier tests."""
    http("DELETE", f"{server}/_sim/faults").raise_for_status()
    http("DELETE", f"{server}/_sim/requests").raise_for_status()
    return server


# Counts


@pytest.mark.parametrize(
    "request_",
    [
        say("tokens=1000 chunk_ms=1000", stream=True),
        say("latency_ms=3600000"),
        say("latency_ms=3600000", stream=True),
    ],
    ids=["paced stream", "unary", "stream before its first byte"],
)
def test_a_hang_up_is_noticed_and_counted(url: str, request_: dict[str, Any]) -> None:
    with raw(url, request_):
        eventually(lambda: counts(url)["open"] == 1)
        assert counts(url)["aborted"] == 0
    eventually(lambda: counts(url)["aborted"] == 1)
    assert (counts(url)["open"], counts(url)["completed"]) == (0, 0)


def test_a_hang_up_by_reset_is_noticed(url: str) -> None:
    with raw(url, say("latency_ms=3600000")) as connection:
        eventually(lambda: counts(url)["open"] == 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: counts(url)["aborted"] == 1)


def test_a_client_that_does_not_read_is_waited_for_and_can_hang_up(url: str) -> None:
    with raw(url, say("tokens=99999", stream=True)):
        eventually(lambda: counts(url)["open"] == 1)
    eventually(lambda: counts(url)["aborted"] == 1)


def test_leaving_after_the_answer_is_not_a_hang_up(url: str) -> None:
    with raw(url, say("x", stream=True)) as connection:
        read_until(connection, b"\r\n0\r\n\r\n")
    eventually(lambda: counts(url)["open"] == 0)
    assert (counts(url)["completed"], counts(url)["aborted"]) == (1, 0)


def test_every_request_is_counted_once_by_how_it_ended(url: str) -> None:
    post(url, **say("x"))
    post(url, **say("x", model="none-such"))
    put_fault(url, kind="cut", times=1)
    with pytest.raises(httpx.RemoteProtocolError):
        post(url, **say("x", stream=True))
    put_fault(url, kind="hang")
    with raw(url, say("x")):
        eventually(lambda: counts(url)["open"] == 1)
    eventually(lambda: counts(url)["open"] == 0)
    assert counts(url) == {
        "requests": 4,
        "streams": 1,
        "completed": 2,
        "aborted": 1,
        "broken": 1,
        "refused": 0,
        "open": 0,
        "by_path": {"POST /v1/chat/completions": {"200": 2, "404": 1, "none": 1}},
    }


def test_requests_are_kept_as_they_came(url: str) -> None:
    post(url, **say("remember me"))
    (kept,) = http("GET", f"{url}/_sim/requests", params={"vendor": "openai"}).json()
    assert (kept["method"], kept["path"], kept["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (kept["body"], kept["headers"]["authorization"]) == (say("remember me"), "Bearer any-key")


def test_a_kept_request_says_when_its_client_hung_up(url: str) -> None:
    with raw(url, say("latency_ms=3600000")):
        eventually(lambda: counts(url)["open"] == 1)
    eventually(lambda: counts(url)["aborted"] == 1)
    (kept,) = http("GET", f"{url}/_sim/requests").json()
    assert kept["hung_up_ms"] >= kept["received_ms"]


def test_only_the_last_200_requests_are_kept(url: str) -> None:
    for _ in range(205):
        http("GET", f"{url}/openai/v1/models")
    assert len(http("GET", f"{url}/_sim/requests").json()) == 200


def test_deleting_the_requests_resets_the_counts(url: str) -> None:
    post(url, **say("x"))
    http("DELETE", f"{url}/_sim/requests").raise_for_status()
    assert (counts(url)["requests"], http("GET", f"{url}/_sim/requests").json()) == (0, [])


def test_an_unknown_admin_call_is_not_found(url: str) -> None:
    assert http("GET", f"{url}/_sim/nothing").status_code == 404


# HTTP


def request_bytes(body: bytes, *headers: str) -> bytes:
    lines = ["POST /openai/v1/chat/completions HTTP/1.1", "host: x", "authorization: Bearer k", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_a_request_may_come_byte_by_byte(url: str) -> None:
    body = json.dumps(say("x")).encode()
    with raw(url, b"") as connection:
        for byte in request_bytes(body, f"content-length: {len(body)}"):
            connection.sendall(bytes([byte]))
        assert read_until(connection, b'"usage"').startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_request_may_be_chunked(url: str) -> None:
    body = json.dumps(say("x")).encode()
    chunked = b"5\r\n%b\r\n%x;note=1\r\n%b\r\n0\r\ntrailer: y\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    with raw(url, request_bytes(chunked, "transfer-encoding: chunked")) as connection:
        assert read_until(connection, b'"usage"').startswith(b"HTTP/1.1 200 OK\r\n")


def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    bodies = [json.dumps(say(f"tokens={count}")).encode() for count in (3, 4)]
    both = b"".join(request_bytes(body, f"content-length: {len(body)}") for body in bodies)
    with raw(url, both) as connection:
        seen = read_until(connection, b'"completion_tokens": 4,')
    assert seen.index(b'"completion_tokens": 3,') < seen.index(b'"completion_tokens": 4,')


def test_a_large_upload_is_told_to_continue(url: str) -> None:
    with raw(url, request_bytes(b"", "content-length: 2", "expect: 100-continue")) as connection:
        assert read_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_connection_close_is_obeyed(url: str) -> None:
    with raw(url, request_bytes(b"{}", "content-length: 2", "connection: close")) as connection:
        seen = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"connection: close\r\n" in seen


@pytest.mark.parametrize("request_", [b"nonsense\r\n\r\n", request_bytes(b"", "content-length: x")])
def test_bytes_that_are_not_http_get_a_400(url: str, request_: bytes) -> None:
    with raw(url, request_) as connection:
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 400 ")


# The command


def started(tmp_path: Path, *options: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    ready = tmp_path / "ready.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.simulator", "--port", "0", "--ready-file", str(ready), *options],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    eventually(ready.exists)
    document = json.loads(ready.read_text())
    assert document["pid"] == process.pid
    return process, document["url"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_stops_on_a_signal_although_a_stream_is_open(tmp_path: Path, number: signal.Signals) -> None:
    process, url = started(tmp_path)
    with raw(url, say("tokens=1000 chunk_ms=1000", stream=True)) as connection:
        read_until(connection, b"data: ")
        process.send_signal(number)
        assert process.wait(DEADLINE_SECONDS) == 0


def test_the_command_can_insist_on_a_key(tmp_path: Path) -> None:
    process, url = started(tmp_path, "--api-key-env", "SIMULATED_KEY", SIMULATED_KEY="the-key")
    models = f"{url}/openai/v1/models"
    statuses = [
        http("GET", models, headers={"authorization": f"Bearer {key}"}).status_code for key in ("the-key", "another")
    ]
    process.terminate()
    process.wait(DEADLINE_SECONDS)
    assert statuses == [200, 401]


def test_a_port_in_use_is_a_sentence(url: str) -> None:
    command = [sys.executable, "-m", "loadtest.simulator", "--port", url.rpartition(":")[2]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert (done.returncode, "in use" in done.stderr.lower(), "Traceback" in done.stderr) == (1, True, False)
