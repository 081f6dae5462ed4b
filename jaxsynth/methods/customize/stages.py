"""The stages of a customisation run: drawing, learning, measuring. `run` says in which order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxsynth.core.io import file_digest, replacing, write_json
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import few_shot
from jaxsynth.data.store import ImageStore
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import (
    GenerateConfig,
    Generator,
    drawn_bytes,
    fill_store,
    sample_images,
)
from jaxsynth.methods.customize.techniques import (
    load,
    name_of,
    prepared,
    save,
    shapes_of,
    texts_of,
)
from jaxsynth.models.diffusion.text_to_image import TextToImage, encode_texts
from jaxsynth.quality.errors import held_out_error
from jaxsynth.quality.features import clip_features
from jaxsynth.quality.similarity import mean_cosine, paired_cosine, text_features
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.customize import Training, customize_task, encode_told
from jaxsynth.training.sharding import local_mesh
from jaxsynth.training.space import training_bytes
from jaxsynth.training.trainer import train
from jaxsynth.weights.hf import Clip, StableDiffusion

FIGURES = "figures.npz"
SHOWN = 6
# How images are drawn during a training.
SAMPLES = GenerateConfig(num_inference_steps=25)
# Of held-out images, for the error during a training.
MOST_HELD_OUT = 64


@dataclass(frozen=True)
class Drawing:
    """Which images are drawn: those of the base, or of what was learned from it."""

    prompts: tuple[str, ...]
    generate: GenerateConfig
    seed: int
    dtype: str
    image_size: int = 0


def _image_bytes(config: Drawing, *, base: StableDiffusion, learned: Artifact | None = None) -> int:
    side = base.sized(config.image_size).image_size
    return drawn_bytes(len(config.prompts), config.generate, side)


@stage(processes="all", space=_image_bytes)
def draw(
    work: Work, config: Drawing, *, base: StableDiffusion, learned: Artifact | None = None
) -> dict:
    """A store of images of every prompt; each process fills its share of the shards."""
    adapters, digests, base = None, [], base.sized(config.image_size)
    if learned is not None:
        base, adapters = load(learned.path, base)
        digests = [file_digest(learned.path / learned.counts["file"])]
    generator = Generator(
        base, config.prompts, config.generate, seed=config.seed, adapters=adapters,
        mesh=local_mesh(),
    )  # fmt: skip
    count = fill_store(
        generator, work.folder, config.prompts, config.prompts, config.generate, seed=config.seed,
        adapter_digests=digests, description="draw",
    )  # fmt: skip
    return {"images": count}


@dataclass(frozen=True)
class Learning:
    """How a technique learns; `shots` images of each class, or all (0)."""

    training: Training
    word: str
    shots: int
    seed: int
    dtype: str
    image_size: int = 0


def _learned_bytes(
    config: Learning, *, data: Dataset, base: StableDiffusion, others: Artifact | None = None
) -> int:
    return training_bytes(shapes_of(config.training, config.word, base), config.training)


@stage(processes="all", space=_learned_bytes)
def learn(
    work: Work,
    config: Learning,
    *,
    data: Dataset,
    base: StableDiffusion,
    others: Artifact | None = None,
) -> dict:
    """What the technique learned, in one file. `others` are images of the subject's class."""
    training, crops = config.training, config.training.crops_per_image
    base = base.sized(config.image_size)
    pipeline, model = prepared(training, config.word, base, jax.random.key(config.seed))
    source = shots_of(data, config.shots, config.seed)

    def encoded(images: ImageSource, texts):
        return encode_told(pipeline, images, texts, crops=crops, seed=config.seed)

    images = encoded(source, texts_of(training, config.word, data, source))
    prior = None
    if others is not None:
        store = ImageStore(others.path)
        (prompt,) = store.class_names
        prior = encoded(store, [(prompt,)] * len(store))
    evaluate = None
    if training.evaluate_every:
        evaluate = _held_out(pipeline, encoded, training, config.word, data)
    task = customize_task(
        pipeline, model, images, training, seed=config.seed, others=prior, evaluate=evaluate,
        sample=_sampler(pipeline, data, name_of(training, config.word)),
        identity={"base": base.digest},
    )  # fmt: skip
    sized = training.sized(len(images))
    model = train(task, sized, work.training, mesh=work.mesh, description="customize")
    counts = {"images": len(images), "steps": sized.steps}
    if not work.writes:
        return counts
    write_json(work.folder / "images.json", list(source.ids))
    return counts | {"file": save(work.folder, training, base, model).name}


