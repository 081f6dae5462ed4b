"""Pixels of a batch on the device: uint8 crosses to it, a quarter of float32's bytes."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8


def normalize_pixels(
    images: UInt8[Array, "*b 3"],
    mean: Sequence[float] | Float32[Array, "3"],
    std: Sequence[float] | Float32[Array, "3"],
) -> Float32[Array, "*b 3"]:
    """uint8 pixels to (pixels / 255 - mean) / std, as `augment.normalize` does on the host.

    To the bit where mean and deviation are arguments of the program: XLA multiplies by the rounded
    reciprocal of a constant.
    """
    shift, scale = (jnp.asarray(values, jnp.float32) * 255 for values in (mean, std))
    return (images.astype(jnp.float32) - shift) / scale
