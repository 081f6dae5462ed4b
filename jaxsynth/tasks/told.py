"""Encoded images with the texts that each may be told by, and the batches that are drawn of them.

Images may be of several shapes (`data.pipeline.buckets`): those of each are a `Told` of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.buckets import Bucket
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.data.views import Subset
from jaxsynth.tasks.motion import ClipConfig, encode_clips
from jaxsynth.tasks.text_to_image import encode_source
from jaxsynth.weights.hf import StableDiffusion

# Streams of an order's key beside those of its epochs, which it is folded with the numbers of: a
# permutation splits its key, and the parts of a split are what folding with small numbers gives.
_TEXTS, _OTHERS = 2**31 - 1, 2**31 - 2

# Of `Told`: with crops on the second axis; the large ones with images on the first; those that all
# shapes of images share; and what sets are joined by.
CROPPED = ("mean", "std", "sizes")
SHARDED = (*CROPPED, "images", "places", "condition")
SHARED = ("ids", "absent")
_JOINED = (*CROPPED, "ids", "first", "choices")


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
    told = Told(*found, *_told_by(pipeline, texts))
    if encoder is None:
        return told
    features = encoder([source[i].image for i in range(len(source))])
    return replace(told, images=features[1:], absent=features[0])


def encode_buckets(
    pipeline: StableDiffusion,
    source: ImageSource,
    texts: Sequence[Sequence[str]],
    buckets: Sequence[Bucket],
) -> list[Told]:
    """The images of each bucket in its shape, with texts as in `encode_told`; they share `ids`."""
    ids, first, choices = _told_by(pipeline, texts)
    return [
        Told(
            *encode_source(
                pipeline, Subset(source, one.rows), crops=1, seed=0, shape=one.shape
            ),
            ids, first[one.rows], choices[one.rows],
        )
        for one in buckets
    ]  # fmt: skip


def _told_by(
    pipeline: StableDiffusion, texts: Sequence[Sequence[str]]
) -> tuple[Int[np.ndarray, "m *e t"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """`ids`, `first` and `choices` of `Told`."""
    distinct = {("",): 0}
    rows = [""]
    for own in map(tuple, texts):
        if own not in distinct:
            distinct[own] = len(rows)
            rows += own
    first = np.array([distinct[tuple(own)] for own in texts], np.int32)
    choices = np.array([len(own) for own in texts], np.int32)
    return pipeline.tokenizer(rows), first, choices


@dataclass(frozen=True)
class ToldBatches:
    """Batches of images in the order of `epoch_rows`, each told by one of its texts.

    How many images there are is the length of "first", which lies on every device whole. Where
    images are of several shapes, step + "shift" counts the batches of the shape at hand.

    A share `dropout` of the texts is emptied: the empty text stands for them or, with `zeroes`,
    zeros for its condition, as in the pipeline's generation. Of images that prompt, `drops` are the
    shares without the image, the text, and both. With `others`, whose rows follow those of the
    images, as many of them follow in the batch, and the mean of the examples' losses times their
    weights is that of the images plus `prior_weight` times that of the others.
    """

    batch_size: int
    dropout: float = 0.0
    others: int = 0
    prior_weight: float = 0.0
    drops: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zeroes: bool = False

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        count = data["first"].shape[0] - self.others
        turn = step + data.get("shift", 0)
        rows = epoch_rows(data["order"], turn, count, self.batch_size)
        own = jax.random.fold_in(jax.random.fold_in(data["order"], _TEXTS), step)
        keys = [jax.random.fold_in(own, i) for i in (0, 1)]
        batch = {}
        if self.others:
            order = jax.random.fold_in(data["order"], _OTHERS)
            more = count + epoch_rows(order, turn, self.others, self.batch_size)
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


def places_of(
    masks: Float[np.ndarray, "n height width 1"], downscale: int, unmasked: float
) -> Float[np.ndarray, "n h w 1"]:
    """How much each position of the latents counts: in the masks 1, outside of them `unmasked`."""
    count, height, width = masks.shape[:3]
    h, w = height // downscale, width // downscale
    means = masks.reshape(count, h, downscale, w, downscale, 1).mean((2, 4))
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


def joined(images: Told, others: Told) -> dict[str, Any]:
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
