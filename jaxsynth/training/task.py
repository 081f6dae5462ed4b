"""A task: what is trained, for `trainer.train`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Array, Key, PyTree, UInt8

from jaxsynth.training import sharding

Learns = Literal["replicate", "table", "stack"]
Loss = Callable[[Any, PyTree, PyTree, Key[Array, ""]], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class Buckets:
    """Examples of several shapes, of which each call of the program takes one (`training.turns`).

    Args:
        data: the arrays of the examples of each shape, of the same names.
        counts: how many examples have each shape.
        seed: decides which shape comes when.
    """

    data: tuple[dict[str, Any], ...]
    counts: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Resident:
    """Batches drawn on the device from arrays that lie there: cached latents, small images.

    Args:
        data: arrays, or their shapes for a plan. Those named in `sharded` have the examples on
            their first axis and are cut over the devices; the others are on every device.
        next_batch: `(step, data) -> batch`, a frozen dataclass; it must not draw rows beyond the
            number of examples, because arrays that do not divide are filled up.
        buckets: arrays of which a batch reads those of one shape beside `data`. A program is
            compiled for each shape, and `next_batch` is given "shift" too: step + shift counts the
            steps of the shape.
    """

    data: dict[str, Any]
    next_batch: Callable[[Array, dict[str, Array]], PyTree]
    sharded: tuple[str, ...] = ()
    buckets: Buckets | None = None


@dataclass(frozen=True)
class Streamed:
    """Batches from the host, such as a Grain pipeline's.

    Args:
        start: makes the iterator of this process's rows of each batch; it has `get_state` and
            `set_state` where a resumed training is to see the same data as an undisturbed one.
            None where the task is only planned.
        shapes: of the whole batch, for a plan.
    """

    start: Callable[[], Iterator[PyTree]] | None
    shapes: PyTree = None


@dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        model: the network; its `Trainable` variables learn. For a plan it may be of shapes alone.
        loss: `(model, constants, batch, key) -> (mean over the batch, metrics)`, a frozen
            dataclass: compared by value, a second training finds the compiled program. Or one for
            each phase by the name of the model's part that it moves (`step.make_train_step`).
        batches: where batches come from.
        table: the sharding rules of the model's weights.
        key: decides all that is random in the steps.
        constants: arrays that the loss needs besides: text states, a noise schedule.
        identity: JSON that checkpoints must agree on, such as the base's digest.
        learns: where what learns lies on a mesh.
        teacher: the loss's constants are then a dict, to which "teacher" is added: the model with
            the average of the parameters so far (`TrainingConfig.ema_decay` is its decay).
        evaluate: `(model, step) -> scalars`, every `evaluate_every` steps (by default each epoch's
            `evaluate_steps`), logged as "eval/<name>".
        sample: `model -> images`, every `sample_every` steps, written beside the metrics.
    """

    model: nnx.Module
    loss: Loss | Mapping[str, Loss]
    batches: Resident | Streamed
    table: sharding.Table
    key: Key[Array, ""]
    constants: PyTree = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    learns: Learns | Mapping[str, Learns] = "replicate"
    teacher: bool = False
    evaluate: Callable[[nnx.Module, int], Mapping[str, Any]] | None = None
    sample: Callable[[nnx.Module], UInt8[np.ndarray, "n h w 3"]] | None = None
