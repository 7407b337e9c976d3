"""The front door against clients of its own: bodies that never come, clients that never read, headers sent twice."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct

import app.api
import app.bodies
from app.ambient import Ambient, Patience
from app.api import LARGE_SECONDS, ONE_PIECE_BYTES, FrontDoor
from app.auth import Callers
from app.config import Config
from app.core import Exchange
from app.dialects import ROUTES
from app.errors import VendorBroke
from app.telemetry import JsonLog, Lines
from app.visits import Head
from tests.gateway_parts import (
    ALIAS,
    STREAM,
    UNENDED,
    Clock,
    Rooms,
    ScriptedAnswer,
    completion,
    config,
    frame,
    request,
)
from tests.test_auth import KEY, WIDE_KEY, NoTokens

Door = Callable[..., Rooms]
Headers = list[tuple[bytes, bytes]]
UNKNOWN_KEY = KEY.replace("a" * 43, "z" * 43)
STALLED_SECONDS = 0.1


class Source(Struct):
    """Stands for `ConfigSource`: one snapshot."""

    current: Config


class Client:
    """The client's end, in the place of a `Visit`. It sends `body`, or nothing for None.

    It reads the first `reads` things that it is sent, and then no more.
    """

    def __init__(self, body: bytes | None, headers: Headers, reads: int = 1_000) -> None:
        self.raw_headers = dict(reversed(headers))
        self.method = "POST"
        self.gone = self.started = self.ended = False
        self.came_at = 0.0
        self.on_hang_up: Callable[[], object] | None = None
        self.status = 0
        self.body = b""
        self._request = body
        self._reads = reads

    def at_once(self) -> bytes | None:
        return self._request

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("it never comes")

    @property
    def blocked(self) -> bool:
        return self._reads <= 0

    async def drained(self) -> None:
        while self.blocked:
            await asyncio.Event().wait()

    def whole(self, status: int, head: Head, body: bytes) -> None:
        self.start(status, head)
        self.write(body)
        self.end()

    def start(self, status: int, head: Head) -> None:
        self.started, self.status = True, status
        self._reads -= 1

    def write(self, data: bytes) -> None:
        self.body += data
        self._reads -= 1

    def end(self) -> None:
        self.ended = True

    async def visit(self, door: FrontDoor, path: str = "/v1/chat/completions") -> None:
        """Comes to the front door, and stays until it is let out."""
        self.task = asyncio.current_task()
        self.patience = Patience()
        await door.serve(ROUTES[path], self)


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Door]:
    """Makes the gateway behind a test's front door."""
    made: list[Rooms] = []

    def make(*script: ScriptedAnswer) -> Rooms:
        made.append(Rooms(tmp_path, *script, ambient=Ambient()))
        return made[-1]

    yield make
    for each in made:
        each.spool.close()


def headers(*, keys: tuple[str, ...] = (KEY,), tenants: tuple[str, ...] = ("acme-corp",)) -> Headers:
    credentials = [(b"authorization", b"Bearer " + key.encode()) for key in keys]
    return credentials + [(b"x-tenant-id", tenant.encode()) for tenant in tenants]


def visit(rooms: Rooms, client: Client, longest_seconds: float = 5.0, path: str = "/v1/chat/completions") -> FrontDoor:
    """Lets the client in, and returns when the front door is done with it; fails after a minute."""
    door = FrontDoor(Source(config(longest_seconds=longest_seconds)), rooms.gateway, Callers(NoTokens()), rooms.ambient)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            await client.visit(door, path)

    asyncio.run(scenario())
    return door


