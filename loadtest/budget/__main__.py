"""Holds what a call costs to what is kept in `kept.json`: machine instructions, and CPU time beside nginx's.

A tenth more of either is a loss. Instructions are counted, so a tenth fewer has to be kept too, or it would hide the
next loss. The ratio is measured: a loss of it is believed when a second start of everything shows it again, and where
nothing can be told that is said, and passes. Figures are of one build of Python, ratios of one kind of machine: on
another one nothing is held, which is said too.

Exit code: 0, or 1 when something was lost, or could not be counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest import interpreter, work
from loadtest.bench.parts import versions
from loadtest.budget import instructions
from loadtest.budget import ratio as ratios
from loadtest.budget.ratio import Ratio, Verdict
from loadtest.services import StackError

KEPT = Path(__file__).with_name("kept.json")
PARTS = ("instructions", "ratio")


class Kept(msgspec.Struct):
    """`instructions` of a call by build of Python and case; `ratios` by build, machine and nginx."""

    instructions: dict[str, dict[str, int]] = {}
    ratios: dict[str, float] = {}


class Outcome(msgspec.Struct):
    lines: list[str]
    lost: bool = False


def read(file: Path = KEPT) -> Kept:
    return msgspec.json.decode(file.read_bytes(), type=Kept) if file.exists() else Kept()


def held_instructions(now: dict[str, int], before: dict[str, int]) -> Outcome:
    outcome = Outcome([])
    for case, count in now.items():
        old = before[case]
        line = f"{case}: {count:,} machine instructions a call, {count / old - 1:+.1%} of the {old:,} that are kept"
        if count > old * (1 + work.MARGIN):
            line, outcome.lost = f"{line}: LOST", True
        elif count < old * (1 - work.MARGIN):
            line, outcome.lost = f"{line}: keep them, python -m loadtest.budget --keep", True
        outcome.lines.append(line)
    return outcome


def held_ratio(kept: float, measured: Sequence[Ratio]) -> Outcome:
    """Of one measurement, or of a second one after a loss."""
    found = [ratios.judge(one, kept) for one in measured]
    lines = [
        f"CPU time of a call beside nginx's: {one.text()}, kept {kept:.2f}, at most {kept * (1 + ratios.BUDGET):.2f}: "
        f"{verdict}"
        for one, verdict in zip(measured, found, strict=True)
    ]
    lost = found == [Verdict.LOST, Verdict.LOST]
    if not lost and found[-1] is not Verdict.HELD:
        lines.append("WARNING: whether a tenth of the CPU time was lost cannot be told on this machine now")
    return Outcome(lines, lost)


def count(kept: Kept, keep: bool) -> Outcome:
    build = interpreter.build()
    if said := instructions.missing():
        return Outcome([f"machine instructions: not counted, {said}"])
    if build not in kept.instructions and not keep:
        return Outcome([f"machine instructions: not counted, none are kept for Python {build}"])
    now = instructions.count()
    if keep:
        kept.instructions[build] = now
    return held_instructions(now, kept.instructions[build])


def measure(kept: Kept, keep: bool) -> Outcome:
    if said := ratios.missing():
        return Outcome([f"CPU time beside nginx's: not measured, {said}"])
    place = f"{interpreter.build()}; {ratios.machine()}; nginx {versions(['nginx'])['nginx']}"
    if keep:
        found = ratios.measured(lambda one: one.is_near(), ratios.KEEPING_SECONDS)
        if not found.is_near():
            return Outcome([f"CPU time of a call beside nginx's: {found.text()}: not kept, others run here"], lost=True)
        kept.ratios[place] = round(found.ratio, 2)
        return held_ratio(kept.ratios[place], [found])
    if place not in kept.ratios:
        return Outcome([f"CPU time beside nginx's: not measured, no ratio is kept for {place}"])
    before = kept.ratios[place]
    measured = []
    for _ in range(2):
        measured.append(ratios.measured(lambda one: ratios.judge(one, before) is not Verdict.UNSURE))
        if ratios.judge(measured[-1], before) is not Verdict.LOST:
            break
    return held_ratio(before, measured)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help=f"write what is found into {KEPT.name}")
    parser.add_argument("--only", choices=PARTS, help="one of the two")
    options = parser.parse_args(arguments)
    kept, lost = read(), False
    for name, held in zip(PARTS, (count, measure), strict=True):
        if options.only not in (None, name):
            continue
        try:
            outcome = held(kept, options.keep)
        except (RuntimeError, StackError) as error:
            outcome = Outcome([f"{name}: {error}"], lost=True)
        print("\n".join(outcome.lines), flush=True)
        lost = lost or outcome.lost
    if options.keep:
        KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(kept, order="sorted")) + b"\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
