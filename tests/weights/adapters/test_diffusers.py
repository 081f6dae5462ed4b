"""Adapter files against peft and diffusers, both ways, and what the readers refuse."""

import json
from dataclasses import replace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from flax import nnx
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.adapters.registry import attach
from jaxsynth.core.errors import UserError
from jaxsynth.models.clip import CLIPTextConfig, CLIPTextModel
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.weights.adapters import diffusers as adapters
from jaxsynth.weights.adapters import peft as folders
from tests.adapters.nets import CONFIG, Net, TorchNet, randomised
from tests.models.torch_parity import copy_weights, nchw, nhwc, randomise, relative_error

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "eos_token_id": 49,
}
# alpha != rank, attention and other modules, linear layers and convolutions.
UNET_LORA = LoRAConfig(
    rank=3,
    alpha=5,
    targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"),
    rank_pattern={"conv1": 2},
    alpha_pattern={r"attn2\.to_k": 7},
)
TEXT_LORA = LoRAConfig(rank=2, alpha=3, targets=("q_proj", "out_proj", "fc1"), use_rslora=True)
SAMPLE = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
CONTEXT = jax.random.normal(jax.random.key(2), (2, 12, 24))
STEPS = jnp.array([3, 700])
IDS = jnp.array([[48, 3, 7, 9, 11, 5, 2, 1, 8, 4, 6, 49]])


def torch_unet():
    return randomise(diffusers.UNet2DConditionModel(**UNET))


def torch_text():
    config = transformers.CLIPTextConfig(**TEXT, bos_token_id=48, pad_token_id=49)
    return randomise(transformers.CLIPTextModel(config))


def pipeline():
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=torch_text(),
        tokenizer=None,
        unet=torch_unet(),
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def unet():
    config = UNet2DConditionConfig.from_dict(UNET)
    model = nnx.eval_shape(lambda: UNet2DCondition(config, rngs=nnx.Rngs(0)))
    copy_weights(torch_unet(), model)
    return model


@pytest.fixture(scope="module")
def text_encoder():
    model = nnx.eval_shape(lambda: CLIPTextModel(CLIPTextConfig(**TEXT), rngs=nnx.Rngs(0)))
    source = torch_text()
    if not hasattr(source, "text_model"):
        # transformers >= 5.6 leaves out this level of the checkpoint's names.
        tower, source = source, torch.nn.Module()
        source.text_model = tower
    copy_weights(source, model)
    return model


@pytest.fixture(scope="module")
def states(unet, text_encoder):
    """Random LoRA states of both networks."""
    return {
        "unet": random_state(unet, UNET_LORA),
        "text_encoder": random_state(text_encoder, TEXT_LORA),
    }


def random_state(model, config, seed=4):
    return randomised(inject.extract(add_lora(model, config, rngs=nnx.Rngs(0))), seed)


@nnx.jit
def run_unet(model):
    return model(SAMPLE, STEPS, CONTEXT)


@nnx.jit
def run_text(model):
    return model(IDS).last_hidden_state


def torch_run_unet(model):
    with torch.no_grad():
        steps, context = torch.tensor(np.array(STEPS)), torch.tensor(np.array(CONTEXT))
        return nhwc(model(nchw(SAMPLE), steps, context).sample)


def torch_run_text(model):
    with torch.no_grad():
        return model(torch.tensor(np.array(IDS))).last_hidden_state


def assert_same(found: inject.AdapterState, expected: inject.AdapterState):
    assert found.arrays.keys() == expected.arrays.keys()
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)


def randomise_lora(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


def peft_config(config: LoRAConfig, **changes) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{
            "r": config.rank,
            "lora_alpha": config.alpha,
            "target_modules": list(config.targets),
            "use_rslora": config.use_rslora,
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": dict(config.alpha_pattern),
            **changes,
        }
    )


ATTENTION = {"unet": ("to_q", "to_k", "to_v", "to_out.0"), "text_encoder": ("q_proj", "out_proj")}
OTHER = {"unet": ("ff.net.2", "conv2"), "text_encoder": ("fc1", "fc2")}


