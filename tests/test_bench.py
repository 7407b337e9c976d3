"""The benchmark's arithmetic, and that its load generator counts what is not a whole answer. No timing is asserted."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import msgspec
import pytest

from loadtest import mock_vendor, shedding
from loadtest.bench import __main__ as bench
from loadtest.bench import plot
from loadtest.bench import report as reporting
from loadtest.bench.parts import Subject, usage
from loadtest.bench.report import Facts, Report, Row, Sample
from loadtest.load import (
    NUMBER,
    Asked,
    Latency,
    LoadResult,
    hold_open,
    latency,
    percentile,
    request_bytes,
    run_load,
)

ANSWER = b'{"ok":true}'
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n" + ANSWER
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def load_against(
    answers: list[bytes], *, hang_up: bool = False, connections: int = 1, expected: int = 200
) -> LoadResult:
    """Sends as many requests as there are `answers` to a server that gives them in turn, and then maybe hangs up."""
    left = iter(answers)

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(next(left))  # type: ignore[attr-defined]
            if hang_up:
                self.transport.close()

    async def run() -> LoadResult:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"
        async with server:
            return await run_load(
                url, request_bytes(url, {}, b"{}"), concurrency=connections, count=len(answers), expected=expected
            )

    return asyncio.run(asyncio.wait_for(run(), 60))


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


def load_against_mock(body: bytes, count: int) -> LoadResult:
    """Sends `body` to the mock vendor `count` times."""

    async def run() -> LoadResult:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: mock_vendor.MockVendor(loop, 0.0), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"
        async with server:
            return await run_load(url, request_bytes(url, {}, body), concurrency=2, count=count)

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_a_slow_stream_is_held_open_while_others_are_answered() -> None:
    body = bench.chat_request("slow")

    async def run() -> tuple[list[bool], LoadResult, list[bool]]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: mock_vendor.MockVendor(loop, 0.0), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"
        async with server:
            held = await hold_open(url, request_bytes(url, {}, body), 3)
            begun = [one.begun for one in held]
            load = await run_load(url, request_bytes(url, {}, bench.chat_request("unary")), concurrency=2, count=5)
            for one in held:
                one.give_up()
            return begun, load, [one.begun for one in held]

    begun, load, after = asyncio.run(asyncio.wait_for(run(), 60))
    assert (begun, after) == ([True] * 3, [False] * 3)
    assert (load.completed, load.errors) == (5, {})


# --- the load generator ---------------------------------------------------------------------------------------------


def test_whole_answers_are_completed_and_no_error() -> None:
    result = load_against([WHOLE] * 7)
    assert (result.completed, result.errors) == (7, {})


def test_a_count_is_shared_by_all_connections() -> None:
    assert load_against([WHOLE] * 10, connections=4).completed == 10


def test_a_client_hangs_up_after_its_events_and_goes_on_with_the_next_of_its_requests() -> None:
    asked: list[bytes] = []

    class Server(asyncio.Protocol):
        """Answers a request that says leave with a stream without an end, any other whole."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            asked.append(data)
            begun = STREAM_HEAD + chunked(b'data: {"a":1}\n\n') + chunked(b'data: {"a":2}\n\n', b'data: {"a":3}\n\n')
            self.transport.write(begun if data.startswith(b"leave") else WHOLE)  # type: ignore[attr-defined]

    async def run() -> LoadResult:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            requests = [Asked(b"leave " + NUMBER, hangs_up_after=2), Asked(b"stay " + NUMBER)]
            return await run_load(url, requests, concurrency=1, count=4, sent_before=7)

    result = asyncio.run(asyncio.wait_for(run(), 60))
    assert asked == [b"leave %012d" % 8, b"stay %012d" % 9, b"leave %012d" % 10, b"stay %012d" % 11]
    assert (result.completed, result.hung_up, result.errors) == (2, 2, {})


def test_an_answer_with_another_status_is_an_error_of_that_status() -> None:
    refused = WHOLE.replace(b"200 OK", b"429 Too Many Requests")
    result = load_against([WHOLE, refused, refused])
    assert (result.completed, result.errors) == (1, {"status 429": 2})


def test_an_answer_shorter_than_its_length_is_truncated() -> None:
    assert load_against([WHOLE[:-1]], hang_up=True).errors == {"truncated": 1}


def test_a_stream_without_its_last_chunk_is_truncated() -> None:
    assert load_against([STREAM_HEAD + chunked(b"data: [DONE]\n\n")], hang_up=True).errors == {"truncated": 1}


