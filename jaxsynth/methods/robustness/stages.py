"""A robustness run's stages: a model's training, its predictions, the metrics of all models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from jax.tree_util import Partial

from jaxsynth.adapters.inject import AdapterState, extract
from jaxsynth.adapters.registry import attach
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_json
from jaxsynth.core.words import counted
from jaxsynth.data.decode import square
from jaxsynth.methods.robustness.sets import Loaded
from jaxsynth.models.siglip import TwoTowers
from jaxsynth.robustness import bias_sets, suite
from jaxsynth.robustness.corruptions.predictions import Corruptions
from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.bootstrap import Interval
from jaxsynth.robustness.metrics.corruption import by_severity, check_alexnet
from jaxsynth.robustness.metrics.details import describe
from jaxsynth.robustness.predictors import Preprocess
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.clip_classifier import ClassifyConfig, classifier_task, train_classifier
from jaxsynth.tasks.clip_predictions import of_pixels
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.adapters.peft import read_peft, write_peft
from jaxsynth.weights.hf import Clip
from jaxsynth.weights.networks.classifiers import Classifier

# Drawn from other random numbers than the pictures that models are asked about.
_TRAINING_SEED = 1_000_003
ANSWERS = "answers.npz"


@dataclass(frozen=True)
class Training:
    """How a CLIP is trained on drawn shapes."""

    classify: ClassifyConfig
    train_on: str
    prompts: tuple[str, ...]
    image_size: int
    per_class: int
    seed: int


def _training_bytes(config: Training, *, clip: Clip) -> int:
    task = classifier_task(clip, config.prompts[:1], config.classify, seed=0, both=False)
    return training_bytes(task.model, config.classify)


@stage(processes="all", space=_training_bytes)
def train_model(work: Work, config: Training, *, clip: Clip) -> dict:
    """Adapters of the CLIP, in `adapter`."""
    drawn = bias_sets.drawn_backgrounds(
        config.per_class, config.image_size, config.seed + _TRAINING_SEED
    )
    images = config.per_class * len(config.prompts)
    model = train_classifier(
        clip,
        config.prompts,
        config.classify,
        work.training,
        images=images,
        seed=config.seed,
        real=getattr(drawn, config.train_on),
        mesh=work.mesh,
        description=f"train on {config.train_on}",
    )
    if work.writes:
        write_peft(work.folder / "adapter", extract(model))
    return {"steps": config.classify.num_steps(images)}


@dataclass(frozen=True)
class Asking:
    """What a model is asked. `templates` are those of a CLIP's class texts."""

    templates: tuple[str, ...]
    eps: float
    autoattack: bool
    corruptions: Corruptions
    alexnet: bool
    batch_size: int
    seed: int


@stage()
def predict_sets(
    work: Work,
    config: Asking,
    *,
    sets: Loaded,
    clip: Clip | None = None,
    checkpoint: Classifier | None = None,
    adapter: AdapterState | None = None,
    training: Artifact | None = None,
) -> dict:
    """A model's predictions on every set: a CLIP's, an adapted one's, or a checkpoint's."""
    asked = {*config.corruptions.asked, *sets.sets.corrupted}
    if config.alexnet and asked:
        check_alexnet(asked)
    if training is not None:
        adapter = read_peft(training.path / "adapter")
    predict, preprocess = _predictor(config, sets, clip, checkpoint, adapter)
    found = suite.answer(
        predict,
        sets.sets,
        jax.random.key(config.seed),
        preprocess=preprocess,
        eps=config.eps,
        with_autoattack=config.autoattack,
        corruptions=config.corruptions,
        batch_size=config.batch_size,
    )
    suite.save_answers(work.folder / ANSWERS, found)
    return {"arrays": len(found)}


def _predictor(
    config: Asking,
    sets: Loaded,
    clip: Clip | None,
    checkpoint: Classifier | None,
    adapter: AdapterState | None,
) -> tuple[Partial, Preprocess]:
    """Pixels in [0, 1] to logits, and what makes images of any size the model's."""
    if checkpoint is not None:
        return checkpoint.predict, checkpoint.preprocessing.host
    assert clip is not None
    model: TwoTowers = clip.model
    if adapter is not None:
        model = attach(model, adapter)
    predict = of_pixels(clip, model, sets.words, config.templates)
    if clip.squash:
        return predict, clip.transform.square
    return predict, partial(square, size=clip.image_size)


def check_classes(where: str, classifier: Classifier, words: Sequence[str]) -> None:
    """UserError where a checkpoint's classes are others than the sets', or in another order."""
    names, count = classifier.class_names, classifier.num_classes
    if count != len(words):
        own = f" ({', '.join(names[:3])}, ...)" if names else ""
        raise UserError(
            f"{where} tells {counted(count, 'class')} apart{own}, but the sets have {len(words)} "
            f"({', '.join(words[:3])}, ...): labels are places among the model's classes"
        )
    mine, theirs = ([name.casefold() for name in each] for each in (names, words))
    if mine != theirs and sorted(mine) == sorted(theirs):
        place = next(i for i in range(count) if mine[i] != theirs[i])
        raise UserError(
            f"{where} has the sets' classes in another order: class {place} is {names[place]!r}, "
            f"in the sets it is {words[place]!r}"
        )


@dataclass(frozen=True)
class Measuring:
    """How the metrics are made. `models` are the names of the inputs, in order."""

    models: tuple[str, ...]
    mode: str
    baseline: str
    resamples: int
    seed: int


@stage()
def measure_models(work: Work, config: Measuring, **predictions: Artifact) -> dict:
    """Writes figures.json: every model's in both modes, and the models' differences."""
    key = jax.random.key(config.seed)
    answers = {
        name: suite.load_answers(predictions[f"model{i}"].path / ANSWERS)
        for i, name in enumerate(config.models)
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
        work.folder / "figures.json",
        {
            "mode": config.mode,
            "baseline": config.baseline,
            "models": models,
            "differences": differences,
            "by_severity": {name: by_severity(found) for name, found in answers.items()},
            "images": table.counts(answers[against]),
            "details": {
                name: describe(found, key, resamples=config.resamples)
                for name, found in answers.items()
            },
        },
    )
    return {"models": len(answers)}


def _json(found: Mapping[str, Interval | None]) -> dict[str, dict | None]:
    return {
        name: None if x is None else {**x.__dict__, "text": x.text()} for name, x in found.items()
    }


def adapter_files(folder: str) -> list[Path]:
    """The files of a peft folder."""
    return sorted(path for path in Path(folder).expanduser().iterdir() if path.is_file())
