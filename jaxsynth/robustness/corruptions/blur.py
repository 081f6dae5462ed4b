"""ImageNet-C's blurs: gaussian, defocus, glass, motion and zoom, of one image in [0, 1].

Parameters are of the generator of the released set (see `corruption_noise`). Lengths in pixels are
for 224 pixels, and in proportion to the shorter side at other sizes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.ops.materialize import materialize
from jaxsynth.robustness.corruptions.filters import (
    blur_along,
    clipped_zoom,
    correlate,
    filter_matrix,
    gaussian_blur,
    gaussian_taps,
    size_ratio,
)

GAUSSIAN_SIGMAS = (1, 2, 3, 4, 6)
# Radius of the disk, sigma of its own blur.
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
# Sigma, farthest move, passes.
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
# Radius, sigma; at an angle of -45 to 45 degrees.
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
# np.arange's end and step: rounding lets the first include its end, 1.11.
ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))


def blur(image: Float[Array, "h w 3"], noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Gaussian blur, cut off at 4 sigma, the edge repeated."""
    sigma = GAUSSIAN_SIGMAS[severity - 1] * size_ratio(image.shape)
    return jnp.clip(gaussian_blur(image, sigma), 0, 1)


def defocus_blur(image: Float[Array, "h w 3"], noise: None, severity: int) -> Float[Array, "h w 3"]:
    """A disk for a kernel, itself blurred a little."""
    kernel = defocus_kernel(severity, size_ratio(image.shape))
    return jnp.clip(correlate(image, kernel, "mirror"), 0, 1)


def defocus_kernel(severity: int, ratio: float) -> Float[np.ndarray, "side side"]:
    """The disk of a severity for images of 224 `ratio` pixels.

    Radii up to 8 lie on a grid of -8 to 8 and are blurred by 3 x 3 pixels, larger ones on their own
    grid and by 5 x 5.
    """
    radius, sigma = DEFOCUS[severity - 1]
    small = radius <= 8
    reach = int(np.ceil((8 if small else radius) * ratio))
    distance = np.arange(-reach, reach + 1)
    disk = np.add.outer(distance**2, distance**2) <= (radius * ratio) ** 2
    blurred = filter_matrix(len(distance), gaussian_taps(sigma, 1 if small else 2), "mirror")
    return (blurred @ (disk / disk.sum()) @ blurred.T).astype(np.float32)


def draw_glass_blur(key: Array, shape: tuple[int, ...]) -> Float[Array, "passes h w"]:
    """Uniform noise in [0, 1): where the pixels of as many passes as there are take their colour.

    Those near the edge have some too, and do not move.
    """
    return jax.random.uniform(key, (max(passes for *_, passes in GLASS), *shape[:2]))


def glass_blur(
    image: Float[Array, "h w 3"], noise: Float[Array, "passes h w"], severity: int
) -> Float[Array, "h w 3"]:
    """Blurred, cut to 8 bits, pixels moved about, blurred again.

    A pass goes through the pixels from the bottom right and puts another's colour, up to `far`
    away, into each. The generator means to swap the two, yet assigns one NumPy view to the other,
    which leaves the other as it was: the released set has copies, and so has this.

    Copies chain, as a pixel may take what was put into another before. Each pixel points to where
    it took its colour; pointers are doubled until all have reached a pixel that was still as in
    the image. So a pass of 50,000 steps one by one is about five over the whole image.
    """
    sigma, far, passes = _glass(image.shape, severity)
    height, width = image.shape[:2]
    # An area of one colour keeps it: its sum may round to just below.
    pixels = materialize(jnp.floor(gaussian_blur(image, sigma) * 255 + 1e-3)).reshape(-1, 3)
    rows, columns = np.indices((height, width), np.int32)

    def inside(row: Array, column: Array) -> Array:
        # The generator's ranges, from size - far down to far + 1.
        within = (row > far) & (row <= height - far)
        return within & (column > far) & (column <= width - far)

    movable = inside(rows, columns)
    # Two whole numbers from -far to far - 1 in one.
    moves = jnp.floor(noise * (2 * far) ** 2).astype(jnp.int32)
    taken = None
    for number in range(passes):
        pair = moves[number]
        right, down = (jnp.where(movable, move - far, 0) for move in divmod(pair, 2 * far))
        offset = down * width + right
        taken_before = inside(rows + down, columns + right) & (offset > 0)
        source = (rows * width + columns + offset).ravel()
        last = _chase(materialize(jnp.where(taken_before.ravel(), source, ~source)))
        taken = last if taken is None else _read(taken, last)
    again = gaussian_blur(materialize(_read(pixels, taken)).reshape(image.shape) / 255, sigma)
    return jnp.clip(again, 0, 1)


def _glass(shape: tuple[int, ...], severity: int) -> tuple[float, int, int]:
    sigma, far, passes = GLASS[severity - 1]
    ratio = size_ratio(shape)
    return sigma * ratio, max(1, round(far * ratio)), passes


def _chase(source: Int[Array, " n"]) -> Int[Array, " n"]:
    """Where each chain of pointers ends: at one that is given as ~place, and so is negative."""

    def follow(source):
        return jnp.where(source < 0, source, _read(source, source))

    return ~jax.lax.while_loop(lambda source: (source >= 0).any(), follow, source)


def _read(values: Array, places: Int[Array, " n"]) -> Array:
    """values[places], without asking whether a place is one."""
    return values.at[places].get(mode="clip", wrap_negative_indices=False)


def draw_motion_blur(key: Array, shape: tuple[int, ...]) -> Float[Array, ""]:
    """An angle in degrees."""
    return jax.random.uniform(key, minval=-45, maxval=45)


def motion_blur(
    image: Float[Array, "h w 3"], angle: Float[Array, ""], severity: int
) -> Float[Array, "h w 3"]:
    """ImageMagick's motion blur, the edge repeated; not rounded to 8 bits."""
    ratio = size_ratio(image.shape)
    radius, sigma = MOTION[severity - 1]
    return jnp.clip(blur_along(image, angle, radius * ratio, sigma * ratio), 0, 1)


def zoom_blur(image: Float[Array, "h w 3"], noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Mean of the image and of its zooms, of which the first is the image again."""
    factors = np.arange(1, *ZOOM[severity - 1])
    total = 2 * image
    for factor in factors[1:]:
        total = total + clipped_zoom(image, float(factor))
    return jnp.clip(total / (len(factors) + 1), 0, 1)
