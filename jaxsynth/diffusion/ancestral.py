"""Samplers that draw noise at every step: DDPM, Euler ancestral and LCM.

All three estimate x_0 from the model output, go to a point between x_0 and x, and add noise. So
they are one step with different tables. The noise is given, by keys in `samplers.sample`; with the
same noise they agree step by step with the diffusers scheduler of their name.

Sources: DDPM (arXiv 2006.11239, equation 7), k-diffusion's ancestral Euler (EDM, arXiv 2206.00364,
with the split of equation 8 of arXiv 2011.13456 into a deterministic and a random part), latent
consistency models (arXiv 2310.04378, algorithm 1 with the boundary conditions of arXiv 2303.01469).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxsynth.core.errors import shown
from jaxsynth.diffusion.schedules import NoiseSchedule, SchedulerError
from jaxsynth.diffusion.timesteps import in_range, spaced, training_sigmas

_SMALLEST = 1e-20  # diffusers' least variance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ancestral:
    """x_0, then a point between it and x, then noise. Carries nothing.

    Columns of `table`: the factor that makes x the model's input, x_0 as a combination of (x, model
    output), then the factors of x_0, x and the noise in the next x.
    """

    timesteps: np.ndarray
    table: np.ndarray
    levels: np.ndarray
    clip: float | None = dataclasses.field(default=None, metadata={"static": True})
    init_noise_sigma: float = dataclasses.field(default=1.0, metadata={"static": True})
    stochastic: bool = dataclasses.field(default=True, metadata={"static": True})

    def init(self, x: Array) -> PyTree:
        return ()

    def scale_model_input(self, x: Array, i: Array | int) -> Array:
        return (x.astype(jnp.float32) * jnp.asarray(self.table)[i, 0]).astype(x.dtype)

    def step(
        self,
        carry: PyTree,
        model_output: Array,
        i: Array | int,
        x: Array,
        *,
        noise: Array | None = None,
    ) -> tuple[Array, PyTree]:
        if noise is None:
            raise ValueError("Ancestral: step() needs `noise`, standard normal like x")
        _, x0_x, x0_m, next_x0, next_x, next_noise = jnp.asarray(self.table)[i]
        x32 = x.astype(jnp.float32)
        x0 = x0_x * x32 + x0_m * model_output.astype(jnp.float32)
        if self.clip is not None:
            x0 = jnp.clip(x0, -self.clip, self.clip)
        result = next_x0 * x0 + next_x * x32 + next_noise * noise.astype(jnp.float32)
        return result.astype(x.dtype), carry


def make_euler_ancestral(
    schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]
) -> Ancestral:
    """Euler steps to a smaller sigma than the next one, and noise up to that one."""
    if schedule.prediction_type == "sample":
        raise SchedulerError(
            "prediction_type 'sample' is not defined for EulerAncestralDiscreteScheduler"
        )
    total = schedule.num_train_timesteps
    timesteps = in_range(spaced(total, steps, options), total, options).astype(np.float32)
    train_sigmas = training_sigmas(schedule, options)
    sigmas = np.append(np.interp(timesteps, np.arange(total), train_sigmas), 0.0)
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    now, then = sigmas[:-1], sigmas[1:]
    up = np.sqrt(then**2 * (now**2 - then**2) / now**2)
    ratio = np.sqrt(then**2 - up**2) / now
    signal = 1 / np.sqrt(now**2 + 1)
    x0_input, x0_m, *_ = as_x0_eps(schedule.prediction_type, signal, now * signal)
    columns = (signal, x0_input * signal, x0_m, 1 - ratio, ratio, up)
    unit_start = options["timestep_spacing"] == "leading"
    largest = sigmas.max()
    return Ancestral(
        timesteps,
        to_table(columns),
        to_table((np.ones_like(now), now)),
        init_noise_sigma=float(np.sqrt(largest**2 + 1) if unit_start else largest),
    )


def make_ddpm(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]) -> Ancestral:
    """The posterior's mean and a fixed variance, between the timesteps that are visited."""
    total = schedule.num_train_timesteps
    timesteps = in_range(spaced(total, steps, options).round().astype(np.int32), total, options)
    a = np.asarray(schedule.alphas_cumprod, np.float64)[timesteps]
    a_next = np.append(a[1:], 1.0)
    beta = 1 - a / a_next
    small = np.maximum(beta * (1 - a_next) / (1 - a), _SMALLEST)
    variances = {"fixed_small": small, "fixed_small_log": small, "fixed_large": beta}
    kind = options["variance_type"]
    if kind not in variances:
        raise SchedulerError(
            f"scheduler config field 'variance_type': {shown(kind)} is not implemented for "
            f"DDPMScheduler; expected one of {list(variances)}"
        )
    columns = (
        np.ones(len(a)),
        *as_x0_eps(schedule.prediction_type, np.sqrt(a), np.sqrt(1 - a))[:2],
        beta * np.sqrt(a_next) / (1 - a),
        np.sqrt(a / a_next) * (1 - a_next) / (1 - a),
        np.sqrt(variances[kind]) * (timesteps > 0),
    )
    levels = to_table((np.sqrt(a), np.sqrt(1 - a)))
    return Ancestral(timesteps, to_table(columns), levels, clip=clip_of(options))


