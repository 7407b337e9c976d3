"""Price tables: written shape -> tariffs, with what was negotiated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

import msgspec
from msgspec import Struct

from app.config.reading import Faults
from app.config.tariff import Price, Rate, Tariff, Window
from app.config.written import (
    Written,
    WrittenClasses,
    WrittenDiscount,
    WrittenGateway,
    WrittenPrice,
    WrittenRate,
    WrittenTarget,
)

MAX_PRICE_USD = 1_000_000
_CLASSES = tuple(field.name for field in msgspec.structs.fields(Price))
_PLAIN_CLASS = {
    "cache_read": "input",
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "audio_input": "input",
    "image_input": "input",
    "embedding": "input",
    "reasoning": "output",
    "audio_output": "output",
}
"""What a class of tokens costs that has no price of its own; in an order in which the plain one is known first."""
_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")


class Priced(Struct, frozen=True):
    """What a target's calls cost: by `tariff`, but those of a tenant in `tenant_tariffs` by that."""

    tariff: Tariff
    tenant_tariffs: Mapping[str, Tariff]


def _nanos(usd: Decimal, path: str, faults: Faults) -> int:
    if not usd.is_finite() or not 0 <= usd <= MAX_PRICE_USD or (nanos := usd * 1_000_000_000) % 1:
        faults.add(path, f"{usd} is not a price: from 0 to {MAX_PRICE_USD} USD, with at most 9 decimals")
        return 0
    return int(nanos)


def ceiling(gateway: WrittenGateway, faults: Faults) -> Price:
    """The price of what has none."""
    given = {
        "input": _nanos(gateway.ceiling_input_usd, "gateway.ceiling_input_usd", faults),
        "output": _nanos(gateway.ceiling_output_usd, "gateway.ceiling_output_usd", faults),
    }
    return _filled(given)


def _filled(given: Mapping[str, int]) -> Price:
    nanos = {"input": 0, "output": 0, **given}
    for name, plain in _PLAIN_CLASS.items():
        nanos.setdefault(name, nanos[plain])
    return Price(**nanos)


def _given(written: WrittenClasses, path: str, faults: Faults) -> dict[str, int]:
    """The classes that stand there."""
    return {
        name: _nanos(usd, f"{path}.{name}", faults) for name in _CLASSES if (usd := getattr(written, name)) is not None
    }


def _rate(given: Mapping[str, int], written: WrittenRate, path: str, faults: Faults) -> Rate:
    """`given` are the classes that have a price outside of a long context."""
    steps = {}
    for step in written.long_context:
        if step.above_input_tokens <= 0 or step.above_input_tokens in steps:
            faults.add(f"{path}.long_context", "above_input_tokens must be above 0, and each stand once")
        over = _given(step, f"{path}.long_context", faults)
        steps[step.above_input_tokens] = _filled({**given, **over})
    return Rate(_filled(given), tuple(sorted(steps.items(), reverse=True)))


def second_of_day(text: str, path: str, faults: Faults) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        faults.add(path, f'{text!r} is not a time of the day: "00:00" to "23:59", in quotes')
        return 0
    return int(match[1]) * 3600 + int(match[2]) * 60


def _tariff(written: WrittenPrice, path: str, faults: Faults) -> Tariff:
    if written.input is None:
        faults.add(f"{path}.input", "is required")
    standard = _given(written, path, faults)

    def rate(other: WrittenRate, here: str) -> Rate:
        return _rate({**standard, **_given(other, here, faults)}, other, here, faults)

    windows = []
    for number, window in enumerate(written.windows):
        here = f"{path}.windows[{number}]"
        start, end = second_of_day(window.from_, f"{here}.from", faults), second_of_day(window.to, f"{here}.to", faults)
        windows.append(Window(start, end, rate(window, here)))
    tiers = {
        name: rate(tier, f"{path}.service_tiers.{name}")
        for name, tier in written.service_tiers.items()
        if tier is not None
    }
    return Tariff(_rate(standard, written, path, faults), tuple(windows), tiers)


def price_targets(written: Written, faults: Faults) -> dict[str, Priced]:
    """The targets that have a price, by name."""
    tariffs = {
        (provider, model): _tariff(price, f"prices.{provider}.{model}", faults)
        for provider, models in written.prices.items()
        for model, price in (models or {}).items()
        if price is not None
    }
    _check_discounts(written, faults)
    priced = {}
    for name, target in written.targets.items():
        tariff = None if target is None else tariffs.get((target.provider, target.priced_as or target.model))
        if tariff is None:
            continue
        concerned = [d for d in written.discounts if _concerns(d, name, target)]
        tenants = {d.tenant for d in concerned if d.tenant is not None}
        priced[name] = Priced(
            _discounted(tariff, concerned, None), {t: _discounted(tariff, concerned, t) for t in sorted(tenants)}
        )
    return priced


def _check_discounts(written: Written, faults: Faults) -> None:
    for number, discount in enumerate(written.discounts):
        path = f"discounts[{number}]"
        for what, name, section in (
            ("tenant", discount.tenant, written.tenants),
            ("target", discount.target, written.targets),
            ("provider", discount.provider, written.providers),
        ):
            if name is not None and name not in section:
                faults.add(f"{path}.{what}", f"no {what} {name!r}; known: {', '.join(section)}")
        if not 0 <= discount.percent <= 100 or discount.percent * 100 % 1:
            faults.add(f"{path}.percent", "must be from 0 to 100, with at most 2 decimals")
        if discount.tenant is discount.target is discount.provider is None:
            faults.add(path, "names neither a tenant nor a target nor a provider")


def _concerns(discount: WrittenDiscount, name: str, target: WrittenTarget) -> bool:
    return discount.target in (None, name) and discount.provider in (None, target.provider)


def _discounted(tariff: Tariff, discounts: Sequence[WrittenDiscount], tenant: str | None) -> Tariff:
    """With the first discount that holds for the tenant."""
    percent = next((d.percent for d in discounts if d.tenant in (None, tenant)), Decimal(0))
    return tariff.less(int(percent * 100)) if percent else tariff
