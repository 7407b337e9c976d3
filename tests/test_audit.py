"""The audit finds what is planted, and says in a sentence what it cannot look up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLANTED = {
    "a vendor's token": "token: ghp_" + "a1B2" * 9,
    "a cloud's key id": "AKIA" + "QWERTYUIOPASDFGH",
    "a private key": "-----BEGIN RSA PRIVATE " + "KEY-----\nMII...",
    "a gateway key": "sk-gw-k3f9a0b1c2d4-" + "A1b2" * 10 + "xyz",
    "a password in a URL": "redis://u:" + "S3riously-not-a-word@host/0",
}


def audit(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=110)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "config.yaml").write_text("api_key: env:OPENAI_API_KEY\ndigest: sha256:" + "0f" * 32 + "\n")
    return tmp_path


def test_references_and_digests_are_no_secrets(repository: Path) -> None:
    ran = audit("secrets", repository)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("secret", PLANTED.values(), ids=PLANTED)
def test_planted_secret_is_found(repository: Path, secret: str) -> None:
    (repository / "notes.md").write_text(f"before\n{secret}\n")
    ran = audit("secrets", repository)
    assert ran.returncode == 1
    assert ran.stderr.startswith("notes.md:")
    assert secret not in ran.stderr


def test_without_a_network_the_lookup_is_a_sentence() -> None:
    nowhere = "http://127.0.0.1:9"
    ran = audit("vulnerabilities", HTTPS_PROXY=nowhere, HTTP_PROXY=nowhere, https_proxy=nowhere, http_proxy=nowhere)
    assert ran.returncode == 0, ran.stderr
    assert "requirements.lock: " in ran.stdout
    assert "not checked" in ran.stdout


def test_bill_of_materials_has_every_package_that_serving_needs() -> None:
    assert audit("sbom").returncode == 0
    bill = json.loads((ROOT / "build" / "sbom.json").read_text())
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    assert {component["name"] for component in bill["components"]} == locked
