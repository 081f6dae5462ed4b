"""What every adapter is: a layer that holds the layer it replaces, next to factors of its own."""

import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from jaxsynth.core.patterns import matches_end, matches_whole


class Trainable(nnx.Variable):
    """A parameter that training updates; every other Variable is frozen.

    A sibling of `nnx.Param`, not a subclass as `nnx.LoRAParam` is: a filter for `nnx.Param` must
    not catch it, nor this one the base weights.
    """


class Constant(nnx.Variable):
    """An array that an adapter was made with and never changes: frozen, but no base weight.

    It follows from the configuration, the base weights or a seed, so that no state holds it.
    """


class AdapterLayer(nnx.Module):
    """A base layer and what adapts it.

    A kind sets `kind` and its `Trainable` factors, and implements `__call__`, `merged` where it can
    be merged, and `unmerged` where that can be undone. One whose effect is an added kernel is an
    `update.UpdateLayer`, which has all three.

    `strength` (1 by default) scales the effect: a float is part of the program, a traced scalar an
    argument of it. At 0 the layer must equal its base exactly.
    """

    kind: ClassVar[str] = "adapter"

    def __init__(self, base: nnx.Module, config: Any, *, dropout: float = 0.0):
        self.base = base
        self.config = config
        self.dropout = dropout
        self.strength = 1.0
        # Set by `seed_dropout` in training; without a key the layer is deterministic.
        self.dropout_key = nnx.data(None)

    def merged(self) -> dict[str, Array]:
        """The base layer's parameters with the adapter in them, by name ("kernel", "bias")."""
        raise NotImplementedError(f"a {self.kind} layer cannot be merged into its base")

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        """The base layer's parameters, given the merged ones (equal up to rounding).

        None stands for a bias that merging added.
        """
        raise NotImplementedError(f"merging a {self.kind} layer cannot be undone")

    @property
    def is_off(self) -> bool:
        """Whether the strength is known to be 0 while tracing: the adapter then costs nothing."""
        return isinstance(self.strength, (int, float)) and self.strength == 0

    @property
    def drops(self) -> bool:
        """Whether training drops anything, and so needs a key."""
        return self.dropout > 0

    def drop(self, inputs: Array) -> Array:
        """Dropout on the adapter's inputs: none without a rate or without a key."""
        if self.dropout == 0.0 or self.dropout_key is None:
            return inputs
        keep = jax.random.bernoulli(self.dropout_key, 1.0 - self.dropout, inputs.shape)
        return jnp.where(keep, inputs / (1.0 - self.dropout), 0).astype(inputs.dtype)


# Makes the adapter of one layer from its path and a key; TypeError on a layer it cannot wrap.
Maker = Callable[[str, nnx.Module, jax.Array], AdapterLayer]


def matches(target: str, path: str) -> bool:
    """Whether a target names `path`: all of it, its end after a dot, or by regular expression."""
    return path == target or path.endswith(f".{target}") or matches_whole(target, path)


def first_match(patterns: dict, path: str, default):
    """The value of the first pattern that matches the path or its end after a dot (as in peft)."""
    for pattern, value in patterns.items():
        if matches_end(pattern, path):
            return value
    return default


def key_of(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """The key of a path: it depends on nothing else."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def without_bias(outputs: Array, layer: nnx.Module) -> Array:
    """The outputs of a layer less its bias, if it has one."""
    bias = getattr(layer, "bias", None)
    return outputs if bias is None else outputs - bias[...].astype(outputs.dtype)