def test_a_stream_without_done_is_an_error() -> None:
    assert load_against([STREAM_HEAD + chunked(b'data: {"a":1}\n\n', b"")]).errors == {"no [DONE]": 1}


def test_done_may_be_split_over_chunks() -> None:
    stream = STREAM_HEAD + chunked(b'data: {"a":1}\n\ndata: [DO', b"NE]\n\n", b"")
    result = load_against([stream])
    assert (result.completed, result.errors, result.events) == (1, {}, 2)


def test_an_answer_without_framing_is_malformed() -> None:
    assert load_against([b"HTTP/1.1 200 OK\r\n\r\n" + ANSWER]).errors == {"malformed": 1}


def test_a_connection_that_the_server_closes_is_replaced() -> None:
    closing = WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    result = load_against([closing] * 3, hang_up=True)
    assert (result.completed, result.errors) == (3, {})


def test_a_server_that_is_not_there_is_an_error_for_each_try() -> None:
    async def run() -> LoadResult:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        server.close()
        await server.wait_closed()
        return await run_load(url, b"", concurrency=1, count=3)

    result = asyncio.run(asyncio.wait_for(run(), 60))
    assert (result.completed, set(result.errors)) == (0, {"connect"})


def test_an_answer_that_comes_after_the_time_is_late_and_not_measured() -> None:
    async def run() -> LoadResult:
        class Slow(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = transport

            def data_received(self, data: bytes) -> None:
                asyncio.get_running_loop().call_later(0.2, self.transport.write, WHOLE)  # type: ignore[attr-defined]

        server = await asyncio.get_running_loop().create_server(Slow, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server:
            return await run_load(url, request_bytes(url, {}, b""), concurrency=2, duration_seconds=0.05)

    result = asyncio.run(asyncio.wait_for(run(), 60))
    assert (result.completed, result.late, result.errors) == (0, 2, {})


# --- the mock vendor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["stream", "burst"])
def test_the_mock_streams_fifty_chunks_and_done(case: str) -> None:
    result = load_against_mock(bench.chat_request(case), 2)
    assert (result.completed, result.events) == (2, 2 * (mock_vendor.STREAM_CHUNKS + 1))


def test_the_mock_adds_the_usage_chunk_where_it_is_asked_for() -> None:
    result = load_against_mock(b'{"stream":true,"stream_options":{"include_usage":true}}', 1)
    assert result.events == mock_vendor.STREAM_CHUNKS + 2


def test_the_mock_answers_a_unary_request_whole() -> None:
    result = load_against_mock(bench.chat_request("unary"), 9)
    assert (result.completed, result.errors, result.events) == (9, {}, 0)


@pytest.mark.parametrize("case", bench.CASES)
def test_a_benchmark_request_is_so_many_kilobytes_of_json(case: str) -> None:
    body = bench.chat_request(case)
    assert len(body) == bench.REQUEST_BYTES * (100 if case == "large" else 1)
    assert bool(json.loads(body).get("stream")) == (case in ("stream", "burst", "translated"))


@pytest.mark.parametrize("case", bench.CASES)
def test_every_miss_is_another_question_and_nothing_else_is(case: str) -> None:
    assert (NUMBER in bench.chat_request(case)) == (case in ("miss", "meaning"))


def test_a_numbered_request_is_another_each_time_and_as_long() -> None:
    heard: list[bytes] = []

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            heard.append(data)
            self.transport.write(WHOLE)  # type: ignore[attr-defined]

    async def run() -> LoadResult:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server:
            return await run_load(url, request_bytes(url, {}, NUMBER), concurrency=1, count=3)

    assert asyncio.run(asyncio.wait_for(run(), 60)).completed == 3
    assert [data.rpartition(b"\r\n")[2] for data in heard] == [b"%012d" % number for number in (1, 2, 3)]
    assert len(NUMBER) == 12


def test_an_expected_refusal_is_no_error() -> None:
    refused = WHOLE.replace(b"200 OK", b"429 Too Many Requests")
    result = load_against([refused, WHOLE], expected=429)
    assert (result.completed, result.errors) == (1, {"status 200": 1})


@pytest.mark.parametrize("case", bench.ALONE)
def test_only_the_gateway_is_asked_what_no_other_does(case: str) -> None:
    subjects = [Subject(name, "http://x", {}, 1) for name in ("mock", "gateway", "gateway-bare", "nginx", "litellm")]
    assert [one.name for one in bench.measured(case, subjects)] == ["gateway"]
    assert bench.measured("stream", subjects) == subjects


def test_what_does_a_subjects_work_beside_it_counts_as_its_own() -> None:
    def idle() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", "echo; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with idle() as one, idle() as two:
        for each in (one, two):
            each.stdout.readline()  # type: ignore[union-attr]
        both = usage(Subject("replicas-2", "", {}, one.pid, beside=(two.pid,))).memory_bytes
        alone = [usage(Subject("", "", {}, each.pid)).memory_bytes for each in (one, two)]
    assert min(alone) > 0
    assert both == pytest.approx(sum(alone), rel=0.2)


# --- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "permille", "expected"), [(1, 990, 1), (20, 950, 19), (100, 990, 99), (101, 500, 51), (4, 500, 2)]
)
def test_a_percentile_is_the_nearest_rank(count: int, permille: int, expected: int) -> None:
    assert percentile(range(1, count + 1), permille) == expected


def test_percentiles_of_nothing_are_zero() -> None:
    assert latency([]) == Latency(0, 0, 0)


def test_latencies_are_given_in_microseconds() -> None:
    assert latency([0.002, 0.001, 0.003]).p50_us == pytest.approx(2000)


def sample(
    subject: str,
    round_: int,
    per_second: int,
    p50_us: float,
    *,
    first_us: float = 0,
    events: int = 0,
    cpu_us: float = 0,
) -> Sample:
    load = LoadResult(1.0, per_second, 0, {}, Latency(p50_us, 0, 0), Latency(first_us, 0, 0), events)
    return Sample("unary", 64, subject, round_, load, cpu_us, cpu_us / 4)


def gateway_row(*samples: Sample) -> Row:
    row = reporting.find(reporting.rows(samples), "unary", 64, "gateway")
    assert row is not None
    return row


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    # The machine was twice as slow in round 1: ratios 0.5, 0.4, 0.6, where medians over all would say 400 / 1000.
    row = gateway_row(
        sample("mock", 0, 1000, 0), sample("gateway", 0, 500, 0),
        sample("mock", 1, 500, 0), sample("gateway", 1, 200, 0),
        sample("mock", 2, 1000, 0), sample("gateway", 2, 600, 0),
    )  # fmt: skip
    assert row.of_mock == 0.5


def test_added_latency_is_the_difference_to_the_mock_of_the_same_round() -> None:
    row = gateway_row(
        sample("mock", 0, 1, 100), sample("gateway", 0, 1, 500),
        sample("mock", 1, 1, 900), sample("gateway", 1, 1, 1200),
        sample("mock", 2, 1, 100), sample("gateway", 2, 1, 450),
    )  # fmt: skip
    assert row.added_us == 350


def test_added_latency_of_a_stream_is_to_its_first_byte() -> None:
    row = gateway_row(
        sample("mock", 0, 1, 50_000, first_us=100, events=51), sample("gateway", 0, 1, 60_000, first_us=700, events=51)
    )
    assert row.added_us == 600


def test_without_traefik_there_is_no_ratio_to_it() -> None:
    assert gateway_row(sample("mock", 0, 1, 1), sample("gateway", 0, 1, 1)).of_traefik is None


def test_figures_are_medians_of_rounds() -> None:
    row = gateway_row(*(sample("gateway", round_, rate, 0) for round_, rate in enumerate((10, 1000, 20))))
    assert row.per_second == 20


def test_what_a_core_carries_counts_the_children_too() -> None:
    assert gateway_row(sample("gateway", 0, 1, 0, cpu_us=200)).per_core == pytest.approx(4000)


def test_the_subjects_are_measured_in_another_order_each_round() -> None:
    subjects = [Subject(name, "", {}, 0) for name in "abc"]
    orders = ["".join(subject.name for subject in bench.interleaved(subjects, round_)) for round_ in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]


def report(*samples: Sample, answered: int | None = None, ledger_rows: int | None = None) -> Report:
    memory = {"idle_memory_mb": (60.0, 20.0), "loaded_memory_mb": (70.0, 25.0)}
    facts = Facts("on", "a machine", [], {}, [1.5], **memory, answered_calls=answered, ledger_rows=ledger_rows)
    return Report(facts, reporting.rows(samples), list(samples))


@pytest.mark.parametrize(("meaning", "verdict"), [(0.55, "met"), (0.75, "MISSED")])
def test_what_a_look_for_the_same_meaning_adds_is_judged(meaning: float, verdict: str) -> None:
    facts = Facts("on", "a machine", [], {}, looks_ms={"miss": 0.2, "meaning": meaning})
    (line,) = reporting.verdicts(Report(facts, [], []))
    assert line.startswith(f"look for the same meaning: {meaning - 0.2:.2f} ms")
    assert line.endswith(verdict)


def test_answers_that_were_not_whole_are_a_fault() -> None:
    load = LoadResult(1.0, 1, 0, {"truncated": 2}, Latency(1, 1, 1), Latency(1, 1, 1), 0)
    faults = reporting.faults(report(Sample("unary", 1, "gateway", 0, load, 1, 0)))
    assert faults == ["FAULT: gateway at unary, concurrency 1: answers that were not whole: 2 x truncated"]


def test_answers_of_other_proxies_that_were_not_whole_are_a_remark() -> None:
    load = LoadResult(1.0, 1, 0, {"truncated": 1}, Latency(1, 1, 1), Latency(1, 1, 1), 0)
    made = report(Sample("unary", 1, "traefik", 0, load, 1, 0))
    assert (reporting.faults(made), len(reporting.remarks(made))) == ([], 1)


def test_a_ledger_without_a_row_for_each_call_is_a_fault() -> None:
    faults = reporting.faults(report(answered=10, ledger_rows=9))
    assert faults == ["FAULT: the ledger has 9 rows for 10 answered calls"]


def test_a_ledger_with_a_row_for_each_call_is_no_fault() -> None:
    assert reporting.faults(report(answered=10, ledger_rows=10)) == []


def test_the_table_says_which_goal_was_missed() -> None:
    text = reporting.table(report(sample("gateway", 0, 2500, 0, cpu_us=400)), bench.CASES)
    assert "goal 4000 missed, floor 2000 met" in text


def test_two_replicas_are_set_beside_one_by_the_ratios_within_rounds() -> None:
    told = reporting.scaling(
        report(
            sample("replicas-1", 0, 1000, 0, cpu_us=400), sample("replicas-2", 0, 1500, 0, cpu_us=480),
            sample("replicas-1", 1, 500, 0, cpu_us=400), sample("replicas-2", 1, 550, 0, cpu_us=480),
        ),
        "unary", "replicas-1", "replicas-2",
    )  # fmt: skip
    (line,) = told.splitlines()[2:]
    assert line == "| 64 | 750 answers/s, p95 0 ms | 1,025 answers/s, p95 0 ms | 1.30 | 500 / 600 µs |"


def test_a_page_of_two_replicas_needs_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "unary", "replicas-1", "--page", str(tmp_path / "page.md")])
    assert "--page needs --only unary replicas-1 replicas-2" in capsys.readouterr().err


