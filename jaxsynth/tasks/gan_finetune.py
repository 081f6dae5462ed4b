"""Training one image-to-image GAN for one edit, with its quality against steps and seconds.

What starts better gets there faster: a generator with adapters from anywhere (`load_state`), or
pix2pix from nothing, goes through the same steps, and a `Curve` says how far from the held-out
images it was after how many of them. Seconds are those of the training steps alone, on the machine
at hand: neither the compilation nor the measuring in between counts, and what was done before the
first step (generating weights, say) is added by whoever did it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from jaxsynth.adapters.inject import AdapterState, Trainable, extract, mark_trainable
from jaxsynth.models.gan.patchgan import PatchGAN
from jaxsynth.quality.metrics import fid
from jaxsynth.tasks.gan import (
    GANConfig,
    Generator,
    Networks,
    Pairs,
    draw_one,
    edit_images,
    init_gan,
    l1_error,
    make_step,
    training_data,
)

Features = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n d"]]


@dataclass(frozen=True)
class Curve:
    """Quality after so many steps, which took so many seconds; the lower the better.

    `l1` is the mean absolute difference to the held-out images, of pixels in [0, 1]; `fd` the
    Frechet distance of their features to those of the held-out images, empty where not asked for.
    """

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    l1: tuple[float, ...]
    fd: tuple[float, ...] = ()

    def reached(self, l1: float) -> tuple[float, float] | None:
        """Steps and seconds until the error fell to `l1`, between two points on a line; or None."""
        for n, error in enumerate(self.l1):
            if error <= l1:
                if n == 0:
                    return float(self.steps[0]), self.seconds[0]
                share = (self.l1[n - 1] - l1) / (self.l1[n - 1] - error)
                return tuple(
                    float(x[n - 1] + share * (x[n] - x[n - 1])) for x in (self.steps, self.seconds)
                )
        return None


def fine_tune(
    generator: Generator,
    discriminator: PatchGAN,
    pairs: Pairs,
    held_out: Pairs,
    config: GANConfig,
    *,
    at: Sequence[int],
    seed: int,
    features: Features | None = None,
) -> tuple[Curve, AdapterState]:
    """The curve of one edit's training at the steps `at`, and what was learnt in the end.

    Everything `Trainable` in `generator` learns, and all of `discriminator`. `pairs` and `held_out`
    hold one concept each. The training ends at the last of `at`, whatever `config.steps` says.

    Raises:
        ValueError: more than one concept, or steps that do not increase from 0 on.
    """
    if len(pairs) != 1 or len(held_out) != 1:
        raise ValueError(f"fine_tune: {len(pairs)} and {len(held_out)} concepts, expected one")
    if not at or at[0] < 0 or list(at) != sorted(set(at)):
        raise ValueError(f"fine_tune: steps {list(at)}, expected them to increase from 0 on")
    graphdef, trainable, frozen = nnx.split(generator, Trainable, ...)
    graph_d, trainable_d = nnx.split(mark_trainable(discriminator))
    state = init_gan(trainable, trainable_d, config, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(state)
    frozen_leaves, frozen_structure = jax.tree.flatten(frozen)
    program = _program(Networks(graphdef, graph_d), config, structure, frozen_structure)
    data = training_data(pairs)
    if at[-1] > 0:
        # Compiles, on copies because the state is donated; the clock is not running yet.
        jax.block_until_ready(program(jax.tree.map(jax.numpy.copy, leaves), frozen_leaves, data))
    real = None if features is None else features(held_out.target[0])
    l1: list[float] = []
    fd: list[float] = []
    seconds: list[float] = []
    step, spent = 0, 0.0

    def model() -> Generator:
        values = jax.tree.unflatten(structure, leaves).trainable["generator"]
        return nnx.merge(graphdef, values, frozen)

    for due in at:
        if due > step:
            began = time.perf_counter()
            for _ in range(due - step):
                leaves = program(leaves, frozen_leaves, data)
            jax.block_until_ready(leaves)
            spent += time.perf_counter() - began
            step = due
        seconds.append(spent)
        made = edit_images(model(), held_out.source, held_out.states[0, 0])
        l1.append(l1_error(made, held_out.target[0]))
        if features is not None:
            fd.append(fid(real, features(made)))
    return Curve(tuple(at), tuple(seconds), tuple(l1), tuple(fd)), extract(model())


@lru_cache(maxsize=8)
def _program(networks: Networks, config: GANConfig, structure: Any, frozen_structure: Any):
    """One step over flat lists (flattening modules costs milliseconds), kept for the next start.

    A program for each step: inside a loop XLA's CPU convolutions lose their fast gradients (5 to 14
    times slower as measured), so several steps are not put into one.
    """
    step = make_step(networks, config, partial(draw_one, count=config.batch_size))

    def call(leaves, frozen_leaves, data):
        state = jax.tree.unflatten(structure, leaves)
        new, _ = step(state, jax.tree.unflatten(frozen_structure, frozen_leaves), data)
        return jax.tree.leaves(new)

    return jax.jit(call, donate_argnums=0)
