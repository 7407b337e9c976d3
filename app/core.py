"""The words of a call: what travels (`Call`, `Reply`), what is noted (`Exchange`), what remains (`LedgerEvent`)."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Raw, Struct, field
from msgspec.structs import astuple

from app.ambient import Patience
from app.config import UNKNOWN, Config, Price, ServiceKey, Target, Tenant
from app.errors import GatewayError
from app.wire import Operation, Request, Units

Status = Literal["success", "error", "refused", "rate_limited", "blocked", "client_closed", "interrupted", "timeout"]
Purpose = Literal["client", "shadow", "reverify", "judge", "embedding"]
GATEWAY_TENANT = "_gateway"
"""The reserved tenant of calls whose purpose is not `client`; no configured name can equal it."""


class Usage(Struct, frozen=True, gc=False, omit_defaults=True):
    """Tokens of one call in disjoint classes; their sum is the vendor's total. Beside them other units.

    `cache_write_1h` are Anthropic's cache writes that live for an hour, which cost more than those of 5 minutes.
    `images` made, `seconds` heard and `characters` spoken stand where the vendor is paid by those.
    """

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    audio_input: int = 0
    image_input: int = 0
    output: int = 0
    reasoning: int = 0
    audio_output: int = 0
    embedding: int = 0
    images: int = 0
    seconds: int = 0
    characters: int = 0

    def is_plain(self) -> bool:
        """Whether it is text in and text out, and nothing else."""
        return not (
            self.cache_read
            or self.cache_write
            or self.cache_write_1h
            or self.audio_input
            or self.image_input
            or self.reasoning
            or self.audio_output
            or self.embedding
            or self.images
            or self.seconds
            or self.characters
        )

    @property
    def total_input(self) -> int:
        return (
            self.input + self.cache_read + self.cache_write + self.cache_write_1h + self.audio_input + self.image_input
        )

    @property
    def total_output(self) -> int:
        return self.output + self.reasoning + self.audio_output

    @property
    def total(self) -> int:
        return self.total_input + self.total_output + self.embedding

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def estimate(operation: Operation, input_tokens: int, output_tokens: int, units: Units | None = None) -> Usage:
    """What stands for the usage of a call that no vendor reported. What makes nothing is free."""
    if operation in ("count_tokens", "moderations", "retrieve", "delete"):
        return Usage()
    if units is not None:
        return Usage(images=units.images, seconds=units.seconds, characters=units.characters)
    if operation == "embeddings":
        return Usage(embedding=input_tokens)
    return Usage(input=input_tokens, output=output_tokens)


class Cost(Struct, frozen=True, gc=False):
    """Nano-dollars (1e-9 USD) of one call. `priced` is False where the ceiling price stood in for a missing one."""

    input_nanos: int = 0
    output_nanos: int = 0
    priced: bool = True

    @property
    def total_nanos(self) -> int:
        return self.input_nanos + self.output_nanos

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.input_nanos + other.input_nanos, self.output_nanos + other.output_nanos, self.priced and other.priced
        )


def _charge(tokens: int, nanos_per_million: int) -> int:
    """Nano-dollars of one usage class, rounded once, half to even."""
    millionths = tokens * nanos_per_million
    return (millionths + 499_999 + (millionths // 1_000_000 & 1)) // 1_000_000


MOST_IMAGES = 250_000_000_000_000
MOST_SECONDS = 1_000_000_000_000
MOST_CHARACTERS = 100_000_000_000
"""What a million of each costs whose price nobody wrote down: above the dearest of vendors' lists (2026-11: 0.25 USD an
image, 0.0001 USD a second, 30 USD a million characters)."""


def cost(usage: Usage, price: Price, priced: bool = True) -> Cost:
    """What `usage` costs by `price`: each class rounded once, the total is the sum of the classes."""
    input_nanos = _charge(usage.input, price.input)
    output_nanos = _charge(usage.output, price.output)
    if usage.is_plain():
        return Cost(input_nanos, output_nanos, priced)
    input_nanos += (
        _charge(usage.cache_read, price.cache_read)
        + _charge(usage.cache_write, price.cache_write)
        + _charge(usage.cache_write_1h, price.cache_write_1h)
        + _charge(usage.audio_input, price.audio_input)
        + _charge(usage.image_input, price.image_input)
        + _charge(usage.embedding, price.embedding)
    )
    output_nanos += _charge(usage.reasoning, price.reasoning) + _charge(usage.audio_output, price.audio_output)
    if usage.images or usage.seconds or usage.characters:
        for units, nanos, most in (
            (usage.images, price.images, MOST_IMAGES),
            (usage.seconds, price.seconds, MOST_SECONDS),
            (usage.characters, price.characters, MOST_CHARACTERS),
        ):
            priced = priced and (nanos != UNKNOWN or not units)
            output_nanos += _charge(units, most if nanos == UNKNOWN else nanos)
    return Cost(input_nanos, output_nanos, priced)


def charge(usage: Usage, target: Target, tenant_id: str | None, service_tier: str | None, at: float) -> Cost:
    """What `usage` costs a tenant at a target; `service_tier` as the vendor names it, `at` the call's arrival."""
    return cost(usage, target.price_for(tenant_id, usage, service_tier, at), target.priced)


