"""Answers to questions that mean the same on a call's journey: what the client gets, the rows, and asking again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.cache.learning import Learning
from app.cache.semantic import Questions
from tests import cache_parts
from tests.cache_parts import ALIAS, body
from tests.gateway_parts import ScriptedAnswer, completion
from tests.limits_parts import whole
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, until
from tests.test_cache_semantic import NoWords, Words
from tests.test_recall import STREAM, Client, headers, kept, replica, text

ASKED = "What is your refund policy?"
AGAIN = "Hello, what is the refund policy please"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def empty(server: RedisServer) -> None:
    server.client.flushall()
    whole(server)


@asynccontextmanager
async def meaning(
    server: RedisServer, folder: Path, *script: Any, vectors: Any = None
) -> AsyncIterator[tuple[Client, Questions]]:
    """A replica that looks at what questions mean."""
    async with replica(server, folder, *script) as client:
        cache, pipe = client.rooms.cache, client.rooms.cache._pipe
        learning = Learning(pipe, client.rooms.channel, AMBIENT, "r1")
        cache.semantic = Questions(
            pipe, AMBIENT, lambda *_: vectors or Words(), learning, lambda ask, key, data: cache.opened(ask, data, key)
        )
        yield client, cache.semantic


def config(mode: str = "static", **policy: Any) -> Any:
    return cache_parts.config(mode, **({"threshold": 0.9, "reverify": 0.0} | policy))


def question(content: str, **fields: Any) -> bytes:
    return body(messages=[{"role": "user", "content": content}], **fields)


def test_a_question_that_means_the_same_is_a_hit_with_a_row_of_its_own(server: RedisServer, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with meaning(server, tmp_path, ScriptedAnswer(completion())) as (client, questions):
            await client.ask(question(ASKED), config=config())
            await kept(server)
            await questions.settled()
            out: list[bytes] = []
            reply = await client.ask(question(AGAIN, stream=True), out, config=config())
            assert headers(reply)["x-cache"] == "HIT (semantic)"
            assert float(headers(reply)["x-cache-similarity"]) > 0.9
            assert text(out) == "hello"
            row = client.row()
            assert (row["cache_hit"], row["cache_kind"], row["status"]) == (True, "semantic", "success")
            assert row["similarity"] > 0.9
            assert row["saved_usd"] > 0

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_hit_is_asked_again_at_the_gateways_cost(server: RedisServer, tmp_path: Path, stream: bool) -> None:
    script = ScriptedAnswer(completion()), ScriptedAnswer(*STREAM) if stream else ScriptedAnswer(completion())

    async def scenario() -> None:
        async with meaning(server, tmp_path, *script) as (client, questions):
            await client.ask(question(ASKED), config=config())
            await kept(server)
            await questions.settled()
            await client.ask(question(AGAIN, stream=stream), config=config(reverify=1.0))
            await until(lambda: questions.learning.tally("acme-corp", ALIAS).checks == 1)
            assert questions.learning.tally("acme-corp", ALIAS).wrong == 0
            rows = {row["purpose"]: row for row in client.rooms.rows()}
            assert (rows["reverify"]["tenant_id"], rows["reverify"]["status"]) == ("_gateway", "success")
            assert rows["reverify"]["cost_usd"]["total"] > 0
            assert rows["client"]["tenant_id"] == "acme-corp"

    run(scenario())


def test_shadow_mode_and_a_missing_embedder_ask_the_vendor(server: RedisServer, tmp_path: Path) -> None:
    answers = [ScriptedAnswer(completion()) for _ in range(4)]

    async def scenario() -> None:
        async with meaning(server, tmp_path / "a", *answers[:2]) as (client, questions):
            await client.ask(question(ASKED), config=config("shadow"))
            await kept(server)
            await questions.settled()
            reply = await client.ask(question(AGAIN), config=config("shadow"))
            assert headers(reply)["x-cache"] == "MISS"
        async with meaning(server, tmp_path / "b", *answers[2:], vectors=NoWords()) as (client, _):
            reply = await client.ask(question(AGAIN + "!"), config=config())
            assert headers(reply)["x-cache"] == "MISS"

    for name in "ab":
        (tmp_path / name).mkdir()
    run(scenario())


def test_in_an_incident_a_hit_is_served_and_no_vendor_is_asked_about_it(server: RedisServer, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with meaning(server, tmp_path, ScriptedAnswer(completion())) as (client, questions):
            await client.ask(question(ASKED), config=config())
            await kept(server)
            await questions.settled()
            calm = config(reverify=1.0)
            incident = msgspec.structs.replace(calm, settings=msgspec.structs.replace(calm.settings, mode="cache_only"))
            reply = await client.ask(question(AGAIN), config=incident)
            assert headers(reply)["x-cache"] == "HIT (semantic)"
            await until(lambda: not client.rooms.gateway.shadows._running)
            assert [row["purpose"] for row in client.rooms.rows()] == ["client", "client"]

    run(scenario())
