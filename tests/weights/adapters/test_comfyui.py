"""ComfyUI's spelling: its names, DoRA for the norms that it divides by, and back."""

import re

import jax
import numpy as np
import pytest
from diffusers.loaders import lora_conversion_utils
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters import inject, registry
from jaxsynth.core.errors import UserError
from jaxsynth.models.clip import CLIPTextConfig, CLIPTextModel
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.weights.adapters import comfyui, lycoris, tensor_files
from jaxsynth.weights.adapters.layer_names import comfyui_names
from jaxsynth.weights.adapters.layered import read_layers
from jaxsynth.weights.models import describe
from tests.adapters.nets import scrambled

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TARGETS = (
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.resnets.1.conv1",
)
Q = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
CONV = "diffusion_model.input_blocks.2.0.in_layers.2"


@pytest.fixture(scope="module")
def unet():
    config = UNet2DConditionConfig.from_dict(UNET)
    plain = describe(UNet2DCondition, config)
    generator = np.random.default_rng(0)
    graphdef, state = nnx.split(plain)
    values = jax.tree.map(lambda x: generator.standard_normal(x.shape).astype("f4") / 8, state)
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, values))


def adapted(unet, kind, **settings):
    config = registry.make_config(kind, targets=TARGETS, **settings)
    model = registry.add(unet, config, rngs=jax.random.key(0))
    moved = scrambled(inject.extract(model), 1).arrays
    arrays = {key: value + moved[key] for key, value in inject.extract(model).arrays.items()}
    return inject.load_state(model, inject.AdapterState(arrays, config))


def test_names_are_those_that_diffusers_knows(unet):
    """Its own way back, for all layers in blocks."""
    names = comfyui_names("unet", unet)
    assert names["conv_in"] == "diffusion_model.input_blocks.0.0"
    assert names["time_embedding.linear_2"] == "diffusion_model.time_embed.2"
    assert names["down_blocks.0.downsamplers.0.conv"] == "diffusion_model.input_blocks.3.0.op"
    assert names["up_blocks.0.upsamplers.0.conv"] == "diffusion_model.output_blocks.2.1.conv"
    paths = [p for p in names if re.search(r"attn\d|\.ff\.|proj_(in|out)|resnets", p)]
    flat = {p: names[p].removeprefix("diffusion_model.").replace(".", "_") for p in paths}
    keys = {f"lora_unet_{flat[path]}.lora_down.weight": path for path in paths}
    # Norms are in no LoRA, and it cannot tell their names.
    keys = {key: path for key, path in keys.items() if "norm" not in path}
    config = type("Config", (), {"layers_per_block": 2})
    mapped = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(dict(keys), config)
    assert len(mapped) == len(keys) > 60
    for found, path in mapped.items():
        found = lora_conversion_utils._convert_unet_lora_key(found.split(".lora_down")[0])
        found = found.replace(".processor.", ".")
        assert found.removeprefix("unet.").replace("_", ".") == path.replace("_", ".")


@pytest.mark.parametrize(
    ("kind", "settings", "keys"),
    [
        ("lora", {"rank": 2, "alpha": 3}, {"alpha", "lora_A.weight", "lora_B.weight"}),
        ("locon", {"rank": 2}, None),
        ("lokr", {"rank": 1, "factor": 2}, {"alpha", "lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
        ("dora", {"rank": 2}, {"alpha", "lora_A.weight", "lora_B.weight", "dora_scale"}),
        ("doha", {"rank": 2, "decompose": "input"}, None),
    ],
)
def test_a_file_and_back(unet, tmp_path, kind, settings, keys):
    model = adapted(unet, kind, **settings)
    path = tmp_path / "x.safetensors"
    comfyui.write_comfyui(path, {"unet": model})
    tensors, metadata = tensor_files.load(path)
    assert {key.rsplit(f"{place}.")[1] for place in (Q, CONV) for key in tensors
            if key.startswith(place)} == keys or keys is None  # fmt: skip
    assert ("jaxsynth.dora" in metadata) == (kind == "dora")
    back = read_layers(path, {"unet": unet})["unet"]
    found, expected = inject.layers(inject.merge(back)), inject.layers(inject.merge(model))
    for target in TARGETS:
        one, other = (layers[target].kernel[...] for layers in (found, expected))
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())
        assert np.abs(other - inject.layers(unet)[target].kernel[...]).max() > 1e-3


def test_dora_is_right_where_magnitudes_are_divided_by_the_bases_norms(unet, tmp_path):
    """ComfyUI's formula for magnitudes of outputs, W' = (W + s dW) m / ||W||."""
    model = adapted(unet, "dora", rank=2, alpha=3)
    path = tmp_path / "x.safetensors"
    comfyui.write_comfyui(path, {"unet": model})
    tensors = load_file(path)
    expected = inject.layers(inject.merge(model))
    for target, name in zip(TARGETS, (Q, CONV), strict=True):
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        kernel = np.asarray(inject.layers(unet)[target].kernel[...])
        axes = (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
        weight = kernel.transpose(axes)
        delta = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(weight.shape)
        changed = weight + tensors[f"{name}.alpha"] / 2 * delta
        norms = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
        scale = tensors[f"{name}.dora_scale"].ravel() / norms
        changed = changed * scale.reshape(-1, *(1,) * (weight.ndim - 1))
        found = np.asarray(expected[target].kernel[...]).transpose(axes)
        np.testing.assert_allclose(changed, found, atol=1e-6 * np.abs(found).max())


def test_text_encoders_and_names_of_diffusers(tmp_path, unet):
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=6, eos_token_id=19,
    )  # fmt: skip
    text = nnx.merge(*nnx.split(CLIPTextModel(config, rngs=nnx.Rngs(0))))
    lora = registry.make_config("lora", rank=2, targets=("q_proj",))
    model = registry.add(text, lora, rngs=nnx.Rngs(0))
    path = tmp_path / "x.safetensors"
    comfyui.write_comfyui(path, {"text_encoder": model})
    place = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = load_file(path)
    assert set(tensors) == {f"{place}.{e}" for e in ("alpha", "lora_A.weight", "lora_B.weight")}
    mid = f"diffusion_model.{TARGETS[0]}"
    tensors |= {f"{mid}.lora_A.weight": np.ones((2, 32), "f4"),
                f"{mid}.lora_B.weight": np.ones((32, 2), "f4")}  # fmt: skip
    networks = {"unet": unet, "text_encoder": text}
    save_file(tensors, path)
    back = read_layers(path, networks)
    found = inject.extract(back["text_encoder"]).arrays
    jax.tree.map(np.testing.assert_array_equal, found, inject.extract(model).arrays)
    assert inject.extract(back["unet"]).config.rank == 2
    assert lycoris.conventions(tensors) == ["1 of 2 layers have no alpha: read as alpha = rank"]
    save_file({f"{mid}s.lora_A.weight": np.ones((2, 32), "f4")}, path)
    with pytest.raises(UserError, match="names no layer of the network"):
        read_layers(path, networks)
    save_file(tensors, path)
    with pytest.raises(UserError, match="is of the text_encoder, which the base lacks"):
        read_layers(path, {"unet": unet})