def make_lcm(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]) -> Ancestral:
    """A consistency model's estimate of x_0, noised again to the next timestep."""
    total, distilled = schedule.num_train_timesteps, options["original_inference_steps"]
    if not steps <= distilled <= total:
        raise SchedulerError(
            f"num_inference_steps: {steps}, but LCMScheduler takes at most as many as it was "
            f"distilled with (original_inference_steps {distilled}, at most {total})"
        )
    known = (np.arange(1, distilled + 1) * (total // distilled) - 1)[::-1]
    visited = np.floor(np.linspace(0, distilled, steps, endpoint=False)).astype(int)
    timesteps = known[visited].astype(np.int32)
    a = np.asarray(schedule.alphas_cumprod, np.float64)[timesteps]
    # The last step keeps the estimate as it is.
    a_next = np.append(a[1:], 1.0)
    scaled, deviation = timesteps * float(options["timestep_scaling"]), 0.5
    skip = deviation**2 / (scaled**2 + deviation**2)
    out = scaled / np.sqrt(scaled**2 + deviation**2)
    columns = (
        np.ones(len(a)),
        *as_x0_eps(schedule.prediction_type, np.sqrt(a), np.sqrt(1 - a))[:2],
        np.sqrt(a_next) * out,
        np.sqrt(a_next) * skip,
        np.sqrt(1 - a_next),
    )
    levels = to_table((np.sqrt(a), np.sqrt(1 - a)))
    return Ancestral(timesteps, to_table(columns), levels, clip=clip_of(options))


def clip_of(options: Mapping[str, Any]) -> float | None:
    """The bound of x_0, None where it is not clipped."""
    return float(options["clip_sample_range"]) if options["clip_sample"] else None


def as_x0_eps(prediction_type: str, signal: np.ndarray, sigma: np.ndarray) -> tuple:
    """Factors of (x, output) in x_0 and of (x, output) in epsilon, for x = signal x_0 + sigma e."""
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    if prediction_type == "epsilon":
        if np.any(signal == 0):
            raise ValueError(
                "prediction_type 'epsilon' cannot start from zero terminal SNR (division by zero); "
                "expected v_prediction or sample with rescale_betas_zero_snr"
            )
        return 1 / signal, -sigma / signal, zero, one
    if prediction_type == "v_prediction":
        return signal, -sigma, sigma, signal
    return zero, one, 1 / sigma, -signal / sigma


def to_table(columns: tuple[np.ndarray, ...]) -> np.ndarray:
    """Float64 columns, one row a step, as the float32 that the steps compute with."""
    return np.stack(columns, axis=1).astype(np.float32)
