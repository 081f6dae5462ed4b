"""Teaching a text-to-image model a subject or a style: three trainings of one task.

- Textual Inversion (Gal et al. 2022, arXiv 2208.01618) learns the embedding of a new word from
  sentences about it;
- DreamBooth (Ruiz et al. 2023, arXiv 2208.12242) learns a subject under a rare word, and goes on to
  draw the class that it is of, by images which the model itself drew before (prior preservation);
- fine-tuning on captioned images, each of which has a text of its own.

What learns is for the model to say: the new word's rows, an adapter of any kind, or all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.core.limits import Count, Natural, NotNegative, OneOf, Positive, Share
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage, encode_texts
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
    templates: str = "object"
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
    """

    epochs: Natural = 0
    steps: Natural = 800
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "constant"
    warmup_steps: Natural = 0
    text_targets: tuple[str, ...] = ()
    identifier: str = "sks"
    prior_weight: NotNegative = 1.0
    class_images: Natural = 100
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
    to work. `noise_offset` adds noise to whole channels.
    """

    epochs: Natural = 0
    steps: Natural = 2000
    caption_dropout: Share = 0.0
    noise_offset: NotNegative = 0.0


# Streams of an order's key beside those of its epochs, which it is folded with the numbers of: a
# permutation splits its key, and the parts of a split are what folding with small numbers gives.
_TEXTS, _OTHERS = 2**31 - 1, 2**31 - 2

# Of `Told`: with crops on the second axis.
CROPPED = ("mean", "std", "sizes")

Training = InversionConfig | DreamBoothConfig | CaptionConfig


@dataclass(frozen=True)
class Told:
    """Encoded images, and the texts that each may be told by.

    `mean`, `std` and `sizes` are those of `text_to_image.Examples`, one for each crop. `ids` are
    the distinct texts, the empty one first; image i has the `choices[i]` texts from `first[i]` on.
    """

    mean: Float[np.ndarray, "n k h w c"]
    std: Float[np.ndarray, "n k h w c"]
    sizes: Float[np.ndarray, "n k 6"]
    ids: Int[np.ndarray, "m *e t"]
    first: Int[np.ndarray, " n"]
    choices: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return self.first.shape[0]  # also of shapes


def encode_told(
    pipeline: StableDiffusion,
    source: ImageSource,
    texts: Sequence[Sequence[str]],
    *,
    crops: int,
    seed: int,
) -> Told:
    """The images of a source as latents, each with its texts (`texts[i]`, at least one)."""
    found = encode_source(pipeline, source, crops=crops, seed=seed)
    distinct = {("",): 0}
    rows = [""]
    for own in map(tuple, texts):
        if own not in distinct:
            distinct[own] = len(rows)
            rows += own
    first = np.array([distinct[tuple(own)] for own in texts], np.int32)
    choices = np.array([len(own) for own in texts], np.int32)
    return Told(*found, pipeline.tokenizer(rows), first, choices)


@dataclass(frozen=True)
class ToldBatches:
    """Batches of `count` images in the order of `epoch_rows`, each told by one of its texts.

    A share `dropout` of the texts is emptied: the empty text stands for them or, with `zeroes`,
    zeros for its condition, as in the pipeline's generation. With `others`, whose rows follow those
    of the images, as many of them follow in the batch, and the mean of the examples' losses times
    their weights is that of the images plus `prior_weight` times that of the others.
    """

    count: int
    batch_size: int
    dropout: float = 0.0
    others: int = 0
    prior_weight: float = 0.0
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
        if self.dropout:
            empty = jax.random.bernoulli(keys[1], self.dropout, rows.shape)
            text = jnp.where(empty, 0, text)
            if self.zeroes:
                batch["given"] = ~empty
        batch |= {name: data[name][rows] for name in ("mean", "std", "sizes")}
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
    data["order"] = order_key
    if not learns_text(model):
        data["texts"] = _conditions(model, data.pop("ids"))
    batches = ToldBatches(
        len(images),
        config.batch_size,
        getattr(config, "caption_dropout", 0.0),
        0 if others is None else len(others),
        getattr(config, "prior_weight", 0.0),
        pipeline.zeroes_empty,
    )
    return Task(
        model=model,
        loss=Denoising(config.snr_gamma, config.remat, config.noise_offset),
        batches=Resident(data, batches, sharded=("mean", "std", "sizes", "first", "choices")),
        table=(*sharding.UNET, *sharding.CLIP),
        key=key,
        constants=NoiseSchedule.from_config(pipeline.scheduler_config),
        identity={"seed": seed, **(identity or {})},
        evaluate=evaluate,
        sample=sample,
    )


def planned_images(pipeline: StableDiffusion, count: int, texts: int, *, size: int = 0) -> Told:
    """The shapes of so many square images with so many texts in all."""
    channels, downscale = pipeline.unet.config.in_channels, pipeline.vae.config.downscale
    side = (size or pipeline.image_size) // downscale
    latents: Any = jax.ShapeDtypeStruct((count, 1, side, side, channels), np.float32)
    sizes: Any = jax.ShapeDtypeStruct((count, 1, 6), np.float32)
    rows: Any = jax.ShapeDtypeStruct((count,), np.int32)
    ids: Any = jax.ShapeDtypeStruct((texts + 1, *pipeline.tokenizer.shape), np.int32)
    return Told(latents, latents, sizes, ids, rows, rows)


def _joined(images: Told, others: Told) -> dict[str, Any]:
    """The arrays of both, whose images may have another number of crops."""
    if isinstance(images.first, jax.ShapeDtypeStruct):
        pairs = {name: (getattr(images, name), getattr(others, name)) for name in vars(images)}
        return {
            name: jax.ShapeDtypeStruct((x.shape[0] + y.shape[0], *x.shape[1:]), x.dtype)
            for name, (x, y) in pairs.items()
        }
    crops = max(images.mean.shape[1], others.mean.shape[1])

    def cropped(values: np.ndarray) -> np.ndarray:
        return np.take(values, np.arange(crops) % values.shape[1], axis=1)

    # Texts of the others come after those of the images, and their own empty text is left over.
    shifted = replace(others, first=others.first + len(images.ids))
    pairs = {name: (getattr(images, name), getattr(shifted, name)) for name in vars(images)}
    return {
        name: np.concatenate([cropped(x) for x in pair] if name in CROPPED else pair)
        for name, pair in pairs.items()
    }


def _conditions(model: TextToImage, ids: Any) -> TextCondition:
    """What the denoiser is told by all texts."""
    if isinstance(ids, jax.ShapeDtypeStruct):
        return jax.eval_shape(encode_texts, model, ids)
    return encode_texts(model, ids)
