"""A call's work is held to what is kept: see loadtest/work.py. It is counted, so a busy machine changes nothing."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from app.api import FrontDoor
from app.asgi import Replica
from app.core import Exchange, LedgerEvent, interrupted
from app.settlement import event_of, intent_of
from loadtest import work

KEPT = work.kept()
pytestmark = pytest.mark.skipif(not KEPT, reason=f"nothing is kept for Python {work.VERSION}: loadtest.work --keep")


def counted(case: str, folder: Path, change: Callable[[Replica], None] = lambda _: None) -> work.Work:
    tracing = sys.gettrace()
    try:
        return uvloop.run(work.count(case, folder, change))
    finally:
        sys.settrace(tracing)


@pytest.mark.parametrize("case", work.CASES)
def test_a_call_takes_no_more_work_than_is_kept(case: str, tmp_path: Path) -> None:
    assert work.faults(case, counted(case, tmp_path), KEPT[case]) == []


def test_a_tenth_more_work_is_noticed(tmp_path: Path) -> None:
    """Planted: a step of the journey that takes a good tenth of what the whole call takes."""
    plain = counted("unary", tmp_path)
    turns = plain.instructions * 12 // 100 // 8  # a turn is eight instructions or more

    def plant(replica: Replica) -> None:
        telemetry = replica.gateway.telemetry
        record = telemetry.record

        def slower(exchange: Exchange, event: LedgerEvent, row: bytes | None) -> None:
            place = 0
            while place < turns:
                place += 1
            record(exchange, event, row)

        telemetry.record = slower  # type: ignore[method-assign]

    (said,) = work.faults("unary", counted("unary", tmp_path, plant), plain)
    assert "instructions a call, +1" in said


def test_a_long_prompt_takes_few_more_steps_than_a_short_one() -> None:
    """Those of `prompt_size`, which goes from one occurrence of a byte to the next, so often and no oftener."""
    assert KEPT["large"].instructions <= KEPT["unary"].instructions + 450
    assert KEPT["large"].compiled_calls <= KEPT["unary"].compiled_calls + 30


@pytest.mark.parametrize(("of_kept", "found"), [(1.09, 0), (1.11, 1), (0.91, 0), (0.89, 1)])
def test_more_than_a_tenth_either_way_is_a_fault(of_kept: float, found: int) -> None:
    now = work.Work(int(1000 * of_kept), 100, 4)
    assert len(work.faults("unary", now, work.Work(1000, 100, 4))) == found


def in_a_dict(function: Callable[..., object]) -> bool:
    """Whether it makes a call with so many keywords that Python hands them over in a dict."""
    return any(step.opname == "MAP_ADD" for step in dis.get_instructions(function))


def test_nothing_of_a_call_is_made_of_more_keywords_than_python_hands_over_at_once() -> None:
    assert not any(map(in_a_dict, (FrontDoor._call, event_of, intent_of)))
    assert in_a_dict(interrupted)  # which no call does, has more
