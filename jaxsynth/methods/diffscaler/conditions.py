"""DiffScaler's condition tasks: a set of parameters that also follows a condition image.

The recipe is that of the data sets, on the same latents, classes and steps; the network merely
reads a condition image beside the latents (`recipes.with_condition`). What it makes of it is
measured twice: by the error of the noise on held-out images, with their own condition, with that of
another image of their class and with none; and on images drawn for held-out conditions, in which
the condition is found again (`quality.adherence`). The yardstick is the set of the same data that
learnt no condition.

Below the run's folder, for a data set and a kind of condition:

    conditions/<data set>/<kind>/maps        the conditions, 8 bits a value
    conditions/<data set>/<kind>/adapter     what was learnt, and its held-out errors
    conditions/<data set>/<kind>/images      images drawn for the held-out conditions
    conditions/<data set>/<kind>/following   how closely they follow, and some of them
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jaxsynth.adapters.inject import Trainable, extract, load_state
from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.io import replacing, write_json
from jaxsynth.data.conditions import (
    CHANNELS,
    WITH_PARTNER,
    as_bytes,
    as_fractions,
    known_map,
    source_condition,
)
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.store import ImageStore
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.classes import ClassGenerator, ClassOf
from jaxsynth.generation.generate import GenerateConfig, drawn_bytes, fill_store
from jaxsynth.methods.diffscaler.recipes import Adaptation, first_label
from jaxsynth.methods.diffscaler.stages import (
    error,
    image_size,
    new_latents,
    parts_of,
    read_kept,
    set_model,
    size,
)
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.vae import decode_latents
from jaxsynth.models.shapes import transform
from jaxsynth.quality.adherence import agreement
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.class_conditional import AdaptConfig, adapt
from jaxsynth.tasks.latents import Latents
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.adapters.native import STATE_FILE, read_state, write_state
from jaxsynth.weights.networks.dit import DiTPipeline

# Of the grid of samples.
_LINES, _COLUMNS = 4, 3
# The parts of a data set that conditions are made for.
PARTS = ("train", "test")


@dataclass(frozen=True)
class Conditions:
    """Which kind of condition is made of every image."""

    kind: str


def _map_bytes(config: Conditions, *, data: Dataset, files: Path | None = None) -> int:
    side, images = data.train[0].image.shape[0], len(data.train) + len(data.test)
    return images * side * side * CHANNELS[config.kind]


@stage(format=1, space=_map_bytes)
def make_maps(work: Work, config: Conditions, *, data: Dataset, files: Path | None = None) -> dict:
    """The condition of every training and test image, of the images' size.

    Of kinds that images do not tell it is read from the folder `files`, if any.
    """
    counts, sources = {}, parts_of(data)
    for part in PARTS:
        source = sources[part]
        side = source[0].image.shape[0]
        made = [
            as_bytes(source_condition(source, i, config.kind, side, files))
            for i in range(len(source))
        ]
        with replacing(work.folder / f"{part}.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, condition=np.stack(made))
        counts[part] = len(made)
    return counts


@dataclass(frozen=True)
class ConditionTraining:
    """What decides what is learnt; `name` is the data set, `rows` as in `stages.SetTraining`."""

    adaptation: Adaptation
    train: AdaptConfig
    rows: int
    kind: str
    name: str
    error_repeats: int


def _condition_bytes(config: ConditionTraining, *, base: DiTPipeline, **_: Artifact | None) -> int:
    channels = CHANNELS[config.kind] * base.vae.config.downscale**2
    model = transform(
        lambda dit: config.adaptation.apply(dit, config.rows, condition_channels=channels),
        base.transformer,
    )
    return training_bytes(model, config.train)


@stage(format=1, processes="all", space=_condition_bytes)
def train_condition(
    work: Work,
    config: ConditionTraining,
    *,
    base: DiTPipeline,
    latents: Artifact,
    maps: Artifact,
    plain: Artifact,
    kept: Artifact | None = None,
) -> dict | None:
    """The run's recipe for data sets, with the condition beside the latents.

    `plain` holds the data set's parameters without a condition.
    """
    schedule = NoiseSchedule.from_config(base.scheduler_config)
    model = adapt(
        condition_model(base, config.adaptation, config.rows, config.kind),
        _conditioned(base, latents, maps, "train"),
        schedule,
        config.train,
        work.training,
        seed=config.adaptation.seed,
        kept=read_kept(kept),
        identity={"base": base.digest},
        mesh=work.mesh,
        description=f"{config.kind} of {config.name}",
    )
    if not work.writes:
        return None
    write_state(work.folder / STATE_FILE, extract(model))
    unconditioned = set_model(base, config.adaptation, config.rows, config.name, plain)
    test = _conditioned(base, latents, maps, "test")

    def told(condition: np.ndarray | None) -> Latents:
        return dataclasses.replace(test, condition=condition)

    repeats = config.error_repeats
    return {
        "own": error(model, test, schedule, repeats),
        "another": error(model, told(test.condition[others(test.labels)]), schedule, repeats),
        "none": error(model, told(np.zeros_like(test.condition)), schedule, repeats),
        "plain": error(unconditioned, told(None), schedule, repeats),
        "trainable": size(model, Trainable),
        "trainable_plain": size(unconditioned, Trainable),
    }


@dataclass(frozen=True)
class ConditionDrawing:
    """What decides the images that are drawn for conditions; `name` is the data set."""

    adaptation: Adaptation
    rows: int
    kind: str
    name: str
    generate: GenerateConfig
    seed: int


def _drawn_bytes(
    config: ConditionDrawing, *, base: DiTPipeline, latents: Artifact, **_: Artifact
) -> int:
    return drawn_bytes(len(latents.counts["classes"]), config.generate, image_size(base))


@stage(format=1, processes="all", space=_drawn_bytes)
def draw_condition(
    work: Work,
    config: ConditionDrawing,
    *,
    base: DiTPipeline,
    latents: Artifact,
    maps: Artifact,
    adapter: Artifact,
) -> dict:
    """Image i of a class has the condition of that class's held-out image i, in turn."""
    empty = condition_model(base, config.adaptation, config.rows, config.kind)
    model = load_state(empty, read_state(adapter.path / STATE_FILE))
    test, first = _conditioned(base, latents, maps, "test"), first_label(base.transformer)
    classes = latents.counts["classes"]

    def conditions(numbers: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return test.condition[rows_of(test.labels - first, numbers, indices), 0]

    generator = ClassGenerator(
        [model],
        base.vae,
        base.scheduler_config,
        [ClassOf(0, first + label) for label in range(len(classes))],
        config.generate,
        seed=config.seed,
        conditions=conditions,
    )
    count = fill_store(
        generator,
        work.folder,
        classes,
        [f"{config.name} {title}" for title in classes],
        config.generate,
        seed=config.seed,
        datasets=[config.name] * len(classes),
        description=f"draw by {config.kind}",
    )
    return {"images": count}


@dataclass(frozen=True)
class Following:
    """Which images are measured, and how many are decoded at once."""

    kind: str
    name: str
    batch_size: int


@stage(format=1)
def measure_condition(
    work: Work,
    config: Following,
    *,
    base: DiTPipeline,
    data: Dataset,
    latents: Artifact,
    maps: Artifact,
    images: Artifact,
    plain: Artifact,
) -> dict:
    """How well the condition is found again in `images`, and in `plain`, drawn without one.

    Photos do not tell what only files know of them: then only samples are written.
    """
    real = parts_of(data)["test"]
    classes = latents.counts["classes"]
    store = ImageStore(images.path).of_dataset(config.name, classes)
    labels = np.asarray(store.labels)
    # The store has the images of a class in the order of their numbers.
    rows = rows_of(np.asarray(real.labels), labels, ranks(labels))
    given = as_fractions(_pixels(maps, "test"))
    lines = _sample_lines(store, real, rows, given, len(classes))
    write_grid(
        work.folder / "samples.png",
        lines,
        [f"{config.name} {title}" for title in classes[: len(lines)]],
        headings=["condition", "drawn", "real"] * _COLUMNS,
    )
    found = {}
    if config.kind not in WITH_PARTNER or known_map(real, 0, config.kind) is not None:
        unconditioned = ImageStore(plain.path).of_dataset(config.name, classes)
        plain_labels, used = np.asarray(unconditioned.labels), np.unique(rows)
        # What the autoencoder does to a photo, no drawn image can undo.
        mean = new_latents(base, latents, "test").mean[used, 0]
        drawn = np.stack([record.image for record in store])
        pairs = {
            "own": (drawn, rows),
            "another": (drawn, others(np.asarray(real.labels))[rows]),
            "plain": (
                np.stack([record.image for record in unconditioned]),
                rows_of(np.asarray(real.labels), plain_labels, ranks(plain_labels)),
            ),
            "autoencoder": (decode_latents(base.vae, mean, config.batch_size), used),
        }
        found = {
            name: float(agreement(config.kind, pixels, given[where]).mean())
            for name, (pixels, where) in pairs.items()
        }
    write_json(work.folder / "following.json", {**found, "images": len(store)})
    return found


def condition_model(base: DiTPipeline, adaptation: Adaptation, rows: int, kind: str) -> DiT:
    """The base with a recipe and an input for conditions of a kind."""
    channels = CHANNELS[kind] * base.vae.config.downscale**2
    return adaptation.apply(base.transformer, rows, condition_channels=channels)


def _conditioned(base: DiTPipeline, latents: Artifact, maps: Artifact, part: str) -> Latents:
    return new_latents(base, latents, part).conditioned(_pixels(maps, part))


def _pixels(maps: Artifact, part: str) -> UInt8[np.ndarray, "n size size k"]:
    """The conditions of "train" or "test" in 255ths."""
    return read_arrays(maps.path / f"{part}.npz", ("condition",))["condition"]


def _sample_lines(
    store: ImageSource, real: ImageSource, rows: np.ndarray, given: np.ndarray, classes: int
) -> list[Sequence[np.ndarray]]:
    """For some classes a line of condition, drawn image and real image."""
    labels, lines = np.asarray(store.labels), []
    for label in range(min(_LINES, classes)):
        line = []
        for place in np.flatnonzero(labels == label)[:_COLUMNS]:
            picture = as_bytes(given[rows[place]])
            line.append(picture[..., 0] if picture.shape[-1] == 1 else picture)
            line += [store[int(place)].image, real[int(rows[place])].image]
        lines.append(line)
    return lines


def others(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Another row for each, of the same label where there is one, every row once in its label."""
    rows = np.arange(len(labels))
    found = np.roll(rows, -1)
    for label in np.unique(labels):
        members = rows[labels == label]
        if len(members) > 1:
            found[members] = np.roll(members, -1)
    return found


def ranks(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many rows before each have its label."""
    return np.array([(labels[:row] == label).sum() for row, label in enumerate(labels)], np.int64)


def rows_of(
    labels: Int[np.ndarray, " n"], numbers: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
) -> Int[np.ndarray, " b"]:
    """The row of the image `indices` of label `numbers`; after a label's last comes its first.

    Raises ValueError for a label that no row has.
    """
    members = {number: np.flatnonzero(labels == number) for number in np.unique(numbers)}
    if empty := [int(number) for number, rows in members.items() if not len(rows)]:
        raise ValueError(f"conditions: no held-out image of class {empty[0]}")
    return np.array(
        [members[n][i % len(members[n])] for n, i in zip(numbers, indices, strict=True)], np.int64
    )
