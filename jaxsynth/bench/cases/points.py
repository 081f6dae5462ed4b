"""An update of many points of a scaling study in one program, and of the same points in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxsynth.adapters.inject import Trainable, stack
from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.tasks.supervised import Pool, SupervisedConfig, View, supervised_tasks
from jaxsynth.training.loop import program_of
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.step import (
    init_stacked,
    init_state,
    make_train_step,
    scan_steps,
    stacked,
)
from jaxsynth.training.task import Task

CLASSES, POOL = 10, 320
TRAIN = {"steps": 1000, "schedule": "constant", "augment": RECIPES["none"]}


@dataclass(frozen=True)
class PointsCase:
    """`points` classifiers of `batch_size` images each."""

    name: str
    network: NetworkConfig
    points: int
    batch_size: int

    @property
    def images(self) -> int:
        return self.points * self.batch_size

    @property
    def detail(self) -> str:
        return f"{self.points} points, batch {self.batch_size} each"


CASES = (
    PointsCase("tiny", NetworkConfig(width=48, layers=3), points=10, batch_size=32),
    PointsCase("small", NetworkConfig(width=128, layers=6), points=10, batch_size=32),
)


def _tasks(case: PointsCase, config: SupervisedConfig) -> list[Task]:
    rng, side = np.random.default_rng(0), case.network.image_size
    images = rng.integers(0, 256, (POOL, side, side, 3)).astype(np.uint8)
    pool = Pool(images, (np.arange(POOL) % CLASSES).astype(np.int32))
    sizes = np.linspace(CLASSES, POOL, case.points).astype(int)
    views = [View(np.arange(n), np.ones(n)) for n in sizes]
    return supervised_tasks(
        pool, views, case.network, config, seeds=range(case.points), num_classes=CLASSES
    )


class Training:
    """`step()` is one update of every point, and waits for all; `together`: in one program."""

    def __init__(self, case: PointsCase, *, together: bool = True):
        self.case = case
        config = SupervisedConfig(batch_size=case.batch_size, **TRAIN)
        tasks = _tasks(case, config)
        graphdef, _, rest = nnx.split(tasks[0].model, Trainable, ...)
        loss, tx, rate = tasks[0].loss, make_optimizer(config), Rate.of(config)

        def value(trainable: nnx.State, frozen: Any, batch: dict, key: Array):
            rest, constants = frozen
            return loss(nnx.merge(graphdef, trainable, rest), constants, batch, key)

        step = scan_steps(make_train_step(value, tx), tasks[0].batches.next_batch, 1)
        starts = [nnx.state(task.model, Trainable) for task in tasks]
        keys, data = [task.key for task in tasks], [task.batches.data for task in tasks]
        if together:
            rates = jax.tree.map(lambda x: np.stack([x] * len(tasks)), rate)
            states = [init_stacked(stack(starts), tx, jnp.stack(keys), rates)]
            step, data = stacked(step), [jax.tree.map(lambda *x: jnp.stack(x), *data)]
        else:
            pairs = zip(starts, keys, strict=True)
            states = [init_state(start, tx, key, rate) for start, key in pairs]
        self._data = jax.tree.map(jnp.asarray, data)
        self._states = [jax.tree.leaves(state) for state in states]
        self._frozen, structure = jax.tree.flatten((rest, tasks[0].constants))
        self._program = program_of(step, jax.tree.structure(states[0]), structure, self._states[0])

    def step(self) -> np.ndarray:
        """Each point's loss."""
        losses = []
        for i, state in enumerate(self._states):
            self._states[i], metrics = self._program(state, self._frozen, self._data[i])
            losses.append(metrics["loss"])
        return np.concatenate([np.atleast_1d(x) for x in jax.device_get(losses)])


def build(case: PointsCase) -> Training:
    """All points in one program."""
    return Training(case)


def connect(ours: Training) -> Training:
    """The same points in turn, which share a compiled program."""
    return Training(ours.case, together=False)


def compare(ours: Training, found: Sequence[np.ndarray], other: Training) -> float:
    """The largest relative difference of a point's loss in the first steps."""
    pairs = [(losses, other.step()) for losses in found]
    return max(float(np.abs(one / two - 1).max()) for one, two in pairs)


def peer_call(ours: Training, other: Training) -> Callable[[], object]:
    """What is timed beside `ours.step`."""
    return other.step
