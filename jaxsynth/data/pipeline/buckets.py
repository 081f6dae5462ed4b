"""Buckets of aspect ratios: images of many shapes, learned in a few shapes instead of in squares.

A bucket is a shape whose sides are multiples of a step and whose area is at most that of the square
that images would be cut to otherwise. An image belongs to the bucket of the nearest aspect ratio,
on a logarithmic scale, and is resized to cover that shape and cut at its centre.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image

from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Count, Natural, check_limits
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.decode import covered

# In pixels: what other trainers take, and bases of 512 pixels and more allow.
STEP = 64


@dataclass(frozen=True)
class BucketConfig:
    """In which shapes images are learned. Where not `enabled`, all images are cut to squares.

    Sides are multiples of `step` pixels, from `min_side` to `max_side`; no shape has more area than
    the square of `image_size`, which is one of them. 0 leaves a field to the base: steps of 64
    pixels (less where its images are small), sides from half of `image_size` to twice as much.

    A program is compiled for each shape that has images. At most `most` shapes are kept: the images
    of the rarest ones go to the nearest of the others.
    """

    enabled: bool = False
    step: Natural = 0
    min_side: Natural = 0
    max_side: Natural = 0
    most: Count = 8

    def __post_init__(self):
        check_limits(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not self.enabled and value != field.default:
                raise ValueError(
                    f"{field.name}: {value}, but images are cut to squares; set enabled=true, or "
                    f"leave {field.name} out"
                )
        if self.max_side and self.min_side > self.max_side:
            raise ValueError(
                f"min_side: {self.min_side} is above max_side = {self.max_side}; swap them, or "
                "leave one out"
            )

    def shapes(self, size: int, factor: int) -> list[tuple[int, int]]:
        """(height, width) of all buckets, the largest area first, of equal ones the squarest.

        Args:
            size: the side of the square, in pixels.
            factor: what the base's networks divide the sides of images by.

        Raises:
            UserError: the sides do not suit the base; the message names the field.
        """
        step = self.step or max(min(STEP, size // 8) // factor * factor, factor)
        if step % factor:
            raise UserError(
                f"step: {step}, expected a multiple of {factor} for this base, such as "
                f"{-(-step // factor) * factor}"
            )
        if step > size:
            raise UserError(f"step: {step}, expected at most image_size = {size}")
        least = self.min_side or -(-(size // 2) // step) * step
        most = self.max_side or 2 * size // step * step
        for name, side in (("min_side", least), ("max_side", most)):
            if side % step:
                raise UserError(
                    f"{name}: {side}, expected a multiple of step = {step}, such as "
                    f"{-(-side // step) * step}"
                )
        if least > size:
            raise UserError(f"min_side: {least}, expected at most image_size = {size}")
        if most < size:
            raise UserError(f"max_side: {most}, expected at least image_size = {size}")
        found = {(size, size)}
        for side in range(least, most + 1, step):
            other = min(size * size // side // step * step, most)
            if other >= least:
                found |= {(side, other), (other, side)}
        return sorted(found, key=lambda shape: (-math.prod(shape), abs(shape[0] - shape[1]), shape))


class Bucket(NamedTuple):
    """A shape in pixels, and the places in their source of the images that are learned in it."""

    height: int
    width: int
    rows: Int[np.ndarray, " n"]

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def nearest(
    sides: Int[np.ndarray, "n 2"], shapes: Sequence[tuple[int, int]]
) -> Int[np.ndarray, " n"]:
    """Which of the shapes (height, width) is nearest in aspect ratio; of equal ones the first."""
    ratios = [np.log(values[:, 1] / values[:, 0]) for values in (np.asarray(sides), _rows(shapes))]
    # Rounded, so that shapes as far to either side are equally near on every machine.
    return np.abs(ratios[0][:, None] - ratios[1]).round(9).argmin(1)


def _rows(shapes: Sequence[tuple[int, int]]) -> Int[np.ndarray, "m 2"]:
    return np.asarray(shapes, np.int64).reshape(-1, 2)


def buckets_of(
    source: ImageSource, shapes: Sequence[tuple[int, int]], most: int = 0
) -> list[Bucket]:
    """The buckets that have images, in the order of `shapes`; each image is in one of them.

    With `most` above 0 there are at most so many: the shape with the fewest images is left out, of
    equal ones the last, until there are no more.
    """
    sides = np.array([record.image.shape[:2] for record in source]).reshape(-1, 2)
    kept = list(shapes)
    while True:
        own = nearest(sides, kept)
        counts = np.bincount(own, minlength=len(kept))
        used = [i for i in range(len(kept)) if counts[i]]
        if not most or len(used) <= most:
            return [Bucket(*kept[i], np.flatnonzero(own == i)) for i in used]
        rarest = min(used, key=lambda i: (counts[i], -i))
        kept = [kept[i] for i in used if i != rarest]


def cut(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> tuple[Float32[np.ndarray, "height width 3"], tuple[int, int]]:
    """The middle of an image resized to cover a shape, in [-1, 1], and its top and left there."""
    middle, corner = covered(Image.fromarray(image), height, width, Image.Resampling.BILINEAR)
    return np.asarray(middle, np.float32) / 127.5 - 1.0, corner
