"""What a vendor's shape is: pure functions from a request to an answer, without waiting, faults or sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import Struct

from loadtest.simulator.http import Headers, Request


class Quota(Struct, frozen=True):
    """What the vendor's rate limit headers say; the figures count but never refuse (the `throttle` fault does)."""

    requests_limit: int
    requests_used: int
    tokens_limit: int
    tokens_used: int


class Unary(Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes
    latency_ms: float = 0
    tokens: int = 0
    """Tokens that the answer reports, for the rate limit figures of later answers."""


class Stream(Struct, frozen=True):
    """A streamed answer with status 200: `events` are whole SSE events, the terminating one included."""

    headers: Headers
    events: Iterator[bytes]
    error_event: Callable[[str, str | None], bytes]
    """Writes the vendor's error event from a message and a code, for an error in the middle of this stream."""
    latency_ms: float = 0
    chunk_ms: float = 0
    tokens: int = 0
    comment: bytes = b""
    """A comment that the vendor sends while nothing else is ready; empty when it sends none."""


class Problem(Struct, frozen=True):
    """An error in OpenAI's four words; each shape writes it in its own way."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Headers = []


class Shape(Struct, frozen=True):
    """How one vendor speaks."""

    answer: Callable[[Request, Quota], Unary | Stream]
    model: Callable[[Request], str]
    """The model that a request names, empty when it names none; never raises."""
    authorize: Callable[[Request, str | None], Problem | None]
    """None when the credential is good; the second argument is the key insisted on, None when any will do."""
    error: Callable[[Problem], Unary]
