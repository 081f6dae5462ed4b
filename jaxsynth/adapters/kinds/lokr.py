"""LoKr (LyCORIS, Yeh et al. 2023, arXiv:2309.14859): an added kernel that is a Kronecker product.

    dW = s w1 (x) w2,    in = c d,  out = a b,  w1 (c, a),  w2 (d, b)

with w2, and w1 on request, of low rank where that is smaller. Inputs are seen as (c, d), to which
the two factors are applied in turn, so that no kernel is made.

Where both factors are whole LyCORIS, ComfyUI and diffusers leave alpha out (s = 1); peft uses alpha
/ rank there too. `full_alpha` says which.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.convolution import narrow_convolve
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.adapters.kinds.update import UpdateConfig, UpdateLayer, check_choice, uniform

_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class LoKrConfig(UpdateConfig):
    """What LoKr wraps, and how.

    `factor` divides both sides of a kernel (-1: near the square root, see `factorization`);
    `ordered` False takes one beyond the square root for the first of two, as peft does, and
    `unbalanced` exchanges a and b. `decompose_both` lets w1 have a low rank too, `full_matrix`
    neither, and `use_tucker` puts a small kernel into w2 on convolutions of more than one tap.
    `first` is the size (c, a) of w1 itself, and `whole` which of w1 and w2 have no low rank: for
    files of tools that split and decide in other ways.
    `init` "lycoris" starts w2 at zero, "peft" w1. `full_alpha`: whether alpha counts where nothing
    has a low rank.
    """

    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced: bool = False
    use_tucker: bool = False
    init: Literal["lycoris", "peft"] = "lycoris"
    full_alpha: bool = False
    ordered: bool = True
    first: tuple[int, int] | None = None
    whole: tuple[bool, bool] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("first", "whole"):
            if (pair := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(pair))
        if self.first is not None and (len(self.first) != 2 or min(self.first) < 1):
            raise ValueError(f"LoKrConfig.first is {self.first}, expected two sizes of at least 1")
        if self.whole is not None and len(self.whole) != 2:
            raise ValueError(f"LoKrConfig.whole is {self.whole}, expected True or False for each")
        check_choice(self, "init", ("lycoris", "peft"))
        if self.factor == 0 or self.factor < -1:
            raise ValueError(f"LoKrConfig.factor is {self.factor}, expected -1 or at least 1")


def factorization(size: int, factor: int = -1, *, ordered: bool = True) -> tuple[int, int]:
    """`size` as a product of two numbers, the smaller first, as LyCORIS and peft split it.

    A `factor` that divides `size` is one of them (the first, if not `ordered`: peft's way); else it
    is the largest divisor up to `factor` (-1: up to the square root).
    """
    if factor > 0 and size % factor == 0:
        first = factor
    else:
        # The walk over the divisors ends at the first one that is no longer the smaller.
        most = size if factor < 0 else factor
        found = [n for n in range(1, size + 1) if size % n == 0 and n <= most]
        first = next((n for n in found if n * n >= size), found[-1])
        ordered = True
    pair = first, size // first
    return (min(pair), max(pair)) if ordered else pair


def lokr(config: LoKrConfig) -> inject.Maker:
    """Makes the LoKr layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        return LoKr(layer, config, path, key)

    return make


def shapes(config: LoKrConfig, rank: int, place: Place) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's factors, without stacking axes."""
    c, d = factorization(place.c_in, config.factor, ordered=config.ordered)
    a, b = factorization(place.c_out, config.factor, ordered=config.ordered)
    if config.unbalanced:
        a, b = b, a
    if config.first is not None:
        c, a = config.first
        d, b = place.c_in // c, place.c_out // a
        if (c * d, a * b) != (place.c_in, place.c_out):
            raise ValueError(
                f"LoKrConfig.first is {config.first}, which does not divide a kernel of "
                f"{place.c_in} inputs and {place.c_out} outputs"
            )
    low1 = config.decompose_both and rank < max(a, c) / 2 and not config.full_matrix
    low2 = rank < max(b, d) / 2 and not config.full_matrix
    if config.whole is not None:
        low1, low2 = (not whole for whole in config.whole)
    found: dict[str, tuple[int, ...]] = (
        {"lokr_w1_a": (rank, a), "lokr_w1_b": (c, rank)} if low1 else {"lokr_w1": (c, a)}
    )
    if low2 and config.use_tucker and math.prod(place.size) > 1:
        return found | {
            "lokr_t2": (*place.size, rank, rank),
            "lokr_w2_a": (rank, b),
            "lokr_w2_b": (d, rank),
        }
    if low2:
        return found | {"lokr_w2_a": (rank, b), "lokr_w2_b": (*place.size, d, rank)}
    return found | {"lokr_w2": (*place.size, d, b)}


class LoKr(UpdateLayer):
    """LoKr on a layer. Factors, after any stacking axes: lokr_w1 (c, a) or lokr_w1_b (c, rank) and
    lokr_w1_a (rank, a); lokr_w2 (*window, d, b) or lokr_w2_b (*window, d, rank) and lokr_w2_a
    (rank, b), with Tucker factors lokr_w2_b (d, rank) and lokr_t2 (*window, rank, rank).
    """

    kind = "LoKr"
    is_dense = True

    def __init__(self, layer: nnx.Module, config: LoKrConfig, path: str, key: jax.Array):
        super().__init__(layer, config, path)
        place, rank = self.place, config.rank_at(path)
        factors = shapes(config, rank, place)
        if "lokr_w1" in factors and "lokr_w2" in factors and not config.full_alpha:
            self.scaling = 1.0
        zero = ("lokr_w2", "lokr_w2_b") if config.init == "lycoris" else ("lokr_w1", "lokr_w1_a")
        for name in _NAMES:
            setattr(self, name, nnx.data(None))
        for number, (name, shape) in enumerate(factors.items()):
            # All but the first axis in the peers' layout, which is the last here, but for Tucker's.
            turned = name == "lokr_w2_a" and "lokr_t2" in factors
            fan_in = shape[-1] if turned else math.prod(shape[:-1])
            shape = (*place.lead, *shape)
            drawn = uniform(jax.random.fold_in(key, number), shape, fan_in)
            setattr(self, name, inject.Trainable(jnp.zeros(shape) if name in zero else drawn))

    def low_rank(self) -> tuple[Array, Array]:
        """Kronecker products of a pair for each factor: w1's own low rank, or an identity and w1 on
        the side that gives fewer ranks; and likewise for w2.
        """
        first, (down, up) = self._first(), self._second()
        c, a = first.shape[-2:]
        if self.lokr_w1 is None and self.lokr_w1_a.shape[-2] < min(c, a):
            left, right = self.lokr_w1_b[...], self.lokr_w1_a[...]
        else:
            left, right = (_eye(c, first), first) if c <= a else (first, _eye(a, first))
        if up is None and not self.place.size and down.shape[-2] < down.shape[-1]:
            down, up = _eye(down.shape[-2], first), down
        elif up is None:
            up = _eye(down.shape[-1], first)
        return _kron(self.place.wide(left), down), _kron(right, up)

    def delta(self) -> Float[Array, "*lead_and_size i o"]:
        down, up = self._second()
        second = down if up is None else jnp.matmul(down, self.place.wide(up), precision=_HIGHEST)
        return self.scaling * _kron(self.place.wide(self._first()), second)

    def added(self, inputs: Array, dtype: Any, strength: Any) -> Float[Array, "*b o"]:
        first = (self._first() * (self.scaling * strength)).astype(dtype)
        down, up = (None if x is None else x.astype(dtype) for x in self._second())
        if self.place.is_table:
            rows = down.shape[-2]
            low = jnp.take(down, inputs % rows, axis=0)
            second = low if up is None else low @ up
            out = jnp.take(first, inputs // rows, axis=0)[..., None] * second[..., None, :]
        else:
            inputs = self.dropped(inputs).astype(dtype)
            inputs = inputs.reshape(*inputs.shape[:-1], first.shape[-2], -1)
            if self.place.size:
                # Each of the c groups of channels is an image of its own.
                low = narrow_convolve(jnp.moveaxis(inputs, -2, 0), down, self.base)
                operands, terms = [jnp.moveaxis(low, 0, -2), first], "...cr,ca"
            else:
                operands, terms = [inputs, down, first], "...cd,dr,ca"
            if up is None:
                out = jnp.einsum(f"{terms}->...ar", *operands)
            else:
                out = jnp.einsum(f"{terms},rb->...ab", *operands, up)
        return out.reshape(*out.shape[:-2], -1)

    def _first(self) -> Array:
        if self.lokr_w1 is not None:
            return self.lokr_w1[...]
        return jnp.matmul(self.lokr_w1_b[...], self.lokr_w1_a[...], precision=_HIGHEST)

    def _second(self) -> tuple[Array, Array | None]:
        """w2 (*lead, *window, d, b) and None, or its two factors."""
        if self.lokr_w2 is not None:
            return self.lokr_w2[...], None
        down = self.lokr_w2_b[...]
        if self.lokr_t2 is not None:
            down = jnp.matmul(self.place.wide(down), self.lokr_t2[...], precision=_HIGHEST)
        return down, self.lokr_w2_a[...]


def _kron(first: Array, second: Array) -> Array:
    """The Kronecker product of the last two axes."""
    product = first[..., :, None, :, None] * second[..., None, :, None, :]
    *lead, c, d, a, b = product.shape
    return product.reshape(*lead, c * d, a * b)


def _eye(size: int, like: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(size), (*like.shape[:-2], size, size))
