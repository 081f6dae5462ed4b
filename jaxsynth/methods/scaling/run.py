"""Scaling studies: what synthetic images are worth, by their number, prompts and mixtures.

The study of Fan et al. (CVPR 2024, arXiv 2312.04567) with the ablations of Singh et al. (2024,
arXiv 2405.20469): classifiers are trained from scratch on growing sets of synthetic images, on
growing sets of real ones, and on both. Points share their images: a size is the start of the next
larger one. All points of a setting train in one program.

Below the run's folder:

    seed0/shots                  the real images of a seed, as lists of ids
    <source>/seed0/adapter       what the generator learned of them, for a source with shots
    <source>/seed0/images        the source's images
    <source>/seed0/kept          those that its filters keep, as places in the store
    <setting>/training           every point of a setting: networks, answers, ids of its images
    <setting>/robustness         the robustness suite's figures of the points that are judged
    clones/start/seed0/probe     what the features of a random backbone tell
    clones/<name>/seed0/{backbone,probe}
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh

from jaxsynth.core.console import console
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_json
from jaxsynth.core.preemption import Preempted
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompt_banks import PromptBank, make_bank
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import few_shot
from jaxsynth.methods.image_sets import Filtering, Generating, filter_images, generate_images
from jaxsynth.methods.scaling import report as pages
from jaxsynth.methods.scaling.clones import Cloning, Probing, probe_backbone, train_clone
from jaxsynth.methods.scaling.config import REAL, Config
from jaxsynth.methods.scaling.plan import plan
from jaxsynth.methods.scaling.points import Point, settings, source_of
from jaxsynth.methods.scaling.stages import (
    Drawing,
    Finetuning,
    Judging,
    Training,
    draw_real,
    judge_points,
    learn_shots,
    train_points,
)
from jaxsynth.runs.rehearsal import NotMade, rehearsing
from jaxsynth.runs.results import check_stages
from jaxsynth.runs.run import keep_record
from jaxsynth.runs.sources import clip_source, data_source, pipeline_source
from jaxsynth.runs.stage import Artifact, Source, StageError
from jaxsynth.training.loop import NonFiniteError
from jaxsynth.training.trainer import check_batches
from jaxsynth.weights.hf import Clip, StableDiffusion

__all__ = ["Config", "make", "plan", "report", "run"]

FAILED_FILE = "failed.json"

T = TypeVar("T")


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the study, then its page; returns the page's path."""
    make(config, workdir)
    return report(Path(workdir))


def make(config: Config, workdir: Path) -> None:
    """Every stage of the study.

    A setting that fails is named at the end and on the page, and the others go on.
    """
    run = _Run(config, Path(workdir))
    run.check()
    keep_record(run.folder, config)
    shots = {seed: run.draw(seed) for seed in config.seeds}
    failed: dict[str, str] = {}

    def attempt(what: str, *needed: str, work: Callable[[], T]) -> T | None:
        """What `work` makes; where it or what it needs failed, that is written down."""
        try:
            if broken := next((failed[name] for name in needed if name in failed), ""):
                raise UserError(broken)
            return work()
        except (Preempted, StageError, NotMade):
            # A changed setting or a damaged file is no failed point, and a rehearsal makes none.
            raise
        except (UserError, NonFiniteError) as error:
            failed[what] = str(error)
            console.print(f"{what}: failed: {error}", markup=False)
            return None

    images: dict[str, dict[int, Artifact] | None] = {REAL: {}}
    for name in config.sources:
        images[name] = attempt(
            f"images of {name}",
            work=lambda name=name: {s: run.generate(name, s, shots[s]) for s in config.seeds},
        )
    for setting, points in settings(config).items():
        name = source_of(setting)
        attempt(
            setting, f"images of {name}",
            work=lambda own=(setting, points), name=name: run.train(*own, shots, images[name]),
        )  # fmt: skip
    for name in ("start", *config.clones) if config.clones else ():
        attempt(
            f"clone {name}", f"images of {config.clone_source}",
            work=lambda name=name: [
                run.clone(name, seed, made)
                for seed, made in (images[config.clone_source] or {}).items()
            ],
        )  # fmt: skip
    if jax.process_index() == 0 and rehearsing() is None:
        write_json(run.folder / FAILED_FILE, failed)
    if all(setting in failed for setting in settings(config)):
        raise UserError(f"every setting failed, the first: {next(iter(failed.values()))}")


