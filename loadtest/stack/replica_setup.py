"""The configuration that the local stack lays over the user's: simulated vendors, one service key and its tenant."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from app.config import ConfigError, load
from loadtest.local_ca import CLIENT_NAME
from loadtest.services import StackError, simulated_key

TENANT = "local-dev"
KEY_TENANTS = [TENANT, "smoke-test", "acme-corp", "acme-free-trial"]
"""Whom the stack's key may act for, of those that the configuration has."""
LIMITS = {"rpm": 600_000, "daily_token_cap": 1_000_000_000}
"""Counted like every tenant's, and out of the way of tests and demonstrations."""


def overlay(
    key: str,
    simulated: Mapping[str, tuple[str, tuple[str, ...]]],
    simulator_url: str,
    tenants: Collection[str],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The overlay document.

    simulated: the providers that the simulator stands in for, each with its path there and the members of its key.
    tenants: those of the configuration. extra: laid on top.
    """
    acts_for = [tenant for tenant in KEY_TENANTS if tenant == TENANT or tenant in tenants]
    document = {
        "gateway": {"edge_secret": "env:GATEWAY_EDGE_SECRET"},
        "providers": {
            name: {"base_url": simulator_url + path} | simulated_key(members, f"{simulator_url}/{name}/token")
            for name, (path, members) in simulated.items()
        },
        "tenants": {TENANT: {"plan": "internal", "allowed_models": ["*"], **LIMITS}},
        "service_keys": {
            key.split("-")[2]: {
                "digest": "sha256:" + hashlib.sha256(key.encode()).hexdigest(),
                "service": TENANT,
                "tenants": acts_for,
            }
        },
        "certificates": {TENANT: {"common_name": CLIENT_NAME, "service": TENANT, "tenants": acts_for}},
    }
    return merged(document, extra)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base` as the gateway lays overlays: mappings merge, everything else replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def check(config: Path, environment: str, overlay_file: Path, environ: Mapping[str, str]) -> None:
    """Loads the configuration as a replica will; raises `StackError` with every fault."""
    try:
        load(config, environment, [overlay_file], environ=environ)
    except ConfigError as error:
        faults = "\n".join(f"    {fault}" for fault in error.faults)
        raise StackError(
            f"The configuration in {config} is not valid:\n{faults}\n"
            f"Correct it; `gateway check --config {config} --environment {environment}` reads it again."
        ) from error
