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

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxsynth.core.patterns import matches_end, matches_whole

T = TypeVar("T")
Path = tuple[Any, ...]
# The attribute that repeats the last axis but one of a layer's parameter.
_SIZES = {"kernel": "in_features", "embedding": "num_embeddings"}


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


@dataclass(frozen=True)
class AdapterState:
    """The trainable values of an adapted network, without the network.

    `arrays` maps "<module path>.<factor>" to an array; `config` is the kind's configuration, or
    None where no layer is wrapped (biases or a whole network trained in place). A pytree, so
    states can be stacked, averaged and flattened.
    """

    arrays: dict[str, Array]
    config: Any = None


jax.tree_util.register_dataclass(AdapterState, data_fields=["arrays"], meta_fields=["config"])


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


def matches(target: str, path: str) -> bool:
    """Whether a target names `path`: all of it, its end after a dot, or by regular expression."""
    return path == target or path.endswith(f".{target}") or matches_whole(target, path)


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


def extract(model: nnx.Module) -> AdapterState:
    """The trainable values of `model` and the configuration that its adapters share."""
    arrays = {path: variable.get_value() for path, variable in trainable_variables(model).items()}
    if not arrays:
        raise ValueError("extract: nothing in the network is trainable")
    return AdapterState(arrays, config_of(model))


def config_of(model: nnx.Module) -> Any:
    """The configuration that the network's adapters share, None where there are none.

    ValueError where they have several.
    """
    found = [layer for layer in layers(model).values() if isinstance(layer, AdapterLayer)]
    configs = {layer.config for layer in found if layer.config is not None}
    if len(configs) > 1:
        raise ValueError(f"extract: the network holds adapters of {len(configs)} configurations")
    return configs.pop() if configs else None


def can_merge(model: nnx.Module) -> bool:
    """Whether all adapters of the network can be merged into its weights."""
    return all(
        type(layer).merged is not AdapterLayer.merged
        for layer in layers(model).values()
        if isinstance(layer, AdapterLayer)
    )


def load_state(model: T, state: AdapterState) -> T:
    """A copy of `model` with the trainable values of `state`, cast to the dtypes that it has.

    Raises ValueError naming every key that is missing, unknown or of another shape.
    """
    expected = trainable_variables(model)
    missing, unknown = expected.keys() - state.arrays.keys(), state.arrays.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"adapter state: missing keys {_some(missing)}, unknown keys {_some(unknown)}"
        )
    for path, variable in expected.items():
        found, wanted = jnp.shape(state.arrays[path]), variable.get_value().shape
        if found != wanted:
            raise ValueError(f"adapter state: {path} has shape {found}, expected {wanted}")

    def fill(path: str, variable: nnx.Variable) -> nnx.Variable:
        if path not in expected or not isinstance(variable, Trainable):
            return variable
        value = jnp.asarray(state.arrays[path], variable.get_value().dtype)
        return Trainable(value, **variable.get_metadata())

    return _map_variables(fill, model)


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


def first_match(patterns: dict, path: str, default):
    """The value of the first pattern that matches the path or its end after a dot (as in peft)."""
    for pattern, value in patterns.items():
        if matches_end(pattern, path):
            return value
    return default


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

    marked = _map_variables(mark, model)
    if unmatched:
        raise ValueError(f"mark_trainable: patterns {sorted(unmatched)} match no parameter")
    return marked


def freeze(model: T, patterns: Sequence[str]) -> T:
    """A copy of `model` whose `Trainable` variables that a pattern matches no longer train.

    Patterns are those of `inject`, on their paths ("lora_A"). They are then part of the base, and
    no longer of the adapter's state. ValueError if a pattern matches none.
    """
    unmatched = set(patterns)

    def fix(path: str, variable: nnx.Variable) -> nnx.Variable:
        matching = {pattern for pattern in patterns if matches(pattern, path)}
        if not isinstance(variable, Trainable) or not matching:
            return variable
        unmatched.difference_update(matching)
        return nnx.Param(variable.get_value(), **variable.get_metadata())

    frozen = _map_variables(fix, model)
    if unmatched:
        raise ValueError(f"freeze: patterns {sorted(unmatched)} match no trainable variable")
    return frozen