@pytest.mark.heavy
@pytest.mark.parametrize("targets", [None, ATTENTION, OTHER], ids=["both", "attention", "other"])
def test_diffusers_loads_ours(unet, text_encoder, tmp_path, targets):
    configs = {"unet": UNET_LORA, "text_encoder": TEXT_LORA}
    if targets is not None:
        configs = {
            name: replace(config, targets=targets[name], rank_pattern={}, alpha_pattern={})
            for name, config in configs.items()
        }
    states = {
        "unet": random_state(unet, configs["unet"]),
        "text_encoder": random_state(text_encoder, configs["text_encoder"]),
    }
    adapters.write_diffusers(tmp_path, states)
    pipe = pipeline()
    plain = torch_run_unet(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    found = run_unet(attach(unet, states["unet"]))
    assert relative_error(found, plain) > 0.05
    assert relative_error(found, torch_run_unet(pipe.unet)) < 1e-4
    found = run_text(attach(text_encoder, states["text_encoder"]))
    assert relative_error(found, torch_run_text(pipe.text_encoder)) < 1e-4


@pytest.mark.parametrize("with_metadata", [True, False])
def test_we_load_diffusers(unet, text_encoder, tmp_path, with_metadata):
    pipe = pipeline()
    # Without metadata readers can only assume alpha = rank and no rsLoRA.
    kinds = {"unet": UNET_LORA, "text_encoder": TEXT_LORA}
    for name, config in kinds.items():
        changes = {} if with_metadata else {"use_rslora": False, "alpha_pattern": {}}
        if not with_metadata:
            changes |= {"lora_alpha": config.rank, "alpha_pattern": dict(config.rank_pattern)}
        getattr(pipe, name).add_adapter(peft_config(config, **changes))
        randomise_lora(getattr(pipe, name))
    layers = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(
            get_peft_model_state_dict(getattr(pipe, name))
        )
        for name in kinds
    }
    metadata = _collate_lora_metadata({name: getattr(pipe, name) for name in kinds})
    pipe.save_lora_weights(tmp_path, **layers, **(metadata if with_metadata else {}))

    found = adapters.read_diffusers(tmp_path)
    assert set(found) == {"unet", "text_encoder"}
    if with_metadata:
        assert found["unet"].config.rank_pattern == UNET_LORA.rank_pattern
        assert set(found["unet"].config.targets) == set(UNET_LORA.targets)
    out = run_unet(attach(unet, found["unet"]))
    assert relative_error(out, torch_run_unet(pipe.unet)) < 1e-4
    out = run_text(attach(text_encoder, found["text_encoder"]))
    assert relative_error(out, torch_run_text(pipe.text_encoder)) < 1e-4

    # The same text encoder names as theirs, but for "text_model.", which transformers dropped.
    theirs = set(load_file(tmp_path / adapters.DIFFUSERS_WEIGHTS))
    adapters.write_diffusers(tmp_path / "again.safetensors", found)
    ours = set(load_file(tmp_path / "again.safetensors"))
    assert len(ours) == len(theirs)
    assert all(k.startswith("text_encoder.text_model.") for k in ours if k.startswith("text"))
    assert {key.replace("text_model.", "") for key in ours if key.startswith("text")} == {
        key.replace("text_model.", "") for key in theirs if key.startswith("text")
    }


def test_attention_names_are_those_of_diffusers(unet, tmp_path):
    config = replace(UNET_LORA, targets=ATTENTION["unet"], rank_pattern={})
    adapters.write_diffusers(tmp_path, {"unet": random_state(unet, config)})
    torch_model = torch_unet()
    torch_model.add_adapter(peft_config(config))
    theirs = convert_state_dict_to_diffusers(get_peft_model_state_dict(torch_model))
    ours = load_file(tmp_path / adapters.DIFFUSERS_WEIGHTS)
    assert {key: value.shape for key, value in ours.items()} == {
        f"unet.{key}": tuple(value.shape) for key, value in theirs.items()
    }


