"""Who calls: a service key, a token of an issuer, or a certificate that the edge has verified."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from urllib.parse import unquote_plus

from app.ambient import same
from app.auth.tokens import Tokens
from app.config import Config, ServiceKey
from app.errors import InvalidApiKey

EDGE_HEADER = b"x-gateway-edge"
"""Carries the edge's secret: without it nothing that the edge says of a client is believed."""
CERTIFICATE_HEADER = b"x-forwarded-tls-client-cert-info"
"""Traefik's `passTLSClientCert` with the subject's common name: `Subject="CN=billing"`, percent-encoded; where the
client sent a chain, the leaf first."""
_SUBJECT = re.compile(r'Subject="CN=([^"]+)"(?:,.*)?')


class Callers:
    """`revoked` has the ids that the control channel revoked, beside those of the configuration."""

    def __init__(self, tokens: Tokens, revoked: Container[str] = ()) -> None:
        self._tokens = tokens
        self._revoked = revoked

    def known(self, config: Config, headers: Mapping[bytes, str], now: float) -> ServiceKey | None:
        """Who calls, or None for a token that `verified` has to look at first. Raises InvalidApiKey.

        Runs for every call: keys and tokens are one lookup by the SHA-256 digest of the whole credential. Of several
        credentials `Authorization` counts before `x-api-key`, and both before a certificate.
        """
        credential = _credential(headers)
        if credential is None:
            return self.accepted(_certified(config, headers), now)
        digest = hashlib.sha256(credential.encode("utf-8", "replace")).digest()
        key = config.keys.get(digest)
        if key is None:
            if not (config.issuers and credential.count(".") == 2):
                raise InvalidApiKey(
                    "The gateway key is unknown. Ask your platform team for one; vendor keys do not work here."
                )
            key = self._tokens.known(config, digest, now)
            if key is None:
                return None
        return self.accepted(key, now)

    async def verified(self, config: Config, headers: Mapping[bytes, str], now: float) -> ServiceKey:
        """Who calls by a token seen for the first time. Raises InvalidApiKey, IssuerUnavailable."""
        return self.accepted(await self._tokens.verify(config, _credential(headers) or "", now), now)

    async def identify(self, config: Config, headers: Mapping[bytes, str], now: float) -> ServiceKey:
        """Both in one, for where a coroutine more costs nothing. Raises InvalidApiKey, IssuerUnavailable."""
        return self.known(config, headers, now) or await self.verified(config, headers, now)

    def accepted(self, key: ServiceKey, now: float) -> ServiceKey:
        """The same caller, unless it counts no more. Raises InvalidApiKey."""
        if key.revoked or key.id in self._revoked:
            raise InvalidApiKey("The credential was revoked. Ask your platform team for a new one.")
        if key.expires is not None and now >= key.expires:
            raise InvalidApiKey("The credential has expired. Get a new one.")
        return key


def header_map(raw: Mapping[bytes, bytes]) -> dict[bytes, str]:
    """By lower-case name. Of one that was written twice the first counts, as it does for Traefik's limits."""
    return {name.lower(): value.decode("latin-1") for name, value in reversed(raw.items())}


def scope_headers(raw: Sequence[tuple[bytes, bytes]]) -> dict[bytes, str]:
    """ASGI's headers as `header_map` has them."""
    return header_map(dict(reversed(raw)))


def _credential(headers: Mapping[bytes, str]) -> str | None:
    """What was sent as a key or token; None where nothing was. Raises InvalidApiKey."""
    authorization = headers.get(b"authorization")
    if authorization is None:
        credential = headers.get(b"x-api-key")
        if credential is None:
            return None
    else:
        scheme, _, credential = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise InvalidApiKey("The Authorization header must read `Bearer <gateway key>`.")
    credential = credential.strip()
    if not credential:
        raise InvalidApiKey("A gateway key is required: send `Authorization: Bearer <gateway key>`.")
    return credential


def _certified(config: Config, headers: Mapping[bytes, str]) -> ServiceKey:
    """The service of a client certificate, if the edge vouches for it. Raises InvalidApiKey."""
    edge, said = headers.get(EDGE_HEADER), headers.get(CERTIFICATE_HEADER)
    if edge is not None and said is not None and config.settings.edge_secret is not None:
        subject = _SUBJECT.fullmatch(unquote_plus(said))
        if same(edge.encode(), config.settings.edge_secret.reveal().encode()) and subject is not None:
            key = config.certificates.get(subject[1])
            if key is None:
                raise InvalidApiKey("The client certificate is valid, and no service of its name is configured here.")
            return key
    raise InvalidApiKey("A gateway key is required: send `Authorization: Bearer <gateway key>`.")
