"""ImageNet-C's brightness, saturate, contrast, jpeg, pixelate, elastic, of one image in [0, 1].

Parameters are of the generator of the released set (see `corruption_noise`). Lengths in pixels are
for 224 pixels, and in proportion to the shorter side at other sizes.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsynth.ops.materialize import materialize
from jaxsynth.robustness.corruptions.filters import gaussian_blur, sample, size_ratio
from jaxsynth.robustness.corruptions.jpeg import jpeg

BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
# Factor and addend of the saturation.
SATURATION = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
QUALITY = (25, 18, 15, 10, 7)
PIXELS = (0.6, 0.5, 0.4, 0.3, 0.25)
# Strength, smoothness and jitter of the corners, in units of _ELASTIC_SIZE: the generator says that
# it should have been 224.
ELASTIC = (
    (2, 0.7, 0.1),
    (2, 0.08, 0.2),
    (0.05, 0.01, 0.02),
    (0.07, 0.01, 0.02),
    (0.12, 0.01, 0.02),
)
_ELASTIC_SIZE = 244


class Elastic(NamedTuple):
    """Uniform noise in [-1, 1]: of the three points as (x, y), and of each pixel down and right."""

    corners: Float[Array, "3 2"]
    right: Float[Array, "h w"]
    down: Float[Array, "h w"]


def brightness(image: Float[Array, "h w 3"], noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Adds to the value of HSV. Hue and saturation stay where the three channels stay in ratio."""
    value = image.max(-1, keepdims=True)
    brighter = jnp.clip(value + BRIGHTNESS[severity - 1], 0, 1)
    # Black has no ratio, and becomes grey.
    return jnp.where(value > 0, image * (brighter / jnp.where(value > 0, value, 1)), brighter)


def saturate(image: Float[Array, "h w 3"], noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Changes the saturation of HSV: how far the channels lie below the largest, in ratio."""
    factor, addend = SATURATION[severity - 1]
    value = image.max(-1, keepdims=True)
    below = value - image
    most = below.max(-1, keepdims=True)
    saturation = jnp.where(value > 0, most / jnp.where(value > 0, value, 1), 0)
    wanted = jnp.clip(saturation * factor + addend, 0, 1)
    # Grey has hue 0, red: green and blue are what an addend takes away.
    share = jnp.where(most > 0, below / jnp.where(most > 0, most, 1), np.float32([0, 1, 1]))
    return jnp.clip(value * (1 - wanted * share), 0, 1)


def contrast(image: Float[Array, "h w 3"], noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Draws each channel to its mean."""
    # One axis after the other: shorter sums round less.
    mean = image.mean(0).mean(0)
    return jnp.clip((image - mean) * CONTRAST[severity - 1] + mean, 0, 1)


def jpeg_compression(
    image: Float[Array, "h w 3"], noise: None, severity: int
) -> Float[Array, "h w 3"]:
    """JPEG as Pillow's, of low quality."""
    return jpeg(image, QUALITY[severity - 1])


def pixelate(image: Float[Array, "h w 3"], noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Made smaller and larger again with Pillow's box filter, in 8 bits."""
    image, full = jnp.round(image * 255), image.shape[:2]
    small = tuple(int(length * PIXELS[severity - 1]) for length in full)
    for before, after in ((full, small), (small, full)):
        image = image.reshape(before[0], -1)
        # Pillow rounds after each of the two directions, along the width first.
        places, weights = _box_places(before[1], after[1])
        places = (3 * places[..., None] + np.arange(3)).reshape(len(places), -1)
        terms = (
            image[:, place] * weight
            for place, weight in zip(places, weights.repeat(3, 1), strict=True)
        )
        image = materialize(jnp.floor(sum(terms) + 0.5))
        places, weights = _box_places(before[0], after[0])
        terms = (
            image[place] * weight[:, None] for place, weight in zip(places, weights, strict=True)
        )
        image = materialize(jnp.floor(sum(terms) + 0.5))
    return image.reshape(*full, 3) / 255


@lru_cache(maxsize=64)
def _box_places(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, weights), each (terms, after): output i is the sum of weights at these places.

    Means over the pixels whose middles lie within half an output pixel (or half a pixel).
    """
    scale = before / after
    middle = (np.arange(after) + 0.5) * scale
    reach = max(scale, 1) / 2
    # Each term's pixel, the first of which may lie just outside.
    places = np.floor(middle - reach).astype(int) + np.arange(int(2 * reach) + 2)[:, None]
    distance = (places + 0.5 - middle) / (2 * reach)
    near = (distance > -0.5) & (distance <= 0.5)
    near &= (places >= 0) & (places < before)
    used = near.any(1)
    weights = (near / near.sum(0)).astype(np.float32)
    return places[used].clip(0, before - 1), weights[used]


def draw_elastic_transform(key: Array, shape: tuple[int, ...]) -> Elastic:
    """Noise for the corners and for the two displacements."""
    keys = jax.random.split(key, 3)
    shapes = (3, 2), shape[:2], shape[:2]
    return Elastic(
        *(jax.random.uniform(one, size, minval=-1) for one, size in zip(keys, shapes, strict=True))
    )


def elastic_transform(
    image: Float[Array, "h w 3"], draws: Elastic, severity: int
) -> Float[Array, "h w 3"]:
    """A random affine map, then a smooth random displacement, both sampled linearly.

    The generator's warpAffine rounds where it samples to 1/32 pixel; this does not.
    """
    height, width = image.shape[:2]
    unit = _ELASTIC_SIZE * size_ratio(image.shape)
    strength, smooth, jitter = (unit * part for part in ELASTIC[severity - 1])
    rows, columns = (axis.astype(np.float32) for axis in np.indices((height, width)))
    y, x = _affine_source(rows, columns, jitter * draws.corners)
    image = materialize(sample(image, y, x, "mirror"))
    right, down = (
        strength * materialize(gaussian_blur(noise, smooth, truncate=3, mode="reflect"))
        for noise in (draws.right, draws.down)
    )
    return jnp.clip(sample(image, rows + down, columns + right, "reflect"), 0, 1)


def _affine_source(
    y: Float[np.ndarray, "h w"], x: Float[np.ndarray, "h w"], moves: Float[Array, "3 2"]
) -> tuple[Array, Array]:
    """Where (y, x) comes from, by the affine map that moves three points around the middle.

    With p the moved points, (x, y) is p1 + a (p0 - p1) + b (p2 - p1), and comes from the same of
    the points before, which form a right angle with sides of two thirds of the image.
    """
    height, width = y.shape
    middle = np.float32([width // 2, height // 2])
    side = min(height, width) // 3
    before = middle + np.float32([[side, side], [side, -side], [-side, -side]])
    after = before + moves
    (ax, ay), (bx, by) = after[0] - after[1], after[2] - after[1]
    area = ax * by - ay * bx
    right, down = x - after[1, 0], y - after[1, 1]
    of_a = (right * by - down * bx) / area
    of_b = (down * ax - right * ay) / area
    return before[1, 1] + 2 * side * of_a, before[1, 0] - 2 * side * of_b
