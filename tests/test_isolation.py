"""What one tenant or service key does changes nothing for another: against a model of each owner by itself.

A case is one reservation or settlement, or one call with its answer, from before or not, and with what becomes of it in
the ledger and in what each key is shown of usage: compared with what its own owners' history alone says. `make drills`
runs ten times as many as `make test`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import Struct, field

from app import api, usage_pages
from app.ambient import Ambient
from app.api import FrontDoor
from app.archive import Archive
from app.auth import Callers
from app.cache.learning import Learning
from app.cache.semantic import Questions
from app.config import NAME, Config, Quota, ServiceKey, Tenant
from app.core import Rates, Reservation, written
from app.errors import LimitError
from app.ledger import read_lines
from app.limits import Limits
from app.limits.scopes import WHOLE
from app.reports.period import UsageReader
from app.visits import Head
from tests.cache_parts import alias as cached_alias
from tests.gateway_parts import ALIAS, DONE, USAGE_FRAME, Rooms, ScriptedAnswer, chunk, completion, config
from tests.ledger_parts import query, running_postgres
from tests.limits_parts import SHARE, Caller, Counters, not_just_before_midnight, pipe_to, whole
from tests.redis_parts import AMBIENT, RedisServer, redis_server, running
from tests.test_auth import NoTokens
from tests.test_cache_semantic import Words
from tests.test_front_door import Client, Source
from tests.test_rollup import roll, settle

CASES = int(os.environ.get("ISOLATION_CASES", "10000"))
ROUND = 250
"""Cases of one set of owners: over long before the first leaves a window of 60 seconds."""
SECONDS_OF_A_ROUND = 30.0
ALIKE = [
    *("a", "A", "a.b", "a-b", "a_b", "a.b.c", "ab", "aa", "a.", "a-", "0", "00", "0.0", "global", "key.a", "rpm"),
    *("a.rpm", "a.call", "a.daily_tokens", "a.concurrency", "x" * 63, "x" * 64, "k3f9a0b1c2d4", "key.k3f9a0b1c2d4"),
]
"""Names that are parts, prefixes or neighbours of one another, of keys, and of other owners' tags."""


class Owner(Struct):
    """A tenant or a key by itself: what it may use, and what its own calls have taken."""

    quota: Quota
    requests: int = 0
    tokens: int = 0
    nanos: int = 0
    running: set[str] = field(default_factory=set)

    def admits(self, tokens: int, nanos: int) -> bool:
        quota = self.quota
        wanted = [
            (quota.rpm, self.requests + 1),
            (quota.tpm, self.tokens + tokens),
            (quota.concurrency, len(self.running) + 1),
            (quota.daily_tokens, self.tokens + tokens),
            (quota.daily_nanos, self.nanos + nanos),
            (quota.monthly_nanos, self.nanos + nanos),
        ]
        return all(limit is None or amount <= limit for limit, amount in wanted)

    def take(self, call_id: str, tokens: int, nanos: int) -> None:
        self.requests += 1
        self.tokens += tokens
        self.nanos += nanos
        self.running.add(call_id)

    def end(self, call_id: str, tokens: int, nanos: int) -> None:
        self.tokens += tokens
        self.nanos += nanos
        self.running.discard(call_id)

    @property
    def counted(self) -> tuple[int, ...]:
        """As `Counters.all` has it: what is not limited is not counted."""
        quota = self.quota
        return tuple(
            0 if limit is None else amount
            for limit, amount in (
                (quota.rpm, self.requests),
                (quota.tpm, self.tokens),
                (quota.concurrency, len(self.running)),
                (quota.daily_tokens, self.tokens),
                (quota.daily_nanos, self.nanos),
                (quota.monthly_nanos, self.nanos),
            )
        )

    def remaining(self) -> tuple[int | None, int | None]:
        quota = self.quota
        tokens = [limit - self.tokens for limit in (quota.tpm, quota.daily_tokens) if limit is not None]
        return None if quota.rpm is None else quota.rpm - self.requests, min(tokens, default=None)


def a_quota(chance: random.Random) -> Quota:
    def limit(most: int) -> int | None:
        return chance.choice([None, chance.randint(1, most)])

    return Quota(limit(40), limit(4000), limit(12), limit(6000), limit(60_000), limit(60_000))


