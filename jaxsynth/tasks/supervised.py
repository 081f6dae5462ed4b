"""Classifiers trained on views over one pool of images, many of them together.

The images of all trainings lie on the device once; a training has the numbers of those that it
sees, so that a study of sizes and mixtures copies no picture, and trainings on different numbers of
images have the same shapes: they stack in one program (`trainer.train_stacked`).

    loss = sum_i w_i CE(f(augment(x_i)), y_i) / sum_i w_i

over a batch drawn with replacement, w_i being the weight of the image's origin. Where the images do
not fit on a device (`streamed`), each training reads its own by Grain, epoch by epoch, and they
train one after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.adapters.inject import Trainable, mark_trainable
from jaxsynth.core.limits import BelowOne, Count, Natural, NotNegative, OneOf
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.decode import square
from jaxsynth.data.pipeline.augment import Augment
from jaxsynth.data.pipeline.batches import train_batches
from jaxsynth.data.pipeline.mixing import one_hot
from jaxsynth.data.pipeline.on_device import ON_DEVICE, augmented, check_on_device
from jaxsynth.tasks.networks import SETTLING, Network, in_training, settled, started
from jaxsynth.training import sharding
from jaxsynth.training.config import DECAYED, SCHEDULES, TrainingConfig, aside
from jaxsynth.training.loop import NonFiniteError
from jaxsynth.training.trainer import Resident, Streamed, Task, train, train_stacked
from jaxsynth.weights.networks.classifiers import Classifier

# Every parameter is a training's own; on a mesh the trainings of a stack lie along "data".
TABLE: sharding.Table = ((r"", jax.sharding.PartitionSpec()),)
# Pools are filled up to a multiple of so many images, so that settings share a compiled program. No
# view has a row of the filling.
_POOL = 1024
# Views likewise, to a power of two that is at least so many rows.
_VIEW = 256


@dataclass(frozen=True)
class SupervisedConfig(TrainingConfig):
    """How a classifier is trained; `augment` as far as it is done on the device.

    `streamed`: images come from the host in batches, in an order of epochs, by `num_workers`
    processes besides this one's threads, and each training has its own program run.
    """

    steps: Natural = 1000
    batch_size: Count = 64
    learning_rate: NotNegative = 1e-3
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    weight_decay: NotNegative = 0.05
    decay_on: Annotated[str, OneOf(*DECAYED)] = "matrices"
    label_smoothing: BelowOne = 0.1
    augment: Augment = field(default_factory=lambda: ON_DEVICE)
    streamed: bool = False
    num_workers: Natural = aside(0)

    def __post_init__(self):
        super().__post_init__()
        check_on_device(self.augment)


@dataclass(frozen=True)
class Pool:
    """The images that views are over: `images` (n, size, size, 3) uint8, `labels` (n,)."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class View:
    """What one training sees: numbers of images in the pool, and the weight of each in the loss."""

    rows: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class ViewRows:
    """Batches of numbers drawn with replacement from the first `count` of a view's rows."""

    batch_size: int

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        key = jax.random.fold_in(data["key"], step)
        places = jax.random.randint(key, (self.batch_size,), 0, data["count"])
        return {"row": data["rows"][places], "weight": data["weights"][places]}


@dataclass(frozen=True)
class Supervised:
    """The module's loss over {"row", "weight"}; constants: the pool's "images" and "labels".

    Streamed batches are {"image", "label", "index"}, and "weights", of each index, the constant.
    """

    num_classes: int
    network: Network
    label_smoothing: float
    augment: Augment

    def pixels(self, constants: Any, batch: Mapping[str, Array], key: Array) -> Array:
        """What the network is given of a batch."""
        images = batch["image"] if "image" in batch else constants["images"][batch["row"]]
        return self.network.normalized(
            augmented(images, key, self.augment, self.network.image_size)
        )

    def __call__(self, model: nnx.Module, constants: Any, batch: dict, key: Array):
        labels = batch["label"] if "label" in batch else constants["labels"][batch["row"]]
        logits = model(self.pixels(constants, batch, key)).astype(jnp.float32)
        each = cross_entropy(logits, labels, self.num_classes, self.label_smoothing)
        rows = batch.get("index")
        weight = batch["weight"] if rows is None else constants["weights"][rows]
        right = (logits.argmax(-1) == labels).astype(jnp.float32)
        return (weight * each).sum() / weight.sum(), {"accuracy": right.mean()}


