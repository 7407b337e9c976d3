"""Which build of Python runs us: the same code takes a tenth to a half longer in one that nobody optimised."""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig

DEBIANS_WHEELS = "/usr/share/python-wheels/"
"""Where Debian and Ubuntu keep pip's wheel, and nobody else without `--enable-optimizations`."""


def optimised(arguments: str | None = None) -> bool:
    """Whether this Python was compiled with a profile of what it runs (PGO), by its build's `configure` arguments.

    Debian's and Ubuntu's say nothing of it: they are those of their shared library, and the program, which is another
    build, gets its profile from the packaging (`debian/rules`: `profile-opt`, with LTO). Every Python knows the flags
    that it would be profiled with (`PGO_PROF_USE_FLAG`), so those tell nothing.
    """
    given = _configured() if arguments is None else arguments
    return "--enable-optimizations" in given or DEBIANS_WHEELS in given


def kind() -> str:
    """For a header."""
    return "an optimised build" if optimised() else "not an optimised build (see runbooks/speed.md)"


def build() -> str:
    """What machine instructions depend on besides our code: `3.11.7 plain 1a2b3c4d, GCC 12.2.0, glibc 2.36, x86_64`.

    The digits are a digest of what it was configured with, less where it was put.
    """
    configured = hashlib.sha256(_configured().replace(sys.base_prefix, "").encode()).hexdigest()[:8]
    words = [f"{platform.python_version()} {'optimised' if optimised() else 'plain'} {configured}"]
    return ", ".join([*words, platform.python_compiler(), " ".join(platform.libc_ver()), platform.machine()])


def _configured() -> str:
    return sysconfig.get_config_var("CONFIG_ARGS") or ""
