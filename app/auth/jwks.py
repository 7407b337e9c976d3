"""The public keys of issuers (JWKS, RFC 7517): read ahead of calls, from a file or over HTTPS."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.config import Config, Issuer

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
FILE_SECONDS = 10.0
"""How often a file is read again."""
URL_SECONDS = 300.0
"""How often a URL is asked again; a key that is not in the set yet is asked for at once."""
RETRY_SECONDS = 10.0
"""No issuer is asked more often, whatever kids its tokens name: anybody can make one up."""
FETCH_SECONDS = 5.0
MAX_BYTES = 1_048_576


class PublicKey(Struct, frozen=True):
    """One key of a set. `algorithm` is the only one that it may be used with, where the issuer says so."""

    kid: str | None
    algorithm: str | None
    public: Any


class _Set(Struct):
    """An issuer's keys as last read; times are monotonic."""

    keys: tuple[PublicKey, ...] = ()
    content: bytes = b""
    read_at: float = float("-inf")
    tried_at: float = float("-inf")
    fault: str | None = None
    reading: asyncio.Task[None] | None = None


class KeySets:
    """The sets of all issuers of the configuration. `generation` counts their changes.

    A set that cannot be read again stays as it was: its issuer being away refuses nobody. Most replicas have no
    issuer, and open no client.
    """

    def __init__(
        self, config: Callable[[], Config], open_client: Callable[[], httpx.AsyncClient], ambient: Ambient
    ) -> None:
        self._config = config
        self._open_client = open_client
        self._client: httpx.AsyncClient | None = None
        self._ambient = ambient
        self._sets: dict[str, _Set] = {}
        self.generation = 0

    def has(self, issuer: Issuer) -> bool:
        """Whether the issuer's keys were ever read."""
        return bool(self._set(issuer).content)

    def find(self, issuer: Issuer, kid: str | None, algorithm: str) -> Any | None:
        """The key that a token's header names. Without a kid only a set of one key has an answer."""
        keys = self._set(issuer).keys
        named = [key for key in keys if key.kid == kid] if kid is not None else list(keys)
        if len(named) != 1 or named[0].algorithm not in (None, algorithm):
            return None
        return named[0].public

    async def refresh(self, issuer: Issuer) -> bool:
        """Reads the issuer's keys again, unless that was tried a moment ago. True when they were read.

        All who ask meanwhile wait for the same reading; one who is cancelled does not end it for the others.
        """
        held = self._set(issuer)
        if held.reading is None:
            now = self._ambient.monotonic()
            if now < held.tried_at + RETRY_SECONDS:
                return False
            held.tried_at = now
            held.reading = asyncio.ensure_future(self._read(issuer, held))
        await asyncio.shield(held.reading)
        return held.fault is None

    async def run(self) -> None:
        while True:
            await self.run_once()
            await self._ambient.sleep(LOOK_SECONDS)

    async def run_once(self) -> int:
        """Reads the sets that are due; returns how many were."""
        now = self._ambient.monotonic()
        issuers = self._config().issuers.values()
        due = [issuer for issuer in issuers if now >= self._set(issuer).read_at + _every_seconds(issuer)]
        return sum(await asyncio.gather(*(self.refresh(issuer) for issuer in due)))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _set(self, issuer: Issuer) -> _Set:
        return self._sets.setdefault(issuer.jwks, _Set())

    async def _read(self, issuer: Issuer, held: _Set) -> None:
        import httpx

        try:
            content = await self._content(issuer.jwks)
            keys = held.keys if content == held.content else await asyncio.to_thread(public_keys, content)
        except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            if held.fault is None:
                log.error("the keys of issuer %s cannot be read: %s", issuer.name, str(error) or type(error).__name__)
            held.fault = str(error) or type(error).__name__
            return
        finally:
            held.reading = None
        if held.fault is not None or not held.content:
            log.info("the keys of issuer %s are read", issuer.name)
        held.fault, held.read_at = None, self._ambient.monotonic()
        if content != held.content:
            held.keys, held.content = keys, content
            self.generation += 1

    async def _content(self, jwks: str) -> bytes:
        if jwks.startswith("file:"):
            return await asyncio.to_thread(Path(jwks[5:]).read_bytes)
        if self._client is None:
            self._client = self._open_client()
        async with asyncio.timeout(FETCH_SECONDS), self._client.stream("GET", jwks) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            content = b""
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES} bytes")
            return content


def _every_seconds(issuer: Issuer) -> float:
    return FILE_SECONDS if issuer.jwks.startswith("file:") else URL_SECONDS


def client() -> httpx.AsyncClient:
    """The client that URLs are asked with: no redirects, certificates checked, proxies as the environment says."""
    import httpx

    return httpx.AsyncClient(follow_redirects=False, timeout=FETCH_SECONDS)


def public_keys(content: bytes) -> tuple[PublicKey, ...]:
    """The keys of a set that signatures can be checked with. Raises ValueError where there is none.

    Symmetric keys are no public keys, keys for encryption sign nothing, and what is of an unknown kind is passed over
    as RFC 7517, 5 asks. For a thread: the first one loads jwt, whose cryptography is 9 MB that a replica without
    issuers does without.
    """
    import jwt

    try:
        written = msgspec.json.decode(content, type=_WrittenSet)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a JSON Web Key Set: {error}") from error
    keys = []
    for key in written.keys:
        if key.get("kty") not in ("RSA", "EC", "OKP") or key.get("use", "sig") != "sig" or "d" in key:
            continue
        try:
            public = jwt.PyJWK(key).key
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue
        kid, algorithm = key.get("kid"), key.get("alg")
        keys.append(PublicKey(kid if isinstance(kid, str) else None, algorithm, public))
    if not keys:
        raise ValueError("no key in it can check a signature")
    return tuple(keys)


class _WrittenSet(Struct):
    keys: list[dict[str, Any]]
