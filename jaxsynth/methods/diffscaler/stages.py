"""DiffScaler's stages: each writes one artifact below the run's folder (`methods.diffscaler.run`).

In all of them `base` is the pre-trained transformer with its autoencoder, and "latents NAME" the
encoded images of a data set.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import (
    Trainable,
    extract,
    load_state,
    mark_trainable,
    with_scale,
    with_values,
)
from jaxsynth.core.arrays import read_array
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import replacing, write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.classes import ClassGenerator, ClassOf
from jaxsynth.generation.generate import GenerateConfig, drawn_bytes, fill_store
from jaxsynth.generation.routing import routing_differences
from jaxsynth.methods.diffscaler.config import PretrainConfig
from jaxsynth.methods.diffscaler.recipes import RECIPES, Adaptation, first_label
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.vae import AutoencoderKL
from jaxsynth.models.shapes import transform
from jaxsynth.quality.errors import held_out_error
from jaxsynth.quality.evaluate import compare
from jaxsynth.quality.features import FeatureExtractor
from jaxsynth.quality.metrics import QualityConfig, least_samples
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.rehearsal import Unmade
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.class_conditional import (
    AdaptConfig,
    adapt,
    adapt_each,
)
from jaxsynth.tasks.latents import Latents, write_latents
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.adapters.native import STATE_FILE, read_state, write_state
from jaxsynth.weights.networks.dit import DDIM_SCHEDULER, DiTPipeline, save_dit

LATENTS, SET = "latents ", "set "
KEPT_FILE = "kept.npy"
# Of a grid of samples.
MAX_CLASSES, COLUMNS = 4, 5
# Titles of the classes of several data sets, by data set.
Classes = Mapping[str, tuple[str, ...]]


def parts_of(dataset: Dataset) -> dict[str, ImageSource]:
    """Train, and the test part's two halves: one that chooses learning rates, one that reports."""
    labels = np.asarray(dataset.test.labels)
    first = np.zeros(len(labels), bool)
    for label in range(dataset.num_classes):
        members = np.flatnonzero(labels == label)
        first[members[::2]] = True
    return {
        "train": dataset.train,
        "validation": Subset(dataset.test, np.flatnonzero(first)),
        "test": Subset(dataset.test, np.flatnonzero(~first)),
    }


@dataclass(frozen=True)
class Encoding:
    """`mirror`: whether training images are encoded mirrored too."""

    mirror: bool


def _latent_bytes(config: Encoding, *, data: Dataset, vae: AutoencoderKL) -> int:
    side = data.train[0].image.shape[0] // vae.config.downscale
    one = 2 * 4 * side * side * vae.config.latent_channels
    views = len(data.train) * (2 if config.mirror else 1)
    # While a part is written, half of it lies beside it.
    return one * (views + len(data.test)) + one * max(views, len(data.test)) // 2


@stage(format=1, space=_latent_bytes)
def encode(work: Work, config: Encoding, *, data: Dataset, vae: AutoencoderKL) -> dict:
    """A data set's latents in three parts, labelled by its own classes."""
    counts = {}
    for part, source in parts_of(data).items():
        mirror = config.mirror and part == "train"
        counts[part] = write_latents(work.folder / f"{part}.npz", vae, source, mirror=mirror)
    return {**counts, "classes": list(data.display_names)}


@dataclass(frozen=True)
class Pretraining:
    """What decides the base that a run trains itself."""

    pretrain: PretrainConfig
    seed: int


def _base_bytes(config: Pretraining, *, latents: Artifact, vae: AutoencoderKL) -> int:
    classes = len(latents.counts["classes"])
    if isinstance(latents, Unmade):
        side = latents.counts["side"]
    else:
        side = read_latents(latents, "test").mean.shape[2]
    network = config.pretrain.network(side, vae.config.latent_channels, classes)
    model = nnx.eval_shape(lambda: mark_trainable(DiT(network, rngs=nnx.Rngs(0))))
    return training_bytes(model, config.pretrain.train) + 4 * size(vae)


