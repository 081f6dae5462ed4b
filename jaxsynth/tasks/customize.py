"""Teaching a text-to-image model a subject, a style, to see or to move: trainings of one task.

- Textual Inversion (Gal et al. 2022, arXiv 2208.01618) learns the embedding of a new word from
  sentences about it;
- DreamBooth (Ruiz et al. 2023, arXiv 2208.12242) learns a subject under a rare word, and goes on to
  draw the class that it is of, by images which the model itself drew before (prior preservation);
- fine-tuning on captioned images, each of which has a text of its own;
- IP-Adapter (Ye et al. 2023, arXiv 2308.06721) learns to draw what an image shows;
- InstantID (Wang et al. 2024, arXiv 2401.07519) learns to draw a person, by the embedding and five
  keypoints of a face;
- motion modules, and LoRA on them, learn from clips (`tasks.motion`).

What learns is for the model to say: the new word's rows, an adapter of any kind, or all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import numpy as np

from jaxsynth.core.limits import (
    Count,
    Natural,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Share,
)
from jaxsynth.core.places import Templates
from jaxsynth.data.pipeline.buckets import BucketConfig
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.diffusion.identity import IdentityPrompted
from jaxsynth.models.diffusion.image_prompt import ProjectionConfig, ResamplerConfig
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage, encode_texts
from jaxsynth.tasks.motion import ClipConfig
from jaxsynth.tasks.text_to_image import Denoising, FinetuneConfig, learns_text
from jaxsynth.tasks.told import SHARDED, SHARED, Told, ToldBatches, joined
from jaxsynth.training import sharding
from jaxsynth.training.config import SCHEDULES, TrainingConfig
from jaxsynth.training.task import Buckets
from jaxsynth.training.trainer import Resident, Task
from jaxsynth.weights.hf import StableDiffusion


@dataclass(frozen=True)
class InversionConfig(TrainingConfig):
    """How a new word is learned; the defaults are those of diffusers' script.

    `token` stands for the subject in prompts, in `vectors` embeddings that start as that of
    `initializer` (a word that is one token; "" takes what the subject is). Each image is told by
    one of `templates` at each step: "object", "style", "imagenet7", a text file with one a line, or
    "" for the data's own. `noise_offset` adds noise to whole channels, `snr_gamma` weighs times
    (min-SNR); of images that are not square so many crops are encoded (`crops_per_image`), unless
    they are learned in `buckets` of aspect ratios.
    """

    steps: Natural = 5000
    batch_size: Count = 16
    learning_rate: NotNegative = 1e-4
    weight_decay: NotNegative = 1e-2
    token: str = "<subject>"
    vectors: Count = 1
    initializer: str = ""
    templates: Templates = "object"
    noise_offset: NotNegative = 0.0
    snr_gamma: Positive | None = None
    crops_per_image: Count = 4
    buckets: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self):
        super().__post_init__()
        _check_crops(self.buckets, self.crops_per_image)


@dataclass(frozen=True)
class DreamBoothConfig(FinetuneConfig):
    """How a subject is learned under the rare word `identifier`, as "a photo of a sks dog".

    `adapter` (LoRA unless given; "full" trains the layers themselves) goes on the UNet, and on the
    text encoder where `text_targets` names layers of it. Each batch has as many images of the class
    beside the subject's, whose loss counts `prior_weight` times: of `class_images` that the base
    draws beforehand. At weight 0 none are drawn. `noise_offset` adds noise to whole channels.

    With `vectors` above 0, `identifier` is a new word ("<subject>") of so many embeddings, which
    start as the class's and are learned beside the adapter (pivotal tuning). `buckets` are the
    shapes of several aspect ratios, in which images are learned; the class's are cut to each.
    """

    epochs: Natural = 0
    steps: Natural = 800
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "constant"
    warmup_steps: Natural = 0
    text_targets: tuple[str, ...] = ()
    identifier: str = "sks"
    prior_weight: NotNegative = 1.0
    class_images: Natural = 100
    vectors: Natural = 0
    noise_offset: NotNegative = 0.0
    buckets: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self):
        super().__post_init__()
        _check_crops(self.buckets, self.crops_per_image)
        if self.prior_weight and self.class_images < 1:
            raise ValueError(
                f"class_images: {self.class_images}, expected at least 1 to keep the prior by; "
                "prior_weight=0 trains without it"
            )


@dataclass(frozen=True)
class CaptionConfig(FinetuneConfig):
    """How captioned images are learned, by LoRA unless `adapter` says otherwise.

    A share `caption_dropout` of the captions is emptied, so that guidance away from no text goes on
    to work. The parts of a caption between commas come in `caption_orders` random orders, of which
    one is taken each time; the first part stays first. `noise_offset` adds noise to whole channels.

    With `unmasked_weight` below 1 each image has a mask, and what is outside of it counts so much
    of what is inside. `buckets` are the shapes of several aspect ratios, in which images are
    learned.
    """

    epochs: Natural = 0
    steps: Natural = 2000
    caption_dropout: Share = 0.0
    caption_orders: Count = 1
    unmasked_weight: Annotated[float, Range(0, 1, above=True)] = 1.0
    noise_offset: NotNegative = 0.0
    buckets: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self):
        super().__post_init__()
        _check_crops(self.buckets, self.crops_per_image)


@dataclass(frozen=True)
class ImagePromptConfig(TrainingConfig):
    """How images become prompts; rates and drops are those of IP-Adapter's code.

    `projection` makes tokens of an image: "linear" four of a CLIP's projected feature (IP-Adapter),
    "resampler" so many as it has `queries` of the states of all patches (Plus; 16 unless given, by
    `depth` layers, 4, of `hidden` numbers, 768). Of the examples a share `drop_image` goes without
    the image, `drop_text` without the caption, and `drop_both` without both. `noise_offset`,
    `snr_gamma` and `crops_per_image` are `InversionConfig`'s.
    """

    steps: Natural = 100_000
    batch_size: Count = 64
    learning_rate: NotNegative = 1e-4
    weight_decay: NotNegative = 1e-2
    projection: Annotated[str, OneOf("linear", "resampler")] = "linear"
    queries: Count | None = None
    depth: Count | None = None
    hidden: Count | None = None
    drop_image: Share = 0.05
    drop_text: Share = 0.05
    drop_both: Share = 0.05
    noise_offset: NotNegative = 0.0
    snr_gamma: Positive | None = None
    crops_per_image: Count = 4

    def __post_init__(self):
        super().__post_init__()
        _check_drops(self.drops)
        for name in ("queries", "depth", "hidden"):
            if not self.of_patches and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is of projection=resampler, not linear"
                )
        if self.of_patches:
            self.projection_config(1, 1)

    @property
    def of_patches(self) -> bool:
        """Whether tokens are made of the states of patches."""
        return self.projection == "resampler"

    @property
    def drops(self) -> tuple[float, float, float]:
        """Shares without the image, the text, and both."""
        return self.drop_image, self.drop_text, self.drop_both

    def projection_config(self, features: int, width: int) -> ProjectionConfig | ResamplerConfig:
        """Of what makes tokens of `width` of an encoder's `features` numbers."""
        if not self.of_patches:
            return ProjectionConfig(features, width)
        names = {"tokens": self.queries, "depth": self.depth, "hidden": self.hidden}
        given = {name: value for name, value in names.items() if value is not None}
        return ResamplerConfig(features, width, **given)


