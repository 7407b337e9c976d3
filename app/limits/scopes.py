"""Which limits a call takes from: its tenant's, its service key's, and those that all tenants share."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Struct

from app.config import Away, Config, Quota, ServiceKey, Tenant, VendorKey, WrittenAway
from app.core import FETCH_LEASE_MS, Fetch, Rates, usd
from app.errors import BudgetExceeded, LimitError, RateLimitExceeded
from app.redis_cluster import slot_of, slot_tags
from app.redis_pipe import TEXT, Open, prepared

Kind = Literal["rpm", "tpm", "concurrency", "daily_tokens", "daily_usd", "monthly_usd"]
WHOLE = "rl:{_global}:whole"
"""The key that says that daily and monthly counters are whole: see budgets.py."""
WINDOWS = ("rpm", "tpm")
BUDGETS = ("daily_tokens", "daily_usd", "monthly_usd")
RECORD_SECONDS = 93_600
"""How long it is known what a call had reserved, from when on: a day, the longest total timeout, and two hours."""
LEASE_MS = 30_000
"""How long a call counts as running without a word from its replica: what a crash costs in concurrency."""
RETRY_CONCURRENCY_SECONDS = 1.0
"""A running call may end at any time; nobody knows when."""
RETRY_SHARE_SECONDS = 5.0
"""Redis may be back at any time, and with it the whole of a budget."""
WINDOW_SECONDS = 61
"""The seconds that a window counts: the current one and the sixty before it."""
ANSWERED = -1
"""In the place of a call's tokens, where an answer from before was found in another slot: reserve.lua says it."""
EMPTIED = 3
"""What a script answers that found neither a counter nor the mark that there was none to find."""
MOST = 2**53 - 1
"""The largest amount that a script counts exactly; no limit is higher."""
_AMOUNT = Open(b"$16\r\n%016d\r\n")
"""With as many digits as MOST has, so that its length is known."""
_DIGIT = Open(b"$1\r\n%d\r\n")


class Limit(Struct, frozen=True, gc=False):
    """One limit. `value` in requests, calls at once, tokens or nano-dollars; `ends`: unix seconds, budgets only.

    `whose` begins the sentence of a refusal. `away` is what holds without Redis. A budget is nearly used up where no
    more than `nearly` is left of it.
    """

    name: str
    kind: Kind
    key: str
    value: int
    whose: str
    away: Away
    ends: int = 0
    time_zone: str = "UTC"
    nearly: int = -1

    @property
    def period(self) -> str:
        return "month" if self.kind == "monthly_usd" else "day"

    def figure(self, value: int) -> str:
        """An amount of a budget as people read it."""
        return f"{value} tokens" if self.kind == "daily_tokens" else f"{bytes(usd(value)).decode()} USD"

    def amount(self, tokens: int, nanos: int) -> int:
        """What a call takes from it."""
        if self.kind in ("tpm", "daily_tokens"):
            return tokens
        return nanos if self.kind in ("daily_usd", "monthly_usd") else 1


Placed = tuple[int, Limit]
"""A limit with its place in what a script answers."""