@stage(format=1, processes="all", space=_base_bytes)
def pretrain(
    work: Work, config: Pretraining, *, latents: Artifact, vae: AutoencoderKL
) -> dict | None:
    """A DiT trained from scratch on the base's data, as a diffusers folder."""
    made, names = config.pretrain, latents.counts["classes"]
    data = read_latents(latents, "train", mapped=made.train.streamed)
    network = made.network(data.mean.shape[2], data.mean.shape[-1], len(names))
    model = DiT(network, rngs=nnx.Rngs(config.seed))
    schedule = NoiseSchedule.from_config(DDIM_SCHEDULER)
    trained = adapt(
        mark_trainable(model), data, schedule, made.train, work.training, seed=config.seed,
        mesh=work.mesh, description="base",
    )  # fmt: skip
    if not work.writes:
        return None
    model = with_values(model, nnx.state(trained))
    save_dit(DiTPipeline(model, vae, DDIM_SCHEDULER, dict(enumerate(names))), work.folder)
    held = read_latents(latents, "test")
    error = held_out_error(model, schedule, held.mean[:, 0], held.inputs, seed=0)
    return {"steps": made.train.sized(len(data)).steps, "error": error}


@dataclass(frozen=True)
class Retaining:
    """How the images are drawn that a training with retention keeps."""

    images: int
    generate: GenerateConfig
    seed: int


def _kept_bytes(config: Retaining, *, base: DiTPipeline) -> int:
    network = base.transformer.config
    return 4 * config.images * network.sample_size**2 * network.in_channels


