"""Questions that mean the same, in Redis: found by vector within a partition, remembered when they are answered.

A look is one command, VSIM on the partition's vector set, which brings each neighbour's facts; an answer that is to be
served is one more. What a miss teaches is worked out after the call. Whatever fails is a miss.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.cache.bounded import Bounded
from app.cache.entry import Entry
from app.cache.guards import LONGEST_TEXT, Facts, Written, read, written
from app.cache.judge import Answer, Judge, answer, digest
from app.cache.learner import Observation
from app.cache.learning import Learning, Tally
from app.cache.partition import Ask, prefix
from app.cache.room import Seen
from app.cache.verifier import NEIGHBOURS, Neighbour, Verdict, weigh
from app.config.caching import LOCAL_EMBEDDERS
from app.dialects.replay import REPLAYS
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused

log = logging.getLogger("gateway")

ON_ITS_THREAD = "NOTHREAD"
"""VSIM on Redis's own thread, 0.1 ms: with a thread of its own for each look, as it does unasked, it took 0.4 ms."""
EFFORT = 32
"""Candidates that a search goes through (VSIM's EF): of 10,000 questions it finds 99.3 % of the sixteen nearest in
90 µs. With 64 it is 99.4 % in 125 µs (measured)."""
QUESTION_BYTES = 1_500
"""What a remembered question costs in Redis: vector, links, facts, its place by use (measured: about 1,300)."""
QUESTIONS_SHARE = 4
"""The tenant's questions may take one part in so many of its bytes, beside its answers."""
FETCHED = 6
"""Neighbours' answers that are fetched at most to compare a new one with; most are known from before."""
ANSWERS_BYTES = 12 * 1_048_576
"""Of answers that a replica knows by heart: 4,400 of 600 characters, or 2,200 of 2,000 (measured)."""
JUDGES_BYTES = 16 * 1_048_576
"""Of what it knows about the answers of tenants' aliases: 300 of these where answers have 600 characters,
180 where they have 2,000 (measured). Those longest unused begin anew."""
ANSWER_SECONDS = 1.0
"""Nobody waits for the vector of an answer."""
TASKS = 64
"""Answers that wait or are being learned from; from what comes beyond nothing is learned."""
LATER_SECONDS = 0.01
"""From an answer until it is learned from: the caller's next call often comes on its heels, and goes first."""
_LOG_SECONDS = 60.0
FORM = "v2"
"""What lies beside a question, by its form (`_Attributes`): another form needs another name. Questions of another one
cannot be read, and would hide those of this one, whose nearest neighbours they are; so each form has sets of its own,
and those that nobody asks any more end by themselves."""

_encode = msgspec.json.encode
Opened = Callable[[Ask, str, bytes], Entry | None]


class _Attributes(Struct, frozen=True, array_like=True):
    """What lies beside a question: the group of its answer, that answer's digest, and its facts."""

    group: str
    answer: str
    said: Written


_attributes = msgspec.json.Decoder(_Attributes)


class Vectors(Protocol):
    """Who makes vectors of texts; None is no vector, and so a miss."""

    name: str

    async def embed(self, text: str, seconds: float) -> bytes | None: ...


class Second(Protocol):
    """A model that is asked whether two answers say the same; None: it did not say so in time."""

    async def same(
        self, alias: str, question: str, one: str, other: str, residency: frozenset[str] | None = None
    ) -> bool | None: ...


class Notes(Struct, frozen=True):
    """What a look found out, for when the vendor's answer is there. `chance` -1: there is no model, or a veto.

    `vector_set`: where the vector belongs, by the model of its time. `would`: the decision, whether or not the mode
    serves it.
    """

    vector_set: str
    vector: bytes
    facts: Facts
    verdict: Verdict | None
    neighbours: tuple[Neighbour, ...]
    chance: float = -1.0
    would: bool = False


class Compared(Struct, frozen=True):
    """What an answer says of the neighbours': the group that it belongs to, and the questions that come into it too;
    whether the chosen group's answer was right (None: nobody knows), and what tells of the judge's own error.
    """

    group: str
    digest: str
    right: bool | None = None
    compared: int = 0
    agreed: int = 0
    merged: tuple[Neighbour, ...] = ()


