"""The credentials of accounts: fetched when they are first asked for, kept, and renewed before they expire.

A key that stands in the configuration never comes here. What does is a Google service account, whose key signs an
assertion that is exchanged for an access token (RFC 7523; Google Identity, "Using OAuth 2.0 for server to server
applications"), and AWS's default chain, which botocore walks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.config import Account, AwsChain, Credential, Secret, ServiceAccount
from app.errors import VendorMisconfigured, VendorUnreachable

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("gateway")

FETCH_SECONDS = 10.0
"""How long one fetch may take. A call that waits for it may give up sooner; the fetch goes on for the next one."""
RENEW_SHARE = 0.2
"""A credential is renewed, off the hot path, once this share of its life is left: 12 minutes of a token's hour."""
MARGIN_SECONDS = 30.0
"""So long before it expires a credential is not given out any more: the vendor's clock is another one."""
RETRY_SECONDS = 10.0
"""How long after a failed renewal the next one is tried, while the old credential still holds."""
ASSERTION_SECONDS = 600
CHAIN_SECONDS = 300.0
"""How long AWS's credentials are kept. botocore renews them 15 minutes before they expire, when it is asked."""
GOOGLE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"


class _Held(Struct):
    """`expires` and `renew_at` are unix seconds."""

    credential: Credential
    expires: float
    renew_at: float


class _Token(Struct):
    access_token: str
    expires_in: float = 3600.0


class _Refusal(Struct):
    error: str | None = None


_token = msgspec.json.Decoder(_Token)
_refusal = msgspec.json.Decoder(_Refusal)


def client() -> httpx.AsyncClient:
    """Where a token is asked for is fixed by the configuration, so no redirect leads elsewhere."""
    import httpx

    return httpx.AsyncClient(follow_redirects=False, timeout=FETCH_SECONDS)


