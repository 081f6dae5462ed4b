"""How robust classifiers are: one table of figures with intervals, and paired differences.

Each model is a checkpoint with a head (`weights.classifiers`), or a CLIP: as it is, with an adapter
(of a DataDream run's classifier, say), or trained here on drawn pictures. All are asked about the
same sets, drawn (`data.cues`) or published ones (`robustness_sets`): pictures as they are, shifted,
of no class, under attack, corrupted, in uncommon contexts, with conflicting cues, on other
backgrounds. Stages: a model's training, where it is trained here; its answers; the figures of all
of them. The figures are made from the answers alone, so they are made again without a model, in
both modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import jax
from jax.tree_util import Partial

from jaxsynth.adapters.inject import extract
from jaxsynth.core.errors import UsageError, UserError
from jaxsynth.core.io import write_json
from jaxsynth.data.decode import square
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.data.prompts import read_templates
from jaxsynth.methods.robustness.report import report
from jaxsynth.methods.robustness.sets import Loaded, SetsConfig, load_sets
from jaxsynth.models.clip import CLIPModel
from jaxsynth.robustness import bias_sets, suite
from jaxsynth.robustness.corruptions.predictions import Corruptions
from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.bootstrap import Interval
from jaxsynth.robustness.metrics.corruption import by_severity, check_alexnet
from jaxsynth.robustness.predictors import Preprocess
from jaxsynth.runs.stage import Artifact, run_stage
from jaxsynth.tasks.clip_classifier import ClassifyConfig, of_pixels, train_classifier
from jaxsynth.weights.adapters.diffusers import attach, read_peft, write_peft
from jaxsynth.weights.hf import Clip, load_clip
from jaxsynth.weights.networks.classifiers import Classifier, load_classifier
from jaxsynth.weights.preprocessing import named_preprocessing

VARIANTS = ("", *bias_sets.VARIANTS)
# Drawn from other random numbers than the pictures that models are asked about.
_TRAINING_SEED = 1_000_003


@dataclass(frozen=True)
class ModelConfig:
    """A classifier: a checkpoint with a head of its own, or a CLIP by the prompts of the classes.

    checkpoint: a folder, hub id or file that `load_classifier` takes (ViT, DeiT, ResNet, ConvNeXt,
    Swin, DINOv2, MAE). head: a file with its linear head, where it has none. preprocessing: where
    it tells none, "imagenet" or a preprocessor_config.json.
    clip: a folder, hub id or "tiny/clip". templates: "" for the run's template, "imagenet7", or a
    file with one a line, over which a class's text is averaged. adapter: a peft folder around it.
    train_on: "", or the drawn set that adapters are trained on here, "original" or "mixed_rand"
    backgrounds. At most one of the two.
    """

    checkpoint: str = ""
    head: str = ""
    preprocessing: str = ""
    clip: str = "tiny/clip"
    templates: str = ""
    adapter: str = ""
    train_on: str = ""

    def __post_init__(self):
        if self.train_on not in VARIANTS:
            raise ValueError(f"train_on: expected one of {VARIANTS}, found {self.train_on!r}")
        if self.adapter and self.train_on:
            raise ValueError("adapter and train_on: expected one of them at most")
        if self.checkpoint:
            for name in ("templates", "adapter", "train_on"):
                if getattr(self, name):
                    raise ValueError(f"{name}: of a CLIP, but this model is a checkpoint")
        elif self.head or self.preprocessing:
            raise ValueError("head and preprocessing: of a checkpoint, but there is none")


@dataclass(frozen=True)
class Config:
    """One run: every model on every set.

    sets: what models are asked about, by default drawn pictures: image_size of them, per_class
    pictures a class of each set (the other sets have as many of each of their kinds).
    train_per_class: pictures a class that a model is trained on here. eps: the attacks' radius in
    the largest change of a pixel. autoattack: AutoAttack too, which takes far longer. corruptions:
    those made of the clean images. baseline: what mCE divides by, "alexnet" or one of the models,
    which the others are then compared with; "" for no mCE. resamples: of the bootstrap. template: a
    prompt with one {} for the class.
    """

    method: str = "robustness"
    models: dict[str, ModelConfig] = field(default_factory=dict)
    mode: str = "corrected"
    sets: SetsConfig = field(default_factory=SetsConfig)
    corruptions: Corruptions = field(default_factory=Corruptions)
    baseline: str = ""
    template: str = "a photo of a {}"
    image_size: int = 32
    per_class: int = 24
    train_per_class: int = 64
    eps: float = 1 / 255
    autoattack: bool = False
    batch_size: int = 64
    resamples: int = 2000
    seed: int = 0
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)

    def __post_init__(self):
        if not self.models:
            raise ValueError("models: expected at least one")
        if self.mode not in ("corrected", "paper"):
            raise ValueError(f"mode: expected 'corrected' or 'paper', found {self.mode!r}")
        if self.baseline not in ("", "alexnet", *self.models):
            raise ValueError(
                f"baseline: expected alexnet or one of {list(self.models)}, found {self.baseline!r}"
            )
        for name, model in self.models.items():
            if model.train_on and not self.sets.drawn:
                raise ValueError(
                    f"models.{name}.train_on: trains on drawn shapes, but sets.clean is "
                    f"{self.sets.clean.source}"
                )
        if self.per_class < 1 or self.train_per_class < 1:
            raise ValueError("per_class and train_per_class: expected 1 or more")


def run(config: Config, workdir: Path) -> Path:
    """Every stage, then the page; returns the page's path."""
    work = _Work(config, Path(workdir))
    answers = {name: work.answers(name) for name in config.models}
    run_stage(
        "figures",
        work.folder / "figures",
        {key: getattr(config, key) for key in ("mode", "baseline", "resamples", "seed")},
        answers,
        lambda folder: _figures(config, answers, folder),
    )
    return report(work.folder)


