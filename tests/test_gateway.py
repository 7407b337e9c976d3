"""The journey of a call where a room fails: one row, one settlement, and an answer that says so."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.ambient import Patience
from app.config import Price, Rate, Tariff, Timeouts
from app.core import Call, Cut, Exchange, Reply
from app.dialogue import MAX_ERROR_BYTES
from app.errors import RequestTooLarge, VendorBroke, VendorFailed
from tests.gateway_parts import (
    ALIAS,
    DONE,
    STREAM,
    UNENDED,
    USAGE,
    USAGE_FRAME,
    Clock,
    FailingSpool,
    Rooms,
    ScriptedAnswer,
    call,
    chunk,
    completion,
    config,
    departed,
    frame,
    headers_of,
    request,
)
from tests.vendors import until

Make = Callable[..., Rooms]
UNARY, STREAMED = request(), request(stream=True)


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Make]:
    """Makes the gateway of a test."""
    made: list[Rooms] = []

    def make(*script: Any, **fields: Any) -> Rooms:
        made.append(Rooms(tmp_path, *script, **({"ambient": Clock()} | fields)))
        return made[-1]

    yield make
    for each in made:
        each.spool.close()


async def sent(rooms: Rooms, call: Call, out: list[bytes], why: Cut | None = None) -> Reply:
    """Serves a call as the front door does; `out` gets each part of the body. `why` is who would cancel it."""
    exchange = Exchange(call=call, patience=Patience(), cut=why)
    return await departed(rooms.gateway, exchange, out.append)


def serve(rooms: Rooms, body: bytes, **fields: Any) -> tuple[Reply, bytes]:
    """The reply to a call, and its whole body."""
    out: list[bytes] = []
    reply = asyncio.run(sent(rooms, call(body, rooms.ambient, **fields), out))
    return reply, b"".join(out)


def hang_up(rooms: Rooms, body: bytes, why: Cut = "client_closed") -> type[BaseException] | None:
    """Cancels a stream once its first part is out; returns what the task ended with."""

    async def scenario() -> type[BaseException] | None:
        out: list[bytes] = []
        task = asyncio.ensure_future(sent(rooms, call(body, rooms.ambient), out, why))
        await until(lambda: bool(out))
        task.cancel()
        await asyncio.wait({task})
        return asyncio.CancelledError if task.cancelled() else type(task.exception())

    return asyncio.run(scenario())


def texts(written: object) -> Iterator[str]:
    """Every text in a row."""
    if isinstance(written, str):
        yield written
    elif isinstance(written, dict | list):
        for part in written.values() if isinstance(written, dict) else written:
            yield from texts(part)


# --- a defect ---------------------------------------------------------------------------------------------------------


def test_a_defect_while_a_unary_answer_is_read_leaves_one_row_that_says_so(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(TypeError("defect")))
    with pytest.raises(TypeError, match="defect"):
        serve(at, UNARY)
    row = at.row()
    assert (row["status"], row["error_code"]) == ("error", "internal_error")


def test_a_defect_in_mid_stream_leaves_one_row_that_says_so(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], TypeError("defect")))
    with pytest.raises(TypeError, match="defect"):
        serve(at, STREAMED)
    row = at.row()
    assert (row["status"], row["error_code"]) == ("error", "internal_error")


def test_a_defect_in_what_sends_the_reply_leaves_one_row_that_says_so(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], UNENDED))

    async def depart(reply: Reply) -> None:
        raise TypeError("defect")

    async def scenario() -> None:
        await at.gateway.serve(Exchange(call=call(STREAMED, at.ambient), patience=Patience()), depart)

    with pytest.raises(TypeError, match="defect"):
        asyncio.run(scenario())
    row = at.row()
    assert (row["status"], row["error_code"]) == ("error", "internal_error")


class LateAnswer(ScriptedAnswer):
    """Its end comes in the turn of the event loop in which it is given up, and after that."""

    def __init__(self, seconds: float) -> None:
        super().__init__(STREAM[0])
        self._seconds = seconds

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        loop = asyncio.get_running_loop()
        loop.call_later(self._seconds, take, b"".join(STREAM[1:]))
        loop.call_soon(time.sleep, 2 * self._seconds)  # both timers are due when it has ended
        await asyncio.Event().wait()
        return True


def test_a_stream_whose_end_comes_as_it_is_given_up_ends_once(rooms: Make) -> None:
    idle = 0.05
    at = rooms(LateAnswer(idle))
    plain = config()
    impatient = msgspec.structs.replace(plain.aliases[ALIAS], timeouts=Timeouts(1.0, 5.0, 5.0, idle, 5.0))
    out: list[bytes] = []

    async def scenario() -> None:
        late = call(STREAMED, at.ambient, config=msgspec.structs.replace(plain, aliases={ALIAS: impatient}))
        exchange = Exchange(call=late, patience=Patience())

        async def depart(reply: Reply) -> None:
            exchange.send = lambda part: out.append(part) is None
            async for part in reply.frames:
                out.append(part)

        await at.gateway.serve(exchange, depart)

    asyncio.run(scenario())
    body = b"".join(out)
    assert body.count(DONE) == 1
    assert b'"code":"upstream_unavailable"' in body
    assert at.row()["status"] == "error"


def test_a_defect_settles_the_limits_once(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(TypeError("defect")))
    with contextlib.suppress(TypeError):
        serve(at, UNARY)
    assert len(at.limits.settled) == 1


# --- a spool that takes no row ----------------------------------------------------------------------------------------


def test_a_unary_answer_whose_row_cannot_be_written_is_a_503(rooms: Make) -> None:
    reply, body = serve(rooms(ScriptedAnswer(completion()), spool=FailingSpool), UNARY)
    assert (reply.status, b'"code":"ledger_unavailable"' in body, b"hello" in body) == (503, True, False)


def test_a_unary_answer_whose_row_cannot_be_written_is_seen_as_an_error(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(completion()), spool=FailingSpool)
    serve(at, UNARY)
    assert [(event.status, event.error_code) for event in at.telemetry.recorded] == [("error", "ledger_unavailable")]


@pytest.mark.parametrize("body", [UNARY, STREAMED], ids=["unary", "stream"])
def test_an_answer_whose_row_cannot_be_written_is_settled_with_the_limits_once(rooms: Make, body: bytes) -> None:
    at = rooms(ScriptedAnswer(*(STREAM if body is STREAMED else [completion()])), spool=FailingSpool)
    serve(at, body)
    assert [tokens for tokens, _ in at.limits.settled] == [USAGE["total_tokens"]]


def test_a_stream_whose_row_cannot_be_written_ends_with_one_error_event(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(*STREAM), spool=FailingSpool)
    _, body = serve(at, STREAMED)
    *_, last, terminator = body.split(b"\n\n")[:-1]
    assert (body.count(b'"error"'), b'"ledger_unavailable"' in last, terminator + b"\n\n") == (1, True, DONE)


def test_a_stream_whose_row_cannot_be_written_is_seen_as_an_error(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(*STREAM), spool=FailingSpool)
    serve(at, STREAMED)
    assert [(event.status, event.error_code) for event in at.telemetry.recorded] == [("error", "ledger_unavailable")]


def test_a_broken_stream_whose_row_cannot_be_written_still_ends_with_one_error_event(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], VendorBroke("cut")), spool=FailingSpool)
    _, body = serve(at, STREAMED)
    assert (body.count(b'"error"'), body.endswith(DONE)) == (1, True)


def test_a_cancellation_is_not_replaced_by_the_spools_failure(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], UNENDED), spool=FailingSpool)
    assert hang_up(at, STREAMED) is asyncio.CancelledError


# --- a vendor's error -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[b"x" * (MAX_ERROR_BYTES + 1)], [VendorBroke("cut")]], ids=["too large", "cut"])
def test_an_error_whose_body_cannot_be_read_is_classed_by_its_status(rooms: Make, parts: list[Any]) -> None:
    at = rooms(ScriptedAnswer(*parts, status=401))
    reply, _ = serve(at, UNARY)
    row = at.row()
    assert (reply.status, row["error_code"]) == (502, "upstream_misconfigured")
    assert [(attempt["outcome"], attempt["status"]) for attempt in row["attempts"]] == [("misconfigured", 401)]


# --- closing the vendor's answer --------------------------------------------------------------------------------------


def test_a_failure_to_close_the_vendors_answer_leaves_the_row(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], UNENDED, close_fails=RuntimeError("close")))
    hang_up(at, STREAMED)
    assert at.row()["status"] == "client_closed"


def test_a_failure_to_close_the_vendors_answer_leaves_the_settlement(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], UNENDED, close_fails=RuntimeError("close")))
    hang_up(at, STREAMED)
    assert len(at.limits.settled) == 1


def test_a_stream_that_was_read_to_its_last_event_is_closed_as_ended(rooms: Make) -> None:
    answer = ScriptedAnswer(*STREAM)
    serve(rooms(answer), STREAMED)
    assert answer.closed == [True]


def test_a_stream_whose_client_hung_up_is_not_closed_as_ended(rooms: Make) -> None:
    answer = ScriptedAnswer(STREAM[0], UNENDED)
    hang_up(rooms(answer), STREAMED)
    assert answer.closed == [False]


def test_a_stream_that_broke_is_not_closed_as_ended(rooms: Make) -> None:
    answer = ScriptedAnswer(STREAM[0], VendorBroke("cut"))
    serve(rooms(answer), STREAMED)
    assert answer.closed == [False]


# --- a vendor's words -------------------------------------------------------------------------------------------------

WORDS = {"control characters": "model\r\nset-cookie: a=b\x00\x1b", "10,000 characters": "m" * 10_000, "no ASCII": "é😀"}


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_no_word_of_a_vendor_enters_a_header_or_the_row_as_it_came(rooms: Make, word: str, stream: bool) -> None:
    if stream:
        parts = [chunk("hello", model=word), chunk(finish_reason=word), USAGE_FRAME, DONE]
    else:
        choice = {"index": 0, "message": {"content": "hello"}, "finish_reason": word}
        parts = [completion(model=word, choices=[choice])]
    at = rooms(ScriptedAnswer(*parts, headers={"x-request-id": word}))
    reply, _ = serve(at, STREAMED if stream else UNARY)
    values = headers_of(reply).values()
    row = at.row()
    assert all(len(text) <= 128 and text.isascii() and text.isprintable() for text in [*values, *texts(row)])
    assert (reply.status, row["status"], "set-cookie" in headers_of(reply)) == (200, "success", False)


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_a_refusing_vendors_code_does_not_enter_the_row_as_it_came(rooms: Make, word: str) -> None:
    at = rooms(ScriptedAnswer(frame({"message": "no", "code": word})[6:], status=400, headers={"x-request-id": word}))
    serve(at, UNARY)
    row = at.row()
    assert row["status"] == "refused"
    assert all(len(text) <= 128 and text.isascii() and text.isprintable() for text in texts(row))


# --- streams ----------------------------------------------------------------------------------------------------------


def test_usage_before_the_first_content_is_withheld_from_a_client_that_did_not_ask(rooms: Make) -> None:
    _, body = serve(rooms(ScriptedAnswer(USAGE_FRAME, *STREAM)), STREAMED)
    assert body == STREAM[0] + STREAM[1] + STREAM[2] + DONE


def test_usage_before_the_first_content_reaches_a_client_that_asked(rooms: Make) -> None:
    asking = request(stream=True, stream_options={"include_usage": True})
    _, body = serve(rooms(ScriptedAnswer(USAGE_FRAME, *STREAM)), asking)
    assert body == USAGE_FRAME + b"".join(STREAM)


BREAKS = {"cut": [VendorBroke("cut")], "ended early": [], "an error event": [frame({"error": {"message": "no"}})]}


@pytest.mark.parametrize("rest", BREAKS.values(), ids=BREAKS)
def test_a_stream_that_breaks_after_its_first_content_is_no_successful_attempt(rooms: Make, rest: list[Any]) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], *rest))
    serve(at, STREAMED)
    assert [attempt["outcome"] for attempt in at.row()["attempts"]] == ["broke"]


def test_a_stream_that_breaks_after_its_first_content_is_charged(rooms: Make) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], VendorBroke("cut")))
    serve(at, STREAMED)
    row = at.row()
    assert (row["usage_source"], row["usage"]["output_tokens"]) == ("estimated", 1)


@pytest.mark.parametrize(
    ("why", "status"), [("client_closed", "client_closed"), ("drain", "interrupted"), ("deadline", "timeout")]
)
def test_the_row_of_a_stream_that_was_cut_says_who_cut_it(rooms: Make, why: Cut, status: str) -> None:
    at = rooms(ScriptedAnswer(STREAM[0], UNENDED))
    hang_up(at, STREAMED, why)
    assert at.row()["status"] == status


# --- refusals and waits -----------------------------------------------------------------------------------------------


def test_the_row_of_a_fault_at_reception_has_its_tenant(rooms: Make) -> None:
    at = rooms()
    reply, _ = serve(at, b"", fault=RequestTooLarge("too large"))
    row = at.row()
    assert (reply.status, row["status"], row["tenant_id"]) == (413, "refused", "acme-corp")


def test_the_wait_before_a_retry_is_no_time_of_ours(rooms: Make) -> None:
    at = rooms(VendorFailed("no"), ScriptedAnswer(completion()))
    serve(at, UNARY)
    latency = at.row()["latency_ms"]
    assert at.ambient.ahead == pytest.approx(1.0)  # half the backoff's base of two seconds, by the clock's chance
    assert latency["total"] >= 1000
    assert latency["gateway"] < 500


# --- money ---


def test_a_call_is_charged_by_the_service_tier_it_was_answered_in(rooms: Make) -> None:
    usual, dear = (Price(**dict.fromkeys(Price.__struct_fields__, usd * 10**9)) for usd in (1, 2))
    tariff = Tariff(Rate(usual), service_tiers={"priority": Rate(dear)})
    made = config()
    alias = made.aliases[ALIAS]
    tiered = msgspec.structs.replace(alias.targets[0], price=usual, tariff=tariff)
    aliases = {ALIAS: msgspec.structs.replace(alias, targets=(tiered,))}
    gateway = rooms(ScriptedAnswer(completion(service_tier="priority")))
    serve(gateway, UNARY, config=msgspec.structs.replace(made, aliases=aliases))
    row = gateway.row()
    assert (row["service_tier"], row["cost_usd"]["total"]) == ("priority", 0.000024)
