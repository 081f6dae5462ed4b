"""Following condition images: adapters inside Stable Diffusion against a ControlNet beside it.

DiffScaler (Nair et al. 2024, arXiv 2404.09976) learns conditional tasks without a second network
and without zero convolutions, by new parameters in every layer, and names ControlNet (arXiv
2302.05543) as what it is to be held against: about 7 million parameters against 300. Both start as
the same base and see the same images, noise, times and prompts at every step
(`training.controlled`). What they learnt is measured twice: by the error of the noise on held-out
images, with their own condition, with another image's and with none; and on images drawn for
held-out conditions, in which the condition is found again (`quality.following`).

Below the run's folder:

    triples                        latents, conditions and prompts of the data set
    ways/<way>/<rate>-seed<n>      what was learnt, its errors, and images drawn with it
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import extract
from jaxsynth.adapters.kinds.affiner import AffinerConfig
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.data.conditions import CHANNELS, as_bytes, source_conditions
from jaxsynth.data.dataset import DataConfig, Dataset
from jaxsynth.data.load import load_dataset
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.controlled import draw_controlled
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.models.diffusion.controlled import Controlled
from jaxsynth.quality.adherence import MEASURES, agreement
from jaxsynth.report.grids import write_grid
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.runs.results import stage_details
from jaxsynth.runs.stage import MANIFEST, Artifact, load_artifact, run_stage
from jaxsynth.tasks.controlled import (
    ControlConfig,
    Triples,
    encode_triples,
    finetune_controlled,
    held_out_error,
    num_trainable,
    with_adapters,
    with_controlnet,
)
from jaxsynth.weights.adapters.native import write_state
from jaxsynth.weights.hf import StableDiffusion, load_pipeline

TRAINING = ".training"
# Every layer but the first, which the condition's own input wraps.
ALL = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "time_emb_proj", "linear_1", "linear_2",
)  # fmt: skip
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SHOWN = 4

# The way that a run's `--config.adapter=` means.
CHOSEN = "adapter"

# Of the pipeline, the condition's channels, the rank, the chosen adapter and a key.
Build = Callable[[StableDiffusion, int, int, AdapterChoice, jax.Array], Controlled]


def _by_adapters(make: Callable[[int], Any]) -> Build:
    def build(pipeline, channels, rank, _, key) -> Controlled:
        return _adapted(pipeline, channels, make(rank), key)

    return build


def _adapted(pipeline: StableDiffusion, channels: int, config: Any, key: jax.Array) -> Controlled:
    maker, targets = (None, ()) if config is None else (registry.maker(config), config.targets)
    return with_adapters(pipeline, channels, maker, targets, rngs=nnx.Rngs(key))


def _chosen(pipeline, channels, rank, adapter: AdapterChoice, key) -> Controlled:
    return _adapted(pipeline, channels, adapter.config(targets=ALL, defaults={"rank": rank}), key)


def _controlnet(pipeline, channels, _, __, key) -> Controlled:
    return with_controlnet(pipeline, channels, rngs=nnx.Rngs(key))


def _affiner(targets: tuple[str, ...]) -> Build:
    return _by_adapters(lambda rank: AffinerConfig(rank=rank, targets=targets, gate=False))


WAYS: dict[str, tuple[str, Build]] = {
    "controlnet": ("ControlNet", _controlnet),
    "affiner": ("Affiner (all layers)", _affiner(ALL)),
    "affiner_attention": ("Affiner (attention)", _affiner(ATTENTION)),
    "lora": ("LoRA (all layers)", _by_adapters(lambda rank: LoRAConfig(rank=rank, targets=ALL))),
    "input": ("new input alone", _by_adapters(lambda _: None)),
    CHOSEN: ("chosen adapter", _chosen),
}


@dataclass(frozen=True)
class Config:
    """One run.

    `base` is a Stable Diffusion folder, hub id or "tiny"; `data` the images, and `kind` the
    condition (`data.conditions`), whose files lie in `condition_folder` where images do not tell
    it. `ways` are compared at every rate of `rates` (by a way's name, or "adapter" for all but the
    ControlNet) with the first seed, then at the rate of the least validation error with all.
    `images` are drawn for each. `adapter` is a kind of adapter on all layers, of this `rank` unless
    it says so: a further way, named "adapter".
    """

    method: str = "controlled"
    base: str = "tiny"
    data: DataConfig = field(default_factory=DataConfig)
    kind: str = "edges"
    condition_folder: str = ""
    ways: tuple[str, ...] = tuple(name for name in WAYS if name != CHOSEN)
    adapter: AdapterChoice | None = None
    rank: int = 8
    train: ControlConfig = field(default_factory=ControlConfig)
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    error_repeats: int = 8
    images: int = 64
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self):
        if self.adapter is not None:
            others = tuple(name for name in self.ways if name != CHOSEN)
            object.__setattr__(self, "ways", (*others, CHOSEN))
        elif CHOSEN in self.ways:
            raise ValueError(f"ways: {CHOSEN!r} is what `adapter` chooses, and it is not set")
        for name, values, known in (
            ("kind", (self.kind,), CHANNELS),
            ("ways", self.ways, WAYS),
            ("rates", self.rates, (*WAYS, "adapter")),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"{name}: {unknown[0]!r}, expected some of {', '.join(known)}")
        if not self.ways or not self.seeds or self.images < 1:
            raise ValueError("ways, seeds and images: expected at least one of each")
        for way in self.ways:
            if not self.rates_of(way):
                raise ValueError(f"rates: none for {way!r}")

    def rates_of(self, way: str) -> tuple[float, ...]:
        """The learning rates to try for a way."""
        group = "" if way == "controlnet" else "adapter"
        return tuple(self.rates.get(way, self.rates.get(group, ())))


def run(config: Config, workdir: Path) -> Path:
    """Every way at every rate, then every seed; returns the page's path."""
    work = _Work(config, Path(workdir))
    for way in config.ways:
        errors = {
            rate: work.train(way, rate, config.seeds[0]).counts["validation"]
            for rate in config.rates_of(way)
        }
        rate = min(errors, key=lambda rate: errors[rate])
        for seed in config.seeds[1:]:
            work.train(way, rate, seed)
    return report(work.folder)


