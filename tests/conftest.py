"""One real stack for the whole session: Traefik with TLS, two replicas, Redis, PostgreSQL, the vendor simulator."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from loadtest.stack import Stack
from tests.guard import Guard
from tests.journey import (
    OTHER_KEY,
    OVERLAY,
    VENDOR_KEY,
    Journey,
    jwks,
    patient_edge,
    pool_providers,
    sees_all,
    until,
)
from tests.webhook import Webhook

hypothesis.settings.register_profile("suite", deadline=None)  # how long a case takes is the machine's affair
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def webhook() -> Iterator[Webhook]:
    """Where the stack's warnings go."""
    webhook = Webhook()
    yield webhook
    webhook.close()


@pytest.fixture(scope="session")
def suite_guard() -> Iterator[Guard]:
    """The guardrail of the alias `guarded`."""
    guard = Guard()
    yield guard
    guard.close()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, webhook: Webhook, suite_guard: Guard) -> Iterator[Stack]:
    """The stack with the suite's overlay: short limits, and aliases and tenants made for single tests."""
    environ = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_ACCESS_KEY"))}
    folder = tmp_path_factory.mktemp("stack")
    secret = folder / "vendor-key"
    secret.write_text(VENDOR_KEY + "\n")
    keys = {name: {"api_key": f"file:{secret}"} for name in ("openai", "openrouter")}
    key_set = folder / "jwks.json"
    key_set.write_text(json.dumps(jwks()))
    issuers = {"sso": OVERLAY["issuers"]["sso"] | {"jwks": f"file:{key_set}"}}
    address = folder / "webhook"
    address.write_text(webhook.url)
    gateway = OVERLAY["gateway"] | {"warnings": {"webhook": f"file:{address}"}}

    def overlay(simulator_url: str) -> dict[str, Any]:
        providers = keys | pool_providers(folder, simulator_url)
        guardrails = {"suite": {"url": suite_guard.url, "timeout_ms": 20_000}}
        return OVERLAY | {"guardrails": guardrails, "gateway": gateway, "providers": providers, "issuers": issuers}

    with Stack(folder, overlay=overlay, environ=environ, dynamic=patient_edge(folder)) as stack:
        with Journey(stack) as journey:  # a Redis that was never used gets its budgets from the ledger first
            until(lambda: all(journey.admin("/status", n).json()["budgets"] == "whole" for n in range(2)))
        yield stack


@pytest.fixture
def journey(stack: Stack) -> Iterator[Journey]:
    """Calls through Traefik, the rows they leave, and the vendor's faults, which are cleared afterwards."""
    journey = Journey(stack)
    journey.clear()
    with journey:
        yield journey
        journey.clear()


@pytest.fixture
def whole(journey: Journey) -> Iterator[Journey]:
    """A test that breaks the stack: afterwards both replicas are back and ready, and Traefik sees them."""
    yield journey
    until(lambda: _ready(journey), 90)  # a Redis that was lost twice in a minute is taken for there after up to 30 s


def _ready(journey: Journey) -> bool:
    try:
        return sees_all(journey.stack) and all(
            httpx.get(replica.url + "/health/ready", timeout=60).status_code == 200
            and [journey.admin("/status", number).json()[part] for part in ("redis", "budgets")] == ["up", "whole"]
            for number, replica in enumerate(journey.stack.replicas)
        )
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def other_key() -> str:
    """A service key that may act for the tenant `tenant-b` only."""
    return OTHER_KEY


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent
