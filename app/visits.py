"""One client's connection, and the requests that come by it: llhttp's framing (by httptools), and what we need beside.

What it must do, and the tests hold it to: tell a call at once that its client is gone, bound heads and what is buffered
of bodies, and answer pipelined requests in their order.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Protocol

import httptools
from litestar.types import Message
from msgspec import Struct

from app.ambient import Ambient, Patience
from app.core import Headers, written
from app.dialects import openai_chat
from app.errors import InternalError, InvalidRequest, RequestTooLarge

log = logging.getLogger("gateway")

MAX_HEAD_BYTES = 81_920
"""Of a request's line and headers: Traefik's `maxHeaderBytes` and what it adds. Counted between reads, so that a head
which ends in the same read may be longer."""
IDLE_SECONDS = 75.0
"""An idle connection is closed after this, and one whose request's head is not there by then."""
UNREAD_BYTES = 65_536
"""Body bytes that nobody has asked for yet, at which reading pauses."""

Head = Headers | bytes
"""Headers, or lines of a head that they were written into; those say nothing of the body's length, unless it is whole,
nor of the connection."""
Handler = Callable[["Visit"], Awaitable[None]]

_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_STATUS_LINES = {status: b"HTTP/1.1 %d %b\r\n" % (status, _PHRASES.get(status, b"")) for status in range(100, 600)}
"""Of every status: a vendor's refusal may have one that has no name, as nginx's 499."""
_BODILESS = (204, 304)


class Port(Protocol):
    """Where a connection arrived."""

    loop: asyncio.AbstractEventLoop
    ambient: Ambient
    connections: set[Connection]
    tasks: set[asyncio.Task[None]]
    closing: bool

    def handler(self, visit: Visit) -> Handler:
        """Who serves it."""

    def parted(self) -> None:
        """A connection or a visit is over."""


class Visit(Struct, eq=False):
    """One request, and the way back to its client.

    An answer is `whole`, or `start`, then `write` as often as it takes, then `end`. None of these waits: who writes
    much looks at `blocked`, and awaits `drained`. To a client that is gone nothing is written, and nobody is told but
    `on_hang_up`.
    """

    _connection: Connection
    method: str = ""
    target: bytes = b""
    version: str = "1.1"
    raw_headers: dict[bytes, bytes] = {}
    """In their order, as they were written; of a name that was written twice the first counts."""
    keep_alive: bool = True
    complete: bool = False
    """Whether the whole request is here; since when, by the ambient's clock."""
    came_at: float = 0.0
    told: bool = False
    """Whether `receive` has said so."""
    continued: bool = False
    """Whether a client that asked was told to send the body."""
    unread_bytes: int = 0
    gone: bool = False
    started: bool = False
    ended: bool = False
    on_hang_up: Callable[[], object] | None = None
    """Called once when the client goes before the answer has ended."""
    task: asyncio.Task[None] | None = None
    patience: Patience | None = None
    _parts: list[bytes] = []
    _waiter: asyncio.Future[None] | None = None
    _head: bytes = b""
    _chunked: bool = False
    _left: int | None = None

    # --- the request ---

    def at_once(self) -> bytes | None:
        """The body where it is here as a whole, else None. It is given out once."""
        if not self.complete:
            return None
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def receive(self) -> Message:
        """ASGI's: what has come of the body, at least the news that it is complete; or that the client is gone."""
        connection = self._connection
        if not (self.complete or self.started or self.continued) and b"expect" in (
            name.lower() for name in self.raw_headers
        ):
            self.continued = True
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self._parts or self.gone or self.ended or (self.complete and not self.told)):
            if not self.complete:
                connection.read_on()
            self._waiter = connection.loop.create_future()
            await self._waiter
        if self.gone or self.ended:
            return {"type": "http.disconnect"}
        body = b"".join(self._parts)
        self._parts = []
        self.unread_bytes = 0
        self.told = self.complete
        return {"type": "http.request", "body": body, "more_body": not self.complete}

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- the answer ---

    @property
    def blocked(self) -> bool:
        """Whether the client reads more slowly than it is written to."""
        return self._connection.blocked and not self.gone

    async def drained(self) -> None:
        """Waits until the client has read most of it, or is gone."""
        while self.blocked:
            await self._connection.unblocked()

    def whole(self, status: int, head: Head, body: bytes) -> None:
        """An answer that is there as a whole, as one write. `head` has its length."""
        lines = self._lines(head)
        if self.gone:
            return
        self.started = True
        said = b"" if self.method == "HEAD" else body
        self._connection.transport.write(b"".join((_STATUS_LINES[status], lines, b"\r\n", said)))
        self._end()

    def start(self, status: int, head: Head) -> None:
        """The head, which leaves with the first bytes of the body. Without a length it is sent in chunks."""
        lines = self._lines(head)
        self.started = True
        if self.method == "HEAD" or status in _BODILESS:
            self._left = 0
        else:
            length = None if isinstance(head, bytes) else dict(head).get(b"content-length")
            self._left = None if length is None else int(length)
        if self._left is None:
            self._chunked = self.version == "1.1"
            if self._chunked:
                lines += b"transfer-encoding: chunked\r\n"
            else:
                self.keep_alive = False
        self._head = b"%b%b\r\n" % (_STATUS_LINES[status], lines)

    def write(self, data: bytes) -> None:
        """A part of the body."""
        if self.gone or not data:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        elif self._left is not None:
            if self.method == "HEAD":
                return
            self._left -= len(data)
            if self._left < 0:
                raise ValueError("the body is longer than its Content-Length")
        if self._head:
            data, self._head = self._head + data, b""
        self._connection.transport.write(data)

    def end(self) -> None:
        """The answer is complete."""
        if self.gone or self.ended:
            return
        if self._left:
            raise ValueError("the body is shorter than its Content-Length")
        rest = self._head + b"0\r\n\r\n" if self._chunked else self._head
        if rest:
            self._connection.transport.write(rest)
        self._end()

    def _lines(self, head: Head) -> bytes:
        if self.started:
            raise ValueError("the answer has begun")
        if isinstance(head, bytes):
            lines = head
        else:
            lines = written(head)
            if (b"connection", b"close") in head:
                self.keep_alive = False
                return lines
        return lines if self.keep_alive else lines + b"connection: close\r\n"

    def _end(self) -> None:
        self.ended = True
        if self._parts:
            self._parts = []
        if self._waiter is not None:
            self.wake()
        connection = self._connection
        connection.idle_since = connection.loop.time()
        if not self.keep_alive:
            connection.take_no_more()

    def broke(self) -> None:
        """The answer cannot be ended: the client sees its connection break."""
        self.keep_alive = False
        self._connection.transport.close()


