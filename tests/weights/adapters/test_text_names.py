"""Adapters of text encoders under both names: transformers >= 5.6 has no "text_model." in them."""

import json
import re

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.registry import attach
from jaxsynth.models.clip import CLIPTextConfig, CLIPTextModel
from jaxsynth.weights.adapters import diffusers
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.adapters import peft as folders
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.models import describe
from tests.adapters.nets import scrambled

TEXT = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 6, "eos_token_id": 19,
}  # fmt: skip
Q = "text_model.encoder.layers.1.self_attn.q_proj"
KINDS = {
    "lora": {"rank": 2, "alpha": 3.0, "rank_pattern": {f"^{re.escape(Q)}": 1}},
    "dora": {"rank": 2, "alpha": 3.0},
    "loha": {"rank": 2, "alpha": 3.0, "init": "peft"},
    "lokr": {"rank": 1, "alpha": 3.0, "factor": 2, "full_alpha": True, "ordered": False},
}
# peft asks transformers' models for a property that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # It takes the bias of `lora_bias`, which has one axis, for a shard of DeepSpeed's.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
]
# What peft needs for our names under a transformers whose model has lost them.
TO_NEW = {r"^text_model\.": ""}
TARGETS = {"names": ("q_proj", "fc1"), "paths": (Q,), "patterns": (f"^{re.escape(Q)}$",)}


@pytest.fixture(scope="module")
def text():
    graphdef, state = nnx.split(describe(CLIPTextModel, CLIPTextConfig(**TEXT)))
    generator = np.random.default_rng(0)
    values = jax.tree.map(lambda x: generator.standard_normal(x.shape).astype("f4") / 4, state)
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, values))


def tower(text, old: bool) -> torch.nn.Module:
    """transformers' model with these weights, by either naming."""
    config = transformers.CLIPTextConfig(**TEXT, bos_token_id=18, pad_token_id=19)
    model = transformers.CLIPTextModel(config)
    names = {key.removeprefix("text_model."): x for key, x in to_file(text).items()}
    own = {key.removeprefix("text_model."): key for key in model.state_dict()}
    model.load_state_dict({own[key]: torch.tensor(x) for key, x in names.items() if key in own})
    if not old or hasattr(model, "text_model"):
        return model
    outer = torch.nn.Module()
    outer.text_model = model
    return outer


def state_of(text, kind, targets):
    config = registry.make_config(kind, targets=targets, **KINDS[kind])
    model = registry.add(text, config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, 1).arrays
    arrays = {name: value + moved[name] for name, value in state.arrays.items()}
    return inject.AdapterState(arrays, config)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_is_for_both_names(text, tmp_path, kind, targets):
    state = state_of(text, kind, TARGETS[targets])
    folders.write_peft(tmp_path, state, model=text)
    expected = to_file(inject.merge(attach(text, state)))
    for old in (False, True):
        net = tower(text, old)
        mapping = None if hasattr(net, "text_model") else TO_NEW
        model = peft.PeftModel.from_pretrained(net, tmp_path, key_mapping=mapping)
        found = model.merge_and_unload().state_dict()
        for key, value in found.items():
            own = f"text_model.{key.removeprefix('text_model.')}"
            np.testing.assert_allclose(value, expected[own], atol=2e-6, err_msg=key)
    again = folders.read_peft(tmp_path, text)
    back = to_file(inject.merge(attach(text, again)))
    for key, value in expected.items():
        np.testing.assert_allclose(back[key], value, atol=2e-6)


@pytest.mark.parametrize("with_network", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_text_model_is_read(text, tmp_path, kind, with_network):
    """As peft writes it under a new transformers: keys and patterns lack the prefix."""
    state = state_of(text, kind, TARGETS["names"])
    folders.write_peft(tmp_path, state, model=text)
    path = tmp_path / folders.PEFT_WEIGHTS
    save_file({k.replace("text_model.", ""): x for k, x in load_file(path).items()}, path)
    settings = tmp_path / folders.PEFT_CONFIG
    fields = json.loads(settings.read_text())
    fields["target_modules"] = r"encoder\.layers\.\d\.(self_attn\.q_proj|mlp\.fc1)"
    patterns = {k.replace("(?:text_model\\.)?", ""): x for k, x in fields["rank_pattern"].items()}
    settings.write_text(json.dumps(fields | {"rank_pattern": patterns}))
    found = folders.read_peft(tmp_path, text if with_network else None)
    expected = to_file(inject.merge(attach(text, state)))
    back = to_file(inject.merge(attach(text, found)))
    for key, value in expected.items():
        np.testing.assert_allclose(back[key], value, atol=2e-6)


def test_settings_in_diffusers_files_are_for_both_names(text, tmp_path):
    for name, targets in TARGETS.items():
        path = tmp_path / f"{name}.safetensors"
        state = state_of(text, "lora", targets)
        diffusers.write_diffusers(path, {"text_encoder": state})
        config = diffusers.read_diffusers(path)["text_encoder"].config
        for layer in (Q, Q.removeprefix("text_model.")):
            assert any(inject.matches(target, layer) for target in config.targets)
            assert config.rank_at(layer) == 1


@pytest.mark.parametrize(
    "setting", ["lora_bias", "modules_to_save", "exclude", "transform", "all-linear"]
)
def test_settings_of_peft_beside_lora(text, tmp_path, setting):
    more = {
        "lora_bias": {"lora_bias": True},
        "modules_to_save": {"modules_to_save": ["fc2"]},
        "exclude": {"exclude_modules": r".*layers\.0.*"},
        "transform": {"layers_to_transform": [1]},
        "all-linear": {},
    }[setting]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], **more)
    model = peft.get_peft_model(tower(text, False), config)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            value.data = 0.2 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(tmp_path / "theirs")
    expected = model.merge_and_unload().state_dict()
    if setting == "all-linear":  # as a file has it that was saved before a network was there
        place = tmp_path / "theirs" / "adapter_config.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"target_modules": setting}))
    state = folders.read_peft(tmp_path / "theirs", text)
    # The file of the weights stands for its folder, whose settings have the scale.
    found, notes = adapter_io.read(
        tmp_path / "theirs" / "adapter_model.safetensors", adapter_io.Networks()
    )
    assert found["text_encoder"].config == folders.read_peft(tmp_path / "theirs").config
    assert notes == []
    folders.write_peft(tmp_path / "ours", state, model=text)
    second = peft.PeftModel.from_pretrained(
        tower(text, False), tmp_path / "ours", key_mapping=TO_NEW
    )
    ours = to_file(inject.merge(attach(text, state)))
    for key, value in second.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(value, expected[key], atol=2e-6, err_msg=key)
        own = f"text_model.{key.removeprefix('text_model.')}"
        np.testing.assert_allclose(ours[own], value, atol=2e-6, err_msg=key)
    if setting in ("lora_bias", "modules_to_save"):
        end = ".diff_b" if setting == "lora_bias" else "fc2.kernel"
        assert any(name.endswith(end) for name in state.arrays)
