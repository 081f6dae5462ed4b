"""DiffScaler (Nair et al. 2024, arXiv 2404.09976): one frozen DiT, many data sets.

A pre-trained class-conditional diffusion transformer learns new data sets by Affiners and new class
rows, a set of parameters for each, and keeps every old one. The run compares the Affiner with its
rivals on one data set (learning rate swept for every recipe, several seeds), gives all data sets a
set of their own, draws from all of them in one mixed batch, and measures the images.

Below the run's folder:

    base                                 the transformer, where the configuration names none
    latents/<data set>                   cached latents: train, validation, test
    kept                                 images of the base, where training retains it
    study/<data set>/<recipe>/<rate>-seed0   what the recipe learnt, and its held-out errors
    sets/<data set>                      its parameters, around the same base
    images                               images of every class of every set, batches mixed
    conditions/<data set>/<kind>         a set that also follows condition images, and its images
"""

import dataclasses
from functools import cached_property, partial
from pathlib import Path

import jax

from jaxsynth.data.conditions import WITH_PARTNER
from jaxsynth.data.dataset import Dataset
from jaxsynth.methods.diffscaler import conditions, inputs, stages
from jaxsynth.methods.diffscaler import report as diffscaler_report
from jaxsynth.methods.diffscaler.config import Config
from jaxsynth.methods.diffscaler.plan import plan, planned_base
from jaxsynth.models.diffusion.vae import AutoencoderKL
from jaxsynth.runs.rehearsal import Unmade
from jaxsynth.runs.results import check_stages
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import condition_files, data_source, joined_source
from jaxsynth.runs.stage import Artifact, Source
from jaxsynth.runs.sweep import sweep
from jaxsynth.tasks.class_conditional import AdaptConfig
from jaxsynth.weights.networks.dit import DiTPipeline

__all__ = ["Config", "make", "plan", "report", "run"]

BASE, ROUTED = "base", "routed"


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the run, then its page; returns the page's path, or the base's folder."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return report(workdir) if config.data else Path(workdir) / BASE


def make(config: Config, workdir: Path) -> None:
    """Every stage of the run."""
    made = _Run(config, Path(workdir))
    if not config.data:
        keep_record(made.folder, config)
        _ = made.trained
        return
    wanted = [(name, kind) for name, kinds in config.conditions.items() for kind in kinds]
    maps = {pair: made.maps(*pair) for pair in wanted}  # first, because files may be missing
    keep_record(made.folder, config)
    rates: dict[str, float] = {}
    for name in config.study:
        for recipe in config.recipes:
            train = partial(made.train, name, recipe)
            best, trained = sweep(config.rates_of(recipe), config.seeds, train)
            if name == config.study[0]:
                rates[recipe] = best
            if recipe in config.draw:
                images = made.draw_recipe(name, recipe, trained[config.seeds[0]])
                made.measure(recipe, images, name)
    rate = rates[config.sets_recipe]
    sets = made.sets(rate)
    images = made.draw(sets)
    for name in config.data:
        made.measure(ROUTED, images, name)
    made.routing(sets)
    for (name, kind), one in maps.items():
        made.condition(name, kind, rate, one, sets[name], images)


