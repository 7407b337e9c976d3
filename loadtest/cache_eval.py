"""`make cache-eval`: labelled questions through the semantic cache; hits and wrong answers over time for each mode.

Questions come from CSV files (`text,label`), or are made up. `--in-process` replays them through the pure parts with a
perfect judge of answers, in seconds. Otherwise they go through a real gateway, Redis and vendor simulator: once where a
label always has the same answer, and once where each answer is worded in one of several ways, so that the gateway's own
judge decides. Labels are used to score, never to decide.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import httpx
from msgspec import Struct
from redis import Redis

from app.cache.embedder import local
from app.cache.guards import Facts, Written, read, written
from app.cache.learner import REFIT, Observation, fit
from app.cache.learning import LOOK_SECONDS, MISSES
from app.cache.verifier import NEIGHBOURS, Model, Neighbour, Verdict, weigh
from app.reports.cache import interval
from app.reports.markup import document, el
from loadtest import labelled
from loadtest.answers import WORDINGS, answer
from loadtest.gate.report import STYLE, line
from loadtest.near_misses import near_misses, variations
from loadtest.stack import Stack

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
        self._kept: list[tuple[str, Written]] = []
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
        self._kept.append((label, written(facts)))


class Run(Struct, frozen=True):
    """One replay through the gateway. `worded`: each question's answer is in one of several wordings."""

    name: str
    mode: str
    worded: bool = False

    def answer(self, label: str, text: str) -> str:
        """What the vendor says to a question of a label."""
        return answer(label, 1 + zlib.crc32(text.encode()) % WORDINGS if self.worded else 0)


RUNS = (
    Run("static, cosine >= 0.95", "static"),
    Run("verified, same answers", "verified"),
    Run("verified, worded answers", "verified", worded=True),
)
CONCURRENCY = 4
"""At once: few, so that what is learned from one question is there for those soon after it."""
TRIES = 10
SYSTEM = "You answer the customers of a bank."
WINDOW = 500
"""Requests over which the plots show shares."""


PATIENT_MS = 5_000
"""What a replay gives Redis and the embedder: misses of a busy machine say nothing of the cache."""


class Replayed(Struct, frozen=True):
    """What a replay came to: outcomes in order, and what else there is to tell of it."""

    outcomes: list[Outcome]
    remarks: list[str]


def through_gateway(
    run: Run, questions: Sequence[Question], embedder: str, max_wrong: float, seed: int = 1
) -> Replayed:
    """A replay on a stack of its own, with near misses and harmless variations after it."""
    overlay = {
        "gateway": {"redis": {"timeout_ms": PATIENT_MS}},
        "aliases": {
            "support-fast": {
                "cache": {
                    "mode": run.mode,
                    "max_temperature": 1,
                    "ttl_seconds": 86400,
                    "embedder": embedder,
                    "embedder_timeout_ms": PATIENT_MS,
                }
            }
        },
        "tenants": {"local-dev": {"cache": {"max_wrong_percent": max_wrong * 100, "max_bytes": 268_435_456}}},
    }
    environ = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_ACCESS_KEY"))}
    with (
        tempfile.TemporaryDirectory(prefix="cache-eval-") as folder,
        Stack(Path(folder), replicas=1, overlay=overlay, environ=environ) as stack,
    ):
        outcomes, bypassed = replay(stack, run, questions)
        remarks = [f"{run.name}: {misses(stack, bypassed)}"]
        for kind, pairs in beside(seed):
            remarks.append(f"{run.name}: {kind} {accepted(stack, run, pairs, same=kind != NEAR):.1%}")
        return Replayed(outcomes, remarks)


def replay(stack: Stack, run: Run, questions: Sequence[Question]) -> tuple[list[Outcome], int]:
    """Asks the questions in their order, scores the answers by their labels; also for how many no cache was asked."""
    book = {text: run.answer(label, text) for text, label in questions}
    labels = {book[text]: label for text, label in questions}
    heard = ask(stack, book, [text for text, _ in questions], run.name)
    outcomes = [
        Outcome(cache.startswith("HIT"), labels.get(said) == label)
        for (cache, said), (_, label) in zip(heard, questions, strict=True)
    ]
    return outcomes, sum(cache == "BYPASS" for cache, _ in heard)


def ask(stack: Stack, book: dict[str, str], texts: Sequence[str], name: str) -> list[tuple[str, str]]:
    """What the cache and the answer said to each text; the vendor answers by the book."""
    httpx.put(f"{stack.simulator_url}/_sim/answers", json=book, timeout=60).raise_for_status()
    heard: list[tuple[str, str]] = [("", "")] * len(texts)
    asked = iter(range(len(texts)))

    async def work(client: httpx.AsyncClient) -> None:
        for number in asked:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": texts[number]}]
            body = {"model": "support-fast", "messages": messages, "temperature": 0}
            for _ in range(TRIES):
                said = await client.post("/v1/chat/completions", json=body)
                if said.status_code != 503:  # Traefik's, while the replica misses a health check on a busy machine
                    break
                await asyncio.sleep(1.0)
            said.raise_for_status()
            heard[number] = said.headers.get("x-cache", ""), said.json()["choices"][0]["message"]["content"]
            if number % 500 == 499:
                print(f"\r  {name}: {number + 1:,} of {len(texts):,}", end="", flush=True)

    async def everything() -> None:
        headers = {"authorization": f"Bearer {stack.key}", "x-tenant-id": stack.tenant}
        async with httpx.AsyncClient(base_url=stack.url, headers=headers, verify=stack.tls(), timeout=60) as client:
            await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))

    asyncio.run(everything())
    print()
    return heard