def stack(states: Sequence[T]) -> T:
    """States (or any pytrees) of one structure, their arrays stacked on a new first axis.

    Raises ValueError naming the first leaf whose shape differs.
    """
    if not states:
        raise ValueError("stack: no states")
    first = jax.tree_util.tree_leaves_with_path(states[0])
    for number, state in enumerate(states[1:], 1):
        if jax.tree.structure(state) != jax.tree.structure(states[0]):
            raise ValueError(f"stack: state {number} has other keys or configuration than state 0")
        for (path, leaf), other in zip(first, jax.tree.leaves(state), strict=True):
            if jnp.shape(leaf) != jnp.shape(other):
                raise ValueError(
                    f"stack: {jax.tree_util.keystr(path)} has shape {jnp.shape(other)} in state "
                    f"{number}, {jnp.shape(leaf)} in state 0"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstack(stacked: T) -> list[T]:
    """The states that `stack` put together."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]


def route(stacked: T, index: Int[Array, " b"]) -> T:
    """One state a sample: row `index[i]` of every stacked array at position i.

    For `jax.vmap(one_sample, in_axes=(0, None, 0))(route(stacked, index), frozen, samples)`.
    """
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def layers(model: nnx.Module) -> dict[str, nnx.Module]:
    """The layers by dotted path: adapters, and modules that hold no other module."""
    found: dict[str, nnx.Module] = {}

    def note(path: str, layer: nnx.Module) -> nnx.Module:
        found[path] = layer
        return layer

    map_layers(note, model)
    return found


def trainable_variables(model: nnx.Module) -> dict[str, Trainable]:
    """The `Trainable` variables by dotted path, sorted."""
    found: dict[str, Trainable] = {}

    def note(path: str, variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable, Trainable):
            found[path] = variable
        return variable

    _map_variables(note, model)
    return dict(sorted(found.items()))


def parameters(model: nnx.Module) -> set[str]:
    """The dotted paths of the network's own parameters that do not train."""
    found: set[str] = set()

    def note(path: str, variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable, nnx.Param):
            found.add(path)
        return variable

    _map_variables(note, model)
    return found


def map_layers(function: Callable[[str, nnx.Module], nnx.Module], model: T) -> T:
    """`model` with every layer replaced by `function(path, layer)`; an error if one is shared."""
    seen: dict[int, str] = {}

    def visit(path: Path, node: Any) -> Any:
        if not isinstance(node, nnx.Module):
            return node
        name = _dotted(path)
        if id(node) in seen:
            raise ValueError(f"{name}: the same layer object as {seen[id(node)]}; untie it first")
        seen[id(node)] = name
        return function(name, node)

    # Variables are leaves, or a copy would get new ones and share no weights.
    return jax.tree_util.tree_map_with_path(
        visit, model, is_leaf=lambda node: isinstance(node, nnx.Variable) or _is_layer(node)
    )


def _map_variables(function: Callable[[str, nnx.Variable], nnx.Variable], model: T) -> T:
    """`model` with every Variable replaced by `function(path, variable)`."""
    adapters = {
        path
        for path, node in jax.tree_util.tree_leaves_with_path(
            model, is_leaf=lambda node: isinstance(node, AdapterLayer)
        )
        if isinstance(node, AdapterLayer)
    }

    def visit(path: Path, node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return node
        parts = tuple(
            part
            for i, part in enumerate(path)
            if path[:i] not in adapters or _dotted((part,)) != "base"
        )
        return function(_dotted(parts), node)

    return jax.tree_util.tree_map_with_path(
        visit, model, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def _is_layer(node: Any) -> bool:
    if isinstance(node, AdapterLayer):
        return True
    return isinstance(node, nnx.Module) and not any(
        isinstance(value, nnx.Pytree) for value in vars(node).values()
    )


def with_attributes(module: T, **attributes: Any) -> T:
    """A shallow copy of `module` with other attributes; its Variables are the same objects."""
    # Only modules and Variables are kept whole: NNX's record of the trace that an object belongs to
    # must be a new one, or attributes could not be set inside jit.
    children, treedef = jax.tree.flatten(
        module,
        is_leaf=lambda node: node is not module and isinstance(node, (nnx.Pytree, nnx.Variable)),
    )
    copy = jax.tree.unflatten(treedef, children)
    for name, value in attributes.items():
        setattr(copy, name, value)
    return copy


def with_params(layer: T, values: dict[str, Array | None]) -> T:
    """A copy of a layer with other parameter values; None removes a bias, a value can add one.

    A kernel of more inputs or a table of more rows changes the size that the layer says it has.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        old = getattr(layer, name)
        if name in _SIZES and value is not None and value.shape[-2] != old.get_value().shape[-2]:
            changed[_SIZES[name]] = value.shape[-2]
        if value is None:
            changed[name] = nnx.data(None)
        else:
            changed[name] = (
                nnx.Param(value) if old is None else type(old)(value, **old.get_metadata())
            )
        if name == "bias" and (old is None) != (value is None):
            changed["use_bias"] = value is not None
    return with_attributes(layer, **changed)


def without_bias(outputs: Array, layer: nnx.Module) -> Array:
    """The outputs of a layer less its bias, if it has one."""
    bias = getattr(layer, "bias", None)
    return outputs if bias is None else outputs - bias[...].astype(outputs.dtype)


def key_of(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """The key of a path: it depends on nothing else."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _dotted(path: Path) -> str:
    """A jax key path in Hugging Face's form: attributes and list indices joined by dots."""
    return ".".join(
        str(getattr(part, "name", getattr(part, "idx", getattr(part, "key", part))))
        for part in path
    )


def _endings(paths: Sequence[str]) -> list[str]:
    """The distinct last names of paths, an index with the name before it ("to_out.0")."""
    found = set()
    for path in paths:
        parts = path.split(".")
        found.add(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])
    return sorted(found)


def _some(keys: set[str]) -> str:
    """Up to five keys for a message."""
    shown = sorted(keys)[:5]
    rest = len(keys) - len(shown)
    return f"{shown}" + (f" and {rest} more" if rest else "")
