"""What a scaling study is told."""

from dataclasses import dataclass, field

from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.prompt_banks import PromptConfig
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.robustness.corruptions.predictions import Corruptions
from jaxsynth.tasks.supervised import NetworkConfig, SupervisedConfig
from jaxsynth.tasks.text_to_image import FinetuneConfig
from jaxsynth.training.config import aside
from jaxsynth.training.sharding import MeshConfig

REAL = "real"


@dataclass(frozen=True)
class SourceConfig:
    """Where a set of synthetic images comes from.

    `prompts` are what they are drawn from. With `shots` the generator first learns so many real
    images of each class (DataDream's adapter for the data set), with 0 it draws from prompts alone.
    `guidance_scale` takes the place of `generate`'s.
    """

    prompts: PromptConfig = field(default_factory=PromptConfig)
    shots: int = 0
    guidance_scale: float | None = None

    def __post_init__(self):
        if self.shots < 0:
            raise ValueError(f"shots: {self.shots}, expected 0 or more")


@dataclass(frozen=True)
class JudgeConfig:
    """Which points go through the robustness suite, and how.

    `sizes` are those of the curves whose points do, in images a class; () leaves the suite out.
    `eps` is the attacks' radius, `resamples` those of the bootstrap over test images.
    """

    sizes: tuple[int, ...] = ()
    eps: float = 1 / 255
    corruptions: Corruptions = field(default_factory=Corruptions)
    batch_size: int = 256
    resamples: int = 1000


@dataclass(frozen=True)
class Config:
    """A study: every source at every size, alone and with real images, with every seed.

    All counts are images of each class. `real_sizes` are those of the curve of real images alone,
    `sizes` those of each source. `added_real` real images stand beside every size of a source in
    the curve "NAME + real" (0: no such curve). At the size `mixed_size`, `fractions` of the images
    are real in "NAME, mixed" (0: none). A synthetic image counts 1 in the loss, a real one
    `real_weight`. Each of `seeds` has its own real images, adapters, synthetic images and start.
    """

    method: str = "scaling"
    base: str = "tiny"
    dtype: str = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
    real_sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
    added_real: int = 0
    mixed_size: int = 0
    fractions: tuple[float, ...] = ()
    real_weight: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    resamples: int = 1000
    points_at_once: int = aside(0)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: SupervisedConfig = field(default_factory=SupervisedConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        for name in ("sizes", "real_sizes", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: {values}, expected one value or more, each once")
        for name in ("sizes", "real_sizes"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 1 or more each")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: {self.dtype!r}, expected float32 or bfloat16")
        for name in self.sources:
            if name == REAL or not name or any(x in name for x in "/,+"):
                raise ValueError(f"sources: {name!r}: expected another name, without / , and +")
        if self.generate.images_per_class < max(self.sizes):
            raise ValueError(
                f"generate.images_per_class: {self.generate.images_per_class}, but `sizes` asks "
                f"for {max(self.sizes)}"
            )
        if not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError(f"fractions: {self.fractions}, expected above 0 and below 1 each")
        if bool(self.fractions) != bool(self.mixed_size):
            raise ValueError(
                f"mixed_size: {self.mixed_size} and fractions: {self.fractions}, expected both or "
                "neither"
            )
        if self.mixed_size > self.generate.images_per_class:
            raise ValueError(f"mixed_size: {self.mixed_size}, more than are generated")
        if self.added_real < 0 or self.real_weight <= 0:
            raise ValueError(
                f"added_real: {self.added_real}, real_weight: {self.real_weight}, expected 0 or "
                "more and above 0"
            )
        strange = set(self.judge.sizes) - {*self.sizes, *self.real_sizes}
        if strange:
            raise ValueError(f"judge.sizes: {sorted(strange)} are neither sizes nor real_sizes")

    @property
    def most_real(self) -> int:
        """The real images of each class that a seed needs."""
        mixed = [round(self.mixed_size * fraction) for fraction in self.fractions]
        shots = [source.shots for source in self.sources.values()]
        return max(*self.real_sizes, self.added_real, *mixed, *shots)
