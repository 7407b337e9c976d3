"""Written shape -> running shape: names resolved, defaults filled in, figures checked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import date
from decimal import Decimal
from typing import TypeVar

import msgspec
from msgspec import Struct

from app.config.accounts import account, credential, pool
from app.config.aliases import DEFAULT_TIMEOUTS, build_aliases, check_zone, named_targets, routing_headers, timeouts
from app.config.caching import tenant_cache
from app.config.callers import certificates, check_tenants, issuers, serves
from app.config.guarding import guardrails, named
from app.config.plans import inherited
from app.config.pricing import ceiling, price_targets
from app.config.reading import Faults, Secrets
from app.config.reading import entries as _entries
from app.config.reading import known as _known
from app.config.running import (
    API_VERSION,
    AWS_REGION,
    BASE_URL,
    DIGEST,
    KEY_ID,
    NAME,
    TARGET_NAME,
    Config,
    Guardrail,
    Provider,
    Quota,
    Secret,
    ServiceKey,
    Settings,
    Target,
    Tenant,
)
from app.config.written import (
    PRIORITIES,
    Written,
    WrittenGateway,
    WrittenPlan,
    WrittenProvider,
    WrittenQuota,
    WrittenTenant,
)
from app.vendors import COMPATIBLE, COMPATIBLE_KIND, KINDS, Vendor

T = TypeVar("T")


MAX_COUNT = 2**53 - 1
"""Redis's scripts count in doubles, which are exact up to here."""
MAX_BUDGET_USD = 9_000_000
"""In nano-dollars just below `MAX_COUNT`."""


def _base_url(url: str, path: str, faults: Faults) -> str:
    match = BASE_URL.fullmatch(url)
    if match is None or not 0 < int(match["port"] or 1) <= 65_535:
        faults.add(path, "expected an http(s) URL without credentials, query and fragment")
    return url.rstrip("/")


def _in_range(part: Struct, path: str, faults: Faults) -> None:
    """Bounds by unit: what ends in `_seconds` is at most a day, `_ms` and `_bytes` are not below zero."""
    for name, value in msgspec.structs.asdict(part).items():
        if name.endswith("_seconds") and not 0 <= value <= 86_400:
            faults.add(f"{path}.{name}", "must be from 0 to 86400")
        elif name.endswith(("_ms", "_bytes")) and value < 0:
            faults.add(f"{path}.{name}", "must not be below 0")


def _positive(value: float | None, path: str, faults: Faults) -> None:
    if value is not None and value <= 0:
        faults.add(path, "must be above 0; leave it out for no limit")


def build(
    written: Written, version: str, environment: str, price_version: str, secrets: Secrets, faults: Faults
) -> Config:
    """The snapshot. With faults noted it is not to be used: what could not be built is missing from it."""
    written = msgspec.structs.replace(written, plans=inherited(written.plans, faults))
    base = timeouts(written.gateway.timeouts, DEFAULT_TIMEOUTS, "gateway.timeouts", faults)
    targets = _targets(written, _providers(written, secrets, faults), faults)
    guarding = guardrails(written, secrets, faults)
    aliases = build_aliases(written, targets, guarding, base, faults)
    return Config(
        version=version,
        environment=environment,
        settings=_settings(
            written.gateway,
            max([base.total, *(alias.timeouts.total for alias in aliases.values())]),
            secrets,
            faults,
        ),
        targets=targets,
        aliases=aliases,
        tenants={
            name: tenant
            for name, tenant in _tenants(written, guarding, faults).items()
            if serves(written.tenants[name], environment)
        },
        plans=_plans(written, guarding),
        keys={
            digest: key
            for digest, key in _keys(written, faults).items()
            if serves(written.service_keys[key.id], environment)
        },
        issuers=issuers(written, environment, faults),
        certificates=certificates(written, environment, faults),
        global_quota=_quota(WrittenQuota(rpm=written.global_.rpm, tpm=written.global_.tpm), "global", faults),
        price_version=price_version,
        prices_checked_on=min(_checked_on(written), default=None),
        routing_headers=routing_headers(aliases.values()),
    )


