"""The configuration: the shipped one loads, every fault is found at once, changes are taken whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from app.config import UNLIMITED, Config, ConfigError, ConfigSource, Secret, ServiceKey, load, written
from app.config.written import WrittenGateway

SHIPPED = Path(__file__).parents[1] / "config"
ENVIRONMENTS = ["ci", "dev", "prod", "staging"]
ENVIRON = {
    name: f"value-of-{name}"
    for name in [
        "OPENAI_API_KEY",
        "OPENROUTER_API_KEY",
        "STAGING_OPENAI_API_KEY",
        "STAGING_OPENROUTER_API_KEY",
        "SIMULATOR_API_KEY",
        "GATEWAY_USER_SALT",
    ]
}
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "config"))


def loaded(
    folder: Path = SHIPPED, environment: str = "prod", *overlays: Path, environ: dict[str, str] = ENVIRON
) -> Config:
    return load(folder, environment, overlays, environ=environ)


def with_overlay(tmp_path: Path, overlay: dict[str, Any] | str) -> Config:
    file = tmp_path / "overlay.yaml"
    file.write_text(overlay if isinstance(overlay, str) else yaml.safe_dump(overlay))
    return loaded(SHIPPED, "prod", file)


def faults_of(work: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        work()
    return raised.value.faults


# --- the shipped configuration ----------------------------------------------------------------------------------------


def test_every_environment_is_known_here() -> None:
    assert sorted(path.stem for path in (SHIPPED / "environments").glob("*.yaml")) == ENVIRONMENTS


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_shipped_configuration_loads(environment: str) -> None:
    assert loaded(environment=environment).environment == environment


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_shipped_target_has_a_price(environment: str) -> None:
    aliases = loaded(environment=environment).aliases.values()
    assert all(target.priced for alias in aliases for target in alias.targets)


@pytest.mark.parametrize("environment", ["dev", "prod", "staging"])
def test_only_ci_meets_the_simulator(environment: str) -> None:
    targets = [target for alias in loaded(environment=environment).aliases.values() for target in alias.targets]
    assert all(target.provider.base_url.startswith("https://") for target in targets)


def test_environments_have_the_same_aliases_and_tenants() -> None:
    seen = {(*map(tuple, (c.aliases, c.tenants)),) for c in (loaded(environment=name) for name in ENVIRONMENTS)}
    assert len(seen) == 1


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_shipped_models_are_pinned_to_a_dated_version(environment: str) -> None:
    targets = [target for alias in loaded(environment=environment).aliases.values() for target in alias.targets]
    floating = [t.model for t in targets if t.serves == "chat" and not re.search(r"-20\d\d-\d\d-\d\d$", t.model)]
    assert floating == []


WRITTEN = [value for name, value in vars(written).items() if name.startswith("Written")]
KEYS = sorted({field.encode_name for shape in WRITTEN for field in msgspec.structs.fields(shape)})
TEXT = "\n".join(path.read_text() for path in sorted(SHIPPED.rglob("*.yaml")))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_set_or_explained_in_the_shipped_files(key: str) -> None:
    assert re.search(rf"\b{key}\b", TEXT)


def test_the_shipped_gateway_file_says_the_defaults() -> None:
    """`what stands here is the default unless it says otherwise`."""
    shipped = yaml.safe_load((SHIPPED / "gateway.yaml").read_text())["gateway"]
    defaults = msgspec.to_builtins(WrittenGateway(), builtin_types=[])
    for key, value in shipped.items():
        if key == "timeouts":
            continue  # their defaults are the running shape's
        assert msgspec.convert(value, type(getattr(WrittenGateway(), key))) == getattr(WrittenGateway(), key)
    assert set(shipped) == set(defaults)


def test_timeouts_left_out_are_the_shipped_ones(folder: Path) -> None:
    shipped = loaded(folder).aliases["support-fast"].timeouts
    (folder / "gateway.yaml").write_text("gateway: {}\n")
    assert loaded(folder).aliases["support-fast"].timeouts == shipped


# --- what is built ----------------------------------------------------------------------------------------------------


def test_a_tenant_takes_its_plan_s_values_and_may_override_each(tmp_path: Path) -> None:
    made = with_overlay(
        tmp_path,
        {
            "plans": {"p": {"rpm": 1, "daily_token_cap": 2, "allowed_models": ["support-fast"], "tier": "gold"}},
            "tenants": {
                "same": {"plan": "p"},
                "other": {"plan": "p", "rpm": 7, "daily_token_cap": 8, "allowed_models": ["*"], "tier": "tin"},
                "none": {"plan": "p", "allowed_models": []},
            },
        },
    )
    facts = {
        name: (t.quota.rpm, t.quota.daily_tokens, t.tier, t.allowed_models)
        for name, t in made.tenants.items()
        if name in ("same", "other", "none")
    }
    assert facts == {
        "same": (1, 2, "gold", frozenset({"support-fast"})),
        "other": (7, 8, "tin", None),
        "none": (1, 2, "gold", frozenset()),
    }


def test_a_limit_left_out_is_no_limit_and_models_left_out_are_none(tmp_path: Path) -> None:
    made = with_overlay(tmp_path, {"plans": {"bare": {}}, "tenants": {"t": {"plan": "bare"}}}).tenants["t"]
    assert (made.quota, made.tier, made.allowed_models) == (UNLIMITED, "bare", frozenset())


def test_prices_are_nano_dollars_and_a_class_without_one_costs_what_its_plain_class_costs() -> None:
    price = loaded().aliases["support-fast"].targets[0].price
    assert (price.input, price.cache_read, price.output) == (150_000_000, 75_000_000, 600_000_000)
    assert (price.cache_write, price.audio_input, price.image_input) == (price.input,) * 3
    assert (price.reasoning, price.audio_output) == (price.output,) * 2


def test_a_model_without_a_price_costs_the_ceiling(tmp_path: Path) -> None:
    overlay = {
        "targets": {"openai/new": {"provider": "openai", "model": "new-2026-01-01"}},
        "aliases": {"new": {"targets": ["openai/new"]}},
    }
    target = with_overlay(tmp_path, overlay).aliases["new"].targets[0]
    assert (target.priced, target.price.input, target.price.output) == (False, 100 * 10**9, 500 * 10**9)


def test_a_key_is_valid_through_its_last_day_in_utc(tmp_path: Path) -> None:
    entry = {"digest": DIGEST, "service": "s", "tenants": ["acme-corp"]}
    text = yaml.safe_dump({"service_keys": {"k3f9a0b1c2d4": entry}}) + "    expires: 2026-01-31\n"
    made = with_overlay(tmp_path, text).keys[bytes(32)]
    assert made == ServiceKey("k3f9a0b1c2d4", "s", frozenset({"acme-corp"}), 1_769_904_000.0)  # 2026-02-01T00:00Z


def test_an_alias_s_own_timeouts_are_over_the_gateway_s(tmp_path: Path) -> None:
    made = with_overlay(tmp_path, {"aliases": {"support-fast": {"timeouts": {"idle_seconds": 5}}}})
    timeouts = made.aliases["support-fast"].timeouts
    assert (timeouts.idle, timeouts.total) == (5.0, made.aliases["support-quality"].timeouts.total)


def test_the_newest_price_table_that_is_not_ahead_is_in_force(folder: Path) -> None:
    for day in ("2026-12-01", "2026-12-24"):
        shutil.copy(folder / "prices" / "2026-11-01.yaml", folder / "prices" / f"{day}.yaml")
    for name in ("notes.yaml", "2026-13-01.yaml"):
        (folder / "prices" / name).write_text("not a table")
    in_force = [load(folder, "prod", environ=ENVIRON, day=date(2026, 12, day)).price_version for day in (1, 23, 24)]
    assert in_force == ["2026-12-01", "2026-12-01", "2026-12-24"]


def test_a_clock_before_all_price_tables_has_the_oldest(folder: Path) -> None:
    shutil.copy(folder / "prices" / "2026-11-01.yaml", folder / "prices" / "2026-12-24.yaml")
    assert load(folder, "prod", environ=ENVIRON, day=date(1970, 1, 1)).price_version == "2026-11-01"


def test_mappings_merge_and_everything_else_is_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("aliases: {support-fast: {targets: [openai/gpt-4o]}}\nplans: {free: {rpm: 1}}\n")
    second.write_text("plans: {free: {rpm: 2}}\nprices: {}\n")
    made = loaded(SHIPPED, "prod", first, second)
    assert made.aliases["support-fast"].chain == ("openai/gpt-4o",)
    assert "support-quality" in made.aliases
    free = made.tenants["acme-free-trial"]
    assert (free.quota.rpm, free.quota.daily_tokens) == (2, 50_000)


def test_an_empty_overlay_changes_nothing_but_the_version(tmp_path: Path) -> None:
    made = with_overlay(tmp_path, "# nothing\n")
    assert (made.aliases, made.version != loaded().version) == (loaded().aliases, True)


def test_yaml_anchors_may_be_merged(tmp_path: Path) -> None:
    made = with_overlay(tmp_path, "plans: {a: &a {rpm: 5}, b: {<<: *a, tier: x}}\ntenants: {t: {plan: b}}\n")
    assert (made.tenants["t"].quota.rpm, made.tenants["t"].tier) == (5, "x")


@pytest.mark.parametrize("service_keys", [None, "service_keys: {}\n"])
def test_a_folder_without_service_keys_loads(folder: Path, service_keys: str | None) -> None:
    (folder / "service_keys.yaml").unlink()
    if service_keys is not None:
        (folder / "service_keys.yaml").write_text(service_keys)
    assert loaded(folder).keys == {}


def test_an_empty_file_is_a_fault_and_not_a_folder_without_keys(folder: Path) -> None:
    (folder / "service_keys.yaml").write_text("")
    with pytest.raises(ConfigError, match="is empty; expected certificates, issuers, service_keys"):
        loaded(folder)


# --- faults -----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, str]] = {
    "unknown section": ("alias: {}", "alias: unknown key; known here: aliases, certificates, discounts, gateway,"),
    "unknown key": ("gateway: {max_bodybytes: 5}", "gateway.max_bodybytes: unknown key; known here: "),
    "unknown key, deeper": ("gateway: {retry: {tries: 5}}", "gateway.retry.tries: unknown key"),
    "unknown key of an entry": ("tenants: {a: {plan: free, rpn: 5}}", "tenants.a.rpn: unknown key"),
    "missing key": ("tenants: {a: {rpm: 5}}", "tenants.a.plan: is required"),
    "wrong type": ("tenants: {a: {plan: free, rpm: many}}", "tenants.a.rpm: Expected `int | null`, got `str`"),
    "true for a number": ("tenants: {a: {plan: free, rpm: true}}", "tenants.a.rpm: Expected `int | null`"),
    "a list for a mapping": ("tenants: [a]", "tenants: expected a mapping, found a list"),
    "nothing for a mapping": ("tenants:", "tenants: expected a mapping, found nothing"),
    "nothing for an entry": ("tenants: {a: }", "tenants.a: expected a mapping, found nothing"),
    "a string for a list": ("aliases: {a: {targets: openai/gpt-4o}}", "aliases.a.targets: Expected `array`"),
    "duplicate key": ("tenants: {a: {plan: free}, a: {plan: free}}", "the key 'a' is written twice"),
    "duplicate key, deeper": ("plans: {a: {rpm: 1, rpm: 2}}", "the key 'rpm' is written twice"),
    "false for a name": ("tenants: {no: {plan: free}}", "a key here is not text; write it in quotes"),
    "octal for a name": ("tenants: {0123: {plan: free}}", "a key here is not text; write it in quotes"),
    "a list for a name": ("tenants: {[a]: {plan: free}}", "a key here is not text; write it in quotes"),
    "not YAML": ("tenants: {", "is not YAML"),
    "a tab": ("tenants:\n\ta: 1", "is not YAML"),
    "another type by tag": ("tenants: !!python/object/apply:os.getcwd []", "is not YAML"),
    "no such day": ("service_keys: {k: {expires: 2026-02-30}}", "is not YAML"),
    "a list at the top": ("- tenants", "expected a mapping at the top, found a list"),
    "tenant's name": ("tenants: {'a:b': {plan: free}}", "tenants.a:b: a name here matches [A-Za-z0-9]"),
    "tenant's name, reserved": ("tenants: {_gateway: {plan: free}}", "tenants._gateway: a name here matches"),
    "tenant's name, line break": ('tenants: {"a\\n": {plan: free}}', "a name here matches"),
    "alias's name": ("aliases: {'a/b': {targets: [openai/gpt-4o]}}", "aliases.a/b: a name here matches"),
    "plan's name": ("plans: {'a b': {}}", "plans.a b: a name here matches"),
    "provider's name": ("providers: {'a/b': {}}", "providers.a/b: a name here matches"),
    "target's name": ("targets: {a: {provider: openai, model: m}}", "targets.a: a name here matches"),
    "key's id": ("service_keys: {short: {}}", "service_keys.short: a name here matches [a-z0-9]{12}"),
    "unknown provider": ("targets: {a/b: {provider: x, model: m}}", "targets.a/b.provider: no provider 'x'; known: "),
    "unknown target": ("aliases: {a: {targets: [x/y]}}", "aliases.a.targets: no target 'x/y'; known: openai/"),
    "unknown plan": ("tenants: {a: {plan: x}}", "tenants.a.plan: no plan 'x'; known: free, "),
    "unknown alias": ("plans: {a: {allowed_models: [x]}}", "plans.a.allowed_models: no alias 'x'; known: support-fast"),
    "unknown alias of a tenant": ("tenants: {a: {plan: free, allowed_models: [x]}}", "tenants.a.allowed_models: no"),
    "unknown tenant": (
        f"service_keys: {{k3f9a0b1c2d4: {{digest: '{DIGEST}', service: s, tenants: [x]}}}}",
        "service_keys.k3f9a0b1c2d4.tenants: no tenant 'x'; known: acme-corp",
    ),
    "unknown kind": ("providers: {openai: {kind: x}}", "providers.openai.kind: expected one of openai, azure"),
    "no target": ("aliases: {a: {targets: []}}", "aliases.a.targets: needs at least one target"),
    "a target twice": ("aliases: {a: {targets: [openai/gpt-4o, openai/gpt-4o]}}", "aliases.a.targets: names a target"),
    "a limit of zero": ("plans: {a: {rpm: 0}}", "plans.a.rpm: must be above 0; leave it out for no limit"),
    "a cap below zero": ("tenants: {a: {plan: free, daily_token_cap: -1}}", "tenants.a.daily_token_cap: must be above"),
    "a global limit of zero": ("global: {tpm: 0}", "global.tpm: must be above 0"),
    "output tokens of zero": ("aliases: {a: {targets: [openai/gpt-4o], default_output_tokens: 0}}", "must be above 0"),
    "a body of zero": ("gateway: {max_body_bytes: 0}", "gateway.max_body_bytes: must be above 0"),
    "a ratio above one": ("gateway: {trace_sample_ratio: 1.1}", "gateway.trace_sample_ratio: must be from 0 to 1"),
    "a ratio that is no number": ("gateway: {trace_sample_ratio: .nan}", "gateway.trace_sample_ratio: must be from"),
    "a retry budget above all": ("gateway: {retry: {budget_percent: 101}}", "retry.budget_percent: must be from 0 to"),
    "a breaker below zero": ("gateway: {breaker: {failures: -1}}", "gateway.breaker.failures: must be from 0, no"),
    "a breaker of nothing": ("gateway: {breaker: {percent: 0}}", "gateway.breaker.percent: must be above 0"),
    "an endless rest": ("gateway: {breaker: {rest_seconds: .inf}}", "gateway.breaker.rest_seconds: must be from 0 to"),
    "no attempt": ("gateway: {retry: {max_attempts: 0}}", "gateway.retry.max_attempts: must be from 1 to 10"),
    "a backoff below zero": ("gateway: {retry: {backoff_base_seconds: -1}}", "backoff_base_seconds: must be from 0 to"),
    "an endless backoff": ("gateway: {retry: {backoff_cap_seconds: .inf}}", "backoff_cap_seconds: must be from 0 to"),
    "a drain that is no number": ("gateway: {drain: {limit_seconds: .nan}}", "gateway.drain.limit_seconds: must be"),
    "a spool below zero": ("gateway: {spool: {reserve_bytes: -1}}", "gateway.spool.reserve_bytes: must not be below 0"),
    "a timeout of zero": ("gateway: {timeouts: {idle_seconds: 0}}", "gateway.timeouts.idle_seconds: must be above 0"),
    "a timeout of a week": ("gateway: {timeouts: {total_seconds: 604800}}", "total_seconds: must be"),
    "an alias's timeout": (
        "aliases: {support-fast: {timeouts: {idle_seconds: -1}}}",
        "aliases.support-fast.timeouts.idle_seconds: must be above 0",
    ),
    "no time for Redis": ("gateway: {redis: {timeout_ms: 0}}", "gateway.redis.timeout_ms: must be above 0"),
    "no time between probes": ("gateway: {redis: {probe_seconds: 0}}", "gateway.redis.probe_seconds: must be above 0"),
    "another policy": (
        "gateway: {redis: {away: {rpm: maybe}}}",
        "gateway.redis.away.rpm: expected one of local_share, open, closed",
    ),
    "a policy for nothing": ("gateway: {redis: {away: {rpd: open}}}", "gateway.redis.away.rpd: unknown key"),
    "no replicas": ("gateway: {redis: {replicas: 0}}", "gateway.redis.replicas: must be above 0"),
    "a budget of zero": ("plans: {a: {daily_usd: 0}}", "plans.a.daily_usd: must be above 0"),
    "a budget beyond counting": ("tenants: {a: {plan: free, monthly_usd: 9000001}}", "at most 9000000 USD"),
    "a budget in parts of a nano-dollar": ("plans: {a: {monthly_usd: 0.0000000001}}", "with at most 9 decimals"),
    "a rate beyond counting": ("plans: {a: {tpm: 9007199254740992}}", "plans.a.tpm: must be at most 9007199254740991"),
    "a zone that is none": ("plans: {a: {budget_time_zone: Mars/Olympus}}", "no time zone 'Mars/Olympus'"),
    "a zone that is a path": ("plans: {a: {budget_time_zone: ../../etc/passwd}}", "no time zone '../../etc/passwd'"),
    "a key's limit below zero": (
        f"service_keys: {{k3f9a0b1c2d4: {{digest: {DIGEST!r}, service: s, tenants: [], limits: {{rpm: -1}}}}}}",
        "service_keys.k3f9a0b1c2d4.limits.rpm: must be above 0",
    ),
    "a price below zero": ("gateway: {ceiling_input_usd: -1}", "gateway.ceiling_input_usd: -1 is not a price"),
    "a price that is no number": (
        "gateway: {ceiling_output_usd: .nan}",
        "gateway.ceiling_output_usd: NaN is not a price",
    ),
    "a price without end": (
        "gateway: {ceiling_output_usd: .inf}",
        "gateway.ceiling_output_usd: Infinity is not a price",
    ),
    "a price too fine": (
        "prices: {openai: {m: {input: 0.0000000001, source: s, checked_on: 2026-01-01}}}",
        "prices.openai.m.input: 1E-10 is not a price: from 0 to 1000000 USD, with at most 9 decimals",
    ),
    "a price without its source": (
        "prices: {openai: {m: {input: 1, checked_on: 2026-01-01}}}",
        "prices.openai.m.source: is required",
    ),
    "a literal secret": ("providers: {openai: {api_key: sk-proj-1}}", "providers.openai.api_key: a secret is a ref"),
    "an empty secret": ("providers: {openai: {api_key: ''}}", "providers.openai.api_key: a secret is a reference"),
    "a secret without a name": (
        "providers: {openai: {api_key: 'env:'}}",
        "providers.openai.api_key: a secret is a ref",
    ),
    "a variable that is not set": (
        "providers: {openai: {api_key: env:NOT_SET}}",
        "providers.openai.api_key: the environment variable NOT_SET is not set",
    ),
    "a file that is not there": (
        "providers: {openai: {api_key: file:/nowhere/key}}",
        "providers.openai.api_key: the file /nowhere/key cannot be read",
    ),
    "an empty file": (
        "providers: {openai: {api_key: file:/dev/null}}",
        "providers.openai.api_key: the file /dev/null is empty",
    ),
    "a digest that is none": (
        "service_keys: {k3f9a0b1c2d4: {digest: sha256:abc, service: s, tenants: []}}",
        "service_keys.k3f9a0b1c2d4.digest: expected sha256: and 64 hexadecimal digits",
    ),
    "a digest twice": (
        f"service_keys: {{k3f9a0b1c2d4: &k {{digest: '{DIGEST}', service: s, tenants: []}}, k3f9a0b1c2d5: *k}}",
        "service_keys.k3f9a0b1c2d5.digest: is the digest of k3f9a0b1c2d4 too",
    ),
    "an embedder that nobody is": (
        "aliases: {support-fast: {cache: {mode: exact, embedder: tiny}}}",
        "aliases.support-fast.cache.embedder: no alias 'tiny'; static and minilm are local models; aliases: ",
    ),
    "an embedder that chats": (
        "aliases: {support-fast: {cache: {mode: exact, embedder: support-quality}}}",
        "aliases.support-fast.cache.embedder: 'support-quality' serves chat; it must serve embeddings",
    ),
    "an embedder of two models": (
        "{aliases: {embed-small: {targets: [openai/text-embedding-3-small, bedrock/titan-embed-v2]},"
        " support-fast: {cache: {mode: exact, embedder: embed-small}}}}",
        "aliases.support-fast.cache.embedder: 'embed-small' has targets of amazon.titan-embed-text-v2:0 and "
        "text-embedding-3-small: their vectors do not compare",
    ),
    "a judge that makes vectors": (
        "aliases: {support-fast: {cache: {mode: exact, judge: embed-small}}}",
        "aliases.support-fast.cache.judge: 'embed-small' serves embeddings; it must serve chat",
    ),
    "a judge of more than all": (
        "aliases: {support-fast: {cache: {mode: exact, judge_percent: 101}}}",
        "aliases.support-fast.cache.judge_percent: must be from 0 to 100",
    ),
    "an embedder that is never late": (
        "aliases: {support-fast: {cache: {mode: exact, embedder_timeout_ms: 60000}}}",
        "aliases.support-fast.cache.embedder_timeout_ms: must be from 1 to 10000",
    ),
    "expiry with a time": (
        "service_keys: {k3f9a0b1c2d4: {digest: d, service: s, tenants: [], expires: 2026-01-01T00:00:00Z}}",
        "service_keys.k3f9a0b1c2d4.expires: Expected `date | null`",
    ),
}


@pytest.mark.parametrize(("overlay", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_with_file_and_path(tmp_path: Path, overlay: str, sentence: str) -> None:
    faults = faults_of(lambda: with_overlay(tmp_path, overlay))
    found = [fault for fault in faults if sentence in fault]
    assert len(found) == 1, faults
    assert found[0].startswith(f"{tmp_path / 'overlay.yaml'}: ")


def test_an_embedder_may_be_one_model_under_two_names(tmp_path: Path) -> None:
    ours = {"provider": "openai", "model": "our-deployment", "serves": "embeddings"}
    overlay = {
        "targets": {"openai/ours": ours | {"priced_as": "text-embedding-3-small"}},
        "aliases": {
            "embed-small": {"targets": ["openai/text-embedding-3-small", "openai/ours"]},
            "support-fast": {"cache": {"mode": "verified", "embedder": "embed-small"}},
        },
    }
    assert with_overlay(tmp_path, overlay).aliases["support-fast"].cache.embedder == "embed-small"
    del overlay["targets"]["openai/ours"]["priced_as"]
    assert any(
        "our-deployment and text-embedding-3-small" in fault
        for fault in faults_of(lambda: with_overlay(tmp_path, overlay))
    )


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.example",
        "a.example/v1",
        "https://",
        "https://user:secret@a.example/v1",
        "https://a.example/v1?key=secret",
        "https://a.example/v1#x",
        "https://a.example:99999/v1",
        "https://a.example:0/v1",
        "https://a..example/v1",
        "https://" + "a" * 64 + ".example",
        "https://a.example/v1\n",
        "https://a.example/ v1",
        "https://[::1/v1",
    ],
)
def test_a_base_url_that_is_none_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    [fault] = faults_of(lambda: with_overlay(tmp_path, {"providers": {"openai": {"base_url": url}}}))
    assert "providers.openai.base_url: expected an http(s) URL" in fault
    assert "secret" not in fault


@pytest.mark.parametrize(
    ("url", "base_url"),
    [
        ("https://a.example", "https://a.example"),
        ("https://a.example/v1/", "https://a.example/v1"),
        ("http://127.0.0.1:4010/openai/v1", "http://127.0.0.1:4010/openai/v1"),
        ("http://[::1]:4010/v1", "http://[::1]:4010/v1"),
        ("http://localhost:65535", "http://localhost:65535"),
        ("http://vllm_server.internal", None),
    ],
)
def test_a_base_url_loses_its_trailing_slash(tmp_path: Path, url: str, base_url: str | None) -> None:
    overlay = {"providers": {"openai": {"base_url": url}}}
    if base_url is None:
        faults_of(lambda: with_overlay(tmp_path, overlay))
    else:
        assert with_overlay(tmp_path, overlay).aliases["support-fast"].targets[0].provider.base_url == base_url


def test_all_faults_of_all_files_are_told_at_once(folder: Path, tmp_path: Path) -> None:
    (folder / "tenant_policy.yaml").write_text(
        "plans: {free: {rpm: -1}, standard: {}}\ntenants: {a: {plan: x, z: 1}}\n"
    )
    overlay = tmp_path / "o.yaml"
    overlay.write_text("providers: {openai: {api_key: sk-1, region: 5}}\naliases: {a: {targets: [x/y]}}\n")
    faults = faults_of(lambda: loaded(folder, "prod", overlay))
    shipped = yaml.safe_load((folder / "gateway_models.yaml").read_text())
    tenant_keys = ", ".join(sorted(field.encode_name for field in msgspec.structs.fields(written.WrittenTenant)))
    expected = [
        f"{folder / 'tenant_policy.yaml'}: tenants.a.z: unknown key; known here: {tenant_keys}",
        f"{overlay}: providers.openai.region: Expected `str | null`, got `int`",
        f"{overlay}: providers.openai.api_key: a secret is a reference, env:NAME or file:/path, never the value itself",
        f"{overlay}: aliases.a.targets: no target 'x/y'; known: {', '.join(shipped['targets'])}",
        f"{folder / 'tenant_policy.yaml'}: plans.free.rpm: must be above 0; leave it out for no limit",
        f"{folder / 'tenant_policy.yaml'}: tenants.a.plan: no plan 'x'; known: free, standard",
    ]
    assert sorted(faults) == sorted(expected)


def test_a_faulty_entry_does_not_make_others_look_faulty(tmp_path: Path) -> None:
    overlay = {"providers": {"openai": {"kind": 5}}, "plans": {"free": {"rpm": "x"}}, "targets": {"openai/gpt-4o": 5}}
    faults = faults_of(lambda: with_overlay(tmp_path, overlay))
    assert [fault.split(": ")[1] for fault in faults] == [
        "providers.openai.kind",
        "targets.openai/gpt-4o",
        "plans.free.rpm",
    ]


def test_a_literal_secret_is_not_repeated(tmp_path: Path) -> None:
    faults = faults_of(lambda: with_overlay(tmp_path, {"providers": {"openai": {"api_key": "sk-proj-canary"}}}))
    assert "canary" not in str(faults)


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "ümlaut", "nul\0"])
def test_a_secret_that_cannot_stand_in_a_header_is_refused_and_not_repeated(value: str) -> None:
    faults = faults_of(lambda: loaded(environ=ENVIRON | {"OPENAI_API_KEY": value}))
    assert "providers.openai.api_key: what env:OPENAI_API_KEY holds cannot stand in a header" in faults[0]
    assert value not in faults[0]


def test_a_section_in_another_s_file_is_refused(folder: Path) -> None:
    with (folder / "gateway.yaml").open("a") as file:
        file.write("tenants: {a: {plan: free}}\n")
    [fault] = faults_of(lambda: loaded(folder))
    assert fault == f"{folder / 'gateway.yaml'}: tenants: does not belong in this file; it may hold gateway"


@pytest.mark.parametrize("name", ["gateway.yaml", "gateway_models.yaml", "tenant_policy.yaml"])
def test_a_missing_file_is_told(folder: Path, name: str) -> None:
    (folder / name).unlink()
    [fault] = faults_of(lambda: loaded(folder))
    assert fault.startswith(f"{folder / name}: cannot be read (No such file or directory)")


def test_an_unknown_environment_is_told_with_the_known_ones() -> None:
    [fault] = faults_of(lambda: loaded(environment="../prod"))
    assert fault.endswith("no environment '../prod'; known: ci, dev, prod, staging")


def test_missing_prices_and_overlays_are_told_together(folder: Path) -> None:
    shutil.rmtree(folder / "prices")
    faults = faults_of(lambda: loaded(folder, "prod", Path("absent.yaml")))
    assert [fault.split(": ")[0] for fault in faults] == [str(folder / "prices"), "absent.yaml"]


def test_without_required_secrets_references_alone_are_checked() -> None:
    assert load(SHIPPED, "prod", environ={}, require_secrets=False).tenants


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_is_never_shown() -> None:
    secret = Secret("canary")
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r}",
        f"{secret!s:>20}",
        repr([secret]),
    ]
    assert "canary" not in "".join(shown)
    assert "canary" not in repr(loaded(environ=ENVIRON | {"OPENAI_API_KEY": "canary"}))


@pytest.mark.parametrize("encode", [msgspec.json.encode, msgspec.msgpack.encode, msgspec.to_builtins])
def test_a_secret_cannot_be_encoded(encode: Callable[[object], object]) -> None:
    with pytest.raises(TypeError):
        encode({"key": Secret("canary")})


def test_secrets_are_equal_by_value() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert len({Secret("a"), Secret("a")}) == 1


def test_a_secret_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    overlay = {"providers": {"openai": {"api_key": f"file:{tmp_path / 'key'}"}}}
    targets = with_overlay(tmp_path, overlay).aliases["support-fast"].targets
    assert [t.provider.credential.secret.reveal() for t in targets] == ["from-file", "value-of-OPENROUTER_API_KEY"]


# --- versions and reload ----------------------------------------------------------------------------------------------


def test_the_version_follows_the_content(folder: Path) -> None:
    before = loaded(folder).version
    assert loaded(SHIPPED).version == before
    with (folder / "gateway.yaml").open("a") as file:
        file.write("# a word\n")
    assert len({before, loaded(folder).version, loaded(SHIPPED, "dev").version}) == 3


def test_the_version_does_not_depend_on_secrets() -> None:
    assert loaded().version == loaded(environ=ENVIRON | {"OPENAI_API_KEY": "other"}).version


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> ConfigSource:
    (tmp_path / "key").write_text("first")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"providers": {"openai": {"api_key": f"file:{tmp_path / 'key'}"}}}))
    made = ConfigSource(folder, "prod", [overlay], ENVIRON)
    made.reload()
    return made


def rewrite(file: Path, text: str) -> None:
    """Replaces a file as editors and Kubernetes do: a new one in its place."""
    other = file.with_suffix(".new")
    other.write_text(text)
    os.replace(other, file)


def vendor_key(source: ConfigSource) -> str:
    return source.current.aliases["support-fast"].targets[0].provider.credential.secret.reveal()


def test_nothing_changed_is_nothing_to_reload(source: ConfigSource) -> None:
    before = source.current
    assert not source.changed()
    assert not source.reload()
    assert source.current is before


def test_the_same_content_in_a_new_file_is_the_same_snapshot(source: ConfigSource, folder: Path) -> None:
    before = source.current
    rewrite(folder / "gateway.yaml", (folder / "gateway.yaml").read_text())
    assert source.changed()
    assert not source.reload()
    assert source.current is before
    assert not source.changed()


def test_new_content_is_a_new_snapshot(source: ConfigSource, folder: Path) -> None:
    before = source.current
    rewrite(folder / "tenant_policy.yaml", (folder / "tenant_policy.yaml").read_text().replace("rpm: 30,", "rpm: 31,"))
    assert source.changed()
    assert source.reload()
    assert [c.tenants["acme-free-trial"].quota.rpm for c in (before, source.current)] == [30, 31]


@pytest.mark.parametrize("name", ["service_keys.yaml", "prices/2027-01-01.yaml", "environments/prod.yaml"])
def test_a_change_is_seen_in_every_file(source: ConfigSource, folder: Path, name: str) -> None:
    rewrite(folder / name, "# changed\n")
    assert source.changed()


def test_a_removed_file_is_a_change(source: ConfigSource, folder: Path) -> None:
    (folder / "service_keys.yaml").unlink()
    assert source.changed()
    assert source.reload()


def test_an_invalid_configuration_is_refused_and_the_old_one_stays(source: ConfigSource, folder: Path) -> None:
    before = source.current
    good = (folder / "tenant_policy.yaml").read_text()
    rewrite(folder / "tenant_policy.yaml", "tenants: {")
    faults_of(source.reload)
    assert source.current is before
    assert not source.changed()
    rewrite(folder / "tenant_policy.yaml", good.replace("rpm: 30,", "rpm: 31,"))
    assert source.changed()
    assert source.reload()


def test_a_secret_in_a_file_is_read_again(source: ConfigSource, tmp_path: Path) -> None:
    version = source.current.version
    rewrite(tmp_path / "key", "second")
    assert source.changed()
    assert source.reload()
    assert (vendor_key(source), source.current.version) == ("second", version)


def test_a_secret_s_file_that_vanished_is_refused_and_the_old_value_stays(source: ConfigSource, tmp_path: Path) -> None:
    (tmp_path / "key").unlink()
    assert source.changed()
    faults_of(source.reload)
    assert vendor_key(source) == "first"
    rewrite(tmp_path / "key", "third")
    assert source.changed()
    assert source.reload()


def test_a_secret_s_file_named_by_a_reload_is_watched(source: ConfigSource, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("fourth")
    overlay = yaml.safe_dump({"providers": {"openai": {"api_key": f"file:{tmp_path / 'other'}"}}})
    rewrite(tmp_path / "overlay.yaml", overlay)
    assert source.reload()
    source.reload()
    assert not source.changed()
    rewrite(tmp_path / "other", "fifth")
    assert source.changed()
    assert source.reload()
    assert vendor_key(source) == "fifth"
