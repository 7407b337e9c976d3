"""Incident modes: what is refused, to whom, until when; told by the command line to every replica."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from app.ambient import Patience
from app.cli import main
from app.config import Mode
from app.control import Entry
from app.core import Exchange, Reply
from app.modes import EVERYBODY, MODE, TENANT_MODE, Modes
from tests.gateway_parts import Clock, Rooms, ScriptedAnswer, call, completion, config, departed, headers_of, request
from tests.journey import Journey, chat, until


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Rooms]:
    made = Rooms(tmp_path, ScriptedAnswer(completion()), ambient=Clock())
    yield made
    made.spool.close()


def told(value: str | None, until: float | None = None) -> Entry:
    return Entry(value=value, by="ann@host", at="2026-06-07T14:32:01.000000Z", until=until)


def answer(rooms: Rooms, **fields: Any) -> Reply:
    """A call's reply."""

    async def scenario() -> Reply:
        made = call(request(), rooms.ambient, **fields)
        parts: list[bytes] = []
        reply = await departed(rooms.gateway, Exchange(call=made, patience=Patience()), parts.append)
        return msgspec.structs.replace(reply, first=b"".join(parts))

    return asyncio.run(scenario())


def code(reply: Reply) -> str | None:
    body = msgspec.json.decode(reply.first)
    return body["error"]["code"] if "error" in body else None


@pytest.mark.parametrize("mode", ["read_only", "cache_only"])
def test_mode_for_everybody_refuses_with_503_and_asks_no_vendor(rooms: Rooms, mode: str) -> None:
    rooms.control.kind(MODE)[EVERYBODY] = told(mode)
    reply = answer(rooms)
    assert (reply.status, code(reply)) == (503, "gateway_read_only")
    assert (rooms.row()["status"], rooms.row()["attempts"], rooms.row()["error_code"]) == (
        "refused", [], "gateway_read_only",
    )  # fmt: skip


def test_read_only_takes_nothing_of_the_tenant_s_limits(rooms: Rooms) -> None:
    rooms.control.kind(MODE)[EVERYBODY] = told("read_only")
    answer(rooms)
    assert rooms.limits.reserved == []


def test_cache_only_gives_back_what_the_look_into_the_cache_had_reserved(rooms: Rooms) -> None:
    rooms.control.kind(MODE)[EVERYBODY] = told("cache_only")
    answer(rooms)
    assert (len(rooms.limits.reserved), rooms.limits.settled) == (1, [(0, 0)])


def test_refusal_says_when_the_mode_ends_and_that_retrying_before_is_no_use(rooms: Rooms) -> None:
    rooms.control.kind(MODE)[EVERYBODY] = told("read_only", until=rooms.ambient.now() + 90)
    headers = headers_of(answer(rooms))
    assert 85 <= int(headers["retry-after"]) <= 90
    assert headers["x-should-retry"] == "false"


def test_mode_of_one_tenant_leaves_others_alone(rooms: Rooms) -> None:
    rooms.control.kind(TENANT_MODE)["tools"] = told("read_only")
    assert answer(rooms).status == 200


def test_mode_of_the_tenant_counts(rooms: Rooms) -> None:
    rooms.control.kind(TENANT_MODE)["acme-corp"] = told("read_only")
    assert code(answer(rooms)) == "gateway_read_only"


@pytest.mark.parametrize(
    ("in_file", "everybody", "tenant", "expected"),
    [
        ("normal", None, None, "normal"),
        ("normal", "cache_only", "read_only", "read_only"),
        ("normal", "read_only", "cache_only", "read_only"),
        ("read_only", "cache_only", None, "read_only"),
        ("cache_only", None, "normal", "cache_only"),
        ("normal", "a word of a later version", None, "normal"),
    ],
)
def test_the_strictest_counts(
    rooms: Rooms, in_file: Mode, everybody: str | None, tenant: str | None, expected: str
) -> None:
    if everybody:
        rooms.control.kind(MODE)[EVERYBODY] = told(everybody)
    if tenant:
        rooms.control.kind(TENANT_MODE)["acme-corp"] = told(tenant)
    at = config()
    at = msgspec.structs.replace(at, settings=msgspec.structs.replace(at.settings, mode=in_file))
    assert Modes(rooms.control, rooms.ambient).of(at, "acme-corp") == expected


