"""Shadow traffic: copies of calls to a target that is being looked at. Nobody waits for the answers or pays for them.

So are calls that were answered from before and are asked again, to see whether that was right.

A copy is sent when its call is over, whose row is written and whose last byte has left: it can slow nothing but the
replica itself, which holds few of them. Its row belongs to the reserved tenant, under no limit of a tenant.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from app.ambient import Ambient, Patience, timestamp
from app.config import Alias, Target, Tenant
from app.core import GATEWAY_TENANT, Exchange, Purpose
from app.telemetry import Telemetry

log = logging.getLogger("gateway")

MOST_AT_ONCE = 32
MOST_BYTES = 33_554_432
"""Of bodies that wait for their copies to end: calls that go on have their own bound."""

Mirror = Callable[[Exchange, Alias], Awaitable[bytes | None]]
"""Has a target answer a call, and settles it; gives what a client would have got, None where that is not whole."""
Heard = Callable[[Exchange, bytes], None]
"""Told of a copy and its answer."""


class Shadows:
    """The copies that are under way."""

    def __init__(self, mirror: Mirror, telemetry: Telemetry, ambient: Ambient) -> None:
        self._mirror = mirror
        self._telemetry = telemetry
        self._ambient = ambient
        self._running: dict[asyncio.Task[None], Exchange] = {}
        self._held_bytes = 0
        self._closed = False

    def picks(self, alias: Alias) -> bool:
        """Whether a call is one of those that are copied."""
        return self._ambient.random() * 100 < alias.shadow.percent

    def begin(self, exchange: Exchange, alias: Alias) -> None:
        """Sends the copy of a call that is over. One that there is no room for is dropped, and counted."""
        if exchange.error is not None or exchange.cut is not None or self._closed:
            return
        target = alias.shadow.target
        sent = self._start(exchange, _alone(alias, target), "shadow", None)
        self._telemetry.shadowed(alias.name, target.name, "sent" if sent else "dropped")

    def again(self, exchange: Exchange, alias: Alias, heard: Heard) -> None:
        """Asks the alias's first target what was answered from before; without room it is not asked."""
        if exchange.error is None and exchange.cut is None and not self._closed:
            self._start(exchange, _alone(alias, alias.targets[0]), "reverify", heard)

    def _start(self, exchange: Exchange, alias: Alias, purpose: Purpose, heard: Heard | None) -> bool:
        size = len(exchange.call.body)
        if len(self._running) >= MOST_AT_ONCE or self._held_bytes + size > MOST_BYTES:
            return False
        self._held_bytes += size
        task = asyncio.ensure_future(self._run(_copy(exchange, self._ambient, purpose), alias, heard))
        task.add_done_callback(lambda done: self._ended(done, size))
        return True

    async def close(self) -> None:
        """Ends those under way; their rows say so."""
        self._closed = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self, copy: Exchange, alias: Alias, heard: Heard | None) -> None:
        self._running[asyncio.current_task()] = copy
        copy.patience = Patience()
        try:
            said = await self._mirror(copy, alias)
            if heard is not None and said is not None:
                heard(copy, said)
        except Exception:
            log.exception("defect in a shadow of a call", extra=copy.call.named)
        finally:
            copy.patience.end()

    def _ended(self, task: asyncio.Task[None], size: int) -> None:
        self._running.pop(task, None)
        self._held_bytes -= size


def _alone(alias: Alias, target: Target) -> Alias:
    """The way of a copy: to one target, once."""
    return msgspec.structs.replace(
        alias.along((target,)), order="written", weights=(), cascade=None, hedge=None, shadow=None
    )


def _copy(exchange: Exchange, ambient: Ambient, purpose: Purpose) -> Exchange:
    """The same call for the gateway's own account, as of now; of its user nothing is kept."""
    call, now = exchange.call, ambient.now()
    return Exchange(
        call=msgspec.structs.replace(
            call,
            event_id=ambient.event_id(now),
            request_id=f"{purpose}_{call.request_id}",
            received_at=now,
            occurred_at=timestamp(now),
            started=ambient.monotonic(),
            tenant_claimed=None,
            user_id_hash=None,
        ),
        patience=exchange.patience,
        purpose=purpose,
        request=exchange.request,
        tenant=Tenant(GATEWAY_TENANT, exchange.tenant.plan, purpose, None),
        rule=exchange.rule,
        input_tokens_estimate=exchange.input_tokens_estimate,
        output_tokens_estimate=exchange.output_tokens_estimate,
        authorized=ambient.monotonic(),
    )
