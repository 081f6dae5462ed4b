"""Layers of one structure, compiled once: a `lax.scan` over their parameters.

A compiler spends its time on every layer of an unrolled network anew; of a scanned one it sees one
layer. Networks whose layers are one module with stacked parameters are scanned by `scan_stacked`
(DiT). Networks whose files number their layers keep a module for each, and `run_layers` stacks
their parameters inside the program, which copies the parameters once a call.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from jaxsynth.models.remat import checkpointed

Layer = TypeVar("Layer")

# Fewer layers of a kind in a row are unrolled: copying their parameters costs more than they take
# to compile.
FEWEST = 6


def run_layers(
    layers: Sequence[Layer],
    x: PyTree,
    call: Callable[[Layer, PyTree], PyTree],
    *,
    remat: str | None = None,
) -> list[PyTree]:
    """What each layer makes of the one's before it: `x = call(layer, x)` for every layer in order.

    Under `remat`, layers in a row that differ in values alone become one scan, where there are
    `FEWEST` of them; others (adapted in another way, say) are unrolled. So are all without it: a
    scan would keep more for the backward pass than XLA keeps of unrolled layers. `call` keeps the
    shapes and types of `x`. Adapters inside may hold arrays that are no Variables: a strength, a
    key of dropout. `remat` names what the backward pass computes again (`models.remat`).
    """
    flat = [_flatten(layer) for layer in layers]
    states: list[PyTree] = []
    start = 0
    while start < len(layers):
        stop = start + 1
        while stop < len(layers) and _alike(flat[start], flat[stop]):
            stop += 1
        if remat is None or stop - start < FEWEST:
            for layer in layers[start:stop]:
                run = checkpointed(lambda x, layer=layer: call(layer, x), remat)
                states.append(x := run(x))
        else:
            x, made = _scan_alike(flat[start:stop], x, call, remat)
            states += made
        start = stop
    return states


def scan_stacked(
    layer: Layer,
    depth: int,
    x: PyTree,
    call: Callable[[Layer, PyTree], PyTree],
    *,
    remat: str | None = None,
) -> PyTree:
    """`x = call(layer, x)`, `depth` times, each time with its own slice of every Variable.

    Of arrays that are no Variables, a strength is the same for all layers and a random key becomes
    one key a layer. ValueError for a Variable whose first axis is not `depth`.
    """
    leaves, treedef = _flatten(layer)
    stacks = {place: leaf.get_value() for place, leaf in enumerate(leaves) if _is_variable(leaf)}
    for place, value in stacks.items():
        if value.ndim == 0 or value.shape[0] != depth:
            raise ValueError(
                f"{type(layer).__name__} holds a {type(leaves[place]).__name__} of shape "
                f"{value.shape}; expected a first axis of {depth} layers"
            )

    def own(place: int, leaf: Any, index: Array, values: dict[int, Array]) -> Any:
        if place in values:
            return leaf.replace(values[place])
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.fold_in(leaf, index)
        return leaf

    def body(x: PyTree, own_values: tuple[Array, dict[int, Array]]) -> tuple[PyTree, None]:
        owned = [own(place, leaf, *own_values) for place, leaf in enumerate(leaves)]
        return call(jax.tree.unflatten(treedef, owned), x), None

    body = checkpointed(body, remat, in_scan=True)
    return jax.lax.scan(body, x, (jnp.arange(depth), stacks))[0]


def _scan_alike(
    flat: Sequence[tuple[list, Any]], x: PyTree, call: Callable, remat: str | None
) -> tuple[PyTree, list[PyTree]]:
    """The last output and all of them."""
    leaves, treedef = flat[0]
    each = [[_value(leaf) for leaf in own] for own, _ in flat]
    arrays = [place for place, value in enumerate(each[0]) if isinstance(value, jax.Array)]
    stacks = {place: jnp.stack([own[place] for own in each]) for place in arrays}

    def body(x: PyTree, values: dict[int, Array]) -> tuple[PyTree, PyTree]:
        owned = [
            leaf.replace(values[place]) if _is_variable(leaf) else values.get(place, leaf)
            for place, leaf in enumerate(leaves)
        ]
        x = call(jax.tree.unflatten(treedef, owned), x)
        return x, x

    x, made = jax.lax.scan(checkpointed(body, remat, in_scan=True), x, stacks)
    return x, [jax.tree.map(lambda state: state[i], made) for i in range(len(flat))]  # noqa: B023


def _flatten(layer: Any) -> tuple[list, Any]:
    return jax.tree.flatten(layer, is_leaf=_is_variable)


def _alike(one: tuple[list, Any], other: tuple[list, Any]) -> bool:
    """Whether two flattened layers differ in the values of arrays alone."""
    return one[1] == other[1] and all(
        _kind(first) == _kind(second) for first, second in zip(one[0], other[0], strict=True)
    )


def _kind(leaf: Any) -> Any:
    """All of a leaf but the values of its array."""
    value = _value(leaf)
    if not isinstance(value, jax.Array):
        return leaf
    variable = (type(leaf), leaf.get_metadata()) if _is_variable(leaf) else None
    return variable, value.shape, value.dtype


def _value(leaf: Any) -> Any:
    return leaf.get_value() if _is_variable(leaf) else leaf


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
