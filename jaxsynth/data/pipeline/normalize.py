"""Pixels of a batch on the device: uint8 crosses to it, a quarter of float32's bytes."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8


def normalize_pixels(
    images: UInt8[Array, "*b 3"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Array, "*b 3"]:
    """uint8 pixels to (pixels / 255 - mean) / std, as `augment.normalize` does on the host."""
    shift, scale = (np.asarray(values, np.float32) * 255 for values in (mean, std))
    return (images.astype(jnp.float32) - shift) / scale
