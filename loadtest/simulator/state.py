"""What the simulator knows of one vendor: its faults, and what it was asked and how that ended."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from loadtest.simulator.faults import Faults
from loadtest.simulator.http import Reply, Request
from loadtest.simulator.shape import Quota

KEPT_REQUESTS = 200
KEPT_BODY_BYTES = 256 * 1024
REQUESTS_LIMIT = 10_000  # a minute; what the quota headers say
TOKENS_LIMIT = 2_000_000  # a minute
BURST = 6
"""A sixth of a minute's grant may be used at once: vendors hold a limit over shorter times than its minute."""


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the vendor grants in a minute, and enforces: beyond it 429. Unlike the quota headers, which only count."""

    rpm: Annotated[int, msgspec.Meta(gt=0)]
    tpm: Annotated[int, msgspec.Meta(gt=0)]


class _Counts:
    def __init__(self) -> None:
        self.requests = self.streams = self.completed = self.aborted = self.broken = self.refused = 0
        self.by_path: defaultdict[str, Counter[str]] = defaultdict(Counter)


class Vendor:
    """One vendor's state. `requests` is always `completed + aborted + broken` plus those open."""

    def __init__(self, grant: Grant | None = None) -> None:
        self.faults = Faults()
        self.grant(grant)
        self._open = 0
        self._minute = 0
        self._minute_requests = 0
        self._minute_tokens = 0
        self.reset()

    def reset(self) -> None:
        """Forget counts and requests; calls that are open stay open, and count nowhere when they end."""
        self._counts = _Counts()
        self._kept: deque[tuple[Request, Reply, bytes]] = deque(maxlen=KEPT_REQUESTS)

    @contextlib.contextmanager
    def call(self, request: Request, reply: Reply) -> Iterator[None]:
        """Count and keep one request for as long as it is being answered."""
        counts = self._counts
        counts.requests += 1
        self._open += 1
        self._kept.append((msgspec.structs.replace(request, body=b""), reply, request.body[:KEPT_BODY_BYTES]))
        try:
            yield
        finally:
            self._open -= 1
            counts.completed += reply.complete
            counts.broken += reply.broken
            counts.aborted += not reply.complete and not reply.broken
            status = "none" if reply.status is None else str(reply.status)
            counts.by_path[f"{request.method} {request.path}"][status] += 1

    def stream_begins(self) -> None:
        self._counts.streams += 1

    def quota(self) -> Quota:
        """The rate limit figures for a request that starts now, which is counted."""
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._minute_requests, self._minute_tokens = minute, 0, 0
        self._minute_requests += 1
        return Quota(
            requests_limit=REQUESTS_LIMIT,
            requests_used=self._minute_requests,
            tokens_limit=TOKENS_LIMIT,
            tokens_used=self._minute_tokens,
        )

    def grant(self, grant: Grant | None) -> None:
        """From now on this much a minute; None is no end of it."""
        self._grant = grant
        self._filled_at = time.monotonic()
        if grant:
            self._requests_left, self._tokens_left = self._brim = grant.rpm / BURST, grant.tpm / BURST

    def admits(self) -> bool:
        """Whether the grant has room for a request, which is then taken; tokens are taken when they are known."""
        if self._grant is None:
            return True
        now = time.monotonic()
        minutes, self._filled_at = (now - self._filled_at) / 60, now
        self._requests_left = min(self._brim[0], self._requests_left + minutes * self._grant.rpm)
        self._tokens_left = min(self._brim[1], self._tokens_left + minutes * self._grant.tpm)
        if self._requests_left < 1 or self._tokens_left <= 0:
            self._counts.refused += 1
            return False
        self._requests_left -= 1
        return True

    def spend(self, tokens: int) -> None:
        self._minute_tokens += tokens
        if self._grant:
            self._tokens_left -= tokens

    def counts(self) -> dict[str, Any]:
        """The counters, as `GET /_sim/counts` shows them."""
        counts = self._counts
        return {
            "requests": counts.requests,
            "streams": counts.streams,
            "completed": counts.completed,
            "aborted": counts.aborted,
            "broken": counts.broken,
            "refused": counts.refused,
            "open": self._open,
            "by_path": {path: dict(statuses) for path, statuses in counts.by_path.items()},
        }

    def requests(self, vendor: str) -> list[dict[str, Any]]:
        """The last requests, oldest first; `body` is JSON where it is JSON, otherwise text (cut at 256 KiB)."""
        return [
            {
                "vendor": vendor,
                "method": request.method,
                "path": request.path,
                "headers": request.headers,
                "body": _body(body),
                "received_ms": request.received_ms,
                "hung_up_ms": reply.hung_up_ms,
                "status": reply.status,
            }
            for request, reply, body in self._kept
        ]


def _body(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode("utf-8", "replace")
