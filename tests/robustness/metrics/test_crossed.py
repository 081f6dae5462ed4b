"""Intervals over seeds and images hold what is true as often as they say, or more often."""

import numpy as np
import pytest
from scipy import stats

from jaxsynth.robustness.metrics.crossed import crossed_interval


def drawn(rng, seeds, images, *, by_seed, by_image, rest):
    """Values around 0 with an effect of each seed and of each image."""
    return (
        rng.normal(0, by_seed, (seeds, 1))
        + rng.normal(0, by_image, (1, images))
        + rng.normal(0, rest, (seeds, images))
    )


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_image"), [(1, 0.0, 0.5), (3, 0.05, 0.5), (5, 0.1, 0.0), (5, 0.0, 0.5)]
)
def test_the_interval_covers_what_is_true(seeds, by_seed, by_image):
    rng, hits, runs = np.random.default_rng(0), 0, 300
    for _ in range(runs):
        values = drawn(rng, seeds, 200, by_seed=by_seed, by_image=by_image, rest=0.2)
        found = crossed_interval(values, resamples=400)
        hits += found.low <= 0 <= found.high
    # Of 300 intervals at 95 %, fewer than 270 would hold the truth with a probability below 1e-4.
    assert stats.binom.cdf(270, runs, 0.95) < 1e-3
    assert hits > 270, hits


def test_one_seed_is_the_bootstrap_of_images_and_seeds_widen_it():
    rng = np.random.default_rng(1)
    values = rng.normal(0.1, 1, (1, 400))
    found = crossed_interval(values)
    assert found.value == pytest.approx(values.mean()) and found.count == 400
    reach = 1.96 * values.std() / 20
    assert found.high - found.low == pytest.approx(2 * reach, rel=0.1)
    apart = values + np.array([[-0.3], [0.0], [0.3]])
    wide = crossed_interval(apart)
    assert wide.value == pytest.approx(found.value)
    assert wide.high - wide.low > 3 * (found.high - found.low)
    assert crossed_interval(apart) == wide


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 4)), np.full((2, 2), np.nan)])
def test_values_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match="expected finite values"):
        crossed_interval(values)
