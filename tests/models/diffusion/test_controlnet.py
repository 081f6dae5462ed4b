"""ControlNet against diffusers' ControlNetModel: outputs, start, copy of the denoiser, files."""

import functools
import json

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.controlnet import ControlNet, ControlNetConfig, embedding_channels
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.training import sharding
from jaxsynth.weights.models import load_model, save_model
from jaxsynth.weights.names import from_hf, hf_name
from tests.models.torch_parity import copy_weights, nchw, nhwc, randomise, relative_error

WEIGHTS = "diffusion_pytorch_model.safetensors"
# What Stable Diffusion's published ControlNets say of themselves.
PUBLISHED = {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.16.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "global_pool_conditions": False,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}


def tiny(**changes) -> dict:
    return {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **changes,
    }


# As the shipped base: the autoencoder's factor is 4, and so is that of three widths.
TINY = tiny(conditioning_embedding_out_channels=(4, 6, 8), use_linear_projection=True)
# Stable Diffusion's factor of 8, two layers a level, no text at the last, a grey condition.
SD_LIKE = tiny(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    attention_head_dim=(2, 4),
    layers_per_block=2,
    conditioning_embedding_out_channels=(4, 6, 8, 10),
    conditioning_channels=1,
)


SDXL_LIKE = tiny(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    attention_head_dim=(2, 4),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=10 + 6 * 4,
    conditioning_embedding_out_channels=(4, 6, 8),
)


SETTINGS = {"tiny": TINY, "sd": SD_LIKE, "sdxl": SDXL_LIKE}


def unet_settings(settings: dict) -> dict:
    """The denoiser that a ControlNet of these settings belongs to."""
    ups = [block.replace("Down", "Up") for block in reversed(settings["down_block_types"])]
    kept = {key: value for key, value in settings.items() if not key.startswith("conditioning")}
    return {**kept, "up_block_types": tuple(ups), "sample_size": 8}


def abstract(model_cls, config):
    return nnx.eval_shape(lambda: model_cls(config, rngs=nnx.Rngs(0)))


@functools.cache
def fresh(config: ControlNetConfig) -> ControlNet:
    """As its constructor makes it, in one program."""
    state = jax.jit(lambda: nnx.state(ControlNet(config, rngs=nnx.Rngs(0))))()
    return nnx.merge(nnx.graphdef(abstract(ControlNet, config)), state)


@functools.cache
def build(name: str):
    """diffusers' ControlNet and denoiser, no weight zero, and ours of the same weights."""
    settings = SETTINGS[name]
    theirs = randomise(diffusers.ControlNetModel(**settings), 1)
    their_unet = randomise(diffusers.UNet2DConditionModel(**unet_settings(settings)), 2)
    ours = abstract(ControlNet, ControlNetConfig.from_dict(dict(theirs.config)))
    our_unet = abstract(UNet2DCondition, UNet2DConditionConfig.from_dict(dict(their_unet.config)))
    copy_weights(theirs, ours)
    copy_weights(their_unet, our_unet)
    return theirs, their_unet, ours, our_unet


def inputs(config: ControlNetConfig, size=(4, 8)):
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(2, *size, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(2, 5, config.cross_attention_dim)).astype(np.float32)
    pixels = [side * config.downscale for side in size]
    condition = rng.uniform(size=(2, *pixels, config.conditioning_channels)).astype(np.float32)
    return sample, np.array([3, 741], np.int32), text, condition


def added(config: ControlNetConfig) -> dict[str, jax.Array]:
    """A pooled text and sizes, for networks that read them."""
    if not config.addition_embed_type:
        return {}
    pooled = np.random.default_rng(3).normal(size=(2, 10)).astype(np.float32)
    sizes = np.array([[60, 80, 0, 12, 32, 32], [51, 38, 3, 0, 32, 64]], np.float32)
    return {"text_embeds": jnp.asarray(pooled), "time_ids": jnp.asarray(sizes)}


def controlled(controlnet, unet, *arguments, **options):
    """Residuals and the denoiser's output under them, as one program."""
    more = added(controlnet.config)

    @jax.jit
    def run(states, sample, timesteps, text, condition):
        net, denoiser = nnx.merge(graphdefs[0], states[0]), nnx.merge(graphdefs[1], states[1])
        found = net(sample, timesteps, text, condition, **options, **more)
        out = denoiser(
            sample,
            timesteps,
            text,
            down_block_additional_residuals=found.down_block_res_samples,
            mid_block_additional_residual=found.mid_block_res_sample,
            **more,
        )
        return found, out

    graphdefs, states = zip(nnx.split(controlnet), nnx.split(unet), strict=True)
    return run(states, *arguments)