@pytest.mark.parametrize(
    ("ratio", "flags", "sampled"), [(0.6, None, True), (0.4, None, False), (0.4, b"01", True), (0.6, b"00", False)]
)
def test_a_call_is_sampled_as_its_caller_says_and_without_a_word_by_the_ratio(
    rooms: Door, ratio: float, flags: bytes | None, sampled: bool
) -> None:
    class Half(Ambient):
        def random(self) -> float:
            return 0.5

    class Kept:
        def record(self, exchange: Exchange, *_: object) -> None:
            seen.append(exchange.call.sampled)

    seen: list[bool] = []
    at = rooms(ScriptedAnswer(completion()))
    at.gateway.telemetry = Kept()
    plain = config()
    settings = msgspec.structs.replace(plain.settings, trace_sample_ratio=ratio)
    source = Source(msgspec.structs.replace(plain, settings=settings))
    parent = (
        [] if flags is None else [(b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-" + flags)]
    )
    door = FrontDoor(source, at.gateway, Callers(NoTokens()), Half())
    asyncio.run(Client(request(), headers() + parent).visit(door))
    assert seen == [sampled]


# --- a body that never comes ------------------------------------------------------------------------------------------


@pytest.fixture
def short_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.bodies, "UPLOAD_SECONDS", 0.05)


@pytest.mark.usefixtures("short_upload")
def test_a_body_that_never_comes_is_given_up_with_400(rooms: Door) -> None:
    client = Client(None, headers())
    visit(rooms(), client)
    assert (client.status, b'"code":"invalid_request"' in client.body) == (400, True)


@pytest.mark.usefixtures("short_upload")
def test_a_body_that_never_comes_leaves_a_row(rooms: Door) -> None:
    at = rooms()
    visit(at, Client(None, headers()))
    row = at.row()
    assert (row["status"], row["error_code"], row["tenant_id"]) == ("refused", "invalid_request", "acme-corp")


# --- a defect ---------------------------------------------------------------------------------------------------------


class Kept(Lines):
    """Lines that stay here."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def write(self, line: bytes) -> None:
        self.written.append(json.loads(line))


@pytest.fixture
def log() -> Iterator[list[dict[str, Any]]]:
    """The log of the process, as a replica writes it."""
    lines = Kept()
    handler = JsonLog(lines, Ambient())
    logging.getLogger().addHandler(handler)
    yield lines.written
    logging.getLogger().removeHandler(handler)


def test_the_line_of_a_defect_names_the_call_s_request_and_trace(rooms: Door, log: list[dict[str, Any]]) -> None:
    at = rooms(ScriptedAnswer(TypeError("a defect")))
    client = Client(request(), headers())
    visit(at, client)
    assert client.status == 500
    row = at.row()
    (line,) = [line for line in log if "traceback" in line]
    assert (line["level"], line["request_id"], line["trace_id"]) == ("error", row["request_id"], row["trace_id"])
    assert "TypeError: a defect" in line["traceback"]


def test_a_line_about_no_call_names_none(log: list[dict[str, Any]]) -> None:
    logging.getLogger("app.test").warning("of nobody")
    (line,) = log
    assert line.keys() == {"time", "level", "message", "logger"}


@pytest.mark.parametrize("keep_alive", [b": \n\n", b": \n\n: \n\n"])
def test_the_error_that_ends_a_stream_is_numbered_past_a_keep_alive(rooms: Door, keep_alive: bytes) -> None:
    def event(number: int, **members: Any) -> bytes:
        return frame({"type": "response.output_text.delta", "sequence_number": number, "delta": "x"} | members)

    opened = event(0, type="response.created", response={"id": "resp_1", "status": "in_progress"})
    at = rooms(ScriptedAnswer(opened, event(7), keep_alive, VendorBroke("cut")))
    client = Client(json.dumps({"model": ALIAS, "input": "Hi", "stream": True}).encode(), headers())
    visit(at, client, path="/v1/responses")
    *_, last = [json.loads(line[6:]) for line in client.body.split(b"\n") if line.startswith(b"data: ")]
    assert keep_alive in client.body
    assert (last["type"], last["sequence_number"]) == ("error", 8)


# --- a client that never reads ----------------------------------------------------------------------------------------


@pytest.fixture
def short_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.api, "STALLED_SECONDS", STALLED_SECONDS)


@pytest.mark.usefixtures("short_stall")
@pytest.mark.parametrize("reads", [0, 1], ids=["no head", "the head only"])
def test_a_stream_whose_client_never_reads_ends_as_a_timeout(rooms: Door, reads: int) -> None:
    at = rooms(ScriptedAnswer(*STREAM[:2], UNENDED))
    visit(at, Client(request(stream=True), headers(), reads), longest_seconds=0.1)
    assert at.row()["status"] == "timeout"


class Counted(ScriptedAnswer):
    """Counts how often it was asked for its next part."""

    asked = 0

    async def chunk(self) -> bytes | None:
        self.asked += 1
        return await super().chunk()


@pytest.mark.usefixtures("short_stall")
@pytest.mark.parametrize("reads", [2, 9])
def test_of_a_vendor_no_more_is_read_than_the_client_reads(rooms: Door, reads: int) -> None:
    answer, client = Counted(*STREAM[:1] * 50, UNENDED), Client(request(stream=True), headers(), reads)
    visit(rooms(answer), client, longest_seconds=0.5)
    assert (answer.asked, client.body) == (reads - 1, STREAM[0] * (reads - 1))


@pytest.mark.usefixtures("short_stall")
def test_a_client_that_never_reads_has_until_after_the_longest_deadline(rooms: Door) -> None:
    started = time.monotonic()
    visit(rooms(ScriptedAnswer(*STREAM[:2], UNENDED)), Client(request(stream=True), headers(), 0), longest_seconds=0.2)
    assert time.monotonic() - started >= 0.2 + STALLED_SECONDS - 0.01


@pytest.mark.usefixtures("short_stall")
def test_a_client_that_never_reads_is_in_flight_no_more_when_it_was_ended(rooms: Door) -> None:
    at = rooms(ScriptedAnswer(*STREAM[:2], UNENDED))
    assert not visit(at, Client(request(stream=True), headers(), 0), longest_seconds=0.1).in_flight


@pytest.mark.usefixtures("short_stall")
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_a_client_that_never_reads_the_end_of_its_answer_is_ended_too(rooms: Door, stream: bool) -> None:
    at = rooms(ScriptedAnswer(b"".join(STREAM)) if stream else ScriptedAnswer(completion()))
    visit(at, Client(request(stream=stream), headers(), reads=1), longest_seconds=0.1)
    assert at.row()["status"] == "success"


# --- answers that are there at once ----------------------------------------------------------------------------------


class Still(Clock):
    """Time goes by in sleep alone, and there without waiting."""

    def monotonic(self) -> float:
        return 1_000.0 + self.ahead


@pytest.mark.parametrize(
    ("filler", "waited", "slept"),
    [
        (0, 0.0, 0.0),
        (ONE_PIECE_BYTES, 0.0, LARGE_SECONDS),
        (ONE_PIECE_BYTES, LARGE_SECONDS / 4, LARGE_SECONDS * 3 / 4),
        (ONE_PIECE_BYTES, 2 * LARGE_SECONDS, 0.0),
    ],
)
def test_an_answer_in_pieces_begins_no_sooner_than_the_edge_has_seen_its_request_end(
    tmp_path: Path, filler: int, waited: float, slept: float
) -> None:
    rooms = Rooms(tmp_path, ScriptedAnswer(completion(system_fingerprint="f" * filler)), ambient=Still())
    client = Client(request(), headers())
    client.came_at = rooms.ambient.monotonic() - waited
    visit(rooms, client)
    rooms.spool.close()
    assert (client.status, rooms.ambient.ahead) == (200, pytest.approx(slept))


# --- headers sent twice -----------------------------------------------------------------------------------------------


def test_of_two_tenants_the_first_counts(rooms: Door) -> None:
    at = rooms(ScriptedAnswer(completion()))
    client = Client(request(), headers(keys=(WIDE_KEY,), tenants=("acme-corp", "tools")))
    visit(at, client)
    assert (client.status, at.row()["tenant_id"]) == (200, "acme-corp")


def test_a_second_tenant_does_not_make_up_for_a_first_that_is_not_allowed(rooms: Door) -> None:
    client = Client(request(), headers(tenants=("tools", "acme-corp")))
    visit(rooms(), client)
    assert (client.status, b'"code":"tenant_not_allowed"' in client.body) == (403, True)


def test_of_two_credentials_the_first_counts(rooms: Door) -> None:
    at = rooms(ScriptedAnswer(completion()))
    client = Client(request(), headers(keys=(KEY, UNKNOWN_KEY)))
    visit(at, client)
    assert (client.status, at.row()["key_id"]) == (200, KEY[6:18])


def test_a_second_credential_does_not_make_up_for_a_first_that_is_unknown(rooms: Door) -> None:
    client = Client(request(), headers(keys=(UNKNOWN_KEY, KEY)))
    visit(rooms(), client)
    assert (client.status, b'"code":"invalid_api_key"' in client.body) == (401, True)
