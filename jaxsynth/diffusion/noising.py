"""The random inputs of one training step: latents of their posterior, noise and timesteps."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxsynth.diffusion.schedules import NoiseSchedule


def sample_noise(
    mean: Float[Array, "b k h w c"],
    std: Float[Array, "b k h w c"],
    key: Key[Array, ""],
    schedule: NoiseSchedule,
    *,
    offset: float = 0.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Int[Array, " b"]]:
    """Of each example a latent x0 of one of its k crops, its noise and its timestep.

    `offset` adds noise that is one number for each channel, so that a network learns to change the
    mean of an image, which noise of single elements hardly does (offset noise; 0.1 is usual).
    """
    keys = [jax.random.fold_in(key, i) for i in range(4)]
    count, crops = mean.shape[:2]
    crop = jax.random.randint(keys[3], (count,), 0, crops)
    pick = partial(jnp.take_along_axis, indices=crop[:, None, None, None, None], axis=1)
    mean, std = pick(mean)[:, 0], pick(std)[:, 0]
    x0 = mean + std * jax.random.normal(keys[0], mean.shape)
    noise = jax.random.normal(keys[1], x0.shape)
    if offset:
        channels = jax.random.normal(jax.random.fold_in(key, 5), (count, 1, 1, x0.shape[-1]))
        noise = noise + offset * channels
    t = jax.random.randint(keys[2], (count,), 0, schedule.num_train_timesteps)
    return x0, noise, t
