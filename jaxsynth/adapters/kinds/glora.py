"""GLoRA (Chavan et al. 2023, arXiv:2306.07967): changes of a weight, and through it.

Two published forms share the name and the letters. LyCORIS' (`form` "product") multiplies by W,

    W' = W + s (W A + B),    both of low rank,

which is W on changed inputs x + s A x. peft's (`form` "hadamard") multiplies each element,

    W' = W + W * A + B,    b' = b + b * D + E + W C

with A, B and the vector C of low rank, and scalars D and E, which are peft's defaults. Without a
bias there is no C, D and E.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.adapters.kinds.update import (
    UpdateConfig,
    UpdateLayer,
    check_choice,
    project,
    uniform,
)

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class GLoRAConfig(UpdateConfig):
    """What GLoRA wraps, and its form. peft's has no alpha and no dropout."""

    form: Literal["product", "hadamard"] = "product"

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "form", ("product", "hadamard"))
        if self.decompose != "none":
            raise ValueError("GLoRAConfig: GLoRA has no magnitudes of DoRA")
        if self.form == "hadamard" and self.bias:
            raise ValueError("GLoRAConfig: the hadamard form changes biases by itself")
        unscaled = self.alpha is None and not self.alpha_pattern and not self.use_rslora
        if self.form == "hadamard" and not (unscaled and self.dropout == self.module_dropout == 0):
            raise ValueError("GLoRAConfig: the hadamard form has neither a scale nor dropout")


def glora(config: GLoRAConfig) -> inject.Maker:
    """Makes the GLoRA layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        make_layer = GLoRA if config.form == "product" else HadamardGLoRA
        return make_layer(layer, config, path, key)

    return make


class GLoRA(UpdateLayer):
    """LyCORIS' form on a linear layer or convolution. After any stacking axes: a2 (in, rank) and a1
    (rank, in), pointwise on a convolution; b2 (*window, in, rank) and b1 (rank, out).
    """

    kind = "GLoRA"

    def __init__(self, layer: nnx.Module, config: GLoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config, path)
        place, rank = self.place, config.rank_at(path)
        if place.is_table:
            raise TypeError(f"{path}: GLoRA adapts nnx.Linear and nnx.Conv, found Embed")
        keys = jax.random.split(key)
        self.a1 = inject.Trainable(uniform(keys[0], (*place.lead, rank, place.c_in), rank))
        self.b1 = inject.Trainable(uniform(keys[1], (*place.lead, rank, place.c_out), rank))
        self.a2 = inject.Trainable(jnp.zeros((*place.lead, place.c_in, rank)))
        self.b2 = inject.Trainable(jnp.zeros((*place.lead, *place.size, place.c_in, rank)))

    def low_rank(self) -> tuple[Array, Array]:
        """B's factors, and for each tap of a window A and what W makes of it there."""
        place, taps = self.place, math.prod(self.place.size)
        through = jnp.matmul(place.wide(self.a1[...]), self.weight(), precision=_HIGHEST)
        through = through.reshape(*self.a1.shape[:-2], -1, place.c_out)
        a2 = self.a2[...]
        each = jnp.eye(taps)[:, None, :, None] * a2[..., None, :, None, :]
        each = each.reshape(*a2.shape[:-2], *place.size, place.c_in, -1)
        down = jnp.concatenate([self.b2[...], each], axis=-1)
        return down, jnp.concatenate([self.b1[...], through], axis=-2)

    def changed(self, inputs: Array, strength: Any) -> Float[Array, "*b o"]:
        dropped, scale = self.dropped(inputs), self.scaling * strength
        low = (dropped @ self.a2[...].astype(inputs.dtype)) * scale
        out = self.base(inputs + low.astype(inputs.dtype) @ self.a1[...].astype(inputs.dtype))
        beside = project(self.base, dropped, self.b2[...].astype(out.dtype))
        beside = (beside * scale).astype(out.dtype)
        return out + beside @ self.b1[...].astype(out.dtype)

    def _without_change(self, merged: dict[str, Array]) -> Array:
        weight, strength = merged["kernel"], self.strength
        through = jnp.matmul(self.a2[...], self.a1[...], precision=_HIGHEST)
        matrix = jnp.eye(self.place.c_in) + strength * self.scaling * through
        beside = jnp.matmul(self.b2[...], self.place.wide(self.b1[...]), precision=_HIGHEST)
        rest = weight.astype(jnp.float32) - strength * self.scaling * beside
        matrix = jnp.broadcast_to(self.place.wide(matrix), (*rest.shape[:-2], *matrix.shape[-2:]))
        return jnp.linalg.solve(matrix, rest).astype(weight.dtype)


