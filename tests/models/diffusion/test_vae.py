"""The autoencoder against diffusers' AutoencoderKL, its size at full scale, and what it refuses."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig, Gaussian
from tests.models.torch_parity import copy_weights, nchw, nhwc, randomise, relative_error

STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.8.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 768,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def tiny(levels: int, **changes) -> dict:
    return {
        "block_out_channels": (16, 32, 32)[:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 8,
        **changes,
    }


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config",
    [
        tiny(2),
        tiny(3, layers_per_block=2, latent_channels=8),
        tiny(
            2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            in_channels=1,
            out_channels=1,
        ),
    ],
    ids=["two-levels", "three-levels", "no-quant-no-attention"],
)
def test_same_as_diffusers(config):
    reference = randomise(diffusers.AutoencoderKL(**config))
    settings = AutoencoderKLConfig.from_dict(dict(reference.config))
    model = AutoencoderKL(settings, rngs=nnx.Rngs(0))
    copy_weights(reference, model)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 16, 24, settings.in_channels)).astype(np.float32)
    with torch.no_grad():
        expected = reference.encode(nchw(images)).latent_dist
        expected_images = reference.decode(expected.mean).sample
    posterior = model.encode(images)
    assert relative_error(posterior.mean, nhwc(expected.mean)) < 1e-4
    assert relative_error(posterior.logvar, nhwc(expected.logvar)) < 1e-4
    assert relative_error(model.decode(posterior.mode()), nhwc(expected_images)) < 1e-4


def test_full_size_parameter_count():
    config = AutoencoderKLConfig.from_dict(STABLE_DIFFUSION)
    model = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    shapes = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes) == 83_653_863
    assert config.downscale == 8
    assert config.scaling_factor == 0.18215
    for factor in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"scaling_factor: .*, expected above 0"):
            AutoencoderKLConfig.from_dict({**STABLE_DIFFUSION, "scaling_factor": factor})


def test_gaussian_sample_has_its_moments():
    shape = (4000, 1, 1, 2)
    gaussian = Gaussian(jnp.full(shape, 3.0), jnp.full(shape, 2 * np.log(0.5)))
    draws = gaussian.sample(jax.random.key(0))
    assert abs(float(draws.mean()) - 3.0) < 0.03
    assert abs(float(draws.std()) - 0.5) < 0.02
    assert (gaussian.mode() == gaussian.mean).all()


def test_force_upcast_computes_in_float32():
    """Whatever type is asked for, and with parameters in that type too."""
    config = AutoencoderKLConfig.from_dict({**tiny(1), "force_upcast": True})
    full = AutoencoderKL(config, rngs=nnx.Rngs(0))
    half = AutoencoderKL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1.0)
    latents = half.encode(images).mode()
    np.testing.assert_array_equal(latents, full.encode(images).mode())
    assert half.decode(latents).dtype == jnp.float32
    nnx.update(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(half)))
    assert half.decode(half.encode(images).mode()).dtype == jnp.float32


def test_bfloat16_computes_in_that_type_and_keeps_float32_moments():
    config = AutoencoderKLConfig.from_dict({**tiny(1), "force_upcast": False})
    full = AutoencoderKL(config, rngs=nnx.Rngs(0))
    half = nnx.eval_shape(lambda: AutoencoderKL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    nnx.update(half, nnx.state(full))
    images = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1.0)
    posterior = half.encode(images)
    assert posterior.mean.dtype == jnp.float32
    assert half.decode(posterior.mode()).dtype == jnp.bfloat16
    assert relative_error(posterior.mean, full.encode(images).mean) < 5e-2


def test_image_that_does_not_divide_is_refused():
    model = AutoencoderKL(AutoencoderKLConfig.from_dict(tiny(2)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiples of 2, got 15x16"):
        model.encode(jnp.zeros((1, 15, 16, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_chanels": 4}, "unknown field 'latent_chanels'"),
        ({"shift_factor": 0.0609}, "shift_factor: expected None or 0.0, got 0.0609"),
        ({"latents_mean": [0.0]}, "latents_mean: expected None"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types: expected 2 entries"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types: expected"),
        ({"norm_num_groups": 7}, "norm_num_groups: 7 does not divide 16"),
        ({"act_fn": "snake"}, "activation 'snake'"),
    ],
)
def test_config_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig.from_dict(tiny(2, **change))