def test_we_load_a_unet_saved_alone(unet, tmp_path):
    torch_model = torch_unet()
    torch_model.add_adapter(peft_config(UNET_LORA))
    randomise_lora(torch_model)
    torch_model.save_lora_adapter(tmp_path)
    found = adapters.read_diffusers(tmp_path)["unet"]
    out = run_unet(attach(unet, found))
    assert relative_error(out, torch_run_unet(torch_model)) < 1e-4


def test_diffusers_round_trip_and_bytes(states, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        adapters.write_diffusers(tmp_path / name, states)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    found = adapters.read_diffusers(tmp_path / "a.safetensors")
    for name, state in states.items():
        assert found[name].config == state.config
        assert_same(found[name], state)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = set(file.keys())
    assert fields["unet.lora_alpha"] == 5
    assert fields["text_encoder.use_rslora"] is True
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    assert f"{block}.attn1.to_out.0.lora_A.weight" in keys
    assert f"{block}.ff.net.0.proj.lora_A.weight" in keys
    layer = "text_encoder.text_model.encoder.layers.0"
    assert f"{layer}.self_attn.q_proj.lora_linear_layer.up.weight" in keys
    assert f"{layer}.mlp.fc1.lora_B.weight" in keys


def test_attention_processor_names(unet, tmp_path):
    state = random_state(unet, LoRAConfig(rank=3, targets=("attn1.to_q", "attn1.to_out.0")))
    adapters.write_diffusers(tmp_path, {"unet": state})
    tensors = load_file(tmp_path / adapters.DIFFUSERS_WEIGHTS)
    renamed = {
        key.replace(".to_q.lora.", ".processor.to_q_lora.").replace(
            ".to_out.0.lora.", ".processor.to_out_lora."
        ): value
        for key, value in tensors.items()
    }
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, tmp_path / "old.safetensors")
    found = adapters.read_diffusers(tmp_path / "old.safetensors")["unet"]
    assert_same(found, state)
    assert_same(inject.extract(attach(unet, found)), state)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [CONFIG.targets, ("down", r"blocks\.\d", "mix")])
def test_peft_loads_ours(tmp_path, use_rslora, targets):
    plain = randomise(TorchNet())
    model = Net(rngs=nnx.Rngs(0))
    copy_weights(plain, model)
    config = replace(CONFIG, use_rslora=use_rslora, targets=targets)
    state = random_state(model, config)
    folders.write_peft(tmp_path, state)
    adapted = attach(model, folders.read_peft(tmp_path))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    with torch.no_grad():
        before = plain(nchw(images)).clone()
        wrapped = peft.PeftModel.from_pretrained(plain, tmp_path)
        expected = wrapped(nchw(images))
    assert relative_error(adapted(images), before) > 0.05
    assert relative_error(adapted(images), expected) < 1e-5

    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / folders.PEFT_WEIGHTS)
    ours = load_file(tmp_path / folders.PEFT_WEIGHTS)
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("targets", [list(CONFIG.targets), r"down|mix|blocks\.[01]"])
def test_we_load_peft(tmp_path, targets):
    plain = randomise(TorchNet())
    model = Net(rngs=nnx.Rngs(0))
    copy_weights(plain, model)
    config = peft_config(CONFIG, target_modules=targets, init_lora_weights="gaussian")
    wrapped = randomise_lora(peft.get_peft_model(plain, config)).eval()
    wrapped.save_pretrained(tmp_path)
    state = folders.read_peft(tmp_path)
    assert state.config.init == "gaussian"
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    with torch.no_grad():
        expected = wrapped(nchw(images))
    assert relative_error(attach(model, state)(images), expected) < 1e-5


