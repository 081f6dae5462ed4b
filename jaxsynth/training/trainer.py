"""The one trainer: a `Task` says what is trained, a `TrainingConfig` how, and `train` trains it.

    task = Task(
        model=add_lora(network),        # what is `Trainable` in it learns
        loss=Denoising(snr_gamma=5.0),  # (model, constants, batch, key) -> (loss, metrics)
        batches=Resident(data, sharded=("mean", "std"), next_batch=Rows(batch_size=8)),
        table=sharding.UNET,
        key=jax.random.key(seed),
        identity={"base": digest},
    )
    model = train(task, config, folder, mesh=mesh)

`train_stacked` trains many tasks of one structure in one program (an adapter for each class, rates
of a sweep), and `plan` compiles the very program of either from shapes alone. All three build it by
`_assemble`, so that what is planned is what runs.

Programs are kept: a loss and a `next_batch` are frozen dataclasses, compared by value, and rates,
lengths and keys are arguments, so trainings of one shape share one compiled program.

On a mesh the base's weights are cut by the task's table, what learns is replicated (`learns`:
"replicate"), cut by the table too ("table") or stacked over "data" ("stack"), the arrays that
batches are drawn from lie over "data" and "fsdp", and a batch's rows as well.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt8
from PIL import Image

from jaxsynth.adapters import optim_hooks
from jaxsynth.adapters.inject import Constant, Trainable, config_of, stack, unstack
from jaxsynth.core.errors import UserError
from jaxsynth.core.records import to_json
from jaxsynth.core.space import check_space, size_of
from jaxsynth.core.words import counted
from jaxsynth.training import loop, sharding
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.optim import Rate, make_optimizer, unused_patterns
from jaxsynth.training.placement import (
    batch_rows,
    check_rows,
    data_places,
    filled_rows,
    is_stack,
    shape_of,
    state_places,
)
from jaxsynth.training.planning import Plan, compile_plan, shaped
from jaxsynth.training.space import needed_bytes
from jaxsynth.training.step import (
    StepFn,
    TrainState,
    averaged,
    init_stacked,
    init_state,
    make_train_step,
    scan_steps,
    stacked,
)
from jaxsynth.training.task import Loss, Resident, Streamed, Task
from jaxsynth.training.turns import Turns


def train(
    task: Task,
    config: TrainingConfig,
    folder: Path,
    *,
    mesh: Mesh | None = None,
    description: str = "train",
) -> nnx.Module:
    """The task's model after training (its average where there is one).

    Resumes from `folder/checkpoints`; metrics go to `folder`.

    Raises:
        UserError: a batch does not divide over the mesh, a pattern of `config` matches nothing.
        NonFiniteError: the loss or gradient is not finite; the message names the step.
    """
    built = _assemble([task], config, mesh, together=False)
    (model,) = _fit(built, config, folder, description)
    return model


def train_stacked(
    tasks: Sequence[Task],
    config: TrainingConfig | Sequence[TrainingConfig],
    folder: Path,
    *,
    mesh: Mesh | None = None,
    description: str = "train",
) -> list[nnx.Module]:
    """`train` for tasks of one structure around one frozen base, all in one compiled program.

    Model i becomes what `train` makes of task i alone, up to rounding. The tasks' data have one
    shape; their constants are those of the first. `config` may be one for each task, which differ
    in rates and warm-up alone. On a mesh the tasks lie along "data"; where their number is not
    divisible by it, the last one is trained more than once.
    """
    count = len(tasks)
    configs = [config] * count if isinstance(config, TrainingConfig) else list(config)
    short = 0 if mesh is None else -count % mesh.shape["data"]
    tasks, configs = [*tasks, *tasks[-1:] * short], [*configs, *configs[-1:] * short]
    built = _assemble(tasks, configs[0], mesh, together=True, configs=configs)
    return _fit(built, configs[0], folder, description)[:count]


class Steps:
    """`train` by hand, for what is measured between steps: the same program, nothing written.

        steps = Steps(task, config)
        seconds = steps.advance(20)
        error = measure(steps.model)

    `done` counts the updates so far.

    Raises:
        UserError: as `train`. ValueError: batches from the host.
    """

    def __init__(self, task: Task, config: TrainingConfig, *, mesh: Mesh | None = None):
        if not isinstance(task.batches, Resident) or task.batches.buckets:
            raise ValueError("Steps: batches of the host or of buckets, expected Resident ones")
        self.done, self._config = 0, config
        self._built = built = _assemble([task], config, mesh, together=False)
        self._leaves, self._structure = jax.tree.flatten(built.state)
        self._frozen, frozen_structure = jax.tree.flatten(built.frozen)
        self._program = loop.program_of(built.step, self._structure, frozen_structure, self._leaves)
        self._compiled = False

    @property
    def model(self) -> nnx.Module:
        """The task's model as it is now."""
        state = jax.tree.unflatten(self._structure, self._leaves)
        return _models(self._built, self._config, state)[0]

    def advance(self, steps: int) -> float:
        """Do so many updates; returns the seconds that they took, without the compilation.

        Raises:
            ValueError: `steps` is negative or no whole number of calls (`steps_per_call`).
        """
        calls, rest = divmod(steps, self._config.steps_per_call)
        if calls < 0 or rest:
            raise ValueError(
                f"advance: {counted(steps, 'step')}, expected a multiple of steps_per_call = "
                f"{self._config.steps_per_call}"
            )
        if not calls:
            return 0.0
        if not self._compiled:
            # On copies, because the state is donated.
            copies = jax.tree.map(jnp.copy, self._leaves)
            jax.block_until_ready(self._program(copies, self._frozen, self._built.data))
            self._compiled = True
        began = time.perf_counter()
        for _ in range(calls):
            self._leaves, _ = self._program(self._leaves, self._frozen, self._built.data)
        jax.block_until_ready(self._leaves)
        self.done += steps
        return time.perf_counter() - began


