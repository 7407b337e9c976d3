"""A call in machine instructions: the rig of loadtest/work.py under valgrind's callgrind.

What the interpreter's own steps (loadtest/work.py) do not show is seen here: what goes on inside compiled functions,
JSON, TLS, the event loop. Not the kernel, and not other processes. Nothing is timed, so a busy machine changes nothing;
another build of Python counts differently.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvloop

from loadtest import work
from loadtest.processes import ROOT

BATCHES, BATCH = 5, 10
"""The median of so many batches: what happens once in a while (the garbage collector) falls into one of them."""
SECONDS = 600
"""It takes 16 to 50: valgrind runs everything some ten times slower, and what it counts fifty times."""
ZERO, DUMP, START, STOP = ((ord("C") << 24 | ord("T") << 16) + number for number in (1, 0, 4, 5))
"""Requests to callgrind, of its callgrind.h."""
REQUEST = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")
"""How a program speaks to valgrind, of its valgrind.h for amd64, as a function of the request's address: four rotations
and an exchange that together do nothing, unless valgrind sees them.
    mov rax, rdi; xor edx, edx; rol rdi, 3; rol rdi, 13; rol rdi, 61; rol rdi, 51; xchg rbx, rbx; mov rax, rdx; ret
`callgrind_control` does the same from outside, and not between two calls.
"""


def missing() -> str | None:
    """Why nothing can be counted here, as a sentence; None where it can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"it takes Linux on x86_64, and this is {platform.system()} on {platform.machine()}"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed here"
    return None


PROGRAM = ("-m", __spec__.name)


def callgrind(dump: Path, *options: str) -> list[str]:
    """What a command is run under; its dumps are `dump`, or begin so where it asks for several."""
    program = shutil.which("valgrind") or "valgrind"
    return [program, "--quiet", "--tool=callgrind", "--vgdb=no", f"--callgrind-out-file={dump}", *options]


def count(program: Sequence[str] = PROGRAM) -> dict[str, int]:
    """Machine instructions of one call, by case, the rig's own part with them. RuntimeError: valgrind's last words."""
    with tempfile.TemporaryDirectory(prefix="gateway-instructions-") as name:
        folder = Path(name)
        command = [*callgrind(folder / "out", "--instr-atstart=no"), sys.executable, *program, name]
        environ = {**os.environ, "PYTHONHASHSEED": "0"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"valgrind had not counted after {SECONDS} s") from error
        if done.returncode != 0:
            raise RuntimeError(f"nothing could be counted with valgrind:\n{(done.stdout + done.stderr)[-2000:]}")
        totals = [total(folder / f"out.{place + 1}") for place in range(len(work.CASES) * BATCHES)]
    return {
        case: int(statistics.median(totals[place * BATCHES : (place + 1) * BATCHES]) / BATCH)
        for place, case in enumerate(work.CASES)
    }


def total(dump: Path) -> int:
    """Instructions of a dump. Raises RuntimeError."""
    text = dump.read_text() if dump.exists() else ""
    found = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"a dump of callgrind without its total:\n{text[:500]}")
    return int(found[1])


# --- below valgrind ---------------------------------------------------------------------------------------------------


class Valgrind:
    """The one that runs us."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(REQUEST)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(at)

    def ask(self, request: int) -> None:
        words = (ctypes.c_uint64 * 6)(request)
        self._function(ctypes.addressof(words))


async def _run(case: str, folder: Path, valgrind: Valgrind) -> None:
    rig = work.Rig(folder)
    try:
        request, streams = work.request_of(case), case == "stream"
        for _ in range(work.WARM_UP):
            work.whole(case, await rig.call(request, streams))
        valgrind.ask(START)
        for _ in range(BATCHES):
            valgrind.ask(ZERO)
            for _ in range(BATCH):
                await rig.call(request, streams)
            valgrind.ask(DUMP)
        valgrind.ask(STOP)
    finally:
        rig.close()


def main(folder: Path) -> None:
    valgrind = Valgrind()
    for case in work.CASES:
        (own := folder / case).mkdir()
        uvloop.run(_run(case, own, valgrind))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
