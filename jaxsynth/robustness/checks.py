"""What every metric asks of its input: one clear error each, before anything is computed.

Inside a program that is being traced there are no values yet: only shapes are looked at there.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# What float32 arithmetic leaves outside of [0, 1] in images that were normalised and back.
_TOLERANCE = 1e-5


def check_logits(logits: Any, name: str = "logits") -> Float[Array, "n c"]:
    """Float32 logits (n, c); ValueError for another shape, too few classes, NaN or infinity."""
    if np.ndim(logits) != 2 or not len(logits):
        raise ValueError(f"{name}: expected (images, classes), found shape {np.shape(logits)}")
    if logits.shape[1] < 2:
        raise ValueError(f"{name}: {logits.shape[1]} classes, expected 2 or more")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating point numbers, found {logits.dtype}")
    _finite(logits, name)
    return jnp.asarray(logits, jnp.float32)


def check_labels(labels: Any, count: int, classes: int, name: str = "labels") -> Int[Array, " n"]:
    """Integer labels (count,) from 0 to `classes` - 1; ValueError saying which are not."""
    if np.shape(labels) != (count,):
        raise ValueError(f"{name}: expected shape ({count},), found {np.shape(labels)}")
    kind = getattr(labels, "dtype", None) or np.asarray(labels).dtype
    if not jnp.issubdtype(kind, jnp.integer):
        raise ValueError(f"{name}: expected integers, found {kind}")
    if not isinstance(labels, jax.core.Tracer):
        values = np.asarray(labels)
        outside = (values < 0) | (values >= classes)
        if outside.any():
            first = int(np.argmax(outside))
            raise ValueError(
                f"{name}: {np.count_nonzero(outside)} of {count} outside 0 to {classes - 1}, "
                f"the first is {values[first]} at {first}"
            )
    return jnp.asarray(labels, jnp.int32)


def check_images(images: Any, name: str = "images") -> Float[Array, "n h w c"]:
    """Float32 images (n, h, w, c) in [0, 1]; ValueError for another shape, kind or range."""
    if np.ndim(images) != 4 or not len(images):
        raise ValueError(
            f"{name}: expected (images, height, width, channels), found shape {np.shape(images)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected floating point numbers in [0, 1], found {images.dtype}; divide "
            "8-bit pixels by 255"
        )
    if not isinstance(images, jax.core.Tracer):
        values = np.asarray(images)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            _finite(values, name)
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            raise ValueError(
                f"{name}: values from {low:g} to {high:g}, expected [0, 1]; `predict` takes pixels "
                "before any normalisation"
            )
    return jnp.asarray(images, jnp.float32)


def check_scores(scores: Any, name: str) -> Float[Array, " n"]:
    """Float32 scores (n,), one an image; ValueError for another shape, NaN or infinity."""
    if np.ndim(scores) != 1 or not len(scores):
        raise ValueError(f"{name}: expected one score an image, found shape {np.shape(scores)}")
    _finite(scores, name)
    return jnp.asarray(scores, jnp.float32)


def check_classes(classes: Sequence[int] | Any, count: int, name: str = "classes") -> np.ndarray:
    """Indices of some of `count` classes, each once; ValueError saying what is wrong."""
    indices = np.asarray(classes)
    if indices.ndim != 1 or not len(indices) or indices.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected a row of class indices, found {indices.dtype} {indices.shape}"
        )
    outside = indices[(indices < 0) | (indices >= count)]
    if len(outside):
        raise ValueError(f"{name}: {outside[0]} is outside 0 to {count - 1}")
    values, times = np.unique(indices, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{name}: class {values[times > 1][0]} is given more than once")
    return indices.astype(np.int32)


def _finite(values: Any, name: str) -> None:
    if isinstance(values, jax.core.Tracer):
        return
    finite = np.isfinite(np.asarray(values, np.float32)).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name}: {np.count_nonzero(~finite)} of {len(values)} rows hold NaN or infinity, "
            f"the first is row {int(np.argmin(finite))}"
        )
