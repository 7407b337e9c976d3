"""The control channel on a real Redis: heard by all, kept through its absence, and never undone by its loss."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest

from app.control import CHANNEL, Control, Entry, tell
from app.redis_pipe import RedisAway, RedisPipe
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running, until

Scenario = Callable[[Control, Control], Coroutine[None, None, None]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


class Later(type(AMBIENT)):
    """A clock that a test moves."""

    ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


def between(server: RedisServer, scenario: Scenario, ambient: Later | None = None) -> None:
    """Runs a scenario with the channel as two replicas see it."""

    async def main() -> None:
        at = ambient or AMBIENT
        one, other = (RedisPipe(server.url, at, timeout_ms=5_000, probe_seconds=0.02) for _ in range(2))
        async with running(one), running(other):
            await scenario(Control(one, at), Control(other, at))

    run(main())


def test_an_entry_reaches_the_other_replica(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        put = await one.put("revoked", "k3f9a0b1c2d4", "leaked", "ann@host")
        assert await other.run_once() == 1
        assert other.kind("revoked") == {"k3f9a0b1c2d4": put}

    between(server, scenario)


def test_a_kind_asked_for_before_it_has_entries_gets_them_later(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        revoked = other.kind("revoked")
        await one.put("revoked", "a", "", "ann")
        await other.run_once()
        assert "a" in revoked

    between(server, scenario)


def test_each_new_entry_is_heard_of_once(server: RedisServer) -> None:
    heard: list[tuple[str, str, str | None]] = []

    async def main() -> None:
        pipe = RedisPipe(server.url, AMBIENT, timeout_ms=5_000)
        async with running(pipe):
            control = Control(pipe, AMBIENT, lambda kind, name, entry: heard.append((kind, name, entry.value)))
            for value in ("read_only", None):
                await control.put("mode", "gateway", value, "ann")
                await control.run_once()
                await control.run_once()

    run(main())
    assert heard == [("mode", "gateway", "read_only"), ("mode", "gateway", None)]


def test_an_entry_is_taken_back_by_another(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        for value in ("read_only", None):
            await one.put("mode", "gateway", value, "ann")
            await other.run_once()
        assert other.kind("mode") == {}

    between(server, scenario)


def test_an_entry_ends_at_its_time_on_a_replica_that_hears_nothing_more(server: RedisServer) -> None:
    ambient = Later()

    async def scenario(one: Control, other: Control) -> None:
        await one.put("cooldown", "openai/gpt-4o", "", "replica-1", until=ambient.now() + 30)
        await other.run_once()
        assert other.kind("cooldown")
        server.kill()
        ambient.ahead = 31
        await other.run_once()
        assert not other.kind("cooldown")

    between(server, scenario, ambient)


def test_a_lapsed_entry_leaves_redis_with_the_next_one(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        await one.put("cooldown", "a", "", "replica-1", until=AMBIENT.now() - 5)
        await one.put("cooldown", "b", "", "replica-1", until=AMBIENT.now() + 60)
        assert set(server.client.hgetall(CHANNEL)) == {"cooldown:b", "version"}

    between(server, scenario)


def test_what_was_heard_stays_in_force_while_redis_is_away(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        await one.put("revoked", "a", "", "ann")
        await other.run_once()
        server.kill()
        assert await other.run_once() == 0
        assert "a" in other.kind("revoked")

    between(server, scenario)


def test_an_emptied_redis_takes_nothing_back(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        await one.put("revoked", "a", "", "ann")
        await other.run_once()
        server.client.flushall()
        await one.put("revoked", "b", "", "ann")
        await other.run_once()
        assert set(other.kind("revoked")) == {"a", "b"}

    between(server, scenario)


def test_a_replica_that_starts_late_hears_everything(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        for name in ("a", "b", "c"):
            await one.put("revoked", name, "", "ann")
        assert await other.run_once() == 3

    between(server, scenario)


def test_nothing_new_costs_one_small_command(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        await one.put("revoked", "a", "", "ann")
        await other.run_once()
        server.client.config_resetstat()
        await other.run_once()
        calls = server.client.info("commandstats")
        assert "cmdstat_hgetall" not in calls
        assert calls["cmdstat_hget"]["calls"] == 1

    between(server, scenario)


@pytest.mark.parametrize("content", ["", "null", "[]", '{"value":1}', "{", "\udcff"])
def test_a_field_that_is_no_entry_is_passed_over(server: RedisServer, content: str) -> None:
    async def scenario(one: Control, other: Control) -> None:
        server.client.hset(CHANNEL, "revoked:a", content.encode("utf-8", "surrogateescape"))
        await one.put("revoked", "b", "", "ann")
        await other.run_once()
        assert set(other.kind("revoked")) == {"b"}

    between(server, scenario)


def test_a_key_of_another_type_is_reported_and_nothing_changes(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(one: Control, other: Control) -> None:
        server.client.set(CHANNEL, "x")
        assert await other.run_once() == 0

    between(server, scenario)
    assert "the control channel cannot be read: WRONGTYPE" in caplog.text


@pytest.mark.parametrize("name", ["", "a b", "a\n", "*", "a" * 193])
def test_a_name_that_cannot_stand_in_a_field_is_refused(server: RedisServer, name: str) -> None:
    async def scenario(one: Control, other: Control) -> None:
        with pytest.raises(ValueError, match="does not match"):
            await one.put("revoked", name, "", "ann")

    between(server, scenario)


def test_a_command_line_tells_all_replicas(server: RedisServer) -> None:
    async def scenario(one: Control, other: Control) -> None:
        told = await tell(server.url, AMBIENT, "revoked", "a", "leaked", "ann@host")
        assert isinstance(told, Entry)
        for replica in (one, other):
            await replica.run_once()
            assert replica.kind("revoked") == {"a": told}

    between(server, scenario)


def test_a_command_line_says_that_redis_is_away(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.control.REACH_SECONDS", 0.2)
    server.kill()
    with pytest.raises(RedisAway):
        run(tell(server.url, AMBIENT, "revoked", "a", "", "ann"))


def test_the_loop_looks_by_itself(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr("app.control.POLL_SECONDS", 0.01)

    async def scenario(one: Control, other: Control) -> None:
        task = asyncio.ensure_future(other.run())
        await one.put("revoked", "a", "", "ann")
        await until(lambda: other.kind("revoked"))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    between(server, scenario)
