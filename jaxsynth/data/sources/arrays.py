"""Images held in memory: arrays of one size, and sources decoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, UInt8

from jaxsynth.core.words import counted
from jaxsynth.data.dataset import ImageSource, Indices, Record, SourceError
from jaxsynth.data.views import Subset


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory.

    `maps` are what is known of every pixel of drawn images, by the kind of condition that it makes
    ("depth", "segmentation", "mask"), and `facts` what is known of each image as a whole ("people",
    "keypoints").
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]
    ids: Sequence[str]
    maps: Mapping[str, UInt8[np.ndarray, "n h w"]] = field(default_factory=dict)
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        if not len(self.images) == len(self.labels) == len(self.ids):
            raise SourceError(
                f"{counted(len(self.images), 'image')}, {counted(len(self.labels), 'label')}, "
                f"{len(self.ids)} ids"
            )
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise SourceError(
                f"expected uint8 images (n, h, w, 3), found {self.images.dtype} {self.images.shape}"
            )
        for kind, pixels in self.maps.items():
            if pixels.shape != self.images.shape[:3]:
                raise SourceError(
                    f"{kind}: a map of {pixels.shape} for images of {self.images.shape}"
                )
        for name, values in self.facts.items():
            if len(values) != len(self.images):
                raise SourceError(f"{name}: {len(values)} for {counted(len(self.images), 'image')}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], int(self.labels[index]), self.ids[index])

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        return [
            _digest(
                self.images[i],
                *(own[key][i] for own in (self.maps, self.facts) for key in sorted(own)),
            )
            for i in (range(len(self)) if indices is None else indices)
        ]


class Cached:
    """A source decoded once, in one flat uint8 array; images may differ in size. See `cached`."""

    def __init__(self, pixels, shapes, labels, ids):
        self.pixels, self.shapes, self.labels, self.ids = pixels, shapes, labels, ids
        sizes = shapes.astype(np.int64).prod(axis=1) * 3
        self.starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        height, width = self.shapes[index]
        start = self.starts[index]
        flat = self.pixels[start : start + int(height) * int(width) * 3]
        return Record(flat.reshape(height, width, 3), int(self.labels[index]), self.ids[index])

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        return [
            _digest(self[int(i)].image) for i in (range(len(self)) if indices is None else indices)
        ]


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 (hex) of arrays' shapes and bytes."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(repr(array.shape).encode())
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


def cached(source: ImageSource, limit_bytes: int = 2**30) -> ImageSource:
    """The source decoded into memory, or the source itself where that takes more than the limit."""
    if isinstance(source, ArraySource | Cached) or not len(source):
        return source
    if isinstance(source, Subset) and isinstance(source.source, ArraySource | Cached):
        return source
    pieces, shapes, total = [], [], 0
    for index in range(len(source)):
        image = source[index].image
        total += image.nbytes
        # The first image tells in time that a large source will not fit.
        if total > limit_bytes or (index == 0 and total * len(source) > 4 * limit_bytes):
            return source
        pieces.append(image.reshape(-1))
        shapes.append(image.shape[:2])
    labels, ids = np.asarray(source.labels), tuple(source.ids)
    return Cached(np.concatenate(pieces), np.asarray(shapes, np.int32), labels, ids)
