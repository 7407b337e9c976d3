"""Ids as vendors make them: unique a call, so that nothing downstream can take one answer for another."""

from __future__ import annotations

import random

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def letters(count: int) -> str:
    """Random letters and digits."""
    return "".join(random.choices(_LETTERS, k=count))


def guid() -> str:
    """A random UUID."""
    digits = hexadecimal(32)
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def hexadecimal(count: int) -> str:
    """Random lower-case hexadecimal digits."""
    return f"{random.getrandbits(4 * count):0{count}x}"
