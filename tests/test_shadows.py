"""Copies of calls: after the call, at the gateway's own expense, and never in anybody's way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.config import Shadow
from app.errors import VendorFailed
from app.providers.translator import Outgoing
from app.shadows import MOST_AT_ONCE
from tests.gateway_parts import STREAM, UNENDED, Clock, ScriptedAnswer, request
from tests.test_second_thoughts import CHEAP, DEAR, NANOS, Table, Vendors, answer, hang_up, headers, settings, streamed
from tests.vendors import until

ALL = Shadow(DEAR, 100.0)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Callable[..., Table]]:
    made: list[Table] = []

    def make(vendors: Vendors, shadow: Shadow = ALL) -> Table:
        made.append(Table(tmp_path, vendors, settings(CHEAP, shadow=shadow), Clock()))
        return made[-1]

    yield make
    for each in made:
        each.rooms.spool.close()


Make = Callable[..., Table]


def run(at: Table, scenario: Callable[[], Awaitable[Any]], rows: int = 2) -> Any:
    """The scenario's result, once so many rows are there."""

    async def whole() -> Any:
        result = await scenario()
        await until(lambda: len(at.rooms.rows()) >= rows)
        return result

    return asyncio.run(whole())


def by_purpose(at: Table) -> dict[str, dict[str, Any]]:
    return {row["purpose"]: row for row in at.rooms.rows()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_copy_has_a_row_of_the_gateway_s_own_and_costs_the_tenant_nothing(table: Make, stream: bool) -> None:
    good = [streamed("a"), streamed("b")] if stream else [answer(), answer()]
    at = table(Vendors(cheap=good[:1], dear=good[1:]))
    reply, _ = run(at, lambda: at.sent(request(stream=stream)))
    assert headers(reply)["x-gateway-shadow"] == "true"
    rows = by_purpose(at)
    client, shadow = rows["client"], rows["shadow"]
    assert (client["tenant_id"], client["cost_usd"]["total"]) == ("acme-corp", NANOS / 1e9)
    assert (shadow["tenant_id"], shadow["cost_usd"]["total"]) == ("_gateway", 10 * NANOS / 1e9)
    assert (shadow["request_id"], shadow["status"]) == (f"shadow_{client['request_id']}", "success")
    assert [a["role"] for a in shadow["attempts"]] == ["shadow"]
    assert shadow["event_id"] != client["event_id"]
    assert at.rooms.limits.settled == [(12, NANOS)]
    assert len(at.rooms.limits.reserved) == 1


def test_a_copy_is_sent_when_the_call_has_its_row_and_its_last_byte(table: Make) -> None:
    events: list[str] = []

    class Watched(Vendors):
        async def open(self, outgoing: Outgoing, connect_seconds: float) -> ScriptedAnswer:
            asked = await super().open(outgoing, connect_seconds)
            events.append(f"{self.models[-1]}, {len(at.rooms.rows())} rows")
            return asked

    at = table(Watched(cheap=[streamed("a")], dear=[streamed("b")]))

    async def scenario() -> None:
        await at.sent(request(stream=True))
        events.append("sent")

    run(at, scenario)
    assert events == ["cheap, 0 rows", "sent", "dear, 1 rows"]


@pytest.mark.parametrize(
    ("said", "status"), [(VendorFailed("x"), "error"), (ScriptedAnswer(b"{}", status=400), "refused")]
)
def test_a_copy_that_fails_is_not_tried_again_and_nobody_hears_of_it(table: Make, said: Any, status: str) -> None:
    at = table(Vendors(cheap=[answer()], dear=[said]))
    reply, _ = run(at, lambda: at.sent(request()))
    assert reply.status == 200
    assert by_purpose(at)["shadow"]["status"] == status
    assert at.vendors.models == ["cheap", "dear"]


def test_a_copy_whose_stream_breaks_has_one_row_that_says_so(table: Make) -> None:
    at = table(Vendors(cheap=[streamed("a")], dear=[ScriptedAnswer(STREAM[0])]))
    run(at, lambda: at.sent(request(stream=True)))
    shadow = by_purpose(at)["shadow"]
    assert (shadow["status"], shadow["error_code"]) == ("error", "upstream_unavailable")


@pytest.mark.parametrize(("percent", "copied"), [(50.0, False), (50.1, True)])
def test_a_share_of_the_calls_is_copied(table: Make, percent: float, copied: bool) -> None:
    at = table(Vendors(cheap=[answer()], dear=[answer()]), Shadow(DEAR, percent))
    reply, _ = run(at, lambda: at.sent(request()), rows=1 + copied)
    assert ("x-gateway-shadow" in headers(reply)) is copied


def test_a_call_that_failed_or_was_hung_up_is_not_copied(table: Make) -> None:
    at = table(Vendors(cheap=[VendorFailed("x"), VendorFailed("x"), ScriptedAnswer(STREAM[0], UNENDED)], dear=[]))
    asyncio.run(at.sent(request()))
    hang_up(at, request(stream=True), lambda: len(at.vendors.asked) == 3)
    assert at.rooms.telemetry.mirrored == []


def test_a_copy_for_which_there_is_no_room_is_dropped_and_counted(table: Make) -> None:
    calls = MOST_AT_ONCE + 2
    at = table(Vendors(cheap=[answer() for _ in range(calls)], dear=[ScriptedAnswer(UNENDED) for _ in range(calls)]))

    async def scenario() -> None:
        for number in range(calls):
            await at.sent(request())
            await until(lambda number=number: at.vendors.models.count("dear") == min(number + 1, MOST_AT_ONCE))
        await at.rooms.gateway.shadows.close()

    run(at, scenario, rows=calls + MOST_AT_ONCE)
    outcomes = [outcome for _, _, outcome in at.rooms.telemetry.mirrored]
    assert outcomes == ["sent"] * MOST_AT_ONCE + ["dropped"] * 2


def test_copies_that_a_drain_ends_have_rows_that_say_so_and_their_vendor_stops(table: Make) -> None:
    slow = ScriptedAnswer(STREAM[0], UNENDED)
    at = table(Vendors(cheap=[streamed("a")], dear=[slow]))

    async def scenario() -> None:
        await at.sent(request(stream=True))
        await until(lambda: at.vendors.models == ["cheap", "dear"])
        await at.rooms.gateway.shadows.close()

    run(at, scenario)
    assert by_purpose(at)["shadow"]["status"] == "interrupted"
    assert slow.closed
