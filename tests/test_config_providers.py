"""Providers in the configuration: what each kind needs, known vendors, and keys that nobody needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import AwsChain, Config, ConfigError, load
from app.providers import PROVIDERS
from app.vendors import COMPATIBLE, KINDS
from tests.test_config import ENVIRON, SHIPPED

USED = {"OPENAI_API_KEY": "k", "OPENROUTER_API_KEY": "k", "GATEWAY_USER_SALT": "s"}


def with_provider(tmp_path: Path, environ: dict[str, str] = ENVIRON, used: bool = True, **provider: Any) -> Config:
    """The shipped configuration with a provider `mine`, and an alias that asks it."""
    overlay: dict[str, Any] = {
        "providers": {"mine": provider},
        "targets": {"mine/model": {"provider": "mine", "model": "m-1"}},
    }
    if used:
        overlay["aliases"] = {"mine": {"targets": ["mine/model"]}}
    file = tmp_path / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay))
    return load(SHIPPED, "prod", [file], environ=environ)


def faults(tmp_path: Path, **provider: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        with_provider(tmp_path, **provider)
    return str(raised.value)


def test_every_kind_and_every_vendor_has_a_translator() -> None:
    assert set(KINDS) | set(COMPATIBLE) == set(PROVIDERS)


def test_a_known_vendor_needs_a_key_and_nothing_else(tmp_path: Path) -> None:
    made = with_provider(tmp_path, kind="openai_compatible", vendor="groq", api_key="env:OPENAI_API_KEY")
    provider = made.aliases["mine"].targets[0].provider
    assert (provider.kind, provider.base_url) == ("groq", "https://api.groq.com/openai/v1")


@pytest.mark.parametrize(("name", "vendor"), COMPATIBLE.items(), ids=COMPATIBLE)
def test_a_known_vendor_may_be_elsewhere(tmp_path: Path, name: str, vendor: object) -> None:
    made = with_provider(
        tmp_path,
        kind="openai_compatible",
        vendor=name,
        base_url="https://mine.example/v1",
        api_key="env:OPENAI_API_KEY",
    )
    assert made.aliases["mine"].targets[0].provider.base_url == "https://mine.example/v1"


def test_a_server_of_ones_own_needs_no_key(tmp_path: Path) -> None:
    made = with_provider(tmp_path, kind="openai_compatible", base_url="http://10.0.0.7:8000/v1")
    assert made.aliases["mine"].targets[0].provider.credential.secret.reveal() == ""


def test_azure_has_deployments_under_an_api_version(tmp_path: Path) -> None:
    made = with_provider(
        tmp_path,
        kind="azure", base_url="https://mine.openai.azure.com/", api_key="env:OPENAI_API_KEY", api_version="2024-10-21",
    )  # fmt: skip
    provider = made.aliases["mine"].targets[0].provider
    assert (provider.base_url, provider.api_version) == ("https://mine.openai.azure.com", "2024-10-21")


AWS = {"access_key_id": "env:OPENAI_API_KEY", "secret_access_key": "env:GATEWAY_USER_SALT"}


def test_bedrock_s_address_and_signatures_are_of_its_region(tmp_path: Path) -> None:
    made = with_provider(tmp_path, kind="bedrock", region="eu-west-3", session_token="env:OPENAI_API_KEY", **AWS)
    provider = made.aliases["mine"].targets[0].provider
    assert provider.base_url == "https://bedrock-runtime.eu-west-3.amazonaws.com"
    credential = provider.credential
    assert (credential.access_key_id, credential.region) == (ENVIRON["OPENAI_API_KEY"], "eu-west-3")
    assert credential.secret.reveal() == ENVIRON["GATEWAY_USER_SALT"]
    assert credential.session_token.reveal() == ENVIRON["OPENAI_API_KEY"]


def test_bedrock_s_chain_signs_for_its_region(tmp_path: Path) -> None:
    made = with_provider(tmp_path, kind="bedrock", region="eu-west-3", credentials="profile:team")
    assert made.aliases["mine"].targets[0].provider.account == AwsChain("team", "eu-west-3")


@pytest.mark.parametrize(
    ("provider", "sentence"),
    [
        (AWS, "providers.mine.region: is required"),
        ({"region": "eu-west-3"}, "providers.mine.credentials: is required"),
        (AWS | {"region": "eu-west-3", "credentials": "chain"}, "providers.mine.access_key_id: stands beside"),
        (AWS | {"region": "eu"}, "providers.mine.region: is required"),
        (AWS | {"region": "eu-west-3/.."}, "providers.mine.region: is required"),
        (
            {"region": "eu-west-3", "access_key_id": "env:OPENAI_API_KEY"},
            "providers.mine.secret_access_key: is required",
        ),
        ({"region": "eu-west-3", "session_token": "env:OPENAI_API_KEY"}, "providers.mine.access_key_id: is required"),
        (AWS | {"region": "eu-west-3", "api_key": "env:OPENAI_API_KEY"}, "providers.mine.access_key_id: stands beside"),
        (
            AWS | {"kind": "openai", "api_key": "env:OPENAI_API_KEY"},
            "providers.mine.access_key_id: is for kind bedrock",
        ),
    ],
)
def test_a_fault_in_bedrock_s_key_is_named(tmp_path: Path, provider: dict[str, str], sentence: str) -> None:
    assert sentence in faults(tmp_path, **{"kind": "bedrock"} | provider)


AZURE = {"kind": "azure", "base_url": "https://mine.openai.azure.com", "api_key": "env:OPENAI_API_KEY"}


@pytest.mark.parametrize(
    ("provider", "sentence"),
    [
        ({"kind": "openai"}, "providers.mine.api_key: is required"),
        ({"kind": "azure", "api_key": "env:OPENAI_API_KEY"}, "providers.mine.base_url: is required"),
        ({"kind": "openai_compatible"}, "providers.mine.base_url: is required"),
        ({"kind": "openai_compatible", "vendor": "groq"}, "providers.mine.api_key: is required"),
        ({"kind": "openai_compatible", "vendor": "acme"}, "no vendor 'acme'; known: cerebras, deepseek"),
        ({"kind": "openai", "vendor": "groq", "api_key": "env:OPENAI_API_KEY"}, "is for kind openai_compatible"),
        ({"kind": "openai", "api_version": "2024-10-21", "api_key": "env:OPENAI_API_KEY"}, "is for kind azure"),
        (AZURE | {"api_version": "v1&x=y"}, "providers.mine.api_version: is for kind azure, and matches"),
    ],
)
def test_a_provider_that_lacks_something_is_a_fault(tmp_path: Path, provider: dict[str, str], sentence: str) -> None:
    assert sentence in faults(tmp_path, **provider)


def test_a_deployments_name_cannot_leave_its_place_in_the_path(tmp_path: Path) -> None:
    file = tmp_path / "overlay.yaml"
    file.write_text(yaml.safe_dump({"targets": {"azure/x": {"provider": "azure", "model": "../x?y"}}}))
    with pytest.raises(ConfigError, match=r"targets\.azure/x\.model: is the name of a deployment"):
        load(SHIPPED, "prod", [file], environ=ENVIRON)


@pytest.mark.parametrize("key", ["env:NOT_SET", "file:/nowhere/key"])
def test_a_provider_that_no_alias_uses_needs_no_key(tmp_path: Path, key: str) -> None:
    made = with_provider(tmp_path, used=False, kind="openai", api_key=key)
    assert "mine" not in made.aliases


@pytest.mark.parametrize("key", ["env:NOT_SET", "file:/nowhere/key"])
def test_a_provider_that_an_alias_uses_needs_its_key(tmp_path: Path, key: str) -> None:
    assert "providers.mine.api_key" in faults(tmp_path, kind="openai", api_key=key)


def test_a_key_written_in_place_is_a_fault_even_where_nobody_uses_it(tmp_path: Path) -> None:
    assert "a secret is a reference" in faults(tmp_path, used=False, kind="openai", api_key="sk-1")


def test_the_shipped_configuration_asks_for_the_keys_that_its_aliases_use_alone() -> None:
    assert load(SHIPPED, "prod", environ=USED).aliases
