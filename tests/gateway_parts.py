"""Rooms of a gateway that a test scripts and reads: a vendor's answers, limits, telemetry, a spool that may fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from app import guardrails
from app.ambient import Ambient, timestamp
from app.cache import Cache
from app.config import Alias, Config, ServiceKey, Tenant, Timeouts, WrittenRetry, WrittenSpool
from app.control import Control, Entry
from app.cooldowns import Cooldowns
from app.core import Call, Exchange, Fetch, LedgerEvent, Rates, Reply, Reservation
from app.credentials import Credentials, client
from app.dialects import ROUTES
from app.dialogue import Dialogue
from app.errors import GatewayError, LedgerUnavailable, VendorBroke, VendorError
from app.gateway import Gateway
from app.guardrails import Guardrails
from app.ledger import Spool, read_lines
from app.limits import Limits
from app.modes import Modes
from app.overload import Overload
from app.providers.translator import Outgoing
from app.redis_pipe import RedisPipe
from tests import test_auth
from tests.ledger_parts import conforming
from tests.translation import target

ALIAS = "support-fast"
UNENDED = None
"""Stands in a script for a vendor that says nothing more."""
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


def config(*, total_seconds: float = 5.0, longest_seconds: float = 5.0) -> Config:
    """The tables of `test_auth`, with an alias of one target and limits for one test."""
    only = target("openai")
    timeouts = Timeouts(1.0, total_seconds, total_seconds, total_seconds, total_seconds)
    settings = msgspec.structs.replace(
        test_auth.CONFIG.settings,
        max_body_bytes=10_000,
        start_buffer_bytes=65_536,
        longest_seconds=longest_seconds,
        retry=WrittenRetry(max_attempts=2, backoff_base_seconds=2.0, backoff_cap_seconds=2.0),
    )
    aliases = {ALIAS: Alias(ALIAS, (only,), (only.name,), 100, timeouts)}
    return msgspec.structs.replace(test_auth.CONFIG, settings=settings, aliases=aliases)


def request(*, stream: bool = False, **fields: object) -> bytes:
    return msgspec.json.encode({"model": ALIAS, "messages": [], "stream": stream, **fields})


def call(body: bytes, ambient: Ambient, **fields: Any) -> Call:
    """A call of the tenant `acme-corp`."""
    now = ambient.now()
    written = {
        "event_id": ambient.event_id(now),
        "request_id": "req-1",
        "received_at": now,
        "occurred_at": timestamp(now),
        "started": ambient.monotonic(),
        "config": config(),
        "dialect": ROUTES["/v1/chat/completions"],
        "key": ServiceKey("k3f9a0b1c2d4", "support-bot", frozenset({"acme-corp"}), None),
        "body": body,
        "tenant_claimed": "acme-corp",
        "trace_id": ambient.trace_id(),
    }
    return Call(**(written | fields))


# --- what vendors say -------------------------------------------------------------------------------------------------


def completion(**fields: object) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    return msgspec.json.encode({"model": "model-2026-01-01", "choices": [choice], "usage": USAGE, **fields})


def chunk(text: str | None = None, finish_reason: str | None = None, **fields: object) -> bytes:
    """A frame of a stream: with a text, or why the vendor stopped."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish_reason}
    return frame({"model": "model-2026-01-01", "choices": [choice], **fields})


