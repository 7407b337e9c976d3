"""Dollars of `numeric` columns, exact."""

from __future__ import annotations

from decimal import Decimal


def nanos(dollars: Decimal) -> int:
    """Nano-dollars. The columns have nine decimals, and `scaleb` keeps 28 digits: exact below 1e19 USD."""
    return int(dollars.scaleb(9))
