"""OpenAI's official SDK for Node through Traefik, over every vendor: tests/node, installed by its own lock file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.journey import KEY, Journey
from tests.test_responses_journey import ALIASES

FOLDER = Path(__file__).parent / "node"
OLDEST = 20
"""The oldest Node that the SDK supports."""


def lacks() -> str | None:
    """Why these cannot be run here."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "node and npm are not installed; .ci/run installs them"
    found = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return (
        None
        if int(re.match(r"v(\d+)", found)[1]) >= OLDEST
        else f"Node {OLDEST} or newer is needed, not {found.strip()}"
    )


pytestmark = pytest.mark.skipif(bool(lacks()), reason=str(lacks()))


@pytest.fixture(scope="module")
def seen(stack: Any) -> dict[str, Any]:
    """What the scenarios saw."""
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(["npm", "ci", *quiet], cwd=FOLDER, check=True, capture_output=True, timeout=100)
    environ = {
        "PATH": os.environ["PATH"],
        "GATEWAY_URL": stack.url,
        "GATEWAY_KEY": KEY,
        "GATEWAY_TENANT": "tenant-a",
        "GATEWAY_FEW": "tenant-few-node",
        "ALIASES": ",".join(ALIASES),
        "NODE_EXTRA_CA_CERTS": str(stack.ca_file),
    }
    with Journey(stack) as journey:
        journey.clear()
    ran = subprocess.run(
        ["node", "scenarios.mjs"], cwd=FOLDER, env=environ, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr[-2_000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("scenario", ["chat", "tools", "responses", "responseTools"])
@pytest.mark.parametrize("alias", ALIASES)
def test_a_stream_accumulates_to_the_whole_answer(seen: dict[str, Any], scenario: str, alias: str) -> None:
    told = seen[scenario][alias]
    assert told["whole"] == told["streamed"]
    assert told.get("numbered", True)


def test_every_vendor_answers_by_schema(seen: dict[str, Any]) -> None:
    assert seen["schema"] == dict.fromkeys(ALIASES, "string")


def test_tools_are_called_in_parallel(seen: dict[str, Any]) -> None:
    assert {alias: len(told["whole"]) for alias, told in seen["tools"].items()} == dict.fromkeys(ALIASES, 2)


def test_a_client_that_leaves_amid_a_stream_has_its_row(seen: dict[str, Any], journey: Journey) -> None:
    rows = journey.rows(list(seen["left"].values()))
    assert {row["status"] for row in rows.values()} == {"client_closed"}


def test_models_and_embeddings_are_read(seen: dict[str, Any]) -> None:
    assert set(ALIASES) <= set(seen["models"])
    assert seen["embedding"] > 0


def test_a_rate_that_is_used_up_is_429_with_retry_after(seen: dict[str, Any]) -> None:
    assert seen["throttled"] == ["RateLimitError", 429, "rate_limit_exceeded", True]


def test_the_lock_file_names_no_registry() -> None:
    assert "http" not in (FOLDER / "package-lock.json").read_text()
