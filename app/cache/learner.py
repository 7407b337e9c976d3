"""What a tenant's traffic teaches: a logistic regression over its observations, and from which chance on to serve.

Every question that was not served although it had neighbours has an outcome: the vendor's answer was the group's, or it
was not. So has a share of those that were served, asked again behind the tenant's back. The threshold is the lowest at
which the expected wrong answers a request stay within what the tenant allows. Pure; numpy is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from app.cache.verifier import FEATURES, Model

WINDOW = 6_000
"""Observations that are fitted to: what came before describes other traffic, and other answers."""
REFIT = 200
"""New observations after which a model is fitted again; until the first so many nothing is served."""
RECENT = 2_000
"""Observations over which the threshold holds its bound."""
CHECKED = 1_500
"""Outcomes that expected and observed errors are compared over."""
LEAST_SURE = 0.9
"""Outcomes below this chance say nothing of errors among what is served."""
DOUBT = 4.0
"""As many expected errors have to be seen for half of a correction to be believed."""
MOST_CORRECTION = 3.0
HEAVIEST = 3.0
"""An outcome behind the tenant's back stands for many that have none; a heavier one would rule the fit."""
RIDGE = 1.0
MARGIN = 0.7
"""Of the bound that is aimed at, for chance has its part in it: over 16 replays of 12,000 questions the error came out
at 0.93 times what is aimed at, at most, and in the worst third of one at 1.3 times. With half of the bound, three
questions of a hundred fewer were hits."""
CAUTION = 2_000
"""Outcomes after which the whole of that is aimed at; half of it at first."""


class Observation(Struct, frozen=True, array_like=True):
    """A question with neighbours. `right` None: it was served, and nobody looked. `weight`: how many it stands for.

    `chance` is what the model of its time gave it; -1 without one. The answer was `compared` with so many others
    that say something else, and to the judge it `agreed` with so many of them.
    """

    features: tuple[float, ...]
    right: bool | None
    weight: float = 1.0
    chance: float = -1.0
    compared: int = 0
    agreed: int = 0


def fit(
    observations: Sequence[Observation], max_wrong: float, judge_error: float = 0.0, version: int = 0, seen: int = 0
) -> Model | None:
    """The model of these observations, oldest first; None where they are too few, or all of them went the same way.

    `judge_error`: the share of wrong answers that the judge calls right; what it hides is taken off the bound.
    """
    import numpy

    observations = [one for one in observations[-WINDOW:] if len(one.features) == len(FEATURES)]
    labelled = [one for one in observations if one.right is not None]
    if len(labelled) < REFIT or len({one.right for one in labelled}) < 2:
        return None
    known = numpy.array([one.features for one in labelled])
    outcomes = numpy.array([float(one.right) for one in labelled])
    weights = numpy.array([min(one.weight, HEAVIEST) for one in labelled])
    mean, scale = known.mean(0), known.std(0) + 1e-3
    coefficients = _regress(numpy, _scaled(numpy, known, mean, scale), outcomes, weights)
    chances = _chances(
        numpy, _scaled(numpy, numpy.array([o.features for o in observations]), mean, scale), coefficients
    )
    correction = _correction(labelled)
    caution = 0.5 + 0.5 * min(1.0, len(labelled) / CAUTION)
    aim = max_wrong * MARGIN * caution * (1.0 - judge_error)
    return Model(
        version=version,
        seen=seen,
        labelled=len(labelled),
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(coefficients[:-1].tolist()),
        bias=float(coefficients[-1]),
        threshold=_threshold(numpy, chances[-RECENT:], aim / correction),
        correction=correction,
        judge_error=judge_error,
    )


def _scaled(numpy: Any, features: Any, mean: Any, scale: Any) -> Any:
    scaled = numpy.clip((features - mean) / scale, -5.0, 5.0)
    return numpy.concatenate([scaled, numpy.ones((len(scaled), 1))], axis=1)


def _chances(numpy: Any, scaled: Any, coefficients: Any) -> Any:
    return 1.0 / (1.0 + numpy.exp(-numpy.clip(scaled @ coefficients, -500.0, 500.0)))


def _regress(numpy: Any, scaled: Any, outcomes: Any, weights: Any) -> Any:
    """Newton's method; the ridge keeps outcomes that features separate wholly from infinite weights."""
    coefficients = numpy.zeros(scaled.shape[1])
    ridge = numpy.full(scaled.shape[1], RIDGE)
    ridge[-1] = 1e-3
    for _ in range(15):
        chances = _chances(numpy, scaled, coefficients)
        slope = scaled.T @ (weights * (chances - outcomes)) + ridge * coefficients
        curve = (scaled * (weights * chances * (1.0 - chances))[:, None]).T @ scaled + numpy.diag(ridge)
        step = numpy.linalg.solve(curve, slope)
        coefficients = coefficients - step
        if numpy.abs(step).max() < 1e-4:
            break
    return coefficients


def _correction(labelled: Sequence[Observation]) -> float:
    """Observed errors over expected ones, where models had said that an answer is likely right; never below 1."""
    checked = [one for one in labelled[-CHECKED:] if one.chance >= LEAST_SURE]
    weights = [min(one.weight, 5.0) for one in checked]
    observed = sum(weight for one, weight in zip(checked, weights, strict=True) if not one.right)
    expected = sum(weight * (1.0 - one.chance) for one, weight in zip(checked, weights, strict=True))
    return min(MOST_CORRECTION, max(1.0, (observed + DOUBT) / (expected + DOUBT)))


def _threshold(numpy: Any, chances: Any, aim: float) -> float:
    """The lowest chance at which what is at or above it has at most `aim` expected errors a request."""
    ranked = numpy.sort(chances)[::-1]
    wrong = numpy.cumsum(1.0 - ranked) / len(ranked)
    served = int(numpy.searchsorted(wrong, aim, side="right"))
    return 1.0 if served == 0 else float(max(0.5, ranked[served - 1]))