def test_dora_both_ways_with_peft(tmp_path):
    config = replace(CONFIG, decompose="output")
    plain = randomise(TorchNet())
    model = Net(rngs=nnx.Rngs(0))
    copy_weights(plain, model)
    adapted = add_lora(model, config, rngs=nnx.Rngs(0))
    state = randomised(inject.extract(adapted), 2)
    folders.write_peft(tmp_path / "ours", state)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    with torch.no_grad():
        expected = wrapped(nchw(images)).numpy()
    np.testing.assert_allclose(attach(model, state)(images), expected, atol=1e-5)
    wrapped.save_pretrained(tmp_path / "theirs")
    assert_same(folders.read_peft(tmp_path / "theirs"), state)
    theirs = load_file(tmp_path / "theirs" / folders.PEFT_WEIGHTS)
    ours = load_file(tmp_path / "ours" / folders.PEFT_WEIGHTS)
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.heavy
def test_diffusers_loads_our_dora(unet, tmp_path):
    config = replace(UNET_LORA, decompose="output")
    state = random_state(unet, config)
    adapters.write_diffusers(tmp_path, {"unet": state})
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path)
    found = run_unet(attach(unet, state))
    assert relative_error(found, torch_run_unet(pipe.unet)) < 1e-4
    assert_same(adapters.read_diffusers(tmp_path)["unet"], state)


@pytest.fixture
def saved(tmp_path):
    """A model, its state, and a peft folder with it."""
    model = Net(rngs=nnx.Rngs(0))
    state = random_state(model, CONFIG)
    folders.write_peft(tmp_path, state)
    return model, state, tmp_path


def edit(folder, *, fields=None, tensors=None, drop=()):
    """Change a peft folder's configuration or tensors."""
    path = folder / folders.PEFT_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **(fields or {})}))
    path = folder / folders.PEFT_WEIGHTS
    kept = {key: value for key, value in load_file(path).items() if key not in drop}
    save_file({**kept, **(tensors or {})}, path)


def test_peft_round_trip_and_bytes(saved, tmp_path):
    _, state, folder = saved
    found = folders.read_peft(folder)
    assert found.config == state.config
    assert_same(found, state)
    folders.write_peft(tmp_path / "based", found, base_model="somewhere/base")
    fields = json.loads((tmp_path / "based" / folders.PEFT_CONFIG).read_text())
    assert fields["base_model_name_or_path"] == "somewhere/base"
    folders.write_peft(tmp_path / "again", found)
    for name in (folders.PEFT_CONFIG, folders.PEFT_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_half_precision_files(saved):
    _, state, folder = saved
    tensors = load_file(folder / folders.PEFT_WEIGHTS)
    edit(folder, tensors={key: value.astype(np.float16) for key, value in tensors.items()})
    for name, value in folders.read_peft(folder).arrays.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, state.arrays[name], atol=1e-3)


_MIX = "base_model.model.mix"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {"peft_type": "LOHA"}}, r"blocks.0.lora_A.weight is none of a LOHA adapter"),
        ({"fields": {"use_dora": True}}, "blocks.0 has no magnitude vector, expected one"),
        ({"fields": {"bias": "all"}}, "bias is 'all', and the weights hold 0 biases"),
        (
            {"fields": {"modules_to_save": ["mix"]}},
            r"modules_to_save is .* hold no tensor",
        ),
        ({"fields": {"init_lora_weights": "pissa"}}, "init_lora_weights is 'pissa'"),
        ({"fields": {"target_modules": None}}, "target_modules is None"),
        ({"fields": {"target_modules": ["down"]}}, "blocks.0 is not among the targets"),
        (
            {"fields": {"target_modules": ["down" * 999]}},
            r"blocks.0 is not among the targets \['(down){20}'\.\.\.\]$",
        ),
        ({"fields": {"r": 5}}, r"blocks.0 has factors of shapes \(3, 8\) .* expected \(5, in\)"),
        ({"fields": {"r": 0}}, "r is 0, expected at least 1"),
        ({"drop": [f"{_MIX}.lora_B.weight"]}, "mix has no lora_B"),
        ({"tensors": {"mix.lora_A.weight": np.ones(2)}}, "key mix.lora_A.weight does not start"),
        ({"tensors": {f"{_MIX}.lora_C.weight": np.ones(2)}}, f"unknown key {_MIX}.lora_C"),
        ({"tensors": {f"{_MIX}.hada_w1_a": np.ones(2)}}, f"{_MIX}.hada_w1_a is of a LoHa"),
        ({"tensors": {f"{_MIX}.lokr_w1": np.ones(2)}}, f"{_MIX}.lokr_w1 is of a LoKr"),
        ({"tensors": {f"{_MIX}.lora_magnitude_vector": np.ones(2)}}, "mix has a magnitude vector"),
        ({"tensors": {"lora_unet_x.lora_down.weight": np.ones(2)}}, "is of a kohya-format"),
    ],
)
def test_peft_folders_that_are_refused(saved, change, message):
    _, _, folder = saved
    edit(folder, **change)
    with pytest.raises(UserError, match=message):
        folders.read_peft(folder)