class Scope(Struct, frozen=True):
    """All limits of a call in one script, all or nothing, and all that can be known of it before a call.

    The names of budgets' keys hold from `starts` until before `ends`, unix seconds. What a call took is noted under
    `record` and its id. A script's keys share a slot of a Redis Cluster: the braces in a key's name make its owner the
    hash tag, so there the script is over the tenant's keys alone, and the service key's and the global ones are in
    `apart`, a scope for each; `limits` are all of them, in that order.
    """

    limits: tuple[Limit, ...]
    starts: int
    ends: int
    record: str
    record_bytes: int
    keys: tuple[str, ...]
    reserving: bytes
    fetching: bytes
    settling: bytes
    """The commands, as `redis_pipe.prepared` makes them, but for what a call says."""
    running: tuple[str, ...]
    """Keys of `concurrency` limits."""
    budgets: tuple[Placed, ...]
    """The daily and monthly limits."""
    shown_requests: tuple[Placed, ...]
    shown_tokens: tuple[Placed, ...]
    """Those of which clients are told."""
    apart: tuple[Scope, ...] = ()
    whole: str = WHOLE
    """The mark that the counters of the script's keys are whole."""

    def reserve(self, call_id: str, tokens: int, nanos: int, fetch: Fetch | None = None) -> bytes:
        """The command for reserve.lua; `tokens` ANSWERED where an answer from before was found."""
        call = call_id.encode()
        size = self.record_bytes + len(call)
        if fetch is None:
            return self.reserving % (size, call, tokens, nanos)
        entry, lease, used = fetch.entry.encode(), fetch.lease.encode(), fetch.used.encode()
        return self.fetching % (size, call, len(entry), entry, len(lease), lease, len(used), used, tokens, nanos)

    def settle(self, call_id: str, requests: int, tokens: int, nanos: int) -> bytes:
        """The command for settle.lua; `requests` 0 gives the call back."""
        call = call_id.encode()
        return self.settling % (self.record_bytes + len(call), call, requests, tokens, nanos)

    def first(self, count: int) -> Scope:
        """The same with so many of its limits."""
        return msgspec.structs.replace(self, **_placed(self.limits[:count]))


class Scripts(Struct, frozen=True):
    """By which digests they are asked for. `apart`: each owner's limits lie in a slot of their own."""

    reserve: bytes
    settle: bytes
    apart: bool = False


def make_scope(config: Config, tenant: Tenant, key: ServiceKey, now: float, scripts: Scripts) -> Scope | None:
    """The scope of a tenant's calls by a service key at `now`; None where nothing is limited."""
    away = config.settings.redis.away
    shared = Quota(rpm=config.global_quota.rpm, tpm=config.global_quota.tpm)
    spare_percent = 100 - config.settings.warn_at_percent
    tenant_tag, key_tag = tenant.id, f"_key.{key.id}"
    owners = {
        tenant_tag: [*_limits("tenant", tenant_tag, f"Tenant {tenant.id}", tenant.quota, away, now, spare_percent)],
        key_tag: [*_limits("key", key_tag, f"The service key {key.id}", key.quota, away, now, spare_percent)],
        "_global": [*_limits("global", "_global", "All tenants together", shared, away, now)],
    }
    found = [each for limits in owners.values() for each in limits]
    if not found:
        return None
    if not scripts.apart:
        return _scope(tenant_tag, found, scripts)
    first, *others = (_scope(tag, limits, scripts) for tag, limits in owners.items() if limits or tag == tenant_tag)
    return msgspec.structs.replace(
        _scope(tenant_tag, found, scripts), keys=first.keys, reserving=first.reserving, fetching=first.fetching,
        settling=first.settling, apart=tuple(others), whole=first.whole,
    )  # fmt: skip


def grant_scope(key: VendorKey, scripts: Scripts) -> Scope:
    """The scope of what a vendor grants one of its keys; without Redis it is the vendor's to count."""
    away = WrittenAway(rpm="open", tpm="open")
    tag = f"_vendor.{key.name}"
    found = list(_limits("vendor_key", tag, f"The vendor's key {key.name}", key.quota, away, 0))
    return _scope(tag, found, scripts)


def _scope(tag: str, found: list[tuple[Limit, int]], scripts: Scripts) -> Scope:
    limits = tuple(limit for limit, _ in found)
    starts = max((starts for _, starts in found), default=0)
    ends = min((limit.ends for limit in limits if limit.ends), default=MOST)
    keys = tuple(limit.key for limit in limits)
    whole = whole_mark(slot_of(f"{{{tag}}}")) if scripts.apart else WHOLE
    record = f"rl:{{{tag}}}:call:"
    noted = Open(b"$%d\r\n" + record.encode().replace(b"%", b"%%") + b"%b\r\n")
    id_begins = len(record.encode()) + 1
    call = id_begins, RECORD_SECONDS, LEASE_MS, _AMOUNT, _AMOUNT, starts, ends
    asked = [word for limit in limits for word in (limit.kind, limit.value)]
    kinds = [limit.kind for limit in limits]
    return Scope(
        **_placed(limits),
        starts=starts,
        ends=ends,
        record=record,
        record_bytes=id_begins - 1,
        keys=keys,
        reserving=prepared("EVALSHA", scripts.reserve, 2 + len(keys), noted, *keys, whole, *call, *asked),
        fetching=prepared(
            "EVALSHA", scripts.reserve, 5 + len(keys), noted, *keys, whole, TEXT, TEXT, TEXT,
            *call, *asked, FETCH_LEASE_MS,
        ),
        settling=prepared(
            "EVALSHA", scripts.settle, 1 + len(keys), noted, *keys, id_begins, _DIGIT, _AMOUNT, _AMOUNT, *kinds
        ),
        running=tuple(limit.key for limit in limits if limit.kind == "concurrency"),
        whole=whole,
    )  # fmt: skip


