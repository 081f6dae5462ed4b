"""What a backbone's features tell: linear heads trained on them, and nearest neighbors.

The linear probe of StableRep (Tian et al. 2023, arXiv 2306.00984), which the study of clones used:
heads with ten learning rates train at once on one summed loss, SGD with momentum, no decay, a
cosine. Where the published code takes the head that is best on the test set, here held-out images
choose it. Features are computed once: images are not augmented.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import (
    BelowOne,
    Count,
    Natural,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Some,
)
from jaxsynth.core.words import counted
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.models.layers import Linear
from jaxsynth.tasks.supervised import TABLE, cross_entropy
from jaxsynth.training.config import OPTIMIZERS, SCHEDULES, TrainingConfig
from jaxsynth.training.trainer import Resident, Task, train

# A head's rate is that for 256 images of a batch.
BASE_BATCH = 256


@dataclass(frozen=True)
class ProbeConfig(TrainingConfig):
    """How heads are trained: one for each of `head_rates`, in proportion to the batch's size.

    `normalize` puts a batch norm without scale before the heads, of the training features'
    statistics. A share `held_out` of each class chooses the head. `neighbors` vote in kNN.
    """

    head_rates: Annotated[tuple[Positive, ...], Some()] = (
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5,
    )  # fmt: skip
    normalize: bool = True
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    neighbors: Count = 20
    optimizer: Annotated[str, OneOf(*OPTIMIZERS)] = "sgd"
    b1: BelowOne = 0.9
    learning_rate: NotNegative = 1.0
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    epochs: Natural = 90
    batch_size: Count = 1024

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.head_rates)) != len(self.head_rates):
            raise ValueError(f"head_rates: {self.head_rates}, some are given twice")
        if self.rates:
            raise ValueError(f"rates: {self.rates}, but `head_rates` are a probe's")


class Heads(nnx.Module):
    """Linear maps of the same features, weights N(0, 0.01)."""

    def __init__(self, count: int, width: int, classes: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.01)
        self.head = nnx.List(
            [
                Linear(width, classes, kernel_init=init, dtype=jnp.float32, rngs=rngs)
                for _ in range(count)
            ]
        )

    def __call__(self, features: Float[Array, "b d"]) -> Float[Array, "h b c"]:
        return jnp.stack([head(features) for head in self.head])


@dataclass(frozen=True)
class ProbeLoss:
    """The sum of the heads' cross entropies over {"feature", "label"}."""

    num_classes: int

    def __call__(self, model: Heads, constants: None, batch: dict, key: Array):
        logits = model(batch["feature"])
        each = jax.vmap(lambda own: cross_entropy(own, batch["label"], self.num_classes, 0.0))
        return each(logits).mean(1).sum(), {}


@dataclass(frozen=True)
class FeatureRows:
    """Batches of `count` features in the order of `epoch_rows`."""

    count: int
    batch_size: int

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        rows = epoch_rows(data["order"], step, self.count, self.batch_size)
        return {name: data[name][rows] for name in ("feature", "label")}


@dataclass(frozen=True)
class Probed:
    """Answers to the test images: `logits` (n, c) of the head that was chosen, whose `rate` it is,
    its accuracy on held-out images, and kNN's votes `neighbors` (n, c)."""

    logits: Float[np.ndarray, "n c"]
    neighbors: Float[np.ndarray, "n c"]
    rate: float
    held_out: float


def probe(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    config: ProbeConfig,
    folder: Path,
    *,
    num_classes: int,
    seed: int,
    mesh: Mesh | None = None,
    description: str = "probe",
) -> Probed:
    """Heads trained on labeled features and asked about others; resumes from `folder`.

    Raises:
        UserError: a class has fewer than two features, so that none can be held out.
    """
    known, held = _held_out(labels, num_classes, config.held_out, seed)
    mean, std = np.zeros(features.shape[1]), np.ones(features.shape[1])
    if config.normalize:
        mean, std = features[known].mean(0), np.sqrt(features[known].var(0) + 1e-6)
    scaled = [((x - mean) / std).astype(np.float32) for x in (features, test)]
    sized = config.sized(len(known))
    task = probe_task(
        {"feature": scaled[0][known], "label": labels[known].astype(np.int32)}, sized,
        width=features.shape[1], num_classes=num_classes, seed=seed,
    )  # fmt: skip
    model = train(task, with_rates(sized), folder, mesh=mesh, description=description)
    right = _logits(model, scaled[0][held]).argmax(-1) == labels[held]
    accuracy = right.mean(1)
    # Of equal heads the smallest rate's: it has moved least.
    best = int(accuracy.argmax())
    votes = nearest(features[known], labels[known], test, config.neighbors, num_classes)
    return Probed(
        _logits(model, scaled[1])[best], votes, config.head_rates[best], float(accuracy[best])
    )


def probe_task(data: dict, config: ProbeConfig, *, width: int, num_classes: int, seed: int) -> Task:
    """The training of the heads on `data`, arrays or shapes of "feature" and "label"."""
    count, key = len(config.head_rates), jax.random.key(seed)
    model = mark_trainable(Heads(count, width, num_classes, rngs=nnx.Rngs(params=key)))
    return Task(
        model=model,
        loss=ProbeLoss(num_classes),
        batches=Resident(
            {**data, "order": jax.random.fold_in(key, 1)},
            FeatureRows(data["label"].shape[0], config.batch_size),
            sharded=("feature", "label"),
        ),
        table=TABLE,
        key=jax.random.fold_in(key, 2),
    )


def with_rates(config: ProbeConfig) -> TrainingConfig:
    """The training's own configuration: each head's rate as a factor of its path."""
    scale = config.batch_size / BASE_BATCH
    rates = tuple((rf"(^|\.)head\.{i}\.", rate * scale) for i, rate in enumerate(config.head_rates))
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainingConfig)}
    return TrainingConfig(**plain | {"rates": rates})


def nearest(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    neighbors: int,
    num_classes: int,
    temperature: float = 0.07,
) -> Float[np.ndarray, "m c"]:
    """Votes of the `neighbors` with the largest cosines, weighing exp(cosine / temperature).

    The classifier of Wu et al. 2018 (arXiv 1805.01978).
    """
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (test, features))
    count, votes = min(neighbors, len(labels)), np.zeros((len(test), num_classes), np.float32)
    for start in range(0, len(test), 1024):
        cosines = one[start : start + 1024] @ other.T
        places = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = np.exp(np.take_along_axis(cosines, places, 1) / temperature)
        for row, (own, weight) in enumerate(zip(labels[places], weights, strict=True), start):
            np.add.at(votes[row], own, weight)
    return votes


def _held_out(
    labels: Int[np.ndarray, " n"], num_classes: int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places that heads learn from and places that choose among them, of every class some."""
    known: list[int] = []
    held: list[int] = []
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(
                f"probe: class {label} has {counted(len(members), 'image')}, expected 2 or more: "
                "one of them chooses the head"
            )
        order = np.random.default_rng([seed, label]).permutation(members)
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        held += order[:count].tolist()
        known += order[count:].tolist()
    return np.sort(known), np.sort(held)


@jax.jit
def _heads(model: Heads, features: Array) -> Array:
    return model(features)


def _logits(model: Heads, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "h n c"]:
    return np.asarray(_heads(model, jnp.asarray(features)))
