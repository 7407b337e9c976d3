"""Who may call beside service keys, built from what is written: issuers of tokens, names of client certificates."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Protocol

from app.config.reading import Faults, entries, known
from app.config.running import NAME, Issuer, ServiceKey
from app.config.written import Written, WrittenIssuer

JWKS = re.compile(
    r"file:/.+|https://(?:[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.?|\[[0-9a-fA-F:]+\])(?::\d{1,5})?"
    r"/[A-Za-z0-9._~/%-]*(?:\?[A-Za-z0-9._~/%&=-]*)?"
)
COMMON_NAME = re.compile(r"[A-Za-z0-9 @._:/-]{1,64}")
"""No quote and no comma: the edge forwards a subject between quotes and does not escape them."""


class Placed(Protocol):
    environments: list[str] | None


def serves(entry: Placed, environment: str) -> bool:
    """Whether an entry counts in an environment. One that names none counts in all."""
    return entry.environments is None or environment in entry.environments


def check_environments(written: Written, environments: Collection[str], faults: Faults) -> None:
    """A misspelt environment would take its entry out of force everywhere, unseen."""
    for section in ("tenants", "service_keys", "issuers", "certificates"):
        for name, entry in getattr(written, section).items():
            for environment in (entry and entry.environments) or ():
                if environment not in environments:
                    path = f"{section}.{name}.environments"
                    faults.add(path, f"no environment {environment!r}; known: {', '.join(sorted(environments))}")


def issuers(written: Written, environment: str, faults: Faults) -> dict[str, Issuer]:
    """By their `iss`."""
    built: dict[str, Issuer] = {}
    for name, issuer in entries(written.issuers, NAME, "issuers", faults):
        path = f"issuers.{name}"
        if issuer.issuer in built:
            faults.add(f"{path}.issuer", f"is that of {built[issuer.issuer].name} too")
        made = _issuer(name, issuer, written, path, faults)
        if serves(issuer, environment):
            built[issuer.issuer] = made
    return built


def _issuer(name: str, issuer: WrittenIssuer, written: Written, path: str, faults: Faults) -> Issuer:
    audiences = [issuer.audience] if isinstance(issuer.audience, str) else issuer.audience
    if not issuer.issuer:
        faults.add(f"{path}.issuer", "is the token's `iss`, to the letter")
    if not audiences or not all(audiences):
        faults.add(f"{path}.audience", "needs at least one: a token that is meant for another system is not ours")
    if not JWKS.fullmatch(issuer.jwks):
        faults.add(f"{path}.jwks", "expected https://host/path, or file:/path of a JSON Web Key Set")
    if not issuer.algorithms:
        faults.add(f"{path}.algorithms", "needs at least one, such as RS256")
    for plan in [*(issuer.plans or ()), *([] if issuer.default_plan is None else [issuer.default_plan])]:
        known(plan, written.plans, "plan", f"{path}.plans", faults)
    for tenant in issuer.tenants:
        if not NAME.fullmatch(tenant.removesuffix("*") or "a"):
            faults.add(f"{path}.tenants", f'{tenant!r} is neither a tenant\'s name, nor the beginning of one and "*"')
    if not 0 <= issuer.leeway_seconds <= 300:
        faults.add(f"{path}.leeway_seconds", "must be from 0 to 300")
    return Issuer(
        name=name,
        issuer=issuer.issuer,
        audiences=tuple(audiences),
        jwks=issuer.jwks,
        algorithms=frozenset(issuer.algorithms),
        tenants=frozenset(tenant for tenant in issuer.tenants if not tenant.endswith("*")),
        tenant_prefixes=tuple(tenant[:-1] for tenant in issuer.tenants if tenant.endswith("*")),
        tenant_claim=issuer.tenant_claim,
        plan_claim=issuer.plan_claim,
        service_claim=issuer.service_claim,
        default_plan=issuer.default_plan,
        plans=None if issuer.plans is None else frozenset(issuer.plans),
        leeway_seconds=issuer.leeway_seconds,
        roles=frozenset(issuer.roles),
    )


def certificates(written: Written, environment: str, faults: Faults) -> dict[str, ServiceKey]:
    """By the common name of the certificate's subject."""
    built: dict[str, ServiceKey] = {}
    if written.certificates and written.gateway.edge_secret is None:
        faults.add("certificates", "needs gateway.edge_secret: without it nothing that the edge forwards is believed")
    for name, certificate in entries(written.certificates, NAME, "certificates", faults):
        path = f"certificates.{name}"
        check_tenants(certificate.tenants, written, f"{path}.tenants", faults)
        if not COMMON_NAME.fullmatch(certificate.common_name):
            faults.add(f"{path}.common_name", f"must match {COMMON_NAME.pattern}")
        if certificate.common_name in built:
            faults.add(f"{path}.common_name", f"is that of {built[certificate.common_name].id} too")
        if serves(certificate, environment):
            built[certificate.common_name] = ServiceKey(
                id=f"cert.{name}",
                service=certificate.service,
                tenants=None if "*" in certificate.tenants else frozenset(certificate.tenants),
                expires=None,
                roles=frozenset(certificate.roles),
            )
    return built


def check_tenants(tenants: Sequence[str], written: Written, path: str, faults: Faults) -> None:
    for name in tenants:
        if name != "*":
            known(name, written.tenants, "tenant", path, faults)
