"""Whether the answer to a similar question may be served: the neighbours' facts, what they say together, and the odds.

Pure, and tens of microseconds. Neighbours with the same answer are one *group*; the groups vote, the guards veto, and
a logistic regression that the tenant's own traffic has taught (learner.py) gives the chance that the answer is right.
How near the nearest question is says little beside how well the neighbours agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

from msgspec import Struct

from app.cache.guards import Facts, differs, substituted

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
    of its own answer.
    """

    id: str
    similarity: float
    group: str
    facts: Facts
    answer: str = ""


class Verdict(Struct, frozen=True):
    """What the neighbours say. `candidates` are the questions of the chosen group, nearest first.

    `veto` is the guard that keeps all of them apart from the question; `features` are empty without a neighbour.
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
    return Verdict(
        group, tuple(mine), mine[0].similarity, veto, _features(facts, neighbours, group, mine, votes, first)
    )


def vetoed(facts: Facts, group: Sequence[Neighbour]) -> str | None:
    """The guard that keeps a question from a group's answer: one that holds against all of the group's questions.

    A question that is another one but for one word is kept apart unless the group has been asked with that word too.
    """
    reason = None
    for neighbour in group:
        reason = differs(facts, neighbour.facts)
        if reason is None:
            break
    else:
        return reason
    for neighbour in group:
        pair = substituted(facts, neighbour.facts)
        if pair is not None and not any(pair[0] in other.facts.content for other in group):
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
    others = [neighbour for neighbour in neighbours if neighbour.group != group]
    other_first = max((s for name, s in first.items() if name != group), default=0.0)
    other_share = max((v for name, v in votes.items() if name != group), default=0.0) / total
    disorder = -sum(vote / total * log(vote / total) for vote in votes.values() if vote > 0.0)
    asked = frozenset(facts.content or facts.words)
    known = frozenset(word for neighbour in mine for word in neighbour.facts.words)
    elsewhere = frozenset(word for neighbour in others for word in neighbour.facts.words)
    size = len(asked) or 1
    overlap = max(_overlap(asked, neighbour) for neighbour in mine[:5])
    other_overlap = max((_overlap(asked, neighbour) for neighbour in others[:4]), default=0.0)
    covered = len(asked & known) / size
    left_over = len(frozenset(mine[0].facts.content).difference(facts.words))
    lead = first[group] - other_first
    count, of = len(mine), len(neighbours)
    nearest, farthest = neighbours[0].similarity, neighbours[-1].similarity
    return (
        nearest,
        first[group],
        lead,
        lead if lead > 0.0 else 0.0,
        share,
        share * share,
        log(share / (1.0001 - share)),
        sum(1 for neighbour in neighbours[:3] if neighbour.group == group) / 3,
        sum(1 for neighbour in neighbours[:5] if neighbour.group == group) / 5,
        count / NEIGHBOURS,
        1.0 if neighbours[0].group == group else 0.0,
        share - other_share,
        disorder,
        overlap,
        overlap - other_overlap,
        covered,
        covered - len(asked & elsewhere) / size,
        float(len(asked - known)),
        float(left_over),
        len((asked & elsewhere) - known) / size,
        log(1 + len(facts.words)),
        len(facts.words) / max(1, len(mine[0].facts.words)),
        float(len(asked.intersection(mine[0].facts.content))),
        len(votes) / of,
        farthest,
        nearest - farthest,
        sum(neighbour.similarity for neighbour in mine[:3]) / min(3, count),
        covered * share,
        overlap * share,
    )


def _overlap(asked: frozenset[str], neighbour: Neighbour) -> float:
    theirs = frozenset(neighbour.facts.content or neighbour.facts.words)
    return len(asked & theirs) / (len(asked | theirs) or 1)
