"""Intervals against scipy's bootstrap, and against how often they hold the truth."""

import jax
import numpy as np
import pytest
from scipy import stats

from jaxsynth.robustness.metrics.bootstrap import (
    difference,
    interval,
    mean,
    quotient,
    ratio,
)

COUNT = 120


def correctness(seed=0, shares=(0.8, 0.3), count=COUNT):
    """Clean and adversarial correctness: what falls without attack falls with it too."""
    rng = np.random.default_rng(seed)
    clean = rng.random(count) < shares[0]
    return clean.astype(float), (clean & (rng.random(count) < shares[1])).astype(float)


def test_a_ratio_is_scipys_bca(key):
    clean, adversarial = correctness()
    found = interval(ratio(adversarial, clean), COUNT, key, resamples=10_000)
    expected = stats.bootstrap(
        (adversarial, clean),
        lambda a, c, axis: a.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    assert found.value == pytest.approx(adversarial.sum() / clean.sum())
    limits = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high), abs=0.008)
    assert found.error == pytest.approx(expected.standard_error, rel=0.04)
    assert found.undefined == 0 and found.count == COUNT
    assert found.text() == (
        f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    )


def test_skewed_values_are_scipys_bca(key):
    """Where a percentile interval is visibly another one."""
    values = np.random.default_rng(3).exponential(size=COUNT) ** 2
    found = interval(mean(values), COUNT, key, resamples=10_000)
    settings = {"n_resamples": 10_000, "rng": np.random.default_rng(0)}
    bca = stats.bootstrap((values,), np.mean, method="BCa", **settings).confidence_interval
    plain = stats.bootstrap((values,), np.mean, method="percentile", **settings)
    assert (found.low, found.high) == pytest.approx((bca.low, bca.high), rel=0.01)
    assert found.high > 1.015 * plain.confidence_interval.high


def test_paired_differences_are_narrower_than_unpaired_ones(key):
    """Two models right on nearly the same images."""
    one, _ = correctness()
    other = one.copy()
    other[:6] = 1 - other[:6]
    paired = interval(difference(mean(one), mean(other)), COUNT, key)
    alone = [interval(mean(x), COUNT, key).error for x in (one, other)]
    assert paired.value == pytest.approx(one.mean() - other.mean(), abs=1e-6)
    assert paired.error < 0.6 * np.hypot(*alone)
    assert paired.low < paired.value < paired.high


def test_groups_keep_their_sizes(key):
    """Accuracy in a small group over that in a large one, as CB_k: never a group without images."""
    rng = np.random.default_rng(0)
    groups = np.r_[np.zeros(COUNT - 6, int), np.ones(6, int)]
    right = (rng.random(COUNT) < np.where(groups, 0.5, 0.9)).astype(float)
    right[-3:] = 0, 1, 1
    figure = quotient(mean(right, groups == 1), mean(right, groups == 0))
    kept = interval(figure, COUNT, key, groups=groups)
    free = interval(figure, COUNT, key)
    assert kept.undefined == 0 < free.undefined
    assert kept.value == pytest.approx(right[-6:].mean() / right[:-6].mean(), rel=1e-5)
    # Six images: the interval says how little is known.
    assert kept.high - kept.low > 0.4
    with pytest.raises(ValueError, match=r"groups: expected shape \(120,\), found \(6,\)"):
        interval(figure, COUNT, key, groups=groups[-6:])


def test_intervals_hold_the_truth_as_often_as_they_say(key):
    """Of a skewed distribution with mean 1, in 100 samples of 60."""
    held = 0
    for seed in range(100):
        values = np.random.default_rng(seed).exponential(size=60)
        found = interval(mean(values), 60, jax.random.fold_in(key, seed), resamples=500, level=0.9)
        held += found.low <= 1 <= found.high
    assert 82 <= held <= 97


def test_values_that_are_all_alike_vary_as_a_share_does_at_most(key):
    found = interval(mean(np.full(COUNT, 0.5)), COUNT, key)
    expected = stats.binomtest(COUNT // 2, COUNT).proportion_ci(0.95, "exact")
    assert found.value == 0.5 and found.error == 0
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("right", [0, 1])
def test_images_that_all_agree_are_clopper_and_pearsons(key, right):
    """Of 21 images of a group; resamples would all be alike, and say nothing of the others."""
    groups = np.repeat([0, 1], [COUNT - 21, 21])
    values = np.where(groups, right, np.arange(COUNT) % 2)
    expected = stats.binomtest(21 * right, 21).proportion_ci(0.95, "exact")
    found = interval(mean(values, groups == 1), COUNT, key, groups=groups, resamples=100)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == right and found.high - found.low > 0.15
    share = mean(values, groups == 0)
    over = interval(quotient(mean(values, groups == 1), share), COUNT, key, resamples=100)
    half = values[groups == 0].mean()
    # The share that it is divided by is not known either.
    assert over.low <= expected.low / half and over.high >= expected.high / half
    assert over.low <= over.value <= over.high and over.value == pytest.approx(right / half)
    # A ratio of images that are right without and with an attack.
    clean = groups == 1
    under = interval(ratio(clean * right, clean), COUNT, key, resamples=100)
    assert (under.low, under.high) == pytest.approx((expected.low, expected.high))


def test_a_figure_that_is_no_number_is_refused(key):
    with pytest.raises(ValueError, match="the figure of all 120 images is nan, not a number"):
        interval(ratio(np.zeros(COUNT), np.zeros(COUNT)), COUNT, key)
    with pytest.raises(ValueError, match="resamples: expected a whole number, 100 or more"):
        interval(mean(np.ones(COUNT)), COUNT, key, resamples=10)
    with pytest.raises(ValueError, match="level: expected between 0 and 1, found 95"):
        interval(mean(np.ones(COUNT)), COUNT, key, level=95)
