"""The denoising loss with optional min-SNR weights.

Kept apart from any network so that every method here (adapters, full training, a weight generator)
trains on the same loss. All of it is float32, whatever the network computes in.

Sources: DDPM (arXiv 2006.11239), min-SNR (arXiv 2303.09556, section 3.4 and its appendix for v).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsynth.diffusion.schedules import NoiseSchedule, snr, velocity


def target(
    schedule: NoiseSchedule,
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Int[Array, " b"],
) -> Float[Array, "b ..."]:
    """What the network should output at t, in float32."""
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "v_prediction":
        return velocity(schedule, x0, noise, t)
    return x0


def min_snr_weights(
    schedule: NoiseSchedule, t: Int[Array, " b"], gamma: float
) -> Float[Array, " b"]:
    """min(snr, gamma) as a weight on the x_0 error, expressed in the schedule's own target.

    epsilon: min(snr, gamma) / snr; v: min(snr, gamma) / (snr + 1); sample: min(snr, gamma).
    """
    if gamma <= 0:
        raise ValueError(f"snr_gamma: expected a positive number or None, found {gamma}")
    ratio = snr(schedule, t)
    if schedule.prediction_type == "epsilon":
        # Equal to min(snr, gamma) / snr, but 1 instead of 0/0 where the SNR is zero.
        return jnp.where(ratio <= gamma, 1.0, gamma / jnp.maximum(ratio, gamma))
    if schedule.prediction_type == "v_prediction":
        return jnp.minimum(ratio, gamma) / (ratio + 1)
    return jnp.minimum(ratio, gamma)


def diffusion_loss(
    schedule: NoiseSchedule,
    model_output: Float[Array, "b ..."],
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Int[Array, " b"],
    *,
    snr_gamma: float | None = None,
    places: Float[Array, "b h w 1"] | None = None,
    per_sample: bool = False,
) -> Float[Array, ""] | Float[Array, " b"]:
    """Mean squared error to the schedule's target, float32.

    Each sample's error is averaged over its elements, by the weights `places` where they are given,
    then weighted; the result is the mean over the batch, or (b,) with `per_sample`. Raises
    ValueError where shapes would broadcast.
    """
    shapes = {"model_output": model_output.shape, "x0": x0.shape, "noise": noise.shape}
    if len(set(shapes.values())) != 1 or t.shape != x0.shape[:1]:
        raise ValueError(
            f"diffusion_loss: expected equal shapes (b, ...) and t (b,), "
            f"found {shapes}, t {t.shape}"
        )
    error = jnp.square(model_output.astype(jnp.float32) - target(schedule, x0, noise, t))
    if places is None:
        loss = error.reshape(error.shape[0], -1).mean(axis=1)
    else:
        channels, axes = error.shape[-1], tuple(range(1, error.ndim))
        loss = (error * places).sum(axes) / (channels * places.sum(axes))
    if snr_gamma is not None:
        loss = loss * min_snr_weights(schedule, t, snr_gamma)
    return loss if per_sample else loss.mean()
