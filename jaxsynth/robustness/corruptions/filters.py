"""Filters and resampling of one image, with the edge rules of the libraries ImageNet-C was made by.

What is known before the pixels are, a Gaussian's taps or where a zoom samples, is made by NumPy
once and becomes constants of the program. A separable filter is a sum of shifted images, or two
products with its band matrix where there are many taps; a motion blur is such a sum along its line;
any other filter goes through the Fourier transform.

Shifts are of (h, w c) and not of (h, w, c): a CPU's vector units want a long last axis.

Edge rules, in SciPy's names: "nearest" repeats the edge pixel (aaa|abcd), "reflect" mirrors between
pixels (cba|abcd), "mirror" on the edge pixel (dcb|abcd), which OpenCV calls reflect-101.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.fft import next_fast_len

from jaxsynth.ops.materialize import materialize

# The size whose parameters are published; others get them in proportion.
REFERENCE_SIZE = 224
# Of so many taps and more, products with the dense matrix are faster than shifts.
_MOST_SHIFTS = 96


def size_ratio(shape: tuple[int, ...]) -> float:
    """The shorter side of (h, w, ...) in units of 224 pixels: lengths in pixels scale so."""
    return min(shape[:2]) / REFERENCE_SIZE


def fold_index(index: Any, length: int, mode: str) -> Any:
    """Where an index outside of 0 to `length` - 1 reads, for NumPy's and JAX's integers alike."""
    if mode == "nearest":
        return index.clip(0, length - 1)
    if mode == "reflect":
        return (2 * length - 1 - abs(2 * (index % (2 * length)) - (2 * length - 1))) // 2
    last = max(length - 1, 1)
    return last - abs(index % (2 * last) - last)


def gaussian_taps(sigma: float, radius: int) -> Float[np.ndarray, " taps"]:
    """Weights at -`radius` to `radius`, of sum 1."""
    distance = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * np.square(distance / sigma))
    return taps / taps.sum()


@lru_cache(maxsize=64)
def gaussian_matrix(
    length: int, sigma: float, truncate: float = 4, mode: str = "nearest"
) -> Float[np.ndarray, "length length"]:
    """The matrix of scipy.ndimage's Gaussian filter along an axis of `length`."""
    return filter_matrix(length, gaussian_taps(sigma, int(truncate * sigma + 0.5)), mode)


