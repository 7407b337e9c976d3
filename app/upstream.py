"""The dialogue with vendors: one request in, one streamed answer out. The only I/O of the vendor side.

Two engines pass the same tests: `Http1`, the default, and `Httpx`, the reference, which also serves where a proxy is
set in the environment. Neither follows redirects; both build their headers from `Outgoing` alone.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from typing import Protocol

import certifi

from app.ambient import Ambient
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
    tls = _trusting()
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        from app.upstream_httpx import Httpx

        return Httpx(tls)
    return Http1(tls, ambient)


def _trusting() -> ssl.SSLContext:
    """Whom httpx trusts too: the certificates that the environment names, else Mozilla's."""
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and folder:
        return ssl.create_default_context(capath=folder)
    return ssl.create_default_context(cafile=file or certifi.where())
