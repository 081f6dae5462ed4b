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

from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.data.conditions import CHANNELS, WITH_PARTNER
from jaxsynth.data.dataset import DataConfig
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.diffscaler import plan as diffscaler_plan
from jaxsynth.methods.diffscaler import report as diffscaler_report
from jaxsynth.methods.diffscaler.conditions import ConditionTask
from jaxsynth.methods.diffscaler.recipes import CHOSEN, RECIPES
from jaxsynth.methods.diffscaler.stages import Work
from jaxsynth.models.diffusion.dit import DiTConfig
from jaxsynth.quality.metrics import QualityConfig
from jaxsynth.tasks.class_conditional import TrainConfig
from jaxsynth.training.planning import Plan


@dataclass(frozen=True)
class PretrainConfig:
    """The base that the run trains itself, where `base` names none: a small DiT."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    patch_size: int = 2
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")

    def network(self, side: int, channels: int, classes: int) -> DiTConfig:
        """For latents of `side` x `side` x `channels`; the output holds the variance too."""
        return DiTConfig(
            num_attention_heads=self.heads,
            attention_head_dim=self.width // self.heads,
            num_layers=self.layers,
            patch_size=self.patch_size,
            sample_size=side,
            in_channels=channels,
            out_channels=2 * channels,
            num_embeds_ada_norm=classes,
            norm_eps=1e-6,
        )


@dataclass(frozen=True)
class Config:
    """One run.

    `base` is a DiT pipeline or transformer folder, a hub id, or an official .pt; "" trains one on
    `base_data` first. `base_data` are data sets by name that the base knows, in what becomes of
    which forgetting is measured: all its classes in their order, or some by "<data set> <class>".
    `vae` serves where the base brings none: "tiny" or an autoencoder's folder. `data` are the new
    data sets by name (none: the run ends with the base), of which `study` names those that all
    `recipes` compare on; `rates` holds the learning rates to sweep, for a recipe's name, "whole" or
    "adapter". `sets_recipe` is what every data set is given in the end, at the rate that did best
    in the study and in `sets_steps` steps (0: as in the study). `mirror` names the data sets whose
    mirror images are as good as they are; `draw` names recipes of the study whose images are drawn
    and measured too. `features` is a CLIP's folder, or "inception:PATH" with InceptionV3's weights.

    `adapter` is a kind of adapter on all layers, of rank `lora_rank` unless it says so: a further
    recipe, named "adapter", and that of the sets.

    `conditions` names for data sets the kinds of condition images (`data.conditions`) that
    `sets_recipe` learns to follow, each by a set of parameters of its own, as the sets are;
    `condition_folders` where the files of a kind lie that images do not tell.
    """

    method: str = "diffscaler"
    base: str = ""
    vae: str = "tiny"
    dtype: str = "float32"
    base_data: dict[str, DataConfig] = field(default_factory=dict)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    data: dict[str, DataConfig] = field(default_factory=dict)
    mirror: tuple[str, ...] = ()
    study: tuple[str, ...] = ()
    recipes: tuple[str, ...] = tuple(name for name in RECIPES if name != CHOSEN)
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rank: int = 8
    lora_rank: int = 9
    train: TrainConfig = field(default_factory=TrainConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    error_repeats: int = 8
    adapter: AdapterChoice | None = None
    sets_recipe: str = "affiner_all"
    sets_steps: int = 0
    together: bool = True
    draw: tuple[str, ...] = ("full",)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    features: str = "tiny/clip"
    quality: QualityConfig = field(default_factory=QualityConfig)
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    condition_folders: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.adapter is not None:
            others = tuple(name for name in self.recipes if name != CHOSEN)
            object.__setattr__(self, "recipes", (*others, CHOSEN))
            object.__setattr__(self, "sets_recipe", CHOSEN)
        elif CHOSEN in self.recipes:
            raise ValueError(f"recipes: {CHOSEN!r} is what `adapter` chooses, and it is not set")
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
        if not self.base_data or not self.seeds:
            raise ValueError("base_data and seeds: expected at least one of each")
        if self.base and not self.data:
            raise ValueError("data: none, and base names one: nothing is left to do")
        if self.data and not self.study:
            raise ValueError("study: expected at least one of data")
        if RECIPES[self.sets_recipe].whole:
            raise ValueError(f"sets_recipe: {self.sets_recipe!r} changes the base's own weights")
        for recipe in self.recipes if self.data else ():
            if not self.rates_of(recipe):
                raise ValueError(f"rates: none for recipe {recipe!r}")

    @property
    def sets_train(self) -> TrainConfig:
        """How the sets are trained, but for the rate."""
        return replace(self.train, steps=self.sets_steps) if self.sets_steps else self.train

    def rates_of(self, recipe: str) -> tuple[float, ...]:
        """The learning rates to try for a recipe."""
        group = "whole" if RECIPES[recipe].whole else "adapter"
        return tuple(self.rates.get(recipe, self.rates.get(group, ())))


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the run, then its page; returns the page's path, or the base's folder."""
    work = Work(config, Path(workdir))
    if not config.data:
        return work.base().path
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


def plan(config: Config, mesh: Mesh) -> list[Plan]:
    """What each training program of a run needs on `mesh`; compiled, and not run."""
    return diffscaler_plan.plans(config, mesh)


def report(workdir: Path) -> Path:
    """Writes results.json and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return diffscaler_report.page_of(Path(workdir))
    return diffscaler_report.write(Path(workdir))
