"""Configuration: YAML files -> one frozen `Config`. The only home of yaml.

Written shape (`Written*`, what people type) and running shape (`Config` and below, what the code reads) are different
types. Loading reports every fault at once with its file and path; `ConfigSource` swaps one pointer.
"""

from __future__ import annotations

import hashlib
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Struct, field

T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Tenants, features and aliases: no such name can forge a Redis key or a path."""
TARGET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
KEY_ID = re.compile(r"[a-z0-9]{12}")
SERVICE_KEY = re.compile(r"sk-gw-([a-z0-9]{12})-[A-Za-z0-9_-]{43}")
"""The shape of a service key; the first group is its public id."""
BASE_URL = re.compile(
    r"https?://(?:[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.?|\[[0-9a-fA-F:]+\])"
    r"(?::(?P<port>\d{1,5}))?(?:/[A-Za-z0-9._~/-]*)?"
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

FILES = {
    "gateway.yaml": {"gateway"},
    "gateway_models.yaml": {"providers", "targets", "aliases"},
    "tenant_policy.yaml": {"plans", "tenants", "global"},
    "service_keys.yaml": {"service_keys"},
}
"""Which sections each file of the configuration folder may hold. An overlay may hold any."""


class ConfigError(Exception):
    """The configuration has faults: `faults` is one sentence each, with file and path. Nothing was swapped."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class Secret:
    """A value that must not be shown: `reveal()` is called only where it is put on the wire."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


# --- written shape --------------------------------------------------------------------------------------------------


class WrittenProvider(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    kind: Literal["openai", "openai_compatible"]
    base_url: str
    api_key: str
    region: str | None = None


class WrittenTarget(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    provider: str
    model: str


class WrittenTimeouts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    connect_seconds: float | None = None
    first_token_seconds: float | None = None
    answer_seconds: float | None = None
    idle_seconds: float | None = None
    total_seconds: float | None = None


class WrittenAlias(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    targets: list[str]
    default_output_tokens: int | None = None
    timeouts: WrittenTimeouts = field(default_factory=WrittenTimeouts)


class WrittenPlan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    rpm: int | None = None
    daily_token_cap: int | None = None
    allowed_models: list[str] | None = None
    tier: str | None = None


class WrittenTenant(WrittenPlan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    plan: str


class WrittenGlobal(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    tpm: int | None = None


class WrittenKey(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    digest: str
    service: str
    tenants: list[str]
    expires: date | None = None


class WrittenPrice(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """USD per million tokens. A class without a price costs what its plain class costs."""

    input: Decimal
    output: Decimal = Decimal(0)
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None
    audio_input: Decimal | None = None
    image_input: Decimal | None = None
    reasoning: Decimal | None = None
    audio_output: Decimal | None = None
    source: str
    checked_on: date


class WrittenRetry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    max_attempts: int = 3
    backoff_base_seconds: float = 0.2
    backoff_cap_seconds: float = 2.0
    cooldown_seconds: float = 30.0


class WrittenRedis(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    away: Literal["open", "closed"] = "open"
    timeout_ms: int = 250
    probe_seconds: float = 1.0


class WrittenDrain(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    delay_seconds: float = 4.0
    limit_seconds: float = 1860.0


class WrittenSpool(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    segment_bytes: int = 67_108_864
    fsync_ms: int = 10
    reserve_bytes: int = 268_435_456


class WrittenGateway(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    max_body_bytes: int = 20_971_520
    default_output_tokens: int = 1024
    start_buffer_bytes: int = 65_536
    timeouts: WrittenTimeouts = field(default_factory=WrittenTimeouts)
    retry: WrittenRetry = field(default_factory=WrittenRetry)
    redis: WrittenRedis = field(default_factory=WrittenRedis)
    drain: WrittenDrain = field(default_factory=WrittenDrain)
    spool: WrittenSpool = field(default_factory=WrittenSpool)
    trace_sample_ratio: float = 0.1
    ceiling_input_usd: Decimal = Decimal(100)
    ceiling_output_usd: Decimal = Decimal(500)
    user_id_salt: str = "env:GATEWAY_USER_SALT"


class Written(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration as people type it, after the overlays."""

    gateway: WrittenGateway = field(default_factory=WrittenGateway)
    providers: dict[str, WrittenProvider]
    targets: dict[str, WrittenTarget]
    aliases: dict[str, WrittenAlias]
    plans: dict[str, WrittenPlan]
    tenants: dict[str, WrittenTenant]
    global_: WrittenGlobal = field(default_factory=WrittenGlobal, name="global")
    service_keys: dict[str, WrittenKey] = {}
    prices: dict[str, dict[str, WrittenPrice]]


