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
    <source>/seed0/measured      how recognisable and diverse they are
    <setting>/training           every point of a setting: networks, answers, ids of its images
    <setting>/round0/...         the same of deliberate practice, a training for each size
    <setting>/round1/seed0/chosen  the images that it takes next, as places in the store
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
from jaxsynth.methods.scaling.points import Point, settings, source_of, trainings
from jaxsynth.methods.scaling.stages import (
    Choosing,
    Drawing,
    Finetuning,
    Measuring,
    choose_uncertain,
    draw_real,
    learn_shots,
    measure_images,
)
from jaxsynth.methods.scaling.trainings import (
    FAILED_FILE,
    Judging,
    Training,
    failures_of,
    judge_points,
    train_points,
)
from jaxsynth.runs.rehearsal import NotMade, rehearsing
from jaxsynth.runs.results import check_stages
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import clip_source, data_source, pipeline_source
from jaxsynth.runs.stage import Artifact, Source, StageError
from jaxsynth.tasks.networks import started
from jaxsynth.training.loop import NonFiniteError
from jaxsynth.training.trainer import check_batches
from jaxsynth.weights.hf import Clip, StableDiffusion
from jaxsynth.weights.networks.classifiers import Classifier, load_classifier

__all__ = ["Config", "make", "plan", "report", "run"]

T = TypeVar("T")


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the study, then its page; returns the page's path."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return report(Path(workdir))


def make(config: Config, workdir: Path) -> None:
    """Every stage of the study.

    A source without prompts, a point that a class has too few images for, a training that is not
    finite: each is named in one line and on the page, and the others go on.
    """
    run = _Run(config, Path(workdir))
    failed = run.check()
    for what, why in failed.items():
        console.print(f"{what}: failed: {why}", markup=False)
    keep_record(run.folder, config)
    shots = {seed: run.draw(seed) for seed in config.seeds}

    def attempt(what: str, *needed: str, work: Callable[[], T]) -> T | None:
        """What `work` makes; where it or what it needs failed, that is written down."""
        if what in failed:
            return None
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
    for setting in settings(config):
        name = source_of(setting)
        attempt(
            setting, f"images of {name}",
            work=lambda setting=setting, name=name: run.train(setting, shots, images[name]),
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
        for setting in settings(config):
            for folder in trainings(config, setting):
                for point, why in failures_of(run.folder / folder).items():
                    failed[f"{setting}: {point}"] = why
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

    @cached_property
    def backbone(self) -> dict[str, Source[Classifier]]:
        """The checkpoint that networks begin with, if there is one, as a stage's input."""
        if not self.config.backbone:
            return {}
        path = self.config.backbone
        return {"backbone": Source(lambda: load_classifier(path), lambda found: found.digest)}

    def check(self) -> dict[str, str]:
        """What is wrong with data, weights and devices is found before the first stage.

        Returns what is wrong with a source's prompts, by what fails.
        """
        failed: dict[str, str] = {}
        data, config = self.data.value, self.config
        few_shot(data, config.most_real, config.seeds[0])
        if config.sources:
            tokenizer = self.base.value.tokenizer
            if config.measured or any(x.keep.takes_any for x in config.sources.values()):
                self.clip.value.tokenizer(list(class_prompts(data)))
            for name, bank in self.banks.items():
                try:
                    tokenizer(list(bank.value.texts))
                except UserError as error:
                    failed[f"images of {name}"] = str(error)
        for given in self.backbone.values():
            started(config.network.make(0, jax.random.key(0)), config.network, given.value)
        if any(source.shots for source in config.sources.values()):
            check_batches({"finetune": config.finetune}, self.mesh)
        if config.train.streamed:
            check_batches({"train": config.train}, self.mesh)
        return failed

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
        images = generate_images(
            folder / "images",
            Generating(generate, seed, config.dtype),
            label=f"images {name}: seed {seed}",
            data=self.data,
            base=self.base,
            bank=self.banks[name],
            adapter=adapter,
        )
        if config.measured:
            measure_images(
                folder / "measured",
                Measuring(config.measured),
                label=f"recognisability {name}: seed {seed}",
                data=self.data,
                clip=self.clip,
                images=images,
            )
        return images

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

    def train(self, setting: str, shots: dict[int, Artifact], images: dict[int, Artifact]) -> None:
        """All points of a setting and the robustness of those that are judged."""
        config, kept = self.config, {}
        for seed, made in images.items():
            kept |= self.filter(source_of(setting), seed, made, shots[seed])
        inputs = {f"images{seed}": made for seed, made in images.items()}
        if any(point.real for point in settings(config)[setting]):
            inputs |= {f"shots{seed}": made for seed, made in shots.items()}
        made: Artifact | None = None
        for where, points in trainings(config, setting).items():
            folder, chosen = self.folder / where.parent, kept
            if made is not None:
                chosen = {
                    f"kept{point.seed}": self.choose(folder, point, inputs, kept, made)
                    for point in points
                }
            made = self.points(folder, setting, points, inputs | chosen)

    def choose(
        self,
        folder: Path,
        point: Point,
        inputs: dict[str, Artifact],
        kept: dict[str, Artifact],
        training: Artifact,
    ) -> Artifact:
        """The images of a point of deliberate practice, after the training of the size before."""
        name = f"kept{point.seed}"
        return choose_uncertain(
            folder / f"seed{point.seed}" / "chosen",
            Choosing(point.size, point.seed, self.config.network),
            label=f"chosen images {point.setting}: {point.size}, seed {point.seed}",
            data=self.data,
            images=inputs[f"images{point.seed}"],
            training=training,
            **({"kept": kept[name]} if name in kept else {}),
        )

    def points(
        self, folder: Path, setting: str, points: list[Point], inputs: dict[str, Artifact]
    ) -> Artifact:
        """One training of points, and the robustness of those that are judged."""
        config = self.config
        made = train_points(
            folder / "training",
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
            **self.backbone,
            **inputs,
        )
        if {point.size for point in points} & {*config.judge.sizes} and ", mixed" not in setting:
            judge_points(
                folder / "robustness",
                Judging(config.judge, config.network, config.seeds[0]),
                label=f"robustness: {setting}",
                data=self.data,
                training=made,
            )
        return made

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
                **self.backbone,
            )
        probe_backbone(
            folder / "probe",
            Probing(config.probe, config.network, seed),
            label=f"probe of {name}: seed {seed}",
            mesh=self.mesh,
            data=self.data,
            clone=made,
            **self.backbone,
        )
