"""How well scores tell in-distribution images from others: AUROC, AUPR and FPR at 95 %.

Scores are higher for images that look in-distribution ("id"), the others being "ood". Which of the
two is called positive changes AUPR and FPR, and libraries differ, so both are here under names that
say it:

- `aupr_id`, `aupr_ood`: average precision with ID (or OOD) images as the ones to be found.
- `fpr95_id`: the share of OOD images that pass where at least 95 % of ID images pass (ID positive;
  Hendrycks and Gimpel 2017, arXiv 1610.02136).
- `fpr95_ood`: the share of ID images that are flagged where at least 95 % of OOD images are (OOD
  positive, as OpenOOD and pytorch-ood have it).
- `fpr95_nearest`: ID positive, at the threshold whose recall of ID images is nearest to 95 %, on
  either side, and of those of the same recall the lowest: the protocol that the synthetic-clone
  study published with (arXiv 2405.20469).

Everything is exact, ties counted half (AUROC) or together (the others), and takes a weight for each
image, so that a bootstrap needs no resorting: with whole numbers these are repetitions. Only the
order of scores counts, so they are compared as they are given (`ranks`): float64 stays float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.robustness.checks import check_scores

Scores = Float[Array, " n"]


class Detection(NamedTuple):
    """What the module's docstring names, each a fraction."""

    auroc: Float[Array, ""]
    aupr_id: Float[Array, ""]
    aupr_ood: Float[Array, ""]
    fpr95_id: Float[Array, ""]
    fpr95_ood: Float[Array, ""]
    fpr95_nearest: Float[Array, ""]


def detection(id_scores: Scores, ood_scores: Scores) -> dict[str, float]:
    """Every figure by name. ValueError for scores that are not finite or not one an image."""
    one, other = ranks(id_scores, ood_scores)
    figures = _weighted_detection(one, other, jnp.ones(len(one)), jnp.ones(len(other)))
    return {name: float(value) for name, value in figures._asdict().items()}


def ranks(id_scores: Scores, ood_scores: Scores) -> tuple[Int[np.ndarray, " n"], ...]:
    """Both sets' places among all distinct scores: of the same order, with the same ties."""
    one = check_scores(id_scores, "id_scores")
    other = check_scores(ood_scores, "ood_scores")
    _, places = np.unique(np.concatenate([one, other]), return_inverse=True)
    return tuple(np.split(places.astype(np.int32), [len(one)]))


def weighted_detection(
    id_scores: Scores, ood_scores: Scores, id_weights: Scores, ood_weights: Scores
) -> Detection:
    """The figures with a weight for each image; traceable, weights of 0 leave an image out."""
    one, other = _Side(id_scores, id_weights), _Side(ood_scores, ood_weights)
    flipped, other_flipped = _Side(-id_scores, id_weights), _Side(-ood_scores, ood_weights)
    return Detection(
        auroc=_auroc(one, other),
        aupr_id=_average_precision(one, other),
        aupr_ood=_average_precision(other_flipped, flipped),
        fpr95_id=_fpr(one, other),
        fpr95_ood=_fpr(other_flipped, flipped),
        fpr95_nearest=_fpr_nearest(one, other),
    )


_weighted_detection = jax.jit(weighted_detection)


class _Side:
    """Scores in ascending order with their weights, and what thresholds let pass of them."""

    def __init__(self, scores: Scores, weights: Scores):
        order = jnp.argsort(scores)
        self.scores, self.weights = scores[order], weights[order].astype(jnp.float32)
        # Whole numbers up to 2^24 add up exactly.
        self.below = jnp.concatenate([jnp.zeros(1), jnp.cumsum(self.weights)])
        self.total = self.below[-1]

    def at_least(self, thresholds: Scores) -> Scores:
        """The weight of scores >= each threshold."""
        return self.total - self.below[jnp.searchsorted(self.scores, thresholds, side="left")]

    def above(self, thresholds: Scores) -> Scores:
        """The weight of scores > each threshold."""
        return self.total - self.below[jnp.searchsorted(self.scores, thresholds, side="right")]


def _auroc(positive: _Side, negative: _Side) -> Array:
    """The share of pairs in which the positive scores higher."""
    ranks = (positive.at_least(negative.scores) + positive.above(negative.scores)) / 2
    return (negative.weights * ranks / positive.total).sum() / negative.total


def _average_precision(positive: _Side, negative: _Side) -> Array:
    """The sum of precision times the step in recall over all thresholds, without interpolation."""
    true = positive.at_least(positive.scores)
    false = negative.at_least(positive.scores)
    precision = true / jnp.where(true > 0, true + false, 1)
    return (positive.weights * precision).sum() / positive.total


def _fpr(positive: _Side, negative: _Side) -> Array:
    """At the highest threshold that recalls at least 95 %."""
    enough = positive.at_least(positive.scores) >= _wanted(positive)
    # Ascending scores: the last of those that recall enough.
    threshold = positive.scores[jnp.maximum(enough.sum() - 1, 0)]
    return negative.at_least(threshold) / negative.total


def _fpr_nearest(positive: _Side, negative: _Side) -> Array:
    """At the recall nearest to 95 %, the higher one where two are as near.

    Scores of either side are thresholds. So of a recall below 1 the lowest threshold lies just
    above the next positive that it does not recall.
    """
    recalled = positive.at_least(positive.scores)
    # A positive of weight 0 was not drawn and is no threshold.
    distance = jnp.where(positive.weights > 0, jnp.abs(recalled - 0.95 * positive.total), jnp.inf)
    # Ascending scores, so the first of the nearest has the higher recall.
    place = jnp.argmin(distance)
    # The weight that is not recalled, and the highest score of it.
    lower = positive.below[jnp.searchsorted(positive.scores, positive.scores[place], side="left")]
    before = jnp.maximum(jnp.searchsorted(positive.below, lower, side="left") - 1, 0)
    previous = positive.scores[before]
    # All positives pass already at the lowest of them: the curve ends there.
    passed = jnp.where(
        lower > 0, negative.above(previous), negative.at_least(positive.scores[place])
    )
    return passed / negative.total


def _wanted(side: _Side) -> Array:
    """95 % of the weight, lowered by what the product rounds up: 19 of 20 is enough."""
    return 0.95 * side.total * (1 - 1e-6)
