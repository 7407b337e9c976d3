"""What a size of traffic needs: constants measured here, a model of them, and the model held against other sizes.

    python -m loadtest.capacity                              measures (3 to 4 minutes), and prints the tables
    python -m loadtest.capacity --page runbooks/capacity.md  writes them into the page too, where the model holds
    python -m loadtest.capacity --page runbooks/capacity.md --kept    works the page's own constants through anew

The replica has one core, with its shipper; Redis, PostgreSQL, the mock vendor and the load share the others. All is CPU
time, of each size the calmest of interleaved rounds; a machine on which others work changes it all the same, and that
is said.

Exit code: 0, or 1 when something could not be started, the machine is too busy for the sizes, or the model misses a
measurement by more than it may.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtest.bench.parts import Parts
from loadtest.capacity import measuring
from loadtest.capacity.model import (
    Constants,
    carried_table,
    checked_table,
    constants_of,
    constants_table,
    worked_table,
)
from loadtest.pages import filled
from loadtest.processes import ROOT
from loadtest.services import StackError

MISSES_BY = 0.35
PARTS = ("worked", "carried", "measured", "constants", "checks")
"""Of the page."""
CALM = 0.3
"""Seconds that a replica waits for its core, for each that it runs: above it, others had too much of it."""


def worked(constants: Constants) -> dict[str, str]:
    """The parts of the page that follow from the constants alone."""
    return {"carried": carried_table(constants), "worked": worked_table(constants)}


def measured(rounds: int, folder: Path) -> measuring.Taken:
    cores = sorted(os.sched_getaffinity(0))
    subject, others = cores[0], set(cores[1:] or cores)
    began = time.monotonic()

    def show(text: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {text}", file=sys.stderr, flush=True)

    os.sched_setaffinity(0, others)
    try:
        show("starting Redis, PostgreSQL, a mock vendor and a replica")
        with Parts(folder, ROOT / "config", subject, others) as parts:
            parts.start_mock(measuring.CHUNK_INTERVAL_MS)
            parts.start_backing_services()
            gateway, _ = parts.start_gateway(1)
            meter = measuring.Meter(parts, gateway)
            try:
                return measuring.taken(meter, parts, gateway, folder / "gateway-spool", rounds, show)
            finally:
                meter.close()
    finally:
        os.sched_setaffinity(0, set(cores))


def run(rounds: int, page: Path | None) -> int:
    folder = Path(tempfile.mkdtemp(prefix="gateway-capacity-"))
    try:
        found = measured(rounds, folder)
        constants = measuring.constants_from(found)
    except StackError as error:
        print(error, f"\nThe logs are in {folder / 'log'}.", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    # What the page keeps is what it is worked out from: constants of three digits.
    constants = constants_of(constants_table(constants))
    rows = measuring.checks(found, constants)
    said = (
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}; the calmest of {rounds} rounds. For each second that it ran the replica waited "
        f"{found.waited:.2f} s for its core."
    )
    tables: Mapping[str, str] = {
        "measured": said,
        "constants": constants_table(constants),
        "checks": checked_table(rows),
        **worked(constants),
    }
    print("\n\n".join(tables.values()))
    missed = [row for row in rows if row.held and row.misses_by > MISSES_BY]
    for row in missed:
        print(f"{row.size}: {row.what} is {row.misses_by:.0%} from what the model says.", file=sys.stderr)
    if found.unreached:
        print(f"The machine is too busy: there were {', '.join(found.unreached)}. Measure again.", file=sys.stderr)
    elif found.waited > CALM:
        print(
            f"The machine is busy: what is measured, and by how much the model misses, says little where the replica "
            f"waits more than {CALM} s.",
            file=sys.stderr,
        )
    held = not (missed or found.unreached)
    if page and held:
        page.write_text(filled(page.read_text(), tables))
    elif page:
        print(f"{page} is left as it was.", file=sys.stderr)
    return 0 if held else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.capacity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="the calmest reading of each size counts (default 3)")
    parser.add_argument("--page", type=Path, metavar="PATH", help="write the tables into this page")
    parser.add_argument("--kept", action="store_true", help="measure nothing: by the constants that the page has")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is above 0")
    if options.page:
        try:  # before minutes of measuring
            page = options.page.read_text()
            filled(page, dict.fromkeys(PARTS, ""))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if options.kept:
        if not options.page:
            parser.error("--kept needs --page")
        options.page.write_text(filled(page, worked(constants_of(page))))
        return 0
    if not hasattr(os, "sched_setaffinity"):
        parser.error("processes are pinned to cores here, which can be done on Linux only")
    return run(options.rounds, options.page)


if __name__ == "__main__":
    sys.exit(main())
