"""Whether two answers say the same, by the gateway itself: by their words, and by where their vectors point.

Pure. All answers of one assistant sound alike, so what they have in common is taken off their vectors first: the mean
of those that it has given lately. A group is compared as a whole, by the mean of its answers that are at hand: one
wording may be far from another, and near to what all of them have in common. Answers that share most of their words say
the same only if no guard minds the others: in a form that is filled in, what differs is what is said. Where answers
come in the same words again and again, nothing but the words counts.

Each answer is also compared with some that were given lately to whatever was asked. Nearly all of those say something
else, so how often they seem to say the same bounds what the judge gets wrong.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from app.cache.guards import LONGEST_TEXT, Facts, differs, read, substituted

ALIKE = 0.5
"""Cosine, less what all answers have in common, from which on two say the same. Unrelated ones are at 0, whatever they
are about."""
LATELY = 256
"""Answers at most whose mean is what all have in common; when there are so many, those until then count half."""
STRANGERS = 8
"""Answers to something else that each one is compared with."""
PRUNED = 4
"""Answers after which the rare words are forgotten: what counts is which ones are in most answers."""
RARE = 8
"""A word in less than one of so many answers is rare."""
FEW = 32
"""Answers before which nothing is known of what they have in common: until then only the same words say the same."""
FORM = 0.6
"""Share of two answers' words that both have, from which on they are one form, filled in twice."""
VERBATIM = 0.9
"""Share of the answers given before that come in the same words, from which on nothing but the words counts."""
ANSWER_BYTES = 600
"""Of an answer beside its facts and its vector: the objects, the name that it is known by (measured: 563)."""
JUDGE_BYTES = 4_000
"""Of a judge beside the answers and words that it keeps (measured: 2,500)."""
WORD_BYTES = 150
"""Of a word beside its characters: the string, the count, its place (measured: 100 to 140)."""


class Answer(Struct, frozen=True, eq=False):
    """`digest` is of its words. `vector` is of length 1; None where there is no model to make it.

    Its facts are packed: as strings they took 22 KB of an answer of 2,000 characters, and take 4 (measured).
    """

    digest: str
    packed: bytes
    vector: Any

    @property
    def facts(self) -> Facts:
        return _facts.decode(self.packed)

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, and its place among others; rather too many than too few."""
        return ANSWER_BYTES + len(self.packed) + (0 if self.vector is None else self.vector.nbytes)


_facts = msgspec.msgpack.Decoder(Facts)
_pack = msgspec.msgpack.encode


def digest(text: str) -> str:
    """Of an answer's words: those that differ in blanks and case only are the same."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:16]


def answer(text: str, vector: bytes | None) -> Answer:
    packed = bytes(memoryview(_pack(read(text[:LONGEST_TEXT]))))  # as long as it is: the encoder's bytes have room left
    if vector is None:
        return Answer(digest(text), packed, None)
    import numpy

    return Answer(digest(text), packed, numpy.frombuffer(vector, numpy.float32))


class Judge:
    """Of the answers that one alias gives a tenant: what they have in common, by what this replica has heard."""

    def __init__(self) -> None:
        self._heard = 0
        self._counted = 0
        self._sum: Any = 0.0
        self._words: dict[str, float] = {}
        self._strangers: deque[Answer] = deque(maxlen=STRANGERS)
        self._verbatim = 1.0

    @property
    def size(self) -> int:
        """Bytes that it takes in memory; rather too many than too few."""
        words = sum(map(len, self._words))
        return JUDGE_BYTES + sum(one.size for one in self._strangers) + WORD_BYTES * len(self._words) + 4 * words

    def hear(self, new: Answer) -> tuple[int, int]:
        """Takes note of an answer. With how many strangers it was compared, and with how many of them it agreed."""
        if new.vector is None:
            return 0, 0
        facts = new.facts
        strangers = tuple(self._strangers) if self._counted >= FEW else ()
        agreed = sum(self._alike(new, facts, [stranger]) for stranger in strangers)
        self._heard += 1
        self._counted += 1
        self._sum = self._sum + new.vector
        for word in {*facts.content}:
            self._words[word] = self._words.get(word, 0.0) + 1.0
        if self._counted == LATELY:
            self._counted //= 2
            self._sum = self._sum / 2
            self._words = {word: count / 2 for word, count in self._words.items()}
        if self._heard % PRUNED == 0:
            least = self._counted / RARE
            self._words = {word: count for word, count in self._words.items() if count >= least}
        if self._heard % max(1, min(self._heard, LATELY) // STRANGERS) == 0:  # from the last LATELY, far apart
            self._strangers.append(new)
        return len(strangers), agreed

    def agreeing(self, new: Answer, groups: Mapping[str, Sequence[Answer]]) -> tuple[str, ...]:
        """The groups that say what an answer says; those that say it in the same words come first."""
        facts = new.facts
        same = tuple(name for name, group in groups.items() if any(new.digest == each.digest for each in group))
        others = ((name, group) for name, group in groups.items() if name not in same)
        found = same + tuple(name for name, group in others if self._alike(new, facts, group))
        if found:
            self._verbatim += (bool(same) - self._verbatim) / LATELY
        return same if self._verbatim >= VERBATIM else found

    def alike(self, new: Answer, group: Sequence[Answer]) -> bool:
        """Whether an answer says what most of a group's do, in whatever words."""
        return self._alike(new, new.facts, group)

    def _alike(self, new: Answer, facts: Facts, group: Sequence[Answer]) -> bool:
        if any(new.digest == each.digest for each in group):
            return True
        if new.vector is None or self._counted < FEW:
            return False
        common = self._sum / self._counted
        mine = new.vector - common
        if len(group) == 1 and (group[0].vector is None or not _near(mine, group[0].vector - common)):
            return False  # as most are: what they say in so many words need not be looked at
        those = [each for each in group if each.vector is not None and not self._contradicts(each.facts, facts)]
        return 2 * len(those) > len(group) and _near(mine, sum(each.vector - common for each in those))

    def _contradicts(self, one: Facts, other: Facts) -> bool:
        """Whether what two answers say in so many words keeps them apart."""
        here, there = (
            frozenset(facts.numbers).difference(("1",)) for facts in (one, other)
        )  # `one moment`, `a moment`
        if here - there and there - here:
            return True
        if not {*other.words}.issuperset(one.names) and not {*one.words}.issuperset(other.names):
            return True
        mine, theirs = (self._own(facts) for facts in (one, other))
        if len(mine & theirs) < FORM * len(mine | theirs):
            return False
        return differs(one, other) is not None or substituted(one, other) is not None

    def _own(self, facts: Facts) -> set[str]:
        """The words of an answer that are not those of every other one."""
        most = self._counted / 2
        return {word for word in facts.content if self._words.get(word, 0.0) <= most}


def _near(one: Any, other: Any) -> bool:
    lengths = float((one @ one) * (other @ other)) ** 0.5
    return lengths > 0.0 and float(one @ other) >= ALIKE * lengths
