"""Sampling a batch of images with guidance, from noise to pixels: ours, and what torch does.

Text is encoded beforehand on both sides, since a data set's few prompts are encoded once.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsynth.bench.cases.networks import NETWORKS, random_pipeline
from jaxsynth.bench.cases.train_step import random_states
from jaxsynth.diffusion.samplers import initial_noise, make_sampler
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import GenerateConfig, Generator, image_keys
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import StableDiffusion, save_pipeline

GUIDANCE = 2.0


@dataclass(frozen=True)
class GenerateCase:
    """`images` at once over `steps` DDIM steps; with `adapters`, image i has number i % adapters.

    torch draws the images of one adapter at a time. `dtype` and `compiled` as in `TrainCase`.
    """

    name: str
    networks: str
    images: int
    steps: int
    adapters: int = 0
    dtype: str = "float32"
    compiled: bool = False

    @property
    def detail(self) -> str:
        own = f", {self.adapters} adapters" if self.adapters else ""
        return f"{self.images} images{own}, {self.steps} steps"


CASES = (
    GenerateCase("tiny", "tiny", images=20, steps=20),
    GenerateCase("tiny-cls", "tiny", images=20, steps=20, adapters=10),
    GenerateCase("sd-shaped", "sd-shaped", images=2, steps=5),
)
assert {case.networks for case in CASES} <= NETWORKS.keys()


class Generation:
    """Our side: `step()` draws the batch, and waits for it."""

    def __init__(self, pipeline: StableDiffusion, case: GenerateCase):
        self.case, self.pipeline = case, pipeline
        self.prompts = [f"a photo of a {number}" for number in range(max(1, case.adapters))]
        self.states = random_states(pipeline, case.adapters)
        config = GenerateConfig(
            guidance_scale=GUIDANCE, num_inference_steps=case.steps, batch_size=case.images
        )
        self._generator = Generator(
            pipeline, self.prompts, config, seed=0, adapters=self.states or None
        )
        self.labels = np.arange(case.images) % len(self.prompts)
        self._indices = np.arange(case.images) // len(self.prompts)
        schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
        sampler = make_sampler(pipeline.scheduler_config, schedule, case.steps)
        side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
        keys = image_keys(0, jnp.asarray(self.labels), jnp.asarray(self._indices))
        self.noise = np.asarray(initial_noise(keys, (side, side, channels), sampler))

    def step(self) -> np.ndarray:
        """The images, uint8 (b, h, w, 3)."""
        return self._generator(self.labels, self._indices)


def build(case: GenerateCase) -> Generation:
    """Our side of a case, with random weights."""
    return Generation(random_pipeline(NETWORKS[case.networks](), dtype=case.dtype), case)


def connect(ours: Generation) -> Any:
    """torch's side with our weights, which it reads from a folder as users' weights are."""
    from jaxsynth.bench.peers.diffusers import TorchGeneration

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_pipeline(ours.pipeline, folder)
        adapters = [folder / f"adapter{number}" for number in range(len(ours.states))]
        for path, state in zip(adapters, ours.states, strict=True):
            adapter_io.save(state, path)
        case = ours.case
        return TorchGeneration(
            folder, ours.prompts, adapters, steps=case.steps, guidance=GUIDANCE, dtype=case.dtype,
            compiled=case.compiled,
        )  # fmt: skip


def compare(ours: Generation, found: list[np.ndarray], peer) -> float:
    """The largest difference of a pixel in [0, 1] beyond our rounding to whole numbers.

    Of 16 bits the mean difference: a pixel on a steep edge may be far off.
    """
    apart = np.abs(found[0].astype(np.float32) / 255 - peer.step(ours.noise, ours.labels))
    worst = apart.max() if ours.case.dtype == "float32" else apart.mean()
    return float(max(worst - 0.5 / 255, 0.0))


def peer_call(ours: Generation, peer) -> Callable[[], object]:
    """What torch does instead of `ours.step`."""
    return lambda: peer.step(ours.noise, ours.labels)