def test_a_page_without_a_place_for_two_replicas_is_refused_before_measuring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (page := tmp_path / "page.md").write_text("a page of something else\n")
    with pytest.raises(SystemExit):
        bench.main(["--only", "unary", "replicas-1", "replicas-2", "--page", str(page)])
    assert "0 places <!-- replicas -->" in capsys.readouterr().err


def test_the_plot_is_one_page_that_loads_nothing() -> None:
    page = plot.page(report(sample("mock", 0, 9, 1), sample("gateway", 0, 5, 3)), bench.CASES)
    assert page.count("<svg") == 3
    assert not [word for word in ("http", "src=", "@import") if word in page]


def test_what_a_long_prompt_and_slow_streams_cost_is_said_beside_the_goals() -> None:
    samples = [
        msgspec.structs.replace(sample("gateway", 0, rate, p50, cpu_us=cpu), case=case)
        for case, rate, p50, cpu in (
            ("unary", 3000, 20_000, 250),
            ("large", 1500, 40_000, 500),
            ("beside", 2940, 21_000, 250),
        )
    ]
    said = reporting.verdicts(report(*samples))
    assert "a 100 KB prompt: 2.00 times the CPU time of a 1 KB one" in said
    assert "beside slow streams: 98% of the answers/s, 1.05 times the median time" in said


# --- an overload ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("core", "refused_ms", "faults"), [(0.9, 44, 0), (0.9, 69, 1), (0.54, 69, 0)])
def test_how_soon_is_refused_is_judged_where_the_replica_had_its_core(
    core: float, refused_ms: int, faults: int
) -> None:
    well = LoadResult(1.0, 200, 0, {}, latency([0.001]), latency([0.001]), 0)
    refused = msgspec.structs.replace(well, latency=Latency(1_000, refused_ms * 1000, refused_ms * 1000))
    seen = shedding.Seen("plain", core, 100.0, well, refused, well)
    assert len(seen.faults(timed=True)) == faults
    assert ("not judged" in seen.text()) == (core < shedding.QUIET)
