"""glibc's heap, told to keep less of what was freed. Elsewhere (musl, macOS) nothing is told."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""From malloc.h."""
_LARGE_BYTES = 131_072
"""glibc's own first threshold, which it raises to the largest block that was ever freed, up to 32 MB."""


def share_one() -> None:
    """One heap for all threads: each would get its own, whose freed pages nobody gives back. Call it before threads.

    Under the GIL they hardly ever meet there.
    """
    _tell(_ARENA_MAX, 1)


def give_back_large() -> None:
    """Large blocks are always maps of their own, given back when they are freed.

    For a process whose blocks grow now and then, as batches do; each such block costs system calls and fresh pages.
    """
    _tell(_MMAP_THRESHOLD, _LARGE_BYTES)
    _tell(_TRIM_THRESHOLD, _LARGE_BYTES)


def _tell(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(parameter, value)
