"""What a DataDream run is told."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.core.limits import BelowOne, Count, Natural, OneOf, Seed, Some, check_limits
from jaxsynth.data.dataset import DataConfig
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.tasks.clip_classifier import ClassifyConfig
from jaxsynth.tasks.text_to_image import FinetuneConfig
from jaxsynth.training.sharding import MeshConfig

MODES = ("dset", "cls")


@dataclass(frozen=True)
class Config:
    """One run: every number of shots with every seed and mode.

    `shots` are the images of each class that are learned from; `seeds` those of every draw.
    `base` and `clip` are folders, hub ids, or the shipped "tiny" and "tiny/clip". `dtype` is the
    storage and compute type of the frozen networks; adapters stay float32. `image_size` is the side
    in pixels of the images that the generator learns and draws (0: the base's own). `modes`: "dset"
    is one adapter for the whole data set, "cls" one for each class. `classes_at_once` bounds how
    many class adapters train together (0: all). `validation_fraction` of the shots is kept from
    training and chooses the classifier's step; at 0 the last step is taken. `adapter`, where it is
    given, is what the generator learns by (`finetune.adapter`); the classifier's is
    `classify.adapter`.
    """

    method: str = "datadream"
    base: str = "tiny"
    clip: str = "tiny/clip"
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    image_size: Natural = 0
    data: DataConfig = field(default_factory=DataConfig)
    shots: Annotated[tuple[Count, ...], Some()] = (16,)
    modes: Annotated[tuple[Annotated[str, OneOf(*MODES)], ...], Some()] = ("dset",)
    seeds: Annotated[tuple[Seed, ...], Some()] = (0,)
    validation_fraction: BelowOne = 0.0
    classes_at_once: Natural = 0
    adapter: AdapterChoice | None = None
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_limits(self)
        if self.adapter is not None and self.finetune.adapter not in (None, self.adapter):
            raise ValueError(
                "adapter and finetune.adapter are both given, and are one setting; give one"
            )

    @property
    def finetuning(self) -> FinetuneConfig:
        """How the generator is fine-tuned: `finetune` with the run's `adapter`."""
        if self.adapter is None:
            return self.finetune
        return dataclasses.replace(self.finetune, adapter=self.adapter)
