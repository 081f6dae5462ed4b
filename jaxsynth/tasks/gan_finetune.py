"""Training one image-to-image GAN for one edit, with its quality against steps and seconds.

What starts better gets there faster: a generator with adapters from anywhere (`load_state`), or
pix2pix from nothing, goes through the same steps, and a `Curve` says how far from the held-out
images it was after how many of them. Seconds are those of the training steps alone, on the machine
at hand: neither the compilation nor the measuring in between counts, and what was done before the
first step (generating weights, say) is added by whoever did it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from jaxsynth.adapters.inject import AdapterState, extract
from jaxsynth.core.words import counted
from jaxsynth.models.gan.patchgan import PatchGAN
from jaxsynth.quality.metrics import fid
from jaxsynth.tasks.gan import (
    GANConfig,
    Generator,
    Pairs,
    edit_images,
    gan_task,
    l1_error,
    training_data,
)
from jaxsynth.training.trainer import Steps

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
    hold one concept each. The training ends at the last of `at`, whatever `config.steps` says; a
    falling rate falls over `config.steps`.

    Raises:
        ValueError: more than one concept, or steps that do not increase from 0 on.
    """
    if len(pairs) != 1 or len(held_out) != 1:
        raise ValueError(
            f"fine_tune: {len(pairs)} and {counted(len(held_out), 'concept')}, expected one"
        )
    if not at or at[0] < 0 or list(at) != sorted(set(at)):
        raise ValueError(f"fine_tune: steps {list(at)}, expected them to increase from 0 on")
    data = training_data(pairs)
    task = gan_task(generator, discriminator, data, config, seed=seed, batches="one")
    steps = Steps(task, config.sized(len(pairs.source)))
    real = None if features is None else features(held_out.target[0])
    l1: list[float] = []
    fd: list[float] = []
    seconds: list[float] = []
    spent = 0.0
    for due in at:
        spent += steps.advance(due - steps.done)
        seconds.append(spent)
        made = edit_images(steps.model.generator, held_out.source, held_out.states[0, 0])
        l1.append(l1_error(made, held_out.target[0]))
        if features is not None:
            fd.append(fid(real, features(made)))
    curve = Curve(tuple(at), tuple(seconds), tuple(l1), tuple(fd))
    return curve, extract(steps.model.generator)
