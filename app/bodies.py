"""Request bodies on their way in: one at a time bounded, and all of them together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from litestar.types import Message, Receive
from msgspec import Struct

from app.ambient import Patience
from app.config import Settings
from app.errors import InvalidRequest, Overloaded, RequestTooLarge

UPLOAD_SECONDS = 300.0
"""A request body that takes longer than this to arrive is given up."""


class Bodies(Struct):
    """Request bodies in memory, of all calls that are being served, in bytes."""

    held: int = 0

    def take(self, body: bytes, settings: Settings) -> bytes:
        """One that is here as a whole, counted in `held` until it is given back. Raises RequestTooLarge, Overloaded."""
        if len(body) > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)
        if self.held + len(body) > settings.max_bodies_bytes:
            raise _full()
        self.held += len(body)
        return body

    async def read(
        self, headers: Mapping[bytes, str], receive: Receive, settings: Settings, patience: Patience
    ) -> bytes | None:
        """One body, counted in `held` until it is given back; None when the client hung up.

        Raises RequestTooLarge, InvalidRequest, and Overloaded where all bodies together would be too much. What is not
        taken is read on and dropped, to twice the limit: closing on a sender that still writes would reset the
        connection, and it would never see why.
        """
        max_bytes = settings.max_body_bytes
        length = headers.get(b"content-length", "")
        if length.isdigit() and int(length) > 2 * max_bytes:
            raise _too_large(max_bytes)
        parts: list[bytes] = []
        size = kept = 0
        full = False
        message: Message = {"type": "http.request", "more_body": True}
        patience.limit(UPLOAD_SECONDS)
        try:
            while message.get("more_body") and size <= 2 * max_bytes:
                message = await receive()
                part = message.get("body", b"")
                size += len(part)
                full = full or self.held + len(part) > settings.max_bodies_bytes
                if size <= max_bytes and not full:
                    parts.append(part)
                    kept += len(part)
                    self.held += len(part)
                else:
                    parts.clear()
                    self.held -= kept
                    kept = 0
            if message["type"] == "http.disconnect":
                return None
            if size > max_bytes:
                raise _too_large(max_bytes)
            if full:
                raise _full()
            body, kept = parts[0] if len(parts) == 1 else b"".join(parts), 0
            return body
        except asyncio.CancelledError:
            if not patience.over():
                raise
            raise InvalidRequest(f"The body did not arrive within {UPLOAD_SECONDS:g} s.") from None
        finally:
            patience.lift()
            self.held -= kept


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is above {max_bytes} bytes. Send less, or ask for a higher limit.")


def _full() -> Overloaded:
    return Overloaded("This replica holds all the request bodies that it has room for. Send the call again.")
