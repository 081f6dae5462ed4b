"""Adapter files as tools leave them: per-layer settings, spellings, number types, and strangers.

Every row is a file made by hand, and what it must do to the base's weights, computed in NumPy.
"""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from jaxsynth.adapters import inject
from jaxsynth.adapters.registry import attach
from jaxsynth.core.errors import UserError
from jaxsynth.models.clip import CLIPTextConfig, CLIPTextModel
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.weights.adapters import io
from jaxsynth.weights.adapters.components import join_networks
from jaxsynth.weights.adapters.embeddings import embedding_file
from jaxsynth.weights.adapters.native import write_state
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.models import describe

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
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 6, "eos_token_id": 19,
}  # fmt: skip
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Q, OUT, FF = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj"
IN, CONV = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1"
NORM, LAYER_NORM = "down_blocks.0.resnets.0.norm1", f"{BLOCK}.norm1"
ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
TEXT_Q = "text_model.encoder.layers.1.self_attn.q_proj"
RNG = np.random.default_rng(0)
PEFT = {"ends": ("lora_A", "lora_B"), "alpha": None}
OLD = {"ends": ("down", "up"), "alpha": None}


def random(*shape):
    return RNG.standard_normal(shape).astype("f4") / 4


def filled(plain):
    graphdef, state = nnx.split(plain)
    values = jax.tree.map(lambda x: jax.numpy.asarray(random(*x.shape)), state)
    return nnx.merge(graphdef, values)


def make(**changes):
    config = UNet2DConditionConfig.from_dict(UNET | changes)
    text = describe(CLIPTextModel, CLIPTextConfig(**TEXT))
    return {"unet": filled(describe(UNet2DCondition, config)), "text_encoder": filled(text)}


@pytest.fixture(scope="module")
def bases():
    """The networks with proj_in as a convolution and as a linear layer, and their weights."""
    both = [make(), make(use_linear_projection=True)]
    return [(one, {n: to_file(model) for n, model in one.items()}) for one in both]


def flat(path, prefix="lora_unet_"):
    return prefix + path.replace(".", "_")


def lora(name, c_in, c_out, *, rank=2, alpha=1.0, window=(), ends=("lora_down", "lora_up")):
    """The tensors of a LoRA and its change of a weight."""
    down, up = random(rank, c_in, *window), random(c_out, rank, *(1,) * len(window))
    tensors = {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
    if alpha is not None:
        tensors[f"{name}.alpha"] = np.asarray(alpha, "f4")
    change = np.einsum("or,ri...->oi...", up.reshape(c_out, rank), down)
    return tensors, (rank if alpha is None else alpha) / rank * change


def joined(*rows):
    """One file of several layers' (tensors, {weight: change})."""
    tensors, changes = {}, {}
    for own, change in rows:
        tensors |= own
        changes |= change
    return tensors, changes


def lora_at(path, c_in, c_out, name=None, **more):
    own, change = lora(flat(path) if name is None else name, c_in, c_out, **more)
    return own, {f"{path}.weight": change}


def lokr(path, first, second, alpha=1.0):
    name, (w1, w2) = flat(path, "lycoris_"), (random(*first), random(*second))
    tensors = {
        f"{name}.lokr_w1": w1,
        f"{name}.lokr_w2": w2,
        f"{name}.alpha": np.asarray(alpha, "f4"),
    }
    w1 = w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2))
    return tensors, {f"{path}.weight": np.kron(w1, w2)}


def lokr_low(path, first, second, rank=1, alpha=3.0):
    """w2 (a, b) in two factors of this rank."""
    name, w1 = flat(path, "lycoris_"), random(*first)
    up, down = random(second[0], rank), random(rank, second[1])
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": up, f"{name}.lokr_w2_b": down}
    tensors[f"{name}.alpha"] = np.asarray(alpha, "f4")
    return tensors, {f"{path}.weight": alpha / rank * np.kron(w1, up @ down)}


