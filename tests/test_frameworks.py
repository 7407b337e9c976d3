"""Frameworks through Traefik, and schemathesis on /schema: from an environment of their own, `make frameworks`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from loadtest.stack import Stack
from tests.journey import KEY, Journey

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / ".venv-frameworks" / "bin"
pytestmark = [
    pytest.mark.drill,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PROGRAMS.exists(), reason="`make frameworks` installs the frameworks, and runs these"),
]


def run(stack: Stack, *command: object) -> subprocess.CompletedProcess[str]:
    environ = {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "GATEWAY_URL": stack.url,
        "GATEWAY_KEY": KEY,
        "GATEWAY_TENANT": "tenant-a",
        "SSL_CERT_FILE": str(stack.ca_file),
        "REQUESTS_CA_BUNDLE": str(stack.ca_file),
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
    }
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=800
    )


def test_frameworks_work_over_every_vendor(journey: Journey) -> None:
    ran = run(journey.stack, PROGRAMS / "python", ROOT / "tests" / "frameworks" / "scenarios.py")
    assert ran.returncode == 0, ran.stderr[-3_000:]
    seen = json.loads(ran.stdout.splitlines()[-1])
    failed = {name: told for name, told in seen.items() if told != "ok"}
    assert not failed, "\n".join(f"{name}: {told}" for name, told in failed.items())
    assert len(seen) >= 45


def test_no_request_that_the_description_allows_or_forbids_is_answered_500(journey: Journey) -> None:
    options = {
        "checks": "not_a_server_error",
        "phases": "examples,coverage,fuzzing",
        "max-examples": "40",
        "mode": "all",
        "suppress-health-check": "all",
        "exclude-path-regex": "^/health/ready",  # which answers 503 while a replica stops
        "generation-database": "none",
        "seed": "1",
        "tls-verify": journey.stack.ca_file,
    }
    told = [part for name, value in options.items() for part in (f"--{name}", value)]
    headers = ["--header", f"Authorization: Bearer {KEY}", "--header", "X-Tenant-Id: tenant-a"]
    ran = run(journey.stack, PROGRAMS / "schemathesis", "run", f"{journey.stack.url}/schema", *told, *headers)
    assert ran.returncode == 0, ran.stdout[-4_000:] + ran.stderr[-1_000:]
