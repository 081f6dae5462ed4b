"""Confidence limits of shares, differences and quotients where a bootstrap cannot tell.

Where 0 of 21 images are right every resample is the same, and where one is, nearly all are: their
quantiles say less than is unknown. These limits come from the number of images instead:

- a share: Clopper and Pearson's (1934, Biometrika 26), also for a mean of values in [0, 1], whose
  variance is at most that of a share with the same mean;
- a difference or quotient: from the limits of its two parts (MOVER: Zou and Donner 2008, Statistics
  in Medicine 27; Donner and Zou 2012, Statistical Methods in Medical Research 21);
- AUROC: as a share of min(m, n) pairs (its variance is at most that: Birnbaum and Klose 1957,
  Annals of Mathematical Statistics 28);
- the false positive rate at 95 % recall: a share, at thresholds between which the 5 % quantile of
  the positives lies (order statistics);
- ECE: from the limits of the accuracy; and from 0 where calibrated confidences would give such an
  ECE by chance (consistency resampling: Brocker and Smith 2007, Weather and Forecasting 22).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

# With fewer images of one sort than this a bootstrap's interval is too narrow.
FEW = 5
_CONSISTENCY_DRAWS = 500


class Limits(NamedTuple):
    """Limits of a value. `few`: they count beside the bootstrap's, which is too narrow here; else
    they are for resamples that are all alike only."""

    low: float
    high: float
    few: bool


def share_limits(hits: float, count: float, level: float) -> Limits:
    """Of `hits` in `count`; either may be a fraction."""
    tail, misses = (1 - level) / 2, max(count - hits, 0.0)
    # Sums of float32 fractions come out beside whole numbers.
    hits, misses = (0.0 if x < 1e-4 else x for x in (hits, misses))
    low = special.betaincinv(hits, misses + 1, tail) if hits else 0.0
    high = special.betaincinv(hits + 1, misses, 1 - tail) if misses else 1.0
    return Limits(float(low), float(high), min(hits, misses) < FEW)


def difference_limits(
    one: float, other: float, limits: Limits, other_limits: Limits, correlation: float = 0.0
) -> Limits:
    """Of `one` less `other`, estimates with that correlation."""

    def reach(mine: float, theirs: float) -> float:
        return math.sqrt(max(mine**2 + theirs**2 - 2 * correlation * mine * theirs, 0.0))

    low = one - other - reach(one - limits.low, other_limits.high - other)
    high = one - other + reach(limits.high - one, other - other_limits.low)
    return Limits(low, high, limits.few or other_limits.few)


def paired_limits(more: float, fewer: float, count: float, level: float) -> Limits:
    """Of a difference of two means over the same `count` images, values in [0, 1]: `more` and
    `fewer` are the sums of the positive and of the negative differences."""
    up, down = more / count, fewer / count
    certain = (1 - up) * (1 - down)
    correlation = -math.sqrt(up * down / certain) if certain > 0 else 0.0
    each = (share_limits(hits, count, level) for hits in (more, fewer))
    low, high, _ = difference_limits(up, down, *each, max(correlation, -1.0))
    return Limits(low, high, min(more + fewer, count - more - fewer) < FEW)


def quotient_limits(one: float, other: float, limits: Limits, other_limits: Limits) -> Limits:
    """Of `one` over `other`, neither negative and independent of each other; infinite where the
    divisor may be 0."""
    few, product = limits.few or other_limits.few, one * other

    def root(mine: float, theirs: float) -> float:
        inside = product**2 - mine * theirs * (2 * one - mine) * (2 * other - theirs)
        return product + math.sqrt(max(inside, 0.0))

    below = root(limits.low, other_limits.high)
    low = limits.low * (2 * one - limits.low) / below if below > 0 else 0.0
    above = other_limits.low * (2 * other - other_limits.low)
    high = root(limits.high, other_limits.low) / above if above > 0 else math.inf
    return Limits(low, high, few)


def unseen_limits(above: float, below: float, count: float, level: float) -> Limits:
    """Of a quotient of sums over `count` images, values in [0, 1]: images of a sort of which none
    was met may be so many, and count for one of the sums only."""
    share = 1 - ((1 - level) / 2) ** (1 / count)
    more = count * share / (1 - share)
    return Limits(above / (below + more), (above + more) / below, few=False)


def auroc_limits(area: float, positives: int, negatives: int, level: float) -> Limits:
    """Of an area under the ROC curve of so many positive and negative images."""
    pairs = min(positives, negatives)
    return share_limits(area * pairs, pairs, level)


def fpr_limits(
    positive: Float[np.ndarray, " m"], negative: Float[np.ndarray, " n"], level: float
) -> Limits:
    """Of the share of negative scores at or above the threshold that 95 % of positive ones pass."""
    from scipy import stats  # slow to import, as is scikit-learn, and few runs come here

    ordered, count = np.sort(positive), len(positive)
    tail = (1 - level) / 4
    places = stats.binom.ppf([tail, 0.5, 1 - tail], count, 0.05).astype(int)
    lower, middle, upper = ordered[np.clip(places - [1, 0, 0], 0, count - 1)]
    passed = [int((negative >= threshold).sum()) for threshold in (upper, middle, lower)]
    low, middle, high = (share_limits(hits, len(negative), (1 + level) / 2) for hits in passed)
    return Limits(low.low, high.high, middle.few)


def calibration_limits(
    confidence: Float[np.ndarray, " n"],
    right: Float[np.ndarray, " n"],
    edges: Float[np.ndarray, " edges"],
    level: float,
) -> Limits:
    """Of an expected calibration error over given bins of confidence."""
    count = len(confidence)
    confidence, right = (np.asarray(x, np.float64) for x in (confidence, right))
    bins = np.searchsorted(np.asarray(edges)[1:-1], confidence, side="left")

    def error(outcomes: np.ndarray) -> float:
        return np.abs(np.bincount(bins, outcomes - confidence)).sum() / count

    value, accuracy = error(right), right.mean()
    limits = share_limits(right.sum(), count, level)
    # A share of other outcomes changes the error by as much at most.
    margin = max(accuracy - limits.low, limits.high - accuracy)
    rng = np.random.default_rng(0)
    by_chance = [
        error((rng.random(count) < confidence).astype(np.float64))
        for _ in range(_CONSISTENCY_DRAWS)
    ]
    calibrated = value <= np.quantile(by_chance, (1 + level) / 2)
    low = 0.0 if calibrated else max(value - margin, 0.0)
    if limits.few:
        return Limits(low, min(value + margin, 1.0), few=True)
    if calibrated:
        return Limits(0.0, value, few=True)
    return Limits(low, min(value + margin, 1.0), few=False)
