"""How a provider signs in: with a key of the configuration, or with credentials that are fetched.

`credentials` of a provider names an account whose credentials are fetched:

vertex    file:/run/secrets/account.json, or env:NAME: the JSON key of a service account, as Google gives it out
bedrock   chain: AWS's default chain; profile:NAME: the same for a profile
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct

from app.config.reading import Faults, Secrets
from app.config.running import (
    AWS_KEY,
    BASE_URL,
    NAME,
    Account,
    AwsChain,
    Credential,
    Quota,
    Secret,
    ServiceAccount,
    VendorKey,
)
from app.config.written import WrittenProvider
from app.vendors import Vendor

GOOGLE_TOKEN_URL = re.compile(r"https://(?:[a-z0-9-]+\.googleapis\.com|accounts\.google\.com)/[A-Za-z0-9._/-]*")
"""Where a key file may send us on its own word: a changed one must not hand a signed assertion to somebody else."""
_PROFILE = re.compile(r"profile:([A-Za-z0-9][A-Za-z0-9._-]{0,63})")


class _KeyFile(Struct):
    """The JSON key of a service account, as far as it is used. `private_key` is PEM."""

    client_email: str
    private_key: str
    private_key_id: str
    token_uri: str


_key_file = msgspec.json.Decoder(_KeyFile)


def account(
    provider: WrittenProvider, vendor: Vendor, path: str, secrets: Secrets, faults: Faults, *, needed: bool
) -> Account | None:
    """Where the provider's credential is fetched; None where it has none that is."""
    if provider.token_url is not None and not BASE_URL.fullmatch(provider.token_url):
        faults.add(f"{path}.token_url", "expected an http(s) URL without credentials, query and fragment")
    if provider.token_url is not None and (provider.credentials is None or vendor.account != "google"):
        faults.add(f"{path}.token_url", "is for the credentials of a Google service account")
    if provider.credentials is None:
        return None
    if provider.api_key is not None:
        faults.add(f"{path}.credentials", "stands beside an api_key: sign in with one of them")
    if vendor.account == "google":
        return _service_account(provider, f"{path}.credentials", secrets, faults, needed)
    if vendor.account == "aws":
        match = _PROFILE.fullmatch(provider.credentials)
        if match is None and provider.credentials != "chain":
            faults.add(f"{path}.credentials", "expected chain, or profile:NAME")
        return AwsChain(match[1] if match else None, provider.region or "")
    faults.add(f"{path}.credentials", "this kind of provider signs in with an api_key")
    return None


def _service_account(
    provider: WrittenProvider, path: str, secrets: Secrets, faults: Faults, needed: bool
) -> ServiceAccount | None:
    written = secrets.resolve(provider.credentials, path, faults, needed, document=True).reveal()
    if not written:
        return None
    try:
        key = _key_file.decode(written)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        faults.add(path, "is not the JSON key of a Google service account")
        return None
    token_url = provider.token_url or key.token_uri
    if provider.token_url is None and not GOOGLE_TOKEN_URL.fullmatch(token_url):
        faults.add(path, "its token_uri is not Google's; name it as token_url if it is meant")
    return ServiceAccount(key.client_email, Secret(key.private_key), key.private_key_id, token_url)


def credential(
    provider: WrittenProvider, vendor: Vendor, path: str, secrets: Secrets, faults: Faults, *, needed: bool
) -> Credential:
    """From the one key, or from the parts of an AWS access key; empty where it is fetched, or none is needed."""

    def secret(name: str) -> Secret | None:
        reference = getattr(provider, name)
        return None if reference is None else secrets.resolve(reference, f"{path}.{name}", faults, needed)

    key, parts = secret("api_key"), {name: secret(name) for name in AWS_KEY}
    written = [name for name, part in parts.items() if part is not None]
    aws = vendor.account == "aws"
    if written and not aws:
        faults.add(f"{path}.{written[0]}", "is for kind bedrock; this kind has an api_key")
    elif written and (key is not None or provider.credentials is not None):
        faults.add(f"{path}.{written[0]}", "stands beside another way to sign in: keep one of them")
    elif written:
        for name in AWS_KEY[:2]:
            if parts[name] is None:
                faults.add(f"{path}.{name}", "is required: an access key has an id and a secret")
    elif key is None and not vendor.keyless and provider.credentials is None and not provider.keys:
        faults.add(f"{path}.{'credentials' if vendor.account else 'api_key'}", "is required")
    access_key_id, secret_access_key, session_token = parts.values()
    return Credential(
        secret=key or secret_access_key or Secret(""),
        access_key_id=access_key_id.reveal() if access_key_id else "",
        session_token=session_token,
        region=(provider.region or "") if aws else "",
    )


def pool(
    name: str, provider: WrittenProvider, vendor: Vendor, path: str, secrets: Secrets, faults: Faults, *, needed: bool
) -> tuple[VendorKey, ...]:
    """The keys among which one is chosen per attempt; none where the provider has one credential."""
    if provider.keys and (vendor.account == "aws" or provider.api_key is not None or provider.credentials is not None):
        faults.add(f"{path}.keys", "stands beside another way to sign in: keep one of them")
    keys = []
    for key_name, key in provider.keys.items():
        here = f"{path}.keys.{key_name}"
        if not NAME.fullmatch(key_name):
            faults.add(here, f"a name here matches {NAME.pattern}")
        if key is None:
            continue
        if not 1 <= key.weight <= 1000:
            faults.add(f"{here}.weight", "must be from 1 to 1000")
        for limit in ("rpm", "tpm"):
            value = getattr(key, limit)
            if value is not None and value < 1:
                faults.add(f"{here}.{limit}", "must be above 0; leave it out for no limit")
        secret = secrets.resolve(key.api_key, f"{here}.api_key", faults, needed)
        keys.append(VendorKey(f"{name}:{key_name}", Credential(secret), key.weight, Quota(rpm=key.rpm, tpm=key.tpm)))
    return tuple(keys)
