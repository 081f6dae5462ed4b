"""What every metric asks of its input: one clear error each, before anything is computed.

Inside a program that is being traced there are no values yet: only shapes are looked at there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.core.words import counted

# What float32 arithmetic leaves outside of [0, 1] in images that were normalised and back.
_TOLERANCE = 1e-5


def as_array(values: Any, name: str) -> Any:
    """A JAX or numpy array as it is; of a list or another library's tensor the numpy array.

    ValueError for what is none, such as rows of different lengths or a tensor on a GPU.
    """
    if isinstance(values, jax.Array | np.ndarray):
        return values
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: {_kind(values)} is no array ({_first_line(error)}); give numpy's or JAX's, "
            "of a torch tensor `x.detach().cpu().numpy()`"
        ) from error
    if found.dtype == object:
        raise ValueError(f"{name}: {_kind(values)} is no array of numbers")
    return found


def check_function(predict: Any, name: str = "predict") -> None:
    """ValueError for what is no function, and for a torch module, which takes other images."""
    if not callable(predict):
        raise ValueError(f"{name}: expected a function, found {type(predict).__name__}")
    if any(kind.__module__.startswith("torch.nn") for kind in type(predict).__mro__):
        raise ValueError(
            f"{name}: {type(predict).__name__} is a torch module, which takes tensors (b, 3, h, w)"
            "; give jaxsynth.robustness.from_torch(model.eval())"
        )


def check_names(values: Any, name: str) -> tuple[Any, ...]:
    """A row of names or numbers; ValueError for a single one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected several in a tuple, found {values!r} alone")
    return tuple(values)


def check_number(
    value: Any, name: str, least: float = 0.0, most: float = np.inf, *, above: bool = False
) -> Any:
    """A finite number from `least` (or only `above` it) to `most`; ValueError for another."""
    if isinstance(value, jax.core.Tracer):
        return value
    found = np.asarray(as_array(value, name))
    fits = found.ndim == 0 and found.dtype.kind in "fiu" and np.isfinite(found)
    if not fits or not least <= found <= most or (above and found == least):
        low = f"above {least:g}" if above else f"{least:g} or more"
        upto = "" if most == np.inf else f" and at most {most:g}"
        shown = f"{found}" if found.ndim == 0 else f"an array of shape {found.shape}"
        raise ValueError(f"{name}: expected one number, {low}{upto}, found {shown}")
    return float(found)


def check_key(key: Any, name: str = "key", *, single: bool = False) -> None:
    """ValueError for a seed, a key of the old style, or several keys where one is to be."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if single and key.shape:
            raise ValueError(f"{name}: expected one random key, found {key.shape} of them")
        return
    if isinstance(key, int | np.integer):
        raise ValueError(f"{name}: found the number {key}; give jax.random.key({key})")
    if getattr(key, "dtype", None) == np.uint32 and np.shape(key)[-1:] in ((2,), (4,)):
        raise ValueError(
            f"{name}: found a key of the old style (uint32 {np.shape(key)}); give "
            "jax.random.key(seed), or jax.random.wrap_key_data(key)"
        )
    raise ValueError(f"{name}: expected a random key as of jax.random.key, found {_kind(key)}")


def check_whole(value: Any, name: str, least: int, most: int | None = None) -> int:
    """A whole number within bounds; ValueError for another, 3.0 and True among them."""
    upto = "or more" if most is None else f"to {most}"
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        raise ValueError(f"{name}: expected a whole number, {least} {upto}, found {value!r}")
    return int(value)


def check_eps(eps: Any, norm: str, shape: tuple[int, ...]) -> None:
    """ValueError for a radius below 0, or beyond what images (n, h, w, c) in [0, 1] can move."""
    if isinstance(eps, jax.core.Tracer):
        return
    values = np.asarray(eps)
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"eps: expected finite numbers, 0 or more, found {eps}")
    most = 1.0 if norm == "linf" else float(np.sqrt(np.prod(shape[1:])))
    if (values > most).any():
        raise ValueError(
            f"eps: {values.max():g} is more than images in [0, 1] can move ({most:g} in {norm}); "
            f"of 8-bit pixels give {values.max():g} / 255"
        )


def check_logits(logits: Any, name: str = "logits") -> Float[Array, "n c"]:
    """Logits (n, c) in float32, or float64 where they are and JAX computes in it.

    ValueError for another shape, too few classes, NaN or infinity.
    """
    logits = as_array(logits, name)
    if np.ndim(logits) != 2 or not len(logits):
        raise ValueError(f"{name}: expected (images, classes), found shape {np.shape(logits)}")
    if logits.shape[1] < 2:
        raise ValueError(f"{name}: {counted(logits.shape[1], 'class')}, expected 2 or more")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating point numbers, found {logits.dtype}")
    _finite(logits, name)
    keeps = logits.dtype == np.float64 and jax.config.jax_enable_x64
    return jnp.asarray(logits, jnp.float64 if keeps else jnp.float32)


def check_labels(labels: Any, count: int, classes: int, name: str = "labels") -> Int[Array, " n"]:
    """Integer labels (count,) from 0 to `classes` - 1; ValueError saying which are not."""
    labels = as_array(labels, name)
    if np.shape(labels) != (count,):
        raise ValueError(f"{name}: expected shape ({count},), found {np.shape(labels)}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, found {labels.dtype}")
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
    images = as_array(images, name)
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


def check_scores(scores: Any, name: str) -> Float[np.ndarray, " n"]:
    """Scores (n,), one an image, in their own precision; ValueError for another shape or kind, NaN
    or infinity."""
    scores = np.asarray(as_array(scores, name))
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: expected one score an image, found shape {scores.shape}")
    if scores.dtype.kind not in "fiu" and scores.dtype != jnp.bfloat16:
        raise ValueError(f"{name}: expected numbers, found {scores.dtype}")
    _finite(scores, name)
    return scores.astype(np.float32) if scores.dtype == jnp.bfloat16 else scores


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
    values = np.asarray(values)
    # Extension types such as bfloat16 have no isfinite of their own.
    values = values if values.dtype.kind in "fiu" else values.astype(np.float32)
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name}: {np.count_nonzero(~finite)} of {counted(len(values), 'row')} hold NaN or "
            f"infinity, the first is row {int(np.argmin(finite))}"
        )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
