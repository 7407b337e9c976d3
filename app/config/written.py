"""The configuration as people type it: one struct a mapping; a key that is not here is a fault."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Literal

from msgspec import Struct, field

from app.wire import Need, Service


class WrittenVendorKey(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    api_key: str
    weight: int = 1
    rpm: int | None = None
    tpm: int | None = None


class WrittenProvider(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    kind: Literal["openai", "azure", "openai_compatible", "anthropic", "gemini", "vertex", "bedrock"]
    vendor: str | None = None
    base_url: str | None = None
    api_key: str | None = None
    keys: dict[str, WrittenVendorKey] = {}
    credentials: str | None = None
    token_url: str | None = None
    api_version: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    region: str | None = None
    trace_context: bool = False


class WrittenTarget(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`priced_as` names the entry of the price table where it is not called `model`: an Azure deployment, an alias."""

    provider: str
    model: str
    serves: Service = "chat"
    priced_as: str | None = None
    drop_params: list[str] = []
    max_output_tokens: int = 8192
    capabilities: list[Need] | None = None
    context_tokens: int | None = None


class WrittenTimeouts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    connect_seconds: float | None = None
    first_token_seconds: float | None = None
    answer_seconds: float | None = None
    idle_seconds: float | None = None
    total_seconds: float | None = None


CacheMode = Literal["off", "exact", "shadow", "static", "verified"]


