"""Pictures in which shape, texture, background, time and weather are each set on their own.

What a classifier goes by shows where these cues part ways: the shape of one class with the texture
of another, a class's shape on another's background, at night, in fog. Real sets of such pictures
are found or pasted together; here every cue, the mask, the place and the depth are known.

A class is a shape of `rendered.SHAPES`; its texture and its background are a pattern of
`textures.TEXTURES` in two shades of one hue. Hues are spread evenly over the classes, so a colour
alone names the class of what is coloured, in any light: darkness, fog, rain and snow change its
brightness and greyness only. What has no texture or background of a class is grey.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image

from jaxsynth.data.procedural.shapes import SHAPES, shape_mask
from jaxsynth.data.procedural.textures import OVERSAMPLE as _FINE
from jaxsynth.data.procedural.textures import TEXTURES, average_down, texture_pattern

WEATHERS = ("sunny", "foggy", "raining", "snowing")
# No class: a plain grey.
PLAIN = -1
# How bright things are at night, and how much of a foggy picture is fog.
_NIGHT, _FOG = 0.45, 0.5
# Radius of a shape as a share of the picture's side, from far to near.
_RADIUS = (0.24, 0.36)


@dataclass(frozen=True)
class Cues:
    """n pictures and what is in them; classes are places in `rendered.SHAPES` or PLAIN.

    images: uint8 (n, size, size, 3). masks, depths: uint8 (n, size, size): how much of a pixel the
    shape covers, 255 for all of it; and 255 times the nearness of what covers at least half of it,
    0 for the background. places: float (n, 2), the shape's middle, (row, column) in pixels.
    """

    images: np.ndarray
    masks: np.ndarray
    depths: np.ndarray
    places: np.ndarray
    shapes: np.ndarray
    textures: np.ndarray
    backgrounds: np.ndarray
    night: np.ndarray
    weathers: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class _Foreground:
    mask: np.ndarray
    nearness: float
    fill: np.ndarray


def render_conflicts(count: int, size: int, seed: int, *, classes: int = len(SHAPES)) -> Cues:
    """`count` pictures of every pair of a shape and a texture of `classes`, on plain grey.

    Of each shape's pictures one in `classes` has its own texture.
    """
    _check(count, size, classes)
    rng = np.random.default_rng([seed, 4])
    shapes, textures = (
        np.repeat(x.ravel(), count) for x in np.mgrid[:classes, :classes].astype(np.int32)
    )
    plain = np.full_like(shapes, PLAIN)
    pictures = [
        _compose(_foreground(shape, texture, classes, size, rng), PLAIN, classes, size, rng)
        for shape, texture in zip(shapes, textures, strict=True)
    ]
    return _cues(pictures, shapes, textures, plain)


def render_backgrounds(
    count: int, size: int, seed: int, *, classes: int = len(SHAPES)
) -> dict[str, Cues]:
    """{"original", "mixed_same", "mixed_rand"}, `count` pictures a class, of the same shapes.

    Image i of each has the same plain shape at the same place: on a background of its class, on
    another one of its class, and on one of another class. (In ImageNet-9's Mixed-Rand the random
    class may be the image's own, one in nine.)
    """
    _check(count, size, classes)
    if classes < 2:
        raise ValueError(f"classes: expected 2 or more, found {classes}")
    rng = np.random.default_rng([seed, 5])
    shapes = np.repeat(np.arange(classes, dtype=np.int32), count)
    other = ((shapes + rng.integers(1, classes, len(shapes))) % classes).astype(np.int32)
    drawn = [_foreground(shape, PLAIN, classes, size, rng) for shape in shapes]
    plain = np.full_like(shapes, PLAIN)
    found = {}
    for name, behind in (("original", shapes), ("mixed_same", shapes), ("mixed_rand", other)):
        pictures = [
            _compose(front, background, classes, size, rng)
            for front, background in zip(drawn, behind, strict=True)
        ]
        found[name] = _cues(pictures, shapes, plain, behind)
    return found


def render_contexts(count: int, size: int, seed: int, *, classes: int = len(SHAPES)) -> Cues:
    """`count` pictures a class of each of the eight ways to be common or uncommon.

    Plain shapes by day or at night, in the sun or in fog, rain or snow, on their class's background
    or on another's: night, bad weather and another's background are uncommon.
    """
    _check(count, size, classes)
    rng = np.random.default_rng([seed, 6])
    ways = np.indices((classes, 2, 2, 2, count)).reshape(5, -1)[:4]
    shapes, night, bad, moved = (x.astype(np.int32) for x in ways)
    step = rng.integers(1, max(classes, 2), len(shapes))
    backgrounds = np.where(moved, (shapes + step) % classes, shapes).astype(np.int32)
    weathers = np.where(bad, rng.integers(1, len(WEATHERS), len(shapes)), 0).astype(np.int32)
    pictures = []
    for shape, background, dark, weather in zip(shapes, backgrounds, night, weathers, strict=True):
        front = _foreground(shape, PLAIN, classes, size, rng)
        pictures.append(
            _compose(
                front, background, classes, size, rng, night=bool(dark), weather=WEATHERS[weather]
            )
        )
    plain = np.full_like(shapes, PLAIN)
    return _cues(pictures, shapes, plain, backgrounds, night=night > 0, weathers=weathers)


def _check(count: int, size: int, classes: int) -> None:
    if count < 1 or size < 16:
        raise ValueError(f"count {count}, size {size}: expected 1 or more, and 16 pixels or more")
    if not 1 <= classes <= len(SHAPES):
        raise ValueError(f"classes: expected 1 to {len(SHAPES)}, found {classes}")


def hue_of(index: int, classes: int) -> np.ndarray:
    """The colour (3,), from 0 to 255, whose shades a class's texture and background have."""
    return 255 * np.array(colorsys.hsv_to_rgb(index / classes, 0.9, 1.0))


def _surface(index: int, classes: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A class's pattern in its hue, or plain grey, (size, size, 3) from 0 to 255."""
    if index == PLAIN:
        return np.full((size, size, 3), 128.0)
    weight = texture_pattern(TEXTURES[index % len(TEXTURES)], size, rng)[..., None]
    return average_down((0.55 + 0.45 * weight) * hue_of(index, classes))


def _foreground(
    shape: int, texture: int, classes: int, size: int, rng: np.random.Generator
) -> _Foreground:
    nearness = rng.uniform(0.2, 1.0)
    side = size * _FINE
    radius = side * np.interp(nearness, (0.2, 1.0), _RADIUS)
    large = shape_mask(SHAPES[shape], side, radius, rng)
    mask = np.asarray(large.resize((size, size), Image.Resampling.BOX))
    fill = _surface(texture, classes, size, rng)
    if texture == PLAIN:
        # Dark or light, so that it stands out from any background.
        fill = np.full_like(fill, rng.choice([rng.uniform(10, 50), rng.uniform(215, 250)]))
    return _Foreground(mask, nearness, fill)


def _compose(
    front: _Foreground,
    background: int,
    classes: int,
    size: int,
    rng: np.random.Generator,
    *,
    night: bool = False,
    weather: str = "sunny",
) -> tuple[np.ndarray, _Foreground]:
    behind = _surface(background, classes, size, rng)
    weight = front.mask[..., None] / 255
    picture = weight * front.fill + (1 - weight) * behind
    if weather == "foggy":
        picture = (1 - _FOG) * picture + _FOG * 190
    elif weather == "raining":
        # Slanted streaks, a pixel wide and half transparent, on one line of eight.
        y, x = np.mgrid[:size, :size]
        streak = (4 * x + y + int(rng.integers(32))) % 32 < 4
        picture = np.where(streak[..., None], (picture + 170) / 2, picture)
    elif weather == "snowing":
        picture = np.where(rng.random((size, size, 1)) < 0.08, 240, picture)
    if night:
        picture = _NIGHT * picture
    picture = picture + rng.normal(0, 2, picture.shape)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8), front


def _cues(pictures, shapes, textures, backgrounds, *, night=None, weathers=None) -> Cues:
    images = np.stack([image for image, _ in pictures])
    masks = np.stack([front.mask for _, front in pictures])
    nearness = np.array([front.nearness for _, front in pictures])
    depths = np.where(masks >= 128, np.round(255 * nearness)[:, None, None], 0).astype(np.uint8)
    grid = np.indices(masks.shape[1:])[None]
    weights = masks[:, None].astype(np.float64)
    places = (weights * grid).sum((2, 3)) / weights.sum((2, 3))
    return Cues(
        images=images,
        masks=masks,
        depths=depths,
        places=places,
        shapes=shapes,
        textures=textures,
        backgrounds=backgrounds,
        night=np.zeros(len(images), bool) if night is None else night,
        weathers=np.zeros(len(images), np.int32) if weathers is None else weathers,
    )
