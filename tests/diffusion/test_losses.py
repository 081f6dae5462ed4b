"""The loss against formulas written out by hand, and its weights against diffusers' SNR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from jaxsynth.diffusion.losses import diffusion_loss, min_snr_weights
from jaxsynth.diffusion.schedules import NoiseSchedule, snr

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
T = np.array([0, 3, 250, 700, 999])


def schedule_for(prediction, **more):
    return NoiseSchedule.from_config({**BETAS, "prediction_type": prediction, **more})


@pytest.fixture
def batch(key):
    output, x0, noise = jax.random.normal(key, (3, 5, 4, 4, 2))
    return output, x0, noise, jnp.asarray(T)


def manual(prediction, output, x0, noise, gamma=None):
    """Loss per sample in float64, from the definitions."""
    output, x0, noise = (np.asarray(a, np.float64) for a in (output, x0, noise))
    a = DDPMScheduler(**BETAS).alphas_cumprod.numpy().astype(np.float64)[T]
    signal, sigma = (np.sqrt(v)[:, None, None, None] for v in (a, 1 - a))
    target = {"epsilon": noise, "sample": x0, "v_prediction": signal * noise - sigma * x0}
    loss = ((output - target[prediction]) ** 2).mean(axis=(1, 2, 3))
    ratio = compute_snr(DDPMScheduler(**BETAS), torch.tensor(T)).numpy().astype(np.float64)
    if gamma is None:
        return loss
    clipped = np.minimum(ratio, gamma)
    return (
        loss
        * {
            "epsilon": clipped / ratio,
            "v_prediction": clipped / (ratio + 1),
            "sample": clipped,
        }[prediction]
    )


@pytest.mark.parametrize("gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_loss_equals_the_formula(prediction, gamma, batch):
    schedule = schedule_for(prediction)
    expected = manual(prediction, *batch[:3], gamma)
    each = diffusion_loss(schedule, *batch, snr_gamma=gamma, per_sample=True)
    assert each.shape == (5,) and each.dtype == jnp.float32
    np.testing.assert_allclose(each, expected, rtol=1e-5)
    mean = diffusion_loss(schedule, *batch, snr_gamma=gamma)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)


def test_snr_equals_diffusers():
    theirs = compute_snr(DDPMScheduler(**BETAS), torch.arange(1000)).numpy()
    np.testing.assert_allclose(snr(schedule_for("epsilon"), jnp.arange(1000)), theirs, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_at_zero_terminal_snr_are_finite(prediction):
    schedule = schedule_for(prediction, rescale_betas_zero_snr=True)
    weight = min_snr_weights(schedule, jnp.array([999]), 5.0)
    np.testing.assert_array_equal(weight, [1.0 if prediction == "epsilon" else 0.0])


def test_bfloat16_output_gives_a_float32_loss(batch):
    schedule = schedule_for("v_prediction")
    output, *rest = batch
    loss = diffusion_loss(schedule, output.astype(jnp.bfloat16), *rest)
    rounded = output.astype(jnp.bfloat16).astype(jnp.float32)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, diffusion_loss(schedule, rounded, *rest))


def test_gradient_reaches_the_output_alone(batch):
    schedule = schedule_for("epsilon")
    output, x0, noise, t = batch
    grad = jax.grad(lambda o: diffusion_loss(schedule, o, x0, noise, t))(output)
    np.testing.assert_allclose(grad, 2 * (output - noise) / output.size, rtol=1e-5, atol=1e-9)


def test_shapes_that_would_broadcast_are_refused(batch):
    schedule = schedule_for("epsilon")
    output, x0, noise, t = batch
    with pytest.raises(ValueError, match="equal shapes"):
        diffusion_loss(schedule, output[..., :1], x0, noise, t)
    with pytest.raises(ValueError, match="t \\(1,\\)"):
        diffusion_loss(schedule, output, x0, noise, t[:1])
    with pytest.raises(ValueError, match="snr_gamma"):
        diffusion_loss(schedule, *batch, snr_gamma=0.0)
