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
from tests.test_answer_matrix import outcome
from tests.test_responses_journey import ALIASES

OF_EVERY_VENDOR = (
    "chat", "tools", "beside", "noTools", "refusal", "reasoning", "image", "json",
    "responses", "responseTools", "responseBeside", "responseNoTools", "responseRefusal", "responseReasoning",
    "responseImage", "responseJson",
)  # fmt: skip
OF_SOME = ("several", "logprobs", "responseLogprobs")
SOME = ("one-target", "azure", "gemini", "vertex")
"""Vendors that give several answers, and log probabilities."""
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


pytestmark = [pytest.mark.skipif(bool(lacks()), reason=str(lacks())), pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def seen(stack: Any) -> dict[str, Any]:
    """What the scenarios saw."""
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(["npm", "ci", *quiet], cwd=FOLDER, check=True, capture_output=True, timeout=300)
    environ = {
        "PATH": os.environ["PATH"],
        "GATEWAY_URL": stack.url,
        "GATEWAY_KEY": KEY,
        "GATEWAY_TENANT": "tenant-a",
        "GATEWAY_FEW": "tenant-few-node",
        "ALIASES": ",".join(ALIASES),
        "SOME": ",".join(SOME),
        "NODE_EXTRA_CA_CERTS": str(stack.ca_file),
    }
    with Journey(stack) as journey:
        journey.clear()
    ran = subprocess.run(
        ["node", "scenarios.mjs"], cwd=FOLDER, env=environ, capture_output=True, text=True, timeout=250
    )
    assert ran.returncode == 0, ran.stderr[-2_000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("scenario", [*OF_EVERY_VENDOR, *OF_SOME])
def test_a_stream_accumulates_to_the_whole_answer(seen: dict[str, Any], scenario: str) -> None:
    assert set(seen[scenario]) == set(SOME if scenario in OF_SOME else ALIASES)
    for alias, told in seen[scenario].items():
        assert told["whole"] == told["streamed"], alias
        assert told.get("numbered", True), alias


def test_every_vendor_answers_by_schema(seen: dict[str, Any]) -> None:
    assert seen["schema"] == dict.fromkeys(ALIASES, "string")


@pytest.mark.parametrize("scenario", ["tools", "beside"])
def test_tools_are_called_in_parallel_with_text_beside_them(seen: dict[str, Any], scenario: str) -> None:
    for told in seen[scenario].values():
        ((answer,), _) = told["whole"]
        assert (len(answer["calls"]), bool(answer["said"])) == (2, scenario == "beside")


def test_refusals_are_told_as_the_page_says(seen: dict[str, Any]) -> None:
    for alias, vendor in ALIASES.items():
        ((answer,), _) = seen["refusal"][alias]["whole"]
        word, *_ = outcome("chat", "Refusal in its own member", vendor)
        assert (word == "yes") == bool(answer["refusal"]), alias


def test_several_answers_are_told_apart(seen: dict[str, Any]) -> None:
    for told in seen["several"].values():
        assert len({answer["said"] for answer in told["whole"][0]}) == 3


def test_log_probabilities_are_of_each_token(seen: dict[str, Any]) -> None:
    for told in seen["logprobs"].values():
        assert len(told["whole"][0][0]["tokens"]) == 4


def test_a_client_that_leaves_amid_a_stream_has_its_row(seen: dict[str, Any], journey: Journey) -> None:
    rows = journey.rows([*seen["left"].values(), *seen["responseLeft"].values()])
    assert {row["status"] for row in rows.values()} == {"client_closed"}


def test_models_and_embeddings_are_read(seen: dict[str, Any]) -> None:
    assert set(ALIASES) <= set(seen["models"])
    assert seen["embedding"] > 0


def test_a_rate_that_is_used_up_is_429_with_retry_after(seen: dict[str, Any]) -> None:
    assert seen["throttled"] == [["RateLimitError", 429, "rate_limit_exceeded", True]] * 2


def test_the_lock_file_names_no_registry() -> None:
    assert "http" not in (FOLDER / "package-lock.json").read_text()
