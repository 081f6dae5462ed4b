"""Each filter takes out the images that it is for, and names how many."""

import numpy as np
import pytest

from jaxsynth.quality.filters import (
    FilterConfig,
    entropy,
    kept,
    most_uncertain,
    nearest_shot,
    shot_shares,
)

LABELS = np.array([0, 0, 0, 1, 1, 1])
SHARES = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55], [0.1, 0.9], [0.3, 0.7]])
# Images 0 and 1 are alike, 4 and 5 too; 0 and 4 would be, but for their classes.
FEATURES = np.array([[1, 0, 0], [2, 0.01, 0], [0, 1, 0], [0, 0, 1], [5, 0, 0], [1, 0.02, 0]], float)


@pytest.mark.parametrize(
    ("config", "places", "counts"),
    [
        (FilterConfig(), [0, 1, 2, 3, 4, 5], {"least_share": 0}),
        (FilterConfig(least_share=0.57), [0, 1, 4, 5], {"least_share": 2}),
        (FilterConfig(agreement=True), [0, 1, 3, 4, 5], {"least_share": 0, "agreement": 1}),
        (FilterConfig(duplicates=0.99), [0, 2, 3, 4], {"least_share": 0, "duplicates": 2}),
        (FilterConfig(most=1), [0, 4], {"least_share": 0, "most": 4}),
        (
            FilterConfig(agreement=True, duplicates=0.99, most=1),
            [0, 4],
            {"least_share": 0, "agreement": 1, "duplicates": 2, "most": 1},
        ),
        (FilterConfig(least_share=0.7, fewest=2), [0, 1, 4, 5], {"least_share": 3, "fewest": -1}),
        (
            FilterConfig(agreement=True, duplicates=0.99, fewest=3),
            [0, 1, 2, 3, 4, 5],
            {"least_share": 0, "agreement": 1, "duplicates": 2, "fewest": -3},
        ),
    ],
)
def test_each_filter_takes_out_its_own(config, places, counts):
    found, taken = kept(SHARES, FEATURES, LABELS, config)
    assert found.tolist() == places and taken == counts


def test_a_repeat_of_a_repeat_that_is_gone_stays():
    """Only images that stay make later ones repeats."""
    angles = np.deg2rad([0, 8, 16])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    config = FilterConfig(duplicates=float(np.cos(np.deg2rad(10))))
    found, _ = kept(np.ones((3, 1)), features, np.zeros(3, int), config)
    assert found.tolist() == [0, 2]


SHOTS = np.array([[1, 0, 0], [0, 1, 0.1], [0, 0, 1], [1, 0.02, 0]], float)
SHOT_LABELS = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("config", "places", "counts"),
    [
        (FilterConfig(least_cosine=0.999), [0, 1, 3, 4, 5], {"least_cosine": 1}),
        (FilterConfig(most_cosine=0.9999), [2, 4], {"most_cosine": 4}),
        (
            FilterConfig(least_cosine=0.996, most_cosine=0.9999, agreement=True),
            [4],
            {"agreement": 1, "least_cosine": 0, "most_cosine": 4},
        ),
    ],
)
def test_images_near_and_far_from_the_shots(config, places, counts):
    """Image 2 is 5.7 degrees from a shot, 4 is 1.1 and 1 is 0.3; the others are copies."""
    near, which = nearest_shot(FEATURES, LABELS, SHOTS, SHOT_LABELS)
    assert which.tolist() == [0, 0, 1, 2, 3, 3]
    found, taken = kept(SHARES, FEATURES, LABELS, config, near)
    assert found.tolist() == places and taken == {"least_share": 0} | counts


def test_shots_judge_by_the_nearest_class_mean():
    shares = shot_shares(FEATURES, SHOTS, SHOT_LABELS, 2)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert shares.argmax(1).tolist()[2:4] == [0, 1] and shares[2, 0] > 0.99


@pytest.mark.parametrize(
    "fields",
    [
        {"least_share": 1.0}, {"duplicates": 0.0}, {"most": -1}, {"judge": "shots"},
        {"fewest": 1}, {"fewest": 3, "most": 2},
        {"least_cosine": 0.5, "most_cosine": 0.4},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        FilterConfig(**fields)


def test_the_least_certain_of_each_class_that_are_free_are_taken():
    wanted = [-(p * np.log(p)).sum() for p in SHARES]
    np.testing.assert_allclose(entropy(SHARES), wanted)
    assert entropy(np.array([[1.0, 0.0]])) == 0
    # Of class 0 entropies fall as 1, 2, 0, of class 1 as 3, 5, 4.
    assert most_uncertain(SHARES, LABELS, np.array([], int), 2).tolist() == [1, 2, 3, 5]
    assert most_uncertain(SHARES, LABELS, np.array([1, 3]), 1).tolist() == [2, 5]
    assert most_uncertain(SHARES, LABELS, np.array([1, 3]), 9).tolist() == [2, 0, 5, 4]
