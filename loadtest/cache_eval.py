"""`make cache-eval`: labelled questions through the semantic cache; hits and wrong answers over time for each mode.

Questions come from CSV files (`text,label`), or are made up. `--in-process` replays them through the pure parts with a
perfect judge of answers, in seconds. Otherwise they go through a real gateway, Redis and vendor simulator: once where a
label always has the same answer, and once where each answer is worded in one of several ways, so that the gateway's own
judge decides. Labels are used to score, never to decide.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from app.cache.embedder import local
from app.cache.guards import Facts, read
from app.cache.learner import REFIT, Observation, fit
from app.cache.verifier import NEIGHBOURS, Model, Neighbour, Verdict, weigh
from loadtest import labelled
from loadtest.near_misses import near_misses, variations

Question = tuple[str, str]
REVERIFY = 0.05


class Outcome(Struct, frozen=True):
    """Of one question: whether it was answered from before, and whether that was right; and the guard that vetoed."""

    hit: bool
    right: bool
    veto: str | None = None


class Share(Struct, frozen=True):
    """Of some requests: how many there were, the share of hits, wrong answers per request and per hit."""

    requests: int
    hits: float
    wrong: float
    wrong_per_hit: float


class Summary(Struct, frozen=True):
    all: Share
    thirds: tuple[Share, Share, Share]
    vetoed: float
    vetoed_right: float


def interval(share: float, of: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if of <= 0:
        return 0.0, 1.0
    z = 1.96
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(outcomes: Sequence[Outcome]) -> Share:
    hits = sum(one.hit for one in outcomes)
    wrong = sum(one.hit and not one.right for one in outcomes)
    count = len(outcomes) or 1
    return Share(len(outcomes), hits / count, wrong / count, wrong / (hits or 1))


def summary(outcomes: Sequence[Outcome]) -> Summary:
    third = len(outcomes) // 3
    parts = outcomes[:third], outcomes[third : 2 * third], outcomes[2 * third :]
    count = len(outcomes) or 1
    return Summary(
        share(outcomes),
        tuple(share(part) for part in parts),
        sum(one.veto is not None for one in outcomes) / count,
        sum(one.veto is not None and one.right for one in outcomes) / count,
    )


class InProcess:
    """The pure parts with a perfect judge: neighbours by brute force, everything else as in a replica."""

    def __init__(self, embedder: str, *, mode: str, max_wrong: float = 0.01, threshold: float = 0.95, seed: int = 1):
        import numpy

        self._numpy = numpy
        self._embed = local(embedder).load_now()
        self._mode, self._max_wrong, self._threshold = mode, max_wrong, threshold
        self._draw = random.Random(seed)
        self._vectors: Any = None
        self._kept: list[tuple[str, Facts]] = []
        self._observed: list[Observation] = []
        self._new = 0
        self.model: Model | None = None

    def replay(self, questions: Sequence[Question]) -> list[Outcome]:
        return [self.ask(text, label) for text, label in questions]

    def ask(self, text: str, label: str) -> Outcome:
        vector, facts, verdict = self._weighed(text)
        right = verdict is not None and verdict.group == label
        chance, hit = self._decide(verdict)
        looked_at = not hit or self._draw.random() < REVERIFY
        if verdict is not None and verdict.veto is None and self._mode == "verified":
            weight = 1.0 / REVERIFY if hit else 1.0
            self._observed.append(Observation(verdict.features, right if looked_at else None, weight, chance))
            self._new += 1
            if self._new >= max(REFIT, len(self._observed) // 20):
                self._new = 0
                self.model = fit(self._observed, self._max_wrong) or self.model
        if not hit:
            self._keep(vector, label, facts)
        return Outcome(hit, right, None if verdict is None else verdict.veto)

    def accepts(self, before: str, question: str) -> bool:
        """Whether a question would be given the answer to the one before, which has just been answered."""
        vector, facts, _ = self._weighed(before)
        self._keep(vector, "=" + before, facts)
        _, _, verdict = self._weighed(question)
        return verdict is not None and verdict.group == "=" + before and self._decide(verdict)[1]

    def _weighed(self, text: str) -> tuple[Any, Facts, Verdict | None]:
        numpy, facts = self._numpy, read(text)
        vector = numpy.frombuffer(self._embed(text), numpy.float32)
        count = len(self._kept)
        if not count:
            return vector, facts, None
        similarities = self._vectors[:count] @ vector
        nearest = numpy.argsort(-similarities)[:NEIGHBOURS].tolist()
        return vector, facts, weigh(
            facts, [Neighbour(str(n), float(similarities[n]), *self._kept[n]) for n in nearest]
        )  # fmt: skip

    def _decide(self, verdict: Verdict | None) -> tuple[float, bool]:
        if verdict is None or verdict.veto is not None:
            return -1.0, False
        if self._mode == "static":
            return -1.0, verdict.similarity >= self._threshold
        if self.model is None:
            return -1.0, False
        chance = self.model.chance(verdict.features)
        return chance, chance >= self.model.threshold

    def _keep(self, vector: Any, label: str, facts: Facts) -> None:
        numpy, count = self._numpy, len(self._kept)
        if self._vectors is None or count == len(self._vectors):
            grown = numpy.zeros((max(1_024, 2 * count), len(vector)), numpy.float32)
            if count:
                grown[:count] = self._vectors
            self._vectors = grown
        self._vectors[count] = vector
        self._kept.append((label, facts))


def told(name: str, outcomes: Sequence[Outcome]) -> str:
    """A line of the report."""
    found = summary(outcomes)
    low, high = interval(found.all.wrong, found.all.requests)
    hit_low, hit_high = interval(found.all.wrong_per_hit, found.all.requests * found.all.hits)
    thirds = " ".join(f"{third.hits:.1%}/{third.wrong:.2%}" for third in found.thirds)
    return (
        f"{name:34} hits {found.all.hits:6.1%}  wrong per request {found.all.wrong:.2%} [{low:.2%}, {high:.2%}]"
        f"  per hit {found.all.wrong_per_hit:.2%} [{hit_low:.2%}, {hit_high:.2%}]  thirds {thirds}"
        f"  vetoed {found.vetoed:.1%} (right: {found.vetoed_right:.1%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="cache_eval", description=__doc__)
    parser.add_argument("csv", nargs="*", type=Path, help="text,label; made up where left out")
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--embedder", choices=("static", "minilm"), default="static")
    parser.add_argument("--max-wrong-percent", type=float, default=1.0)
    parser.add_argument("--in-process", action="store_true")
    options = parser.parse_args()
    questions = (
        labelled.read(options.csv, options.count, options.seed)
        if options.csv
        else labelled.made_up(options.count, options.seed)
    )
    print(f"{len(questions)} questions, {len({label for _, label in questions})} labels, {options.embedder}")
    for mode in ("static", "verified"):
        run = InProcess(options.embedder, mode=mode, max_wrong=options.max_wrong_percent / 100, seed=options.seed)
        print(told(f"{mode}, in process", run.replay(questions)))
        for name, pairs in (
            ("near misses", [(one, other) for _, one, other in near_misses(options.seed, 1_100)]),
            ("harmless variations", list(variations(options.seed, 300))),
        ):
            print(f"{mode}: {name} accepted {sum(run.accepts(*pair) for pair in pairs) / len(pairs):.1%}")


if __name__ == "__main__":
    main()
