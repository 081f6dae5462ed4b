"""DoRA (Liu et al. 2024, arXiv:2402.09353): an updated kernel's direction, and lengths of its own.

    W' = m (W + s dW) / ||W + s dW||

with one length m for each output (the paper, peft, LyCORIS since 3.2) or for each input (LyCORIS
2.2 to 3.1), which starts as the base's own. It decomposes any added kernel, not LoRA's alone. In
the gradient the norm is a constant (section 4.3 of the paper) unless `detach_norm` is False.

At strength t the kernel is W + t (W' - W), so that 0 is the base; LyCORIS' multiplier, which scales
the norm's ratio alone, leaves something of a DoRA at 0.

The sum W + s dW is not made: what its two parts give is scaled instead, and for low-rank factors
dW = D U the squared norms are those of W, a cross term through D^T W and a small Gram matrix.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsynth.adapters.kinds.place import Place


def lengths(
    kernel: Float[Array, "*lead_and_size i o"], place: Place, side: str
) -> Float[Array, "*lead n"]:
    """The length of a kernel's part for each output, or each input."""
    flat = place.flat(kernel) ** 2
    return _root(flat.sum(-2) if side == "output" else place.inputs(flat.sum(-1)))


def sum_lengths(
    kernel: Float[Array, "*lead_and_size i o"],
    down: Float[Array, "*lead_and_size i r"],
    up: Float[Array, "*lead r o"],
    place: Place,
    side: str,
) -> Float[Array, "*lead n"]:
    """The lengths of `kernel + down up`, without making that sum."""

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    weight, down = place.flat(kernel), place.flat(down)
    if side == "output":
        turned = jnp.swapaxes(down, -1, -2)
        inner = 2 * product(turned, weight) + product(product(turned, down), up)
        return _root((weight**2).sum(-2) + (inner * up).sum(-2))
    turned = jnp.swapaxes(up, -1, -2)
    inner = 2 * product(weight, turned) + product(down, product(up, turned))
    return _root(place.inputs((weight**2).sum(-1) + (inner * down).sum(-1)))


def _root(squares: Array) -> Array:
    # A kernel of zeros has no direction; its length is then that of what is added to nothing.
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
