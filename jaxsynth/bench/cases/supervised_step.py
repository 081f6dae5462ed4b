"""One update of a vision transformer from scratch on labeled images: ours, and what torch does.

Forward, backward, clipping and AdamW of every parameter, on uint8 images that both sides normalize.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxsynth.adapters.inject import Trainable, mark_trainable
from jaxsynth.bench.cases.train_step import Stepper
from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.tasks.supervised import Supervised, SupervisedConfig
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.step import init_state, make_train_step
from jaxsynth.weights.networks.classifiers import Classifier, save_classifier
from jaxsynth.weights.preprocessing import Preprocessing

CLASSES = 10
# Both sides decay every parameter; torch's usual loop knows no other.
TRAIN = SupervisedConfig(
    steps=100, learning_rate=1e-3, schedule="constant", decay_on="all", clip_norm=1.0,
    augment=RECIPES["none"],
)  # fmt: skip


@dataclass(frozen=True)
class SupervisedCase:
    """`images` a step of the network."""

    name: str
    network: NetworkConfig
    images: int

    @property
    def detail(self) -> str:
        return f"batch {self.images}, {self.network.image_size} px"


VIT_S = NetworkConfig(image_size=224, patch_size=16, width=384, layers=12, heads=6)
CASES = (
    SupervisedCase("tiny", NetworkConfig(width=48, layers=3), images=32),
    SupervisedCase("vit-s16", VIT_S, images=8),
)


class Training:
    """Our side: `step()` is one update, and waits for it."""

    def __init__(self, case: SupervisedCase):
        self.case = case
        self.network = case.network.make(CLASSES, jax.random.key(0))
        loss = Supervised(CLASSES, case.network, TRAIN.label_smoothing, TRAIN.augment)
        graphdef, trainable, frozen = nnx.split(mark_trainable(self.network), Trainable, ...)
        self.batch = _batch(case)
        tx = make_optimizer(TRAIN)

        def value(trainable: nnx.State, frozen: nnx.State, batch: dict, key: Array):
            return loss(nnx.merge(graphdef, trainable, frozen), None, batch, key)

        state = init_state(trainable, tx, jax.random.key(1), Rate.of(TRAIN))
        self._stepper = Stepper(make_train_step(value, tx), state, frozen)

    def step(self) -> dict[str, np.ndarray]:
        return self._stepper(self.batch)


def _batch(case: SupervisedCase) -> dict[str, Array]:
    rng, side = np.random.default_rng(0), case.network.image_size
    images = rng.integers(0, 256, (case.images, side, side, 3)).astype(np.uint8)
    return {
        "image": jnp.asarray(images),
        "label": jnp.arange(case.images, dtype=jnp.int32) % CLASSES,
        "weight": jnp.ones(case.images),
    }


def build(case: SupervisedCase) -> Training:
    """Our side of a case, with random weights."""
    return Training(case)


def connect(ours: Training) -> Any:
    """torch's side with our weights, which it reads from a folder as users' weights are."""
    from jaxsynth.bench.peers.torch_vit import TorchTraining

    network = ours.case.network
    side = network.image_size
    seen = Preprocessing(side, side, False, "bicubic", network.mean, network.std, "floor")
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(Classifier(ours.network, seen), folder)
        return TorchTraining(Path(folder), network, TRAIN)


def compare(ours: Training, found: list[dict[str, np.ndarray]], peer) -> float:
    """The largest relative difference of the losses and gradients' norms of the first steps.

    The second step's are those after the first update, so this covers the optimizer too.
    """
    worst = 0.0
    for metrics in found:
        expected = peer.step(ours.batch)
        for name, value in expected.items():
            worst = max(worst, abs(float(metrics[name]) - value) / abs(value))
    return worst


def peer_call(ours: Training, peer) -> Callable[[], object]:
    """What torch does instead of `ours.step`."""
    return lambda: peer.step(ours.batch)
