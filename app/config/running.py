"""The configuration as the code reads it: frozen, checked, every default filled in, every name resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date

import msgspec
from msgspec import Struct

from app.config.tariff import Price, Tariff, Used
from app.config.written import (
    PRIORITIES,
    CacheMode,
    Doubt,
    Mode,
    Order,
    WrittenBreaker,
    WrittenContent,
    WrittenDrain,
    WrittenOverload,
    WrittenRedis,
    WrittenRetry,
    WrittenSpool,
)
from app.wire import Need, Service

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Tenants, features and aliases: no such name can forge a Redis key or a path."""
TARGET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
KEY_ID = re.compile(r"[a-z0-9]{12}")
SERVICE_KEY = re.compile(r"sk-gw-([a-z0-9]{12})-[A-Za-z0-9_-]{43}")
"""The shape of a service key; the first group is its public id."""
BASE_URL = re.compile(
    r"https?://(?:[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.?|\[[0-9a-fA-F:]+\])"
    r"(?::(?P<port>\d{1,5}))?(?:/[A-Za-z0-9._~/-]*)?"
)
API_VERSION = re.compile(r"20\d\d-\d\d-\d\d(-preview)?")
AWS_REGION = re.compile(r"[a-z]{2,3}(-[a-z]+)+-\d{1,2}")
AWS_KEY = ("access_key_id", "secret_access_key", "session_token")
"""The parts of an AWS access key; the last is for temporary ones."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Secret:
    """A value that must not be shown: `reveal()` is called only where it is put on the wire."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class Credential(Struct, frozen=True):
    """What signs a request to a vendor: an API key or bearer token; at AWS the secret access key with its id.

    `region` is the AWS region that the signature is for.
    """

    secret: Secret
    access_key_id: str = ""
    session_token: Secret | None = None
    region: str = ""


class ServiceAccount(Struct, frozen=True):
    """A Google service account. Its key is exchanged for access tokens at `token_url`."""

    email: str
    key: Secret
    key_id: str
    token_url: str


class AwsChain(Struct, frozen=True):
    """AWS's default chain: environment, profile, web identity, container or instance. `profile` None is the default."""

    profile: str | None = None
    region: str = ""


Account = ServiceAccount | AwsChain
"""Where credentials are fetched that expire."""


class VendorKey(Struct, frozen=True):
    """One of a provider's keys: `name` is `<provider>:<key>`, `weight` its share of the calls.

    `quota` is what the vendor grants it, in requests and tokens per 60 seconds.
    """

    name: str
    credential: Credential
    weight: int
    quota: Quota


class Provider(Struct, frozen=True):
    """A vendor's endpoint. `kind` is its translator's name, `base_url` has no trailing slash.

    With an `account`, the credential is fetched; with `keys`, one of them is chosen per attempt. `credential` is empty
    then. `trace_context`: its requests carry the call's W3C trace context.
    """

    name: str
    kind: str
    base_url: str
    credential: Credential
    region: str | None
    api_version: str | None = None
    account: Account | None = None
    keys: tuple[VendorKey, ...] = ()
    trace_context: bool = False


class Target(Struct, frozen=True):
    """One pinned model at one provider: `name` is `<provider>/<model>` as the chain shows it.

    `drop_params` names the request's members that are left out here where the vendor cannot carry them. `serves` says
    what the model is for. `price` is what calls usually cost; where that depends on the call, `tariff` says on what,
    and a tenant may have one of its own. `priced_as` is the model's name in the price table.
    `max_output_tokens` is the length of an answer whose request names none, for vendors that must be told one.
    `capabilities` and `context_tokens` are what the model has room for; None: it is not known, and taken for enough.
    """

    name: str
    provider: Provider
    model: str
    price: Price
    priced: bool
    drop_params: frozenset[str] = frozenset()
    serves: Service = "chat"
    max_output_tokens: int = 8192
    priced_as: str = ""
    tariff: Tariff | None = None
    tenant_tariffs: Mapping[str, Tariff] = {}
    capabilities: frozenset[Need] | None = None
    context_tokens: int | None = None

    def price_for(self, tenant_id: str | None, used: Used, service_tier: str | None, at: float) -> Price:
        """The price of one call; `at` is when it arrived, unix seconds."""
        tariff = self.tenant_tariffs.get(tenant_id, self.tariff) if self.tenant_tariffs else self.tariff
        return self.price if tariff is None else tariff.price(used, service_tier, at)

    @property
    def usual(self) -> Price | None:
        """The price of every call that names no service tier; None where that depends on the call."""
        tariff = self.tariff
        if self.tenant_tariffs or (tariff is not None and (tariff.windows or tariff.rate.long_context)):
            return None
        return self.price if tariff is None else tariff.rate.price