class Round:
    """Some owners, and cases among them."""

    def __init__(self, chance: random.Random, limits: Limits) -> None:
        self.chance = chance
        self.limits = limits
        self.tenants = {name: Owner(a_quota(chance)) for name in chance.sample(ALIKE, 5)}
        self.keys = {
            id: Owner(a_quota(chance)) for id in chance.sample(["k3f9a0b1c2d4", "a" * 12, "0" * 12, "key000000000"], 2)
        }
        self.callers = {
            (tenant, key): Caller(
                limits,
                Tenant(tenant, "p", "p", None, self.tenants[tenant].quota),
                key=ServiceKey(key, "s", None, None, quota=self.keys[key].quota),
                away=SHARE,
                replicas=1,
            )
            for tenant in self.tenants
            for key in self.keys
        }
        self.open: list[tuple[str, str, str, Reservation, int, int]] = []

    async def case(self, number: int) -> None:
        chance = self.chance
        if self.open and chance.random() < 0.4:
            self.settle(*self.open.pop(chance.randrange(len(self.open))))
            return
        (tenant, key), caller = chance.choice(list(self.callers.items()))
        owners = self.tenants[tenant], self.keys[key]
        call_id, tokens, nanos = f"call-{number}", chance.randint(0, 400), chance.randint(0, 4000)
        expected = all(owner.admits(tokens, nanos) for owner in owners)
        held = None
        with contextlib.suppress(LimitError):
            held = await caller.reserve(tokens, nanos, call_id)
        assert (held is not None) == expected, f"{tenant} by {key}: {tokens} tokens and {nanos} nano-dollars"
        if held is None:
            return
        for owner in owners:
            owner.take(call_id, tokens, nanos)
        self.see(held.rates, owners)
        self.open.append((tenant, key, call_id, held, tokens, nanos))

    def see(self, rates: Rates | None, owners: tuple[Owner, ...]) -> None:
        """None is told where there is no limit at all."""
        for place, told in enumerate((rates.remaining_requests, rates.remaining_tokens) if rates else (None, None)):
            left = [left for owner in owners if (left := owner.remaining()[place]) is not None]
            assert told == (max(0, min(left)) if left else None)

    def settle(self, tenant: str, key: str, call_id: str, held: Reservation, tokens: int, nanos: int) -> None:
        used_tokens, used_nanos = self.chance.randint(0, 500), self.chance.randint(0, 5000)
        self.limits.settle(held, used_tokens, used_nanos)
        for owner in (self.tenants[tenant], self.keys[key]):
            owner.end(call_id, used_tokens - tokens, used_nanos - nanos)

    @property
    def tags(self) -> dict[str, Owner]:
        return self.tenants | {f"_key.{id}": owner for id, owner in self.keys.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def test_names_that_are_alike_are_names() -> None:
    assert [name for name in ALIKE if not NAME.fullmatch(name)] == []


@pytest.mark.timeout(3600)
def test_each_owner_is_admitted_by_its_own_history_alone(server: RedisServer) -> None:
    seed = random.randrange(2**32)

    async def rounds() -> None:
        pipe = pipe_to(server)
        Limits(pipe, AMBIENT)  # scripts that are known are loaded on connecting; else what is sent later overtakes them
        async with running(pipe):
            for number in range(0, CASES, ROUND):
                not_just_before_midnight(SECONDS_OF_A_ROUND)
                server.client.flushall()
                whole(server)
                limits = Limits(pipe, AMBIENT)
                pipe.on_return.clear()  # those of the rounds before
                chance = random.Random(seed + number)
                round = Round(chance, limits)
                for case in range(ROUND):
                    await round.case(case)
                await pipe.execute("PING")
                for tag, owner in round.tags.items():
                    assert Counters(server, tag).all == owner.counted, tag
                prefixes = tuple(f"rl:{{{tag}}}:" for tag in round.tags)
                assert {key for key in server.client.keys("*") if not key.startswith(prefixes)} == {WHOLE}

    try:
        asyncio.run(rounds())
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.timeout(3600)
def test_without_redis_too_each_owner_is_admitted_by_its_own_history_alone(tmp_path: Path) -> None:
    """The only replica's share is the whole, so that the same model holds."""
    seed = random.randrange(2**32)

    async def rounds() -> None:
        for number in range(0, CASES, ROUND):
            not_just_before_midnight(SECONDS_OF_A_ROUND)
            round = Round(random.Random(seed + number), Limits(pipe_to(RedisServer(tmp_path)), AMBIENT))
            for case in range(ROUND):
                await round.case(case)

    try:
        asyncio.run(rounds())
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


# --- the ledger, and what keys are shown of it ------------------------------------------------------------------------

KEYS = {f"sk-gw-isolation{n:03d}-" + str(n) * 43: f"isolation{n:03d}" for n in range(6)}
SECRETS = list(KEYS)
AT_ONCE = 100
FOREVER_SECONDS = 60.0


class Counting:
    """Implements `upstream.Engine`: an answer with the usage that the call's `user` says."""

    async def open(self, outgoing: Any, connect_seconds: float) -> ScriptedAnswer:
        read, written = map(int, msgspec.json.decode(outgoing.body, type=dict)["user"].split())
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return ScriptedAnswer(completion(usage=usage))

    async def close(self) -> None:
        pass


class Yesterday(Ambient):
    """A day ago, so that the day of the calls is over when it is summed."""

    def now(self) -> float:
        return super().now() - 86_400


class Made(Struct):
    """A call as it was made: who may see it, and what of it."""

    key: str
    claimed: str
    feature: str
    tokens: int
    allowed: bool


def a_config(chance: random.Random, cache: str = "off") -> Config:
    """Tenants whose names are alike, and keys for some of them each; one is for all."""
    keys = {}
    for number, (secret, id) in enumerate(KEYS.items()):
        acts_for = None if number == 0 else frozenset(chance.sample(ALIKE, chance.randint(1, 8)))
        entry = ServiceKey(id, f"service-{number}", acts_for, None, roles=frozenset({"call", "usage"}))
        keys[hashlib.sha256(secret.encode()).digest()] = entry
    tenants = {name: Tenant(name, "p", "p", None) for name in ALIKE}
    base = config(total_seconds=FOREVER_SECONDS)
    alias = cached_alias(cache) if cache != "off" else msgspec.structs.replace(cached_alias(), cache=None)
    patient = msgspec.structs.replace(alias, timeouts=base.aliases[ALIAS].timeouts)
    return msgspec.structs.replace(base, aliases={ALIAS: patient}, tenants=tenants, keys=keys)


async def calls(door: FrontDoor, chance: random.Random) -> dict[str, Made]:
    """`CASES` calls by request id; of some the tenant is forged."""
    made: dict[str, Made] = {}
    may = {key.id: key for key in door.source.current.keys.values()}

    async def one(number: int) -> None:
        secret, claimed = chance.choice(SECRETS), chance.choice(ALIKE)
        feature = chance.choice([f"of-{claimed[:40]}", "shared"])
        read, written = chance.randint(0, 50), chance.randint(0, 50)
        id = f"case-{number}"
        made[id] = Made(KEYS[secret], claimed, feature, read + written, may[KEYS[secret]].may_act_for(claimed))
        sent = {
            "authorization": f"Bearer {secret}",
            "x-tenant-id": claimed,
            "x-feature-id": feature,
            "x-request-id": id,
        }
        body = {"model": ALIAS, "messages": [], "user": f"{read} {written}"}
        client = Client(json.dumps(body).encode(), [(name.encode(), value.encode()) for name, value in sent.items()])
        await client.visit(door)
        assert client.status == (200 if made[id].allowed else 403), (id, client.body)

    for start in range(0, CASES, AT_ONCE):
        await asyncio.gather(*(one(number) for number in range(start, min(CASES, start + AT_ONCE))))
    return made


def used_by(tenant: str, made: dict[str, Made], costs: dict[str, Decimal]) -> dict[str, Any]:
    """What usage has to say: of this tenant's calls alone, whichever key made them."""
    own = {id: call for id, call in made.items() if call.allowed and call.claimed == tenant}
    return {
        "tenant_id": tenant,
        "requests": len(own),
        "tokens": sum(call.tokens for call in own.values()),
        "usd": sum((costs[id] for id in own), Decimal()),
        "features": Counter(call.feature for call in own.values()),
    }


async def shown(http: httpx.AsyncClient, secret: str, tenant: str) -> dict[str, Any] | None:
    """What `GET /v1/usage` says of today; None where it is refused."""
    answer = await http.get("/v1/usage", headers={"authorization": f"Bearer {secret}", "x-tenant-id": tenant})
    if answer.status_code == 403:
        return None
    told = json.loads(answer.content, parse_float=Decimal)
    return {
        "tenant_id": told["tenant_id"],
        "requests": told["total"]["requests"],
        "tokens": told["total"]["total_tokens"],
        "usd": Decimal(told["total"]["cost_usd"]),
        "features": Counter({line["feature_id"]: line["requests"] for line in told["by_feature"]}),
    }


@pytest.mark.timeout(3600)
def test_each_call_is_its_tenant_s_in_the_ledger_and_in_usage_and_nobody_else_s(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    rooms = Rooms(tmp_path, ambient=Yesterday())
    rooms.dialogue.upstream = Counting()
    door = FrontDoor(Source(a_config(chance)), rooms.gateway, Callers(NoTokens()), rooms.ambient)
    made = asyncio.run(calls(door, chance))
    lines = [
        line.payload for file in tmp_path.glob("*.spool") for line in read_lines(file.read_bytes()) if line.kind == "E"
    ]
    rooms.spool.close()
    rows = {row["request_id"]: row for row in map(json.loads, lines)}
    assert len(rows) == len(lines)
    assert rows.keys() == made.keys()
    for id, call in made.items():
        row = rows[id]
        owner = (call.claimed, None) if call.allowed else (None, call.claimed)
        assert (row["tenant_id"], row.get("tenant_claimed"), row["key_id"]) == (*owner, call.key), f"seed {seed}: {id}"
        assert (row["feature_id"], row["usage"]["total_tokens"]) == (call.feature, call.tokens if call.allowed else 0)

    costs = {id: Decimal(str(row["cost_usd"]["total"])) for id, row in rows.items()}
    assert sum(costs.values()) > 0
    owned = {tenant: used_by(tenant, made, costs) for tenant in ALIKE}

    async def everyone(url: str) -> None:
        reader = UsageReader(url, AMBIENT, deadline_seconds=FOREVER_SECONDS)
        routes = usage_pages.tenant_routes(door.source, reader, AMBIENT, door.callers, rooms.telemetry)
        transport = httpx.ASGITransport(app=api.app(door, routes))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            for secret, id in KEYS.items():
                key = door.source.current.keys[hashlib.sha256(secret.encode()).digest()]
                for tenant in ALIKE:
                    expected = owned[tenant] if key.may_act_for(tenant) else None
                    assert await shown(http, secret, tenant) == expected, f"seed {seed}: {tenant!r} by {id}"
        await reader.close()

    async def insert(url: str) -> None:
        archive = Archive(url, AMBIENT, FOREVER_SECONDS)
        await archive.prepare()
        for start in range(0, len(lines), 2000):
            await archive.insert([line.decode() for line in lines[start : start + 2000]])
        await archive.close()

    with running_postgres() as postgres:
        url = postgres.database()
        asyncio.run(insert(url))
        asyncio.run(everyone(url))  # from the rows
        settle(url)
        assert roll(url) == sorted({date.fromisoformat(row["timestamp"][:10]) for row in rows.values()})
        query(url, "TRUNCATE ledger")
        asyncio.run(everyone(url))  # from the rollups


# --- answers from before ----------------------------------------------------------------------------------------------

CACHED_CASES = CASES // 4
PROMPTS = ["What is the refund policy?", "Who am I?", "Say hello.", "What did I ask before?"]
GREETINGS = ["", "Hello, ", "hi ", "Good morning! "]
"""Before a prompt, they change its words and not its meaning."""
ONCE = [f"key-{number}" for number in range(12)]
SURROUNDINGS: list[dict[str, Any]] = [
    {"system": system, "tools": tools, "response_format": form}
    for system in ("Answer briefly.", "Answer at length.")
    for tools in (None, [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}])
    for form in (None, {"type": "json_object"})
]
REVISIONS = ["r1", "r2"]
NUMBERED = re.compile(rb"answer-(\d+)-")


class Reader(Client):
    """A client that reads the head of its answer too."""

    def start(self, status: int, head: Head) -> None:
        lines = head if isinstance(head, bytes) else written(head)
        self.told = dict(line.split(b": ", 1) for line in lines.split(b"\r\n")[:-1])
        super().start(status, head)


class Numbering:
    """Implements `upstream.Engine`: no two of its answers are the same."""

    def __init__(self) -> None:
        self.given = 0

    async def open(self, outgoing: Any, connect_seconds: float) -> ScriptedAnswer:
        self.given += 1
        text = f"answer-{self.given}-"
        await asyncio.sleep(0)
        if msgspec.json.decode(outgoing.body, type=dict).get("stream"):
            return ScriptedAnswer(chunk(text), chunk(finish_reason="stop"), USAGE_FRAME, DONE)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return ScriptedAnswer(completion(choices=[choice]))

    async def close(self) -> None:
        pass


def without_replays(seen: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Who was told an answer, and where; what a key replayed only counts for its tenant, prompt, tools and format."""
    whole = {(tenant, where) for tenant, where in seen if json.loads(where)[1] != ""}
    known = {(tenant, json.dumps(json.loads(where)[0])) for tenant, where in whole}
    return whole | {(tenant, where) for tenant, where in seen - whole
                    if (tenant, json.dumps(json.loads(where)[0])) not in known}  # fmt: skip


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["exact", "static"])
def test_an_answer_from_before_is_of_the_same_tenant_and_surroundings(
    server: RedisServer, tmp_path: Path, mode: str
) -> None:
    """The same few prompts from all tenants through two replicas, under other system prompts, tools, formats and
    revisions; and the same few idempotency keys: with the same body they are told the same whatever the revision.
    """
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    current, vendor = a_config(chance, mode), Numbering()
    may = {key.id: key for key in current.keys.values()}
    owners: dict[bytes, set[tuple[str, str]]] = {}
    answered = Counter[str]()

    async def one(door: FrontDoor) -> None:
        secret, claimed = chance.choice(SECRETS), chance.choice(ALIKE)
        around, revision = chance.choice(SURROUNDINGS), chance.choice(REVISIONS)
        prompt = chance.choice(GREETINGS) + chance.choice(PROMPTS)
        messages = [{"role": "system", "content": around["system"]}, {"role": "user", "content": prompt}]
        members = {name: value for name, value in around.items() if name != "system" and value is not None}
        body = {"model": ALIAS, "messages": messages, "temperature": 0, "stream": chance.random() < 0.3} | members
        sent = {"authorization": f"Bearer {secret}", "x-tenant-id": claimed, "x-kb-revision": revision}
        if chance.random() < 0.3:
            sent["idempotency-key"] = chance.choice(ONCE)
        client = Reader(json.dumps(body).encode(), [(name.encode(), value.encode()) for name, value in sent.items()])
        await client.visit(door)
        allowed = may[KEYS[secret]].may_act_for(claimed)
        assert client.status in ((200, 409, 422) if allowed else (403,)), client.body
        numbers = set(NUMBERED.findall(client.body))
        assert len(numbers) == (client.status == 200)
        for number in numbers:
            result = client.told.get(b"x-cache", b"").decode()
            surroundings = json.dumps([around, "" if result == "HIT (idempotent)" else revision])
            owners.setdefault(number, set()).add((claimed, surroundings))
            answered[result] += 1

    async def main() -> None:
        async with running(pipe_to(server)) as first, running(pipe_to(server)) as second:
            doors, channels, remembering = [], [], []
            for name, pipe in (("r1", first), ("r2", second)):
                rooms = Rooms(tmp_path / name, ambient=AMBIENT, pipe=pipe, replica=name)
                rooms.dialogue.upstream = vendor
                await rooms.channel.run_once()
                cache = rooms.cache
                cache.semantic = Questions(
                    pipe, AMBIENT, lambda *_: Words(), Learning(pipe, rooms.channel, AMBIENT, name),
                    lambda ask, key, data, cache=cache: cache.opened(ask, data, key),
                )  # fmt: skip
                channels.append(rooms.channel)
                remembering.append(cache.semantic)
                doors.append(FrontDoor(Source(current), rooms.gateway, Callers(NoTokens()), AMBIENT))
            for _ in range(0, CACHED_CASES, AT_ONCE):
                for channel in channels:  # a replica that has not read it for a second finds nothing
                    await channel.run_once()
                await asyncio.gather(*(one(chance.choice(doors)) for _ in range(AT_ONCE)))
            for questions, door in zip(remembering, doors, strict=True):
                await questions.close()
                door.gateway.spool.close()

    server.client.flushall()
    whole(server)
    try:
        asyncio.run(main())
        assert {number: seen for number, seen in owners.items() if len(without_replays(seen)) > 1} == {}
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    assert answered["HIT (semantic)" if mode == "static" else "HIT (exact)"] > CACHED_CASES / 500, answered
    assert vendor.given >= len(ALIKE)
