"""Finding a model's folder: local, packaged or on the hub."""

import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.weights import hub
from jaxsynth.weights.hf import load_clip
from jaxsynth.weights.hub import resolve


def test_resolve_local_names(tmp_path):
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, expected a folder"):
        resolve(tmp_path / "file")
    with pytest.raises(UserError, match="no such folder"):
        resolve(tmp_path / "absent")
    with pytest.raises(UserError, match="not a hub id"):
        resolve("a/b/c")
    with pytest.raises(UserError, match="the name of a model is empty"):
        resolve("")
    with pytest.raises(UserError, match="'tiny/absent': not among the package's files"):
        resolve("tiny/absent")


def test_offline_hub_gives_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'owner/name' is no local.*local folder") as caught:
        resolve("owner/name")
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    with pytest.raises(UserError, match="'owner/name'"):
        load_clip("owner/name@main")


def test_offline_hub_takes_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c" * 40)
    (repository / "snapshots" / ("c" * 40)).mkdir(parents=True)
    assert resolve("owner/name").name == "c" * 40


STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bin"], 0),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"], 0),
        ([f"{STEM}.fp32.safetensors", f"{STEM}.fp16.safetensors"], 0),
        ([f"{STEM}.bf16.safetensors", f"{STEM}.non_ema.safetensors"], 0),
        ([f"{STEM}.non_ema.safetensors"], 0),
        (["model.ema.safetensors", "pytorch_model.bin"], 0),
        ([INDEX, f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"], 0),
        ([f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-00001-of-00001.safetensors"], 0),
        (["model.fp16.safetensors.index.json"], 0),
        ([INDEX, f"{STEM}.fp16.safetensors"], 0),
        (["model.safetensors", INDEX], 1),
        (["pytorch_model.bin"], 0),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], 0),
        (["adapter_model.safetensors", "optimizer.bin", "model.ckpt", "config.json"], None),
        ([], None),
    ],
)
def test_the_weights_of_a_folder(names, chosen):
    found = hub.choose_weights("folder", sorted(names))
    assert found == (None if chosen is None else names[chosen])
    assert hub.choose_weights("folder", sorted(names, reverse=True)) == found


def test_variants_of_which_none_is_better_are_named():
    names = [f"{STEM}.ema.safetensors", f"{STEM}.non_ema.safetensors"]
    message = rf"folder: weights of the variants ema, non_ema, .* rename .* {STEM}\.safetensors"
    with pytest.raises(UserError, match=message):
        hub.choose_weights("folder", names)


def test_only_needed_files_are_downloaded():
    repository = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "safety_checker/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.fp16.safetensors",
    ]
    assert hub._wanted("owner/name", repository) == [
        "model_index.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    half = ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"]
    others = ["model-00001-of-00001.safetensors", "README.md"]
    assert hub._wanted("owner/name", half + others) == sorted(half)
    assert hub._wanted("owner/name", ["config.json", "pytorch_model.bin"]) == [
        "config.json",
        "pytorch_model.bin",
    ]
    message = r"no diffusion_pytorch_model\.safetensors .*, only v1\.ckpt\. Name .*refs/pr"
    with pytest.raises(UserError, match=message):
        hub._wanted("owner/name", ["config.json", "v1.ckpt"])
    with pytest.raises(UserError, match=r"or \.bin\)\. Name"):
        hub._wanted("owner/name", ["README.md"])
