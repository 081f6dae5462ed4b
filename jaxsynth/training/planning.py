"""What a program needs, before there is anything to run: its memory, its work and its traffic.

A program is traced, placed on a mesh and compiled from shapes alone, so that a configuration for
many accelerators is checked on a laptop, for fake CPU devices or for a TPU slice that is not there
(`training.chips`). Nothing of its size is allocated.

Memory is what the compiler reports for the devices that it compiled for. Arguments are exact
anywhere; temporaries of fake CPU devices are the CPU's own, which computes bfloat16 in float32: an
accelerator's may be smaller or larger. Work is counted in the traced program, because XLA's own
analysis counts the body of a loop (all layers of a scanned network) once; traffic is read from the
compiled one (`training.hlo`).
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsynth.core.errors import UserError
from jaxsynth.training.chips import Chip
from jaxsynth.training.hlo import Collective, traffic

# Beyond so many times a batch's unit it is no batch any more.
MOST_UNITS = 2**16


@dataclass(frozen=True)
class Plan:
    """A compiled program's needs: bytes on each device, work and traffic of one update.

    `arguments` are the program's own, `unread` what lies beside them on a device though the program
    does not read it (a sampler's text encoder), `frozen` the part of both that training does not
    change. `outputs` counts those that do not take an argument's place.
    `flops` are those of matrix products and convolutions on all devices together, recomputation
    included. `moved` are the bytes that a device reads and writes in its memory, `collectives` its
    exchanges with others, `largest` the largest array of each kind of them; all of a program that
    the compiler refused for its memory are left out, and `temporaries` are what it said.
    `images` counts the examples of one update, 0 where it is about none. `updates` is how often the
    whole run calls the program, 0 where that is not known before. `note` says what was assumed.
    """

    name: str
    devices: int
    arguments: int
    frozen: int
    outputs: int
    temporaries: int
    flops: float
    moved: float = 0.0
    collectives: tuple[Collective, ...] = ()
    largest: tuple[tuple[str, str], ...] = ()
    unread: int = 0
    refused: bool = False
    images: int = 0
    updates: int = 0
    note: str = ""

    @property
    def bytes(self) -> int:
        """The most that a device holds at once."""
        return self.arguments + self.unread + self.outputs + self.temporaries

    @property
    def received(self) -> float:
        """Bytes that a device receives from others in one update."""
        return sum(one.received for one in self.collectives)

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that one update takes at the least, by what limits it."""
        return {
            "compute": self.flops / self.devices / chip.flops,
            "memory": self.moved / chip.bandwidth,
            "links": self.received / chip.links,
        }

    def seconds(self, chip: Chip) -> float:
        """The least time of one update."""
        return max(self.bounds(chip).values())


@dataclass(frozen=True)
class Program:
    """A program of a run that is still to be compiled, for any size of its batch.

    Args:
        build: compiles it for a batch size.
        field: the config's field that says the batch size; "" where none does.
        batch: its value.
        unit: batch sizes are multiples of it.
        updates: how often the whole run calls it with batches of a size, 0 where that is not known.
    """

    name: str
    build: Callable[[int], Plan]
    field: str = ""
    batch: int = 0
    unit: int = 1
    updates: Callable[[int], int] | None = None

    def compile(self) -> Plan:
        """The plan of the config's own batch size; UserError, naming the program, as `run`."""
        return self.of(self.batch)

    def of(self, batch: int) -> Plan:
        """The plan of another batch size."""
        try:
            updates = 0 if self.updates is None else self.updates(batch)
            return dataclasses.replace(self.build(batch), updates=updates)
        except UserError as error:
            where = f" (--config.{self.field}=)" if self.field else ""
            raise UserError(f"{self.name}: {error}{where}") from error


def rows_of(mesh: Mesh) -> int:
    """The devices that share a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def with_rows(program: Program, rows: int) -> Program:
    """The program with a batch of `rows` on each device that shares one (of each adapter, where
    several train together); one whose batch no field says stays as it is.
    """
    if not program.field:
        return program
    return dataclasses.replace(program, batch=rows * program.unit)


def smaller_batch(program: Program, memory: float) -> tuple[int, Plan | None]:
    """The largest of half the batch, a quarter, ... that fits in so many bytes, and its plan.

    No plan where not even the least size does. UserError as the program.
    """
    units = max(program.batch // program.unit, 1)
    while units > 1:
        units = math.ceil(units / 2)
        batch, plan = units * program.unit, program.of(units * program.unit)
        if fits(plan, memory):
            return batch, plan
    return program.unit, None


def largest_batch(program: Program, memory: float) -> tuple[int, Plan | None]:
    """The largest batch that fits in so many bytes, to a sixteenth, and its plan.

    From the program's own size by doubling or halving, then by bisection. No plan where not even
    the least size fits. UserError as the program.
    """
    units = max(program.batch // program.unit, 1)
    found: dict[int, Plan] = {}

    def good(units: int) -> bool:
        found[units] = program.of(units * program.unit)
        return fits(found[units], memory)

    if good(units):
        low, high = units, 2 * units
        while high <= MOST_UNITS and good(high):
            low, high = high, 2 * high
    else:
        low, high = units // 2, units
        while low and not good(low):
            low, high = low // 2, low
    while low and high - low > max(low // 16, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return max(low, 1) * program.unit, found[low] if low else None


def fits(plan: Plan, memory: float) -> bool:
    """Whether a device with so many bytes runs the program."""
    return not plan.refused and plan.bytes <= memory


def compile_plan(
    name: str,
    step: Callable[..., Any],
    state: PyTree[jax.ShapeDtypeStruct],
    frozen: PyTree[jax.ShapeDtypeStruct],
    data: PyTree[jax.ShapeDtypeStruct],
    *,
    steps: int = 1,
    images: int = 0,
    note: str = "",
) -> Plan:
    """Compile `step(state, frozen, data) -> (state, metrics)` of `steps` updates, as `fit` does.

    Every leaf has the NamedSharding that it will lie in; the state is donated and keeps its own.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    mesh = jax.tree.leaves(places)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = (state, frozen, data)
    traced = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere)).trace(*arguments)
    return measure(
        name, traced, mesh.size, arguments, frozen, steps=steps, images=images, note=note
    )


