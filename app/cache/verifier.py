"""Whether the answer to a similar question may be served: the neighbours' facts, what they say together, and the odds.

Pure, and tens of microseconds. Neighbours with the same answer are one *group*; the groups vote, the guards veto, and
a logistic regression that the tenant's own traffic has taught (learner.py) gives the chance that the answer is right.
How near the nearest question is says little beside how well the neighbours agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

from msgspec import Struct

from app.cache.guards import Facts, Written, differs, substituted

NEIGHBOURS = 16
VOTE_STEEPNESS = 20.0
"""A neighbour that is 0.05 less similar has a third of the vote."""
FEATURES = (
    "nearest", "group_nearest", "lead", "lead_if_any", "vote", "vote_squared", "vote_odds", "of_3", "of_5", "of_all",
    "has_nearest", "vote_lead", "disorder", "overlap", "overlap_lead", "covered", "covered_lead", "not_covered",
    "key_left_over", "pointing_elsewhere", "length", "length_ratio", "shared", "groups", "farthest", "fall",
    "group_mean", "covered_vote", "overlap_vote",
)  # fmt: skip


class Neighbour(Struct, frozen=True):
    """A question that was answered before: `id` the digest of its entry, `group` that of its answer's group, `answer`
    of its own answer; `said` has its facts.
    """

    id: str
    similarity: float
    group: str
    said: Written
    answer: str = ""


class Verdict(Struct, frozen=True):
    """What the neighbours say. `candidates` are the questions of the chosen group, nearest first.

    `veto` is the guard that keeps all of them apart from the question: what is vetoed is not served, and nothing is
    learned of it, so it has no `features`.
    """

    group: str
    candidates: tuple[Neighbour, ...]
    similarity: float
    veto: str | None
    features: tuple[float, ...]


class Model(Struct, frozen=True, array_like=True):
    """What has been learned of one tenant. `threshold`: the chance from which on an answer is served.

    `correction` is by how much errors came more often than expected; `seen` how many observations ever, `labelled` how
    many of those it was fitted to had an outcome.
    """

    version: int
    seen: int
    labelled: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    threshold: float
    correction: float
    judge_error: float

    def chance(self, features: Sequence[float]) -> float:
        """That the group's answer is right."""
        total = self.bias
        for value, mean, scale, weight in zip(features, self.mean, self.scale, self.weights, strict=True):
            scaled = (value - mean) / scale
            total += weight * (5.0 if scaled > 5.0 else -5.0 if scaled < -5.0 else scaled)
        return 1.0 / (1.0 + exp(-total)) if total > -500 else 0.0


def weigh(facts: Facts, neighbours: Sequence[Neighbour]) -> Verdict | None:
    """What the neighbours, nearest first, say of the question; None where there are none."""
    if not neighbours:
        return None
    nearest = neighbours[0].similarity
    votes: dict[str, float] = {}
    first: dict[str, float] = {}
    for neighbour in neighbours:
        vote = exp(VOTE_STEEPNESS * (neighbour.similarity - nearest))
        votes[neighbour.group] = votes.get(neighbour.group, 0.0) + vote
        first.setdefault(neighbour.group, neighbour.similarity)
    group = max(votes, key=votes.__getitem__)
    mine = [neighbour for neighbour in neighbours if neighbour.group == group]
    veto = vetoed(facts, mine)
    features = _features(facts, neighbours, group, mine, votes, first) if veto is None else ()
    return Verdict(group, tuple(mine), mine[0].similarity, veto, features)


def vetoed(facts: Facts, group: Sequence[Neighbour]) -> str | None:
    """The guard that keeps a question from a group's answer: one that holds against all of the group's questions.

    A question that is another one but for one word is kept apart unless the group has been asked with that word too.
    """
    reason = None
    for neighbour in group:
        reason = differs(facts, neighbour.said.facts)
        if reason is None:
            break
    else:
        return reason
    for neighbour in group:
        if neighbour.said.content.count(" ") + 1 != len(facts.content):
            continue  # as most do, without reading the rest
        pair = substituted(facts, neighbour.said.facts)
        if pair is not None and not any(pair[0] in other.said.content.split() for other in group):
            return "substitution"
    return None


def _features(
    facts: Facts,
    neighbours: Sequence[Neighbour],
    group: str,
    mine: Sequence[Neighbour],
    votes: dict[str, float],
    first: dict[str, float],
) -> tuple[float, ...]:
    total = sum(votes.values())
    share = votes[group] / total
    others = [neighbour for neighbour in neighbours if neighbour.group != group] if len(votes) > 1 else ()
    other_first = other_share = disorder = 0.0
    for name, vote in votes.items():
        part = vote / total
        if part > 0.0:
            disorder -= part * log(part)
        if name != group:
            other_share = max(other_share, part)
            other_first = max(other_first, first[name])
    asked = frozenset(facts.content or facts.words)
    here, elsewhere = _among(asked, mine), _among(asked, others)
    size = len(asked) or 1
    overlap = _overlap(asked, mine[:5])
    covered = len(here) / size
    own_words, own_content = mine[0].said.words.split(), frozenset(mine[0].said.content.split())
    lead = first[group] - other_first
    count, of = len(mine), len(neighbours)
    nearest, farthest = neighbours[0].similarity, neighbours[-1].similarity
    of_3 = sum([neighbour.group == group for neighbour in neighbours[:3]])
    return (
        nearest,
        first[group],
        lead,
        lead if lead > 0.0 else 0.0,
        share,
        share * share,
        log(share / (1.0001 - share)),
        of_3 / 3,
        (of_3 + sum([neighbour.group == group for neighbour in neighbours[3:5]])) / 5,
        count / NEIGHBOURS,
        1.0 if neighbours[0].group == group else 0.0,
        share - other_share,
        disorder,
        overlap,
        overlap - _overlap(asked, others[:4]),
        covered,
        covered - len(elsewhere) / size,
        float(len(asked) - len(here)),
        float(len(own_content.difference(facts.words))),
        len(elsewhere - here) / size,
        log(1 + len(facts.words)),
        len(facts.words) / max(1, len(own_words)),
        float(len(asked & own_content)),
        len(votes) / of,
        farthest,
        nearest - farthest,
        sum([neighbour.similarity for neighbour in mine[:3]]) / min(3, count),
        covered * share,
        overlap * share,
    )


def _among(asked: frozenset[str], neighbours: Sequence[Neighbour]) -> frozenset[str]:
    """Those of the words that one of the neighbours has too."""
    text = f" {' '.join([neighbour.said.words for neighbour in neighbours])} "
    return frozenset([word for word in asked if f" {word} " in text])


def _overlap(asked: frozenset[str], neighbours: Sequence[Neighbour]) -> float:
    """The largest share of the words of both that both have."""
    most = 0.0
    for neighbour in neighbours:
        theirs = {*(neighbour.said.content or neighbour.said.words).split()}
        both = len(theirs)
        theirs &= asked
        most = max(most, len(theirs) / (len(asked) + both - len(theirs) or 1))
    return most
