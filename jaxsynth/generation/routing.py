"""One batch, many adapters: each image runs with its own."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree


def per_image(
    run: Callable[..., Array], own: PyTree, shared: PyTree, count: int
) -> Callable[..., Array]:
    """`denoise(*rows) -> out` where image i of `count` runs `run(own_i, shared, *rows_i)`.

    `own` has a leading axis of images (`adapters.base.route`). Rows come in whole batches one after
    the other, as guidance stacks its branches (k * count, ...): the k rows of an image share its
    adapter.
    """

    def denoise(*rows: Array) -> Array:
        grouped = [x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for x in rows]
        axes: Any = (0, None, *[0] * len(rows))
        out = jax.vmap(run, in_axes=axes)(own, shared, *grouped)
        return out.swapaxes(0, 1).reshape(-1, *out.shape[2:])

    return denoise
