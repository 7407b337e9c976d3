"""`gateway check --explain TENANT ALIAS`: which rule of an alias wins for a call, and why."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import get_args
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.auth import allow
from app.config import Alias, Config, Target, Tenant
from app.core import charge, estimate, usd
from app.errors import RequestError
from app.routing import Facts, choose, misfit, place
from app.wire import Need


class Judged(Struct, frozen=True):
    """A rule, and why it does not hold; `why_not` None is the one that wins, or one after it."""

    rule: str
    why_not: str | None
    wins: bool


class Asked(Struct, frozen=True):
    """A target in its place, and what this call would cost there by estimate."""

    target: str
    region: str | None
    estimated_usd: msgspec.Raw


class Explanation(Struct, frozen=True):
    """What a call meets. `refused` says why there is no way; `notes` are what cannot be known from files alone."""

    tenant: str
    plan: str
    alias: str
    rules: tuple[Judged, ...] = ()
    wins: str | None = None
    why: str = ""
    targets: tuple[Asked, ...] = ()
    escalation: tuple[str, ...] = ()
    on_context_length: tuple[str, ...] = ()
    on_content_filter: tuple[str, ...] = ()
    shadow: str | None = None
    hedge: str | None = None
    left_out: tuple[str, ...] = ()
    refused: str | None = None
    notes: tuple[str, ...] = ()


def explain(config: Config, tenant: Tenant, alias_name: str, facts: Facts) -> Explanation:
    """The way of one call, by the same functions that choose it."""
    base = Explanation(tenant.id, tenant.plan, alias_name)
    try:
        alias = allow(config, tenant, alias_name)
        rule, way = choose(alias, facts, lambda target: 0.0)
    except RequestError as error:
        return msgspec.structs.replace(base, refused=f"{error.status} {error.code}: {error.message}")
    judged = tuple(Judged(r.name, misfit(r.when, facts), r.name == rule) for r in alias.rules)
    written = config.aliases[alias_name]
    usage = estimate(alias.serves, facts.input_tokens, facts.output_tokens)
    return msgspec.structs.replace(
        base,
        rules=judged,
        wins=rule,
        why=_why(way, facts),
        targets=tuple(
            Asked(t.name, t.provider.region, usd(charge(usage, t, tenant.id, None, facts.at).total_nanos))
            for t in way.targets
        ),
        escalation=_names(way.cascade.targets) if way.cascade else (),
        on_context_length=_names(way.on_context_length),
        on_content_filter=_names(way.on_content_filter),
        shadow=way.shadow.target.name if way.shadow else None,
        hedge=way.targets[1].name if way.hedge and len(way.targets) > 1 else None,
        left_out=_left_out(written, alias, tenant),
        notes=_notes(way, tenant, alias_name),
    )


def _names(targets: tuple[Target, ...]) -> tuple[str, ...]:
    return tuple(target.name for target in targets)


def _why(way: Alias, facts: Facts) -> str:
    """Why the first target is the first."""
    if way.weights:
        return f"by weight; this user stands at {facts.place:.2f} of 1"
    return {"written": "as written", "cost": "cheapest first", "latency": "fastest first"}[way.order]


def _left_out(written: Alias, alias: Alias, tenant: Tenant) -> tuple[str, ...]:
    """Rules and targets that the tenant's residency keeps it from."""
    if tenant.residency is None:
        return ()
    kept = {rule.name for rule in alias.rules}
    every = [*written.targets, *(target for rule in written.rules for target in rule.alias.targets)]
    outside = [t for t in dict.fromkeys(_names(tuple(every))) if t not in {
        target.name for target in every if target.provider.region in tenant.residency
    }]  # fmt: skip
    return (*(f"rule {rule.name}" for rule in written.rules if rule.name not in kept), *outside)


