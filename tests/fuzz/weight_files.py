"""Files of weights: PyTorch's, safetensors, adapters of every format, tokenizers, configs."""

import dataclasses
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import tokenizers as lib
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.core.documents import read_json
from jaxsynth.core.places import ASSETS
from jaxsynth.diffusion.samplers import make_sampler
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.classifiers import convnext, dinov2, resnet, siglip, swin, vit
from jaxsynth.models.clip import CLIPConfig
from jaxsynth.models.diffusion import controlnet, dit, unet, vae
from jaxsynth.models.gan import e2gan, patchgan, pix2pix
from jaxsynth.models.siglip import SiglipConfig
from jaxsynth.weights import hf, hub, models, preprocessing
from jaxsynth.weights.adapters import io
from jaxsynth.weights.adapters.embeddings import (
    FORMATS,
    Embedding,
    read_embedding,
    write_embedding,
)
from jaxsynth.weights.networks import classifiers
from jaxsynth.weights.networks.heads import LinearHead
from jaxsynth.weights.safetensors import opened
from jaxsynth.weights.text_tokenizer import TextTokenizer
from jaxsynth.weights.tokenizer import Tokenizer, train_tokenizer
from jaxsynth.weights.torch_files.reader import read_nested, read_state_dict
from jaxsynth.weights.torch_files.writer import write_pickled
from tests.fuzz.cases import Case, below, touch


def torch_files(folder: Path) -> list[Case]:
    tensors = {"linear.weight": np.ones((3, 4), "f4"), "linear.bias": np.ones(3, "f2")}
    write_pickled(folder / "new.pt", tensors)
    write_pickled(folder / "new.ckpt", {"state_dict": tensors, "epoch": 3, "name": "x"})
    shutil.copy(folder / "new.pt", folder / "new.bin")
    nested = {
        4: ({"linear.0.weight": np.ones((8, 4), "f4")}, [1, 2.5, "x"]),
        "name": "x",
        "n": None,
    }
    write_pickled(folder / "nested.pt", nested)
    with zipfile.ZipFile(folder / "new.pt") as archive:
        body = archive.read("new/data.pkl")
    parts = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    old = b"".join(pickle.dumps(part, 2) for part in parts) + body + pickle.dumps(["0", "1"], 2)
    for values in tensors.values():
        old += struct.pack("<Q", values.size) + values.tobytes()
    (folder / "old.pth").write_bytes(old)
    cases = [
        Case("head", folder / "new.pt", LinearHead.read),
        Case("nested", folder / "nested.pt", lambda p: touch(read_nested(p))),
        Case("adapter", folder / "new.bin", lambda p: io.tensor_files.load(p)),
    ]
    for name in ("new.pt", "new.ckpt", "old.pth"):
        cases.append(Case(f"state {name}", folder / name, lambda p: touch(read_state_dict(p))))
    return cases


