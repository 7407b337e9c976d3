"""What holds a call's cost: the arithmetic, verdicts on rounds that are drawn, a planted loss under valgrind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest import interpreter
from loadtest.budget import __main__ as budget
from loadtest.budget import instructions
from loadtest.budget.ratio import LEAST, Ratio, Round, Verdict, judge, ratio

KEPT = 12.0
ROUNDS = 120


def drawn(loss: float, noise: float = 0.1, waited: float = 0.0, seed: int = 1) -> list[Round]:
    """Rounds of a machine whose speed swings by a third and on which each figure is off by `noise`."""
    chance = random.Random(seed)
    rounds = []
    for _ in range(ROUNDS):
        speed = chance.uniform(0.85, 1.15)
        ours, nginx = (chance.lognormvariate(0, noise) * speed for _ in range(2))
        rounds.append(Round(KEPT * 29 * (1 + loss) * ours, 29 * nginx, waited))
    return rounds


def verdict(rounds: Sequence[Round]) -> Verdict:
    """As the gate comes to one: it looks after each round, and stops as soon as it is sure."""
    for end in range(LEAST, len(rounds) + 1):
        found = judge(ratio(rounds[:end]), KEPT)
        if found is not Verdict.UNSURE:
            return found
    return Verdict.UNSURE


@pytest.mark.parametrize("loss", [-0.3, 0.0, 0.03])
def test_what_is_within_the_budget_is_never_said_to_be_lost(loss: float) -> None:
    found = [verdict(drawn(loss, seed=seed)) for seed in range(100)]
    assert Verdict.LOST not in found
    assert found.count(Verdict.HELD) > 90


@pytest.mark.parametrize("loss", [0.2, 0.3])
def test_a_loss_of_a_fifth_is_found_and_never_said_to_be_held(loss: float) -> None:
    found = [verdict(drawn(loss, seed=seed)) for seed in range(100)]
    assert Verdict.HELD not in found
    assert found.count(Verdict.LOST) > 90


def test_where_rounds_say_everything_nobody_is_sure() -> None:
    assert verdict(drawn(0.1, noise=0.5)) is Verdict.UNSURE


def test_a_round_whose_core_was_taken_does_not_count() -> None:
    disturbed = drawn(0.4, waited=0.5)
    assert verdict(disturbed) is Verdict.UNSURE
    assert ratio(disturbed).counted == 0
    assert verdict([*disturbed, *drawn(0.0)]) is Verdict.HELD


def sure(of_kept: float) -> Ratio:
    return Ratio(60, 60, KEPT * of_kept, KEPT * of_kept * 0.99, KEPT * of_kept * 1.01)


@pytest.mark.parametrize(
    ("measured", "lost", "warned"),
    [
        ([1.0], False, False),
        ([1.2, 1.2], True, False),
        ([1.2, 1.0], False, False),
        ([1.2, 1.1], False, True),
        ([1.1], False, True),
    ],
)
def test_a_loss_is_believed_the_second_time_and_what_cannot_be_told_passes_with_a_warning(
    measured: list[float], lost: bool, warned: bool
) -> None:
    outcome = budget.held_ratio(KEPT, [sure(of_kept) for of_kept in measured])
    assert (outcome.lost, outcome.lines[-1].startswith("WARNING")) == (lost, warned)


@pytest.mark.parametrize(("count", "lost"), [(1_090, False), (1_110, True), (910, False), (890, True)])
def test_a_tenth_more_instructions_or_fewer_is_a_fault(count: int, lost: bool) -> None:
    assert budget.held_instructions({"unary": count}, {"unary": 1_000}).lost is lost


def test_what_nobody_kept_is_said_and_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (said,) = budget.count(budget.Kept(), keep=False).lines
    assert "not counted" in said


@pytest.mark.parametrize(
    ("arguments", "optimised"),
    [
        ("'--prefix=/usr/local' '--enable-optimizations' '--with-lto' '--enable-shared'", True),  # the image's
        ("'--enable-shared' '--prefix=/usr' '--with-wheel-pkg-dir=/usr/share/python-wheels/'", True),  # Debian's
        ("'--prefix=/opt/python' '--enable-shared' 'LDFLAGS=-Wl,-rpath,/opt/python/lib'", False),  # pyenv's
        ("", False),
    ],
)
def test_an_optimised_build_is_known_by_how_it_was_configured(arguments: str, optimised: bool) -> None:
    assert interpreter.optimised(arguments) is optimised


PLANTED = """
import sys
from pathlib import Path
from loadtest import work
from loadtest.budget import instructions

class Rig(work.Rig):
    def __init__(self, folder):
        super().__init__(folder)
        telemetry = self.replica.gateway.telemetry
        record = telemetry.record
        def slower(*arguments):
            for _ in range(60):
                bytes(50_000).count(b"x")
            record(*arguments)
        telemetry.record = slower

work.Rig = Rig
instructions.main(Path(sys.argv[1]))
"""


@pytest.mark.drill
@pytest.mark.skipif(instructions.missing() is not None, reason=str(instructions.missing()))
def test_work_inside_compiled_functions_is_noticed(tmp_path: Path) -> None:
    """Of which the interpreter's steps show next to nothing."""
    program = tmp_path / "planted.py"
    program.write_text(PLANTED)
    plain, planted = instructions.count(), instructions.count((str(program),))
    assert not budget.held_instructions(plain, instructions.count()).lost
    assert budget.held_instructions(planted, plain).lost
