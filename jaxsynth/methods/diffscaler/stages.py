"""DiffScaler's stages: each writes one artifact below the run's folder (`methods.diffscaler`)."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_json
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.load import load_dataset
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset, joined
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.classes import ClassGenerator, ClassOf
from jaxsynth.generation.generate import fill_store
from jaxsynth.generation.routing import routing_differences
from jaxsynth.methods.diffscaler.recipes import CHOSEN, RECIPES, adapted, first_label
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.quality.evaluate import compare
from jaxsynth.quality.features import FeatureExtractor, clip_extractor, inception_extractor
from jaxsynth.quality.metrics import least_samples
from jaxsynth.runs.stage import Artifact, run_stage
from jaxsynth.tasks.class_conditional import (
    Latents,
    TrainConfig,
    adapt,
    adapt_each,
    encode_latents,
    held_out_error,
)
from jaxsynth.weights.adapters.native import read_state, write_state
from jaxsynth.weights.hf import load_model, load_pipeline, resolve
from jaxsynth.weights.networks.dit import DiTPipeline, load_dit, save_dit

if TYPE_CHECKING:
    from jaxsynth.methods.diffscaler.run import Config

TRAINING = ".training"
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}


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


class Work:
    """A run's networks and data, loaded when a stage first needs them, and its stages."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self._encoded: dict[str, Artifact] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def vae(self) -> AutoencoderKL:
        if self.config.base and self.pipeline.vae is not None:
            return self.pipeline.vae
        if self.config.vae == "tiny":
            return load_pipeline("tiny").vae
        return load_model(AutoencoderKL, AutoencoderKLConfig, resolve(self.config.vae))

    @cached_property
    def pipeline(self) -> DiTPipeline:
        """The base: as given, or trained by this run."""
        source = self.config.base or self.base().path
        return load_dit(source, self.config.dtype, compute_dtype=self.config.dtype)

    @property
    def dit(self) -> DiT:
        return self.pipeline.transformer

    @cached_property
    def scheduler_config(self) -> dict:
        # A base's own may name a sampler that only its pipeline has; the schedule is what counts.
        return self.pipeline.scheduler_config if self.config.base else SCHEDULER_CONFIG

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.scheduler_config)

    def base(self) -> Artifact:
        """A DiT trained from scratch on the base's data."""
        config, data = self.config, self.encode("base")
        return run_stage(
            "base",
            self.folder / "base",
            {"pretrain": config.pretrain, "seed": config.seeds[0]},
            {"latents": data},
            lambda path: self._pretrain(path, data),
            unlisted=(f"{TRAINING}/*",),
        )

    def _pretrain(self, folder: Path, data: Artifact) -> dict:
        made, names = self.config.pretrain, data.counts["classes"]
        latents, held = (Latents.load(data.path / f"{part}.npz") for part in ("train", "test"))
        side, channels = latents.mean.shape[2], latents.mean.shape[-1]
        config = made.network(side, channels, len(names))
        model = DiT(config, rngs=nnx.Rngs(self.config.seeds[0]))
        schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
        trained = adapt(
            mark_trainable(model), latents, schedule, made.train, folder / TRAINING,
            seed=self.config.seeds[0], description="base",
        )  # fmt: skip
        model = with_values(model, nnx.state(trained))
        pipeline = DiTPipeline(model, self.vae, SCHEDULER_CONFIG, dict(enumerate(names)))
        save_dit(pipeline, folder)
        return {"steps": made.train.steps, "error": held_out_error(model, held, schedule, seed=0)}

    def encode(self, name: str) -> Artifact:
        """A data set's latents in three parts, labelled by its own classes."""
        if name not in self._encoded:
            self._encoded[name] = self._encode(name)
        return self._encoded[name]

    def _encode(self, name: str) -> Artifact:
        config = self.config
        data = config.base_data if name == "base" else config.data[name]

        def build(folder: Path) -> dict:
            if name == "base":
                dataset = joined({key: load_dataset(x) for key, x in config.base_data.items()})
            else:
                dataset = load_dataset(config.data[name])
            counts = {}
            for part, source in parts_of(dataset).items():
                mirror = name in config.mirror and part == "train"
                latents = encode_latents(self.vae, source, mirror=mirror)
                latents.save(folder / f"{part}.npz")
                counts[part] = len(latents)
            return {**counts, "classes": list(dataset.display_names)}

        settings = {"data": data, "mirror": name in config.mirror, "vae": config.vae}
        if config.base:
            settings["base"] = self.pipeline.digest
        return run_stage(f"latents {name}", self.folder / "latents" / name, settings, {}, build)

    def latents(self, name: str, part: str) -> Latents:
        """A part's latents; labels of a new data set are those of the extended table."""
        found = Latents.load(self.encode(name).path / f"{part}.npz")
        if name == "base":
            return dataclasses.replace(found, labels=self._known_labels()[found.labels])
        return dataclasses.replace(found, labels=found.labels + first_label(self.dit))

    def _known_labels(self) -> np.ndarray:
        """The base's label of each class of its data: by name where it knows more than these."""
        names, known = self.classes("base"), self.pipeline.id2label
        if len(names) == self.dit.config.num_embeds_ada_norm:
            return np.arange(len(names))
        labels = {name: label for label, name in known.items()}
        if missing := [name for name in names if name not in labels]:
            raise UserError(
                f"base_data: class {missing[0]!r} is none of the {len(known)} that the base names"
            )
        return np.array([labels[name] for name in names])

    def sources(self, name: str) -> dict[str, ImageSource]:
        """The images of a data set's parts."""
        return parts_of(load_dataset(self.config.data[name]))

    def classes(self, name: str) -> list[str]:
        """The display names of a data set's classes."""
        return self.encode(name).counts["classes"]

    def sweep(self, name: str, recipe: str) -> float:
        """The rate of the least validation error, all tried with the first seed."""
        errors = {
            rate: self.train(name, recipe, rate, self.config.seeds[0]).counts["validation"]
            for rate in self.config.rates_of(recipe)
        }
        return min(errors, key=lambda rate: errors[rate])

    def train(self, name: str, recipe: str, rate: float, seed: int) -> Artifact:
        """One recipe on one data set at one rate."""
        config = self.config
        train = dataclasses.replace(config.train, learning_rate=rate)
        settings = {
            "recipe": recipe,
            "rank": config.rank,
            "lora_rank": config.lora_rank,
            "train": train,
            "seed": seed,
            "error_repeats": config.error_repeats,
            "base": self.pipeline.digest,
            "dtype": config.dtype,
            **self.choice(recipe),
        }

        def build(folder: Path) -> dict:
            model = adapt(
                self._adapted(name, recipe, seed), self.latents(name, "train"), self.schedule,
                train, folder / TRAINING, seed=seed, kept=self.kept(train),
                description=f"{recipe} {rate:g}",
            )  # fmt: skip
            write_state(folder / "adapter.safetensors", extract(model))
            return self._scores(name, model, recipe)

        return run_stage(
            f"{recipe}: {name}, rate {rate:g}, seed {seed}",
            self.folder / "study" / name / recipe / f"{rate:g}-seed{seed}",
            settings,
            {"latents": self.encode(name)},
            build,
            unlisted=(f"{TRAINING}/*",),
        )

    def _adapted(self, name: str, recipe: str, seed: int, classes: int = 0) -> DiT:
        count = classes or len(self.classes(name))
        ranks = {"rank": self.config.rank, "lora_rank": self.config.lora_rank}
        return adapted(self.dit, recipe, count, **ranks, seed=seed, adapter=self.config.adapter)

    def choice(self, recipe: str) -> dict:
        """The adapter among a stage's settings, where it is what the stage trains."""
        return {"adapter": self.config.adapter} if recipe == CHOSEN else {}

    def _scores(self, name: str, model: DiT, recipe: str) -> dict:
        """Errors on what the model learnt and on what the base knew."""
        error = partial(held_out_error, schedule=self.schedule, seed=0)
        learnt = sum(x.size for x in jax.tree.leaves(nnx.state(model, Trainable)))
        old = self.latents("base", "test")
        scores = {
            part: error(model, self.latents(name, part), repeats=self.config.error_repeats)
            for part in ("validation", "test")
        }
        scores |= {
            "trainable": learnt,
            "whole": sum(x.size for x in jax.tree.leaves(nnx.state(self.dit))),
            "old": error(model, old),
            "old_before": self._old_before,
        }
        if not RECIPES[recipe].whole:
            scores["old_off"] = error(with_scale(model, 0.0), old)
        return scores

    @cached_property
    def _old_before(self) -> float:
        """The base's error on what it knows, the same beside every recipe."""
        return held_out_error(self.dit, self.latents("base", "test"), self.schedule, seed=0)

    @cached_property
    def _drawn_by_base(self) -> np.ndarray:
        """Latents of the base's own classes, for retention."""
        retention = self.config.train.retention
        classes = [ClassOf(0, label) for label in range(self.dit.config.num_embeds_ada_norm)]
        generate = dataclasses.replace(self.config.generate, guidance_scale=1.0)
        generator = ClassGenerator(
            [self.dit],
            self.vae,
            self.scheduler_config,
            classes,
            generate,
            seed=self.config.seeds[0],
        )
        numbers = np.arange(retention.images)
        parts = [
            generator.latents(part % len(classes), part // len(classes))
            for part in np.split(
                numbers, range(generate.batch_size, len(numbers), generate.batch_size)
            )
        ]
        return np.concatenate(parts)

    def kept(self, train: TrainConfig) -> np.ndarray | None:
        return self._drawn_by_base if train.retention else None

    def sets(self, rate: float) -> dict[str, Artifact]:
        """A set of parameters for every data set, all around one base.

        Their class tables have one length, so that they stack; a set uses the first of its rows.
        """
        config = self.config
        train = dataclasses.replace(config.sets_train, learning_rate=rate)
        seed = config.seeds[0]
        settings = {
            "recipe": config.sets_recipe,
            "rank": config.rank,
            "lora_rank": config.lora_rank,
            "train": train,
            "seed": seed,
            "rows": self.rows,
            "together": config.together,
            "base": self.pipeline.digest,
            "dtype": config.dtype,
            **self.choice(config.sets_recipe),
        }
        names = tuple(config.data)
        groups = [names] if config.together else [(name,) for name in names]
        made: dict[str, Artifact] = {}
        for group in groups:
            label = ", ".join(group)

            def build(folder: Path, group: tuple[str, ...] = group) -> dict:
                models = [
                    self._adapted(name, config.sets_recipe, seed, self.rows) for name in group
                ]
                data = [self.latents(name, "train") for name in group]
                trained = adapt_each(
                    models, data, self.schedule, train, folder / TRAINING, seed=seed,
                    kept=self.kept(train), description=f"{len(group)} sets",
                )  # fmt: skip
                errors = {}
                for name, model in zip(group, trained, strict=True):
                    write_state(folder / f"{name}.safetensors", extract(model))
                    test = self.latents(name, "test")
                    errors[name] = held_out_error(model, test, self.schedule, seed=0)
                return {"errors": errors}

            stage = run_stage(
                f"sets: {label}",
                self.folder / "sets" / ("together" if config.together else group[0]),
                settings,
                {name: self.encode(name) for name in group},
                build,
                unlisted=(f"{TRAINING}/*",),
            )
            made |= dict.fromkeys(group, stage)
        return made

    @property
    def rows(self) -> int:
        return max(len(self.classes(name)) for name in self.config.data)

    def set_model(self, name: str, stage: Artifact) -> DiT:
        empty = self._adapted(name, self.config.sets_recipe, self.config.seeds[0], self.rows)
        return load_state(empty, read_state(stage.path / f"{name}.safetensors"))

    def draw(self, sets: dict[str, Artifact]) -> Artifact:
        """Images of every class of every set, each batch a mixture of all."""

        def build(folder: Path) -> dict:
            models = [self.set_model(name, stage) for name, stage in sets.items()]
            return self._fill(folder, models, list(sets))

        inputs = {f"set {name}": stage for name, stage in sets.items()}
        return run_stage("images", self.folder / "images", self._drawing(), inputs, build)

    def draw_one(self, name: str, recipe: str, stage: Artifact) -> Artifact:
        """Images of one data set from what one recipe learnt."""

        def build(folder: Path) -> dict:
            empty = self._adapted(name, recipe, self.config.seeds[0])
            state = read_state(stage.path / "adapter.safetensors")
            return self._fill(folder, [load_state(empty, state)], [name])

        where = self.folder / "study" / name / recipe / "images"
        label = f"images: {recipe}, {name}"
        return run_stage(label, where, self._drawing(), {"adapter": stage}, build)

    def _drawing(self) -> dict:
        return {"generate": self.config.generate, "seed": self.config.seeds[0]}

    def _fill(self, folder: Path, models: list[DiT], names: list[str]) -> dict:
        config, first = self.config, first_label(self.dit)
        classes, class_names, datasets = [], [], []
        for number, name in enumerate(names):
            for label, title in enumerate(self.classes(name)):
                classes.append(ClassOf(number, first + label))
                class_names.append(title)
                datasets.append(name)
        generator = ClassGenerator(
            models, self.vae, self.scheduler_config, classes, config.generate, seed=config.seeds[0]
        )
        titles = [f"{name} {title}" for name, title in zip(datasets, class_names, strict=True)]
        count = fill_store(
            generator,
            folder,
            class_names,
            titles,
            config.generate,
            seed=config.seeds[0],
            datasets=datasets,
        )
        return {"images": count}

    def measure(self, label: str, images: Artifact, names: tuple[str, ...]) -> dict[str, Artifact]:
        """FID and its companions of each data set's images against its held-out photos.

        A data set with too few of those is measured against its training images, and the result
        says so.
        """
        config, made = self.config, {}
        for name in names:

            def build(folder: Path, name: str = name) -> dict:
                dataset = load_dataset(config.data[name])
                store = ImageStore(images.path).of_dataset(name, self.classes(name))
                real, reference = dataset.test, "held-out images"
                if len(real) < 2 * least_samples(config.quality):
                    real, reference = dataset.train, "training images"
                found = compare(
                    real,
                    store,
                    _extractor(config.features),
                    config.quality,
                    reference=reference,
                    seed=0,
                )
                write_json(folder / "quality.json", found)
                return {"fid": found["all"]["fid"]}

            settings = {
                "features": config.features,
                "quality": config.quality,
                "data": config.data[name],
                "reference": "held-out images where there are enough",
            }
            made[name] = run_stage(
                f"quality: {label}, {name}",
                self.folder / "quality" / label / name,
                settings,
                {"images": images},
                build,
            )
        return made

    def routing(self, sets: dict[str, Artifact]) -> Artifact:
        """Proves what one batch of all sets is worth: equal outputs, and the base untouched."""

        def build(folder: Path) -> dict:
            models = [self.set_model(name, stage) for name, stage in sets.items()]
            found = routing_differences(self.dit, models)
            write_json(folder / "routing.json", found)
            return found

        inputs = {f"set {name}": stage for name, stage in sets.items()}
        return run_stage("routing", self.folder / "routing", {"format": 1}, inputs, build)


def _extractor(name: str) -> FeatureExtractor:
    """A CLIP's image tower, or "inception:PATH"."""
    kind, _, path = name.partition(":")
    return inception_extractor(path) if kind == "inception" and path else clip_extractor(name)
