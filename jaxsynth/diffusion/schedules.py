"""Noise schedules: betas and their cumulative products, read from a diffusers scheduler config.

Everything about a scheduler_config.json is checked here, because a field that is silently ignored
gives images that are only slightly wrong. Training needs the betas and the prediction type, which
are checked at once. The rest belongs to one sampler and is checked where that sampler is made: an
unknown class or field, an unknown value and an option that this package does not implement are
then errors that name the field.

The tables follow the float32 arithmetic that the published checkpoints were trained with, to the
bit where that is possible, so that sampling timesteps agree exactly with diffusers.

Sources: DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512), zero terminal SNR
(arXiv 2305.08891), and the schedulers of diffusers 0.42 for names and defaults.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.core.errors import UserError, shown


class SchedulerError(UserError, ValueError):
    """A scheduler's config that is not as expected or not implemented; the field is named."""


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_BASE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_THRESHOLDING = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
}

# Every field of each scheduler class with that class's own default.
FIELDS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {
        **_BASE,
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    },
    "DDIMScheduler": {
        **_BASE,
        **_THRESHOLDING,
        **_CLIPPING,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    "DPMSolverMultistepScheduler": {
        **_BASE,
        **_THRESHOLDING,
        **_SIGMAS,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "EulerDiscreteScheduler": {
        **_BASE,
        **_SIGMAS,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {
        **_BASE,
        "timestep_spacing": "linspace",
        "rescale_betas_zero_snr": False,
    },
    "LCMScheduler": {
        **_BASE,
        **_THRESHOLDING,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "timestep_scaling": 10.0,
        "rescale_betas_zero_snr": False,
    },
    "DDPMScheduler": {
        **_BASE,
        **_THRESHOLDING,
        **_CLIPPING,
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
}

# Of the noise schedule; the largest there are have 4000.
_MOST_STEPS = 1 << 20

# What the noise schedule itself is made of; every other field belongs to a sampler.
_OF_THE_SCHEDULE = (*_BASE, "rescale_betas_zero_snr")

# Values that exist and are implemented.
_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    # "learned" would be the log-variance itself, which no model here gives.
    "variance_type": (
        None,
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned_range",
    ),
}

# Options of a sampler of which only these values are implemented, checked when it is made.
_IMPLEMENTED = {
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "solver_order": (1, 2),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint", "heun"),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "lambda_min_clipped": (-math.inf,),
    "use_dynamic_shifting": (False,),
    "interpolation_type": ("linear",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_type": ("discrete",),
}

# Options whose meaning is not tied to one sampler: where the chosen sampler has no such option,
# diffusers drops them; here they must be off.
# The first is part of the noise schedule, and so holds for any sampler.
_MUST_BE_OFF = ("rescale_betas_zero_snr", "clip_sample", "thresholding", "use_karras_sigmas")

_KNOWN = {name: default for fields in FIELDS.values() for name, default in fields.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete variance-preserving schedule x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    `alphas_cumprod` is a_t for t = 0 .. T-1. A pytree: the tables are leaves, the rest is static.
    `stated` holds the fields that the scheduler config states, for samplers made by name.
    """

    betas: Float[np.ndarray | Array, " t"]
    alphas_cumprod: Float[np.ndarray | Array, " t"]
    prediction_type: str = dataclasses.field(metadata={"static": True})
    class_name: str | None = dataclasses.field(default=None, metadata={"static": True})
    stated: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of a scheduler_config.json dict, of whatever class.

        Raises SchedulerError naming the field for betas or a prediction type that are not
        implemented, or of the wrong type. Options of samplers are checked where a sampler is made
        (`options`).
        """
        class_name = config.get("_class_name")
        if not isinstance(class_name, str | None):
            raise SchedulerError(f"scheduler config: _class_name {shown(class_name)}")
        stated = _stated(config)
        defaults = FIELDS.get(class_name or "", {})
        own = {name: value for name, value in defaults.items() if name in _BASE}
        values = {**_BASE, "rescale_betas_zero_snr": False, **own, **stated}
        betas = _betas(values)
        # torch accumulates a float32 cumulative product in float64; so do we, for equal tables.
        cumprod = _cumprod(np.float32(1) - betas)
        stated.pop("trained_betas", None)
        return cls(
            betas=betas,
            alphas_cumprod=cumprod,
            prediction_type=values["prediction_type"],
            class_name=class_name,
            stated=tuple(sorted((name, _hashable(value)) for name, value in stated.items())),
        )

    def options(self, class_name: str) -> dict[str, Any]:
        """All options of sampler `class_name`: the stated ones over that class's own defaults.

        This is what diffusers' `Scheduler.from_config(other.config)` does, except that an option
        which would change the images and which we lack is an error. Options that only another
        class has (`skip_prk_steps` for DDIM) do not apply. Where the config is of another class,
        that class's sampler is being replaced: what only it can do is left at the default. Raises
        ValueError naming the field.
        """
        stated = dict(self.stated)
        known = FIELDS[class_name]
        replaces = self.class_name not in (None, class_name)
        for name in _MUST_BE_OFF[:1] if replaces else _MUST_BE_OFF:
            if name not in known and stated.get(name):
                raise SchedulerError(
                    f"scheduler config field {name!r}: {shown(stated[name])} cannot be honoured "
                    f"by {class_name}, which has no such option; expected it off"
                )
        options = dict(known)
        for name, value in stated.items():
            if replaces and name not in _OF_THE_SCHEDULE and not _is_implemented(name, value):
                continue
            if name not in _KNOWN:
                raise SchedulerError(
                    f"scheduler config field {shown(name)} (value {shown(value)}) is unknown; "
                    f"known fields: {sorted(_KNOWN)}"
                )
            checked = _checked(name, value, _KNOWN[name])
            if name not in known:
                continue
            if checked not in _IMPLEMENTED.get(name, (checked,)):
                raise SchedulerError(
                    f"scheduler config field {shown(name)}: {shown(checked)} is not implemented "
                    f"for {class_name}; expected one of {list(_IMPLEMENTED[name])}"
                )
            options[name] = checked
        return options


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config` without the private ones and those at their class default.

    Those of the noise schedule are checked. Of the fields of 2022 `tensor_format` said what arrays
    to return, and `predict_epsilon` is today's `prediction_type`.
    """
    # diffusers lists here what the user never set: another class then uses its own default.
    unset = config.get("_use_default_values", ())
    if not isinstance(unset, (list, tuple)):
        raise SchedulerError(f"scheduler config field '_use_default_values': {shown(unset)}")
    stated = {
        name: _checked(name, value, _KNOWN[name]) if name in _OF_THE_SCHEDULE else value
        for name, value in config.items()
        if not name.startswith("_") and name not in unset and name != "tensor_format"
    }
    predicts_noise = stated.pop("predict_epsilon", True)
    if predicts_noise not in (True, False):
        raise SchedulerError(
            f"scheduler config field 'predict_epsilon': expected a bool, found "
            f"{shown(predicts_noise)}"
        )
    if not predicts_noise:
        stated.setdefault("prediction_type", "sample")
    return stated


def _is_implemented(name: str, value: Any) -> bool:
    """Whether a sampler's option is one that this package knows, with a value that it has."""
    try:
        checked = _checked(name, value, _KNOWN[name])
    except (KeyError, ValueError):
        return False
    return checked in _IMPLEMENTED.get(name, (checked,))


def _hashable(value: Any) -> Any:
    """Lists as tuples, since a schedule's static fields are hashed."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _checked(name: str, value: Any, default: Any) -> Any:
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise SchedulerError(
                f"scheduler config field {shown(name)}: {shown(value)} is not implemented; "
                f"expected one of {list(_CHOICES[name])}"
            )
        return value
    if isinstance(default, bool):
        if value is None:  # null is diffusers' other spelling of false for the sigma options
            return False
        right = isinstance(value, bool)
    elif isinstance(default, int):
        right = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        right = isinstance(value, int | float) and not isinstance(value, bool)
    elif isinstance(default, str):
        right = isinstance(value, str)
    else:  # trained_betas, sigma_min, sigma_max
        return value
    if not right:
        raise SchedulerError(
            f"scheduler config field {shown(name)}: expected a {type(default).__name__}, "
            f"found {shown(value)}"
        )
    return value


def _betas(values: Mapping[str, Any]) -> np.ndarray:
    steps = values["num_train_timesteps"]
    start, end = values["beta_start"], values["beta_end"]
    if not 1 <= steps <= _MOST_STEPS:
        raise SchedulerError(
            f"scheduler config field 'num_train_timesteps': expected 1 to {_MOST_STEPS}, found "
            f"{shown(steps)}"
        )
    if not 0 <= start <= 1 or not 0 <= end <= 1:
        raise SchedulerError(
            f"scheduler config: betas must lie in [0, 1), found beta_start {start:g} and beta_end "
            f"{end:g}"
        )
    if (trained := values["trained_betas"]) is not None:
        if not isinstance(trained, (list, tuple)) or not all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 2 for x in trained
        ):
            raise SchedulerError(
                "scheduler config field 'trained_betas': expected a list of numbers in [0, 1)"
            )
        betas = np.asarray(trained, np.float32)
        if betas.shape != (steps,):
            raise SchedulerError(
                f"scheduler config field 'trained_betas': expected {steps} numbers "
                f"(num_train_timesteps), found shape {betas.shape}"
            )
    elif values["beta_schedule"] == "linear":
        betas = _linspace(start, end, steps)
    elif values["beta_schedule"] == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, steps) ** 2
    else:
        betas = _cosine_betas(steps)
    if not (np.all(betas >= 0) and np.all(betas < 1)):
        raise SchedulerError(
            "scheduler config: betas must lie in [0, 1), found "
            f"{betas.min()} .. {betas.max()} (beta_start, beta_end or trained_betas)"
        )
    return _rescale_zero_terminal_snr(betas) if values["rescale_betas_zero_snr"] else betas


def _linspace(start: float, end: float, steps: int) -> np.ndarray:
    """float32 linspace from both ends to the middle, which is how torch rounds it."""
    if steps == 1:
        return np.asarray([start], np.float32)
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(steps - 1))
    index = np.arange(steps)
    # The product is added before it is rounded (a fused multiply-add in torch).
    up, down = np.float64(start) + step * index, np.float64(end) - step * (steps - 1 - index)
    return np.where(index < steps // 2, up, down).astype(np.float32)


def _cosine_betas(steps: int, max_beta: float = 0.999) -> np.ndarray:
    time = np.arange(steps + 1) / steps
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta).astype(np.float32)


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(a_t) so that it ends at 0 and starts where it did (arXiv 2305.08891).

    Agrees with torch to a few 1e-6, not to the bit: torch does not round its square root correctly.
    """
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    product = root**2
    alphas = np.concatenate([product[:1], product[1:] / product[:-1]])
    return np.float32(1) - alphas


def at(table: Float[np.ndarray | Array, " t"], t: Int[Array, "..."], like: Array) -> Array:
    """`table[t]` in float32, shaped to broadcast against `like` (batch first)."""
    picked = jnp.asarray(table, jnp.float32)[t]
    return picked.reshape(picked.shape + (1,) * (like.ndim - picked.ndim))


def snr(schedule: NoiseSchedule, t: Int[Array, " b"]) -> Float[Array, " b"]:
    """Signal-to-noise ratio a_t / (1 - a_t), float32."""
    a = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t]
    return a / (1 - a)


def _roots(schedule: NoiseSchedule, t: Array, like: Array) -> tuple[Array, Array]:
    a = at(schedule.alphas_cumprod, t, like)
    return jnp.sqrt(a), jnp.sqrt(1 - a)


def add_noise(
    schedule: NoiseSchedule,
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Int[Array, " b"],
) -> Float[Array, "b ..."]:
    """x_t, computed in float32 and returned in x0's dtype. `t` is (b,) or a scalar in [0, T)."""
    signal, sigma = _roots(schedule, t, x0)
    mixed = signal * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)
    return mixed.astype(x0.dtype)


def velocity(
    schedule: NoiseSchedule,
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Int[Array, " b"],
) -> Float[Array, "b ..."]:
    """The v-prediction target sqrt(a_t) noise - sqrt(1 - a_t) x_0, in x0's dtype."""
    signal, sigma = _roots(schedule, t, x0)
    v = signal * noise.astype(jnp.float32) - sigma * x0.astype(jnp.float32)
    return v.astype(x0.dtype)


def to_x0_eps(
    schedule: NoiseSchedule,
    model_output: Float[Array, "b ..."],
    x_t: Float[Array, "b ..."],
    t: Int[Array, " b"],
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """The (x_0, noise) that `model_output` at (x_t, t) stands for, in float32.

    With zero terminal SNR, an epsilon model says nothing about x_0 at the last t (division by 0).
    """
    signal, sigma = _roots(schedule, t, x_t)
    out, x_t = model_output.astype(jnp.float32), x_t.astype(jnp.float32)
    if schedule.prediction_type == "epsilon":
        return (x_t - sigma * out) / signal, out
    if schedule.prediction_type == "v_prediction":
        return signal * x_t - sigma * out, signal * out + sigma * x_t
    return out, (x_t - signal * out) / sigma
