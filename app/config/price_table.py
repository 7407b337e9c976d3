"""One price table by itself: read as people wrote it, and written so that people can read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path

import msgspec
import yaml
from msgspec import Struct

from app.config.reading import FAULTY, PRICE_SECTIONS, ConfigError, Faults, convert, parse
from app.config.written import (
    WrittenClasses,
    WrittenDiscount,
    WrittenLongContext,
    WrittenPrice,
    WrittenRate,
    WrittenWindow,
)

CLASSES = tuple(field.name for field in msgspec.structs.fields(WrittenClasses))
_PLAIN_KEY = re.compile(r"[A-Za-z][A-Za-z0-9._/:-]*[A-Za-z0-9]")


class PriceTable(Struct, frozen=True):
    """A file of `config/prices`. `head` is the comment on its top; `prices` are by provider and model."""

    head: str
    prices: Mapping[str, Mapping[str, WrittenPrice]]
    discounts: tuple[WrittenDiscount, ...] = ()


class _Sections(Struct, frozen=True):
    prices: dict[str, dict[str, WrittenPrice]]
    discounts: list[WrittenDiscount] = []


def read_price_table(path: Path) -> PriceTable:
    """Raises `ConfigError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from error
    faults = Faults()
    merged = parse([(str(path), PRICE_SECTIONS, content)], faults)
    sections = convert(merged, _Sections, "", faults)
    if faults.sentences or sections is FAULTY:
        raise ConfigError(faults.sentences)
    head = re.match(r"(?:#.*\n)*", content.decode())
    return PriceTable(head[0] if head else "", sections.prices, tuple(sections.discounts))


def write_price_table(table: PriceTable) -> str:
    """YAML: a model's price is a mapping of a few lines, providers and models in the order of their names."""
    lines = ["prices:"]
    for provider, models in sorted(table.prices.items()):
        lines.append(f"  {_key(provider)}:")
        for model, price in sorted(models.items()):
            lines.append(f"    {_key(model)}:")
            parts = [_classes(price), *_conditions(price)]
            parts.append(f"source: {_text(price.source)}, checked_on: {price.checked_on.isoformat()}")
            lines.append("      {" + ",\n       ".join(parts) + "}")
    if table.discounts:
        lines.append("discounts:")
        for discount in table.discounts:
            named = [f"{name}: {_key(value)}" for name in ("tenant", "target", "provider")
                     if (value := getattr(discount, name)) is not None]  # fmt: skip
            lines.append(
                f"  - {{percent: {usd(discount.percent)}, {', '.join(named)}, source: {_text(discount.source)}, "
                f"checked_on: {discount.checked_on.isoformat()}}}"
            )
    return table.head + "\n".join(lines) + "\n"


def usd(amount: Decimal) -> str:
    """Without an exponent and without zeros at its end."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _conditions(price: WrittenPrice) -> Iterator[str]:
    if price.long_context:
        yield _steps(price)
    if price.service_tiers:
        tiers = [f"{_key(name)}: {{{_rate(rate)}}}" for name, rate in sorted(price.service_tiers.items())]
        yield "service_tiers: {" + ",\n         ".join(tiers) + "}"
    if price.windows:
        yield "windows: [" + ",\n         ".join(f"{{{_window(window)}}}" for window in price.windows) + "]"


def _rate(rate: WrittenRate) -> str:
    parts = [_classes(rate)]
    if rate.long_context:
        parts.append(_steps(rate))
    return ", ".join(parts)


def _window(window: WrittenWindow) -> str:
    return f'from: "{window.from_}", to: "{window.to}", {_rate(window)}'


def _steps(rate: WrittenRate) -> str:
    return "long_context: [" + ", ".join(map(_step, rate.long_context)) + "]"


def _step(step: WrittenLongContext) -> str:
    return f"{{above_input_tokens: {step.above_input_tokens}, {_classes(step)}}}"


def _classes(written: WrittenClasses) -> str:
    return ", ".join(f"{name}: {usd(value)}" for name in CLASSES if (value := getattr(written, name)) is not None)


def _key(name: str) -> str:
    """Plain where YAML then reads this very text: `no` and `True` are none."""
    return name if _PLAIN_KEY.fullmatch(name) and yaml.safe_load(name) == name else _text(name)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
