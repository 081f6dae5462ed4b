"""Clips made from nothing: printed digits that glide over a plain ground, each in one direction.

They are drawn as the tiny base's digits are (`shapes`), only smaller, so that they have room to
move. What is learned from them is motion and not what digits look like.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageChops

from jaxsynth.data.procedural.shapes import (
    COLOURS,
    DIGITS,
    OVERSAMPLE,
    digit_mask,
    fonts,
    two_colours,
)

# (down, right) of each, by the name of its class.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0),
}  # fmt: skip
FRAMES = 12
# Of a picture's side: a frame's step, the least and the most, and the height of a digit.
_STEPS, _HEIGHTS = (0.034, 0.041), (0.5, 0.62)


class Moving(NamedTuple):
    """`clips` with the direction (of `DIRECTIONS`) that each moves in, and a text of the digit."""

    clips: UInt8[np.ndarray, "n f h w 3"]
    labels: Int[np.ndarray, " n"]
    captions: tuple[str, ...]


def render_moving(count: int, size: int, seed: int, *, frames: int = FRAMES) -> Moving:
    """`count` clips of each direction, one direction after another.

    The texts name digit and colours and never the direction.
    """
    rng = np.random.default_rng([seed, 4])
    faces, clips, captions = fonts(), [], []
    for way in DIRECTIONS.values():
        for _ in range(count):
            digit = int(rng.integers(10))
            ink, paper = two_colours(rng, plain=0.4)
            side = size * OVERSAMPLE
            mask = digit_mask(digit, faces[rng.integers(len(faces))], side, _HEIGHTS, rng)
            step = side * rng.uniform(*_STEPS)
            tints = [np.float32(COLOURS[name]) + rng.normal(0, 10, 3) for name in (ink, paper)]
            clips.append(_glide(mask, size, frames, np.array(way) * step, *tints))
            name = DIGITS[digit]
            captions.append(
                (
                    f"a photo of the digit {name}",
                    f"a {ink} digit {name} on a {paper} background",
                    f"the digit {name}",
                )[rng.integers(3)]
            )
    labels = np.repeat(np.arange(len(DIRECTIONS), dtype=np.int32), count)
    return Moving(np.stack(clips), labels, tuple(captions))


def _glide(
    mask: Image.Image, size: int, frames: int, step: np.ndarray, ink: np.ndarray, paper: np.ndarray
) -> UInt8[np.ndarray, "f h w 3"]:
    """A large mask on its way over the middle, averaged down, as ink on paper."""
    found = []
    for frame in range(frames):
        down, right = np.round(step * (frame - (frames - 1) / 2)).astype(int)
        shifted = ImageChops.offset(mask, int(right), int(down))
        # What leaves on one side does not come in on the other.
        box = [0, 0, *mask.size]
        box[0 if right > 0 else 2] += int(right)
        box[1 if down > 0 else 3] += int(down)
        inside = Image.new("L", mask.size, 0)
        inside.paste(shifted.crop(tuple(box)), tuple(box))
        weight = np.asarray(inside.resize((size, size), Image.Resampling.BOX), np.float32)
        weight = weight[..., None] / 255
        found.append(np.clip(np.round(weight * ink + (1 - weight) * paper), 0, 255))
    return np.stack(found).astype(np.uint8)
