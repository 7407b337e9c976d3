"""What holds a call's cost: the arithmetic, what is not there, a planted loss under valgrind, nginx counted twice."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from loadtest import interpreter
from loadtest.budget import __main__ as budget
from loadtest.budget import instructions, nginx

RATIO = "unary, times nginx 1.22.1"


@pytest.mark.parametrize("name", ["unary", RATIO])
@pytest.mark.parametrize(("figure", "lost"), [(1_090, False), (1_110, True), (910, False), (890, True)])
def test_a_tenth_more_or_less_is_a_fault(name: str, figure: int, lost: bool) -> None:
    assert budget.held({name: figure / 40, "large": 1}, {name: 25.0, "large": 1}).lost is lost


def test_the_ratio_to_an_nginx_that_nobody_kept_is_said_and_not_held() -> None:
    outcome = budget.held({"unary": 1_000, "unary, times nginx 9.9": 99.0}, {"unary": 1_000, RATIO: 30.0})
    assert not outcome.lost
    assert outcome.lines[-1] == "unary, times nginx 9.9: 99.0, and none is kept"


@pytest.mark.parametrize("path", ["", "as it is"])
def test_without_valgrind_or_for_a_python_that_nobody_kept_it_passes_and_says_so(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "kept.json").write_bytes(msgspec.json.encode({"2.7 plain": {"unary": 1}}))
    if not path:
        monkeypatch.setenv("PATH", "")
    outcome = budget.run(file, keep=False)
    assert not outcome.lost
    assert "not counted" in outcome.lines[0]


def test_every_python_that_figures_are_kept_for_has_the_ratio_too() -> None:
    kept = msgspec.json.decode(budget.KEPT.read_bytes(), type=dict[str, dict[str, float]])
    assert {name.partition(" nginx ")[0] for figures in kept.values() for name in figures} == {
        *("large", "stream", "unary", "unary, times")
    }
    assert all(len(figures) == 4 for figures in kept.values())


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
    assert not budget.held(plain, instructions.count()).lost
    assert budget.held(planted, plain).lost


@pytest.mark.drill
@pytest.mark.skipif(nginx.missing() is not None, reason=str(nginx.missing()))
def test_nginx_takes_the_same_each_time_and_more_for_a_larger_prompt() -> None:
    once, again, large = nginx.count(), nginx.count(), nginx.count("large")
    assert once == pytest.approx(again, rel=0.01)
    assert large > 1.1 * once