def difference(path, ends, **shapes):
    tensors, changes = {}, {}
    for (parameter, shape), end in zip(shapes.items(), ends, strict=True):
        value = random(*shape)
        tensors[f"{flat(path)}.{end}"] = value
        changes[f"{path}.{parameter}"] = value
    return tensors, changes


def tucker(path, c_in, c_out, rank=2):
    down, mid, up = random(rank, c_in, 1, 1), random(rank, rank, 3, 3), random(c_out, rank, 1, 1)
    name = flat(path)
    tensors = {
        f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up, f"{name}.alpha": np.asarray(1, "f4"),
    }  # fmt: skip
    change = np.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    return tensors, {f"{path}.weight": change / rank}


def loha(path, c_in, c_out, rank=2):
    name = flat(path)
    own = {
        f"hada_w{i}_{end}": random(*shape)
        for i in (1, 2)
        for end, shape in (("a", (c_out, rank)), ("b", (rank, c_in)))
    }
    change = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    tensors = {f"{name}.{key}": value for key, value in own.items()}
    return tensors | {f"{name}.alpha": np.asarray(1, "f4")}, {f"{path}.weight": change / rank}


def reshaped(row, change):
    """The same numbers in the shapes that `change` makes of every factor's."""
    tensors, changes = row
    return {k: v.reshape(change(v.shape)) if v.ndim else v for k, v in tensors.items()}, changes


def ended(row, old, new):
    """The same with other ends of keys."""
    tensors, changes = row
    return {key.replace(old, new): value for key, value in tensors.items()}, changes