def controlled_torch(controlnet, unet, sample, timesteps, text, condition, **options):
    sample, condition = nchw(sample), nchw(condition)
    timesteps, text = torch.from_numpy(timesteps), torch.from_numpy(text)
    more = {
        name: torch.tensor(np.asarray(value)) for name, value in added(controlnet.config).items()
    }
    with torch.no_grad():
        found = controlnet(sample, timesteps, text, condition, added_cond_kwargs=more, **options)
        down, mid = found.down_block_res_samples, found.mid_block_res_sample
        out = unet(
            sample,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            added_cond_kwargs=more,
        ).sample
    return [nhwc(x) for x in down], nhwc(mid), nhwc(out)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny", {"conditioning_scale": 0.7}),
        ("sd", {"guess_mode": True, "conditioning_scale": 1.5}),
        ("sdxl", {"conditioning_scale": 0.7}),
    ],
)
def test_same_as_diffusers(name, options):
    theirs, their_unet, ours, our_unet = build(name)
    arguments = inputs(ours.config)
    down, mid, expected = controlled_torch(theirs, their_unet, *arguments, **options)
    found, out = controlled(ours, our_unet, *arguments, **options)
    assert len(found.down_block_res_samples) == len(down)
    for actual, residual in zip(found.down_block_res_samples, down, strict=True):
        assert relative_error(actual, residual) < 1e-4
    assert relative_error(found.mid_block_res_sample, mid) < 1e-4
    assert relative_error(out, expected) < 1e-4
    with torch.no_grad():
        sample, timesteps, text, _ = arguments
        more = {name: torch.tensor(np.asarray(value)) for name, value in added(ours.config).items()}
        known = nchw(sample), torch.from_numpy(timesteps), torch.from_numpy(text)
        plain = their_unet(*known, added_cond_kwargs=more)
    assert relative_error(nhwc(plain.sample), expected) > 0.05, "the residuals must matter"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_embedding_s_length_decides_the_factor_as_in_diffusers(count):
    settings = tiny(conditioning_embedding_out_channels=(4, 6, 8, 10)[:count])
    theirs = diffusers.ControlNetModel(**settings)
    ours = abstract(ControlNet, ControlNetConfig.from_dict(settings))
    condition = np.zeros((1, 16, 16, 3), np.float32)
    with torch.no_grad():
        expected = nhwc(theirs.controlnet_cond_embedding(nchw(condition))).shape
    embed = type(ours.controlnet_cond_embedding).__call__
    assert jax.eval_shape(embed, ours.controlnet_cond_embedding, condition).shape == expected
    assert expected[1] == 16 // ours.config.downscale == 16 // 2 ** (count - 1)


def test_embedding_for_a_factor():
    assert embedding_channels(8) == tuple(PUBLISHED["conditioning_embedding_out_channels"])
    for factor in (1, 2, 4, 8):
        config = ControlNetConfig(conditioning_embedding_out_channels=embedding_channels(factor))
        assert config.downscale == factor
    for factor in (0, 3, 16):
        with pytest.raises(ValueError, match=f"a factor of {factor}, expected 1, 2, 4 or 8"):
            embedding_channels(factor)


@pytest.mark.heavy
def test_a_new_controlnet_changes_nothing():
    _, _, _, unet = build("tiny")
    config = ControlNetConfig.from_dict(TINY)
    arguments = inputs(config)
    sample, timesteps, text, _ = arguments
    graphdef, state = nnx.split(unet)
    plain = jax.jit(lambda state: nnx.merge(graphdef, state)(sample, timesteps, text))(state)
    copied = ControlNet.from_unet(
        unet, conditioning_embedding_out_channels=(4, 6, 8), rngs=nnx.Rngs(0)
    )
    for net in (fresh(config), copied):
        found, out = controlled(net, unet, *arguments)
        assert all(not np.any(x) for x in jax.tree.leaves(found))
        np.testing.assert_array_equal(out, plain)


def test_from_unet_is_that_of_diffusers():
    _, their_unet, _, our_unet = build("sd")
    theirs = diffusers.ControlNetModel.from_unet(
        their_unet, conditioning_embedding_out_channels=(4, 6, 8, 10), conditioning_channels=1
    )
    ours = ControlNet.from_unet(
        our_unet,
        conditioning_channels=1,
        conditioning_embedding_out_channels=(4, 6, 8, 10),
        rngs=nnx.Rngs(0),
    )
    assert ours.config == ControlNetConfig.from_dict(dict(theirs.config))
    tensors = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    drawn = []
    for path, variable in nnx.to_flat_state(nnx.state(ours, nnx.Param)):
        expected = from_hf(path[-1], tensors.pop(hf_name(path)))
        assert variable.shape == expected.shape, path
        if path[0] == "controlnet_cond_embedding" and path[1] != "conv_out":
            drawn.append(path)
        else:
            np.testing.assert_array_equal(variable[...], expected, err_msg=str(path))
    assert not tensors
    assert len(drawn) == 2 * (1 + 2 * 3), "only the embedding's convolutions are random"
    state = dict(nnx.to_flat_state(nnx.state(ours)))
    assert all(np.std(state[path][...]) > 0 for path in drawn if path[-1] == "kernel")
    assert ours.conv_in.kernel is not our_unet.conv_in.kernel, "a change would reach the denoiser"


