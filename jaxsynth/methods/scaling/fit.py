"""Power laws of error against the number of images, and what a set was worth in real images.

    error(n) = a n^-b + c,   a > 0, b > 0, c >= 0

by weighted least squares on the means over seeds, each weighted by the inverse square of its own
size (errors vary in proportion). For a given b the law is linear in a and c, so the whole fit is a
search over one number, done for all resamples at once on a grid.

Intervals are a residual bootstrap over seeds: each size's mean is drawn anew from the relative
deviations of all sizes' seeds, which few seeds a size would not allow alone. Deviations from a mean
of k seeds are too small by sqrt((k - 1) / k), and few of them tell a spread badly, so they are
widened by that and by the ratio of Student's quantile to the normal one. Where the offset's
interval reaches 0, a law without one fits as well, and the exponent's interval holds that law's
too: an offset that cannot be negative would otherwise push exponents up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from jaxsynth.core.words import counted

LEVEL = 0.95
# The exponents that are searched. Laws of published curves have 0.05 to 1.
EXPONENTS = np.geomspace(0.01, 5.0, 160)
FEWEST_SIZES = 4
# An interval of the exponent whose ends are so many times apart tells none.
WIDEST = 10.0
# An error this much above the offset is called saturated.
NEAR = 0.1


@dataclass(frozen=True)
class Estimate:
    """A number with its interval at `LEVEL`."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """As "0.51 [0.44, 0.60]"."""
        value, low, high = (f"{x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Law:
    """A fitted power law. `saturates`: images from which on the error is within `NEAR` of the
    offset, None where the offset's interval reaches 0. `refused` says why the data cannot tell, and
    then there are no numbers."""

    scale: Estimate | None = None
    exponent: Estimate | None = None
    offset: Estimate | None = None
    saturates: float | None = None
    refused: str = ""

    def at(self, sizes: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The law's errors."""
        if self.scale is None or self.exponent is None or self.offset is None:
            raise ValueError(f"Law.at: {self.refused}")
        return self.scale.value * np.asarray(sizes) ** -self.exponent.value + self.offset.value

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Curve = Mapping[float, Sequence[float]]


def fit(curve: Curve, *, resamples: int = 1000, seed: int = 0) -> Law:
    """The power law of `{images: errors of the seeds}`, errors being fractions above 0.

    Refused, with the reason: fewer than `FEWEST_SIZES` sizes or two seeds, an error of 0, a curve
    that does not fall by more than its seeds vary, or an exponent whose interval is wider than
    `WIDEST` or reaches an end of what is searched.
    """
    sizes = np.array(sorted(curve), float)
    seeds = [np.asarray(curve[size], float) for size in sizes]
    if reason := _unfit(sizes, seeds):
        return Law(refused=reason)
    means = np.array([own.mean() for own in seeds])
    drawn = means * (1 + _noise(seeds, resamples, np.random.default_rng(seed)))
    fall = drawn[:, 0] - drawn[:, -1]
    if np.quantile(fall, (1 - LEVEL) / 2) <= 0:
        return Law(refused="the error does not fall by more than its seeds vary")
    curves, weights = np.concatenate([means[None], drawn]), 1 / means**2
    scale, exponent, offset = map(_estimate, _least_squares(sizes, curves, weights))
    if offset.low <= 0:
        plain = map(_estimate, _least_squares(sizes, curves, weights, offset=False))
        scale, exponent = (_wider(*both) for both in zip((scale, exponent), plain, strict=False))
    ends = exponent.low <= EXPONENTS[0] or exponent.high >= EXPONENTS[-1]
    if ends or exponent.high > WIDEST * exponent.low:
        return Law(
            refused=f"exponents from {exponent.low:.2g} to {exponent.high:.2g} fit as well as any"
        )
    saturates = None
    if offset.low > 0:
        saturates = float((scale.value / (NEAR * offset.value)) ** (1 / exponent.value))
    return Law(scale, exponent, offset, saturates)


def worth(
    error: Sequence[float], real: Curve, *, resamples: int = 1000, seed: int = 0
) -> tuple[Estimate, str]:
    """How many real images have the same error as a set with the errors `error` of its seeds.

    Between the sizes that were measured the logarithm of the error is linear in that of the size;
    beyond them the answer is the end, and the words say "less than" or "more than" it. The interval
    is that of the resamples of both.

    Raises:
        ValueError: no two real sizes, an error of 0, or one seed.
    """
    sizes = np.array(sorted(real), float)
    seeds = [np.asarray(real[size], float) for size in sizes]
    own = np.asarray(error, float)
    if len(sizes) < 2 or min(min(map(np.min, seeds)), own.min()) <= 0:
        raise ValueError("worth: expected errors above 0 of two real sizes or more")
    if min(map(len, [own, *seeds])) < 2:
        raise ValueError("worth: one seed, which tells nothing of the spread")
    rng = np.random.default_rng(seed)
    means = np.array([each.mean() for each in seeds])
    curves = np.concatenate([means[None], means * (1 + _noise(seeds, resamples, rng))])
    # The set's one size has few seeds: its relative spread is taken with the real curve's.
    noise = _noise([own, *seeds], resamples, rng)[:, 0]
    errors = own.mean() * np.concatenate([[1.0], 1 + noise])
    # Errors of real data fall with its amount; resamples that rise by chance are made to fall.
    falling = np.minimum.accumulate(np.maximum(curves, 1e-9), axis=1)
    found = np.array(
        [
            np.exp(np.interp(np.log(max(e, 1e-9)), np.log(c[::-1]), np.log(sizes[::-1])))
            for e, c in zip(errors, falling, strict=True)
        ]
    )
    estimate = _estimate(found)
    words = ""
    if errors[0] > falling[0, 0]:
        words = "less than"
    elif errors[0] < falling[0, -1]:
        words = "more than"
    return estimate, words


