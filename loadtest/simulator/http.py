"""HTTP/1.1 on asyncio, with the rudeness that a simulator needs: cut, reset, silence, and hang-ups noticed at once.

One `Connection` a client connection, one task a request. The task is cancelled when the client hangs up
before its answer is complete; `Reply.hung_up_ms` then says when.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import cast
from urllib.parse import parse_qsl, unquote

from msgspec import Struct

Headers = list[tuple[str, str]]
Answer = Callable[["Request", "Reply"], Awaitable[None]]

MAX_HEAD_BYTES = 64 * 1024


class Request(Struct, frozen=True):
    """A whole request; header names in lower case, the last of repeated headers wins.

    `target` is the path and query as they were sent, which a signature is over; `path` is decoded.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    received_ms: int
    target: str


class BadRequest(Exception):
    """The bytes are not HTTP/1.1 as we read it; the connection is closed after a 400."""


class Reply:
    """Writes the answer to one request. Exactly one of `send`, `finish`, `cut`, `reset` ends it."""

    def __init__(self, connection: Connection, keep_alive: bool) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        self.status: int | None = None
        self.complete = False
        self.broken = False
        self.hung_up_ms: int | None = None

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a whole answer at once."""
        self._connection.write(self._head(status, [*headers, ("content-length", str(len(body)))]) + body)
        self._end()

    def start(self, status: int, headers: Headers, length: int | None = None) -> None:
        """Write the status line and headers; `length` None means chunked."""
        framing = ("transfer-encoding", "chunked") if length is None else ("content-length", str(length))
        self._connection.write(self._head(status, [*headers, framing]))

    async def chunks(self, parts: Iterable[bytes]) -> None:
        """Write body parts, each its own HTTP chunk, in one go; waits while the client reads too slowly."""
        self._connection.write(b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts))
        await self._connection.writable.wait()

    def write(self, part: bytes) -> None:
        """Write bytes of a body whose length was announced."""
        self._connection.write(part)

    def finish(self) -> None:
        """End a chunked body."""
        self._connection.write(b"0\r\n\r\n")
        self._end()

    def cut(self) -> None:
        """Close the connection in the middle of the answer, after what was written has left."""
        self.broken = True
        self._connection.close()

    def reset(self) -> None:
        """Close the connection with a TCP reset."""
        self.broken = True
        self._connection.reset()

    def _head(self, status: int, headers: Headers) -> bytes:
        self.status = status
        lines = [f"HTTP/1.1 {status} {_reason(status)}", f"date: {_http_date(int(time.time()))}"]
        lines.extend(f"{name}: {value}" for name, value in headers)
        lines.append("connection: keep-alive" if self._keep_alive else "connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _end(self) -> None:
        self.complete = True
        if not self._keep_alive:
            self._connection.close()


class Connection(asyncio.Protocol):
    """One client connection: reads requests one after the other, and notices when the client leaves."""

    def __init__(self, answer: Answer, connections: set[Connection]) -> None:
        self._answer = answer
        self._connections = connections
        self._buffer = bytearray()
        self._head: tuple[str, str, dict[str, str], bool, int] | None = None
        self._reply: Reply | None = None
        self._task: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        self.writable.set()
        if self._task is not None:
            if self._reply is not None and not self._reply.complete and not self._reply.broken:
                self._reply.hung_up_ms = now_ms()
            self._task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._read()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """Close at once, dropping what was not sent."""
        self._transport.abort()

    def reset(self) -> None:
        # Linger 0 makes the kernel send RST instead of FIN.
        linger = struct.pack("ii", 1, 0)
        with contextlib.suppress(OSError):
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()

    def _read(self) -> None:
        """Start the next request when it is all here and the one before has been answered."""
        if self._task is not None or self._transport.is_closing():
            return
        try:
            if self._head is None:
                self._head = self._take_head()
            if self._head is None:
                return
            method, target, headers, keep_alive, length = self._head
            body = _take_chunked(self._buffer) if length < 0 else _take(self._buffer, length)
        except BadRequest as fault:
            Reply(self, keep_alive=False).send(400, [("content-type", "text/plain")], str(fault).encode())
            return
        if body is None:
            return
        self._head = None
        path, _, query = target.partition("?")
        request = Request(
            method=method,
            path=unquote(path),
            query=dict(parse_qsl(query)) if query else {},
            headers=headers,
            body=body,
            received_ms=now_ms(),
            target=target,
        )
        self._reply = Reply(self, keep_alive)
        self._task = asyncio.get_running_loop().create_task(self._run(request, self._reply))

    async def _run(self, request: Request, reply: Reply) -> None:
        try:
            await self._answer(request, reply)
        except Exception:
            # The outermost border: a defect of the simulator must be seen, not look like a fault it was told to have.
            traceback.print_exc(file=sys.stderr)
            self.abort()
        self._task = None
        self._read()

    def _take_head(self) -> tuple[str, str, dict[str, str], bool, int] | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BadRequest("The request headers are longer than 64 KiB.")
            return None
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        request_line = lines[0].split(" ")
        if len(request_line) != 3 or not request_line[2].startswith("HTTP/1."):
            raise BadRequest("The request line is not HTTP/1.1.")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        connection = headers.get("connection", "").lower()
        keep_alive = "close" not in connection and (request_line[2] == "HTTP/1.1" or "keep-alive" in connection)
        if headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in headers.get("transfer-encoding", "").lower():
            length = -1
        else:
            announced = headers.get("content-length", "0")
            if not announced.isdecimal():
                raise BadRequest("Content-Length is not a number.")
            length = int(announced)
        return request_line[0], request_line[1], headers, keep_alive, length


def now_ms() -> int:
    """Milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def _take(buffer: bytearray, length: int) -> bytes | None:
    if len(buffer) < length:
        return None
    body = bytes(buffer[:length])
    del buffer[:length]
    return body


def _take_chunked(buffer: bytearray) -> bytes | None:
    """The decoded body when all of its chunks are here, otherwise None with the buffer untouched."""
    parts, at = [], 0
    while True:
        line_end = buffer.find(b"\r\n", at)
        if line_end < 0:
            return None
        size_text = bytes(buffer[at:line_end]).split(b";")[0].strip()
        try:
            size = int(size_text, 16)
        except ValueError:
            raise BadRequest("A chunk size is not a hexadecimal number.") from None
        at = line_end + 2
        if len(buffer) < at + size + 2:
            return None
        if size == 0:
            end = at if buffer[at : at + 2] == b"\r\n" else buffer.find(b"\r\n\r\n", at) + 2
            if end < 2:
                return None
            del buffer[: end + 2]
            return b"".join(parts)
        parts.append(bytes(buffer[at : at + size]))
        at += size + 2


_REASONS = {int(status): status.phrase for status in HTTPStatus}


def _reason(status: int) -> str:
    return _REASONS.get(status, "Unknown")


_date: tuple[int, str] = (0, "")


def _http_date(second: int) -> str:
    """An HTTP date; the last one is kept, as a busy second asks for the same thousands of times."""
    global _date
    if _date[0] != second:
        _date = (second, time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second)))
    return _date[1]
