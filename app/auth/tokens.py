"""Tokens (JWT, RFC 7519): whether they are an issuer's, and whom they speak for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from app.auth.jwks import KeySets
from app.config import NAME, Config, Issuer, ServiceKey
from app.errors import InvalidApiKey, IssuerUnavailable

KEPT_SECONDS = 60.0
"""How long a verified token is known by its digest: reading and checking one costs a hundred times a lookup."""
KEPT_TOKENS = 10_000
"""A token and its caller are about 1 KB. Beyond this the oldest go, and are verified once more."""
MAX_TOKEN_CHARACTERS = 16_384


class Tokens:
    """Tokens verified a short while ago, by digest. A new configuration or key set forgets them all."""

    def __init__(self, key_sets: KeySets) -> None:
        self._key_sets = key_sets
        self._kept: dict[bytes, tuple[float, ServiceKey]] = {}
        self._kept_under: tuple[str, int] | None = None

    def known(self, config: Config, digest: bytes, now: float) -> ServiceKey | None:
        """The caller of a token that was verified within KEPT_SECONDS; its own expiry is the caller's to check."""
        found = self._kept.get(digest)
        if found is None or now >= found[0] or self._kept_under != (config.version, self._key_sets.generation):
            return None
        return found[1]

    async def verify(self, config: Config, token: str, now: float) -> ServiceKey:
        """The caller of a token. Waits only where the issuer's keys have to be asked for.

        Raises InvalidApiKey with what is wrong, IssuerUnavailable while the issuer's keys were never read.
        """
        import jwt  # loaded by now, with the keys of the issuers: see `jwks.public_keys`

        if len(token) > MAX_TOKEN_CHARACTERS:
            raise InvalidApiKey(f"The token is longer than {MAX_TOKEN_CHARACTERS} characters.")
        try:
            unverified = jwt.decode_complete(token, options={"verify_signature": False})
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            raise InvalidApiKey("The credential is neither a gateway key nor a token that can be read.") from None
        header, issuer = unverified["header"], config.issuers.get(str(unverified["payload"].get("iss")))
        if issuer is None:
            raise InvalidApiKey("The token's issuer (iss) is not one of this gateway.")
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in issuer.algorithms:
            raise InvalidApiKey(f"The token is not signed by {' or '.join(sorted(issuer.algorithms))}.")
        public = self._key_sets.find(issuer, kid, algorithm)
        if public is None and await self._key_sets.refresh(issuer):
            public = self._key_sets.find(issuer, kid, algorithm)
        if public is None:
            if not self._key_sets.has(issuer):
                raise IssuerUnavailable("The keys of the token's issuer cannot be read just now. Try again.")
            raise InvalidApiKey("The token is signed by a key (kid) that its issuer does not publish.")
        try:
            # Times are checked below, by our clock.
            options = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "require": ["exp", "iss", "aud"]}
            claims = jwt.decode(
                token, public, [algorithm], options=options, audience=issuer.audiences, issuer=issuer.issuer
            )
        except jwt.InvalidAudienceError:
            raise InvalidApiKey("The token is for another audience (aud).") from None
        except (jwt.InvalidTokenError, jwt.InvalidKeyError, ValueError, TypeError):
            raise InvalidApiKey("The token's signature or claims are not valid.") from None
        caller = _caller(issuer, claims, now)
        self._keep(config, token, caller, now)
        return caller

    def _keep(self, config: Config, token: str, caller: ServiceKey, now: float) -> None:
        under = (config.version, self._key_sets.generation)
        if self._kept_under != under:
            self._kept.clear()
            self._kept_under = under
        while len(self._kept) >= KEPT_TOKENS:
            del self._kept[next(iter(self._kept))]
        self._kept[hashlib.sha256(token.encode("utf-8", "replace")).digest()] = (now + KEPT_SECONDS, caller)


def _caller(issuer: Issuer, claims: Mapping[str, Any], now: float) -> ServiceKey:
    """Whom verified claims speak for. Raises InvalidApiKey."""
    expires = _seconds(claims, "exp") + issuer.leeway_seconds
    if now >= expires:
        raise InvalidApiKey("The token has expired (exp). Get a new one.")
    if "nbf" in claims and now < _seconds(claims, "nbf") - issuer.leeway_seconds:
        raise InvalidApiKey("The token is not valid yet (nbf).")
    written = claims.get(issuer.tenant_claim)
    tenants = written if isinstance(written, list) else [written]
    if not tenants or not all(isinstance(tenant, str) and NAME.fullmatch(tenant) for tenant in tenants):
        raise InvalidApiKey(f"The token's claim {issuer.tenant_claim!r} must name a tenant, matching {NAME.pattern}.")
    plan = claims.get(issuer.plan_claim, issuer.default_plan)
    if not (plan is None or (isinstance(plan, str) and NAME.fullmatch(plan))):
        raise InvalidApiKey(f"The token's claim {issuer.plan_claim!r} must name a plan, matching {NAME.pattern}.")
    client = claims.get(issuer.service_claim)
    named = isinstance(client, str) and NAME.fullmatch(client)
    return ServiceKey(
        id=f"jwt.{issuer.name}.{client}" if named else f"jwt.{issuer.name}",
        service=client if named else issuer.name,
        tenants=frozenset(tenant for tenant in tenants if issuer.may_name(tenant)),
        expires=expires,
        roles=issuer.roles,
        plan=plan if issuer.plans is None or plan in issuer.plans else None,
        default_tenant=tenants[0] if len(tenants) == 1 else None,
    )


def _seconds(claims: Mapping[str, Any], name: str) -> float:
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidApiKey(f"The token's {name} is not a number of seconds.")
    return float(value)
