"""The stages of a comparison of ways to follow conditions (`methods.controlled.run`)."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import extract
from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import replacing, write_json
from jaxsynth.data.conditions import CHANNELS, as_bytes, source_conditions
from jaxsynth.data.dataset import Dataset
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.controlled import draw_controlled
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.controlled.ways import Way
from jaxsynth.models.diffusion.controlled import Controlled
from jaxsynth.models.shapes import transform
from jaxsynth.quality.adherence import agreement
from jaxsynth.quality.errors import held_out_error
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.controlled import (
    ControlConfig,
    Triples,
    encode_triples,
    finetune_controlled,
    num_trainable,
)
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.adapters.native import write_state
from jaxsynth.weights.hf import StableDiffusion

SHOWN = 4


@dataclass(frozen=True)
class Encoding:
    """Which kind of condition is made of every image."""

    kind: str


def _triple_bytes(
    config: Encoding, *, base: StableDiffusion, data: Dataset, files: Path | None = None
) -> int:
    side, images = base.unet.config.sample_size, len(data.train) + len(data.test)
    pixels = (side * base.vae.config.downscale) ** 2
    text = base.text_encoder.config
    texts = 3 * (data.num_classes + 1) * text.max_position_embeddings * text.hidden_size
    one = 2 * side * side * base.vae.config.latent_channels + pixels * CHANNELS[config.kind]
    return 4 * (images * one + texts)


@stage(format=1, space=_triple_bytes)
def encode(
    work: Work,
    config: Encoding,
    *,
    base: StableDiffusion,
    data: Dataset,
    files: Path | None = None,
) -> dict:
    """Latents, conditions and prompts of the training images, and of two halves of the test images.

    Conditions of kinds that images do not tell are read from the folder `files`, if any.
    """
    size = base.image_size
    counts = {}
    for part, source in (("train", data.train), ("test", data.test)):
        condition = source_conditions(source, config.kind, size, folder=files)
        prompts = [data.template.format(data.display_names[label]) for label in source.labels]
        images = [source[i].image for i in range(len(source))]
        triples = encode_triples(base, images, prompts, condition)
        rows = {"train": slice(None)}
        if part == "test":
            rows = {"validation": slice(0, None, 2), "test": slice(1, None, 2)}
        for name, own in rows.items():
            found = _rows(triples, own)
            with replacing(work.folder / f"{name}.npz") as path, path.open("wb") as file:
                np.savez_compressed(file, **vars(found))
            write_json(work.folder / f"{name}.json", prompts[own])
            counts[name] = len(found)
    return counts


@dataclass(frozen=True)
class WayTraining:
    """What decides what a way learns, and what its errors and its images are.

    The images' noise is of `draw_seed`, for all seeds of a way alike.
    """

    way: Way
    train: ControlConfig
    error_repeats: int
    images: int
    generate: GenerateConfig
    draw_seed: int


def _way_bytes(config: WayTraining, *, base: StableDiffusion, triples: Artifact) -> int:
    down = base.vae.config.downscale
    model = transform(lambda unet: config.way.apply(unet, down), base.unet)
    return training_bytes(model, config.train)


@stage(format=1, processes="all", space=_way_bytes)
def train_way(
    work: Work, config: WayTraining, *, base: StableDiffusion, triples: Artifact
) -> dict | None:
    """One way at one rate, its errors and its images."""
    way, schedule = config.way, NoiseSchedule.from_config(base.scheduler_config)
    model = way.apply(base.unet, base.vae.config.downscale)
    counts = {
        "trainable": num_trainable(model),
        "whole": sum(x.size for x in jax.tree.leaves(nnx.state(base.unet))),
    }
    model = finetune_controlled(
        model, read_triples(triples, "train"), schedule, config.train, work.training,
        seed=way.seed, identity={"base": base.digest}, mesh=work.mesh,
        description=f"{way.name} {config.train.learning_rate:g}",
    )  # fmt: skip
    if not work.writes:
        return None
    write_state(work.folder / "learnt.safetensors", extract(model))
    errors = _errors(model, schedule, triples, config.error_repeats)
    return counts | errors | _follow(work.folder, model, base, triples, config)


def read_triples(stage: Artifact, part: str) -> Triples:
    """A part's triples: "train", "validation" or "test"."""
    path = stage.path / f"{part}.npz"
    return Triples(**read_arrays(path, [field.name for field in dataclasses.fields(Triples)]))


def _errors(
    model: Controlled, schedule: NoiseSchedule, stage: Artifact, repeats: int
) -> dict[str, float]:
    """Held-out errors with an image's own condition, with another image's and with none."""
    test = read_triples(stage, "test")
    measured = partial(held_out_error, model, schedule, seed=0, repeats=repeats)

    def error(triples: Triples) -> float:
        return measured(triples.mean, triples.inputs)

    def told(condition: np.ndarray) -> Triples:
        return dataclasses.replace(test, condition=condition)

    return {
        "validation": error(read_triples(stage, "validation")),
        "own": error(test),
        "another": error(told(np.roll(test.condition, 1, axis=0))),
        "none": error(told(np.zeros_like(test.condition))),
    }


def _follow(
    folder: Path, model: Controlled, base: StableDiffusion, stage: Artifact, config: WayTraining
) -> dict[str, float]:
    """Draw images for held-out conditions; how well those are found again in them."""
    test, kind = read_triples(stage, "test"), config.way.kind
    prompts = read_json(stage.path / "test.json", list[str])
    rows = np.arange(config.images) % len(test)
    given = test.condition[rows]
    chosen = [prompts[row] for row in rows]
    images = draw_controlled(base, model, chosen, given, config.generate, seed=config.draw_seed)
    line = []
    for image, condition in list(zip(images, as_bytes(given), strict=True))[: SHOWN * SHOWN]:
        line += [condition[..., 0] if condition.shape[-1] == 1 else condition, image]
    write_grid(
        folder / "samples.png",
        [line[i : i + 2 * SHOWN] for i in range(0, len(line), 2 * SHOWN)],
        [""] * -(-len(line) // (2 * SHOWN)),
        headings=["condition", "drawn"] * SHOWN,
    )
    wrong = np.roll(given, 1, axis=0)
    return {
        "follows": float(agreement(kind, images, given).mean()),
        "follows_another": float(agreement(kind, images, wrong).mean()),
    }


def _rows(triples: Triples, rows: slice) -> Triples:
    """Some of the images, with all texts."""
    own = {name: getattr(triples, name)[rows] for name in ("mean", "std", "condition", "prompt")}
    return dataclasses.replace(triples, **own)
