"""A vendor made of bare sockets: each test says, byte by byte, what it does with a connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

from app.providers.translator import Outgoing


class Peer:
    """The vendor's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.requests: list[tuple[list[str], bytes]] = []

    async def request(self) -> tuple[list[str], bytes]:
        """The lines of the next request's head, and its body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        length = next((int(line[16:]) for line in head if line.lower().startswith("content-length: ")), 0)
        self.requests.append((head, await self.reader.readexactly(length)))
        return self.requests[-1]

    async def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))
        await self.writer.drain()

    async def gone(self) -> None:
        """Returns when the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65_536):
                pass


Behaviour = Callable[[Peer], Awaitable[None]]


class Vendor:
    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.peers: list[Peer] = []
        self.ended = 0
        """Connections that are over at our end."""

    @property
    def requests(self) -> list[tuple[list[str], bytes]]:
        return [request for peer in self.peers for request in peer.requests]

    def outgoing(self, body: bytes = b"{}", headers: tuple[tuple[str, str], ...] = (), path: str = "/v1/x") -> Outgoing:
        return Outgoing(self.origin + path, headers, body)


@asynccontextmanager
async def vendor(
    behaviour: Behaviour, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", name: str | None = None
) -> AsyncIterator[Vendor]:
    """Listens until the block ends; `behaviour` runs once for each connection, then the connection is closed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        made.peers.append(peer)
        running.add(asyncio.current_task())
        try:
            await behaviour(peer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            made.ended += 1
            writer.transport.abort() if writer.is_closing() else writer.close()

    running: set[asyncio.Task[None] | None] = set()
    server = await asyncio.start_server(serve, host, 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    shown = name or (f"[{host}]" if ":" in host else host)
    made = Vendor(f"{'https' if tls else 'http'}://{shown}:{port}")
    try:
        yield made
    finally:
        server.close()
        for task in running:
            if task is not None:
                task.cancel()
        await asyncio.gather(*[task for task in running if task is not None], return_exceptions=True)


@contextlib.contextmanager
def accepting_nobody() -> Iterator[str]:
    """The origin of a vendor whose queue is full: it neither accepts a connection nor refuses it."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(16):
            waiting = sockets.enter_context(socket.socket())
            waiting.settimeout(0.2)
            try:
                waiting.connect(listener.getsockname())
            except TimeoutError:
                break
        else:
            raise AssertionError("the queue does not fill")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Polls; fails when the condition is not met in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not met in time"
        await asyncio.sleep(0.005)
