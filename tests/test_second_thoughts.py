"""More than one answer to a call: what a cascade doubts, what a hedge outruns, where a refusal leads, and who pays."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from app.allowance import MOST, Allowance
from app.ambient import Ambient, Patience
from app.config import Alias, Cascade, Config, Hedge, Price, Target, Timeouts, WrittenBreaker, WrittenRetry
from app.control import Control
from app.cooldowns import Cooldowns
from app.core import Call, Exchange, Reply
from app.errors import VendorError, VendorFailed, VendorMisconfigured
from app.http1 import Http1
from app.providers.translator import Outgoing
from app.redis_pipe import RedisPipe
from tests.gateway_parts import (
    ALIAS,
    DONE,
    STREAM,
    UNENDED,
    USAGE,
    Clock,
    Rooms,
    ScriptedAnswer,
    call,
    chunk,
    completion,
    config,
    departed,
    request,
)
from tests.gateway_parts import headers_of as headers
from tests.redis_parts import AMBIENT, redis_server, run, running
from tests.translation import PRICE, target
from tests.vendors import accepting_nobody, until

LIMITS = Timeouts(1.0, 5.0, 5.0, 5.0, 30.0)


def priced(model: str, dollars: int) -> Target:
    """A target whose tokens cost so many dollars a million."""
    price = Price(**dict.fromkeys(PRICE.__struct_fields__, dollars * 1_000_000_000))
    return replace(target("openai", model), price=price)


CHEAP, SPARE, DEAR = priced("cheap", 1), priced("spare", 2), priced("dear", 10)
NANOS = 12_000
"""What USAGE costs at one dollar a million."""


class Vendors:
    """Implements `upstream.Engine`: each model says the next of its own script, or has said all it had to."""

    def __init__(self, **script: list[ScriptedAnswer | VendorError]) -> None:
        self._script = {model: iter(said) for model, said in script.items()}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def open(self, outgoing: Outgoing, connect_seconds: float) -> ScriptedAnswer:
        body = json.loads(outgoing.body)
        self.asked.append((body["model"], body))
        said = next(self._script[body["model"]])
        if isinstance(said, VendorError):
            raise said
        return said

    async def close(self) -> None:
        pass

    @property
    def models(self) -> list[str]:
        return [model for model, _ in self.asked]


def settings(*targets: Target, **fields: Any) -> Config:
    """The alias goes by these targets; `retry` and `breaker` are settings, the rest is the alias's own."""
    base = config()
    made = {name: fields.pop(name) for name in ("retry", "breaker") if name in fields}
    alias = Alias(ALIAS, targets, tuple(t.name for t in targets), 100, LIMITS, **fields)
    named = {t.name: t for t in (CHEAP, SPARE, DEAR)}
    return replace(base, aliases={ALIAS: alias}, targets=named, settings=replace(base.settings, **made))


Serve = Callable[..., tuple[Reply, bytes]]


class Table:
    """A gateway whose vendors speak by `vendors`, and what it answers."""

    def __init__(self, folder: Path, vendors: Vendors, configured: Config, ambient: Ambient | None = None) -> None:
        self.rooms = Rooms(folder, ambient=ambient or Clock())
        self.vendors = vendors
        self.config = configured
        self.rooms.gateway.dialogue.upstream = vendors

    def call(self, body: bytes) -> Call:
        return call(body, self.rooms.ambient, config=self.config)

    async def sent(self, body: bytes) -> tuple[Reply, bytes]:
        exchange = Exchange(call=self.call(body), patience=Patience())
        parts: list[bytes] = []
        reply = await departed(self.rooms.gateway, exchange, parts.append)
        return reply, b"".join(parts)

    def serve(self, body: bytes) -> tuple[Reply, bytes]:
        return asyncio.run(self.sent(body))

    def row(self) -> dict[str, Any]:
        return self.rooms.row()


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Callable[..., Table]]:
    made: list[Table] = []

    def make(vendors: Vendors, *targets: Target, ambient: Ambient | None = None, **fields: Any) -> Table:
        made.append(Table(tmp_path, vendors, settings(*targets, **fields), ambient))
        return made[-1]

    yield make
    for each in made:
        each.rooms.spool.close()


