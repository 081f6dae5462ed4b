"""Classifiers trained from scratch on views over one pool of images, many of them together.

The images of all trainings lie on the device once; a training has the numbers of those that it
sees, so that a study of sizes and mixtures copies no picture, and trainings on different numbers of
images have the same shapes: they stack in one program (`trainer.train_stacked`).

    loss = sum_i w_i CE(f(augment(x_i)), y_i) / sum_i w_i

over a batch drawn with replacement, w_i being the weight of the image's origin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.adapters.inject import Trainable, mark_trainable
from jaxsynth.core.limits import BelowOne, Count, Natural, NotNegative, OneOf, check_limits
from jaxsynth.data.pipeline.augment import Augment
from jaxsynth.data.pipeline.mixing import one_hot
from jaxsynth.data.pipeline.on_device import ON_DEVICE, augmented, check_on_device
from jaxsynth.models.classifiers.vit import ViTConfig, ViTForImageClassification
from jaxsynth.training import sharding
from jaxsynth.training.config import DECAYED, SCHEDULES, TrainingConfig
from jaxsynth.training.trainer import Resident, Task

# Pixels are normalized by these whatever the data: a network from scratch knows no other ones.
MEAN, STD = 0.5, 0.25
# Every parameter is a training's own; on a mesh the trainings of a stack lie along "data".
TABLE: sharding.Table = ((r"", jax.sharding.PartitionSpec()),)
# Pools are filled up to a multiple of so many images, so that settings share a compiled program. No
# view has a row of the filling.
_POOL = 1024


@dataclass(frozen=True)
class NetworkConfig:
    """A vision transformer for square images of `image_size` pixels, cut into `patch_size`."""

    image_size: Count = 32
    patch_size: Count = 8
    width: Count = 64
    layers: Count = 4
    heads: Count = 4

    def __post_init__(self):
        check_limits(self)
        self.vit(0)

    def vit(self, num_labels: int) -> ViTConfig:
        """The network's own configuration; ValueError where the sizes do not fit each other."""
        return ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            layer_norm_eps=1e-6,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_labels=num_labels,
        )

    def make(self, num_labels: int, key: Array) -> ViTForImageClassification:
        """The network at its random start; 0 labels leave the head out."""
        return ViTForImageClassification(self.vit(num_labels), rngs=nnx.Rngs(params=key))


@dataclass(frozen=True)
class SupervisedConfig(TrainingConfig):
    """How a classifier is trained; `augment` as far as it is done on the device."""

    steps: Natural = 1000
    batch_size: Count = 64
    learning_rate: NotNegative = 1e-3
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    weight_decay: NotNegative = 0.05
    decay_on: Annotated[str, OneOf(*DECAYED)] = "matrices"
    label_smoothing: BelowOne = 0.1
    augment: Augment = field(default_factory=lambda: ON_DEVICE)

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
    """The module's loss over {"row", "weight"}; constants: the pool's "images" and "labels"."""

    num_classes: int
    size: int
    label_smoothing: float
    augment: Augment

    def __call__(self, model: nnx.Module, constants: dict[str, Array], batch: dict, key: Array):
        row = batch["row"]
        images = augmented(constants["images"][row], key, self.augment, self.size)
        labels = constants["labels"][row]
        logits = model((images - MEAN) / STD).astype(jnp.float32)
        each = cross_entropy(logits, labels, self.num_classes, self.label_smoothing)
        weight = batch["weight"]
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
    network: NetworkConfig,
    config: SupervisedConfig,
    *,
    seeds: Sequence[int],
    num_classes: int,
) -> list[Task]:
    """A task for each view, of one structure: views are filled up to the largest.

    The start of task i and all that is random in it follow from `seeds[i]`, so that views of one
    seed are compared from one start.
    """
    longest = max(len(view.rows) for view in views)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(
        jnp.asarray(seeds, jnp.uint32)
    )
    make = lambda key: mark_trainable(network.make(num_classes, key))  # noqa: E731
    graphdef, _, rest = nnx.split(make(keys[0, 0]), Trainable, ...)
    starts = jax.jit(jax.vmap(lambda key: nnx.state(make(key), Trainable)))(keys[:, 0])
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
        start = jax.tree.map(lambda x: x[i], starts)  # noqa: B023
        task = _task(nnx.merge(graphdef, start, rest), data, constants, network, config,
                     num_classes, keys[i, 2])  # fmt: skip
        tasks.append(task)
    return tasks


def planned_task(
    network: NetworkConfig,
    config: SupervisedConfig,
    *,
    images: int,
    longest: int,
    num_classes: int,
) -> Task:
    """A task of `supervised_tasks` of shapes alone: a pool of `images`, views of `longest`."""
    key, shape = jax.random.key(0), jax.ShapeDtypeStruct
    model = nnx.eval_shape(lambda: mark_trainable(network.make(num_classes, jax.random.key(0))))
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
    return _task(model, data, constants, network, config, num_classes, key)


def _task(model, data, constants, network, config, num_classes, key) -> Task:
    return Task(
        model=model,
        loss=Supervised(num_classes, network.image_size, config.label_smoothing, config.augment),
        batches=Resident(data, ViewRows(config.batch_size)),
        table=TABLE,
        key=key,
        constants=constants,
    )


def of_pixels(model: nnx.Module) -> Partial:
    """A function of images (b, h, w, 3) in [0, 1] to float32 logits; the weights are arguments."""
    return Partial(_of_pixels, model)


def _of_pixels(model: nnx.Module, images: Array) -> Array:
    return model((images - MEAN) / STD).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _apply(function, model: nnx.Module, images: Array) -> Array:
    return function(model, images)


def by_batches(
    function: Callable[[nnx.Module, Array], Array],
    model: nnx.Module,
    images: UInt8[np.ndarray, "n h w 3"],
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, "n d"]:
    """`function(model, images in [0, 1])` of all images, in order; one program for all models."""
    found = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        filled = np.resize(part, (min(batch_size, len(images)), *part.shape[1:]))
        given = jnp.asarray(filled, jnp.float32) / 255
        found.append(np.asarray(_apply(function, model, given))[: len(part)])
    return np.concatenate(found)


def logits_of(
    model: nnx.Module, images: UInt8[np.ndarray, "n h w 3"], *, batch_size: int = 256
) -> Float[np.ndarray, "n c"]:
    """Logits of all images, in order."""
    return by_batches(_of_pixels, model, images, batch_size=batch_size)
