"""Prefix tuning and prompt tuning (Li and Liang 2021, arXiv:2101.00190; Lester et al. 2021,
arXiv:2104.08691): learnt tokens in front of a layer's own.

Around an attention's key and value projections (`to_k` and `to_v`, the default) they are keys and
values that every query sees; around a table of words they are words of a prompt. The wrapped layer
gives more tokens than it took, so its network must not count them: that holds for the keys and
values of an attention without a mask, and for a text encoder whose table of positions is as long as
the prompt and the words together.

At strength 0 nothing is put in front. A traced strength cannot change the number of tokens, and a
token in front cannot be merged into weights; both are errors.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject


@dataclass(frozen=True)
class PrefixConfig:
    """What gets tokens in front, and how many. `deviation` is that of their normal start.

    With `zeros` they start as zeros, as LoRA's B does; even so they change an attention, which
    gives them weight.
    """

    targets: tuple[str, ...] = ("to_k", "to_v")
    tokens: int = 8
    deviation: float = 0.02
    zeros: bool = False

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.tokens < 1:
            raise ValueError(f"PrefixConfig.tokens is {self.tokens}, expected at least 1")


def prefix(config: PrefixConfig) -> inject.Maker:
    """Makes the prefix layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        if type(layer) not in (nnx.Linear, nnx.Embed):
            raise TypeError(
                f"{path}: a prefix stands before nnx.Linear and nnx.Embed, found "
                f"{type(layer).__name__}"
            )
        return Prefix(layer, config, key)

    return make


class Prefix(inject.AdapterLayer):
    """A layer and, before what it gives, `prefix` (tokens, out), after any stacking axes."""

    kind = "prefix"

    def __init__(self, layer: nnx.Linear | nnx.Embed, config: PrefixConfig, key: jax.Array):
        super().__init__(layer, config)
        name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
        *lead, _, c_out = getattr(layer, name).get_value().shape
        shape = (*lead, config.tokens, c_out)
        drawn = config.deviation * jax.random.normal(key, shape)
        self.prefix = inject.Trainable(jnp.zeros(shape) if config.zeros else drawn)

    def __call__(self, inputs: Array) -> Float[Array, "*b n o"]:
        out = self.base(inputs)
        if self.is_off:
            return out
        if not isinstance(self.strength, (int, float)):
            raise NotImplementedError(
                "a prefix of a traced strength: tokens are there or not, use a number"
            )
        rows = (self.strength * self.prefix[...]).astype(out.dtype)
        front = jnp.broadcast_to(rows, (*out.shape[:-2], *rows.shape))
        return jnp.concatenate([front, out], axis=-2)
