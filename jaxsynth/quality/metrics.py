"""How close a generated set is to a real one, measured on features (n, d) of any network.

- FID, the Frechet distance between two Gaussians with the sets' means and covariances (Heusel et
  al. 2017, arXiv 1706.08500). Its expectation falls with the number of samples: two figures compare
  only at equal counts, and zero is not what a perfect generator gets.
- KID, the unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Binkowski et
  al. 2018, arXiv 1801.01401).
- Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991): the share of one set
  inside the balls that reach from each sample of the other to its k-th neighbour.
- Density and coverage (Naeem et al. 2020, arXiv 2002.09797): how many real balls hold a generated
  sample, over k; and the share of real samples whose ball holds any.

`evaluate` puts beside each figure its floor: what the real data gets against itself at the same
counts. Everything is a function of features and a seed; FID and KID are float64 on the host, the
nearest neighbours are found in JAX (`distances` says how they round).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Count, Natural
from jaxsynth.core.words import counted
from jaxsynth.quality.distances import neighbour_radii, neighbourhoods

Features = Float[np.ndarray, "n d"]

# The size of KID's subsets in the paper and in every implementation since.
KID_SUBSET = 1000


@dataclass(frozen=True)
class QualityConfig:
    """How sets are compared.

    precision_k, coverage_k: the neighbour that sets a ball's radius; the papers' 3 and 5.
    kid_subsets: subsets whose mean is KID. kid_subset_size: 0 for 1000, or half of the smaller set
        if that is fewer, so that the subsets differ.
    repeats: random splits of the real set, over which matched figures and floor are averaged.
    """

    precision_k: Count = 3
    coverage_k: Count = 5
    kid_subsets: Count = 100
    kid_subset_size: Natural = 0
    repeats: Count = 5


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of features, float64; the covariance divides by n - 1.

    `count` is n, 0 where it is not known. `network` says what made the features, "" if unknown.
    """

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    count: int = 0
    network: str = ""


class KID(NamedTuple):
    """Mean and standard deviation (over n - 1) of the subsets' estimates, and the subsets' size."""

    mean: float
    std: float
    subset_size: int


def statistics(features: Features, *, network: str = "") -> Statistics:
    """Mean and covariance (over n - 1, as np.cov), summed in float64 a few thousand rows a time."""
    features = check_features(features, "features", least=2)
    mu = features.mean(axis=0, dtype=np.float64)
    sigma = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), 4096):
        centred = features[start : start + 4096] - mu
        sigma += centred.T @ centred
    return Statistics(mu, sigma / (len(features) - 1), len(features), network)


def fid(real: Features | Statistics, generated: Features | Statistics) -> float:
    """The Frechet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), never below 0.

    Either side is features (n, d) or statistics of them, from a file say; covariances divide by
    n - 1. UserError for fewer than 2 samples, values that are not finite, or dimensions or networks
    that differ.
    """
    if isinstance(real, Statistics) and isinstance(generated, Statistics):
        names = {real.network, generated.network} - {""}
        if len(names) > 1:
            raise UserError(f"fid: statistics of different networks, {' and '.join(sorted(names))}")
    return _frechet(_gaussian(real, "real"), _gaussian(generated, "generated"))


