"""Samplers that run as one `lax.scan`: DDIM, PNDM (PLMS), DPM-Solver++(2M), Euler; and by name
those of `diffusion.ancestral`, which add noise at every step.

A sampler is a frozen table: everything that depends on the step only is computed once on the host
in float64 and indexed by the step, so a step is a few multiply-adds on x and the model output.
What a method remembers between steps is its `carry`, a pytree of arrays.

Every sampler has `.timesteps` (n,) numpy, `.init_noise_sigma`, `.stochastic`, `.init(x) -> carry`,
`.scale_model_input(x, i) -> x` and `.step(carry, model_output, i, x, *, noise=None) ->
(x, carry)`; x may have any dtype, the arithmetic is float32. `.levels` (n, 2) are the factors of
the clean image and of the noise in the x that a step starts from. Step by step they agree with the
diffusers scheduler of the same name, timesteps included. One whose model output has several times
the channels of x (`learned_range.LearnedRange`) says how many in `.outputs`.

Sources: DDIM (arXiv 2010.02502), PNDM (arXiv 2202.09778, equations 9, 12, 13), DPM-Solver++
(arXiv 2211.01095, algorithm 2), EDM (arXiv 2206.00364) for Euler and the Karras sigmas; spacings
from arXiv 2305.08891, table 2.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxsynth.core.errors import quoted, shown
from jaxsynth.diffusion.ancestral import (
    as_x0_eps,
    clip_of,
    make_ddpm,
    make_euler_ancestral,
    make_lcm,
    to_table,
)
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

NAMES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "ddpm": "DDPMScheduler",
    "lcm": "LCMScheduler",
}
# The steps of a model with a learned variance (`learned_range`), which `generation.classes` makes.
ANCESTRAL = "ancestral"

Denoise = Callable[[Array, Array], Array]


class Sampler(Protocol):
    """What `sample` needs; see the module docstring."""

    timesteps: np.ndarray
    levels: np.ndarray
    init_noise_sigma: float
    stochastic: bool

    def init(self, x: Array) -> PyTree: ...
    def scale_model_input(self, x: Array, i: Array | int) -> Array: ...
    def step(
        self, carry: PyTree, model_output: Array, i: Array | int, x: Array, *, noise: Any = None
    ) -> tuple[Array, PyTree]: ...


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


def check_sampler(name: str) -> None:
    """ValueError for a config's `sampler` that is no name of one; "" is the model's own."""
    if name and name not in (*NAMES, ANCESTRAL, *NAMES.values()):
        known = ", ".join((*NAMES, ANCESTRAL))
        raise ValueError(
            f"sampler: {quoted(name)}, expected one of {known}, or nothing for the model's own"
        )


def make_sampler(
    sampler: str | Mapping[str, Any],
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    strength: float | None = None,
) -> Sampler:
    """A sampler by name or by a scheduler_config.json dict, over `schedule`.

    By name (one of `NAMES` or the diffusers class name), its options are those that the schedule's
    own config states, over the class's defaults (`NoiseSchedule.options`). A dict must describe the
    same noise schedule and names the class in `_class_name`. `eta` is DDIM's noise, 0 to 1. With
    `strength`, above 0 and at most 1, it has only the last `floor(strength * steps)` steps, as
    diffusers' image-to-image pipelines take them, for images that start from others (`noised`).
    Build it outside `jit`. Raises ValueError naming the field or argument.
    """
    if isinstance(sampler, str):
        class_name = NAMES.get(sampler, sampler)
    else:
        own = NoiseSchedule.from_config(sampler)
        if own.prediction_type != schedule.prediction_type or not np.array_equal(
            own.alphas_cumprod, np.asarray(schedule.alphas_cumprod)
        ):
            raise SchedulerError(
                "make_sampler: the scheduler config describes another noise schedule "
                f"({own.prediction_type}, T={own.num_train_timesteps}) than the one given "
                f"({schedule.prediction_type}, T={schedule.num_train_timesteps})"
            )
        schedule, class_name = own, own.class_name
    if class_name not in NAMES.values():
        raise SchedulerError(
            f"make_sampler: no sampler {shown(class_name)}; expected one of {sorted(NAMES)} or "
            f"{sorted(NAMES.values())}"
        )
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise SchedulerError(
            f"num_inference_steps: expected 1 to {total} (num_train_timesteps), "
            f"found {num_inference_steps}"
        )
    if eta != 0 and class_name != "DDIMScheduler":
        raise SchedulerError(f"eta: {eta} applies to DDIM only, not to {class_name}")
    options = schedule.options(class_name)
    skipped = _skipped(num_inference_steps, strength)
    if class_name == "PNDMScheduler":
        return _make_pndm(schedule, num_inference_steps, options, skipped)
    build = {
        "DDIMScheduler": partial(_make_ddim, eta=eta),
        "DPMSolverMultistepScheduler": _make_dpm,
        "EulerDiscreteScheduler": _make_euler,
        "EulerAncestralDiscreteScheduler": make_euler_ancestral,
        "DDPMScheduler": make_ddpm,
        "LCMScheduler": make_lcm,
    }[class_name]
    return _without_first(build(schedule, num_inference_steps, options), skipped)


def _skipped(steps: int, strength: float | None) -> int:
    """How many first steps images leave out that start from others at `strength`."""
    if strength is None:
        return 0
    if not 0 < strength <= 1:
        raise SchedulerError(f"strength: {strength}, expected above 0 and at most 1")
    taken = int(steps * strength)
    if taken < 1:
        raise SchedulerError(
            f"strength: {strength} of {steps} steps leaves none to take; expected at least "
            f"{1 / steps:g}, or more steps"
        )
    return steps - taken


def _without_first(sampler: Any, count: int) -> Sampler:
    """The sampler from step `count` on, with nothing of the steps before in its memory."""
    if not count:
        return sampler
    table = np.array(sampler.table[count:])
    if isinstance(sampler, DPMSolverPP):
        # The first step has no output before it, and is of first order as diffusers' is.
        table[0, 3] += table[0, 4]
        table[0, 4] = 0
    return dataclasses.replace(
        sampler, timesteps=sampler.timesteps[count:], table=table, levels=sampler.levels[count:]
    )


def initial_noise(
    keys: Array, shape: tuple[int, ...], sampler: Sampler, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "b ..."]:
    """x_T for `sample`: one image of `shape` (h, w, c) per key, scaled by init_noise_sigma.

    Image i depends on keys[i] alone, so it does not matter how images are batched.
    """
    noise = _noise(keys, 0, shape) * sampler.init_noise_sigma
    return noise.astype(dtype)


def noised(
    keys: Array, mean: Float[Array, "b ..."], std: Float[Array, "b ..."], sampler: Sampler
) -> Float[Array, "b ..."]:
    """x for `sample` that starts from images: their latents with the noise of the first step.

    SDEdit (Meng et al. 2022, arXiv 2108.01073). The latents are drawn from the posterior with this
    `mean` and `std`, and the noise is that of `initial_noise`.
    """
    shape = mean.shape[1:]
    start = mean + std * _noise(keys, _POSTERIOR, shape)
    signal, sigma = jnp.asarray(sampler.levels)[0]
    return signal * start + sigma * _noise(keys, 0, shape)


def sample(
    denoise: Denoise,
    x_T: Float[Array, "b ..."],
    sampler: Sampler,
    *,
    keys: Array | None = None,
) -> Float[Array, "b ..."]:
    """Run all steps from x_T in one `lax.scan`; returns x_0 in x_T's dtype.

    `denoise(x, t) -> model_output` gets x in x_T's dtype and t (b,), int32 (float32 for Euler).
    x_T is `initial_noise`, that is already scaled by `sampler.init_noise_sigma`. `keys` (b,), one
    per image, is needed by a stochastic sampler (DDIM with eta > 0) and otherwise unused; it may
    be the keys given to `initial_noise`. Between steps x stays in float32.
    """
    batch = x_T.shape[0]
    if sampler.stochastic and (keys is None or keys.shape[0] != batch):
        found = None if keys is None else keys.shape
        raise ValueError(f"sample: expected {batch} keys, one per image, found {found}")
    timesteps = jnp.asarray(sampler.timesteps)
    expected = (*x_T.shape[:-1], x_T.shape[-1] * getattr(sampler, "outputs", 1))

    def body(state: tuple[Array, PyTree], i: Array) -> tuple[tuple[Array, PyTree], None]:
        x, carry = state
        t = jnp.broadcast_to(timesteps[i], (batch,))
        output = denoise(sampler.scale_model_input(x, i).astype(x_T.dtype), t)
        if output.shape != expected:
            raise ValueError(
                f"sample: denoise returned {output.shape} for x {x.shape}, expected {expected}"
            )
        noise = _noise(keys, i + 1, x.shape[1:]) if sampler.stochastic else None
        return sampler.step(carry, output, i, x, noise=noise), None

    x = x_T.astype(jnp.float32)
    steps = jnp.arange(timesteps.shape[0], dtype=jnp.int32)
    (x, _), _ = jax.lax.scan(body, (x, sampler.init(x)), steps)
    return x.astype(x_T.dtype)


# Beside the streams of the steps: the draw of the latents that images start from.
_POSTERIOR = 2**31 - 1


def _noise(keys: Array, stream: Array | int, shape: tuple[int, ...]) -> Array:
    """Standard normals per key; stream 0 is x_T, stream i + 1 belongs to step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)


def _product_at(
    schedule: NoiseSchedule, timesteps: np.ndarray, options: Mapping[str, Any]
) -> np.ndarray:
    """a_t in float64; below 0 it is 1 or a_0, as `set_alpha_to_one` says."""
    table = np.asarray(schedule.alphas_cumprod, np.float64)
    final = 1.0 if options["set_alpha_to_one"] else table[0]
    return np.where(timesteps >= 0, table[np.maximum(timesteps, 0)], final)


def _make_ddim(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any], eta: float) -> DDIM:
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


def _make_pndm(
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


def _make_dpm(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]) -> DPMSolverPP:
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


def _make_euler(schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]) -> Euler:
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
