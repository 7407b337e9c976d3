"""The HTTP server by raw sockets: framing, order, bounds, hang-ups, and how it closes."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import uvloop
from litestar.types import Receive, Scope, Send

import app.visits
from app.ambient import Ambient
from app.server import Server
from app.visits import MAX_HEAD_BYTES, Visit

BODY = b'{"ok":true}'
LENGTH = (b"content-length", b"%d" % len(BODY))
MUCH = b"x" * 65_536


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application: answers with what it was sent, and how it understood it."""
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message["body"]
    said = b"%b %b ? %b : %b" % (scope["method"].encode(), scope["path"].encode(), scope["query_string"], body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Seen", b"1")]})
    await send({"type": "http.response.body", "body": said[:4], "more_body": True})
    await send({"type": "http.response.body", "body": said[4:]})


class Calls:
    """Handlers of calls, and what they met."""

    def __init__(self) -> None:
        self.hung_up = threading.Event()
        self.unread = threading.Event()

    async def whole(self, visit: Visit) -> None:
        """Answers with the header that `x-want` holds (`name=value`)."""
        headers = dict(visit.raw_headers)
        while visit.at_once() is None and (await visit.receive()).get("more_body"):
            pass
        name, _, value = headers.get(b"x-want", b"x-plain=1").partition(b"=")
        value = value.replace(b"%0A", b"\n").replace(b"%0D", b"\r")
        visit.whole(200, [LENGTH, (name, value)], BODY)

    async def stream(self, visit: Visit) -> None:
        visit.start(200, [(b"content-type", b"text/event-stream")])
        for part in (b"one", b"", b"two"):
            visit.write(part)
            await asyncio.sleep(0)
        visit.end()

    async def endless(self, visit: Visit) -> None:
        visit.on_hang_up = self.hung_up.set
        visit.start(200, [])
        while not visit.gone:
            visit.write(MUCH)
            if visit.blocked:
                self.unread.set()
            await visit.drained()
            await asyncio.sleep(0)

    async def silent(self, visit: Visit) -> None:
        gone = asyncio.Event()
        visit.on_hang_up = gone.set
        await gone.wait()
        self.hung_up.set()

    async def refuses(self, visit: Visit) -> None:
        visit.whole(int(dict(visit.raw_headers).get(b"x-status", b"401")), [LENGTH], BODY)

    async def fails(self, visit: Visit) -> None:
        raise RuntimeError("a defect")

    async def breaks(self, visit: Visit) -> None:
        visit.start(200, [])
        visit.write(b"one")
        raise RuntimeError("a defect")

    async def short(self, visit: Visit) -> None:
        visit.start(200, [(b"content-length", b"5")])
        visit.write(b"one")
        visit.end()


class Running:
    """A server on a loop in a thread of its own."""

    def __init__(self, calls: Calls) -> None:
        self.loop = uvloop.new_event_loop()
        names = ("whole", "stream", "endless", "silent", "refuses", "fails", "breaks", "short")
        self.server = Server(
            echo, "127.0.0.1", 0, Ambient(), {b"/" + name.encode(): getattr(calls, name) for name in names}
        )
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.run(self.server.start())

    def run(self, work: Awaitable[None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def call(self, work: Callable[[], None]) -> None:
        async def whole() -> None:
            work()

        self.run(whole())

    def stop(self) -> None:
        self.call(self.server.abort)
        self.run(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def running(calls: Calls) -> Iterator[Running]:
    running = Running(calls)
    yield running
    running.stop()


class Caller:
    """One connection of a client."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def say(self, data: bytes, answers: int = 1) -> bytes:
        """Sends `data`, and returns what comes until `answers` bodies are there, or the connection ends."""
        self.connection.sendall(data)
        return self.until(lambda got: got.count(BODY) >= answers)

    def until(self, enough: Callable[[bytes], bool]) -> bytes:
        got = b""
        while not enough(got) and (part := self.packet()):
            got += part
        return got

    def rest(self) -> bytes:
        """What comes until the connection is closed."""
        return self.until(lambda _: False)

    def packet(self) -> bytes:
        """What one read gives; nothing when the connection is closed."""
        return self.connection.recv(65_536)


@pytest.fixture
def caller(running: Running) -> Iterator[Caller]:
    with socket.create_connection(running.server.address, timeout=60) as connection:
        yield Caller(connection)


def request(target: str = "/whole", *lines: str, version: str = "1.1", method: str = "POST", body: str = "{}") -> bytes:
    head = [f"{method} {target} HTTP/{version}", "host: gateway", f"content-length: {len(body)}", *lines]
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


# --- answers ----------------------------------------------------------------------------------------------------------


def test_head_and_body_of_a_whole_answer_are_one_packet(caller: Caller) -> None:
    caller.connection.sendall(request("/whole", "x-want: x-a=1"))
    assert caller.packet() == b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\nx-a: 1\r\n\r\n" + BODY


def test_a_stream_is_sent_in_chunks_and_the_connection_kept(caller: Caller) -> None:
    caller.connection.sendall(request("/stream"))
    got = caller.until(lambda got: got.endswith(b"0\r\n\r\n"))
    assert got.partition(b"\r\n\r\n")[2] == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    assert BODY in caller.say(request())


def test_a_stream_to_a_client_of_http_1_0_ends_with_its_connection(caller: Caller) -> None:
    caller.connection.sendall(request("/stream", version="1.0"))
    head, _, body = caller.rest().partition(b"\r\n\r\n")
    assert (b"chunked" in head, body) == (False, b"onetwo")


def test_a_connection_takes_one_call_after_another(caller: Caller) -> None:
    assert [caller.say(request("/whole", f"x-want: x-n={n}")).count(b"x-n: %d" % n) for n in range(3)] == [1, 1, 1]


def test_calls_sent_at_once_are_answered_in_order(caller: Caller) -> None:
    got = caller.say(b"".join(request("/whole", f"x-want: x-n={n}") for n in range(20)), answers=20)
    assert [got.index(b"x-n: %d\r" % n) for n in range(20)] == sorted(got.index(b"x-n: %d\r" % n) for n in range(20))


def test_an_answer_may_close_its_connection(caller: Caller) -> None:
    assert b"\r\nconnection: close\r\n" in caller.say(request("/whole", "x-want: connection=close"))
    assert caller.packet() == b""


@pytest.mark.parametrize(("lines", "version"), [(["connection: close"], "1.1"), ([], "1.0")])
def test_a_client_that_wants_no_second_call_gets_its_end(caller: Caller, lines: list[str], version: str) -> None:
    assert caller.say(request("/whole", *lines, version=version)).count(b"\r\nconnection: close\r\n") == 1
    assert caller.packet() == b""


@pytest.mark.parametrize("value", ["a%0Ab", "a%0Db", "a%0D%0Ax-forged:1"])
def test_a_header_with_a_line_break_is_not_sent(caller: Caller, value: str) -> None:
    caller.connection.sendall(request("/whole", f"x-want: x-a={value}"))
    got = caller.rest()
    assert got.startswith(b"HTTP/1.1 500 ")
    assert b"forged" not in got


def test_a_status_without_a_name_is_sent_all_the_same(caller: Caller) -> None:
    assert caller.say(request("/refuses", "x-status: 499")).startswith(b"HTTP/1.1 499 \r\n")


def test_a_defect_is_answered_500_and_ends_the_connection(caller: Caller) -> None:
    caller.connection.sendall(request("/fails"))
    got = caller.rest()
    assert got.startswith(b"HTTP/1.1 500 ")
    assert b'"code":"internal_error"' in got


@pytest.mark.parametrize("path", ["/breaks", "/short"])
def test_an_answer_that_cannot_be_ended_breaks_its_connection(caller: Caller, path: str) -> None:
    caller.connection.sendall(request(path))
    got = caller.rest()
    assert b"one" in got
    assert b"0\r\n\r\n" not in got


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_may_come_byte_by_byte(caller: Caller) -> None:
    for byte in request():
        caller.connection.sendall(bytes([byte]))
    assert BODY in caller.say(b"")


def test_a_body_larger_than_what_is_buffered_arrives_whole(caller: Caller) -> None:
    body = "0123456789" * 100_000
    caller.connection.sendall(request("/echo", body=body))
    got = caller.until(lambda got: got.endswith(b"0\r\n\r\n"))
    assert len(got) > len(body)
    assert got.count(b"0123456789") >= 99_990


def test_a_body_in_chunks_is_read(caller: Caller) -> None:
    head = b"POST /echo?a=b#c HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\n\r\n"
    caller.connection.sendall(head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    got = caller.until(lambda got: got.endswith(b"0\r\n\r\n"))
    assert b"? a=b : abcde" in got


def test_of_a_header_that_is_written_twice_the_first_counts(caller: Caller) -> None:
    got = caller.say(request("/whole", "x-want: x-a=1", "x-want: x-a=2"))
    assert b"\r\nx-a: 1\r\n" in got


def test_a_trailer_is_no_header(caller: Caller) -> None:
    head = b"POST /whole HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\ntrailer: x-want\r\n\r\n"
    got = caller.say(head + b"2\r\n{}\r\n0\r\nx-want: x-forged=1\r\n\r\n")
    assert (BODY in got, b"forged" in got) == (True, False)
    assert b"x-plain" in caller.say(request("/whole"))  # nor one of the next request


def test_a_trailer_without_end_is_refused(caller: Caller) -> None:
    """The parser keeps it until it is complete: 50 MB of one held the event loop for a minute."""
    head = b"POST /refuses HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\n\r\n"
    assert b" 401 " in caller.say(head + b"2\r\n{}\r\n0\r\nx: ")
    for _ in range(MAX_HEAD_BYTES // 8192):
        caller.connection.sendall(b"a" * 8192)
    caller.connection.sendall(b"a")  # which is beyond
    assert caller.rest().startswith(b"HTTP/1.1 413 ")


def test_a_body_in_many_chunks_is_read_though_they_take_more_bytes_than_a_head_may(caller: Caller) -> None:
    head = b"POST /whole HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\n\r\n"
    assert BODY in caller.say(head + b"1\r\na\r\n" * MAX_HEAD_BYTES + b"0\r\n\r\n")
    assert BODY in caller.say(request("/whole"))


def test_a_client_that_waits_for_100_continue_is_told(caller: Caller) -> None:
    head, _, body = request("/echo", "expect: 100-continue").partition(b"\r\n\r\n")
    caller.connection.sendall(head + b"\r\n\r\n")
    assert caller.packet() == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.connection.sendall(body)
    assert b": {}" in caller.until(lambda got: got.endswith(b"0\r\n\r\n"))


def test_a_refusal_does_not_wait_for_the_body_and_the_next_call_is_served(caller: Caller) -> None:
    sent = request("/refuses", body="x" * 200_000)
    assert b"401" in caller.say(sent[:1000])
    assert b"200 OK" in caller.say(sent[1000:] + request())


@pytest.mark.parametrize(
    ("target", "seen"),
    [
        ("/a%20b?x=1", b"POST /a b ? x=1 : {}"),
        ("http://gateway/a?x=1", b"POST /a ? x=1 : {}"),
        ("http://gateway", b"POST / ?  : {}"),
    ],
)
def test_other_routes_are_the_applications(caller: Caller, target: str, seen: bytes) -> None:
    caller.connection.sendall(request(target))
    got = caller.until(lambda got: got.endswith(b"0\r\n\r\n"))
    assert b"\r\nx-seen: 1\r\n" in got
    assert b"%x\r\n%b\r\n" % (len(seen) - 4, seen[4:]) in got


def test_a_query_does_not_hide_a_call(caller: Caller) -> None:
    assert BODY in caller.say(request("/whole?a=b"))


def test_an_answer_to_head_has_no_body(caller: Caller) -> None:
    caller.connection.sendall(request("/echo", method="HEAD", body="") + request())
    got = caller.until(lambda got: BODY in got)
    assert b"HEAD" not in got


def test_a_refusal_of_head_has_no_body(caller: Caller) -> None:
    caller.connection.sendall(request("/refuses", method="HEAD", body="") + request("/stream"))
    got = caller.until(lambda got: got.endswith(b"0\r\n\r\n"))
    assert got.startswith(b"HTTP/1.1 401 ")
    assert BODY not in got


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\nhost : a\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_request_is_answered_400_and_the_connection_ends(caller: Caller, data: bytes) -> None:
    caller.connection.sendall(data)
    got = caller.rest()
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_request"' in got


def test_both_a_length_and_chunks_are_no_request(caller: Caller) -> None:
    caller.connection.sendall(request("/whole", "transfer-encoding: chunked"))
    assert caller.rest().startswith(b"HTTP/1.1 400 ")


def test_what_is_no_request_waits_for_the_answer_before_it(caller: Caller) -> None:
    caller.connection.sendall(request("/stream") + b"\x00\x01")
    got = caller.rest()
    assert got.startswith(b"HTTP/1.1 200 ")
    assert got.endswith(b"3\r\ntwo\r\n0\r\n\r\n")


def test_an_upgrade_is_not_taken_and_the_request_served(caller: Caller) -> None:
    assert BODY in caller.say(request("/whole", "connection: upgrade", "upgrade: h2c"))
    assert caller.rest() == b""


def test_a_head_without_end_is_refused(caller: Caller) -> None:
    caller.connection.sendall(b"GET / HTTP/1.1\r\n")
    for _ in range(MAX_HEAD_BYTES // 8192):  # the last one is beyond
        caller.connection.sendall(b"x-long: %b\r\n" % (b"x" * 8192))
    assert caller.rest().startswith(b"HTTP/1.1 413 ")


# --- clients that go, or do not read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/silent", "/endless"])
def test_a_hang_up_is_told_at_once(running: Running, calls: Calls, path: str) -> None:
    with closing(socket.create_connection(running.server.address, timeout=60)) as connection:
        connection.sendall(request(path))
        if path == "/endless":
            connection.recv(1)
    assert calls.hung_up.wait(60)


def test_a_client_that_does_not_read_is_waited_for(caller: Caller, calls: Calls) -> None:
    caller.connection.sendall(request("/endless"))
    assert calls.unread.wait(60)
    assert not calls.hung_up.is_set()
    assert len(caller.packet()) > 0


def test_leaving_after_the_answer_is_no_hang_up(running: Running, calls: Calls) -> None:
    with closing(socket.create_connection(running.server.address, timeout=60)) as connection:
        Caller(connection).say(request())
    running.run(running.server.close())
    assert not calls.hung_up.is_set()


def test_idle_connections_are_swept(caller: Caller, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BODY in caller.say(request())
    monkeypatch.setattr(app.visits, "IDLE_SECONDS", 0.0)
    running.call(running.server.sweep)
    assert caller.packet() == b""


def test_a_head_that_does_not_end_is_swept(caller: Caller, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BODY in caller.say(request() + b"GET / HTTP/1.1\r\n")
    monkeypatch.setattr(app.visits, "IDLE_SECONDS", 0.0)
    running.call(running.server.sweep)
    assert caller.packet() == b""


def test_a_call_under_way_is_not_swept(caller: Caller, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.visits, "IDLE_SECONDS", 0.0)
    caller.connection.sendall(request("/endless"))
    first = caller.packet()
    running.call(running.server.sweep)
    assert first
    assert caller.until(lambda got: len(got) > 5_000_000)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_closing_server_ends_idle_connections_and_waits_for_visits(running: Running, calls: Calls) -> None:
    address = running.server.address
    with socket.create_connection(address, timeout=60) as idle, socket.create_connection(address, timeout=10) as busy:
        Caller(idle).say(request())
        busy.sendall(request("/endless"))
        busy.recv(1)
        ending = asyncio.run_coroutine_threadsafe(running.server.close(), running.loop)
        assert idle.recv(1) == b""
        assert not ending.done()
    ending.result(10)
    assert calls.hung_up.is_set()


def test_a_closing_server_takes_no_connection(running: Running) -> None:
    address = running.server.address
    running.run(running.server.close())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=60)


def test_an_answer_of_a_closing_server_says_that_it_is_the_last(caller: Caller, running: Running) -> None:
    caller.connection.sendall(request("/whole", "expect: 100-continue")[:-2])
    assert b" 100 " in caller.packet()  # it is being served
    ending = asyncio.run_coroutine_threadsafe(running.server.close(), running.loop)
    running.call(lambda: None)
    assert b"\r\nconnection: close\r\n" in caller.say(b"{}")
    assert caller.packet() == b""
    ending.result(10)


def test_a_port_that_is_taken_is_named(running: Running) -> None:
    host, port = running.server.address

    async def second() -> None:
        await Server(echo, host, port, Ambient()).start()

    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        running.run(second())


@pytest.mark.parametrize(("calls", "warned"), [(100, False), (900, True)])
def test_a_replica_takes_the_files_that_its_calls_need_or_says_how_many_it_lacks(calls: int, warned: bool) -> None:
    asked = f"import resource; from app.asgi import take_files; take_files({calls}); "
    asked += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    limited = ["sh", "-c", f'ulimit -Sn 256 && ulimit -Hn 1000 && exec "{sys.executable}" -c "{asked}"']
    done = subprocess.run(
        limited, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["1000", "1000"]
    assert ("1000 files may be open, and 900 calls at once" in done.stderr) is warned
