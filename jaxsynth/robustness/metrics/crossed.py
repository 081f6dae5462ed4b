"""Intervals of figures that were measured for several seeds on the same images.

Trainings with other seeds differ, and so do images: both are samples. With d (s, n) the value of
seed i on image j, such as whether one classifier was right there less whether another was, the mean
of d is resampled as its mean plus the change that other seeds and the change that other images
bring, each drawn on its own (after Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1,
2007). What seed and image share is counted twice: intervals are rather too wide than too narrow.

Seeds are few. Deviations of k of them from their mean are too small by sqrt((k - 1) / k), and few
tell a spread badly, so theirs are widened by that and by the ratio of Student's quantile to the
normal one. Of one seed only the images tell how sure a figure is.
"""

import numpy as np
from jaxtyping import Float
from scipy import special

from jaxsynth.robustness.metrics.bootstrap import Interval


def crossed_interval(
    values: Float[np.ndarray, "s n"], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The mean of `values` over seeds and images, with its interval.

    Raises:
        ValueError: no values, or some that are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"crossed_interval: {values.shape}, expected finite values (s, n)")
    seeds, images = values.shape
    rng, mean = np.random.default_rng(seed), values.mean()
    counts = rng.multinomial(images, np.full(images, 1 / images), resamples)
    drawn = counts @ (values.mean(0) - mean) / images
    if seeds > 1:
        apart = (values.mean(1) - mean) * np.sqrt(seeds / (seeds - 1))
        top = (1 + level) / 2
        apart = apart * special.stdtrit(seeds - 1, top) / special.ndtri(top)
        drawn = drawn + rng.choice(apart, (resamples, seeds)).mean(1)
    low, high = np.quantile(mean + drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        value=float(mean),
        low=float(min(low, mean)),
        high=float(max(high, mean)),
        level=level,
        error=float(drawn.std(ddof=1)),
        count=images,
        resamples=resamples,
    )
