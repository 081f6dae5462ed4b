"""One update of LoRA on UNet and text encoder, as DataDream trains: ours, and what torch does.

Forward, backward, clipping and AdamW on encoded images; both sides also draw their noise.
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
from jaxtyping import Array, PyTree

from jaxsynth.adapters.inject import AdapterState, Trainable, extract, load_state, stack
from jaxsynth.bench.cases.networks import NETWORKS, random_pipeline
from jaxsynth.diffusion.noising import sample_noise
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.tasks.text_to_image import Denoising, FinetuneConfig, adapted
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.planning import count_flops
from jaxsynth.training.step import StepFn, init_stacked, init_state, make_train_step, stacked
from jaxsynth.weights.hf import StableDiffusion, save_pipeline


@dataclass(frozen=True)
class TrainCase:
    """`adapters` are trained together on `batch_size` images each; torch takes one at a time.

    The base is stored and computed in `dtype`; what learns stays float32. With `compiled` torch's
    side is compiled too.
    """

    name: str
    networks: str
    batch_size: int
    adapters: int = 1
    dtype: str = "float32"
    compiled: bool = False

    @property
    def images(self) -> int:
        """Images a call."""
        return self.batch_size * self.adapters

    @property
    def detail(self) -> str:
        each = f"batch {self.batch_size}"
        return each if self.adapters == 1 else f"{self.adapters} adapters, {each} each"


CASES = (
    TrainCase("tiny", "tiny", batch_size=8),
    TrainCase("tiny-cls", "tiny", batch_size=8, adapters=10),
    TrainCase("sd-shaped", "sd-shaped", batch_size=4),
)
assert {case.networks for case in CASES} <= NETWORKS.keys()

FINETUNE = FinetuneConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
PROMPT = "a photo of a cat"


@dataclass(frozen=True)
class Drawn:
    """What one step of one adapter draws; latents (b, h, w, c)."""

    x0: np.ndarray
    noise: np.ndarray
    t: np.ndarray


class Stepper:
    """A compiled training step and its state: a call is one update, and waits for it.

    Over flat lists, as in `training.loop`: flattening modules at every call costs milliseconds.
    """

    def __init__(self, step: StepFn, state: PyTree, frozen: PyTree):
        self._leaves, structure = jax.tree.flatten(state)
        self._frozen, frozen_structure = jax.tree.flatten(frozen)

        def call(leaves, frozen_leaves, batch):
            state = jax.tree.unflatten(structure, leaves)
            new, metrics = step(state, jax.tree.unflatten(frozen_structure, frozen_leaves), batch)
            return jax.tree.leaves(new), metrics

        self._program = jax.jit(call, donate_argnums=0)

    def __call__(self, batch: PyTree) -> dict[str, np.ndarray]:
        """The step's metrics."""
        self._leaves, metrics = self._program(self._leaves, self._frozen, batch)
        return jax.device_get(metrics)

    def flops(self, batch: PyTree) -> float:
        """Operations of the products and convolutions of an update."""
        return count_flops(self._program.trace(self._leaves, self._frozen, batch).jaxpr)


