"""Who calls, for whom, and what they may use: tables."""

from __future__ import annotations

import hashlib

import pytest

from app.auth import allow, authorize, identify
from app.config import (
    Config,
    Secret,
    ServiceKey,
    Settings,
    Tenant,
    WrittenDrain,
    WrittenRedis,
    WrittenRetry,
    WrittenSpool,
)
from app.errors import (
    GatewayError,
    InvalidApiKey,
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    TenantNotAllowed,
    TenantRequired,
)
from tests.test_routing import alias

KEY = "sk-gw-k3f9a0b1c2d4-" + "a" * 43
OLD_KEY = "sk-gw-000000000000-" + "b" * 43
WIDE_KEY = "sk-gw-111111111111-" + "c" * 43
EXPIRES = 1_800_000_000.0


def key(text: str, tenants: frozenset[str] | None, expires: float | None = None) -> tuple[bytes, ServiceKey]:
    return hashlib.sha256(text.encode()).digest(), ServiceKey(text[6:18], "support-bot", tenants, expires)


def tenant(name: str, *models: str) -> Tenant:
    return Tenant(name, "free", "free", None if models == ("*",) else frozenset(models), None, None)


CONFIG = Config(
    version="0123456789ab",
    environment="dev",
    settings=Settings(
        max_body_bytes=1,
        start_buffer_bytes=1,
        longest_seconds=1.0,
        retry=WrittenRetry(),
        redis=WrittenRedis(),
        drain=WrittenDrain(),
        spool=WrittenSpool(),
        trace_sample_ratio=0.0,
        user_id_salt=Secret("salt"),
    ),
    aliases={"support-fast": alias("a"), "support-quality": alias("b")},
    tenants={t.id: t for t in [tenant("acme-corp", "support-fast"), tenant("tools", "*"), tenant("nobody")]},
    keys=dict(
        [
            key(KEY, frozenset({"acme-corp", "gone"})),
            key(OLD_KEY, frozenset({"acme-corp"}), EXPIRES),
            key(WIDE_KEY, None),
        ]
    ),
    global_tpm=None,
    price_version="2026-11-01",
)


@pytest.mark.parametrize(
    ("authorization", "api_key", "found"),
    [
        (f"Bearer {KEY}", None, KEY),
        (f"bearer {KEY}", None, KEY),
        (f"BEARER  {KEY} ", None, KEY),
        (None, KEY, KEY),
        (None, f" {KEY} ", KEY),
        (f"Bearer {KEY}", WIDE_KEY, KEY),
        (f"Bearer {OLD_KEY}", None, OLD_KEY),
    ],
)
def test_a_known_credential_is_identified(authorization: str | None, api_key: str | None, found: str) -> None:
    assert identify(CONFIG, authorization, api_key, EXPIRES - 1).id == found[6:18]


@pytest.mark.parametrize(
    ("authorization", "api_key", "now", "says"),
    [
        (None, None, 0, "is required"),
        (None, "", 0, "is required"),
        ("", None, 0, "must read"),
        ("Bearer", None, 0, "is required"),
        ("Bearer ", None, 0, "is required"),
        ("Bearer   ", None, 0, "is required"),
        (f"Basic {KEY}", None, 0, "must read"),
        (KEY, None, 0, "must read"),
        (f"Bearer {KEY[:-1]}", None, 0, "unknown"),
        (f"Bearer {KEY}x", None, 0, "unknown"),
        (f"Bearer {KEY.upper()}", None, 0, "unknown"),
        (f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}", None, 0, "unknown"),
        ("Bearer sk-proj-of-a-vendor", None, 0, "vendor keys do not work"),
        ("Bearer \ud800é", None, 0, "unknown"),
        ("Basic x", KEY, 0, "must read"),
        (f"Bearer {OLD_KEY}", None, EXPIRES, "expired"),
    ],
)
def test_any_other_credential_is_refused_with_a_reason(
    authorization: str | None, api_key: str | None, now: float, says: str
) -> None:
    with pytest.raises(InvalidApiKey, match=says) as raised:
        identify(CONFIG, authorization, api_key, now)
    assert KEY not in raised.value.message


def for_whom(credential: str, claimed: str | None) -> Tenant:
    return authorize(CONFIG, CONFIG.keys[hashlib.sha256(credential.encode()).digest()], claimed)


@pytest.mark.parametrize(("credential", "claimed"), [(KEY, "acme-corp"), (WIDE_KEY, "tools"), (WIDE_KEY, "acme-corp")])
def test_a_key_acts_for_its_tenants(credential: str, claimed: str) -> None:
    assert for_whom(credential, claimed).id == claimed


@pytest.mark.parametrize(
    ("credential", "claimed", "error"),
    [
        (KEY, None, TenantRequired),
        (KEY, "", TenantRequired),
        (KEY, "tools", TenantNotAllowed),
        (KEY, "gone", TenantNotAllowed),
        (KEY, "no-such-tenant", TenantNotAllowed),
        (WIDE_KEY, "no-such-tenant", TenantNotAllowed),
        (WIDE_KEY, "*", InvalidRequest),
        (WIDE_KEY, "_gateway", InvalidRequest),
        (WIDE_KEY, "acme-corp\n", InvalidRequest),
        (WIDE_KEY, "acme-corp:rl", InvalidRequest),
        (WIDE_KEY, "{acme-corp}", InvalidRequest),
        (WIDE_KEY, "a" * 65, InvalidRequest),
        (WIDE_KEY, "ácme", InvalidRequest),
    ],
)
def test_any_other_tenant_is_refused(credential: str, claimed: str | None, error: type[GatewayError]) -> None:
    with pytest.raises(GatewayError) as raised:
        for_whom(credential, claimed)
    assert type(raised.value) is error


def test_a_tenant_that_does_not_exist_looks_like_one_that_is_not_allowed() -> None:
    said = []
    for claimed in ("tools", "absent"):
        with pytest.raises(TenantNotAllowed) as raised:
            for_whom(KEY, claimed)
        said.append(raised.value.message.replace(claimed, "X"))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("tenant_id", "model", "error"),
    [
        ("acme-corp", "support-fast", None),
        ("acme-corp", "support-quality", ModelNotAllowed),
        ("acme-corp", "gpt-4o", ModelNotFound),
        ("tools", "support-fast", None),
        ("tools", "support-quality", None),
        ("tools", "*", ModelNotFound),
        ("nobody", "support-fast", ModelNotAllowed),
    ],
)
def test_a_tenant_may_use_the_aliases_it_is_allowed(
    tenant_id: str, model: str, error: type[GatewayError] | None
) -> None:
    if error is None:
        assert allow(CONFIG, CONFIG.tenants[tenant_id], model) is CONFIG.aliases[model]
        return
    with pytest.raises(error) as raised:
        allow(CONFIG, CONFIG.tenants[tenant_id], model)
    assert (type(raised.value), raised.value.param) == (error, "model")
