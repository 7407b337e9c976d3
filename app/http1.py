"""A narrow HTTP/1.1 client on the event loop: a request in, a streamed answer out. The default engine of `upstream`.

Why our own: the hot path is this. Measured with one core and 64 calls in flight, CPU per call with uvicorn in front:
httpx 2,570 µs, aiohttp 411, pyreqwest 289 (and a call cancelled before the answer's headers leaves its connection
open for ever), this 175; 50-chunk streams 661 / 2,462 / 302 for aiohttp / pyreqwest / this. Framing is llhttp's (by
httptools, the parser of our server too); it speaks no HTTP/2, follows no redirect, knows no proxy: where a proxy is
configured, the httpx engine serves.

Cancelling closes the connection, so a vendor stops working the moment nobody waits.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

import httptools
from msgspec import Struct

from app.ambient import Ambient
from app.errors import VendorBroke, VendorUnreachable
from app.providers.translator import Outgoing

IDLE_SECONDS = 55.0
"""An idle connection older than this is not used again: load balancers in front of vendors close at 60 s."""
MAX_IDLE = 512
"""Connections of one origin that may rest at once."""
HEAD_BYTES = 65_536
"""An answer's head beyond this is broken; llhttp itself sets no bound."""
LINGER_SECONDS = 1.0
"""How long an answer that was read to its last event may still take to end, so that its connection is kept."""
HIGH_WATER_BYTES = 262_144
"""Unread answer bytes, framing included, at which reading pauses: a slow client slows the vendor instead of filling
memory."""
LARGE_BYTES = 16_384
"""A body from this size on is written beside its head: joining the two would copy it."""

Origin = tuple[str, str, int]


class Http1:
    """The engine: a pool of connections by origin. Implements `upstream.Engine`."""

    def __init__(self, tls: ssl.SSLContext, ambient: Ambient, max_idle: int = MAX_IDLE) -> None:
        self._tls = tls
        self._ambient = ambient
        self._max_idle = max_idle
        self._idle: dict[Origin, list[_Connection]] = {}
        self._origins: dict[str, tuple[Origin, bytes]] = {}
        """By a URL of the configuration: where it connects to, and the first lines of its requests."""

    async def open(self, outgoing: Outgoing, connect_seconds: float) -> _Answer:
        """Sends, and returns once the answer's head is there. Raises VendorUnreachable, VendorBroke.

        A pooled connection that the vendor closed before a single byte came is replaced by a fresh one, once.
        """
        url = outgoing.url
        if outgoing.method != "POST":  # of an address that is this call's alone
            origin, first = _first_lines(outgoing.method, url)
        elif url in self._origins:
            origin, first = self._origins[url]
        else:
            origin, first = self._origins[url] = _first_lines("POST", url)
        body = outgoing.body
        lines = "".join([f"{name}: {value}\r\n" for name, value in outgoing.headers]).encode("ascii")
        head = b"%b%bcontent-length: %d\r\n\r\n" % (first, lines, len(body))
        message = (head, body) if len(body) >= LARGE_BYTES else (head + body,)
        connection = self._pooled(origin)
        if connection is not None:
            try:
                return await connection.exchange(message)
            except _Stale:
                pass
        connection = await self._connect(origin, connect_seconds)
        try:
            return await connection.exchange(message)
        except _Stale:
            raise VendorUnreachable("the vendor closed the connection without an answer") from None

    async def close(self) -> None:
        for connections in self._idle.values():
            for connection in [*connections]:
                connection.abort()

    def give_back(self, connection: _Connection) -> None:
        """Its answer was read to its end, and the vendor keeps it."""
        now = self._ambient.monotonic()
        idle = self._idle.setdefault(connection.origin, [])
        while idle and (len(idle) >= self._max_idle or idle[0].idle_since <= now - IDLE_SECONDS):
            idle.pop(0).abort()
        connection.answer = None
        connection.idle_since = now
        idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        """The vendor closed it, or we did."""
        idle = self._idle.get(connection.origin, [])
        if connection in idle:
            idle.remove(connection)

    def _pooled(self, origin: Origin) -> _Connection | None:
        idle = self._idle.get(origin)
        if not idle:
            return None
        connection = idle.pop()
        if connection.idle_since > self._ambient.monotonic() - IDLE_SECONDS:
            return connection
        connection.abort()  # the newest is too old, so all of them are
        while idle:
            idle.pop().abort()
        return None

    async def _connect(self, origin: Origin, connect_seconds: float) -> _Connection:
        scheme, host, port = origin
        tls = self._tls if scheme == "https" else None
        try:
            async with asyncio.timeout(connect_seconds):
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, origin, loop), host, port, ssl=tls, server_hostname=host if tls else None
                )
        except TimeoutError:
            raise VendorUnreachable(f"no connection within {connect_seconds:g} s") from None
        except (OSError, UnicodeError) as error:  # refused, unknown host, TLS; UnicodeError: no name for DNS
            raise VendorUnreachable(f"no connection ({type(error).__name__})") from error
        return connection


