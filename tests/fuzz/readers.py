"""Every reader of other people's files, with files that this package itself made.

A reader is a function that makes its cases in a folder; a case is a file or a folder, which of its
files are changed, and what reads it.
"""

import dataclasses
import hashlib
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import mutate


@dataclasses.dataclass(frozen=True)
class Case:
    """`root` is what `read` is given; `files` are those below it that are changed, by name."""

    name: str
    root: Path
    read: Callable[[Path], Any]
    files: Sequence[str] = ("",)
    # Called with the random numbers, the root and the changed file, after the change.
    after: Callable[[Random, Path, Path], None] | None = None


def make(random: Random, case: Case, folder: Path) -> Path:
    """A copy of a case below `folder` with one of its files changed; what is to be read."""
    target = folder / case.root.name
    if target.is_dir():
        shutil.rmtree(target)
    if case.root.is_dir():
        shutil.copytree(case.root, target)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    name = random.choice(case.files)
    source, path = (case.root / name, target / name) if name else (case.root, target)
    if path.suffix in (".pt", ".pth") and zipfile.is_zipfile(source):
        mutate.archive(random, source, path)
    else:
        path.write_bytes(mutate.changed(random, path, source.read_bytes()))
    if case.after is not None:
        case.after(random, target, path)
    return target


def touch(found: Any) -> None:
    """Reads every number of nested data."""
    if isinstance(found, np.ndarray):
        found.tobytes()
    elif isinstance(found, Mapping):
        for item in found.values():
            touch(item)
    elif isinstance(found, (list, tuple)):
        for item in found:
            touch(item)


def torch_files(folder: Path) -> list[Case]:
    from jaxsynth.weights.networks.heads import LinearHead
    from jaxsynth.weights.torch_files.reader import read_nested, read_state_dict
    from jaxsynth.weights.torch_files.writer import write_pickled

    tensors = {"linear.weight": np.ones((3, 4), "f4"), "linear.bias": np.ones(3, "f2")}
    write_pickled(folder / "new.pt", tensors)
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
    cases = [Case("head", folder / "new.pt", LinearHead.read)]
    for name in ("new.pt", "old.pth"):
        cases.append(Case(f"state {name}", folder / name, lambda p: touch(read_state_dict(p))))
    for name in ("new.pt", "nested.pt"):
        cases.append(Case(f"nested {name}", folder / name, lambda p: touch(read_nested(p))))
    return cases


