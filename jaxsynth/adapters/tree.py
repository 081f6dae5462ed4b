"""Walks over networks: their layers and variables by dotted path, and copies with others.

Paths are the dotted module paths of the Hugging Face checkpoint; an adapter's `base` never appears
in them. No function changes its input: each copy shares the variables that it keeps.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from jaxsynth.adapters.layer import AdapterLayer, Trainable

T = TypeVar("T")
Path = tuple[Any, ...]
# The attribute that repeats the last axis but one of a layer's parameter.
_SIZES = {"kernel": "in_features", "embedding": "num_embeddings"}


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

    map_variables(note, model)
    return dict(sorted(found.items()))


def parameters(model: nnx.Module) -> set[str]:
    """The dotted paths of the network's own parameters that do not train."""
    found: set[str] = set()

    def note(path: str, variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable, nnx.Param):
            found.add(path)
        return variable

    map_variables(note, model)
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


def map_variables(function: Callable[[str, nnx.Variable], nnx.Variable], model: T) -> T:
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


def _is_layer(node: Any) -> bool:
    if isinstance(node, AdapterLayer):
        return True
    return isinstance(node, nnx.Module) and not any(
        isinstance(value, nnx.Pytree) for value in vars(node).values()
    )


def _dotted(path: Path) -> str:
    """A jax key path in Hugging Face's form: attributes and list indices joined by dots."""
    return ".".join(
        str(getattr(part, "name", getattr(part, "idx", getattr(part, "key", part))))
        for part in path
    )