# What file, and on which of the bases: 0 has convolutions for proj_in, 1 linear layers.
FILES = {
    "lokr-factors-by-layer": (0, lambda: joined(
        lokr(Q, (4, 4), (4, 4)), lokr(OUT, (8, 8), (2, 2)), lokr_low(FF, (4, 2), (32, 8)),
        lokr(CONV, (2, 2), (8, 8, 3, 3)))),
    "norms-beside-lora": (0, lambda: joined(
        lora_at(CONV, 16, 16, window=(3, 3)),
        difference(NORM, ("w_norm", "b_norm"), weight=(16,), bias=(16,)),
        difference(LAYER_NORM, ("w_norm", "b_norm"), weight=(16,), bias=(16,)))),
    "full-with-and-without-biases": (0, lambda: joined(
        difference(Q, ("diff",), weight=(16, 16)),
        difference(OUT, ("diff", "diff_b"), weight=(16, 16), bias=(16,)),
        difference(CONV, ("diff", "diff_b"), weight=(16, 16, 3, 3), bias=(16,)),
        difference(FF, ("diff_b",), bias=(128,)))),
    "lora-with-bias-differences": (0, lambda: joined(
        lora_at(OUT, 16, 16), difference(OUT, ("diff_b",), bias=(16,)), lora_at(Q, 16, 16))),
    "four-kinds": (0, lambda: joined(
        lora_at(Q, 16, 16, rank=3, alpha=5.0), loha(OUT, 16, 16), lokr_low(FF, (4, 2), (32, 8)),
        difference(NORM, ("w_norm", "b_norm"), weight=(16,), bias=(16,)))),
    "tucker-on-one-of-two": (0, lambda: joined(
        tucker(CONV, 16, 16), lora_at(CONV.replace("conv1", "conv2"), 16, 16, window=(3, 3)),
        lora_at(Q, 16, 16))),
    "ranks-and-alphas-by-layer": (0, lambda: joined(
        lora_at(Q, 16, 16, rank=1, alpha=4.0), lora_at(OUT, 16, 16, rank=3, alpha=0.0),
        lora_at(FF, 16, 128, rank=3, alpha=-2.0),
        lora_at(CONV, 16, 16, window=(3, 3), alpha=None))),
    "onetrainer-original-names": (0, lambda: lora_at(Q, 16, 16, f"unet.{ORIGINAL}")),
    "onetrainer-diffusers-names": (0, lambda: lora_at(Q, 16, 16, f"unet.{Q}")),
    "kohya-original-names": (0, lambda: lora_at(Q, 16, 16, flat(ORIGINAL))),
    "comfyui-names": (0, lambda: lora_at(Q, 16, 16, f"diffusion_model.{ORIGINAL}")),
    "an-adapter-s-name": (0, lambda: ended(
        lora_at(Q, 16, 16, f"unet.{Q}", **PEFT), ".weight", ".default.weight")),
    "another-adapter-s-name": (0, lambda: ended(
        lora_at(Q, 16, 16, f"unet.{Q}", **PEFT), ".weight", ".my_style.weight")),
    "a-wrapped-model": (0, lambda: lora_at(Q, 16, 16, f"unet.base_model.model.{Q}", **PEFT)),
    "a-wrapped-model-alone": (0, lambda: lora_at(Q, 16, 16, f"base_model.model.{Q}", **PEFT)),
    "old-processors": (0, lambda: joined(
        lora_at(Q, 16, 16, f"unet.{BLOCK}.attn1.processor.to_q_lora", **OLD),
        lora_at(OUT, 16, 16, f"unet.{BLOCK}.attn1.processor.to_out_lora", **OLD))),
    "pointwise-factors-for-linear": (1, lambda: reshaped(
        joined(lora_at(IN, 16, 16), lora_at(Q, 16, 16)), lambda shape: (*shape, 1, 1))),
    "linear-factors-for-pointwise": (0, lambda: joined(
        lora_at(Q, 16, 16), pointwise(lora_at(IN, 16, 16)))),
    "pointwise-peft": (1, lambda: reshaped(
        lora_at(IN, 16, 16, f"unet.{IN}", **PEFT), lambda shape: (*shape, 1, 1))),
    "linear-peft-for-pointwise": (0, lambda: pointwise(
        lora_at(IN, 16, 16, f"unet.{IN}", **PEFT))),
    "flattened-windows": (0, lambda: reshaped(
        lora_at(CONV, 16, 16, window=(3, 3)), lambda shape: (shape[0], -1))),
    "bundled-embedding": (0, lambda: joined(
        lora_at(Q, 16, 16), ({"bundle_emb.cat.string_to_param.*": random(2, 24)}, {}))),
    "text-with-text-model": (0, lambda: lora_at(TEXT_Q, 8, 8, flat(TEXT_Q, "lora_te_"))),
    "text-without-text-model": (0, lambda: lora_at(
        TEXT_Q, 8, 8, flat(TEXT_Q.removeprefix("text_model."), "lora_te1_"))),
    "text-dotted": (0, lambda: lora_at(TEXT_Q, 8, 8, f"text_encoder.{TEXT_Q}")),
    "text-diffusers-without": (0, lambda: joined(
        lora_at(Q, 16, 16, f"unet.{Q}", **PEFT),
        lora_at(TEXT_Q, 8, 8, f"text_encoder.{TEXT_Q.removeprefix('text_model.')}", **PEFT))),
}  # fmt: skip


def pointwise(row):
    """Changes of a linear weight as those of a 1x1 convolution."""
    tensors, changes = row
    return tensors, {key: value[..., None, None] for key, value in changes.items()}


def check(source, base, changes, says=()):
    """The adapters of a file change these weights of the base so, and no others."""
    networks, weights = base
    states, notes = io.read(source, io.Networks(lambda: networks))
    found = {}
    for component, state in states.items():
        merged = to_file(inject.merge(attach(networks[component], state)))
        for key, value in weights[component].items():
            found[key] = merged[key] - value
    assert changes.keys() <= found.keys()
    for key, value in found.items():
        expected = changes.get(key, np.zeros(value.shape))
        np.testing.assert_allclose(value, expected, atol=2e-6, err_msg=key)
    for text in says:
        assert any(text in note for note in notes)
    return states


