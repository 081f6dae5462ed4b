"""Learned reverse variances: their loss and their sampler, for networks that output (noise, v).

The second half of the output's channels, v, places each element's log-variance between the two
bounds of DDPM: at v = -1 the posterior's, at v = 1 beta's. The mean learns from the squared error
as ever; the variance learns from the variational bound, which does not reach the mean.

Sources: improved DDPM (Nichol and Dhariwal 2021, arXiv 2102.09672), equation 15 for the variance
and 16 for the loss `L_simple + lambda L_vlb` with lambda = 0.001, L_vlb summed over T steps and
estimated here by T times that of the drawn step; the discretised likelihood of t = 0 is DDPM's
(arXiv 2006.11239, equation 13) with the authors' tanh form of the normal distribution function. DiT
(arXiv 2212.09748) adds the bound with weight 1, which is the same at its T = 1000.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxsynth.diffusion.ancestral import as_x0_eps, clip_of, to_table
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.schedules import NoiseSchedule, at, to_x0_eps
from jaxsynth.diffusion.timesteps import in_range, spaced

VLB_WEIGHT = 0.001

# diffusers' bound on a variance of which the logarithm is taken.
_TINY = 1e-20


def split_output(
    model_output: Float[Array, "b h w c2"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """(prediction, v): the two halves of the channels. ValueError for an odd number of them."""
    if model_output.shape[-1] % 2:
        raise ValueError(
            f"learned variance: expected an even number of channels, found {model_output.shape}"
        )
    return tuple(jnp.split(model_output, 2, axis=-1))


def without_variance(denoise: Callable[..., Array]) -> Callable[..., Array]:
    """`denoise` with the first half of its output's channels, for samplers that set the variance.

    So DDIM and the other samplers run on a network with learned variances. It takes what `denoise`
    takes, and goes inside or outside of `guidance.classifier_free`.
    """
    return lambda *args, **kwargs: split_output(denoise(*args, **kwargs))[0]


def learned_range_loss(
    schedule: NoiseSchedule,
    model_output: Float[Array, "b h w c2"],
    x0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    *,
    vlb_weight: float = VLB_WEIGHT,
    per_sample: bool = False,
) -> Float[Array, ""] | Float[Array, " b"]:
    """Mean squared error of the prediction, plus `vlb_weight` T times the bound; float32.

    `x_t` is `add_noise(schedule, x0, noise, t)`. The mean over the batch, or (b,) with
    `per_sample`. Raises ValueError where shapes would broadcast.
    """
    prediction, _ = split_output(model_output)
    error = diffusion_loss(schedule, prediction, x0, noise, t, per_sample=True)
    bound = variational_bound(schedule, model_output, x0, x_t, t)
    loss = error + vlb_weight * schedule.num_train_timesteps * bound
    return loss if per_sample else loss.mean()


def variational_bound(
    schedule: NoiseSchedule,
    model_output: Float[Array, "b h w c2"],
    x0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> Float[Array, " b"]:
    """Each sample's term of the bound in bits a dimension, with a gradient to the variance only.

    At t > 0 the divergence of the network's normal distribution of x_{t-1} from the posterior given
    x0; at t = 0 the negative log-likelihood of x0 in bins of 2/255, the outermost open (the
    authors' code has them for latents too, where beyond +-1 no value is likely).
    """
    if model_output.shape[:-1] != x0.shape[:-1] or x0.shape != x_t.shape:
        raise ValueError(
            f"variational_bound: model_output {model_output.shape}, x0 {x0.shape} and x_t "
            f"{x_t.shape} do not belong together"
        )
    prediction, v = split_output(model_output)
    found, _ = to_x0_eps(schedule, jax.lax.stop_gradient(prediction), x_t, t)
    x0 = x0.astype(jnp.float32)
    bounds = _posterior(schedule)
    least, most, x0_factor, x_factor = (at(table, t, x0) for table in bounds)
    log_variance = _between(v, least, most)
    # Both means have the same share of x_t.
    apart = x0_factor * (x0 - found)
    divergence = 0.5 * (
        log_variance
        - least
        - 1
        + jnp.exp(least - log_variance)
        + jnp.square(apart) * jnp.exp(-log_variance)
    )
    mean = x0_factor * found + x_factor * x_t.astype(jnp.float32)
    unlikely = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    first = (t == 0).reshape(t.shape + (1,) * (x0.ndim - 1))
    nats = jnp.where(first, unlikely, divergence)
    return nats.reshape(nats.shape[0], -1).mean(axis=1) / np.log(2.0)


def _posterior(schedule: NoiseSchedule) -> tuple[Array, Array, Array, Array]:
    """Of q(x_{t-1} | x_t, x_0): log-variance and log beta, and the mean's factors of x_0 and x_t.

    The variance at t = 0 is 0; its logarithm is taken to be that at t = 1, as the authors do. All
    follows from beta, because 1 - a_t from the table of a_t has few correct digits at the first t.
    """
    betas = jnp.asarray(schedule.betas, jnp.float32)
    log_a = jnp.cumsum(jnp.log1p(-betas))
    share = -jnp.expm1(log_a)  # of noise in x_t, 1 - a_t
    log_before = jnp.concatenate([jnp.zeros(1), log_a[:-1]])
    before = -jnp.expm1(log_before)
    variance = betas * before / share
    variance = variance.at[0].set(variance[min(1, len(variance) - 1)])
    x0_factor = betas * jnp.exp(0.5 * log_before) / share
    x_factor = jnp.sqrt(1 - betas) * before / share
    return jnp.log(jnp.maximum(variance, _TINY)), jnp.log(betas), x0_factor, x_factor


def _between(v: Array, least: Array, most: Array) -> Array:
    """The log-variance that v stands for, -1 to 1 for the bounds (it may go beyond)."""
    fraction = (v.astype(jnp.float32) + 1) / 2
    return fraction * most + (1 - fraction) * least


def _discretised_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """log P of the bin of width 2/255 around x, in nats; open beyond -0.999 and 0.999."""

    def below(edge: Array) -> Array:
        z = (x - mean + edge) * jnp.exp(-log_scale)
        return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    def log(probability: Array) -> Array:
        return jnp.log(jnp.maximum(probability, 1e-12))

    upper, lower = below(1 / 255), below(-1 / 255)
    inside = log(upper - lower)
    return jnp.where(x < -0.999, log(upper), jnp.where(x > 0.999, log(1 - lower), inside))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedRange:
    """Ancestral sampling with the learned variance, for `samplers.sample`; carries nothing.

    The model's output has twice the channels of x. Columns of `table`: x_0 as a combination of
    (x, prediction), the factors of x_0 and x in the mean, the bounds of the log-variance, and
    whether the step adds noise.
    """

    timesteps: np.ndarray
    table: np.ndarray
    clip: float | None = dataclasses.field(default=None, metadata={"static": True})
    stochastic: bool = dataclasses.field(default=True, metadata={"static": True})
    init_noise_sigma: float = dataclasses.field(default=1.0, metadata={"static": True})
    outputs: ClassVar[int] = 2

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
        if noise is None:
            raise ValueError("LearnedRange: step() needs `noise`, standard normal like x")
        x0_x, x0_m, mean_x0, mean_x, least, most, noisy = jnp.asarray(self.table)[i]
        prediction, v = split_output(model_output)
        x32 = x.astype(jnp.float32)
        x0 = x0_x * x32 + x0_m * prediction.astype(jnp.float32)
        if self.clip is not None:
            x0 = jnp.clip(x0, -self.clip, self.clip)
        spread = jnp.exp(0.5 * _between(v, least, most)) * noise.astype(jnp.float32)
        # Not a product: without noise the spread may be infinite.
        result = mean_x0 * x0 + mean_x * x32 + jnp.where(noisy > 0, spread, 0)
        return result.astype(x.dtype), carry


def make_learned_range(
    schedule: NoiseSchedule, num_inference_steps: int, *, spacing: str | None = None
) -> LearnedRange:
    """The sampler over `num_inference_steps` of the schedule's timesteps, with their own variances.

    `spacing` ("linspace", as the authors of DiT sample with 250 steps; "leading"; "trailing") and
    clipping are the schedule's config's unless given, over the defaults of diffusers'
    DDPMScheduler, which clips to +-1. Build it outside `jit`. Raises ValueError naming the field.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ValueError(
            f"num_inference_steps: expected 1 to {total} (num_train_timesteps), "
            f"found {num_inference_steps}"
        )
    options = schedule.options("DDPMScheduler")
    if spacing is not None:
        if spacing not in ("leading", "linspace", "trailing"):
            raise ValueError(f"spacing: expected leading, linspace or trailing, found {spacing!r}")
        options = {**options, "timestep_spacing": spacing}
    visited = spaced(total, num_inference_steps, options).round().astype(np.int32)
    timesteps = in_range(visited, total, options)
    a = np.asarray(schedule.alphas_cumprod, np.float64)[timesteps]
    a_next = np.append(a[1:], 1.0)
    beta = 1 - a / a_next
    variance = np.maximum(beta * (1 - a_next) / (1 - a), _TINY)
    columns = (
        *as_x0_eps(schedule.prediction_type, np.sqrt(a), np.sqrt(1 - a))[:2],
        beta * np.sqrt(a_next) / (1 - a),
        np.sqrt(a / a_next) * (1 - a_next) / (1 - a),
        np.log(variance),
        np.log(beta),
        timesteps > 0,
    )
    return LearnedRange(timesteps, to_table(columns), clip=clip_of(options))