# --- running shape --------------------------------------------------------------------------------------------------


class Price(Struct, frozen=True, gc=False):
    """Nano-dollars per million tokens, by usage class."""

    input: int
    output: int
    cache_read: int
    cache_write: int
    audio_input: int
    image_input: int
    reasoning: int
    audio_output: int


class Provider(Struct, frozen=True):
    """A vendor's endpoint. `base_url` has no trailing slash."""

    name: str
    kind: str
    base_url: str
    api_key: Secret
    region: str | None


class Target(Struct, frozen=True):
    """One pinned model at one provider: `name` is `<provider>/<model>` as the chain shows it."""

    name: str
    provider: Provider
    model: str
    price: Price
    priced: bool


class Timeouts(Struct, frozen=True, gc=False):
    """Seconds. `total` bounds the call with all its attempts. Per attempt: `first_token` the wait for a stream's first
    content, `answer` for a whole unary answer, `idle` between two chunks.
    """

    connect: float
    first_token: float
    answer: float
    idle: float
    total: float


class Alias(Struct, frozen=True):
    """What apps ask for: a chain of targets, tried in order."""

    name: str
    targets: tuple[Target, ...]
    chain: tuple[str, ...]
    default_output_tokens: int
    timeouts: Timeouts


class Tenant(Struct, frozen=True):
    """A billing and policy boundary. `allowed_models` None means every alias; a limit None means unlimited."""

    id: str
    plan: str
    tier: str
    allowed_models: frozenset[str] | None
    rpm: int | None
    daily_token_cap: int | None

    def allows(self, alias: str) -> bool:
        return self.allowed_models is None or alias in self.allowed_models


class ServiceKey(Struct, frozen=True):
    """Who calls. `tenants` None means every configured tenant; `expires` is unix seconds."""

    id: str
    service: str
    tenants: frozenset[str] | None
    expires: float | None

    def may_act_for(self, tenant: str) -> bool:
        return self.tenants is None or tenant in self.tenants


class Settings(Struct, frozen=True):
    """The `gateway` section, with every default filled in. `longest_seconds`: the longest total over all aliases."""

    max_body_bytes: int
    start_buffer_bytes: int
    longest_seconds: float
    retry: WrittenRetry
    redis: WrittenRedis
    drain: WrittenDrain
    spool: WrittenSpool
    trace_sample_ratio: float
    user_id_salt: Secret


class Config(Struct, frozen=True):
    """One immutable snapshot. `keys` is by SHA-256 digest of the whole key; `version` by content."""

    version: str
    environment: str
    settings: Settings
    aliases: Mapping[str, Alias]
    tenants: Mapping[str, Tenant]
    keys: Mapping[bytes, ServiceKey]
    global_tpm: int | None
    price_version: str


# --- reading --------------------------------------------------------------------------------------------------------


