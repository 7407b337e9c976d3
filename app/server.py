"""The HTTP server of both ports: uvicorn, with what it leaves to others."""

from __future__ import annotations

from collections.abc import Sequence

import uvicorn
from litestar.types import ASGIApp, Scope
from uvicorn.lifespan.off import LifespanOff
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.dialects import openai_chat
from app.errors import RequestTooLarge

MAX_HEAD_BYTES = 81_920
"""Of a request's line and headers: Traefik's `maxHeaderBytes` and what it adds. Counted between reads, so that a head
which ends in the same read may be longer."""
_HEAD_BODY = openai_chat.error_body(RequestTooLarge(f"The head of the request is above {MAX_HEAD_BYTES} bytes."))
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 413 Content Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_HEAD_BODY), _HEAD_BODY)
)


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which tells a call at once that its client is gone, and takes no head without end.

    ASGI has a call wait for a hang-up in a task of its own: a tenth of the time of a call that has nothing else to wait
    for. Neither uvicorn nor httptools bounds a request's head.
    """

    _head_bytes: int | None = None
    """Of the head that is arriving; None between heads."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()
        if self.scope is not None:
            self.scope["cycle"] = self.cycle

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.scope is not None:
            self.scope["hung_up"] = True
            if hang_up := self.scope.get("hang_up"):
                hang_up()


_CLOSE = (b"connection", b"close")


def send_whole(scope: Scope, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
    """An answer that is there as a whole, as one write: ASGI's two are two packets, and a sixth of a call's time.

    `headers` has its length. False, and nothing is sent, where it has to go the way of ASGI.
    """
    cycle: RequestResponseCycle | None = scope.get("cycle")
    if cycle is None or cycle.response_started or cycle.disconnected or cycle.flow.write_paused:
        return False
    lines = [STATUS_LINE[status], *[b"%b: %b\r\n" % header for header in headers]]
    if _CLOSE in headers:
        cycle.keep_alive = False
    elif not cycle.keep_alive:
        lines.append(b"connection: close\r\n")
    head = b"".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
        raise ValueError("a header has a line break")
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(b"%b\r\n%b" % (head, body))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True


def server(app: ASGIApp, host: str, port: int) -> uvicorn.Server:
    """uvicorn under our own signals and lifespan: hang-ups and the drain are ours to decide."""
    config = uvicorn.Config(
        app, host=host, port=port, loop="none", http=_Protocol, ws="none", lifespan="off", interface="asgi3",
        proxy_headers=False, server_header=False, date_header=False, access_log=False, log_config=None,
        timeout_keep_alive=75, backlog=4096,
    )  # fmt: skip
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = LifespanOff(config)
    return server