class Training:
    """Our side: `step()` is one update of every adapter, and waits for it."""

    def __init__(self, pipeline: StableDiffusion, case: TrainCase):
        self.case, self.pipeline = case, pipeline
        self._schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
        self._keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(case.adapters)]
        self.states = random_states(pipeline, case.adapters)
        model = adapted(pipeline, FINETUNE, self._keys[0])
        graphdef, _, frozen = nnx.split(model, Trainable, ...)
        trainables = [nnx.state(load_state(model, state), Trainable) for state in self.states]
        self.batches = [_batch(pipeline, case.batch_size, i) for i in range(case.adapters)]
        tx, rate, schedule = make_optimizer(FINETUNE), Rate.of(FINETUNE), self._schedule
        denoising = Denoising(FINETUNE.snr_gamma, FINETUNE.remat)

        def loss(trainable, frozen, batch, key):
            return denoising(nnx.merge(graphdef, trainable, frozen), schedule, batch, key)

        step = make_train_step(loss, tx)
        if case.adapters == 1:
            state = init_state(trainables[0], tx, self._keys[0], rate)
            self._batch = self.batches[0]
        else:
            step, self._batch = stacked(step), stack(self.batches)
            rates = jax.tree.map(lambda x: np.stack([x] * case.adapters), rate)
            state = init_stacked(stack(trainables), tx, jnp.stack(self._keys), rates)
        self._stepper = Stepper(step, state, frozen)
        self._forward = lambda: jax.make_jaxpr(loss)(
            trainables[0], frozen, self.batches[0], self._keys[0]
        )

    @property
    def work(self) -> dict[str, float]:
        """Operations of a call, as LoRA needs them and as training all weights would."""
        return {
            "LoRA": self._stepper.flops(self._batch),
            # The weights' gradients cost what the forward pass does, and the activations' too.
            "full training": 3 * count_flops(self._forward()) * self.case.adapters,
        }

    def step(self) -> dict[str, np.ndarray]:
        return self._stepper(self._batch)

    def drawn(self, adapter: int, step: int) -> Drawn:
        """What `adapter` draws in step number `step`."""
        key = jax.random.fold_in(self._keys[adapter], step)
        batch = self.batches[adapter]
        drawn = sample_noise(batch["mean"], batch["std"], key, self._schedule)
        return Drawn(*map(np.asarray, drawn))


def build(case: TrainCase) -> Training:
    """Our side of a case, with random weights."""
    return Training(random_pipeline(NETWORKS[case.networks](), dtype=case.dtype), case)


def connect(ours: Training) -> Any:
    """torch's side with our weights, which it reads from a folder as users' weights are."""
    from jaxsynth.bench.peers.diffusers import TorchTraining

    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(ours.pipeline, folder)
        case = ours.case
        return TorchTraining(Path(folder), FINETUNE, case.dtype, compiled=case.compiled)


def random_states(pipeline: StableDiffusion, count: int) -> list[AdapterState]:
    """LoRA states whose B is not zero, so that every factor has an effect and a gradient."""
    states = []
    for i in range(count):
        key = jax.random.fold_in(jax.random.key(1), i)
        state = extract(adapted(pipeline, FINETUNE, key))
        arrays = {
            name: 0.02 * jax.random.normal(jax.random.fold_in(key, number), value.shape)
            if name.endswith("lora_B")
            else value
            for number, (name, value) in enumerate(state.arrays.items())
        }
        states.append(AdapterState(arrays, state.config))
    return states


def _batch(pipeline: StableDiffusion, size: int, seed: int) -> dict[str, Array]:
    """Encoded images: random posteriors, one crop each."""
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    generator = np.random.default_rng(seed)
    shape = (size, 1, side, side, channels)
    mean = generator.standard_normal(shape, np.float32)
    ids = pipeline.tokenizer([PROMPT]).repeat(size, 0)
    std = np.full(shape, 0.1, np.float32)
    return {"mean": jnp.asarray(mean), "std": jnp.asarray(std), "ids": jnp.asarray(ids)}


def compare(ours: Training, found: list[dict[str, np.ndarray]], peer) -> float:
    """The largest relative difference of loss and gradient norm in the first steps, `found` ours.

    The second step's loss depends on the first update, so this covers the optimiser too. The first
    and the last adapter stand for all.
    """
    worst = 0.0
    for adapter in sorted({0, ours.case.adapters - 1}):
        peer.load(ours.states[adapter])
        for number, metrics in enumerate(found):
            expected = peer.step(ours.batches[adapter], ours.drawn(adapter, number))
            for name, value in expected.items():
                mine = float(np.ravel(metrics[name])[adapter])
                worst = max(worst, abs(mine - value) / abs(value))
    return worst


def peer_call(ours: Training, peer) -> Callable[[], object]:
    """What torch does instead of `ours.step`: each adapter's step in turn."""

    def call():
        for batch in ours.batches:
            peer.step(batch)

    return call