def _placed(limits: tuple[Limit, ...]) -> dict[str, tuple[Limit, ...] | tuple[Placed, ...]]:
    """A scope's limits, and which of them are looked at for what."""
    placed = tuple(enumerate(limits))
    shown = [each for each in placed if not each[1].name.startswith("global_")]
    return {
        "limits": limits,
        "budgets": tuple(each for each in placed if each[1].kind in BUDGETS),
        "shown_requests": tuple(each for each in shown if each[1].kind == "rpm"),
        "shown_tokens": tuple(each for each in shown if each[1].kind in ("tpm", "daily_tokens")),
    }


def whole_mark(slot: int) -> str:
    """The mark of a cluster's slot that the counters in it are whole."""
    return f"rl:{{{slot_tags()[slot]}}}:whole"


def _limits(
    owner: str, tag: str, whose: str, quota: Quota, away: WrittenAway, now: float, spare_percent: int = 0
) -> Iterator[tuple[Limit, int]]:
    """An owner's limits, each with the second from which its key's name holds."""
    prefix = f"rl:{{{tag}}}:"
    rates = {"rpm": quota.rpm, "tpm": quota.tpm, "concurrency": quota.concurrency}
    for kind, value in rates.items():
        if value is not None:
            policy = getattr(away, f"{owner}_{kind}" if owner == "global" else kind)
            yield Limit(f"{owner}_{kind}", kind, prefix + kind, value, whose, policy), 0
    budgets = {
        "daily_tokens": (quota.daily_tokens, away.daily_token_cap),
        "daily_usd": (quota.daily_nanos, away.daily_usd),
        "monthly_usd": (quota.monthly_nanos, away.monthly_usd),
    }
    for kind, (value, policy) in budgets.items():
        if value is not None:
            name, starts, ends = period(kind == "monthly_usd", quota.time_zone, now)
            key = f"{prefix}{kind}:{name}"
            nearly = value * spare_percent // 100
            yield Limit(f"{owner}_{kind}", kind, key, value, whose, policy, ends, quota.time_zone, nearly), starts


def owner_of(limit: Limit) -> str:
    """A tenant's name, or `_key.` and a service key's id: what the braces in the key's name hold."""
    return limit.key[len("rl:{") :].partition("}")[0]


def budgets_of(owner: str, id: str, quota: Quota, now: float) -> Iterator[Limit]:
    """A tenant's or service key's daily and monthly limits at `now`."""
    tag = f"_key.{id}" if owner == "key" else id
    for limit, _ in _limits(owner, tag, "", quota, WrittenAway(), now):
        if limit.kind in BUDGETS:
            yield limit


def period(monthly: bool, time_zone: str, now: float) -> tuple[str, int, int]:
    """The name of the budget day (`20261123`) or month (`202611`) at `now`, and the unix seconds of its two ends."""
    zone = ZoneInfo(time_zone)
    today = datetime.fromtimestamp(now, zone).date()
    if monthly:
        first = today.replace(day=1)
        after = (first + timedelta(days=31)).replace(day=1)
        return f"{first:%Y%m}", _midnight(first, zone), _midnight(after, zone)
    return f"{today:%Y%m%d}", _midnight(today, zone), _midnight(today + timedelta(days=1), zone)


def _midnight(day: date, zone: ZoneInfo) -> int:
    """Where a clock change skips midnight, the moment of the change."""
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())


