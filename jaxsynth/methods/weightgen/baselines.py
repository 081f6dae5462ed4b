"""What a generator of weights has to beat: mean, nearest, ridge, and weights with noise added.

The published comparison (Gong et al. 2024, arXiv 2407.11966) lists none of them, though studies of
generated weights find that generators seldom beat averages or noise around what they were trained
on (Zeng et al. 2025, arXiv 2506.07998). They cost next to nothing: a ridge regression in closed
form, its strength chosen by leave-one-out errors, which are exact.

Everything is numpy over rows of features of the concepts' texts and rows of their weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Strengths relative to the features' mean square.
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-10, 7))


@dataclass(frozen=True)
class Ridge:
    """A linear map from features to weights, kept in its dual form (a coefficient a concept).

    `error` is the leave-one-out error: the mean over concepts of the squared distance.
    `left_out` are the predictions for each concept by the others.
    """

    features: Float[np.ndarray, "c f"]
    centre: Float[np.ndarray, " f"]
    coefficients: Float[np.ndarray, "c v"]
    mean: Float[np.ndarray, " v"]
    strength: float
    error: float
    left_out: Float[np.ndarray, "c v"]

    def __call__(self, features: Float[np.ndarray, "m f"]) -> Float[np.ndarray, "m v"]:
        """The weights for texts of these features."""
        weights = (np.asarray(features, np.float64) - self.centre) @ self.features.T
        return (weights @ self.coefficients + self.mean).astype(np.float32)


def fit_ridge(
    features: Float[np.ndarray, "c f"],
    weights: Float[np.ndarray, "c v"],
    strengths: Sequence[float] = STRENGTHS,
) -> Ridge:
    """Ridge regression with an intercept, of the strength with the least leave-one-out error.

    ValueError for less than three concepts, or where the numbers of rows differ.
    """
    features, weights = (np.asarray(x, np.float64) for x in (features, weights))
    if len(features) != len(weights) or len(features) < 3:
        raise ValueError(
            f"fit_ridge: {len(features)} rows of features and {len(weights)} of weights, expected "
            "as many, and at least 3"
        )
    centre, mean = features.mean(0), weights.mean(0)
    centred, targets = features - centre, weights - mean
    kernel = centred @ centred.T
    scale = np.trace(kernel) / len(kernel) or 1.0
    values, vectors = np.linalg.eigh(kernel)
    values = np.maximum(values, 0)
    # Errors need the targets' products only: they are few, the weights may be millions.
    products = targets @ targets.T
    residuals = {by: _residuals(values, vectors, by * scale) for by in strengths}
    errors = {
        by: float(np.sum(matrix @ products * matrix) / len(matrix))
        for by, matrix in residuals.items()
    }
    best = min(errors, key=lambda by: errors[by])
    inverse = (vectors / (values + best * scale)) @ vectors.T
    left_out = (weights - residuals[best] @ targets).astype(np.float32)
    return Ridge(centred, centre, inverse @ targets, mean, best, errors[best], left_out)


def _residuals(values: np.ndarray, vectors: np.ndarray, by: float) -> np.ndarray:
    """The matrix that gives leave-one-out residuals of centred targets: a fit's over 1 - leverage.

    The intercept's share of the fit falls out of the product, not out of the leverage.
    """
    fit = (vectors * (values / (values + by))) @ vectors.T
    leverage = np.diag(fit) + 1 / len(values)
    return (np.eye(len(values)) - fit) / np.maximum(1 - leverage, 1e-12)[:, None]


def nearest(
    features: Float[np.ndarray, "c f"], queries: Float[np.ndarray, "m f"]
) -> Int[np.ndarray, " m"]:
    """The concept of the most similar text: by the cosine, after the mean text is subtracted.

    Texts of one form have most of their embedding in common, which would hide the rest.
    """
    centre = np.mean(features, 0)
    return np.argmax(_unit(queries - centre) @ _unit(features - centre).T, axis=1)


def nearest_other(features: Float[np.ndarray, "c f"]) -> Int[np.ndarray, " c"]:
    """For each concept the most similar one of the others."""
    centred = _unit(features - np.mean(features, 0))
    similar = centred @ centred.T
    np.fill_diagonal(similar, -np.inf)
    return np.argmax(similar, axis=1)


def choose_features(
    candidates: Mapping[str, Float[np.ndarray, "c f"]], weights: Float[np.ndarray, "c v"]
) -> tuple[str, Ridge]:
    """The kind of features that predicts left-out concepts best, and the ridge regression on it."""
    fitted = {name: fit_ridge(features, weights) for name, features in candidates.items()}
    best = min(fitted, key=lambda name: fitted[name].error)
    return best, fitted[best]


def with_noise(
    weights: Float[np.ndarray, "*rows v"],
    spread: Float[np.ndarray, " v"],
    scale: float,
    rng: np.random.Generator,
) -> Float[np.ndarray, "*rows v"]:
    """Weights with normal noise of `scale` times each value's spread over the concepts."""
    noise = rng.standard_normal(np.shape(weights), np.float32)
    return np.asarray(weights + scale * spread * noise, np.float32)


def word_counts(texts: Sequence[str], vocabulary: Sequence[str]) -> Float[np.ndarray, "m f"]:
    """How often each word of `vocabulary` is in each text."""
    place = {word: number for number, word in enumerate(vocabulary)}
    counts = np.zeros((len(texts), len(place)), np.float32)
    for row, text in enumerate(texts):
        for word in words(text):
            if word in place:
                counts[row, place[word]] += 1
    return counts


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
