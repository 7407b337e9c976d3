"""The way to an answer: which targets, in which order, how often, and after what wait. Pure."""

from __future__ import annotations

from msgspec import Struct

from app.config import Alias, Target, WrittenRetry
from app.cooldowns import is_resting
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
    VendorThrottled,
)


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
) -> Next | None:
    """What to do after attempt number `attempts` of a call, the `tries_here`-th at the plan's target `index`.

    None: give up. A call makes at most `retry.max_attempts` vendor requests, and every target of a longer chain is
    still tried once: a retry here is spent only while an attempt is left for each target that was not tried yet.
    `chance` is uniform in [0, 1): the wait has full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter").
    """
    if error.retry == "never":
        return None
    untried = targets - index - 1
    if other_key and isinstance(error, OF_A_KEY) and attempts + untried < retry.max_attempts:
        return Next(index, 0.0)
    backoff = min(retry.backoff_cap_seconds, retry.backoff_base_seconds * 2 ** (tries_here - 1)) * chance
    asked = error.retry_after_seconds or 0.0
    if error.retry == "here" and attempts + untried < retry.max_attempts and asked <= retry.backoff_cap_seconds:
        return Next(index, max(backoff, asked))
    if untried:
        return Next(index + 1, 0.0)
    return None


def sum_up(errors: list[VendorError], deadline_passed: bool) -> GatewayError:
    """One error for the client from all that the chain met. Vendors' messages stay in the log."""
    if deadline_passed:
        return DeadlineExceeded(
            "No target answered before the deadline. Try a shorter request, or ask for a longer deadline.",
            should_retry=False,
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
        "No target could answer; the gateway has retried and fallen back already. Try again later.",
        retry_after_seconds=max(1.0, *asked) if asked else 1.0,
        should_retry=False,
    )
