"""A model's answers to corrupted images.

Clean images are corrupted on the device (`corruptions`), a batch at a time under every corruption
and severity; or read, where a set comes corrupted (ImageNet-C, CIFAR-10-C). Only whether each was
classified rightly is kept, as (severities, images) a corruption, so that figures are paired with
the clean images in every resample. A corruption's key is folded with its name's place among all of
them and the image's, and its severities share their random numbers: neither the choice of
corruptions nor the batch changes a picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxsynth.core.limits import Range, Some
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import ImageSource
from jaxsynth.robustness.attacks.evaluate import batches
from jaxsynth.robustness.checks import check_whole
from jaxsynth.robustness.corruptions.codec import CODEC_CORRUPTIONS, corrupt_by_codec
from jaxsynth.robustness.corruptions.common_3d import depth_from_inverse
from jaxsynth.robustness.corruptions.registry import (
    CORRUPTIONS,
    CORRUPTIONS_3D,
    EXTRA_CORRUPTIONS,
    SEVERITIES,
    TEST_CORRUPTIONS,
    all_released,
    corrupt,
    corrupt_3d,
)
from jaxsynth.robustness.metrics.corruption import PAPER_CORRUPTIONS, PAPER_CORRUPTIONS_3D
from jaxsynth.robustness.predictors import Answers, Asker, ask, labels_of

GROUPS = {
    "paper": (*PAPER_CORRUPTIONS, *PAPER_CORRUPTIONS_3D),
    "imagenet_c": tuple(TEST_CORRUPTIONS),
    "extra": tuple(EXTRA_CORRUPTIONS),
    "3dcc": tuple(CORRUPTIONS_3D),
    "codecs": CODEC_CORRUPTIONS,
}
# Without those that need a video codec.
_ALL = (*CORRUPTIONS, *CORRUPTIONS_3D)
_NAMES = (*_ALL, *CODEC_CORRUPTIONS)
DEEP = (*CORRUPTIONS_3D, *CODEC_CORRUPTIONS)


Severity = Annotated[int, Range(SEVERITIES[0], SEVERITIES[-1])]


@dataclass(frozen=True)
class Corruptions:
    """Corruptions to make of the clean images: names or `GROUPS`, or "all" but the "codecs", which
    need PyAV.

    released: 8 bits and JPEG of quality 85, as the released ImageNet-C is.
    """

    names: tuple[str, ...] = ()
    severities: Annotated[tuple[Severity, ...], Some()] = SEVERITIES
    released: bool = False

    def __post_init__(self):
        for name in self.names:
            if name not in (*_NAMES, *GROUPS, "all"):
                raise ValueError(
                    f"names: {name!r}: expected all, {', '.join(GROUPS)}, or some of "
                    f"{', '.join(_NAMES)}"
                )
        for severity in self.severities:
            check_whole(severity, "severities", SEVERITIES[0], SEVERITIES[-1])
        if len(set(self.severities)) < len(self.severities) or not self.severities:
            raise ValueError(f"severities: expected some of 1 to 5, found {self.severities}")

    @property
    def asked(self) -> tuple[str, ...]:
        """Single names, each once."""
        found = []
        for name in self.names:
            found += _ALL if name == "all" else GROUPS.get(name, (name,))
        return tuple(dict.fromkeys(found))


def corrupted_batch(
    name: str,
    images: Float[Array, "n h w 3"],
    severity: int,
    key: Key[Array, ""],
    *,
    first: int = 0,
    nearness: Float[Array, "n h w"] | None = None,
    released: bool = False,
) -> Float[Array, "n h w 3"]:
    """Images in [0, 1] under any corruption, image i being number `first` + i of its set.

    `nearness` in [0, 1] is for the 3D ones, a relative one as a depth network gives: depth goes
    from 0.1 at 1 to 0.5, where the generator has it end, at 0, and its inverse is linear between.
    """
    drawn = jax.random.fold_in(key, _NAMES.index(name))
    if name in CORRUPTIONS:
        return corrupt(name, images, severity, drawn, first=first, released=released)
    if nearness is None:
        raise ValueError(f"{name}: needs how near each pixel is")
    depth = depth_from_inverse(1024 * (1 + 4 * jnp.asarray(nearness)))
    if name in CODEC_CORRUPTIONS:
        moved = jnp.asarray(corrupt_by_codec(name, images, depth, severity, drawn, first=first))
        return all_released(moved) if released else moved
    return corrupt_3d(name, images, depth, severity, drawn, first=first, released=released)


def answer_corruptions(
    asker: Asker,
    clean: ImageSource,
    key: Key[Array, ""],
    asked: Corruptions,
    *,
    depth_folder: Path | None = None,
) -> Answers:
    """Whether each clean image is classified rightly under each corruption and severity."""
    shape = len(asked.severities), len(clean)
    found = {name: np.empty(shape, bool) for name in asked.asked}
    labels = labels_of(clean)
    deep = any(name in DEEP for name in found)
    for rows, batch in batches(len(clean), asker.batch_size):
        images = jnp.asarray(asker.read(clean, batch))
        nearness = jnp.asarray(asker.nearness(clean, batch, depth_folder)) if deep else None
        for name, right in found.items():
            for place, severity in enumerate(asked.severities):
                moved = corrupted_batch(
                    name,
                    images,
                    severity,
                    key,
                    first=rows.start,
                    nearness=nearness,
                    released=asked.released,
                )
                decided = _decided(asker, moved, f"{name} of severity {severity}")
                right[place, rows] = (decided == labels[batch])[: rows.stop - rows.start]
    return _named(found, asked.severities)


def answer_corrupted(
    asker: Asker, clean: ImageSource, corrupted: Mapping[str, Sequence[ImageSource]]
) -> Answers:
    """The same of sets that come corrupted: image i of each is the i-th clean one, corrupted.

    An image that has the model's size is not resized: the released ones are cut to 224 pixels, and
    to resize and cut them again would enlarge them. ValueError where labels are not the clean ones.
    """
    labels = labels_of(clean)
    ready = asker.read(clean, [0]).shape[1:]
    found = {}
    for name, sources in corrupted.items():
        if name not in _NAMES:
            raise ValueError(f"corrupted: {name!r}: expected one of {', '.join(_NAMES)}")
        if len(sources) != len(SEVERITIES):
            raise ValueError(
                f"corrupted: {name}: {counted(len(sources), 'set')}, expected one a severity"
            )
        right = np.empty((len(sources), len(clean)), bool)
        for place, source in enumerate(sources):
            if not np.array_equal(labels_of(source), labels):
                raise ValueError(
                    f"{name}, severity {place + 1}: labels differ from the clean set's: not the "
                    "same images"
                )
            for rows, batch in batches(len(source), asker.batch_size):
                images = asker.read(source, batch, ready=ready)
                decided = _decided(asker, images, f"{name} of severity {place + 1}")
                right[place, rows] = (decided == labels[batch])[: rows.stop - rows.start]
        found[name] = right
    return _named(found, SEVERITIES)


def _named(found: Mapping[str, np.ndarray], severities: Sequence[int]) -> Answers:
    named = {}
    for name, right in found.items():
        named[f"corruption/{name}/correct"] = right
        named[f"corruption/{name}/severities"] = np.asarray(severities)
    return named


def _decided(asker: Asker, images, what: str) -> np.ndarray:
    logits = np.asarray(ask(asker.predict, images))
    if not np.isfinite(logits).all():
        raise ValueError(f"predict: NaN or infinite logits for images under {what}")
    return logits.argmax(1)
