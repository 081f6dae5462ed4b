"""DataDream's stages: shots, adapters, images, classifiers. `run` says in which order."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxsynth.core.io import file_digest, write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, SourceError
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import few_shot, load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.generation.generate import (
    GenerateConfig,
    Generator,
    drawn_bytes,
    fill_store,
    sample_images,
)
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.clip_classifier import (
    ClassifyConfig,
    classifier_task,
    predict,
    scores,
    train_classifier,
)
from jaxsynth.tasks.text_to_image import (
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

SHOTS_FILE = "shots.json"


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
    """How a generator learns the shots. `classes_at_once` is that of mode "cls"."""

    finetune: FinetuneConfig
    mode: str
    seed: int
    dtype: str
    classes_at_once: int = 0
    image_size: int = 0


def _adapter_bytes(
    config: Finetuning, *, shots: Artifact, data: Dataset, base: StableDiffusion
) -> int:
    train, count = config.finetune, data.num_classes if config.mode == "cls" else 1
    base = base.sized(config.image_size)
    return training_bytes(planned_task(base, train, images=1).model, train, count=count)


@stage(processes="all", space=_adapter_bytes)
def finetune_generator(
    work: Work, config: Finetuning, *, shots: Artifact, data: Dataset, base: StableDiffusion
) -> dict:
    """One adapter for all classes, or one for each in a folder of its name."""
    drawn, finetuning = load_shots(shots.path / SHOTS_FILE), config.finetune
    base = base.sized(config.image_size)
    examples = encode_examples(
        base,
        drawn.train_source(data),
        class_prompts(data),
        crops=finetuning.crops_per_image,
        seed=config.seed,
    )
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
    for start in range(0, len(each), group):
        own = each[start : start + group]
        states = finetune_each(
            base, own, finetuning, work.training / f"{start:04d}", seed=config.seed, first=start,
            mesh=work.mesh, description=f"fine-tune {counted(len(own), 'class')}",
        )  # fmt: skip
        for label, state in enumerate(states, start):
            if work.writes:
                adapter_io.save(state, work.folder / safe_name(data.class_names[label]))
    return {"adapters": len(each), "steps": finetuning.num_steps(len(each[0]))}


# How images are drawn during a training, one for each of the first prompts.
SAMPLES = GenerateConfig(num_inference_steps=25)
MOST_SAMPLES = 8


def _sampler(base: StableDiffusion, prompts: Sequence[str]) -> Callable[[TextToImage], np.ndarray]:
    shown = prompts[:MOST_SAMPLES]

    def sample(model: TextToImage) -> np.ndarray:
        return sample_images(base, shown, SAMPLES, seed=0, model=model)[:, 0]

    return sample


@dataclass(frozen=True)
class Generating:
    """How images are drawn."""

    generate: GenerateConfig
    seed: int
    dtype: str
    image_size: int = 0


def _image_bytes(
    config: Generating, *, data: Dataset, base: StableDiffusion, adapter: Artifact | None = None
) -> int:
    side = base.sized(config.image_size).image_size
    return drawn_bytes(data.num_classes, config.generate, side)


@stage(processes="all", space=_image_bytes)
def generate_images(
    work: Work,
    config: Generating,
    *,
    data: Dataset,
    base: StableDiffusion,
    adapter: Artifact | None = None,
) -> dict:
    """A store of images of every class; each process fills its share of the shards."""
    prompts, states, digests = class_prompts(data), None, []
    base = base.sized(config.image_size)
    if adapter is not None:
        files = adapter_io.find(adapter.path, [safe_name(name) for name in data.class_names])
        loaded = [adapter_io.load(file) for file in files]
        states = loaded if len(files) > 1 else loaded[0]
        digests = [file_digest(file) for file in files]
    generator = Generator(
        base, prompts, config.generate, seed=config.seed, adapters=states, mesh=local_mesh()
    )
    count = fill_store(
        generator, work.folder, data.class_names, prompts, config.generate, seed=config.seed,
        adapter_digests=digests, description="generate",
    )  # fmt: skip
    return {"images": count}


@dataclass(frozen=True)
class Classifying:
    """How a classifier is trained: not at all where `classify` is None.

    An epoch is `images` images, as many as a generated set holds.
    """

    classify: ClassifyConfig | None
    images: int
    seed: int
    dtype: str


def _classifier_bytes(
    config: Classifying, *, data: Dataset, clip: Clip, **_: Artifact | None
) -> int:
    logits = 4 * len(data.test) * data.num_classes
    if config.classify is None:
        return logits
    task = classifier_task(clip, class_prompts(data)[:1], config.classify, seed=0, both=False)
    return logits + training_bytes(task.model, config.classify)


@stage(processes="all", space=_classifier_bytes)
def classify(
    work: Work,
    config: Classifying,
    *,
    data: Dataset,
    clip: Clip,
    shots: Artifact | None = None,
    images: Artifact | None = None,
) -> dict:
    """A classifier trained on the shots, the images, both or nothing, and its test scores."""
    prompts, model = class_prompts(data), clip.model
    if config.classify is not None:
        drawn = None if shots is None else load_shots(shots.path / SHOTS_FILE)
        validation = None
        if drawn is not None and drawn.has_validation:
            validation = drawn.val_source(data)
        model = train_classifier(
            clip, prompts, config.classify, work.training, images=config.images, seed=config.seed,
            real=None if drawn is None else drawn.train_source(data),
            synthetic=None if images is None else ImageStore(images.path),
            validation=validation, mesh=work.mesh, description=_title(shots, images),
        )  # fmt: skip
    if not work.writes:
        return {}
    logits = predict(clip, model, prompts, data.test, mesh=local_mesh())
    found = scores(logits, np.asarray(data.test.labels), data.class_names)
    np.save(work.folder / "logits.npy", logits)
    write_json(work.folder / "scores.json", found)
    return {"top1": found["top1"], "macro": found["macro"]}


def _title(shots: Artifact | None, images: Artifact | None) -> str:
    seen = [name for name, given in (("real", shots), ("synthetic", images)) if given is not None]
    return f"classify {' and '.join(seen)}"