NEAR = "near misses accepted"


def beside(seed: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Pairs of which the second must not have the first's answer, and pairs of which it may."""
    return [
        (NEAR, [(one, other) for _, one, other in near_misses(seed, 1_100)]),
        ("harmless variations accepted", list(variations(seed, 300))),
    ]


def accepted(stack: Stack, run: Run, pairs: Sequence[tuple[str, str]], *, same: bool) -> float:
    """The share of second questions that get the first one's answer from before. Where it is not the `same`, theirs has
    other facts.
    """
    labels = {text: text.lower() for pair in pairs for text in pair}
    if same:
        labels |= {other: labels[one] for one, other in pairs}
    book = {text: run.answer(label, text) for text, label in labels.items()}
    known = {book[text]: label for text, label in labels.items()}
    ask(stack, book, [one for one, _ in pairs], "first ones")
    heard = ask(stack, book, [other for _, other in pairs], "second ones")
    taken = [
        cache.startswith("HIT") and known.get(said) == labels[one]
        for (cache, said), (one, _) in zip(heard, pairs, strict=True)
    ]
    return sum(taken) / len(taken)


def misses(stack: Stack, bypassed: int) -> str:
    """Why there was no answer from before, by the figures that the replica leaves in Redis every two seconds."""
    time.sleep(2 * LOOK_SECONDS)
    found: Counter[str] = Counter()
    with Redis.from_url(stack.redis_url, decode_responses=True) as client:
        for key in client.scan_iter(match=f"sc:{{{stack.tenant}}}:_figures:*"):
            for name, count in client.hgetall(key).items():
                found[name.partition(":")[2]] += int(count)
    vetoes = sum(count for name, count in found.items() if name.startswith("veto:"))
    reasons = {"vetoed": vetoes, **{name: found[name] for name in MISSES}, "no cache asked": bypassed}
    told = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in reasons.items())
    return f"{found['looks']:,} looks, {found['hits']:,} hits; misses: {told}; {found['checks']:,} asked again"


def page(runs: dict[str, list[Outcome]], text: Sequence[str]) -> bytes:
    """The report: figures, and hits and wrong answers over time for each mode."""

    def plots(outcomes: list[Outcome]) -> list[Element]:
        parts = [share(outcomes[at : at + WINDOW]) for at in range(0, len(outcomes), WINDOW)]
        marks, last = [False] * len(parts), f"{len(outcomes):,} requests"
        return [
            line(f"hits, of {WINDOW} requests each", [part.hits for part in parts], marks, "{:.0%}", last),
            line(f"wrong, of {WINDOW} requests each", [part.wrong for part in parts], marks, "{:.2%}", last),
        ]

    sections = [el("section", el("h2", name), *plots(outcomes)) for name, outcomes in runs.items()]
    title = "Semantic cache: hits and wrong answers"
    head = el("head", el("meta", charset="utf-8"), el("title", title), el("style", STYLE))
    return document(el("html", head, el("body", el("h1", title), el("pre", "\n".join(text)), *sections), lang="en"))


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
    parser.add_argument("--in-process", action="store_true", help="only the pure parts, in seconds")
    parser.add_argument("--only", help="of the runs through a gateway those whose name has this: static, same, worded")
    parser.add_argument("--report", type=Path, default=Path("build/cache-eval.html"), help="HTML page with the plots")
    options = parser.parse_args()
    questions = (
        labelled.read(options.csv, options.count, options.seed)
        if options.csv
        else labelled.made_up(options.count, options.seed)
    )
    text = [f"{len(questions):,} questions, {len({label for _, label in questions})} labels, {options.embedder}"]
    print(text[0])
    runs: dict[str, list[Outcome]] = {}
    bound = options.max_wrong_percent / 100

    def note(said: str) -> None:
        print(said)
        text.append(said)

    for mode in ("static", "verified"):
        run = InProcess(options.embedder, mode=mode, max_wrong=bound, seed=options.seed)
        name = f"{mode}, in process"
        runs[name] = run.replay(questions)
        note(told(name, runs[name]))
        for kind, pairs in beside(options.seed):
            note(f"{name}: {kind} {sum(run.accepts(*pair) for pair in pairs) / len(pairs):.1%}")
    for through in () if options.in_process else RUNS:
        if options.only and options.only not in through.name:
            continue
        done = through_gateway(through, questions, options.embedder, bound, options.seed)
        runs[through.name] = done.outcomes
        note(told(through.name, done.outcomes))
        for remark in done.remarks:
            note(remark)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_bytes(page(runs, text))
    print(f"report: {options.report}")


if __name__ == "__main__":
    main()
