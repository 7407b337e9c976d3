"""`gateway lint-apps`: what of an app's source calls a vendor by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from app.cli import main
from app.lint_apps import MAX_BYTES, PROSE, SKIPPED, direct_calls
from loadtest.processes import ROOT

DIRECT = {
    'httpx.post("https://api.openai.com/v1/chat/completions")': "address api.openai.com",
    'url = "https://my-resource.openai.azure.com/openai/v1"': "address my-resource.openai.azure.com",
    'const base = "https://api.anthropic.com";': "address api.anthropic.com",
    '"https://bedrock-runtime.eu-west-1.amazonaws.com"': "address bedrock-runtime.eu-west-1.amazonaws.com",
    '"https://eu-aiplatform.googleapis.com"': "address eu-aiplatform.googleapis.com",
    'key = os.environ["OPENAI_API_KEY"]': "key OPENAI_API_KEY",
    "ANTHROPIC_API_KEY: ${SECRET}": "key ANTHROPIC_API_KEY",
    "client = OpenAI()": "client OpenAI",
    "client = AsyncAnthropic(max_retries=2)": "client AsyncAnthropic",
    "const client = new OpenAI({ timeout: 5 })": "client OpenAI",
    'boto3.client("bedrock-runtime")': "own address",
}
THROUGH_THE_GATEWAY = (
    'client = OpenAI(base_url="https://llm-gateway.internal/v1", api_key=os.environ["GATEWAY_KEY"])',
    "client = OpenAI(\n    timeout=5,\n    base_url=GATEWAY,\n)",
    "const client = new OpenAI({ baseURL: process.env.LLM_GATEWAY_URL })",
    "host = 'api.openai.com'  # gateway: allow",
    "from openai import OpenAI",
)


@pytest.mark.parametrize(("source", "found"), DIRECT.items())
def test_direct_call_is_found(source: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("\n" + source)
    (call,) = direct_calls(tmp_path)
    assert call.line == 2
    assert found in call.found
    assert str(call).startswith(f"{tmp_path}/app.py:2: ")


@pytest.mark.parametrize("source", THROUGH_THE_GATEWAY)
def test_call_through_the_gateway_is_not_found(source: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(source)
    assert direct_calls(tmp_path) == []


def test_key_that_is_found_is_not_shown(tmp_path: Path) -> None:
    key = "sk-" + "proj-" + "a1" * 20
    (tmp_path / ".env").write_text(f"KEY={key}\n")
    (call,) = direct_calls(tmp_path)
    assert key not in str(call)


def test_what_others_wrote_and_what_is_no_source_is_passed_over(tmp_path: Path) -> None:
    for name in ("node_modules/x.js", ".venv/x.py", "README.md", "poetry.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("https://api.openai.com")
    (tmp_path / "model.bin").write_bytes(b"\0https://api.openai.com")
    (tmp_path / "bundle.js").write_text("https://api.openai.com\n".ljust(MAX_BYTES + 1))
    assert direct_calls(tmp_path) == []
    assert [direct_calls(tmp_path / named) for named in ("model.bin", "bundle.js")] == [[], []]  # as a hook names them


def test_command_fails_with_the_places_and_passes_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint-apps", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "No direct vendor call.\n"
    (tmp_path / "app.py").write_text("OpenAI()")
    assert main(["lint-apps", str(tmp_path), "--json"]) == 1
    (call,) = json.loads(capsys.readouterr().out)
    assert (call["file"], call["line"]) == (str(tmp_path / "app.py"), 1)


def test_folder_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint-apps", str(tmp_path / "away")]) == 1
    assert "away" in capsys.readouterr().err


def test_hook_of_pre_commit_runs_the_command_on_the_files_that_it_would_look_at(tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert f"id: {hook['id']}" in (ROOT / "runbooks" / "drills.md").read_text()
    assert {kind for kind in PROSE if re.search(hook["exclude"], f"a{kind}")} == PROSE
    app = tmp_path / "app.py"
    app.write_text("client = OpenAI()")
    assert not any(re.search(hook["exclude"], path) for path in ("app.py", "src/builder/app.py", "rebuild/app.py"))
    assert {folder for folder in SKIPPED if re.search(hook["exclude"], f"src/{folder}/a.js")} == SKIPPED
    assert {folder for folder in SKIPPED if re.search(hook["exclude"], f"{folder}/a.js")} == SKIPPED
    program, *arguments = hook["entry"].split()
    assert program == "gateway"
    assert main([*arguments, str(app)]) == 1
    app.write_text("client = OpenAI(base_url=GATEWAY)")
    assert main([*arguments, str(app)]) == 0
