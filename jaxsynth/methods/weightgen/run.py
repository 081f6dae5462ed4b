"""Denoised neural weights (Gong et al. 2024, arXiv 2407.11966): initial weights made from a text.

A small image editor (E2GAN) learns a few concepts by their texts and is frozen. Many concepts get a
LoRA around it, all trained together from one shared start, and a diffusion model learns to make
such LoRAs from texts. For unseen concepts what it makes is fine-tuned, and so are the baselines
that the paper leaves out.

Below the run's folder, for each seed, which also decides what is unseen:

    seed<k>/concepts            what a language model was asked for, where one is
    seed<k>/edited/<part>       edits by a diffusion model, where there is one
    seed<k>/base                the editor, trained on some of the concepts
    seed<k>/collection          LoRAs of the training concepts, as blocks
    seed<k>/generators/<name>   a generator of weights for each of `generators`
    seed<k>/ablation            what each of them is worth on validation concepts
    seed<k>/comparison          curves from every kind of initial weights
"""

import dataclasses
from functools import cached_property
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxsynth.data.dataset import Dataset
from jaxsynth.data.procedural.concepts import Concept, read_concepts, split_concepts
from jaxsynth.methods.weightgen import report as pages
from jaxsynth.methods.weightgen.config import Config
from jaxsynth.methods.weightgen.editors import Scratch
from jaxsynth.methods.weightgen.edits import Scene
from jaxsynth.methods.weightgen.plan import fitting_group, plan
from jaxsynth.methods.weightgen.stages import (
    CONCEPTS,
    GENERATOR,
    Ablation,
    Asking,
    BaseTraining,
    Collecting,
    Comparison,
    Editing,
    GeneratorTraining,
    ablate,
    ask_server,
    collect_adapters,
    compare_weights,
    edit_photos,
    train_editor,
    train_weights,
)
from jaxsynth.runs.results import check_stages
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import data_source, pipeline_source
from jaxsynth.runs.stage import Artifact, Source
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import EDITING, PIPELINES, StableDiffusion, load_pipeline

__all__ = ["Config", "make", "plan", "report", "run"]

PARTS = ("train", "validation", "unseen")


def run(config: Config, workdir: Path) -> Path:
    """Every stage of every seed, then the page; returns the page's path."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return report(workdir)


def make(config: Config, workdir: Path) -> None:
    """Every stage of every seed."""
    workdir = Path(workdir)
    keep_record(workdir, config)
    sources = _Sources(config)
    for seed in config.seeds:
        _Seed(config, workdir / f"seed{seed}", seed, sources).compare()


def report(workdir: Path) -> Path:
    """Writes results.json and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return pages.page_of(Path(workdir))
    check_stages(Path(workdir))
    return pages.write(Path(workdir))


@dataclasses.dataclass(frozen=True)
class _Sources:
    """What all seeds read."""

    config: Config

    @cached_property
    def data(self) -> Source[Dataset]:
        return data_source(self.config.data)

    @cached_property
    def text(self) -> Source[StableDiffusion]:
        return pipeline_source(self.config.text, kinds=PIPELINES)

    @cached_property
    def editing(self) -> Source[StableDiffusion]:
        model = self.config.edits.model
        return Source(lambda: load_pipeline(model, kinds=EDITING), lambda found: found.digest)

    @cached_property
    def mesh(self) -> Mesh | None:
        return self.config.mesh.make()

    @cached_property
    def group(self) -> int:
        """How many LoRAs train together, 0: all."""
        config = self.config
        if config.editor.group or not config.memory:
            return config.editor.group
        return fitting_group(config, self.mesh or make_mesh(devices=jax.devices()[:1]))


