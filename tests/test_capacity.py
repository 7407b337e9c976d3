"""The capacity model: what it says of a traffic, its tables, and that the page tells what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.capacity import (
    BUSY,
    MEANS,
    Checked,
    Constants,
    Traffic,
    constants_of,
    constants_table,
    figure,
    fitted,
    main,
    need,
    wakes,
    worked_table,
)

PAGE = Path(__file__).parents[1] / "runbooks" / "capacity.md"
COSTS = Constants(
    standing_us=20_000,
    wake_us=2_000,
    call_us=500,
    chunk_us=20,
    ship_us=100,
    redis_scripts=2,
    redis_standing_us=10_000,
    redis_wake_us=400,
    redis_us=40,
    postgres_standing_us=10_000,
    postgres_us=150,
    row_bytes=2_000,
    wal_bytes=1_500,
    replica_bytes=100e6,
    stream_bytes=30_000,
)


def test_a_traffic_is_worked_out_by_its_calls_and_chunks() -> None:
    found = need(COSTS, Traffic(1_000, streamed=0.5, chunks=100, stream_seconds=8, average=0.5), replicas=4, masters=1)
    assert found.replica_cores == pytest.approx(1_000 * 600e-6 + 50_000 * 20e-6 + 4 * (0.02 + wakes(250) * 0.002))
    assert found.open_streams == 4_000
    assert found.stream_memory_bytes == 4_000 * 30_000
    assert found.redis_scripts == 2_000
    assert found.redis_cores == pytest.approx(1_000 * 40e-6 + 4 * wakes(250) * 400e-6 + 0.01)
    assert found.rows_a_day == 500 * 86_400
    assert found.row_bytes_a_day == 500 * 86_400 * 2_000
    assert found.wal_bytes == 1_500_000
    assert found.postgres_cores == pytest.approx(0.15 + 4 * 0.01)


@given(st.floats(1, 1e6), st.floats(0, 1), st.integers(0, 2_000))
def test_no_replica_and_no_master_is_busier_than_it_may_be(calls: float, streamed: float, chunks: int) -> None:
    found = need(COSTS, Traffic(calls, streamed, chunks))
    assert found.replicas >= 2
    assert found.replica_cores <= found.replicas * BUSY * 1.000001
    assert found.redis_cores <= found.redis_masters * BUSY * 1.000001
    fewer = need(COSTS, Traffic(calls, streamed, chunks), replicas=max(1, found.replicas - 1))
    assert found.replicas == 2 or fewer.replica_cores > fewer.replicas * BUSY * 0.999999


@given(st.floats(1, 1e5))
def test_twice_the_calls_need_twice_the_work(calls: float) -> None:
    one, two = (need(COSTS, Traffic(calls * times), replicas=2, masters=1) for times in (1, 2))
    fixed = [2 * (COSTS.standing_us + wakes(calls * times / 2) * COSTS.wake_us) / 1e6 for times in (1, 2)]
    assert two.replica_cores - fixed[1] == pytest.approx(2 * (one.replica_cores - fixed[0]))
    assert two.row_bytes_a_day == pytest.approx(2 * one.row_bytes_a_day)


def test_few_calls_wake_a_replica_each_and_many_share_its_wakes() -> None:
    assert wakes(1) == pytest.approx(1, rel=0.01)
    assert wakes(100) == 50
    assert wakes(100_000) == pytest.approx(100, rel=0.01)


@given(st.floats(0, 5_000), st.floats(0, 500), st.floats(0, 50_000))
def test_what_a_wake_and_a_call_cost_is_found_from_two_sizes(wake: float, call: float, idle: float) -> None:
    sizes = [(calls, idle + wakes(calls) * wake + calls * call) for calls in (30, 600)]
    assert fitted(sizes, idle) == pytest.approx((wake, call), abs=0.01)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.126, "0.13"), (7, "7"), (950, "950"), (1_260, "1.3 k"), (79.4e9, "79 G"), (7.9e12, "7.9 T")],
)
def test_figures_have_two_digits_that_count(value: float, written: str) -> None:
    assert figure(value) == written


def test_constants_come_back_from_their_table() -> None:
    assert constants_of(constants_table(COSTS)) == COSTS
    with pytest.raises(ValueError, match="chunk_us"):
        constants_of(constants_table(COSTS).replace("`chunk_us`", "`other`"))


def test_every_constant_says_what_it_is_of() -> None:
    assert set(MEANS) == set(Constants.__struct_fields__)


def test_a_prediction_misses_by_its_worst_part() -> None:
    assert Checked(10, (1.0, 2.0, 3.0), (0.5, 2.0, 4.0)).misses_by == 0.5


def test_the_page_tells_what_the_model_says_of_its_constants(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    assert main(["--page", str(PAGE)]) == 0
    assert capsys.readouterr().out.strip() in page
    assert constants_table(constants_of(page)) in page
    assert all(value > 0 for value in msgspec.structs.astuple(constants_of(page)))
    assert worked_table(constants_of(page)) in page