class Expected(Struct, frozen=True, gc=False):
    """What a call costs at `target`, before anybody has counted."""

    target: Target
    cost: Cost


def dearest(usage: Usage, targets: Sequence[Target], tenant_id: str | None, at: float) -> Expected:
    """What `usage` costs a tenant at the dearest of `targets`."""
    if len(targets) == 1:
        target = targets[0]
    elif usage.is_plain():
        given, made, most = usage.input, usage.output, -1
        for one in targets:
            price = one.price_for(tenant_id, usage, None, at)
            about = given * price.input + made * price.output
            if about > most:
                most, target = about, one
    else:
        target = max(targets, key=lambda one: charge(usage, one, tenant_id, None, at).total_nanos)
    return Expected(target, charge(usage, target, tenant_id, None, at))


def saved_nanos(usage: Usage, target: Target, tenant_id: str | None, at: float) -> int:
    """What a cache hit saved: the price, at the target that would have been asked, of the answer that was kept.

    Prompt tokens that the vendor had read from or written to its own cache count at what they cost there and then, for
    nobody knows what they would cost again. Nothing where the price is unknown: a ceiling is no saving.
    """
    return charge(usage, target, tenant_id, None, at).total_nanos if target.priced else 0


NOTHING = Raw(b"0")


def usd(nanos: int) -> Raw:
    """Nano-dollars as a JSON number in dollars with at most nine decimals, without passing through a float."""
    if 0 < nanos < 1_000_000_000:  # nearly every amount
        return Raw((b"0.%09d" % nanos).rstrip(b"0"))
    if nanos == 0:
        return NOTHING
    sign, nanos = (b"-", -nanos) if nanos < 0 else (b"", nanos)
    whole, rest = divmod(nanos, 1_000_000_000)
    if not rest:
        return Raw(b"%b%d" % (sign, whole))
    return Raw((b"%b%d.%09d" % (sign, whole, rest)).rstrip(b"0"))


# --- the ledger's event: schema cost-ledger-v1 ------------------------------------------------------------------


