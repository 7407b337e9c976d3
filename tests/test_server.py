"""Answers that leave in one write, by raw sockets against the real server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
from litestar.types import Receive, Scope, Send

from app.server import send_whole, server

BODY = b'{"ok":true}'
LENGTH = (b"content-length", b"%d" % len(BODY))


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the query as one more header, and with the way of ASGI where that is asked for."""
    name, _, value = scope["query_string"].partition(b"=")
    headers = [LENGTH, (name or b"x-plain", value.replace(b"%0A", b"\n").replace(b"%0D", b"\r"))]
    while (await receive()).get("more_body"):
        pass
    if not send_whole(scope, 200, headers, BODY):
        raise AssertionError("an open connection takes a whole answer")
    assert not send_whole(scope, 200, headers, BODY)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """A server in a thread of its own."""
    listening = socket.create_server(("127.0.0.1", 0))
    uvicorn = server(answering, *listening.getsockname())
    uvicorn.install_signal_handlers = lambda: None
    thread = threading.Thread(target=lambda: asyncio.run(uvicorn.serve(sockets=[listening])))
    thread.start()
    yield listening.getsockname()
    uvicorn.should_exit = True
    thread.join(10)


class Caller:
    """One connection of a client."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def say(self, data: bytes, answers: int = 1) -> bytes:
        """Sends `data`, and returns what comes until `answers` bodies are there."""
        self.connection.sendall(data)
        got = b""
        while got.count(BODY) < answers and (part := self.packet()):
            got += part
        return got

    def packet(self) -> bytes:
        """What one read gives; nothing when the connection is closed."""
        return self.connection.recv(65_536)


@pytest.fixture
def caller(address: tuple[str, int]) -> Iterator[Caller]:
    with socket.create_connection(address, timeout=10) as connection:
        yield Caller(connection)


def request(query: str = "", more: str = "", version: str = "1.1") -> bytes:
    return f"POST /?{query} HTTP/{version}\r\nhost: gateway\r\ncontent-length: 2\r\n{more}\r\n{{}}".encode()


def test_head_and_body_are_one_packet(caller: Caller) -> None:
    caller.connection.sendall(request("x-a=1"))
    assert caller.packet() == (b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\nx-a: 1\r\n\r\n" + BODY)


def test_a_connection_takes_one_call_after_another(caller: Caller) -> None:
    assert [caller.say(request(f"x-n={n}")).count(b"x-n: %d" % n) for n in range(3)] == [1, 1, 1]


def test_calls_sent_at_once_are_answered_in_order(caller: Caller) -> None:
    got = caller.say(b"".join(request(f"x-n={n}") for n in range(3)), answers=3)
    places = [got.index(b"x-n: %d" % n) for n in range(3)]
    assert places == sorted(places)


def test_an_answer_may_close_its_connection(caller: Caller) -> None:
    assert b"\r\nconnection: close\r\n" in caller.say(request("connection=close"))
    assert caller.packet() == b""


@pytest.mark.parametrize(("more", "version"), [("connection: close\r\n", "1.1"), ("", "1.0")])
def test_a_client_that_wants_no_second_call_gets_its_end(caller: Caller, more: str, version: str) -> None:
    assert caller.say(request(more=more, version=version)).count(b"\r\nconnection: close\r\n") == 1
    assert caller.packet() == b""


@pytest.mark.parametrize("value", ["a%0Ab", "a%0Db", "a%0D%0Ax-forged: 1"])
def test_a_header_with_a_line_break_is_not_sent(caller: Caller, value: str) -> None:
    caller.connection.sendall(request(f"x-a={value}".replace(" ", "")))
    got = caller.packet()
    assert got.startswith(b"HTTP/1.1 500 ")
    assert b"forged" not in got
