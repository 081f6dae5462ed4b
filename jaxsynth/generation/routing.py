"""One batch, many adapters: each image runs with its own, and what that is worth."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from jaxsynth.adapters.inject import Trainable, merge, route, stack, with_scale
from jaxsynth.models.diffusion.dit import DiT


def per_image(
    run: Callable[..., Array],
    own: PyTree,
    shared: PyTree,
    count: int,
    *,
    stacked: Collection[str] = (),
) -> Callable[..., Array]:
    """`denoise(*rows) -> out` where image i of `count` runs `run(own_i, shared, *rows_i)`.

    `own` has a leading axis of images (`adapters.inject.route`). Rows are arrays or pytrees of
    them, whole batches one after the other, as guidance stacks its branches (k * count, ...): the k
    rows of an image share its adapter. `stacked` names the modules in `own` that scan over their
    layers (`DiT.stacked`): their arrays are brought into the scan's order here, and not again at
    every step of a sampler.
    """

    def axis(path: tuple, _: Array) -> int:
        return int(any(getattr(part, "key", None) in stacked for part in path))

    axes = jax.tree_util.tree_map_with_path(axis, own)
    own = jax.tree.map(lambda leaf, axis: jnp.moveaxis(leaf, 0, axis), own, axes)

    def denoise(*rows: PyTree) -> Array:
        grouped = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), rows)
        in_axes: Any = (axes, None, *[0] * len(rows))
        out = jax.vmap(run, in_axes=in_axes)(own, shared, *grouped)
        return out.swapaxes(0, 1).reshape(-1, *out.shape[2:])

    return denoise


def routing_differences(base: DiT, models: list[DiT]) -> dict[str, float]:
    """The largest differences between a mixed batch and separate runs, and between base and off.

    {"mixed": over outputs of a batch that mixes all models, "off": of each model at strength 0 on
    the base's classes, "merged": of each model merged into plain weights}.
    """
    config = base.config
    keys = jax.random.split(jax.random.key(0), 3)
    count = 4 * len(models)
    x = jax.random.normal(
        keys[0], (count, config.sample_size, config.sample_size, config.in_channels)
    )
    t = jax.random.randint(keys[1], (count,), 0, 1000)
    which = jnp.arange(count) % len(models)
    labels = jnp.full(count, config.null_label + 1)
    graphdef, _, frozen = nnx.split(models[0], Trainable, ...)
    factors = stack([nnx.state(model, Trainable) for model in models])

    @jax.jit
    def mixed(factors, frozen, x, t, labels):
        def one(factors, frozen, *rows):
            return nnx.merge(graphdef, factors, frozen)(*rows)

        return per_image(one, route(factors, which), frozen, count)(x, t, labels)

    call: Callable = jax.jit(lambda model, *rows: model(*rows))
    together = mixed(factors, frozen, x, t, labels)
    apart = jnp.stack([call(model, x, t, labels) for model in models])[which, jnp.arange(count)]
    old = jax.random.randint(keys[2], (count,), 0, config.null_label + 1)
    plain = call(base, x, t, old)
    off = [jnp.abs(call(with_scale(model, 0.0), x, t, old) - plain).max() for model in models]
    merged = [
        jnp.abs(call(merge(model), x, t, labels) - call(model, x, t, labels)).max()
        for model in models
    ]
    return {
        "mixed": float(jnp.abs(together - apart).max()),
        "off": float(max(off)),
        "merged": float(max(merged)),
        "scale": float(jnp.abs(apart).max()),
    }
