"""Confidence intervals by bootstrap for any figure of a set of images, and for paired differences.

A figure is a function of weights (n,), one for each image, built from what is known of the images:

    interval(ratio(adversarial_correct, clean_correct), n, key)                  # R_adv
    interval(difference(mean(correct_a), mean(correct_b)), n, key)               # of two models

Resampling images with replacement is giving them whole numbers as weights, so nothing is sorted or
gathered anew, and figures that share images stay paired: numerator and denominator of a ratio, or
two models, meet the same images in every resample. Where a figure compares groups of images that
were collected as such (FOCUS's partitions), `groups` keeps each group's size.

Intervals are BCa (Efron 1987, Journal of the American Statistical Association 82), which corrects a
percentile interval for the bias and the skew of the resamples. The skew (acceleration) comes from
the figure's derivatives with respect to the weights, its empirical influences: the jackknife's
limit. So figures must be differentiable in their weights, as all weighted means are.

Where all images agree, as 0 of 21 are right, every resample is the same, and would call the figure
certain. A share's interval is then Clopper and Pearson's (1934, Biometrika 26): up to 16 % there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key
from scipy import stats

Weights = Float[Array, " n"]
Figure = Callable[[Weights], Float[Array, ""]]


class TooFewError(ValueError):
    """Most resamples of a figure give no number."""


@dataclass(frozen=True)
class Interval:
    """A figure with its interval at `level`, its standard error, and the resamples behind them.

    `undefined` of the resamples gave no number (no image of a denominator was drawn); they are left
    out. `count` is how many images there are.
    """

    value: float
    low: float
    high: float
    level: float
    error: float
    count: int
    resamples: int
    undefined: int = 0

    def text(self, *, scale: float = 100.0, digits: int = 1) -> str:
        """As "61.3 [58.1, 64.2]"."""
        value, low, high = (f"{scale * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def mean(values: Float[Array, " n"], among: Float[Array, " n"] | None = None) -> Figure:
    """The mean of values, of those images that `among` marks with 1 if it is given."""
    among = jnp.ones(len(values)) if among is None else among
    return Partial(_ratio, _floats(values) * _floats(among), _floats(among), jnp.float32(1))


def ratio(above: Float[Array, " n"], below: Float[Array, " n"], *, scale: float = 1.0) -> Figure:
    """Sum of one value of the images over the sum of another, times `scale`."""
    return Partial(_ratio, _floats(above), _floats(below), jnp.float32(scale))


def quotient(above: Figure, below: Figure) -> Figure:
    """One figure over another."""
    return Partial(_quotient, above, below)


def difference(one: Figure, other: Figure) -> Figure:
    """One figure less another."""
    return Partial(_difference, one, other)


def evaluate(figure: Figure, count: int) -> float:
    """The figure itself, of `count` images each of which counts once."""
    return float(_value_and_influences(jnp.ones(count), _as_partial(figure))[0])


def interval(
    figure: Figure,
    count: int,
    key: Key[Array, ""],
    *,
    groups: Int[np.ndarray, " n"] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The figure of `count` images and its BCa interval.

    `figure` is a `Partial` (as this module's are) or a function; with arrays as a Partial's
    arguments one program serves all figures of a kind. `groups` (n,) numbers the groups whose sizes
    each resample keeps. ValueError where the figure itself is no number, `TooFewError` where most
    resamples give none.
    """
    if not 0 < level < 1 or resamples < 100:
        raise ValueError(
            f"level {level}, resamples {resamples}: expected between 0 and 1, and 100 or more"
        )
    figure = _as_partial(figure)
    first, sizes, members = _layout(count, groups)
    value, influences = _value_and_influences(jnp.ones(count), figure)
    value = float(value)
    if not np.isfinite(value):
        raise ValueError(f"interval: the figure of all {count} images is {value}, not a number")
    drawn = np.asarray(_resample(figure, key, first, sizes, members, resamples), np.float64)
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < resamples / 2:
        raise TooFewError(
            f"interval: {resamples - len(defined)} of {resamples} resamples give no number: too "
            "few images count"
        )
    low, high = _unanimous(figure, count, level) or _bca(
        defined, value, np.asarray(influences, np.float64), level
    )
    return Interval(
        value=value,
        low=low,
        high=high,
        level=level,
        error=float(defined.std(ddof=1)),
        count=count,
        resamples=resamples,
        undefined=resamples - len(defined),
    )