def _settings(gateway: WrittenGateway, longest_seconds: float, secrets: Secrets, faults: Faults) -> Settings:
    for name in ("retry", "breaker", "redis", "drain", "spool", "overload"):
        _in_range(getattr(gateway, name), f"gateway.{name}", faults)
    if gateway.max_bodies_bytes < gateway.max_body_bytes:
        faults.add("gateway.max_bodies_bytes", "must be at least gateway.max_body_bytes, or no such body is ever taken")
    for name in ("max_body_bytes", "default_output_tokens", "start_buffer_bytes"):
        _positive(getattr(gateway, name), f"gateway.{name}", faults)
    _positive(gateway.redis.timeout_ms, "gateway.redis.timeout_ms", faults)
    _positive(gateway.redis.probe_seconds, "gateway.redis.probe_seconds", faults)
    _positive(gateway.overload.max_calls, "gateway.overload.max_calls", faults)
    _positive(gateway.overload.max_delay_ms, "gateway.overload.max_delay_ms", faults)
    _positive(gateway.redis.replicas, "gateway.redis.replicas", faults)
    if not 0 <= gateway.trace_sample_ratio <= 1:
        faults.add("gateway.trace_sample_ratio", "must be from 0 to 1")
    if not 1 <= gateway.retry.max_attempts <= 10:
        faults.add("gateway.retry.max_attempts", "must be from 1 to 10")
    if not 0 <= gateway.retry.budget_percent <= 100:
        faults.add("gateway.retry.budget_percent", "must be from 0 to 100")
    if not 0 <= gateway.breaker.failures <= 10_000:
        faults.add("gateway.breaker.failures", "must be from 0, no breaker, to 10000")
    if not 0 < gateway.breaker.percent <= 100:
        faults.add("gateway.breaker.percent", "must be above 0 and at most 100")
    warnings = gateway.warnings
    if not 1 <= warnings.at_percent <= 99:
        faults.add("gateway.warnings.at_percent", "must be from 1 to 99; at 100 calls are refused")
    if not 1 <= gateway.content.keep_days <= 3660:
        faults.add("gateway.content.keep_days", "must be from 1 to 3660")
    for region in gateway.content.phone_regions:
        if not (len(region) == 2 and region.isascii() and region.isupper()):
            faults.add("gateway.content.phone_regions", f"{region!r} is no country code such as DE")
    return Settings(
        max_body_bytes=gateway.max_body_bytes,
        max_bodies_bytes=gateway.max_bodies_bytes,
        start_buffer_bytes=gateway.start_buffer_bytes,
        longest_seconds=longest_seconds,
        retry=gateway.retry,
        breaker=gateway.breaker,
        redis=gateway.redis,
        drain=gateway.drain,
        spool=gateway.spool,
        content=gateway.content,
        trace_sample_ratio=gateway.trace_sample_ratio,
        user_id_salt=secrets.resolve(gateway.user_id_salt, "gateway.user_id_salt", faults),
        edge_secret=(
            None if gateway.edge_secret is None else secrets.resolve(gateway.edge_secret, "gateway.edge_secret", faults)
        ),
        overload=gateway.overload,
        mode=gateway.mode,
        warn_at_percent=warnings.at_percent,
        warnings_webhook=(None if warnings.webhook is None else _webhook(warnings.webhook, secrets, faults)),
    )


def _webhook(reference: str, secrets: Secrets, faults: Faults) -> Secret:
    """Slack's addresses are secrets: who knows one may post."""
    path = "gateway.warnings.webhook"
    webhook = secrets.resolve(reference, path, faults)
    if webhook.reveal() and BASE_URL.fullmatch(webhook.reveal()) is None:
        faults.add(path, f"what {reference} holds is not an http(s) URL without credentials, query and fragment")
    return webhook


def _providers(written: Written, secrets: Secrets, faults: Faults) -> dict[str, Provider]:
    used = _used(written)
    providers: dict[str, Provider] = {}
    for name, provider in _entries(written.providers, NAME, "providers", faults):
        path = f"providers.{name}"
        vendor = _vendor(provider, path, faults)
        base_url = provider.base_url or vendor.base_url
        if vendor.account == "aws" and not AWS_REGION.fullmatch(provider.region or ""):
            faults.add(f"{path}.region", "is required, and is an AWS region such as eu-central-1")
        if base_url is not None:
            base_url = base_url.replace("{region}", provider.region or "none")
        if base_url is None:
            faults.add(f"{path}.base_url", "is required: each installation of this kind has an address of its own")
        if provider.api_version is not None and not (vendor.versioned and API_VERSION.fullmatch(provider.api_version)):
            faults.add(f"{path}.api_version", f"is for kind azure, and matches {API_VERSION.pattern}")
        providers[name] = Provider(
            name=name,
            kind=provider.vendor or provider.kind,
            base_url=_base_url(base_url or "https://none", f"{path}.base_url", faults),
            credential=credential(provider, vendor, path, secrets, faults, needed=name in used),
            region=provider.region,
            api_version=provider.api_version,
            account=account(provider, vendor, path, secrets, faults, needed=name in used),
            keys=pool(name, provider, vendor, path, secrets, faults, needed=name in used),
            trace_context=provider.trace_context,
        )
    return providers


