"""Samplers by name, that run as one `lax.scan`: DDIM, PNDM (PLMS), DPM-Solver++(2M) and Euler of
`diffusion.solvers`, and those of `diffusion.ancestral`, which add noise at every step.

A sampler is a frozen table: everything that depends on the step only is computed once on the host
in float64 and indexed by the step, so a step is a few multiply-adds on x and the model output.
What a method remembers between steps is its `carry`, a pytree of arrays.

Every sampler has `.timesteps` (n,) numpy, `.init_noise_sigma`, `.stochastic`, `.init(x) -> carry`,
`.scale_model_input(x, i) -> x` and `.step(carry, model_output, i, x, *, noise=None) ->
(x, carry)`; x may have any dtype, the arithmetic is float32. `.levels` (n, 2) are the factors of
the clean image and of the noise in the x that a step starts from. Step by step they agree with the
diffusers scheduler of the same name, timesteps included. One whose model output has several times
the channels of x (`learned_range.LearnedRange`) says how many in `.outputs`.
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
from jaxsynth.diffusion.ancestral import make_ddpm, make_euler_ancestral, make_lcm
from jaxsynth.diffusion.schedules import NoiseSchedule, SchedulerError
from jaxsynth.diffusion.solvers import DPMSolverPP, make_ddim, make_dpm, make_euler, make_pndm

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
        return make_pndm(schedule, num_inference_steps, options, skipped)
    build = {
        "DDIMScheduler": partial(make_ddim, eta=eta),
        "DPMSolverMultistepScheduler": make_dpm,
        "EulerDiscreteScheduler": make_euler,
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
