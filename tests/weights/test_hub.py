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
    with pytest.raises(UserError, match=r"no safetensors, only pytorch_model\.bin, .*refs/pr"):
        hub._wanted("owner/name", ["config.json", "pytorch_model.bin"])
    with pytest.raises(UserError, match=r"no safetensors\. Name"):
        hub._wanted("owner/name", ["README.md"])