def _used(written: Written) -> frozenset[str]:
    """The providers that an alias may ask: only they need their secrets, so that the others can stand there unused."""
    found = [written.targets.get(name) for name in named_targets(written)]
    return frozenset(target.provider for target in found if target is not None)


def _vendor(provider: WrittenProvider, path: str, faults: Faults) -> Vendor:
    """What is known of the provider's kind, or of the vendor that it names."""
    if provider.vendor is None:
        return KINDS[provider.kind]
    if provider.kind != COMPATIBLE_KIND:
        faults.add(f"{path}.vendor", f"is for kind {COMPATIBLE_KIND}")
    _known(provider.vendor, COMPATIBLE, "vendor", f"{path}.vendor", faults)
    return COMPATIBLE.get(provider.vendor, KINDS[provider.kind])


def _targets(written: Written, providers: Mapping[str, Provider], faults: Faults) -> dict[str, Target]:
    at_ceiling = ceiling(written.gateway, faults)
    prices = price_targets(written, faults)
    targets: dict[str, Target] = {}
    for name, target in _entries(written.targets, TARGET_NAME, "targets", faults):
        _known(target.provider, written.providers, "provider", f"targets.{name}.provider", faults)
        _positive(target.max_output_tokens, f"targets.{name}.max_output_tokens", faults)
        _positive(target.context_tokens, f"targets.{name}.context_tokens", faults)
        if target.provider in providers:
            provider = written.providers[target.provider]
            if provider is not None and KINDS[provider.kind].versioned and not NAME.fullmatch(target.model):
                faults.add(f"targets.{name}.model", f"is the name of a deployment and matches {NAME.pattern}")
            priced = prices.get(name)
            tariffs = None if priced is None else priced.tenant_tariffs
            targets[name] = Target(
                name=name,
                provider=providers[target.provider],
                model=target.model,
                price=at_ceiling if priced is None else priced.tariff.rate.price,
                priced=priced is not None,
                priced_as=target.priced_as or target.model,
                tariff=None if priced is None or (priced.tariff.plain and not tariffs) else priced.tariff,
                tenant_tariffs=tariffs or {},
                drop_params=frozenset(target.drop_params),
                serves=target.serves,
                max_output_tokens=target.max_output_tokens,
                capabilities=None if target.capabilities is None else frozenset(target.capabilities),
                context_tokens=target.context_tokens,
            )
    return targets


def _checked_on(written: Written) -> Iterator[date]:
    """When the prices that are in use were checked."""
    for target in written.targets.values():
        models = {} if target is None else written.prices.get(target.provider) or {}
        price = None if target is None else models.get(target.priced_as or target.model)
        if price is not None:
            yield price.checked_on


def _quota(written: WrittenQuota, path: str, faults: Faults, base: Quota | None = None) -> Quota:
    """`base` has what is left out."""
    base = base or Quota()
    counts = {"rpm": "rpm", "tpm": "tpm", "concurrency": "concurrency", "daily_tokens": "daily_token_cap"}
    values: dict[str, int | None] = {}
    for name, key in counts.items():
        value = getattr(written, key)
        _positive(value, f"{path}.{key}", faults)
        if value is not None and value > MAX_COUNT:
            faults.add(f"{path}.{key}", f"must be at most {MAX_COUNT}; leave it out for no limit")
        values[name] = getattr(base, name) if value is None else value
    for name, key in {"daily_nanos": "daily_usd", "monthly_nanos": "monthly_usd"}.items():
        dollars: Decimal | None = getattr(written, key)
        values[name] = getattr(base, name) if dollars is None else _budget(dollars, f"{path}.{key}", faults)
    zone = written.budget_time_zone
    if zone is not None:
        check_zone(zone, f"{path}.budget_time_zone", faults)
    return Quota(**values, time_zone=zone or base.time_zone)


def _budget(dollars: Decimal, path: str, faults: Faults) -> int:
    if not dollars.is_finite() or not 0 < dollars <= MAX_BUDGET_USD or (nanos := dollars * 1_000_000_000) % 1:
        faults.add(path, f"must be above 0 and at most {MAX_BUDGET_USD} USD, with at most 9 decimals")
        return 0
    return int(nanos)


def _check_policy(policy: WrittenPlan, written: Written, path: str, faults: Faults) -> None:
    for alias_name in policy.allowed_models or ():
        if alias_name != "*":
            _known(alias_name, written.aliases, "alias", f"{path}.allowed_models", faults)
    if policy.capture_content and written.gateway.content.folder is None:
        faults.add(f"{path}.capture_content", "wants gateway.content.folder: where content is kept")
    regions = {provider.region: None for provider in written.providers.values() if provider and provider.region}
    for region in policy.residency or ():
        _known(region, regions, "provider's region", f"{path}.residency", faults)


