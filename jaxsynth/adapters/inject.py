"""Surgery on networks: wrap layers in adapters, and merge, scale, read, fill and stack them.

An adapter is a layer that holds the layer it replaces (`base`) next to its own `Trainable` factors;
a kind (LoRA, ...) is one file with such a layer and a function that makes it, and everything here
works on any kind. No function changes its input: each returns a new tree around the same base
weights. Paths are the dotted module paths of the Hugging Face checkpoint, so `base` never appears
in them.

Training splits a network by variable type and sees only the factors:

    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)

Many adapters on one base are a `jax.vmap` over stacked `trainable` with `frozen` unmapped.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxsynth.adapters.layer import (
    AdapterLayer,
    Constant,
    Maker,
    Trainable,
    first_match,
    key_of,
    matches,
    without_bias,
)
from jaxsynth.adapters.state import (
    AdapterState,
    MixedConfig,
    config_of,
    configs_of,
    extract,
    load_state,
    route,
    stack,
    unstack,
)
from jaxsynth.adapters.tree import (
    Path,
    layers,
    map_layers,
    map_variables,
    parameters,
    trainable_variables,
    with_attributes,
    with_params,
)

# What callers import: the parts that all operations here are made of come along.
__all__ = [
    "AdapterLayer", "AdapterState", "Constant", "Maker", "MixedConfig", "Path", "T", "Trainable",
    "can_merge", "config_of", "configs_of", "extract", "first_match", "freeze", "inject", "key_of",
    "layers", "load_state", "map_layers", "mark_trainable", "matches", "merge", "parameters",
    "route", "seed_dropout", "stack", "trainable_variables", "unmerge", "unstack",
    "with_attributes", "with_params", "with_scale", "with_values", "without_bias",
]  # fmt: skip

T = TypeVar("T")


def inject(model: T, make: Maker, *, targets: Sequence[str], rngs: nnx.Rngs | Key[Array, ""]) -> T:
    """A copy of `model` whose target layers are wrapped by `make`; base weights are shared.

    A target is a path ("down_blocks.0.attentions.0.proj_in"), the end of one ("to_q", "to_out.0")
    or a regular expression for a whole one (".*attn2.*"). A layer's key depends on its path alone,
    so its initial values do not change with the other targets.

    Raises:
        ValueError: a target matches no layer, or a matched layer is wrapped already.
        TypeError: a matched layer is of a type that `make` does not adapt.
    """
    if isinstance(targets, str):
        raise TypeError(f"targets: expected a sequence of patterns, found the string {targets!r}")
    key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
    unmatched = set(targets)
    present: list[str] = []

    def wrap(path: str, layer: nnx.Module) -> nnx.Module:
        present.append(path)
        matching = {target for target in targets if matches(target, path)}
        unmatched.difference_update(matching)
        if not matching:
            return layer
        if isinstance(layer, AdapterLayer):
            raise ValueError(f"{path}: already wrapped by a {layer.kind} adapter")
        return make(path, layer, key_of(key, path))

    adapted = map_layers(wrap, model)
    if unmatched or not targets:
        raise ValueError(
            f"targets {sorted(unmatched)} match no layer; the layers here end in "
            f"{_endings(present)}"
        )
    return adapted


def merge(model: T) -> T:
    """The plain network with every adapter in its base layer's weights, at its current strength."""

    def fold(_: str, layer: nnx.Module) -> nnx.Module:
        if not isinstance(layer, AdapterLayer):
            return layer
        return with_params(layer.base, layer.merged())

    return map_layers(fold, model)


def unmerge(merged: T, adapted: T) -> T:
    """`adapted` again, its base weights recovered from `merged` (equal up to rounding).

    Raises NotImplementedError for a kind whose merge cannot be undone.
    """
    plain = layers(merged)

    def unfold(path: str, layer: nnx.Module) -> nnx.Module:
        if path not in plain:
            raise ValueError(f"{path}: a layer of the adapted network that the merged one lacks")
        if not isinstance(layer, AdapterLayer):
            return plain[path]
        names = layer.merged()
        found = {name: getattr(plain[path], name)[...] for name in names}
        return with_attributes(layer, base=with_params(layer.base, layer.unmerged(found)))

    return map_layers(unfold, adapted)