def test_denoisers_that_cannot_be_copied_are_refused():
    def refuse(match, unet):
        with pytest.raises(ValueError, match=match):
            ControlNet.from_unet(unet, rngs=nnx.Rngs(0))

    unet = abstract(UNet2DCondition, UNet2DConditionConfig.from_dict(unet_settings(TINY)))
    adapted = add_lora(unet, LoRAConfig(targets=("mid_block.resnets.0.conv1",)), rngs=nnx.Rngs(0))
    refuse("adapter layers", adapted)
    for change, match in (
        ({"conv_in_kernel": 1}, "conv_in_kernel is 1"),
        ({"layers_per_block": [1, 2]}, "layers_per_block.*: expected an int"),
    ):
        config = UNet2DConditionConfig.from_dict({**unet_settings(TINY), **change})
        refuse(match, abstract(UNet2DCondition, config))


def test_a_condition_of_another_size_is_named():
    net = abstract(ControlNet, ControlNetConfig.from_dict(TINY))
    *arguments, condition = inputs(net.config)
    with pytest.raises(ValueError, match=r"\(2, 8, 32, 3\), expected \(2, 16, 32, 3\)"):
        jax.eval_shape(ControlNet.__call__, net, *arguments, condition[:, :8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order: expected 'rgb'"),
        ({"global_pool_conditions": True}, "global_pool_conditions: expected False"),
        ({"conditioning_embedding_out_channels": []}, "out_channels: is empty"),
        ({"up_block_types": ["UpBlock2D"]}, "ControlNetConfig: unknown field 'up_block_types'"),
        ({"attention_head_dim": 3}, "ControlNetConfig.attention_head_dim: 3 heads do not divide 8"),
    ],
)
def test_config_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        ControlNetConfig.from_dict({**TINY, **change})


def test_published_config_has_the_published_size():
    net = abstract(ControlNet, ControlNetConfig.from_dict(PUBLISHED))
    assert net.config.downscale == 8
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))]
    assert sum(sizes) == 361_279_120


def test_folders_go_to_diffusers_and_back(tmp_path):
    theirs, _, ours, _ = build("tiny")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_model(ControlNet, ControlNetConfig, tmp_path / "theirs")
    save_model(loaded, None, tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["_class_name"] == "ControlNetModel"
    again, report = diffusers.ControlNetModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    for key in config:
        assert key.startswith("_") or np.array_equal(again.config[key], theirs.config[key]), key
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(ours))


def test_files_are_read_strictly(tmp_path):
    theirs = diffusers.ControlNetModel(**TINY)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "controlnet_down_blocks.0.weight"
    for changed, match in (
        ({k: v for k, v in tensors.items() if k != key}, f"key '{key}' missing"),
        ({**tensors, "up_blocks.0.x": tensors[key]}, r"unknown key 'up_blocks\.0\.x'"),
        ({**tensors, key: tensors[key][:4]}, rf"{key}: shape \(4, 8, 1, 1\), expected \(8, 8"),
    ):
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(UserError, match=match):
            load_model(ControlNet, ControlNetConfig, tmp_path)


def test_gradients_reach_every_parameter_once_the_zeros_are_left():
    """At the start only the zero convolutions move, as the paper says; two steps later all do."""
    config = ControlNetConfig.from_dict(TINY)
    arguments = inputs(config)
    graphdef, state = nnx.split(fresh(config))

    @jax.jit
    def step(state):
        def loss(state):
            found = nnx.merge(graphdef, state)(*arguments, remat="block")
            return sum(
                (x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum()
                for x in [*found.down_block_res_samples, found.mid_block_res_sample]
            )

        grads = jax.grad(loss)(state)
        return grads, jax.tree.map(lambda p, g: p - 1e-3 * g, state, grads)

    def moved(grads):
        values = {hf_name(path): np.asarray(value[...]) for path, value in nnx.to_flat_state(grads)}
        assert all(np.isfinite(value).all() for value in values.values())
        return {name for name, value in values.items() if np.any(value)}

    names = {hf_name(path) for path, _ in nnx.to_flat_state(state)}
    zero = {name for name in names if name.startswith(("controlnet_down", "controlnet_mid"))}
    # The embedding ends in zeros too, so what lies before those moves a step later.
    late = {name for name in names if name.startswith("controlnet_cond") and "conv_out" not in name}
    for expected in (zero, names - late, names):
        grads, state = step(state)
        assert moved(grads) == expected


def test_every_parameter_has_a_sharding_rule():
    net = abstract(ControlNet, ControlNetConfig.from_dict(SD_LIKE))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    found = sharding.shardings_for(nnx.state(net), mesh, sharding.CONTROLNET, min_size=16)
    assert any("fsdp" in leaf.spec for leaf in jax.tree.leaves(found))
