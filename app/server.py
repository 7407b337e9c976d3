"""The HTTP/1.1 server of every port.

Why our own: ASGI has a dict a message, an event and three timers a call, and no word for a client that is gone. Routes
of calls are served by a coroutine that holds a `Visit`; everything else by an ASGI application. It drains: `close`
waits for what is under way.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from functools import partial
from urllib.parse import unquote

import httptools
from litestar.types import ASGIApp, HTTPScope, Message

from app.ambient import Ambient
from app.visits import Connection, Handler, Visit

SWEEP_SECONDS = 5.0
"""How often connections are looked at for that: a timer of each would cost every call."""
BACKLOG = 4096


class Server:
    """One port. `calls` has the handlers of its routes by path, one that ends with a slash for all below it; all other
    requests are `app`'s, an ASGI application.
    """

    def __init__(
        self, app: ASGIApp, host: str, port: int, ambient: Ambient, calls: Mapping[bytes, Handler] | None = None
    ) -> None:
        self.ambient = ambient
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        """Of the visits under way, those whose client is gone too."""
        self.closing = False
        self.loop: asyncio.AbstractEventLoop
        self._calls = calls or {}
        self._below = [(path, handler) for path, handler in self._calls.items() if path.endswith(b"/")]
        self._app = app
        self._host = host
        self._port = port
        self._listening: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    async def start(self) -> None:
        """Listens. Raises OSError where it cannot."""
        self.loop = asyncio.get_running_loop()
        try:
            self._listening = await self.loop.create_server(
                partial(Connection, self), self._host, self._port, backlog=BACKLOG
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(
                f"it cannot listen on {self._host}:{self._port} ({reason}). Choose another --port or --admin-port."
            ) from error
        self._sweep_often()

    @property
    def address(self) -> tuple[str, int]:
        return self._listening.sockets[0].getsockname()[:2]

    async def close(self) -> None:
        """No new connections; those that are idle end now, the others with their visits. Waits for the last."""
        self.closing = True
        if self._listening is not None:
            self._listening.close()
        for connection in [*self.connections]:
            connection.close()
        self.parted()
        await self._empty.wait()
        if self._sweeper is not None:
            self._sweeper.cancel()

    def parted(self) -> None:
        """A connection or a visit is over."""
        if self.closing and not self.connections and not self.tasks:
            self._empty.set()

    def abort(self) -> None:
        """Ends the connections that are left."""
        for connection in [*self.connections]:
            connection.transport.abort()

    def handler(self, visit: Visit) -> Handler:
        found = self._calls.get(visit.target) or self._calls.get(path := _path(visit.target)[0])
        if found is None:
            found = next((handler for above, handler in self._below if path.startswith(above)), self._others)
        return found

    async def _others(self, visit: Visit) -> None:
        """A visit by ASGI."""
        path, query = _path(visit.target)
        headers = [(name.lower(), value) for name, value in visit.raw_headers.items()]
        transport = visit._connection.transport
        scope: HTTPScope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": visit.version,
            "method": visit.method, "scheme": "http", "path": unquote(path.decode("latin-1")), "raw_path": path,
            "query_string": query, "root_path": "", "headers": headers, "state": {}, "extensions": None,
            "server": transport.get_extra_info("sockname"), "client": transport.get_extra_info("peername"),
        }  # fmt: skip

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.start(message["status"], [(name.lower(), value) for name, value in message.get("headers", ())])
                return
            await visit.drained()
            visit.write(message.get("body", b""))
            if not message.get("more_body"):
                visit.end()

        await self._app(scope, visit.receive, send)

    def sweep(self) -> None:
        """Closes the connections that have been idle for too long."""
        now = self.loop.time()
        for connection in [*self.connections]:
            connection.sweep(now)

    def _sweep_often(self) -> None:
        self.sweep()
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep_often)


def _path(target: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request's target, which may be a whole URL (RFC 9112, 3.2.2)."""
    if not target.startswith(b"/"):
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError:
            return target, b""
        return url.path or b"/", url.query or b""
    path, _, query = target.partition(b"?")
    return path.partition(b"#")[0], query.partition(b"#")[0]
