"""One Redis connection for all calls. A command goes out at once where nothing waits for an answer; where something
does, those that meet in one turn of the event loop leave as one pipeline at its end.

No call waits for a Redis that is away: the oldest unanswered command has `timeout_ms`; then the connection is dropped,
everything unanswered fails, and until a probe has succeeded every command fails at once.
Setting the connection up (URL, TLS, AUTH, SELECT) is redis-py's part, reading and writing hiredis'.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hiredis import HiredisError, Reader, pack_command
from msgspec import Struct
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisError

from app.ambient import Ambient

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 2.0
"""For TCP, TLS, AUTH and SELECT together: several round trips, and no call waits for them."""
_STEADY_SECONDS = 60.0
"""A second loss within this time of the last doubles the probation: calls under way pay for each loss."""
_LONGEST_PROBATION_SECONDS = 30.0
_GRACE_SECONDS = 0.03
"""An overdue command gets one more look at the socket: it may be the event loop that stood still, not Redis."""
_INCOMPLETE = object()
_BY_DIGEST = b"$7\r\nEVALSHA\r\n$40\r\n"
"""What stands before the digest in a packed command that names its script by it."""

Argument = str | bytes | int
OnError = Callable[[Exception], None]


class RedisAway(Exception):
    """Redis is not there, too slow or has too much waiting. What was sent may have been executed all the same."""


class RedisUnasked(RedisAway):
    """Redis is away, and has not executed this command: it was not sent, or sent back."""


class RedisRefused(Exception):
    """Redis answered with an error; the text is Redis's own and begins with its code (`OOM`, `WRONGTYPE`, …)."""


class Waiting(Struct, gc=False):
    """A command without its answer, packed. `since` is the event loop's time when it was handed in."""

    since: float
    command: bytes
    future: asyncio.Future[Any] | None
    on_error: OnError | None
    turns: int = 0
    """How often another node of a cluster was said to be the one to ask."""

    def fail(self, error: Exception) -> None:
        if self.future is None:
            if self.on_error is not None:
                self.on_error(error)
        elif not self.future.done():
            self.future.set_exception(error)


class Open(Struct, frozen=True):
    """An argument that is not known yet, as Redis's protocol has it but for what `%` puts in."""

    form: bytes


TEXT = Open(b"$%d\r\n%b\r\n")
"""Of any length: that, and the bytes."""


