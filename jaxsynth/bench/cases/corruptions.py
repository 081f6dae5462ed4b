"""ImageNet-C's 19 corruptions at 224 pixels: ours, and imagecorruptions' on the same images.

Drawing the randomness counts on both sides. imagecorruptions takes one 8-bit image at a time; a
call of ours takes the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.robustness.corruptions.registry import CORRUPTIONS, corrupt, program_memory

SIZE, SEVERITY = 224, 3
# Those without randomness that imagecorruptions has with the released set's formula, and whose
# pictures are therefore compared; it cuts to 8 bits what these do not.
SAME = ("brightness", "contrast", "defocus_blur", "gaussian_blur", "jpeg_compression", "saturate")


@dataclass(frozen=True)
class CorruptionCase:
    """These corruptions of a batch of `images`, one after the other."""

    name: str
    corruptions: tuple[str, ...]
    images: int = 8

    @property
    def detail(self) -> str:
        return f"{self.images} images"


CASES = (
    CorruptionCase("all 19", tuple(CORRUPTIONS)),
    *(CorruptionCase(name, (name,)) for name in CORRUPTIONS),
)


class Corrupting:
    """Our side: `step()` corrupts the batch, and waits for it."""

    def __init__(self, case: CorruptionCase):
        self.case = case
        self.images = pictures(case.images)
        self._on_device = jnp.asarray(self.images.astype(np.float32) / 255)
        self._key = jax.random.key(0)

    def step(self) -> dict[str, np.ndarray]:
        """The corrupted images (n, h, w, 3) in [0, 1], by the corruption."""
        return {name: np.asarray(self._corrupt(name)) for name in self.case.corruptions}

    def _corrupt(self, name: str) -> jax.Array:
        return corrupt(name, self._on_device, SEVERITY, self._key)

    @cached_property
    def memory(self) -> int:
        """Bytes an image that the program takes besides its arguments, the most of all."""
        found = (
            program_memory(name, self.images.shape, SEVERITY) for name in self.case.corruptions
        )
        return max(found) // self.case.images


def pictures(count: int) -> np.ndarray:
    """Patches of colour with waves, edges and a little noise, uint8 (n, h, w, 3)."""
    generator = np.random.default_rng(0)
    patches = generator.random((count, 7, 7, 3)).repeat(SIZE // 7, 1).repeat(SIZE // 7, 2)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    waves = np.sin(np.add.outer(6 * generator.random(count), 12 * x * y + 5 * y))[..., None]
    noise = generator.normal(size=(count, SIZE, SIZE, 3))
    return np.round(np.clip(0.6 * patches + 0.2 + 0.15 * waves + 0.03 * noise, 0, 1) * 255).astype(
        np.uint8
    )


def build(case: CorruptionCase) -> Corrupting:
    """Our side of a case."""
    return Corrupting(case)


def connect(ours: Corrupting, peer: str) -> Any:
    """imagecorruptions' side."""
    from jaxsynth.bench.peers.imagecorruptions import Imagecorruptions

    return Imagecorruptions(ours.case.corruptions, SEVERITY)


def compare(ours: Corrupting, found: list[dict[str, np.ndarray]], peer: Any) -> float | None:
    """The largest difference of a pixel beyond rounding to 8 bits, of those that are `SAME`.

    None where there is none: the peer draws its own randomness, or has another formula.
    """
    worst = None
    for name in ours.case.corruptions:
        if name in SAME:
            theirs = peer.corrupt(name, ours.images[0]).astype(np.float32) / 255
            apart = np.abs(found[0][name][0] - theirs).max() - 1 / 255
            worst = max(worst or 0.0, float(apart), 0.0)
    return worst


def peer_call(ours: Corrupting, peer: Any) -> Callable[[], object]:
    """What the peer does instead of `ours.step`."""
    return lambda: [peer.corrupt(name, x) for name in ours.case.corruptions for x in ours.images]