def test_files_that_are_missing_or_broken(saved, tmp_path):
    _, _, folder = saved
    with pytest.raises(UserError, match=r"no adapter_config\.json; expected a peft adapter folder"):
        folders.read_peft(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such file; expected a diffusers LoRA file"):
        adapters.read_diffusers(tmp_path / "nowhere.safetensors")
    weights = folder / folders.PEFT_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=folders.PEFT_WEIGHTS):
        folders.read_peft(folder)


def test_diffusers_files_that_are_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    pair = {"lora_A": np.ones((2, 4), np.float32), "lora_B": np.ones((4, 2), np.float32)}
    good = {f"unet.a.{name}.weight": value for name, value in pair.items()}
    for extra, message in (
        ({"vae.a.lora_A.weight": pair["lora_A"]}, "vae.a.lora_A.weight starts with none"),
        ({"unet.a.lora.down.weight": pair["lora_A"]}, "a.lora_A a second time"),
        ({"unet.a.alpha": np.ones(1)}, "unknown key unet.a.alpha"),
        ({"unet.a.lokr_w2": np.ones(1)}, "unet.a.lokr_w2 is of a LoKr adapter"),
        ({"unet.b.lora_B.weight": pair["lora_B"]}, "b has no lora_A"),
    ):
        save_file({**good, **extra}, path)
        with pytest.raises(UserError, match=message):
            adapters.read_diffusers(path)
    save_file(good, path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="lora_adapter_metadata: not valid JSON"):
        adapters.read_diffusers(path)


def test_writers_refuse_what_readers_would(saved, tmp_path):
    _, state, _ = saved
    target = tmp_path / "refused"
    with pytest.raises(ValueError, match=r"\(2, 3, 8\): .*unstack"):
        folders.write_peft(target, inject.stack([state, state]))
    with pytest.raises(TypeError, match="found NoneType"):
        folders.write_peft(target, inject.AdapterState(state.arrays))
    with pytest.raises(UserError, match=r"expected \(4, in\)"):
        folders.write_peft(target, inject.AdapterState(state.arrays, replace(CONFIG, rank=4)))
    with pytest.raises(ValueError, match="component 'vae'"):
        adapters.write_diffusers(target, {"vae": state})
    assert not list(target.glob("*"))


def test_attach_refuses_another_network(saved):
    _, state, _ = saved
    with pytest.raises(UserError, match=r"does not fit.*\['blocks.0', .*match no layer"):
        attach(nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), state)
    wider = Net(rngs=nnx.Rngs(0))
    wider.mix = nnx.Conv(8, 9, (1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"mix.lora_B has shape \(1, 1, 2, 8\), expected"):
        attach(wider, state)
    arrays = {k: v for k, v in state.arrays.items() if not k.startswith("mix.")}
    with pytest.raises(UserError, match=r"missing keys \['mix.lora_A', 'mix.lora_B'\]"):
        attach(Net(rngs=nnx.Rngs(0)), inject.AdapterState(arrays, CONFIG))
    with pytest.raises(UserError, match=r"unknown keys \['blocks"):
        attach(wider, inject.AdapterState(arrays))
