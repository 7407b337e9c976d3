"""The README's commands and snippets, run as they stand, in a folder that looks like a checkout with a stack up."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli import _parser
from app.config import SERVICE_KEY, load
from loadtest.bench import __main__ as bench
from loadtest.stack import Stack

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def is_make(block: str) -> bool:
    return all(line.startswith("make ") for line in block.splitlines())


SHELL = [block for block in blocks("sh") if not is_make(block)]
MAKE = [line for block in blocks("sh") if is_make(block) for line in block.splitlines()]
READY = re.search(r"^ready\(\) .*$", README, re.MULTILINE)[0]
INLINE = re.findall(r"`((?:gateway|make) [^`]+)`", PROSE)
SDK, MOCK = blocks("python")


@pytest.fixture
def checkout(stack: Stack, tmp_path: Path) -> Path:
    """A folder with what the commands look for: the ready file, the configuration, an environment to activate."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for file, text in {
        ".gateway/ready.json": json.dumps(stack.ready()),
        ".venv/bin/activate": f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        ".curlrc": "fail\nsilent\nshow-error\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def shell(commands: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    """Fails with a command that fails; curl does so on any status from 400 on."""
    script = f"set -euo pipefail\n. .venv/bin/activate\n{READY}\n{commands}"
    return subprocess.run(
        ["bash", "-c", script],
        cwd=checkout,
        env=ENVIRONMENT | {"HOME": str(checkout)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize("commands", SHELL, ids=lambda commands: commands.splitlines()[-1][:40])
def test_commands_work_when_pasted(commands: str, checkout: Path) -> None:
    ran = shell(commands, checkout)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_curl_line_gets_an_answer(checkout: Path) -> None:
    answer = json.loads(shell(block_with("/v1/chat/completions"), checkout).stdout)
    assert answer["choices"][0]["message"]["content"]


def test_key_that_the_command_makes_is_the_one_whose_digest_it_writes(checkout: Path) -> None:
    printed = shell(block_with("gateway keys new"), checkout).stdout.splitlines()
    (public,) = (match[1] for line in printed if (match := SERVICE_KEY.fullmatch(line)))
    keys = load(checkout / "config", "prod", require_secrets=False).keys
    assert [(key.id, key.service, key.tenants) for key in keys.values()] == [
        (public, "billing", frozenset({"acme-corp"}))
    ]


def test_sdk_snippet_prints_an_answer(checkout: Path) -> None:
    assert subprocess.check_output([sys.executable, "-c", SDK], cwd=checkout, text=True, timeout=200).strip()


@pytest.mark.stack
def test_app_can_use_the_stack_as_its_mock(tmp_path: Path) -> None:
    call = """
    headers = {"Authorization": "Bearer " + gateway["key"], "X-Tenant-Id": gateway["tenant"]}
    body = {"model": "support-fast", "messages": [{"role": "user", "content": "Say hello."}]}
    import ssl
    tls = ssl.create_default_context(cafile=gateway["ca_file"])
    answer = httpx.post(gateway["url"] + "/v1/chat/completions", json=body, headers=headers, verify=tls, timeout=60)
    assert answer.headers["x-gateway-fallback"] == "true"
"""
    test, replaced = re.subn(r"\n    \.\.\.  # the app's own call.*\n", call, MOCK)
    assert replaced == 1
    (tmp_path / "test_app.py").write_text(test)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "base", "test_app.py"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PATH": path, "GATEWAY_CHECKOUT": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("line", [*MAKE, *(line for line in INLINE if line.startswith("make "))])
def test_make_knows_what_the_readme_makes(line: str) -> None:
    ran = subprocess.run(["bash", "-c", line.replace("make", "make -n", 1)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if "ARGS" in line:
        started = next(command for command in ran.stdout.splitlines() if "/gateway " in command)
        assert parses(started)


@pytest.mark.parametrize("line", [line for line in INLINE if line.startswith("gateway ")])
def test_command_named_in_a_sentence_is_one(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parses(line)


def test_options_named_in_a_sentence_are_ones() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", PROSE)) | {"--day", "--json"}
    assert named <= {*options(_parser()), *options(bench._parser())}


def test_every_command_tells_how_it_is_used() -> None:
    def told(parser: argparse.ArgumentParser) -> list[str]:
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser.format_help(), *(text for one in below for each in one.choices.values() for text in told(each))]

    assert any("above 5 %." in text for text in told(_parser()))


def test_readme_can_be_read_in_one_go() -> None:
    assert len(README.splitlines()) <= 200


def block_with(text: str) -> str:
    (block,) = [block for block in SHELL if text in block]
    return block


def parses(line: str) -> bool:
    """Whether the command line is one that `gateway` takes; `--help` ends it with 0."""
    try:
        _parser().parse_args(shlex.split(line, comments=True)[1:])
    except SystemExit as ended:
        return ended.code == 0
    return True


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