def cross_entropy(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], num_classes: int, smoothing: float
) -> Float[Array, " b"]:
    """-sum_c t_c log softmax(logits)_c, t one-hot with `smoothing` spread over all classes."""
    return optax.softmax_cross_entropy(logits, one_hot(labels, num_classes, smoothing))


def supervised_tasks(
    pool: Pool,
    views: Sequence[View],
    network: Network,
    config: SupervisedConfig,
    *,
    seeds: Sequence[int],
    num_classes: int,
    backbone: Classifier | None = None,
) -> list[Task]:
    """A task for each view, of one structure: views are filled up to the largest.

    The start of task i and all that is random in it follow from `seeds[i]`, so that views of one
    seed are compared from one start. With `backbone` all but the head starts there.
    """
    longest = _filled(max(len(view.rows) for view in views))
    models, keys = _starts(network, seeds, num_classes, backbone)
    short = -len(pool.images) % _POOL
    constants = {
        "images": jnp.asarray(np.pad(pool.images, ((0, short), (0, 0), (0, 0), (0, 0)))),
        "labels": jnp.asarray(np.pad(pool.labels, (0, short))),
    }
    tasks = []
    for i, view in enumerate(views):
        data = {
            "rows": np.resize(view.rows, longest).astype(np.int32),
            "weights": np.resize(view.weights, longest).astype(np.float32),
            "count": np.int32(len(view.rows)),
            "key": keys[i, 1],
        }
        batches = Resident(data, ViewRows(config.batch_size))
        tasks.append(_task(models[i], batches, constants, network, config, num_classes, keys[i, 2]))
    return tasks


def streamed_tasks(
    sources: Sequence[tuple[ImageSource, Float[np.ndarray, " n"]]],
    network: Network,
    config: SupervisedConfig,
    *,
    seeds: Sequence[int],
    num_classes: int,
    backbone: Classifier | None = None,
) -> list[Task]:
    """A task for each (images, their weights in the loss), which are read batch by batch."""
    models, keys = _starts(network, seeds, num_classes, backbone)

    def start(source: ImageSource, seed: int) -> Iterator[dict]:
        return train_batches(
            source, config.batch_size, seed, _Square(network.image_size), numbered=True,
            process_index=jax.process_index(), process_count=jax.process_count(),
            num_workers=config.num_workers,
        )  # fmt: skip

    shapes = _batch_shapes(network, config)
    return [
        _task(
            models[i], Streamed(partial(start, source, seeds[i]), shapes),
            {"weights": jnp.asarray(weights, jnp.float32)}, network, config, num_classes,
            keys[i, 2],
        )
        for i, (source, weights) in enumerate(sources)
    ]  # fmt: skip


def planned_task(
    network: Network,
    config: SupervisedConfig,
    *,
    images: int,
    longest: int,
    num_classes: int,
) -> Task:
    """A task of shapes alone: a pool of `images`, views of `longest`; or streamed."""
    key, shape = jax.random.key(0), jax.ShapeDtypeStruct
    model = nnx.eval_shape(lambda: _made(network, num_classes, jax.random.key(0)))
    if config.streamed:
        batches = Streamed(None, _batch_shapes(network, config))
        constants = {"weights": shape((longest,), np.float32)}
        return _task(model, batches, constants, network, config, num_classes, key)
    longest = _filled(longest)
    data = {
        "rows": shape((longest,), np.int32),
        "weights": shape((longest,), np.float32),
        "count": shape((), np.int32),
        "key": key,
    }
    side = network.image_size
    constants = {
        "images": shape((images, side, side, 3), np.uint8),
        "labels": shape((images,), np.int32),
    }
    batches = Resident(data, ViewRows(config.batch_size))
    return _task(model, batches, constants, network, config, num_classes, key)


def _filled(longest: int) -> int:
    return max(_VIEW, 1 << (longest - 1).bit_length())


