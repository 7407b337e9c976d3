"""The dialogue with vendors: one request in, one streamed answer out. The only I/O of the vendor side; home of httpx.

Two engines pass the same tests: `Http1`, the default, and `Httpx`, the reference, which also serves where a proxy is
set in the environment. Neither follows redirects; both build their headers from `Outgoing` alone.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Protocol

import httpx

from app.ambient import Ambient
from app.errors import VendorBroke, VendorError, VendorUnreachable
from app.http1 import Http1
from app.providers.translator import Outgoing


class VendorAnswer(Protocol):
    """An answer whose head has arrived. `headers` have lower-case names. Close it on every path."""

    status: int
    headers: Mapping[str, str]

    async def chunk(self) -> bytes | None:
        """The next bytes as they arrive; None at the end. Raises VendorBroke when the answer was cut."""

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        """Gives `take` each part the moment it arrives, until that says that it wants no more: True then, False at the
        end. Raises VendorBroke when the answer was cut, and what `take` raises.
        """

    async def read(self, max_bytes: int) -> bytes:
        """The whole body. Raises VendorBroke when it was cut or is larger."""

    async def close(self, ended: bool = False) -> None:
        """Ends the vendor's work if the answer was not read to its end. May be called twice.

        `ended`: the answer's last event was read; the connection may be kept if the HTTP message ends in time.
        """


class Engine(Protocol):
    async def open(self, outgoing: Outgoing, connect_seconds: float) -> VendorAnswer:
        """Sends, and returns once the answer's head is there. Raises VendorUnreachable, VendorBroke.

        Cancelling it ends the connection, so that the vendor stops.
        """

    async def close(self) -> None:
        """Ends idle connections."""


Upstream = Engine


def engine(ambient: Ambient) -> Engine:
    """The engine for this environment."""
    tls = httpx.create_ssl_context()
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return Httpx(tls)
    return Http1(tls, ambient)


class Httpx:
    """The reference engine.

    Its limits: a call cancelled during the TLS handshake leaves its connection to the garbage collector, and bytes
    that a vendor sends beyond its answer are taken for the next one.
    """

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._client = httpx.AsyncClient(
            verify=tls,
            timeout=None,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=512, keepalive_expiry=55.0),
        )

    async def open(self, outgoing: Outgoing, connect_seconds: float) -> _HttpxAnswer:
        request = self._client.build_request(
            outgoing.method,
            outgoing.url,
            headers=dict(outgoing.headers) | {"accept-encoding": "identity"},
            content=outgoing.body,
            timeout=httpx.Timeout(None, connect=connect_seconds),
        )
        del request.headers["user-agent"]
        try:
            return _HttpxAnswer(await self._client.send(request, stream=True))
        except httpx.TransportError as error:
            raise _mapped(error) from error
        except UnicodeError as error:
            raise VendorUnreachable("no connection (UnicodeError)") from error

    async def close(self) -> None:
        await self._client.aclose()


class _HttpxAnswer:
    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self._response = response
        self._chunks = response.aiter_raw()

    async def chunk(self) -> bytes | None:
        try:
            return await anext(self._chunks, None)
        except httpx.TransportError as error:
            raise VendorBroke("the vendor cut its answer") from error

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        while (part := await self.chunk()) is not None:
            if not take(part):
                return True
        return False

    async def read(self, max_bytes: int) -> bytes:
        parts = []
        size = 0
        while (part := await self.chunk()) is not None:
            size += len(part)
            if size > max_bytes:
                raise VendorBroke("the vendor's answer is too large")
            parts.append(part)
        return b"".join(parts)

    async def close(self, ended: bool = False) -> None:
        await self._response.aclose()


FAILURES: dict[type[httpx.TransportError], type[VendorError]] = {
    httpx.ConnectError: VendorUnreachable,
    httpx.ConnectTimeout: VendorUnreachable,
    httpx.PoolTimeout: VendorUnreachable,
    httpx.ProxyError: VendorUnreachable,
    httpx.UnsupportedProtocol: VendorUnreachable,
    httpx.ReadTimeout: VendorBroke,
    httpx.WriteTimeout: VendorBroke,
    httpx.ReadError: VendorBroke,
    httpx.WriteError: VendorBroke,
    httpx.CloseError: VendorBroke,
    httpx.LocalProtocolError: VendorBroke,
    httpx.RemoteProtocolError: VendorBroke,
}
"""What each of httpx's failures means before the answer's head."""


def _mapped(error: httpx.TransportError) -> VendorError:
    return FAILURES[type(error)](f"the vendor's connection failed ({type(error).__name__})")
