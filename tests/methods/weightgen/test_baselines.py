"""The plain predictors of weights, against their definitions."""

import numpy as np
import pytest

from jaxsynth.methods.weightgen.baselines import (
    choose_features,
    fit_ridge,
    nearest,
    nearest_other,
    with_noise,
    word_counts,
)


def linear(seed: int, concepts: int = 20, noise: float = 0.1):
    """Features, and weights that follow from them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(3.0, 1.0, (concepts, 5))
    true = rng.normal(size=(5, 40))
    weights = 7 + features @ true + noise * rng.normal(size=(concepts, 40))
    return features, weights, true


def test_ridge_is_the_regularised_solution():
    features, weights, _ = linear(0)
    found = fit_ridge(features, weights, strengths=(0.3,))
    x, y = features - features.mean(0), weights - weights.mean(0)
    by = 0.3 * np.trace(x @ x.T) / len(x)
    slope = np.linalg.solve(x.T @ x + by * np.eye(5), x.T @ y)
    query = np.random.default_rng(1).normal(size=(3, 5))
    expected = (query - features.mean(0)) @ slope + weights.mean(0)
    np.testing.assert_allclose(found(query), expected, rtol=1e-5)


@pytest.mark.parametrize("strength", [1e-3, 0.3, 10.0])
def test_leave_one_out_errors_are_those_of_leaving_out(strength):
    features, weights, _ = linear(0, concepts=9)
    found = fit_ridge(features, weights, strengths=(strength,))
    x = features - features.mean(0)
    by = strength * np.trace(x @ x.T) / len(x)
    errors = []
    for left in range(9):
        rest = np.arange(9) != left
        x, y = features[rest] - features[rest].mean(0), weights[rest] - weights[rest].mean(0)
        slope = np.linalg.solve(x.T @ x + by * np.eye(5), x.T @ y)
        predicted = (features[left] - features[rest].mean(0)) @ slope + weights[rest].mean(0)
        np.testing.assert_allclose(found.left_out[left], predicted, rtol=1e-4)
        errors.append(np.square(weights[left] - predicted).sum())
    assert found.error == pytest.approx(np.mean(errors), rel=1e-6)


def test_the_strength_follows_the_noise():
    features, weights, true = linear(0, noise=0.01)
    clear = fit_ridge(features, weights)
    fresh = np.random.default_rng(2).normal(3.0, 1.0, (4, 5))
    np.testing.assert_allclose(clear(fresh), 7 + fresh @ true, atol=0.1)
    noisy = fit_ridge(features, np.random.default_rng(3).normal(size=(20, 40)))
    assert noisy.strength > 100 * clear.strength  # nothing to learn: close to the mean
    assert fit_ridge(np.ones((4, 2)), np.arange(8.0).reshape(4, 2)).error > 0  # equal texts


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 rows of features and 3 of weights"):
        fit_ridge(np.ones((4, 2)), np.ones((3, 2)))


def test_the_nearest_is_by_direction_from_the_mean():
    features = np.array([[11.0, 10.0], [10.0, 11.0], [9.0, 9.0]])
    queries = np.array([[15.0, 10.5], [10.1, 14.0], [2.0, 3.0]])
    np.testing.assert_array_equal(nearest(features, queries), [0, 1, 2])
    others = np.array([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2], [-1.1, -0.3]])
    np.testing.assert_array_equal(nearest_other(others), [1, 0, 3, 2])


def test_the_better_features_are_chosen():
    features, weights, _ = linear(0)
    useless = np.random.default_rng(5).normal(size=features.shape)
    name, ridge = choose_features({"noise": useless, "true": features}, weights)
    assert name == "true" and ridge.error == fit_ridge(features, weights).error


def test_noise_is_of_each_values_spread():
    spread = np.array([0.0, 1.0, 5.0], np.float32)
    found = with_noise(np.ones((20_000, 3)), spread, 0.5, np.random.default_rng(0))
    np.testing.assert_allclose(found.std(0), 0.5 * spread, rtol=0.03)
    np.testing.assert_allclose(found.mean(0), 1, atol=0.1)


def test_words_are_counted():
    found = word_counts(["Red, red sky", "a blue sea"], ["blue", "red", "sky"])
    np.testing.assert_array_equal(found, [[0, 2, 1], [1, 0, 0]])