@dataclasses.dataclass(frozen=True)
class _Seed:
    """One seed's concepts, and the order of its stages."""

    config: Config
    folder: Path
    seed: int
    sources: _Sources

    @cached_property
    def concepts(self) -> dict[str, list[Concept]]:
        """Train, validation and unseen concepts."""
        wanted = self.config.concepts
        if wanted.source == "server":
            asked = ask_server(
                self.folder / "concepts",
                Asking(wanted.model, wanted.families, wanted.each, self.seed),
                label=self.label("concepts"),
                # What a server answers cannot be known before it is asked.
                server=Source(lambda: wanted.url, "server"),
            )
            found = read_concepts(asked.path / CONCEPTS)
        else:
            found = wanted.load(self.seed)
        rest = wanted.validation + wanted.unseen
        train, others = split_concepts(found, wanted.train, rest, seed=self.seed)
        return {
            "train": train,
            "validation": others[: wanted.validation],
            "unseen": others[wanted.validation :],
        }

    def scene(self, part: str) -> Scene:
        """The concepts of a part, numbered after those of the parts before it."""
        before = PARTS[: PARTS.index(part)]
        first = sum(len(self.concepts[name]) for name in before)
        own, config = tuple(self.concepts[part]), self.config
        return Scene(own, first, config.photos, config.held_out, self.seed)

    def label(self, name: str) -> str:
        return f"seed {self.seed}: {name}"

    def edited(self, part: str) -> Artifact | None:
        """A part's photos as a diffusion model edits them; None for procedural edits."""
        edits = self.config.edits
        if edits.kind == "procedural":
            return None
        return edit_photos(
            self.folder / "edited" / part,
            Editing(self.scene(part), edits.how),
            label=self.label(f"edited, {part}"),
            data=self.sources.data,
            model=self.sources.editing,
        )

    @cached_property
    def base(self) -> Artifact:
        """The editor, trained with text on the first concepts."""
        config, scene = self.config, self.scene("train")
        first = dataclasses.replace(scene, concepts=scene.concepts[: config.concepts.base])
        return train_editor(
            self.folder / "base",
            BaseTraining(first, config.networks, config.editor.base),
            label=self.label("base"),
            mesh=self.sources.mesh,
            data=self.sources.data,
            text=self.sources.text,
            edited=self.edited("train"),
        )

    @cached_property
    def collection(self) -> Artifact:
        """LoRAs of the training concepts."""
        config, editor = self.config, self.config.editor
        return collect_adapters(
            self.folder / "collection",
            Collecting(
                self.scene("train"), config.networks, config.adapter, editor.together,
                config.checkpoints, editor.every, self.sources.group, editor.share, editor.own,
            ),
            label=self.label("collection"),
            mesh=self.sources.mesh,
            base=self.base,
            data=self.sources.data,
            text=self.sources.text,
            edited=self.edited("train"),
        )  # fmt: skip

    @cached_property
    def generators(self) -> dict[str, Artifact]:
        """The generators of weights, by their names as inputs."""
        config = self.config
        return {
            GENERATOR + name: train_weights(
                self.folder / "generators" / name,
                GeneratorTraining(variant, config.networks, config.adapter, self.seed),
                label=self.label(f"generator {name}"),
                mesh=self.sources.mesh,
                base=self.base,
                collection=self.collection,
                text=self.sources.text,
            )
            for name, variant in config.generators.items()
        }

    @cached_property
    def ablation(self) -> Artifact:
        """Every generator on validation concepts."""
        config, editor = self.config, self.config.editor
        return ablate(
            self.folder / "ablation",
            Ablation(
                self.scene("validation"), config.networks, config.adapter, config.generators,
                config.few_steps, editor.tune, config.ablation_at, editor.pairs,
            ),
            label=self.label("ablation"),
            base=self.base,
            collection=self.collection,
            data=self.sources.data,
            text=self.sources.text,
            edited=self.edited("validation"),
            **self.generators,
        )  # fmt: skip

    def compare(self) -> Artifact:
        """Unseen concepts from every kind of initial weights."""
        config, editor = self.config, self.config.editor
        return compare_weights(
            self.folder / "comparison",
            Comparison(
                self.scene("unseen"), config.networks, config.adapter, config.generators,
                config.few_steps, editor.tune, editor.tune_at, editor.pairs,
                Scratch(editor.pix2pix, editor.scratch, editor.scratch_at), config.noise,
            ),
            label=self.label("comparison"),
            base=self.base,
            collection=self.collection,
            ablation=self.ablation,
            data=self.sources.data,
            text=self.sources.text,
            edited=self.edited("unseen"),
            **self.generators,
        )  # fmt: skip