def report(workdir: Path) -> Path:
    """Writes results.json and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return diffscaler_report.page_of(Path(workdir))
    check_stages(Path(workdir))
    return diffscaler_report.write(Path(workdir))


class _Run:
    """The stages of a run, each with the slice of the config and the inputs that it declares."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self.mesh = config.mesh.make()
        self._data = {name: data_source(one) for name, one in config.data.items()}
        self._data["base"] = joined_source(config.base_data)
        self._latents: dict[str, Artifact] = {}

    @property
    def _seed(self) -> int:
        return self.config.seeds[0]

    @cached_property
    def _own_vae(self) -> Source[AutoencoderKL]:
        return inputs.vae_source(self.config)

    @cached_property
    def _vae(self) -> Source[AutoencoderKL]:
        if not self.config.base:
            return self._own_vae
        return Source(lambda: self.base.value.vae, lambda _: self.base.digest)

    @cached_property
    def base(self) -> Source[DiTPipeline]:
        """The base: as given, or trained by this run."""
        if self.config.base:
            return inputs.given_base(self.config, self._own_vae)
        if isinstance(self.trained, Unmade):
            return Source(
                lambda: planned_base(self.config, self._own_vae.value), self.trained.digest
            )
        return inputs.trained_base(self.trained, self.config, self._own_vae)

    @cached_property
    def trained(self) -> Artifact:
        return stages.pretrain(
            self.folder / BASE, stages.Pretraining(self.config.pretrain, self._seed),
            label="base", mesh=self.mesh, latents=self.latents("base"), vae=self._own_vae,
        )  # fmt: skip

    @cached_property
    def _kept(self) -> Artifact | None:
        retention, generate = self.config.train.retention, self.config.generate
        if retention is None:
            return None
        slice_ = stages.Retaining(retention.images, generate, self._seed)
        return stages.draw_kept(
            self.folder / "kept", slice_, label="images of the base", base=self.base
        )

    def latents(self, name: str) -> Artifact:
        if name not in self._latents:
            made = stages.encode(
                self.folder / "latents" / name, stages.Encoding(name in self.config.mirror),
                label=f"latents {name}", data=self._data[name], vae=self._vae,
            )  # fmt: skip
            if isinstance(made, Unmade):  # what the data alone tell
                pixels = self._data[name].value.train[0].image.shape[0]
                made.counts["classes"] = list(self._classes(name))
                made.counts["side"] = pixels // self._own_vae.value.config.downscale
            self._latents[name] = made
        return self._latents[name]

    def _classes(self, name: str) -> tuple[str, ...]:
        dataset: Dataset = self._data[name].value
        return dataset.display_names

    @cached_property
    def _rows(self) -> int:
        return max(len(self._classes(name)) for name in self.config.data)

    def _at(self, train: AdaptConfig, rate: float) -> AdaptConfig:
        return dataclasses.replace(train, learning_rate=rate)

    def train(self, name: str, recipe: str, rate: float, seed: int) -> Artifact:
        config = self.config
        slice_ = stages.RecipeTraining(
            config.adaptation(recipe, seed), self._at(config.train, rate), config.error_repeats
        )
        return stages.train_recipe(
            self.folder / "study" / name / recipe / f"{rate:g}-seed{seed}", slice_,
            label=f"{recipe}: {name}, rate {rate:g}, seed {seed}", mesh=self.mesh, base=self.base,
            latents=self.latents(name), old=self.latents("base"), kept=self._kept,
        )  # fmt: skip

    def draw_recipe(self, name: str, recipe: str, adapter: Artifact) -> Artifact:
        config, classes = self.config, self._classes(name)
        slice_ = stages.Drawing(
            config.adaptation(recipe, self._seed), len(classes), {name: classes},
            config.generate, self._seed,
        )  # fmt: skip
        return stages.draw_recipe(
            self.folder / "study" / name / recipe / "images", slice_,
            label=f"images: {recipe}, {name}", base=self.base, adapter=adapter,
        )  # fmt: skip

    def sets(self, rate: float) -> dict[str, Artifact]:
        config, names = self.config, tuple(self.config.data)
        slice_ = stages.SetTraining(
            config.adaptation(config.sets_recipe, self._seed),
            self._at(config.sets_train, rate),
            self._rows,
        )
        made: dict[str, Artifact] = {}
        for group in [names] if config.together else [(name,) for name in names]:
            one = stages.train_sets(
                self.folder / "sets" / ("together" if config.together else group[0]), slice_,
                label=f"sets: {', '.join(group)}", mesh=self.mesh, base=self.base, kept=self._kept,
                **{stages.LATENTS + name: self.latents(name) for name in group},
            )  # fmt: skip
            made |= dict.fromkeys(group, one)
        return made

    def draw(self, sets: dict[str, Artifact]) -> Artifact:
        config = self.config
        slice_ = stages.Drawing(
            config.adaptation(config.sets_recipe, self._seed), self._rows,
            {name: self._classes(name) for name in sets}, config.generate, self._seed,
        )  # fmt: skip
        return stages.draw_sets(
            self.folder / "images", slice_, label="images", base=self.base,
            **{stages.SET + name: one for name, one in sets.items()},
        )  # fmt: skip

    def measure(self, label: str, images: Artifact, name: str) -> Artifact:
        return stages.measure(
            self.folder / "quality" / label / name, stages.Measuring(name, self.config.quality),
            label=f"quality: {label}, {name}", images=images, data=self._data[name],
            features=self._features,
        )  # fmt: skip

    @cached_property
    def _features(self) -> Source:
        return inputs.features_source(self.config.features)

    def routing(self, sets: dict[str, Artifact]) -> Artifact:
        adaptation = self.config.adaptation(self.config.sets_recipe, self._seed)
        return stages.routing(
            self.folder / "routing", stages.Routing(adaptation, self._rows), base=self.base,
            **{stages.SET + name: one for name, one in sets.items()},
        )  # fmt: skip

    def maps(self, name: str, kind: str) -> Artifact:
        folder = self.config.condition_folders.get(kind, "") if kind in WITH_PARTNER else ""
        return conditions.make_maps(
            self._condition_folder(name, kind) / "maps", conditions.Conditions(kind),
            label=f"maps: {kind} of {name}", data=self._data[name],
            files=condition_files(self._data[name], folder),
        )  # fmt: skip

    def condition(
        self, name: str, kind: str, rate: float, maps: Artifact, plain: Artifact, drawn: Artifact
    ) -> None:
        """`plain` holds the data set's parameters without a condition, `drawn` images of them."""
        config, folder, where = self.config, self._condition_folder(name, kind), f"{kind} of {name}"
        adaptation = config.adaptation(config.sets_recipe, self._seed)
        adapter = conditions.train_condition(
            folder / "adapter",
            conditions.ConditionTraining(
                adaptation, self._at(config.sets_train, rate), self._rows, kind, name,
                config.error_repeats,
            ),
            label=f"condition: {where}", mesh=self.mesh, base=self.base,
            latents=self.latents(name), maps=maps, plain=plain, kept=self._kept,
        )  # fmt: skip
        images = conditions.draw_condition(
            folder / "images",
            conditions.ConditionDrawing(
                adaptation, self._rows, kind, name, config.generate, self._seed
            ),
            label=f"images: {where}", base=self.base, latents=self.latents(name), maps=maps,
            adapter=adapter,
        )  # fmt: skip
        conditions.measure_condition(
            folder / "following",
            conditions.Following(kind, name, config.generate.batch_size),
            label=f"following: {where}", base=self.base, data=self._data[name],
            latents=self.latents(name), maps=maps, images=images, plain=drawn,
        )  # fmt: skip

    def _condition_folder(self, name: str, kind: str) -> Path:
        return self.folder / "conditions" / name / kind
