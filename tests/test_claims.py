"""What the README names is what there is: headers, codes, metrics, keys, files, figures. And what the CLI says."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec import Struct

from app import api
from app.auth import callers
from app.cache import wishes
from app.cli import _parser, main
from app.config import FILES, Written
from app.errors import GatewayError, VendorError
from app.release import VERSION
from loadtest.services import SIMULATOR_LATENCY_MS
from loadtest.simulator import faults
from tests.journey import Journey, chat, events, until
from tests.test_readme import ENVIRONMENT, PROSE, README, ROOT

SECTIONS = {field.encode_name for field in msgspec.structs.fields(Written)}
OURS = re.compile(r"x-[a-z-]+|retry-after|server-timing|age")


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables below a heading."""
    text = re.search(rf"^## {heading}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)[1]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def coded(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- headers --------------------------------------------------------------------------------------------------------


def header_tables() -> tuple[set[str], set[str]]:
    """Names in the table of requests, names in the table of answers."""
    table = rows("Headers")
    answers = next(number for number, row in enumerate(table) if row[0] == "answer")
    asked = " ".join(" ".join(row) for row in table[:answers]).lower()
    said = {name for row in table[answers:] for name in coded(row[0])}
    return set(
        re.findall(r"\bx-[a-z-]+|authorization|traceparent|tracestate|cache-control|idempotency-key", asked)
    ), said


def test_request_headers_of_the_readme_are_those_that_are_read() -> None:
    sources = "".join(Path(module.__file__).read_text() for module in (api, callers, wishes))
    read = set(re.findall(r'headers(?:\.get\(|\[)b"([a-z-]+)"', sources))
    assert header_tables()[0] == read - {"content-length"} | {name.decode() for name in api._TOLD}


def test_answer_headers_of_the_readme_are_those_that_are_sent(journey: Journey) -> None:
    answers = [journey.post(chat("tokens=2")), journey.post(chat(max_tokens=100_000), x_tenant_id="tenant-poor")]
    answers.append(journey.post(chat("tokens=2", "ruled"), x_feature_id="beta"))
    answers.append(journey.post(chat("tokens=9", "cascaded", max_tokens=2)))
    answers.append(journey.post(chat("tokens=2", "shadowed")))
    journey.fault("openai", kind="hang", times=1)
    answers.append(journey.post(chat("tokens=2", "hedged")))
    answers += [journey.post(chat("tokens=2", "remembered"), idempotency_key="claims") for _ in range(2)]
    with journey.stream(chat("tokens=2")) as streamed:
        events(streamed)
    big = chat("x" * 13_200, "azure", max_tokens=20)
    answers += [journey.post(big, x_tenant_id="tenant-lower") for _ in range(4)]
    sent = {name for answer in (*answers, streamed) for name in answer.headers if OURS.fullmatch(name)}
    assert sent == header_tables()[1]


# --- errors ---------------------------------------------------------------------------------------------------------


def leaves(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    """The errors that a client can meet."""
    for child in kind.__subclasses__():
        if child is not VendorError:
            yield from leaves(child) if child.__subclasses__() else [child]


def test_errors_of_the_readme_are_those_of_the_code() -> None:
    written = {(code, int(row[1])) for row in rows("Errors")[1:] for code in coded(row[0])}
    assert written == {(error.code, error.status) for error in leaves(GatewayError)}


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_of_the_readme_are_scraped(journey: Journey) -> None:
    codes = {error.code for error in leaves(GatewayError)}
    named = set(re.findall(r"`(gateway_[a-z_]+)`", PROSE)) - codes
    scraped = set(re.findall(r"^# TYPE (\S+)", journey.admin("/metrics").text, re.MULTILINE))
    assert named
    assert named <= scraped


# --- configuration --------------------------------------------------------------------------------------------------


def exists(path: list[str], shape: typing.Any) -> bool:
    """Whether a key path leads somewhere in the written configuration; `<name>` stands for any name."""
    if not path:
        return True
    if typing.get_origin(shape) is dict:
        return path[0] == "<name>" and exists(path[1:], typing.get_args(shape)[1])
    if not (isinstance(shape, type) and issubclass(shape, Struct)):
        return False
    members = {field.encode_name: field.type for field in msgspec.structs.fields(shape)}
    return path[0] in members and exists(path[1:], members[path[0]])


def test_configuration_keys_of_the_readme_exist() -> None:
    named = {match[1] for match in re.finditer(r"`([a-z_]+(?:\.[a-z_<>]+)+)[:`]", PROSE)}
    keys = {key for key in named if key.partition(".")[0] in SECTIONS and not key.endswith((".yaml", ".json"))}
    assert len(keys) > 10
    assert [key for key in keys if not exists(key.split("."), Written)] == []


def test_each_section_is_in_the_file_where_the_readme_has_it() -> None:
    table = {coded(row[0])[0]: coded(row[1]) for row in rows("Configuration")[1:]}
    for file, sections in FILES.items():
        named = {name.partition(".")[0] for name in table[file]} & SECTIONS
        assert named <= sections


def test_variables_of_the_readme_are_read_somewhere() -> None:
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", PROSE))
    sources = [*ROOT.glob("app/**/*.py"), *ROOT.glob("config/**/*.yaml")]
    text = "\n".join(file.read_text() for file in sources)
    assert [name for name in named if name not in text] == []


# --- the rest -------------------------------------------------------------------------------------------------------


def test_files_of_the_readme_exist() -> None:
    named = set(re.findall(r"(?<![/a-z])(?:app|config|loadtest|traefik)/[a-z_0-9./]*", README))
    assert "app/gateway.py" in named
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


def test_routes_of_the_readme_are_served(journey: Journey) -> None:
    for method, path in re.findall(r"`(GET|POST) (/[a-z0-9/]+)`", PROSE):
        headers = {} if path == "/status" else journey.headers()  # anybody's, but no gateway key opens it further
        answer = journey.http.request(method, path, headers=headers, content=b"")
        assert answer.status_code in (200, 400), path
    assert journey.http.get("/usage").status_code == 401


def test_faults_of_the_readme_are_those_of_the_simulator() -> None:
    tags = {kind.__struct_config__.tag for kind in typing.get_args(faults.AnyFault)}
    sentence = re.search(r"told faults over .*?\(`loadtest", PROSE, re.DOTALL)[0]
    assert {name for name in coded(sentence) if re.fullmatch(r"[a-z_]+", name)} == tags


def test_figures_of_the_readme_are_those_of_the_code() -> None:
    text = " ".join(PROSE.split())
    large, held = f"{api.ONE_PIECE_BYTES >> 10} KiB", f"{api.LARGE_SECONDS * 1000:g} ms"
    assert f"above {large} from its cache after {held} (`LARGE_SECONDS` in `app/api.py`)" in text
    assert f"the simulator answers after {SIMULATOR_LATENCY_MS} ms" in text


# --- the command line -----------------------------------------------------------------------------------------------


def gateway(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *(str(argument) for argument in arguments)]
    without = {name: value for name, value in ENVIRONMENT.items() if name != "DATABASE_URL"}
    return subprocess.run(command, cwd=ROOT, env=without | environ, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("check --config nowhere", "nowhere/gateway.yaml: cannot be read (No such file or directory)"),
        ("check --environment mars --no-secrets", "no environment 'mars'; known: ci, dev, prod, staging"),
        ("check --environment staging", "the environment variable STAGING_OPENAI_API_KEY is not set"),
        ("check --no-secrets --overlay nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("serve --config nowhere", "nowhere/gateway.yaml: cannot be read (No such file or directory)"),
        ("keys new --service billing --tenant acme-corp --config nowhere", "--config names the configuration folder"),
        ("keys new --service a/b --tenant acme-corp", "--service must match"),
        ("usage --tenant acme-corp", "Set DATABASE_URL, or give --database-url."),
        ("usage --tenant acme-corp --database-url x://", "write postgresql://user:password@host:5432/database"),
        ("usage --tenant acme-corp --database-url postgresql://u:hush@127.0.0.1:1/d", "PostgreSQL at 127.0.0.1:1"),
        ("keys revoke nobodyskey00", "no key 'nobodyskey00'; `gateway keys list` shows the ids of all."),
        ("mode --redis-url nowhere", "REDIS_URL is no address of a Redis"),
        ("cache stats --redis-url redis://", "Redis could not be reached"),
        ("cache invalidate --tenant acme-corp --redis-url nowhere", "REDIS_URL is no address of a Redis"),
        ("spool list --spool-dir nowhere", "nowhere is no folder; --spool-dir names the replica's spool."),
        ("content list --folder nowhere", "nowhere is no folder; --folder names gateway.content.folder"),
        ("content delete --folder nowhere --tenant acme-corp", "nowhere is no folder"),
        ("spool replay --spool-dir nowhere --database-url postgresql://h/d", "nowhere is no folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "GATEWAY_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    code = main(arguments.split())
    said = capsys.readouterr()
    assert (code, said.out) == (1, "")
    assert sentence in said.err
    assert "hush" not in said.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("serve --port 99999", "'99999' is not a port, 0 to 65535."),
        ("jobs --port -1", "'-1' is not a port"),
        ("check --explain acme-corp support-fast --at yesterday", "'yesterday' is not a time: 2026-11-28T22:30+01:00"),
        ("mode cache-only --for ever", "'ever' is not a time up to 31d: 90s, 30m, 2h, 1d"),
        ("usage --tenant acme-corp --day today", "'today' is not a day: YYYY-MM-DD."),
        ("prices rerate --from 2026-11 --to 2026-11-30", "'2026-11' is not a day: YYYY-MM-DD."),
        ("up --replicas 0", "'0' is not a number, 1 to 1000."),
        ("top --every 0", "'0' is not a time in seconds, 0.1 to 86400."),
        ("jobs --rollup-seconds nan", "'nan' is not a time in seconds"),
        ("preship --target gateway.example", "'gateway.example' is not an address: https://gateway.example"),
        ("rollup --day 2026-13-01", "'2026-13-01' is not a day: YYYY-MM-DD."),
    ],
)
def test_a_wrong_option_is_refused_with_the_form_that_it_has(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_version_is_the_release(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"gateway {VERSION}\n"


def test_list_of_no_keys_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shutil.copytree(ROOT / "config", tmp_path / "config")
    (config / "service_keys.yaml").write_text("service_keys: {}\n")
    assert main(["keys", "list", "--config", str(config)]) == 0
    said = capsys.readouterr()
    assert (said.out, "`gateway keys new` makes one" in said.err) == ("", True)


def test_every_option_has_a_word_of_help() -> None:
    def silent(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from silent(command)
            elif not action.help:
                yield f"{parser.prog} {action.option_strings or action.dest}"

    assert list(silent(_parser())) == []


def test_key_for_an_unknown_tenant_is_not_written(tmp_path: Path) -> None:
    config = shutil.copytree(ROOT / "config", tmp_path / "config")
    before = (config / "service_keys.yaml").read_text()
    failed = gateway("keys", "new", "--service", "billing", "--tenant", "nobody", "--config", config)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "no tenant 'nobody'" in failed.stderr
    assert (config / "service_keys.yaml").read_text() == before


def test_frozen_postgres_does_not_hold_up_the_usage_command(journey: Journey) -> None:
    journey.stack.freeze("postgres")
    try:
        failed = gateway("usage", "--tenant", "acme-corp", "--database-url", journey.stack.postgres_url)
    finally:
        journey.stack.thaw("postgres")
    until(lambda: all(journey.admin("/status", number).json()["postgres"] == "up" for number in range(2)))
    assert failed.returncode == 1
    assert "does not take part" in failed.stderr
    assert "Traceback" not in failed.stderr
