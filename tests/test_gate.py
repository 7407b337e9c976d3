"""The pre-ship gate: what passes, what misses, and the whole of it against the stack with k6."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from app.cli import main
from loadtest.gate import checks, report, settings
from loadtest.gate.checks import Found
from loadtest.gate.k6 import Call, Load, read
from loadtest.gate.run import of_stack
from loadtest.gate.settings import BadSettings
from loadtest.gate.target import NotRun, Target
from tests.journey import Journey

GATES = settings.read()


def target(journey: Journey) -> Target:
    return of_stack(journey.stack)


def result(name: str, passed: bool, blocking: bool = True) -> report.Result:
    gate = settings.Gate(title=f"the {name}", threshold="all", blocking=blocking)
    calls = [Call(at_seconds=second, seconds=0.1, outcome="ok", fallback=False) for second in range(3)]
    loads = {"load": Load("run", calls, 0)}
    return report.Result(name, gate, passed, "measured", ["a detail <b>"], loads)


def small(tmp_path: Path) -> Path:
    """The gates with little load: k6 begins and ends in seconds."""
    document = yaml.safe_load(settings.DEFAULT.read_text())
    # How long a call of theirs takes is the machine's affair.
    document["load"] |= {"model": "support-fast", "expected_peak_rpm": 300, "seconds": 1, "p95_seconds": 60}
    drill = {
        "model": "support-fast",
        "rpm": 300,
        "seconds": 1,
        "faults": {"failing": {"kind": "status", "status": 503}},
    }
    document["fallback"] |= drill
    file = tmp_path / "gates.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


# --- what a load says -----------------------------------------------------------------------------------------------


def point(metric: str, at: float, value: float, **tags: str) -> str:
    time = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at)).isoformat()
    return json.dumps({"metric": metric, "type": "Point", "data": {"time": time, "value": value, "tags": tags}})


def test_load_is_read_from_the_points_of_k6(tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    lines = [
        json.dumps({"metric": "call", "type": "Metric", "data": {"name": "call"}}),
        point("call", 1.5, 250, outcome="ok", fallback="true"),
        point("http_reqs", 1.5, 1),
        point("call", 0, 100, outcome="status 503", fallback="false"),
        point("dropped_iterations", 2, 3),
    ]
    file.write_text("\n".join(lines))
    seen = read("run", file)
    assert seen.calls == [Call(1.5, 0.25, "ok", True), Call(0, 0.1, "status 503", False)]
    assert (seen.unsent, seen.errors, seen.fallbacks) == (3, {"status 503": 1, "not sent": 3}, 1)
    assert seen.error_share == 4 / 5


def test_load_with_nothing_answered_has_no_percentile(tmp_path: Path) -> None:
    (tmp_path / "points.json").write_text(point("dropped_iterations", 0, 1))
    assert read("run", tmp_path / "points.json").p95_seconds == 0


# --- the table ------------------------------------------------------------------------------------------------------


def test_missed_blocking_gate_stops_the_release() -> None:
    assert not report.shippable([result("load", True), result("rows", False)])


def test_missed_gate_that_does_not_block_is_a_warning() -> None:
    results = [result("load", False, blocking=False)]
    assert report.shippable(results)
    assert "missed, a warning" in report.table(results)


def test_table_shows_details_of_missed_gates_only() -> None:
    assert "a detail" in report.table([result("rows", False)])
    assert "a detail" not in report.table([result("rows", True)])


def test_page_plots_each_load_and_escapes_what_was_found() -> None:
    page = report.page("https://gateway", [result("load", False)]).decode()
    assert page.count("<polyline") == 2
    assert "a detail &lt;b&gt;" in page


def test_gates_of_the_guide_are_all_there_and_block() -> None:
    assert GATES.gates.__struct_fields__ == ("smoke", "direct", "rows", "fallback", "load", "evals")
    assert all(getattr(GATES.gates, name).blocking for name in GATES.gates.__struct_fields__)
    assert (GATES.load.p95_seconds, GATES.load.error_share) == (3, 0.005)
    assert GATES.load.rpm == 2 * GATES.load.expected_peak_rpm


def test_unknown_key_in_the_gates_file_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(settings.DEFAULT.read_text()) | {"extra": 1}))
    with pytest.raises(BadSettings, match="extra"):
        settings.read(file)


# --- gates that cannot be run ---------------------------------------------------------------------------------------


def test_drill_without_a_simulator_says_what_it_needs() -> None:
    with pytest.raises(NotRun, match="--simulator-url"):
        checks.fallback(Target("https://gateway", "key", "tenant"), GATES.fallback, "run")


def test_rows_without_a_ledger_say_what_they_need() -> None:
    with pytest.raises(NotRun, match="--database-url"):
        checks.rows(Target("https://gateway", "key", "tenant"), {"run": 1})


@pytest.mark.parametrize("command", [["preship"], ["drill", "fallback"]])
def test_target_without_a_key_is_not_asked(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--target", "https://127.0.0.1:1", "--key", ""]) == 1
    assert "HELLO_SHIP_GATEWAY_KEY" in capsys.readouterr().err


# --- against the stack ----------------------------------------------------------------------------------------------


def test_the_drill_alone_says_who_got_through_and_who_did_not(
    journey: Journey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = journey.stack
    given = ["--target", stack.url, "--key", stack.key, "--tenant", stack.tenant, "--ca-file", str(stack.ca_file)]
    given += ["--simulator-url", stack.simulator_url, "--gates", str(small(tmp_path))]
    assert main(["drill", "fallback", *given]) == 0, capsys.readouterr().out
    assert re.fullmatch(r"failing (\d+)/\1\nThe drill passed.\n", capsys.readouterr().out)

    journey.fault("openrouter", kind="status", status=503)
    assert main(["drill", "fallback", *given]) == 1
    said = capsys.readouterr().out
    assert said.startswith("failing 0/")
    assert said.endswith("The drill failed.\n")


def test_evals_pass_against_a_vendor_that_heeds_its_prompt(journey: Journey) -> None:
    assert checks.evals(target(journey), GATES.evals, "evalgood") == Found(True, "100% passed, the baseline is 100%")


def test_evals_fail_when_the_vendor_answers_wrongly(journey: Journey) -> None:
    journey.fault("openai", kind="wrong")
    found = checks.evals(target(journey), GATES.evals, "evalbad")
    assert not found.passed
    assert len(found.details) == len(GATES.evals.cases)


def test_missing_row_is_found(journey: Journey) -> None:
    found = checks.rows(target(journey), {"never-called": 1}, seconds=0)
    assert (found.passed, found.details) == (False, ["never-called: 1 calls, 0 rows of 0 calls"])


def test_gates_that_pass_let_it_ship_and_a_wrong_answer_does_not(
    journey: Journey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = journey.stack
    given = ["--target", stack.url, "--key", stack.key, "--tenant", stack.tenant, "--ca-file", str(stack.ca_file)]
    given += ["--simulator-url", stack.simulator_url, "--database-url", stack.postgres_url, "--apps", str(tmp_path)]
    given += [word for replica in stack.replicas for word in ("--admin-url", replica.admin_url)]
    given += ["--admin-token", stack.admin_token]
    given += ["--gates", str(small(tmp_path)), "--report", str(tmp_path / "preship.html")]
    assert main(["preship", *given]) == 0, capsys.readouterr().out
    written = json.loads((tmp_path / "preship.json").read_text())
    assert [gate["name"] for gate in written["gates"] if gate["passed"]] == list(GATES.gates.__struct_fields__)
    assert (tmp_path / "preship.html").read_text().count("<svg") == 4
    drill = written["gates"][3]
    assert re.search(r"GatewayFallsBack sees \d+% of calls leave, it fires above 10%", drill["measured"])

    journey.fault("openai", kind="wrong")
    assert main(["preship", *given]) == 1
    assert "Do not ship" in capsys.readouterr().out
    written = json.loads((tmp_path / "preship.json").read_text())
    assert [gate["name"] for gate in written["gates"] if not gate["passed"]] == ["evals"]


def test_vendor_limit_that_is_met_under_load_misses_the_gate(journey: Journey, tmp_path: Path) -> None:
    load = settings.read(small(tmp_path)).load
    load = settings.Load(**{name: getattr(load, name) for name in load.__struct_fields__} | {"vendor_rpm": 12})
    found = checks.load(target(journey), load, "narrow")
    assert not found.passed
    assert " 0 refused" not in found.measured
