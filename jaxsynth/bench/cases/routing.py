"""What it costs that every image of a batch runs its own set of adapters, as DiffScaler draws.

Both sides are ours: a batch that mixes several data sets' Affiners around one transformer, and the
same batch with one set for all images. Latents only: the autoencoder is nobody's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxsynth.bench.cases.dit_train_step import random_affiners
from jaxsynth.bench.cases.networks import DITS, NETWORKS, random_dit, random_network
from jaxsynth.generation.classes import ClassGenerator, ClassOf
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.diffscaler.recipes import first_label
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.weights.networks.dit import SCHEDULER

GUIDANCE = 1.5


@dataclass(frozen=True)
class RoutingCase:
    """`images` at once over `steps` steps; image i has the Affiners of set i % `sets`."""

    name: str
    network: str
    images: int
    steps: int
    sets: int = 3

    @property
    def detail(self) -> str:
        return f"{self.images} images, {self.sets} sets, {self.steps} steps"


CASES = (
    RoutingCase("tiny", "tiny", images=48, steps=5),
    RoutingCase("dit-s2", "dit-s2", images=6, steps=2),
)
assert {case.network for case in CASES} <= DITS.keys()


class Drawing:
    """A batch drawn with these models, in turn: `step()` gives its latents, and waits for them."""

    def __init__(self, models: Sequence[DiT], case: RoutingCase):
        self.case, self.models = case, models
        self.sets = np.arange(case.images) % case.sets
        label = first_label(models[0])
        # Numbers and places of classes decide an image's noise, so they are those of every drawing.
        classes = [ClassOf(number % len(models), label) for number in range(case.sets)]
        vae = AutoencoderKLConfig.from_dict(NETWORKS["tiny"]().vae)
        config = GenerateConfig(
            guidance_scale=GUIDANCE,
            num_inference_steps=case.steps,
            sampler="ddim",
            batch_size=case.images,
        )
        self._generator = ClassGenerator(
            models, random_network(AutoencoderKL, vae), SCHEDULER, classes, config, seed=0
        )

    def step(self) -> np.ndarray:
        """(b, h, w, c)."""
        return self._generator.latents(self.sets, np.arange(self.case.images))


def build(case: RoutingCase) -> Drawing:
    """The mixed batch."""
    base = random_dit(DITS[case.network]())
    return Drawing([random_affiners(base, number) for number in range(case.sets)], case)


def connect(ours: Drawing) -> Drawing:
    """The batch that has one set for all images."""
    return Drawing(ours.models[:1], ours.case)


def compare(ours: Drawing, found: list[np.ndarray], one: Drawing) -> float:
    """The largest difference of the mixed batch from one drawn with each image's set alone.

    Relative to the largest value.
    """
    worst = 0.0
    for number, model in enumerate(ours.models):
        alone = (one if number == 0 else Drawing([model], ours.case)).step()
        rows = ours.sets == number
        apart = np.abs(found[0][rows] - alone[rows]).max() / np.abs(alone).max()
        worst = max(worst, float(apart))
    return worst


def peer_call(ours: Drawing, one: Drawing) -> Callable[[], object]:
    """What is timed beside `ours.step`."""
    return one.step