Make = Callable[..., Table]


def answer(content: str | None = "hello", reason: str = "stop", **message: Any) -> ScriptedAnswer:
    logprobs = message.pop("logprobs", None)
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": reason}
    if logprobs is not None:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": value} for value in logprobs]}
    return ScriptedAnswer(completion(choices=[choice]))


def said(body: bytes) -> str:
    return json.loads(body)["choices"][0]["message"]["content"]


# --- cascades ---------------------------------------------------------------------------------------------------------

EVERY = Cascade((DEAR,), frozenset({"schema", "refusal", "length"}), -0.5)
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "n",
        "schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}},
    },
}
DOUBTFUL: dict[str, tuple[str, dict[str, Any], ScriptedAnswer]] = {
    "cut": ("length", {}, answer(reason="length")),
    "filtered": ("refusal", {}, answer(reason="content_filter")),
    "refused": ("refusal", {}, answer(None, refusal="I cannot.")),
    "no JSON": ("schema", {"response_format": SCHEMA}, answer("hello")),
    "other JSON": ("schema", {"response_format": SCHEMA}, answer('{"a":"1"}')),
    "not sure": ("low_confidence", {"logprobs": True}, answer(logprobs=[-0.1, -1.0])),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_doubtful_answer_is_taken_to_the_dearer_target(table: Make, case: str) -> None:
    why, fields, doubtful = DOUBTFUL[case]
    at = table(Vendors(cheap=[doubtful], dear=[answer("better")]), CHEAP, cascade=EVERY)
    reply, body = at.serve(request(**fields))
    assert (reply.status, said(body)) == (200, "better")
    assert (headers(reply)["x-gateway-escalation"], headers(reply)["x-gateway-attempts"]) == (why, "2")
    assert headers(reply)["x-gateway-fallback"] == "false"
    row = at.row()
    assert [(a["outcome"], a["doubt"], a["role"]) for a in row["attempts"]] == [
        ("doubtful", why, "chain"), ("success", None, "escalation"),
    ]  # fmt: skip
    assert row["status"] == "success"


TRUSTED: dict[str, tuple[dict[str, Any], ScriptedAnswer]] = {
    "whole": ({}, answer()),
    "sure": ({"logprobs": True}, answer(logprobs=[-0.1, -0.2])),
    "fitting JSON": ({"response_format": SCHEMA}, answer('{"a":1}')),
    "a call of a tool": ({"response_format": SCHEMA}, answer(None, "tool_calls", tool_calls=[{"id": "1"}])),
}


@pytest.mark.parametrize("case", TRUSTED)
def test_an_answer_without_doubt_is_the_cheap_one_s(table: Make, case: str) -> None:
    fields, good = TRUSTED[case]
    at = table(Vendors(cheap=[good]), CHEAP, cascade=EVERY)
    reply, _ = at.serve(request(**fields))
    assert "x-gateway-escalation" not in headers(reply)
    assert at.vendors.models == ["cheap"]
    assert (at.row()["cost_usd"]["total"], at.row()["usage"]["total_tokens"]) == (NANOS / 1e9, 12)


def test_both_answers_of_a_cascade_are_in_the_row_and_in_the_budget(table: Make) -> None:
    at = table(Vendors(cheap=[answer(reason="length")], dear=[answer()]), CHEAP, cascade=EVERY)
    at.serve(request())
    row, (first, second) = at.row(), at.row()["attempts"]
    assert row["usage"]["total_tokens"] == 2 * USAGE["total_tokens"]
    assert row["cost_usd"]["total"] == 11 * NANOS / 1e9
    assert (first["cost_usd"]["total"], first["usage"]["total_tokens"]) == (NANOS / 1e9, 12)
    assert (second["cost_usd"], row["provider"], row["usage_source"]) == (None, "openai", "vendor")
    assert at.rooms.limits.settled == [(24, 11 * NANOS)]


def test_a_cascade_reserves_for_both_answers(table: Make) -> None:
    at = table(Vendors(cheap=[answer()]), CHEAP, cascade=EVERY)
    at.serve(request(max_tokens=1000))
    ((tokens, nanos),) = at.rooms.limits.reserved
    alone = table(Vendors(cheap=[answer()]), CHEAP)
    alone.serve(request(max_tokens=1000))
    ((tokens_alone, nanos_alone),) = alone.rooms.limits.reserved
    assert (tokens, nanos) == (2 * tokens_alone, 11 * nanos_alone)


@pytest.mark.parametrize(
    "above",
    [
        [VendorFailed("x"), VendorFailed("x")],
        [VendorMisconfigured("x", vendor_status=401)],
        [ScriptedAnswer(b'{"error":{"message":"too long","code":"context_length_exceeded"}}', status=400)],
    ],
)
def test_where_nobody_above_answers_the_doubtful_answer_serves(table: Make, above: list[Any]) -> None:
    at = table(Vendors(cheap=[answer("cut", "length")], dear=above), CHEAP, cascade=EVERY)
    reply, body = at.serve(request())
    assert (reply.status, said(body)) == (200, "cut")
    assert "x-gateway-escalation" not in headers(reply)
    row = at.row()
    assert (row["attempts"][0]["outcome"], row["attempts"][0]["doubt"]) == ("success", "length")
    assert (row["cost_usd"]["total"], row["model_resolved"], row["finish_reason"]) == (
        NANOS / 1e9, "model-2026-01-01", "length",
    )  # fmt: skip


def streamed(*texts: str, reason: str = "stop") -> ScriptedAnswer:
    return ScriptedAnswer(*(chunk(text) for text in texts), chunk(finish_reason=reason), STREAM[3], DONE)


def test_a_doubtful_stream_never_begins(table: Make) -> None:
    at = table(Vendors(cheap=[streamed("bad", reason="length")], dear=[streamed("go", "od")]), CHEAP, cascade=EVERY)
    reply, body = at.serve(request(stream=True))
    assert b"bad" not in body
    assert body == chunk("go") + chunk("od") + chunk(finish_reason="stop") + DONE
    assert headers(reply)["x-gateway-escalation"] == "length"
    row = at.row()
    assert (row["cost_usd"]["total"], row["usage"]["total_tokens"]) == (11 * NANOS / 1e9, 24)
    assert [a["outcome"] for a in row["attempts"]] == ["doubtful", "success"]


def test_a_stream_without_doubt_is_relayed_byte_for_byte(table: Make) -> None:
    at = table(Vendors(cheap=[streamed("go", "od")]), CHEAP, cascade=replace(EVERY, mean_logprob=None))
    _, body = at.serve(request(stream=True))
    assert body == chunk("go") + chunk("od") + chunk(finish_reason="stop") + DONE
    assert at.row()["cost_usd"]["total"] == NANOS / 1e9


def test_a_stream_that_is_cut_while_it_is_judged_is_retried_unseen(table: Make) -> None:
    cut = ScriptedAnswer(chunk("ba"))
    at = table(Vendors(cheap=[cut, streamed("good")]), CHEAP, cascade=EVERY)
    _, body = at.serve(request(stream=True))
    assert b"ba" not in body
    assert b"good" in body
    assert [a["outcome"] for a in at.row()["attempts"]] == ["broke", "success"]


def test_log_probabilities_that_only_we_asked_for_are_taken_out_again(table: Make) -> None:
    at = table(Vendors(cheap=[answer(logprobs=[-0.1])]), CHEAP, cascade=EVERY)
    _, body = at.serve(request())
    assert at.vendors.asked[0][1]["logprobs"] is True
    assert json.loads(body)["choices"][0]["logprobs"] is None


def test_a_doubtful_answer_s_connection_is_closed(table: Make) -> None:
    doubtful = answer(reason="length")
    table(Vendors(cheap=[doubtful], dear=[answer()]), CHEAP, cascade=EVERY).serve(request())
    assert doubtful.closed == [True]


def test_a_hang_up_while_the_dearer_target_is_asked_pays_for_the_first_and_the_prompt(table: Make) -> None:
    at = table(Vendors(cheap=[answer(reason="length")], dear=[ScriptedAnswer(UNENDED)]), CHEAP, cascade=EVERY)
    hang_up(at, request(), lambda: at.vendors.models == ["cheap", "dear"])
    row = at.row()
    assert (row["status"], [a["outcome"] for a in row["attempts"]]) == ("client_closed", ["doubtful", "cancelled"])
    prompt = row["usage"]["input_tokens"] - USAGE["prompt_tokens"]
    assert prompt > 0
    assert row["cost_usd"]["total"] == pytest.approx((NANOS + prompt * 10_000) / 1e9)


def hang_up(at: Table, body: bytes, when: Callable[[], bool]) -> None:
    async def scenario() -> None:
        exchange = Exchange(call=at.call(body), patience=Patience())

        async def serve() -> None:
            exchange.patience = Patience()
            await departed(at.rooms.gateway, exchange)

        task = asyncio.ensure_future(serve())
        await until(when)
        exchange.cut = "client_closed"
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(scenario())


# --- refusals that another model may take -----------------------------------------------------------------------------


def refused(code: str) -> ScriptedAnswer:
    return ScriptedAnswer(msgspec.json.encode({"error": {"message": "No.", "code": code}}), status=400)


def test_a_prompt_that_is_too_long_goes_to_the_targets_for_it(table: Make) -> None:
    at = table(
        Vendors(cheap=[refused("context_length_exceeded")], dear=[answer("roomy")]),
        CHEAP,
        SPARE,
        on_context_length=(DEAR,),
    )
    reply, body = at.serve(request())
    assert (said(body), headers(reply)["x-gateway-fallback"]) == ("roomy", "true")
    row = at.row()
    assert [(a["outcome"], a["role"]) for a in row["attempts"]] == [("refused", "chain"), ("success", "context_length")]
    assert row["cost_usd"]["total"] == 10 * NANOS / 1e9


def test_a_filtered_prompt_goes_to_the_targets_for_it(table: Make) -> None:
    at = table(Vendors(cheap=[refused("content_filter")], dear=[answer()]), CHEAP, on_content_filter=(DEAR,))
    at.serve(request())
    assert [a["role"] for a in at.row()["attempts"]] == ["chain", "content_filter"]


def test_an_answer_that_the_vendor_filtered_goes_there_too_and_is_paid_for(table: Make) -> None:
    at = table(Vendors(cheap=[answer("", "content_filter")], dear=[answer("fine")]), CHEAP, on_content_filter=(DEAR,))
    _, body = at.serve(request())
    assert said(body) == "fine"
    assert at.row()["cost_usd"]["total"] == 11 * NANOS / 1e9


def test_a_stream_that_the_vendor_filtered_before_its_first_word_goes_there_too(table: Make) -> None:
    nothing = ScriptedAnswer(chunk(finish_reason="content_filter"), STREAM[3], DONE)
    at = table(Vendors(cheap=[nothing], dear=[streamed("fine")]), CHEAP, on_content_filter=(DEAR,))
    _, body = at.serve(request(stream=True))
    assert b"fine" in body
    assert b"content_filter" not in body


def test_a_filtered_stream_is_an_answer_where_there_is_nobody_else(table: Make) -> None:
    at = table(Vendors(cheap=[ScriptedAnswer(chunk(finish_reason="content_filter"), STREAM[3], DONE)]), CHEAP)
    reply, body = at.serve(request(stream=True))
    assert (reply.status, at.row()["finish_reason"]) == (200, "content_filter")
    assert body.endswith(DONE)


def test_what_a_filter_left_of_a_stream_is_an_answer_where_the_vendor_has_no_terminator(table: Make) -> None:
    at = table(Vendors(cheap=[ScriptedAnswer(chunk(finish_reason="content_filter"))]), CHEAP)
    reply, body = at.serve(request(stream=True))
    assert (reply.status, at.row()["finish_reason"]) == (200, "content_filter")
    assert body.endswith(DONE)


@pytest.mark.parametrize("code", ["context_length_exceeded", "content_filter", "invalid_value"])
def test_other_refusals_and_those_without_a_list_go_to_the_client(table: Make, code: str) -> None:
    lists = {} if code != "invalid_value" else {"on_context_length": (DEAR,), "on_content_filter": (DEAR,)}
    at = table(Vendors(cheap=[refused(code)]), CHEAP, SPARE, **lists)
    reply, body = at.serve(request())
    assert (reply.status, json.loads(body)["error"]["code"]) == (400, code)


@pytest.mark.parametrize("then", [[refused("context_length_exceeded")], [VendorFailed("x"), VendorFailed("x")]])
def test_where_those_fail_too_the_client_gets_the_first_refusal(table: Make, then: list[Any]) -> None:
    at = table(Vendors(cheap=[refused("context_length_exceeded")], dear=then), CHEAP, on_context_length=(DEAR,))
    reply, body = at.serve(request())
    assert (reply.status, json.loads(body)["error"]["code"]) == (400, "context_length_exceeded")


# --- hedges -----------------------------------------------------------------------------------------------------------

SOON = Hedge(0.01, 100.0)


def test_a_second_target_is_asked_where_the_first_says_nothing(table: Make) -> None:
    slow = ScriptedAnswer(UNENDED)
    at = table(Vendors(cheap=[slow], spare=[answer("fast")]), CHEAP, SPARE, hedge=SOON)
    reply, body = at.serve(request())
    assert (said(body), headers(reply)["x-gateway-hedge"], headers(reply)["x-gateway-attempts"]) == (
        "fast",
        "true",
        "2",
    )
    assert slow.closed == [False]
    row = at.row()
    assert [(a["outcome"], a["role"]) for a in row["attempts"]] == [("outrun", "chain"), ("success", "hedge")]


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_of_the_one_that_was_outrun_is_paid_for(table: Make, stream: bool) -> None:
    good = streamed("fast") if stream else answer("fast")
    at = table(Vendors(cheap=[ScriptedAnswer(UNENDED)], spare=[good]), CHEAP, SPARE, hedge=SOON)
    at.serve(request(stream=stream))
    row, (lost, won) = at.row(), at.row()["attempts"]
    prompt = lost["usage"]["input_tokens"]
    assert prompt > 0
    assert lost["cost_usd"]["total"] == prompt * 1_000 / 1e9
    assert won["usage"] is None
    assert row["usage"]["total_tokens"] == 12 + prompt
    assert row["cost_usd"]["total"] == pytest.approx((2 * NANOS + prompt * 1_000) / 1e9)
    ((tokens, nanos),) = at.rooms.limits.settled
    assert (tokens, nanos) == (12 + prompt, 2 * NANOS + prompt * 1_000)


def test_a_first_target_that_answers_in_time_is_alone(table: Make) -> None:
    at = table(Vendors(cheap=[answer()]), CHEAP, SPARE, hedge=Hedge(30.0, 100.0))
    reply, _ = at.serve(request())
    assert at.vendors.models == ["cheap"]
    assert "x-gateway-hedge" not in headers(reply)
    assert at.row()["cost_usd"]["total"] == NANOS / 1e9


def test_beyond_their_share_of_the_calls_nobody_is_asked_beside_the_first(table: Make) -> None:
    class Late(ScriptedAnswer):
        async def read(self, max_bytes: int) -> bytes:
            await asyncio.sleep(5 * SOON.after_seconds)
            return await super().read(max_bytes)

    vendors = Vendors(cheap=[ScriptedAnswer(UNENDED), Late(completion())], spare=[answer()])
    at = table(vendors, CHEAP, SPARE, hedge=replace(SOON, percent=1.0))

    async def both() -> list[bool]:
        return ["x-gateway-hedge" in headers((await at.sent(request()))[0]) for _ in range(2)]

    assert asyncio.run(both()) == [True, False]


def test_an_allowance_is_earned_by_calls_and_never_saved_up_without_end() -> None:
    allowance = Allowance(Stopped(), 0.0)
    assert not allowance.spend()
    for _ in range(10):
        allowance.earn(10.0)
    assert [allowance.spend(), allowance.spend()] == [True, False]
    for _ in range(10_000):
        allowance.earn(100.0)
    assert sum(allowance.spend() for _ in range(10_000)) == MOST


def test_where_the_hedge_fails_the_first_is_waited_for(table: Make) -> None:
    class Late(ScriptedAnswer):
        async def read(self, max_bytes: int) -> bytes:
            await until(lambda: at.vendors.models == ["cheap", "spare"])
            return await super().read(max_bytes)

    at = table(Vendors(cheap=[Late(completion())], spare=[VendorFailed("x")]), CHEAP, SPARE, hedge=SOON)
    reply, _ = at.serve(request())
    assert reply.status == 200
    row = at.row()
    assert [a["outcome"] for a in row["attempts"]] == ["success", "failed"]
    assert (row["cost_usd"]["total"], row["fallback_used"]) == (NANOS / 1e9, False)


def test_where_both_of_a_race_fail_each_attempt_says_its_own(table: Make) -> None:
    class Late(ScriptedAnswer):
        async def read(self, max_bytes: int) -> bytes:
            await until(lambda: at.vendors.models == ["cheap", "spare"])
            await asyncio.sleep(0)
            return b"cut"

    failures: list[Any] = [VendorFailed("x"), VendorFailed("x")]
    at = table(Vendors(cheap=[Late()], spare=failures), CHEAP, SPARE, hedge=SOON)
    reply, _ = at.serve(request())
    assert reply.status == 503
    first, *others = at.row()["attempts"]
    assert (first["outcome"], first["estimated_usd"] > 0) == ("broke", True)
    assert {(a["outcome"], a["estimated_usd"]) for a in others} == {("failed", 0)}


def test_a_failed_first_target_is_retried_as_ever(table: Make) -> None:
    at = table(Vendors(cheap=[VendorFailed("x")], spare=[answer()]), CHEAP, SPARE, hedge=Hedge(30.0, 100.0))
    reply, _ = at.serve(request())
    assert (reply.status, at.vendors.models) == (200, ["cheap", "spare"])


def test_a_hang_up_cancels_both_of_a_race_and_pays_for_both_prompts(table: Make) -> None:
    racing = [ScriptedAnswer(UNENDED), ScriptedAnswer(UNENDED)]
    at = table(Vendors(cheap=racing[:1], spare=racing[1:]), CHEAP, SPARE, hedge=SOON)
    hang_up(at, request(), lambda: at.vendors.models == ["cheap", "spare"])
    assert [each.closed for each in racing] == [[False], [False]]
    row = at.row()
    assert (row["status"], [a["outcome"] for a in row["attempts"]]) == ("client_closed", ["cancelled", "cancelled"])
    prompt = row["usage"]["input_tokens"] // 2
    assert prompt > 0
    assert row["cost_usd"]["total"] == pytest.approx(prompt * (1_000 + 2_000) / 1e9)


def test_two_that_answer_at_once_are_one_answer_and_both_are_paid_for(table: Make) -> None:
    both = asyncio.Event()

    class Together(ScriptedAnswer):
        async def read(self, max_bytes: int) -> bytes:
            if at.vendors.models == ["cheap", "spare"]:
                asyncio.get_running_loop().call_soon(both.set)
            await both.wait()
            return await super().read(max_bytes)

    first, second = Together(completion()), Together(completion())
    at = table(Vendors(cheap=[first], spare=[second]), CHEAP, SPARE, hedge=SOON)
    reply, _ = at.serve(request())
    row = at.row()
    assert reply.status == 200
    assert sorted(a["outcome"] for a in row["attempts"]) == ["outrun", "success"]
    assert first.closed
    assert second.closed
    assert row["cost_usd"]["total"] == 3 * NANOS / 1e9


# --- the retry budget and the breaker ---------------------------------------------------------------------------------


def test_without_a_retry_budget_the_next_target_is_asked_instead(table: Make) -> None:
    at = table(Vendors(cheap=[VendorFailed("x")], spare=[answer()]), CHEAP, SPARE, retry=WrittenRetry())
    at.rooms.gateway.dialogue.retries.balance = at.rooms.gateway.dialogue.retries._least = 0.0
    reply, _ = at.serve(request())
    assert (reply.status, at.vendors.models) == (200, ["cheap", "spare"])


def test_retries_are_a_share_of_the_calls(table: Make) -> None:
    calls = 200
    at = table(
        Vendors(cheap=[VendorFailed("x") for _ in range(3 * calls)]),
        CHEAP,
        retry=WrittenRetry(budget_percent=10.0, backoff_base_seconds=0.0),
        breaker=WrittenBreaker(failures=0),
        ambient=Stopped(),
    )

    async def all_of_them() -> None:
        for _ in range(calls):
            await at.sent(request())

    asyncio.run(all_of_them())
    assert len(at.vendors.models) - calls == 20 + calls // 10


class Stopped(Clock):
    """Time goes by when it is told to."""

    at = 1_000.0

    def now(self) -> float:
        return self.at + self.ahead

    def monotonic(self) -> float:
        return self.at + self.ahead


def test_a_target_that_fails_too_often_is_passed_over_until_one_call_finds_that_it_works(table: Make) -> None:
    clock = Stopped()
    failures: list[Any] = [VendorFailed("x") for _ in range(3)]
    at = table(
        Vendors(cheap=[*failures, answer("back"), answer("back")], spare=[answer("spare") for _ in range(9)]),
        CHEAP, SPARE, ambient=clock,
        retry=WrittenRetry(max_attempts=1), breaker=WrittenBreaker(failures=3, rest_seconds=10.0),
    )  # fmt: skip

    def ask() -> str:
        return said(asyncio.run(at.sent(request()))[1])

    assert [ask() for _ in range(5)] == ["spare"] * 5
    assert at.vendors.models.count("cheap") == 3
    clock.at += 10.0
    assert [ask(), ask()] == ["back", "back"]


def test_while_one_call_finds_out_the_others_pass_the_target_over(table: Make) -> None:
    clock = Stopped()
    at = table(
        Vendors(cheap=[VendorFailed("x"), ScriptedAnswer(UNENDED)], spare=[answer(), answer("other")]),
        CHEAP, SPARE, ambient=clock,
        retry=WrittenRetry(max_attempts=1), breaker=WrittenBreaker(failures=1, rest_seconds=10.0),
    )  # fmt: skip

    async def scenario() -> str:
        await at.sent(request())
        clock.at += 10.0
        finds_out = asyncio.ensure_future(at.sent(request()))
        await until(lambda: at.vendors.models.count("cheap") == 2)
        _, body = await at.sent(request())
        finds_out.cancel()
        await asyncio.wait({finds_out})
        return said(body)

    assert asyncio.run(scenario()) == "other"
    assert at.rooms.gateway.dialogue.cooldowns.resting() == frozenset()  # who was cancelled leaves it to the next one


def test_a_chain_that_rests_whole_is_asked_all_the_same(table: Make) -> None:
    at = table(
        Vendors(cheap=[VendorFailed("x"), answer("back")]), CHEAP, ambient=Stopped(),
        retry=WrittenRetry(max_attempts=1), breaker=WrittenBreaker(failures=1),
    )  # fmt: skip
    assert at.serve(request())[0].status == 503
    assert said(at.serve(request())[1]) == "back"


def test_spent_retries_are_not_the_client_s_to_repeat(table: Make) -> None:
    at = table(Vendors(cheap=[VendorFailed("x"), VendorFailed("x")]), CHEAP)
    reply, _ = at.serve(request())
    assert (reply.status, headers(reply)["x-should-retry"]) == (503, "false")


# --- the limits of vendors --------------------------------------------------------------------------------------------


class Deaf(Vendors):
    """Whoever has no script is a vendor that accepts no connection, asked by the engine of production."""

    def __init__(self, origin: str, **script: list[ScriptedAnswer | VendorError]) -> None:
        super().__init__(**script)
        self.origin = origin

    async def open(self, outgoing: Outgoing, connect_seconds: float) -> Any:
        model = json.loads(outgoing.body)["model"]
        if model in self._script:
            return await super().open(outgoing, connect_seconds)
        self.asked.append((model, {}))
        return await Http1(ssl.create_default_context(), Ambient()).open(
            replace(outgoing, url=f"{self.origin}/v1/chat/completions"), connect_seconds
        )


def limited(at: Table, limits: Timeouts) -> Table:
    alias = replace(at.config.aliases[ALIAS], timeouts=limits)
    at.config = replace(at.config, aliases={ALIAS: alias})
    return at


@pytest.mark.parametrize("stream", [False, True])
def test_a_vendor_that_accepts_no_connection_is_left_after_the_connect_limit(table: Make, stream: bool) -> None:
    with accepting_nobody() as origin:
        vendors = Deaf(origin, spare=[streamed("hello") if stream else answer()])
        at = limited(table(vendors, CHEAP, SPARE), Timeouts(0.05, 60.0, 60.0, 60.0, 120.0))
        reply, body = at.serve(request(stream=stream))
    assert (reply.status, b"hello" in body, headers(reply)["x-gateway-fallback"]) == (200, True, "true")
    assert [(tried["target"], tried["outcome"]) for tried in at.row()["attempts"]] == [
        *[(CHEAP.name, "unreachable")] * (len(vendors.models) - 1), (SPARE.name, "success"),
    ]  # fmt: skip


def test_a_stream_that_falls_silent_ends_after_the_idle_limit_with_one_error_and_its_row(table: Make) -> None:
    silent = ScriptedAnswer(*STREAM[:2], UNENDED)
    vendors = Vendors(cheap=[silent], spare=[answer()])
    at = limited(table(vendors, CHEAP, SPARE), Timeouts(60.0, 60.0, 60.0, 0.05, 120.0))
    reply, body = at.serve(request(stream=True))
    data = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    errors = [frame for frame in data if b'"error"' in frame]
    assert (reply.status, len(errors), data[-2:]) == (200, 1, [errors[0], b"[DONE]"])
    assert json.loads(errors[0])["error"]["code"] == "upstream_unavailable"
    assert (vendors.models, silent.closed) == (["cheap"], [False])
    row = at.row()
    assert (row["status"], row["error_code"], row["usage_source"]) == ("error", "upstream_unavailable", "estimated")
    assert row["cost_usd"]["total"] > 0


def test_two_replicas_share_a_breaker_and_each_finds_out_for_itself(tmp_path: Path) -> None:
    """Over a real Redis: one breaks, the other passes over; a probe that fails is a rest for both; then it works."""
    clock = Stopped()
    fails = [VendorFailed("x") for _ in range(4)]

    def replica(name: str, pipe: RedisPipe, cheap: list[Any]) -> tuple[Table, Control]:
        vendors = Vendors(cheap=cheap, spare=[answer("spare") for _ in range(9)])
        once, breaker = WrittenRetry(max_attempts=1), WrittenBreaker(failures=3, rest_seconds=10.0)
        (tmp_path / name).mkdir()
        at = Table(tmp_path / name, vendors, settings(CHEAP, SPARE, retry=once, breaker=breaker), clock)
        control = Control(pipe, clock, lambda kind, target, entry: cooldowns.heard(target, entry))
        cooldowns = Cooldowns(clock, control, name)
        at.rooms.dialogue.cooldowns = cooldowns
        return at, control

    async def ask(at: Table) -> str:
        text = said((await at.sent(request()))[1])
        await until(lambda: not at.rooms.dialogue.cooldowns._telling)
        for control in controls:
            await control.run_once()
        return text

    controls: list[Control] = []

    async def scenario(url: str) -> tuple[list[str], list[str], list[str]]:
        pipes = [RedisPipe(url, AMBIENT, timeout_ms=5_000, probe_seconds=0.02) for _ in range(2)]
        async with running(pipes[0]), running(pipes[1]):
            (one, control), (two, other) = (
                replica("one", pipes[0], [*fails, answer("back")]),
                replica("two", pipes[1], [answer("back")]),
            )
            controls.extend((control, other))
            broken = [await ask(one) for _ in range(3)] + [await ask(two)]
            clock.at += 10.0
            probed = [await ask(one), await ask(two)]
            assert (one.vendors.models.count("cheap"), two.vendors.models.count("cheap")) == (4, 0)
            clock.at += 20.0
            mended = [await ask(two), await ask(one)]
            one.rooms.spool.close()
            two.rooms.spool.close()
            return broken, probed, mended

    with redis_server(tmp_path) as server:
        broken, probed, mended = run(scenario(server.url))
    assert (broken, probed, mended) == (["spare"] * 4, ["spare"] * 2, ["back"] * 2)
