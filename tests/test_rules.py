"""Which way a call goes: rules, weights, price and pace, what a model can do, and the words that explain it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.ambient import Ambient
from app.auth import allow
from app.cli import main
from app.config import Alias, Config, Hours, Target, Tenant
from app.errors import UnsupportedParameter
from app.paces import FINDING_OUT_SECONDS, STALE_SECONDS, Paces
from app.routing import Facts, choose, holds, needs, place
from tests.test_config import SHIPPED, faults_of, with_overlay
from tests.translation import PRICE, target

WEDNESDAY_NOON = datetime(2026, 11, 25, 12, 0, tzinfo=UTC).timestamp()
FACTS = Facts(tenant="t", plan="free", input_tokens=100, output_tokens=100, at=WEDNESDAY_NOON)


def slow_as(**seconds: float) -> Any:
    return lambda target: seconds.get(target.model, 0.0)


def configured(tmp_path: Path, **alias: Any) -> Config:
    """The shipped configuration with the alias `smart`, whose own target is openai/gpt-4o-mini."""
    return with_overlay(tmp_path, {"aliases": {"smart": {"targets": ["openai/gpt-4o-mini"], **alias}}})


def rule(**when: Any) -> dict[str, Any]:
    return {"when": when, "targets": ["openai/gpt-4o"]}


def chosen(config: Config, **facts: Any) -> str | None:
    return choose(config.aliases["smart"], replace(FACTS, **facts), slow_as())[0]


# --- rules ------------------------------------------------------------------------------------------------------------

HOLDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plan": ({"plans": ["free", "standard"]}, {"plan": "standard"}, {"plan": "enterprise"}),
    "a long prompt": ({"prompt_tokens_above": 1000}, {"input_tokens": 1001}, {"input_tokens": 1000}),
    "a short prompt": ({"prompt_tokens_up_to": 1000}, {"input_tokens": 1000}, {"input_tokens": 1001}),
    "hours": (
        {"hours": {"from": "11:00", "to": "13:00"}}, {"at": WEDNESDAY_NOON}, {"at": WEDNESDAY_NOON + 3600},
    ),
    "hours in a zone": (
        {"hours": {"from": "13:00", "to": "14:00", "zone": "Europe/Berlin"}},
        {"at": WEDNESDAY_NOON}, {"at": WEDNESDAY_NOON + 3600},
    ),
    "a weekday": ({"hours": {"weekdays": ["wed"]}}, {"at": WEDNESDAY_NOON}, {"at": WEDNESDAY_NOON + 86_400}),
    "a header": (
        {"headers": {"x-feature-id": ["search", "chat"]}},
        {"headers": {b"x-feature-id": "chat"}}, {"headers": {b"x-feature-id": "mail"}},
    ),
    "any value of a header": ({"headers": {"x-beta": ["*"]}}, {"headers": {b"x-beta": "1"}}, {}),
    "a need": ({"needs": ["vision"]}, {"needs": frozenset({"vision", "tools"})}, {"needs": frozenset({"tools"})}),
    "all of them": (
        {"plans": ["free"], "prompt_tokens_above": 10, "needs": ["tools"]},
        {"needs": frozenset({"tools"})}, {"needs": frozenset({"tools"}), "plan": "standard"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOLDS)
def test_a_rule_holds_for_what_it_names_and_nothing_else(tmp_path: Path, case: str) -> None:
    when, fits, misfits = HOLDS[case]
    config = configured(tmp_path, rules={"it": rule(**when)})
    assert chosen(config, **fits) == "it"
    assert chosen(config, **misfits) is None


def test_the_first_rule_that_holds_wins_with_its_own_targets(tmp_path: Path) -> None:
    config = configured(
        tmp_path,
        rules={
            "never": rule(plans=["enterprise"]),
            "first": {"when": {"plans": ["free"]}, "targets": ["openrouter/gpt-4o", "openai/gpt-4o"]},
            "second": rule(prompt_tokens_above=0),
        },
    )
    name, way = choose(config.aliases["smart"], FACTS, slow_as())
    assert (name, way.chain) == ("first", ("openrouter/gpt-4o", "openai/gpt-4o"))
    assert way.timeouts == config.aliases["smart"].timeouts


def test_without_a_rule_that_holds_the_alias_s_own_targets_count(tmp_path: Path) -> None:
    name, way = choose(configured(tmp_path, rules={"it": rule(plans=["standard"])}).aliases["smart"], FACTS, slow_as())
    assert (name, way.chain) == (None, ("openai/gpt-4o-mini",))


def test_only_an_alias_with_a_choice_asks_for_facts(tmp_path: Path) -> None:
    aliases = configured(tmp_path, rules={"it": rule(plans=["free"])}).aliases
    assert {name: alias.routed for name, alias in aliases.items() if name in ("smart", "support-fast")} == {
        "smart": True, "support-fast": False,
    }  # fmt: skip


NIGHT = Hours(22 * 3600, 6 * 3600, "Europe/Berlin", frozenset({4}))  # Friday 22:00 to Saturday 06:00


@pytest.mark.parametrize(
    ("local", "held"),
    [
        ("2026-11-27T21:59:59+01:00", False),
        ("2026-11-27T22:00:00+01:00", True),
        ("2026-11-28T05:59:59+01:00", True),
        ("2026-11-28T06:00:00+01:00", False),
        ("2026-11-27T05:00:00+01:00", False),  # the night of Thursday
        ("2026-07-03T22:30:00+02:00", True),  # summer time
        ("2026-07-03T20:30:00+00:00", True),
    ],
)
def test_hours_past_midnight_belong_to_the_day_on_which_they_begin(local: str, held: bool) -> None:
    assert holds(NIGHT, datetime.fromisoformat(local).timestamp()) is held


@given(st.integers(0, 86_399), st.integers(0, 86_399), st.integers(0, 2_000_000_000))
def test_hours_and_those_between_them_fill_the_day(start: int, end: int, at: int) -> None:
    every = frozenset(range(7))
    within, without = (holds(Hours(a, b, "UTC", every), at) for a, b in ((start, end), (end, start)))
    assert (within, without) == (True, True) if start == end else within != without


BODIES: dict[bytes, set[str]] = {
    b'{"messages":[{"role":"user","content":"hi"}]}': set(),
    b'{"messages":[{"content":[{"type":"image_url","image_url":{}}]}]}': {"vision"},
    b'{"messages":[{"content":[{"type" : "image","source":{}}]}]}': {"vision"},
    b'{"input":[{"content":[{"type":"input_image"}]}]}': {"vision"},
    b'{"messages":[{"content":[{"type":"input_audio"}]}]}': {"audio"},
    b'{"tools":[{"type":"function"}]}': {"tools"},
    b'{"tools":[]}': set(),
    b'{"response_format":{"type":"json_schema","json_schema":{}}}': {"json_schema"},
    json.dumps({"messages": [{"content": '{"type":"image_url"} {"tools": [{'}]}).encode(): set(),
}


@pytest.mark.parametrize("body", BODIES)
def test_a_request_s_needs_are_read_off_its_body(body: bytes) -> None:
    assert needs(body) == BODIES[body]


# --- who comes first --------------------------------------------------------------------------------------------------


def way(*targets: Target, **fields: Any) -> Alias:
    from tests.test_routing import alias

    return replace(alias("a"), routed=True, **fields).along(targets)


def models(alias: Alias, pace: Any = None, **facts: Any) -> list[str]:
    return [t.model for t in choose(alias, replace(FACTS, **facts), pace or slow_as())[1].targets]


A, B, C = (target("openai", name) for name in "abc")


def test_weights_share_out_the_users_and_leave_the_others_as_fallbacks() -> None:
    canary = way(A, B, C, weights=(95, 5, 0))
    assert models(canary, place=0.0) == models(canary, place=0.949) == ["a", "b", "c"]
    assert models(canary, place=0.951) == models(canary, place=0.999) == ["b", "a", "c"]


def test_a_user_stays_where_it_is_and_users_are_spread_evenly() -> None:
    places = [place("smart", f"user-{number}") for number in range(2000)]
    assert place("smart", "user-7") == places[7] != place("other", "user-7")
    assert min(places) >= 0
    assert max(places) < 1
    assert 60 <= sum(at >= 0.95 for at in places) <= 140


def test_the_cheapest_for_this_call_comes_first() -> None:
    reads = replace(A, price=replace(PRICE, input=1_000_000, output=9_000_000))
    writes = replace(B, price=replace(PRICE, input=9_000_000, output=1_000_000))
    by_cost = way(reads, writes, order="cost")
    assert models(by_cost, input_tokens=1000, output_tokens=10) == ["a", "b"]
    assert models(by_cost, input_tokens=10, output_tokens=1000) == ["b", "a"]


def test_the_fastest_comes_first_and_one_of_unknown_pace_before_it() -> None:
    by_latency = way(A, B, C, order="latency")
    assert models(by_latency, slow_as(a=0.9, b=0.2, c=0.5)) == ["b", "c", "a"]
    assert models(by_latency, slow_as(a=0.9, b=0.2)) == ["c", "b", "a"]


class Clock(Ambient):
    at = 100.0

    def monotonic(self) -> float:
        return self.at


def test_a_pace_is_forgotten_for_one_call_at_a_time() -> None:
    clock = Clock()
    paces = Paces(clock)
    paces.took(A, False, 2.0)
    assert (paces.reader(False)(A), paces.reader(True)(A)) == (2.0, 0.0)
    clock.at += STALE_SECONDS
    assert [paces.reader(False)(A) for _ in range(3)] == [0.0, 2.0, 2.0]
    clock.at += FINDING_OUT_SECONDS
    assert paces.reader(False)(A) == 0.0
    paces.took(A, False, 1.0)
    assert 1.0 < paces.reader(False)(A) < 2.0


# --- what a model can do ----------------------------------------------------------------------------------------------

BLIND = replace(A, capabilities=frozenset({"tools"}), context_tokens=1_000)
SEEING = replace(B, capabilities=frozenset({"tools", "vision"}), context_tokens=8_000)


def test_a_target_that_lacks_what_the_request_needs_is_passed_over() -> None:
    assert models(way(BLIND, SEEING), needs=frozenset({"vision"})) == ["b"]
    assert models(way(BLIND, SEEING), needs=frozenset({"tools"})) == ["a", "b"]
    assert models(way(BLIND, C), needs=frozenset({"vision"})) == ["c"]


def test_a_target_whose_context_is_too_small_is_passed_over_and_the_largest_is_left() -> None:
    assert models(way(BLIND, SEEING), input_tokens=950, output_tokens=100) == ["b"]
    assert models(way(BLIND, SEEING), input_tokens=90_000) == ["b"]


def test_a_need_that_no_target_meets_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameter, match="has audio"):
        models(way(BLIND, SEEING), needs=frozenset({"audio", "tools"}))


# --- residency --------------------------------------------------------------------------------------------------------


def test_a_tenant_s_regions_hold_wherever_a_rule_or_a_refusal_may_lead(tmp_path: Path) -> None:
    config = with_overlay(
        tmp_path,
        {
            "targets": {"bedrock/nova-lite": {"provider": "bedrock", "model": "m"}},
            "providers": {
                "bedrock": {"access_key_id": "env:OPENAI_API_KEY", "secret_access_key": "env:OPENAI_API_KEY"}
            },
            "aliases": {
                "smart": {
                    "targets": ["openai/gpt-4o-mini", "bedrock/nova-lite"],
                    "weights": {"openai/gpt-4o-mini": 9, "bedrock/nova-lite": 1},
                    "rules": {"abroad": rule(plans=["free"]), "here": rule(prompt_tokens_above=0)},
                    "cascade": {"targets": ["openai/gpt-4o"]},
                    "on_context_length": ["openai/gpt-4o"],
                    "on_content_filter": ["openai/gpt-4o"],
                    "shadow": {"target": "openai/gpt-4o", "percent": 1},
                }
            },
        },
    )
    tenant = Tenant("t", "free", "free", None, residency=frozenset({"eu-central-1"}))
    within = allow(config, tenant, "smart")
    assert (within.chain, within.weights, within.rules) == (("bedrock/nova-lite",), (1,), ())
    assert (within.cascade, within.on_context_length, within.on_content_filter, within.shadow) == (None, (), (), None)


# --- the written shape ------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no condition": ({"rules": {"r": rule()}}, "rules.r.when: asks nothing"),
    "no target of a rule": ({"rules": {"r": {"when": {"plans": ["free"]}, "targets": []}}}, "rules.r.targets: needs"),
    "an unknown target of a rule": (
        {"rules": {"r": {"when": {"plans": ["free"]}, "targets": ["x/y"]}}}, "rules.r.targets: no target 'x/y'",
    ),
    "a rule's name": ({"rules": {"a b": rule(plans=["free"])}}, "rules.a b: a name here matches"),
    "an unknown plan": ({"rules": {"r": rule(plans=["x"])}}, "rules.r.when.plans: no plan 'x'"),
    "an unknown key": ({"rules": {"r": rule(plan=["free"])}}, "rules.r.when.plan: unknown key"),
    "an unknown need": ({"rules": {"r": rule(needs=["smell"])}}, "rules.r.when.needs: Invalid enum value 'smell'"),
    "tokens below zero": ({"rules": {"r": rule(prompt_tokens_above=-1)}}, "prompt_tokens_above: must not be below 0"),
    "tokens that cross": (
        {"rules": {"r": rule(prompt_tokens_above=5, prompt_tokens_up_to=5)}}, "prompt_tokens_up_to: must be above",
    ),
    "no such zone": ({"rules": {"r": rule(hours={"zone": "Mars/Base"})}}, "when.hours.zone: no time zone 'Mars/Base'"),
    "no such time": ({"rules": {"r": rule(hours={"from": "24:00"})}}, "when.hours.from: '24:00' is not a time"),
    "no such weekday": ({"rules": {"r": rule(hours={"weekdays": ["sunday"]})}}, "hours.weekdays: Invalid enum value"),
    "a credential as a header": (
        {"rules": {"r": rule(headers={"authorization": ["*"]})}}, "when.headers.authorization: must match",
    ),
    "a header of the edge": ({"rules": {"r": rule(headers={"x-gateway-edge": ["*"]})}}, "x-gateway-edge: must match"),
    "a header without a value": ({"rules": {"r": rule(headers={"x-beta": []})}}, "headers.x-beta: needs at least one"),
    "another order": ({"order": "price"}, "smart.order: expected one of written, cost, latency"),
    "a weight for another": ({"weights": {"openai/gpt-4o": 1}}, "weights.openai/gpt-4o: is not among the targets"),
    "a weight below zero": ({"weights": {"openai/gpt-4o-mini": -1}}, "weights.openai/gpt-4o-mini: must be from 0"),
    "no weight": ({"weights": {"openai/gpt-4o-mini": 0}}, "smart.weights: needs one above 0"),
    "weights and an order": (
        {"weights": {"openai/gpt-4o-mini": 1}, "order": "cost"}, "smart.weights: stands beside order: cost",
    ),
    "a cascade to itself": ({"cascade": {"targets": ["openai/gpt-4o-mini"]}}, "has given the doubtful answer"),
    "a cascade that is certain": (
        {"cascade": {"targets": ["openai/gpt-4o"], "mean_logprob_below": 0.5}}, "cascade.mean_logprob_below: is a",
    ),
    "a cascade without doubt": ({"cascade": {"targets": ["openai/gpt-4o"], "escalate": []}}, "nothing would escalate"),
    "a cascade's unknown key": ({"cascade": {"targets": ["openai/gpt-4o"], "to": 1}}, "smart.cascade.to: unknown key"),
    "an unknown shadow": ({"shadow": {"target": "x/y", "percent": 1}}, "smart.shadow.target: no target 'x/y'"),
    "a shadow of nothing": ({"shadow": {"target": "openai/gpt-4o", "percent": 0}}, "shadow.percent: must be above 0"),
    "a hedge of one": ({"hedge": {"after_seconds": 1}}, "smart.hedge: needs a second target"),
    "a hedge at once": (
        {"targets": ["openai/gpt-4o", "openai/gpt-4o-mini"], "hedge": {"after_seconds": 0}},
        "hedge.after_seconds: must be above 0",
    ),
    "another service": (
        {"on_context_length": ["openai/text-embedding-3-small"]}, "targets: the targets serve different things",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_way_that_cannot_be_gone_is_a_fault_with_its_path(tmp_path: Path, case: str) -> None:
    written, said = FAULTS[case]
    assert said in faults_of(lambda: configured(tmp_path, **written))[0]


def test_all_faults_of_the_rules_are_told_at_once(tmp_path: Path) -> None:
    rules = {"a": rule(plans=["x"]), "b": rule(hours={"zone": "x", "to": "y"}), "c": rule(plans=["free"], needs=["x"])}
    assert len(faults_of(lambda: configured(tmp_path, rules=rules, shadow={"target": "x/y", "percent": 0}))) == 6


# --- explained --------------------------------------------------------------------------------------------------------


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["check", "--config", str(SHIPPED), "--environment", "prod", "--no-secrets", "--explain", *arguments])
    return code, capsys.readouterr().out


def test_the_rule_that_wins_is_named_and_why_the_others_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--tokens", "50000", "--at", "2026-11-25T12:00"]
    code, said = explained(capsys, "acme-corp", "support-auto", *call)
    assert code == 0
    assert "does not standard-plan: the plan is enterprise, not standard" in said
    assert "wins     long-documents" in said
    assert "does not nights: it is Wed 13:00 in Europe/Berlin" in said
    assert "1. openai/gpt-4o (us, about " in said


def test_the_alias_s_own_way_is_explained_with_its_escalation(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = explained(capsys, "acme-corp", "support-auto", "--at", "2026-11-25T12:00", "--json")
    found = json.loads(said)
    assert (code, found["wins"]) == (0, None)
    assert [asked["target"] for asked in found["targets"]] == ["openai/gpt-4o-mini", "openrouter/gpt-4o-mini"]
    assert found["escalation"] == ["openai/gpt-4o", "openrouter/gpt-4o"]


def test_a_call_that_would_be_refused_is_explained_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = explained(capsys, "acme-free-trial", "support-auto")
    assert code == 1
    assert "refused: 403 model_not_allowed" in said


def test_a_tenant_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(capsys, "nobody", "support-auto")[0] == 1
