"""What a training program needs, before there is anything to train: its memory and its work.

A program is traced, placed on a mesh and compiled from shapes alone, so that a configuration for
many accelerators is checked on a laptop whose devices are fake. Nothing of its size is allocated.

Memory is what the compiler reports for the devices that it compiled for. Arguments are exact
anywhere; temporaries of fake CPU devices are the CPU's own, which computes bfloat16 in float32 and
attends in chunks: an accelerator's may be smaller or larger. Work is counted in the traced
program, because XLA's own analysis counts the body of a loop (all layers of a scanned network)
once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree


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


def compile_plan(
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
    return measure(name, traced, mesh.size, frozen, steps=steps, note=note)


def measure(
    name: str,
    traced: Any,
    devices: int,
    frozen: PyTree[jax.ShapeDtypeStruct],
    *,
    steps: int = 1,
    note: str = "",
) -> Plan:
    """Compile a traced program of `steps` updates; `frozen` are those arguments that stay."""
    memory = traced.lower().compile().memory_analysis()
    return Plan(
        name=name,
        devices=devices,
        arguments=memory.argument_size_in_bytes,
        frozen=sum(map(_bytes_on_a_device, jax.tree.leaves(frozen))),
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=count_flops(traced.jaxpr) / steps,
        note=note,
    )


def shaped(tree: PyTree, places: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes of arrays with the shardings that they will lie in."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x),
                                              sharding=place),
        tree,
        places,
    )  # fmt: skip


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


def _bytes_on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