class Timeouts(Struct, frozen=True, gc=False):
    """Seconds. `total` bounds the call with all its attempts. Per attempt: `first_token` the wait for a stream's first
    content, `answer` for a whole unary answer, `idle` between two chunks.
    """

    connect: float
    first_token: float
    answer: float
    idle: float
    total: float


class AliasCache(Struct, frozen=True):
    """How an alias's answers are kept. `max_temperature`: the highest whose answers are; None asked counts as 1.

    `answers_by` is a digest of what answers, models and their addresses: other models never answer with these answers.

    Of the semantic modes: `embedder` makes vectors of questions; `threshold` is the least cosine in mode static;
    conversations of more than `max_turns` user turns are not looked up; `reverify` is the share of hits that are asked
    again behind the caller's back. `embedder` is a local model or an alias, and has `embedder_seconds`; `judge` is the
    alias that says of a share of answers (`judge_share`) whether two are the same.
    """

    mode: CacheMode
    ttl_seconds: float
    max_temperature: float
    kb_revision: str | None
    answers_by: bytes
    embedder: str = "static"
    threshold: float = 0.95
    max_turns: int = 2
    reverify: float = 0.05
    embedder_seconds: float = 0.1
    judge: str | None = None
    judge_share: float = 0.1


class TenantCache(Struct, frozen=True):
    """What a tenant's policy says of the cache. `mode` None: each alias's own; it counts where the alias has a cache.

    `store` False: nothing of its answers is kept anywhere. `max_bytes` bounds what is kept, by last use. `max_wrong`:
    the share of requests that mode verified may answer wrongly.
    """

    mode: CacheMode | None = None
    store: bool = True
    max_bytes: int = 67_108_864
    max_wrong: float = 0.01


CACHED = TenantCache()


class Guardrail(Struct, frozen=True):
    """A service that is asked about texts. `checks`: prompts (`input`), answers (`output`).

    `fails_open`: what it does not answer in time passes. A stream is checked at the ends of sentences, and at
    `segment_characters` without one.
    """

    name: str
    url: str
    token: Secret | None
    checks: frozenset[str]
    timeout_seconds: float
    fails_open: bool
    segment_characters: int


class Hours(Struct, frozen=True, gc=False):
    """From second `start` of the local day to before second `end`, past midnight where `end` is not larger.

    `zone` is an IANA name; `weekdays` counts from Monday, 0, and means the day on which the hours begin.
    """

    start: int
    end: int
    zone: str
    weekdays: frozenset[int]


class When(Struct, frozen=True):
    """What must hold for a rule to win; None and empty ask nothing. Prompts are measured in tokens, by estimate.

    `headers`: by lower-case name the values that the client's header may have, `*` any.
    """

    plans: frozenset[str] | None = None
    tokens_above: int | None = None
    tokens_up_to: int | None = None
    hours: Hours | None = None
    headers: tuple[tuple[bytes, frozenset[str]], ...] = ()
    needs: frozenset[Need] = frozenset()


class Cascade(Struct, frozen=True):
    """Whom a doubtful answer is taken to, and what makes it doubtful.

    `doubts` are a failed schema, a refusal, the end of its room; `mean_logprob` is the least mean of its tokens' log
    probabilities.
    """

    targets: tuple[Target, ...]
    doubts: frozenset[Doubt]
    mean_logprob: float | None = None