def _first_lines(method: str, url: str) -> tuple[Origin, bytes]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    head = f"{method} {path} HTTP/1.1\r\nhost: {parts.netloc}\r\naccept-encoding: identity\r\n".encode("ascii")
    return (parts.scheme, parts.hostname or "", port), head


class _Stale(Exception):
    """The connection ended before a single byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection. It carries one answer at a time, or rests in the pool; `on_*` are httptools' calls."""

    def __init__(self, engine: Http1, origin: Origin, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.origin = origin
        self.loop = loop
        self.idle_since = 0.0
        self.closed = False
        self.transport: asyncio.Transport | None = None
        self.answer: _Answer | None = None
        self._head: dict[bytes, bytes] = {}
        self.on_header = self._head.__setitem__
        """An answer has thirty: the parser writes them there itself."""
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        """For all its answers, one after the other: making one looks for eight methods."""

    async def exchange(self, message: tuple[bytes, ...]) -> _Answer:
        """Writes a request and waits for the head of its answer. Raises VendorBroke, `_Stale`."""
        self.answer = answer = _Answer(self)
        try:
            if len(message) == 1:
                self.transport.write(message[0])
            else:
                self.transport.writelines(message)
            while not answer.status:
                if answer.failure is not None:
                    raise answer.failure
                answer.waiter = self.loop.create_future()
                await answer.waiter
        except BaseException:
            self.abort()
            raise
        return answer

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if answer is None:  # bytes that nobody asked for
            self.abort()
        if self.closed:
            return
        take = answer.take
        answer.unread_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            answer.fail("the vendor's answer is not HTTP")
        if self._head and answer.status:
            self._head.clear()  # trailers, which are left out, however many there are
        if take is None or not answer.passed(take):
            answer.fed()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._parser = None  # it refers back to us: without this, each connection would wait for the garbage collector
        answer, self.answer = self.answer, None
        if answer is None:
            self.engine.forget(self)
        else:
            answer.lost(error)

    # --- from the parser ---

    def on_message_begin(self) -> None:
        self._head.clear()
        if self.answer.complete:  # a second answer to one request: whose is it?
            self.answer.keep = False

    def on_headers_complete(self) -> None:
        status, answer = self._parser.get_status_code(), self.answer
        if status >= 200 and not answer.status:  # not 100 Continue, 103 Early Hints: the answer is yet to come
            answer.status, answer.headers = status, _Headers(self._head.copy())
            self._head.clear()

    def on_body(self, body: bytes) -> None:
        answer = self.answer
        if not answer.complete:
            answer.body.append(body)

    def on_message_complete(self) -> None:
        answer = self.answer
        if answer.status and not answer.complete:
            answer.complete = True
            answer.keep = self._parser.should_keep_alive()


class _Headers(Mapping[str, str]):
    """An answer's headers, looked for when somebody asks for one: of thirty that is one or two."""

    __slots__ = ("_lower", "_raw")

    def __init__(self, raw: dict[bytes, bytes]) -> None:
        self._raw = raw
        self._lower: dict[bytes, bytes] | None = None

    def __getitem__(self, name: str) -> str:
        key = name.encode("latin-1")
        value = self._raw.get(key)  # as most vendors write it
        return self._all()[key].decode("latin-1") if value is None else value.decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[bytes, bytes]:
        if self._lower is None:
            self._lower = {name.lower(): value for name, value in self._raw.items()}
        return self._lower


class _Answer(Struct, eq=False):
    """Implements `upstream.VendorAnswer`. `status` is 0 until its head is there, `body` what nobody has read yet."""

    connection: _Connection
    status: int = 0
    headers: Mapping[str, str] = {}
    body: list[bytes] = []
    unread_bytes: int = 0
    complete: bool = False
    keep: bool = False
    failure: Exception | None = None
    waiter: asyncio.Future[None] | None = None
    take: Callable[[bytes], bool] | None = None
    sated: bool = False
    paused: bool = False
    released: bool = False
    lingers: bool = False
    over: bool = False

    async def chunk(self) -> bytes | None:
        """The bytes that have arrived, at least one; None at the end. Raises VendorBroke when the answer was cut."""
        while not self.body:
            if self.complete:
                return None
            if self.failure is not None:
                raise self.failure
            self.waiter = self.connection.loop.create_future()
            await self.waiter
        return self._given()

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        """Gives `take` each part the moment it arrives, until that says that it wants no more: True then, False at the
        end. Raises VendorBroke when the answer was cut, and what `take` raises.
        """
        if self.body and not take(self._given()):
            return True
        self.take, self.sated = take, False
        try:
            while not self.sated:
                if self.failure is not None:
                    raise self.failure
                if self.complete:
                    return False
                self.waiter = self.connection.loop.create_future()
                await self.waiter
        finally:
            self.take = None
        return True

    async def read(self, max_bytes: int) -> bytes:
        """The whole body. Raises VendorBroke when it was cut or is above `max_bytes`."""
        if self.complete and len(self.body) == 1 and len(self.body[0]) <= max_bytes:
            return self._given()
        parts = []
        size = 0
        while (part := await self.chunk()) is not None:
            size += len(part)
            if size > max_bytes:
                raise VendorBroke("the vendor's answer is too large")
            parts.append(part)
        return b"".join(parts)

    async def close(self, ended: bool = False) -> None:
        """Back to the pool if the answer was read to its end; else the connection ends, and the vendor stops.

        `ended`: its last event was read. What ends the HTTP message may come a moment later, and is waited for.
        """
        if self.released:
            return
        self.released = True
        if ended and not self.complete and self.failure is None and not self.connection.closed:
            self.lingers = True
            self.body.clear()
            self.connection.loop.call_later(LINGER_SECONDS, self._let_go)
        else:
            self._let_go()

    def _let_go(self) -> None:
        if self.over:
            return
        self.over = True
        self.lingers = False
        connection = self.connection
        if (
            self.complete
            and self.keep
            and not self.body
            and not connection.closed
            and connection.transport.get_write_buffer_size() == 0
        ):
            connection.engine.give_back(connection)
        else:
            connection.abort()

    def _given(self) -> bytes:
        """What has arrived."""
        body = self.body
        data = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        self.unread_bytes = 0
        if self.paused:
            self.paused = False
            if not self.connection.closed:
                self.connection.transport.resume_reading()
        return data

    # --- from the connection ------------------------------------------------------------------------------------------

    def passed(self, take: Callable[[bytes], bool]) -> bool:
        """What has arrived is parsed, and taken at once. Whether that goes on."""
        body = self.body
        if body:
            self.unread_bytes = 0
            try:
                self.sated = not take(body.pop() if len(body) == 1 else self._given())
            except Exception as defect:  # it is the reader's, who is told of it where it waits
                self.failure = defect
        elif self.unread_bytes > HIGH_WATER_BYTES:  # the parser keeps a trailer that does not end
            self.fail("the vendor's answer goes on without a body")
        if self.sated or self.complete or self.failure is not None:
            self.take = None
        return self.take is not None

    def fed(self) -> None:
        """What has arrived is parsed, and waits to be read."""
        if not self.status and self.unread_bytes > HEAD_BYTES:
            self.fail("the head of the vendor's answer is too large")
        elif self.unread_bytes > HIGH_WATER_BYTES and not self.paused and not self.connection.closed:
            self.paused = True
            self.connection.transport.pause_reading()
        if self.lingers:
            self.body.clear()
            if self.complete:
                self._let_go()
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def lost(self, error: Exception | None) -> None:
        if self.status and error is None and not _framed(self.headers):
            self.complete = True  # a body without a length ends with its connection (RFC 9112, 6.3)
        elif not self.complete and self.failure is None:
            self.failure = VendorBroke("the vendor cut its answer") if self.status or self.unread_bytes else _Stale()
        self._wake()

    def fail(self, reason: str) -> None:
        self.keep = False
        if not self.complete and self.failure is None:
            self.failure = VendorBroke(reason)
        self.connection.abort()


def _framed(headers: Mapping[str, str]) -> bool:
    return "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower()
