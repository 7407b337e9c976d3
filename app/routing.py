"""The way to an answer: which rule, which targets, in which order, how often, and after what wait. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from zlib import crc32
from zoneinfo import ZoneInfo

from msgspec import Struct

from app.config import Alias, Hours, Target, When, WrittenRetry
from app.cooldowns import is_resting
from app.core import Role, charge, estimate
from app.errors import (
    DeadlineExceeded,
    GatewayError,
    UnsupportedParameter,
    UpstreamMisconfigured,
    UpstreamUnavailable,
    VendorCannot,
    VendorError,
    VendorKeyFull,
    VendorMisconfigured,
    VendorRefused,
    VendorThrottled,
)

# --- which way ------------------------------------------------------------------------------------------------------


class Facts(Struct, frozen=True, kw_only=True):
    """What a call's way is chosen by. `at` is unix seconds; `headers` by lower-case name.

    `place` is uniform in [0, 1) over users, and the same for all calls of one: weights share out users, not calls.
    """

    tenant: str
    plan: str
    input_tokens: int
    output_tokens: int
    at: float
    headers: Mapping[bytes, str] = {}
    needs: frozenset[str] = frozenset()
    place: float = 0.0


def place(alias: str, user: str) -> float:
    """Where a user stands among all users of an alias; the same on every replica, and another for another alias."""
    return crc32(f"{alias}:{user}".encode()) / 2**32


_NEEDS = {
    "vision": re.compile(rb'"type"\s*:\s*"(?:image_url|image|input_image)"'),
    "audio": re.compile(rb'"type"\s*:\s*"input_audio"'),
    "tools": re.compile(rb'"tools"\s*:\s*\[\s*\{'),
    "json_schema": re.compile(rb'"type"\s*:\s*"json_schema"'),
}
"""What a request says where it wants more than text, in every dialect. Inside a text its quotes would be escaped."""


def needs(body: bytes) -> frozenset[str]:
    """What a request wants of a model beyond text."""
    return frozenset(need for need, said in _NEEDS.items() if said.search(body))


def misfit(when: When, facts: Facts) -> str | None:
    """Why a rule does not hold for a call; None where it does."""
    if when.plans is not None and facts.plan not in when.plans:
        return f"the plan is {facts.plan}, not {_either(when.plans)}"
    if when.tokens_above is not None and facts.input_tokens <= when.tokens_above:
        return f"the prompt has about {facts.input_tokens} tokens, not above {when.tokens_above}"
    if when.tokens_up_to is not None and facts.input_tokens > when.tokens_up_to:
        return f"the prompt has about {facts.input_tokens} tokens, not up to {when.tokens_up_to}"
    if when.hours is not None and not holds(when.hours, facts.at):
        return f"it is {datetime.fromtimestamp(facts.at, ZoneInfo(when.hours.zone)):%a %H:%M} in {when.hours.zone}"
    for name, values in when.headers:
        said = facts.headers.get(name)
        if said is None:
            return f"there is no header {name.decode()}"
        if said not in values and "*" not in values:
            return f"the header {name.decode()} is not {_either(values)}"
    if lacking := when.needs - facts.needs:
        return f"the request needs no {_either(lacking)}"
    return None


def _either(names: frozenset[str]) -> str:
    return " or ".join(sorted(names))


def holds(hours: Hours, at: float) -> bool:
    """Whether a time, unix seconds, is within the hours. What is past midnight belongs to the day before."""
    local = datetime.fromtimestamp(at, ZoneInfo(hours.zone))
    second, day = local.hour * 3600 + local.minute * 60 + local.second, local.weekday()
    if hours.start < hours.end:
        return hours.start <= second < hours.end and day in hours.weekdays
    if second >= hours.start:
        return day in hours.weekdays
    return second < hours.end and (day - 1) % 7 in hours.weekdays


Pace = Callable[[Target], float]
"""How long a target takes, in seconds, as far as it is known; 0 where it has to be found out."""


def choose(alias: Alias, facts: Facts, pace: Pace) -> tuple[str | None, Alias]:
    """The first rule that holds, by name, and the way it leads: the targets in the order they are to be tried.

    None: no rule does, and the alias's own way counts. Raises UnsupportedParameter where no target has what is needed.
    """
    name, way = next(
        ((rule.name, rule.alias) for rule in alias.rules if misfit(rule.when, facts) is None), (None, alias)
    )
    if not way.routed:
        return name, way
    ordered = order(way, facts, pace)
    targets = able(ordered, facts)
    if not targets:
        lacking = facts.needs - frozenset.union(*(target.capabilities or frozenset() for target in ordered))
        raise UnsupportedParameter(
            f"No target of {alias.name!r} has {_either(lacking or facts.needs)}. Use another model, or leave it out.",
            param="model",
        )
    return name, way.along(targets)


def order(way: Alias, facts: Facts, pace: Pace) -> tuple[Target, ...]:
    """The targets, whoever comes first by weight, price or pace before the others; those stay as they are written."""
    targets = way.targets
    if way.weights:
        at = facts.place * sum(way.weights)
        for index, weight in enumerate(way.weights):
            at -= weight
            if at < 0:
                return (targets[index], *targets[:index], *targets[index + 1 :])
    if way.order == "cost":
        usage = estimate(way.serves, facts.input_tokens, facts.output_tokens)
        return tuple(sorted(targets, key=lambda t: charge(usage, t, facts.tenant, None, facts.at).total_nanos))
    if way.order == "latency":
        return tuple(sorted(targets, key=pace))
    return targets


def able(targets: tuple[Target, ...], facts: Facts) -> tuple[Target, ...]:
    """Those that have what the request needs. Prompts are estimated: where none has the room, the largest is asked."""
    having = [t for t in targets if t.capabilities is None or facts.needs <= t.capabilities]
    tokens = facts.input_tokens + facts.output_tokens
    roomy = [t for t in having if t.context_tokens is None or tokens <= t.context_tokens]
    return tuple(roomy or sorted(having, key=lambda t: -(t.context_tokens or 0))[:1])


# --- whom to try, and what comes after --------------------------------------------------------------------------------


def plan(alias: Alias, resting: frozenset[str]) -> tuple[Target, ...]:
    """The targets to try, in order. Resting ones are left out, unless all rest: then trying beats certain failure."""
    if not resting:
        return alias.targets
    awake = tuple(target for target in alias.targets if not is_resting(target, resting))
    return awake or alias.targets


class Next(Struct, frozen=True):
    """What follows a failed attempt: wait, then the target at `index` of the plan."""

    index: int
    wait_seconds: float
    other_key: bool = False


OF_A_KEY = (VendorThrottled, VendorMisconfigured, VendorKeyFull)
"""What one of a vendor's keys met may not be so for another."""


