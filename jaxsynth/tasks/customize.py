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
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

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
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.diffusion.identity import IdentityPrompted
from jaxsynth.models.diffusion.image_prompt import ProjectionConfig, ResamplerConfig
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage, encode_texts
from jaxsynth.tasks.motion import ClipConfig, encode_clips
from jaxsynth.tasks.text_to_image import Denoising, FinetuneConfig, encode_source, learns_text
from jaxsynth.training import sharding
from jaxsynth.training.config import SCHEDULES, TrainingConfig
from jaxsynth.training.trainer import Resident, Task
from jaxsynth.weights.hf import StableDiffusion


@dataclass(frozen=True)
class InversionConfig(TrainingConfig):
    """How a new word is learned; the defaults are those of diffusers' script.

    `token` stands for the subject in prompts, in `vectors` embeddings that start as that of
    `initializer` (a word that is one token; "" takes what the subject is). Each image is told by
    one of `templates` at each step: "object", "style", "imagenet7", a text file with one a line, or
    "" for the data's own. `noise_offset` adds noise to whole channels, `snr_gamma` weighs times
    (min-SNR); of images that are not square so many crops are encoded (`crops_per_image`).
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


@dataclass(frozen=True)
class DreamBoothConfig(FinetuneConfig):
    """How a subject is learned under the rare word `identifier`, as "a photo of a sks dog".

    `adapter` (LoRA unless given; "full" trains the layers themselves) goes on the UNet, and on the
    text encoder where `text_targets` names layers of it. Each batch has as many images of the class
    beside the subject's, whose loss counts `prior_weight` times: of `class_images` that the base
    draws beforehand. At weight 0 none are drawn. `noise_offset` adds noise to whole channels.

    With `vectors` above 0, `identifier` is a new word ("<subject>") of so many embeddings, which
    start as the class's and are learned beside the adapter (pivotal tuning).
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

    def __post_init__(self):
        super().__post_init__()
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
    of what is inside.
    """

    epochs: Natural = 0
    steps: Natural = 2000
    caption_dropout: Share = 0.0
    caption_orders: Count = 1
    unmasked_weight: Annotated[float, Range(0, 1, above=True)] = 1.0
    noise_offset: NotNegative = 0.0


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


def _check_drops(drops: tuple[float, float, float]) -> None:
    if sum(drops) > 1:
        raise ValueError(f"drop_image, drop_text, drop_both: {drops}, expected at most 1 in all")


# Streams of an order's key beside those of its epochs, which it is folded with the numbers of: a
# permutation splits its key, and the parts of a split are what folding with small numbers gives.
_TEXTS, _OTHERS = 2**31 - 1, 2**31 - 2

# Of `Told`: with crops on the second axis, with images on the first, and what sets are joined by.
CROPPED = ("mean", "std", "sizes")
_SHARDED = (*CROPPED, "first", "choices", "images", "places", "condition")
_JOINED = (*CROPPED, "ids", "first", "choices")

Training = (
    InversionConfig
    | DreamBoothConfig
    | CaptionConfig
    | ImagePromptConfig
    | InstantIDConfig
    | ClipConfig
)


@dataclass(frozen=True)
class Told:
    """Encoded images, and the texts that each may be told by.

    `mean`, `std` and `sizes` are those of `text_to_image.Examples`, one for each crop, or of clips
    one for each window of f frames. `ids` are
    the distinct texts, the empty one first; image i has the `choices[i]` texts from `first[i]` on.
    Where images prompt, `images` are an encoder's features of each and `absent` those of no image.
    `places` say how much each position of the latents counts. `condition` are pictures that a
    ControlNet follows, uint8.
    """

    mean: Float[np.ndarray, "n k *f h w c"]
    std: Float[np.ndarray, "n k *f h w c"]
    sizes: Float[np.ndarray, "n k 6"]
    ids: Int[np.ndarray, "m *e t"]
    first: Int[np.ndarray, " n"]
    choices: Int[np.ndarray, " n"]
    images: Float[np.ndarray, "n ..."] | None = None
    absent: Float[np.ndarray, "..."] | None = None
    places: Float[np.ndarray, "n h w 1"] | None = None
    condition: UInt8[np.ndarray, "n h2 w2 3"] | None = None

    def __len__(self) -> int:
        return self.first.shape[0]  # also of shapes


def encode_told(
    pipeline: StableDiffusion,
    source: ImageSource,
    texts: Sequence[Sequence[str]],
    *,
    crops: int,
    seed: int,
    encoder: Callable[[Sequence[Any]], np.ndarray] | None = None,
    clips: ClipConfig | None = None,
) -> Told:
    """The images of a source as latents, each with its texts (`texts[i]`, at least one).

    `encoder` gives the features of no image and of each. With `clips` the source's clips are
    encoded as that says, in its own number of windows in place of `crops`.
    """
    if clips is None:
        found = encode_source(pipeline, source, crops=crops, seed=seed)
    else:
        found = encode_clips(pipeline, source, clips, seed=seed)
    distinct = {("",): 0}
    rows = [""]
    for own in map(tuple, texts):
        if own not in distinct:
            distinct[own] = len(rows)
            rows += own
    first = np.array([distinct[tuple(own)] for own in texts], np.int32)
    choices = np.array([len(own) for own in texts], np.int32)
    told = Told(*found, pipeline.tokenizer(rows), first, choices)
    if encoder is None:
        return told
    features = encoder([source[i].image for i in range(len(source))])
    return replace(told, images=features[1:], absent=features[0])


@dataclass(frozen=True)
class ToldBatches:
    """Batches of `count` images in the order of `epoch_rows`, each told by one of its texts.

    A share `dropout` of the texts is emptied: the empty text stands for them or, with `zeroes`,
    zeros for its condition, as in the pipeline's generation. Of images that prompt, `drops` are the
    shares without the image, the text, and both. With `others`, whose rows follow those of the
    images, as many of them follow in the batch, and the mean of the examples' losses times their
    weights is that of the images plus `prior_weight` times that of the others.
    """

    count: int
    batch_size: int
    dropout: float = 0.0
    others: int = 0
    prior_weight: float = 0.0
    drops: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zeroes: bool = False

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        rows = epoch_rows(data["order"], step, self.count, self.batch_size)
        own = jax.random.fold_in(jax.random.fold_in(data["order"], _TEXTS), step)
        keys = [jax.random.fold_in(own, i) for i in (0, 1)]
        batch = {}
        if self.others:
            order = jax.random.fold_in(data["order"], _OTHERS)
            more = self.count + epoch_rows(order, step, self.others, self.batch_size)
            rows = jnp.concatenate([rows, more])
            # Twice each, because the mean is over both halves.
            weights = jnp.asarray([2.0, 2.0 * self.prior_weight])
            batch["weight"] = jnp.repeat(weights, self.batch_size)
        chosen = jax.random.uniform(keys[0], rows.shape) * data["choices"][rows]
        text = data["first"][rows] + chosen.astype(jnp.int32)
        empty = jnp.zeros(rows.shape, bool)
        if self.dropout:
            empty = jax.random.bernoulli(keys[1], self.dropout, rows.shape)
        if "images" in data:
            seen = data["images"][rows]
            drawn = jax.random.uniform(jax.random.fold_in(own, 2), rows.shape)
            image, both, text_alone = np.cumsum(np.take(self.drops, (0, 2, 1)))
            empty = empty | ((drawn >= image) & (drawn < text_alone))
            without = (drawn < both).reshape(-1, *[1] * (seen.ndim - 1))
            batch["image"] = jnp.where(without, data["absent"], seen)
        if self.dropout or "images" in data:
            text = jnp.where(empty, 0, text)
            if self.zeroes:
                batch["given"] = ~empty
        names = (*CROPPED, "places", "condition")
        batch |= {name: data[name][rows] for name in names if name in data}
        if "texts" in data:
            return batch | {"text": data["texts"].take(text)}
        return batch | {"ids": data["ids"][text]}


def customize_task(
    pipeline: StableDiffusion,
    model: TextToImage,
    images: Told,
    config: Training,
    *,
    seed: int,
    others: Told | None = None,
    identity: Mapping[str, Any] | None = None,
    evaluate: Callable[[TextToImage, int], Mapping[str, Any]] | None = None,
    sample: Callable[[TextToImage], np.ndarray] | None = None,
) -> Task:
    """The training of what is `Trainable` in `model` on images and their texts; all may be shapes.

    `others` are images of the subject's class, for a `DreamBoothConfig` that keeps the prior;
    `evaluate` and `sample` are the task's.
    """
    order_key, key = jax.random.split(jax.random.key(seed))
    data: dict[str, Any] = dict(vars(images) if others is None else _joined(images, others))
    data = {name: values for name, values in data.items() if values is not None}
    data["order"] = order_key
    if not learns_text(model):
        data["texts"] = _conditions(model, data.pop("ids"))
    batches = ToldBatches(
        len(images),
        config.batch_size,
        getattr(config, "caption_dropout", 0.0),
        0 if others is None else len(others),
        getattr(config, "prior_weight", 0.0),
        getattr(config, "drops", (0.0, 0.0, 0.0)),
        pipeline.zeroes_empty,
    )
    return Task(
        model=model,
        loss=Denoising(config.snr_gamma, config.remat, config.noise_offset),
        batches=Resident(data, batches, sharded=tuple(x for x in _SHARDED if x in data)),
        table=(*sharding.CONTROLNET, *sharding.CLIP),
        key=key,
        constants=NoiseSchedule.from_config(pipeline.scheduler_config),
        identity={"seed": seed, **(identity or {})},
        # IdentityNet is as large as the denoiser's encoder.
        learns="table" if isinstance(model, IdentityPrompted) else "replicate",
        evaluate=evaluate,
        sample=sample,
    )


def places_of(
    masks: Float[np.ndarray, "n size size 1"], downscale: int, unmasked: float
) -> Float[np.ndarray, "n h w 1"]:
    """How much each position of the latents counts: in the masks 1, outside of them `unmasked`."""
    count, size = masks.shape[:2]
    side = size // downscale
    means = masks.reshape(count, side, downscale, side, downscale, 1).mean((2, 4))
    return unmasked + (1 - unmasked) * means


def planned_images(
    pipeline: StableDiffusion,
    count: int,
    texts: int,
    *,
    size: int = 0,
    features: tuple[int, ...] | None = None,
    masked: bool = False,
    followed: bool = False,
    clips: ClipConfig | None = None,
) -> Told:
    """The shapes of so many square images with so many texts in all, and `features` of each.

    `masked` images have `places`, and `followed` ones a `condition`. With `clips` they are clips,
    in the windows that that says.
    """

    def shape(*dims: int, dtype: Any = np.float32) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    channels, downscale = pipeline.unet.config.in_channels, pipeline.vae.config.downscale
    side = (size or pipeline.image_size) // downscale
    windows = (1,) if clips is None else (clips.windows_per_clip, clips.frames)
    latents, rows = shape(count, *windows, side, side, channels), shape(count, dtype=np.int32)
    told = Told(
        latents, latents, shape(count, windows[0], 6),
        shape(texts + 1, *pipeline.tokenizer.shape, dtype=np.int32), rows, rows,
    )  # fmt: skip
    if masked:
        return replace(told, places=shape(count, side, side, 1))
    if followed:
        pixels = side * downscale
        told = replace(told, condition=shape(count, pixels, pixels, 3, dtype=np.uint8))
    if features is None:
        return told
    return replace(told, images=shape(count, *features), absent=shape(*features))


def _joined(images: Told, others: Told) -> dict[str, Any]:
    """The arrays of both, whose images may have another number of crops."""
    if isinstance(images.first, jax.ShapeDtypeStruct):
        pairs = {name: (getattr(images, name), getattr(others, name)) for name in _JOINED}
        return {
            name: jax.ShapeDtypeStruct((x.shape[0] + y.shape[0], *x.shape[1:]), x.dtype)
            for name, (x, y) in pairs.items()
        }
    crops = max(images.mean.shape[1], others.mean.shape[1])

    def cropped(values: np.ndarray) -> np.ndarray:
        return np.take(values, np.arange(crops) % values.shape[1], axis=1)

    # Texts of the others come after those of the images, and their own empty text is left over.
    shifted = replace(others, first=others.first + len(images.ids))
    pairs = {name: (getattr(images, name), getattr(shifted, name)) for name in _JOINED}
    return {
        name: np.concatenate([cropped(x) for x in pair] if name in CROPPED else pair)
        for name, pair in pairs.items()
    }


def _conditions(model: TextToImage, ids: Any) -> TextCondition:
    """What the denoiser is told by all texts."""
    if isinstance(ids, jax.ShapeDtypeStruct):
        return jax.eval_shape(encode_texts, model, ids)
    return encode_texts(model, ids)