def plan(
    name: str,
    task: Task,
    config: TrainingConfig,
    mesh: Mesh,
    *,
    count: int = 0,
    images: int = 0,
    note: str = "",
) -> Plan:
    """What the program of `train` needs on `mesh`, compiled from shapes; nothing is allocated.

    With `count` it is that of `train_stacked` for so many tasks like this one. `images` are the
    examples of an update where they are not `batch_size` of each task.

    Raises:
        UserError: as `train`.
    """
    tasks = [task] * (count + -count % mesh.shape["data"]) if count else [task]
    built = _assemble(tasks, config, mesh, together=bool(count), abstract=True)
    shapes = (built.state, built.frozen, built.data)
    steps = config.steps_per_call if isinstance(task.batches, Resident) else 1
    images = images or config.batch_size * max(count, 1)
    return compile_plan(name, built.step, *shapes, steps=steps, images=images, note=note)


@dataclass(frozen=True)
class _Built:
    """A training program with its arguments in place: arrays, or for a plan their shapes."""

    step: StepFn
    state: TrainState
    frozen: PyTree
    data: PyTree
    task: Task
    graphdef: Any
    # What does not learn, as it was given: off the mesh.
    rest: tuple[PyTree, PyTree]
    count: int
    together: bool
    mesh: Mesh | None
    # Of examples of several shapes, those of each.
    parts: tuple[dict[str, Any], ...] = ()


