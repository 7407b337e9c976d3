"""Calls of the past at other prices: what a call costs now less what it was charged becomes a row of its own.

Rows of the ledger are never changed. An adjustment has the time, tenant and names of its call, no tokens, and the
difference as its cost, so that sums of the day come out right; `adjusts` names the call. Its id follows from the call's
and from how many adjustments the call had: doing it twice, or two at a time, makes one row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import msgspec
from msgspec import Struct

from app.archive import Archive
from app.config import Config, Target
from app.core import Cost, EventLatency, LedgerEvent, Usage, charge, event_cost, event_usage, usd
from app.sql import statements

PAGE_ROWS = 2000
"""A page is some MB and far from the archive's deadline."""

_decode = msgspec.json.Decoder(LedgerEvent).decode
_encode = msgspec.json.encode


class Rerated(Struct):
    """What re-rating came to: `difference_nanos` by tenant; `unpriced` and `unknown` calls were left as they are."""

    calls: int = 0
    adjusted: int = 0
    unpriced: int = 0
    unknown: int = 0
    difference_nanos: Counter[str | None] = msgspec.field(default_factory=Counter)


class Charged(Struct, frozen=True):
    """What a call has cost so far, its adjustments included. `unpriced`: at the ceiling, for want of a price."""

    cost: Cost
    unpriced: bool
    adjustments: int


def priced_now(event: LedgerEvent, at: float, config: Config) -> Cost | None:
    """What a call costs by the configuration's prices, with all attempts that its tenant pays for; `at`: unix seconds.

    None where a target is not known. Its `priced` is False where one has no price.
    """
    own, cost = event.usage.classes, Cost()
    for attempt in event.attempts:
        if attempt.usage is not None:
            target = config.targets.get(attempt.target)
            if target is None:
                return None
            own -= attempt.usage.classes
            cost += charge(attempt.usage.classes, target, event.tenant_id, attempt.service_tier, at)
    target = _target(event, config)
    return None if target is None else cost + charge(own, target, event.tenant_id, event.service_tier, at)


def adjustment(event: LedgerEvent, charged: Charged, now: Cost, config: Config) -> LedgerEvent | None:
    """The row that makes a call cost what it costs now; None where it does."""
    difference = Cost(now.input_nanos - charged.cost.input_nanos, now.output_nanos - charged.cost.output_nanos)
    if difference == Cost() and not charged.unpriced:
        return None
    return msgspec.structs.replace(
        event,
        event_id=_id(event.event_id, charged.adjustments),
        adjusts=event.event_id,
        usage=event_usage(Usage()),
        usage_source="none",
        cost_usd=event_cost(difference, config.price_version),
        cost_status="repriced" if charged.unpriced else "priced",
        config_version=config.version,
        saved_usd=usd(0),
        latency_ms=EventLatency(0.0, 0.0, 0.0, 0.0),
        ttft_ms=None,
        attempts=(),
        fallback_used=False,
        vendor_request_id=None,
        error_code=None,
        limit_tripped=None,
    )


def _id(event_id: str, adjustments: int) -> str:
    """A UUIDv8 (RFC 9562) made of what it names."""
    digest = hashlib.sha256(f"adjustment {adjustments} of {event_id}".encode()).digest()
    value = int.from_bytes(digest[:16]) & ~(0xF << 76 | 0x3 << 62) | 0x8 << 76 | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _target(event: LedgerEvent, config: Config) -> Target | None:
    """Where the answer came from: by the attempt that answered, else (it was interrupted) by provider and model."""
    if event.attempts:
        answered = (attempt for attempt in event.attempts if attempt.outcome == "success")
        return config.targets.get(next(answered, event.attempts[-1]).target)
    found = (t for t in config.targets.values() if (t.provider.name, t.model) == (event.provider, event.model_resolved))
    return next(found, None)


async def rerate(
    archive: Archive,
    config: Config,
    first: date,
    last: date,
    *,
    write: bool = True,
    page_rows: int = PAGE_ROWS,
    progress: Callable[[Rerated], None] = lambda so_far: None,
) -> Rerated:
    """Re-rates the calls of the UTC days `first` to `last` by the prices of `config`. Raises `archive.ArchiveError`.

    Calls whose target the configuration no longer has, or has no price for, stay as they are. Broken off, the next run
    goes through all of them again and writes what is missing.
    """
    page = statements("rerate.sql")["page"]
    result = Rerated()
    after: dict[str, Any] = {"after_at": datetime(1970, 1, 1, tzinfo=UTC), "after_id": "0" * 32}
    while True:
        rows = await archive.rows(page, {"first": first, "last": last, "rows": page_rows, **after})
        adjustments = []
        for occurred_at, _, event, input_usd, output_usd, unpriced, times in rows:
            charged = Charged(Cost(int(input_usd.scaleb(9)), int(output_usd.scaleb(9))), unpriced, times)
            made = _rerated(_decode(event), occurred_at.timestamp(), charged, config, result)
            if made is not None:
                adjustments.append(_encode(made).decode())
        if write:
            await archive.insert(adjustments)
        progress(result)
        if len(rows) < page_rows:
            return result
        after = {"after_at": rows[-1][0], "after_id": rows[-1][1]}


def _rerated(event: LedgerEvent, at: float, charged: Charged, config: Config, result: Rerated) -> LedgerEvent | None:
    result.calls += 1
    now = priced_now(event, at, config)
    if now is None:
        result.unknown += 1
        return None
    if not now.priced:
        result.unpriced += 1
        return None
    made = adjustment(event, charged, now, config)
    if made is not None:
        result.adjusted += 1
        result.difference_nanos[event.tenant_id] += now.total_nanos - charged.cost.total_nanos
    return made