def frame(data: Mapping[str, object]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(data)


USAGE_FRAME = frame({"model": "model-2026-01-01", "choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
STREAM = (chunk("hel"), chunk("lo"), chunk(finish_reason="stop"), USAGE_FRAME, DONE)


class ScriptedAnswer:
    """Implements `upstream.VendorAnswer`: its parts one by one, an exception among them raised, UNENDED for ever."""

    def __init__(
        self,
        *parts: bytes | Exception | None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        close_fails: Exception | None = None,
    ) -> None:
        self.status = status
        self.headers = headers or {}
        self.closed: list[bool] = []
        """`ended` of each call of `close`."""
        self._parts = iter(parts)
        self._close_fails = close_fails

    async def chunk(self) -> bytes | None:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            if part is UNENDED:
                await asyncio.Event().wait()
            return part
        return None

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        while (part := await self.chunk()) is not None:
            if not take(part):
                return True
        return False

    async def read(self, max_bytes: int) -> bytes:
        whole = b""
        while (part := await self.chunk()) is not None:
            whole += part
            if len(whole) > max_bytes:
                raise VendorBroke("the vendor's answer is too large")
        return whole

    async def close(self, ended: bool = False) -> None:
        self.closed.append(ended)
        if self._close_fails is not None:
            raise self._close_fails


class ScriptedUpstream:
    """Implements `upstream.Engine`: the next answer of the script, or its failure."""

    def __init__(self, *script: ScriptedAnswer | VendorError) -> None:
        self._script = iter(script)

    async def open(self, outgoing: Outgoing, connect_seconds: float) -> ScriptedAnswer:
        said = next(self._script)
        if isinstance(said, VendorError):
            raise said
        return said

    async def close(self) -> None:
        pass


# --- the other rooms --------------------------------------------------------------------------------------------------


class Clock(Ambient):
    """Sleeping moves the clock and takes no time; chance is always a half."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    def random(self) -> float:
        return 0.5

    async def sleep(self, seconds: float) -> None:
        self.ahead += seconds


class Hearing(Ambient):
    """The channel's: for it no time goes by, so what it has read is fresh, however long the machine stood still."""

    def monotonic(self) -> float:
        return 0.0


class KeptLimits:
    """Grants everything. `reserved` and `settled` have the tokens and nano-dollars of each call."""

    nearly = False

    def __init__(self) -> None:
        self.reserved: list[tuple[int, int]] = []
        self.settled: list[tuple[int, int]] = []

    async def reserve(
        self, call: Call, tenant: Tenant, tokens: int, nanos: int, fetch: Fetch | None = None
    ) -> Reservation:
        self.reserved.append((tokens, nanos))
        return Reservation(call.event_id, tenant.id, tokens)

    async def look(self, config: Config, tenant: Tenant, key: ServiceKey) -> Rates | None:
        return None

    def nearly_used(self, call: Call, tenant: Tenant) -> bool:
        return self.nearly

    def settle(self, reservation: Reservation, tokens: int, nanos: int) -> None:
        self.settled.append((tokens, nanos))


class KeptControl:
    """A channel whose entries the test writes: `told` has them by kind and name."""

    def __init__(self) -> None:
        self.told: dict[str, dict[str, Entry]] = {}

    def kind(self, kind: str) -> dict[str, Entry]:
        return self.told.setdefault(kind, {})


class KeptTelemetry:
    """Remembers what it is told. `recorded` has the events."""

    def __init__(self) -> None:
        self.recorded: list[LedgerEvent] = []
        self.checks: list[tuple[str, ...]] = []
        self.unidentified_codes: list[str] = []
        self.mirrored: list[tuple[object, ...]] = []
        self.audited: list[tuple[str, str, dict[str, object]]] = []

    def record(self, exchange: Exchange, event: LedgerEvent, row: bytes | None) -> None:
        self.recorded.append(event)

    def unidentified(self, error: GatewayError) -> None:
        self.unidentified_codes.append(error.code)

    def audit(self, who: str, action: str, **what: object) -> None:
        self.audited.append((who, action, what))

    def vendor_error(self, *_: object) -> None:
        pass

    def misconfigured(self, *_: object) -> None:
        pass

    def fell_back(self, *_: object) -> None:
        pass

    def escalated(self, *_: object) -> None:
        pass

    def hedged(self, *_: object) -> None:
        pass

    def shadowed(self, *what: object) -> None:
        self.mirrored.append(what)

    def broke_off(self, *_: object) -> None:
        pass

    def guarded(self, *what: str) -> None:
        self.checks.append(what)


class FailingSpool(Spool):
    """A spool that takes calls and intents, and no row."""

    def append(self, event: LedgerEvent) -> bytes:
        raise LedgerUnavailable("The disk is full.")


class Rooms:
    """A gateway in `folder` whose vendor speaks by `script`."""

    def __init__(
        self,
        folder: Path,
        *script: ScriptedAnswer | VendorError,
        spool: type[Spool] = Spool,
        ambient: Ambient,
        pipe: RedisPipe | None = None,
        limits: Limits | None = None,
        replica: str = "r1",
    ) -> None:
        """`pipe` leads to the Redis of answers from before; None: it is away."""
        pipe = pipe or RedisPipe("redis://127.0.0.1:1", ambient)
        self.folder = folder
        self.ambient = ambient
        self.limits = limits or KeptLimits()
        self.telemetry = KeptTelemetry()
        self.control = KeptControl()
        self.channel = Control(pipe, Hearing())
        self.cache = Cache(pipe, self.channel, ambient)
        self.overload = Overload(config, ambient, lambda late, tick: None)
        self.guardrails = Guardrails(guardrails.client, self.telemetry.guarded, ambient)
        self.spool = spool(folder, replica, WrittenSpool(reserve_bytes=0), ambient)
        self.dialogue = Dialogue(
            limits=self.limits,
            spool=self.spool,
            credentials=Credentials(client, ambient),
            cooldowns=Cooldowns(ambient),
            upstream=ScriptedUpstream(*script),
            telemetry=self.telemetry,
            ambient=ambient,
        )
        self.gateway = Gateway(
            modes=Modes(self.control, ambient),
            overload=self.overload,
            guardrails=self.guardrails,
            dialogue=self.dialogue,
            limits=self.limits,
            cache=self.cache,
            spool=self.spool,
            telemetry=self.telemetry,
            ambient=ambient,
        )
        self.spool.open()

    def rows(self) -> list[dict[str, Any]]:
        """The rows in the spool's files."""
        return [conforming(json.loads(line.payload)) for line in self._lines() if line.kind == "E"]

    def row(self) -> dict[str, Any]:
        """The only one."""
        (row,) = self.rows()
        return row

    def _lines(self) -> Iterable[Any]:
        for path in sorted(self.folder.glob("*.spool")):
            yield from read_lines(path.read_bytes())


def headers_of(reply: Reply) -> dict[str, str]:
    """A reply's headers by name."""
    return dict(line.split(": ", 1) for line in reply.head.decode("latin-1").split("\r\n")[:-1])


async def departed(gateway: Gateway, exchange: Exchange, sent: Callable[[bytes], object] = lambda part: None) -> Reply:
    """Serves a call as the front door does, and returns its reply; `sent` gets each part of the body."""
    replies: list[Reply] = []

    async def depart(reply: Reply) -> None:
        replies.append(reply)
        if reply.frames is None:
            sent(reply.first)
            return
        async with aclosing(reply.frames) as frames:
            async for part in frames:
                sent(part)

    await gateway.serve(exchange, depart)
    return replies[0]