def _assemble(
    tasks: Sequence[Task],
    config: TrainingConfig,
    mesh: Mesh | None,
    *,
    together: bool,
    configs: Sequence[TrainingConfig] = (),
    abstract: bool = False,
) -> _Built:
    task = tasks[0]
    adapter = config_of(task.model)
    graphdef, trainable, buffers, base = nnx.split(task.model, Trainable, Constant, ...)
    if task.teacher and not config.ema_decay:
        raise UserError("ema_decay: 0, but this training has a teacher, which is the average")
    for name in ("rates", "decays"):
        if unused := unused_patterns(getattr(config, name), trainable):
            raise UserError(f"{name}: {unused[0]!r} matches no parameter that learns")
    phases = tuple(task.loss.items()) if isinstance(task.loss, Mapping) else task.loss
    resident = isinstance(task.batches, Resident)
    buckets = task.batches.buckets if resident else None
    if buckets and (together or abstract):
        raise ValueError("buckets: expected one training of them, and one shape for a plan")
    if mesh is not None and not together and not is_stack(task):
        check_rows(config, mesh, task.batches)
    step = _step(
        phases,
        task.batches.next_batch if resident else None,
        _program_of(config, adapter),
        graphdef,
        adapter,
        None if together or mesh is None else NamedSharding(mesh, batch_rows(task)),
        together,
        task.teacher,
    )
    parts = tuple(task.loss) if isinstance(task.loss, Mapping) else ()
    init = _init(_program_of(config, adapter), adapter, parts, together)
    # As arrays: a number would be of a weak type, and the second step another program.
    rates = [jax.tree.map(np.asarray, Rate.of(one)) for one in configs or [config]]
    start = (trainable, task.key, rates[0])
    if together and abstract:
        start = jax.tree.map(lambda leaf: _repeated(leaf, len(tasks)), start)
    elif together:
        every = [(nnx.state(one.model, Trainable), one.key) for one in tasks]
        values, keys = stack([values for values, _ in every]), jnp.stack([key for _, key in every])
        each = [rates[i % len(rates)] for i in range(len(tasks))]
        start = (values, keys, jax.tree.map(lambda *leaves: np.stack(leaves), *each))
    frozen = (buffers, base, task.constants)
    if abstract:
        state, data = jax.eval_shape(init, *start), _shapes_of(task.batches, len(tasks), together)
    else:
        state, data = init(*start), _data_of([one.batches for one in tasks], together)
    parts = list(buckets.data) if buckets else []
    if mesh is not None:
        place = shaped if abstract else sharding.place
        state = place(state, state_places(state, task, mesh, together))
        whole = NamedSharding(mesh, PartitionSpec())
        frozen_places = (
            jax.tree.map(lambda _: whole, buffers),
            sharding.shardings_for(base, mesh, task.table),
            jax.tree.map(lambda _: whole, task.constants),
        )
        frozen = place(frozen, frozen_places)
        if resident:
            stacks = together or is_stack(task)
            data, *parts = (
                filled_rows(one, task.batches.sharded, mesh, stacks, abstract)
                for one in (data, *parts)
            )
            data, *parts = (
                place(one, data_places(one, task, mesh, together)) for one in (data, *parts)
            )
        elif abstract:
            rows = NamedSharding(mesh, sharding.BATCH)
            data = place(data, jax.tree.map(lambda _: rows, data))
    elif not abstract:
        frozen, data, parts = jax.device_put((frozen, data, parts))
    return _Built(
        step, state, frozen, data, task, graphdef, (buffers, base), len(tasks), together, mesh,
        tuple(parts),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _init(
    config: TrainingConfig, adapter: Any, parts: tuple[str, ...], together: bool
) -> Callable[[PyTree, Array, Rate], TrainState]:
    """The first state in one program: array by array, each shape would compile several."""
    tx = optim_hooks.optimiser(adapter, make_optimizer(config), config.steps)
    ema = bool(config.ema_decay)
    if together:
        return jax.jit(lambda values, key, rate: init_stacked(values, tx, key, rate, ema=ema))
    return jax.jit(
        lambda values, key, rate: init_state(values, tx, key, rate, parts=parts, ema=ema)
    )


@lru_cache(maxsize=64)
def _step(
    loss: Loss | tuple[tuple[str, Loss], ...],
    next_batch: Callable | None,
    config: TrainingConfig,
    graphdef: Any,
    adapter: Any,
    rows: NamedSharding | None,
    together: bool,
    teacher: bool,
) -> StepFn:
    """The step function; equal arguments give the same one, whose compiled program `fit` keeps."""

    def of(one: Loss):
        def value(trainable, frozen, batch, key):
            if teacher:
                (buffers, base, constants), average = frozen
                constants = {**constants, "teacher": nnx.merge(graphdef, average, buffers, base)}
            else:
                buffers, base, constants = frozen
            if rows is not None:
                batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), batch)
            return one(nnx.merge(graphdef, trainable, buffers, base), constants, batch, key)

        return optim_hooks.penalised(value, adapter)

    losses = {part: of(one) for part, one in loss} if isinstance(loss, tuple) else of(loss)
    tx = optim_hooks.optimiser(adapter, make_optimizer(config), config.steps)
    step = make_train_step(
        losses,
        tx,
        schedule=config.schedule,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
        teacher=teacher,
    )
    if next_batch is not None:
        step = scan_steps(step, next_batch, config.steps_per_call)
    step = stacked(step) if together else step

    def precise(state, frozen, batch):
        with jax.default_matmul_precision(config.precision):
            return step(state, frozen, batch)

    return step if config.precision == "default" else precise