def filter_matrix(
    length: int, taps: Float[np.ndarray, " taps"], mode: str
) -> Float[np.ndarray, "length length"]:
    """The matrix that correlates an axis of `length` with an odd number of taps."""
    matrix = np.zeros((length, length))
    rows = np.arange(length)
    for place, weight in enumerate(taps, -(len(taps) // 2)):
        np.add.at(matrix, (rows, fold_index(rows + place, length, mode)), weight)
    return matrix.astype(np.float32)


def along_height(matrix: Float[Array, "a h"], image: Float[Array, "h ..."]) -> Array:
    """A matrix applied to each column."""
    return jnp.einsum("ah,h...->a...", matrix, image, precision="highest")


def along_width(matrix: Float[Array, "b w"], image: Float[Array, "h w ..."]) -> Array:
    """A matrix applied to each row."""
    return jnp.einsum("bw,hw...->hb...", matrix, image, precision="highest")


def gaussian_blur(
    image: Float[Array, "h w ..."], sigma: float, *, truncate: float = 4, mode: str = "nearest"
) -> Float[Array, "h w ..."]:
    """Gaussian blur of `sigma` pixels, cut off at `truncate` sigma."""
    height, width = image.shape[:2]
    rows, columns = (gaussian_matrix(length, sigma, truncate, mode) for length in (height, width))
    radius = int(truncate * sigma + 0.5)
    if not 1 <= radius <= min(_MOST_SHIFTS, height, width) // 2:
        return along_width(columns, along_height(rows, image))
    taps = gaussian_taps(sigma, radius).astype(np.float32)
    flat = image.reshape(height, -1)
    # To the right a pixel's neighbour is as many places away as it has channels.
    channels = flat.shape[1] // width
    blurred = materialize(_shifted_sum(taps, rows, flat, axis=0, step=1))
    return _shifted_sum(taps, columns, blurred, axis=1, step=channels).reshape(image.shape)


def _shifted_sum(
    taps: Float[np.ndarray, " taps"],
    matrix: Float[np.ndarray, "n n"],
    image: Float[Array, "h k"],
    *,
    axis: int,
    step: int,
) -> Float[Array, "h k"]:
    """The product with the taps' band matrix along an axis, for neighbours `step` places apart.

    Rows of the matrix differ near its ends only: those few are products, the rest a sum of slices.
    """
    radius, length = len(taps) // 2, image.shape[axis] // step

    def part(start: int, stop: int) -> Array:
        return jax.lax.slice_in_dim(image, start * step, stop * step, axis=axis)

    inner = length - 2 * radius
    middle = sum(tap * part(place, place + inner) for place, tap in enumerate(taps))
    own = np.eye(step, dtype=np.float32)
    first = np.kron(matrix[:radius, : 2 * radius], own)
    last = np.kron(matrix[-radius:, -2 * radius :], own)
    product = along_height if axis == 0 else along_width
    before, after = product(first, part(0, 2 * radius)), product(last, part(inner, length))
    return jnp.concatenate([before, middle, after], axis)


def mean_filter(layer: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Sum over 3 x 3 squares, mirrored at the edge, divided by 9.

    Summed before it is divided: sums of whole numbers stay exact.
    """
    around = jnp.pad(layer, 1, mode="reflect")
    rows = around[:-2] + around[1:-1] + around[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def correlate(
    image: Float[Array, "h w ..."], kernel: Float[np.ndarray, "k k"], mode: str
) -> Float[Array, "h w ..."]:
    """The image correlated with a square kernel of odd side, by the Fourier transform."""
    reach = kernel.shape[0] // 2
    height, width = image.shape[:2]
    beyond = (np.arange(-reach, length + reach) for length in (height, width))
    rows, columns = (
        fold_index(index, length, mode)
        for index, length in zip(beyond, (height, width), strict=True)
    )
    image = image[rows][:, columns]
    size = tuple(next_fast_len(length, real=True) for length in image.shape[:2])
    spectrum = jnp.fft.rfft2(image, size, axes=(0, 1))
    # The transform's product convolves: a correlation is that with the kernel turned around.
    other = np.fft.rfft2(kernel[::-1, ::-1], size, axes=(0, 1)).astype(np.complex64)
    other = other.reshape(*other.shape, *(1,) * (image.ndim - 2))
    full = jnp.fft.irfft2(spectrum * other, size, axes=(0, 1))
    return full[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def blur_along(
    image: Float[Array, "h w ..."], angle: Float[Array, ""], radius: float, sigma: float
) -> Float[Array, "h w ..."]:
    """ImageMagick's MotionBlur: half a Gaussian from the pixel on along `angle` (degrees).

    Weights exp(-i^2 / 2 sigma^2) at i = 0 to 2 ceil(radius), each at the nearest whole pixel (read
    in ImageMagick's `MotionBlurImage`, by its Go port KarpelesLab/mblur). The edge is repeated.
    """
    reach = 2 * int(np.ceil(radius))
    steps = np.arange(reach + 1)
    weights = np.exp(-0.5 * np.square(steps / sigma))
    weights = (weights / weights.sum()).astype(np.float32)
    turn = jnp.deg2rad(angle)
    right, down = (
        jnp.ceil(steps * part - 0.5).astype(jnp.int32) for part in (jnp.cos(turn), jnp.sin(turn))
    )
    height, width = image.shape[:2]
    around = _repeat_edge(image, reach)
    channels = around.shape[1] // (width + 2 * reach)
    shape = height, width * channels
    blurred = sum(
        weight * jax.lax.dynamic_slice(around, (reach + y, (reach + x) * channels), shape)
        for weight, y, x in zip(weights, down, right, strict=True)
    )
    return blurred.reshape(image.shape)


def _repeat_edge(image: Float[Array, "h w ..."], reach: int) -> Float[Array, "a b"]:
    """(h + 2 reach, (w + 2 reach) c)."""
    edges = ((reach, reach), (reach, reach), *((0, 0) for _ in image.shape[2:]))
    around = jnp.pad(image, edges, mode="edge")
    return around.reshape(len(around), -1)


def zoom_places(
    length: int, factor: float
) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, " length"]]:
    """(low, high, share): where an axis samples when its middle is enlarged `factor` times.

    The generator's `clipped_zoom`: ceil(length / factor) pixels from the middle, enlarged linearly
    with the ends kept (scipy.ndimage.zoom), the middle of that.
    """
    crop = int(np.ceil(length / factor))
    start, enlarged = (length - crop) // 2, round(crop * factor)
    trim = (enlarged - length) // 2
    places = (np.arange(length) + trim) * ((crop - 1) / max(enlarged - 1, 1))
    low = np.minimum(np.floor(places).astype(np.int32), crop - 1)
    high = np.minimum(low + 1, crop - 1)
    return start + low, start + high, (places - low).astype(np.float32)


def clipped_zoom(image: Float[Array, "h w ..."], factor: float) -> Float[Array, "h w ..."]:
    """The image's middle enlarged `factor` times, at the same size."""
    low, high, share = zoom_places(image.shape[0], factor)
    share = share.reshape(-1, *(1,) * (image.ndim - 1))
    image = image[low] * (1 - share) + image[high] * share
    low, high, share = zoom_places(image.shape[1], factor)
    share = share.reshape(-1, *(1,) * (image.ndim - 2))
    return image[:, low] * (1 - share) + image[:, high] * share


def sample(
    image: Float[Array, "h w c"], y: Float[Array, "a b"], x: Float[Array, "a b"], mode: str
) -> Float[Array, "a b c"]:
    """The image between its pixels, linearly, at (y, x) in pixels from the first one's middle."""
    height, width, channels = image.shape
    flat = image.reshape(height * width, channels)
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    rows = [fold_index(top.astype(jnp.int32) + step, height, mode) * width for step in (0, 1)]
    columns = [fold_index(left.astype(jnp.int32) + step, width, mode) for step in (0, 1)]
    upper = flat[rows[0] + columns[0]] * (1 - right) + flat[rows[0] + columns[1]] * right
    lower = flat[rows[1] + columns[0]] * (1 - right) + flat[rows[1] + columns[1]] * right
    return upper * (1 - down) + lower * down


def draw_plasma(key: Array, shape: tuple[int, ...]) -> Float[Array, " points"]:
    """Uniform noise in [-1, 1] for a `plasma` of a power of two not below `shape`'s sides."""
    side = 1 << (max(shape[:2]) - 1).bit_length()
    return jax.random.uniform(key, (side * side - 1,), minval=-1)


def plasma(noise: Float[Array, " points"], decay: float) -> Float[Array, "side side"]:
    """A cloud in [0, 1] by diamond-square on a torus.

    Each level puts a point into the middle of each square, then of each diamond: the mean of four
    neighbours, plus wobble^2 times the `noise`, where the wobble starts at 100 and is divided by
    `decay` after each level. The noise is that of the coarsest level's squares, of its diamonds on
    top, of those at the left, and so on.
    """
    grid, wobble, used = jnp.zeros((1, 1), jnp.float32), 100.0, 0
    while used < len(noise):
        noisy, count = wobble**2, 3 * grid.size
        squares, right, below = noise[used : used + count].reshape(3, *grid.shape)
        used += count
        pairs = grid + jnp.roll(grid, -1, 0)
        middle = (pairs + jnp.roll(pairs, -1, 1)) / 4 + noisy * squares
        on_top = (middle + jnp.roll(middle, 1, 0) + grid + jnp.roll(grid, -1, 1)) / 4
        at_left = (middle + jnp.roll(middle, 1, 1) + grid + jnp.roll(grid, -1, 0)) / 4
        even = jnp.stack([grid, on_top + noisy * right], -1).reshape(len(grid), -1)
        odd = jnp.stack([at_left + noisy * below, middle], -1).reshape(len(grid), -1)
        grid = jnp.stack([even, odd], 1).reshape(2 * len(grid), -1)
        wobble /= decay
    grid = grid - grid.min()
    return grid / grid.max()