class Shadow(Struct, frozen=True):
    """A target that gets a copy of `percent` of an alias's calls; nobody waits for its answers or pays for them."""

    target: Target
    percent: float


class Hedge(Struct, frozen=True):
    """A second target is asked too, where the first says nothing for so long; at most for `percent` of the calls."""

    after_seconds: float
    percent: float


class Alias(Struct, frozen=True):
    """What apps ask for: a chain of targets, tried in order. All of them serve the same.

    `order` and `weights` (one for each target, where there are any) say who comes first. The first of `rules` that
    holds has the call go by another alias in this one's place: the same name, another way. The targets of
    `on_context_length` and `on_content_filter` come after a refusal of that kind. `routed` is True where the way
    depends on the call. `cache` None: it is off.
    Two follow from the others: `reach` is where a call may go by this way, a cascade's targets apart, and `dear` has
    those of it where a call may cost the most, by its estimate and as long as that is of text alone.
    """

    name: str
    targets: tuple[Target, ...]
    chain: tuple[str, ...]
    default_output_tokens: int
    timeouts: Timeouts
    serves: Service = "chat"
    cache: AliasCache | None = None
    order: Order = "written"
    weights: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    cascade: Cascade | None = None
    on_context_length: tuple[Target, ...] = ()
    on_content_filter: tuple[Target, ...] = ()
    shadow: Shadow | None = None
    hedge: Hedge | None = None
    routed: bool = False
    guardrails: tuple[Guardrail, ...] = ()
    reach: tuple[Target, ...] = ()
    dear: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        reach = self.targets + self.on_context_length + self.on_content_filter
        msgspec.structs.force_setattr(self, "reach", reach)
        msgspec.structs.force_setattr(self, "dear", _dear(reach))

    @property
    def everywhere(self) -> tuple[Target, ...]:
        """Every target that may answer its calls, whatever way they go."""
        ways = (self, *(rule.alias for rule in self.rules))
        return tuple(target for way in ways for target in (*way.reach, *(way.cascade.targets if way.cascade else ())))

    def along(self, targets: tuple[Target, ...]) -> Alias:
        """The same with another chain."""
        return msgspec.structs.replace(self, targets=targets, chain=tuple(target.name for target in targets))


