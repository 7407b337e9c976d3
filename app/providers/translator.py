"""What a provider is: a frozen row of pure functions. `upstream.py` alone does the I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum

from msgspec import Struct

from app.config import Target
from app.core import Usage
from app.errors import VendorError
from app.wire import ChatRequest


class Outgoing(Struct, frozen=True):
    """One request to a vendor. Headers are built here, never copied from the client."""

    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Answer(Struct, frozen=True):
    """What a unary answer tells the ledger. `usage` is None where the vendor reported none.

    `text_bytes` is the size of the generated text, for an estimate in that case.
    """

    model: str | None
    usage: Usage | None
    finish_reason: str | None
    text_bytes: int


class Kind(IntEnum):
    """What a frame of a stream means to the relay."""

    START = 0  # before the first content: held back, so that a failure can still fall back
    CONTENT = 1
    USAGE = 2  # usage alone: withheld from a client that did not ask for it
    DONE = 3  # the vendor's last frame


class StreamScan:
    """Reads a stream frame by frame as it is relayed, and keeps what the ledger needs.

    `scan` says what a frame means; it raises `VendorError` for an error event or a frame that is not the vendor's
    format. `finished` is True once the vendor has said why it stopped: a stream that ends before was cut.
    """

    usage: Usage | None = None
    model: str | None = None
    finish_reason: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def scan(self, frame: bytes) -> Kind:
        raise NotImplementedError

    def text_bytes(self, frame: bytes) -> int:
        """Size of the text that a content frame carries."""
        raise NotImplementedError


class Translator(Struct, frozen=True):
    """Pure: no clock, no id, no log, no I/O.

    chat       the vendor's request for a chat call at a target
    response   reads a unary answer; raises VendorBroke
    stream     a fresh scan for one streamed answer
    error      what an HTTP status with its headers (lower-case names) and body means
    request_id_header   where the vendor puts its own request id
    """

    chat: Callable[[ChatRequest, Target], Outgoing]
    response: Callable[[bytes], Answer]
    stream: Callable[[], StreamScan]
    error: Callable[[int, Mapping[str, str], bytes], VendorError]
    request_id_header: str
