"""A new price table from the data of the `genai-prices` library (MIT), which is part of it: no network is asked.

The library is a development dependency; its data is as old as its release, so update it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from importlib.metadata import version
from typing import Any

import msgspec
from msgspec import Struct

from app.config import CLASSES, PriceTable, WrittenLongContext, WrittenPrice, WrittenRate, WrittenWindow, usd

_PROVIDERS = {"bedrock": "aws", "gemini": "google", "vertex": "google", "xai": "x-ai"}
"""What the library calls vendors that we call otherwise. Others are found by their own name, else by their address."""
_PRICE_KEYS = {
    "input": "input_mtok",
    "cache_read": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
    "audio_input": "input_audio_mtok",
    "image_input": "input_image_mtok",
    "output": "output_mtok",
    "reasoning": "output_reasoning_mtok",
    "audio_output": "output_audio_mtok",
}
_UNITS = ("images", "seconds", "characters")
_TIERS = {
    "batch": {"processing": "batch"},
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
}
"""Service tiers as vendors name them in their answers, and as the library does."""

Steps = dict[str, tuple[tuple[int, Decimal], ...]]
"""By usage class: USD per million tokens, from so many input tokens on; the first from 0."""


class SyncError(Exception):
    """A sentence that says what to do."""


class Wanted(Struct, frozen=True):
    """A model that needs a price: `provider` and `base_url` as configured, `model` as the price table names it."""

    provider: str
    base_url: str
    model: str


class Synced(Struct, frozen=True):
    """The new table, what differs from the old one, and what the library does not know: kept as it was, or missing."""

    table: PriceTable
    changes: tuple[str, ...]
    kept: tuple[str, ...]
    missing: tuple[str, ...]


def sync(old: PriceTable, wanted: Sequence[Wanted], day: date) -> Synced:
    """Prices of `day` for all that is wanted and all that is in the old table. Raises `SyncError`."""
    library = _Library(day)
    addresses = {want.provider: want.base_url for want in wanted}
    names = {(want.provider, want.model) for want in wanted}
    names |= {(provider, model) for provider, models in old.prices.items() for model in models}
    prices: dict[str, dict[str, WrittenPrice]] = {}
    changes: list[str] = []
    kept: list[str] = []
    missing: list[str] = []
    for provider, model in sorted(names):
        before = old.prices.get(provider, {}).get(model)
        found = library.price(provider, addresses.get(provider), model)
        if found is not None:
            if before is not None:  # the library knows tokens alone
                found = msgspec.structs.replace(found, **{unit: getattr(before, unit) for unit in _UNITS})
            prices.setdefault(provider, {})[model] = found
            changes += [f"{provider} {model}: {change}" for change in _differences(before, found)]
        elif before is not None:
            prices.setdefault(provider, {})[model] = before
            kept.append(f"{provider} {model}, checked on {before.checked_on.isoformat()}")
        else:
            missing.append(f"{provider} {model}")
    return Synced(PriceTable(old.head, prices, old.discounts), tuple(changes), tuple(kept), tuple(missing))


class _Library:
    """The library's prices on one day, in our words."""

    def __init__(self, day: date) -> None:
        try:
            from genai_prices.data_snapshot import get_snapshot
        except ImportError:
            raise SyncError(
                "`gateway prices sync` needs genai-prices, a development dependency: run `make up`."
            ) from None
        self._data = get_snapshot()
        self._day = day
        self._source = f"genai-prices {version('genai-prices')}"

    def price(self, provider: str, base_url: str | None, model: str) -> WrittenPrice | None:
        found = self._model(provider, base_url, model)
        if found is None:
            return None
        vendor, info = found
        noon = datetime.combine(self._day, time(12), UTC)
        usual, windowed = _by_time(info, noon)
        standard = _steps(usual)
        if "input" not in standard:
            return None
        tiers = {
            name: rate
            for name, context in _TIERS.items()
            if (rate := _rate(_steps(info.get_prices(noon, context)), _steps(info.get_prices(noon))))
        }
        return WrittenPrice(
            **_rate(standard, {}),
            service_tiers={name: WrittenRate(**rate) for name, rate in tiers.items()},
            windows=[
                WrittenWindow(from_=f"{span.start_time:%H:%M}", to=f"{span.end_time:%H:%M}", **rate)
                for span, price in windowed
                if (rate := _rate(_steps(price), standard))
            ],
            source=f"{self._source}, {vendor.id}/{info.id}",
            checked_on=self._day,
        )

    def _model(self, provider: str, base_url: str | None, model: str) -> tuple[Any, Any] | None:
        for id, address in ((_PROVIDERS.get(provider, provider), None), (None, base_url)):
            try:
                return self._data.find_provider_model(model, None, id, address)
            except LookupError:
                continue
        return None


def _by_time(info: Any, moment: datetime) -> tuple[Any, list[tuple[Any, Any]]]:
    """The usual price, and those of times of the day with their spans. The library lists what goes first last."""
    if not isinstance(info.prices, list):
        return info.prices, []
    windowed = []
    for conditional in reversed(info.prices):
        if hasattr(conditional.constraint, "start_time"):
            windowed.append((conditional.constraint, conditional.prices))
        elif conditional.constraint is None or conditional.constraint.active(moment):
            return conditional.prices, windowed
    return info.prices[0].prices, windowed


def _steps(price: Any) -> Steps:
    steps: Steps = {}
    for name, key in _PRICE_KEYS.items():
        value = getattr(price, key)
        if value is not None:
            tiers = [(tier.start, tier.price) for tier in getattr(value, "tiers", ())]
            steps[name] = ((0, getattr(value, "base", value)), *tiers)
    return steps


def _rate(steps: Steps, base: Steps) -> dict[str, Any]:
    """The members of a written rate: the classes that differ from `base`, and the long contexts of all classes."""
    if steps == base:
        return {}
    classes = {name: values[0][1] for name, values in steps.items() if values != base.get(name)}
    starts = sorted({start for values in steps.values() for start, _ in values[1:]})
    long_context = [
        WrittenLongContext(above_input_tokens=start, **{name: _from(values, start) for name, values in steps.items()})
        for start in starts
    ]
    return {**classes, "long_context": long_context}


def _from(values: tuple[tuple[int, Decimal], ...], tokens: int) -> Decimal:
    return [price for start, price in values if start <= tokens][-1]


def _differences(before: WrittenPrice | None, after: WrittenPrice) -> Iterator[str]:
    if before is None:
        yield f"new, input {usd(after.input)}" + ("" if after.output is None else f", output {usd(after.output)}")
        return
    for name in CLASSES:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"{name} {_shown(old)} -> {_shown(new)}"
    for name in ("long_context", "service_tiers", "windows"):
        if getattr(before, name) != getattr(after, name):
            yield f"{name} changed"


def _shown(price: Decimal | None) -> str:
    return "none" if price is None else usd(price)
