"""Questions that mean the same, in Redis: found by vector within a partition, remembered when they are answered.

A look is one command, VSIM on the partition's vector set, which brings each neighbour's facts; an answer that is to be
served is one more. What a miss teaches is worked out after the call. Whatever fails is a miss.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.cache.embedder import similarity
from app.cache.entry import Entry
from app.cache.guards import LONGEST_TEXT, Facts, read
from app.cache.learner import Observation
from app.cache.learning import Learning
from app.cache.partition import Ask, prefix
from app.cache.room import Seen
from app.cache.verifier import NEIGHBOURS, Neighbour, Verdict, weigh
from app.dialects.replay import REPLAYS
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused

log = logging.getLogger("gateway")

EFFORT = 64
"""Candidates that a search goes through (VSIM's EF): with more of them the sixteen nearest are the same ones."""
QUESTION_BYTES = 1_500
"""What a remembered question costs in Redis: vector, links, facts, its place by use (measured: about 1,300)."""
QUESTIONS_SHARE = 4
"""The tenant's questions may take one part in so many of its bytes, beside its answers."""
COMPARED_GROUPS = 3
TASKS = 64
"""Answers that are learned from at a time; from what comes beyond nothing is learned."""
ANSWERS_ALIKE = 0.8
"""Cosine from which two answers say the same, unless their numbers or units differ. High: to take the same for
another costs hits, to take another for the same is a wrong answer that nobody sees. (Of made-up answers with
the same six facts in other words a third pass, of those with other facts fewer than one in 10,000.)
"""
_LOG_SECONDS = 60.0

_encode = msgspec.json.encode
Opened = Callable[[Ask, str, bytes], Entry | None]


class _Attributes(Struct, frozen=True, array_like=True):
    group: str
    facts: Facts


_attributes = msgspec.json.Decoder(_Attributes)


class Vectors(Protocol):
    """Who makes vectors of texts; None is no vector, and so a miss."""

    name: str

    async def embed(self, text: str) -> bytes | None: ...


class Notes(Struct, frozen=True):
    """What a look found out, for when the vendor's answer is there. `chance` -1: there is no model.

    `would`: the decision, whether or not the mode serves it.
    """

    vectors: Vectors
    vector: bytes
    facts: Facts
    verdict: Verdict | None
    nearest: tuple[Neighbour, ...]
    chance: float = -1.0
    would: bool = False


class Questions:
    """The questions of all tenants. `opened` gives the entry in the bytes under a key, if it may answer a call."""

    def __init__(
        self,
        pipe: RedisPipe,
        ambient: Ambient,
        vectors: Callable[[str], Vectors],
        learning: Learning,
        opened: Opened,
    ) -> None:
        here = Path(__file__)
        self._remember = pipe.script(here.with_name("remember.lua").read_text())
        self._forget = pipe.script(here.with_name("forget_questions.lua").read_text())
        self._pipe = pipe
        self._ambient = ambient
        self._vectors = vectors
        self.learning = learning
        self._opened = opened
        self._tasks: set[asyncio.Task[None]] = set()
        self._logged = float("-inf")
        self.dropped = self.failed = 0

    # --- looking ------------------------------------------------------------------------------------------------------

    async def find(self, ask: Ask) -> Seen:
        policy, turn = ask.policy, ask.turn
        if turn.turns > policy.max_turns or len(turn.text) > LONGEST_TEXT:
            return Seen()
        tally = self.learning.tally(ask.tenant_id, ask.alias)
        tally.looks += 1
        vectors = self._vectors(policy.embedder)
        vector = await vectors.embed(turn.text)
        if vector is None:
            tally.no_vector += 1
            return Seen()
        key = _vector_set(ask, vectors)
        try:
            found = await self._pipe.execute(
                "VSIM", key, "FP32", vector, "WITHSCORES", "WITHATTRIBS", "COUNT", NEIGHBOURS, "EF", EFFORT
            )
        except (RedisAway, RedisRefused) as error:
            self._complain(error)
            return Seen()
        facts = read(turn.text)
        neighbours = _neighbours(found)
        verdict = weigh(facts, neighbours)
        if verdict is None:
            return Seen(notes=Notes(vectors, vector, facts, None, ()))
        chance, would = self._decide(ask, verdict)
        if verdict.veto is not None:
            tally.vetoed(verdict.veto)
        serves = would and ask.mode != "shadow"
        notes = Notes(vectors, vector, facts, verdict, _nearest(neighbours, verdict.group), chance, would)
        if not serves:
            return Seen(notes=notes)
        for candidate in verdict.candidates[:2]:
            entry_key = prefix(ask.tenant_id, ask.alias) + "x:" + candidate.id
            entry = await self._entry(ask, key, candidate.id, entry_key)
            if entry is not None:
                tally.hits += 1
                check = self._ambient.random() < policy.reverify
                if chance >= 0.0 and not check:
                    self.learning.note(ask, Observation(verdict.features, None, 1.0, chance))
                return Seen(entry, entry_key, candidate.similarity, notes, check)
        return Seen(notes=notes)

    def _decide(self, ask: Ask, verdict: Verdict) -> tuple[float, bool]:
        """The chance that the group's answer is right, where there is a model; and whether it would be served."""
        if ask.mode == "static":
            alike = verdict.similarity >= ask.policy.threshold
            return -1.0, alike and verdict.veto is None
        model = self.learning.model(ask.tenant_id, ask.tenant.max_wrong)
        if model is None:
            return -1.0, False
        chance = model.chance(verdict.features)
        return chance, verdict.veto is None and chance >= model.threshold

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
        if len(self._tasks) >= TASKS:
            self.dropped += 1
            work.close()
            return
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

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
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _answered(self, ask: Ask, notes: Notes, key: str, entry: Entry) -> None:
        """A miss: whether the chosen group's answer was the vendor's, and the question as one more of its group."""
        text = REPLAYS[ask.dialect].text(entry.body) or ""
        group, right, more, agreed = await self._compared(ask, notes, text)
        verdict = notes.verdict
        if verdict is not None and right is not None:
            if verdict.veto is None:
                self.learning.note(ask, Observation(verdict.features, right, 1.0, notes.chance, more, agreed))
            tally = self.learning.tally(ask.tenant_id, ask.alias)
            if verdict.veto is not None:
                tally.vetoed_right += right
            elif notes.would:
                tally.shadowed(right)
        vector_set = _vector_set(ask, notes.vectors)
        await self._pipe.execute(
            "EVALSHA", self._remember, 2, vector_set, _questions(ask.tenant_id), notes.vector,
            key.rpartition(":")[2], _encode(_Attributes(group, notes.facts)),
            max(1, ask.tenant.max_bytes // QUESTIONS_SHARE // QUESTION_BYTES), int(ask.policy.ttl_seconds * 1000),
        )  # fmt: skip

    async def _checked(self, ask: Ask, seen: Seen, entry: Entry) -> None:
        """A hit that was asked again: it stands for all those that were not. A wrong answer is not served again."""
        notes: Notes = seen.notes
        text = REPLAYS[ask.dialect].text(entry.body) or ""
        _, right, more, agreed = await self._compared(ask, notes, text)
        if right is None:
            return
        weight = 1.0 / max(ask.policy.reverify, 0.001)
        self.learning.tally(ask.tenant_id, ask.alias).checked(right, seen.key)
        if notes.chance >= 0.0:
            self.learning.note(ask, Observation(notes.verdict.features, right, weight, notes.chance, more, agreed))

    async def _compared(self, ask: Ask, notes: Notes, text: str) -> tuple[str, bool | None, int, int]:
        """The group that an answer belongs to, whether that is the one that was chosen (None: nobody knows any more),
        and of how many other groups it was compared with how many agreed, which they cannot all do rightly.
        """
        own = _digest(text)
        verdict = notes.verdict
        if verdict is None:
            return own, None, 0, 0
        same: list[str] = []
        known: set[str] = set()
        vector: bytes | None = None
        for neighbour in notes.nearest:
            if neighbour.group == own:
                same.append(own)
                known.add(own)
                continue
            entry_key = prefix(ask.tenant_id, ask.alias) + "x:" + neighbour.id
            entry = await self._entry(ask, _vector_set(ask, notes.vectors), neighbour.id, entry_key)
            if entry is None:
                continue
            other = REPLAYS[ask.dialect].text(entry.body) or ""
            known.add(neighbour.group)
            if vector is None:
                vector = await notes.vectors.embed(text[:LONGEST_TEXT])
            theirs = await notes.vectors.embed(other[:LONGEST_TEXT])
            if vector is not None and theirs is not None and alike(text, other, similarity(vector, theirs)):
                same.append(neighbour.group)
        group = own if own in same else same[0] if same else own
        right = None if verdict.group not in known else group == verdict.group or verdict.group in same
        return group, right, max(0, len(known) - 1), max(0, len(same) - 1)

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


def alike(one: str, other: str, cosine: float) -> bool:
    """The local judge: whether two answers say the same."""
    return cosine >= ANSWERS_ALIKE and _said_alike(one, other)


def _said_alike(one: str, other: str) -> bool:
    here, there = _read(one[:LONGEST_TEXT]), _read(other[:LONGEST_TEXT])
    return set(here.numbers) == set(there.numbers) and set(here.units) == set(there.units)


_read = lru_cache(512)(read)


def _neighbours(found: list[Any]) -> list[Neighbour]:
    """VSIM's answer: id, score, attributes, and so on. Its score is (1 + cosine) / 2."""
    neighbours = []
    for n in range(0, len(found), 3):
        try:
            attributes = _attributes.decode(found[n + 2] or b"")
        except msgspec.DecodeError:
            continue
        neighbours.append(
            Neighbour(found[n].decode(), 2.0 * float(found[n + 1]) - 1.0, attributes.group, attributes.facts)
        )
    return neighbours


def _nearest(neighbours: list[Neighbour], chosen: str) -> tuple[Neighbour, ...]:
    """The nearest question of each of the nearest groups, the chosen one's among them."""
    first: dict[str, Neighbour] = {}
    for neighbour in neighbours:
        first.setdefault(neighbour.group, neighbour)
    mine = first.pop(chosen)
    return (mine, *list(first.values())[: COMPARED_GROUPS - 1])


def _digest(answer: str) -> str:
    """Of an answer's words: those that differ in blanks and case only are the same."""
    return hashlib.sha256(" ".join(answer.lower().split()).encode()).hexdigest()[:16]


def _vector_set(ask: Ask, vectors: Vectors) -> str:
    return f"{prefix(ask.tenant_id, ask.alias)}v:{vectors.name}:{ask.partition}"


def _questions(tenant_id: str) -> str:
    return f"sc:{{{tenant_id}}}:_questions"


def _used(tenant_id: str) -> str:
    return f"sc:{{{tenant_id}}}:_used"
