"""What a robustness run is told: models, sets, attacks and corruptions."""

from dataclasses import dataclass, field
from typing import Annotated

from jaxsynth.core.limits import Count, OneOf, Seed, Share, check_limits
from jaxsynth.core.places import (
    Clip,
    MaybeFile,
    MaybeNetwork,
    Place,
    Templates,
)
from jaxsynth.methods.robustness.sets import SetsConfig
from jaxsynth.robustness import bias_sets
from jaxsynth.robustness.corruptions.predictions import Corruptions
from jaxsynth.tasks.clip_classifier import ClassifyConfig
from jaxsynth.training.sharding import MeshConfig

VARIANTS = ("", *bias_sets.VARIANTS)


@dataclass(frozen=True)
class ModelConfig:
    """A classifier: a checkpoint with a head of its own, or a CLIP by the prompts of the classes.

    checkpoint: a folder, hub id or file that `load_classifier` takes (ViT, DeiT, ResNet, ConvNeXt,
    Swin, DINOv2, MAE, SigLIP). head: a file with its linear head, where it has none.
    preprocessing: where it tells none, "imagenet" or a preprocessor_config.json.
    clip: a folder, hub id or "tiny/clip". templates: "" for the run's template, "imagenet7", or a
    file with one a line, over which a class's text is averaged. adapter: a peft folder around it.
    train_on: "", or the drawn set that adapters are trained on here, "original" or "mixed_rand"
    backgrounds. At most one of the two.
    """

    checkpoint: MaybeNetwork = ""
    head: MaybeFile = ""
    preprocessing: Annotated[str, Place(file=True, folder=True, words=("", "imagenet"))] = ""
    clip: Clip = "tiny/clip"
    templates: Templates = ""
    adapter: Annotated[str, Place(folder=True, has=("adapter_config.json",), words=("",))] = ""
    train_on: str = ""

    def __post_init__(self):
        if self.train_on not in VARIANTS:
            raise ValueError(f"train_on: expected one of {VARIANTS}, found {self.train_on!r}")
        if self.adapter and self.train_on:
            raise ValueError("adapter and train_on: expected one of them at most")
        if self.checkpoint:
            for name in ("templates", "adapter", "train_on"):
                if getattr(self, name):
                    raise ValueError(f"{name}: of a CLIP, but this model is a checkpoint")
        elif self.head or self.preprocessing:
            raise ValueError("head and preprocessing: of a checkpoint, but there is none")


@dataclass(frozen=True)
class Config:
    """One run: every model on every set.

    sets: what models are asked about, by default drawn pictures: image_size of them, per_class
    pictures a class of each set (the other sets have as many of each of their kinds).
    train_per_class: pictures a class that a model is trained on here. eps: the attacks' radius in
    the largest change of a pixel. autoattack: AutoAttack too, which takes far longer. corruptions:
    those made of the clean images. baseline: what mCE divides by, "alexnet" or one of the models,
    which the others are then compared with; "" for no mCE. resamples: of the bootstrap. template: a
    prompt with one {} for the class.
    """

    method: str = "robustness"
    models: dict[str, ModelConfig] = field(default_factory=dict)
    mode: Annotated[str, OneOf("corrected", "paper")] = "corrected"
    sets: SetsConfig = field(default_factory=SetsConfig)
    corruptions: Corruptions = field(default_factory=Corruptions)
    baseline: str = ""
    template: str = "a photo of a {}"
    image_size: Count = 32
    per_class: Count = 24
    train_per_class: Count = 64
    eps: Share = 1 / 255
    autoattack: bool = False
    batch_size: Count = field(default=64, metadata={"identity": False})
    resamples: Count = 2000
    seed: Seed = 0
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_limits(self)
        if not self.models:
            raise ValueError("models: expected at least one")
        if self.baseline not in ("", "alexnet", *self.models):
            raise ValueError(
                f"baseline: expected alexnet or one of {list(self.models)}, found {self.baseline!r}"
            )
        for name in self.classify.beyond_adapters:
            raise ValueError(
                f"classify.{name}: set, but a model is trained here on real images alone and kept "
                "as an adapter; leave it at its default"
            )
        for name, model in self.models.items():
            if not name or "/" in name or name == "figures":
                raise ValueError(f"models: {name!r}: expected a plain name")
            if model.train_on and not self.sets.drawn:
                raise ValueError(
                    f"models.{name}.train_on: trains on drawn shapes, but sets.clean is "
                    f"{self.sets.clean.source}"
                )
