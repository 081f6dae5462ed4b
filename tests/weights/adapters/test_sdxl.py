"""Adapters and words of SDXL in every format: what is written reads back, and the tools read it."""

import re

import jax
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters.inject import extract, merge
from jaxsynth.adapters.registry import add, attach, make_config
from jaxsynth.core.errors import UserError
from jaxsynth.weights.adapters import io
from jaxsynth.weights.adapters.components import split_networks
from jaxsynth.weights.adapters.embeddings import (
    FORMATS,
    Embedding,
    read_embedding,
    with_embedding,
    write_embedding,
)
from jaxsynth.weights.adapters.formats import FORMATS as FILE_FORMATS
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.layout import to_file
from tests.adapters.nets import randomised

# Layers of every part: attention, feed-forward and projections, of linear layers.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "q_proj", "out_proj", "fc1")
SHAPES = {"text_encoder": 16, "text_encoder_2": 24}
# A key that each format has for each network.
KEYS = {
    "diffusers": (
        r"unet\.down_blocks\.1\.attentions\.0\.transformer_blocks\.1\.",
        r"text_encoder\.text_model\.encoder\.layers\.1\.self_attn\.q_proj\.",
        r"text_encoder_2\.text_model\.encoder\.layers\.1\.mlp\.fc1\.",
    ),
    "kohya": (
        r"lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k\.lora_up",
        r"lora_te1_text_model_encoder_layers_1_self_attn_q_proj\.lora_down",
        r"lora_te2_text_model_encoder_layers_1_mlp_fc1\.alpha",
    ),
    "comfyui": (
        r"diffusion_model\.middle_block\.1\.transformer_blocks\.1\.attn1\.to_out\.0\.lora_A",
        r"text_encoders\.clip_l\.transformer\.text_model\.encoder\.layers\.0\.mlp\.fc1\.lora_B",
        r"text_encoders\.clip_g\.transformer\.text_model\.encoder\.layers\.0\.mlp\.fc1\.alpha",
    ),
}
KEYS["lycoris"] = KEYS["kohya"]


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return load_pipeline(sdxl_folder)


@pytest.fixture(scope="module")
def networks(pipeline):
    return io.Networks(lambda: pipeline.adaptable)


@pytest.fixture(scope="module")
def states(pipeline):
    """A LoRA of each network; alpha is not the rank."""
    config = make_config("lora", rank=2, alpha=3.0, targets=TARGETS)
    model = add(pipeline.networks, config, rngs=jax.random.key(0))
    return split_networks(randomised(extract(model), 3))


@pytest.fixture(scope="module")
def merged(pipeline, states):
    """The weights that the LoRA makes, by network."""
    return {
        name: to_file(merge(attach(network, states[name])))
        for name, network in pipeline.adaptable.items()
    }


def same(found, expected) -> None:
    assert found.keys() == expected.keys() == {"unet", "text_encoder", "text_encoder_2"}
    for name, state in expected.items():
        assert found[name].arrays.keys() == state.arrays.keys()
        for key, value in state.arrays.items():
            np.testing.assert_allclose(found[name].arrays[key], value, atol=1e-6, err_msg=key)


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    values = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    return {key.replace(".base_layer", ""): x for key, x in values.items() if ".lora_" not in key}


def agree(module: torch.nn.Module, expected: dict[str, np.ndarray]) -> None:
    found = weights(module)
    for key, value in expected.items():
        own = found[key] if key in found else found[key.removeprefix("text_model.")]
        np.testing.assert_allclose(own, value, atol=2e-5, err_msg=key)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("to", [name for name in FILE_FORMATS if name != "a1111"])
def test_every_format_is_written_and_read(sdxl_folder, networks, states, merged, tmp_path, to):
    target = tmp_path / ("adapter" if to == "peft" else "adapter.safetensors")
    assert io.write(target, states, to, networks) == []
    same(io.read(target, networks)[0], states)
    if to in KEYS:
        names = list(load_file(target))
        for pattern in KEYS[to]:
            assert any(re.match(pattern, name) for name in names), pattern
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    if to in ("diffusers", "kohya"):
        pipe.load_lora_weights(target)
        pipe.fuse_lora(components=[*SHAPES, "unet"])
        for name, expected in merged.items():
            agree(getattr(pipe, name), expected)
    if to == "peft":
        for name, expected in merged.items():
            plain = getattr(pipe, name)
            # transformers since 5.6 leaves out a name in one class of text encoders.
            renames = name != "unet" and not hasattr(plain, "text_model")
            mapping = {r"^text_model\.": ""} if renames else None
            loaded = peft.PeftModel.from_pretrained(plain, target / name, key_mapping=mapping)
            agree(loaded.merge_and_unload(), expected)
        # One network's folder says by its name which text encoder it is for.
        alone, _ = io.read(target / "text_encoder_2", networks)
        assert list(alone) == ["text_encoder_2"]


