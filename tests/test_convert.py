"""`jaxsynth convert` through the command: both kinds of source, and what it refuses."""

import numpy as np
import pytest

from jaxsynth import cli
from jaxsynth.adapters.base import AdapterState
from jaxsynth.adapters.lora import LoRAConfig
from jaxsynth.data.store import Entry, StoreWriter
from jaxsynth.weights.adapters import read_diffusers, read_peft, write_peft


def adapter(*paths: str) -> AdapterState:
    rng = np.random.default_rng(len(paths[0]))
    arrays = {}
    for path in paths:
        arrays[f"{path}.lora_A"] = rng.normal(size=(6, 2)).astype(np.float32)
        arrays[f"{path}.lora_B"] = rng.normal(size=(2, 8)).astype(np.float32)
    targets = tuple({path.rsplit(".", 1)[-1] for path in paths})
    return AdapterState(arrays, LoRAConfig(rank=2, alpha=3.0, targets=targets))


UNET = adapter("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
TEXT = adapter("text_model.encoder.layers.0.self_attn.q_proj")


def same(a: AdapterState, b: AdapterState) -> None:
    assert a.arrays.keys() == b.arrays.keys() and a.config.alpha == b.config.alpha
    for name, value in a.arrays.items():
        np.testing.assert_array_equal(value, b.arrays[name])


def test_adapters_go_to_diffusers_and_back(tmp_path, capfd):
    write_peft(tmp_path / "in" / "unet", UNET)
    write_peft(tmp_path / "in" / "text_encoder", TEXT)
    lora, back = tmp_path / "lora", tmp_path / "back"
    assert cli.main(["convert", str(tmp_path / "in"), str(lora), "--to=diffusers"]) == 0
    assert "text_encoder (2 arrays), unet (2 arrays)" in capfd.readouterr().out
    states = read_diffusers(lora)
    same(states["unet"], UNET)
    same(states["text_encoder"], TEXT)
    assert cli.main(["convert", str(lora), str(back), "--to", "peft"]) == 0
    same(read_peft(back / "unet"), UNET)
    same(read_peft(back / "text_encoder"), TEXT)


@pytest.mark.parametrize(("state", "name"), [(UNET, "unet"), (TEXT, "text_encoder")])
def test_the_network_of_one_peft_folder_is_seen_from_its_layers(tmp_path, state, name):
    write_peft(tmp_path / "in", state)
    file = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "in"), str(file), "--to=diffusers"]) == 0
    same(read_diffusers(file)[name], state)
    assert cli.main(["convert", str(file), str(tmp_path / "back"), "--to=peft"]) == 0
    same(read_peft(tmp_path / "back"), state)


def test_an_image_store_becomes_an_image_folder(tmp_path, capfd):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    entries = [
        Entry(label=i % 2, class_name="cat/dog"[: 3 + 4 * (i % 2)], index=i) for i in (0, 1, 2)
    ]
    StoreWriter(tmp_path / "store", ["cat", "cat/dog"], 3).write_shard(0, list(images), entries)
    target = tmp_path / "folder"
    assert cli.main(["convert", str(tmp_path / "store"), str(target), "--to=imagefolder"]) == 0
    assert "3 images to" in capfd.readouterr().out
    assert len(list(target.glob("*/*.png"))) == 3
    assert cli.main(["convert", str(tmp_path / "store"), str(tmp_path / "x"), "--to=peft"]) == 1
    assert "is an image store: --to=peft does not apply" in capfd.readouterr().err


def test_refusals_name_what_is_wrong(tmp_path, capfd):
    write_peft(tmp_path / "in", UNET)
    for argv, message in [
        ((tmp_path / "gone", tmp_path / "x", "--to=peft"), "gone does not exist"),
        ((tmp_path / "in", tmp_path / "in", "--to=peft"), "in already exists"),
        ((tmp_path / "in", tmp_path / "x", "--to=kohia"), "--to=kohia: expected one of peft"),
        ((tmp_path / "in", tmp_path / "x", "--to=parquet"), "is an adapter: --to=parquet does"),
        ((tmp_path, tmp_path / "x", "--to=peft"), None),
    ]:
        code = cli.main(["convert", *map(str, argv)])
        err = capfd.readouterr().err
        if message is None:  # the parent of one peft folder is read as a folder of networks
            assert code == 0
        else:
            assert code == 1 and message in err and err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert cli.main(["convert", str(tmp_path / "empty"), str(tmp_path / "y"), "--to=peft"]) == 1
    assert "is nothing this command knows: expected store.json" in capfd.readouterr().err
