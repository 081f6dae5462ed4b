"""Learning rates compared fairly: the first seed tries all of them, the others take the best.

A rate is chosen by an error on validation images, which no reported figure is measured on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsynth.runs.rehearsal import Unmade
from jaxsynth.runs.stage import Artifact

# The count of a stage, or the field of a result, that chooses.
SCORE = "validation"

Rates = Mapping[str, tuple[float, ...]]


def rates_of(rates: Rates, *names: str) -> tuple[float, ...]:
    """The rates of the first of `names` that `rates` has an entry for, () where it has none."""
    return next((tuple(rates[name]) for name in names if name in rates), ())


def sweep(
    rates: Sequence[float], seeds: Sequence[int], train: Callable[[float, int], Artifact]
) -> tuple[float, dict[int, Artifact]]:
    """The best of `rates`, and what `train(rate, seed)` makes at it with every seed.

    The first seed tries every rate; the least count SCORE wins.
    """
    tried = {rate: train(rate, seeds[0]) for rate in rates}
    best = min(tried, key=lambda rate: _score(tried[rate]))
    return best, {seed: train(best, seed) if i else tried[best] for i, seed in enumerate(seeds)}


def _score(stage: Artifact) -> float:
    """The count that chooses; of a stage that is only rehearsed any other is better."""
    return math.inf if isinstance(stage, Unmade) else stage.counts[SCORE]


def best_results(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of results of a sweep (with "rate", "seed" and SCORE) those at the rate that it chose."""
    if not results:
        return []
    first = min(result["seed"] for result in results)
    tried = [result for result in results if result["seed"] == first]
    rate = min(tried, key=lambda result: result[SCORE])["rate"]
    return [result for result in results if result["rate"] == rate]
