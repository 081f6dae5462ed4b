"""The small classifiers that attacks are timed on, and our side of the timing.

A hidden-layer network, where what surrounds the products counts, and ResNet-20 for 32x32 pixels (He
et al. 2016, arXiv 1512.03385), where convolutions do. How much they do a third network tells, which
has its convolutions and nothing else. Weights are random: an attack costs the same.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxsynth.models.layers import convolve
from jaxsynth.robustness.attacks.common import cross_entropy
from jaxsynth.robustness.attacks.gradient import pgd

Weights = dict[str, np.ndarray]
EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 20
SIZE, CLASSES = 32, 10
# Channels of the three stages, and blocks of two convolutions in each.
WIDTHS, BLOCKS = (16, 32, 64), 3
HIDDEN = (256, 256)
# Of the network's normalisations, which a trained one would have learnt.
MEAN, STD = 0.5, 0.25


@dataclass(frozen=True)
class AttackCase:
    """A batch of `images` under PGD from the images themselves, without a random start."""

    name: str
    network: str
    images: int

    @property
    def detail(self) -> str:
        return f"{self.images} images, {STEPS} steps"


class Attack:
    """Our side: `step()` attacks the batch, and waits for it."""

    def __init__(self, case: AttackCase):
        self.case = case
        generator = np.random.default_rng(0)
        self.weights = WEIGHTS[case.network](generator)
        self.images = generator.random((case.images, SIZE, SIZE, 3), np.float32)
        self.labels = generator.integers(0, CLASSES, case.images).astype(np.int32)
        weights = {name: jnp.asarray(value) for name, value in self.weights.items()}
        self.predict = Partial(NETWORKS[case.network], weights)
        self._on_device = jnp.asarray(self.images), jnp.asarray(self.labels)

    @cached_property
    def memory(self) -> int:
        """Bytes an image that the gradient's program takes besides its arguments."""
        images, labels = self._on_device

        def gradient(predict, images):
            return jax.grad(lambda x: cross_entropy(predict(x), labels).sum())(images)

        found = jax.jit(gradient).lower(self.predict, images).compile().memory_analysis()
        return (found.temp_size_in_bytes + found.output_size_in_bytes) // self.case.images

    def step(self, steps: int = STEPS) -> np.ndarray:
        """The adversarial images (n, h, w, c) after so many steps."""
        found = pgd(
            self.predict,
            *self._on_device,
            jax.random.key(0),
            eps=EPS,
            steps=steps,
            step_size=STEP_SIZE,
            from_random=False,
        )
        return np.asarray(found)

    def loss(self, images: np.ndarray) -> float:
        """Mean cross-entropy."""
        return float(cross_entropy(self.predict(jnp.asarray(images)), self._on_device[1]).mean())


def mlp(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """Logits of two hidden layers with ReLU."""
    x = (images.reshape(len(images), -1) - MEAN) / STD
    for number in range(len(HIDDEN)):
        x = jax.nn.relu(x @ weights[f"{number}.weight"] + weights[f"{number}.bias"])
    return x @ weights["head.weight"] + weights["head.bias"]


def mlp_weights(generator: np.random.Generator) -> Weights:
    """Random, (in, out)."""
    sizes = (SIZE * SIZE * 3, *HIDDEN)
    weights = {}
    for number, (before, after) in enumerate(zip(sizes, HIDDEN, strict=False)):
        weights |= _linear(f"{number}", before, after, generator)
    return weights | _linear("head", sizes[-1], CLASSES, generator)


def resnet20(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """Logits of ResNet-20 at inference, where batch normalisation is a factor and an addend."""

    def normalised(x: jax.Array, name: str, stride: int) -> jax.Array:
        x = _convolved(weights, x, name, stride)
        return x * weights[f"{name}.scale"] + weights[f"{name}.bias"]

    x = jax.nn.relu(normalised((images - MEAN) / STD, "stem", 1))
    for block, stride, widens in blocks():
        left = jax.nn.relu(normalised(x, f"{block}.0", stride))
        left = normalised(left, f"{block}.1", 1)
        x = jax.nn.relu(left + (normalised(x, f"{block}.shortcut", stride) if widens else x))
    return x.mean((1, 2)) @ weights["head.weight"] + weights["head.bias"]


def convolutions(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """`resnet20` without normalisation, ReLU and shortcuts past a block."""
    x = _convolved(weights, images, "stem", 1)
    for block, stride, widens in blocks():
        left = _convolved(weights, _convolved(weights, x, f"{block}.0", stride), f"{block}.1", 1)
        x = left + _convolved(weights, x, f"{block}.shortcut", stride) if widens else left
    return x.mean((1, 2)) @ weights["head.weight"] + weights["head.bias"]


def _convolved(weights: dict[str, jax.Array], x: jax.Array, name: str, stride: int) -> jax.Array:
    kernel = weights[f"{name}.kernel"]
    pad = (kernel.shape[0] // 2,) * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return convolve(x, kernel, (stride, stride), (pad, pad), dimension_numbers=layout)


def blocks() -> list[tuple[str, int, bool]]:
    """(name, stride of its first convolution, whether its shortcut is a convolution)."""
    return [
        (f"{stage}.{number}", 2 if stage and not number else 1, bool(stage and not number))
        for stage in range(len(WIDTHS))
        for number in range(BLOCKS)
    ]


def resnet20_weights(generator: np.random.Generator) -> Weights:
    """Random, (height, width, in, out); scales and biases are per channel."""
    weights = _conv("stem", 3, 3, WIDTHS[0], generator)
    before = WIDTHS[0]
    for block, _, widens in blocks():
        after = WIDTHS[int(block[0])]
        weights |= _conv(f"{block}.0", 3, before, after, generator)
        weights |= _conv(f"{block}.1", 3, after, after, generator)
        if widens:
            weights |= _conv(f"{block}.shortcut", 1, before, after, generator)
        before = after
    return weights | _linear("head", before, CLASSES, generator)


def _linear(name: str, before: int, after: int, generator: np.random.Generator) -> Weights:
    weight = generator.standard_normal((before, after), np.float32) * before**-0.5
    bias = 0.1 * generator.standard_normal(after, np.float32)
    return {f"{name}.weight": weight.astype(np.float32), f"{name}.bias": bias}


def _conv(name: str, side: int, before: int, after: int, generator: np.random.Generator) -> Weights:
    kernel = generator.standard_normal((side, side, before, after), np.float32)
    return {
        f"{name}.kernel": (kernel * (side * side * before) ** -0.5).astype(np.float32),
        f"{name}.scale": 1 + 0.1 * generator.standard_normal(after, np.float32),
        f"{name}.bias": 0.1 * generator.standard_normal(after, np.float32),
    }


NETWORKS = {"mlp": mlp, "resnet20": resnet20, "convolutions": convolutions}
WEIGHTS = {
    "mlp": mlp_weights,
    "resnet20": resnet20_weights,
    "convolutions": resnet20_weights,
}