@dataclass(frozen=True)
class InstantIDConfig(TrainingConfig):
    """How faces become prompts; the resampler is InstantID's, rates and drops are IP-Adapter's.

    InstantID's code for training was never published. A resampler of `depth` layers of `hidden`
    numbers makes `queries` tokens of an embedding. Of the examples a share `drop_image` goes with
    an embedding of zeros, `drop_text` without the caption, and `drop_both` with neither; keypoints
    are always there. `rates` gives IdentityNet (".*identity_net.*") a rate of its own.
    `noise_offset` and `snr_gamma` are `InversionConfig`'s; images must be square.
    """

    steps: Natural = 100_000
    batch_size: Count = 16
    learning_rate: NotNegative = 1e-4
    weight_decay: NotNegative = 1e-2
    queries: Count = 16
    depth: Count = 4
    hidden: Count = 1280
    drop_image: Share = 0.05
    drop_text: Share = 0.05
    drop_both: Share = 0.05
    noise_offset: NotNegative = 0.0
    snr_gamma: Positive | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_drops(self.drops)
        self.projection_config(1, 1)

    @property
    def crops_per_image(self) -> int:
        """A square image has one."""
        return 1

    @property
    def drops(self) -> tuple[float, float, float]:
        """Shares without the face, the text, and both."""
        return self.drop_image, self.drop_text, self.drop_both

    def projection_config(self, features: int, width: int) -> ResamplerConfig:
        """Of what makes tokens of `width` of embeddings of `features` numbers."""
        return ResamplerConfig(features, width, self.queries, self.hidden, self.depth)


