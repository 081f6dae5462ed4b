"""Several adapted networks in one set of plain weights: a weighted sum of what each changed.

    W = W0 + sum_k w_k (W_k - W0)

over one base W0, W_k being adapter k merged into it; for LoRA this is the weighted sum of the
updates (task arithmetic, Ilharco et al. 2022, arXiv:2212.04089). New rows of a table are no change
of old ones: they stand one adapter's after the other's, unweighted.

DiffScaler announces a "weight merging scheme" for unseen combinations of its data sets, whose
formula was not found; this is the plain one.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxsynth.adapters import inject


def combine(plain: inject.T, adapted: Sequence[inject.T], weights: Sequence[float]) -> inject.T:
    """The plain network `plain` with `weights[k]` of what each of `adapted` changed in it.

    Row i of the new rows of adapter k's table is row `old + (rows of those before k) + i`.

    Raises ValueError where the numbers differ, or a network has other layers or shapes.
    """
    if len(adapted) != len(weights) or not adapted:
        raise ValueError(f"combine: {len(weights)} weights for {len(adapted)} adapted networks")
    merged = [inject.layers(inject.merge(model)) for model in adapted]
    old = inject.layers(plain)
    for number, found in enumerate(merged):
        if other := set(found) ^ set(old):
            raise ValueError(f"combine: network {number} and the base differ in {sorted(other)[0]}")

    def join(path: str, layer: nnx.Module) -> nnx.Module:
        names = {n for own in merged for n in _params(own[path])}
        values = {}
        for name in sorted(names):
            before = _params(layer).get(name)
            after = [_params(own[path]).get(name) for own in merged]
            values[name] = _joined(f"{path}.{name}", before, after, weights)
        return inject.with_params(layer, values)

    return inject.map_layers(join, plain)


def _params(layer: nnx.Module) -> dict[str, Array]:
    return {
        name: value.get_value()
        for name, value in vars(layer).items()
        if isinstance(value, nnx.Variable) and isinstance(value, (nnx.Param, inject.Trainable))
    }


def _joined(
    name: str, before: Array | None, after: Sequence[Array | None], weights: Sequence[float]
) -> Array:
    dtype = next(value.dtype for value in (before, *after) if value is not None)
    start = jnp.zeros(()) if before is None else before.astype(jnp.float32)
    rows: list[Array] = []
    total = start
    for value, weight in zip(after, weights, strict=True):
        if value is None:  # no bias here, one in another network
            continue
        wide = value.astype(jnp.float32)
        if before is not None and wide.shape != before.shape:
            if not name.endswith("embedding") or wide.shape[1:] != before.shape[1:]:
                raise ValueError(f"combine: {name} has shape {wide.shape}, {before.shape} before")
            rows.append(wide[len(before) :])
            wide = wide[: len(before)]
        total = total + weight * (wide - start)
    return jnp.concatenate([total, *rows]).astype(dtype) if rows else total.astype(dtype)
