"""The error of a denoiser on held-out images, at fixed times and noises."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise

# What the denoiser is told about some rows, by the names of its arguments.
Inputs = Callable[[Int[np.ndarray, " b"]], Mapping[str, np.ndarray]]


def held_out_error(
    model: nnx.Module,
    schedule: NoiseSchedule,
    x0: Float[np.ndarray, "n h w c"],
    inputs: Inputs,
    *,
    seed: int,
    repeats: int = 8,
    batch_size: int = 64,
) -> float:
    """Mean squared error of a denoiser's prediction at `repeats` (time, noise) pairs an image.

    The denoiser is called `model(x_t, t, **inputs(rows))`; where it predicts a variance too, that
    is left out.

    Times are spread evenly over the schedule and every image gets others; the pairs depend on
    `seed`, `repeats` and the number of images only, so figures of different models on one data set
    compare pair by pair. All batches have `batch_size` rows, so that one program serves.
    """
    rng = np.random.default_rng(seed)
    count, total = len(x0), schedule.num_train_timesteps
    strata = (np.arange(repeats)[None] + rng.random((count, repeats))) / repeats
    t = np.minimum((strata * total).astype(np.int32), total - 1).reshape(-1)
    rows = np.repeat(np.arange(count), repeats)
    graphdef, state = nnx.split(model)
    found = 0.0
    for start in range(0, len(rows), batch_size):
        size = min(batch_size, len(rows) - start)
        # Drawn part by part: the generator gives the same numbers as all at once.
        noise = rng.standard_normal((size, *x0.shape[1:]), np.float32)
        filled = np.resize(np.arange(size), batch_size)
        chosen = rows[start + filled]
        given = dict(inputs(chosen))
        values = _errors(
            graphdef, state, schedule, x0[chosen], noise[filled], t[start + filled], given
        )
        found += float(np.asarray(values, np.float64)[:size].sum())
    return found / len(rows)


@partial(jax.jit, static_argnums=0)
def _errors(
    graphdef: Any,
    state: nnx.State,
    schedule: NoiseSchedule,
    x0: Array,
    noise: Array,
    t: Array,
    inputs: dict[str, Array],
) -> Float[Array, " b"]:
    output = nnx.merge(graphdef, state)(add_noise(schedule, x0, noise, t), t, **inputs)
    output = output[..., : x0.shape[-1]]
    return diffusion_loss(schedule, output, x0, noise, t, per_sample=True)