def _dear(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """Without those where input and output both cost no more than at another of them."""
    prices = [target.usual for target in targets]
    if None in prices:
        return targets
    return tuple(
        target
        for place, (target, price) in enumerate(zip(targets, prices, strict=True))
        if not any(
            other.input >= price.input
            and other.output >= price.output
            and ((other.input, other.output) != (price.input, price.output) or at < place)
            for at, other in enumerate(prices)
        )
    )


class Rule(Struct, frozen=True):
    """`alias` is the way of the calls for which `when` holds; it has no rules itself."""

    name: str
    when: When
    alias: Alias


class Quota(Struct, frozen=True, gc=False):
    """How much its owner (a tenant, a service key, all tenants together) may use; None means unlimited.

    `rpm`, `tpm`: requests and tokens in any 60 seconds. `concurrency`: calls at once. `daily_tokens`; `daily_nanos` and
    `monthly_nanos` in nano-dollars: per day and month that begin at midnight in `time_zone` (an IANA name).
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    daily_tokens: int | None = None
    daily_nanos: int | None = None
    monthly_nanos: int | None = None
    time_zone: str = "UTC"


UNLIMITED = Quota()


class Tenant(Struct, frozen=True):
    """A billing and policy boundary. `allowed_models` None means every alias.

    `residency`: the regions whose providers may serve it; None means any. `downgrade`: by alias, the cheaper one that
    serves in its place when a budget is nearly used up. `priority` is a place in PRIORITIES.
    `capture_content`: its prompts and answers are kept, redacted.
    """

    id: str
    plan: str
    tier: str
    allowed_models: frozenset[str] | None
    quota: Quota = UNLIMITED
    residency: frozenset[str] | None = None
    capture_content: bool = False
    downgrade: Mapping[str, str] = {}
    cache: TenantCache = CACHED
    priority: int = PRIORITIES.index("normal")
    guardrails: tuple[Guardrail, ...] = ()

    def allows(self, alias: str) -> bool:
        return self.allowed_models is None or alias in self.allowed_models


class ServiceKey(Struct, frozen=True):
    """Who calls, by a key, a token or a certificate. `tenants` None means every configured tenant.

    `expires` is unix seconds. `roles`: with `call` it may call models, with `usage` it may read what its tenants have
    used. A token may name a `plan`, for tenants without a row, and the one tenant that a call without a header is for.
    """

    id: str
    service: str
    tenants: frozenset[str] | None
    expires: float | None
    revoked: bool = False
    roles: frozenset[str] = frozenset({"call"})
    plan: str | None = None
    default_tenant: str | None = None
    quota: Quota = UNLIMITED

    def may_act_for(self, tenant: str) -> bool:
        return self.tenants is None or tenant in self.tenants


class Issuer(Struct, frozen=True):
    """Whose tokens (JWT) are believed, and about whom: `tenants` by name, `tenant_prefixes` by how names begin.

    `issuer` is the tokens' `iss`; `jwks` where its public keys are: `https://` or `file:`. The claims are names in the
    token; `plans` None means that it may name any.
    """

    name: str
    issuer: str
    audiences: tuple[str, ...]
    jwks: str
    algorithms: frozenset[str]
    tenants: frozenset[str]
    tenant_prefixes: tuple[str, ...]
    tenant_claim: str
    plan_claim: str
    service_claim: str
    default_plan: str | None
    plans: frozenset[str] | None
    leeway_seconds: float
    roles: frozenset[str] = frozenset({"call"})

    def may_name(self, tenant: str) -> bool:
        return tenant in self.tenants or tenant.startswith(self.tenant_prefixes)


class Settings(Struct, frozen=True):
    """The `gateway` section, with every default filled in. `longest_seconds`: the longest total over all aliases.

    `mode` is the one that the files ask for; the control channel may ask for a stricter one (`modes.py`).
    A budget is nearly used up from `warn_at_percent` on; `warnings_webhook` is the address that is told, a secret too.
    """

    max_body_bytes: int
    start_buffer_bytes: int
    longest_seconds: float
    retry: WrittenRetry
    redis: WrittenRedis
    drain: WrittenDrain
    spool: WrittenSpool
    trace_sample_ratio: float
    user_id_salt: Secret
    edge_secret: Secret | None = None
    max_bodies_bytes: int = 268_435_456
    breaker: WrittenBreaker = WrittenBreaker()
    warn_at_percent: int = 80
    warnings_webhook: Secret | None = None
    content: WrittenContent = WrittenContent()
    overload: WrittenOverload = WrittenOverload()
    mode: Mode = "normal"


class Config(Struct, frozen=True):
    """One immutable snapshot. `keys` is by SHA-256 digest of the whole key; `version` by content.

    `issuers` is by the tokens' `iss`, `certificates` by the subject's common name. `plans` holds what a tenant of that
    plan is, with the plan's name for its own. `price_version` is the date of the price table; `prices_checked_on` the
    oldest check of a price in use. `routing_headers` are those of the client's that a rule looks at.
    """

    version: str
    environment: str
    settings: Settings
    aliases: Mapping[str, Alias]
    tenants: Mapping[str, Tenant]
    keys: Mapping[bytes, ServiceKey]
    global_quota: Quota
    price_version: str
    prices_checked_on: date | None = None
    targets: Mapping[str, Target] = {}
    plans: Mapping[str, Tenant] = {}
    issuers: Mapping[str, Issuer] = {}
    certificates: Mapping[str, ServiceKey] = {}
    routing_headers: frozenset[bytes] = frozenset()
