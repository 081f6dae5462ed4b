"""Files of motion modules and of LoRA on them, both ways, and what is refused."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.inject import with_attributes
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.cli import main as cli
from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.motion import MotionConfig, MotionModules
from jaxsynth.models.diffusion.unet import UNet2DConditionConfig
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.adapters.motion import (
    read_motion,
    with_motion_lora,
    write_motion,
    write_motion_lora,
)
from jaxsynth.weights.layout import to_file
from tests.adapters.nets import randomised
from tests.methods.small_base import DEEPER, random_network

BASE = UNet2DConditionConfig.from_dict(DEEPER)
# Of eight heads and the base's groups, as a file by itself is read.
CONFIG = MotionConfig((8, 16), 1, 8, 4)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FIRST = "down_blocks.0.motion_modules.0.temporal_transformer"


@pytest.fixture(scope="module")
def modules():
    return random_network(MotionModules, CONFIG, 1)


def same(a: MotionModules, b: MotionModules) -> None:
    assert a.config == b.config
    found, expected = to_file(a), to_file(b)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_folder_is_that_of_diffusers(modules, tmp_path):
    write_motion(tmp_path / "motion", modules)
    same(read_motion(tmp_path / "motion", BASE), modules)
    theirs = diffusers.MotionAdapter.from_pretrained(tmp_path / "motion")
    assert theirs.config.motion_num_attention_heads == 8
    theirs.save_pretrained(tmp_path / "theirs")
    ours, other = (load_file(tmp_path / name / WEIGHTS) for name in ("motion", "theirs"))
    assert ours.keys() == other.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, other[name], atol=1e-6)
    same(read_motion(tmp_path / "theirs"), modules)


@pytest.mark.parametrize("name", ["mm.safetensors", "mm.ckpt"])
def test_a_file_is_the_authors(modules, tmp_path, name):
    """Also as a training of theirs keeps it; diffusers converts it to the same."""
    file = write_motion(tmp_path / name, modules, "comfyui")
    same(read_motion(file, BASE), modules)
    if name.endswith("ckpt"):
        tensors = torch.load(file, weights_only=True)
        torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, file)
        same(read_motion(file, BASE), modules)
        return
    tensors = load_file(file)
    assert f"{FIRST}.transformer_blocks.0.attention_blocks.1.pos_encoder.pe" in tensors
    assert f"{FIRST}.transformer_blocks.0.ff_norm.weight" in tensors
    converted = convert_animatediff_checkpoint_to_diffusers(tensors)
    expected = to_file(modules)
    assert converted.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(converted[key], value)


def test_the_command_converts_both_ways(modules, tmp_path, deeper_folder, capfd):
    wide = random_network(MotionModules, MotionConfig((32, 64), 1, 8, 32, 24, False), 1)
    folder = write_motion(tmp_path / "motion", wide)
    file, again = tmp_path / "mm.ckpt", tmp_path / "again"
    assert cli.main(["convert", str(folder), str(file), "--to=comfyui"]) == 0
    assert cli.main(["convert", str(file), str(again), "--to=diffusers"]) == 0
    assert f"motion modules v1 to {again}" in capfd.readouterr().out
    same(read_motion(again), wide)
    write_motion(tmp_path / "narrow.ckpt", modules, "comfyui")
    argv = ["convert", str(tmp_path / "narrow.ckpt"), str(tmp_path / "narrow"), "--to=diffusers"]
    assert cli.main(argv) == 1
    assert "norm_num_groups: 32 does not divide 8" in capfd.readouterr().err
    assert cli.main([*argv, f"--base={deeper_folder}"]) == 0
    same(read_motion(tmp_path / "narrow"), modules)
    assert cli.main(["convert", str(folder), str(tmp_path / "x"), "--to=kohya"]) == 1
    assert "--to=kohya does not apply, only diffusers, comfyui" in capfd.readouterr().err


def lora_of(modules: MotionModules, authors: bool, seed: int = 2) -> dict[str, np.ndarray]:
    """Factors of rank 2 for every attention, in the authors' names or diffusers'."""
    rng, found = np.random.default_rng(seed), {}
    for key, weight in to_file(modules).items():
        layer = key.removesuffix(".weight")
        if not layer.endswith(("to_q", "to_k", "to_v", "to_out.0")) or weight.ndim != 2:
            continue
        if authors:
            block, _, name = layer.rpartition(".to_")
            block = block.replace(".transformer_blocks", ".temporal_transformer.transformer_blocks")
            block = block.replace(".attn1", ".attention_blocks.0")
            block = block.replace(".attn2", ".attention_blocks.1")
            ends = f"{block}.processor.to_{name.removesuffix('.0')}_lora."
        else:
            ends = f"unet.{layer}.lora."
        rows, columns = weight.shape
        found[f"{ends}down.weight"] = rng.standard_normal((2, columns)).astype("f4")
        found[f"{ends}up.weight"] = rng.standard_normal((rows, 2)).astype("f4")
    return found


def test_motion_lora_of_both_names(modules, tmp_path):
    """W + strength * up @ down, as diffusers loads it, and nothing else changes."""
    for name, authors in (("theirs", False), ("authors", True)):
        save_file(lora_of(modules, authors), tmp_path / f"{name}.safetensors")
    found = to_file(with_motion_lora(modules, tmp_path / "theirs.safetensors"))
    half = to_file(with_motion_lora(modules, tmp_path / "authors.safetensors", 0.5))
    adapter = diffusers.MotionAdapter.from_pretrained(write_motion(tmp_path / "motion", modules))
    base = diffusers.UNet2DConditionModel(**DEEPER)
    unet = diffusers.UNetMotionModel.from_unet2d(base, adapter)
    lora = {key: torch.from_numpy(x) for key, x in lora_of(modules, False).items()}
    unet.load_lora_adapter(lora, prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    expected = {key: value.numpy() for key, value in unet.state_dict().items()}
    changed = 0
    for key, weight in to_file(modules).items():
        np.testing.assert_allclose(found[key], expected[key], atol=1e-5)
        np.testing.assert_allclose(half[key], (weight + expected[key]) / 2, atol=1e-5)
        changed += not np.array_equal(found[key], weight)
    assert changed == len(lora_of(modules, False)) // 2


def test_what_is_refused(modules, tmp_path):
    """In one line that says which file, and what it is."""
    third = random_network(MotionModules, MotionConfig((8, 16), 1, 8, 4, 32, False), 1)
    sdxl = random_network(MotionModules, MotionConfig((8, 16, 16), 1, 8, 4), 1)
    for name, each in (("v2", modules), ("sdxl", sdxl)):
        write_motion(tmp_path / name, each)
    write_motion(tmp_path / "sdxl.ckpt", sdxl, "comfyui")
    save_file(lora_of(modules, True), tmp_path / "lora.safetensors")
    unet = {"down_blocks.0.resnets.0.conv1.weight": np.zeros((8, 8, 3, 3), "f4")}
    save_file(unet, tmp_path / "unet.safetensors")
    base_lora = {
        f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.{end}.weight": x
        for end, x in (("down", np.zeros((2, 8), "f4")), ("up", np.zeros((8, 2), "f4")))
    }
    save_file(base_lora, tmp_path / "style.safetensors")
    mixed = load_file(tmp_path / "v2" / WEIGHTS)
    save_file(mixed | unet, tmp_path / "mixed.safetensors")
    place = "down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"
    moved = {**mixed, place: mixed[place][:, ::-1].copy()}
    save_file(moved, tmp_path / "moved.safetensors")
    save_file(
        {k: x for k, x in mixed.items() if ".1.proj_in" not in k}, tmp_path / "cut.safetensors"
    )
    for name, changed in (
        ("as-v2", {"use_motion_mid_block": True}),
        ("as-v1", {"motion_max_seq_length": 24}),
    ):
        file = write_motion(tmp_path / name, third) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    (tmp_path / "unet").mkdir()
    save_file(mixed, tmp_path / "unet" / WEIGHTS)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for name, message in {
        "as-v2": r"config.json: is of motion modules v2 \(use_motion_mid_block True\), and the "
        r"weights are of v3 \(False\)",
        "as-v1": r"config.json: is of motion modules v1 \(motion_max_seq_length 24\), and the "
        r"weights are of v3 \(32\)",
        "sdxl": "modules SDXL beta for a base whose block_out_channels",
        "sdxl.ckpt": "modules SDXL beta for a base whose block_out_channels",
        "lora.safetensors": "is a LoRA .*, expected motion modules; .*--motion-lora=FILE",
        "style.safetensors": "is an adapter .*, expected motion modules of AnimateDiff",
        "unet.safetensors": "holds the weights of a network .*, expected motion modules",
        "mixed.safetensors": "resnets.0.conv1.weight' is of no motion module",
        "moved.safetensors": "pos_embed.pe: positions of another kind",
        "cut.safetensors": "proj_in.bias' missing",
        "unet": "_class_name 'UNet2DConditionModel', expected 'MotionAdapter'",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            read_motion(tmp_path / name, BASE)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    for given, name, message in (
        (third, "lora", "a LoRA of motion modules v2, which have a middle block, .* are v3"),
        (
            sdxl,
            "lora",
            "a LoRA of motion modules of another base",
        ),
        (modules, "style", "is a LoRA of other layers .* given by --adapter=FILE"),
        (modules, "unet", "holds the weights of a network .*, expected a LoRA of motion"),
    ):
        with pytest.raises(UserError, match=message):
            with_motion_lora(given, tmp_path / f"{name}.safetensors")
    few = with_attributes(modules, config=MotionConfig((8, 16), 1, 2, 4))
    with pytest.raises(UserError, match="modules of 2 heads, and a file without a config"):
        write_motion(tmp_path / "few.ckpt", few, "comfyui")


def test_a_written_motion_lora_is_read_again_in_both_names(modules, tmp_path):
    """Its scale is in the factors; diffusers' file gives diffusers' own weights, too."""
    config = LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
    adapted = registry.add(modules, config, rngs=jax.random.key(0))
    state = randomised(inject.extract(adapted), 1)
    expected = to_file(inject.merge(registry.attach(modules, state)))
    folder = tmp_path / "lora"
    own = write_motion_lora(folder / "pytorch_lora_weights.safetensors", state)
    other = write_motion_lora(tmp_path / "zoom.safetensors", state, "comfyui")
    first = f"{FIRST}.transformer_blocks.0.attention_blocks.0.processor."
    assert {f"{first}to_q_lora.up.weight", f"{first}to_out_lora.down.weight"} <= set(
        load_file(other)
    )
    for file in (own, other, folder):
        found = to_file(with_motion_lora(modules, file))
        for key, weight in expected.items():
            np.testing.assert_allclose(found[key], weight, atol=1e-6, err_msg=key)
    unet = diffusers.UNetMotionModel.from_unet2d(
        diffusers.UNet2DConditionModel(**DEEPER),
        diffusers.MotionAdapter.from_pretrained(write_motion(tmp_path / "motion", modules)),
    )
    lora = {key: torch.from_numpy(x) for key, x in load_file(own).items()}
    unet.load_lora_adapter(lora, prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    theirs = unet.state_dict()
    for key, weight in expected.items():
        np.testing.assert_allclose(theirs[key].numpy(), weight, atol=1e-5, err_msg=key)
    with pytest.raises(UserError, match=r"expected a file ending in \.safetensors"):
        write_motion_lora(tmp_path / "zoom.ckpt", state)


def test_a_domain_adapter_is_read_as_trainings_keep_it(tmp_path):
    """A LoRA of the base below "state_dict", with how it was made beside or among the tensors."""
    place = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    factors = {
        f"{place}.{name}_lora.{end}.weight": x
        for name in ("to_q", "to_out")
        for end, x in (("down", torch.randn(2, 8)), ("up", torch.randn(8, 2)))
    }
    plain, kept = tmp_path / "plain.ckpt", tmp_path / "kept.ckpt"
    torch.save(factors, plain)
    expected = adapter_io.load(plain)
    wrapped = {f"module.{key}": value for key, value in factors.items()}
    for content in (
        {"state_dict": factors},
        {"state_dict": wrapped, "global_step": 3, "animatediff_config": {"rank": 2}},
        {"state_dict": factors | {"animatediff_config": {"rank": 2}}},
    ):
        torch.save(content, kept)
        found = adapter_io.load(kept)
        assert found.arrays.keys() == expected.arrays.keys() and len(found.arrays) == 4
        for path, value in expected.arrays.items():
            np.testing.assert_array_equal(found.arrays[path], value)
