"""Resampling as a matrix over one axis, as PIL and as torch do it.

An image is resized by one product with such a matrix for its rows and one for its columns, which is
differentiable, runs on device, and folds the crop in (its rows are those kept). PIL (and torch with
antialias) widens the filter where it shrinks; torch without antialias keeps four taps and has its
own cubic (a = -0.75 instead of -0.5), as positions of vision transformers are resized.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float

Filter = Literal["bilinear", "bicubic", "lanczos"]
# Where a central crop begins if it cannot be central: transformers rounds half a pixel down, and
# torchvision (and timm with it) to the even number.
CropRounding = Literal["floor", "round"]
CROP_ROUNDINGS: tuple[CropRounding, ...] = ("floor", "round")

_CUBIC, _TORCH_CUBIC = -0.5, -0.75


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (lambda x: _cubic(x, _CUBIC), 2.0),
    "lanczos": (_lanczos, 3.0),
}


@lru_cache(maxsize=128)
def resize_matrix(size: int, new_size: int, method: Filter) -> Float[np.ndarray, "new old"]:
    """The weights of PIL's resize from `size` to `new_size` pixels: rows sum to 1.

    Pixels beyond the edge do not exist: the weights of the others are scaled up. ValueError for an
    unknown filter.
    """
    if method not in _FILTERS:
        raise ValueError(f"interpolation {method!r}: expected one of {', '.join(_FILTERS)}")
    kernel, support = _FILTERS[method]
    scale = size / new_size
    stretch = max(scale, 1.0)
    centres = (np.arange(new_size) + 0.5) * scale
    reach = support * stretch
    # PIL's window: whole pixels around the centre, cut at the edges.
    low = np.maximum((centres - reach + 0.5).astype(int), 0)
    high = np.minimum((centres + reach + 0.5).astype(int), size)
    pixels = np.arange(size)
    weights = kernel((pixels + 0.5 - centres[:, None]) / stretch)
    weights = np.where((pixels >= low[:, None]) & (pixels < high[:, None]), weights, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def crop_start(size: int, crop: int, rounding: CropRounding) -> int:
    """The first of the middle `crop` of `size` pixels; ValueError for an unknown rounding."""
    if rounding not in CROP_ROUNDINGS:
        raise ValueError(f"rounding {rounding!r}: expected one of {', '.join(CROP_ROUNDINGS)}")
    return (size - crop) // 2 if rounding == "floor" else round((size - crop) / 2)


@lru_cache(maxsize=32)
def torch_cubic_matrix(size: int, new_size: int) -> Float[np.ndarray, "new old"]:
    """`torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` without antialias.

    The edge's pixel is repeated beyond it.
    """
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new_size, size), np.float32)
    for tap in range(-1, 3):
        weights = _cubic(centres - (first + tap), _TORCH_CUBIC)
        np.add.at(matrix, (np.arange(new_size), np.clip(first + tap, 0, size - 1)), weights)
    return matrix