class _Work:
    """A run's sets and CLIPs, loaded when a stage first needs them, and its stages."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        for name in config.models:
            if not name or "/" in name or name == "figures":
                raise UsageError(f"config.models: {name!r}: expected a plain name")
        folder.mkdir(parents=True, exist_ok=True)
        self._clips: dict[str, Clip] = {}
        self._classifiers: dict[ModelConfig, Classifier] = {}

    def classifier(self, name: str) -> Classifier:
        """A model's checkpoint; UserError where its classes are not those of the sets."""
        model = self.config.models[name]
        if model not in self._classifiers:
            given = named_preprocessing(model.preprocessing) if model.preprocessing else None
            found = load_classifier(model.checkpoint, model.head or None, preprocess=given)
            self._classifiers[model] = found
        found = self._classifiers[model]
        check_classes(f"config.models.{name}: {model.checkpoint}", found, self.loaded.words)
        return found

    def clip(self, name: str) -> Clip:
        path = self.config.models[name].clip
        if path not in self._clips:
            self._clips[path] = load_clip(path)
        clip = self._clips[path]
        if self.config.sets.drawn and clip.image_size != self.config.image_size:
            raise UserError(
                f"config.models.{name}: {path} takes {clip.image_size} pixels, "
                f"config.image_size is {self.config.image_size}"
            )
        return clip

    @property
    def prompts(self) -> list[str]:
        return [self.config.template.format(word) for word in self.loaded.words]

    @cached_property
    def loaded(self) -> Loaded:
        config = self.config
        return load_sets(
            config.sets, size=config.image_size, per_class=config.per_class, seed=config.seed
        )

    def answers(self, name: str) -> Artifact:
        """The stage of a model's answers, after that of its training if it is trained here."""
        config, model = self.config, self.config.models[name]
        inputs = {"training": self._train(name)} if model.train_on else {}
        settings = {
            **self._identity(name),
            **{
                key: getattr(config, key)
                for key in (
                    "template",
                    "image_size",
                    "sets",
                    "per_class",
                    "eps",
                    "autoattack",
                    "corruptions",
                    "seed",
                )
            },
        }

        def build(folder: Path) -> dict:
            asked = {*config.corruptions.asked, *self.loaded.sets.corrupted}
            if config.baseline == "alexnet" and asked:
                check_alexnet(asked)
            predict, preprocess = self._predict(name, inputs.get("training"))
            found = suite.answer(
                predict,
                self.loaded.sets,
                jax.random.key(config.seed),
                preprocess=preprocess,
                eps=config.eps,
                with_autoattack=config.autoattack,
                corruptions=config.corruptions,
                batch_size=config.batch_size,
            )
            suite.save_answers(folder / "answers.npz", found)
            return {"arrays": len(found)}

        return run_stage(
            f"answers of {name}", self.folder / name / "answers", settings, inputs, build
        )

    def _identity(self, name: str) -> dict:
        """What tells a model from another, for the manifest."""
        model = self.config.models[name]
        if model.checkpoint:
            found = self.classifier(name)
            return {"checkpoint": found.digest, "preprocessing": found.preprocessing}
        found = {"clip": self.clip(name).digest, "adapter": model.adapter}
        if model.templates:
            found["templates"] = read_templates(model.templates)
        return found

    def _predict(self, name: str, training: Artifact | None) -> tuple[Partial, Preprocess]:
        """Pixels in [0, 1] to logits, and what makes images of any size the model's."""
        given = self.config.models[name]
        if given.checkpoint:
            classifier = self.classifier(name)
            return classifier.predict, classifier.preprocessing.host
        clip = self.clip(name)
        model: CLIPModel = clip.model
        folder = given.adapter or (training and training.path / "adapter")
        if folder:
            model = attach(model, read_peft(folder))
        templates = read_templates(given.templates) if given.templates else (self.config.template,)
        predict = of_pixels(clip, model, self.loaded.words, templates)
        return predict, partial(square, size=clip.image_size)

    def _train(self, name: str) -> Artifact:
        config, on = self.config, self.config.models[name].train_on
        clip = self.clip(name)
        steps = config.classify.num_steps(config.train_per_class * len(SHAPES))
        settings = {
            "clip": clip.digest,
            "on": on,
            "steps": steps,
            "classify": config.classify,
            **{key: getattr(config, key) for key in ("template", "image_size", "seed")},
            "train_per_class": config.train_per_class,
        }

        def build(folder: Path) -> dict:
            drawn = bias_sets.drawn_backgrounds(
                config.train_per_class, config.image_size, config.seed + _TRAINING_SEED
            )
            model = train_classifier(
                clip,
                self.prompts,
                config.classify,
                folder,
                steps=steps,
                seed=config.seed,
                real=getattr(drawn, on),
                description=f"train {name}",
            )
            write_peft(folder / "adapter", extract(model))
            return {"steps": steps}

        return run_stage(
            f"training of {name}", self.folder / name / "training", settings, {}, build
        )


