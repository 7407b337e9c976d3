"""Who may what, as it is written: plans that extend others, tenants in files of their own, environments, issuers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from app.config import Config, ConfigError, ConfigSource, load
from tests.test_config import DIGEST, ENVIRON, SHIPPED, faults_of, loaded, with_overlay

ISSUER = {
    "issuer": "https://login.example.com/",
    "audience": "llm-gateway",
    "jwks": "https://login.example.com/keys",
    "algorithms": ["RS256"],
    "tenants": ["acme-*", "smoke-test"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "config"))


def written(tmp_path: Path, **sections: object) -> Config:
    return with_overlay(tmp_path, sections)


# --- plans ------------------------------------------------------------------------------------------------------------

PLANS = {
    "base": {"rpm": 10, "allowed_models": ["support-fast"], "tier": "b"},
    "more": {"extends": "base", "rpm": 20},
    "most": {"extends": "more", "allowed_models": ["*"], "residency": ["us"]},
}


@pytest.mark.parametrize(
    ("plan", "rpm", "models", "tier", "residency"),
    [
        ("base", 10, {"support-fast"}, "b", None),
        ("more", 20, {"support-fast"}, "b", None),
        ("most", 20, None, "b", {"us"}),
    ],
)
def test_a_plan_has_what_it_leaves_out_from_the_one_it_extends(
    tmp_path: Path, plan: str, rpm: int, models: set[str] | None, tier: str, residency: set[str] | None
) -> None:
    tenant = written(tmp_path, plans=PLANS, tenants={"t": {"plan": plan}}).tenants["t"]
    assert (tenant.quota.rpm, tenant.allowed_models, tenant.tier, tenant.residency) == (rpm, models, tier, residency)


def test_a_tenant_s_own_value_counts_before_an_inherited_one(tmp_path: Path) -> None:
    tenant = written(tmp_path, plans=PLANS, tenants={"t": {"plan": "most", "residency": [], "rpm": 1}}).tenants["t"]
    assert (tenant.residency, tenant.quota.rpm) == (frozenset(), 1)


def test_a_plan_is_a_tenant_without_a_name(tmp_path: Path) -> None:
    made = written(tmp_path, plans=PLANS, tenants={"t": {"plan": "most"}})
    named = made.plans["most"]
    assert (named.quota.rpm, named.plan, named.residency) == (20, "most", frozenset({"us"}))


@pytest.mark.parametrize(
    ("plans", "fault"),
    [
        ({"a": {"extends": "a"}}, "plans.a.extends: goes in a circle: a -> a"),
        ({"a": {"extends": "b"}, "b": {"extends": "a"}}, "plans.b.extends: goes in a circle: a -> b -> a"),
        ({"a": {"extends": "gone"}}, "plans.a.extends: no plan 'gone'"),
        ({"a": {"residency": ["mars"]}}, "plans.a.residency: no provider's region 'mars'; known: us"),
    ],
)
def test_a_plan_that_leads_nowhere_is_a_fault(tmp_path: Path, plans: dict[str, object], fault: str) -> None:
    assert any(fault in found for found in faults_of(lambda: written(tmp_path, plans=plans)))


# --- files of tenants -------------------------------------------------------------------------------------------------


def put(folder: Path, name: str, document: object) -> Path:
    file = folder / "tenants" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(document))
    return file


def test_tenants_are_read_from_all_files_of_the_folder(folder: Path) -> None:
    put(folder, "a.yaml", {"tenants": {"one": {"plan": "free"}}})
    put(folder, "b.yaml", {"tenants": {"two": {"plan": "standard", "rpm": 3}}})
    tenants = loaded(folder).tenants
    assert (tenants["one"].plan, tenants["two"].quota.rpm, "acme-corp" in tenants) == ("free", 3, True)


def test_a_tenant_written_twice_is_a_fault_that_names_both_files(folder: Path) -> None:
    put(folder, "a.yaml", {"tenants": {"acme-corp": {"plan": "free"}}})
    (fault,) = faults_of(lambda: loaded(folder))
    assert fault.startswith(f"{folder}/tenants/a.yaml: tenants.acme-corp: is written in {folder}/tenant_policy.yaml")


def test_such_a_file_holds_nothing_but_tenants(folder: Path) -> None:
    put(folder, "a.yaml", {"tenants": {}, "plans": {}})
    assert "plans: does not belong in this file" in faults_of(lambda: loaded(folder))[0]


def test_an_environment_may_change_a_tenant_of_such_a_file(folder: Path) -> None:
    put(folder, "a.yaml", {"tenants": {"one": {"plan": "free"}}})
    (folder / "environments" / "prod.yaml").write_text("tenants: {one: {rpm: 5}}\n")
    assert loaded(folder).tenants["one"].quota.rpm == 5


def test_a_new_file_of_tenants_is_noticed(folder: Path) -> None:
    source = ConfigSource(folder, "prod", (), ENVIRON)
    put(folder, "a.yaml", {"tenants": {"one": {"plan": "free"}}})
    assert source.changed()
    assert source.reload()
    assert "one" in source.current.tenants


def test_ten_thousand_tenants_load_and_a_fault_among_them_is_short(folder: Path) -> None:
    put(folder, "many.yaml", {"tenants": {f"tenant-{n}": {"plan": "free"} for n in range(10_000)}})
    assert len(loaded(folder).tenants) > 10_000
    overlay = folder / "overlay.yaml"
    key = {"digest": DIGEST, "service": "s", "tenants": ["gone"]}
    overlay.write_text(yaml.safe_dump({"service_keys": {"k3f9a0b1c2d4": key}}))
    (fault,) = faults_of(lambda: loaded(folder, "prod", overlay))
    assert len(fault) < 1_000
    assert " more" in fault


# --- environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environment", "counts"), [("prod", True), ("staging", True), ("dev", False)])
def test_an_entry_counts_in_its_environments_only(folder: Path, environment: str, counts: bool) -> None:
    where = {"environments": ["prod", "staging"]}
    overlay = folder / "overlay.yaml"
    document = {
        "gateway": {"edge_secret": "env:GATEWAY_USER_SALT"},
        "tenants": {"one": {"plan": "free", **where}},
        "service_keys": {"k3f9a0b1c2d4": {"digest": DIGEST, "service": "s", "tenants": ["one"], **where}},
        "issuers": {"sso": ISSUER | where},
        "certificates": {"billing": {"common_name": "b", "service": "s", "tenants": ["one"], **where}},
    }
    overlay.write_text(yaml.safe_dump(document))
    config = loaded(folder, environment, overlay)
    found = ("one" in config.tenants, bool(config.keys), bool(config.issuers), bool(config.certificates))
    assert found == (counts,) * 4


def test_a_misspelt_environment_is_a_fault(tmp_path: Path) -> None:
    tenants = {"one": {"plan": "free", "environments": ["prd"]}}
    (fault,) = faults_of(lambda: written(tmp_path, tenants=tenants))
    assert "tenants.one.environments: no environment 'prd'; known: ci, dev, prod, staging" in fault


# --- issuers and certificates -----------------------------------------------------------------------------------------


def test_an_issuer_is_found_by_what_its_tokens_say(tmp_path: Path) -> None:
    issuer = written(tmp_path, issuers={"sso": ISSUER}).issuers["https://login.example.com/"]
    assert (issuer.name, issuer.audiences, issuer.algorithms) == ("sso", ("llm-gateway",), frozenset({"RS256"}))


@pytest.mark.parametrize(
    ("tenant", "may"), [("acme-x", True), ("acme-", True), ("smoke-test", True), ("acme", False), ("other", False)]
)
def test_an_issuer_may_name_its_tenants_only(tmp_path: Path, tenant: str, may: bool) -> None:
    (issuer,) = written(tmp_path, issuers={"sso": ISSUER}).issuers.values()
    assert issuer.may_name(tenant) is may


def test_an_issuer_with_a_star_may_name_any_tenant(tmp_path: Path) -> None:
    (issuer,) = written(tmp_path, issuers={"sso": ISSUER | {"tenants": ["*"]}}).issuers.values()
    assert issuer.may_name("anything")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"algorithms": ["none"]}, "issuers.sso.algorithms: Invalid enum value 'none'"),
        ({"algorithms": ["HS256"]}, "issuers.sso.algorithms: Invalid enum value 'HS256'"),
        ({"algorithms": []}, "issuers.sso.algorithms: needs at least one"),
        ({"jwks": "http://login.example.com/keys"}, "issuers.sso.jwks: expected https://host/path"),
        ({"jwks": "https://u:secret@login.example.com/keys"}, "issuers.sso.jwks: expected https://host/path"),
        ({"jwks": "file:keys.json"}, "issuers.sso.jwks: expected https://host/path"),
        ({"audience": []}, "issuers.sso.audience: needs at least one"),
        ({"audience": ""}, "issuers.sso.audience: needs at least one"),
        ({"default_plan": "gone"}, "issuers.sso.plans: no plan 'gone'"),
        ({"plans": ["free", "gone"]}, "issuers.sso.plans: no plan 'gone'"),
        ({"tenants": ["a b"]}, "issuers.sso.tenants: 'a b' is neither a tenant's name"),
        ({"leeway_seconds": 3600}, "issuers.sso.leeway_seconds: must be from 0 to 300"),
    ],
)
def test_a_faulty_issuer_is_told_by_its_path(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    found = faults_of(lambda: written(tmp_path, issuers={"sso": ISSUER | change}))
    assert any(fault in sentence for sentence in found), found


def test_two_issuers_cannot_make_the_same_tokens(tmp_path: Path) -> None:
    (fault,) = faults_of(lambda: written(tmp_path, issuers={"a": ISSUER, "b": ISSUER}))
    assert "issuers.b.issuer: is that of a too" in fault


CERTIFICATE = {"common_name": "billing", "service": "billing", "tenants": ["acme-corp"]}


def test_certificates_without_the_edge_s_secret_are_a_fault(tmp_path: Path) -> None:
    (fault,) = faults_of(lambda: written(tmp_path, certificates={"billing": CERTIFICATE}))
    assert "certificates: needs gateway.edge_secret" in fault


@pytest.mark.parametrize("name", ["", 'a"b', "a,b", "é", "a" * 65])
def test_a_common_name_that_the_edge_cannot_forward_clearly_is_a_fault(tmp_path: Path, name: str) -> None:
    sections = {
        "gateway": {"edge_secret": "env:GATEWAY_USER_SALT"},
        "certificates": {"billing": CERTIFICATE | {"common_name": name}},
    }
    with pytest.raises(ConfigError, match=r"certificates\.billing\.common_name: must match"):
        written(tmp_path, **sections)


def test_the_edge_s_secret_is_a_secret(tmp_path: Path) -> None:
    config = written(tmp_path, gateway={"edge_secret": "env:GATEWAY_USER_SALT"})
    assert "value-of" not in repr(config.settings)
    assert config.settings.edge_secret.reveal() == ENVIRON["GATEWAY_USER_SALT"]


def test_the_examples_in_the_shipped_files_are_valid(tmp_path: Path) -> None:
    """The commented entries of service_keys.yaml, with their comment signs taken away."""
    lines = (SHIPPED / "service_keys.yaml").read_text().splitlines()
    text = "\n".join(line.removeprefix("#") if line.startswith("#   ") else line for line in lines)
    text = text.replace("issuers: {}", "").replace("certificates: {}", "")
    text = text.replace("   corp-sso:", "issuers:\n   corp-sso:").replace("   billing:", "certificates:\n   billing:")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(text + "\ngateway: {edge_secret: env:GATEWAY_USER_SALT}\n")
    config = load(SHIPPED, "prod", [overlay], environ={**os.environ, **ENVIRON})
    assert (len(config.issuers), len(config.certificates)) == (1, 1)
