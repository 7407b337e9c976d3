"""What traffic teaches: pure, on made-up observations and on made-up questions with real static embeddings."""

from __future__ import annotations

import random

import msgspec
import pytest

from app.cache.guards import Written, read, written
from app.cache.learner import REFIT, Observation, fit
from app.cache.verifier import FEATURES, Model, Neighbour, weigh
from loadtest.cache_eval import InProcess, summary
from loadtest.labelled import made_up
from loadtest.near_misses import near_misses

BOUND = 0.01


def observations(count: int, *, wrong: float, seed: int = 1) -> list[Observation]:
    """Right where the first feature says so, but for a share that is wrong all the same."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        features = [draw.gauss(0.0, 1.0) for _ in FEATURES]
        made.append(Observation(tuple(features), (features[0] > 0) != (draw.random() < wrong)))
    return made


def served(model: Model, fresh: list[Observation]) -> list[Observation]:
    return [one for one in fresh if model.chance(one.features) >= model.threshold]


def test_too_few_observations_or_one_outcome_teach_nothing() -> None:
    assert fit(observations(REFIT - 1, wrong=0.0), BOUND) is None
    assert fit([Observation((0.0,) * len(FEATURES), True)] * 500, BOUND) is None
    assert fit([Observation((0.0,), True), Observation((0.0,), False)] * 500, BOUND) is None


@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_what_is_served_keeps_the_bound_on_questions_that_were_not_learned_from(bound: float) -> None:
    first, second = observations(3_000, wrong=0.02), observations(3_000, wrong=0.02, seed=3)
    before = fit(first, bound)
    model = fit([*first, *(msgspec.structs.replace(o, chance=before.chance(o.features)) for o in second)], bound)
    fresh = observations(20_000, wrong=0.02, seed=2)
    assert sum(not one.right for one in served(model, fresh)) / len(fresh) <= bound


def test_a_wider_bound_serves_more() -> None:
    seen, fresh = observations(3_000, wrong=0.05), observations(2_000, wrong=0.05, seed=2)
    assert len(served(fit(seen, 0.02), fresh)) > len(served(fit(seen, 0.005), fresh))


def test_where_nothing_can_be_told_apart_nothing_is_served() -> None:
    model = fit(observations(3_000, wrong=0.5), 0.001)
    assert len(served(model, observations(2_000, wrong=0.5, seed=2))) < 20


def test_the_judges_error_is_taken_off_the_bound() -> None:
    seen = observations(3_000, wrong=0.05)
    assert fit(seen, BOUND, 0.5).threshold > fit(seen, BOUND).threshold


def test_errors_that_come_more_often_than_expected_raise_the_threshold() -> None:
    seen = observations(3_000, wrong=0.05)
    sure = [msgspec.structs.replace(one, chance=0.999) for one in seen]
    model = fit(sure, BOUND)
    assert model.correction > 1.5
    assert model.threshold > fit(seen, BOUND).threshold


def test_neighbours_of_one_group_outvote_a_nearer_one_of_another() -> None:
    facts = read("how do I pay my bill")
    said = written(facts)
    neighbours = [Neighbour("a", 0.90, "x", said)] + [Neighbour(str(n), 0.89, "y", said) for n in range(4)]
    verdict = weigh(facts, neighbours)
    assert verdict.group == "y"
    assert [neighbour.id for neighbour in verdict.candidates] == ["0", "1", "2", "3"]
    assert len(verdict.features) == len(FEATURES)


def of(text: str) -> Written:
    return written(read(text))


def test_a_guard_vetoes_unless_the_group_was_asked_just_so_before() -> None:
    asked, three, two = read("I waited 2 weeks"), of("I waited 3 weeks"), of("waited for 2 weeks")
    vetoed = weigh(asked, [Neighbour("a", 0.99, "x", three)])
    assert (vetoed.veto, vetoed.features) == ("numbers", ())
    assert weigh(asked, [Neighbour("a", 0.99, "x", three), Neighbour("b", 0.9, "x", two)]).veto is None


def test_another_word_vetoes_until_the_group_was_asked_with_it() -> None:
    asked, oslo, rome = read("weather in rome now"), of("weather in oslo now"), of("rome weather")
    assert weigh(asked, [Neighbour("a", 0.99, "x", oslo)]).veto == "substitution"
    assert weigh(asked, [Neighbour("a", 0.99, "x", oslo), Neighbour("b", 0.9, "x", rome)]).veto is None


def test_made_up_questions_are_answered_from_before_within_the_bound() -> None:
    run = InProcess("static", mode="verified", max_wrong=BOUND)
    result = summary(run.replay(made_up(3_000)))
    assert max(third.wrong for third in result.thirds) <= BOUND
    assert result.thirds[-1].hits >= 0.4
    accepted = [pair for pair in near_misses(3, 550) if run.accepts(*pair[1:])]
    assert len(accepted) <= 0.03 * 550, accepted[:10]
