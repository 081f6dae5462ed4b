"""LoHa (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS, arXiv:2309.14859).

The added kernel is the elementwise product of two low-rank ones, and so of rank up to r^2:

    dW = s (w1_b w1_a) * (w2_b w2_a)

It is also, exactly, LoRA of rank r^2, whose factors are all products of a column of one pair with
one of the other (the Khatri-Rao product). Small ranks are applied like that, which makes no kernel;
for large ones the kernel is cheaper.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.update import UpdateConfig, UpdateLayer, check_choice, uniform


@dataclass(frozen=True)
class LoHaConfig(UpdateConfig):
    """What LoHa wraps, and how.

    `init` "lycoris" is normal, with w2_a zero; "peft" Kaiming-uniform, with w2_b zero. `use_tucker`
    (peft: `use_effective_conv2d`) puts a small kernel into each product on convolutions of more
    than one tap.
    """

    init: Literal["lycoris", "peft"] = "lycoris"
    use_tucker: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "init", ("lycoris", "peft"))


def loha(config: LoHaConfig) -> inject.Maker:
    """Makes the LoHa layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        return LoHa(layer, config, path, key)

    return make


class LoHa(UpdateLayer):
    """LoHa on a layer. For i in 1, 2, after any stacking axes: hada_wi_b (*window, in, rank) and
    hada_wi_a (rank, out); with Tucker factors hada_wi_b (in, rank) and hada_ti (*window, rank,
    rank).
    """

    kind = "LoHa"
    is_dense = True

    def __init__(self, layer: nnx.Module, config: LoHaConfig, path: str, key: jax.Array):
        super().__init__(layer, config, path)
        place, rank = self.place, config.rank_at(path)
        tucker = config.use_tucker and math.prod(place.size) > 1
        window = () if tucker else place.size
        shape_b, shape_a = (
            (*place.lead, *window, place.c_in, rank),
            (*place.lead, rank, place.c_out),
        )
        shape_t = (*place.lead, *place.size, rank, rank)
        keys = jax.random.split(key, 6)
        lycoris = config.init == "lycoris"
        # LyCORIS' deviations, or peft's fan_in: all but the first axis of its layout.
        b = 1.0 if lycoris else place.c_in if tucker else place.rows
        a = 0.1 if lycoris else place.c_out if tucker else rank
        t = 0.1 if lycoris else math.prod(place.size) * rank
        draw = _normal if lycoris else uniform
        self.hada_w1_a = inject.Trainable(draw(keys[0], shape_a, a))
        self.hada_w1_b = inject.Trainable(draw(keys[1], shape_b, b))
        zero_a, zero_b = jnp.zeros(shape_a), jnp.zeros(shape_b)
        self.hada_w2_a = inject.Trainable(zero_a if lycoris else draw(keys[2], shape_a, a))
        self.hada_w2_b = inject.Trainable(draw(keys[3], shape_b, b) if lycoris else zero_b)
        self.hada_t1 = self.hada_t2 = nnx.data(None)
        if tucker:
            self.hada_t1 = inject.Trainable(draw(keys[4], shape_t, t))
            self.hada_t2 = inject.Trainable(draw(keys[5], shape_t, t))

    def low_rank(self) -> tuple[Array, Array]:
        (down, up), (other_down, other_up) = self._pairs()
        return _columns(down, other_down), jnp.swapaxes(
            _columns(jnp.swapaxes(up, -1, -2), jnp.swapaxes(other_up, -1, -2)), -1, -2
        )

    def delta(self) -> Float[Array, "*lead_and_size i o"]:
        first, second = (
            jnp.matmul(down, self.place.wide(up), precision=jax.lax.Precision.HIGHEST)
            for down, up in self._pairs()
        )
        return self.scaling * (first * second)

    def is_cheaper_whole(self, inputs: Array) -> bool:
        # Dropout and tables meet the factors alone. A training step multiplies each position by the
        # r^2 ranks of both factors about three times more than the base does by its kernel.
        place, ranks = self.place, self.hada_w1_a.shape[-2] ** 2
        if place.is_table or self.dropout:
            return False
        return 3 * ranks * (place.rows + place.c_out) > place.rows * place.c_out

    def _pairs(self) -> list[tuple[Array, Array]]:
        """(*lead, *window, in, rank) and (*lead, rank, out), twice."""
        pairs = []
        for down, mid, up in (
            (self.hada_w1_b, self.hada_t1, self.hada_w1_a),
            (self.hada_w2_b, self.hada_t2, self.hada_w2_a),
        ):
            wide = down[...]
            if mid is not None:
                wide = jnp.matmul(
                    self.place.wide(wide), mid[...], precision=jax.lax.Precision.HIGHEST
                )
            pairs.append((wide, up[...]))
        return pairs


def _columns(first: Array, second: Array) -> Array:
    """All products of a column of (..., n, r) with one of (..., n, r): (..., n, r * r)."""
    return (first[..., :, None] * second[..., None, :]).reshape(*first.shape[:-1], -1)


def _normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> Array:
    return deviation * jax.random.normal(key, shape, jnp.float32)
