"""Full difference (LyCORIS "full" and "norm"): a change of its own for every weight of a layer.

What full fine-tuning learns, kept beside the frozen weights instead of in their place, so that it
can be scaled, taken off, stacked and stored like any adapter. On normalisation layers it is norm
tuning, with the bias alone BitFit.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.update import check_choice

_WEIGHTS = ("kernel", "embedding", "scale")


@dataclass(frozen=True)
class FullConfig:
    """What is changed, and which of its parameters: "all", the "weight" or the "bias"."""

    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    parameters: Literal["all", "weight", "bias"] = "all"

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        check_choice(self, "parameters", ("all", "weight", "bias"))


def full(config: FullConfig) -> inject.Maker:
    """Makes the full-difference layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, _: jax.Array) -> inject.AdapterLayer:
        return Full(layer, config, path)

    return make


class Full(inject.AdapterLayer):
    """A layer with `diff` for its kernel, table or scale and `diff_b` for its bias, zero at first.

    Any layer whose parameters are those: linear, convolutions in groups too, tables, norms.
    """

    kind = "full difference"

    def __init__(self, layer: nnx.Module, config: FullConfig, path: str):
        super().__init__(layer, config)
        found = {name for name, value in vars(layer).items() if isinstance(value, nnx.Param)}
        if not found or (other := found - {*_WEIGHTS, "bias"}) or len(found & set(_WEIGHTS)) > 1:
            raise TypeError(
                f"{path}: {self.kind} changes a kernel, embedding or scale and a bias, found "
                f"{type(layer).__name__} with {sorted(other if found else found)}"
            )
        # Pairs and no dict: what is static in a network must be hashable.
        self.names = tuple(
            ("diff_b" if name == "bias" else ("diff"), name)
            for name in sorted(found)
            if config.parameters in ("all", "bias" if name == "bias" else "weight")
        )
        if not self.names:
            raise ValueError(f"{path}: {type(layer).__name__} has no {config.parameters}")
        for factor, name in self.names:
            shape = getattr(layer, name).get_value().shape
            setattr(self, factor, inject.Trainable(jnp.zeros(shape, jnp.float32)))

    def __call__(self, inputs: Array) -> Array:
        return inject.with_params(self.base, self.merged())(inputs)

    def merged(self) -> dict[str, Array]:
        return self._shifted({n: getattr(self.base, n)[...] for _, n in self.names}, 1.0)

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        return self._shifted(merged, -1.0)

    def _shifted(self, values: dict[str, Array], sign: float) -> dict[str, Array]:
        if self.is_off:
            return values
        result = {}
        for factor, name in self.names:
            change = sign * self.strength * getattr(self, factor)[...]
            result[name] = (values[name].astype(jnp.float32) + change).astype(values[name].dtype)
        return result
