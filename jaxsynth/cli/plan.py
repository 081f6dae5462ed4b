"""`jaxsynth plan`: what each program of a config needs on machines that are not here."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxsynth.core.errors import UsageError, UserError

EPILOG = """\
Every program that `jaxsynth run` would start for this config is compiled from shapes alone: no
weights, no data and no accelerator are needed, and nothing of the networks' size is allocated.

  --topology   a TPU slice: v5e:4x4, v6e:2x2, v5p:2x2x4; needs pip install 'jaxsynth[tpu]'.
               Several, with commas between them, are planned one after another and compared
  --devices    so many CPU devices, which are fake

It prints, in MiB on each device,
  arguments    what lies there between steps: weights, optimiser, average and cached latents
  unread       what lies there besides, though this program does not read it
  frozen       the part of both that training does not change
  outputs      what a step returns beside them
  temporaries  what a step needs while it runs; of CPU devices, which compute in 32 bits and lay
               memory out otherwise, it says little about another kind
then the work and the traffic of one update (or batch) on each device, the collectives, and for a
TPU the least time that its peak, its memory or its links allow; and how often the whole run calls
the program, with the hours that those add up to. A program takes longer than that.

  --only       programs whose names hold that text
  --rows       rows of a batch on each device, in place of the config's batch sizes: the same
               config on slices of any size
  --quick      with the least of the compiler's effort, for large networks: the same programs,
               whose temporaries and traffic may be larger than those of the run

A program that does not fit is tried with half the batch, a quarter, ... until it does; --fit finds
the largest batch of every program. --memory says how much a device has where that is not known.

A mesh has the axes data, fsdp and tensor; their sizes multiply to the number of devices, data takes
what the others leave, and what is not given is the config's.

examples:
  jaxsynth plan --config=configs/diffscaler.py:xl2 --topology=v5e:4x4 --config.train.batch_size=256
  jaxsynth plan --config=configs/diffscaler.py:xl2 --devices=8 --fsdp=4
  jaxsynth plan --config=configs/datadream.py:sd21 --topology=v5e:4x4,v5p:4x4x4 --only=classify