def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """The mean of `one - other`, paired by seed, with Student's interval; needs two seeds."""
    apart = np.asarray(one, float) - np.asarray(other, float)
    if len(apart) < 2:
        raise ValueError(f"difference: {counted(len(apart), 'seed')}, expected two or more")
    reach = (
        special.stdtrit(len(apart) - 1, (1 + LEVEL) / 2) * apart.std(ddof=1) / np.sqrt(len(apart))
    )
    return Estimate(float(apart.mean()), float(apart.mean() - reach), float(apart.mean() + reach))


def _unfit(sizes: np.ndarray, seeds: Sequence[np.ndarray]) -> str:
    if len(sizes) < FEWEST_SIZES:
        return f"{len(sizes)} sizes, a law with three parameters needs {FEWEST_SIZES} or more"
    if min(map(len, seeds)) < 2:
        return "one seed, which tells nothing of the spread"
    if not all(np.isfinite(own).all() and own.min() > 0 for own in seeds):
        return "an error of 0 or none at all, which has no place on a logarithmic scale"
    return ""


def _noise(seeds: Sequence[np.ndarray], resamples: int, rng) -> Float[np.ndarray, "resamples n"]:
    """Relative changes of each size's mean (the module says how they are drawn)."""
    counts = np.array([len(own) for own in seeds])
    apart = np.concatenate(
        [(own / own.mean() - 1) * np.sqrt(len(own) / (len(own) - 1)) for own in seeds]
    )
    freedom = int((counts - 1).sum())
    apart = apart * special.stdtrit(freedom, (1 + LEVEL) / 2) / special.ndtri((1 + LEVEL) / 2)
    noise = np.empty((resamples, len(seeds)))
    for i, count in enumerate(counts):
        noise[:, i] = rng.choice(apart, (resamples, count)).mean(1)
    return noise


def _least_squares(
    sizes: np.ndarray, means: Float[np.ndarray, "r n"], weights: np.ndarray, *, offset: bool = True
):
    """(scale, exponent, offset), each (r,): the best over `EXPONENTS` for every row of means."""
    basis = (sizes / sizes[0]) ** -EXPONENTS[:, None]  # (e, n), 1 at the first size
    w = weights / weights.sum()
    sb, sbb = basis @ w, basis**2 @ w
    sy, sby, syy = means @ w, (means * w) @ basis.T, (means**2) @ w
    spread = sbb - sb**2
    a = (sby - sy[:, None] * sb) / spread
    c = sy[:, None] - a * sb
    # Where the offset would be negative it is 0, and the scale is that of a law through 0.
    below = (c < 0) | (not offset)
    a = np.where(below, sby / sbb, a)
    c = np.where(below, 0.0, c)
    a = np.maximum(a, 1e-12)
    loss = syy[:, None] - 2 * a * sby - 2 * c * sy[:, None]
    loss = loss + a**2 * sbb + 2 * a * c * sb + c**2
    best = loss.argmin(1)
    rows = np.arange(len(means))
    exponent = _between(EXPONENTS, loss, best)
    return a[rows, best] * sizes[0] ** exponent, exponent, c[rows, best]


def _between(grid: np.ndarray, loss: np.ndarray, best: np.ndarray) -> np.ndarray:
    """The place of the least loss, by the parabola through the best point and its neighbors."""
    inner = np.clip(best, 1, len(grid) - 2)
    rows = np.arange(len(loss))
    left, middle, right = (loss[rows, inner + i] for i in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, (left - right) / (2 * np.where(bend > 0, bend, 1)), 0.0)
    moved = np.exp(np.log(grid[inner]) + np.clip(shift, -1, 1) * np.log(grid[1] / grid[0]))
    return np.where(best == inner, moved, grid[best])


def _wider(one: Estimate, other: Estimate) -> Estimate:
    """The first, its interval holding the other's too."""
    return Estimate(one.value, min(one.low, other.low), max(one.high, other.high))


def _estimate(values: np.ndarray) -> Estimate:
    """The first value, with the quantiles of the others."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(values[0])
    return Estimate(value, float(min(low, value)), float(max(high, value)))
