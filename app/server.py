"""The HTTP server of both ports: uvicorn, with what it leaves to others."""

from __future__ import annotations

import uvicorn
from litestar.types import ASGIApp
from uvicorn.lifespan.off import LifespanOff
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
