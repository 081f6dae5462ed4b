"""Scores that say how in-distribution an image looks: higher means more so, for every one of them.

From logits alone:
- `max_softmax` (MSP; Hendrycks and Gimpel 2017, arXiv 1610.02136), `max_logit` (Hendrycks et al.
  2022, arXiv 1911.11132), `energy` (Liu et al. 2020, arXiv 2010.03759), `negative_entropy`, and
  `gen`, the generalised entropy (Liu et al., CVPR 2023).

From penultimate features, fitted on features of training images:
- `knn`: the distance to the k-th nearest (Sun et al. 2022, arXiv 2204.06507).
- `vim`: the residual outside of the features' principal space, as one more logit (Wang et al. 2022,
  arXiv 2203.10807).
- `mahalanobis`: the distance to the nearest class mean (Lee et al. 2018, arXiv 1807.03888);
  `relative_mahalanobis` subtracts the distance to the mean of all (Ren et al. 2021, arXiv
  2106.09022).

ID and OOD images must come through one transform: a different resize is itself a difference that
scores find. `detection` turns two sets of scores into figures. Float64 logits give float64 scores.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.quality.metrics import check_features
from jaxsynth.robustness.checks import (
    as_array,
    check_labels,
    check_logits,
    check_number,
    check_whole,
)

Logits = Float[Array, "n c"]
Features = Float[Array, "n d"]
Scores = Float[Array, " n"]


def _in_their_precision(score: Callable[..., Scores]) -> Callable[..., Scores]:
    """Computes a score of float64 logits in float64, which JAX does only where it is told to."""

    @wraps(score)
    def wrapped(logits: Logits, **options) -> Scores:
        logits = as_array(logits, "logits")
        if logits.dtype != np.float64:
            return score(logits, **options)
        with jax.enable_x64(True):
            return np.asarray(score(logits, **options))

    return wrapped


@_in_their_precision
def max_softmax(logits: Logits) -> Scores:
    """The logarithm of the largest probability.

    It orders images as the probability does, but does not round to the same 1 for all that are
    certain, as float32 probabilities do.
    """
    return _max_softmax(check_logits(logits))


@_in_their_precision
def max_logit(logits: Logits) -> Scores:
    """The largest logit."""
    return check_logits(logits).max(1)


@_in_their_precision
def energy(logits: Logits, *, temperature: float = 1.0) -> Scores:
    """T log sum exp(logits / T), the negative of the energy."""
    temperature = check_number(temperature, "temperature", above=True)
    return temperature * jax.nn.logsumexp(check_logits(logits) / temperature, axis=1)


@_in_their_precision
def negative_entropy(logits: Logits) -> Scores:
    """The sum of p log p, in nats."""
    return _negative_entropy(check_logits(logits))


@_in_their_precision
def gen(logits: Logits, *, gamma: float = 0.1, top: int = 100) -> Scores:
    """Minus the sum of (p (1 - p))^gamma over the `top` largest probabilities."""
    logits = check_logits(logits)
    gamma, top = check_number(gamma, "gamma", above=True), check_whole(top, "top", 1)
    return _gen(logits, gamma, min(top, logits.shape[1]))


class KNN(NamedTuple):
    """Training features (m, d), each of length 1."""

    bank: Features


def fit_knn(features: Features) -> KNN:
    """Of all training features, or of a random share of them."""
    return KNN(_unit(_features(features, "features")))


def knn(fitted: KNN, features: Features, *, k: int = 50) -> Scores:
    """Minus the distance to the k-th nearest training feature, all scaled to length 1."""
    features = _features(features, "features", like=fitted.bank)
    check_whole(k, "k", 1, len(fitted.bank))
    return _knn(fitted, features, k)


class ViM(NamedTuple):
    """The origin (d,), the residual space's basis (d, r) and the residual's scale."""

    origin: Float[Array, " d"]
    residual: Float[Array, "d r"]
    scale: Float[Array, ""]


def fit_vim(
    features: Features,
    kernel: Float[Array, "d c"],
    bias: Float[Array, " c"],
    *,
    dimension: int = 0,
) -> ViM:
    """From training features and the last layer, logits = features @ kernel + bias.

    `dimension` of the principal space; 0 is the paper's: 1000 of 2048 or more, 512 of 768 or more,
    else half. The decomposition is float64 on the host.
    """
    features = np.asarray(_features(features, "features", least=2), np.float64)
    kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    size = features.shape[1]
    if kernel.shape != (size, len(bias)):
        raise ValueError(
            f"kernel: expected ({size}, {len(bias)}) for the features and the bias, found "
            f"{kernel.shape}"
        )
    dimension = dimension or (1000 if size >= 2048 else 512 if size >= 768 else size // 2)
    if not 0 < dimension < size:
        raise ValueError(f"dimension: expected 1 to {size - 1}, found {dimension}")
    origin = -np.linalg.pinv(kernel.T) @ bias
    centred = features - origin
    # Ascending eigenvalues: the first vectors are what the principal space leaves.
    _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    residual = vectors[:, : size - dimension]
    lengths = np.linalg.norm(centred @ residual, axis=1)
    scale = (features @ kernel + bias).max(1).mean() / lengths.mean()
    return ViM(*(jnp.asarray(value, jnp.float32) for value in (origin, residual, scale)))


def vim(fitted: ViM, features: Features, logits: Logits) -> Scores:
    """The energy of the logits less the scaled length of the residual."""
    features = _features(features, "features", like=fitted.residual.T)
    logits = check_logits(logits)
    if len(logits) != len(features):
        raise ValueError(f"{len(features)} features and {len(logits)} logits: expected as many")
    return _vim(fitted, features, logits)


class Gaussians(NamedTuple):
    """Class means (c, d), their mean (d,), and roots (d, d) of the inverse covariances.

    `within` whitens what is left around the class means, `total` around the mean of all.
    """

    means: Float[Array, "c d"]
    mean: Float[Array, " d"]
    within: Float[Array, "d d"]
    total: Float[Array, "d d"]


def fit_mahalanobis(features: Features, labels: Int[Array, " n"], *, classes: int) -> Gaussians:
    """Class means with one covariance, and one Gaussian of all, from training features.

    Covariances divide by n; directions without variance (below 1e-10 of the largest) are left out.
    Float64 on the host. ValueError for a class without images.
    """
    features = np.asarray(_features(features, "features", least=2), np.float64)
    labels = np.asarray(check_labels(labels, len(features), classes))
    counts = np.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise ValueError(f"labels: class {int(np.argmin(counts))} of {classes} has no features")
    means = np.stack([features[labels == index].mean(0) for index in range(classes)])
    mean = features.mean(0)
    roots = (_whitening(features - centre) for centre in (means[labels], mean))
    return Gaussians(*(jnp.asarray(value, jnp.float32) for value in (means, mean, *roots)))


def mahalanobis(fitted: Gaussians, features: Features) -> Scores:
    """Minus the squared distance to the nearest class mean."""
    features = _features(features, "features", like=fitted.means)
    return _mahalanobis(fitted, features, relative=False)


def relative_mahalanobis(fitted: Gaussians, features: Features) -> Scores:
    """As `mahalanobis`, plus the squared distance to the mean of all."""
    features = _features(features, "features", like=fitted.means)
    return _mahalanobis(fitted, features, relative=True)


def _features(features, name: str, *, least: int = 1, like: Array | None = None) -> Features:
    found = check_features(np.asarray(features), name, least=least).astype(np.float32)
    if like is not None and found.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name}: {found.shape[1]} dimensions, fitted on {like.shape[1]}: they are not of one "
            "network"
        )
    return jnp.asarray(found)


def _unit(features: Features) -> Features:
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _whitening(centred: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = values > 1e-10 * values[-1]
    return vectors * np.where(kept, 1 / np.sqrt(np.where(kept, values, 1)), 0)


def _others(logits: Logits) -> tuple[Array, Array]:
    """Sorted logits, the largest at 0, and log sum exp of all but the largest."""
    ordered = jnp.sort(logits, axis=1, descending=True)
    ordered = ordered - ordered[:, :1]
    return ordered, jax.nn.logsumexp(ordered[:, 1:], axis=1)


@jax.jit
def _max_softmax(logits: Logits) -> Scores:
    _, others = _others(logits)
    return -jax.nn.softplus(others)


@jax.jit
def _negative_entropy(logits: Logits) -> Scores:
    ordered, others = _others(logits)
    # The largest's logarithm is near 0: from the others, or float32 would round it away.
    total = jax.nn.softplus(others)[:, None]
    logs = ordered - total
    return (jnp.exp(logs) * logs).sum(1)


@partial(jax.jit, static_argnums=2)
def _gen(logits: Logits, gamma: float, top: int) -> Scores:
    ordered, others = _others(logits)
    total = jax.nn.softplus(others)[:, None]
    logs = ordered - total
    # 1 - p of the largest is the sum of the others: exact where p is 1 in float32.
    first = others[:, None] - total
    rest = jnp.log1p(-jnp.exp(logs[:, 1:]))
    summands = jnp.exp(gamma * (logs + jnp.concatenate([first, rest], axis=1)))
    return -summands[:, :top].sum(1)


@partial(jax.jit, static_argnums=2)
def _knn(fitted: KNN, features: Features, k: int) -> Scores:
    def one(row: Array) -> Array:
        # Of vectors of length 1 the largest product is the smallest distance.
        products = jnp.matmul(fitted.bank, row, precision="highest")
        _, nearest = jax.lax.top_k(products, k)
        # From the difference: 2 - 2 x.y would round small distances away.
        return jnp.linalg.norm(fitted.bank[nearest[-1]] - row)

    return -jax.lax.map(one, _unit(features), batch_size=256)


@jax.jit
def _vim(fitted: ViM, features: Features, logits: Logits) -> Scores:
    inside = jnp.matmul(features - fitted.origin, fitted.residual, precision="highest")
    return jax.nn.logsumexp(logits, axis=1) - fitted.scale * jnp.linalg.norm(inside, axis=1)


@partial(jax.jit, static_argnames="relative")
def _mahalanobis(fitted: Gaussians, features: Features, *, relative: bool) -> Scores:
    def distances(rows: Features, centre: Array, root: Array) -> Array:
        whitened = jnp.matmul(rows - centre, root, precision="highest")
        return jnp.square(whitened).sum(-1)

    def one(mean: Array) -> Array:
        return distances(features, mean, fitted.within)

    nearest = jax.lax.map(one, fitted.means).min(0)
    return (distances(features, fitted.mean, fitted.total) if relative else 0) - nearest
