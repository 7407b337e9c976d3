"""What the tests of the simulator share: requests, admin calls, and a socket to be rude with."""

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

DEADLINE_SECONDS = 60
# All is plain HTTP: reading the machine's CA bundle for every call would be most of the suite's time.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def http(method: str, url: str, **options: Any) -> httpx.Response:
    """One request on a connection of its own."""
    return httpx.request(method, url, timeout=DEADLINE_SECONDS, verify=_NO_TLS, **options)


def say(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **fields}


def put_fault(url: str, vendor: str = "openai", **fault: Any) -> None:
    http("PUT", f"{url}/_sim/faults/{vendor}", json=fault).raise_for_status()


def post(url: str, vendor: str = "openai", **request: Any) -> httpx.Response:
    headers = {"authorization": "Bearer any-key"}
    return http("POST", f"{url}/{vendor}/v1/chat/completions", json=request, headers=headers)


def counts(url: str, vendor: str = "openai") -> dict[str, Any]:
    return http("GET", f"{url}/_sim/counts").json()[vendor]


def eventually(holds: Callable[[], bool]) -> None:
    """Poll until the condition holds; fails after the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


@contextlib.contextmanager
def raw(url: str, request: dict[str, Any] | bytes) -> Iterator[socket.socket]:
    """A TCP connection on which one request has been sent."""
    host, port = url.removeprefix("http://").split(":")
    if isinstance(request, dict):
        body = json.dumps(request).encode()
        head = f"POST /openai/v1/chat/completions HTTP/1.1\r\nauthorization: Bearer k\r\ncontent-length: {len(body)}"
        request = head.encode() + b"\r\n\r\n" + body
    with socket.create_connection((host, int(port)), timeout=DEADLINE_SECONDS) as connection:
        connection.sendall(request)
        yield connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    seen = b""
    while mark not in seen:
        part = connection.recv(65536)
        assert part, f"the connection ended before {mark!r}: {seen!r}"
        seen += part
    return seen
