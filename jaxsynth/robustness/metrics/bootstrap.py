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

Where all images agree, as 0 of 21 are right, or nearly all, resamples say less than is unknown. The
interval then holds the limits that the number of images sets (`limits`): up to 16 % there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key
from scipy import special

from jaxsynth.core.words import counted
from jaxsynth.robustness.checks import check_key, check_whole
from jaxsynth.robustness.metrics.limits import (
    Limits,
    difference_limits,
    paired_limits,
    quotient_limits,
    share_limits,
    unseen_limits,
)

Weights = Float[Array, " n"]
Figure = Callable[[Weights], Float[Array, ""]]


class TooFewError(ValueError):
    """Most resamples of a figure give no number, or all the same."""


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


class Measured(NamedTuple):
    """A figure of `count` images; `groups` of them keep their sizes when it is resampled."""

    figure: Figure
    count: int
    groups: np.ndarray | None = None

    def interval(self, key: Key[Array, ""], *, resamples: int = 2000) -> Interval:
        """The figure with its interval (see `interval`)."""
        return interval(self.figure, self.count, key, groups=self.groups, resamples=resamples)


def mean(values: Float[Array, " n"], among: Float[Array, " n"] | None = None) -> Figure:
    """The mean of values, of those images that `among` marks with 1 if it is given."""
    among = jnp.ones(len(values)) if among is None else among
    _check_alike(values, among, "among")
    return Partial(_ratio, _floats(values) * _floats(among), _floats(among), jnp.float32(1))


def ratio(above: Float[Array, " n"], below: Float[Array, " n"], *, scale: float = 1.0) -> Figure:
    """Sum of one value of the images over the sum of another, times `scale`."""
    _check_alike(above, below, "below")
    return Partial(_ratio, _floats(above), _floats(below), jnp.float32(scale))


def _check_alike(values, others, name: str) -> None:
    """ValueError where there is not one number of each kind for every image."""
    if np.shape(values) != np.shape(others):
        raise ValueError(
            f"{name}: expected shape {np.shape(values)}, one an image, found {np.shape(others)}"
        )


def quotient(above: Figure, below: Figure) -> Figure:
    """One figure over another."""
    return Partial(_quotient, above, below)


def difference(one: Figure, other: Figure) -> Figure:
    """One figure less another."""
    return Partial(_difference, one, other)


def bounded(figure: Figure, limits: Partial) -> Figure:
    """A figure of another kind, with the limits that `limits(level)` gives for it."""
    return Partial(_bounded, _as_partial(figure), limits)


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
    """The figure of `count` images and its BCa interval, never of no width.

    `figure` is a `Partial` (as this module's are) or a function; with arrays as a Partial's
    arguments one program serves all figures of a kind. `groups` (n,) numbers the groups whose sizes
    each resample keeps. ValueError where the figure itself is no number, `TooFewError` where most
    resamples give none, or all the same one and nothing else is known of the figure.
    """
    check_key(key, single=True)
    check_whole(count, "count", 1)
    check_whole(resamples, "resamples", 100)
    if not 0 < level < 1:
        raise ValueError(f"level: expected between 0 and 1, found {level}")
    figure = _as_partial(figure)
    first, sizes, members = _layout(count, groups)
    try:
        value, influences = _value_and_influences(jnp.ones(count), figure)
    except TypeError as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"figure: it is none of {counted(count, 'image')} ({why})") from error
    value = float(value)
    if not np.isfinite(value):
        raise ValueError(
            f"interval: the figure of all {counted(count, 'image')} is {value}, not a number"
        )
    drawn = np.asarray(_resample(figure, key, first, sizes, members, resamples), np.float64)
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < resamples / 2:
        raise TooFewError(
            f"interval: {resamples - len(defined)} of {resamples} resamples give no number: too "
            "few images count"
        )
    low, high = _bca(defined, value, np.asarray(influences, np.float64), level)
    limits = _limits(figure, count, level)
    # Rounding alone makes resamples of one value differ by as much.
    alike = high - low <= 1e-6 * max(1.0, abs(value))
    if limits is not None and (limits.few or alike):
        low, high = min(low, limits.low), max(high, limits.high)
    elif alike:
        raise TooFewError(f"interval: all resamples give {value:g}: nothing tells how it varies")
    if not np.isfinite(high):
        raise TooFewError("interval: too few images count: the divisor may be 0")
    low, high = min(low, value), max(high, value)
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