def kid(
    real: Features,
    generated: Features,
    *,
    seed: int,
    subsets: int = 100,
    subset_size: int = 0,
) -> KID:
    """The kernel distance: its mean over random subsets, drawn without replacement.

    Each is the unbiased estimate (it may be negative) between `subset_size` samples of either set,
    0 for the smaller of 1000 and half of the smaller set. The spread tells how the estimate varies
    between such subsets; with half of the data it is about the standard error of the mean.
    """
    real, generated = _pair(real, generated, least=4)
    smaller = min(len(real), len(generated))
    size = subset_size or min(KID_SUBSET, smaller // 2)
    if not 2 <= size <= smaller:
        raise UserError(
            f"kid_subset_size: {size} of {len(real)} real and {len(generated)} generated samples, "
            f"expected 2 to {smaller}"
        )
    if subsets < 2:
        raise UserError(f"kid_subsets: expected 2 or more, found {subsets}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), size, False)].astype(np.float64) for s in (real, generated))
        values.append(_mmd2(_cubic(x, x), _cubic(y, y), _cubic(x, y)))
    return KID(float(np.mean(values)), float(np.std(values, ddof=1)), size)


def manifold(
    real: Features, generated: Features, *, precision_k: int = 3, coverage_k: int = 5
) -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"}, Euclidean, a sample not its own neighbour.

    Balls are closed for precision and recall and open for density and coverage, as in the papers'
    code: a set against itself gets 1 for all four. UserError for k or fewer samples.
    """
    real, generated = _pair(real, generated, least=2)
    shift = real.mean(axis=0, dtype=np.float64)
    sets = (_Set(real, "real", shift), _Set(generated, "generated", shift))
    return _manifold(*sets, precision_k, coverage_k)


def evaluate(
    real: Features, generated: Features, config: QualityConfig = QualityConfig(), *, seed: int
) -> dict[str, Any]:
    """All figures of a generated set, with their spread and their floor; numbers only, for JSON.

    "all" compares all samples: the figure usually published, biased by its counts. For "matched"
    and "floor" each repeat draws two disjoint sets of m real samples and m generated ones, with m
    the smaller of half the real and all the generated: the first real set against the generated is
    "matched", against the second real set "floor". They hold "mean", "std" (over n - 1, None for a
    single repeat) and "values" per figure. "samples" has the counts, "settings" config and seed.

    Repeats share the data, so the spread is that of the split, and less than between new data sets.
    UserError for too few samples, values that are not finite, or dimensions that differ.
    """
    least = least_samples(config)
    real = check_features(real, "real", least=2 * least)
    real, generated = _pair(real, generated, least=least)
    shift = real.mean(axis=0, dtype=np.float64)
    whole = _Set(real, "real", shift), _Set(generated, "generated", shift)
    count = min(len(real) // 2, len(generated))
    matched, floor = _repeats(real, generated, count, shift, config, seed)
    return {
        "samples": {
            "real": len(real),
            "generated": len(generated),
            "matched": count,
            "dimensions": real.shape[1],
        },
        "settings": {**asdict(config), "seed": seed},
        "all": _figures(*whole, config, seed),
        "matched": matched,
        "floor": floor,
    }


def check_features(features: Any, name: str, *, least: int = 1) -> Features:
    """Float features (n, d), n at least `least`; UserError saying what is wrong with `name`."""
    features = np.asarray(features)
    if features.ndim != 2 or not features.shape[1] or features.dtype.kind != "f":
        raise UserError(
            f"{name}: expected float features (n, d), found {features.dtype} {features.shape}"
        )
    if len(features) < least:
        raise UserError(f"{name}: {counted(len(features), 'sample')}, expected {least} or more")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{name}: {np.count_nonzero(~finite)} of {counted(len(features), 'sample')} are not "
            f"finite, the first is row {int(np.argmin(finite))}"
        )
    return features.astype(np.float32) if features.dtype.itemsize < 4 else features


def least_samples(config: QualityConfig) -> int:
    """How many samples of either set a comparison needs; `evaluate` needs twice as many real."""
    return max(config.precision_k + 1, config.coverage_k + 1, config.kid_subset_size, 4)


class _Gaussian(NamedTuple):
    """Mean, trace of the covariance S, and a factor F (r, d) with S = F^T F."""

    mean: np.ndarray
    trace: float
    factor: np.ndarray


class _Set:
    """Features with what several comparisons need of them, computed once."""

    def __init__(self, features: Features, name: str, shift: np.ndarray):
        self.features, self.name, self._shift = features, name, shift
        self._radii = np.empty((len(features), 0), np.float32)

    @cached_property
    def gaussian(self) -> _Gaussian:
        return _gaussian(self.features, self.name)

    @cached_property
    def centred(self) -> Features:
        """Distances do not depend on the shift, but round less around 0."""
        return (self.features - self._shift).astype(np.float32)

    def radii(self, k: int) -> np.ndarray:
        """Squared distances to the k-th neighbours."""
        if not 0 < k < len(self.features):
            raise UserError(
                f"the {k}-th neighbour among {len(self.features)} {self.name} samples: "
                "expected a k from 1 to one less than the samples"
            )
        if k > self._radii.shape[1]:
            self._radii = neighbour_radii(self.centred, k)
        return self._radii[:, k - 1]


def _pair(real: Features, generated: Features, *, least: int) -> tuple[Features, Features]:
    real = check_features(real, "real", least=least)
    generated = check_features(generated, "generated", least=least)
    if real.shape[1] != generated.shape[1]:
        raise UserError(
            f"generated: features of {generated.shape[1]} dimensions, real ones have "
            f"{real.shape[1]}: they are not of one network"
        )
    return real, generated


def _figures(real: _Set, generated: _Set, config: QualityConfig, seed) -> dict[str, float]:
    kernel = kid(
        real.features,
        generated.features,
        seed=seed,
        subsets=config.kid_subsets,
        subset_size=config.kid_subset_size,
    )
    return {
        "fid": _frechet(real.gaussian, generated.gaussian),
        "kid": kernel.mean,
        "kid_std": kernel.std,
        **_manifold(real, generated, config.precision_k, config.coverage_k),
    }


def _repeats(real, generated, count: int, shift, config: QualityConfig, seed: int):
    """(matched, floor) over the repeats."""
    if config.repeats < 1:
        raise UserError(f"repeats: expected 1 or more, found {config.repeats}")
    matched, floor = [], []
    for repeat in range(config.repeats):
        rng = np.random.default_rng([seed, repeat])
        order = rng.permutation(len(real))[: 2 * count]
        first, second = (_Set(real[half], "real", shift) for half in np.split(order, 2))
        floor.append(_figures(first, second, config, [seed, repeat]))
        drawn = generated[rng.choice(len(generated), count, replace=False)]
        other = _Set(drawn, "generated", shift)
        matched.append(_figures(first, other, config, [seed, repeat]))
    return _summary(matched), _summary(floor)


def _summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    summary = {}
    for name in runs[0]:
        # The subsets' spread within a repeat; the spread between repeats is what is asked for here.
        if name == "kid_std":
            continue
        values = [run[name] for run in runs]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary[name] = {"mean": float(np.mean(values)), "std": std, "values": values}
    return summary


def _gaussian(x: Features | Statistics, name: str) -> _Gaussian:
    if not isinstance(x, Statistics):
        x = check_features(x, name, least=2)
        if len(x) <= x.shape[1]:
            mu = x.mean(axis=0, dtype=np.float64)
            factor = (x - mu) / np.sqrt(len(x) - 1)
            return _Gaussian(mu, float(np.square(factor).sum()), factor)
        x = statistics(x)
    mu, sigma = (np.asarray(value, np.float64) for value in (x.mu, x.sigma))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{name}: mu {mu.shape} and sigma {sigma.shape}, expected (d,) and (d, d)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{name}: mu or sigma is not finite")
    scale = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-3 * scale:
        raise UserError(f"{name}: sigma is not symmetric, so no covariance")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values[0] < -1e-3 * scale:
        raise UserError(f"{name}: sigma has the eigenvalue {values[0]:.3g}, so is no covariance")
    # What lies below the rounding of the largest is noise, and its root would not be small.
    kept = values > len(mu) * np.finfo(np.float64).eps * values[-1]
    factor = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    return _Gaussian(mu, float(np.trace(sigma)), factor)


def _frechet(a: _Gaussian, b: _Gaussian) -> float:
    """With S1 = F^T F and S2 = G^T G, tr (S1 S2)^(1/2) is the sum of the singular values of F G^T.

    No root of a product that is not symmetric and nearly singular, as in scipy's sqrtm; and for
    fewer samples than dimensions the centred samples are the factors, so nothing is d x d.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(
            f"generated: features of {len(b.mean)} dimensions, real ones have {len(a.mean)}: "
            "they are not of one network"
        )
    shared = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + a.trace + b.trace - 2 * shared
    return max(float(distance), 0.0)


def _cubic(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """In float64, as KID is a small difference of sums of it."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mmd2(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    """Binkowski et al., equation 4."""

    def total(kernel: np.ndarray, *, diagonal: bool) -> float:
        return kernel.sum() if diagonal else kernel.sum() - np.trace(kernel)

    n, m = xy.shape
    same = total(xx, diagonal=False) / (n * (n - 1)) + total(yy, diagonal=False) / (m * (m - 1))
    return same - 2 * total(xy, diagonal=True) / (n * m)


def _manifold(real: _Set, generated: _Set, precision_k: int, coverage_k: int) -> dict[str, float]:
    # The larger first: both come from one search.
    largest = max(precision_k, coverage_k)
    real.radii(largest)
    found = neighbourhoods(
        real.centred,
        generated.centred,
        closed=real.radii(precision_k),
        opened=real.radii(coverage_k),
        query_closed=generated.radii(precision_k),
    )
    return {
        "precision": float(found.covered.mean()),
        "recall": float(found.reached.mean()),
        "density": float(found.inside.mean() / coverage_k),
        "coverage": float((found.nearest < real.radii(coverage_k)).mean()),
    }