@pytest.mark.parametrize("name", FILES)
def test_a_file_changes_what_its_numbers_say(bases, tmp_path, name):
    number, build = FILES[name]
    tensors, changes = build()
    assert max(np.abs(change).max() for change in changes.values()) > 0.05
    path = tmp_path / "file.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    says = ("embeddings beside the adapter are left out: cat",) if "bundled" in name else ()
    states = check(path, bases[number], changes, says)
    # What was read is kept: in our own file, also where layers differ in kind.
    kept = tmp_path / "adapter.safetensors"
    write_state(kept, join_networks(states, mixed=True))
    check(kept, bases[number], changes)


def as_type(kind):
    if kind in ("F8_E4M3", "F8_E5M2"):
        return getattr(torch, {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[kind])
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[kind]


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "BF16", "F16", "F64"])
@pytest.mark.parametrize("spelling", [flat(Q), f"unet.{Q}"])
def test_numbers_of_any_float_type_are_read(bases, tmp_path, kind, spelling):
    more = PEFT if spelling.startswith("unet") else {}
    tensors, _ = lora(spelling, 16, 16, **more)
    stored = {key: torch.tensor(value).to(as_type(kind)) for key, value in tensors.items()}
    path = tmp_path / "file.safetensors"
    save_torch(stored, path)
    values = {key.split(".lora_")[-1]: value.float().numpy() for key, value in stored.items()}
    down, up = (x for key, x in sorted(values.items()) if "weight" in key)
    scale = 1.0 if more else 0.5
    check(path, bases[0], {f"{Q}.weight": scale * up @ down})


@pytest.mark.parametrize(
    "alpha",
    [
        np.ones(1, "f4"), np.ones((1, 1), "f2"), np.int64(1), np.ones(1, "i4"), np.uint8(1),
        np.float64(1), np.asarray(1, ml_dtypes.bfloat16),
    ],
    ids=lambda x: f"{np.asarray(x).dtype}{np.shape(x)}",
)  # fmt: skip
def test_an_alpha_is_one_number_of_any_type_and_shape(bases, tmp_path, alpha):
    tensors, changes = lora_at(Q, 16, 16)
    tensors[f"{flat(Q)}.alpha"] = np.asarray(alpha)
    save_file(tensors, tmp_path / "file.safetensors")
    check(tmp_path / "file.safetensors", bases[0], changes)


def test_pytorch_s_own_files_are_read(bases, tmp_path):
    tensors, changes = lora_at(Q, 16, 16, f"unet.{BLOCK}.attn1.processor.to_q_lora", **OLD)
    stored = {key: torch.tensor(value) for key, value in tensors.items()}
    torch.save(stored, tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        check(source, bases[0], changes)
    tensors, changes = lora_at(Q, 16, 16)
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "kohya.pt")
    check(tmp_path / "kohya.pt", bases[0], changes)
    for name in ("ema", "model", "state_dict"):
        inside = {name: {k: torch.tensor(v) for k, v in tensors.items()}, "global_step": 4}
        torch.save(inside, tmp_path / f"{name}.ckpt")
        assert embedding_file(tmp_path / f"{name}.ckpt") is None
        check(tmp_path / f"{name}.ckpt", bases[0], changes)
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors, changes = lora_at(Q, 16, 16, f"base_model.model.{Q}", **PEFT)
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, folder / "adapter_model.bin")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [Q]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    check(folder, bases[0], changes)


