"""What a training program needs, before there is anything to train: its memory and its work.

A program is traced, placed on a mesh and compiled from shapes alone, so that a configuration for
many accelerators is checked on a laptop whose devices are fake. Nothing of its size is allocated.

Memory is what the compiler reports for the devices that it compiled for. XLA for CPUs computes
bfloat16 in float32 and plans memory less tightly than it does for accelerators, so temporaries of
fake CPU devices are an upper estimate; arguments are exact anywhere. Work is counted in the traced
program, because XLA's own analysis counts the body of a loop (all layers of a scanned network)
once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsynth.adapters.inject import Trainable, config_of
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.report.tables import Table
from jaxsynth.tasks import class_conditional
from jaxsynth.tasks.class_conditional import TrainConfig
from jaxsynth.training import sharding
from jaxsynth.training.step import init_state, stacked


@dataclass(frozen=True)
class Plan:
    """A compiled program's needs: bytes on each device, floating-point operations of one update.

    `arguments` is all that lies on a device between calls, `frozen` the part of it that training
    does not change. `outputs` counts those that do not take an argument's place.
    `flops` are those of matrix products and convolutions on all devices together, recomputation
    included. `note` says what was assumed.
    """

    name: str
    devices: int
    arguments: int
    frozen: int
    outputs: int
    temporaries: int
    flops: float
    note: str = ""

    @property
    def bytes(self) -> int:
        """The most that a device holds at once."""
        return self.arguments + self.outputs + self.temporaries


def plan_adapt(
    name: str,
    make: Callable[[], DiT],
    schedule: NoiseSchedule,
    config: TrainConfig,
    mesh: Mesh,
    *,
    images: int,
    views: int = 1,
    sets: int = 0,
    note: str = "",
) -> Plan:
    """The program that `class_conditional.adapt` runs for `images` latents of `views` views.

    With `sets` it is that of `adapt_each` for so many, each of so many images. `make` builds the
    network to train; it is only traced, and so are its adapters. Raises ValueError for a weight
    without a sharding rule and a batch that does not divide over the mesh.
    """
    if not sets:
        class_conditional.check_rows(config, mesh)
    model = nnx.eval_shape(make)
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    null = model.config.null_label
    tx, step = class_conditional.make_step(
        graphdef, schedule, config, null, None if sets else mesh, config_of(model)
    )
    init = partial(init_state, tx=tx, ema=bool(config.ema_decay))
    state = jax.eval_shape(lambda values: init(values, key=jax.random.key(0)), trainable)
    data = jax.eval_shape(lambda: _no_latents(model, config, images, views))
    if sets:
        step = stacked(step)
        state, data = (_repeated(tree, sets + -sets % mesh.shape["data"]) for tree in (state, data))
    whole = PartitionSpec("data") if sets else PartitionSpec()
    placed = (_placed(state, mesh, whole), _cut(frozen, mesh), _placed(data, mesh, whole))
    return plan(name, step, *placed, steps=config.steps_per_call, note=note)


def plan(
    name: str,
    step: Callable[..., Any],
    state: PyTree[jax.ShapeDtypeStruct],
    frozen: PyTree[jax.ShapeDtypeStruct],
    data: PyTree[jax.ShapeDtypeStruct],
    *,
    steps: int = 1,
    note: str = "",
) -> Plan:
    """Compile `step(state, frozen, data) -> (state, metrics)` of `steps` updates, as `fit` does.

    Every leaf has the NamedSharding that it will lie in; the state is donated and keeps its own.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    mesh = jax.tree.leaves(places)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    traced = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere)).trace(
        state, frozen, data
    )
    memory = traced.lower().compile().memory_analysis()
    return Plan(
        name=name,
        devices=mesh.size,
        arguments=memory.argument_size_in_bytes,
        frozen=sum(map(_bytes_on_a_device, jax.tree.leaves(frozen))),
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=count_flops(traced.jaxpr) / steps,
        note=note,
    )


def table(plans: Sequence[Plan]) -> Table:
    """A row for each program: MiB on each device, and GFLOP of one update on all together."""
    rows = []
    for one in plans:
        sizes = (one.arguments, one.frozen, one.outputs, one.temporaries, one.bytes)
        rows.append([one.name, *(size / 2**20 for size in sizes), _gflop(one.flops)])
    columns = ["Program", "arguments", "frozen", "outputs", "temporary", "sum", "GFLOP"]
    caption = "MiB on each device; GFLOP of one update, all devices together"
    return Table(columns, rows, caption=caption, better=None)


def _gflop(flops: float) -> str:
    value = flops / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count_flops(program: core.ClosedJaxpr | core.Jaxpr) -> float:
    """Operations of the matrix products and convolutions in a traced program, loops in full.

    A multiplication and an addition are two. Of branches the most expensive counts, and a loop
    without a known end once.
    """
    jaxpr = program.jaxpr if isinstance(program, core.ClosedJaxpr) else program
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            left = equation.invars[0].aval.shape
            (contracted, _), _ = params["dimension_numbers"]
            out = equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            out = equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(kernel) / outputs
        elif name == "cond":
            total += max(map(count_flops, params["branches"]))
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(map(count_flops, _programs_in(params)))
    return total


def _programs_in(params: dict[str, Any]) -> list[core.ClosedJaxpr | core.Jaxpr]:
    return [x for x in params.values() if isinstance(x, core.ClosedJaxpr | core.Jaxpr)]


def _no_latents(model: DiT, config: TrainConfig, images: int, views: int) -> dict[str, jax.Array]:
    """What `draw_batch` takes; for tracing only."""
    side, channels = model.config.sample_size, model.config.in_channels
    mean = jax.numpy.zeros((images, views, side, side, channels))
    one = jax.numpy.zeros((), jax.numpy.int32)
    data = {
        "mean": mean,
        "std": mean,
        "labels": jax.numpy.zeros(images, jax.numpy.int32),
        "count": one,
        "views": one,
        "key": jax.random.key(0),
    }
    if config.retention:
        data["kept"] = jax.numpy.zeros((config.retention.images, side, side, channels))
    return data


def _repeated(tree: PyTree, count: int) -> PyTree:
    """With a first axis of `count`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)


def _placed(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _cut(frozen: PyTree, mesh: Mesh) -> PyTree:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        frozen,
        sharding.shardings_for(frozen, mesh, sharding.DIT),
    )


def _bytes_on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