def _program_of(config: TrainingConfig, adapter: Any) -> TrainingConfig:
    """The config without what a program takes as an argument or does not depend on."""
    plain = TrainingConfig()
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainingConfig)}
    argued = ["learning_rate", "min_lr", "warmup_steps", "epochs", "min_steps", "warmup_epochs"]
    argued += [f.name for f in dataclasses.fields(plain) if not f.metadata.get("identity", True)]
    kept |= {name: getattr(plain, name) for name in argued}
    if optim_hooks.needs_length(adapter):
        return TrainingConfig(**kept)
    return TrainingConfig(**kept | {"steps": 0})


def _fit(built: _Built, config: TrainingConfig, folder: Path, description: str) -> list[nnx.Module]:
    task, mesh = built.task, built.mesh
    batches: Any = loop.Constant(built.data)
    place = None
    if isinstance(task.batches, Streamed):
        if task.batches.start is None:
            raise ValueError("train: the task's batches have no start: it can only be planned")
        batches = task.batches.start()
        if mesh is not None:
            place = lambda batch: sharding.shard_batch(batch, mesh)  # noqa: E731
    elif task.batches.buckets:
        buckets = task.batches.buckets
        batches = Turns(built.data, built.parts, buckets, config.steps_per_call, mesh)
    streams = isinstance(task.batches, Streamed)
    identity = {
        "task": dict(task.identity),
        "config": to_json(config, identity=True),
        "tasks": built.count if built.together else 0,
    }

    needs = needed_bytes(built.state, built.state.trainable)
    check_space(description, folder, needs - size_of(folder))

    def evaluate(state: TrainState) -> dict[str, Any]:
        (model,) = _models(built, config, state)
        return dict(task.evaluate(model, int(state.step)))

    def sample(state: TrainState) -> None:
        (model,) = _models(built, config, state)
        _write_samples(folder / "samples" / f"{int(state.step):07d}.png", task.sample(model))

    with (
        Checkpoints(
            folder / "checkpoints",
            every=config.checkpoint_every,
            minutes=config.checkpoint_minutes,
            keep=1,
            identity=identity,
        ) as checkpoint,
        MetricsWriter(folder, tensorboard=config.tensorboard) as metrics,
    ):
        state = loop.fit(
            built.state,
            built.frozen,
            batches,
            built.step,
            steps=config.steps,
            steps_per_call=1 if streams else config.steps_per_call,
            examples=config.batch_size * (built.count if built.together else 1),
            place=place,
            checkpoint=checkpoint,
            metrics=metrics,
            log_every=config.log_every,
            evaluate=None if task.evaluate is None or built.together else evaluate,
            evaluate_every=config.evaluate_every,
            sample=None if task.sample is None or built.together else sample,
            sample_every=config.sample_every,
            profile=folder / "profile" if config.profile else None,
            description=description,
        )
    return _models(built, config, state)


def _models(built: _Built, config: TrainingConfig, state: TrainState) -> list[nnx.Module]:
    """The tasks' models with what was learned, off the mesh."""
    learned = sharding.gather(averaged(state, config.ema_decay))
    values = unstack(learned) if built.together else [learned]
    return [nnx.merge(built.graphdef, one, *built.rest) for one in values]


def _write_samples(path: Path, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """One row of images; written by process 0."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(list(images), axis=1)).save(path)


def check_batches(trainings: Mapping[str, TrainingConfig], mesh: Mesh | None) -> None:
    """UserError naming a training whose batches do not divide over the mesh, before any begins."""
    if mesh is None:
        return
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, training in trainings.items():
        if training.batch_size // training.accumulate % parts:
            raise UserError(
                f"{name}.batch_size {training.batch_size} (in {training.accumulate} parts) is not "
                f"divisible over data x fsdp = {parts} devices"
            )


def _data_of(batches: Sequence[Resident | Streamed], together: bool) -> PyTree:
    if isinstance(batches[0], Streamed):
        if together:
            raise ValueError("train_stacked: batches from the host, expected Resident ones")
        return None
    if not together:
        return batches[0].data
    return jax.tree.map(lambda *leaves: _stacked(leaves), *[one.data for one in batches])


def _stacked(leaves: Sequence[Any]) -> Any:
    host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if host else jnp.stack(leaves)


def _shapes_of(batches: Resident | Streamed, count: int, together: bool) -> PyTree:
    given = batches.data if isinstance(batches, Resident) else batches.shapes

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if together:
            return _repeated(leaf, count)
        return shape_of(leaf)

    return jax.tree.map(shape, given)


def _repeated(leaf: Any, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *jnp.shape(leaf)), jnp.result_type(leaf))