def _tenants(written: Written, guarding: Mapping[str, Guardrail], faults: Faults) -> dict[str, Tenant]:
    quotas: dict[str, Quota] = {}
    for name, plan in _entries(written.plans, NAME, "plans", faults):
        _check_policy(plan, written, f"plans.{name}", faults)
        _check_downgrade(plan.downgrade or {}, plan.allowed_models or (), written, f"plans.{name}", faults)
        tenant_cache(plan.cache, None, f"plans.{name}.cache", faults)
        named(plan.guardrails, guarding, f"plans.{name}.guardrails", faults)
        quotas[name] = _quota(plan, f"plans.{name}", faults)
    tenants: dict[str, Tenant] = {}
    for name, tenant in _entries(written.tenants, NAME, "tenants", faults):
        _check_policy(tenant, written, f"tenants.{name}", faults)
        _known(tenant.plan, written.plans, "plan", f"tenants.{name}.plan", faults)
        plan = written.plans.get(tenant.plan) or WrittenPlan()
        models = (plan.allowed_models or ()) if tenant.allowed_models is None else tenant.allowed_models
        downgrade = (plan.downgrade or {}) if tenant.downgrade is None else tenant.downgrade
        if tenant.downgrade is not None or tenant.allowed_models is not None:
            _check_downgrade(downgrade, models, written, f"tenants.{name}", faults)
        tenants[name] = Tenant(
            id=name,
            plan=tenant.plan,
            tier=tenant.tier or plan.tier or tenant.plan,
            allowed_models=None if "*" in models else frozenset(models),
            quota=_quota(tenant, f"tenants.{name}", faults, quotas.get(tenant.plan)),
            residency=_residency(plan.residency if tenant.residency is None else tenant.residency),
            downgrade=downgrade,
            cache=tenant_cache(tenant.cache, plan.cache, f"tenants.{name}.cache", faults),
            capture_content=bool(plan.capture_content if tenant.capture_content is None else tenant.capture_content),
            priority=PRIORITIES.index(tenant.priority or plan.priority or "normal"),
            guardrails=(
                named(plan.guardrails, guarding, f"plans.{tenant.plan}.guardrails", Faults())
                if tenant.guardrails is None
                else named(tenant.guardrails, guarding, f"tenants.{name}.guardrails", faults)
            ),
        )
    return tenants


def _check_downgrade(
    downgrade: Mapping[str, str], models: Collection[str], written: Written, path: str, faults: Faults
) -> None:
    """What serves instead is there, may be used, and serves the same."""
    for name, cheaper in downgrade.items():
        here = f"{path}.downgrade.{name}"
        for alias_name in (name, cheaper):
            _known(alias_name, written.aliases, "alias", here, faults)
        if cheaper == name:
            faults.add(here, "names the alias itself; expected a cheaper one")
        if cheaper not in models and "*" not in models:
            faults.add(here, f"{cheaper!r} is not among the allowed_models")
        if _serves(name, written) != _serves(cheaper, written):
            faults.add(here, f"{cheaper!r} serves something else")


def _serves(alias_name: str, written: Written) -> str | None:
    """What an alias serves, by its first target that is known."""
    alias = written.aliases.get(alias_name)
    targets = [written.targets.get(name) for name in alias.targets] if alias else []
    return next((target.serves for target in targets if target), None)


def _residency(regions: list[str] | None) -> frozenset[str] | None:
    return None if regions is None else frozenset(regions)


def _plans(written: Written, guarding: Mapping[str, Guardrail]) -> dict[str, Tenant]:
    """What a tenant of each plan is, but for its name: for tenants that only a token names."""
    nameless = {name: WrittenTenant(plan=name) for name, plan in written.plans.items() if plan is not None}
    return _tenants(msgspec.structs.replace(written, tenants=nameless), guarding, Faults())


def _keys(written: Written, faults: Faults) -> dict[bytes, ServiceKey]:
    keys: dict[bytes, ServiceKey] = {}
    for key_id, key in _entries(written.service_keys, KEY_ID, "service_keys", faults):
        path = f"service_keys.{key_id}"
        check_tenants(key.tenants, written, f"{path}.tenants", faults)
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
            revoked=key.revoked is not None,
            roles=frozenset(key.roles),
            quota=_quota(key.limits, f"{path}.limits", faults),
        )
    return keys


def _midnight(day: date) -> float:
    """The end of `day` in UTC, as unix seconds: a key is valid through its day."""
    return (day - date(1970, 1, 1)).days * 86_400.0 + 86_400.0