def check_classes(where: str, classifier: Classifier, words: Sequence[str]) -> None:
    """UserError where a checkpoint's classes are others than the sets', or in another order."""
    names, count = classifier.class_names, classifier.num_classes
    if count != len(words):
        own = f" ({', '.join(names[:3])}, ...)" if names else ""
        raise UserError(
            f"{where} tells {count} classes apart{own}, but the sets have {len(words)} "
            f"({', '.join(words[:3])}, ...): labels are places among the model's classes"
        )
    mine, theirs = ([name.casefold() for name in each] for each in (names, words))
    if mine != theirs and sorted(mine) == sorted(theirs):
        place = next(i for i in range(count) if mine[i] != theirs[i])
        raise UserError(
            f"{where} has the sets' classes in another order: class {place} is {names[place]!r}, "
            f"in the sets it is {words[place]!r}"
        )


def _figures(config: Config, artifacts: dict[str, Artifact], folder: Path) -> dict:
    """Writes figures.json: every model's in both modes, and the models' differences."""
    key = jax.random.key(config.seed)
    answers = {
        name: suite.load_answers(made.path / "answers.npz") for name, made in artifacts.items()
    }
    options = {
        "baseline": answers.get(config.baseline, config.baseline or None),
        "resamples": config.resamples,
    }
    models = {
        mode: {
            name: _json(table.measure(found, key, mode=mode, **options))
            for name, found in answers.items()
        }
        for mode in ("corrected", "paper")
    }
    against = config.baseline if config.baseline in answers else next(iter(answers))
    differences = {
        f"{name} less {against}": _json(
            table.compare(found, answers[against], key, mode=config.mode, **options)
        )
        for name, found in answers.items()
        if name != against
    }
    write_json(
        folder / "figures.json",
        {
            "mode": config.mode,
            "baseline": config.baseline,
            "models": models,
            "differences": differences,
            "by_severity": {name: by_severity(found) for name, found in answers.items()},
            "images": table.counts(answers[against]),
        },
    )
    return {"models": len(answers)}


def _json(found: dict[str, Interval | None]) -> dict[str, dict | None]:
    return {
        name: None if x is None else {**x.__dict__, "text": x.text()} for name, x in found.items()
    }
