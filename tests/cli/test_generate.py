"""`jaxsynth generate` through the command: pictures, restarts, stores, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.kinds.prefix import PrefixConfig
from jaxsynth.cli import main as cli
from jaxsynth.data.store import ImageStore
from jaxsynth.weights.adapters.diffusers import write_diffusers
from jaxsynth.weights.adapters.embeddings import Embedding, write_embedding
from jaxsynth.weights.adapters.native import write_state
from jaxsynth.weights.hf import load_pipeline
from tests.adapters.nets import randomised
from tests.generation.test_generate import same_images
from tests.words import last_of_each

PROMPTS = ("a photo of the digit one", "zero")
SETTINGS = ("--steps=2", "--guidance=3", "--sampler=euler_ancestral")


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """A LoRA on the UNet as diffusers writes it, with an effect that is seen."""
    config = LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v"))
    unet = registry.add(load_pipeline(base_folder).unet, config, rngs=jax.random.key(0))
    path = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    write_diffusers(path, {"unet": randomised(inject.extract(unet), 1)})
    return path


def generate(base, out, *argv) -> int:
    words = ["generate", f"--base={base}", f"--out={out}", *map(str, argv)]
    return cli.main(last_of_each(words))


def pictures(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


@pytest.mark.heavy
def test_pictures_of_prompts_and_an_adapter(base_folder, adapter, tmp_path, capfd):
    """Settings in each file; a stopped command goes on; a prompt alone gives the same picture."""
    out = tmp_path / "images"
    given = [f"--prompt={text}" for text in PROMPTS]
    asked = (*given, f"--adapter={adapter}:0.5", "--count=2", "--seed=7", *SETTINGS)
    assert generate(base_folder, out, *asked, "--negative-prompt=two") == 0
    assert f"4 images to {out}" in capfd.readouterr().out
    found = pictures(out)
    assert list(found) == ["00000-000.png", "00000-001.png", "00001-000.png", "00001-001.png"]
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == list(found)
    for line in lines:
        embedded = json.loads(Image.open(out / line.pop("file_name")).text["jaxsynth"])
        assert embedded == line
    last = lines[-1]
    assert (last["prompt"], last["index"], last["seed"], last["steps"]) == (PROMPTS[1], 1, 7, 2)
    assert last["adapters"][0]["file"] == str(adapter) and last["adapters"][0]["weight"] == 0.5

    bytes_before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "00001-000.png").unlink()
    (out / "metadata.jsonl").unlink()
    assert generate(base_folder, out, *asked, "--negative-prompt=two") == 0
    assert "3 of them there already" in capfd.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == bytes_before

    assert generate(base_folder, out, *asked, "--negative-prompt=two", "--steps=3") == 2
    assert "another request: steps was 2, now 3; give another --out" in capfd.readouterr().err

    file = tmp_path / "prompts.jsonl"
    file.write_text(
        f'{{"prompt": "five", "seed": 3}}\n\n'
        f'{{"prompt": "{PROMPTS[1]}", "seed": 7, "negative_prompt": "two"}}\n'
    )
    rest = (f"--adapter={adapter}:0.5", "--count=2", *SETTINGS)
    assert generate(base_folder, tmp_path / "more", f"--prompts={file}", *rest) == 0
    more = pictures(tmp_path / "more")
    same_images(more["00001-001.png"], found["00001-001.png"])


def test_a_store_of_prompts(base_folder, tmp_path, capfd):
    out, file = tmp_path / "store", tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    asked = (f"--prompts={file}", "--count=2", "--seed=7", "--store", *SETTINGS)
    assert generate(base_folder, out, *asked) == 0
    assert f"an image store of 4 images at {out}" in capfd.readouterr().out
    store = ImageStore(out)
    assert {entry.prompt for entry in store.entries} == set(PROMPTS)
    assert generate(base_folder, out, *asked) == 0
    assert generate(base_folder, out, *asked, "--guidance=4") == 2
    assert "guidance was 3.0, now 4.0" in capfd.readouterr().err


@pytest.mark.heavy
def test_adapters_are_mixed(base_folder, adapter, tmp_path, capfd):
    """Half and half of one adapter is the whole of it; a kind that cannot be merged is named."""
    given = ("--prompt=zero", "--count=4", *SETTINGS)
    halves = (f"--adapter={adapter}:0.5",) * 2
    for name, more in (("one", (f"--adapter={adapter}",)), ("two", halves), ("none", ())):
        assert generate(base_folder, tmp_path / name, *given, *more) == 0
    one, two, none = (
        np.stack(list(pictures(tmp_path / name).values())) for name in ("one", "two", "none")
    )
    same_images(one, two)
    assert np.abs(one.astype(int) - none).mean() > 1
    config = PrefixConfig()
    unet = registry.add(load_pipeline(base_folder).unet, config, rngs=jax.random.key(0))
    write_state(tmp_path / "prefix.safetensors", inject.extract(unet))
    prefix = f"--adapter={tmp_path / 'prefix.safetensors'}"
    assert generate(base_folder, tmp_path / "x", *given, f"--adapter={adapter}", prefix) == 1
    error = capfd.readouterr().err
    assert "prefix.safetensors: an adapter of this kind cannot be merged" in error


@pytest.mark.heavy
def test_pictures_begin_with_a_picture(base_folder, tmp_path, capfd):
    """Several in turns; the files say which they were; another picture is refused."""
    for name, value in (("dark", 30), ("light", 220)):
        Image.fromarray(np.full((20, 10, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    dark, light = (f"--image={tmp_path / name}.png" for name in ("dark", "light"))
    given = ("--prompt=zero", "--count=2", "--steps=8", "--sampler=ddim", "--guidance=1")
    begun = (*given, "--strength=0.13")
    assert generate(base_folder, tmp_path / "both", *begun, dark, light) == 0
    assert generate(base_folder, tmp_path / "dark", *begun, dark) == 0
    both, one = (list(pictures(tmp_path / name).values()) for name in ("both", "dark"))
    assert both[0].shape == (8, 8, 3)
    np.testing.assert_array_equal(both[0], one[0])
    assert np.abs(both[1].astype(int) - one[1]).mean() > 1
    line = json.loads((tmp_path / "both" / "metadata.jsonl").read_text().splitlines()[0])
    assert [entry["file"] for entry in line["images"]] == [dark[8:], light[8:]]
    assert line["strength"] == 0.13
    assert generate(base_folder, tmp_path / "both", *begun, light, dark) == 2
    assert "another request: images was" in capfd.readouterr().err
    for more, words in (
        (("--strength=0.5",), "--strength is for --image, and none is given"),
        ((dark, "--strength=2"), "--strength=2.0: expected above 0 and at most 1"),
        ((dark, f"--mask={tmp_path / 'dark.png'}"), "has no use for a mask"),
        ((dark, "--strength=0.1"), "strength: 0.1 of 8 steps leaves none to take"),
        ((f"--image={tmp_path / 'none.png'}",), "no such file"),
        ((f"--mask={tmp_path / 'dark.png'}",), "1 given for 0 --image"),
        (("--image-guidance=-1",), "expected a number from 0 on"),
    ):
        assert generate(base_folder, tmp_path / "x", *given, *more) != 0
        assert words in capfd.readouterr().err


@pytest.mark.heavy
def test_a_new_word_and_an_adapter_combine(base_folder, adapter, tmp_path, capfd):
    """A word of two known words' vectors draws what these draw, an adapter or none beside it."""
    pipeline = load_pipeline(base_folder)
    table = pipeline.text_encoder.text_model.embeddings.token_embedding.embedding[...]
    vectors = np.asarray(table[pipeline.tokenizer(["one digit"])[0, 1:3]])
    word = write_embedding(tmp_path / "new.pt", Embedding("<new>", vectors), "a1111")
    for name, more in (("plain", ()), ("style", (f"--adapter={adapter}",))):
        own = (f"--embedding={word}:<x>", "--prompt=a photo of <x>")
        assert generate(base_folder, tmp_path / f"{name}-x", *own, *more, *SETTINGS) == 0
        known = "--prompt=a photo of one digit"
        assert generate(base_folder, tmp_path / name, known, *more, *SETTINGS) == 0
    found = {x: np.stack(list(pictures(tmp_path / x).values())) for x in
             ("plain", "plain-x", "style", "style-x")}  # fmt: skip
    same_images(found["plain-x"], found["plain"])
    same_images(found["style-x"], found["style"])
    assert np.abs(found["plain"].astype(int) - found["style"]).mean() > 1
    line = json.loads((tmp_path / "style-x" / "metadata.jsonl").read_text().splitlines()[0])
    assert line["embeddings"][0]["word"] == "<x>" and line["adapters"][0]["weight"] == 1
    capfd.readouterr()
    for given, status, message in (
        (f"--embedding={word}:photo", 1, "token 'photo' is in the tokenizer already"),
        (f"--embedding={adapter}", 1, "style.safetensors: is an adapter"),
        ("--embedding=gone.pt:<x>", 2, "--embedding=gone.pt:<x>: gone.pt does not exist"),
    ):
        assert generate(base_folder, tmp_path / "no", "--prompt=zero", given, *SETTINGS) == status
        assert message in capfd.readouterr().err
    assert generate(base_folder, tmp_path / "no", "--prompt=zero", f"--adapter={word}") == 1
    assert "is given by --embedding=FILE" in capfd.readouterr().err


