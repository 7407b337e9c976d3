"""The capacity model: what it says of a traffic, its tables, and that the page tells what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hiredis import pack_command
from hypothesis import given
from hypothesis import strategies as st

from loadtest.capacity import measuring
from loadtest.capacity.__main__ import MISSES_BY, main
from loadtest.capacity.measuring import Asked, Spent, Taken, checks, constants_from
from loadtest.capacity.model import (
    BUSY,
    MEANS,
    Checked,
    Constants,
    Traffic,
    busy,
    constants_of,
    constants_table,
    figure,
    fitted,
    need,
    redis_busy,
    wakes,
)
from loadtest.capacity.replay import scripts_of
from loadtest.pages import filled
from loadtest.services import StackError

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
    spool_bytes=1_800,
    row_bytes=2_000,
    wal_bytes=1_500,
    replica_bytes=100e6,
    stream_bytes=30_000,
    counters_bytes=11_000,
)


def test_a_traffic_is_worked_out_by_its_calls_and_chunks() -> None:
    found = need(COSTS, Traffic(1_000, streamed=0.5, chunks=100, stream_seconds=8, average=0.5), replicas=4, masters=1)
    assert found.replica_cores == pytest.approx(1_000 * 600e-6 + 50_000 * 20e-6 + 4 * (0.02 + wakes(250) * 0.002))
    assert found.open_streams == 4_000
    assert found.stream_bytes == 4_000 * 30_000
    assert found.replica_bytes == 100e6 + 1_000 * 30_000
    assert found.redis_scripts == 2_000
    assert found.redis_cores == pytest.approx(1_000 * 40e-6 + wakes(1_000) * 400e-6 + 0.01)
    assert found.rows_a_day == 500 * 86_400
    assert found.row_bytes_a_day == 500 * 86_400 * 2_000
    assert found.spool_bytes == 500 * 86_400 / 4 * 1_800
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
    assert wakes(200) == 100
    assert wakes(100_000) == pytest.approx(200, rel=0.01)


@given(st.floats(1, 5_000), st.floats(1, 500), st.floats(0, 50_000))
def test_what_a_wake_and_a_call_cost_is_found_from_two_sizes(wake: float, call: float, idle: float) -> None:
    sizes = [(calls, idle + wakes(calls) * wake + calls * call) for calls in (150, 1_200)]
    assert fitted(sizes, idle) == pytest.approx((wake, call), abs=0.01)


def test_what_no_costs_explain_is_not_taken_for_some() -> None:
    with pytest.raises(ValueError, match="1,500 calls/s cost 90"):
        fitted([(150, 100), (1_500, 90)], 0)


def test_fewer_replicas_or_masters_would_not_do() -> None:
    found = need(COSTS, Traffic(30_000))
    assert busy(COSTS, Traffic(30_000), found.replicas - 1) > BUSY
    assert redis_busy(COSTS, 30_000, found.redis_masters - 1) > BUSY


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


def test_how_far_apart_two_are_is_of_the_larger() -> None:
    assert Checked("", "", 1.0, 0.5).misses_by == Checked("", "", 0.5, 1.0).misses_by == 0.5


# --- what was measured ------------------------------------------------------------------------------------------------


def spent_by(costs: Constants, calls: float, streamed: float = 0.0, seconds: float = measuring.SECONDS) -> Spent:
    """What so many calls a second spend by the model, with half a second in which rows are waited for."""
    traffic = Traffic(calls, streamed, measuring.STREAM_CHUNKS)
    rows, took = calls * seconds, seconds + 0.5
    replica = busy(costs, traffic, 1) * seconds + costs.standing_us / 1e6 * 0.5
    return Spent(
        calls=rows,
        replica=replica - rows * costs.ship_us / 1e6,
        shipper=rows * costs.ship_us / 1e6,
        redis=redis_busy(costs, calls, 1) * seconds + costs.redis_standing_us / 1e6 * 0.5,
        postgres=(rows * costs.postgres_us + seconds * costs.postgres_standing_us) / 1e6,
        scripts=rows * costs.redis_scripts,
        wal_bytes=rows * costs.wal_bytes,
        rows=rows,
        ran=replica,
        waited=replica / 4,
        seconds=took,
    )


def all_spent(costs: Constants) -> Taken:
    counts = (*measuring.STREAMING, measuring.STREAMS_CHECKED)
    both = measuring.BOTH_SECONDS
    return Taken(
        idle=msgspec.structs.replace(spent_by(costs, 0.0), postgres=0.0),
        loads={rate: spent_by(costs, rate) for rate in (*measuring.FITTED, *measuring.CHECKED)},
        streams={count: spent_by(costs, count * 2 / both, 1.0, both) for count in counts},
        redis={
            rate: Asked(rate * 0.9, redis_busy(costs, rate * 0.9, 1), 0.0)
            for rate in (*measuring.REDIS_FITTED, *measuring.REDIS_CHECKED)
        },
        spool_bytes=costs.spool_bytes,
        row_bytes=costs.row_bytes,
        replica_bytes=costs.replica_bytes,
        stream_bytes=costs.stream_bytes,
        counters_bytes=costs.counters_bytes,
    )


def test_constants_come_back_from_what_they_make_a_run_spend() -> None:
    found = all_spent(COSTS)
    taken = msgspec.structs.asdict(constants_from(found))
    assert taken == pytest.approx({name: getattr(COSTS, name) for name in taken})
    assert found.waited == pytest.approx(0.25)


def test_the_model_is_held_against_other_sizes_than_its_constants_are_taken_at() -> None:
    rows = checks(all_spent(COSTS), COSTS)
    assert [row.size for row in rows if row.misses_by > 0.001] == []
    assert {row.size for row in rows} == {
        "one replica, 500 calls/s",
        "one replica, 2,000 calls/s",
        "one replica, 300 streams at once",
        "Redis alone, 1,350 calls/s",
        "Redis alone, 8,100 calls/s",
    }
    assert not {*measuring.FITTED} & {*measuring.CHECKED}
    assert not {*measuring.REDIS_FITTED} & {*measuring.REDIS_CHECKED}


def test_what_cannot_be_is_said_to_be_a_busy_machine() -> None:
    found = all_spent(COSTS)
    rate = measuring.REDIS_FITTED[1]
    with pytest.raises(StackError, match="too busy"):
        constants_from(msgspec.structs.replace(found, redis={**found.redis, rate: Asked(5_000, 0.001, 0.0)}))


def test_a_size_that_was_not_come_to_is_told() -> None:
    found = all_spent(COSTS)
    assert found.unreached == []
    slow = msgspec.structs.replace(
        found, loads={**found.loads, 2_000: spent_by(COSTS, 1_284)}, redis={300: Asked(100, 0.1, 0.0)}
    )
    assert slow.unreached == ["1,284 calls/s and not 2,000", "100 calls/s of Redis alone and not 300"]


CALL, OTHER = "01a22227-71a8-7c47-97d6-1634947dac7f", "01a22227-71a8-7c47-97d6-1634947dac70"


class SlowLog:
    """The slow log of a Redis that was asked these, the last one first."""

    def __init__(self, *asked: str) -> None:
        self._asked = asked

    def slowlog_get(self, most: int) -> list[dict[str, bytes]]:
        return [{"command": asked.encode()} for asked in self._asked[:most]]


def test_the_scripts_of_the_last_call_are_found_in_their_order() -> None:
    told = SlowLog(
        "INFO all", f"EVALSHA b 1 rl:{{t}}:{CALL} {CALL} 9", f"GETDEL {CALL}", f"EVALSHA a 1 rl:{{t}}:{CALL} 5",
        f"EVALSHA b 1 rl:{{t}}:{OTHER} {OTHER} 9",
    )  # fmt: skip
    ours = "#" * 36
    assert scripts_of(told) == [
        pack_command(("EVALSHA", "a", "1", f"rl:{{t}}:{ours}", "5")),
        pack_command(("EVALSHA", "b", "1", f"rl:{{t}}:{ours}", ours, "9")),
    ]
    with pytest.raises(StackError, match="no script"):
        scripts_of(SlowLog("INFO all"))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_a_part_of_a_page_is_replaced_and_one_that_it_has_not_is_missed() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end -->\n<!-- y -->\nkept\n<!-- end -->\n"
    assert filled(page, {"x": r"\1"}) == page.replace("old", r"\1")
    with pytest.raises(ValueError, match="0 places <!-- z -->"):
        filled(page, {"z": ""})


def test_the_page_tells_what_the_model_says_of_its_constants(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    assert main(["--page", str(page), "--kept"]) == 0
    assert page.read_text() == PAGE.read_text()
    assert constants_table(constants_of(page.read_text())) in page.read_text()
    assert all(value > 0 for value in msgspec.structs.astuple(constants_of(page.read_text())))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kept"], "--kept needs --page"),
        (["--page", "other.md"], "0 places <!-- worked -->"),
        (["--rounds", "0"], "above 0"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.md").write_text("a page of something else\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(options)
    assert said in capsys.readouterr().err


def test_the_page_is_kept_of_a_run_that_the_model_held() -> None:
    part = PAGE.read_text().partition("<!-- checks -->\n")[2].partition("<!-- end -->")[0]
    apart = [line.split(" | ")[-1].strip(" |") for line in part.splitlines()[2:]]
    assert len(apart) == 3 * len(measuring.CHECKED) + 1 + len(measuring.REDIS_CHECKED)
    held = [int(cell.strip("%")) for cell in apart if "not held" not in cell]
    assert len(held) == len(apart) - 1
    assert max(held) <= MISSES_BY * 100
