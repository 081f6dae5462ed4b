"""Keep XLA's CPU compiler from merging an array into the loops that read it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsynth.ops.backend import backend


def materialize(x: Array) -> Array:
    """Compute x in whole before anything reads it; on other backends x itself.

    XLA's CPU compiler merges what makes an array into what reads it, even where each element is
    read many times, or where a loop of the two no longer does 16 elements at once. It drops an
    `optimization_barrier` before that; what a loop reads stays apart.
    """
    if backend() != "cpu" or not isinstance(x, jax.core.Tracer):
        return x
    return jax.lax.fori_loop(
        0, 2, lambda number, value: jnp.where(number < 1, x, value), jnp.zeros_like(x)
    )
