"""What a scaling study is told."""

from dataclasses import dataclass, field
from typing import Annotated

from jaxsynth.core.limits import (
    Count,
    Distinct,
    Finite,
    Natural,
    OneOf,
    Positive,
    Range,
    Seed,
    check_limits,
)
from jaxsynth.core.places import Clip, MaybeNetwork, Pipeline
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.prompt_banks import PromptConfig
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.quality.filters import FilterConfig
from jaxsynth.robustness.corruptions.predictions import Corruptions
from jaxsynth.tasks.contrastive import CloneConfig
from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.tasks.probe import ProbeConfig
from jaxsynth.tasks.supervised import SupervisedConfig
from jaxsynth.tasks.text_to_image import FinetuneConfig
from jaxsynth.training.config import aside
from jaxsynth.training.sharding import MeshConfig

REAL = "real"


@dataclass(frozen=True)
class SourceConfig:
    """Where a set of synthetic images comes from.

    `prompts` are what they are drawn from. With `shots` the generator first learns so many real
    images of each class (DataDream's adapter for the data set), with 0 it draws from prompts alone.
    `guidance_scale` takes the place of `generate`'s. `keep` says which images sizes are taken from,
    as the study's `clip` judges them; what it compares with shots are the generator's.
    """

    prompts: PromptConfig = field(default_factory=PromptConfig)
    shots: Natural = 0
    guidance_scale: Finite | None = None
    keep: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self):
        check_limits(self)
        if self.keep.needs_shots and not self.shots:
            raise ValueError(
                "keep: judge, least_cosine or most_cosine compares with shots, but shots is 0"
            )


@dataclass(frozen=True)
class JudgeConfig:
    """Which points go through the robustness suite, and how.

    `sizes` are those of the curves whose points do, in images a class; () leaves the suite out.
    `attacks` are some of FGSM and PGD, of radius `eps`; `corruptions` those made of test images.
    """

    sizes: tuple[Count, ...] = ()
    attacks: tuple[Annotated[str, OneOf("FGSM", "PGD")], ...] = ("FGSM", "PGD")
    eps: Positive = 1 / 255
    corruptions: Corruptions = field(default_factory=Corruptions)
    batch_size: Count = 256

    def __post_init__(self):
        check_limits(self)


@dataclass(frozen=True)
class Config:
    """A study: every source at every size, alone and with real images, with every seed.

    All counts are images of each class. `real_sizes` are those of the curve of real images alone,
    `sizes` those of each source. `added_real` real images stand beside every size of a source in
    the curve "NAME + real" (0: no such curve). At the size `mixed_size`, `fractions` of the images
    are real in "NAME, mixed" (0: none). A synthetic image counts 1 in the loss, a real one
    `real_weight`. The sources in `practice` have a curve "NAME, practiced" too: each size has the
    images of the last one and those about which the last one's classifier is least certain, of all
    that were drawn.

    The first `measured` images of each class tell how recognisable and diverse a source is to
    `clip` (0: neither). Networks begin at random, or with the weights of `backbone`, a folder or
    hub id that `load_classifier` reads and whose shape `network` has. `clones` are backbones
    trained without classes on all images of the source `clone_source`, whose features `probe` tells
    the classes by. Each of `seeds` has its own real images, adapters, synthetic images and start.
    `resamples` are those of the intervals on the page; `points_at_once` bounds how many points
    train together (0: all of a setting).
    """

    method: str = "scaling"
    base: Pipeline = "tiny"
    clip: Clip = "tiny/clip"
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    sizes: Annotated[tuple[Count, ...], Distinct()] = (4, 8, 16, 32, 64)
    real_sizes: Annotated[tuple[Count, ...], Distinct()] = (4, 8, 16, 32, 64)
    added_real: Natural = 0
    mixed_size: Natural = 0
    fractions: tuple[Annotated[float, Range(0, 1, above=True, below=True)], ...] = ()
    real_weight: Positive = 1.0
    practice: tuple[str, ...] = ()
    measured: Natural = 0
    backbone: MaybeNetwork = ""
    clones: dict[str, CloneConfig] = field(default_factory=dict)
    clone_source: str = ""
    seeds: Annotated[tuple[Seed, ...], Distinct()] = (0, 1, 2)
    resamples: Annotated[int, Range(100)] = aside(1000)
    points_at_once: Natural = aside(0)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: SupervisedConfig = field(default_factory=SupervisedConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_limits(self)
        for name in self.sources:
            if name == REAL or not name or any(x in name for x in "/,+"):
                raise ValueError(f"sources: {name!r}: expected another name, without / , and +")
        if self.generate.images_per_class < max(self.sizes):
            raise ValueError(
                f"generate.images_per_class: {self.generate.images_per_class}, but `sizes` asks "
                f"for {max(self.sizes)}"
            )
        for name in self.practice:
            if name not in self.sources:
                raise ValueError(f"practice: {name!r}, expected some of {', '.join(self.sources)}")
        if self.practice and self.generate.images_per_class <= max(self.sizes):
            raise ValueError(
                f"practice: {', '.join(self.practice)}: chooses the largest size, "
                f"{max(self.sizes)}, of all images, but generate.images_per_class is "
                f"{self.generate.images_per_class}; expected more"
            )
        if self.measured > self.generate.images_per_class:
            raise ValueError(f"measured: {self.measured}, more than are generated")
        if self.clones and self.network.family != "vit":
            raise ValueError(
                f"network.family: {self.network.family!r}, but `clones` compare tokens; expected "
                "'vit', or no clones"
            )
        if "start" in self.clones:
            raise ValueError("clones: 'start' is the random backbone, expected another name")
        if bool(self.fractions) != bool(self.mixed_size):
            raise ValueError(
                f"mixed_size: {self.mixed_size} and fractions: {self.fractions}, expected both or "
                "neither"
            )
        if bool(self.clones) != bool(self.clone_source):
            raise ValueError(
                f"clone_source: {self.clone_source!r} and {len(self.clones)} clones, expected both "
                "or neither"
            )
        if self.clones and self.clone_source not in self.sources:
            raise ValueError(
                f"clone_source: {self.clone_source!r}, expected one of {', '.join(self.sources)}"
            )
        if self.mixed_size > self.generate.images_per_class:
            raise ValueError(f"mixed_size: {self.mixed_size}, more than are generated")
        strange = set(self.judge.sizes) - {*self.sizes, *self.real_sizes}
        if strange:
            raise ValueError(f"judge.sizes: {sorted(strange)} are neither sizes nor real_sizes")

    @property
    def most_real(self) -> int:
        """The real images of each class that a seed needs."""
        mixed = [round(self.mixed_size * fraction) for fraction in self.fractions]
        shots = [source.shots for source in self.sources.values()]
        return max(*self.real_sizes, self.added_real, *mixed, *shots)