@stage(format=1, space=_kept_bytes)
def draw_kept(work: Work, config: Retaining, *, base: DiTPipeline) -> dict:
    """Latents of the base's own classes in turn, without guidance."""
    classes = [ClassOf(0, label) for label in range(base.transformer.config.num_embeds_ada_norm)]
    generate = dataclasses.replace(config.generate, guidance_scale=1.0)
    generator = ClassGenerator(
        [base.transformer], base.vae, base.scheduler_config, classes, generate, seed=config.seed
    )
    numbers = np.arange(config.images)
    starts = range(generate.batch_size, len(numbers), generate.batch_size)
    parts = [
        generator.latents(part % len(classes), part // len(classes))
        for part in np.split(numbers, starts)
    ]
    with replacing(work.folder / KEPT_FILE) as path, path.open("wb") as file:
        np.save(file, np.concatenate(parts))
    return {"images": config.images}


@dataclass(frozen=True)
class RecipeTraining:
    """What decides what a recipe learns, and how exactly its errors are measured."""

    adaptation: Adaptation
    train: AdaptConfig
    error_repeats: int


def _recipe_bytes(
    config: RecipeTraining, *, base: DiTPipeline, latents: Artifact, **_: Artifact | None
) -> int:
    rows = len(latents.counts["classes"])
    model = transform(lambda dit: config.adaptation.apply(dit, rows), base.transformer)
    return training_bytes(model, config.train)


@stage(format=1, processes="all", space=_recipe_bytes)
def train_recipe(
    work: Work,
    config: RecipeTraining,
    *,
    base: DiTPipeline,
    latents: Artifact,
    old: Artifact,
    kept: Artifact | None = None,
) -> dict | None:
    """One recipe on one data set at one rate; `old` are latents of what the base knows.

    Errors are on what the model learnt and on what the base knew.
    """
    schedule = NoiseSchedule.from_config(base.scheduler_config)
    adaptation = config.adaptation
    model = adapt(
        adaptation.apply(base.transformer, len(latents.counts["classes"])),
        new_latents(base, latents, "train", mapped=config.train.streamed),
        schedule,
        config.train,
        work.training,
        seed=adaptation.seed,
        kept=read_kept(kept),
        identity={"base": base.digest},
        mesh=work.mesh,
        description=f"{adaptation.recipe} {config.train.learning_rate:g}",
    )
    if not work.writes:
        return None
    write_state(work.folder / STATE_FILE, extract(model))
    scores = {
        part: error(model, new_latents(base, latents, part), schedule, config.error_repeats)
        for part in ("validation", "test")
    }
    known = known_latents(base, old, "test")
    scores |= {
        "trainable": size(model, Trainable),
        "whole": size(base.transformer),
        "old": error(model, known, schedule),
        "old_before": error(base.transformer, known, schedule),
    }
    if not RECIPES[adaptation.recipe].whole:
        scores["old_off"] = error(with_scale(model, 0.0), known, schedule)
    return scores


@dataclass(frozen=True)
class SetTraining:
    """What decides what data sets are given in the end; their class tables have `rows` new rows."""

    adaptation: Adaptation
    train: AdaptConfig
    rows: int


def _set_bytes(
    config: SetTraining, *, base: DiTPipeline, kept: Artifact | None = None, **latents: Artifact
) -> int:
    model = transform(lambda dit: config.adaptation.apply(dit, config.rows), base.transformer)
    return training_bytes(model, config.train, count=len(latents))


@stage(format=1, processes="all", space=_set_bytes)
def train_sets(
    work: Work,
    config: SetTraining,
    *,
    base: DiTPipeline,
    kept: Artifact | None = None,
    **latents: Artifact,
) -> dict | None:
    """A set of parameters for each data set of "latents NAME", all trained in one program.

    Their class tables have one length, so that they stack; a set uses the first of its rows. Where
    latents stream, sets train in turn.
    """
    schedule = NoiseSchedule.from_config(base.scheduler_config)
    sets = {name.removeprefix(LATENTS): one for name, one in latents.items()}
    model = config.adaptation.apply(base.transformer, config.rows)
    mapped = config.train.streamed
    data = [new_latents(base, one, "train", mapped=mapped) for one in sets.values()]
    options: dict[str, Any] = {
        "seed": config.adaptation.seed,
        "kept": read_kept(kept),
        "identity": {"base": base.digest},
        "mesh": work.mesh,
        "description": f"{counted(len(sets), 'set')}",
    }
    if len(sets) == 1:  # on a mesh its batch is cut, where those of several lie side by side
        trained = [adapt(model, data[0], schedule, config.train, work.training, **options)]
    else:
        models = [model] * len(sets)
        trained = adapt_each(models, data, schedule, config.train, work.training, **options)
    if not work.writes:
        return None
    errors = {}
    for (name, one), model in zip(sets.items(), trained, strict=True):
        write_state(work.folder / f"{name}.safetensors", extract(model))
        errors[name] = error(model, new_latents(base, one, "test"), schedule)
    return {"errors": errors}


@dataclass(frozen=True)
class Drawing:
    """What decides images of data sets, beside their parameters; `rows` as in `SetTraining`."""

    adaptation: Adaptation
    rows: int
    classes: Classes
    generate: GenerateConfig
    seed: int


def _drawn_bytes(config: Drawing, *, base: DiTPipeline, **_: Artifact) -> int:
    classes = sum(len(titles) for titles in config.classes.values())
    return drawn_bytes(classes, config.generate, image_size(base))


def image_size(base: DiTPipeline) -> int:
    """The side of the images that a base draws."""
    return base.transformer.config.sample_size * base.vae.config.downscale


@stage(format=1, processes="all", space=_drawn_bytes)
def draw_sets(work: Work, config: Drawing, *, base: DiTPipeline, **sets: Artifact) -> dict:
    """Images of every class of every data set, each batch a mixture of all ("set NAME")."""
    models = [
        set_model(base, config.adaptation, config.rows, name, sets[SET + name])
        for name in config.classes
    ]
    return _fill(work.folder, models, base, config)


@stage(format=1, processes="all", space=_drawn_bytes)
def draw_recipe(work: Work, config: Drawing, *, base: DiTPipeline, adapter: Artifact) -> dict:
    """Images of one data set from what one recipe learnt."""
    empty = config.adaptation.apply(base.transformer, config.rows)
    model = load_state(empty, read_state(adapter.path / STATE_FILE))
    return _fill(work.folder, [model], base, config)


def _fill(folder: Path, models: Sequence[DiT], base: DiTPipeline, config: Drawing) -> dict:
    """Of several processes, each draws every n-th shard."""
    first = first_label(base.transformer)
    classes, class_names, datasets = [], [], []
    for number, (name, titles) in enumerate(config.classes.items()):
        classes += [ClassOf(number, first + label) for label in range(len(titles))]
        class_names += titles
        datasets += [name] * len(titles)
    generator = ClassGenerator(
        models, base.vae, base.scheduler_config, classes, config.generate, seed=config.seed
    )
    prompts = [f"{name} {title}" for name, title in zip(datasets, class_names, strict=True)]
    count = fill_store(
        generator, folder, class_names, prompts, config.generate, seed=config.seed,
        datasets=datasets,
    )  # fmt: skip
    return {"images": count}


@dataclass(frozen=True)
class Measuring:
    """Which data set's images are measured, and how."""

    name: str
    quality: QualityConfig


@stage(format=1)
def measure(
    work: Work,
    config: Measuring,
    *,
    images: Artifact,
    data: Dataset,
    features: FeatureExtractor,
) -> dict:
    """FID and its companions of a data set's images against its held-out photos, and a grid.

    A data set with too few of those is measured against its training images, and the result says
    so.
    """
    store = ImageStore(images.path).of_dataset(config.name, data.display_names)
    real, reference = data.test, "held-out images"
    if len(real) < 2 * least_samples(config.quality):
        real, reference = data.train, "training images"
    found = compare(real, store, features, config.quality, reference=reference, seed=0)
    write_json(work.folder / "quality.json", found)
    lines = []
    for label in range(min(data.num_classes, MAX_CLASSES)):
        line = []
        for source in (data.train, store):
            rows = np.flatnonzero(np.asarray(source.labels) == label)[:COLUMNS]
            line += [source[int(i)].image for i in rows]
        lines.append(line)
    blank = [""] * (COLUMNS - 1)
    write_grid(
        work.folder / "samples.png",
        lines,
        [f"{config.name} {title}" for title in data.display_names[: len(lines)]],
        headings=["real", *blank, "drawn", *blank],
    )
    return {"fid": found["all"]["fid"]}


@dataclass(frozen=True)
class Routing:
    """What decides the models whose mixed batches are compared."""

    adaptation: Adaptation
    rows: int


@stage(format=1)
def routing(work: Work, config: Routing, *, base: DiTPipeline, **sets: Artifact) -> dict:
    """Proves what one batch of all sets is worth: equal outputs, and the base untouched."""
    models = [
        set_model(base, config.adaptation, config.rows, name.removeprefix(SET), one)
        for name, one in sets.items()
    ]
    found = routing_differences(base.transformer, models)
    write_json(work.folder / "routing.json", found)
    return found


def read_latents(stage: Artifact, part: str, *, mapped: bool = False) -> Latents:
    """A part's latents, labelled by the data set's own classes."""
    return Latents.load(stage.path / f"{part}.npz", mapped=mapped)


def new_latents(base: DiTPipeline, stage: Artifact, part: str, *, mapped: bool = False) -> Latents:
    """A part's latents of a new data set, with the labels of the extended table."""
    found = read_latents(stage, part, mapped=mapped)
    return dataclasses.replace(found, labels=found.labels + first_label(base.transformer))


def known_latents(base: DiTPipeline, stage: Artifact, part: str) -> Latents:
    """A part's latents of what the base knows, with its labels.

    By name where it knows more classes than these; UserError for a name that it does not know.
    """
    found, names, known = read_latents(stage, part), stage.counts["classes"], base.id2label
    if len(names) == base.transformer.config.num_embeds_ada_norm:
        return found
    labels = {name: label for label, name in known.items()}
    if missing := [name for name in names if name not in labels]:
        raise UserError(
            f"base_data: class {missing[0]!r} is none of the {len(known)} that the base names"
        )
    return dataclasses.replace(
        found, labels=np.array([labels[name] for name in names])[found.labels]
    )


def read_kept(stage: Artifact | None) -> np.ndarray | None:
    """The latents of a `draw_kept` stage."""
    return None if stage is None else read_array(stage.path / KEPT_FILE)


def set_model(
    base: DiTPipeline, adaptation: Adaptation, rows: int, name: str, stage: Artifact
) -> DiT:
    """The base with the parameters of one data set of a `train_sets` stage."""
    empty = adaptation.apply(base.transformer, rows)
    return load_state(empty, read_state(stage.path / f"{name}.safetensors"))


def error(model: DiT, latents: Latents, schedule: NoiseSchedule, repeats: int = 8) -> float:
    """The held-out error on latents, at the same times and noises for every model."""
    measured = partial(held_out_error, seed=0, repeats=repeats, batch_size=256)
    return measured(model, schedule, latents.mean[:, 0], latents.inputs)


def size(model: nnx.Module, *which: type) -> int:
    """How many numbers a network has, or its variables of a type."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, *which)))
