"""Who calls, for whom, and what they may use: tables."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from urllib.parse import quote_plus

import msgspec
import pytest

from app.auth import Callers, allow, allowed, authorize
from app.config import (
    UNLIMITED,
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
    return Tenant(name, "free", "free", None if models == ("*",) else frozenset(models))


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
    global_quota=UNLIMITED,
    price_version="2026-11-01",
)


class NoTokens:
    """Stands for `Tokens` where none is sent."""

    def known(self, *_: object) -> None:
        return None


def identify(
    config: Config, authorization: str | None, api_key: str | None, now: float, revoked: Container[str] = ()
) -> ServiceKey | None:
    headers = {b"authorization": authorization, b"x-api-key": api_key}
    sent = {name: value for name, value in headers.items() if value is not None}
    return Callers(NoTokens(), revoked).known(config, sent, now)


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


def test_a_key_that_the_channel_revoked_is_refused() -> None:
    with pytest.raises(InvalidApiKey, match="was revoked"):
        identify(CONFIG, f"Bearer {KEY}", None, 0, {KEY[6:18]})


def test_a_key_that_the_file_revoked_is_refused() -> None:
    keys = {digest: msgspec.structs.replace(key, revoked=True) for digest, key in CONFIG.keys.items()}
    with pytest.raises(InvalidApiKey, match="was revoked"):
        identify(msgspec.structs.replace(CONFIG, keys=keys), f"Bearer {KEY}", None, 0)


# --- certificates -----------------------------------------------------------------------------------------------------


EDGE = "edge-secret"
CERTIFIED = msgspec.structs.replace(
    CONFIG,
    settings=msgspec.structs.replace(CONFIG.settings, edge_secret=Secret(EDGE)),
    certificates={"billing": ServiceKey("cert.billing", "billing", frozenset({"acme-corp"}), None)},
)


def certified(said: str, edge: str | None = EDGE, config: Config = CERTIFIED, **more: str) -> ServiceKey | None:
    headers = {b"x-forwarded-tls-client-cert-info": said, b"x-gateway-edge": edge}
    headers |= {name.encode(): value for name, value in more.items()}
    return Callers(NoTokens()).known(config, {name: value for name, value in headers.items() if value is not None}, 0)


@pytest.mark.parametrize(
    "said", ["Subject%3D%22CN%3Dbilling%22", "Subject%3D%22CN%3Dbilling%22%2CSubject%3D%22CN%3DIssuing+CA%22"]
)
def test_a_certificate_that_the_edge_vouches_for_is_its_service(said: str) -> None:
    assert certified(said).id == "cert.billing"


@pytest.mark.parametrize("edge", [None, "", "edge-secret ", "Edge-secret", "é"])
def test_a_certificate_without_the_edge_s_secret_is_nothing(edge: str | None) -> None:
    with pytest.raises(InvalidApiKey, match="is required"):
        certified("Subject%3D%22CN%3Dbilling%22", edge)


def test_no_certificate_is_believed_where_no_edge_secret_is_configured() -> None:
    for edge in (None, "", "None"):
        with pytest.raises(InvalidApiKey, match="is required"):
            certified(
                "Subject%3D%22CN%3Dbilling%22", edge, msgspec.structs.replace(CERTIFIED, settings=CONFIG.settings)
            )


@pytest.mark.parametrize(
    "said", ["", "billing", "Subject%3D%22CN%3D%22", "CN%3Dbilling", "Subject%3D%22O%3Dx%2CCN%3Dbilling%22x", "%"]
)
def test_a_subject_that_is_no_common_name_is_nothing(said: str) -> None:
    with pytest.raises(InvalidApiKey, match="is required"):
        certified(said)


@pytest.mark.parametrize("name", ["Billing", "billing2", "O=Acme,CN=billing", "Issuing CA"])
def test_a_certificate_of_no_configured_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidApiKey, match="no service of its name"):
        certified(quote_plus(f'Subject="CN={name}",Subject="CN=billing"'))


def test_a_key_counts_before_a_certificate() -> None:
    assert certified("Subject%3D%22CN%3Dbilling%22", authorization=f"Bearer {KEY}").id == KEY[6:18]


def test_a_wrong_key_is_not_made_up_for_by_a_certificate() -> None:
    with pytest.raises(InvalidApiKey, match="unknown"):
        certified("Subject%3D%22CN%3Dbilling%22", authorization="Bearer wrong")


# --- tenants ----------------------------------------------------------------------------------------------------------


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


# --- a tenant that only a token names ---------------------------------------------------------------------------------


TOKEN = ServiceKey("jwt.sso", "sso", frozenset({"new-corp", "acme-corp"}), None, plan="free", default_tenant="new-corp")
PLANNED = msgspec.structs.replace(CONFIG, plans={"free": tenant("free", "support-fast")})


def test_a_tenant_without_a_row_has_the_plan_that_the_token_names() -> None:
    made = authorize(PLANNED, TOKEN, "new-corp")
    assert made == msgspec.structs.replace(PLANNED.plans["free"], id="new-corp")


def test_a_tenant_s_row_counts_before_the_token_s_plan() -> None:
    assert authorize(PLANNED, TOKEN, "acme-corp") is PLANNED.tenants["acme-corp"]


def test_a_token_for_one_tenant_needs_no_header() -> None:
    assert authorize(PLANNED, TOKEN, None).id == "new-corp"


@pytest.mark.parametrize("plan", [None, "gone"])
def test_a_tenant_without_row_and_plan_is_refused(plan: str | None) -> None:
    with pytest.raises(TenantNotAllowed):
        authorize(PLANNED, msgspec.structs.replace(TOKEN, plan=plan), "new-corp")


def test_a_token_may_not_act_for_a_tenant_that_it_does_not_name() -> None:
    with pytest.raises(TenantNotAllowed):
        authorize(PLANNED, TOKEN, "tools")


# --- models -----------------------------------------------------------------------------------------------------------


def regional(*regions: str) -> Tenant:
    return msgspec.structs.replace(tenant("regional", "*"), residency=frozenset(regions))


def in_regions(*regions: str | None) -> Config:
    """The tables, with an alias `spread` of one target in each region."""
    base = alias("a")
    targets = tuple(
        msgspec.structs.replace(
            base.targets[0],
            name=f"{region}/m",
            provider=msgspec.structs.replace(base.targets[0].provider, name=str(region), region=region),
        )
        for region in regions
    )
    spread = msgspec.structs.replace(base, targets=targets, chain=tuple(target.name for target in targets))
    return msgspec.structs.replace(CONFIG, aliases={"spread": spread})


def test_only_targets_in_the_tenant_s_regions_may_serve_it() -> None:
    found = allow(in_regions("us", "eu", None, "eu-north"), regional("eu"), "spread")
    assert found.chain == ("eu/m",)
    assert [target.name for target in found.targets] == ["eu/m"]


def test_a_tenant_without_residency_may_be_served_anywhere() -> None:
    config = in_regions("us", None)
    assert allow(config, tenant("t", "*"), "spread") is config.aliases["spread"]


def test_an_alias_without_a_target_in_the_tenant_s_regions_is_refused_and_not_listed() -> None:
    config = in_regions("us", None)
    with pytest.raises(ModelNotAllowed):
        allow(config, regional("eu"), "spread")
    assert allowed(config, regional("eu")) == []
    assert allowed(config, regional("us")) == ["spread"]


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