# --- the command line -------------------------------------------------------------------------------------------------


def test_mode_needs_a_redis(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert main(["mode", "read-only"]) == 1
    assert "gateway.mode" in capsys.readouterr().err


@pytest.mark.parametrize("time", ["", "0m", "30", "m", "32d", "-5m", "1.5h", "٣m"])
def test_time_that_is_none_is_refused(time: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["mode", "read-only", f"--for={time}"])
    assert "is not a time up to 31d" in capsys.readouterr().err


def test_normal_has_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mode", "normal", "--for", "30m", "--redis-url", "redis://127.0.0.1:1"]) == 1
    assert "normal has no end" in capsys.readouterr().err


def modes(journey: Journey) -> list[str]:
    return [journey.admin("/status", number).json()["mode"] for number in (0, 1)]


def codes(journey: Journey) -> set[str]:
    answers = [journey.post(chat("tokens=2")) for _ in range(4)]
    return {"" if answer.is_success else answer.json()["error"]["code"] for answer in answers}


def test_mode_reaches_every_replica_outlives_redis_and_is_taken_back(
    whole: Journey, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--redis-url", whole.stack.redis_url]
    try:
        assert main(["mode", "read-only", "--for", "30m", "--reason", "drill", *at]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("everybody                read-only until ")
        assert json.loads(printed.err)["action"] == "mode.set"
        until(lambda: modes(whole) == ["read_only"] * 2)
        assert codes(whole) == {"gateway_read_only"}
        assert whole.http.get("/v1/models", headers=whole.headers()).status_code == 200
        assert whole.http.get("/health/ready").status_code == 200
        whole.stack.kill("redis")
        until(lambda: {whole.admin("/status", n).json()["redis"] for n in (0, 1)} == {"down"} or whole.post() is None)
        assert codes(whole) == {"gateway_read_only"}
    finally:
        whole.stack.start("redis")
        assert main(["mode", "normal", *at]) == 0
    until(lambda: modes(whole) == ["normal"] * 2)
    until(lambda: codes(whole) == {""})
    for number in (1, 2):
        log = whole.stack.log_dir / f"replica-{number}.log"
        until(lambda log=log: '"action":"control.mode","name":"gateway","value":null' in log.read_text())


def test_mode_of_a_tenant_is_shown_with_the_others(journey: Journey, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--redis-url", journey.stack.redis_url]
    assert main(["mode", "read-only", "--tenant", "tenant-b", *at]) == 0
    assert "tenant-b                 read-only, by " in capsys.readouterr().out
    until(lambda: all("tenant-b" in journey.admin("/status", n).json()["tenant_modes"] for n in (0, 1)))
    assert codes(journey) == {""}
    journey.tenant, journey.key = "tenant-b", journey.key
    assert main(["mode", "normal", "--tenant", "tenant-b", *at]) == 0
    assert "tenant-b" not in capsys.readouterr().out


def test_cache_only_serves_what_is_cached_and_nothing_else(journey: Journey) -> None:
    at = ["--redis-url", journey.stack.redis_url]
    known = chat("tokens=2 known", model="remembered")

    def unknown() -> httpx.Response:
        return journey.post(chat(f"tokens=2 {uuid.uuid4()}", model="remembered"))

    def heard() -> list[bool]:
        return [journey.tenant in journey.admin("/status", n).json()["tenant_modes"] for n in (0, 1)]

    until(lambda: journey.post(known).headers["x-cache"].startswith("HIT"))
    assert main(["mode", "cache-only", "--tenant", journey.tenant, *at]) == 0
    try:
        until(lambda: heard() == [True, True])
        asked = len(journey.asked())

        def said() -> set[tuple[int, str | None]]:
            answers = [journey.post(known) for _ in range(4)]
            return {(answer.status_code, answer.headers.get("x-cache")) for answer in answers}

        until(lambda: said() == {(200, "HIT (exact)")})  # a replica that heard nothing for a second finds nothing
        refused = unknown()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "gateway_read_only")
        assert len(journey.asked()) == asked
    finally:
        assert main(["mode", "normal", "--tenant", journey.tenant, *at]) == 0
    until(lambda: heard() == [False, False])
    assert unknown().status_code == 200
