"""The samplers that need no noise at every step, and how each is made for a schedule.

DDIM (arXiv 2010.02502), PNDM (arXiv 2202.09778, equations 9, 12, 13), DPM-Solver++ (arXiv
2211.01095, algorithm 2) and Euler (arXiv 2206.00364) with the Karras sigmas; spacings from arXiv
2305.08891, table 2. `diffusion.samplers` says what a sampler is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxsynth.diffusion.ancestral import as_x0_eps, clip_of, to_table
from jaxsynth.diffusion.schedules import NoiseSchedule, SchedulerError
from jaxsynth.diffusion.timesteps import (
    finish,
    in_range,
    karras,
    spaced,
    spaced_dpm,
    timesteps_of,
    training_sigmas,
)


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


def _row(table: np.ndarray | Array, i: Array | int) -> Array:
    return jnp.asarray(table)[i]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDIM:
    """DDIM; with eta > 0 each step adds noise (eta 1 is ancestral DDPM). Carries nothing.

    Columns of `table`: x_0 and epsilon as combinations of (x, model output), then the factors of
    x_0, epsilon and noise in the next x.
    """

    timesteps: np.ndarray
    table: np.ndarray
    levels: np.ndarray
    clip: float | None = _static(None)
    stochastic: bool = _static(False)
    init_noise_sigma: float = _static(1.0)

    def init(self, x: Array) -> PyTree:
        return ()

    def scale_model_input(self, x: Array, i: Array | int) -> Array:
        return x

    def step(
        self,
        carry: PyTree,
        model_output: Array,
        i: Array | int,
        x: Array,
        *,
        noise: Array | None = None,
    ) -> tuple[Array, PyTree]:
        if self.stochastic and noise is None:
            raise ValueError("DDIM with eta > 0: step() needs `noise`, standard normal like x")
        x0_x, x0_m, eps_x, eps_m, next_x0, next_eps, next_noise = _row(self.table, i)
        m, x32 = model_output.astype(jnp.float32), x.astype(jnp.float32)
        x0 = x0_x * x32 + x0_m * m
        if self.clip is not None:
            # As in diffusers, epsilon is not derived again from the clipped x_0.
            x0 = jnp.clip(x0, -self.clip, self.clip)
        result = next_x0 * x0 + next_eps * (eps_x * x32 + eps_m * m)
        if self.stochastic:
            result = result + next_noise * noise.astype(jnp.float32)
        return result.astype(x.dtype), carry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PNDM:
    """Pseudo linear multistep (PLMS), fourth order, without Runge-Kutta warm-up steps.

    The second timestep is visited twice. Call 0 is an Euler step; call 1 evaluates the model where
    call 0 arrived and redoes that step from its start with the mean of both outputs (Heun), which
    is why x at the start is carried. From then on the last outputs are extrapolated. The output of
    call 1 does not enter the history.

    Columns of `table`: weights of the output and the three before it; factors of x and of the
    combined output in the next x. Carry: (last three outputs, newest first; x at the start).
    """

    timesteps: np.ndarray
    table: np.ndarray
    levels: np.ndarray
    stochastic: bool = _static(False)
    init_noise_sigma: float = _static(1.0)

    def init(self, x: Array) -> PyTree:
        return jnp.zeros((3, *x.shape), jnp.float32), jnp.zeros(x.shape, jnp.float32)

    def scale_model_input(self, x: Array, i: Array | int) -> Array:
        return x

    def step(
        self,
        carry: PyTree,
        model_output: Array,
        i: Array | int,
        x: Array,
        *,
        noise: Array | None = None,
    ) -> tuple[Array, PyTree]:
        history, start = carry
        w0, w1, w2, w3, next_x, next_m = _row(self.table, i)
        m, x32 = model_output.astype(jnp.float32), x.astype(jnp.float32)
        combined = w0 * m + w1 * history[0] + w2 * history[1] + w3 * history[2]
        result = next_x * jnp.where(i == 1, start, x32) + next_m * combined
        pushed = jnp.concatenate([m[None], history[:-1]])
        carry = (jnp.where(i == 1, history, pushed), jnp.where(i == 0, x32, start))
        return result.astype(x.dtype), carry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DPMSolverPP:
    """DPM-Solver++(2M), or its first-order form. Carries the previous step's x_0.

    Columns of `table`: x_0 as a combination of (x, model output), then the factors of x, x_0 and
    the previous x_0 in the next x.
    """

    timesteps: np.ndarray
    table: np.ndarray
    levels: np.ndarray
    stochastic: bool = _static(False)
    init_noise_sigma: float = _static(1.0)

    def init(self, x: Array) -> PyTree:
        return jnp.zeros(x.shape, jnp.float32)

    def scale_model_input(self, x: Array, i: Array | int) -> Array:
        return x

    def step(
        self,
        carry: PyTree,
        model_output: Array,
        i: Array | int,
        x: Array,
        *,
        noise: Array | None = None,
    ) -> tuple[Array, PyTree]:
        x0_x, x0_m, next_x, next_x0, next_previous = _row(self.table, i)
        x32 = x.astype(jnp.float32)
        x0 = x0_x * x32 + x0_m * model_output.astype(jnp.float32)
        result = next_x * x32 + next_x0 * x0 + next_previous * carry
        return result.astype(x.dtype), x0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Euler:
    """Euler steps on the probability flow, with x = x_0 + sigma * noise (variance exploding).

    Columns of `table`: the factor that makes x the model's input, then the factors of x and of the
    model output in the next x. Timesteps may be fractional (float32). Carries nothing.
    """

    timesteps: np.ndarray
    table: np.ndarray
    levels: np.ndarray
    init_noise_sigma: float = _static()
    stochastic: bool = _static(False)

    def init(self, x: Array) -> PyTree:
        return ()

    def scale_model_input(self, x: Array, i: Array | int) -> Array:
        return (x.astype(jnp.float32) * _row(self.table, i)[0]).astype(x.dtype)

    def step(
        self,
        carry: PyTree,
        model_output: Array,
        i: Array | int,
        x: Array,
        *,
        noise: Array | None = None,
    ) -> tuple[Array, PyTree]:
        _, next_x, next_m = _row(self.table, i)
        result = next_x * x.astype(jnp.float32) + next_m * model_output.astype(jnp.float32)
        return result.astype(x.dtype), carry


def _product_at(
    schedule: NoiseSchedule, timesteps: np.ndarray, options: Mapping[str, Any]
) -> np.ndarray:
    """a_t in float64; below 0 it is 1 or a_0, as `set_alpha_to_one` says."""
    table = np.asarray(schedule.alphas_cumprod, np.float64)
    final = 1.0 if options["set_alpha_to_one"] else table[0]
    return np.where(timesteps >= 0, table[np.maximum(timesteps, 0)], final)


def make_ddim(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any], eta: float) -> DDIM:
    total = schedule.num_train_timesteps
    timesteps = in_range(spaced(total, steps, options).round().astype(np.int32), total, options)
    a = _product_at(schedule, timesteps, options)
    a_next = _product_at(schedule, timesteps - total // steps, options)
    std = eta * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    if eta < 0 or np.any(1 - a_next - std**2 < -1e-12):
        raise SchedulerError(f"eta: expected 0 to 1, found {eta}")
    direction = np.sqrt(np.maximum(1 - a_next - std**2, 0))
    columns = (
        *as_x0_eps(schedule.prediction_type, np.sqrt(a), np.sqrt(1 - a)),
        np.sqrt(a_next),
        direction,
        std,
    )
    levels = to_table((np.sqrt(a), np.sqrt(1 - a)))
    return DDIM(timesteps, to_table(columns), levels, clip=clip_of(options), stochastic=eta > 0)


def make_pndm(
    schedule: NoiseSchedule, steps: int, options: Mapping[str, Any], skipped: int
) -> PNDM:
    """Without the first `skipped` timesteps it is started anew at the next one.

    diffusers cuts its list of visits, of which one is double, and so ends a step early.
    """
    if not options["skip_prk_steps"]:
        raise SchedulerError(
            "scheduler config field 'skip_prk_steps': False (Runge-Kutta warm-up) is not "
            "implemented for PNDMScheduler; expected True, as Stable Diffusion ships it"
        )
    if schedule.prediction_type == "sample":
        raise SchedulerError("prediction_type 'sample' is not defined for PNDMScheduler")
    total = schedule.num_train_timesteps
    visited = in_range(spaced(total, steps, options).round().astype(np.int32), total, options)
    visited = visited[skipped:]
    several = len(visited) > 1
    timesteps = np.concatenate([visited[:2], visited[1:]]) if several else visited
    stride = total // steps
    source, destination = timesteps.copy(), timesteps - stride
    if several:  # call 1 repeats call 0's step, which ended on its own timestep
        source[1], destination[1] = timesteps[1] + stride, timesteps[1]
    in_range(source, total, options)
    a = _product_at(schedule, source, options)
    a_next = _product_at(schedule, destination, options)
    # Equation 9; the output may be v, which is epsilon up to a combination with x.
    factor = (a_next - a) / (a * np.sqrt(1 - a_next) + np.sqrt(a * (1 - a) * a_next))
    *_, eps_x, eps_m = as_x0_eps(schedule.prediction_type, np.sqrt(a), np.sqrt(1 - a))
    weights = np.tile(np.array([55, -59, 37, -9]) / 24, (len(timesteps), 1))
    start = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [1.5, -0.5, 0, 0], [23, -16, 5, 0]])
    start[3] /= 12
    weights[:4] = start[: len(timesteps)]
    columns = (*weights.T, np.sqrt(a_next / a) - factor * eps_x, -factor * eps_m)
    return PNDM(timesteps, to_table(columns), to_table((np.sqrt(a), np.sqrt(1 - a))))


def make_dpm(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]) -> DPMSolverPP:
    total = schedule.num_train_timesteps
    train_sigmas = training_sigmas(schedule, options)
    if options["use_karras_sigmas"]:
        sigmas = karras(float(train_sigmas[0]), float(train_sigmas[-1]), steps)
        timesteps = timesteps_of(sigmas, train_sigmas)
        # diffusers rounds except for the cosine schedule, where it truncates.
        if dict(schedule.stated).get("beta_schedule") != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        timesteps = timesteps.astype(np.int32)
    else:
        timesteps = in_range(spaced_dpm(total, steps, options), total, options).astype(np.int32)
        sigmas = np.interp(timesteps, np.arange(total), train_sigmas)
    sigmas = finish(sigmas, train_sigmas, options)
    n = len(timesteps)
    signal = 1 / np.sqrt(sigmas**2 + 1)
    sigma = sigmas * signal
    shrink = signal[1:] * (sigmas[1:] / sigmas[:-1] - 1)  # alpha_t (exp(-h) - 1), finite at sigma 0
    second = _second_order_steps(n, options)
    # A last step of length 0 (Karras sigmas that end on sigma_min) needs no correction.
    at = np.flatnonzero(second & (sigmas[1:] < sigmas[:-1]))
    # lambda = log(signal / sigma) = -log(sigmas); only second-order steps need h.
    h, previous_h = np.log(sigmas[at] / sigmas[at + 1]), np.log(sigmas[at - 1] / sigmas[at])
    if np.any(previous_h <= 0):
        raise SchedulerError(
            f"num_inference_steps: {steps} visit a timestep twice with timestep_spacing "
            f"{options['timestep_spacing']!r}, which DPM-Solver cannot; use fewer steps"
        )
    midpoint = options["solver_type"] == "midpoint"
    slope = -0.5 * shrink[at] if midpoint else shrink[at] / h + signal[at + 1]
    correction = np.zeros(n)
    correction[at] = slope * h / previous_h
    x0_x, x0_m, *_ = as_x0_eps(schedule.prediction_type, signal[:-1], sigma[:-1])
    columns = (x0_x, x0_m, sigma[1:] / sigma[:-1], -shrink + correction, -correction)
    levels = to_table((signal[:-1], sigma[:-1]))
    return DPMSolverPP(timesteps, to_table(columns), levels)


def _second_order_steps(n: int, options: Mapping[str, Any]) -> np.ndarray:
    second = np.full(n, options["solver_order"] == 2)
    second[0] = False
    short = options["lower_order_final"] and n < 15
    if options["euler_at_final"] or short or options["final_sigmas_type"] == "zero":
        second[-1] = False
    return second


def make_euler(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]) -> Euler:
    total = schedule.num_train_timesteps
    train_sigmas = training_sigmas(schedule, options)
    timesteps = in_range(spaced(total, steps, options), total, options).astype(np.float32)
    sigmas = np.interp(timesteps, np.arange(total), train_sigmas)
    if options["use_karras_sigmas"]:
        sigmas = karras(float(sigmas[-1]), float(sigmas[0]), steps)
        timesteps = timesteps_of(sigmas, train_sigmas).astype(np.float32)
    sigmas = finish(sigmas, train_sigmas, options)
    signal = 1 / np.sqrt(sigmas[:-1] ** 2 + 1)
    # The slope dx/dsigma is epsilon, here from the model's input signal * x.
    *_, eps_x, eps_m = as_x0_eps(schedule.prediction_type, signal, sigmas[:-1] * signal)
    delta = np.diff(sigmas)
    largest = sigmas.max()
    unit_start = options["timestep_spacing"] == "leading"
    return Euler(
        timesteps,
        to_table((signal, 1 + delta * eps_x * signal, delta * eps_m)),
        to_table((np.ones_like(signal), sigmas[:-1])),
        init_noise_sigma=float(np.sqrt(largest**2 + 1) if unit_start else largest),
    )
