"""Who calls, on whose behalf, and what they may use."""

from __future__ import annotations

import hashlib
from collections.abc import Container

from app.config import NAME, Alias, Config, ServiceKey, Tenant
from app.errors import (
    InvalidApiKey,
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    RoleRequired,
    TenantNotAllowed,
    TenantRequired,
)


def identify(
    config: Config, authorization: str | None, api_key: str | None, now: float, revoked: Container[str] = ()
) -> ServiceKey:
    """The service behind a credential: `Authorization: Bearer <key>`, or `x-api-key`.

    Keys are looked up by the SHA-256 digest of the whole credential. `revoked` has ids that the control channel
    revoked, beside those of the configuration. Raises InvalidApiKey.
    """
    credential = api_key
    if authorization is not None:
        scheme, _, credential = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise InvalidApiKey("The Authorization header must read `Bearer <gateway key>`.")
    credential = (credential or "").strip()
    if not credential:
        raise InvalidApiKey("A gateway key is required: send `Authorization: Bearer <gateway key>`.")
    key = config.keys.get(hashlib.sha256(credential.encode("utf-8", "replace")).digest())
    if key is None:
        raise InvalidApiKey("The gateway key is unknown. Ask your platform team for one; vendor keys do not work here.")
    if key.revoked or key.id in revoked:
        raise InvalidApiKey("The gateway key was revoked. Ask your platform team for a new one.")
    if key.expires is not None and now >= key.expires:
        raise InvalidApiKey("The gateway key has expired. Ask your platform team for a new one.")
    return key


def authorize(config: Config, key: ServiceKey, claimed: str | None) -> Tenant:
    """The tenant that a call is for: the header selects within what the credential may act for.

    Raises TenantRequired, TenantNotAllowed (also for a tenant that does not exist: the two look the same from
    outside), InvalidRequest.
    """
    if not claimed:
        raise TenantRequired("X-Tenant-Id is required: the tenant on whose behalf you call.")
    if not NAME.fullmatch(claimed):
        raise InvalidRequest(f"X-Tenant-Id must match {NAME.pattern}.", param="X-Tenant-Id")
    tenant = config.tenants.get(claimed)
    if tenant is None or not key.may_act_for(claimed):
        raise TenantNotAllowed(f"This key may not act for the tenant {claimed!r}.", param="X-Tenant-Id")
    return tenant


def require(key: ServiceKey, role: str) -> None:
    """Raises RoleRequired unless the key has the role."""
    if role not in key.roles:
        raise RoleRequired(
            f"This key does not have the role `{role}`: ask your platform team for one with `roles: [{role}]`."
        )


def allow(config: Config, tenant: Tenant, alias: str) -> Alias:
    """The alias, if the tenant may use it. Raises ModelNotFound, ModelNotAllowed."""
    found = config.aliases.get(alias)
    if found is None:
        raise ModelNotFound(f"There is no model {alias!r}; GET /v1/models lists yours.", param="model")
    if not tenant.allows(alias):
        raise ModelNotAllowed(
            f"The tenant {tenant.id} may not use {alias!r}; GET /v1/models lists its models.", param="model"
        )
    return found
