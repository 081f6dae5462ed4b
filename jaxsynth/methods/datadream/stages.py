"""DataDream (Kim et al., ECCV 2024, arXiv 2407.10910): few-shot guided synthetic data sets.

A text-to-image model learns the few real images there are (one LoRA for the data set, `dset`, or
one per class, `cls`), draws a data set, and a CLIP classifier is trained on it, alone and together
with the real shots. Beside it stand the rivals: the untrained CLIP, the real shots alone, and
images of the same generator from prompts alone.

Below the run's folder:

    shots16-seed0/shots                  the drawn images, as lists of ids
    prompt-seed0/images, .../synthetic   prompt-only images, and the classifier trained on them
    shots16-seed0/real                   the classifier trained on the shots
    shots16-seed0/dset/{adapter,images,synthetic,both}
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import file_digest, write_json
from jaxsynth.data.dataset import DataConfig, Dataset, ImageSource, SourceError
from jaxsynth.data.load import load_dataset
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import Shots, few_shot, load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.generation.generate import GenerateConfig, Generator, fill_store
from jaxsynth.generation.sampler import sampler_of
from jaxsynth.methods.datadream import report as datadream_report
from jaxsynth.models.clip import CLIPModel
from jaxsynth.runs.stage import Artifact, run_stage
from jaxsynth.tasks.clip_classifier import ClassifyConfig, predict, scores, train_classifier
from jaxsynth.tasks.text_to_image import FinetuneConfig, encode_examples, finetune, finetune_each
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters.components import join_networks, split_networks
from jaxsynth.weights.adapters.diffusers import (
    DIFFUSERS_WEIGHTS,
    fits_diffusers,
    read_diffusers,
    write_diffusers,
)
from jaxsynth.weights.adapters.native import STATE_FILE, read_state, write_state
from jaxsynth.weights.hf import Clip, StableDiffusion, load_clip, load_pipeline

MODES = ("dset", "cls")
# Below an adapter's stage: checkpoints and metrics. No class's folder starts with a dot.
TRAINING = ".training"


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; `data` -1 takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Config:
    """One run: every number of shots with every seed and mode.

    `base` and `clip` are folders, hub ids, or the shipped "tiny" and "tiny/clip". `dtype` is the
    storage and compute type of the frozen networks; adapters stay float32. `classes_at_once` bounds
    how many class adapters train together (0: all). `validation_fraction` of the shots is kept from
    training and chooses the classifier's step; at 0 the last step is taken. `adapter`, where it is
    given, is what the generator learns by (`finetune.adapter`); the classifier's is
    `classify.adapter`.
    """

    method: str = "datadream"
    base: str = "tiny"
    clip: str = "tiny/clip"
    dtype: str = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    shots: tuple[int, ...] = (16,)
    modes: tuple[str, ...] = ("dset",)
    seeds: tuple[int, ...] = (0,)
    validation_fraction: float = 0.0
    classes_at_once: int = 0
    adapter: AdapterChoice | None = None
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        for name in ("shots", "modes", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one value")
        if unknown := set(self.modes) - set(MODES):
            raise ValueError(f"modes: {sorted(unknown)}, expected some of {MODES}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: {self.dtype!r}, expected float32 or bfloat16")
        if self.adapter is not None:
            if self.finetune.adapter not in (None, self.adapter):
                raise ValueError(
                    "adapter and finetune.adapter are both given, and are one setting; give one"
                )
            chosen = dataclasses.replace(self.finetune, adapter=self.adapter)
            object.__setattr__(self, "finetune", chosen)


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the run, then its page; returns the page's path.

    What can be wrong with data, weights and devices is found before the first long stage.
    """
    work = _Work(config, Path(workdir))
    work.check()
    drawn = {(k, seed): work.draw(k, seed) for seed in config.seeds for k in config.shots}
    for seed in config.seeds:
        work.prompt_only(seed)
        for shots in config.shots:
            work.few_shot(shots, seed, drawn[shots, seed])
    return report(work.folder)


