"""The one training loop: jit, resume, report, save, stop. `trainer` is what calls it.

`batches` needs `__next__`, and `get_state`/`set_state` where a resumed run is to see the same data
as an uninterrupted one (Grain's iterators have all three). What is written to the metrics of a
resumed run equals an uninterrupted one's: speeds, which cannot, have a file of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
from rich.console import Console

from jaxsynth.core import preemption
from jaxsynth.core.console import progress
from jaxsynth.core.words import counted
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.planning import count_flops
from jaxsynth.training.speed import Meter
from jaxsynth.training.step import StepFn, TrainState

PROFILED_CALLS = range(3, 8)  # past compilation, and short enough to read


class NonFiniteError(FloatingPointError):
    """The loss or the gradient became NaN or infinite; the message names the step.

    `which`: the numbers of those of several trainings where it did; () of a single one.
    """

    def __init__(self, message: str, which: Sequence[int] = ()):
        super().__init__(message)
        self.which = tuple(which)


class Constant:
    """Batches that are always the same: the data that `scan_steps` cuts its batches from."""

    def __init__(self, data: PyTree):
        self.data = data

    def __iter__(self) -> "Constant":
        return self

    def __next__(self) -> PyTree:
        return self.data


def fit(
    state: TrainState,
    frozen: PyTree,
    batches: Iterator[PyTree],
    step_fn: StepFn,
    *,
    steps: int,
    steps_per_call: int = 1,
    examples: int = 0,
    place: Callable[[PyTree], PyTree] | None = None,
    checkpoint: Checkpoints | None = None,
    metrics: MetricsWriter | None = None,
    log_every: int = 50,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int = 0,
    sample: Callable[[TrainState], None] | None = None,
    sample_every: int = 0,
    description: str = "train",
    profile: str | Path | None = None,
    console: Console | None = None,
) -> TrainState:
    """Train until `state.step` is `steps`.

    Args:
        state: consumed: its buffers are donated to the first step.
        frozen: passed to every step, never changed.
        step_fn: from `make_train_step`, `stacked` or `scan_steps`. Passing the same function
            again (one adapter per class, say) uses the same compiled program.
        steps: counted from the very beginning, not from where this process resumed.
        steps_per_call: how many steps `step_fn` makes; must divide `steps`.
        examples: of one step, for the speed in examples a second; 0: not reported.
        place: moves a batch to the devices, such as `partial(shard_batch, mesh=mesh)`.
        checkpoint: resumed from if it holds a step; saved to as it says and at the end.
        metrics: gets means over each `log_every` steps, and how fast they were (`speed.Meter`).
        evaluate: called every `evaluate_every` steps; its scalars are logged as "eval/<name>".
            It must not keep the state's arrays, which the next step overwrites.
        sample: called every `sample_every` steps, likewise.
        profile: folder for an XLA profile of a few early steps.

    Raises:
        NonFiniteError: naming the step; checkpoints from before it remain.
        Preempted: the run was asked to stop; the newest step is saved.
        RuntimeError: `batches` ended before `steps`.
    """
    window = _Window()
    if checkpoint is not None and checkpoint.latest is not None:
        state, seen = checkpoint.restore(state, batches)
        window.restore(seen)
    # Of stacked adapters that lie on several processes, each reads its own, all being equal.
    start = int(np.max(np.asarray(state.step.addressable_shards[0].data)))
    if (steps - start) % steps_per_call:
        raise ValueError(
            f"{counted(steps - start, 'step')} left, not divisible by {steps_per_call=}"
        )
    if metrics is not None:
        metrics.resume(start)
    if start >= steps:
        return state

    leaves, structure = jax.tree.flatten(state)
    frozen_leaves, frozen_structure = jax.tree.flatten(frozen)
    program = program_of(step_fn, structure, frozen_structure, leaves)
    traced: dict[Any, Any] = {}
    pending: tuple[int, Any] | None = None
    meter: Meter | None = None

    def collect() -> dict[str, Any]:
        """Wait for the newest step's metrics and add them to the window."""
        nonlocal pending
        done, values = pending
        pending = None
        values = jax.device_get(values)
        _check_finite(done, steps_per_call, values)
        window.add(values)
        return values

    step, calls = start, 0
    with progress(description, steps, start=start, out=console) as bar:
        while step < steps:
            calls += 1
            if profile is not None:
                _profile(calls, profile)
            if meter is not None:
                meter.look()
            try:
                batch = next(batches)
            except StopIteration:
                raise RuntimeError(f"the batches ended at step {step} of {steps}") from None
            with jax.profiler.StepTraceAnnotation(description, step_num=step):
                if meter is not None:
                    meter.look()
                batch = _on_device(batch) if place is None else place(batch)
                shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
                new = shapes not in traced
                if new:
                    traced[shapes] = program.trace(leaves, frozen_leaves, batch)
                if meter is None:
                    work = lambda one: count_flops(traced[one].jaxpr) / steps_per_call  # noqa: E731
                    meter = Meter(step, examples, work)
                # What a step reads lies on the devices by now; only the first call of a program
                # makes constants.
                with jax.transfer_guard_host_to_device("allow" if new else "disallow"):
                    leaves, values = program(leaves, frozen_leaves, batch)
            meter.queued(values, shapes)
            # The device works on this step while the host reads the one before it.
            if pending is not None:
                newest = collect()
                bar.update(step, note=f"loss {np.mean(newest['loss']):.4f}")
            before, step = step, step + steps_per_call
            pending = (step, values)

            report: dict[str, Any] = {}
            if _due(log_every, before, step, steps):
                collect()
                if metrics is not None:
                    metrics.write_speed(step, meter.read(step))
                report |= window.close()
            if evaluate is not None and _due(evaluate_every, before, step, steps):
                found = evaluate(jax.tree.unflatten(structure, leaves))
                report |= {f"eval/{name}": value for name, value in found.items()}
                meter.pause()
            if sample is not None and _due(sample_every, before, step, steps):
                sample(jax.tree.unflatten(structure, leaves))
                meter.pause()
            if report and metrics is not None:
                metrics.write(step, report)
            leaving = preemption.requested(step) and step < steps
            if checkpoint is not None and (leaving or checkpoint.due(before, step, steps)):
                if pending is not None:
                    collect()
                saved = jax.tree.unflatten(structure, leaves)
                checkpoint.save(step, saved, batches, seen=window.state())
            if leaving:
                raise preemption.Preempted(
                    f"{description}: stopped on SIGTERM after step {step} of {steps}, which is "
                    "saved; the same command goes on there"
                )
        if pending is not None:
            collect()
    if profile is not None and calls in PROFILED_CALLS:
        jax.profiler.stop_trace()
    return jax.tree.unflatten(structure, leaves)