def report(workdir: Path) -> Path:
    """Writes the figures' files and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return pages.page_of(Path(workdir))
    check_stages(Path(workdir))
    return pages.write(Path(workdir))


@dataclass(frozen=True)
class _Run:
    """A study's inputs and stages."""

    config: Config
    folder: Path

    @cached_property
    def base(self) -> Source[StableDiffusion]:
        return pipeline_source(self.config.base, self.config.dtype)

    @cached_property
    def clip(self) -> Source[Clip]:
        return clip_source(self.config.clip)

    @cached_property
    def data(self) -> Source[Dataset]:
        return data_source(self.config.data)

    @cached_property
    def banks(self) -> dict[str, Source[PromptBank]]:
        return {name: self._bank(name) for name in self.config.sources}

    def _bank(self, name: str) -> Source[PromptBank]:
        prompts = self.config.sources[name].prompts
        return Source(lambda: make_bank(self.data.value, prompts), lambda found: found.digest)

    @cached_property
    def mesh(self) -> Mesh | None:
        return self.config.mesh.make()

    def check(self) -> None:
        """What is wrong with data, prompts, weights and devices is found before the first stage."""
        data, config = self.data.value, self.config
        few_shot(data, config.most_real, config.seeds[0])
        if config.sources:
            tokenizer = self.base.value.tokenizer
            if any(source.keep.takes_any for source in config.sources.values()):
                self.clip.value.tokenizer(list(class_prompts(data)))
            for bank in self.banks.values():
                tokenizer(list(bank.value.texts))
        if any(source.shots for source in config.sources.values()):
            check_batches({"finetune": config.finetune}, self.mesh)

    def draw(self, seed: int) -> Artifact:
        return draw_real(
            self.folder / f"seed{seed}" / "shots",
            Drawing(self.config.most_real, seed),
            label=f"real images: seed {seed}",
            data=self.data,
        )

    def generate(self, name: str, seed: int, shots: Artifact) -> Artifact:
        """A source's images of a seed, after its adapter if it has one."""
        config, source = self.config, self.config.sources[name]
        folder, adapter = self.folder / safe_name(name) / f"seed{seed}", None
        if source.shots:
            adapter = learn_shots(
                folder / "adapter",
                Finetuning(config.finetune, source.shots, seed, config.dtype),
                label=f"adapter {name}: seed {seed}",
                mesh=self.mesh,
                shots=shots,
                data=self.data,
                base=self.base,
            )
        generate = config.generate
        if source.guidance_scale is not None:
            generate = replace(generate, guidance_scale=source.guidance_scale)
        return generate_images(
            folder / "images",
            Generating(generate, seed, config.dtype),
            label=f"images {name}: seed {seed}",
            data=self.data,
            base=self.base,
            bank=self.banks[name],
            adapter=adapter,
        )

    def filter(
        self, name: str, seed: int, images: Artifact, shots: Artifact
    ) -> dict[str, Artifact]:
        """Which of a source's images are kept, where it filters any."""
        source = self.config.sources[name]
        keep, count = source.keep, source.shots if source.keep.needs_shots else 0
        if not keep.takes_any:
            return {}
        made = filter_images(
            self.folder / safe_name(name) / f"seed{seed}" / "kept",
            Filtering(keep, count),
            label=f"kept images {name}: seed {seed}",
            data=self.data,
            clip=self.clip,
            images=images,
            shots=shots if count else None,
        )
        return {f"kept{seed}": made}

    def train(
        self,
        setting: str,
        points: list[Point],
        shots: dict[int, Artifact],
        images: dict[int, Artifact],
    ) -> None:
        """All points of a setting, and the robustness of those that are judged."""
        config = self.config
        inputs = {f"images{seed}": made for seed, made in images.items()}
        for seed, made in images.items():
            inputs |= self.filter(source_of(setting), seed, made, shots[seed])
        if any(point.real for point in points):
            inputs |= {f"shots{seed}": made for seed, made in shots.items()}
        made = train_points(
            self.folder / safe_name(setting) / "training",
            Training(
                tuple(points),
                config.network,
                config.train,
                config.real_weight,
                config.points_at_once,
            ),
            label=f"training: {setting}",
            mesh=self.mesh,
            data=self.data,
            **inputs,
        )
        if {point.size for point in points} & {*config.judge.sizes} and ", mixed" not in setting:
            judge_points(
                self.folder / safe_name(setting) / "robustness",
                Judging(config.judge, config.network, config.seeds[0]),
                label=f"robustness: {setting}",
                data=self.data,
                training=made,
            )

    def clone(self, name: str, seed: int, images: Artifact) -> None:
        """A backbone trained on images, and its probe; for "start" that of its random start."""
        config, folder = self.config, self.folder / "clones" / safe_name(name) / f"seed{seed}"
        made = None
        if name != "start":
            made = train_clone(
                folder / "backbone",
                Cloning(config.clones[name], config.network, seed),
                label=f"clone {name}: seed {seed}",
                mesh=self.mesh,
                base=self.base,
                images=images,
            )
        probe_backbone(
            folder / "probe",
            Probing(config.probe, config.network, seed),
            label=f"probe of {name}: seed {seed}",
            mesh=self.mesh,
            data=self.data,
            clone=made,
        )