def strangers():
    q, _ = lora_at(Q, 16, 16)
    one = np.ones((2, 2), "f4")
    wide = {f"unet.{BLOCK}.attn2.to_k.lora_A.weight": np.ones((2, 96), "f4"),
            f"unet.{BLOCK}.attn2.to_k.lora_B.weight": np.ones((16, 2), "f4")}  # fmt: skip
    checkpoint = {f"model.diffusion_model.input_blocks.{i}.0.weight": one for i in range(5)}
    return {
        "checkpoint": (checkpoint, "is a checkpoint of whole networks in one file"),
        "checkpoint-and-one-lora": (checkpoint | q, "is a checkpoint of whole networks"),
        "embedding": ({"emb_params": one}, "is an embedding"),
        "embedding-by-word": ({"<cat>": one}, "is an embedding"),
        "network": ({f"{Q}.weight": one, f"{OUT}.bias": one}, "holds the weights of a network"),
        "nothing": ({}, "holds no tensors"),
        "sdxl": (
            {f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn1_to_q.{end}.weight": one
             for i in (1, 2) for end in ("lora_up", "lora_down")},
            "the file is of SDXL, and the base is not",
        ),
        "flux": (
            {f"lora_unet_double_blocks_{i}_img_attn_proj.lora_{end}.weight": one
             for i in (0, 1) for end in ("up", "down")},
            "the file is of FLUX, and the base is not",
        ),
        "sdxl-of-diffusers": (
            {f"unet.{Q.replace('blocks.0.attn', 'blocks.1.attn')}.lora_{end}.weight": one
             for end in "AB"},
            "the file is of SDXL, and the base is not",
        ),
        "flux-of-diffusers": (
            {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{end}.weight": one
             for end in "AB"},
            "of transformer, which the base lacks .the file is of FLUX",
        ),
        "whole-numbers": (
            {key: value.astype("i1") if value.ndim else value for key, value in q.items()},
            "lora_down.weight holds numbers of type I8, expected floats",
        ),
        "booleans": ({f"{flat(Q)}.lora_down.weight": one > 0}, "holds numbers of type BOOL"),
        "huge-alpha": (q | {f"{flat(Q)}.alpha": np.array(1e300)}, "too large for float32"),
        "no-axis": (
            q | {f"{flat(Q)}.lora_down.weight": np.array(1, "f4")},
            "lora_down.weight is a single number, expected a vector or a matrix",
        ),
        "two-alphas": (q | {f"{flat(Q)}.alpha": np.ones(2, "f4")}, r"alpha has shape \(2,\), exp"),
        "lokr-of-no-layer": (lokr(Q, (4, 4), (3, 4))[0], r"lokr_w1 \(4, 4\), lokr_w2 \(3, 4\), "
                             r"which make no kernel of the layer's shape \(16, 16\)"),
        "another-width": (wide, r"to_k.lora_A has shape \(2, 96\), and the base's layer takes "
                          r"\(2, 24\)"),
        "another-width-kohya": (
            lora_at(Q, 12, 16)[0], r"lora_down.weight has shape \(2, 12\), expected \(2, 16\)"),
        "no-such-layer": (
            {f"unet.{Q}s.{end}.weight": one for end in ("lora_A", "lora_B")}, "match no layer"),
        "bias-of-none": (
            difference(Q, ("diff", "diff_b"), weight=(16, 16), bias=(16,))[0],
            "diff_b is of a parameter that the layer .* has not"),
        "half-a-lora": ({f"{flat(Q)}.lora_up.weight": np.ones((16, 2), "f4")},
                        "to_q has no lora_down.weight"),
        "two-adapters": (
            {f"unet.{Q}.lora_A.{name}.weight": np.ones((2, 16), "f4") for name in ("a", "b")},
            "a second time"),
    }  # fmt: skip


@pytest.mark.parametrize("name", strangers())
def test_what_is_no_adapter_of_the_base_is_named(bases, tmp_path, name):
    tensors, message = strangers()[name]
    path = tmp_path / "file.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as error:
        io.read(path, io.Networks(lambda: bases[0][0]))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    if name == "flux":
        with pytest.raises(UserError, match="a LoRA of FLUX, whose layers a base tells: say which"):
            io.read(path, io.Networks())
