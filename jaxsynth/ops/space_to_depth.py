"""Pixels below a latent as its channels."""

from typing import TypeVar

import jax
import numpy as np

Values = TypeVar("Values", np.ndarray, jax.Array)


def space_to_depth(condition: Values, factor: int) -> Values:
    """A condition at the size of latents that are `factor` times smaller than their pixels.

    (..., h, w, k) to (..., h / factor, w / factor, factor^2 k): the pixels below a latent become
    its channels, row by row. Nothing is lost: means over them, or any other linear reduction, are
    among what a network's first kernel can learn, and thin lines are not blurred before it sees
    them. T2I-Adapter (arXiv 2302.08453) does the same. ValueError for sizes that `factor` does not
    divide.
    """
    *lead, height, width, channels = condition.shape
    if height % factor or width % factor:
        raise ValueError(f"space_to_depth: {width}x{height} pixels, expected multiples of {factor}")
    shape = (*lead, height // factor, factor, width // factor, factor, channels)
    squares = condition.reshape(shape).swapaxes(-4, -3)
    return squares.reshape(*lead, height // factor, width // factor, factor**2 * channels)
