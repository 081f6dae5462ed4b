"""Schedules against diffusers' tables, and what a scheduler config may say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise, to_x0_eps, velocity

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
BETAS = {
    "default": {},
    "sd": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"num_train_timesteps": 77},
    "trained": {"trained_betas": [0.01, 0.02, 0.5, 0.03], "num_train_timesteps": 4},
}


@pytest.mark.parametrize("name", BETAS)
def test_tables_equal_diffusers_to_the_bit(name):
    theirs = DDIMScheduler(**BETAS[name])
    ours = NoiseSchedule.from_config(dict(theirs.config))
    np.testing.assert_array_equal(ours.betas, theirs.betas.numpy())
    np.testing.assert_array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())
    assert ours.alphas_cumprod.dtype == np.float32


@pytest.mark.parametrize("name", ["default", "sd", "cosine"])
def test_zero_terminal_snr_matches_diffusers(name):
    theirs = DDIMScheduler(**BETAS[name], rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    config = {**BETAS[name], "rescale_betas_zero_snr": True}
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    assert ours[-1] == 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_noise_and_velocity_match_diffusers_and_invert(key):
    import torch

    theirs = DDPMScheduler(**BETAS["sd"])
    x, noise = (jax.random.normal(k, (4, 3, 3, 2)) for k in jax.random.split(key))
    t = jnp.array([0, 1, 500, 999])
    schedule = NoiseSchedule.from_config(SD15)
    to_torch = lambda a: torch.tensor(np.asarray(a))  # noqa: E731
    arguments = to_torch(x), to_torch(noise), torch.tensor(np.asarray(t), dtype=torch.int64)
    noisy, v = add_noise(schedule, x, noise, t), velocity(schedule, x, noise, t)
    np.testing.assert_allclose(noisy, theirs.add_noise(*arguments).numpy(), atol=1e-6)
    np.testing.assert_allclose(v, theirs.get_velocity(*arguments).numpy(), atol=1e-6)
    for prediction, output in {"epsilon": noise, "v_prediction": v, "sample": x}.items():
        kind = dataclasses.replace(schedule, prediction_type=prediction)
        x0, eps = to_x0_eps(kind, output, noisy, t)
        # x_0 from epsilon divides by sqrt(a_T) = 0.07, epsilon from x_0 by sqrt(1 - a_0) = 0.03.
        np.testing.assert_allclose(x0, x, atol=2e-5)
        np.testing.assert_allclose(eps, noise, atol=2e-5)


def test_arithmetic_is_float32_and_dtype_is_kept(key):
    schedule = NoiseSchedule.from_config(SD15)
    x = jax.random.normal(key, (2, 4)).astype(jnp.bfloat16)
    t = jnp.array([3, 700])
    noisy = add_noise(schedule, x, -x, t)
    exact = add_noise(schedule, x.astype(jnp.float32), -x.astype(jnp.float32), t)
    assert noisy.dtype == jnp.bfloat16
    np.testing.assert_array_equal(noisy, exact.astype(jnp.bfloat16))
    assert to_x0_eps(schedule, x, x, t)[0].dtype == jnp.float32


def test_schedule_passes_through_jit_as_an_argument(key):
    schedule = NoiseSchedule.from_config(SD15)
    x, t = jax.random.normal(key, (2, 3)), jnp.array([0, 999])
    jitted = jax.jit(add_noise)(schedule, x, x, t)
    np.testing.assert_allclose(jitted, add_noise(schedule, x, x, t), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule.*sigmoid"),
        ({"prediction_type": "flow_prediction"}, "prediction_type.*flow_prediction"),
        ({"beta_start": "0.1"}, "beta_start.*expected a float"),
        ({"steps_offset": 1.5}, "steps_offset.*expected a int"),
        ({"predict_epsilon": "no"}, "predict_epsilon.*expected a bool"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas.*1000"),
        ({"beta_end": 1.5}, r"betas must lie in \[0, 1\)"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        NoiseSchedule.from_config({**SD15, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "LMSDiscreteScheduler"},
        {"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": None},
        {"tensor_format": "pt"},
        {"betas_end": 0.1},
        {"timestep_spacing": "middle"},
        {"variance_type": "learned"},
        {"predict_epsilon": True},
    ],
)
def test_training_needs_the_betas_and_the_prediction_type_alone(change):
    plain, found = NoiseSchedule.from_config(SD15), NoiseSchedule.from_config({**SD15, **change})
    np.testing.assert_array_equal(found.alphas_cumprod, plain.alphas_cumprod)
    assert found.prediction_type == plain.prediction_type == "epsilon"
    assert hash(jax.tree.structure(found)) is not None


def test_predict_epsilon_is_the_prediction_type_of_2022():
    old = {"beta_schedule": "linear", "predict_epsilon": False}
    assert NoiseSchedule.from_config(old).prediction_type == "sample"
    assert "tensor_format" not in dict(NoiseSchedule.from_config({"tensor_format": "np"}).stated)


def test_a_class_has_its_own_betas_where_the_config_states_none():
    theirs = LCMScheduler()
    found = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
    np.testing.assert_array_equal(found.alphas_cumprod, theirs.alphas_cumprod.numpy())


def test_fields_that_were_never_set_take_the_chosen_class_default():
    config = dict(EulerDiscreteScheduler(steps_offset=1).config)
    assert config["timestep_spacing"] == "linspace"
    schedule = NoiseSchedule.from_config(config)
    assert schedule.options("DDIMScheduler")["timestep_spacing"] == "leading"
    assert schedule.options("DDIMScheduler")["steps_offset"] == 1
    assert DDIMScheduler.from_config(config).config.timestep_spacing == "leading"