def _notes(way: Alias, tenant: Tenant, alias_name: str) -> tuple[str, ...]:
    notes = []
    if way.order == "latency":
        notes.append("each replica goes by the pace that it has measured; here all are taken for equally fast")
    if alias_name in tenant.downgrade:
        notes.append(f"while a budget is nearly used up, {tenant.downgrade[alias_name]} serves in its place")
    notes.append("targets that rest just now are passed over: `resting` of the admin port's /status names them")
    return tuple(notes)


def text(explained: Explanation) -> str:
    """For people."""
    e = explained
    lines = [f"{e.alias} for {e.tenant} (plan {e.plan})"]
    if e.refused:
        return "\n".join([*lines, f"  refused: {e.refused}"])
    for judged in e.rules:
        if judged.wins:
            lines.append(f"  wins     {judged.rule}")
        elif judged.why_not is None:
            lines.append(f"  later    {judged.rule}: it would hold, but an earlier one has won")
        else:
            lines.append(f"  does not {judged.rule}: {judged.why_not}")
    if e.wins is None:
        lines.append("  wins     the alias's own targets" + (": no rule holds" if e.rules else ""))
    lines.append(f"  asks, {e.why}:")
    for number, asked in enumerate(e.targets, 1):
        cost = bytes(asked.estimated_usd).decode()
        lines.append(f"    {number}. {asked.target} ({asked.region or 'no region'}, about {cost} USD)")
    for label, names in (
        ("a doubtful answer is taken to", e.escalation),
        ("a prompt too long is taken to", e.on_context_length),
        ("a filtered prompt is taken to", e.on_content_filter),
        ("beside a slow first is asked", (e.hedge,) if e.hedge else ()),
        ("a share is mirrored to", (e.shadow,) if e.shadow else ()),
        ("kept out by the tenant's residency", e.left_out),
    ):
        if names:
            lines.append(f"  {label}: {', '.join(names)}")
    return "\n".join([*lines, *(f"  note: {note}" for note in e.notes)])


# --- the command line -------------------------------------------------------------------------------------------------


def add(parser: argparse.ArgumentParser) -> None:
    """The options of `gateway check` that describe a call."""
    parser.add_argument(
        "--explain", nargs=2, metavar=("TENANT", "ALIAS"), help="say which rule wins for a call like this, and why"
    )
    call = parser.add_argument_group("the call that --explain is about")
    call.add_argument("--tokens", type=int, default=100, help="of its prompt (100)")
    call.add_argument("--output-tokens", type=int, help="of its answer (the alias's default)")
    call.add_argument("--at", type=_moment, help="when it comes, 2026-11-28T22:30+01:00; UTC without an offset (now)")
    call.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    call.add_argument("--need", action="append", default=[], choices=get_args(Need), help="repeatable")
    call.add_argument("--user", default="anyone", help="the user's hash, which weights go by")
    call.add_argument("--json", action="store_true", help="for machines")


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: 2026-11-28T22:30+01:00") from None


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Prints the explanation; 1 where the call would be refused."""
    tenant_name, alias_name = arguments.explain
    tenant = config.tenants.get(tenant_name)
    if tenant is None:
        sys.stderr.write(f"There is no tenant {tenant_name!r} in this environment.\n")
        return 1
    alias = config.aliases.get(alias_name)
    headers = [written.partition("=") for written in arguments.header]
    at = arguments.at
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=ZoneInfo("UTC"))
    output = arguments.output_tokens
    facts = Facts(
        tenant=tenant.id,
        plan=tenant.plan,
        input_tokens=arguments.tokens,
        output_tokens=output if output is not None else alias.default_output_tokens if alias else 0,
        at=Ambient().now() if at is None else at.timestamp(),
        headers={name.lower().encode("latin-1", "replace"): value for name, _, value in headers},
        needs=frozenset(arguments.need),
        place=place(alias_name, arguments.user),
    )
    explained = explain(config, tenant, alias_name, facts)
    print(msgspec.json.encode(explained).decode() if arguments.json else text(explained))
    return 1 if explained.refused else 0
