"""One update of Affiners on a class-conditional transformer, as DiffScaler trains: ours, and torch.

Forward, backward and Adam on encoded images of new classes, with the error of the noise and the
bound of the learned variance; both sides also draw their noise.
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

from jaxsynth.adapters.inject import AdapterState, Trainable, extract, load_state
from jaxsynth.bench.cases.networks import DITS, random_dit
from jaxsynth.bench.cases.train_step import Stepper
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.methods.diffscaler.recipes import PLACES, adapted, first_label
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.tasks.class_conditional import AdaptConfig, Drawn, LabelledDenoising
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.step import init_state, make_train_step
from jaxsynth.weights.models import save_model
from jaxsynth.weights.networks.dit import SCHEDULER

# The places that the paper names.
RECIPE, PLACE, RANK, CLASSES = "affiner", "paper", 8, 10
# A gradient that is zero but for rounding (the shift of a key has no effect) is held to this share
# of the whole gradient.
_FLOOR = 1e-3


@dataclass(frozen=True)
class DiTCase:
    """Affiners of rank 8 on the transformer `network`, `images` a step."""

    name: str
    network: str
    images: int

    @property
    def detail(self) -> str:
        return f"batch {self.images}, Affiner r{RANK}"


CASES = (
    DiTCase("tiny", "tiny", images=64),
    DiTCase("dit-s2", "dit-s2", images=4),
    DiTCase("dit-b2", "dit-b2", images=2),
)
assert {case.network for case in CASES} <= DITS.keys()


class Training:
    """Our side: `step()` is one update, and waits for it."""

    def __init__(self, base: DiT, case: DiTCase):
        self.case, self.base = case, base
        self.config = AdaptConfig(batch_size=case.images, learning_rate=1e-3)
        self._key = jax.random.key(0)
        self._schedule = NoiseSchedule.from_config(SCHEDULER)
        model = random_affiners(base)
        self.state = extract(model)
        self._graphdef, self._trainable, self._frozen = nnx.split(model, Trainable, ...)
        self._denoising = LabelledDenoising(base.config.null_label, self.config.label_dropout)
        self.batch = _batch(base, case.images)
        tx = make_optimizer(self.config)
        state = init_state(self._trainable, tx, self._key, Rate.of(self.config))
        self._stepper = Stepper(make_train_step(self._loss, tx), state, self._frozen)

    def _loss(self, trainable: nnx.State, frozen: nnx.State, batch: dict, key: Array):
        model = nnx.merge(self._graphdef, trainable, frozen)
        return self._denoising(model, self._schedule, batch, key)

    def step(self) -> dict[str, np.ndarray]:
        return self._stepper(self.batch)

    def drawn(self, step: int) -> Drawn:
        """What step number `step` draws."""
        key = jax.random.fold_in(self._key, step)
        return jax.device_get(self._denoising.draw(self._schedule, self.batch, key))

    def gradients(self) -> dict[str, np.ndarray]:
        """Those of the first step, by the names of `state`."""

        key = jax.random.fold_in(self._key, 0)
        gradient = jax.jit(jax.grad(self._loss, has_aux=True))
        found, _ = gradient(self._trainable, self._frozen, self.batch, key)
        return jax.device_get(extract(nnx.merge(self._graphdef, found, self._frozen)).arrays)


def random_affiners(base: DiT, seed: int = 0) -> DiT:
    """The base with Affiners and class rows of which every value has an effect and a gradient."""
    model = adapted(base, RECIPE, CLASSES, rank=RANK, lora_rank=RANK, seed=seed)
    key = jax.random.fold_in(jax.random.key(1), seed)
    state = extract(model)
    arrays = {
        name: value + 0.1 * jax.random.normal(jax.random.fold_in(key, number), value.shape)
        for number, (name, value) in enumerate(state.arrays.items())
    }
    return load_state(model, AdapterState(arrays, state.config))


def _batch(base: DiT, count: int) -> dict[str, Array]:
    """Encoded images of the new classes: random posteriors."""
    side, channels = base.config.sample_size, base.config.in_channels
    shape = (count, side, side, channels)
    mean = np.random.default_rng(0).standard_normal(shape, np.float32)
    labels = first_label(base) + np.arange(count) % CLASSES
    return {
        "mean": jnp.asarray(mean),
        "std": jnp.full(shape, 0.1, jnp.float32),
        "labels": jnp.asarray(labels, jnp.int32),
    }


def build(case: DiTCase) -> Training:
    """Our side of a case, with random weights."""
    return Training(random_dit(DITS[case.network]()), case)


def connect(ours: Training) -> Any:
    """torch's side with our weights, which it reads from a folder as users' weights are."""
    from jaxsynth.bench.peers.torch_dit import TorchDiTTraining

    with tempfile.TemporaryDirectory() as folder:
        save_model(ours.base, ours.base.config.to_dict(), folder)
        return TorchDiTTraining(
            Path(folder),
            PLACES[PLACE],
            rank=RANK,
            classes=CLASSES,
            learning_rate=ours.config.learning_rate,
            label_dropout=ours.config.label_dropout,
            scheduler=SCHEDULER,
        )


def compare(ours: Training, found: list[dict[str, np.ndarray]], peer) -> float:
    """The largest relative difference of the losses of the first steps, and of a gradient.

    The second step's loss depends on the first update, so this covers the optimiser too. Gradients
    are compared parameter by parameter, by the norm of the difference.
    """
    peer.load(ours.state)
    worst = 0.0
    for number, metrics in enumerate(found):
        expected = peer.step(ours.batch, ours.drawn(number))
        worst = max(worst, abs(float(metrics["loss"]) - expected) / abs(expected))
        if number == 0:
            theirs = peer.gradients(ours.state)
    return max(worst, gradient_difference(ours.gradients(), theirs))


def gradient_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest relative difference of the gradient of one parameter."""
    norm = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in theirs.values()))
    return max(
        float(np.linalg.norm(ours[name] - value) / (np.linalg.norm(value) + _FLOOR * norm))
        for name, value in theirs.items()
    )


def peer_call(ours: Training, peer) -> Callable[[], object]:
    """What torch does instead of `ours.step`."""
    return lambda: peer.step(ours.batch)
