"""Aliases: written shape -> chains of targets, and the rules of who goes which way."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from app.config.caching import alias_cache, check_helpers
from app.config.guarding import named
from app.config.pricing import second_of_day
from app.config.reading import Faults, entries, known
from app.config.running import (
    NAME,
    Alias,
    Cascade,
    Guardrail,
    Hedge,
    Hours,
    Rule,
    Shadow,
    Target,
    Timeouts,
    When,
)
from app.config.written import (
    Written,
    WrittenAlias,
    WrittenCascade,
    WrittenHours,
    WrittenTimeouts,
    WrittenWay,
    WrittenWhen,
)

HEADER = re.compile(r"x-(?!api-key$|forwarded-|real-ip$|gateway-|request-id$|user-id$|amzn-|goog-)[a-z0-9-]{1,62}")
"""What an app may say of a call: no credential, nothing that the edge sets, no user in the clear."""
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_SECONDS = 86_400
DEFAULT_TIMEOUTS = Timeouts(connect=5.0, first_token=60.0, answer=300.0, idle=60.0, total=1800.0)


def timeouts(written: WrittenTimeouts, base: Timeouts, path: str, faults: Faults) -> Timeouts:
    values = {}
    for name in ("connect", "first_token", "answer", "idle", "total"):
        value = getattr(written, f"{name}_seconds")
        if value is not None and not 0 < value <= 86_400:
            faults.add(f"{path}.{name}_seconds", "must be above 0 and at most 86400")
        values[name] = getattr(base, name) if value is None else float(value)
    return Timeouts(**values)


def named_targets(written: Written) -> Iterator[str]:
    """Every target that a call may go to."""
    for alias in written.aliases.values():
        if alias is None:
            continue
        yield from (*alias.on_context_length, *alias.on_content_filter)
        if alias.shadow is not None:
            yield alias.shadow.target
        for way in (alias, *alias.rules.values()):
            if way is not None:
                yield from way.targets
                yield from way.cascade.targets if way.cascade else ()


def check_zone(name: str, path: str, faults: Faults) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        faults.add(path, f"no time zone {name!r}; expected an IANA name such as Europe/Berlin or UTC")


def build_aliases(
    written: Written,
    targets: Mapping[str, Target],
    guardrails: Mapping[str, Guardrail],
    base: Timeouts,
    faults: Faults,
) -> dict[str, Alias]:
    aliases: dict[str, Alias] = {}
    for name, alias in entries(written.aliases, NAME, "aliases", faults):
        builder = _Builder(written, targets, guardrails, faults)
        aliases[name] = builder.alias(name, alias, timeouts(alias.timeouts, base, f"aliases.{name}.timeouts", faults))
    check_helpers(aliases, faults)
    return aliases


def routing_headers(aliases: Collection[Alias]) -> frozenset[bytes]:
    """The headers that the rules look at."""
    return frozenset(name for alias in aliases for rule in alias.rules for name, _ in rule.when.headers)


class _Builder:
    """What the parts of one alias are checked against."""

    def __init__(
        self,
        written: Written,
        targets: Mapping[str, Target],
        guardrails: Mapping[str, Guardrail],
        faults: Faults,
    ) -> None:
        self._written = written
        self._targets = targets
        self._guardrails = guardrails
        self._faults = faults

    def alias(self, name: str, alias: WrittenAlias, alias_timeouts: Timeouts) -> Alias:
        path = f"aliases.{name}"
        tokens = alias.default_output_tokens
        if tokens is not None and tokens <= 0:
            self._faults.add(f"{path}.default_output_tokens", "must be above 0; leave it out for no limit")
        chain = self.chain(alias.targets, f"{path}.targets")
        whole = Alias(
            name=name,
            targets=chain,
            chain=tuple(alias.targets),
            default_output_tokens=tokens or self._written.gateway.default_output_tokens,
            timeouts=alias_timeouts,
            serves=chain[0].serves if chain else "chat",
            on_context_length=self.chain(alias.on_context_length, f"{path}.on_context_length", needed=False),
            on_content_filter=self.chain(alias.on_content_filter, f"{path}.on_content_filter", needed=False),
            shadow=self.shadow(alias, path),
            hedge=self.hedge(alias, path),
            guardrails=named(alias.guardrails, self._guardrails, f"{path}.guardrails", self._faults),
        )
        rules = []
        for rule_name, rule in entries(alias.rules, NAME, f"{path}.rules", self._faults):
            here = f"{path}.rules.{rule_name}"
            way = self.kept(self.way(whole, rule, here), alias, path, Faults())
            rules.append(Rule(rule_name, self.when(rule.when, f"{here}.when"), way))
        whole = self.kept(self.way(whole, alias, path), alias, path, self._faults)
        whole = msgspec.structs.replace(whole, rules=tuple(rules), routed=whole.routed or bool(rules))
        self.check_serves(whole, path)
        return whole

    def chain(self, names: Sequence[str], path: str, *, needed: bool = True) -> tuple[Target, ...]:
        for name in names:
            known(name, self._written.targets, "target", path, self._faults)
        if needed and not names:
            self._faults.add(path, "needs at least one target")
        if len(set(names)) != len(names):
            self._faults.add(path, "names a target twice")
        return tuple(self._targets[name] for name in names if name in self._targets)

    def way(self, base: Alias, way: WrittenWay, path: str) -> Alias:
        """`base` along the chain of an alias or of a rule."""
        chain = self.chain(way.targets, f"{path}.targets") if way.targets != list(base.chain) else base.targets
        weights = self.weights(way, path)
        if any(t.capabilities is not None or t.context_tokens is not None for t in chain):
            routed = True
        else:
            routed = bool(weights) or way.order != "written"
        return msgspec.structs.replace(
            base.along(chain),
            order=way.order,
            weights=weights,
            cascade=None if way.cascade is None else self.cascade(way.cascade, way.targets, f"{path}.cascade"),
            routed=routed,
        )

    def kept(self, way: Alias, alias: WrittenAlias, path: str, faults: Faults) -> Alias:
        """The way with its cache: answers of other targets are never taken for those of its own."""
        answering = (*way.reach, *(way.cascade.targets if way.cascade else ()))
        return msgspec.structs.replace(way, cache=alias_cache(alias.cache, answering, f"{path}.cache", faults))

    def weights(self, way: WrittenWay, path: str) -> tuple[int, ...]:
        if not way.weights:
            return ()
        for name, weight in way.weights.items():
            if name not in way.targets:
                self._faults.add(f"{path}.weights.{name}", "is not among the targets")
            if weight is not None and not 0 <= weight <= 1_000_000:
                self._faults.add(f"{path}.weights.{name}", "must be from 0 to 1000000")
        if not any(way.weights.values()):
            self._faults.add(f"{path}.weights", "needs one above 0")
        if way.order != "written":
            self._faults.add(f"{path}.weights", f"stands beside order: {way.order}; keep one of them")
        return tuple(way.weights.get(name) or 0 for name in way.targets if name in self._targets)

    def when(self, when: WrittenWhen, path: str) -> When:
        for plan in when.plans or ():
            known(plan, self._written.plans, "plan", f"{path}.plans", self._faults)
        for name in ("prompt_tokens_above", "prompt_tokens_up_to"):
            value = getattr(when, name)
            if value is not None and value < 0:
                self._faults.add(f"{path}.{name}", "must not be below 0")
        above, up_to = when.prompt_tokens_above, when.prompt_tokens_up_to
        if above is not None and up_to is not None and above >= up_to:
            self._faults.add(f"{path}.prompt_tokens_up_to", "must be above prompt_tokens_above, or no prompt ever fits")
        for header, values in when.headers.items():
            if not HEADER.fullmatch(header):
                self._faults.add(f"{path}.headers.{header}", f"must match {HEADER.pattern}")
            if not values:
                self._faults.add(f"{path}.headers.{header}", 'needs at least one value; "*" means any')
        if when == WrittenWhen():
            self._faults.add(path, "asks nothing, so that no rule after it ever counts: use the alias's own targets")
        return When(
            plans=None if when.plans is None else frozenset(when.plans),
            tokens_above=above,
            tokens_up_to=up_to,
            hours=None if when.hours is None else self.hours(when.hours, f"{path}.hours"),
            headers=tuple((name.encode("latin-1", "replace"), frozenset(v or ())) for name, v in when.headers.items()),
            needs=frozenset(when.needs),
        )

    def hours(self, hours: WrittenHours, path: str) -> Hours:
        check_zone(hours.zone, f"{path}.zone", self._faults)
        start = second_of_day(hours.from_, f"{path}.from", self._faults)
        end = second_of_day(hours.to, f"{path}.to", self._faults)
        days = hours.weekdays or WEEKDAYS
        return Hours(start, end, hours.zone, frozenset(map(WEEKDAYS.index, days)))

    def cascade(self, cascade: WrittenCascade, before: Sequence[str], path: str) -> Cascade:
        targets = self.chain(cascade.targets, f"{path}.targets")
        if again := [name for name in cascade.targets if name in before]:
            self._faults.add(f"{path}.targets", f"{again[0]} has given the doubtful answer; name others")
        least = cascade.mean_logprob_below
        if least is not None and not (math.isfinite(least) and least <= 0):
            self._faults.add(f"{path}.mean_logprob_below", "is a natural logarithm of a probability: at most 0")
        if not cascade.escalate and least is None:
            self._faults.add(f"{path}.escalate", "is empty, and there is no mean_logprob_below: nothing would escalate")
        return Cascade(targets, frozenset(cascade.escalate), least)

    def shadow(self, alias: WrittenAlias, path: str) -> Shadow | None:
        if alias.shadow is None:
            return None
        known(alias.shadow.target, self._written.targets, "target", f"{path}.shadow.target", self._faults)
        self.percent(alias.shadow.percent, f"{path}.shadow.percent")
        target = self._targets.get(alias.shadow.target)
        return None if target is None else Shadow(target, alias.shadow.percent)

    def hedge(self, alias: WrittenAlias, path: str) -> Hedge | None:
        if alias.hedge is None:
            return None
        if not 0 < alias.hedge.after_seconds <= DAY_SECONDS:
            self._faults.add(f"{path}.hedge.after_seconds", "must be above 0 and at most 86400")
        self.percent(alias.hedge.percent, f"{path}.hedge.percent")
        if not any(len(way.targets) > 1 for way in (alias, *alias.rules.values()) if way is not None):
            self._faults.add(f"{path}.hedge", "needs a second target to ask")
        return Hedge(alias.hedge.after_seconds, alias.hedge.percent)

    def percent(self, percent: float, path: str) -> None:
        if not 0 < percent <= 100:
            self._faults.add(path, "must be above 0 and at most 100")

    def check_serves(self, alias: Alias, path: str) -> None:
        """All that a call may meet serves the same, and only chat has a meaning to be in doubt about."""
        ways = [alias, *(rule.alias for rule in alias.rules)]
        met = [target for way in ways for target in (*way.reach, *(way.cascade.targets if way.cascade else ()))]
        met += [alias.shadow.target] if alias.shadow else []
        serves = {target.serves for target in met}
        if len(serves) > 1:
            self._faults.add(f"{path}.targets", f"the targets serve different things: {', '.join(sorted(serves))}")
        if alias.serves != "chat" and any(way.cascade for way in ways):
            self._faults.add(f"{path}.cascade", "is for chat: there is nothing to doubt about embeddings")
