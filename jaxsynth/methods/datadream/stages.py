"""DataDream's stages: shots, adapters, images, classifiers. `run` says in which order."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, ImageSource, SourceError
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.sources.captioned import Captions
from jaxsynth.data.splits import few_shot, load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset, shared
from jaxsynth.generation.generate import GenerateConfig, sample_images
from jaxsynth.methods.image_sets import KEPT_FILE, SHOTS_FILE, shot_folder, with_adapter
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.clip_classifier import (
    ClassifyConfig,
    classifier_task,
    head_task,
    train_classifier,
)
from jaxsynth.tasks.clip_predictions import predict, scores
from jaxsynth.tasks.image_heads import finetune_heads
from jaxsynth.tasks.text_to_image import (
    Examples,
    FinetuneConfig,
    encode_examples,
    finetune,
    finetune_each,
    planned_task,
)
from jaxsynth.training.sharding import local_mesh
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import Clip, StableDiffusion

# Inputs of a classifier: a set of images, and the places of those that a filter keeps, by name.
SET, KEPT = "set ", "kept "


@dataclass(frozen=True)
class Drawing:
    """Which images may be seen."""

    shots: int
    seed: int
    validation_fraction: float


@stage()
def draw_shots(work: Work, config: Drawing, *, data: Dataset) -> dict:
    """The images that may be seen, as lists of ids."""
    drawn = few_shot(data, config.shots, config.seed, val_fraction=config.validation_fraction)
    for record in drawn.train_source(data):  # a corrupt file is found now
        if min(record.image.shape[:2]) < 1:
            raise SourceError(f"{record.id}: an empty image")
    drawn.save(work.folder / SHOTS_FILE)
    return {"images": sum(map(len, drawn.train)), "validation": sum(map(len, drawn.val))}


@dataclass(frozen=True)
class Finetuning:
    """How a generator learns the shots. `classes_at_once` is that of adapters of classes, `shots`
    how many of a class have an adapter of their own."""

    finetune: FinetuneConfig
    mode: str
    seed: int
    dtype: str
    classes_at_once: int = 0
    image_size: int = 0
    shots: int = 0


def _adapter_bytes(
    config: Finetuning,
    *,
    shots: Artifact,
    data: Dataset,
    base: StableDiffusion,
    **_: object,
) -> int:
    train, count = config.finetune, 1 if config.mode == "dset" else data.num_classes
    count *= max(config.shots, 1)  # a head is about an adapter
    base = base.sized(config.image_size)
    return training_bytes(planned_task(base, train, images=1).model, train, count=count)


@stage(processes="all", space=_adapter_bytes)
def finetune_generator(
    work: Work,
    config: Finetuning,
    *,
    shots: Artifact,
    data: Dataset,
    base: StableDiffusion,
    under: Artifact | None = None,
    captions: Captions | None = None,
) -> dict:
    """One adapter for all classes, or one for each in a folder of its name; of `MIXED` modes that
    folder has one for each shot, in folders 0000, 0001, ...

    Those of the classes learn on top of the adapter `under`, where there is one. `captions` say
    what each shot shows, in the place of its class's prompt.
    """
    drawn, finetuning = load_shots(shots.path / SHOTS_FILE), config.finetune
    base, seen = with_adapter(base.sized(config.image_size), under), drawn.train_source(data)
    examples = encode_examples(
        base, seen, class_prompts(data), crops=finetuning.crops_per_image, seed=config.seed,
        captions=None if captions is None else captions.of(seen),
    )  # fmt: skip
    if config.mode == "dset":
        state = finetune(
            base, examples, finetuning, work.training, seed=config.seed, mesh=work.mesh,
            sample=_sampler(base, class_prompts(data)), description="fine-tune dset",
        )  # fmt: skip
        if work.writes:
            adapter_io.save(state, work.folder)
        return {"adapters": 1, "steps": finetuning.num_steps(len(examples))}
    rows = np.cumsum([0, *map(len, drawn.train)])
    each = [examples.select(np.arange(start, end)) for start, end in itertools.pairwise(rows)]
    group = config.classes_at_once or len(each)
    of_shots = {"loft": _of_images, "chimera": finetune_heads}.get(config.mode)
    adapters = 0
    for start in range(0, len(each), group):
        own = each[start : start + group]
        train = finetune_each if of_shots is None else of_shots
        states = train(
            base, own, finetuning, work.training / f"{start:04d}", seed=config.seed, first=start,
            mesh=work.mesh, description=f"fine-tune {counted(len(own), 'class')}",
        )  # fmt: skip
        for label, found in enumerate(states, start):
            folder = work.folder / safe_name(data.class_names[label])
            named = (
                [(folder, found)]
                if isinstance(found, AdapterState)
                else [(folder / shot_folder(i), state) for i, state in enumerate(found)]
            )
            adapters += len(named)
            for place, state in named if work.writes else ():
                adapter_io.save(state, place)
    images = 1 if config.mode == "loft" else len(each[0])
    return {"adapters": adapters, "steps": finetuning.num_steps(images)}


def _of_images(
    base: StableDiffusion,
    sets: Sequence[Examples],
    config: FinetuneConfig,
    folder: Path,
    *,
    first: int,
    **more: Any,
) -> list[list[AdapterState]]:
    """An adapter of each example of each set, all of which train together."""
    counts = [len(own) for own in sets]
    alone = [own.select(np.array([i])) for own in sets for i in range(len(own))]
    # The shots of the classes before: of all classes as many.
    states = finetune_each(base, alone, config, folder, first=first * counts[0], **more)
    ends = np.cumsum([0, *counts])
    return [states[start:end] for start, end in itertools.pairwise(ends)]


# How images are drawn during a training, one for each of the first prompts.
SAMPLES = GenerateConfig(num_inference_steps=25)
MOST_SAMPLES = 8


def _sampler(base: StableDiffusion, prompts: Sequence[str]) -> Callable[[TextToImage], np.ndarray]:
    shown = prompts[:MOST_SAMPLES]

    def sample(model: TextToImage) -> np.ndarray:
        return sample_images(base, shown, SAMPLES, seed=0, model=model)[:, 0]

    return sample


@dataclass(frozen=True)
class Classifying:
    """How a classifier is trained: not at all where `classify` is None.

    An epoch is `images` images, as many as a generated set holds. `shares` are those of several
    sets of images.
    """

    classify: ClassifyConfig | None
    images: int
    seed: int
    dtype: str
    shares: dict[str, float] = field(default_factory=dict)


def _classifier_bytes(
    config: Classifying, *, data: Dataset, clip: Clip, **_: Artifact | None
) -> int:
    logits = 4 * len(data.test) * data.num_classes
    train = config.classify
    if train is None:
        return logits
    # Heads have a row for each class.
    names = (
        class_prompts(data) if train.visual_head or train.head_share else class_prompts(data)[:1]
    )
    task = classifier_task(clip, names, train, seed=0, both=False)
    found = training_bytes(task.model, train)
    if train.head_share:
        found += training_bytes(head_task(task, clip, names).model, train)
    return logits + found


@stage(processes="all", space=_classifier_bytes)
def classify(
    work: Work,
    config: Classifying,
    *,
    data: Dataset,
    clip: Clip,
    shots: Artifact | None = None,
    images: Artifact | None = None,
    **sets: Artifact,
) -> dict:
    """A classifier trained on the shots, the images, both or nothing, and its test scores.

    The images are a store's, or those of several sets: inputs `SET` and `KEPT` with their names.
    """
    prompts, model = class_prompts(data), clip.model
    if config.classify is not None:
        drawn = None if shots is None else load_shots(shots.path / SHOTS_FILE)
        validation = None
        if drawn is not None and drawn.has_validation:
            validation = drawn.val_source(data)
        synthetic = None if images is None else ImageStore(images.path)
        if config.shares:
            synthetic = shared_sets(config.shares, sets, data.class_names)
        model = train_classifier(
            clip, prompts, config.classify, work.training, images=config.images, seed=config.seed,
            real=None if drawn is None else drawn.train_source(data),
            synthetic=synthetic, validation=validation, mesh=work.mesh,
            description=_title(shots, synthetic),
        )  # fmt: skip
    if not work.writes:
        return {}
    logits = predict(clip, model, prompts, data.test, mesh=local_mesh())
    found = scores(logits, np.asarray(data.test.labels), data.class_names)
    np.save(work.folder / "logits.npy", logits)
    write_json(work.folder / "scores.json", found)
    return {"top1": found["top1"], "macro": found["macro"]}


def shared_sets(
    shares: Mapping[str, float], inputs: Mapping[str, Artifact], class_names: Sequence[str]
) -> ImageSource:
    """The images of several sets, filtered where they are, each with its share."""
    sources: dict[str, ImageSource] = {}
    for name in shares:
        source: ImageSource = ImageStore(inputs[SET + name].path)
        if kept := inputs.get(KEPT + name):
            source = Subset(source, read_json(kept.path / KEPT_FILE, list[int]))
        counts = np.bincount(source.labels, minlength=len(class_names))
        if not counts.all():
            raise UserError(
                f"{inputs[SET + name].path}: of class {class_names[int(counts.argmin())]!r} the "
                "filters keep no image; loosen `keep` of the recipe, or give it a `keep.fewest`"
            )
        sources[name] = source
    return next(iter(sources.values())) if len(sources) == 1 else shared(sources, shares)


def _title(shots: Artifact | None, images: ImageSource | None) -> str:
    seen = [name for name, given in (("real", shots), ("synthetic", images)) if given is not None]
    return f"classify {' and '.join(seen)}"
