"""Pictures of a few drawn shapes with what is known of every pixel: mask, label and depth.

Conditions for a controlled generator are mostly estimated from photos by another network, and its
errors then pass for the generator's. Here they are exact, because the picture is drawn from them,
and what a generator makes of them can be measured. Needs no download; the shapes and colours are
those the tiny base knows.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops

from jaxsynth.data.procedural.shapes import COLOURS, OVERSAMPLE, SHAPES, distinct, shape_mask

# Nearness of a shape, 1 being nearest, and its radius as a fraction of the picture's side.
_NEARNESS = (0.2, 1.0)
_RADIUS = (0.12, 0.32)


@dataclass(frozen=True)
class Scenes:
    """Pictures, captions and maps, each map (n, size, size) uint8.

    images: uint8 (n, size, size, 3).
    masks: how much of a pixel the shapes cover together, 255 for all of it.
    labels: 0 for the background, else 1 + the index of the shape's name in `rendered.SHAPES`.
    depths: 0 for the background, else 255 times the nearness of the shape.
    """

    images: np.ndarray
    captions: list[str]
    masks: np.ndarray
    labels: np.ndarray
    depths: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)


def render_scenes(count: int, size: int, seed: int, *, shapes: int = 2) -> Scenes:
    """`count` pictures of `shapes` different shapes; nearer ones are larger and cover others.

    A label or a depth is that of the nearest shape that covers at least half of the pixel. A
    caption names the shapes from front to back.
    """
    if not 1 <= shapes <= 4:
        raise ValueError(f"shapes is {shapes}, expected 1 to 4: colours must differ")
    rng = np.random.default_rng([seed, 2])
    images = np.empty((count, size, size, 3), np.uint8)
    masks, labels, depths = (np.zeros((count, size, size), np.uint8) for _ in range(3))
    captions = []
    for i in range(count):
        colours = _colours(shapes + 1, rng)
        kinds = rng.choice(len(SHAPES), shapes, replace=False)
        picture = np.full((size, size, 3), COLOURS[colours[0]], np.float32)
        union = Image.new("L", (size * OVERSAMPLE,) * 2, 0)
        # The farthest first: what is drawn later covers it.
        for kind, colour, near in zip(
            kinds, colours[1:], np.sort(rng.uniform(*_NEARNESS, shapes)), strict=True
        ):
            radius = size * OVERSAMPLE * np.interp(near, _NEARNESS, _RADIUS)
            large = shape_mask(SHAPES[kind], size * OVERSAMPLE, radius, rng)
            mask = np.asarray(large.resize((size, size), Image.Resampling.BOX))
            weight = mask[..., None].astype(np.float32) / 255
            picture = weight * np.asarray(COLOURS[colour], np.float32) + (1 - weight) * picture
            union = ImageChops.lighter(union, large)
            labels[i][mask >= 128] = 1 + kind
            depths[i][mask >= 128] = round(255 * near)
        masks[i] = union.resize((size, size), Image.Resampling.BOX)
        picture = picture + rng.normal(0, rng.uniform(0, 5), picture.shape)
        images[i] = np.clip(np.round(picture), 0, 255).astype(np.uint8)
        named = [f"{c} {SHAPES[k]}" for c, k in zip(colours[1:], kinds, strict=True)]
        captions.append("a photo of a " + " in front of a ".join(reversed(named)))
    return Scenes(images, captions, masks, labels, depths)


def _colours(count: int, rng: np.random.Generator) -> list[str]:
    """Colours of which every two can be told apart."""
    while True:
        found: list[str] = []
        for name in rng.permutation(list(COLOURS)):
            if all(distinct(name, other) for other in found):
                found.append(str(name))
            if len(found) == count:
                return found
