"""Which timesteps and noise levels a sampler visits; all of it numpy on the host.

Kept apart from the samplers because these few lines are where implementations disagree: they
follow diffusers to the rounding, so that a sampler visits exactly the timesteps of its scheduler.

Sources: the spacings of arXiv 2305.08891 (table 2) and the Karras sigmas of EDM (arXiv 2206.00364,
equation 5) as diffusers 0.42 applies them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsynth.diffusion.schedules import NoiseSchedule, SchedulerError


def trailing(total: int, steps: int) -> np.ndarray:
    # Where total / steps is not exact, arange can add a point at 0, which diffusers keeps as t = -1
    # (61 of 1000 steps): such a point is no timestep.
    return np.arange(total, 0, -total / steps).round()[:steps] - 1


def spaced(total: int, steps: int, options: Mapping[str, Any]) -> np.ndarray:
    """Descending float64 timesteps of DDIM, PNDM and Euler."""
    spacing = options["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps)[::-1] * float(total // steps) + options["steps_offset"]
    return trailing(total, steps)


def spaced_dpm(total: int, steps: int, options: Mapping[str, Any]) -> np.ndarray:
    """The same for DPM-Solver, which leaves out the last of n + 1 points."""
    spacing = options["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[::-1][:-1]
    if spacing == "leading":
        points = np.arange(steps + 1)[::-1][:-1] * float(total // (steps + 1))
        return points + options["steps_offset"]
    return trailing(total, steps)


def in_range(timesteps: np.ndarray, total: int, options: Mapping[str, Any]) -> np.ndarray:
    if timesteps.min() < 0 or timesteps.max() > total - 1:
        raise SchedulerError(
            f"timesteps {timesteps.min()} .. {timesteps.max()} leave 0 .. {total - 1}: reduce "
            f"num_inference_steps ({len(timesteps)}) or 'steps_offset' "
            f"({options['steps_offset']}) for timestep_spacing {options['timestep_spacing']!r}"
        )
    return timesteps


def training_sigmas(schedule: NoiseSchedule, options: Mapping[str, Any]) -> np.ndarray:
    """sqrt((1 - a_t) / a_t), in float32 because diffusers derives Karras timesteps from that."""
    a = np.array(schedule.alphas_cumprod, np.float32)
    if options["rescale_betas_zero_snr"]:
        a[-1] = 2**-24  # keeps the first sigma finite
    return np.sqrt((1 - a) / a)


def karras(smallest: float, largest: float, steps: int, rho: float = 7.0) -> np.ndarray:
    ramp = np.linspace(0, 1, steps)
    ends = largest ** (1 / rho), smallest ** (1 / rho)
    return (ends[0] + ramp * (ends[1] - ends[0])) ** rho


def timesteps_of(sigmas: np.ndarray, train_sigmas: np.ndarray) -> np.ndarray:
    """Fractional timesteps of `sigmas`, interpolated in log sigma."""
    table = np.log(train_sigmas)
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(table, wanted, side="right") - 1, 0, len(table) - 2)
    weight = np.clip((table[low] - wanted) / (table[low] - table[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def finish(sigmas: np.ndarray, train_sigmas: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """Append the last sigma; float32 values as diffusers stores them, in float64 for the tables."""
    last = 0.0 if options["final_sigmas_type"] == "zero" else train_sigmas[0]
    return np.append(sigmas, last).astype(np.float32).astype(np.float64)
