"""The configuration of a DiffScaler run (`methods.diffscaler.run`)."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.core.limits import Count, Distinct, Natural, OneOf, Seed, check_limits
from jaxsynth.core.places import MaybeFolder, Place
from jaxsynth.data.conditions import CHANNELS, WITH_PARTNER
from jaxsynth.data.dataset import DataConfig
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.diffscaler.recipes import CHOSEN, RECIPES, Adaptation
from jaxsynth.models.diffusion.dit import DiTConfig
from jaxsynth.quality.metrics import QualityConfig
from jaxsynth.runs.sweep import rates_of
from jaxsynth.tasks.class_conditional import AdaptConfig
from jaxsynth.training.sharding import MeshConfig


@dataclass(frozen=True)
class PretrainConfig:
    """The base that the run trains itself, where `base` names none: a small DiT."""

    width: Count = 128
    layers: Count = 4
    heads: Count = 4
    patch_size: Count = 2
    train: AdaptConfig = field(default_factory=AdaptConfig)

    def __post_init__(self):
        check_limits(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.train.retention is not None:
            raise ValueError("pretrain.train.retention: there is no base to retain yet")

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
    `base_data` first. `base_data` are data sets by name that the base was trained on, on which
    forgetting is measured: all its classes in their order, or some by "<data set> <class>".
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

    Training lies on the devices of `mesh`.
    """

    method: str = "diffscaler"
    base: Annotated[
        str, Place(model=True, file=True, has=("model_index.json", "config.json"), words=("",))
    ] = ""
    vae: Annotated[str, Place(model=True, has=("vae/config.json", "config.json"))] = "tiny"
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    base_data: dict[str, DataConfig] = field(default_factory=dict)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    data: dict[str, DataConfig] = field(default_factory=dict)
    mirror: tuple[str, ...] = ()
    study: tuple[str, ...] = ()
    recipes: tuple[str, ...] = tuple(name for name in RECIPES if name != CHOSEN)
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rank: Count = 8
    lora_rank: Count = 9
    train: AdaptConfig = field(default_factory=AdaptConfig)
    seeds: Annotated[tuple[Seed, ...], Distinct()] = (0, 1, 2)
    error_repeats: Count = 8
    adapter: AdapterChoice | None = None
    sets_recipe: str = "affiner_all"
    sets_steps: Natural = 0
    together: bool = True
    draw: tuple[str, ...] = ("full",)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    features: Annotated[str, Place(model=True, has=("config.json",), prefix="inception:")] = (
        "tiny/clip"
    )
    quality: QualityConfig = field(default_factory=QualityConfig)
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    condition_folders: dict[str, MaybeFolder] = field(default_factory=dict)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_limits(self)
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
        if not self.base_data:
            raise ValueError("base_data: expected at least one")
        if "base" in self.data:
            raise ValueError("data: 'base' is what the run's folders call the base's own data")
        if self.base and not self.data:
            raise ValueError("data: none, and base names one: nothing is left to do")
        if self.data and not self.study:
            raise ValueError("study: expected at least one of data")
        if RECIPES[self.sets_recipe].whole:
            raise ValueError(f"sets_recipe: {self.sets_recipe!r} changes the base's own weights")
        self.sets_train  # noqa: B018, refuses `sets_steps` that its calls do not divide
        for recipe in self.recipes if self.data else ():
            if not self.rates_of(recipe):
                raise ValueError(f"rates: none for recipe {recipe!r}")

    @property
    def sets_train(self) -> AdaptConfig:
        """How the sets are trained, but for the rate."""
        return replace(self.train, steps=self.sets_steps) if self.sets_steps else self.train

    def rates_of(self, recipe: str) -> tuple[float, ...]:
        """The learning rates to try for a recipe."""
        group = "whole" if RECIPES[recipe].whole else "adapter"
        return rates_of(self.rates, recipe, group)

    def adaptation(self, recipe: str, seed: int) -> Adaptation:
        """What a recipe of this run makes of the base, from a seed."""
        adapter = self.adapter if recipe == CHOSEN else None
        return Adaptation(recipe, self.rank, self.lora_rank, adapter, seed)
