"""How robust classifiers are: one table of metrics with intervals, and paired differences.

Each model is a checkpoint with a head (`weights.networks.classifiers`), or a CLIP: as it is, with
an adapter (of a DataDream run's classifier, say), or trained here on drawn pictures. All are asked
about the same sets, drawn (`data.procedural.cues`) or published ones (`sets`): pictures as they
are, shifted, of no class, under attack, corrupted, in uncommon contexts, with conflicting cues, on
other backgrounds. The metrics are made from the predictions alone, so they are made again without a
model, in both modes.

Below the run's folder:

    <model>/training, <model>/answers    its training, where it is trained here; its predictions
    figures                              the metrics of all models
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from jax.sharding import Mesh

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.errors import UserError
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.data.prompts import read_templates
from jaxsynth.methods.robustness.config import Config, ModelConfig
from jaxsynth.methods.robustness.report import report
from jaxsynth.methods.robustness.sets import Loaded, load_sets
from jaxsynth.methods.robustness.stages import (
    Asking,
    Measuring,
    Training,
    adapter_files,
    check_classes,
    measure_models,
    predict_sets,
    train_model,
)
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import clip_source, content_digest, files_digest
from jaxsynth.runs.stage import Artifact, Source
from jaxsynth.tasks.clip_classifier import classifier_task
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.weights.adapters.peft import read_peft
from jaxsynth.weights.hf import Clip, describe_clip
from jaxsynth.weights.networks.classifiers import Classifier, load_classifier
from jaxsynth.weights.preprocessing import named_preprocessing

__all__ = ["Config", "make", "plan", "report", "run"]


def run(config: Config, workdir: Path) -> Path:
    """Every stage, then the page; returns the page's path."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return report(Path(workdir))


def make(config: Config, workdir: Path) -> None:
    """Every stage."""
    run = _Run(config, Path(workdir))
    run.check()
    keep_record(run.folder, config)
    predictions = {name: run.predictions(name) for name in config.models}
    measure_models(
        run.folder / "figures",
        Measuring(
            tuple(config.models), config.mode, config.baseline, config.resamples, config.seed
        ),
        label="figures",
        **{f"model{i}": made for i, made in enumerate(predictions.values())},
    )


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """The training of each model that is trained here; attacks and corruptions are not planned.

    UserError where none is.
    """
    prompts = [config.template.format(word) for word in SHAPES]
    images = config.train_per_class * len(SHAPES)

    def build(name: str, clip: Clip, batch: int) -> Plan:
        sized = replace(config.classify, batch_size=batch)
        task = classifier_task(clip, prompts, sized, seed=config.seed, both=False)
        return trainer.plan(name, task, sized.sized(images), mesh)

    def updates(batch: int) -> int:
        return replace(config.classify, batch_size=batch).sized(images).steps

    batch, unit = config.classify.batch_size, rows_of(mesh) * config.classify.accumulate
    programs = []
    for model_name, model in config.models.items():
        if model.train_on:
            name = f"training of {model_name}"
            compile_ = partial(build, name, describe_clip(model.clip))
            programs.append(Program(name, compile_, "classify.batch_size", batch, unit, updates))
    if not programs:
        raise UserError("models: none is trained here (train_on), so there is nothing to plan")
    return programs


@dataclass(frozen=True)
class _Run:
    """A run's inputs and stages."""

    config: Config
    folder: Path

    @cached_property
    def sets(self) -> Source[Loaded]:
        config = self.config

        def load() -> Loaded:
            sizes = {"size": config.image_size, "per_class": config.per_class}
            return load_sets(config.sets, **sizes, seed=config.seed)

        return Source(load, content_digest)

    @cached_property
    def mesh(self) -> Mesh | None:
        return self.config.mesh.make()

    @cached_property
    def _clips(self) -> dict[str, Source[Clip]]:
        paths = {model.clip for model in self.config.models.values() if not model.checkpoint}
        return {path: clip_source(path) for path in paths}

    @cached_property
    def _checkpoints(self) -> dict[ModelConfig, Source[Classifier]]:
        models = {model for model in self.config.models.values() if model.checkpoint}
        return {model: _checkpoint_source(model) for model in models}

    def check(self) -> None:
        """What is wrong with models and sets is found before the first stage."""
        words = self.sets.value.words
        for name, model in self.config.models.items():
            if model.checkpoint:
                found = self._checkpoints[model].value
                check_classes(f"config.models.{name}: {model.checkpoint}", found, words)
                continue
            size = self._clips[model.clip].value.image_size
            if self.config.sets.drawn and size != self.config.image_size:
                raise UserError(
                    f"config.models.{name}: {model.clip} takes {size} pixels, "
                    f"config.image_size is {self.config.image_size}"
                )

    def predictions(self, name: str) -> Artifact:
        """The stage of a model's predictions, after that of its training if it is trained here."""
        config, model = self.config, self.config.models[name]
        templates: tuple[str, ...] = ()
        if not model.checkpoint:
            given = model.templates
            templates = tuple(read_templates(given)) if given else (config.template,)
        return predict_sets(
            self.folder / name / "answers",
            Asking(
                templates,
                config.eps,
                config.autoattack,
                config.corruptions,
                config.baseline == "alexnet",
                config.batch_size,
                config.seed,
            ),
            label=f"answers of {name}",
            sets=self.sets,
            clip=None if model.checkpoint else self._clips[model.clip],
            checkpoint=self._checkpoints.get(model),
            adapter=_adapter_source(model.adapter) if model.adapter else None,
            training=self.train(name) if model.train_on else None,
        )

    def train(self, name: str) -> Artifact:
        """The stage that trains a model."""
        config, model = self.config, self.config.models[name]
        return train_model(
            self.folder / name / "training",
            Training(
                config.classify,
                model.train_on,
                tuple(config.template.format(word) for word in self.sets.value.words),
                config.image_size,
                config.train_per_class,
                config.seed,
            ),
            label=f"training of {name}",
            mesh=self.mesh,
            clip=self._clips[model.clip],
        )


def _checkpoint_source(model: ModelConfig) -> Source[Classifier]:
    def load() -> Classifier:
        given = named_preprocessing(model.preprocessing) if model.preprocessing else None
        return load_classifier(model.checkpoint, model.head or None, preprocess=given)

    return Source(load, lambda found: content_digest((found.digest, found.preprocessing)))


def _adapter_source(path: str) -> Source[AdapterState]:
    return Source(lambda: read_peft(path), lambda _: files_digest(adapter_files(path)))