class HadamardGLoRA(inject.AdapterLayer):
    """peft's form on a linear layer: A_down (in, rank), A_up (rank, out), B_down and B_up alike,
    C_down (1, rank), C_up (rank, in), D (1,) and E (1,), after any stacking axes.
    """

    kind = "GLoRA"

    def __init__(self, layer: nnx.Module, config: GLoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config)
        place, rank = Place.of(layer, self.kind, path), config.rank_at(path)
        if type(layer) is not nnx.Linear:
            raise TypeError(
                f"{path}: GLoRA's hadamard form adapts nnx.Linear, found {type(layer).__name__}"
            )
        keys = jax.random.split(key, 3)
        for name, own in zip("AB", keys[:2], strict=True):
            drawn = uniform(own, (*place.lead, place.c_in, rank), place.c_in)
            setattr(self, f"{name}_down", inject.Trainable(drawn))
            setattr(
                self, f"{name}_up", inject.Trainable(jnp.zeros((*place.lead, rank, place.c_out)))
            )
        self.C_down = self.C_up = self.D = self.E = nnx.data(None)
        if layer.bias is not None:
            self.C_down = inject.Trainable(uniform(keys[2], (*place.lead, 1, rank), 1))
            self.C_up = inject.Trainable(jnp.zeros((*place.lead, rank, place.c_in)))
            self.D = inject.Trainable(jnp.zeros((*place.lead, 1)))
            self.E = inject.Trainable(jnp.zeros((*place.lead, 1)))

    def __call__(self, inputs: Array) -> Array:
        return inject.with_params(self.base, self.merged())(inputs)

    def merged(self) -> dict[str, Array]:
        kernel, bias = self.base.kernel[...], self.base.bias
        if self.is_off:
            return {"kernel": kernel} | ({} if bias is None else {"bias": bias[...]})
        factor, shift = self._change()
        wide = kernel.astype(jnp.float32)
        result = {"kernel": (wide * factor + shift).astype(kernel.dtype)}
        if bias is None:
            return result
        moved = bias[...].astype(jnp.float32) * (1 + self.strength * self.D[...])
        moved = moved + self.strength * (self.E[...] + self._through(wide))
        return result | {"bias": moved.astype(bias[...].dtype)}

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        if self.is_off:
            return merged
        factor, shift = self._change()
        wide = (merged["kernel"].astype(jnp.float32) - shift) / factor
        result: dict[str, Array | None] = {"kernel": wide.astype(merged["kernel"].dtype)}
        if "bias" not in merged:
            return result
        bias = merged["bias"].astype(jnp.float32)
        bias = bias - self.strength * (self.E[...] + self._through(wide))
        bias = bias / (1 + self.strength * self.D[...])
        return result | {"bias": bias.astype(merged["bias"].dtype)}

    def _change(self) -> tuple[Array, Array]:
        a = jnp.matmul(self.A_down[...], self.A_up[...], precision=_HIGHEST)
        b = jnp.matmul(self.B_down[...], self.B_up[...], precision=_HIGHEST)
        return 1 + self.strength * a, self.strength * b

    def _through(self, kernel: Array) -> Float[Array, "*lead o"]:
        c = jnp.matmul(self.C_down[...], self.C_up[...], precision=_HIGHEST)
        return jnp.matmul(c, kernel, precision=_HIGHEST)[..., 0, :]