def report(workdir: Path) -> Path:
    """Writes results.json and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return datadream_report.page_of(Path(workdir))
    return datadream_report.write(Path(workdir))


class _Work:
    """A run's networks and data, loaded when a stage first needs them, and its stages."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def pipeline(self) -> StableDiffusion:
        return load_pipeline(self.config.base, self.config.dtype, compute_dtype=self.config.dtype)

    @cached_property
    def clip(self) -> Clip:
        return load_clip(self.config.clip, self.config.dtype, compute_dtype=self.config.dtype)

    @cached_property
    def dataset(self) -> Dataset:
        return load_dataset(self.config.data)

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        return class_prompts(self.dataset)

    @cached_property
    def mesh(self) -> Mesh | None:
        """None on one device, where a mesh would change nothing."""
        if len(jax.devices()) == 1:
            return None
        return make_mesh(**dataclasses.asdict(self.config.mesh))

    def check(self) -> None:
        """Loads data and networks and makes the mesh; each raises what a user has to know.

        The shots are drawn for every run of the configuration, and a batch must divide among the
        devices.
        """
        for shots in self.config.shots:
            few_shot(self.dataset, shots, 0, val_fraction=self.config.validation_fraction)
        for network in (self.pipeline, self.clip):
            network.tokenizer(list(self.prompts))
        generate = self.config.generate
        sampler_of(self.pipeline, generate.sampler, generate.num_inference_steps)
        if self.mesh is None:
            return
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = {"classify.batch_size": self.config.classify.batch_size}
        if "dset" in self.config.modes:
            rows["finetune.batch_size"] = self.config.finetune.batch_size
        for name, count in rows.items():
            if count % parts:
                raise UserError(
                    f"{name} {count} is not divisible over data x fsdp = {parts} devices"
                )

    @cached_property
    def data_identity(self) -> dict:
        """What decides the images: the configuration, and which files it found."""
        data = self.dataset
        listing = [list(data.class_names), list(data.train.ids), list(data.test.ids)]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return {"config": self.config.data, "ids": digest, "prompts": self.prompts}

    def prompt_only(self, seed: int) -> None:
        """The rivals that see no shots: zero-shot CLIP, and images from prompts alone."""
        folder = self.folder / f"prompt-seed{seed}"
        self._classify("zero-shot", self.folder / "zero-shot", 0, {})
        images = self._generate("prompt images", folder / "images", seed, None)
        self._classify(
            "prompt-only", folder / "synthetic", seed, {"images": images}, synthetic=images
        )

    def draw(self, shots: int, seed: int) -> Artifact:
        """The images that may be seen, as lists."""
        return run_stage(
            f"shots: {_name(shots, seed)}",
            self._below(shots, seed) / "shots",
            {
                "data": self.data_identity,
                "shots": shots,
                "seed": seed,
                "validation_fraction": self.config.validation_fraction,
            },
            {},
            lambda path: self._draw(shots, seed, path),
        )

    def few_shot(self, shots: int, seed: int, drawn: Artifact) -> None:
        """Everything that one draw of shots leads to."""
        folder, name = self._below(shots, seed), _name(shots, seed)
        self._classify(f"real: {name}", folder / "real", seed, {"shots": drawn}, drawn=drawn)
        for mode in self.config.modes:
            own = folder / mode
            adapter = self._finetune(f"adapter {mode}: {name}", own / "adapter", mode, seed, drawn)
            images = self._generate(f"images {mode}: {name}", own / "images", seed, adapter)
            inputs = {"images": images}
            self._classify(
                f"synthetic {mode}: {name}", own / "synthetic", seed, inputs, synthetic=images
            )
            inputs = {"images": images, "shots": drawn}
            self._classify(
                f"both {mode}: {name}", own / "both", seed, inputs, drawn=drawn, synthetic=images
            )

    def _draw(self, shots: int, seed: int, folder: Path) -> dict:
        drawn = few_shot(self.dataset, shots, seed, val_fraction=self.config.validation_fraction)
        for record in drawn.train_source(self.dataset):  # a corrupt file is found now
            if min(record.image.shape[:2]) < 1:
                raise SourceError(f"{record.id}: an empty image")
        if jax.process_index() == 0:
            drawn.save(folder / "shots.json")
        return {"images": sum(map(len, drawn.train)), "validation": sum(map(len, drawn.val))}

    def _finetune(self, name: str, folder: Path, mode: str, seed: int, drawn: Artifact) -> Artifact:
        settings = {
            "finetune": self.config.finetune,
            "mode": mode,
            "seed": seed,
            "base": self.pipeline.digest,
            "dtype": self.config.dtype,
            "prompts": self.prompts,
        }
        if mode == "cls":
            settings["classes_at_once"] = self.config.classes_at_once
        return run_stage(
            name,
            folder,
            settings,
            {"shots": drawn},
            lambda path: self._build_adapter(
                path, mode, seed, load_shots(drawn.path / "shots.json")
            ),
            unlisted=(f"{TRAINING}/*",),
        )

    def _build_adapter(self, folder: Path, mode: str, seed: int, shots: Shots) -> dict:
        config = self.config.finetune
        examples = encode_examples(
            self.pipeline,
            shots.train_source(self.dataset),
            self.prompts,
            crops=config.crops_per_image,
            seed=seed,
        )
        if mode == "dset":
            state = finetune(
                self.pipeline, examples, config, folder / TRAINING, seed=seed, mesh=self.mesh,
                description="fine-tune dset",
            )  # fmt: skip
            write_adapter(folder, state)
            return {"adapters": 1, "steps": config.num_steps(len(examples))}
        rows = np.cumsum([0, *map(len, shots.train)])
        each = [examples.select(np.arange(start, end)) for start, end in itertools.pairwise(rows)]
        group = self.config.classes_at_once or len(each)
        for start in range(0, len(each), group):
            own = each[start : start + group]
            states = finetune_each(
                self.pipeline, own, config, folder / TRAINING / f"{start:04d}", seed=seed,
                first=start, mesh=self.mesh, description=f"fine-tune {len(own)} classes",
            )  # fmt: skip
            for label, state in enumerate(states, start):
                write_adapter(folder / safe_name(self.dataset.class_names[label]), state)
        return {"adapters": len(each), "steps": config.num_steps(len(each[0]))}

    def _generate(self, name: str, folder: Path, seed: int, adapter: Artifact | None) -> Artifact:
        settings = {
            "generate": self.config.generate,
            "seed": seed,
            "base": self.pipeline.digest,
            "dtype": self.config.dtype,
            "prompts": self.prompts,
            "class_names": self.dataset.class_names,
        }

        def build(path: Path) -> dict:
            adapters, digests = None, []
            if adapter is not None:
                files = adapter_files(adapter.path, self.dataset.class_names)
                states = [read_adapter(file) for file in files]
                adapters = states if len(files) > 1 else states[0]
                digests = [file_digest(file) for file in files]
            generator = Generator(
                self.pipeline, self.prompts, self.config.generate, seed=seed, adapters=adapters,
                mesh=self._local_mesh,
            )  # fmt: skip
            count = fill_store(
                generator, path, self.dataset.class_names, self.prompts, self.config.generate,
                seed=seed, adapter_digests=digests, description="generate",
            )  # fmt: skip
            return {"images": count}

        return run_stage(
            name, folder, settings, {} if adapter is None else {"adapter": adapter}, build
        )

    @cached_property
    def _local_mesh(self) -> Mesh | None:
        """This process's devices: images need no other process."""
        devices = jax.local_devices()
        return None if len(devices) == 1 else make_mesh(devices=devices)

    def _classify(
        self,
        name: str,
        folder: Path,
        seed: int,
        inputs: dict[str, Artifact],
        *,
        drawn: Artifact | None = None,
        synthetic: Artifact | None = None,
    ) -> Artifact:
        """Train on the shots, the store, both or nothing (zero-shot), and score the test set."""
        trained = drawn is not None or synthetic is not None
        settings = {
            "data": self.data_identity,
            "clip": self.clip.digest,
            "dtype": self.config.dtype,
            "seed": seed,
        }
        if trained:
            images = self.config.generate.images_per_class * self.dataset.num_classes
            steps = self.config.classify.num_steps(images)
            settings |= {"classify": self.config.classify, "steps": steps}

        def build(path: Path) -> dict:
            model = self.clip.model
            if trained:
                shots = None if drawn is None else _read_shots(drawn)
                validation = None
                if shots is not None and shots.has_validation:
                    validation = shots.val_source(self.dataset)
                model = train_classifier(
                    self.clip, self.prompts, self.config.classify, path, steps=steps, seed=seed,
                    real=None if shots is None else shots.train_source(self.dataset),
                    synthetic=None if synthetic is None else ImageStore(synthetic.path),
                    validation=validation, mesh=self.mesh, description=name.split(":")[0],
                )  # fmt: skip
            return self._score(model, path)

        return run_stage(
            name, folder, settings, inputs, build, unlisted=("checkpoints/*", "*.jsonl")
        )

    def _below(self, shots: int, seed: int) -> Path:
        return self.folder / f"shots{shots}-seed{seed}"

    def _score(self, model: CLIPModel, folder: Path) -> dict:
        test: ImageSource = self.dataset.test
        logits = predict(self.clip, model, self.prompts, test, mesh=self._local_mesh)
        found = scores(logits, np.asarray(test.labels), self.dataset.class_names)
        if jax.process_index() == 0:
            np.save(folder / "logits.npy", logits)
            write_json(folder / "scores.json", found)
        return {"top1": found["top1"], "macro": found["macro"]}