def sign_flip(
    differences: Float[np.ndarray, " n"], key: Key[Array, ""], *, resamples: int = 10_000
) -> float:
    """How often chance makes the mean of paired differences as large: a two-sided p-value.

    If neither model were better, each image's difference could as well have the other sign. The
    observed signs count as one of the draws, so the p-value is never 0.
    """
    differences = _floats(differences)
    if differences.ndim != 1 or not len(differences):
        raise ValueError(f"differences: expected one an image, found shape {differences.shape}")
    drawn = np.asarray(_flip(differences, key, resamples))
    # A tie is as large: the tolerance is float32's.
    found = abs(float(differences.mean()))
    return float((1 + (np.abs(drawn) >= found * (1 - 1e-5)).sum()) / (1 + resamples))


def _as_partial(figure: Figure) -> Partial:
    return figure if isinstance(figure, Partial) else Partial(figure)


def _floats(values) -> Array:
    return jnp.asarray(values, jnp.float32)


def _ratio(above: Array, below: Array, scale, weights: Weights) -> Array:
    return scale * (weights @ above) / (weights @ below)


def _quotient(above: Figure, below: Figure, weights: Weights) -> Array:
    return above(weights) / below(weights)


def _difference(one: Figure, other: Figure, weights: Weights) -> Array:
    return one(weights) - other(weights)


def _call(weights: Weights, figure: Figure) -> Array:
    return figure(weights)


_value_and_influences = jax.jit(jax.value_and_grad(_call))


def _layout(count: int, groups) -> tuple[Array, Array, Array]:
    """Images sorted by group (`members`); for each place the group's first place and its size."""
    if groups is None:
        groups = np.zeros(count, int)
    groups = np.asarray(groups)
    if groups.shape != (count,):
        raise ValueError(f"groups: expected shape ({count},), found {groups.shape}")
    members = np.argsort(groups, kind="stable")
    _, first, sizes = np.unique(groups[members], return_index=True, return_counts=True)
    spread = (np.repeat(values, sizes) for values in (first, sizes))
    return *(jnp.asarray(x, jnp.int32) for x in spread), jnp.asarray(members, jnp.int32)


@partial(jax.jit, static_argnums=5)
def _resample(figure, key, first, sizes, members, resamples: int) -> Array:
    def one(number):
        drawn = jax.random.uniform(jax.random.fold_in(key, number), first.shape)
        # Rounding may make the product the size itself.
        places = first + jnp.minimum((drawn * sizes).astype(jnp.int32), sizes - 1)
        return figure(jnp.zeros(len(first)).at[members[places]].add(1))

    return jax.lax.map(one, jnp.arange(resamples))


@partial(jax.jit, static_argnums=2)
def _flip(differences, key, resamples: int) -> Array:
    def one(number):
        signs = jax.random.rademacher(jax.random.fold_in(key, number), differences.shape)
        return (signs * differences).mean()

    return jax.lax.map(one, jnp.arange(resamples))


def _unanimous(figure: Figure, count: int, level: float) -> tuple[float, float] | None:
    """The interval of a share of images that is none or all of them, or of such over a figure."""
    if not isinstance(figure, Partial):
        return None
    if figure.func is _quotient:
        above, below = figure.args
        found = _unanimous(above, count, level)
        return found and tuple(limit / evaluate(below, count) for limit in found)
    if figure.func is not _ratio:
        return None
    above, below, scale = (np.asarray(x) for x in figure.args)
    none, all_ = not above.any(), np.array_equal(above, below)
    if not (none or all_) or not np.isin(below, (0, 1)).all():
        return None
    tail = ((1 - level) / 2) ** (1 / below.sum())
    return (0.0, float(scale * (1 - tail))) if none else (float(scale * tail), float(scale))


def _bca(drawn: np.ndarray, value: float, influences: np.ndarray, level: float):
    """The quantiles of the resamples at Efron's corrected levels."""
    # Half of the ties, so that a figure which cannot change is not called biased.
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    if not 0 < below < 1:
        # All resamples lie on one side: no finite correction, so their own quantiles.
        below = 0.5
    bias = stats.norm.ppf(below)
    centred = influences - influences.mean()
    spread = np.square(centred).sum()
    skew = (centred**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    ends = stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    levels = stats.norm.cdf(bias + (bias + ends) / (1 - skew * (bias + ends)))
    return (float(x) for x in np.quantile(drawn, levels))
