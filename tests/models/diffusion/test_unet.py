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
from jaxsynth.weights.models import describe
from jaxsynth.weights.names import hf_name, hf_shape
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

SDXL_BASE = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
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
SDXL_LIKE = tiny(
    block_out_channels=(16, 32, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4, 8),
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 3),
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=10 + 6 * 6,
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


def added(config: UNet2DConditionConfig) -> dict[str, np.ndarray]:
    """A pooled text and sizes, for a denoiser that reads them."""
    if not config.addition_embed_type:
        return {}
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pooled = np.random.default_rng(2).normal(size=(2, width)).astype(np.float32)
    sizes = np.array([[600, 800, 0, 120, 512, 512], [512, 384, 31, 0, 512, 384]], np.float32)
    return {"text_embeds": pooled, "time_ids": sizes}


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


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (tiny(), (8, 8)),
        (SD1_LIKE, (7, 10)),
        (SD2_LIKE, (8, 12)),
        (EIGHT_LATENT_CHANNELS, (8, 8)),
        (SDXL_LIKE, (8, 12)),
    ],
    ids=["tiny", "sd1-odd-size", "sd2", "eight-latent-channels", "sdxl"],
)
def test_same_as_diffusers(settings, size):
    reference, model = build(settings)
    arguments, more = inputs(model.config, size), added(model.config)
    theirs = {name: torch.from_numpy(value) for name, value in more.items()}
    expected = apply_torch(reference, *arguments, added_cond_kwargs=theirs)
    assert relative_error(apply(model, *arguments, **more), expected) < 1e-4
    if more:
        other = {**more, "time_ids": more["time_ids"][::-1]}
        assert relative_error(apply(model, *arguments, **other), expected) > 1e-3
        with pytest.raises(ValueError, match="'text_time' expected both"):
            model(*arguments, text_embeds=more["text_embeds"])
        with pytest.raises(ValueError, match="expected 46"):
            model(*arguments, text_embeds=more["text_embeds"], time_ids=more["time_ids"][:, :5])


@pytest.mark.heavy
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


@pytest.mark.heavy
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


@pytest.mark.parametrize(
    ("published", "numbers"),
    [(STABLE_DIFFUSION_2_1_BASE, 865_910_724), (SDXL_BASE, 2_567_463_684)],
    ids=["sd21", "sdxl"],
)
def test_full_size_shapes_are_those_of_diffusers(published, numbers):
    model = describe(UNet2DCondition, UNet2DConditionConfig.from_dict(published))
    shapes = {
        hf_name(path): hf_shape(path[-1], leaf.shape)
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**published).state_dict()
    assert shapes == {name: tuple(value.shape) for name, value in theirs.items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == numbers


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
        ({"addition_embed_type": "image"}, "addition_embed_type: expected None or 'text_time'"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim: expected a number"),
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


@pytest.mark.heavy
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