def safetensors(folder: Path) -> list[Case]:
    from jaxsynth.weights import hub
    from jaxsynth.weights.safetensors import opened

    tensors = {
        "a.weight": np.ones((3, 4), "f4"),
        "a.bias": np.ones(3, "f2"),
        "b": np.ones((), "f4"),
    }
    path = folder / "model.safetensors"
    path.write_bytes(hub.to_bytes(tensors, {"format": "x", "config": '{"rank": 4}'}))

    def read(path: Path) -> None:
        with opened(path) as file:
            touch(file.adapter())

    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    shards = folder / "shards"
    shards.mkdir()
    shutil.copy(path, shards / "part.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    names = ["model.safetensors.index.json", "part.safetensors"]
    return [Case("file", path, read), Case("shards", shards, hub.weight_files, names)]


def adapters(folder: Path) -> list[Case]:
    import jax

    from jaxsynth.adapters import inject, registry
    from jaxsynth.cli import convert

    networks = convert._Networks("tiny")
    unet = networks.need("it")["unet"]
    place = next(path for path in inject.layers(unet) if path.endswith("attn1.to_q"))
    files = []
    for kind, formats in {
        "lora": ("peft", "diffusers", "kohya", "comfyui", "jaxsynth"),
        "loha": ("peft", "lycoris", "jaxsynth"),
        "lokr": ("peft", "lycoris"),
        "vera": ("peft", "jaxsynth"),
        "ia3": ("peft",),
    }.items():
        settings = {} if kind == "ia3" else {"rank": 2}
        config = registry.make_config(kind, targets=(place,), **settings)
        state = inject.extract(registry.add(unet, config, rngs=jax.random.key(0)))
        for to in formats:
            target = folder / f"{kind}-{to}"
            target = target if to == "peft" else target.with_suffix(".safetensors")
            convert._write_adapters(target, {"unet": state}, to, networks)
            files.append(target)

    def read(path: Path) -> None:
        convert._read_adapters(path, networks)

    folders = ["adapter_config.json", "adapter_model.safetensors"]
    return [Case(path.name, path, read, folders if path.is_dir() else [""]) for path in files]


def tokenizers(folder: Path) -> list[Case]:
    from jaxsynth.weights.tokenizer import Tokenizer, train_tokenizer

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

    return [
        Case(place.name, place, read, sorted(file.name for file in place.iterdir()))
        for place in (parts, whole)
    ]


def configs(folder: Path) -> list[Case]:
    from jaxsynth.core.documents import read_json
    from jaxsynth.diffusion.samplers import make_sampler
    from jaxsynth.diffusion.schedules import NoiseSchedule
    from jaxsynth.models.classifiers import convnext, dinov2, resnet, swin, vit
    from jaxsynth.models.clip import CLIPConfig
    from jaxsynth.models.diffusion import controlnet, dit, unet, vae
    from jaxsynth.models.gan import e2gan, patchgan, pix2pix
    from jaxsynth.weights import hf, hub, preprocessing

    cases = []
    for cls in (
        CLIPConfig, unet.UNet2DConditionConfig, vae.AutoencoderKLConfig, dit.DiTConfig,
        controlnet.ControlNetConfig, vit.ViTConfig, dinov2.Dinov2Config, convnext.ConvNextConfig,
        swin.SwinConfig, resnet.ResNetConfig, e2gan.E2GANConfig, patchgan.PatchGANConfig,
        pix2pix.Pix2PixConfig,
    ):  # fmt: skip
        path = folder / cls.__name__ / "config.json"
        hub_json = json.dumps(dataclasses.asdict(cls()))
        path.parent.mkdir()
        path.write_text(hub_json)
        cases.append(Case(cls.__name__, path, lambda p, cls=cls: hf._config(cls, p)))

    def sampler(path: Path) -> None:
        config = read_json(path)
        make_sampler(config, NoiseSchedule.from_config(config), 4)

    for source in sorted(hub.ASSETS.rglob("scheduler_config.json")):
        cases.append(Case("scheduler", source, sampler))
    clip = hub.ASSETS / "tiny" / "clip" / preprocessing.PREPROCESSOR
    cases.append(Case("preprocessor", clip, preprocessing.from_transformers))
    timm = folder / "timm.json"
    values = {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic",
              "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "center"}  # fmt: skip
    timm.write_text(json.dumps(values))
    cases.append(Case("timm", timm, lambda p: preprocessing.from_timm(p, read_json(p))))
    return cases


def networks(folder: Path) -> list[Case]:
    import jax
    from flax import nnx

    from jaxsynth.models.classifiers.resnet import ResNetConfig, ResNetForImageClassification
    from jaxsynth.models.diffusion.dit import DiT, DiTConfig
    from jaxsynth.weights.hf import load_model, save_model
    from jaxsynth.weights.networks.classifiers import Classifier, load_classifier, save_classifier
    from jaxsynth.weights.preprocessing import Preprocessing

    small = DiTConfig(num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4)
    save_model(DiT(small, rngs=nnx.Rngs(jax.random.key(0))), None, folder / "dit")
    resnet = ResNetConfig(
        embedding_size=4, hidden_sizes=(4, 8), depths=(1, 1), layer_type="basic", num_labels=2
    )
    seen = Preprocessing(32, 32, True, "bicubic", (0.5,) * 3, (0.5,) * 3)
    network = ResNetForImageClassification(resnet, rngs=nnx.Rngs(jax.random.key(0)))
    save_classifier(Classifier(network, seen, ("a", "b")), folder / "resnet")
    cases = []
    for name, read in (
        ("dit", lambda p: load_model(DiT, DiTConfig, p)),
        ("resnet", load_classifier),
    ):
        files = sorted(file.name for file in (folder / name).iterdir())
        cases.append(Case(name, folder / name, read, files))
    return cases


def _sealed(random: Random, root: Path, path: Path) -> None:
    """Seven times in ten the seal of a changed shard is made to fit, as an attacker's would."""
    seal = path.with_suffix(".seal")
    if path.suffix in (".jsonl", ".array_record") and random.random() < 0.7:
        values = json.loads(seal.read_text())
        values[path.suffix] = hashlib.sha256(path.read_bytes()).hexdigest()
        seal.write_text(json.dumps(values))


def stores(folder: Path) -> list[Case]:
    from jaxsynth.data.store import Entry, ImageStore, StoreWriter

    root = folder / "store"
    writer = StoreWriter(root, ["a", "b"], 4, 2)
    for shard in range(2):
        entries = [Entry(label, "ab"[label], shard, prompt="p") for label in (0, 1)]
        writer.write_shard(shard, [np.full((8, 8, 3), 60 * shard, np.uint8)] * 2, entries)

    def read(path: Path) -> None:
        store = ImageStore(path)
        assert set(store.labels.tolist()) <= {0, 1}, "a label of no class"
        for index in range(min(len(store), 10)):
            store[index]

    names = sorted(file.name for file in root.iterdir())
    return [Case("store", root, read, names, _sealed)]


def images(folder: Path) -> list[Case]:
    from PIL import Image

    from jaxsynth.data.decode import decode_image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8))
    cases = []
    for suffix, options in {
        "png": {}, "jpg": {}, "webp": {}, "bmp": {}, "ppm": {}, "tif": {"compression": "tiff_lzw"},
    }.items():  # fmt: skip
        path = folder / f"picture.{suffix}"
        picture.save(path, **options)
        cases.append(Case(suffix, path, decode_image))
    return cases