class Questions:
    """The questions of all tenants. `opened` gives the entry in the bytes under a key, if it may answer a call."""

    def __init__(
        self,
        pipe: RedisPipe,
        ambient: Ambient,
        vectors: Callable[[str, frozenset[str] | None], Vectors],
        learning: Learning,
        opened: Opened,
        second: Second | None = None,
    ) -> None:
        here = Path(__file__)
        self._remember = pipe.script(here.with_name("remember.lua").read_text())
        self._forget = pipe.script(here.with_name("forget_questions.lua").read_text())
        self._pipe = pipe
        self._ambient = ambient
        self._vectors = vectors
        self.learning = learning
        self._opened = opened
        self._second = second
        self._later: deque[Coroutine[Any, Any, None]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._answers: Bounded[Answer] = Bounded(ANSWERS_BYTES)
        self._judges: Bounded[Judge] = Bounded(JUDGES_BYTES)
        self._logged = float("-inf")
        self.dropped = self.failed = 0

    # --- looking ------------------------------------------------------------------------------------------------------

    async def find(self, ask: Ask) -> Seen:
        policy, turn = ask.policy, ask.turn
        if turn.turns > policy.max_turns or len(turn.text) > LONGEST_TEXT:
            return Seen()
        vector: bytes | None = None
        if not ask.guarded or policy.embedder in LOCAL_EMBEDDERS:  # what no guardrail has seen goes to no vendor
            vectors = self._vectors(policy.embedder, ask.residency)
            key = _vector_set(ask, vectors)  # before: a reload meanwhile may give its alias another model
            vector = await vectors.embed(turn.text, policy.embedder_seconds)
        if vector is None:
            self._looked(ask).no_vector += 1
            return Seen()
        try:
            found, facts = await self._search(key, vector, turn.text)
        except (RedisAway, RedisRefused) as error:
            self._looked(ask).away += 1
            self._complain(error)
            return Seen()
        neighbours = _neighbours(found)
        verdict = weigh(facts, neighbours)
        if verdict is None:
            self._looked(ask).alone += 1
            return Seen(notes=Notes(key, vector, facts, None, ()))
        chance, would = self._decide(ask, verdict)
        notes = Notes(key, vector, facts, verdict, tuple(neighbours), chance, would)
        if not would or ask.mode == "shadow":
            tally = self._looked(ask)
            if verdict.veto is not None:
                tally.vetoed(verdict.veto)
            elif chance < 0.0 and ask.mode != "static":
                tally.untaught += 1
            elif not would:
                tally.unsure += 1
            return Seen(notes=notes)
        for candidate in verdict.candidates[:2]:
            entry_key = prefix(ask.tenant_id, ask.alias) + "x:" + candidate.id
            entry = await self._entry(ask, key, candidate.id, entry_key)
            if entry is not None:
                self._looked(ask).hits += 1
                check = self._ambient.random() < policy.reverify
                if chance >= 0.0 and not check:
                    self.learning.note(ask, Observation(verdict.features, None, 1.0, chance))
                return Seen(entry, entry_key, candidate.similarity, notes, check)
        self._looked(ask).ended += 1
        return Seen(notes=notes)

    async def _search(self, key: str, vector: bytes, text: str) -> tuple[list[Any], Facts]:
        """The nearest questions, as VSIM tells them, and the facts of this one, which are read while Redis looks.

        Raises RedisAway, RedisRefused.
        """
        looking = self._pipe.execute(
            "VSIM", key, "FP32", vector, "WITHSCORES", "WITHATTRIBS", "COUNT", NEIGHBOURS, "EF", EFFORT, ON_ITS_THREAD
        )
        try:
            await asyncio.sleep(0)  # it leaves at the end of the event loop's turn
            facts = read(text)
            return await looking, facts
        finally:
            looking.cancel()

    def _looked(self, ask: Ask) -> Tally:
        """Counts a look when it is over: what is counted over an await may be written down meanwhile."""
        tally = self.learning.tally(ask.tenant_id, ask.alias)
        tally.looks += 1
        return tally

    def _decide(self, ask: Ask, verdict: Verdict) -> tuple[float, bool]:
        """The chance that the group's answer is right, where there is a model and no veto; and whether it would be
        served.
        """
        if ask.mode == "static":
            alike = verdict.similarity >= ask.policy.threshold
            return -1.0, alike and verdict.veto is None
        model = self.learning.model(ask.tenant_id, ask.tenant.max_wrong)
        if model is None or verdict.veto is not None:
            return -1.0, False
        chance = model.chance(verdict.features)
        return chance, chance >= model.threshold

    async def _entry(self, ask: Ask, key: str, id: str, entry_key: str) -> Entry | None:
        """An answer by its question's id. One that has ended leaves no question behind."""
        try:
            data = await self._pipe.execute("GET", entry_key)
            if data is not None and (entry := self._opened(ask, entry_key, data)) is not None:
                now = int(self._ambient.now() * 1000)
                self._pipe.send("ZADD", _used(ask.tenant_id), "XX", now, entry_key)
                self._pipe.send("ZADD", _questions(ask.tenant_id), "XX", now, f"{key} {id}")
                return entry
            self._pipe.send("VREM", key, id)
            self._pipe.send("ZREM", _questions(ask.tenant_id), f"{key} {id}")
        except (RedisAway, RedisRefused) as error:
            self._complain(error)
        return None

    # --- learning -----------------------------------------------------------------------------------------------------

    def observe(self, ask: Ask, seen: Seen | None, key: str, entry: Entry) -> None:
        if seen is not None and seen.notes is not None:
            self._start(self._answered(ask, seen.notes, key, entry))

    def reverified(self, ask: Ask, seen: Seen, entry: Entry) -> None:
        self._start(self._checked(ask, seen, entry))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closed or len(self._later) + len(self._tasks) >= TASKS:
            self.dropped += 1
            work.close()
            return
        self._later.append(work)
        if len(self._later) == 1:
            asyncio.get_running_loop().call_later(LATER_SECONDS, self._begin)

    def _begin(self) -> None:
        """With one in a turn of the event loop: calls go on in between."""
        if not self._later:
            return
        task = asyncio.ensure_future(self._later.popleft())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        asyncio.get_running_loop().call_soon(self._begin)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, RedisAway | RedisRefused):
            self._complain(error)
        elif error is not None:
            self.failed += 1
            log.error("an answer could not be learned from", exc_info=error)

    async def settled(self) -> None:
        """Waits until everything that was handed in has been learned from."""
        while self._later or self._tasks:
            self._begin()
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Ends what is being learned: nothing asks a judge, or Redis, any more."""
        self._closed = True
        while self._later:
            self._later.popleft().close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answered(self, ask: Ask, notes: Notes, key: str, entry: Entry) -> None:
        """A miss: whether the chosen group's answer was the vendor's, and the question as one more of its group."""
        found = await self._compared(ask, notes, entry)
        verdict = notes.verdict
        if verdict is not None and found.right is not None:
            if verdict.veto is None:
                self._note(ask, notes, found, 1.0)
            tally = self.learning.tally(ask.tenant_id, ask.alias)
            if verdict.veto is not None:
                tally.vetoed_right += found.right
            elif notes.would:
                tally.shadowed(found.right)
        await self._pipe.execute(
            "EVALSHA", self._remember, 2, notes.vector_set, _questions(ask.tenant_id), notes.vector,
            key.rpartition(":")[2], _encode(_Attributes(found.group, found.digest, written(notes.facts))),
            max(1, ask.tenant.max_bytes // QUESTIONS_SHARE // QUESTION_BYTES), int(ask.policy.ttl_seconds * 1000),
        )  # fmt: skip

        for other in found.merged:
            attributes = _encode(_Attributes(found.group, other.answer, other.said))
            self._pipe.send("VSETATTR", notes.vector_set, other.id, attributes)

    async def _checked(self, ask: Ask, seen: Seen, entry: Entry) -> None:
        """A hit that was asked again: it stands for all those that were not. A wrong answer is not served again."""
        notes: Notes = seen.notes
        found = await self._compared(ask, notes, entry)
        if found.right is None:
            return
        self.learning.tally(ask.tenant_id, ask.alias).checked(found.right, seen.key)
        if notes.chance >= 0.0:
            self._note(ask, notes, found, 1.0 / max(ask.policy.reverify, 0.001))

    def _note(self, ask: Ask, notes: Notes, found: Compared, weight: float) -> None:
        features = notes.verdict.features
        seen = Observation(features, found.right, weight, notes.chance, found.compared, found.agreed)
        self.learning.note(ask, seen)

    async def _compared(self, ask: Ask, notes: Notes, entry: Entry) -> Compared:
        """What a vendor's answer says of those of the neighbours, by the gateway's own judge; of a share of answers by
        the model that the alias names for it, whose word counts, and shows what the gateway's own gets wrong.
        """
        text, verdict, policy = REPLAYS[ask.dialect].text(entry.body) or "", notes.verdict, ask.policy
        new = await self._answer(ask, text)
        groups = {} if verdict is None else await self._groups(ask, notes, new)
        named = (ask.tenant_id, ask.alias, _judged_by(ask))
        judge = self._judges.get(named) or Judge()
        agreeing = judge.agreeing(new, groups)
        compared, agreed = judge.hear(new)
        self._judges.put(named, judge, judge.size)
        if verdict is None:
            return Compared(new.digest, new.digest)
        right = None if verdict.group not in groups else verdict.group in agreeing
        if policy.judge is not None:
            compared = agreed = 0
            same_words = any(new.digest == each.digest for each in groups.get(verdict.group, ()))
            if right is not None and not same_words and self._ambient.random() < policy.judge_share:
                says = await self._asked(ask, notes, text)
                if says is False:
                    compared, agreed = 1, int(right)
                    agreeing = tuple(name for name in agreeing if name != verdict.group)
                elif says and not right:
                    agreeing = (verdict.group, *agreeing)
                right = says
        if not agreeing:
            return Compared(new.digest, new.digest, right, compared, agreed)
        sizes = {name: sum(n.group == name for n in notes.neighbours) for name in agreeing}
        group = max(sizes, key=sizes.__getitem__)
        merged = tuple(n for n in notes.neighbours if n.group in sizes and n.group != group)
        return Compared(group, new.digest, right, compared, agreed, merged)

    async def _groups(self, ask: Ask, notes: Notes, new: Answer) -> dict[str, list[Answer]]:
        """The neighbours' answers by group, as far as they are known or can be fetched; the chosen group's first."""
        answers = {new.digest: new}
        fetched = 0
        groups: dict[str, list[Answer]] = {}
        for neighbour in sorted(notes.neighbours, key=lambda one: one.group != notes.verdict.group):
            found = answers.get(neighbour.answer) or self._known(ask, neighbour.answer)
            if found is None and fetched < FETCHED:
                fetched += 1
                text = await self._text(ask, notes.vector_set, neighbour.id)
                found = None if text is None else await self._answer(ask, text)
            if found is not None:
                answers[neighbour.answer] = found
                group = groups.setdefault(neighbour.group, [])
                if all(found.digest != each.digest for each in group):
                    group.append(found)
        return groups

    async def _asked(self, ask: Ask, notes: Notes, text: str) -> bool | None:
        """What the judge that the alias names says of an answer and the chosen group's nearest."""
        for candidate in notes.verdict.candidates[:2]:
            other = await self._text(ask, notes.vector_set, candidate.id)
            if other is not None and self._second is not None:
                return await self._second.same(ask.policy.judge, ask.turn.text, text, other, ask.residency)
        return None

    async def _text(self, ask: Ask, vector_set: str, id: str) -> str | None:
        """An answer by its question's id."""
        entry_key = prefix(ask.tenant_id, ask.alias) + "x:" + id
        entry = await self._entry(ask, vector_set, id, entry_key)
        return None if entry is None else REPLAYS[ask.dialect].text(entry.body) or ""

    async def _answer(self, ask: Ask, text: str) -> Answer:
        """The answer as the judge sees it, known from now on."""
        known = self._known(ask, digest(text))
        if known is not None:
            return known
        vectors = self._vectors(_judged_by(ask), None)
        made = answer(text, await vectors.embed(text[:LONGEST_TEXT], ANSWER_SECONDS))
        if made.vector is not None:
            self._answers.put((ask.tenant_id, ask.alias, _judged_by(ask), made.digest), made, made.size)
        return made

    def _known(self, ask: Ask, digest: str) -> Answer | None:
        return self._answers.get((ask.tenant_id, ask.alias, _judged_by(ask), digest))

    # --- forgetting ---------------------------------------------------------------------------------------------------

    def forget(self, tenant_id: str, alias: str | None) -> None:
        self._start(self._forgotten(tenant_id, alias))

    async def _forgotten(self, tenant_id: str, alias: str | None) -> None:
        begins = f"sc:{{{tenant_id}}}:" if alias is None else prefix(tenant_id, alias)
        at: bytes | str = "0"
        while True:
            at = await self._pipe.execute("EVALSHA", self._forget, 1, _questions(tenant_id), begins, at)
            if at == b"0":
                return

    def _complain(self, error: Exception) -> None:
        self.failed += 1
        now = self._ambient.monotonic()
        if isinstance(error, RedisRefused) and now - self._logged >= _LOG_SECONDS:
            self._logged = now
            log.error("redis does not do what the semantic cache asks: %s", error)


def _neighbours(found: list[Any]) -> list[Neighbour]:
    """VSIM's answer: id, score, attributes, and so on. Its score is (1 + cosine) / 2."""
    neighbours = []
    for n in range(0, len(found), 3):
        try:
            attributes = _attributes.decode(found[n + 2] or b"")
        except msgspec.DecodeError:
            continue
        neighbours.append(
            Neighbour(
                found[n].decode(),
                2.0 * float(found[n + 1]) - 1.0,
                attributes.group,
                attributes.said,
                attributes.answer,
            )
        )
    return neighbours


def _judged_by(ask: Ask) -> str:
    """The local model whose vectors of answers are compared. Those of another one do not compare."""
    return "minilm" if ask.policy.embedder == "minilm" else "static"


def _vector_set(ask: Ask, vectors: Vectors) -> str:
    return f"{prefix(ask.tenant_id, ask.alias)}{FORM}:{vectors.name}:{ask.partition}"


def _questions(tenant_id: str) -> str:
    return f"sc:{{{tenant_id}}}:_questions"


def _used(tenant_id: str) -> str:
    return f"sc:{{{tenant_id}}}:_used"