class _Loader(yaml.CSafeLoader):
    """A safe loader to which a key written twice is a fault, and so is one that YAML does not read as text.

    YAML reads `no` as false and 0123 as 83: a tenant or a key id of that name would be another one.
    """


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            raise yaml.MarkedYAMLError(None, None, "a key here is not text; write it in quotes", key_node.start_mark)
        if key_node.value in seen:
            raise yaml.MarkedYAMLError(None, None, f"the key {key_node.value!r} is written twice", key_node.start_mark)
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class _Faults:
    """Collects sentences; knows which file a path was written in."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.origin: dict[str, str] = {}

    def add(self, path: str, message: str) -> None:
        at = path
        while at not in self.origin and "." in at:
            at = at.rpartition(".")[0]
        self.sentences.append(f"{self.origin.get(at, 'configuration')}: {path}: {message}")


def _merge(base: dict[str, Any], over: dict[str, Any], path: str, file: str, faults: _Faults) -> None:
    """Mappings merge, everything else replaces. Notes the file of every path."""
    for key, value in over.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, here, file, faults)
            continue
        base[key] = value
        faults.origin[here] = file
        if isinstance(value, dict):
            base[key] = {}
            _merge(base[key], value, here, file, faults)


_FAULTY = object()


def _convert(value: Any, shape: Any, path: str, faults: _Faults) -> Any:
    """`value` as `shape`, without the parts that are faulty, so that the rest is checked too.

    `_FAULTY` stands for what cannot go without such a part; a faulty entry of a mapping is None.
    """
    if isinstance(shape, type) and issubclass(shape, Struct):
        if not isinstance(value, dict):
            faults.add(path, f"expected a mapping, found {_kind(value)}")
            return _FAULTY
        members = {m.encode_name: m for m in msgspec.structs.fields(shape)}
        parts: dict[str, Any] = {}
        for key, part in value.items():
            here = f"{path}.{key}" if path else key
            if key in members:
                parts[members[key].name] = _convert(part, members[key].type, here, faults)
            else:
                faults.add(here, f"unknown key; known here: {', '.join(sorted(members))}")
        required = [member for member in members.values() if member.required]
        for member in required:
            if member.name not in parts:
                faults.add(f"{path}.{member.encode_name}" if path else member.encode_name, "is required")
        good = {name: part for name, part in parts.items() if part is not _FAULTY}
        return shape(**good) if all(member.name in good for member in required) else _FAULTY
    if typing.get_origin(shape) is dict:
        if not isinstance(value, dict):
            faults.add(path, f"expected a mapping, found {_kind(value)}")
            return _FAULTY
        part_shape = typing.get_args(shape)[1]
        entries = {key: _convert(part, part_shape, f"{path}.{key}", faults) for key, part in value.items()}
        return {key: None if part is _FAULTY else part for key, part in entries.items()}
    if typing.get_origin(shape) is Literal and value not in typing.get_args(shape):
        faults.add(path, f"expected one of {', '.join(typing.get_args(shape))}")
        return _FAULTY
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        faults.add(path, str(error))
        return _FAULTY


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _read(folder: Path, environment: str, overlays: Sequence[Path]) -> list[tuple[str, set[str] | None, bytes]]:
    """Every file as (name, sections it may hold or None, content), in the order of merging."""
    faults: list[str] = []
    files: list[tuple[str, set[str] | None, bytes]] = []

    def read(path: Path, sections: set[str] | None, hint: str) -> None:
        try:
            files.append((str(path), sections, path.read_bytes()))
        except OSError as error:
            faults.append(f"{path}: cannot be read ({error.strerror}); {hint}")

    for name, sections in FILES.items():
        if name == "service_keys.yaml" and not (folder / name).exists():
            continue
        read(folder / name, sections, "every configuration folder has one")
    tables = sorted((folder / "prices").glob("????-??-??.yaml"))
    if tables:
        read(tables[-1], {"prices"}, "the newest price table is used")
    else:
        faults.append(f"{folder / 'prices'}: no price table; write one named by its date, such as 2026-11-01.yaml")
    known = sorted(p.stem for p in (folder / "environments").glob("*.yaml"))
    if environment in known:
        read(folder / "environments" / f"{environment}.yaml", None, "")
    else:
        faults.append(f"{folder / 'environments'}: no environment {environment!r}; known: {', '.join(known)}")
    for overlay in overlays:
        read(overlay, None, "it was named by --overlay")
    if faults:
        raise ConfigError(faults)
    return files


def _parse(files: Sequence[tuple[str, set[str] | None, bytes]], faults: _Faults) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name, sections, content in files:
        try:
            document = yaml.load(content, Loader=_Loader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-02-30
            faults.sentences.append(f"{name}: is not YAML: {' '.join(str(error).split())}")
            continue
        if document is None and sections is None:
            continue  # an environment or an overlay that changes nothing
        if document is None:
            faults.sentences.append(f"{name}: is empty; expected {', '.join(sorted(sections or ()))}")
            continue
        if not isinstance(document, dict):
            faults.sentences.append(f"{name}: expected a mapping at the top, found {_kind(document)}")
            continue
        for section in [key for key in document if sections is not None and key not in sections]:
            faults.sentences.append(
                f"{name}: {section}: does not belong in this file; it may hold {', '.join(sorted(sections or ()))}"
            )
            del document[section]
        _merge(merged, document, "", name, faults)
    return merged


class _Secrets:
    """Resolves `env:NAME` and `file:/path`; remembers what it read so that a rotation is noticed."""

    def __init__(self, environ: Mapping[str, str], require: bool) -> None:
        self.environ = environ
        self.require = require
        self.read: list[bytes] = []
        self.files: list[Path] = []

    def resolve(self, reference: str, path: str, faults: _Faults) -> Secret:
        scheme, _, name = reference.partition(":")
        value = ""
        if scheme == "env" and name:
            value = self.environ.get(name, "")
            if not value and self.require:
                faults.add(path, f"the environment variable {name} is not set")
        elif scheme == "file" and name:
            self.files.append(Path(name))
            try:
                value = Path(name).read_text().strip()
            except (OSError, ValueError):
                if self.require:
                    faults.add(path, f"the file {name} cannot be read")
            else:
                if not value and self.require:
                    faults.add(path, f"the file {name} is empty")
        else:
            faults.add(path, "a secret is a reference, env:NAME or file:/path, never the value itself")
        if any(ord(c) < 33 or ord(c) > 126 for c in value):
            faults.add(path, f"what {reference} holds cannot stand in a header: printable ASCII without spaces only")
        self.read.append(value.encode())
        return Secret(value)


# --- written -> running ---------------------------------------------------------------------------------------------


MAX_PRICE_USD = 1_000_000


def _nanos(usd: Decimal, path: str, faults: _Faults) -> int:
    if not usd.is_finite() or not 0 <= usd <= MAX_PRICE_USD or (nanos := usd * 1_000_000_000) % 1:
        faults.add(path, f"{usd} is not a price: from 0 to {MAX_PRICE_USD} USD, with at most 9 decimals")
        return 0
    return int(nanos)


def _price(written: WrittenPrice, path: str, faults: _Faults) -> Price:
    def nanos(name: str, default: Decimal) -> int:
        value = getattr(written, name)
        return _nanos(default if value is None else value, f"{path}.{name}", faults)

    return Price(
        input=nanos("input", written.input),
        output=nanos("output", written.output),
        cache_read=nanos("cache_read", written.input),
        cache_write=nanos("cache_write", written.input),
        audio_input=nanos("audio_input", written.input),
        image_input=nanos("image_input", written.input),
        reasoning=nanos("reasoning", written.output),
        audio_output=nanos("audio_output", written.output),
    )


def _ceiling(gateway: WrittenGateway, faults: _Faults) -> Price:
    input_nanos = _nanos(gateway.ceiling_input_usd, "gateway.ceiling_input_usd", faults)
    output_nanos = _nanos(gateway.ceiling_output_usd, "gateway.ceiling_output_usd", faults)
    return Price(
        input=input_nanos,
        output=output_nanos,
        cache_read=input_nanos,
        cache_write=input_nanos,
        audio_input=input_nanos,
        image_input=input_nanos,
        reasoning=output_nanos,
        audio_output=output_nanos,
    )


_DEFAULT_TIMEOUTS = Timeouts(connect=5.0, first_token=60.0, answer=300.0, idle=60.0, total=1800.0)


def _timeouts(written: WrittenTimeouts, base: Timeouts, path: str, faults: _Faults) -> Timeouts:
    values = {}
    for name in ("connect", "first_token", "answer", "idle", "total"):
        value = getattr(written, f"{name}_seconds")
        if value is not None and not 0 < value <= 86_400:
            faults.add(f"{path}.{name}_seconds", "must be above 0 and at most 86400")
        values[name] = getattr(base, name) if value is None else float(value)
    return Timeouts(**values)


def _base_url(url: str, path: str, faults: _Faults) -> str:
    match = BASE_URL.fullmatch(url)
    if match is None or not 0 < int(match["port"] or 1) <= 65_535:
        faults.add(path, "expected an http(s) URL without credentials, query and fragment")
    return url.rstrip("/")


def _entries(
    section: Mapping[str, T | None], pattern: re.Pattern[str], path: str, faults: _Faults
) -> Iterator[tuple[str, T]]:
    """Names and entries that could be read; checks the names of all."""
    for name, entry in section.items():
        if not pattern.fullmatch(name):
            faults.add(f"{path}.{name}", f"a name here matches {pattern.pattern}")
        if entry is not None:
            yield name, entry


def _known(name: str, section: Mapping[str, object], what: str, path: str, faults: _Faults) -> None:
    if name not in section:
        faults.add(path, f"no {what} {name!r}; known: {', '.join(section)}")


def _in_range(part: Struct, path: str, faults: _Faults) -> None:
    """Bounds by unit: what ends in `_seconds` is at most a day, `_ms` and `_bytes` are not below zero."""
    for name, value in msgspec.structs.asdict(part).items():
        if name.endswith("_seconds") and not 0 <= value <= 86_400:
            faults.add(f"{path}.{name}", "must be from 0 to 86400")
        elif name.endswith(("_ms", "_bytes")) and value < 0:
            faults.add(f"{path}.{name}", "must not be below 0")


def _positive(value: float | None, path: str, faults: _Faults) -> None:
    if value is not None and value <= 0:
        faults.add(path, "must be above 0; leave it out for no limit")


def _build(
    written: Written, version: str, environment: str, price_version: str, secrets: _Secrets, faults: _Faults
) -> Config:
    gateway = written.gateway
    for name in ("retry", "redis", "drain", "spool"):
        _in_range(getattr(gateway, name), f"gateway.{name}", faults)
    for name in ("max_body_bytes", "default_output_tokens", "start_buffer_bytes"):
        _positive(getattr(gateway, name), f"gateway.{name}", faults)
    _positive(gateway.redis.timeout_ms, "gateway.redis.timeout_ms", faults)
    _positive(gateway.redis.probe_seconds, "gateway.redis.probe_seconds", faults)
    if not 0 <= gateway.trace_sample_ratio <= 1:
        faults.add("gateway.trace_sample_ratio", "must be from 0 to 1")
    if not 1 <= gateway.retry.max_attempts <= 10:
        faults.add("gateway.retry.max_attempts", "must be from 1 to 10")
    ceiling = _ceiling(gateway, faults)
    timeouts = _timeouts(gateway.timeouts, _DEFAULT_TIMEOUTS, "gateway.timeouts", faults)

    providers = {
        name: Provider(
            name=name,
            kind=provider.kind,
            base_url=_base_url(provider.base_url, f"providers.{name}.base_url", faults),
            api_key=secrets.resolve(provider.api_key, f"providers.{name}.api_key", faults),
            region=provider.region,
        )
        for name, provider in _entries(written.providers, NAME, "providers", faults)
    }

    prices = {
        (provider, model): _price(price, f"prices.{provider}.{model}", faults)
        for provider, models in written.prices.items()
        for model, price in (models or {}).items()
        if price is not None
    }
    targets: dict[str, Target] = {}
    for name, target in _entries(written.targets, TARGET_NAME, "targets", faults):
        _known(target.provider, written.providers, "provider", f"targets.{name}.provider", faults)
        if target.provider in providers:
            price = prices.get((target.provider, target.model))
            targets[name] = Target(
                name=name,
                provider=providers[target.provider],
                model=target.model,
                price=price or ceiling,
                priced=price is not None,
            )

    aliases: dict[str, Alias] = {}
    for name, alias in _entries(written.aliases, NAME, "aliases", faults):
        path = f"aliases.{name}"
        for target_name in alias.targets:
            _known(target_name, written.targets, "target", f"{path}.targets", faults)
        if not alias.targets:
            faults.add(f"{path}.targets", "needs at least one target")
        if len(set(alias.targets)) != len(alias.targets):
            faults.add(f"{path}.targets", "names a target twice")
        _positive(alias.default_output_tokens, f"{path}.default_output_tokens", faults)
        aliases[name] = Alias(
            name=name,
            targets=tuple(targets[t] for t in alias.targets if t in targets),
            chain=tuple(alias.targets),
            default_output_tokens=alias.default_output_tokens or gateway.default_output_tokens,
            timeouts=_timeouts(alias.timeouts, timeouts, f"{path}.timeouts", faults),
        )

    def check_policy(policy: WrittenPlan, path: str) -> None:
        _positive(policy.rpm, f"{path}.rpm", faults)
        _positive(policy.daily_token_cap, f"{path}.daily_token_cap", faults)
        for alias_name in policy.allowed_models or ():
            if alias_name != "*":
                _known(alias_name, written.aliases, "alias", f"{path}.allowed_models", faults)

    for name, plan in _entries(written.plans, NAME, "plans", faults):
        check_policy(plan, f"plans.{name}")

    tenants: dict[str, Tenant] = {}
    for name, tenant in _entries(written.tenants, NAME, "tenants", faults):
        check_policy(tenant, f"tenants.{name}")
        _known(tenant.plan, written.plans, "plan", f"tenants.{name}.plan", faults)
        plan = written.plans.get(tenant.plan) or WrittenPlan()
        models = (plan.allowed_models or ()) if tenant.allowed_models is None else tenant.allowed_models
        tenants[name] = Tenant(
            id=name,
            plan=tenant.plan,
            tier=tenant.tier or plan.tier or tenant.plan,
            allowed_models=None if "*" in models else frozenset(models),
            rpm=plan.rpm if tenant.rpm is None else tenant.rpm,
            daily_token_cap=plan.daily_token_cap if tenant.daily_token_cap is None else tenant.daily_token_cap,
        )

    keys: dict[bytes, ServiceKey] = {}
    for key_id, key in _entries(written.service_keys, KEY_ID, "service_keys", faults):
        path = f"service_keys.{key_id}"
        for name in key.tenants:
            if name != "*":
                _known(name, written.tenants, "tenant", f"{path}.tenants", faults)
        if not DIGEST.fullmatch(key.digest):
            faults.add(f"{path}.digest", "expected sha256: and 64 hexadecimal digits; `gateway keys new` writes them")
            continue
        digest = bytes.fromhex(key.digest[7:])
        if digest in keys:
            faults.add(f"{path}.digest", f"is the digest of {keys[digest].id} too")
        keys[digest] = ServiceKey(
            id=key_id,
            service=key.service,
            tenants=None if "*" in key.tenants else frozenset(key.tenants),
            expires=None if key.expires is None else _midnight(key.expires),
        )

    _positive(written.global_.tpm, "global.tpm", faults)
    return Config(
        version=version,
        environment=environment,
        settings=Settings(
            max_body_bytes=gateway.max_body_bytes,
            start_buffer_bytes=gateway.start_buffer_bytes,
            longest_seconds=max([timeouts.total, *(alias.timeouts.total for alias in aliases.values())]),
            retry=gateway.retry,
            redis=gateway.redis,
            drain=gateway.drain,
            spool=gateway.spool,
            trace_sample_ratio=gateway.trace_sample_ratio,
            user_id_salt=secrets.resolve(gateway.user_id_salt, "gateway.user_id_salt", faults),
        ),
        aliases=aliases,
        tenants=tenants,
        keys=keys,
        global_tpm=written.global_.tpm,
        price_version=price_version,
    )


def _midnight(day: date) -> float:
    """The end of `day` in UTC, as unix seconds: a key is valid through its day."""
    return (day - date(1970, 1, 1)).days * 86_400.0 + 86_400.0


def load(
    folder: Path,
    environment: str,
    overlays: Sequence[Path] = (),
    *,
    environ: Mapping[str, str] = os.environ,
    require_secrets: bool = True,
) -> Config:
    """The configuration in `folder` for `environment`.

    Raises `ConfigError` with every fault. With `require_secrets` False, references that cannot be resolved pass:
    that is how `gateway check` runs where the secrets are not.
    """
    return _load(folder, environment, overlays, _Secrets(environ, require_secrets))[0]


def _load(folder: Path, environment: str, overlays: Sequence[Path], secrets: _Secrets) -> tuple[Config, bytes]:
    """The snapshot, and a digest of everything it came from, secrets included: that tells whether it is a new one."""
    files = _read(folder, environment, overlays)
    faults = _Faults()
    merged = _parse(files, faults)
    written = _convert(merged, Written, "", faults) if not faults.sentences else _FAULTY
    if written is _FAULTY:
        raise ConfigError(faults.sentences)
    content = hashlib.sha256()
    for name, _, part in files:
        content.update(f"{Path(name).name}:{len(part)}\n".encode() + part)
    content.update(environment.encode())
    price_version = next(Path(name).stem for name, sections, _ in files if sections == {"prices"})
    config = _build(written, content.hexdigest()[:12], environment, price_version, secrets, faults)
    if faults.sentences:
        raise ConfigError(faults.sentences)
    seen = hashlib.sha256(content.digest())
    for value in secrets.read:
        seen.update(hashlib.sha256(value).digest())
    return config, seen.digest()


class ConfigSource:
    """Holds the snapshot that new calls get. `reload` swaps it whole, or keeps it and raises."""

    def __init__(self, folder: Path, environment: str, overlays: Sequence[Path], environ: Mapping[str, str]) -> None:
        self._where = (folder, environment, tuple(overlays), environ)
        self._secret_files: tuple[Path, ...] = ()
        self._looked = self._look()
        self.current, self._seen = self._load()

    def changed(self) -> bool:
        """True when a file looks other than at the last load: a few stat calls, cheap enough for the event loop."""
        return self._look() != self._looked

    def reload(self) -> bool:
        """Reads the files again: True when a new snapshot took effect, False when the content is the same.

        Raises `ConfigError`; the old snapshot then keeps serving. May run in a thread: the swap is one assignment.
        """
        self._looked = self._look()
        config, seen = self._load()
        if seen == self._seen:
            return False
        self.current, self._seen = config, seen
        return True

    def _load(self) -> tuple[Config, bytes]:
        folder, environment, overlays, environ = self._where
        secrets = _Secrets(environ, True)
        try:
            return _load(folder, environment, overlays, secrets)
        finally:
            if secrets.files:  # other files than before make the next `changed` true: once more, and nothing is missed
                self._secret_files = tuple(secrets.files)

    def _look(self) -> tuple[tuple[str, int, int, int], ...]:
        folder, _, overlays, _ = self._where
        seen = []
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml"), *overlays, *self._secret_files]):
            try:
                stat = file.stat()
            except OSError:
                continue
            seen.append((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(seen)