def after(
    error: VendorError,
    *,
    index: int,
    targets: int,
    attempts: int,
    tries_here: int,
    retry: WrittenRetry,
    chance: float,
    other_key: bool = False,
    rests: bool = False,
    may_retry: bool = True,
) -> Next | None:
    """What to do after attempt number `attempts` of a call, the `tries_here`-th at the plan's target `index`.

    None: give up. A call makes at most `retry.max_attempts` vendor requests, and every target of a longer chain is
    still tried once: a retry here is spent only while an attempt is left for each target that was not tried yet.
    A target that `rests` now is left if there is another; so is one that there is no retry budget for (`may_retry`).
    `chance` is uniform in [0, 1): the wait has full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter").
    """
    if error.retry == "never":
        return None
    untried = targets - index - 1
    if other_key and isinstance(error, OF_A_KEY) and attempts + untried < retry.max_attempts:
        return Next(index, 0.0, other_key=True)
    if untried and (rests or not may_retry):
        return Next(index + 1, 0.0)
    backoff = min(retry.backoff_cap_seconds, retry.backoff_base_seconds * 2 ** (tries_here - 1)) * chance
    asked = error.retry_after_seconds or 0.0
    if (
        error.retry == "here"
        and may_retry
        and attempts + untried < retry.max_attempts
        and asked <= retry.backoff_cap_seconds
    ):
        return Next(index, max(backoff, asked))
    if untried:
        return Next(index + 1, 0.0)
    return None


TOO_LONG = frozenset({"context_length_exceeded", "string_above_max_length"})
FILTERED = frozenset({"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"})
"""Vendors' exact codes for prompts that another model may take: OpenAI's, and Azure's for its filter."""


def detour(alias: Alias, refused: VendorRefused, asked: Collection[str]) -> tuple[Role, tuple[Target, ...]]:
    """What kind of refusal it is that the alias has other targets for, and those of them that were not asked yet."""
    kind: Role = "context_length" if refused.vendor_code in TOO_LONG else "content_filter"
    others = alias.on_context_length if kind == "context_length" else alias.on_content_filter
    if kind == "content_filter" and refused.vendor_code not in FILTERED:
        return kind, ()
    return kind, tuple(target for target in others if target.name not in asked)


def sum_up(errors: list[VendorError], deadline_passed: bool, begun: bool = False) -> GatewayError:
    """One error for the client from all that the chain met. Vendors' messages stay in the log.

    Where a stream had `begun`, nothing was retried, and its client has a part of the answer.
    """
    if deadline_passed:
        what = "The answer was not complete at" if begun else "No target answered before"
        return DeadlineExceeded(
            f"{what} the deadline. Try a shorter request, or ask for a longer deadline.", should_retry=False
        )
    if errors and all(isinstance(error, VendorCannot) for error in errors):
        return UnsupportedParameter(errors[0].message, param=errors[0].param)
    if errors and all(isinstance(error, VendorMisconfigured) for error in errors):
        return UpstreamMisconfigured(
            "Every target refused the gateway's own credential or model. The platform team has to mend it.",
            should_retry=False,
        )
    asked = [error.retry_after_seconds for error in errors if error.retry_after_seconds]
    return UpstreamUnavailable(
        "The vendor's stream broke off: the answer is not complete. Send the request again."
        if begun
        else "No target could answer; the gateway has retried and fallen back already. Try again later.",
        retry_after_seconds=max(1.0, *asked) if asked else 1.0,
        should_retry=False,
    )