class EventUsage(Struct, frozen=True, gc=False):
    """`input_tokens` and `output_tokens` are the vendor's totals; `classes` splits them without overlap."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    embedding_tokens: int
    classes: Usage


class EventCost(Struct, frozen=True, gc=False):
    """USD as JSON numbers with at most nine decimals."""

    input: Raw
    output: Raw
    total: Raw
    price_table_version: str


class EventLatency(Struct, frozen=True, gc=False):
    """Milliseconds. `gateway` is what we added: total less the cache's and the vendor's time."""

    gateway: float
    cache_lookup: float
    provider: float
    total: float


Role = Literal["chain", "escalation", "hedge", "context_length", "content_filter", "shadow"]
"""How an attempt came about: by the alias's chain; after a doubtful answer; beside a slow attempt; after a refusal; as
a copy of another call."""


class Attempt(Struct, frozen=True, gc=False, omit_defaults=True):
    """One request to a vendor: `outcome` is `success`, a `VendorError.fault`, or what cut it short.

    The one that answered is the one whose outcome is `success`, else the last. `doubtful` is one whose answer was not
    taken, for its `doubt`; `outrun` one that another was faster than. For these two the tenant pays: `usage` and
    `cost_usd` of that `model`, the prompt by estimate where the vendor has not counted, are part of the row's own sums.
    `estimated_usd` is
    not: it is what the vendor may charge for an attempt that fell silent or broke off and was followed by another.
    `key` names the one of the provider's keys that signed, `<provider>:<key>`; null where it has one.
    """

    target: str
    provider: str
    outcome: str
    status: int | None
    started_ms: float
    duration_ms: float
    vendor_request_id: str | None = None
    estimated_usd: Raw = NOTHING
    key: str | None = None
    role: Role = "chain"
    doubt: str | None = None
    model: str | None = None
    service_tier: str | None = None
    usage: EventUsage | None = None
    cost_usd: EventCost | None = None


class LedgerEvent(
    Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True, tag_field="$schema", tag="cost-ledger-v1"
):
    """One call, whatever became of it. The guide's fields first, with its names and nesting; ours after them.

    What has a default is not written where it says nothing else, here and in its parts: a third of a row's bytes was
    names of members that were null.

    A row with `adjusts` is no call: it corrects the cost of the call with that `event_id`, and has no tokens. Its
    `cost_status` is `repriced` where the call had been charged at the ceiling, `unpriced`. `alias_requested` is what
    the client asked for where a budget that was nearly used up put `model_alias`, a cheaper one, in its place. `rule`
    names the one of the alias's rules that the call went by.
    """

    event_id: str
    timestamp: str
    request_id: str
    trace_id: str
    tenant_id: str | None
    feature_id: str | None
    user_id_hash: str | None
    model_alias: str | None
    model_resolved: str | None
    provider: str | None
    region: str | None
    cache_hit: bool
    usage: EventUsage
    cost_usd: EventCost
    latency_ms: EventLatency
    status: Status
    fallback_chain: tuple[str, ...]
    fallback_used: bool
    rate_limit_tier: str | None
    prompt_version: str | None
    guardrail_blocked: bool
    purpose: Purpose
    tenant_claimed: str | None = None
    key_id: str
    environment: str
    config_version: str
    stream: bool
    ttft_ms: float | None = None
    finish_reason: str | None = None
    vendor_request_id: str | None = None
    attempts: tuple[Attempt, ...]
    usage_source: Literal["vendor", "estimated", "none"]
    cost_status: Literal["priced", "unpriced", "repriced", "none"]
    cache_kind: str | None = None
    similarity: float | None = None
    saved_usd: Raw
    service_tier: str | None = None
    adjusts: str | None = None
    error_code: str | None = None
    limit_tripped: str | None = None
    operation: Operation
    alias_requested: str | None = None
    rule: str | None = None


class Intent(Struct, frozen=True, array_like=True, gc=False):
    """What is known before the first vendor byte: enough for a row if the process dies in mid-call."""

    event_id: str
    timestamp: str
    request_id: str
    trace_id: str
    tenant_id: str
    feature_id: str | None
    user_id_hash: str | None
    alias: str
    model: str
    provider: str
    region: str | None
    tier: str | None
    prompt_version: str | None
    key_id: str
    environment: str
    config_version: str
    stream: bool
    input_tokens: int
    output_tokens: int
    input_nanos: int
    output_nanos: int
    priced: bool
    price_version: str
    chain: tuple[str, ...]
    operation: Operation = "chat"
    alias_requested: str | None = None
    purpose: Purpose = "client"


def interrupted(intent: Intent) -> LedgerEvent:
    """The row of a call whose process died: charged at the estimate that was reserved for it."""
    usage = estimate(intent.operation, intent.input_tokens, intent.output_tokens)
    return LedgerEvent(
        event_id=intent.event_id,
        timestamp=intent.timestamp,
        request_id=intent.request_id,
        trace_id=intent.trace_id,
        tenant_id=intent.tenant_id,
        feature_id=intent.feature_id,
        user_id_hash=intent.user_id_hash,
        model_alias=intent.alias,
        model_resolved=intent.model,
        provider=intent.provider,
        region=intent.region,
        cache_hit=False,
        usage=event_usage(usage),
        cost_usd=event_cost(Cost(intent.input_nanos, intent.output_nanos, intent.priced), intent.price_version),
        latency_ms=EventLatency(0.0, 0.0, 0.0, 0.0),
        status="interrupted",
        fallback_chain=intent.chain,
        fallback_used=False,
        rate_limit_tier=intent.tier,
        prompt_version=intent.prompt_version,
        guardrail_blocked=False,
        key_id=intent.key_id,
        environment=intent.environment,
        config_version=intent.config_version,
        stream=intent.stream,
        attempts=(),
        usage_source="estimated",
        cost_status="priced" if intent.priced else "unpriced",
        saved_usd=usd(0),
        error_code="process_died",
        operation=intent.operation,
        alias_requested=intent.alias_requested,
        purpose=intent.purpose,
    )


def event_usage(usage: Usage) -> EventUsage:
    given, made = usage.total_input, usage.total_output
    return EventUsage(given, made, given + made + usage.embedding, usage.embedding, usage)


def event_cost(cost: Cost, price_version: str) -> EventCost:
    return EventCost(usd(cost.input_nanos), usd(cost.output_nanos), usd(cost.total_nanos), price_version)


# --- the call -----------------------------------------------------------------------------------------------------


class Dialect(Struct, frozen=True):
    """What a route's clients speak: how a request is read, and how an error is written, whole or to end a stream.

    `read` raises InvalidRequest. `name` finds the translators that answer in this dialect: `dialects.translator`.
    Errors are told the request's id, which `id_headers` carry; one that ends a stream also which frames were sent last,
    empty before the first, as its events may be numbered. `rate_headers` writes the figures of limits, as lines of a
    head; it is told the time, in unix seconds. `methods` are those that the route takes.
    `relayed` are headers of the client that go on to a vendor which speaks the dialect itself, as far as they match.
    """

    name: str
    read: Callable[[bytes], Request]
    error_body: Callable[[GatewayError, str | None], bytes]
    error_frames: Callable[[GatewayError, str, bytes], bytes]
    rate_headers: Callable[[Rates, float], bytes]
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    relayed: Mapping[bytes, re.Pattern[str]] = {}
    methods: tuple[str, ...] = ("POST",)


class Wishes(Struct, frozen=True, gc=False):
    """What a call's headers say of keeping its answer.

    `fresh` (Cache-Control: no-cache): none from before; `max_age` none older, in seconds; `store` False (no-store):
    this one is not kept. `kb_revision`: the knowledge that it comes from; `tags`: its documents. `idempotency_key`: the
    call is the same as every other of that key.
    """

    fresh: bool = False
    store: bool = True
    max_age: float | None = None
    kb_revision: str | None = None
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None


CacheKind = Literal["exact", "semantic", "coalesced", "idempotent"]


class Recalled(Struct, frozen=True, gc=False):
    """Whose answer it was that a call got without a vendor's being asked: by which model, at which provider.

    `usage` is what it had cost, for what was saved; `age_seconds` since it was kept.
    """

    kind: CacheKind
    provider: str | None = None
    model: str | None = None
    usage: Usage | None = None
    age_seconds: float = 0.0
    similarity: float | None = None


class Call(Struct, frozen=True, kw_only=True):
    """One call with a valid credential, made once at reception; the configuration snapshot is pinned in it.

    `fault` is what reception found wrong (a body too large, a forged header): it travels in the call, so that it
    leaves a row like any other outcome. `received_at` is unix seconds and, as text, the time that intent and event
    carry (`occurred_at`); `started` is the monotonic clock. `trace_id` is 32 hexadecimal digits (W3C trace context).
    `metadata` has those of its headers that routing rules look at, by lower-case name.
    """

    event_id: str
    request_id: str
    received_at: float
    occurred_at: str
    started: float
    config: Config
    key: ServiceKey
    dialect: Dialect
    body: bytes
    fault: GatewayError | None = None
    tenant_claimed: str | None = None
    feature_id: str | None = None
    user_id_hash: str | None = None
    prompt_version: str | None = None
    tokens_hint: int = 0
    trace_id: str
    parent_span_id: int | None = None
    trace_state: str | None = None
    sampled: bool = False
    relayed: tuple[tuple[str, str], ...] = ()
    wishes: Wishes | None = None
    metadata: Mapping[bytes, str] = {}

    @property
    def named(self) -> dict[str, str]:
        """What a line of the log about this call carries, as its `extra`."""
        return {"request_id": self.request_id, "trace_id": self.trace_id}


Headers = Sequence[tuple[bytes, bytes]]


def written(headers: Headers) -> bytes:
    """Headers as lines of a head, each with its end. Raises ValueError where one has a line break inside."""
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers):
        raise ValueError("a header has a line break")
    return lines


class Reply(Struct, frozen=True):
    """What goes back: a status, lines of a head, and frames. Of a unary answer the first frame is the only one."""

    status: int
    head: bytes
    first: bytes
    frames: AsyncGenerator[bytes, None] | None = None


class Rates(Struct, frozen=True, gc=False):
    """The tightest limits on a call's requests and tokens, for its answer's headers. None: no such limit.

    `remaining_*` are the values after the call's reservation; `reset_*_seconds` the time until it is whole again.
    """

    limit_requests: int | None
    remaining_requests: int | None
    reset_requests_seconds: float
    limit_tokens: int | None
    remaining_tokens: int | None
    reset_tokens_seconds: float


FETCH_LEASE_MS = 5_000
"""How long a call may be the one that asks without a word from its replica: what a crash costs those that wait."""


class Fetch(Struct, frozen=True, gc=False):
    """What a reservation brings along: the answer from before, else a lease to ask for it. Redis's names of the three.

    `used` has the tenant's answers by last use.
    """

    entry: str
    lease: str
    used: str


class Reservation(Struct, frozen=True, gc=False):
    """What `limits.reserve` holds for a call until `limits.settle`.

    `held` is False when Redis was away and this replica let the call pass by its own counts. `fetched` is what it
    brought along: bytes of an answer, else whether the lease is this call's. None: Redis was not asked.
    """

    call_id: str
    tenant_id: str
    tokens: int
    held: bool = True
    rates: Rates | None = None
    fetched: bytes | bool | None = None


Cut = Literal["client_closed", "drain", "deadline"]

GAP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Upper bounds of the classes that waits between a stream's chunks are counted in."""


