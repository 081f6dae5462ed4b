"""Where a training's state and data lie on a mesh, of arrays or of their shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsynth.core.errors import UserError
from jaxsynth.training import sharding
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.step import TrainState
from jaxsynth.training.task import Learns, Resident, Streamed, Task


def state_places(state: TrainState, task: Task, mesh: Mesh, together: bool) -> TrainState:
    """The NamedSharding of every leaf of a state."""
    whole = NamedSharding(mesh, PartitionSpec())
    stack_place = NamedSharding(mesh, PartitionSpec("data"))
    if together:
        return jax.tree.map(lambda _: stack_place, state)

    def choose(how: Learns, tree: PyTree) -> PyTree:
        if how == "table":
            return sharding.shardings_for(tree, mesh, task.table)
        if how == "stack":
            return jax.tree.map(lambda leaf: stack_place if leaf.ndim else whole, tree)
        return jax.tree.map(lambda _: whole, tree)

    def of_parts(tree: PyTree) -> PyTree:
        if isinstance(task.learns, Mapping):
            # In the order of leaves, and rebuilt from them, because an nnx.State wraps its parts.
            places = {part: choose(how, tree[part]) for part, how in task.learns.items()}
            leaves = jax.tree.leaves([places[part] for part in sorted(places)])
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)
        return choose(task.learns, tree)

    everywhere = lambda tree: jax.tree.map(lambda _: whole, tree)  # noqa: E731
    return TrainState(
        step=whole,
        trainable=of_parts(state.trainable),
        opt_state=of_parts(state.opt_state),
        ema=None
        if state.ema is None
        else state.ema._replace(count=whole, ema=of_parts(state.ema.ema)),
        rate=everywhere(state.rate),
        key=whole,
    )


def filled_rows(
    data: dict[str, Any], names: Sequence[str], mesh: Mesh, stacks: bool, abstract: bool
) -> dict[str, Any]:
    """Arrays of examples filled up to a multiple of the devices; the filling is never drawn."""
    if stacks:
        return data
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    filled = dict(data)
    for name in (one for one in names if one in data):
        short = -len(data[name]) % parts if not abstract else -data[name].shape[0] % parts
        if not short:
            continue
        if abstract:
            leaf = data[name]
            filled[name] = jax.ShapeDtypeStruct(
                (leaf.shape[0] + short, *leaf.shape[1:]), leaf.dtype
            )
        else:
            host = np.asarray(data[name])
            filled[name] = np.concatenate([host, np.zeros((short, *host.shape[1:]), host.dtype)])
    return filled


def data_places(
    data: dict[str, Any], task: Task, mesh: Mesh, together: bool
) -> dict[str, NamedSharding]:
    def choose(name: str) -> PartitionSpec:
        if together:
            return PartitionSpec("data")
        return batch_rows(task) if name in task.batches.sharded else PartitionSpec()

    return {
        name: jax.tree.map(lambda _: NamedSharding(mesh, choose(name)), leaf)  # noqa: B023
        for name, leaf in data.items()
    }


def batch_rows(task: Task) -> PartitionSpec:
    """How a batch's first axis is cut."""
    return PartitionSpec("data") if is_stack(task) else sharding.BATCH


def is_stack(task: Task) -> bool:
    """Whether a part that learns is a stack: batches and their data then have its axis first."""
    learns = task.learns.values() if isinstance(task.learns, Mapping) else (task.learns,)
    return "stack" in learns


def check_rows(config: TrainingConfig, mesh: Mesh, batches: Resident | Streamed) -> None:
    """UserError unless every part of a batch divides over the devices of `mesh`."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    cut = f" in {config.accumulate} parts (accumulate)" if config.accumulate > 1 else ""
    if config.batch_size // config.accumulate % parts:
        raise UserError(
            f"batch_size: {config.batch_size}{cut} is not divisible over data x fsdp = {parts} "
            f"devices; the next that is: {-(-config.batch_size // parts) * parts}"
        )
    if isinstance(batches, Streamed):
        return
    # A batch may consist of parts, each with fewer rows than it.
    data = jax.tree.map(shape_of, batches.data)
    if batches.buckets:
        data |= jax.tree.map(shape_of, batches.buckets.data[0])
    batch = jax.eval_shape(batches.next_batch, jax.ShapeDtypeStruct((), jnp.int32), data)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[0] // config.accumulate % parts:
            raise UserError(
                f"batch_size: of {config.batch_size}, {leaf.shape[0]} rows are "
                f"{sharding.dotted(path)!r}{cut}, not divisible over data x fsdp = {parts} devices"
            )


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, or of a shape."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
