"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): rescale what frozen layers give, or take.

    y = l (W x + b)        or, on feed-forward layers,        y = W (l x) + b

with one factor for each output or input, 1 at the start. LyCORIS' variant leaves b as it is
(`scales_bias` False) and stores l - 1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.place import Place


@dataclass(frozen=True)
class IA3Config:
    """What is rescaled: the outputs of `targets`, or the inputs of those in `feedforward` too."""

    targets: tuple[str, ...] = ("to_k", "to_v", "ff.net.2")
    feedforward: tuple[str, ...] = ("ff.net.2",)
    scales_bias: bool = True

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "feedforward", tuple(self.feedforward))


def ia3(config: IA3Config) -> inject.Maker:
    """Makes the (IA)^3 layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, _: jax.Array) -> inject.AdapterLayer:
        return IA3(layer, config, path)

    return make


class IA3(inject.AdapterLayer):
    """A rescaled `nnx.Linear`, `nnx.Conv` or `nnx.Embed`: ia3_l (out,) or (in,), after any
    stacking axes.
    """

    kind = "(IA)^3"

    def __init__(self, layer: nnx.Module, config: IA3Config, path: str):
        super().__init__(layer, config)
        self.place = Place.of(layer, self.kind, path)
        on_input = any(inject.matches(target, path) for target in config.feedforward)
        if on_input and self.place.is_table:
            raise ValueError(f"{path}: a table has no inputs to rescale; it cannot be feed-forward")
        self.side = "input" if on_input else "output"
        size = self.place.c_in if on_input else self.place.c_out
        self.ia3_l = inject.Trainable(jnp.ones((*self.place.lead, size)))

    def __call__(self, inputs: Array) -> Float[Array, "*b o"]:
        if self.is_off:
            return self.base(inputs)
        change = self.strength * (self.ia3_l[...] - 1)
        if self.side == "input":
            return self.base(inputs * (1 + change).astype(inputs.dtype))
        out = self.base(inputs)
        scaled = out if self.config.scales_bias else inject.without_bias(out, self.base)
        return out + scaled * change.astype(out.dtype)

    def merged(self) -> dict[str, Array]:
        return self._scaled(self._params(), 1 + self.strength * (self.ia3_l[...] - 1))

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        """The base layer's own, given the merged ones. A factor of 0 cannot be undone."""
        return self._scaled(merged, 1 / (1 + self.strength * (self.ia3_l[...] - 1)))

    def _params(self) -> dict[str, Array]:
        values = {self.place.name: getattr(self.base, self.place.name)[...]}
        bias = getattr(self.base, "bias", None)
        return values if bias is None else values | {"bias": bias[...]}

    def _scaled(self, values: dict[str, Array], factor: Array) -> dict[str, Array]:
        result = dict(values)
        weight = values[self.place.name]
        wide = weight.astype(jnp.float32) * self.place.spread(factor, self.side)
        result[self.place.name] = wide.astype(weight.dtype)
        if "bias" in values and self.side == "output" and self.config.scales_bias:
            bias = values["bias"]
            result["bias"] = (bias.astype(jnp.float32) * factor).astype(bias.dtype)
        return result