def test_diffusers_names_under_kohya_s_prefix_are_read(networks, states, pipeline, tmp_path):
    tensors = {}
    for name, prefix in (
        ("unet", "lora_unet"), ("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2"),
    ):  # fmt: skip
        for key, value in states[name].arrays.items():
            path, _, factor = key.rpartition(".")
            end = {"lora_A": "lora_down", "lora_B": "lora_up"}[factor]
            flat = f"{prefix}_{path.replace('.', '_')}"
            tensors[f"{flat}.{end}.weight"] = np.ascontiguousarray(np.asarray(value).T)
            tensors[f"{flat}.alpha"] = np.float32(3.0)
    file = tmp_path / "lora.safetensors"
    save_file({key: np.asarray(value) for key, value in tensors.items()}, file)
    same(io.read(file, networks)[0], states)


def test_files_of_another_family_are_named(networks, states, base_folder, tmp_path):
    plain = load_pipeline(base_folder)
    single = io.Networks(lambda: plain.adaptable)
    config = make_config("lora", rank=2, targets=("to_q", "q_proj"))
    own = split_networks(extract(add(plain.networks, config, rngs=jax.random.key(0))))
    for to in ("diffusers", "kohya", "comfyui"):
        io.write(tmp_path / f"xl-{to}.safetensors", states, to, networks)
        with pytest.raises(UserError, match="the file is of SDXL, and the base is not"):
            io.read(tmp_path / f"xl-{to}.safetensors", single)
        io.write(tmp_path / f"sd-{to}.safetensors", own, to, single)
        with pytest.raises(UserError, match=rf"sd-{to}.safetensors.*(SDXL|base)"):
            io.read(tmp_path / f"sd-{to}.safetensors", networks)


def test_a_word_has_vectors_for_both_text_encoders(pipeline, sdxl_folder, tmp_path):
    rng = np.random.default_rng(0)
    both = [rng.normal(size=(2, width)).astype(np.float32) for width in SHAPES.values()]
    embedding = Embedding("<dog>", *both)
    for to in FORMATS:
        file = write_embedding(tmp_path / to, embedding, to)
        assert set(load_file(file)) == {"clip_l", "clip_g"}
        read = read_embedding(file)
        assert read.word == "<dog>" and np.array_equal(read.second, both[1])
    own = with_embedding(pipeline, read, file)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    tensors = load_file(file)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            torch.tensor(tensors[key]), token="<dog>",
            text_encoder=getattr(pipe, f"text_encoder{end}"),
            tokenizer=getattr(pipe, f"tokenizer{end}"),
        )  # fmt: skip
    prompt = "a photo of a <dog>"
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    found = own.networks.encode(own.tokenizer([prompt]))
    np.testing.assert_allclose(found.states, states.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.pooled, pooled.numpy(), atol=1e-4)


def test_words_of_another_family_are_named(pipeline, base_folder, tmp_path):
    one, other = np.ones((2, 16), np.float32), np.ones((2, 24), np.float32)
    plain = load_pipeline(base_folder)
    for base, embedding, message in (
        (pipeline, Embedding("<x>", one), "for 1 text encoder, and the base has 2"),
        (plain, Embedding("<x>", one, other), r"for 2 text encoders \(SDXL\), and the base has 1"),
        (pipeline, Embedding("<x>", one, one), "width 16, and the base's text encoder has width"),
    ):
        with pytest.raises(UserError, match=message):
            with_embedding(base, embedding)
    for name, tensors, message in (
        ("half", {"clip_l": one}, "expected clip_l and clip_g"),
        ("uneven", {"clip_l": one, "clip_g": other[:1]}, "2 vectors .* and 1 for the second"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=message):
            read_embedding(tmp_path / f"{name}.safetensors")
