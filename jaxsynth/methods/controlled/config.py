"""The configuration of a comparison of ways to follow conditions (`methods.controlled.run`)."""

from dataclasses import dataclass, field
from typing import Annotated

from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.core.limits import Count, Distinct, OneOf, Seed, check_limits
from jaxsynth.core.places import MaybeFolder, Pipeline
from jaxsynth.data.conditions import CHANNELS
from jaxsynth.data.dataset import DataConfig
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.controlled.ways import CHOSEN, WAYS, Way
from jaxsynth.runs.sweep import rates_of
from jaxsynth.tasks.controlled import ControlConfig
from jaxsynth.training.sharding import MeshConfig


@dataclass(frozen=True)
class Config:
    """One run.

    `base` is a Stable Diffusion folder, hub id or "tiny"; `data` the images, and `kind` the
    condition (`data.conditions`), whose files lie in `condition_folder` where images do not tell
    it. `ways` are compared at every rate of `rates` (by a way's name, or "adapter" for all but the
    ControlNet) with the first seed, then at the rate of the least validation error with all.
    `images` are drawn for each. `adapter` is a kind of adapter on all layers, of this `rank` unless
    it says so: a further way, named "adapter". Training lies on the devices of `mesh`.
    """

    method: str = "controlled"
    base: Pipeline = "tiny"
    data: DataConfig = field(default_factory=DataConfig)
    kind: Annotated[str, OneOf(*CHANNELS)] = "edges"
    condition_folder: MaybeFolder = ""
    ways: Annotated[tuple[str, ...], Distinct()] = tuple(name for name in WAYS if name != CHOSEN)
    adapter: AdapterChoice | None = None
    rank: Count = 8
    train: ControlConfig = field(default_factory=ControlConfig)
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seeds: Annotated[tuple[Seed, ...], Distinct()] = (0, 1, 2)
    error_repeats: Count = 8
    images: Count = 64
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_limits(self)
        if self.adapter is not None:
            others = tuple(name for name in self.ways if name != CHOSEN)
            object.__setattr__(self, "ways", (*others, CHOSEN))
        elif CHOSEN in self.ways:
            raise ValueError(f"ways: {CHOSEN!r} is what `adapter` chooses, and it is not set")
        for name, values, known in (
            ("ways", self.ways, WAYS),
            ("rates", self.rates, (*WAYS, "adapter")),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"{name}: {unknown[0]!r}, expected some of {', '.join(known)}")
        for way in self.ways:
            if not self.rates_of(way):
                raise ValueError(f"rates: none for {way!r}")

    def rates_of(self, way: str) -> tuple[float, ...]:
        """The learning rates to try for a way."""
        return rates_of(self.rates, way, *(() if way == "controlnet" else ("adapter",)))

    def way(self, name: str, seed: int) -> Way:
        """A way of this run, from a seed."""
        return Way(name, self.rank, self.adapter if name == CHOSEN else None, self.kind, seed)
