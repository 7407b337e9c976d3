"""A load generator that costs about 25 microseconds a request, so that it is not what is measured.

Closed loop: each of `concurrency` connections sends its next request the moment the last answer is complete. Requests
are bytes, made once, and sent in turn. An answer counts only if it is whole: status 200, every byte that its framing
promised and, for an event stream, `data: [DONE]` at its end. Anything else is an error, counted by kind.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast
from urllib.parse import urlsplit

import msgspec

RECONNECT_SECONDS = 0.01
"""Between two refused connections: time bounds a run, and 100,000 refusals a second would tell no more than 100."""
LATE_SECONDS = 10.0
"""How long answers under way may still take when the time is up, before they count as errors."""
NUMBER = b"<number it!>"
"""Where a request has this, it is another one each time: its number, as long as this, stands in its place."""
_DONE = b"data: [DONE]\n\n"
_ENDS = (_DONE, b'data: {"type":"message_stop"}\n\n')
"""How a whole stream ends, in chat completions and in Messages."""
_TAIL_BYTES = max(map(len, _ENDS))


class Asked(msgspec.Struct, frozen=True):
    """A request as it goes over the wire, and the events of its answer after which the client hangs up; 0: it stays."""

    request: bytes
    hangs_up_after: int = 0


class Latency(msgspec.Struct, frozen=True):
    """Percentiles in microseconds; zero when nothing was measured."""

    p50_us: float
    p95_us: float
    p99_us: float


class LoadResult(msgspec.Struct, frozen=True):
    """What one run saw. `completed` and the latencies are of whole answers within `seconds`; `late` came whole after
    it. `errors` is by kind: `status 429`, `truncated`, `no [DONE]`, `malformed`, `connect`, `unfinished`.
    `events` counts the server-sent events of all answers; `hung_up` the answers that the client left as it was to.
    """

    seconds: float
    completed: int
    late: int
    errors: dict[str, int]
    latency: Latency
    first_byte: Latency
    events: int
    hung_up: int = 0

    @property
    def per_second(self) -> float:
        return self.completed / self.seconds if self.seconds else 0.0


def percentile(ordered: Sequence[float], permille: int) -> float:
    """The nearest-rank percentile of an ascending sequence, in thousandths (950 is p95); 0 for an empty one."""
    if not ordered:
        return 0.0
    return ordered[max(1, -(-len(ordered) * permille // 1000)) - 1]


def latency(seconds: Sequence[float]) -> Latency:
    """The percentiles of durations in seconds."""
    ordered = sorted(seconds)
    return Latency(*(percentile(ordered, permille) * 1e6 for permille in (500, 950, 990)))


def request_bytes(url: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A POST as it goes over the wire."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path or '/'} HTTP/1.1", f"host: {parts.netloc}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Tally:
    """What the connections of one run share. `stopping` ends the sending; only answers before it are measured."""

    def __init__(
        self, count: int | None, expected: int = 200, interval_seconds: float = 0.0, sent_before: int = 0
    ) -> None:
        self.expected = expected
        self.interval_seconds = interval_seconds
        self.sent = sent_before
        self.latencies = array("d")
        self.first_bytes = array("d")
        self.errors: Counter[str] = Counter()
        self.events = 0
        self.hung_up = 0
        self.late = 0
        self.stopping = False
        self._left = count

    def take(self) -> bool:
        """Whether one more request may be sent."""
        if self.stopping or self._left == 0:
            return False
        if self._left is not None:
            self._left -= 1
        self.sent += 1
        return True


class Connection(asyncio.Protocol):
    """One keep-alive connection. `over` is done when it will send nothing more: True if others may take its place."""

    def __init__(self, asked: Sequence[Asked], tally: Tally, over: asyncio.Future[bool]) -> None:
        self._asked = asked
        self._tally = tally
        self._over = over
        self._transport: asyncio.Transport
        self._waiting = False
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send_when_due()

    def _send_when_due(self) -> None:
        """Now, or with an interval when it is time: the first of each connection at a time of its own."""
        interval, now = self._tally.interval_seconds, time.perf_counter()
        if not interval:
            self._send()
            return
        self._next_at = max(now, self._next_at + interval) if self._next_at else now + random.random() * interval
        self._timer = asyncio.get_running_loop().call_later(self._next_at - now, self._send)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("truncated")

    @property
    def begun(self) -> bool:
        """Whether its answer is under way."""
        return self._waiting and self._first_at > 0.0

    def give_up(self) -> None:
        """Counts the answer under way, if any, as unfinished and closes."""
        if self._timer is not None:
            self._timer.cancel()
        self._fail("unfinished")

    def _send(self) -> None:
        if not self._tally.take():
            self._end(False)
            return
        self._waiting = True
        self._unread = b""
        self._headers_read = False
        self._left = 0  # bytes of a body with a Content-Length
        self._tail = b""
        self._first_at = 0.0
        number = self._tally.sent
        asked = self._asked[number % len(self._asked)]
        self._events_left = asked.hangs_up_after or -1
        self._sent_at = time.perf_counter()
        self._transport.write(asked.request.replace(NUMBER, b"%012d" % number))

    def _fail(self, kind: str) -> None:
        if self._waiting:
            self._tally.errors[kind] += 1
        self._end(True)

    def _end(self, replaceable: bool) -> None:
        self._waiting = False
        if not self._over.done():
            self._over.set_result(replaceable)
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._waiting:
            return
        if self._unread:
            data = self._unread + data
            self._unread = b""
        try:
            self._read(data)
        except ValueError:
            self._fail("malformed")

    def _read(self, data: bytes) -> None:
        if not self._headers_read:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._unread = data
                return
            self._read_headers(data[: end + 2].lower())
            data = data[end + 4 :]
        if data and not self._first_at:
            self._first_at = time.perf_counter()
        if self._chunked:
            self._read_chunks(data)
            return
        self._left -= len(data)
        if self._left <= 0:
            self._finish()

    def _read_headers(self, headers: bytes) -> None:
        self._headers_read = True
        self._status = int(headers[9:12])
        self._closes = b"\r\nconnection: close\r\n" in headers
        self._is_stream = b"\r\ncontent-type: text/event-stream" in headers
        self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in headers
        if not self._chunked:
            at = headers.index(b"\r\ncontent-length:") + len(b"\r\ncontent-length:")
            self._left = int(headers[at : headers.index(b"\r\n", at)])

    def _read_chunks(self, data: bytes) -> None:
        at = 0
        while (size_end := data.find(b"\r\n", at)) >= 0:
            start = size_end + 2
            end = start + int(data[at:size_end], 16)
            if len(data) < end + 2:
                break
            if end == start:
                self._finish()
                return
            if self._is_stream:
                events = data.count(b"data: ", start, end)
                self._tally.events += events
                self._tail = (self._tail + data[start:end])[-_TAIL_BYTES:]
                if self._events_left > 0:
                    self._events_left -= events
                    if self._events_left <= 0:
                        self._hang_up()
                        return
            at = end + 2
        self._unread = data[at:]

    def _hang_up(self) -> None:
        self._tally.hung_up += 1
        self._waiting = False
        self._over.set_result(True)
        self._transport.abort()

    def _finish(self) -> None:
        now = time.perf_counter()
        tally = self._tally
        self._waiting = False
        if self._status != tally.expected:
            tally.errors[f"status {self._status}"] += 1
        elif self._is_stream and not self._tail.endswith(_ENDS):
            tally.errors["no [DONE]"] += 1
        elif tally.stopping:
            tally.late += 1
        else:
            tally.latencies.append(now - self._sent_at)
            tally.first_bytes.append(self._first_at - self._sent_at)
        if self._closes:
            self._end(True)
        else:
            self._send_when_due()


async def run_load(
    url: str,
    request: bytes | Sequence[Asked],
    *,
    concurrency: int,
    duration_seconds: float | None = None,
    count: int | None = None,
    expected: int = 200,
    interval_seconds: float = 0.0,
    sent_before: int = 0,
    tls: ssl.SSLContext | None = None,
) -> LoadResult:
    """Sends `request` to the host of `url` for a time or a number of requests, whichever ends first.

    Of several requests the n-th sent is the one at n modulo their number, with those `sent_before` counted too.

    An answer with another status than `expected` is an error. With an interval each connection sends no more often than
    that, and never before its last answer is complete.

    Answers under way when the time is up are waited for, so that the server is idle afterwards.
    """
    host, port = urlsplit(url).hostname, urlsplit(url).port
    if host is None or port is None or (duration_seconds is None and count is None):
        raise ValueError("a load needs a host, a port, and a duration or a count")
    loop = asyncio.get_running_loop()
    asked = [Asked(request)] if isinstance(request, bytes) else request
    tally = Tally(count, expected, interval_seconds, sent_before)
    live: set[Connection] = set()

    async def keep_connected() -> None:
        replaced = True
        while replaced and not tally.stopping:
            over: asyncio.Future[bool] = loop.create_future()
            try:
                _, connection = await loop.create_connection(
                    partial(Connection, asked, tally, over), host, port, ssl=tls
                )
            except OSError:
                tally.errors["connect"] += 1
                replaced = tally.take()
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            live.add(connection)
            replaced = await over
            live.discard(connection)

    started = time.perf_counter()
    workers = [asyncio.ensure_future(keep_connected()) for _ in range(concurrency)]
    _, unfinished = await asyncio.wait(workers, timeout=duration_seconds)
    seconds = time.perf_counter() - started
    tally.stopping = True
    if unfinished:
        await asyncio.wait(unfinished, timeout=LATE_SECONDS)
    for connection in list(live):
        connection.give_up()
    await asyncio.gather(*workers)
    return LoadResult(
        seconds=seconds,
        completed=len(tally.latencies),
        late=tally.late,
        errors=dict(tally.errors),
        latency=latency(tally.latencies),
        first_byte=latency(tally.first_bytes),
        events=tally.events,
        hung_up=tally.hung_up,
    )


async def hold_open(url: str, request: bytes, count: int, tls: ssl.SSLContext | None = None) -> list[Connection]:
    """So many answers that have begun; `give_up` ends each. Raises RuntimeError where one has not in LATE_SECONDS."""
    loop = asyncio.get_running_loop()
    parts, tally = urlsplit(url), Tally(count)
    held: list[Connection] = []
    for _ in range(count):
        made = partial(Connection, [Asked(request)], tally, loop.create_future())
        held.append((await loop.create_connection(made, parts.hostname, parts.port, ssl=tls))[1])
    deadline = loop.time() + LATE_SECONDS
    while not all(one.begun for one in held):
        if loop.time() > deadline:
            raise RuntimeError(f"{sum(not one.begun for one in held)} of {count} streams have not begun")
        await asyncio.sleep(0.02)
    return held
