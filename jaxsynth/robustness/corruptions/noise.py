"""ImageNet-C's noises: gaussian, shot, impulse and speckle, of one image in [0, 1].

Each corruption of this room is a pair: `draw_...(key, shape)` makes the randomness, the same for
every severity, and the function of the corruption's name applies it. Severities 1 to 5 index the
rows of parameters. Those are of the generator of the released set (Hendrycks and Dietterich 2019,
arXiv 1903.12261; make_imagenet_c.py in hendrycks/robustness). Noise does not scale with the size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

GAUSSIAN_SCALES = (0.08, 0.12, 0.18, 0.26, 0.38)
SHOT_PHOTONS = (60, 25, 12, 5, 3)
IMPULSE_SHARES = (0.03, 0.06, 0.09, 0.17, 0.27)
SPECKLE_SCALES = (0.15, 0.2, 0.35, 0.45, 0.6)


def draw_normal(key: Array, shape: tuple[int, ...]) -> Float[Array, "h w 3"]:
    """Standard normal noise of the image's shape."""
    return jax.random.normal(key, shape)


def draw_uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, "h w 3"]:
    """Uniform noise in [0, 1) of the image's shape."""
    return jax.random.uniform(key, shape)


def gaussian_noise(
    image: Float[Array, "h w 3"], noise: Float[Array, "h w 3"], severity: int
) -> Float[Array, "h w 3"]:
    """Adds normal noise."""
    return jnp.clip(image + GAUSSIAN_SCALES[severity - 1] * noise, 0, 1)


def speckle_noise(
    image: Float[Array, "h w 3"], noise: Float[Array, "h w 3"], severity: int
) -> Float[Array, "h w 3"]:
    """Adds normal noise in proportion to the pixel."""
    return jnp.clip(image + image * SPECKLE_SCALES[severity - 1] * noise, 0, 1)


def impulse_noise(
    image: Float[Array, "h w 3"], noise: Float[Array, "h w 3"], severity: int
) -> Float[Array, "h w 3"]:
    """Salt and pepper, each channel by itself, half of each."""
    share = IMPULSE_SHARES[severity - 1]
    return jnp.where(noise < share / 2, 0, jnp.where(noise < share, 1, image))


def shot_noise(
    image: Float[Array, "h w 3"], noise: Float[Array, "h w 3"], severity: int
) -> Float[Array, "h w 3"]:
    """A Poisson number of photons."""
    return photons(image, noise, SHOT_PHOTONS[severity - 1])


def photons(
    image: Float[Array, "h w 3"], noise: Float[Array, "h w 3"], most: int
) -> Float[Array, "h w 3"]:
    """Poisson(`most` x) / `most`, in [0, 1], where white is `most` photons.

    The count is the distribution's quantile at uniform `noise`: the number of counts whose
    cumulative probability lies below it. One pass over the counts, no rejection, so every pixel
    costs the same and any library's quantile function gives the same picture. More than `most`
    photons are white too, so counts end there. `most` x is to stay below 87: exp(-87) underflows.
    """
    rate = most * image

    def count(number, state):
        mass, below, found = state
        found = found + (noise > below)
        mass = mass * rate / (number + 1)
        return mass, below + mass, found

    start = jnp.exp(-rate), jnp.exp(-rate), jnp.zeros_like(image)
    found = jax.lax.fori_loop(0, most, count, start, unroll=min(most, 12))[2]
    return found / np.float32(most)
