"""Holds what a call costs to what is kept in `kept.json`: machine instructions, and how many times nginx's they are.

A tenth more is a loss. A tenth less has to be kept, or it would hide the next loss. All of it is counted, nothing is
timed, so what else the machine does changes nothing. Figures are of one build of Python and one version of nginx: of
others nothing is held, nor where valgrind or nginx is not there, and that is said.

Exit code: 0, or 1 when something is not as kept, or could not be counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from loadtest import interpreter, work
from loadtest.budget import instructions, nginx
from loadtest.services import StackError

KEPT = Path(__file__).with_name("kept.json")


class Outcome(msgspec.Struct):
    lines: list[str]
    lost: bool = False


def count() -> tuple[dict[str, int | float], list[str]]:
    """The figures, and what there is to say of those that cannot be had here. Raises RuntimeError and `StackError`."""
    figures: dict[str, int | float] = {**instructions.count()}
    if said := nginx.missing():
        return figures, [f"unary beside nginx: not counted, {said}"]
    proxy = nginx.count()
    figures[f"unary, times nginx {nginx.version()}"] = round(figures["unary"] / proxy, 2)
    return figures, [f"unary in nginx: {proxy:,} machine instructions a call"]


def held(now: Mapping[str, int | float], before: Mapping[str, int | float]) -> Outcome:
    outcome = Outcome([])
    for name, figure in now.items():
        line = f"{name}: {figure:,}"
        if (old := before.get(name)) is None:
            line += ", and none is kept"
        else:
            line += f", {figure / old - 1:+.1%} of the {old:,} that are kept"
            if figure > old * (1 + work.MARGIN):
                line, outcome.lost = f"{line}: LOST", True
            elif figure < old * (1 - work.MARGIN):
                line, outcome.lost = f"{line}: keep them, python -m loadtest.budget --keep", True
        outcome.lines.append(line)
    return outcome


def run(file: Path, keep: bool) -> Outcome:
    kept = msgspec.json.decode(file.read_bytes(), type=dict[str, dict[str, int | float]])
    build = interpreter.build()
    if said := instructions.missing():
        return Outcome([f"machine instructions: not counted, {said}"])
    if build not in kept and not keep:
        return Outcome([f"machine instructions: not counted, none are kept for Python {build}"])
    try:
        now, said_too = count()
    except (RuntimeError, StackError) as error:
        return Outcome([str(error)], lost=True)
    if keep:
        kept[build] = now
        file.write_bytes(msgspec.json.format(msgspec.json.encode(kept, order="sorted")) + b"\n")
    outcome = held(now, kept[build])
    return Outcome([f"Machine instructions of a call, Python {build}:", *outcome.lines, *said_too], outcome.lost)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help=f"write what is counted into {KEPT.name}")
    outcome = run(KEPT, parser.parse_args(arguments).keep)
    print("\n".join(outcome.lines))
    return 1 if outcome.lost else 0


if __name__ == "__main__":
    sys.exit(main())
