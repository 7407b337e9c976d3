"""Answers from before on a call's journey: a real Redis, a vendor that speaks by script, one row for each call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.ambient import Patience
from app.api import _cut
from app.cache import Ask, Entry, Scope, Seen
from app.config import Cascade, Quota, Timeouts
from app.control import Entry as ControlEntry
from app.core import Call, Exchange, Reply, Usage, Wishes
from app.errors import VendorFailed, VendorRefused
from app.limits import Limits
from app.modes import TENANT_MODE
from app.redis_pipe import RedisPipe
from tests import cache_parts
from tests.cache_parts import ALIAS, body, call
from tests.gateway_parts import DONE, UNENDED, USAGE_FRAME, Rooms, ScriptedAnswer, chunk, completion, departed
from tests.gateway_parts import headers_of as headers
from tests.limits_parts import Counters, pipe_to, whole
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running, until, wire
from tests.translation import target

TOTAL = 12
"""Tokens of the scripted vendor's answers."""
STREAM = (chunk("hel"), chunk("lo"), chunk(finish_reason="stop"), USAGE_FRAME, DONE)
CONFIG = cache_parts.config()
UNKEPT = cache_parts.tenant("acme-corp", store=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def empty(server: RedisServer) -> None:
    server.client.flushall()
    whole(server)


def config(**policy: Any) -> Any:
    return cache_parts.config(**policy)


class Client:
    """A replica and those who call it."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self.exchanges: list[Exchange] = []

    async def ask(self, written: bytes | None = None, out: list[bytes] | None = None, **fields: Any) -> Reply:
        """The answer's parts are in `out`, or its body in the reply."""
        made = call(written, **({"config": CONFIG} | fields))
        return await self.send(made, [] if out is None else out)

    async def send(self, made: Call, out: list[bytes]) -> Reply:
        exchange = Exchange(call=made, patience=Patience())
        self.exchanges.append(exchange)
        try:
            reply = await departed(self.rooms.gateway, exchange, out.append)
        finally:
            exchange.patience.end()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return reply

    def row(self, number: int = -1) -> dict[str, Any]:
        return self.rooms.rows()[number]


@asynccontextmanager
async def replica(
    server: RedisServer,
    folder: Path,
    *script: Any,
    name: str = "r1",
    limited: bool = False,
    pipe: RedisPipe | None = None,
) -> Any:
    """One replica on its own pipe, or on the one given; `limited` with the limits of production."""
    async with AsyncExitStack() as stack:
        pipe = await stack.enter_async_context(running(pipe or pipe_to(server)))
        limits = Limits(pipe, AMBIENT) if limited else None
        rooms = Rooms(folder, *script, ambient=AMBIENT, pipe=pipe, limits=limits, replica=name)
        await rooms.channel.run_once()
        try:
            yield Client(rooms)
        finally:
            rooms.spool.close()


def text(out: list[bytes]) -> str:
    data = [line[6:] for line in b"".join(out).split(b"\n") if line.startswith(b"data: {")]
    choices = [choice for one in data for choice in json.loads(one).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def kept(server: RedisServer, count: int = 1) -> None:
    """Until so many answers are in Redis."""
    await until(lambda: len([key for key in server.client.keys("sc:*:x:*") if not key.endswith(":lease")]) == count)


# --- the same words ---------------------------------------------------------------------------------------------------


def test_the_same_request_is_answered_without_a_vendor(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, ScriptedAnswer(completion())) as client:
            first = await client.ask()
            await kept(server)
            second = await client.ask()
            assert second.first == first.first
            assert [headers(reply)["x-cache"] for reply in (first, second)] == ["MISS", "HIT (exact)"]
            assert 0 <= int(headers(second)["age"]) < 60
            row = client.row()
            assert (row["cache_hit"], row["cache_kind"], row["status"]) == (True, "exact", "success")
            assert (row["usage"]["total_tokens"], row["cost_usd"]["total"], row["attempts"]) == (0, 0, [])
            assert row["model_resolved"] == "model-2026-01-01"
            assert row["latency_ms"]["cache_lookup"] > 0
            assert row["saved_usd"] == client.row(0)["cost_usd"]["total"]

    run(main())


@pytest.mark.parametrize("first", [False, True])
def test_one_entry_serves_streams_and_whole_answers(server: RedisServer, tmp_path: Path, first: bool) -> None:
    async def main() -> None:
        answer = ScriptedAnswer(*STREAM) if first else ScriptedAnswer(completion())
        async with replica(server, tmp_path, answer) as client:
            await client.ask(body(stream=first))
            await kept(server)
            whole = await client.ask()
            out: list[bytes] = []
            streamed = await client.ask(body(stream=True, stream_options={"include_usage": True}), out)
            assert json.loads(whole.first)["choices"][0]["message"]["content"] == text(out) == "hello"
            assert headers(streamed)["content-type"] == "text/event-stream; charset=utf-8"
            *_, usage, done, _ = b"".join(out).split(b"\n\n")
            assert (json.loads(usage[6:])["usage"]["total_tokens"], done) == (TOTAL, b"data: [DONE]")
            assert json.loads(whole.first)["usage"]["total_tokens"] == TOTAL

    run(main())


def test_an_exact_hit_takes_a_request_and_nothing_else(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        tenant = msgspec.structs.replace(
            CONFIG.tenants["acme-corp"], quota=Quota(rpm=9, tpm=5000, daily_tokens=5000, concurrency=3)
        )
        limited = msgspec.structs.replace(CONFIG, tenants={"acme-corp": tenant})
        async with replica(server, tmp_path, ScriptedAnswer(completion()), limited=True) as client:
            await client.ask(config=limited)
            await kept(server)
            await client.rooms.gateway.limits._pipe.execute("PING")
            counters = Counters(server)
            await until(
                lambda: (counters.rpm, counters.tpm, counters.day_tokens, counters.running) == (1, TOTAL, TOTAL, 0)
            )
            hit = await client.ask(config=limited)
            await client.rooms.gateway.limits._pipe.execute("PING")
            assert headers(hit)["x-cache"] == "HIT (exact)"
            await until(
                lambda: (counters.rpm, counters.tpm, counters.day_tokens, counters.running) == (2, TOTAL, TOTAL, 0)
            )
            assert headers(hit)["x-ratelimit-remaining-requests"] == "7"

    run(main())


def test_no_cache_asks_the_vendor_and_keeps_what_it_says(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        answers = [ScriptedAnswer(completion()), ScriptedAnswer(completion(id="new"))]
        async with replica(server, tmp_path, *answers) as client:
            await client.ask()
            await kept(server)
            (key,) = [key for key in server.client.keys("sc:*:x:*") if not key.endswith(":lease")]
            before = server.client.strlen(key)
            fresh = await client.ask(wishes=Wishes(fresh=True))
            await until(lambda: server.client.strlen(key) != before)
            assert headers(fresh)["x-cache"] == "BYPASS"
            assert json.loads((await client.ask()).first)["id"] == "new"

    run(main())


def test_no_store_leaves_nothing_behind(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, ScriptedAnswer(completion())) as client:
            reply = await client.ask(wishes=Wishes(store=False))
            await client.rooms.channel.run_once()
            assert headers(reply)["x-cache"] == "BYPASS"
            assert server.client.keys("sc:*") == []

    run(main())


def test_an_answer_older_than_asked_for_is_a_miss_that_is_paid_for(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        tenant = msgspec.structs.replace(CONFIG.tenants["acme-corp"], quota=Quota(rpm=9, tpm=5000))
        limited = msgspec.structs.replace(CONFIG, tenants={"acme-corp": tenant})
        answers = [ScriptedAnswer(completion()), ScriptedAnswer(completion())]
        async with replica(server, tmp_path, *answers, limited=True) as client:
            await client.ask(config=limited)
            await kept(server)
            old = await client.ask(config=limited, wishes=Wishes(max_age=-1))
            await client.rooms.channel.run_once()
            assert headers(old)["x-cache"] == "MISS"
            await until(lambda: (Counters(server).rpm, Counters(server).tpm) == (2, 2 * TOTAL))

    run(main())


@pytest.mark.parametrize("finish", ["length", "content_filter", "tool_calls"])
def test_an_answer_that_is_not_whole_is_not_kept(server: RedisServer, tmp_path: Path, finish: str) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "he"}, "finish_reason": finish}

    async def main() -> None:
        async with replica(server, tmp_path, ScriptedAnswer(completion(choices=[choice]))) as client:
            await client.ask()
            await client.rooms.channel.run_once()
            assert server.client.keys("sc:*") == []

    run(main())


@pytest.mark.parametrize("doubtful", [False, True])
def test_a_doubtful_answer_that_served_for_want_of_a_better_one_is_not_kept(
    server: RedisServer, tmp_path: Path, doubtful: bool
) -> None:
    """Both answers say the same; the cascade doubts the less likely one, and the target above fails."""
    above = target("openai", "above")
    unsure = Cascade((above,), frozenset(), -0.5)
    likely = {"content": [{"token": "hello", "logprob": -9.0 if doubtful else -0.1}]}
    message = {"role": "assistant", "content": "hello"}
    choice = {"index": 0, "message": message, "logprobs": likely, "finish_reason": "stop"}
    alias = msgspec.structs.replace(CONFIG.aliases[ALIAS], cascade=unsure)
    targets = {above.name: above, alias.targets[0].name: alias.targets[0]}
    asking = msgspec.structs.replace(CONFIG, aliases={ALIAS: alias}, targets=targets)
    said = [
        answer
        for _ in range(2)
        for answer in (ScriptedAnswer(completion(choices=[choice])), *([VendorRefused("no")] if doubtful else []))
    ]

    async def main() -> None:
        async with replica(server, tmp_path, *said) as client:
            first = await client.ask(config=asking)
            assert client.exchanges[-1].doubted is doubtful
            if not doubtful:
                await kept(server)
            second = await client.ask(config=asking)
            assert (first.status, second.status) == (200, 200)
            assert headers(second)["x-cache"] == ("MISS" if doubtful else "HIT (exact)")
            assert len(server.client.keys("sc:*:x:*")) == (0 if doubtful else 1)

    run(main())


def test_an_alias_without_a_cache_says_and_keeps_nothing(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        plain = msgspec.structs.replace(
            CONFIG, aliases={ALIAS: msgspec.structs.replace(CONFIG.aliases[ALIAS], cache=None)}
        )
        async with replica(server, tmp_path, ScriptedAnswer(completion())) as client:
            reply = await client.ask(config=plain)
            await client.rooms.channel.run_once()
            assert "x-cache" not in headers(reply)
            assert (server.client.keys("sc:*"), client.row()["cache_kind"]) == ([], None)

    run(main())


# --- what fails -------------------------------------------------------------------------------------------------------


def test_without_redis_every_call_is_a_miss(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        rooms = Rooms(tmp_path, *(ScriptedAnswer(completion()) for _ in range(2)), ambient=AMBIENT)
        client = Client(rooms)
        assert [headers(await client.ask())["x-cache"] for _ in range(2)] == ["BYPASS", "BYPASS"]
        rooms.spool.close()

    run(main())


def test_a_damaged_entry_is_a_miss_and_deleted(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, *(ScriptedAnswer(completion()) for _ in range(2))) as client:
            await client.ask()
            await kept(server)
            (key,) = [key for key in server.client.keys("sc:*:x:*") if not key.endswith(":lease")]
            server.client.setrange(key, 20, "damaged")
            reply = await client.ask()
            assert headers(reply)["x-cache"] == "MISS"
            assert client.rooms.cache.damaged == 1
            await until(lambda: server.client.getrange(key, 20, 26) != "damaged")
            assert headers(await client.ask())["x-cache"] == "HIT (exact)"

    run(main())


def test_an_entry_of_another_tenant_is_none_whatever_redis_says(server: RedisServer, tmp_path: Path) -> None:
    """Redis, or who writes to it, has put one tenant's answer under another's name."""

    async def main() -> None:
        async with replica(server, tmp_path, *(ScriptedAnswer(completion()) for _ in range(2))) as client:
            await client.ask()
            await kept(server)
            other = msgspec.structs.replace(CONFIG.tenants["acme-corp"], id="globex")
            both = msgspec.structs.replace(CONFIG, tenants=CONFIG.tenants | {"globex": other})
            key = cache_parts.asked(of=CONFIG.aliases[ALIAS]).key
            server.client.copy(key, cache_parts.asked(by=other, of=CONFIG.aliases[ALIAS]).key)
            caller = msgspec.structs.replace(call().key, tenants=None)
            reply = await client.ask(config=both, tenant_claimed="globex", key=caller)
            assert headers(reply)["x-cache"] == "MISS"

    run(main())


def test_a_full_redis_keeps_nothing_and_fails_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    async def main() -> None:
        with redis_server(tmp_path_factory.mktemp("full"), "--maxmemory", "1") as full:
            async with replica(full, tmp_path, ScriptedAnswer(completion())) as client:
                reply = await client.ask()
                await until(lambda: client.rooms.cache.lost)
                assert (reply.status, headers(reply)["x-cache"]) == (200, "MISS")

    run(main())


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_gives_way(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        tenant = msgspec.structs.replace(CONFIG.tenants["acme-corp"], cache=cache_parts.tenant(max_bytes=2000).cache)
        small = msgspec.structs.replace(CONFIG, tenants={"acme-corp": tenant})
        questions = [body(user=str(n)) for n in range(4)]
        async with replica(server, tmp_path, *(ScriptedAnswer(completion()) for _ in range(9))) as client:

            async def result(number: int) -> str:
                await asyncio.sleep(0.002)  # last use is told in milliseconds
                return headers(await client.ask(questions[number], config=small))["x-cache"]

            assert [await result(n) for n in (0, 1, 2)] == ["MISS"] * 3
            await kept(server, 3)
            assert await result(0) == "HIT (exact)"
            assert await result(3) == "MISS"  # in the place of 1
            await until(lambda: "lease" not in "".join(server.client.keys("sc:*:x:*")))
            assert [await result(n) for n in (0, 2, 3)] == ["HIT (exact)"] * 3
            assert await result(1) == "MISS"
            await until(lambda: "lease" not in "".join(server.client.keys("sc:*:x:*")))
            books = server.client.hgetall("sc:{acme-corp}:_bytes")
            assert sum(int(size) for key, size in books.items() if key) == int(books[""]) <= 2000

    run(main())


# --- in an incident ---------------------------------------------------------------------------------------------------


class Known:
    """Finds an answer that is to be asked again, to every question; `asked` are the questions."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def find(self, ask: Ask) -> Seen:
        self.asked.append(ask.turn.text)
        return Seen(Entry(completion(), "openai", "m", Usage(), AMBIENT.now()), "key", 0.9, check=True)

    def reverified(self, ask: Ask, seen: Seen, entry: Entry) -> None:
        pass


@pytest.mark.parametrize(
    ("mode", "embedder", "found", "asked_again"),
    [
        ("normal", "static", True, True),
        ("cache_only", "static", True, False),
        ("normal", "embed-small", True, True),
        ("cache_only", "embed-small", False, False),
    ],
)
def test_no_vendor_is_asked_behind_the_back_of_a_tenant_in_cache_only(
    server: RedisServer, tmp_path: Path, mode: str, embedder: str, found: bool, asked_again: bool
) -> None:
    async def scenario() -> None:
        async with replica(server, tmp_path, ScriptedAnswer(completion())) as one:
            one.rooms.cache.semantic = known = Known()
            one.rooms.control.kind(TENANT_MODE)["acme-corp"] = ControlEntry(value=mode, by="ann", at="", until=None)
            reply = await one.ask(config=config(mode="static", embedder=embedder))
            assert (len(known.asked), reply.status) == ((1, 200) if found else (0, 503))
            if asked_again:
                await until(lambda: len(one.rooms.rows()) == 2)
            assert len(one.rooms.gateway.shadows._running) == 0
            assert [row["purpose"] for row in one.rooms.rows()] == ["client", *["reverify"] * asked_again]

    run(scenario())


# --- at the same time -------------------------------------------------------------------------------------------------


def listeners(client: Client) -> int:
    flight = client.exchanges[0].memory and client.exchanges[0].memory.flight
    return flight.listeners if flight else 0


class Paced(ScriptedAnswer):
    """A vendor that stops before its part `at`, and goes on when it is told to."""

    def __init__(self, *parts: Any, at: int = 1, **fields: Any) -> None:
        super().__init__(*parts, **fields)
        self.go = asyncio.Event()
        self.asked = asyncio.Event()
        self._at = at

    async def chunk(self) -> bytes | None:
        if self._at == 0:
            self.asked.set()
            await self.go.wait()
        self._at -= 1
        return await super().chunk()


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_meet_ask_the_vendor_once(server: RedisServer, tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        parts = STREAM if stream else (completion(),)
        vendor = Paced(*parts, at=0)
        async with replica(server, tmp_path, vendor) as client:
            outs: list[list[bytes]] = [[] for _ in range(5)]
            calls = [asyncio.create_task(client.ask(body(stream=stream), out)) for out in outs]
            await until(lambda: client.exchanges and listeners(client) == 4)
            vendor.go.set()
            replies = await asyncio.gather(*calls)
            assert len({b"".join(out) for out in outs}) == 1
            results = [headers(reply)["x-cache"] for reply in replies]
            assert results == ["MISS", *["HIT (coalesced)"] * 4]
            rows = client.rooms.rows()
            assert sorted(row["cache_kind"] or "" for row in rows) == ["", *["coalesced"] * 4]
            assert [row["usage"]["total_tokens"] for row in rows].count(TOTAL) == 1
            assert all(row["saved_usd"] > 0 and row["status"] == "success" for row in rows if row["cache_kind"])

    run(main())


def test_the_vendor_s_call_lives_while_anybody_listens(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Paced(*STREAM)
        async with replica(server, tmp_path, vendor) as client:
            door = FrontDoor(client)
            out: list[bytes] = []
            leader = asyncio.create_task(client.ask(body(stream=True)))
            await vendor.asked.wait()
            follower = asyncio.create_task(client.ask(body(stream=True), out))
            await until(lambda: listeners(client) == 1)
            assert door.hang_up(leader, 0) is False
            vendor.go.set()
            await asyncio.gather(leader, follower)
            assert text(out) == "hello"
            statuses = {row["cache_kind"]: (row["status"], row["usage"]["total_tokens"]) for row in client.rooms.rows()}
            assert statuses == {None: ("client_closed", TOTAL), "coalesced": ("success", 0)}

    run(main())


def test_a_call_that_nobody_listens_to_any_more_is_cut(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Paced(*STREAM)
        async with replica(server, tmp_path, vendor) as client:
            door = FrontDoor(client)
            leader = asyncio.create_task(client.ask(body(stream=True)))
            await vendor.asked.wait()
            follower = asyncio.create_task(client.ask(body(stream=True)))
            await until(lambda: listeners(client) == 1)
            door.hang_up(leader, 0)
            assert door.hang_up(follower, 1) is True
            await asyncio.gather(leader, follower, return_exceptions=True)
            assert [row["status"] for row in client.rooms.rows()] == ["client_closed"] * 2
            assert vendor.closed == [False]

    run(main())


class FrontDoor:
    """Clients that hang up, as the front door hears of it."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def hang_up(self, task: asyncio.Task[Any], number: int) -> bool:
        return _cut(self.client.exchanges[number], task, "client_closed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_vendor_s_refusal_is_everybody_s(server: RedisServer, tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        vendor = Paced(b'{"error":{"message":"no","code":"bad"}}', status=400, at=0)
        async with replica(server, tmp_path, vendor) as client:
            calls = [asyncio.create_task(client.ask(body(stream=stream))) for _ in range(3)]
            await until(lambda: client.exchanges and listeners(client) == 2)
            vendor.go.set()
            replies = await asyncio.gather(*calls)
            assert [reply.status for reply in replies] == [400] * 3
            assert [row["cache_hit"] for row in client.rooms.rows()] == [False] * 3

    run(main())


def test_who_follows_a_leader_that_leaves_asks_for_itself(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        vendor = ScriptedAnswer(UNENDED)
        async with replica(server, tmp_path, vendor, ScriptedAnswer(completion())) as client:
            leader = asyncio.create_task(client.ask())
            await until(lambda: client.rooms.cache.flights)
            follower = asyncio.create_task(client.ask())
            await until(lambda: listeners(client) == 1)
            client.exchanges[0].cut = "drain"
            leader.cancel()
            assert headers(await follower)["x-cache"] == "MISS"
            await asyncio.gather(leader, return_exceptions=True)

    run(main())


def test_another_replica_waits_for_the_entry(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Paced(*STREAM)
        async with (
            replica(server, tmp_path, vendor) as one,
            replica(server, tmp_path, name="r2") as two,
        ):
            leader = asyncio.create_task(one.ask(body(stream=True)))
            await vendor.asked.wait()
            other = asyncio.create_task(two.ask())
            await until(lambda: two.exchanges)
            vendor.go.set()
            reply = await other
            await leader
            assert headers(reply)["x-cache"] == "HIT (coalesced)"

    run(main())


def test_another_replica_goes_on_alone_when_the_lease_lapses(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, ScriptedAnswer(completion()), limited=True) as client:
            key = cache_parts.asked(of=CONFIG.aliases[ALIAS]).key
            server.client.set(key + ":lease", "a call of a replica that died", px=150)
            reply = await client.ask()
            assert headers(reply)["x-cache"] == "MISS"
            assert client.row()["latency_ms"]["cache_lookup"] >= 100

    run(main())


def test_another_replica_waits_no_longer_than_half_the_first_token_limit(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        alias = msgspec.structs.replace(CONFIG.aliases[ALIAS], timeouts=Timeouts(1.0, 0.2, 5.0, 5.0, 5.0))
        hasty = msgspec.structs.replace(CONFIG, aliases={ALIAS: alias})
        async with replica(server, tmp_path, ScriptedAnswer(completion())) as client:
            server.client.set(cache_parts.asked(of=alias).key + ":lease", "a call that takes long")
            reply = await client.ask(config=hasty)
            assert headers(reply)["x-cache"] == "MISS"
            assert client.row()["latency_ms"]["cache_lookup"] < 5000

    run(main())


def test_leases_of_running_calls_are_renewed(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, ScriptedAnswer(UNENDED)) as client:
            running_call = asyncio.create_task(client.ask())
            await until(lambda: client.rooms.cache.flights)
            (lease,) = server.client.keys("*:lease")
            server.client.pexpire(lease, 200)
            assert client.rooms.cache.run_once() == 1
            await until(lambda: server.client.pttl(lease) > 1000)
            running_call.cancel()
            await asyncio.gather(running_call, return_exceptions=True)
            await until(lambda: not server.client.keys("*:lease"))

    run(main())


# --- the same key -----------------------------------------------------------------------------------------------------

ONCE = Wishes(idempotency_key="order-17")
WARM = {"temperature": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_with_the_same_key_gets_the_same_bytes(server: RedisServer, tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        parts = STREAM if stream else (completion(),)
        async with replica(server, tmp_path, ScriptedAnswer(*parts)) as client:
            outs: list[list[bytes]] = [[], []]
            replies = [await client.ask(body(stream=stream, **WARM), out, wishes=ONCE) for out in outs]
            assert b"".join(outs[0]) == b"".join(outs[1])
            assert [headers(reply)["x-gateway-idempotency"] for reply in replies] == ["new", "replayed"]
            assert (
                headers(replies[0])["content-type"].split(";")[0] == headers(replies[1])["content-type"].split(";")[0]
            )
            row = client.row()
            assert (row["cache_kind"], row["cost_usd"]["total"], row["saved_usd"]) == ("idempotent", 0, 0)

    run(main())


def test_a_key_with_another_request_is_refused(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, ScriptedAnswer(completion())) as client:
            await client.ask(body(**WARM), wishes=ONCE)
            reply = await client.ask(body(temperature=0.9), wishes=ONCE)
            assert (reply.status, json.loads(reply.first)["error"]["code"]) == (422, "idempotency_mismatch")

    run(main())


def test_keys_of_two_credentials_are_two_keys(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, *(ScriptedAnswer(completion()) for _ in range(2))) as client:
            await client.ask(body(**WARM), wishes=ONCE)
            other = msgspec.structs.replace(call().key, id="aaaaaaaaaaaa")
            reply = await client.ask(body(**WARM), wishes=ONCE, key=other)
            assert headers(reply)["x-gateway-idempotency"] == "new"

    run(main())


def test_a_vendor_s_refusal_is_replayed(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        refused = VendorRefused("no", vendor_status=400, vendor_code="bad")
        async with replica(server, tmp_path, refused) as client:
            replies = [await client.ask(wishes=ONCE) for _ in range(2)]
            assert [reply.status for reply in replies] == [400, 400]
            assert replies[0].first == replies[1].first
            row = client.row()
            assert (row["status"], row["error_code"], row["cache_kind"]) == ("refused", "bad", "idempotent")

    run(main())


def test_a_failure_is_not_replayed(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        failed = [VendorFailed("no", vendor_status=500)] * 2
        async with replica(server, tmp_path, *failed, ScriptedAnswer(completion())) as client:
            replies = [await client.ask(wishes=ONCE) for _ in range(2)]
            assert [reply.status for reply in replies] == [503, 200]

    run(main())


def test_a_refusal_of_ours_is_not_replayed(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        tenant = msgspec.structs.replace(CONFIG.tenants["acme-corp"], quota=Quota(tpm=1))
        narrow = msgspec.structs.replace(CONFIG, tenants={"acme-corp": tenant})
        async with replica(server, tmp_path, ScriptedAnswer(completion()), limited=True) as client:
            replies = [await client.ask(wishes=ONCE, config=given) for given in (narrow, CONFIG)]
            assert [reply.status for reply in replies] == [429, 200]

    run(main())


def test_a_call_whose_first_still_runs_waits_for_it(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Paced(*STREAM)
        async with replica(server, tmp_path, vendor) as one, replica(server, tmp_path, name="r2") as two:
            first = asyncio.create_task(one.ask(body(stream=True, **WARM), wishes=ONCE))
            await vendor.asked.wait()
            out: list[bytes] = []
            second = asyncio.create_task(two.ask(body(stream=True, **WARM), out, wishes=ONCE))
            await until(lambda: two.exchanges)
            vendor.go.set()
            await asyncio.gather(first, second)
            assert text(out) == "hello"

    run(main())


def test_a_call_whose_first_runs_beyond_the_deadline_is_told_when_to_come_again(
    server: RedisServer, tmp_path: Path
) -> None:
    async def main() -> None:
        alias = msgspec.structs.replace(CONFIG.aliases[ALIAS], timeouts=Timeouts(1.0, 5.0, 5.0, 5.0, 0.3))
        hasty = msgspec.structs.replace(CONFIG, aliases={ALIAS: alias})
        vendor = ScriptedAnswer(UNENDED)
        async with replica(server, tmp_path, vendor) as client:
            first = asyncio.create_task(client.ask(wishes=ONCE))
            await until(lambda: server.client.keys("*_once*"))
            reply = await client.ask(wishes=ONCE, config=hasty)
            assert (reply.status, json.loads(reply.first)["error"]["code"]) == (409, "idempotency_in_progress")
            assert headers(reply)["retry-after"] == "1"
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    run(main())


def test_a_tenant_whose_answers_are_not_kept_has_the_mark_only(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        tenant = msgspec.structs.replace(CONFIG.tenants["acme-corp"], cache=UNKEPT.cache)
        private = msgspec.structs.replace(CONFIG, tenants={"acme-corp": tenant})
        async with replica(server, tmp_path, ScriptedAnswer(completion())) as client:
            await client.ask(wishes=ONCE, config=private)
            await until(lambda: [server.client.get(key) for key in server.client.keys("*")] != [])
            reply = await client.ask(wishes=ONCE, config=private)
            assert (reply.status, json.loads(reply.first)["error"]["code"]) == (409, "idempotency_already_done")
            everything = [server.client.get(key) for key in server.client.keys("sc:*")]
            assert not any("hello" in value for value in everything)

    run(main())


def test_without_redis_a_header_says_that_nothing_is_replayed(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        rooms = Rooms(tmp_path, ScriptedAnswer(completion()), ambient=AMBIENT)
        reply = await Client(rooms).ask(wishes=ONCE)
        assert (reply.status, headers(reply)["x-gateway-idempotency"]) == (200, "unavailable")
        rooms.spool.close()

    run(main())


@pytest.mark.parametrize("delay_seconds", [0.0, 2.0], ids=["frozen", "slow"])
def test_one_call_waits_for_a_redis_that_does_not_answer_and_the_others_go_on_without(
    server: RedisServer, tmp_path: Path, delay_seconds: float
) -> None:
    async def main() -> None:
        delay = 0.0
        async with AsyncExitStack() as stack:
            port = await stack.enter_async_context(wire(server.port, lambda: delay))
            pipe = RedisPipe(f"redis://127.0.0.1:{port}", AMBIENT, timeout_ms=300, probe_seconds=0.05)
            answers = [ScriptedAnswer(completion()) for _ in range(7)]
            client = await stack.enter_async_context(replica(server, tmp_path, *answers, limited=True, pipe=pipe))
            await client.ask()
            await kept(server)
            delay = delay_seconds
            if not delay:
                server.freeze()
                stack.callback(server.thaw)
            for number in range(6):
                reply = await client.ask(wishes=Wishes(idempotency_key=f"key-{number}"))
                told = headers(reply)
                assert (reply.status, told["x-gateway-idempotency"]) == (200, "unavailable")
                assert told["x-cache"] in ("MISS", "BYPASS")
                assert not pipe.up  # from the first on: what is sent fails at once
            delay = 0.0
            server.thaw()
            await until(lambda: pipe.up)
            await client.rooms.channel.run_once()
            assert headers(await client.ask())["x-cache"] == "HIT (exact)"

    run(main())


# --- invalidation -----------------------------------------------------------------------------------------------------

SCOPES = [
    Scope(),
    Scope(tenant="acme-corp"),
    Scope(alias=ALIAS),
    Scope(revision="7"),
    Scope(tag="doc-1"),
    Scope(tenant="acme-corp", alias=ALIAS, revision="7", tag="doc-1"),
]
OTHER_SCOPES = [Scope(tenant="acme"), Scope(alias="support"), Scope(revision="8"), Scope(tag="doc-2")]


@pytest.mark.parametrize("scope", [*SCOPES, *OTHER_SCOPES], ids=repr)
def test_what_was_invalidated_on_one_replica_is_found_on_none(
    server: RedisServer, tmp_path: Path, scope: Scope
) -> None:
    async def main() -> None:
        said = Wishes(kb_revision="7", tags=("doc-1",))
        answers = [ScriptedAnswer(completion()) for _ in range(2)]
        async with replica(server, tmp_path, *answers) as one, replica(server, tmp_path, name="r2") as two:
            two.rooms.channel._on_entry = lambda kind, name, entry: two.rooms.cache.epochs.heard(entry)
            await one.ask(wishes=said)
            await kept(server)
            assert headers(await two.ask(wishes=said))["x-cache"] == "HIT (exact)"
            await one.rooms.cache.invalidate(scope, "suite")
            await two.rooms.channel.run_once()
            expected = "HIT (exact)" if scope in OTHER_SCOPES else "MISS"
            assert headers(await one.ask(wishes=said))["x-cache"] == expected
            assert two.rooms.cache.epochs.of("acme-corp", ALIAS, "7") == one.rooms.cache.epochs.of(
                "acme-corp", ALIAS, "7"
            )

    run(main())


def test_an_answer_that_was_under_way_is_not_found_after_an_invalidation(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Paced(*STREAM)
        async with replica(server, tmp_path, vendor, ScriptedAnswer(completion())) as client:
            under_way = asyncio.create_task(client.ask(body(stream=True)))
            await vendor.asked.wait()
            await client.rooms.cache.invalidate(Scope(revision=""), "suite")
            await client.rooms.cache.invalidate(Scope(tag="doc-1"), "suite")
            await client.rooms.cache.invalidate(Scope(tenant="acme-corp"), "suite")
            vendor.go.set()
            await under_way
            assert headers(await client.ask())["x-cache"] == "MISS"

    run(main())


def test_a_replica_that_hears_nothing_finds_nothing(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, *(ScriptedAnswer(completion()) for _ in range(2))) as client:
            await client.ask()
            await kept(server)
            client.rooms.channel._read_at -= 1.5
            assert headers(await client.ask())["x-cache"] == "BYPASS"

    run(main())


def test_what_was_invalidated_is_deleted(server: RedisServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with replica(server, tmp_path, *(ScriptedAnswer(completion()) for _ in range(3))) as client:
            for user in "123":
                await client.ask(body(user=user), wishes=Wishes(idempotency_key=user))
            await kept(server, 3)
            await client.rooms.cache.invalidate(Scope(tenant="acme-corp"), "suite")
            await kept(server, 0)
            await until(lambda: server.client.zcard("sc:{acme-corp}:_used") == 3)  # answers of idempotency keys stay
            books = server.client.hgetall("sc:{acme-corp}:_bytes")
            assert sum(int(size) for key, size in books.items() if key) == int(books[""])

    run(main())
