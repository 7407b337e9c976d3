"""Both engines against vendors of bare sockets: framing, reuse, every way to fail, cancelling, backpressure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Iterator

import httpx
import msgspec
import pytest
import trustme
import uvloop

from app.ambient import Ambient
from app.errors import VendorBroke, VendorError, VendorUnreachable
from app.http1 import HEAD_BYTES, IDLE_SECONDS, LARGE_BYTES, LINGER_SECONDS, Http1
from app.providers.translator import Outgoing
from app.upstream import Engine, engine
from app.upstream_httpx import FAILURES, Httpx
from tests.vendors import Behaviour, Peer, accepting_nobody, until, vendor

CONNECT_SECONDS = 5.0
CA = trustme.CA()

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nx-request-id: r-1\r\n"
HELLO = OK + b"content-length: 5\r\n\r\nhello"

Scenario = Callable[[Engine], Awaitable[None]]
Run = Callable[[Scenario], None]


class Clock(Ambient):
    """A monotonic clock that the test moves."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


def trusting() -> ssl.SSLContext:
    context = httpx.create_ssl_context()
    CA.configure_trust(context)
    return context


def serving(name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(name).configure_cert(context)
    return context


def on(loop: Callable[[], asyncio.AbstractEventLoop], make: Callable[[], Engine]) -> Run:
    def run(scenario: Scenario) -> None:
        async def whole() -> None:
            made = make()
            try:
                async with asyncio.timeout(90):
                    await scenario(made)
            finally:
                await made.close()

        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(whole())

    return run


def http1() -> Http1:
    return Http1(trusting(), Clock())


RUNS = {
    "http1": on(uvloop.new_event_loop, http1),
    "http1-asyncio": on(asyncio.new_event_loop, http1),
    "httpx": on(uvloop.new_event_loop, lambda: Httpx(trusting())),
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


@pytest.fixture(params=["http1", "http1-asyncio"])
def run_http1(request: pytest.FixtureRequest) -> Run:
    """For what the default engine alone promises."""
    return RUNS[request.param]


def saying(*parts: bytes, times: int = 1_000) -> Behaviour:
    """A vendor that answers each request with these bytes."""

    async def behaviour(peer: Peer) -> None:
        for _ in range(times):
            await peer.request()
            await peer.send(*parts)

    return behaviour


def once(*parts: bytes) -> Behaviour:
    """A vendor that answers one request, then closes."""
    return saying(*parts, times=1)


# --- framing ----------------------------------------------------------------------------------------------------------

FRAMINGS = {
    "content-length": HELLO,
    "chunked": OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
    "chunked with trailers": OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-request-id: other\r\n\r\n",
    "until the connection ends": OK + b"\r\nhello",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nx-request-id: r-1\r\n\r\nhello",
    "HTTP/1.0 with a length": b"HTTP/1.0 200 OK\r\nx-request-id: r-1\r\ncontent-length: 5\r\n\r\nhello",
    "after 100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO,
    "after 103 Early Hints": b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\nx-request-id: r-0\r\n\r\n" + HELLO,
    "header names in capitals": HELLO.replace(b"x-request-id", b"X-Request-ID"),
}


@pytest.mark.parametrize("answer", FRAMINGS.values(), ids=FRAMINGS)
def test_an_answer_is_read_whole(run: Run, answer: bytes) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(once(answer)) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            assert (got.status, got.headers.get("x-request-id")) == (200, "r-1")
            assert await got.read(5) == b"hello"
            assert await got.chunk() is None
            await got.close()

    run(scenario)


@pytest.mark.parametrize("answer", FRAMINGS.values(), ids=FRAMINGS)
def test_an_answer_that_arrives_byte_by_byte_is_read_whole(run: Run, answer: bytes) -> None:
    async def behaviour(peer: Peer) -> None:
        peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await peer.request()
        for byte in answer:
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)

    async def scenario(upstream: Engine) -> None:
        async with vendor(behaviour) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            assert await got.read(5) == b"hello"
            await got.close()

    run(scenario)


def test_an_answer_without_a_body_is_empty(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(once(b"HTTP/1.1 204 No Content\r\n\r\n")) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            assert (got.status, await got.read(0)) == (204, b"")
            await got.close()

    run(scenario)


def test_a_chunk_is_delivered_before_the_vendor_sends_the_next(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        received = asyncio.Event()

        async def behaviour(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK, b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n")
            await received.wait()
            await peer.send(b"3\r\ntwo\r\n0\r\n\r\n")

        async with vendor(behaviour) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            assert await got.chunk() == b"one"
            received.set()
            assert [await got.chunk(), await got.chunk()] == [b"two", None]
            await got.close()

    run(scenario)


def test_what_arrives_is_given_out_at_once_until_that_is_enough(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        received = asyncio.Queue()

        async def behaviour(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK, b"transfer-encoding: chunked\r\n\r\n")
            for part in (b"one", b"two", b"six"):
                await peer.send(b"3\r\n%b\r\n" % part)
                assert await received.get() == part
            await peer.send(b"0\r\n\r\n")

        def until_two(part: bytes) -> bool:
            received.put_nowait(part)
            return part != b"two"

        async with vendor(behaviour) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            assert await got.pour(until_two)
            assert not await got.pour(until_two)
            assert await got.chunk() is None
            await got.close()

    run(scenario)


def test_what_the_taker_raises_is_raised_where_it_is_waited_for(run: Run) -> None:
    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK, b"content-length: 9\r\n\r\none")
        await peer.gone()

    def fails(part: bytes) -> bool:
        raise RuntimeError(part)

    async def scenario(upstream: Engine) -> None:
        async with vendor(behaviour) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            with pytest.raises(RuntimeError, match="one"):
                await got.pour(fails)
            await got.close()

    run(scenario)


def test_a_trailer_is_a_header_of_no_answer(run: Run) -> None:
    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK, b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-late: 1\r\n\r\n")
        await peer.request()
        await peer.send(HELLO)
        await peer.gone()

    async def scenario(upstream: Engine) -> None:
        async with vendor(behaviour) as at:
            for _ in range(2):
                got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
                assert await got.read(5) == b"hello"
                assert (got.headers.get("x-late"), got.headers.get("x-request-id")) == (None, "r-1")
                await got.close()
            assert len(at.peers) == 1

    run(scenario)


def test_a_redirect_is_an_answer_like_any_other(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        answer = b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n"
        async with vendor(saying(answer)) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            assert (got.status, got.headers["location"], len(at.requests)) == (307, "/elsewhere", 1)
            await got.close()

    run(scenario)


def test_an_answer_above_the_limit_is_broken(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            with pytest.raises(VendorBroke):
                await got.read(4)
            await got.close()

    run(scenario)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("size", [LARGE_BYTES - 1, LARGE_BYTES, 8_000_000])
def test_a_large_request_and_a_large_answer_pass(run: Run, size: int, encrypted: bool) -> None:
    async def scenario(upstream: Engine) -> None:
        async def behaviour(peer: Peer) -> None:
            _, body = await peer.request()
            await peer.send(OK, b"content-length: %d\r\n\r\n" % len(body), body)
            await peer.gone()

        body = os.urandom(size)
        async with vendor(behaviour, tls=serving("localhost") if encrypted else None, name="localhost") as at:
            got = await upstream.open(at.outgoing(body), CONNECT_SECONDS)
            assert await got.read(len(body)) == body
            await got.close()

    run(scenario)


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_request_holds_what_outgoing_says_and_framing(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        headers = (("authorization", "Bearer vendor-key"), ("content-type", "application/json"), ("accept", "a/b"))
        async with vendor(saying(HELLO)) as at:
            got = await upstream.open(at.outgoing(b'{"a":1}', headers, "/v1/chat?x=1"), CONNECT_SECONDS)
            await got.close()
            lines, body = at.requests[0]
            sent = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
            assert sent.pop("connection", "keep-alive") == "keep-alive"
            framing = {
                "host": at.origin.removeprefix("http://"),
                "content-length": "7",
                "accept-encoding": "identity",
            }
            assert lines[0] == "POST /v1/chat?x=1 HTTP/1.1"
            assert sent == dict(headers) | framing
            assert body == b'{"a":1}'

    run(scenario)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_another_method_than_post_is_sent_as_it_is_and_its_address_not_remembered(run: Run, method: str) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            asked = msgspec.structs.replace(at.outgoing(b"", (), "/v1/responses/resp_1"), method=method)
            got = await upstream.open(asked, CONNECT_SECONDS)
            assert await got.read(1_000) == b"hello"
            await got.close()
            assert at.requests[0][0][0] == f"{method} /v1/responses/resp_1 HTTP/1.1"
        assert not getattr(upstream, "_origins", None)

    run(scenario)


def test_a_cookie_of_the_vendor_is_not_sent_back(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(OK, b"set-cookie: a=b; Path=/\r\ncontent-length: 0\r\n\r\n")) as at:
            for _ in range(2):
                await (await upstream.open(at.outgoing(), CONNECT_SECONDS)).close()
            assert not any(line.lower().startswith("cookie") for lines, _ in at.requests for line in lines)

    run(scenario)


# --- reuse ------------------------------------------------------------------------------------------------------------


async def call(upstream: Engine, outgoing: object) -> bytes:
    got = await upstream.open(outgoing, CONNECT_SECONDS)
    try:
        return await got.read(1_000_000)
    finally:
        await got.close()


@pytest.mark.parametrize("framing", ["content-length", "chunked", "after 100 Continue"])
def test_a_connection_is_used_again(run: Run, framing: str) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(FRAMINGS[framing])) as at:
            for _ in range(3):
                assert await call(upstream, at.outgoing()) == b"hello"
            assert (len(at.peers), len(at.requests)) == (1, 3)

    run(scenario)


def test_calls_at_the_same_time_have_a_connection_each(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        everyone = asyncio.Barrier(8)

        async def behaviour(peer: Peer) -> None:
            while True:
                _, body = await peer.request()
                await everyone.wait()
                await peer.send(OK, b"content-length: 1\r\n\r\n", body)

        async with vendor(behaviour) as at:
            for _ in range(2):
                bodies = [b"%d" % number for number in range(8)]
                assert await asyncio.gather(*[call(upstream, at.outgoing(body)) for body in bodies]) == bodies
            assert len(at.peers) == 8

    run(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"connection: close\r\ncontent-length: 5\r\n\r\nhello",
        FRAMINGS["HTTP/1.0"],
        FRAMINGS["HTTP/1.0 with a length"],
        FRAMINGS["until the connection ends"],
    ],
)
def test_a_connection_that_the_vendor_will_not_keep_is_not_used_again(run: Run, answer: bytes) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(once(answer)) as at:
            for _ in range(2):
                assert await call(upstream, at.outgoing()) == b"hello"
            assert len(at.peers) == 2

    run(scenario)


def test_a_connection_with_an_unread_body_is_not_used_again(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(OK, b"content-length: 5\r\n\r\nhel")) as at:
            await (await upstream.open(at.outgoing(), CONNECT_SECONDS)).close()
            await until(lambda: at.ended == 1)
            await (await upstream.open(at.outgoing(), CONNECT_SECONDS)).close()
            assert len(at.peers) == 2

    run(scenario)


@pytest.mark.parametrize("extra", [b"x", HELLO, b"HTTP/1.1 200 OK\r\n"])
def test_bytes_after_the_answer_are_never_taken_for_an_answer(run_http1: Run, extra: bytes) -> None:
    async def scenario(upstream: Engine) -> None:
        answers = iter([HELLO + extra, HELLO.replace(b"hello", b"right")])

        async def behaviour(peer: Peer) -> None:
            while True:
                await peer.request()
                await peer.send(next(answers))

        async with vendor(behaviour) as at:
            assert await call(upstream, at.outgoing()) == b"hello"
            assert await call(upstream, at.outgoing()) == b"right"

    run_http1(scenario)


def test_bytes_on_an_idle_connection_end_it(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            await call(upstream, at.outgoing())
            await at.peers[0].send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
            await until(lambda: at.ended == 1)
            assert await call(upstream, at.outgoing()) == b"hello"

    run_http1(scenario)


def test_a_pooled_connection_that_the_vendor_closed_is_replaced(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(once(HELLO)) as at:
            for number in range(1, 4):
                assert await call(upstream, at.outgoing()) == b"hello"
                await until(lambda number=number: at.ended == number)
            assert len(at.peers) == 3

    run(scenario)


def test_a_pooled_connection_that_the_vendor_closes_on_the_next_request_is_replaced_once(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async def behaviour(peer: Peer) -> None:
            if len(at.peers) < 3:
                await peer.request()
                await peer.send(HELLO)
            await peer.request()

        async with vendor(behaviour) as at:
            assert await call(upstream, at.outgoing()) == b"hello"
            assert await call(upstream, at.outgoing()) == b"hello"
            with pytest.raises(VendorUnreachable):
                await call(upstream, at.outgoing())
            assert [len(peer.requests) for peer in at.peers] == [2, 2, 1]

    run_http1(scenario)


def test_a_connection_idle_for_too_long_is_not_used_again() -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            await call(upstream, at.outgoing())
            clock.ahead = IDLE_SECONDS
            await call(upstream, at.outgoing())
            await until(lambda: at.ended == 1)
            assert len(at.peers) == 2

    clock = Clock()
    on(uvloop.new_event_loop, lambda: Http1(trusting(), clock))(scenario)


def test_connections_that_rest_for_too_long_are_closed_when_another_comes_back() -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            answers = [await upstream.open(at.outgoing(), CONNECT_SECONDS) for _ in range(3)]
            for got in answers:
                await got.read(5)
            await answers[0].close()
            clock.ahead = IDLE_SECONDS / 2
            await answers[1].close()
            clock.ahead = IDLE_SECONDS
            await answers[2].close()
            await until(lambda: at.ended == 1)

    clock = Clock()
    on(uvloop.new_event_loop, lambda: Http1(trusting(), clock))(scenario)


STREAM_HEAD = OK + b"transfer-encoding: chunked\r\n\r\n"
LAST_EVENT = b"e\r\ndata: [DONE]\n\n\r\n"
STREAM_END = b"0\r\n\r\n"
END_MS = 20


async def ending_late(peer: Peer) -> None:
    """A vendor whose message ends a moment after its last event."""
    while True:
        await peer.request()
        await peer.send(STREAM_HEAD, LAST_EVENT)
        await asyncio.sleep(END_MS / 1000)
        await peer.send(STREAM_END)


async def read_last_event(upstream: Engine, outgoing: Outgoing, *, ended: bool) -> None:
    got = await upstream.open(outgoing, CONNECT_SECONDS)
    assert await got.chunk() == b"data: [DONE]\n\n"
    await got.close(ended=ended)


@pytest.fixture
def long_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a second does not end it."""
    monkeypatch.setattr("app.http1.LINGER_SECONDS", 60.0)


@pytest.mark.usefixtures("long_linger")
def test_a_stream_read_to_its_last_event_gives_its_connection_back_when_it_ends(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(ending_late) as at:
            for _ in range(5):
                await read_last_event(upstream, at.outgoing(), ended=True)
                await until(lambda: any(upstream._idle.values()))
            assert (len(at.peers), len(at.requests)) == (1, 5)

    run_http1(scenario)


def test_a_connection_whose_stream_has_not_ended_yet_is_not_used(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(ending_late) as at:
            for _ in range(2):
                await read_last_event(upstream, at.outgoing(), ended=True)
            assert len(at.peers) == 2

    run_http1(scenario)


@pytest.mark.usefixtures("long_linger")
def test_a_stream_that_was_left_ends_its_connection_at_once(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async def behaviour(peer: Peer) -> None:
            await peer.request()
            await peer.send(STREAM_HEAD, LAST_EVENT)
            await peer.gone()

        async with vendor(behaviour) as at:
            await read_last_event(upstream, at.outgoing(), ended=True)  # one that lingers
            await read_last_event(upstream, at.outgoing(), ended=False)
            await until(lambda: at.ended > 0)
            assert [peer.reader.at_eof() for peer in at.peers] == [False, True]

    run_http1(scenario)


def test_a_stream_that_was_left_before_its_end_is_not_waited_for(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(ending_late) as at:
            for number in range(1, 4):
                await read_last_event(upstream, at.outgoing(), ended=False)
                await until(lambda number=number: at.ended == number)
            assert (len(at.peers), any(upstream._idle.values())) == (3, False)

    run_http1(scenario)


def test_a_stream_whose_end_never_comes_ends_its_connection_after_the_linger(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async def behaviour(peer: Peer) -> None:
            await peer.request()
            await peer.send(STREAM_HEAD, LAST_EVENT)
            await peer.gone()

        async with vendor(behaviour) as at:
            await read_last_event(upstream, at.outgoing(), ended=True)
            closed = time.monotonic()
            await until(lambda: at.ended == 1)
            assert time.monotonic() - closed >= 0.9 * LINGER_SECONDS

    run_http1(scenario)


def test_a_vendor_that_goes_on_after_its_last_event_is_cut_after_the_linger(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async def behaviour(peer: Peer) -> None:
            await peer.request()
            await peer.send(STREAM_HEAD)
            while True:
                await peer.send(LAST_EVENT)
                await asyncio.sleep(END_MS / 1000)

        async with vendor(behaviour) as at:
            await read_last_event(upstream, at.outgoing(), ended=True)
            await until(lambda: at.ended == 1)

    run_http1(scenario)


def test_at_most_so_many_connections_rest() -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            answers = [await upstream.open(at.outgoing(), CONNECT_SECONDS) for _ in range(4)]
            for got in answers:
                await got.read(5)
                await got.close()
            await until(lambda: at.ended == 2)

    on(uvloop.new_event_loop, lambda: Http1(trusting(), Clock(), max_idle=2))(scenario)


def test_closing_an_answer_twice_does_not_disturb_the_next_one(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            first = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            assert await first.read(5) == b"hello"
            await first.close()
            second = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            await first.close()
            assert await second.read(5) == b"hello"
            await second.close()
            assert len(at.peers) == 1

    run(scenario)


def test_closing_the_engine_ends_idle_connections(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO)) as at:
            await call(upstream, at.outgoing())
            await upstream.close()
            await until(lambda: at.ended == 1)

    run(scenario)


def test_an_answer_before_the_request_was_sent_is_read_and_its_connection_not_kept(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async def behaviour(peer: Peer) -> None:
            await peer.reader.readuntil(b"\r\n\r\n")
            await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 5\r\n\r\nhello")
            await peer.gone()

        async with vendor(behaviour) as at:
            got = await upstream.open(at.outgoing(b"x" * 20_000_000), CONNECT_SECONDS)
            assert (got.status, await got.read(5)) == (413, b"hello")
            await got.close()
            await until(lambda: at.ended == 1)

    run_http1(scenario)


# --- failures ---------------------------------------------------------------------------------------------------------


def raises(run: Run, behaviour: Behaviour, *errors: type[VendorError]) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(behaviour) as at:
            with pytest.raises(errors):
                await call(upstream, at.outgoing())

    run(scenario)


BROKEN = {
    "cut in the status line": b"HTTP/1.1 20",
    "cut in the headers": OK,
    "cut in a body with a length": OK + b"content-length: 5\r\n\r\nhel",
    "cut before a body with a length": OK + b"content-length: 5\r\n\r\n",
    "cut in a chunk": OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhel",
    "cut between chunks": OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "cut between Chunks": OK + b"transfer-encoding: Chunked\r\n\r\n5\r\nhello\r\n",
    "cut before the last line": OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    "garbage": b"\x15\x03\x01\x00\x02\x02\x16 what is this\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a bad chunk size": OK + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "two lengths": OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    "a huge head": OK + b"x: " + b"a" * (16 * HEAD_BYTES),
    "endless headers": OK + b"x: aaaaaaaaaaaaaaaa\r\n" * 100_000,
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_a_vendor_error(run: Run, answer: bytes) -> None:
    raises(run, once(answer), VendorBroke)


def test_an_endless_trailer_is_broken_while_the_answer_is_given_out(run_http1: Run) -> None:
    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK, b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx: ")
        with contextlib.suppress(ConnectionError):
            while True:
                await peer.send(b"a" * 65_536)

    async def scenario(upstream: Engine) -> None:
        async with vendor(behaviour) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            given: list[bytes] = []
            with pytest.raises(VendorBroke):
                await got.pour(lambda part: given.append(part) is None)
            assert given == [b"hello"]
            await got.close()

    run_http1(scenario)


def test_endless_early_hints_are_broken(run_http1: Run) -> None:
    raises(run_http1, once(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 100_000), VendorBroke)


def test_a_change_of_protocol_is_broken(run_http1: Run) -> None:
    answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nraw"
    raises(run_http1, saying(answer), VendorBroke)


def test_what_came_before_a_cut_is_delivered_first(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(once(BROKEN["cut in a body with a length"])) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            await until(lambda: at.ended == 1)
            assert await got.chunk() == b"hel"
            for _ in range(2 if isinstance(upstream, Http1) else 1):
                with pytest.raises(VendorBroke):
                    await got.chunk()
            await got.close()

    run(scenario)


def test_what_came_before_a_cut_is_given_out_before_that_is_told(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        taken: list[bytes] = []
        async with vendor(once(BROKEN["cut in a body with a length"])) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            with pytest.raises(VendorBroke):
                await got.pour(lambda part: taken.append(part) is None)
            assert b"".join(taken) == b"hel"
            await got.close()

    run(scenario)


def test_a_reset_in_the_body_is_broken(run: Run) -> None:
    async def behaviour(peer: Peer) -> None:
        linger = struct.pack("ii", 1, 0)  # closing sends RST
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await peer.request()
        await peer.send(OK, b"\r\nhel")
        peer.writer.transport.abort()

    raises(run, behaviour, VendorBroke)


async def silent_close(peer: Peer) -> None:
    await peer.request()


def test_a_connection_closed_without_an_answer_is_a_vendor_error(run: Run) -> None:
    raises(run, silent_close, VendorUnreachable, VendorBroke)


def test_nobody_listening_is_unreachable(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(silent_close) as at:
            pass
        with pytest.raises(VendorUnreachable):
            await call(upstream, at.outgoing())

    run(scenario)


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 64 + ".invalid"])
def test_an_unknown_host_is_unreachable(run: Run, host: str) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(silent_close) as at:
            at.origin = f"http://{host}"
            with pytest.raises(VendorUnreachable):
                await call(upstream, at.outgoing())

    run(scenario)


def test_every_failure_of_httpx_is_mapped() -> None:
    def leaves(error: type[httpx.TransportError]) -> Iterator[type[httpx.TransportError]]:
        below = error.__subclasses__()
        yield from (leaf for sub in below for leaf in leaves(sub)) if below else [error]

    assert set(FAILURES) == set(leaves(httpx.TransportError))


# --- TLS and addresses ------------------------------------------------------------------------------------------------


def test_a_vendor_with_a_trusted_certificate_is_reached(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO), tls=serving("localhost"), name="localhost") as at:
            assert [await call(upstream, at.outgoing()) for _ in range(2)] == [b"hello", b"hello"]
            assert len(at.peers) == 1

    run(scenario)


@pytest.mark.parametrize("problem", ["an unknown authority", "another name"])
def test_a_certificate_that_cannot_be_trusted_is_unreachable(run: Run, problem: str) -> None:
    async def scenario(upstream: Engine) -> None:
        if problem == "another name":
            context = serving("elsewhere.example")
        else:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            trustme.CA().issue_cert("localhost").configure_cert(context)
        async with vendor(saying(HELLO), tls=context, name="localhost") as at:
            with pytest.raises(VendorUnreachable):
                await call(upstream, at.outgoing())
            assert at.requests == []

    run(scenario)


def test_plain_text_where_tls_was_expected_is_unreachable(run: Run) -> None:
    async def behaviour(peer: Peer) -> None:
        await peer.send(HELLO)
        await peer.gone()

    async def scenario(upstream: Engine) -> None:
        async with vendor(behaviour) as at:
            at.origin = at.origin.replace("http:", "https:")
            with pytest.raises(VendorUnreachable):
                await call(upstream, at.outgoing())

    run(scenario)


def test_a_vendor_that_accepts_no_connection_is_unreachable_after_the_limit(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        with accepting_nobody() as origin, pytest.raises(VendorUnreachable):
            await upstream.open(Outgoing(f"{origin}/v1/x", (), b"{}"), 0.05)

    run(scenario)


def test_a_vendor_that_does_not_shake_hands_is_unreachable_after_the_limit(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(Peer.gone) as at:
            at.origin = at.origin.replace("http:", "https:")
            with pytest.raises(VendorUnreachable):
                await upstream.open(at.outgoing(), 0.05)
            await until(lambda: at.ended == 1)

    run(scenario)


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")
def test_a_vendor_on_ipv6_is_reached(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(saying(HELLO), host="::1") as at:
            assert await call(upstream, at.outgoing()) == b"hello"
            assert "[::1]" in at.requests[0][0][1]

    run(scenario)


# --- cancelling and backpressure --------------------------------------------------------------------------------------


async def silence(peer: Peer) -> None:
    await peer.request()
    await peer.gone()


async def half_an_answer(peer: Peer) -> None:
    await peer.request()
    await peer.send(OK, b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n")
    await peer.gone()


async def open_and_read(upstream: Engine, outgoing: object, begun: asyncio.Event) -> None:
    got = await upstream.open(outgoing, CONNECT_SECONDS)
    try:
        while await got.chunk() is not None:
            begun.set()
    finally:
        await got.close()


def test_cancelling_while_connecting_closes_the_connection(run_http1: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(Peer.gone) as at:
            at.origin = at.origin.replace("http:", "https:")  # the handshake is never answered
            task = asyncio.ensure_future(upstream.open(at.outgoing(), CONNECT_SECONDS))
            await until(lambda: len(at.peers) == 1)
            await cancelled(task)
            await until(lambda: at.ended == 1, seconds=1)

    run_http1(scenario)


def test_cancelling_while_awaiting_the_head_closes_the_connection(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(silence) as at:
            task = asyncio.ensure_future(upstream.open(at.outgoing(), CONNECT_SECONDS))
            await until(lambda: len(at.requests) == 1)
            await cancelled(task)
            await until(lambda: at.ended == 1, seconds=1)

    run(scenario)


def test_cancelling_in_mid_answer_closes_the_connection(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(half_an_answer) as at:
            begun = asyncio.Event()
            task = asyncio.ensure_future(open_and_read(upstream, at.outgoing(), begun))
            await begun.wait()
            await cancelled(task)
            await until(lambda: at.ended == 1, seconds=1)

    run(scenario)


async def cancelled(task: asyncio.Future[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_two_hundred_cancelled_calls_leak_no_file_descriptor(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        async with vendor(silence) as waiting, vendor(half_an_answer) as begun, vendor(Peer.gone) as shaking:
            shaking.origin = shaking.origin.replace("http:", "https:")
            kinds = {waiting: 8, begun: 8, shaking: 4} if isinstance(upstream, Http1) else {waiting: 10, begun: 10}
            before = len(os.listdir("/proc/self/fd"))
            for rounds in range(1, 11):
                outgoings = [at.outgoing() for at, calls in kinds.items() for _ in range(calls)]
                tasks = [asyncio.ensure_future(open_and_read(upstream, out, asyncio.Event())) for out in outgoings]
                await until(lambda n=rounds: all(len(at.peers) == n * calls for at, calls in kinds.items()))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: sum(at.ended for at in kinds) == 200)
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    run(scenario)


def test_a_reader_who_does_not_read_stops_the_vendor(run: Run) -> None:
    async def scenario(upstream: Engine) -> None:
        sent = 0

        async def behaviour(peer: Peer) -> None:
            nonlocal sent
            await peer.request()
            await peer.send(OK, b"content-length: %d\r\n\r\n" % total)
            while sent < total:
                await peer.send(bytes(piece))
                sent += piece
            await peer.gone()

        async with vendor(behaviour) as at:
            got = await upstream.open(at.outgoing(), CONNECT_SECONDS)
            await got.chunk()
            seen = -1
            while seen != sent:  # still growing
                seen = sent
                for _ in range(20):
                    await asyncio.sleep(0.01)
            assert sent < total // 2
            while await got.chunk() is not None:
                pass
            assert sent == total
            await got.close()

    piece, total = 65_536, 65_536 * 1_600  # 100 MB: far above what the kernel's buffers hold
    run(scenario)


# --- which engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_httpx_engine_serves_where_a_proxy_is_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert isinstance(engine(Ambient()), Httpx)


def test_our_own_engine_serves_where_no_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(engine(Ambient()), Http1)