# --- what clients are told --------------------------------------------------------------------------------------------


def rates(scope: Scope, left: list[int], now_ms: int) -> Rates:
    """The figures of the tightest limits on requests and on tokens; those that all tenants share are not shown."""
    requests, requests_left, requests_wait = _tightest(scope.shown_requests, left, now_ms)
    tokens, tokens_left, tokens_wait = _tightest(scope.shown_tokens, left, now_ms)
    return Rates(requests, requests_left, requests_wait, tokens, tokens_left, tokens_wait)


def _tightest(shown: tuple[Placed, ...], left: list[int], now_ms: int) -> tuple[int | None, int | None, float]:
    """A limit's value, what is left of it, and the seconds until it is whole again."""
    tightest: Limit | None = None
    least = MOST
    for place, limit in shown:
        if left[place] < least:  # MOST is left of one that is open while Redis is away
            least, tightest = left[place], limit
    if tightest is None:
        return None, None, 0.0
    ends = tightest.ends or now_ms // 1000 + WINDOW_SECONDS
    return tightest.value, least if least > 0 else 0, ends - now_ms / 1000


def refusal(
    scope: Scope, left: list[int], waits_ms: list[int], tokens: int, nanos: int, now_ms: int, *, share: bool = False
) -> LimitError:
    """The error of the limit that is in the way for longest.

    `waits_ms` is below 0 for what is not in the way, and known for windows. `share`: what is left is this replica's
    share while Redis is away.
    """
    longest: tuple[float, LimitError] | None = None
    for limit, remaining, wait_ms in zip(scope.limits, left, waits_ms, strict=True):
        if wait_ms < 0:
            continue
        amount = limit.amount(tokens, nanos)
        if limit.kind in WINDOWS:
            wait_seconds = wait_ms / 1000
        elif limit.kind == "concurrency":
            wait_seconds = RETRY_CONCURRENCY_SECONDS
        else:
            wait_seconds = min(limit.ends - now_ms / 1000, RETRY_SHARE_SECONDS if share else float("inf"))
        lasts = float("inf") if amount > limit.value else wait_seconds
        if longest is None or lasts > longest[0]:
            longest = lasts, _error(limit, amount, remaining, wait_seconds, share)
    assert longest is not None
    error = longest[1]
    error.rates = rates(scope, left, now_ms)
    return error


def _error(limit: Limit, amount: int, remaining: int, wait_seconds: float, share: bool) -> LimitError:
    """A sentence that names the limit, its value, and what to do."""
    budget = limit.kind in BUDGETS
    above = amount > limit.value
    if budget:
        figures = (
            f"has a budget of {limit.figure(limit.value)} per {limit.period} ({limit.time_zone}) with "
            f"{limit.figure(max(0, remaining))} left; this call may need {limit.figure(amount)}."
        )
    elif limit.kind == "concurrency":
        figures = f"has its limit of {limit.value} calls at once running."
    elif limit.kind == "rpm":
        figures = f"has used its limit of {limit.value} requests in any 60 seconds."
    else:
        figures = (
            f"has a limit of {limit.value} tokens in any 60 seconds with {max(0, remaining)} left; "
            f"this call may need {amount}."
        )
    if limit.name.startswith("global_"):
        figures = figures.replace("has ", "have ", 1).replace(" its ", " their ", 1)
    if above:
        advice = "Waiting does not help: lower max_tokens or shorten the prompt."
    elif share:
        advice = f"Each replica admits a share of it while Redis is away. Send it again in {wait_seconds:.1f} seconds."
    elif budget:
        advice = f"Lower max_tokens, or wait for the next {limit.period}, in {wait_seconds:.0f} seconds."
    elif limit.kind == "concurrency":
        advice = "Send it again when one of them has ended."
    else:
        advice = f"Send it again in {wait_seconds:.1f} seconds."
    return (BudgetExceeded if budget else RateLimitExceeded)(
        f"{limit.whose} {figures} {advice}",
        limit=limit.name,
        retry_after_seconds=wait_seconds,
        should_retry=False if above or (budget and not share) else None,
    )