def _as_partial(figure: Figure) -> Partial:
    return figure if isinstance(figure, Partial) else Partial(figure)


def _floats(values) -> Array:
    return jnp.asarray(values, jnp.float32)


def weighted_sum(values: Float[Array, "*k n"], weights: Weights) -> Float[Array, "*k"]:
    """Sum over the images, in float32 on every chip: TPUs round products to 8 bits by default."""
    return jnp.matmul(values, weights, precision="highest")


def _ratio(above: Array, below: Array, scale, weights: Weights) -> Array:
    return scale * weighted_sum(above, weights) / weighted_sum(below, weights)


def _bounded(figure: Figure, limits: Partial, weights: Weights) -> Array:
    return figure(weights)


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


def _limits(figure: Figure, count: int, level: float) -> Limits | None:
    """What the images' number says of a figure made of means by this module; None for others."""
    if not isinstance(figure, Partial):
        return None
    if figure.func is _bounded:
        return figure.args[1](level)
    if figure.func is _ratio:
        return _ratio_limits(figure, level)
    if figure.func not in (_quotient, _difference):
        return None
    parts = figure.args
    if figure.func is _difference and (paired := _paired_limits(*parts, level)):
        return paired
    limits = [_limits(part, count, level) for part in parts]
    if None in limits:
        return None
    of_both = quotient_limits if figure.func is _quotient else difference_limits
    return of_both(*(evaluate(part, count) for part in parts), *limits)


def _ratio_limits(figure: Partial, level: float) -> Limits | None:
    above, below, scale = (np.asarray(x, np.float64) for x in figure.args)
    if not np.isin(below, (0, 1)).all() or above.min() < 0 or above.max() > 1:
        return None
    if (above <= below).all():
        found = share_limits(above.sum(), below.sum(), level)
    else:
        found = unseen_limits(above.sum(), below.sum(), len(below), level)
    return found._replace(low=float(scale * found.low), high=float(scale * found.high))


def _paired_limits(one: Figure, other: Figure, level: float) -> Limits | None:
    """Of two means over the same images."""
    if not all(isinstance(x, Partial) and x.func is _ratio for x in (one, other)):
        return None
    first, below, scale = (np.asarray(x, np.float64) for x in one.args)
    second, other_below, other_scale = (np.asarray(x, np.float64) for x in other.args)
    if not (np.array_equal(below, other_below) and scale == other_scale):
        return None
    if any((x < 0).any() or (x > below).any() for x in (first, second)):
        return None
    change = first - second
    more, fewer = np.maximum(change, 0).sum(), np.maximum(-change, 0).sum()
    found = paired_limits(float(more), float(fewer), float(below.sum()), level)
    return found._replace(low=float(scale * found.low), high=float(scale * found.high))


def _bca(drawn: np.ndarray, value: float, influences: np.ndarray, level: float):
    """The quantiles of the resamples at Efron's corrected levels."""
    # Half of the ties, so that a figure which cannot change is not called biased.
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    if not 0 < below < 1:
        # All resamples lie on one side: no finite correction, so their own quantiles.
        below = 0.5
    bias = special.ndtri(below)
    centred = influences - influences.mean()
    spread = np.square(centred).sum()
    skew = (centred**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    ends = special.ndtri([(1 - level) / 2, (1 + level) / 2])
    levels = special.ndtr(bias + (bias + ends) / (1 - skew * (bias + ends)))
    return (float(x) for x in np.quantile(drawn, levels))
