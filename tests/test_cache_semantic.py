"""Questions that mean the same, on a real Redis: what is served, what is learned, and whatever fails is a miss."""

from __future__ import annotations

import asyncio
import json
import math
import zlib
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from app.cache.entry import Entry, opened, sealed
from app.cache.guards import read
from app.cache.judge import answer
from app.cache.learning import Learning
from app.cache.partition import Ask, prefix
from app.cache.room import Seen
from app.cache.semantic import Questions
from app.control import Control
from app.core import Usage
from app.redis_pipe import RedisPipe
from loadtest.labelled import made_up
from tests.cache_parts import alias, asked, body, tenant
from tests.gateway_parts import completion
from tests.limits_parts import pipe_to
from tests.redis_parts import AMBIENT, RedisServer, redis_server, run, running

REFUND = "How do I get a refund for my order"
REFUND_TOO = "How can I get a refund for an order, please"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def empty(server: RedisServer) -> None:
    server.client.flushall()


class Words:
    """A vector of a text: where its words hash to."""

    name = "words"

    async def embed(self, text: str, seconds: float) -> bytes | None:
        counts = array("f", bytes(4 * 256))
        for word in read(text).content:
            counts[zlib.crc32(word.encode()) % 256] += 1.0
        length = math.sqrt(sum(count * count for count in counts)) or 1.0
        return array("f", (count / length for count in counts)).tobytes()


class NoWords:
    name = "words"

    async def embed(self, text: str, seconds: float) -> bytes | None:
        return None


class Says:
    """A judge that says the same of all answers."""

    def __init__(self, says: bool | None) -> None:
        self.says = says
        self.heard: list[tuple[str, ...]] = []
        self.within: list[frozenset[str] | None] = []

    async def same(
        self, alias: str, question: str, one: str, other: str, residency: frozenset[str] | None = None
    ) -> bool | None:
        self.heard.append((alias, question, one, other))
        self.within.append(residency)
        return self.says


class Replica:
    """Semantic lookups as one replica makes them, each answer kept as the room of the cache keeps it."""

    def __init__(self, pipe: RedisPipe, server: RedisServer, name: str, vectors: Any, second: Any = None) -> None:
        self.control = Control(pipe, AMBIENT)
        self.learning = Learning(pipe, self.control, AMBIENT, name)
        self.questions = Questions(
            pipe, AMBIENT, lambda *_: vectors, self.learning, lambda ask, key, data: opened(key, data), second
        )
        self.pipe, self.server = pipe, server

    async def answer(self, ask: Ask, seen: Seen, text: str) -> None:
        """The vendor's answer to what was not served."""
        entry = entry_of(text)
        self.server.client.set(ask.key, sealed(ask.key, entry))
        self.questions.observe(ask, seen, ask.key, entry)
        await self.questions.settled()

    async def put(self, question: str, text: str, **how: Any) -> Seen:
        """Asks; what is not served is answered with `text`."""
        ask = of(question, **how)
        seen = await self.questions.find(ask)
        if seen.entry is None:
            await self.answer(ask, seen, text)
        return seen


@asynccontextmanager
async def replica(
    server: RedisServer, name: str = "a", vectors: Any = None, second: Any = None
) -> AsyncIterator[Replica]:
    pipe = pipe_to(server)
    made = Replica(pipe, server, name, vectors or Words(), second)
    async with running(pipe):
        yield made


def of(question: str, mode: str = "static", *, who: str = "acme-corp", system: str = "", **policy: Any) -> Ask:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    cache = {name: policy.pop(name) for name in ("max_bytes", "max_wrong") if name in policy}
    return asked(body(messages=messages), by=tenant(who, **cache), of=alias(mode, **({"threshold": 0.9} | policy)))


def entry_of(text: str) -> Entry:
    whole = json.loads(completion())
    whole["choices"][0]["message"]["content"] = text
    return Entry(json.dumps(whole).encode(), "openai", "m", Usage(), AMBIENT.now())


def text_of(seen: Seen) -> str | None:
    return None if seen.entry is None else json.loads(seen.entry.body)["choices"][0]["message"]["content"]


