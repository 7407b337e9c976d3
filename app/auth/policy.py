"""On whose behalf a caller may act, and what that tenant may use."""

from __future__ import annotations

import msgspec

from app.config import NAME, Alias, Config, ServiceKey, Target, Tenant
from app.errors import (
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    NotFound,
    RoleRequired,
    TenantNotAllowed,
    TenantRequired,
)
from app.providers import stored
from app.wire import ChatRequest, KeptRequest, Request


def authorize(config: Config, key: ServiceKey, claimed: str | None) -> Tenant:
    """The tenant that a call is for: the header selects within what the credential may act for.

    A token for one tenant needs no header. A tenant without a row has the plan that its token names; a row counts
    before that. Raises TenantRequired, InvalidRequest, TenantNotAllowed (also for a tenant that does not exist: the two
    look the same from outside).
    """
    claimed = claimed or key.default_tenant
    if not claimed:
        raise TenantRequired("X-Tenant-Id is required: the tenant on whose behalf you call.")
    tenant = config.tenants.get(claimed)
    if tenant is None:
        if not NAME.fullmatch(claimed):
            raise InvalidRequest(f"X-Tenant-Id must match {NAME.pattern}.", param="X-Tenant-Id")
        if key.plan in config.plans:
            tenant = msgspec.structs.replace(config.plans[key.plan], id=claimed)
    if tenant is None or not key.may_act_for(claimed):
        raise TenantNotAllowed(
            f"This credential may not act for the tenant {claimed!r}: name one that it is for, or ask your platform "
            "team to add it.",
            param="X-Tenant-Id",
        )
    return tenant


def require(key: ServiceKey, role: str) -> None:
    """Raises RoleRequired unless the caller has the role."""
    if role not in key.roles:
        raise RoleRequired(
            f"This credential does not have the role `{role}`: ask your platform team for one with `roles: [{role}]`."
        )


def allow(config: Config, tenant: Tenant, alias: str) -> Alias:
    """The alias, with those of its targets that may serve the tenant. Raises ModelNotFound, ModelNotAllowed."""
    found = config.aliases.get(alias)
    if found is None:
        raise ModelNotFound(f"There is no model {alias!r}; GET /v1/models lists yours.", param="model")
    way = within(found, tenant.residency) if tenant.allows(alias) else None
    if way is None:
        raise ModelNotAllowed(
            f"The tenant {tenant.id} may not use {alias!r}; GET /v1/models lists its models.", param="model"
        )
    return way


def keeper(config: Config, tenant: Tenant, request: KeptRequest) -> Alias:
    """The way to the target that keeps an answer for the tenant: by an alias that it may use, past all its rules.

    Raises NotFound.
    """
    kept = [one.name for one in config.targets.values() if stored.vendor_id(request.name, request.owner, one.name)]
    for name in allowed(config, tenant) if kept else ():
        alias = within(config.aliases[name], tenant.residency)
        for target in alias.everywhere:
            if target.name in kept:
                limits = (alias.default_output_tokens, alias.timeouts)
                return Alias(name, (target,), (target.name,), *limits, guardrails=alias.guardrails)
    raise NotFound(
        "No vendor keeps an answer of this name for this tenant: name one that it was given for `store: true`.",
        param="id",
    )


def substitute(config: Config, tenant: Tenant, alias: Alias) -> Alias | None:
    """The cheaper alias that serves in this one's place when a budget is nearly used up. None: nothing else does."""
    found = config.aliases.get(tenant.downgrade.get(alias.name, ""))
    return None if found is None else within(found, tenant.residency)


def goes_on(request: Request, alias: Alias, cheaper: Alias, nearly: bool) -> bool:
    """Whether a request goes on by the cheaper alias. `nearly`: a budget is nearly used up.

    A conversation goes on where it began, as the vendor there alone has the turns before: by the cheaper alias, though
    budgets have room again, or as asked, though they have not.
    """
    if not request.stored or request.previous is None:
        return nearly
    return _keeps(cheaper, request) and (nearly or not _keeps(alias, request))


def _keeps(alias: Alias, request: ChatRequest) -> bool:
    return any(stored.vendor_id(request.previous, request.owner, target.name) for target in alias.everywhere)


def allowed(config: Config, tenant: Tenant) -> list[str]:
    """The aliases that a tenant may use."""
    return [name for name, alias in config.aliases.items() if tenant.allows(name) and within(alias, tenant.residency)]


def within(alias: Alias, regions: frozenset[str] | None) -> Alias | None:
    """The alias as far as it is in a tenant's regions, wherever a call may go by it. None: no target is.

    A rule whose targets are all elsewhere is left out: its calls go by the next one that holds.
    """
    if regions is None:
        return alias
    rules = []
    for rule in alias.rules:
        way = _way_within(rule.alias, regions)
        if way is not None:
            rules.append(msgspec.structs.replace(rule, alias=way))
    way = _way_within(alias, regions)
    return None if way is None else msgspec.structs.replace(way, rules=tuple(rules)) if alias.rules else way


def _way_within(way: Alias, regions: frozenset[str]) -> Alias | None:
    targets = _in_regions(way.targets, regions)
    if not targets:
        return None
    if len(targets) != len(way.targets) and way.weights:
        kept = [weight for target, weight in zip(way.targets, way.weights, strict=True) if target in targets]
        way = msgspec.structs.replace(way, weights=tuple(kept))
    if way.cascade is not None:
        above = _in_regions(way.cascade.targets, regions)
        way = msgspec.structs.replace(
            way, cascade=msgspec.structs.replace(way.cascade, targets=above) if above else None
        )
    if way.shadow is not None and not _in_regions((way.shadow.target,), regions):
        way = msgspec.structs.replace(way, shadow=None)
    if way.on_context_length or way.on_content_filter:
        way = msgspec.structs.replace(
            way,
            on_context_length=_in_regions(way.on_context_length, regions),
            on_content_filter=_in_regions(way.on_content_filter, regions),
        )
    return way.along(targets)


def _in_regions(targets: tuple[Target, ...], regions: frozenset[str]) -> tuple[Target, ...]:
    return tuple(target for target in targets if target.provider.region in regions)