class Connection(asyncio.Protocol):
    """One client's connection. Visits are served one after the other, in the order in which they came."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.loop = port.loop
        self.transport: asyncio.Transport
        self.blocked = False
        self.idle_since = port.loop.time()
        self.current: Visit | None = None
        """The visit that is being served."""
        self.patience = Patience(port.loop)
        """Of one visit after the other: the timer of the last serves the next one too."""
        self._target: list[bytes] = []
        self._head: dict[bytes, bytes] = {}
        self.on_url, self.on_header = self._target.append, self._head.setdefault
        """The parser itself writes them there, for one request after the other."""
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._arriving: Visit | None = None
        self._next: deque[Visit] = deque()
        self._drained: list[asyncio.Future[None]] = []
        self._head_bytes: int | None = None
        """Of the head that is arriving; None between heads."""
        self._beside = 0
        """Bytes that came since the last head was complete, or the last part of a body here."""
        self._reads = True
        self._closes = False
        """No further request is taken."""

    # --- from the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.port.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._closes:
            return
        self._beside += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # it stays HTTP/1.1, and this request is the last
            self._closes = True
            if self._arriving is not None:
                self._arriving.keep_alive = False
        except httptools.HttpParserError:
            self._refuse(400, InvalidRequest("This is not an HTTP/1.1 request."))
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(413, RequestTooLarge(f"The head of the request is above {MAX_HEAD_BYTES} bytes."))
            return
        if self._head:
            self._head.clear()  # trailers, however many: no headers, for the edge has not looked at them
        if self._beside > MAX_HEAD_BYTES:  # the parser keeps one without end, and copies it with every read
            self._refuse(413, RequestTooLarge(f"Beside its body the request is above {MAX_HEAD_BYTES} bytes."))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._parser = None  # it refers back to us
        self._closes = True
        self._next.clear()
        self.port.connections.discard(self)
        self.port.parted()
        self.resume_writing()
        visit = self.current
        if visit is None:
            self.patience.close()
        elif not visit.ended:
            visit.gone = True
            visit.wake()
            if visit.on_hang_up is not None:
                visit.on_hang_up()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        drained, self._drained = self._drained, []
        for waiter in drained:
            if not waiter.done():
                waiter.set_result(None)
        if self.current is None and self._next:
            self._serve(self._next.popleft())

    async def unblocked(self) -> None:
        waiter = self.loop.create_future()
        self._drained.append(waiter)
        await waiter

    # --- from the parser ---

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._target.clear()
        self._head.clear()
        self.idle_since = self.loop.time()

    def on_headers_complete(self) -> None:
        self._head_bytes, self._beside = None, 0
        parser, target = self._parser, self._target
        version = parser.get_http_version()
        self._arriving = visit = Visit(
            self,
            parser.get_method().decode("ascii"),
            target[0] if len(target) == 1 else b"".join(target),
            version,
            self._head.copy(),
            version == "1.1" and parser.should_keep_alive() and not self.port.closing,
        )
        self._head.clear()
        if self.current is None and not self.blocked:
            self._serve(visit)
        else:  # it came before the last one was answered
            self.hold_on()
            self._next.append(visit)

    def on_body(self, body: bytes) -> None:
        self._beside = 0
        visit = self._arriving
        if visit.ended or visit.gone:  # it was answered before this came
            return
        visit._parts.append(body)
        visit.unread_bytes += len(body)
        if visit.unread_bytes > UNREAD_BYTES:
            self.hold_on()
        if visit._waiter is not None:
            visit.wake()

    def on_message_complete(self) -> None:
        visit = self._arriving
        visit.complete, visit.came_at = True, self.port.ambient.monotonic()
        if visit._waiter is not None:
            visit.wake()

    # --- visits ---

    def _serve(self, visit: Visit) -> None:
        self.current, visit.patience = visit, self.patience
        visit.task = task = self.loop.create_task(self._attend(visit))
        self.port.tasks.add(task)

    async def _attend(self, visit: Visit) -> None:
        """Serves one visit; whatever becomes of that, its answer ends."""
        port = self.port
        self.patience.begin(visit.task)
        try:
            await port.handler(visit)(visit)
        except Exception:
            log.exception("defect in %s", visit.target[:200])
        finally:
            self.patience.end()
            if not (visit.ended or visit.gone):
                self._mend(visit)
            port.tasks.discard(visit.task)
            if port.closing:
                port.parted()
            self._served()

    def _mend(self, visit: Visit) -> None:
        if visit.started:
            visit.broke()
            return
        visit.keep_alive = False
        visit.whole(*_refusal(500, InternalError("The gateway has a defect; its log has the traceback.")))

    def take_no_more(self) -> None:
        """The connection ends with what was written to it."""
        self._closes = True
        self.transport.close()

    def _served(self) -> None:
        self.current = None
        if self._closes:
            if self._parser is None:
                self.patience.close()
        elif self._next and not self.blocked:
            self._serve(self._next.popleft())
        elif not self._reads:
            self.read_on()

    def hold_on(self) -> None:
        """Reads no more for now."""
        if self._reads and not self.transport.is_closing():
            self._reads = False
            self.transport.pause_reading()

    def read_on(self) -> None:
        if not self._reads and not self.transport.is_closing():
            self._reads = True
            self.transport.resume_reading()

    def _refuse(self, status: int, error: InvalidRequest | RequestTooLarge) -> None:
        """What came is no request. After the answers that are owed, the connection ends."""
        self._closes = True
        self._head_bytes = None
        if self.current is not None and not self.current.ended:
            self.current.keep_alive = False
        elif not self.transport.is_closing():
            Visit(self).whole(*_refusal(status, error))

    def close(self) -> None:
        """After the visits under way, or now."""
        self._next.clear()
        if self.current is None or self.current.ended:
            self._closes = True
            self.transport.close()
        else:
            self.current.keep_alive = False

    def sweep(self, now: float) -> None:
        if self.idle_since + IDLE_SECONDS > now or (self.current is not None and not self.current.ended):
            return
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # its last answer was never read
        else:
            self.transport.close()


def _refusal(status: int, error: InvalidRequest | RequestTooLarge | InternalError) -> tuple[int, Headers, bytes]:
    body = openai_chat.error_body(error, None)
    headers = [
        (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close"),
    ]  # fmt: skip
    return status, headers, body