def with_values(model: T, values: nnx.State) -> T:
    """`model` with other values in the kinds of variables that it has: training's marks are gone.

    `values` are those of a copy of it with other marks, whose variables come in the same order.
    """
    graphdef, state = nnx.split(model)
    leaves = jax.tree.leaves(values)
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


def can_merge(model: nnx.Module) -> bool:
    """Whether all adapters of the network can be merged into its weights."""
    return all(
        type(layer).merged is not AdapterLayer.merged
        for layer in layers(model).values()
        if isinstance(layer, AdapterLayer)
    )


def with_scale(model: T, scale: float | Float[Array, ""]) -> T:
    """A copy of `model` with every adapter at strength `scale` (0: the base, 1: as trained).

    A float is baked into compiled programs, a (traced) scalar is not.
    """
    static = isinstance(scale, (int, float))
    value = float(scale) if static else jnp.asarray(scale, jnp.float32)

    def rescale(_: str, layer: nnx.Module) -> nnx.Module:
        if not isinstance(layer, AdapterLayer):
            return layer
        return with_attributes(layer, strength=nnx.static(value) if static else nnx.data(value))

    return map_layers(rescale, model)


def seed_dropout(model: T, key: Key[Array, ""]) -> T:
    """A copy of `model` whose adapters drop inputs with masks that follow from `key`.

    Call it inside the loss, on the merged network and with the step's key: a stateful dropout would
    repeat one mask for ever, because a functional step discards its counter. A layer called twice
    in one forward pass uses the same mask twice. Without this call adapters are deterministic.
    """

    def seed(path: str, layer: nnx.Module) -> nnx.Module:
        if not isinstance(layer, AdapterLayer) or not layer.drops:
            return layer
        return with_attributes(layer, dropout_key=nnx.data(key_of(key, path)))

    return map_layers(seed, model)


def mark_trainable(model: T, patterns: Sequence[str] | None = None) -> T:
    """A copy of `model` whose parameters are `Trainable`: all, or those that a pattern matches.

    Patterns are those of `inject`, on parameter paths in NNX names ("conv_in.bias", ".*bias").
    Raises ValueError if a pattern matches no parameter.
    """
    unmatched = set(patterns or ())

    def mark(path: str, variable: nnx.Variable) -> nnx.Variable:
        if not isinstance(variable, nnx.Param):
            return variable
        matching = {pattern for pattern in patterns or () if matches(pattern, path)}
        unmatched.difference_update(matching)
        if patterns is not None and not matching:
            return variable
        return Trainable(variable.get_value(), **variable.get_metadata())

    marked = map_variables(mark, model)
    if unmatched:
        raise ValueError(f"mark_trainable: patterns {sorted(unmatched)} match no parameter")
    return marked


def freeze(model: T, patterns: Sequence[str]) -> T:
    """A copy of `model` whose `Trainable` variables that a pattern matches no longer train.

    Patterns are those of `inject`, on their paths ("lora_A"). They are `Constant` then, and no
    longer of the adapter's state. ValueError if a pattern matches none.
    """
    unmatched = set(patterns)

    def fix(path: str, variable: nnx.Variable) -> nnx.Variable:
        matching = {pattern for pattern in patterns if matches(pattern, path)}
        if not isinstance(variable, Trainable) or not matching:
            return variable
        unmatched.difference_update(matching)
        return Constant(variable.get_value(), **variable.get_metadata())

    frozen = map_variables(fix, model)
    if unmatched:
        raise ValueError(f"freeze: patterns {sorted(unmatched)} match no trainable variable")
    return frozen


def _endings(paths: Sequence[str]) -> list[str]:
    """The distinct last names of paths, an index with the name before it ("to_out.0")."""
    found = set()
    for path in paths:
        parts = path.split(".")
        found.add(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])
    return sorted(found)
