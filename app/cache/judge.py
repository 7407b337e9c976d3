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
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from app.cache.guards import LONGEST_TEXT, Facts, differs, read, substituted

ALIKE = 0.5
"""Cosine, less what all answers have in common, from which on two say the same. Unrelated ones are at 0, whatever they
are about."""
LATELY = 256
"""Answers whose mean is what all have in common."""
STRANGERS = 8
"""Answers to something else that each one is compared with."""
FEW = 32
"""Answers before which nothing is known of what they have in common: until then only the same words say the same."""
FORM = 0.6
"""Share of two answers' words that both have, from which on they are one form, filled in twice."""
VERBATIM = 0.9
"""Share of the answers given before that come in the same words, from which on nothing but the words counts."""


class Answer(Struct, frozen=True):
    """`digest` is of its words. `vector` is of length 1; None where there is no model to make it."""

    digest: str
    facts: Facts
    vector: Any


def digest(text: str) -> str:
    """Of an answer's words: those that differ in blanks and case only are the same."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:16]


def answer(text: str, vector: bytes | None) -> Answer:
    facts = read(text[:LONGEST_TEXT])
    if vector is None:
        return Answer(digest(text), facts, None)
    import numpy

    return Answer(digest(text), facts, numpy.frombuffer(vector, numpy.float32))


class Judge:
    """Of the answers that one alias gives a tenant: what they have in common, by what this replica has heard."""

    def __init__(self) -> None:
        self._lately: deque[Answer] = deque(maxlen=LATELY)
        self._sum: Any = 0.0
        self._words: Counter[str] = Counter()
        self._verbatim = 1.0

    def hear(self, new: Answer) -> tuple[int, int]:
        """Takes note of an answer. With how many strangers it was compared, and with how many of them it agreed."""
        if new.vector is None:
            return 0, 0
        strangers: list[Answer] = []
        if len(self._lately) >= FEW:
            strangers = list(self._lately)[:: len(self._lately) // STRANGERS][:STRANGERS]
        agreed = sum(self.alike(new, [stranger]) for stranger in strangers)
        if len(self._lately) == LATELY:
            self._sum = self._sum - self._lately[0].vector
            self._words.subtract(set(self._lately[0].facts.content))
        self._lately.append(new)
        self._sum = self._sum + new.vector
        self._words.update(set(new.facts.content))
        return len(strangers), agreed

    def agreeing(self, new: Answer, groups: Mapping[str, Sequence[Answer]]) -> tuple[str, ...]:
        """The groups that say what an answer says; those that say it in the same words come first."""
        same = tuple(name for name, group in groups.items() if any(new.digest == each.digest for each in group))
        found = same + tuple(name for name, group in groups.items() if name not in same and self.alike(new, group))
        if found:
            self._verbatim += (bool(same) - self._verbatim) / LATELY
        return same if self._verbatim >= VERBATIM else found

    def alike(self, new: Answer, group: Sequence[Answer]) -> bool:
        """Whether an answer says what most of a group's do, in whatever words."""
        if any(new.digest == each.digest for each in group):
            return True
        if new.vector is None or len(self._lately) < FEW:
            return False
        those = [each for each in group if each.vector is not None and not self._contradicts(each.facts, new.facts)]
        if 2 * len(those) <= len(group):
            return False
        common = self._sum / len(self._lately)
        mine, theirs = new.vector - common, sum(each.vector - common for each in those)
        lengths = float((mine @ mine) * (theirs @ theirs)) ** 0.5
        return lengths > 0.0 and float(mine @ theirs) >= ALIKE * lengths

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
        most = len(self._lately) / 2
        return {word for word in facts.content if self._words[word] <= most}