class Credentials:
    """One credential an account, however many calls ask for it at once. Most replicas have none, and open no client."""

    def __init__(
        self, open_client: Callable[[], httpx.AsyncClient], ambient: Ambient, fetch_seconds: float = FETCH_SECONDS
    ) -> None:
        self._open_client = open_client
        self._client: httpx.AsyncClient | None = None
        self._ambient = ambient
        self._fetch_seconds = fetch_seconds
        self.held: dict[Account, _Held] = {}
        self.fetches: dict[Account, asyncio.Task[Credential]] = {}
        self._chains: dict[AwsChain, Any] = {}

    async def of(self, account: Account) -> Credential:
        """The account's credential; waits only where none is held.

        Raises VendorMisconfigured where the account is refused, VendorUnreachable where nobody answers for it.
        """
        now = self._ambient.now()
        held = self.held.get(account)
        if held is None or now >= held.expires - MARGIN_SECONDS:
            return await asyncio.shield(self._fetch(account))
        if now >= held.renew_at:
            held.renew_at = now + RETRY_SECONDS
            self._fetch(account)
        return held.credential

    async def close(self) -> None:
        for fetch in self.fetches.values():
            fetch.cancel()
        await asyncio.gather(*self.fetches.values(), return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    def _fetch(self, account: Account) -> asyncio.Task[Credential]:
        """The fetch that is under way, or a new one."""
        fetch = self.fetches.get(account)
        if fetch is None:
            fetch = self.fetches[account] = asyncio.create_task(self._fetch_once(account))
            fetch.add_done_callback(lambda done: self._fetched(account, done))
        return fetch

    def _fetched(self, account: Account, fetch: asyncio.Task[Credential]) -> None:
        del self.fetches[account]
        if not fetch.cancelled() and (error := fetch.exception()) is not None:
            log.error("no credential of %s: %s", _name(account), error)

    async def _fetch_once(self, account: Account) -> Credential:
        started = self._ambient.now()
        try:
            async with asyncio.timeout(self._fetch_seconds):
                if isinstance(account, ServiceAccount):
                    credential, seconds = await self._google(account)
                else:
                    credential, seconds = await asyncio.to_thread(self._aws, account), CHAIN_SECONDS
        except TimeoutError:
            raise VendorUnreachable(f"no answer within {self._fetch_seconds:g} s to who {_name(account)} is") from None
        held = {other: kept for other, kept in self.held.items() if kept.expires > started}
        held[account] = _Held(credential, started + seconds, started + seconds * (1 - RENEW_SHARE))
        self.held = held  # accounts that a reload has replaced fall out when they expire
        return credential

    async def _google(self, account: ServiceAccount) -> tuple[Credential, float]:
        """An access token, and how many seconds it lives."""
        import httpx

        now = int(self._ambient.now())
        claims = {"iss": account.email, "scope": GOOGLE_SCOPE, "aud": account.token_url}
        claims |= {"iat": now, "exp": now + ASSERTION_SECONDS}
        assertion = await asyncio.to_thread(_signed, account, claims)
        if self._client is None:
            self._client = self._open_client()
        try:
            answer = await self._client.post(account.token_url, data={"grant_type": GRANT, "assertion": assertion})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise VendorUnreachable(f"{account.token_url} cannot be reached ({type(error).__name__})") from error
        if answer.status_code >= 500 or answer.status_code == 429:
            raise VendorUnreachable(f"{account.token_url} answered {answer.status_code}")
        try:
            token = _token.decode(answer.content) if answer.status_code == 200 else None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise VendorUnreachable(f"{account.token_url} answered what is no token") from error
        if token is None:
            said = _reason(answer.content)
            raise VendorMisconfigured(
                f"{account.token_url} refused the key of {_name(account)}: {said}",
                vendor_status=answer.status_code,
                vendor_code=said,
            )
        return Credential(Secret(token.access_token)), token.expires_in

    def _aws(self, chain: AwsChain) -> Credential:
        """Blocks: files, an instance's metadata, or AWS's token service. Runs in a thread, one fetch a chain."""
        try:
            from botocore.credentials import RefreshableCredentials
            from botocore.exceptions import BotoCoreError, ClientError
            from botocore.session import Session
        except ImportError:
            raise VendorMisconfigured(
                "AWS's default chain needs botocore: pip install 'llm-gateway[bedrock]', or give the provider a key"
            ) from None
        try:
            found = self._chains.get(chain) or Session(profile=chain.profile).get_credentials()
            if found is None:
                raise VendorMisconfigured(f"{_name(chain)} has found no credentials")
            if isinstance(found, RefreshableCredentials):  # others are found anew, as a file may have changed
                self._chains[chain] = found
            frozen = found.get_frozen_credentials()
        except (BotoCoreError, ClientError) as error:
            raise VendorMisconfigured(f"{_name(chain)} has failed ({type(error).__name__})") from error
        token = Secret(frozen.token) if frozen.token else None
        return Credential(Secret(frozen.secret_key), frozen.access_key, token, chain.region)


def _signed(account: ServiceAccount, claims: Mapping[str, Any]) -> str:
    """The assertion. For a thread: the first one loads jwt, which is 9 MB that most replicas do without."""
    import jwt

    try:
        return jwt.encode(dict(claims), account.key.reveal(), algorithm="RS256", headers={"kid": account.key_id})
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise VendorMisconfigured(f"the private key of {_name(account)} cannot be used") from error


def _name(account: Account) -> str:
    """For messages, without a secret."""
    if isinstance(account, ServiceAccount):
        return f"the service account {account.email}"
    return f"AWS's default chain{f' (profile {account.profile})' if account.profile else ''}"


def _reason(body: bytes) -> str:
    """OAuth's error code (`invalid_grant`), as far as it is one."""
    try:
        error = _refusal.decode(body).error or ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = ""
    return error if error.replace("_", "").isalnum() and len(error) <= 64 else "no reason given"