def _name(shots: int, seed: int) -> str:
    return f"{shots} shots, seed {seed}"


def _read_shots(drawn: Artifact) -> Shots:
    return load_shots(drawn.path / "shots.json")


def write_adapter(folder: Path, state: AdapterState) -> None:
    """An adapter over UNet and text encoder: `pytorch_lora_weights.safetensors` of LoRA and DoRA.

    That is diffusers' file; any other kind is in this package's own, `adapter.safetensors`.
    """
    if jax.process_index():
        return
    if not fits_diffusers(state.config):
        write_state(folder / STATE_FILE, state)
        return
    write_diffusers(folder, split_networks(state))


def read_adapter(path: Path) -> AdapterState:
    """What `write_adapter` wrote, or another diffusers LoRA file, over both networks."""
    if path.name == STATE_FILE:
        return read_state(path)
    # The UNet first, as `FinetuneConfig` has it; the file's own order is that of its keys.
    states = dict(sorted(read_diffusers(path).items(), reverse=True))
    try:
        return join_networks(states)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def adapter_files(folder: Path, class_names: Sequence[str]) -> list[Path]:
    """The one file of a `dset` adapter, or the files of a `cls` one in class order."""
    names = (DIFFUSERS_WEIGHTS, STATE_FILE)
    places = [folder, *(folder / safe_name(class_name) for class_name in class_names)]
    found = [place / name for place in places for name in names if (place / name).is_file()]
    if len(found) not in (1, len(class_names)):
        raise UserError(f"{folder}: {len(found)} adapters, expected 1 or {len(class_names)}")
    return found