def _check_crops(buckets: BucketConfig, crops: int) -> None:
    if buckets.enabled and crops != FinetuneConfig.crops_per_image:
        raise ValueError(
            f"crops_per_image: {crops}, but an image in a bucket is cut once, at its centre; leave "
            "it out, or buckets.enabled"
        )


def _check_drops(drops: tuple[float, float, float]) -> None:
    if sum(drops) > 1:
        raise ValueError(f"drop_image, drop_text, drop_both: {drops}, expected at most 1 in all")


Training = (
    InversionConfig
    | DreamBoothConfig
    | CaptionConfig
    | ImagePromptConfig
    | InstantIDConfig
    | ClipConfig
)


def customize_task(
    pipeline: StableDiffusion,
    model: TextToImage,
    images: Told | Sequence[Told],
    config: Training,
    *,
    seed: int,
    others: Told | Sequence[Told] | None = None,
    identity: Mapping[str, Any] | None = None,
    evaluate: Callable[[TextToImage, int], Mapping[str, Any]] | None = None,
    sample: Callable[[TextToImage], np.ndarray] | None = None,
) -> Task:
    """The training of what is `Trainable` in `model` on images and their texts; all may be shapes.

    Images of several shapes are a `Told` for each, of which a batch has one. `others` are images of
    the subject's class, for a `DreamBoothConfig` that keeps the prior, in the shapes of `images`;
    `evaluate` and `sample` are the task's.
    """
    order_key, key = jax.random.split(jax.random.key(seed))
    sets = [images] if isinstance(images, Told) else list(images)
    priors = [others] if isinstance(others, Told) else list(others or [None] * len(sets))
    parts = [
        dict(vars(one)) if prior is None else joined(one, prior)
        for one, prior in zip(sets, priors, strict=True)
    ]
    parts = [{name: x for name, x in part.items() if x is not None} for part in parts]
    data: dict[str, Any] = {name: parts[0][name] for name in SHARED if name in parts[0]}
    parts = [{name: x for name, x in part.items() if name not in SHARED} for part in parts]
    data["order"] = order_key
    if not learns_text(model):
        data["texts"] = _conditions(model, data.pop("ids"))
    batches = ToldBatches(
        config.batch_size,
        getattr(config, "caption_dropout", 0.0),
        0 if priors[0] is None else len(priors[0]),
        getattr(config, "prior_weight", 0.0),
        getattr(config, "drops", (0.0, 0.0, 0.0)),
        pipeline.zeroes_empty,
    )
    sharded = tuple(name for name in SHARDED if name in parts[0])
    if len(parts) == 1:
        resident = Resident(data | parts[0], batches, sharded)
    else:
        buckets = Buckets(tuple(parts), tuple(map(len, sets)), seed)
        resident = Resident(data, batches, sharded, buckets)
    return Task(
        model=model,
        loss=Denoising(config.snr_gamma, config.remat, config.noise_offset),
        batches=resident,
        table=(*sharding.CONTROLNET, *sharding.CLIP),
        key=key,
        constants=NoiseSchedule.from_config(pipeline.scheduler_config),
        identity={"seed": seed, **(identity or {})},
        # IdentityNet is as large as the denoiser's encoder.
        learns="table" if isinstance(model, IdentityPrompted) else "replicate",
        evaluate=evaluate,
        sample=sample,
    )


def _conditions(model: TextToImage, ids: Any) -> TextCondition:
    """What the denoiser is told by all texts."""
    if isinstance(ids, jax.ShapeDtypeStruct):
        return jax.eval_shape(encode_texts, model, ids)
    return encode_texts(model, ids)