class _Work:
    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def pipeline(self) -> StableDiffusion:
        return load_pipeline(self.config.base)

    @cached_property
    def dataset(self) -> Dataset:
        return load_dataset(self.config.data)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.pipeline.scheduler_config)

    @cached_property
    def triples(self) -> Artifact:
        """train, validation (the even images of the test part) and test (the odd ones)."""
        config = self.config

        def build(path: Path) -> dict:
            pipeline, names = self.pipeline, self.dataset.display_names
            size = pipeline.unet.config.sample_size * pipeline.vae.config.downscale
            folder = config.condition_folder or None
            counts = {}
            for part, source in (("train", self.dataset.train), ("test", self.dataset.test)):
                condition = source_conditions(source, config.kind, size, folder=folder)
                prompts = [self.dataset.template.format(names[label]) for label in source.labels]
                images = [source[i].image for i in range(len(source))]
                triples = encode_triples(pipeline, images, prompts, condition)
                rows = {"train": slice(None)}
                if part == "test":
                    rows = {"validation": slice(0, None, 2), "test": slice(1, None, 2)}
                for name, own in rows.items():
                    found = _rows(triples, own)
                    np.savez_compressed(path / f"{name}.npz", **vars(found))
                    (path / f"{name}.json").write_text(json.dumps(prompts[own]), "utf-8")
                    counts[name] = len(found)
            return counts

        settings = {
            "data": config.data,
            "kind": config.kind,
            "files": config.condition_folder,
            "base": self.pipeline.digest,
        }
        return run_stage("triples", self.folder / "triples", settings, {}, build)

    def part(self, name: str) -> Triples:
        with np.load(self.triples.path / f"{name}.npz", allow_pickle=False) as file:
            return Triples(**file)

    def train(self, way: str, rate: float, seed: int) -> Artifact:
        """One way at one rate, its errors and its images."""
        config = self.config
        train = dataclasses.replace(config.train, learning_rate=rate)
        settings = {
            "way": way,
            "rank": config.rank,
            "train": train,
            "seed": seed,
            "error_repeats": config.error_repeats,
            "images": config.images,
            "generate": config.generate,
            "base": self.pipeline.digest,
            **({"adapter": config.adapter} if way == CHOSEN else {}),
        }

        def build(folder: Path) -> dict:
            channels, key = CHANNELS[config.kind], jax.random.key(seed)
            adapter = config.adapter or AdapterChoice()
            model = WAYS[way][1](self.pipeline, channels, config.rank, adapter, key)
            counts = {
                "trainable": num_trainable(model),
                "whole": sum(x.size for x in jax.tree.leaves(nnx.state(self.pipeline.unet))),
            }
            model = finetune_controlled(
                self.pipeline, model, self.part("train"), train, folder / TRAINING, seed=seed,
                description=f"{way} {rate:g}",
            )  # fmt: skip
            write_state(folder / "learnt.safetensors", extract(model))
            return counts | self._errors(model) | self._following(model, folder)

        return run_stage(
            f"{way}: rate {rate:g}, seed {seed}",
            self.folder / "ways" / way / f"{rate:g}-seed{seed}",
            settings,
            {"triples": self.triples},
            build,
            unlisted=(f"{TRAINING}/*",),
        )

    def _errors(self, model: Controlled) -> dict[str, float]:
        test = self.part("test")

        def error(triples: Triples, **more) -> float:
            repeats = self.config.error_repeats
            return held_out_error(model, triples, self.schedule, seed=0, repeats=repeats, **more)

        def told(condition: np.ndarray) -> Triples:
            return dataclasses.replace(test, condition=condition)

        return {
            "validation": error(self.part("validation")),
            "own": error(test),
            "another": error(told(np.roll(test.condition, 1, axis=0))),
            "none": error(told(np.zeros_like(test.condition))),
        }

    def _following(self, model: Controlled, folder: Path) -> dict[str, float]:
        config, test = self.config, self.part("test")
        prompts = read_json(self.triples.path / "test.json", list[str])
        rows = np.arange(config.images) % len(test)
        given = test.condition[rows]
        chosen = [prompts[row] for row in rows]
        # The conditions are those of the first seed's noise for every way alike.
        images = draw_controlled(
            self.pipeline, model, chosen, given, config.generate, seed=config.seeds[0]
        )
        line = []
        for image, condition in list(zip(images, as_bytes(given), strict=True))[: SHOWN * SHOWN]:
            line += [condition[..., 0] if condition.shape[-1] == 1 else condition, image]
        write_grid(
            folder / "samples.png",
            [line[i : i + 2 * SHOWN] for i in range(0, len(line), 2 * SHOWN)],
            [""] * -(-len(line) // (2 * SHOWN)),
            headings=["condition", "drawn"] * SHOWN,
        )
        return {
            "follows": float(agreement(config.kind, images, given).mean()),
            "follows_another": float(
                agreement(config.kind, images, np.roll(given, 1, axis=0)).mean()
            ),
        }


def _rows(triples: Triples, rows: slice) -> Triples:
    """Some of the images, with all texts."""
    own = {name: getattr(triples, name)[rows] for name in ("mean", "std", "condition", "prompt")}
    return dataclasses.replace(triples, **own)


def report(workdir: Path) -> Path:
    """Writes results.json, the table and report.html from the finished stages."""
    workdir = Path(workdir)
    results = []
    for path in sorted(workdir.glob(f"ways/*/*-seed*/{MANIFEST}")):
        stage = load_artifact(path.parent)
        config = stage.manifest["config"]
        results.append(
            {
                "way": config["way"],
                "rate": config["train"]["learning_rate"],
                "seed": config["seed"],
                **stage.counts,
                "seconds": stage.manifest["seconds"],
                "artifact": path.parent.relative_to(workdir).as_posix(),
            }
        )
    if not results:
        raise FileNotFoundError(f"{workdir}: no finished run (ways/<way>/<rate>-seed<n>)")
    page = workdir / "report.html"
    if jax.process_index():
        return page
    write_json(workdir / "results.json", results)
    kind = load_artifact(workdir / "triples").manifest["config"]["kind"]
    tables = [compared(results, kind), followed(results, kind)]
    for table in tables:
        console.print(to_rich(table))
    (workdir / "table.md").write_text("\n\n".join(map(to_markdown, tables)) + "\n", "utf-8")
    pictures = [
        Picture(
            workdir / best(results, way)[0]["artifact"] / "samples.png",
            f"{label}.",
            pixelated=True,
        )
        for way, (label, _) in WAYS.items()
        if best(results, way)
    ]
    return write_page(
        page,
        "Following conditions",
        [
            Section(
                f"Ways to follow {kind}",
                "Mean squared error of the predicted noise on held-out images, at the same times "
                "and noises for every way: with an image's own condition, with another image's, "
                "and with none. The learning rate was chosen with the first seed on one half of "
                "the held-out images, the errors are of the other. Drawn images are compared with "
                "the condition that they were drawn for and with that of another.",
                tables=tables,
                images=pictures,
            ),
            Section("How it was made", details=stage_details(workdir)),
        ],
        subtitle="Adapters inside the base against a network beside it.",
        facts=[("condition", kind), ("runs", str(len(results)))],
    )


def best(results: list[dict], way: str) -> list[dict]:
    """A way's runs at the rate that the first seed's validation chose."""
    own = [result for result in results if result["way"] == way]
    first = min((result["seed"] for result in own), default=0)
    tried = [result for result in own if result["seed"] == first]
    if not tried:
        return []
    rate = min(tried, key=lambda result: result["validation"])["rate"]
    return [result for result in own if result["rate"] == rate]


def compared(results: list[dict], kind: str) -> Table:
    """What each way learns, and its errors."""
    body = []
    for way, (label, _) in WAYS.items():
        if not (runs := best(results, way)):
            continue
        errors = (Measure(tuple(run[key] for run in runs)) for key in ("own", "another", "none"))
        share = runs[0]["trainable"] / runs[0]["whole"]
        body.append(
            [label, f"{runs[0]['trainable']:,}", f"{share:.1%}", f"{runs[0]['rate']:g}", *errors]
        )
    return Table(
        ["Way", "trained", "of base", "rate", "own", "another's", "none"],
        body,
        caption=f"{kind}: error x 1000 by the condition given, mean ± standard deviation of seeds",
        better="lower",
        scale=1000,
        digits=1,
    )


def followed(results: list[dict], kind: str) -> Table:
    """How closely drawn images follow their conditions."""
    body = []
    for way, (label, _) in WAYS.items():
        if runs := best(results, way):
            keys = ("follows", "follows_another")
            body.append([label, *(Measure(tuple(run[key] for run in runs)) for key in keys)])
    return Table(
        ["Way", "its own", "another's"],
        body,
        caption=f"{MEASURES[kind]} of drawn images with a condition; higher is better for its own",
        better=None,
        digits=3,
    )
