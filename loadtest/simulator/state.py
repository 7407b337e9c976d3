"""What the simulator knows of one vendor: its faults, and what it was asked and how that ended."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import msgspec

from loadtest.simulator.faults import Faults
from loadtest.simulator.http import Reply, Request
from loadtest.simulator.shape import Quota

KEPT_REQUESTS = 200
KEPT_BODY_BYTES = 256 * 1024
REQUESTS_LIMIT = 10_000  # a minute; what the quota headers say
TOKENS_LIMIT = 2_000_000  # a minute


class _Counts:
    def __init__(self) -> None:
        self.requests = self.streams = self.completed = self.aborted = self.broken = 0
        self.by_path: defaultdict[str, Counter[str]] = defaultdict(Counter)


class Vendor:
    """One vendor's state. `requests` is always `completed + aborted + broken` plus those open."""

    def __init__(self) -> None:
        self.faults = Faults()
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

    def spend(self, tokens: int) -> None:
        self._minute_tokens += tokens

    def counts(self) -> dict[str, Any]:
        """The counters, as `GET /_sim/counts` shows them."""
        counts = self._counts
        return {
            "requests": counts.requests,
            "streams": counts.streams,
            "completed": counts.completed,
            "aborted": counts.aborted,
            "broken": counts.broken,
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