@dataclass(frozen=True)
class _Square:
    """Images of a batch in one size; their augmentation is the device's."""

    size: int

    def __call__(self, image: np.ndarray, _: np.random.Generator | None) -> np.ndarray:
        return square(image, self.size)


def _batch_shapes(network: Network, config: SupervisedConfig) -> dict[str, Any]:
    shape, rows, side = jax.ShapeDtypeStruct, config.batch_size, network.image_size
    return {
        "image": shape((rows, side, side, 3), np.uint8),
        "label": shape((rows,), np.int32),
        "index": shape((rows,), np.int32),
        "step": shape((rows,), np.int32),
    }


def _made(network: Network, num_classes: int, key: Array) -> nnx.Module:
    return mark_trainable(in_training(network.make(num_classes, key)))


def _starts(
    network: Network, seeds: Sequence[int], num_classes: int, backbone: Classifier | None
) -> tuple[list[nnx.Module], Array]:
    """The networks of seeds at their start, and three keys of each."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(
        jnp.asarray(seeds, jnp.uint32)
    )
    first = _made(network, num_classes, keys[0, 0])
    if backbone is not None:
        first = started(first, network, backbone)
    graphdef, _, rest = nnx.split(first, Trainable, ...)
    starts = jax.jit(jax.vmap(lambda key: nnx.state(_made(network, num_classes, key), Trainable)))(
        keys[:, 0]
    )
    models = []
    for i in range(len(seeds)):
        model = nnx.merge(graphdef, jax.tree.map(lambda x: x[i], starts), rest)  # noqa: B023
        models.append(model if backbone is None else started(model, network, backbone))
    return models, keys


def _task(model, batches, constants, network, config, num_classes, key) -> Task:
    return Task(
        model=model,
        loss=Supervised(num_classes, network, config.label_smoothing, config.augment),
        batches=batches,
        table=TABLE,
        key=key,
        constants=constants,
    )


@dataclass(frozen=True)
class Trained:
    """Networks by the numbers of their tasks, and why the others have none."""

    models: dict[int, nnx.Module]
    failed: dict[int, str]


def train_tasks(
    tasks: Sequence[Task],
    config: TrainingConfig,
    folder: Path,
    *,
    at_once: int = 0,
    mesh: Mesh | None = None,
    description: str = "train",
) -> Trained:
    """Tasks of `supervised_tasks` together, `at_once` at a time (0: all); streamed ones in turn.

    A task whose loss or gradient is not finite is left out, and those that it trained with begin
    again without it. `config` is sized.
    """
    streamed = any(isinstance(task.batches, Streamed) for task in tasks)
    group, models, failed = 1 if streamed else at_once or len(tasks), {}, {}
    for start in range(0, len(tasks), group):
        numbers = list(range(start, min(start + group, len(tasks))))
        while numbers:
            left_out = "".join(f"-{i}" for i in range(start, start + group) if i in failed)
            own, some = folder / f"{start:04d}{left_out}", [tasks[i] for i in numbers]
            try:
                if streamed:
                    found = [train(some[0], config, own, mesh=mesh, description=description)]
                else:
                    found = train_stacked(some, config, own, mesh=mesh, description=description)
            except NonFiniteError as error:
                # On a mesh the last task may be there several times.
                places = {min(i, len(numbers) - 1) for i in error.which} or {*range(len(numbers))}
                failed |= {numbers[i]: str(error).partition(":")[0] for i in places}
                numbers = [number for i, number in enumerate(numbers) if i not in places]
                continue
            models |= {
                i: _settled(tasks[i], model) for i, model in zip(numbers, found, strict=True)
            }
            break
    return Trained(models, failed)


def _settled(task: Task, model: nnx.Module) -> nnx.Module:
    """The trained network with the statistics of augmented batches of its own images."""
    keys = jax.random.split(task.key, SETTLING)

    def pixels() -> Iterator[Array]:
        if isinstance(task.batches, Resident):
            data = jax.tree.map(jnp.asarray, task.batches.data)
            batches = (task.batches.next_batch(jnp.int32(i), data) for i in range(SETTLING))
        else:
            batches = task.batches.start()
        for key, batch in zip(keys, batches, strict=False):
            yield task.loss.pixels(task.constants, batch, key)

    return settled(model, pixels())