def safetensors(folder: Path) -> list[Case]:
    tensors = {
        "a.weight": np.ones((3, 4), "f4"),
        "a.bias": np.ones(3, "f2"),
        "b": np.ones((), "f4"),
    }
    path = folder / "model.safetensors"
    path.write_bytes(hub.to_bytes(tensors, {"format": "x", "config": '{"rank": 4}'}))

    def read(path: Path) -> None:
        with opened(path) as file:
            touch([file.read_any(key) for key in file.keys])

    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    shards = folder / "shards"
    shards.mkdir()
    shutil.copy(path, shards / "part.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    names = ["model.safetensors.index.json", "part.safetensors"]
    return [Case("file", path, read), Case("shards", shards, hub.weight_files, names)]


def adapters(folder: Path) -> list[Case]:
    networks = io.Networks.of("tiny")
    model = networks.need("it")["unet"]
    place = next(path for path in inject.layers(model) if path.endswith("attn1.to_q"))
    files = []
    for kind, formats in {
        "lora": ("peft", "diffusers", "kohya", "comfyui", "jaxsynth"),
        "dora": ("peft", "diffusers"),
        "loha": ("peft", "lycoris", "jaxsynth"),
        "lokr": ("peft", "lycoris"),
        "vera": ("peft", "jaxsynth"),
        "oft": ("jaxsynth",),
        "ia3": ("peft",),
        "hypernetwork": ("a1111",),
    }.items():
        settings = {} if kind in ("ia3", "hypernetwork", "oft") else {"rank": 2}
        if kind != "hypernetwork":
            settings["targets"] = (place,)
        config = registry.make_config(kind, **settings)
        state = inject.extract(registry.add(model, config, rngs=jax.random.key(0)))
        for to in formats:
            suffix = {"peft": "", "diffusers": "", "a1111": ".pt"}.get(to, ".safetensors")
            target = folder / f"{kind}-{to}{suffix}"
            io.write(target, {"unet": state}, to, networks)
            files.append(target)

    def read(path: Path) -> None:
        io.read(path, networks)

    words = [write_embedding(folder / to, Embedding("<a>", np.ones((2, 4), "f4")), to)
             for to in FORMATS]  # fmt: skip
    return [
        *(Case(path.name, path, read, below(path) if path.is_dir() else [""]) for path in files),
        *(Case(f"embedding {path.parent.name}", path, read_embedding) for path in words),
    ]


def tokenizers(folder: Path) -> list[Case]:
    parts = folder / "parts"
    train_tokenizer(["a photo of a cat", "a photo of a dog"] * 9, 560, 16, parts)
    vocab = json.loads((parts / "vocab.json").read_text())
    merges = (parts / "merges.txt").read_text().splitlines()[1:]
    whole = folder / "whole"
    whole.mkdir()
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
    added = [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}]
    (whole / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    settings = {"model_max_length": 16, "added_tokens_decoder": {"559": added[0]}}
    (whole / "tokenizer_config.json").write_text(json.dumps(settings))

    def read(path: Path) -> None:
        Tokenizer(path)(["a photo of a cat"])

    def read_any(path: Path) -> None:
        TextTokenizer(path, positions=16)(["a photo of a cat"])

    cases = [Case(place.name, place, read, below(place)) for place in (parts, whole)]
    own = {"<unk>": 0, "</s>": 1, "▁a": 2, "▁cat": 3, "a": 4, "▁": 5}
    for name, kind in (
        ("bpe", lib.models.BPE(vocab=own, merges=[("▁", "a")], unk_token="<unk>")),
        ("unigram", lib.models.Unigram([(word, -float(i)) for word, i in own.items()], unk_id=0)),
    ):
        backend = lib.Tokenizer(kind)
        backend.normalizer = lib.normalizers.Lowercase()
        backend.pre_tokenizer = lib.pre_tokenizers.Metaspace()
        backend.post_processor = lib.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        place = folder / name
        place.mkdir()
        backend.save(str(place / "tokenizer.json"))
        settings = {"eos_token": "</s>", "pad_token": {"content": "</s>"}, "add_eos_token": True}
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
        cases.append(Case(name, place, read_any, below(place)))
    return cases


def configs(folder: Path) -> list[Case]:
    cases = []
    for cls in (
        CLIPConfig, unet.UNet2DConditionConfig, vae.AutoencoderKLConfig, dit.DiTConfig,
        controlnet.ControlNetConfig, vit.ViTConfig, dinov2.Dinov2Config, convnext.ConvNextConfig,
        swin.SwinConfig, resnet.ResNetConfig, e2gan.E2GANConfig, patchgan.PatchGANConfig,
        pix2pix.Pix2PixConfig, SiglipConfig, siglip.SiglipClassifierConfig,
    ):  # fmt: skip
        path = folder / cls.__name__ / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(dataclasses.asdict(cls())))
        cases.append(Case(cls.__name__, path, lambda p, cls=cls: models.config_at(cls, p)))

    def sampler(path: Path) -> None:
        config = read_json(path)
        make_sampler(config, NoiseSchedule.from_config(config), 4)

    schedulers = sorted(ASSETS.rglob("scheduler_config.json"))
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"):
        config = json.loads(schedulers[0].read_text())
        path = folder / name / "scheduler_config.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"_class_name": name, **{
            key: config[key] for key in ("beta_start", "beta_end", "beta_schedule") if key in config
        }, "num_train_timesteps": 1000, "timestep_spacing": "leading"}))  # fmt: skip
        schedulers.append(path)
    cases += [Case("scheduler", source, sampler) for source in schedulers]
    clip = ASSETS / "tiny" / "clip" / preprocessing.PREPROCESSOR
    cases.append(Case("preprocessor", clip, preprocessing.from_transformers))
    timm = folder / "timm.json"
    values = {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic",
              "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "center"}  # fmt: skip
    timm.write_text(json.dumps(values))
    cases.append(Case("timm", timm, lambda p: preprocessing.from_timm(p, read_json(p))))
    return cases


def networks(folder: Path) -> list[Case]:
    small = dit.DiTConfig(num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4)
    models.save_model(dit.DiT(small, rngs=nnx.Rngs(jax.random.key(0))), None, folder / "dit")
    config = resnet.ResNetConfig(
        embedding_size=4, hidden_sizes=(4, 8), depths=(1, 1), layer_type="basic", num_labels=2
    )
    seen = preprocessing.Preprocessing(32, 32, True, "bicubic", (0.5,) * 3, (0.5,) * 3, "floor")
    network = resnet.ResNetForImageClassification(config, rngs=nnx.Rngs(jax.random.key(0)))
    classifiers.save_classifier(
        classifiers.Classifier(network, seen, ("a", "b")), folder / "resnet"
    )
    cases = []
    for name, read in (
        ("dit", lambda p: models.load_model(dit.DiT, dit.DiTConfig, p)),
        ("resnet", classifiers.load_classifier),
    ):
        cases.append(Case(name, folder / name, read, below(folder / name)))
    return cases


def pipelines(folder: Path) -> list[Case]:
    """Whole pipelines: every JSON file of their folders, described or loaded."""
    apart = shutil.ignore_patterns("clip", "dit")
    shutil.copytree(ASSETS / "tiny", folder / "sd", ignore=apart)
    shutil.copytree(ASSETS / "tiny" / "clip", folder / "clip")
    cases = []
    for name, read in (("sd", hf.describe_pipeline), ("clip", hf.describe_clip)):
        root = folder / name
        names = [file for file in below(root) if file.endswith((".json", ".txt"))]
        cases.append(Case(name, root, read, names))
    cases.append(Case("sd weights", folder / "sd", hf.load_pipeline, below(folder / "sd")))
    return cases