def test_a_question_that_means_the_same_gets_the_answer_from_before(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            seen = await one.questions.find(of(REFUND_TOO))
            assert text_of(seen) == "Within 30 days."
            assert seen.key == of(REFUND).key
            assert seen.similarity == pytest.approx(1.0, abs=0.01)

    run(scenario())


@pytest.mark.parametrize("question", ["How do I get a refund for 2 orders", "How do I not get a refund for my order"])
def test_a_near_miss_is_a_miss_however_similar(server: RedisServer, question: str) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            assert (await one.questions.find(of(question, threshold=0.5))).entry is None

    run(scenario())


@pytest.mark.parametrize("other", [{"who": "acme"}, {"system": "Answer in French."}, {"name": "support-quality"}])
def test_nobody_else_gets_it(server: RedisServer, other: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            assert (await one.questions.find(of(REFUND, **other))).notes.verdict is None

    run(scenario())


def test_shadow_serves_nothing_and_tells_what_it_would_have_got_right_and_wrong(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await learned(one)
            one.learning.tally("acme-corp", "support-fast").__init__()
            for text, label in made_up(300, 9):
                seen = await one.put(text, f"About {label}.", mode="shadow")
                assert seen.entry is None
            tally = one.learning.tally("acme-corp", "support-fast")
            assert tally.shadow_right > 50
            assert tally.shadow_wrong <= 6
            assert tally.hits == 0

    run(scenario())


async def learned(one: Replica, count: int = 900) -> list[tuple[str, str, Seen]]:
    """A tenant's traffic in mode verified, learned from as it comes."""
    served = []
    for number, (text, label) in enumerate(made_up(count, 3)):
        served.append((text, label, await one.put(text, f"About {label}.", mode="verified", reverify=0.0)))
        if number % 100 == 99:
            await one.learning.run_once()
    return served


def test_verified_serves_nothing_at_first_then_much_and_hardly_ever_wrongly(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            served = await learned(one)
            answers = [(label, text_of(seen)) for _, label, seen in served]
            assert all(text is None for _, text in answers[:200])
            assert one.learning.fitted > 0
            hits = [(label, text) for label, text in answers[600:] if text is not None]
            assert len(hits) > 60
            assert sum(text != f"About {label}." for label, text in hits) <= 6

    run(scenario())


def test_what_one_replica_learns_another_serves_by(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one, replica(server, "b") as two:
            await learned(one)
            model = one.learning.model("acme-corp", 0.01)
            assert two.learning.model("acme-corp", 0.01) is None
            await two.control.run_once()
            await two.learning.run_once()
            assert two.learning.model("acme-corp", 0.01) == model
            assert two.learning.model("acme", 0.01) is None

    run(scenario())


def test_one_replica_learns_at_a_time(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            for text, label in made_up(400, 3):
                await one.put(text, f"About {label}.", mode="verified")
            server.client.set("sc:{acme-corp}:_learner", "another")
            assert await one.learning.run_once() == 0
            server.client.delete("sc:{acme-corp}:_learner")
            assert await one.learning.run_once() == 1

    run(scenario())


def test_an_answer_that_is_found_wrong_when_asked_again_is_told_of(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            seen = await one.questions.find(of(REFUND_TOO, reverify=1.0))
            assert seen.check
            one.questions.reverified(of(REFUND_TOO), seen, entry_of("Refunds have ended."))
            await one.questions.settled()
            await one.learning.run_once()
            await one.pipe.execute("PING")
            assert server.client.zrange("sc:{acme-corp}:_worst", 0, -1) == [seen.key]
            (figures,) = server.client.keys("sc:{acme-corp}:_figures:*")
            assert server.client.hgetall(figures)["support-fast:wrong"] == "1"

    run(scenario())


def test_an_answer_that_has_ended_is_a_miss_and_its_question_forgotten(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            server.client.delete(of(REFUND).key)
            assert (await one.questions.find(of(REFUND_TOO))).entry is None
            await one.questions.find(of("something else"))
            assert server.client.zcard("sc:{acme-corp}:_questions") == 0

    run(scenario())


def test_a_damaged_entry_is_a_miss_and_its_question_forgotten(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            server.client.set(of(REFUND).key, b"rubbish")
            assert (await one.questions.find(of(REFUND_TOO))).entry is None
            assert one.learning.tally("acme-corp", "support-fast").ended == 1
            await one.pipe.execute("PING")
            assert server.client.zcard("sc:{acme-corp}:_questions") == 0

    run(scenario())


def test_damaged_facts_are_no_neighbour(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            (key,) = server.client.keys("*:v2:*")
            server.client.execute_command("VSETATTR", key, of(REFUND).digest, "rubbish")
            assert (await one.questions.find(of(REFUND_TOO))).notes.verdict is None

    run(scenario())


def test_a_tenant_has_a_bounded_number_of_questions(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            for text, label in made_up(60, 5):
                await one.put(text, label, mode="shadow", max_bytes=1_500 * 4 * 10)
            assert server.client.zcard("sc:{acme-corp}:_questions") == 10
            (key,) = server.client.keys("*:v2:*")
            assert server.client.execute_command("VCARD", key) == 10

    run(scenario())


def test_what_is_forgotten_is_not_found(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            await one.put(REFUND, "Within 30 days.", who="acme")
            one.questions.forget("acme-corp", None)
            await one.questions.settled()
            assert (await one.questions.find(of(REFUND_TOO))).entry is None
            assert (await one.questions.find(of(REFUND_TOO, who="acme"))).entry is not None

    run(scenario())


def test_without_a_vector_or_redis_there_is_a_miss(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server, vectors=NoWords()) as one:
            assert await one.questions.find(of(REFUND)) == Seen()
        away = Replica(pipe_to(server), server, "a", Words())
        assert await away.questions.find(of(REFUND)) == Seen()
        away.questions.observe(of(REFUND), Seen(), of(REFUND).key, entry_of("x"))

    run(scenario())


def test_long_conversations_are_not_looked_up(server: RedisServer) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2

    async def scenario() -> None:
        async with replica(server) as one:
            ask = asked(body(messages=[*turns, {"role": "user", "content": REFUND}]), of=alias("static"))
            assert (await one.questions.find(ask)).notes is None
            assert (
                await one.questions.find(msgspec.structs.replace(ask, policy=alias("static", max_turns=3).cache))
            ).notes

    run(scenario())


def test_each_look_is_told_by_what_became_of_it(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")  # nobody is there
            await one.put("How do I get a refund for 2 orders", "It depends.")  # another number
            await one.put("Where do refunds for broken lamps go", "Elsewhere.")  # not alike enough
            await one.put(REFUND_TOO, "", mode="verified")  # nothing has been learned
            await one.put(REFUND_TOO, "")
            tally = one.learning.tally("acme-corp", "support-fast")
            assert (tally.alone, tally.vetoes, tally.unsure, tally.untaught, tally.hits) == (1, {"numbers": 1}, 1, 1, 1)
            assert tally.looks == 5
            await one.learning.run_once()
            looks = {labels[2]: value for labels, value in one.learning.looks()}
            assert (looks["alone"], looks["vetoed"], looks["hit"], sum(looks.values())) == (1, 1, 1, 5)

    run(scenario())


@pytest.mark.parametrize(("says", "checks", "wrong"), [(True, 1, 0), (False, 1, 1), (None, 0, 0)])
def test_where_an_alias_judges_its_word_counts_and_no_word_teaches_nothing(
    server: RedisServer, says: bool | None, checks: int, wrong: int
) -> None:
    judge = Says(says)

    async def scenario() -> None:
        async with replica(server, second=judge) as one:
            await one.put(REFUND, "Within 30 days.")
            ask = of(REFUND_TOO, reverify=1.0, judge="judging", judge_share=1.0)
            seen = await one.questions.find(ask)
            one.questions.reverified(ask, seen, entry_of("In a month."))
            await one.questions.settled()
            tally = one.learning.tally("acme-corp", "support-fast")
            assert (tally.checks, tally.wrong) == (checks, wrong)

    run(scenario())
    assert judge.heard == [("judging", REFUND_TOO, "In a month.", "Within 30 days.")]


@pytest.mark.parametrize(("share", "text"), [(0.0, "In a month."), (1.0, "Within 30 days.")])
def test_a_judge_is_not_asked_of_the_same_words_nor_beyond_its_share(
    server: RedisServer, share: float, text: str
) -> None:
    judge = Says(False)

    async def scenario() -> None:
        async with replica(server, second=judge) as one:
            await one.put(REFUND, "Within 30 days.", judge="judging", judge_share=share)
            ask = of(REFUND_TOO, reverify=1.0, judge="judging", judge_share=share)
            one.questions.reverified(ask, await one.questions.find(ask), entry_of(text))
            await one.questions.settled()
            assert one.learning.tally("acme-corp", "support-fast").checks == 1

    run(scenario())
    assert judge.heard == []


def test_of_two_that_learned_from_the_same_model_one_is_heard(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one, replica(server, "b") as two:
            for text, label in made_up(400, 3):
                await one.put(text, label, mode="verified")
            assert await one.learning.run_once() == 1
            put = [each.pipe.execute("EVALSHA", each.learning._put, 1, "sc:{acme-corp}:_model", 1, 2, name)
                   for each, name in ((one, b"a"), (two, b"b"))]  # fmt: skip
            assert sorted(await asyncio.gather(*put)) == [0, 1]
            assert server.client.hget("sc:{acme-corp}:_model", "version") == "2"
            await one.pipe.execute("HSET", "sc:{acme-corp}:_model", "model", "rubbish")
            before = one.learning.model("acme-corp", 0.01)
            await one.control.put("verifier", "acme-corp", "2", "b")
            await one.control.run_once()
            await one.learning.run_once()
            assert one.learning.model("acme-corp", 0.01) == before  # what cannot be read replaces nothing

    run(scenario())


def test_questions_whose_answers_turn_out_to_be_one_become_one_group(server: RedisServer) -> None:
    judge = Says(False)

    async def scenario() -> None:
        async with replica(server, second=judge) as one:

            async def groups(question: str, text: str) -> int:
                await one.put(question, text, mode="shadow", judge="judging", judge_share=1.0)
                await one.pipe.execute("PING")
                (key,) = server.client.keys("*:v2:*")
                ids = server.client.execute_command("VRANDMEMBER", key, 9)
                return len({json.loads(server.client.execute_command("VGETATTR", key, id))[0] for id in ids})

            assert await groups("how do I open an account", "You come to us.") == 1
            assert await groups("how do I open my account at home", "Come to us, please.") == 2
            judge.says = True
            assert await groups("how to open an account", "Come to us, please.") == 1

    run(scenario())


class Renamed(Words):
    """Its alias gets another model while a vector is being made."""

    def __init__(self) -> None:
        self.name = "old"

    async def embed(self, text: str, seconds: float) -> bytes | None:
        vector = await super().embed(text, seconds)
        self.name = "new"
        return vector


def test_a_vector_is_remembered_among_those_of_the_model_that_made_it(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server, vectors=Renamed()) as one:
            await one.put(REFUND, "Within 30 days.")
            (key,) = server.client.keys("*:v2:*")
            assert ":v2:old:" in key

    run(scenario())


@pytest.mark.parametrize(("embedder", "sent"), [("embed-small", False), ("static", True)])
def test_what_no_guardrail_has_seen_is_sent_to_no_embedder(server: RedisServer, embedder: str, sent: bool) -> None:
    ask = msgspec.structs.replace(of(REFUND, embedder=embedder), guarded=True)

    async def scenario() -> None:
        async with replica(server) as one:
            seen = await one.questions.find(ask)
            assert (seen.notes is not None) is sent
            assert one.learning.tally("acme-corp", "support-fast").no_vector == (not sent)

    run(scenario())


def test_an_embedder_is_told_where_the_tenants_texts_may_go(server: RedisServer) -> None:
    told: list[tuple[str, frozenset[str] | None]] = []
    judge = Says(True)

    async def scenario() -> None:
        async with replica(server, second=judge) as one:
            one.questions._vectors = lambda *how: told.append(how) or Words()
            resident = msgspec.structs.replace(tenant(), residency=frozenset({"eu"}))
            for question in (REFUND, REFUND_TOO):
                policy = alias("shadow", embedder="embed-small", judge="judging", judge_share=1.0, threshold=0.9)
                ask = asked(body(messages=[{"role": "user", "content": question}]), by=resident, of=policy)
                await one.answer(ask, await one.questions.find(ask), f"To {question}")
            assert {how for how in told if how[0] == "embed-small"} == {("embed-small", frozenset({"eu"}))}

    run(scenario())
    assert judge.within == [frozenset({"eu"})]


def test_an_answer_that_is_forgotten_while_its_group_is_read_is_compared_once(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:

            def forgetting(ask: Ask, key: str, data: bytes) -> Entry | None:
                one.questions._answers.clear()
                return opened(key, data)

            for question, text in ((REFUND, "Within 30 days."), ("How do I get the refund for my order", "A month.")):
                await one.put(question, text, mode="shadow")
            (key,) = server.client.keys("*:v2:*")
            for id in server.client.execute_command("VRANDMEMBER", key, 9):  # one group, whose entries say one thing
                attributes = json.loads(server.client.execute_command("VGETATTR", key, id))
                server.client.execute_command("VSETATTR", key, id, json.dumps(["one", id, *attributes[2:]]))
                entry = prefix("acme-corp", "support-fast") + "x:" + id
                server.client.set(entry, sealed(entry, entry_of("In 60 days.")))
            one.questions._opened = forgetting
            ask = of(REFUND_TOO, mode="shadow")
            notes = (await one.questions.find(ask)).notes
            groups = await one.questions._groups(ask, notes, answer("Never.", None))
            assert [len(group) for group in groups.values()] == [1]

    run(scenario())


def test_when_it_closes_a_judge_is_waited_for_no_more_and_nothing_is_learned_after(server: RedisServer) -> None:
    class Hangs(Says):
        async def same(self, *_: Any) -> bool | None:
            asking.set()
            await asyncio.Event().wait()

    asking = asyncio.Event()

    async def scenario() -> None:
        async with replica(server, second=Hangs(True)) as one:
            await one.put(REFUND, "Within 30 days.")
            ask = of(REFUND_TOO, reverify=1.0, judge="judging", judge_share=1.0)
            seen = await one.questions.find(ask)
            one.questions.reverified(ask, seen, entry_of("In a month."))
            await asking.wait()
            await one.questions.close()
            asking.clear()
            one.questions.reverified(ask, seen, entry_of("In a month."))
            await one.questions.settled()
            assert not asking.is_set()
            assert one.questions.dropped == 1

    run(scenario())


def test_the_next_call_goes_before_what_the_last_one_teaches(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            ask = of(REFUND)
            seen = await one.questions.find(ask)
            server.client.set(ask.key, sealed(ask.key, entry_of("Within 30 days.")))
            one.questions.observe(ask, seen, ask.key, entry_of("Within 30 days."))
            assert not one.questions._tasks
            await one.questions.settled()
            assert text_of(await one.questions.find(of(REFUND_TOO))) == "Within 30 days."

    run(scenario())


def test_what_waits_to_be_learned_from_ends_with_the_replica(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            ask = of(REFUND)
            seen = await one.questions.find(ask)
            one.questions.observe(ask, seen, ask.key, entry_of("Within 30 days."))
            await one.questions.close()
            await one.questions.settled()
            await one.pipe.execute("PING")
            assert server.client.keys("*:v2:*") == []

    run(scenario())


def test_a_look_that_is_cancelled_leaves_the_next_one_its_answer(server: RedisServer) -> None:
    async def scenario() -> None:
        async with replica(server) as one:
            await one.put(REFUND, "Within 30 days.")
            looking = asyncio.ensure_future(one.questions.find(of("something else")))
            await asyncio.sleep(0)
            looking.cancel()
            assert text_of(await one.questions.find(of(REFUND_TOO))) == "Within 30 days."
            assert looking.cancelled()

    run(scenario())


def test_questions_of_another_form_do_not_hide_those_of_this_one(server: RedisServer) -> None:
    """What lies beside a question reads so for as long as FORM is this one."""

    async def scenario() -> None:
        async with replica(server) as one:
            await one.put("Is it 5 km", "Yes.")
            (key,) = server.client.keys("*:v2:*")
            (id,) = server.client.execute_command("VRANDMEMBER", key, 10)
            group, digest, said = json.loads(server.client.execute_command("VGETATTR", key, id))
            assert (group, said) == (digest, ["is it 5 km", "5 km", "5", "km", "", 0, ""])
            for n in range(16):  # as they were: words as lists
                old = json.dumps(["x", "x", [["is"], ["is"], [], [], [], 0, "en"]])
                vector = await Words().embed("Is it 5 km", 1.0)
                server.client.execute_command(
                    "VADD", key.replace(":v2:", ":v:"), "FP32", vector, f"old{n}", "Q8", "SETATTR", old
                )
            assert text_of(await one.questions.find(of("is it 5 km?"))) == "Yes."

    run(scenario())
