"""The random inputs of one training step: latents of their posterior, noise and timesteps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxsynth.diffusion.schedules import NoiseSchedule


def drawn_crops(values: Shaped[Array, "b k ..."], key: Key[Array, ""]) -> Shaped[Array, "b ..."]:
    """Of each example's k crops the one that `sample_noise` with this key takes."""
    count, crops = values.shape[:2]
    crop = jax.random.randint(jax.random.fold_in(key, 3), (count,), 0, crops)
    return jnp.take_along_axis(values, crop.reshape(-1, *(1,) * (values.ndim - 1)), axis=1)[:, 0]


def sample_noise(
    mean: Float[Array, "b k *f h w c"],
    std: Float[Array, "b k *f h w c"],
    key: Key[Array, ""],
    schedule: NoiseSchedule,
    *,
    offset: float = 0.0,
) -> tuple[Float[Array, "b *f h w c"], Float[Array, "b *f h w c"], Int[Array, " b"]]:
    """Of each example a latent x0 of one of its k crops, its noise and its timestep.

    Examples may be clips of f frames, which have one timestep and each a noise of its own.

    `offset` adds noise that is one number for each channel, so that a network learns to change the
    mean of an image, which noise of single elements hardly does (offset noise; 0.1 is usual).
    """
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    count = len(mean)
    mean, std = (drawn_crops(values, key) for values in (mean, std))
    x0 = mean + std * jax.random.normal(keys[0], mean.shape)
    noise = jax.random.normal(keys[1], x0.shape)
    if offset:
        shape = (*x0.shape[:-3], 1, 1, x0.shape[-1])
        channels = jax.random.normal(jax.random.fold_in(key, 5), shape)
        noise = noise + offset * channels
    t = jax.random.randint(keys[2], (count,), 0, schedule.num_train_timesteps)
    return x0, noise, t
