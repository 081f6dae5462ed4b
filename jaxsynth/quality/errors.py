"""The error of a denoiser on held-out images, at fixed times and noises."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float, Int


def mean_error(
    errors: Callable[
        [Int[np.ndarray, " b"], Float[np.ndarray, "b h w c"], Int[np.ndarray, " b"]],
        Float[Array, " b"],
    ],
    count: int,
    shape: tuple[int, ...],
    total: int,
    *,
    seed: int,
    repeats: int,
    batch_size: int,
) -> float:
    """The mean of `errors(rows, noise, t)` over `repeats` (time, noise) pairs for each of `count`
    images of `shape`.

    Times are spread evenly below `total` and every image gets others; the pairs depend on `seed`,
    `repeats` and the number of images only, so figures of different models on one data set compare
    pair by pair. All batches have `batch_size` rows, so that one program serves.
    """
    rng = np.random.default_rng(seed)
    strata = (np.arange(repeats)[None] + rng.random((count, repeats))) / repeats
    t = np.minimum((strata * total).astype(np.int32), total - 1).reshape(-1)
    rows = np.repeat(np.arange(count), repeats)
    found = 0.0
    for start in range(0, len(rows), batch_size):
        size = min(batch_size, len(rows) - start)
        # Drawn part by part: the generator gives the same numbers as all at once.
        noise = rng.standard_normal((size, *shape), np.float32)
        filled = np.resize(np.arange(size), batch_size)
        part = start + filled
        values = errors(rows[part], noise[filled], t[part])
        found += float(np.asarray(values, np.float64)[:size].sum())
    return found / len(rows)
