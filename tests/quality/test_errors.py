"""The held-out error, by its definition."""

import jax
import numpy as np
import pytest

from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.quality.errors import held_out_error
from jaxsynth.weights.networks.dit import SCHEDULER
from tests.methods.small_base import random_network

SCHEDULE = NoiseSchedule.from_config(SCHEDULER)
# It predicts a variance too, which is no part of the error.
DIT = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    out_channels=8,
    sample_size=4,
    num_embeds_ada_norm=3,
)


@jax.jit
def apply(model: DiT, *rows):
    return model(*rows)


def test_it_is_the_mean_over_fixed_times_and_noises():
    base = random_network(DiT, DIT, 0)
    rng = np.random.default_rng(0)
    x0, labels = rng.normal(size=(5, 4, 4, 4)).astype(np.float32), np.arange(5) % 3

    def error(seed: int, batch_size: int = 64) -> float:
        return held_out_error(
            base, SCHEDULE, x0, lambda rows: {"labels": labels[rows]}, seed=seed, repeats=4,
            batch_size=batch_size,
        )  # fmt: skip

    found = error(3)
    assert found == error(3) and error(4) != found
    assert error(3, batch_size=7) == pytest.approx(found, rel=1e-5)
    # By the definition: image i at a time from each quarter of the schedule.
    rng = np.random.default_rng(3)
    times = (1000 * (np.arange(4) + rng.random((5, 4))) / 4).astype(int)
    noise = rng.standard_normal((5, 4, 4, 4, 4), np.float32)
    assert all(sorted(row // 250) == [0, 1, 2, 3] for row in times)
    signal = np.asarray(SCHEDULE.alphas_cumprod, np.float64)[times][..., None, None, None]
    x_t = np.sqrt(signal) * x0[:, None] + np.sqrt(1 - signal) * noise
    rows = x_t.reshape(20, 4, 4, 4).astype(np.float32), times.reshape(-1), np.repeat(labels, 4)
    output = np.asarray(apply(base, *rows))[..., :4]
    expected = np.square(output - noise.reshape(20, 4, 4, 4)).mean()
    assert found == pytest.approx(expected, rel=1e-5)
