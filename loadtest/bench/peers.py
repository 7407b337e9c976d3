"""The gateways that ours is measured beside, each in an environment of its own that is made on demand.

They run as their makers advise for speed, and with less than ours: no database, no limits, no ledger, no access log.
LiteLLM's release is one from before the compromised 1.82.7 and 1.82.8.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import yaml

from loadtest import services
from loadtest.processes import ROOT
from loadtest.services import StackError

LITELLM, PORTKEY = "1.81.16", "1.15.2"
FOLDER = ROOT / "build" / "bench-peers"
INSTALL_SECONDS = 900
KEY = "sk-bench-peer"


class Peer(msgspec.Struct, frozen=True):
    """How one is started: `health` is a path that it answers with 200, `chat` the path of its chat completions."""

    name: str
    version: str
    argv: Sequence[str]
    env: Mapping[str, str]
    health: str
    chat: str
    headers: dict[str, str]


def litellm(port: int, mock_url: str, folder: Path) -> Peer:
    """One worker, no database, no Redis, no callbacks; a master key is its only check. Raises StackError."""
    environment = FOLDER / f"litellm-{LITELLM}"
    program = environment / "bin" / "litellm"
    if not program.exists():
        _install([sys.executable, "-m", "venv", str(environment)])
        _install([str(environment / "bin" / "pip"), "install", "--quiet", f"litellm[proxy]=={LITELLM}"])
    model = {"model": "openai/gpt-4o-mini", "api_base": f"{mock_url}/openai/v1", "api_key": "sk-mock"}
    written = folder / "litellm.yaml"
    written.write_text(
        yaml.safe_dump(
            {
                "model_list": [{"model_name": "support-fast", "litellm_params": model}],
                "general_settings": {"master_key": KEY},
            }
        )
    )
    argv = [str(program), "--config", str(written), "--host", "127.0.0.1", "--port", str(port)]
    env = services.plain_environment(os.environ) | {
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    return Peer(
        "litellm",
        LITELLM,
        [*argv, "--num_workers", "1", "--telemetry", "False"],
        env,
        "/health/liveliness",
        "/v1/chat/completions",
        {"authorization": f"Bearer {KEY}"},
    )


def portkey(port: int, mock_url: str) -> Peer:
    """Headers name vendor and host of each call, as its open-source gateway wants it. Raises StackError."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise StackError("Portkey's gateway needs Node.js with npm, which is not installed.")
    environment = FOLDER / f"portkey-{PORTKEY}"
    program = environment / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if not program.exists():
        environment.mkdir(parents=True, exist_ok=True)
        asked = ["install", "--no-audit", "--no-fund", "--ignore-scripts", f"@portkey-ai/gateway@{PORTKEY}"]
        _install([npm, *asked, "--prefix", str(environment)])
    headers = {
        "authorization": "Bearer sk-mock",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"{mock_url}/openai/v1",
    }
    env = services.plain_environment(os.environ) | {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    argv = [node, str(program), "--headless", f"--port={port}"]
    return Peer("portkey", PORTKEY, argv, env, "/", "/v1/chat/completions", headers)


def _install(command: Sequence[str]) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise StackError(f"{command[0]} did not install within {INSTALL_SECONDS} s.") from error
    if ran.returncode:
        raise StackError(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