class Pace(Struct, eq=False):
    """How a stream's chunks followed each other: from one's leaving for the client to the next one's. Seconds.

    `first` and `last` are when the first and the last one left; before the first, `last` is when it was waited for.
    `gaps` counts by GAP_SECONDS, with one more class for what is above.
    """

    last: float
    first: float | None = None
    longest_gap: float = 0.0
    gaps: list[int] = field(default_factory=lambda: [0] * (len(GAP_SECONDS) + 1))

    def chunk(self, now: float) -> None:
        """One has left."""
        if self.first is None:
            self.first = now
        else:
            gap = now - self.last
            if gap > self.longest_gap:
                self.longest_gap = gap
            self.gaps[bisect_left(GAP_SECONDS, gap)] += 1
        self.last = now

    @property
    def chunks(self) -> int:
        return 0 if self.first is None else 1 + sum(self.gaps)

    @property
    def gaps_seconds(self) -> float:
        """All of them together."""
        return 0.0 if self.first is None else self.last - self.first


FIRST_ATTEMPT = 16
"""The place of a call's first request to a vendor among its spans: `span_id`."""


def span_id(event_id: str, place: int) -> int:
    """The id of one of a call's spans: the random half of the event's id, counted up. Unique in its trace.

    So an id that a vendor is told before the call is over is known when its span is built.
    """
    return (int(event_id[19:23] + event_id[24:], 16) + place) & 0xFFFF_FFFF_FFFF_FFFF or 1


