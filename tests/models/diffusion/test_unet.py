"""The denoiser against diffusers' UNet2DConditionModel, its full size, and what it refuses."""

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from tests.models.torch_parity import copy_weights, nchw, nhwc, randomise, relative_error

STABLE_DIFFUSION_2_1_BASE = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "use_linear_projection": True,
}


def tiny(**changes) -> dict:
    """Two levels with text at both, one layer each."""
    return {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        **changes,
    }


SD1_LIKE = tiny(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    attention_head_dim=8,
)
SD2_LIKE = tiny(
    block_out_channels=(16, 32, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=(2, 4, 8),
    use_linear_projection=True,
    upcast_attention=True,
    transformer_layers_per_block=(1, 2, 1),
)
EIGHT_LATENT_CHANNELS = tiny(
    in_channels=8,
    out_channels=8,
    layers_per_block=(1, 2),
    flip_sin_to_cos=False,
    freq_shift=1,
    conv_in_kernel=1,
    conv_out_kernel=5,
    norm_eps=1e-3,
    act_fn="gelu",
)


def inputs(config: UNet2DConditionConfig, size=(8, 8), tokens=7):
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(2, *size, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(2, tokens, config.cross_attention_dim)).astype(np.float32)
    return sample, np.array([3, 741], np.int32), text


def build(settings: dict):
    reference = randomise(diffusers.UNet2DConditionModel(**settings))
    config = UNet2DConditionConfig.from_dict(dict(reference.config))
    model = nnx.eval_shape(lambda: UNet2DCondition(config, rngs=nnx.Rngs(0)))
    copy_weights(reference, model)
    return reference, model


def apply(model: UNet2DCondition, *arguments, **residuals):
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *a, **k: nnx.merge(graphdef, state)(*a, **k))
    return run(state, *arguments, **residuals)


def apply_torch(model, sample, timesteps, text, **residuals):
    with torch.no_grad():
        return nhwc(
            model(
                nchw(sample), torch.from_numpy(timesteps), torch.from_numpy(text), **residuals
            ).sample
        )


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (tiny(), (8, 8)),
        (SD1_LIKE, (7, 10)),
        (SD2_LIKE, (8, 12)),
        (EIGHT_LATENT_CHANNELS, (8, 8)),
    ],
    ids=["tiny", "sd1-odd-size", "sd2", "eight-latent-channels"],
)
def test_same_as_diffusers(settings, size):
    reference, model = build(settings)
    arguments = inputs(model.config, size)
    expected = apply_torch(reference, *arguments)
    assert relative_error(apply(model, *arguments), expected) < 1e-4


def test_control_residuals_same_as_diffusers():
    reference, model = build(tiny())
    arguments = inputs(model.config)
    rng = np.random.default_rng(1)
    shapes = [(2, 8, 8, 16), (2, 8, 8, 16), (2, 4, 4, 16), (2, 4, 4, 32)]
    down = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    mid = rng.normal(size=shapes[-1]).astype(np.float32)
    expected = apply_torch(
        reference,
        *arguments,
        down_block_additional_residuals=[nchw(x) for x in down],
        mid_block_additional_residual=nchw(mid),
    )
    actual = apply(
        model,
        *arguments,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    )
    assert relative_error(actual, expected) < 1e-4
    with pytest.raises(ValueError, match="expected 4 arrays, got 3"):
        model(*arguments, down_block_additional_residuals=down[:3])


def test_gradients_same_as_diffusers():
    """Kernel and input gradients take their own route on CPU, so they are compared too."""
    reference, model = build(tiny())
    sample, timesteps, text = inputs(model.config)
    torch_sample, torch_text = nchw(sample).requires_grad_(), torch.from_numpy(text)
    torch_text.requires_grad_()
    out = reference(torch_sample, torch.from_numpy(timesteps), torch_text).sample
    out.square().mean().backward()

    graphdef, params = nnx.split(model)

    @jax.jit
    def gradients(params, sample, text):
        def loss(params, sample, text):
            return jnp.square(nnx.merge(graphdef, params)(sample, timesteps, text)).mean()

        return jax.grad(loss, argnums=(0, 1, 2))(params, sample, text)

    grads, sample_grad, text_grad = gradients(params, sample, text)
    assert relative_error(sample_grad, nhwc(torch_sample.grad)) < 1e-4
    assert relative_error(text_grad, torch_text.grad.numpy()) < 1e-4
    expected = {
        "down_blocks.0.resnets.0.conv1": grads["down_blocks"][0]["resnets"][0]["conv1"],
        "down_blocks.0.downsamplers.0.conv": grads["down_blocks"][0]["downsamplers"][0]["conv"],
        "up_blocks.0.upsamplers.0.conv": grads["up_blocks"][0]["upsamplers"][0]["conv"],
        "conv_in": grads["conv_in"],
    }
    modules = dict(reference.named_modules())
    for name, grad in expected.items():
        kernel = modules[name].weight.grad.numpy().transpose(2, 3, 1, 0)
        assert relative_error(grad["kernel"][...], kernel) < 1e-4, name


def test_full_size_parameter_count():
    config = UNet2DConditionConfig.from_dict(STABLE_DIFFUSION_2_1_BASE)
    model = nnx.eval_shape(lambda: UNet2DCondition(config, rngs=nnx.Rngs(0)))
    shapes = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes) == 865_910_724


def test_bfloat16_is_close_to_float32():
    reference, full = build(tiny())
    half = nnx.eval_shape(
        lambda: UNet2DCondition(full.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    nnx.update(half, nnx.state(full))
    arguments = inputs(full.config)
    out = apply(half, *arguments)
    assert out.dtype == jnp.bfloat16
    expected = apply_torch(reference, *arguments)
    assert relative_error(out.astype(jnp.float32), expected) < 5e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type: expected None, got 'text_"),
        ({"class_embed_type": "timestep"}, "class_embed_type: expected None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift: expected 'default'"),
        ({"only_cross_attention": True}, "only_cross_attention: expected False"),
        ({"block_channels": [1]}, "unknown field 'block_channels'"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types: expected 2 entries"),
        ({"down_block_types": ["UpBlock2D"] * 2}, "down_block_types: expected one of"),
        ({"cross_attention_dim": [24, 24]}, "cross_attention_dim.*: expected an int"),
        ({"attention_head_dim": [4]}, "attention_head_dim.*: expected an int or 2 of them"),
        ({"attention_head_dim": 5}, "5 heads do not divide 16 channels"),
        ({"norm_num_groups": None}, "norm_num_groups.*: expected an int"),
    ],
)
def test_config_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionConfig.from_dict(tiny(**change))


def test_recomputing_blocks_changes_neither_output_nor_gradients(key):
    config = UNet2DConditionConfig(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    graphdef, state = nnx.split(UNet2DCondition(config, rngs=nnx.Rngs(0)))
    sample = jax.random.normal(key, (2, 4, 4, 4))
    text = jax.random.normal(key, (2, 3, 8))

    def loss(state, remat):
        out = nnx.merge(graphdef, state)(sample, jnp.array([3, 700]), text, remat=remat)
        return (out**2).mean()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, again = grad(state, None), grad(state, "block")
    chex.assert_trees_all_close(plain, again, rtol=1e-5, atol=1e-6)
    text_of = str(jax.make_jaxpr(lambda s: jax.grad(loss)(s, "block"))(state))
    assert "remat" in text_of or "checkpoint" in text_of