def documents(folder: Path) -> list[Case]:
    from jaxsynth.cli import main
    from jaxsynth.data.procedural.concepts import read_concepts
    from jaxsynth.data.robustness_sets import read_label_space
    from jaxsynth.data.splits import Shots, load_shots
    from jaxsynth.robustness.bias_sets import read_class_map
    from jaxsynth.runs.stage import load_artifact, run_stage
    from jaxsynth.training.metrics import MetricsWriter, read_metrics

    lists = (("a/1", "a/2"), ("b/1",))
    Shots("digits", ("a", "b"), 2, 0, lists, ((), ())).save(folder / "shots.json")
    with MetricsWriter(folder) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": 0.5 / step, "each": np.ones(2)})

    def build(path: Path) -> dict[str, Any]:
        (path / "file.txt").write_text("x")
        return {"images": 7}

    run_stage("make", folder / "stage", {"steps": 3}, {}, build)
    (folder / "run").mkdir()
    run = {"argv": ["run"], "method": "datadream", "config": {"shots": 1}, "versions": {}}
    (folder / "run" / main.RUN_FILE).write_text(json.dumps(run))
    concepts = [{"prompt": "a red hat", "family": "artistic", "paraphrases": ["x"], "edits": []}]
    (folder / "concepts.json").write_text(json.dumps({"concepts": concepts}))
    (folder / "classes.json").write_text(json.dumps({"0": ["n01", "tench"], "1": ["n02", "b_c"]}))
    (folder / "map.json").write_text(json.dumps({"0": 1, "1": -1}))

    def artifact(path: Path) -> None:
        found = load_artifact(path)
        found.digest, found.counts, found.verify()

    return [
        Case("shots", folder / "shots.json", load_shots),
        Case("metrics", folder / "metrics.jsonl", read_metrics),
        Case("manifest", folder / "stage", artifact, ["manifest.json"]),
        Case("run", folder / "run", main._read_run, [main.RUN_FILE]),
        Case("concepts", folder / "concepts.json", read_concepts),
        Case("label space", folder / "classes.json", read_label_space),
        Case("class map", folder / "map.json", lambda path: read_class_map(path, ["x", "y"])),
    ]


READERS: dict[str, Callable[[Path], list[Case]]] = {
    "torch": torch_files,
    "safetensors": safetensors,
    "adapters": adapters,
    "tokenizers": tokenizers,
    "configs": configs,
    "networks": networks,
    "stores": stores,
    "images": images,
    "documents": documents,
}