def measure(
    name: str,
    traced: Any,
    devices: int,
    arguments: PyTree,
    frozen: PyTree[jax.ShapeDtypeStruct],
    *,
    steps: int = 1,
    images: int = 0,
    note: str = "",
) -> Plan:
    """Compile a traced program of `steps` updates; `frozen` are those `arguments` that stay."""
    plan = Plan(
        name=name,
        devices=devices,
        arguments=sum(map(_bytes_on_a_device, jax.tree.leaves(arguments))),
        frozen=sum(map(_bytes_on_a_device, jax.tree.leaves(frozen))),
        outputs=0,
        temporaries=0,
        flops=count_flops(traced.jaxpr) / steps,
        images=images,
        note=note,
    )
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := _refused_for(str(error))) is None:
            raise
        return dataclasses.replace(plan, temporaries=needed, refused=True)
    memory, moved = compiled.memory_analysis(), traffic(compiled.as_text())
    return dataclasses.replace(
        plan,
        arguments=memory.argument_size_in_bytes,
        unread=max(0, plan.arguments - memory.argument_size_in_bytes),
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        moved=moved.bytes / steps,
        collectives=tuple(one.divided(steps) for one in moved.collectives),
        largest=tuple(moved.largest.items()),
    )


def _refused_for(message: str) -> int | None:
    """The bytes that a compiler wanted beyond what there is; None for another error."""
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    number, unit = (one for one in found.groups() if one)
    return int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)))


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


def _bytes_on_a_device(leaf: Any) -> int:
    """Of a shape with its place; a leaf without one is a constant of the program's own size."""
    shape = jax.numpy.shape(leaf)
    if (place := getattr(leaf, "sharding", None)) is not None:
        shape = place.shard_shape(shape)
    return math.prod(shape) * jax.numpy.result_type(leaf).itemsize
