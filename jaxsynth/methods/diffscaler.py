"""DiffScaler (Nair et al. 2024, arXiv 2404.09976): one frozen DiT, many data sets.

A pre-trained class-conditional diffusion transformer learns new data sets by Affiners and new class
rows, a set of parameters for each, and keeps every old one. The run compares the Affiner with its
rivals on one data set (learning rate swept for every recipe, several seeds), gives all data sets a
set of their own, draws from all of them in one mixed batch, and measures the images.

Below the run's folder:

    base                                 the transformer, where the configuration names none
    latents/<data set>                   cached latents: train, validation, test
    study/<data set>/<recipe>/<rate>-seed0   what the recipe learnt, and its held-out errors
    sets/<data set>                      its parameters, around the same base
    images                               images of every class of every set, batches mixed
    conditions/<data set>/<kind>         a set that also follows condition images, and its images
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters.base import (
    Trainable,
    extract,
    load_state,
    mark_trainable,
    merge,
    route,
    stack,
    with_scale,
)
from jaxsynth.data.conditions import CHANNELS, WITH_PARTNER
from jaxsynth.data.sources import DataConfig, Dataset, ImageSource, Subset, load_dataset
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.classes import ClassGenerator, ClassOf
from jaxsynth.generation.images import GenerateConfig, fill_store
from jaxsynth.generation.routing import per_image
from jaxsynth.methods import diffscaler_report
from jaxsynth.methods.diffscaler_conditions import ConditionTask
from jaxsynth.methods.diffscaler_recipes import RECIPES, adapted, first_label
from jaxsynth.models.dit import DiT, DiTConfig
from jaxsynth.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.quality.evaluate import compare
from jaxsynth.quality.features import FeatureExtractor, clip_extractor, inception_extractor
from jaxsynth.quality.metrics import QualityConfig
from jaxsynth.training.artifact import Artifact, run_stage, write_json
from jaxsynth.training.class_conditional import (
    Latents,
    TrainConfig,
    adapt,
    adapt_each,
    encode_latents,
    held_out_error,
)
from jaxsynth.weights.dit import DiTPipeline, load_dit, save_dit
from jaxsynth.weights.hf import load_model, load_pipeline, resolve
from jaxsynth.weights.states import read_state, write_state

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


@dataclass(frozen=True)
class PretrainConfig:
    """The base that the run trains itself, where `base` names none: a small DiT."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    patch_size: int = 2
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Config:
    """One run.

    `base` is a DiT pipeline or transformer folder, a hub id, or an official .pt; "" trains one on
    `base_data` first. `vae` serves where the base brings none: "tiny" or an autoencoder's folder.
    `data` are the new data sets by name, of which `study` names those that all `recipes` compare
    on; `rates` holds the learning rates to sweep, for a recipe's name, "whole" or "adapter".
    `sets_recipe` is what every data set is given in the end, at the rate that did best in the
    study. `mirror` names the data sets whose mirror images are as good as they are; `draw` names
    recipes of the study whose images are drawn and measured too. `features` is a CLIP's folder, or
    "inception:PATH" with InceptionV3's weights.

    `conditions` names for data sets the kinds of condition images (`data.conditions`) that
    `sets_recipe` learns to follow, each by a set of parameters of its own; `condition_folders`
    where the files of a kind lie that images do not tell.
    """

    method: str = "diffscaler"
    base: str = ""
    vae: str = "tiny"
    dtype: str = "float32"
    base_data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    data: dict[str, DataConfig] = field(default_factory=dict)
    mirror: tuple[str, ...] = ()
    study: tuple[str, ...] = ()
    recipes: tuple[str, ...] = tuple(RECIPES)
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rank: int = 8
    lora_rank: int = 9
    train: TrainConfig = field(default_factory=TrainConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    error_repeats: int = 8
    sets_recipe: str = "affiner_all"
    together: bool = True
    draw: tuple[str, ...] = ("full",)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    features: str = "tiny/clip"
    quality: QualityConfig = field(default_factory=QualityConfig)
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    condition_folders: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name, values, known in (
            ("recipes", self.recipes, RECIPES),
            ("draw", self.draw, self.recipes),
            ("sets_recipe", (self.sets_recipe,), self.recipes),
            ("study", self.study, self.data),
            ("mirror", self.mirror, (*self.data, "base")),
            ("rates", self.rates, (*RECIPES, "whole", "adapter")),
            ("conditions", self.conditions, self.data),
            ("conditions", [k for kinds in self.conditions.values() for k in kinds], CHANNELS),
            ("condition_folders", self.condition_folders, WITH_PARTNER),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"{name}: {unknown[0]!r}, expected some of {', '.join(known)}")
        if not self.data or not self.study or not self.seeds:
            raise ValueError("data, study and seeds: expected at least one of each")
        if RECIPES[self.sets_recipe].whole:
            raise ValueError(f"sets_recipe: {self.sets_recipe!r} changes the base's own weights")
        for recipe in self.recipes:
            if not self.rates_of(recipe):
                raise ValueError(f"rates: none for recipe {recipe!r}")

    def rates_of(self, recipe: str) -> tuple[float, ...]:
        """The learning rates to try for a recipe."""
        group = "whole" if RECIPES[recipe].whole else "adapter"
        return tuple(self.rates.get(recipe, self.rates.get(group, ())))


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the run, then its page; returns the page's path."""
    work = _Work(config, Path(workdir))
    wanted = [(name, kind) for name, kinds in config.conditions.items() for kind in kinds]
    tasks = [ConditionTask(work, name, kind) for name, kind in wanted]
    for task in tasks:  # first, because files may be missing
        task.maps()
    best: dict[str, dict[str, float]] = {}
    for name in config.study:
        best[name] = {recipe: work.sweep(name, recipe) for recipe in config.recipes}
        for recipe in config.recipes:
            for seed in config.seeds[1:]:
                work.train(name, recipe, best[name][recipe], seed)
    rate = best[config.study[0]][config.sets_recipe]
    sets = work.sets(rate)
    images = work.draw(sets)
    work.measure("routed", images, tuple(config.data))
    for name in config.study:
        for recipe in config.draw:
            stage = work.train(name, recipe, best[name][recipe], config.seeds[0])
            work.measure(recipe, work.draw_one(name, recipe, stage), (name,))
    work.routing(sets)
    for task in tasks:
        task.run(rate, sets[task.name], images)
    return report(work.folder)


def report(workdir: Path) -> Path:
    """Writes results.json and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return diffscaler_report.page_of(Path(workdir))
    return diffscaler_report.write(Path(workdir))


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


class _Work:
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
        config = DiTConfig(
            num_attention_heads=made.heads,
            attention_head_dim=made.width // made.heads,
            num_layers=made.layers,
            patch_size=made.patch_size,
            sample_size=latents.mean.shape[2],
            in_channels=latents.mean.shape[-1],
            out_channels=2 * latents.mean.shape[-1],
            num_embeds_ada_norm=len(names),
            norm_eps=1e-6,
        )
        model = DiT(config, rngs=nnx.Rngs(self.config.seeds[0]))
        schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
        model = adapt(
            mark_trainable(model), latents, schedule, made.train, folder / TRAINING,
            seed=self.config.seeds[0], description="base",
        )  # fmt: skip
        model = _frozen(model)
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
            dataset = load_dataset(data)
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
            return found
        return dataclasses.replace(found, labels=found.labels + first_label(self.dit))

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
        return adapted(self.dit, recipe, count, **ranks, seed=seed)

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
            "old_before": error(self.dit, old),
        }
        if not RECIPES[recipe].whole:
            scores["old_off"] = error(with_scale(model, 0.0), old)
        return scores

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
        train = dataclasses.replace(config.train, learning_rate=rate)
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
        classes, titles = [], []
        for number, name in enumerate(names):
            for label, title in enumerate(self.classes(name)):
                classes.append(ClassOf(number, first + label))
                titles.append(f"{name} {title}")
        generator = ClassGenerator(
            models, self.vae, self.scheduler_config, classes, config.generate, seed=config.seeds[0]
        )
        count = fill_store(generator, folder, titles, titles, config.generate, seed=config.seeds[0])
        return {"images": count}

    def measure(self, label: str, images: Artifact, names: tuple[str, ...]) -> dict[str, Artifact]:
        """FID and its companions of each data set's images against its held-out photos."""
        config, made = self.config, {}
        for name in names:

            def build(folder: Path, name: str = name) -> dict:
                dataset = load_dataset(config.data[name])
                store = diffscaler_report.images_of(images.path, name)
                extractor = _extractor(config.features)
                found = compare(dataset.train, store, extractor, config.quality, seed=0)
                write_json(folder / "quality.json", found)
                return {"fid": found["all"]["fid"]}

            settings = {
                "features": config.features,
                "quality": config.quality,
                "data": config.data[name],
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


def routing_differences(base: DiT, models: list[DiT]) -> dict[str, float]:
    """The largest differences between a mixed batch and separate runs, and between base and off.

    {"mixed": over outputs of a batch that mixes all models, "off": of each model at strength 0 on
    the base's classes, "merged": of each model merged into plain weights}.
    """
    config = base.config
    keys = jax.random.split(jax.random.key(0), 3)
    count = 4 * len(models)
    x = jax.random.normal(
        keys[0], (count, config.sample_size, config.sample_size, config.in_channels)
    )
    t = jax.random.randint(keys[1], (count,), 0, 1000)
    which = jnp.arange(count) % len(models)
    labels = jnp.full(count, first_label(base))
    graphdef, _, frozen = nnx.split(models[0], Trainable, ...)
    factors = stack([nnx.state(model, Trainable) for model in models])

    @jax.jit
    def mixed(factors, frozen, x, t, labels):
        def one(factors, frozen, *rows):
            return nnx.merge(graphdef, factors, frozen)(*rows)

        return per_image(one, route(factors, which), frozen, count)(x, t, labels)

    call: Callable = jax.jit(lambda model, *rows: model(*rows))
    together = mixed(factors, frozen, x, t, labels)
    apart = jnp.stack([call(model, x, t, labels) for model in models])[which, jnp.arange(count)]
    old = jax.random.randint(keys[2], (count,), 0, config.null_label + 1)
    plain = call(base, x, t, old)
    off = [jnp.abs(call(with_scale(model, 0.0), x, t, old) - plain).max() for model in models]
    merged = [
        jnp.abs(call(merge(model), x, t, labels) - call(model, x, t, labels)).max()
        for model in models
    ]
    return {
        "mixed": float(jnp.abs(together - apart).max()),
        "off": float(max(off)),
        "merged": float(max(merged)),
        "scale": float(jnp.abs(apart).max()),
    }


def _extractor(name: str) -> FeatureExtractor:
    """A CLIP's image tower, or "inception:PATH"."""
    kind, _, path = name.partition(":")
    return inception_extractor(path) if kind == "inception" and path else clip_extractor(name)


def _frozen(model: DiT) -> DiT:
    """The same network with plain parameters."""
    graphdef, state = nnx.split(DiT(model.config, dtype=model.dtype, rngs=nnx.Rngs(0)))
    values = nnx.to_flat_state(nnx.state(model))
    flat = dict(nnx.to_flat_state(state))
    filled = [(path, flat[path].replace(value[...])) for path, value in values]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
