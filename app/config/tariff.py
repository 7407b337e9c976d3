"""What a model costs, as the code reads it: a price by usage class, and what else the price depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec
from msgspec import Struct

DAY_SECONDS = 86_400
UNKNOWN = -1
"""Stands for a price that nobody wrote down, where no other class says it."""


class Price(Struct, frozen=True, gc=False, kw_only=True):
    """Nano-dollars per million tokens, by usage class; per million of other units, UNKNOWN where none is written."""

    input: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    audio_input: int
    image_input: int
    output: int
    reasoning: int
    audio_output: int
    embedding: int
    images: int = UNKNOWN
    seconds: int = UNKNOWN
    characters: int = UNKNOWN

    def less(self, hundredths_of_percent: int) -> Price:
        """With a discount. Rounded half to even to nano-dollars per million tokens, a millionth of what is charged."""
        return Price(
            **{
                name: nanos if nanos == UNKNOWN else _round(nanos * (10_000 - hundredths_of_percent), 10_000)
                for name, nanos in msgspec.structs.asdict(self).items()
            }
        )


def _round(numerator: int, denominator: int) -> int:
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole & 1))


class Used(Protocol):
    """What a call has used, as far as its price goes by that."""

    @property
    def total_input(self) -> int: ...


class Rate(Struct, frozen=True):
    """A price, and what all tokens of a call cost whose input is above so many tokens; the largest step first."""

    price: Price
    long_context: tuple[tuple[int, Price], ...] = ()

    def of(self, used: Used) -> Price:
        """The price of a call with that much input."""
        input_tokens = used.total_input
        for above, price in self.long_context:
            if input_tokens > above:
                return price
        return self.price

    def less(self, hundredths_of_percent: int) -> Rate:
        steps = tuple((above, price.less(hundredths_of_percent)) for above, price in self.long_context)
        return Rate(self.price.less(hundredths_of_percent), steps)


class Window(Struct, frozen=True):
    """Holds from second `start` of the UTC day to before second `end`, past midnight where `end` is not larger."""

    start: int
    end: int
    rate: Rate

    def holds(self, second: float) -> bool:
        if self.start < self.end:
            return self.start <= second < self.end
        return second >= self.start or second < self.end


class Tariff(Struct, frozen=True):
    """All prices of a model: by the service tier that the vendor answered in, else by time of day, else as usual."""

    rate: Rate
    windows: tuple[Window, ...] = ()
    service_tiers: Mapping[str, Rate] = {}

    @property
    def plain(self) -> bool:
        """Whether every call has the same price."""
        return not (self.rate.long_context or self.windows or self.service_tiers)

    def price(self, used: Used, service_tier: str | None, at: float) -> Price:
        """`at` is when the call arrived, unix seconds. A tier that is not listed costs what calls cost without one."""
        rate = self.rate
        if service_tier in self.service_tiers:
            rate = self.service_tiers[service_tier]
        elif self.windows:
            second = at % DAY_SECONDS
            rate = next((window.rate for window in self.windows if window.holds(second)), rate)
        return rate.of(used) if rate.long_context else rate.price

    def less(self, hundredths_of_percent: int) -> Tariff:
        return Tariff(
            self.rate.less(hundredths_of_percent),
            tuple(Window(w.start, w.end, w.rate.less(hundredths_of_percent)) for w in self.windows),
            {name: rate.less(hundredths_of_percent) for name, rate in self.service_tiers.items()},
        )