def prepared(*arguments: Argument | Open) -> bytes:
    """A command to be completed by `%`. That takes a quarter of the time of packing the whole of it again."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        if isinstance(argument, Open):
            parts.append(argument.form)
        else:
            parts.append(pack_command((argument,)).partition(b"\r\n")[2].replace(b"%", b"%%"))
    return b"".join(parts)


class _Line(asyncio.Protocol):
    """One connection from set-up to loss. Answers are matched by order, whether or not somebody still waits."""

    def __init__(self, pipe: RedisPipe, transport: asyncio.Transport) -> None:
        self.waiting: deque[Waiting] = deque()
        self.gone = asyncio.Event()
        self._pipe = pipe
        self._transport = transport
        self._timeout_seconds = pipe.timeout_ms / 1000
        self.loop = asyncio.get_running_loop()
        self._reader = Reader(replyError=RedisRefused, notEnoughData=_INCOMPLETE)
        self._unsent: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self._overdue: Waiting | None = None

    def write(
        self, command: bytes, future: asyncio.Future[Any] | None, on_error: OnError | None, turns: int = 0
    ) -> None:
        if not self.waiting:
            self._transport.write(command)
        else:
            if not self._unsent:
                self.loop.call_soon(self._flush)
            self._unsent.append(command)
        self.waiting.append(Waiting(self.loop.time(), command, future, on_error, turns))
        if self._watch is None:
            self._watch = self.loop.call_later(self._timeout_seconds, self._look)

    def _flush(self) -> None:
        if not self.gone.is_set():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def _look(self) -> None:
        """The one timer of a connection: runs while something waits, and looks at the oldest."""
        self._watch = None
        if not self.waiting:
            return
        oldest = self.waiting[0]
        left = oldest.since + self._timeout_seconds - self.loop.time()
        if left <= 0:
            if oldest is self._overdue:
                self.lose(f"no answer within {self._timeout_seconds * 1000:g} ms")
                return
            self._overdue, left = oldest, _GRACE_SECONDS
        self._watch = self.loop.call_later(left, self._look)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not _INCOMPLETE:
                waiting = self.waiting.popleft()
                if type(reply) is RedisRefused:
                    self._refused(waiting, reply)
                elif (future := waiting.future) is not None and not future.done():
                    future.set_result(reply)
        except (HiredisError, IndexError) as error:
            self.lose(f"what came is not an answer: {error}")

    def _refused(self, waiting: Waiting, error: RedisRefused) -> None:
        if not str(error).startswith("NOSCRIPT"):
            self._pipe.refused(waiting, error)
        elif waiting.future is None or not waiting.future.done():
            count, _, rest = waiting.command.partition(_BY_DIGEST)
            text = self._pipe.scripts[rest[:40]].encode()
            command = b"%b$4\r\nEVAL\r\n$%d\r\n%b%b" % (count, len(text), text, rest[40:])
            self.write(command, waiting.future, waiting.on_error, waiting.turns)

    def connection_lost(self, error: Exception | None) -> None:
        self.lose(str(error or "Redis closed the connection"))

    def lose(self, reason: str) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
        self._pipe.lost(self, reason)
        while self.waiting:
            self.waiting.popleft().fail(RedisAway(reason))


class RedisPipe:
    """The connection as the rooms see it. `run` keeps it; `up` says whether it is there, `changes` counts the turns.

    `timeout_ms` and `probe_seconds` may be set at any time and count from the next connection on. What `on_return`
    holds is called each time Redis is there again. One that was lost must answer for `probation_seconds` first, and
    for longer when it comes and goes.
    """

    apart = False
    """Whether a script's keys must share a slot: in a cluster, see redis_cluster.py."""
    name = "redis"

    def __init__(
        self,
        url: str,
        ambient: Ambient,
        *,
        timeout_ms: float = 250,
        probe_seconds: float = 1.0,
        waiting_limit: int = 20_000,
        probation_seconds: float = 2.0,
    ) -> None:
        # RESP2: on it nothing arrives that was not asked for.
        self._pool = ConnectionPool.from_url(url, protocol=2, client_name="gateway")
        self._ambient = ambient
        self.timeout_ms = timeout_ms
        self.probe_seconds = probe_seconds
        self._waiting_limit = waiting_limit
        self.on_return: list[Callable[[], None]] = []
        self.scripts: dict[bytes, str] = {}
        self.up = False
        self.changes = 0
        self._said_up: bool | None = None
        self._said_misnamed = False
        self._lost_at = float("-inf")
        self._first_probation_seconds = probation_seconds
        self._probation_seconds = 0.0
        self._line: _Line | None = None
        self._closed = False

    def script(self, text: str) -> bytes:
        """The digest to `EVALSHA` a Lua script by; where Redis does not know it, its text is sent on instead."""
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode()
        self.scripts[sha] = text
        return sha

    def execute(self, *arguments: Argument) -> asyncio.Future[Any]:
        """Sends a command. The future gives its answer (int, bytes, None, list) or raises `RedisRefused`, `RedisAway`.

        Raises `RedisUnasked` at once when Redis is away or too much waits. A cancelled future changes nothing for the
        commands after it; its own is executed all the same.
        """
        return self.ask(pack_command(arguments))

    def ask(self, command: bytes, key: Argument = "") -> asyncio.Future[Any]:
        """The same with a command that is packed, and its first key, if it has one: see `prepared`."""
        line = self._line
        if line is None or len(line.waiting) >= self._waiting_limit:
            raise self._unasked()
        future: asyncio.Future[Any] = line.loop.create_future()  # asking for the running loop is a system call
        line.write(command, future, None)
        return future

    def send(self, *arguments: Argument, on_error: OnError | None = None) -> None:
        """A command whose answer nobody waits for. Raises `RedisUnasked` at once; `on_error` gets later errors."""
        self.tell(pack_command(arguments), on_error=on_error)

    def tell(self, command: bytes, key: Argument = "", on_error: OnError | None = None) -> None:
        """The same with a command that is packed, and its first key, if it has one."""
        line = self._line
        if line is None or len(line.waiting) >= self._waiting_limit:
            raise self._unasked()
        line.write(command, None, on_error)

    @property
    def nodes(self) -> list[RedisPipe]:
        """For what looks through all keys."""
        return [self]

    def refused(self, waiting: Waiting, error: RedisRefused) -> None:
        """Redis answered a command with an error."""
        if not self._said_misnamed and str(error).startswith("MOVED "):
            self._said_misnamed = True
            log.error("redis is a node of a cluster: name it as one, redis+cluster://HOST:PORT or redis://A,B,C")
        waiting.fail(error)

    def _unasked(self) -> RedisUnasked:
        return RedisUnasked("Redis is away" if self._line is None else f"{self._waiting_limit} commands wait for Redis")

    async def run(self) -> None:
        """Connects, and again after each loss, at most once per `probe_seconds`. Cancelled, it closes first."""
        while not self._closed:
            tried = self._ambient.monotonic()
            try:
                connection, line = await self._connect()
            except (RedisError, RedisAway, RedisRefused, OSError) as error:
                self._say(False, str(error) or f"no connection within {_CONNECT_SECONDS:g} s")
            else:
                try:
                    await line.gone.wait()
                except asyncio.CancelledError:
                    await self.close()
                    raise
                finally:
                    await connection.disconnect(nowait=True)
            await self._ambient.sleep(max(0.0, tried + self.probe_seconds - self._ambient.monotonic()))

    async def _connect(self) -> tuple[AbstractConnection, _Line]:
        """A connection on which a PING was answered in time: a Redis that merely accepts, or still loads, is away."""
        connection = self._pool.make_connection()
        line = None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await connection.connect()
            if asyncio.current_task().cancelling():  # redis-py sends by `wait_for`, which may eat it before Python 3.12
                raise asyncio.CancelledError
            transport = connection._writer.transport  # redis-py has no public name for it
            line = _Line(self, transport)
            transport.set_protocol(line)
            await self._prove(line)
        except BaseException:
            if line is not None:
                line.lose("no connection")
            await connection.disconnect(nowait=True)
            raise
        if not line.gone.is_set():
            self._line, self.up = line, True
            self._say(True, "")
            for callback in self.on_return:
                callback()
        return connection, line

    async def _prove(self, line: _Line) -> None:
        """Sees that Redis answers, one that was lost for as long as its probation lasts. Raises RedisAway."""
        for text in self.scripts.values():  # else each one's first use would be executed after what was sent later
            line.write(pack_command(("SCRIPT", "LOAD", text)), None, None)
        ends = self._ambient.monotonic() + self._probation_seconds
        while True:
            pong: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            line.write(pack_command(("PING",)), pong, None)
            await pong
            left = ends - self._ambient.monotonic()
            if left <= 0:
                return
            await self._ambient.sleep(min(left, self.probe_seconds / 4))
            if line.gone.is_set():
                raise RedisAway("it did not stay")

    def lost(self, line: _Line, reason: str) -> None:
        """A connection reports its end."""
        if line is self._line:
            now = self._ambient.monotonic()
            flapping = now - self._lost_at < _STEADY_SECONDS + self._probation_seconds
            longer = 2 * self._probation_seconds if flapping else self._first_probation_seconds
            self._probation_seconds = min(_LONGEST_PROBATION_SECONDS, longer)
            self._lost_at = now
            self._line, self.up = None, False
            self._say(False, reason)

    def _say(self, up: bool, reason: str) -> None:
        """One log line per change, however often it was tried."""
        if up is self._said_up or self._closed:
            return
        self._said_up = up
        self.changes += 1
        if up:
            log.info("%s is there", self.name)
        else:
            log.warning("%s is away: %s; it is tried every %g s", self.name, reason, self.probe_seconds)

    async def close(self) -> None:
        """Lets what was sent be answered, at most `timeout_ms` long, then hangs up."""
        if self._line is not None:
            with suppress(RedisAway, RedisRefused):
                await self.execute("PING")
        self._closed = True
        if self._line is not None:
            self._line.lose("the gateway stops")