class WrittenCache(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    mode: CacheMode = "off"
    ttl_seconds: float = 3600.0
    max_temperature: float = 0.0
    kb_revision: str | None = None
    embedder: str = "static"
    embedder_timeout_ms: int = 100
    threshold: float = 0.95
    max_turns: int = 2
    reverify_percent: float = 5.0
    judge: str | None = None
    judge_percent: float = 10.0


Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Order = Literal["written", "cost", "latency"]
Doubt = Literal["schema", "refusal", "length"]
"""Why a cascade may not trust an answer, beside the mean of its log probabilities."""


class WrittenHours(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From one time of the day to before another, past midnight where `to` is not later; a weekday is `from`'s."""

    from_: str = field(default="00:00", name="from")
    to: str = "00:00"
    zone: str = "UTC"
    weekdays: list[Weekday] = []


class WrittenWhen(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that is named must hold."""

    plans: list[str] | None = None
    prompt_tokens_above: int | None = None
    prompt_tokens_up_to: int | None = None
    hours: WrittenHours | None = None
    headers: dict[str, list[str]] = {}
    needs: list[Need] = []


class WrittenCascade(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    targets: list[str]
    escalate: list[Doubt] = field(default_factory=lambda: ["schema", "refusal", "length"])
    mean_logprob_below: float | None = None


class WrittenShadow(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    target: str
    percent: float


class WrittenHedge(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    after_seconds: float
    percent: float = 5


class WrittenWay(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a call goes: the chain, who comes first in it, and who is asked where the answer is doubtful."""

    targets: list[str]
    order: Order = "written"
    weights: dict[str, int] = {}
    cascade: WrittenCascade | None = None


class WrittenRule(WrittenWay, frozen=True, forbid_unknown_fields=True, kw_only=True):
    when: WrittenWhen


class WrittenAlias(WrittenWay, frozen=True, forbid_unknown_fields=True, kw_only=True):
    default_output_tokens: int | None = None
    timeouts: WrittenTimeouts = field(default_factory=WrittenTimeouts)
    cache: WrittenCache = field(default_factory=WrittenCache)
    rules: dict[str, WrittenRule] = {}
    on_context_length: list[str] = []
    on_content_filter: list[str] = []
    guardrails: list[str] = []
    shadow: WrittenShadow | None = None
    hedge: WrittenHedge | None = None


class WrittenGuardrail(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    url: str
    token: str | None = None
    checks: list[Literal["input", "output"]] = field(default_factory=lambda: ["input", "output"])
    timeout_ms: int = 1000
    away: Literal["open", "closed"] = "closed"
    segment_characters: int = 400


Priority = Literal["low", "normal", "high"]
PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high")
"""From the first that is shed in an overload to the last; elsewhere a priority is its place here."""
Mode = Literal["normal", "cache_only", "read_only"]


class WrittenQuota(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    daily_token_cap: int | None = None
    daily_usd: Decimal | None = None
    monthly_usd: Decimal | None = None
    budget_time_zone: str | None = None


class WrittenTenantCache(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    mode: CacheMode | None = None
    store: bool | None = None
    max_bytes: int | None = None
    max_wrong_percent: float | None = None


class WrittenPlan(WrittenQuota, frozen=True, forbid_unknown_fields=True, kw_only=True):
    allowed_models: list[str] | None = None
    downgrade: dict[str, str] | None = None
    tier: str | None = None
    residency: list[str] | None = None
    cache: WrittenTenantCache | None = None
    priority: Priority | None = None
    guardrails: list[str] | None = None
    capture_content: bool | None = None


class WrittenExtendedPlan(WrittenPlan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    extends: str | None = None


class WrittenTenant(WrittenPlan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    plan: str
    environments: list[str] | None = None


class WrittenGlobal(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    rpm: int | None = None
    tpm: int | None = None


Role = Literal["call", "usage"]


class WrittenKey(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    digest: str
    service: str
    tenants: list[str]
    roles: list[Role] = field(default_factory=lambda: ["call"])
    expires: date | None = None
    revoked: date | None = None
    environments: list[str] | None = None
    limits: WrittenQuota = field(default_factory=WrittenQuota)


Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
]  # fmt: skip
"""Signatures by a private key only: with a shared secret the gateway could make the tokens that it believes."""


class WrittenIssuer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    issuer: str
    audience: str | list[str]
    jwks: str
    algorithms: list[Algorithm]
    tenants: list[str]
    tenant_claim: str = "tenant"
    plan_claim: str = "plan"
    service_claim: str = "client_id"
    default_plan: str | None = None
    plans: list[str] | None = None
    leeway_seconds: float = 30
    roles: list[Role] = field(default_factory=lambda: ["call"])
    environments: list[str] | None = None


class WrittenCertificate(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    common_name: str
    service: str
    tenants: list[str]
    roles: list[Role] = field(default_factory=lambda: ["call"])
    environments: list[str] | None = None


class WrittenClasses(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """USD per million tokens, by usage class; of images, seconds and characters, per million of them."""

    input: Decimal | None = None
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None
    audio_input: Decimal | None = None
    image_input: Decimal | None = None
    output: Decimal | None = None
    reasoning: Decimal | None = None
    audio_output: Decimal | None = None
    embedding: Decimal | None = None
    images: Decimal | None = None
    seconds: Decimal | None = None
    characters: Decimal | None = None


class WrittenLongContext(WrittenClasses, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all tokens of a call cost when its input, cached tokens included, is larger than this."""

    above_input_tokens: int


class WrittenRate(WrittenClasses, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prices, and those of calls with a long context. A class left out costs what it costs without this rate."""

    long_context: list[WrittenLongContext] = []


class WrittenWindow(WrittenRate, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The rate between two times of the UTC day, "16:30" to "00:30"; the first window that holds applies."""

    from_: str = field(name="from")
    to: str


class WrittenPrice(WrittenRate, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model's price. A class without one costs what its plain class costs. Service tiers go before windows."""

    service_tiers: dict[str, WrittenRate] = {}
    windows: list[WrittenWindow] = []
    source: str
    checked_on: date


class WrittenDiscount(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was negotiated for a tenant, a target or a provider; where several are named, for calls that meet all."""

    percent: Decimal
    tenant: str | None = None
    target: str | None = None
    provider: str | None = None
    source: str
    checked_on: date


class WrittenRetry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    max_attempts: int = 3
    backoff_base_seconds: float = 0.2
    backoff_cap_seconds: float = 2.0
    cooldown_seconds: float = 30.0
    budget_percent: float = 10.0


class WrittenBreaker(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    failures: int = 5
    percent: float = 50.0
    within_seconds: float = 10.0
    rest_seconds: float = 10.0
    longest_rest_seconds: float = 120.0


Away = Literal["local_share", "open", "closed"]


class WrittenAway(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    rpm: Away = "local_share"
    tpm: Away = "local_share"
    concurrency: Away = "local_share"
    daily_token_cap: Away = "local_share"
    daily_usd: Away = "local_share"
    monthly_usd: Away = "local_share"
    global_rpm: Away = "local_share"
    global_tpm: Away = "local_share"


class WrittenRedis(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    away: WrittenAway = field(default_factory=WrittenAway)
    replicas: int = 2
    timeout_ms: int = 250
    probe_seconds: float = 1.0


class WrittenDrain(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    delay_seconds: float = 4.0
    limit_seconds: float = 1860.0


class WrittenSpool(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    segment_bytes: int = 67_108_864
    segment_seconds: float = 3600.0
    fsync_ms: int = 10
    reserve_bytes: int = 268_435_456


class WrittenWarnings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    at_percent: int = 80
    webhook: str | None = None


class WrittenOverload(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    max_calls: int = 2000
    max_delay_ms: int = 50


class WrittenContent(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    folder: str | None = None
    keep_days: int = 30
    phone_regions: list[str] = []


class WrittenGateway(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    max_body_bytes: int = 20_971_520
    max_bodies_bytes: int = 268_435_456
    default_output_tokens: int = 1024
    start_buffer_bytes: int = 65_536
    timeouts: WrittenTimeouts = field(default_factory=WrittenTimeouts)
    retry: WrittenRetry = field(default_factory=WrittenRetry)
    breaker: WrittenBreaker = field(default_factory=WrittenBreaker)
    redis: WrittenRedis = field(default_factory=WrittenRedis)
    drain: WrittenDrain = field(default_factory=WrittenDrain)
    spool: WrittenSpool = field(default_factory=WrittenSpool)
    warnings: WrittenWarnings = field(default_factory=WrittenWarnings)
    overload: WrittenOverload = field(default_factory=WrittenOverload)
    content: WrittenContent = field(default_factory=WrittenContent)
    mode: Mode = "normal"
    trace_sample_ratio: float = 0.1
    ceiling_input_usd: Decimal = Decimal(100)
    ceiling_output_usd: Decimal = Decimal(500)
    user_id_salt: str = "env:GATEWAY_USER_SALT"
    edge_secret: str | None = None


class Written(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration as people type it, after the overlays."""

    gateway: WrittenGateway = field(default_factory=WrittenGateway)
    providers: dict[str, WrittenProvider]
    targets: dict[str, WrittenTarget]
    aliases: dict[str, WrittenAlias]
    guardrails: dict[str, WrittenGuardrail] = {}
    plans: dict[str, WrittenExtendedPlan]
    tenants: dict[str, WrittenTenant]
    global_: WrittenGlobal = field(default_factory=WrittenGlobal, name="global")
    service_keys: dict[str, WrittenKey] = {}
    issuers: dict[str, WrittenIssuer] = {}
    certificates: dict[str, WrittenCertificate] = {}
    prices: dict[str, dict[str, WrittenPrice]]
    discounts: list[WrittenDiscount] = []