def _on_device(batch: PyTree) -> PyTree:
    """Arrays of the host on the device; others lie where they shall, maybe on many hosts."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), batch)


def _due(every: int, before: int, step: int, steps: int) -> bool:
    """Whether a multiple of `every` (or the end) was reached by going from `before` to `step`."""
    return every > 0 and (step >= steps or step // every > before // every)


class _Window:
    """Means of the metrics since the last report, also of a report that a stop interrupted."""

    def __init__(self):
        self.sums: dict[str, Any] = {}
        self.count = 0

    def state(self) -> dict[str, Any]:
        """What `restore` takes, as JSON."""
        return {
            "count": self.count,
            "sums": {k: np.asarray(x).tolist() for k, x in self.sums.items()},
        }

    def restore(self, seen: dict[str, Any]) -> None:
        """Go on with the sums of an interrupted run."""
        self.count = seen["count"]
        self.sums = {name: np.asarray(value, np.float64) for name, value in seen["sums"].items()}

    def add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + np.asarray(value, np.float64)
        self.count += 1

    def close(self) -> dict[str, Any]:
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def program_of(step_fn: StepFn, structure, frozen_structure, leaves: list[jax.Array]):
    """`(leaves, frozen leaves, batch) -> (new leaves, metrics)`, compiled once for equal arguments.

    `leaves` are the state's, which are donated; only where they lie is looked at.
    """
    return _program(step_fn, structure, frozen_structure, _pinned(leaves))


@lru_cache(maxsize=32)
def _program(step_fn: StepFn, structure, frozen_structure, pinned):
    """`step_fn` jitted over flat lists: flattening modules at every call costs milliseconds."""

    def call(leaves, frozen_leaves, batch):
        state = jax.tree.unflatten(structure, leaves)
        new, values = step_fn(state, jax.tree.unflatten(frozen_structure, frozen_leaves), batch)
        new_leaves, new_structure = jax.tree.flatten(new)
        if new_structure != structure:
            raise TypeError(
                f"the step changed the state's structure: {structure} -> {new_structure}"
            )
        return new_leaves, values

    if pinned is None:
        return jax.jit(call, donate_argnums=0)
    shardings, values = pinned
    return jax.jit(call, donate_argnums=0, out_shardings=(list(shardings), values))


def _pinned(leaves: list[jax.Array]):
    """The shardings that the new state shall keep, and the metrics': hashable, or None off a mesh.

    Left free, XLA may choose others, which would compile a second program and copy the state.
    """
    named = [x.sharding for x in leaves if isinstance(x.sharding, NamedSharding)]
    if not named:
        return None
    everywhere = NamedSharding(named[0].mesh, PartitionSpec())
    return tuple(
        x.sharding if isinstance(x.sharding, NamedSharding) else everywhere for x in leaves
    ), everywhere


def _check_finite(step: int, steps_per_call: int, values: Mapping[str, Any]) -> None:
    for name in ("loss", "grad_norm"):
        bad = ~np.isfinite(np.atleast_1d(values[name]))
        if bad.any():
            where = f"step {step}"
            if steps_per_call > 1:
                where = f"one of the steps {step - steps_per_call + 1} to {step}"
            which = np.flatnonzero(bad).tolist() if bad.size > 1 else []
            words = f" of adapters {which}" if which else ""
            raise NonFiniteError(f"{name}{words} is not finite at {where}: {values[name]}", which)


def _profile(call: int, folder: str | Path) -> None:
    if call == PROFILED_CALLS.start:
        jax.profiler.start_trace(str(folder))
    elif call == PROFILED_CALLS.stop:
        jax.profiler.stop_trace()