class Exchange(Struct, kw_only=True, eq=False):
    """The notes on one call: the only mutable record. Written along the journey, read once at settlement.

    `done` is set where an answer was good to its end: what is neither done, cut nor an error is a defect.
    `alias_requested` is set where `request` names the alias that a downgrade put in its place.
    `cut` says who ended the call before its answer did; whoever cancels the task sets it first. `patience` cancels it
    too, where a vendor does not answer in time.
    `sized` is what `prompt_size.size` says of the request, where its tokens are counted by that. `expected` is what was
    reserved for it, where that is by its tokens alone.
    `text_bytes` is the size of the answer's text, for an estimate where the vendor reported no usage; `prompt` what it
    told of the prompt before the answer was cut.
    `rates` is what the answer says of limits. `charged` is what the row says that the call cost; `row` is the event
    as the spool has it.
    `authorized` and `reserved` are when the call had passed those rooms, on the monotonic clock; 0 where it has not.
    `rule` names the routing rule that won. `attempts` are in the order in which they began, and `served` is the place
    of the one that answers. `beside` is what the others cost the tenant. `escalated` is why another answer was sought
    than the first, `hedged` whether a second target was asked beside the first, `shadowed` whether a third got a copy.
    `doubted`: the answer is doubtful, and served for want of a better one.
    `grant` is what the call holds of its vendor's key, where the key's vendor grants so much and no more.
    `left`: its client hung up, and it went on for others that listen. `sent` are the last frames of a stream that left,
    `send` lets more of them leave and tells whether there is room for the next, where its reader takes them at once.
    `memory` is what the call has to do with answers from before, where anything (`recall.Memory`). `recalled` is set
    where it was answered by one, at a target's price that was saved: `spared`. `looking` is when the cache was asked,
    on the monotonic clock.
    """

    call: Call
    patience: Patience
    purpose: Purpose = "client"
    request: Request | None = None
    alias_requested: str | None = None
    tenant: Tenant | None = None
    reservation: Reservation | None = None
    grant: Reservation | None = None
    rates: Rates | None = None
    content_type: bytes = b"application/json"
    sized: tuple[int, int] | None = None
    expected: Expected | None = None
    input_tokens_estimate: int = 0
    output_tokens_estimate: int = 0
    target: Target | None = None
    rule: str | None = None
    attempts: list[Attempt] = []
    served: int = -1
    beside: list[tuple[Usage, Cost]] = []
    escalated: str | None = None
    hedged: bool = False
    shadowed: bool = False
    doubted: bool = False
    chain: tuple[str, ...] = ()
    authorized: float = 0.0
    reserved: float = 0.0
    pace: Pace | None = None
    first_token: float = 0.0
    provider_seconds: float = 0.0
    model_resolved: str | None = None
    vendor_request_id: str | None = None
    finish_reason: str | None = None
    service_tier: str | None = None
    usage: Usage | None = None
    charged: Cost | None = None
    prompt: Usage | None = None
    text_bytes: int = 0
    error: GatewayError | None = None
    done: bool = False
    cut: Cut | None = None
    left: bool = False
    sent: bytes = b""
    send: Callable[[bytes], bool] | None = None
    memory: Any = None
    recalled: Recalled | None = None
    spared: Target | None = None
    looking: float = 0.0
    cache_seconds: float = 0.0
    event: LedgerEvent | None = None
    row: bytes | None = None
