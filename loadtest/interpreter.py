"""Which build of Python runs us: the same code takes a tenth to a half longer in one that nobody optimised."""

from __future__ import annotations

import platform
import sys
import sysconfig

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
DEBIANS_WHEELS = "/usr/share/python-wheels/"
"""Where Debian and Ubuntu keep pip's wheel, and nobody else without `--enable-optimizations`."""


def optimised(arguments: str | None = None) -> bool:
    """Whether this Python was compiled with a profile of what it runs (PGO), by its build's `configure` arguments.

    Debian's and Ubuntu's say nothing of it: they are those of their shared library, and the program, which is another
    build, gets its profile from the packaging (`debian/rules`: `profile-opt`, with LTO). Every Python knows the flags
    that it would be profiled with (`PGO_PROF_USE_FLAG`), so those tell nothing.
    """
    given = (sysconfig.get_config_var("CONFIG_ARGS") or "") if arguments is None else arguments
    return "--enable-optimizations" in given or DEBIANS_WHEELS in given


def kind() -> str:
    """For a header."""
    return "an optimised build" if optimised() else "not an optimised build (see runbooks/speed.md)"


def build() -> str:
    """What machine instructions and CPU time depend on, as far as Python goes: `3.11 optimised, GCC 12.2.0, x86_64`."""
    words = [f"{VERSION} {'optimised' if optimised() else 'plain'}", platform.python_compiler(), platform.machine()]
    return ", ".join(words)
