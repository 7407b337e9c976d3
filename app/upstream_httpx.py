"""The reference engine, on httpx: passes the same tests as the default, and serves where a proxy is set.

A module of its own because httpx is 8 MB and a tenth of a cold start that a replica without a proxy does without.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from app.errors import VendorBroke, VendorError, VendorUnreachable
from app.providers.translator import Outgoing


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
