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

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsynth.adapters import inject

if TYPE_CHECKING:
    from jaxsynth.adapters.kinds.update import Place, UpdateLayer


def initial(weight: Array, place: "Place", config: Any) -> Float[Array, "*lead n"]:
    """The lengths that the kernel has."""
    return jnp.sqrt(_squares(weight, place, config.decompose))


def ratios(layer: "UpdateLayer") -> Float[Array, "*lead n"]:
    """m / ||W + s dW|| for each output or input, in float32."""
    squares = _gram(layer) if not layer.is_dense else None
    if squares is None:
        whole = _constant(layer, layer.weight()) + _constant(layer, layer.delta())
        squares = _squares(whole, layer.place, layer.config.decompose)
    # A kernel of zeros has no direction; its length is then that of what is added to nothing.
    norms = jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
    return layer.magnitude[...] / norms


def decomposed(layer: "UpdateLayer", inputs: Array) -> Float[Array, "*b o"]:
    """The layer's outputs: those of its base, and what the decomposition changes of them."""
    strength, ratio = layer.strength, ratios(layer)
    if layer.config.decompose == "input" and not layer.place.is_table:
        scale = (1 + strength * (ratio - 1)).astype(inputs.dtype)
        out = layer.base(inputs * scale)
        return out + layer.added(inputs * ratio.astype(inputs.dtype), out.dtype, strength)
    out = layer.base(inputs)
    if layer.config.decompose == "input":
        ratio = jnp.take(ratio, inputs, axis=0)[..., None]
    # peft with dropout passes dropped inputs through the base a second time; here they reach the
    # update alone, as in LoRA.
    change = (strength * (ratio - 1)).astype(out.dtype) * inject.without_bias(out, layer.base)
    return out + change + (strength * ratio).astype(out.dtype) * layer.added(inputs, out.dtype, 1.0)


def _gram(layer: "UpdateLayer") -> Float[Array, "*lead n"]:
    place, highest = layer.place, jax.lax.Precision.HIGHEST
    down, up = (_constant(layer, factor) for factor in layer.low_rank())
    down, up = place.flat(down), layer.scaling * up
    weight = place.flat(_constant(layer, layer.weight()))

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=highest)

    if layer.config.decompose == "output":
        turned = jnp.swapaxes(down, -1, -2)
        inner = 2 * product(turned, weight) + product(product(turned, down), up)
        return (weight**2).sum(-2) + (inner * up).sum(-2)
    turned = jnp.swapaxes(up, -1, -2)
    inner = 2 * product(weight, turned) + product(down, product(up, turned))
    return place.inputs((weight**2).sum(-1) + (inner * down).sum(-1))


def _squares(kernel: Array, place: "Place", side: str) -> Float[Array, "*lead n"]:
    flat = place.flat(kernel) ** 2
    return flat.sum(-2) if side == "output" else place.inputs(flat.sum(-1))


def _constant(layer: "UpdateLayer", value: Array) -> Array:
    return jax.lax.stop_gradient(value) if layer.config.detach_norm else value