def shots_of(data: Dataset, shots: int, seed: int) -> ImageSource:
    """The images that are learned from."""
    return few_shot(data, shots, seed).train_source(data) if shots else data.train


def _held_out(
    pipeline: StableDiffusion, encoded: Callable, training: Training, word: str, data: Dataset
) -> Callable[[TextToImage, int], Mapping[str, Any]]:
    """The error of the noise on images that are not learned from, each with its first text."""
    source = data.test
    told = encoded(source, texts_of(training, word, data, source))
    x0, ids = told.mean[:MOST_HELD_OUT, 0], told.ids[told.first[:MOST_HELD_OUT]]
    sizes = told.sizes[:MOST_HELD_OUT, 0]
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)

    def evaluate(model: TextToImage, step: int) -> Mapping[str, Any]:
        texts = jax.tree.map(np.asarray, encode_texts(model, ids).sized(sizes))
        error = held_out_error(
            model.unet, schedule, x0, lambda rows: texts.take(rows).inputs(), seed=0
        )
        return {"held_out_error": error}

    return evaluate


def _sampler(
    pipeline: StableDiffusion, data: Dataset, name: str
) -> Callable[[TextToImage], np.ndarray]:
    shown = [data.template.format(name)] if name else list(class_prompts(data))[:SHOWN]

    def sample(model: TextToImage) -> np.ndarray:
        return sample_images(pipeline, shown, SAMPLES, seed=0, model=model)[:, 0]

    return sample


@dataclass(frozen=True)
class Measuring:
    """Which prompts the drawn images are compared with: those of the base."""

    prompts: tuple[str, ...]
    shots: int
    seed: int


@stage(format=1)
def measure(
    work: Work,
    config: Measuring,
    *,
    data: Dataset,
    clip: Clip,
    untouched: Artifact,
    drawn: Artifact,
) -> dict:
    """Similarity of images before and after to photos that were not learned from; a grid."""
    extractor = clip_features(clip)
    learned = shots_of(data, config.shots, config.seed)
    photos = extractor.of_source(data.test)
    texts = text_features(clip, config.prompts)
    found: dict[str, Float[np.ndarray, " n"]] = {
        "photos": mean_cosine(extractor.of_source(learned), photos)
    }
    stores = {"base": ImageStore(untouched.path), "custom": ImageStore(drawn.path)}
    for name, store in stores.items():
        features = extractor.of_source(store)
        found[name] = mean_cosine(features, photos)
        found[f"{name}_prompt"] = paired_cosine(features, texts[np.asarray(store.labels)])
    with replacing(work.folder / FIGURES) as path, path.open("wb") as file:
        np.savez(file, **found)
    _grid(work, data, learned, stores, config.prompts)
    return {name: float(values.mean()) for name, values in found.items()}


def _grid(work: Work, data: Dataset, learned: ImageSource, stores, prompts) -> None:
    """Photos learned from and held out, and of each prompt the images before and after."""
    rows, labels = [], []
    for title, source in (("learned from", learned), ("held out", data.test)):
        rows.append([source[i].image for i in range(min(2 * SHOWN, len(source)))])
        labels.append(title)
    for label, prompt in enumerate(prompts):
        row = []
        for store in stores.values():
            own = np.flatnonzero(np.asarray(store.labels) == label)[:SHOWN]
            row += [store[int(i)].image for i in own]
            row += [None] * (SHOWN - len(own))
        rows.append(row)
        labels.append(prompt)
    headings = ["the base", *[""] * (SHOWN - 1), "customised", *[""] * (SHOWN - 1)]
    write_grid(work.folder / "images.png", rows, labels, headings=headings)