"""


def add_parser(verbs) -> argparse.ArgumentParser:
    """The verb's parser; `call` is left to the command."""
    parser = verbs.add_parser(
        "plan",
        help="compile a config's programs for many devices, and print what they need",
        description="Compile a config's programs for many devices, without any of them, and print "
        "the memory, the work and the traffic that they need.",
        usage="jaxsynth plan --config=FILE[:VARIANT] (--topology=KIND:SHAPE | --devices=N) "
        "[--data=N] [--fsdp=N] [--tensor=N] [--only=TEXT] [--rows=N] [--quick] [--fit] "
        "[--config.FIELD=VALUE ...]",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a Python file with get_config"
    )
    parser.add_argument("--topology", metavar="KIND:SHAPE", help="the TPU slices to compile for")
    parser.add_argument("--devices", type=int, metavar="N", help="or so many CPU devices")
    for axis, what in (
        ("data", "which share a batch"),
        ("fsdp", "which share a batch and the frozen weights"),
        ("tensor", "which share the layers' heads and channels"),
    ):
        text = f"devices along the axis {axis}, {what}"
        parser.add_argument(f"--{axis}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="programs with it in their names"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="rows of a batch on each device")
    parser.add_argument(
        "--quick", action="store_true", help="compile with the least effort, for large networks"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="of each device")
    parser.add_argument("--fit", action="store_true", help="find the largest batch that fits")
    return parser


def plan(args: argparse.Namespace, configured: Callable, enable_cache: Callable[[], None]) -> None:
    """Compile and print; `configured(args)` gives the method's name, module and config."""
    if (args.topology is None) == (args.devices is None):
        found = "neither" if args.topology is None else "both"
        raise UsageError(
            f"found {found}, expected --topology=KIND:SHAPE, such as v5e:4x4, or --devices=N"
        )
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise UsageError(f"--memory={args.memory:g}: expected GiB above 0")
    if args.rows is not None and args.rows < 1:
        raise UsageError(f"--rows={args.rows}: expected at least 1")
    _start_fake_devices(1 if args.devices is None else args.devices, exactly=args.topology is None)
    slices: list[tuple[str, Any, Any]] = [("", None, None)]
    if args.topology is not None:
        from jaxsynth.training.chips import slice_of

        slices = [(name, *slice_of(name)) for name in args.topology.split(",")]
    name, method, config = configured(args)
    enable_cache()
    with _least_effort() if args.quick else contextlib.nullcontext():
        planned = [_plan_on(args, name, method, config, *one) for _, *one in slices]
    if len(planned) > 1:
        from jaxsynth.core.console import console
        from jaxsynth.report.plans import slices_table
        from jaxsynth.report.tables import to_rich

        each = zip(slices, planned, strict=True)
        table = slices_table([(where, chip, plans) for (where, chip, _), plans in each])
        console.print(to_rich(table))


@contextlib.contextmanager
def _least_effort() -> Iterator[None]:
    """Programs are compiled quickly, not well. Both of XLA's switches go from -1 to 1."""
    import jax

    names = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name in names:
            jax.config.update(name, -1.0)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _plan_on(
    args: argparse.Namespace, name: str, method: Any, config: Any, chip: Any, devices: Any
) -> list:
    """Compile and print for one slice, or for this process's fake devices; the plans."""
    import jax

    from jaxsynth.core.console import console
    from jaxsynth.ops.backend import compiling_for
    from jaxsynth.training.planning import with_rows
    from jaxsynth.training.sharding import make_mesh

    given = {axis: getattr(args, axis) for axis in ("data", "fsdp", "tensor")}
    sizes = {axis: getattr(config.mesh, axis) if n is None else n for axis, n in given.items()}
    try:
        mesh = make_mesh(**sizes, devices=devices)
    except ValueError as error:
        raise UserError(f"mesh: {error}") from None
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = jax.devices()[0].device_kind if chip is None else f"{chip.name} chip"
    effort = ", compiled with the least effort" if args.quick else ""
    console.print(f"{name} on {mesh.size} x {kind} ({shape}){effort}", markup=False)
    with compiling_for("" if chip is None else "tpu"):
        every = method.plan(config, mesh)
        programs = [one for one in every if args.only in one.name]
        if not programs:
            names = ", ".join(one.name for one in every)
            raise UsageError(f"--only={args.only}: no such program; there are {names}")
        if args.rows is not None:
            programs = [with_rows(one, args.rows) for one in programs]
        limit = args.memory * 2**30 if args.memory else chip.memory if chip else 0.0
        return _print(programs, limit, chip, fit=args.fit, say=console.print)


def _print(programs: list, limit: float, chip: Any, *, fit: bool, say: Callable) -> list:
    from jaxsynth.report.plans import GIB, collectives_table, memory_table, run_table, work_table
    from jaxsynth.report.tables import to_rich
    from jaxsynth.training.chips import CHIPS

    plans = [one.compile() for one in programs]
    say(to_rich(memory_table(plans, limit)))
    say(to_rich(work_table(plans, chip)))
    if (table := run_table(plans, chip)) is not None:
        say(to_rich(table))
    if (table := collectives_table(plans)) is not None:
        say(to_rich(table))
    for note in dict.fromkeys(one.note for one in plans if one.note):
        say(note, markup=False)
    most = limit or max(one.memory for one in CHIPS.values())
    for program, one in zip(programs, plans, strict=True):
        over = one.refused or one.bytes > most
        if over:
            has = "'s" if limit else ", and the largest chip has"
            say(
                f"{one.name}: needs {one.bytes / GIB:.3g} GiB of each device{has} {most / GIB:.4g}",
                markup=False,
            )
        if over or fit:
            say(_advice(program, most, fit), markup=False)
    return plans


def _advice(program: Any, limit: float, fit: bool) -> str:
    """What of a program fits in `limit` bytes of each device."""
    from jaxsynth.training.planning import largest_batch, smaller_batch

    if not program.field:
        return f"{program.name}: no batch to make smaller; take more devices or another config"
    batch, found = (largest_batch if fit else smaller_batch)(program, limit)
    if found is None:
        return (
            f"{program.name}: not even --config.{program.field}={program.unit} fits; "
            "take more devices, --fsdp, or remat"
        )
    what = "the largest that fits is" if fit else "fits with"
    size = f"{found.bytes / 2**30:.3g} GiB"
    return f"{program.name}: {what} --config.{program.field}={batch} ({size})"


def _start_fake_devices(count: int, *, exactly: bool) -> None:
    """Has JAX see `count` CPU devices, which has to be said before it is imported."""
    if count < 1:
        raise UsageError(f"--devices={count}: expected at least 1")
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    import jax

    if exactly and (found := len(jax.devices())) != count:
        raise UsageError(f"--devices={count}: this process has already started JAX with {found}")