def test_mistakes_are_told_in_one_line(base_folder, adapter, tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "sead": 1}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    out, prompt = tmp_path / "out", "--prompt=zero"
    table = [
        (2, out, (), "nothing to draw: give --prompt=TEXT or --prompts=FILE"),
        (2, out, ("--prompts=gone.txt",), "--prompts=gone.txt: no such file"),
        (2, out, (prompt, "--sampler=eulerr"), "did you mean euler?"),
        (2, out, (prompt, "--sampler=unipc"), "--sampler=unipc: expected one of ddim"),
        (2, out, (prompt, "--size=big"), "--size=big: expected pixels"),
        (2, out, (prompt, "--size=0x8"), "--size=0x8: expected pixels"),
        (2, out, (prompt, "--count=0"), "--count=0: expected at least 1"),
        (2, out, (prompt, "--seed=-1"), "--seed=-1: expected 0 to 4294967295"),
        (2, out, (prompt, "--guidance=nan"), "--guidance=nan: expected a number"),
        (2, out, (prompt, "--adapter=gone.safetensors"), "gone.safetensors"),
        (2, out, (prompt, f"--adapter={adapter}:inf"), "weight inf, expected a number"),
        (2, out, (prompt, "--promt=x"), "did you mean --prompt=x?"),
        (2, out, (prompt, "--adapter="), "--adapter is empty, expected FILE or FILE:WEIGHT"),
        (2, out, (prompt, "--controlnet=", f"--condition={tmp_path / 'empty.txt'}"), "is empty"),
        (2, out, (prompt, "--embedding="), "--embedding is empty, expected FILE or FILE:WORD"),
        (2, out, (prompt, "--base="), "--base is empty, expected a folder, a hub id or tiny"),
        (2, tmp_path / "empty.txt", (prompt,), "empty.txt: is a file, expected a folder"),
        (2, tmp_path / "photos", (prompt,), "is not empty, and no folder of images"),
        (1, out, (f"--prompts={tmp_path / 'bad.jsonl'}",), "bad.jsonl, line 2: unknown field"),
        (1, out, (f"--prompts={tmp_path / 'empty.txt'}",), "empty.txt: holds no prompt"),
        (1, out, (prompt, prompt, "--store"), "the prompt 'zero' is given twice"),
        (1, out, (prompt, "--size=9x8"), "size: 9x8 pixels"),
        (1, out, (prompt, "--sampler=lcm", "--steps=60"), "original_inference_steps"),
    ]
    for code, where, argv, message in table:
        assert generate(base_folder, where, *argv) == code, argv
        error = capfd.readouterr().err
        assert message in error and error.count("\n") == 1, (argv, error)
    assert not out.exists()


def test_an_adapter_of_another_base_is_named(base_folder, tmp_path, capfd):
    config = LoRAConfig(rank=2, targets=("to_q",))
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    arrays = {f"{path}.lora_A": np.ones((6, 2)), f"{path}.lora_B": np.ones((2, 6))}
    write_diffusers(tmp_path / "a.safetensors", {"unet": inject.AdapterState(arrays, config)})
    asked = ("--prompt=zero", f"--adapter={tmp_path / 'a.safetensors'}")
    assert generate(base_folder, tmp_path / "out", *asked) == 1
    error = capfd.readouterr().err
    assert "lora_A has shape (2, 6)" in error


def test_an_unusual_scheduler_is_named_before_anything_is_drawn(base_folder, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    path = base / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"_class_name": "UniPCMultistepScheduler"}
    path.write_text(json.dumps(config))
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    assert generate(base, tmp_path / "out", "--prompt=zero") == 1
    error = capfd.readouterr().err
    assert str(path) in error and "--sampler=ddim" in error and not (tmp_path / "out").exists()
