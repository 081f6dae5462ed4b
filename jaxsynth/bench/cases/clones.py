"""One update of a clone's contrastive method, and one of SimCLR's on the same images; both ours.

No library trains SynCLR beside which ours could be timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxsynth.bench.cases.supervised_step import VIT_S
from jaxsynth.tasks.clone_network import HeadsConfig
from jaxsynth.tasks.contrastive import CloneConfig, clone_task
from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.tasks.supervised import Pool
from jaxsynth.training.trainer import Steps

CAPTIONS, EACH = 8, 8
TINY = NetworkConfig(width=48, layers=3)


@dataclass(frozen=True)
class CloneCase:
    """A step of `config` on images of 8 captions."""

    name: str
    network: NetworkConfig
    config: CloneConfig

    @property
    def images(self) -> int:
        return self.config.batch_size

    @property
    def detail(self) -> str:
        return f"batch {self.images}, {self.network.image_size} px"


def _config(method: str, captions: int, each: int, **more) -> CloneConfig:
    return CloneConfig(
        method=method, captions=captions, per_caption=each, batch_size=captions * each, steps=1000,
        ema_decay=0.99 if method == "synclr" else 0.0, **more,
    )  # fmt: skip


CASES = (
    *(CloneCase(f"tiny {x}", TINY, _config(x, 8, 4)) for x in ("stablerep", "synclr", "synclip")),
    CloneCase(
        "vit-s16 synclr", VIT_S,
        _config("synclr", 2, 2, local_crops=4, local_size=96, heads=HeadsConfig(1024, 256, 8192)),
    ),
)  # fmt: skip


class Training:
    """`step()` is one update, and waits for it."""

    def __init__(self, case: CloneCase):
        self.case = case
        rng, side = np.random.default_rng(0), case.network.image_size
        images = rng.integers(0, 256, (CAPTIONS * EACH, side, side, 3)).astype(np.uint8)
        captions = np.arange(len(images)) % CAPTIONS
        tokens = np.array([[1, 2 + i, 2 + CAPTIONS] for i in range(CAPTIONS)])
        pool = Pool(images, captions.astype(np.int32))
        task = clone_task(pool, captions, tokens, case.network, case.config, seed=0)
        self._steps = Steps(task, case.config)

    def step(self) -> int:
        """How many updates there have been."""
        self._steps.advance(1)
        return self._steps.done


def build(case: CloneCase) -> Training:
    """A case's method, from a random start."""
    return Training(case)


def connect(ours: Training) -> Training:
    """SimCLR, which has no teacher, captions, small crops or patches."""
    config = replace(ours.case.config, method="simclr", ema_decay=0.0)
    return Training(replace(ours.case, config=config))


def compare(ours: Training, found: list[int], other: Training) -> None:
    """Methods differ, so only their speed is compared."""
    jax.block_until_ready(other.step())


def peer_call(ours: Training, other: Training) -> Callable[[], object]:
    """What is timed beside `ours.step`."""
    return other.step
