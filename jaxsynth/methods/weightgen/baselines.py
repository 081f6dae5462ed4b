"""What a generator of weights has to beat: mean, nearest, ridge, and weights with noise added.

The published comparison (Gong et al. 2024, arXiv 2407.11966) lists none of them, though studies of
generated weights find that generators seldom beat averages or noise around what they were trained
on (Zeng et al. 2025, arXiv 2506.07998). They cost next to nothing: scikit-learn's
ridge regression, its strength chosen by leave-one-out errors, which are exact.

Everything is numpy over rows of features of the concepts' texts and rows of their weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from jaxsynth.core.words import counted

# scikit-learn, slow to import, is imported where it is used: a plan or a mistake comes not so far.
if TYPE_CHECKING:
    from sklearn.linear_model import RidgeCV

# Strengths relative to the features' mean square.
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-10, 7))


@dataclass(frozen=True)
class Ridge:
    """A linear map from features to weights, which are sums of `directions` (one a concept).

    `error` is the leave-one-out error: the mean over concepts of the squared distance.
    `left_out` are the predictions for each concept by the others.
    """

    model: "RidgeCV"
    directions: Float[np.ndarray, "c v"]
    mean: Float[np.ndarray, " v"]
    strength: float
    error: float
    left_out: Float[np.ndarray, "c v"]

    def __call__(self, features: Float[np.ndarray, "m f"]) -> Float[np.ndarray, "m v"]:
        """The weights for texts of these features."""
        shares = self.model.predict(np.asarray(features, np.float64))
        return (shares @ self.directions + self.mean).astype(np.float32)


def fit_ridge(
    features: Float[np.ndarray, "c f"],
    weights: Float[np.ndarray, "c v"],
    strengths: Sequence[float] = STRENGTHS,
) -> Ridge:
    """Ridge regression with an intercept, of the strength with the least leave-one-out error.

    The weights may be millions, the concepts are few: the regression is of the weights' coordinates
    along their own singular vectors, which leaves distances and predictions as they are.

    ValueError for less than three concepts, or where the numbers of rows differ.
    """
    from sklearn.linear_model import RidgeCV

    features, weights = (np.asarray(x, np.float64) for x in (features, weights))
    if len(features) != len(weights) or len(features) < 3:
        raise ValueError(
            f"fit_ridge: {counted(len(features), 'row')} of features and {len(weights)} of "
            "weights, expected as many, and at least 3"
        )
    mean = weights.mean(0)
    left, sizes, directions = np.linalg.svd(weights - mean, full_matrices=False)
    scale = float(np.square(features - features.mean(0)).sum() / len(features)) or 1.0
    model = RidgeCV(
        alphas=[by * scale for by in strengths],
        scoring="neg_mean_squared_error",  # so that the predictions are stored, not their errors
        store_cv_results=True,  # pyrefly: ignore[unexpected-keyword]
    )
    coordinates = left * sizes
    model.fit(features, coordinates)
    best = int(np.argmin(np.abs(np.asarray(model.alphas) - model.alpha_)))
    predicted = model.cv_results_[..., best]
    error = float(np.square(predicted - coordinates).sum(1).mean())
    left_out = (predicted @ directions + mean).astype(np.float32)
    return Ridge(model, directions, mean, float(strengths[best]), error, left_out)


def nearest(
    features: Float[np.ndarray, "c f"], queries: Float[np.ndarray, "m f"]
) -> Int[np.ndarray, " m"]:
    """The concept of the most similar text: by the cosine, after the mean text is subtracted.

    Texts of one form have most of their embedding in common, which would hide the rest. Of equally
    similar ones it is the first.
    """
    from sklearn.metrics.pairwise import cosine_similarity

    centre = np.mean(features, 0)
    return np.argmax(cosine_similarity(queries - centre, features - centre), axis=1)


def nearest_other(features: Float[np.ndarray, "c f"]) -> Int[np.ndarray, " c"]:
    """For each concept the most similar one of the others."""
    from sklearn.metrics.pairwise import cosine_similarity

    similar = cosine_similarity(features - np.mean(features, 0))
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
    from sklearn.feature_extraction.text import CountVectorizer

    if not vocabulary:
        return np.zeros((len(texts), 0), np.float32)
    counter = CountVectorizer(
        vocabulary=list(vocabulary), tokenizer=words, token_pattern=None, lowercase=False
    )
    return counter.transform(texts).toarray().astype(np.float32)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
