"""ImageNet-C's weather: fog, frost, snow, and spatter, of one image in [0, 1].

Parameters are of the generator of the released set (see `corruption_noise`). Lengths in pixels, and
how large snow flakes are, are for 224 pixels, and in proportion to the shorter side at other sizes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.ops.materialize import materialize
from jaxsynth.robustness.corruptions.edges import canny, chamfer, equalise
from jaxsynth.robustness.corruptions.filters import (
    blur_along,
    clipped_zoom,
    draw_plasma,
    gaussian_blur,
    mean_filter,
    plasma,
    size_ratio,
)

# How much fog, and by what its cloud's wobble is divided from level to level.
FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
# Weights of image and frost.
FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
# Mean, deviation, zoom, threshold, radius and sigma of the motion, weight of the image.
SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
# Mean, deviation, sigma, threshold, strength (of water) or sigma (of mud).
SPATTER = (
    (0.65, 0.3, 4, 0.69, 0.6),
    (0.65, 0.3, 3, 0.68, 0.6),
    (0.65, 0.3, 2, 0.68, 0.5),
    (0.65, 0.3, 1, 0.65, 1.5),
    (0.67, 0.4, 1, 0.65, 1.5),
)
# Severities up to here are water, above it mud.
_LAST_WATER = 3
_WATER = np.float32([175, 238, 238]) / 255
_MUD = np.float32([63, 42, 20]) / 255
_MUD_LEAST = 0.8
_EDGES = (50, 150)
_FARTHEST = 20
_EMBOSS = np.int32([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
# Luma of ITU-R BT.601, as OpenCV's grey.
_GREY = np.float32([0.299, 0.587, 0.114])


class Frost(NamedTuple):
    """What chooses a frost: of given textures one, and a corner; or the noise one grows from."""

    which: Int[Array, ""]
    corner: Int[Array, "2"]
    cloud: Float[Array, " points"]
    seeds: Float[Array, "h w"]
    angles: Float[Array, " needles"]


class Snow(NamedTuple):
    """Standard normal noise for the flakes, and the angle in degrees at which they fall."""

    flakes: Float[Array, "h w"]
    angle: Float[Array, ""]


def fog(
    image: Float[Array, "h w 3"], noise: Float[Array, " points"], severity: int
) -> Float[Array, "h w 3"]:
    """Adds a cloud (of 256 pixels for 224), then rescales by the image's maximum."""
    amount, decay = FOG[severity - 1]
    cloud = plasma(noise, decay)[: image.shape[0], : image.shape[1], None]
    most = image.max()
    return jnp.clip((image + amount * cloud) * most / (most + amount), 0, 1)


def draw_frost(key: Array, shape: tuple[int, ...]) -> Frost:
    """Draws for both kinds; `which` and `corner` are reduced to the textures given."""
    keys = jax.random.split(key, 5)
    most = np.iinfo(np.int32).max
    return Frost(
        jax.random.randint(keys[0], (), 0, most),
        jax.random.randint(keys[1], (2,), 0, most),
        draw_plasma(keys[2], shape),
        jax.random.uniform(keys[3], shape[:2]),
        jax.random.uniform(keys[4], (_NEEDLES,), maxval=180),
    )


def frost(
    image: Float[Array, "h w 3"],
    draws: Frost,
    severity: int,
    textures: Float[Array, "k a b 3"] | None = None,
) -> Float[Array, "h w 3"]:
    """A weighted sum of the image and of a piece of one of the `textures`, in [0, 1].

    The released set was made from five photographs, which are not part of this library: pass them
    for its pictures. Without, `frost_texture` makes one.
    """
    of_image, of_frost = FROST[severity - 1]
    if textures is None:
        texture = frost_texture(draws)
    else:
        height, width = image.shape[:2]
        room = jnp.array([textures.shape[1] - height, textures.shape[2] - width])
        corner = draws.corner % jnp.maximum(room, 1)
        start = (draws.which % len(textures), *corner, 0)
        texture = jax.lax.dynamic_slice(textures, start, (1, height, width, 3))[0]
    return jnp.clip(of_image * image + of_frost * texture, 0, 1)


# The procedural frost is ours, and so are its numbers: directions of the crystals, the share of
# pixels one starts from, after how many pixels (of 224) it has faded to 1/e, the colour, and how a
# cloud and the crystals add up.
_NEEDLES = 4
_SEED_SHARE = 0.01
_NEEDLE_FADES = 12
# A needle is made of steps of 1 to 5 and of 11 and 22 pixels, the same on either side: any of -27
# to 27 is a sum of one of each.
_NEEDLE_STEPS = ((1, 2, 3, 4, 5), (11, 22))
_ICE = np.float32([0.86, 0.94, 1.0])
_BASE, _OF_CLOUD, _OF_NEEDLES = 0.15, 0.45, 0.6


def frost_texture(draws: Frost) -> Float[Array, "h w 3"]:
    """Ice on a pane: a cloud of thin ice with bright needles along a few directions."""
    height, width = draws.seeds.shape
    # Each direction has a range of the numbers, and brightness is the place in it.
    seeds = draws.seeds / _SEED_SHARE - jnp.arange(_NEEDLES, dtype=jnp.float32)[:, None, None]
    seeds = jnp.where((seeds > 0) & (seeds < 1), seeds, 0)
    needles = jax.lax.map(lambda draws: _grow_needles(*draws), (seeds, draws.angles)).max(0)
    cloud = materialize(plasma(draws.cloud, 2)[:height, :width])
    ice = _BASE + _OF_CLOUD * cloud + _OF_NEEDLES * materialize(needles)
    return jnp.clip(ice, 0, 1)[..., None] * _ICE


def _grow_needles(layer: Float[Array, "h w"], angle: Float[Array, ""]) -> Float[Array, "h w"]:
    """Each seed grown both ways along `angle` (degrees), fading."""
    ratio = size_ratio(layer.shape)
    turn = jnp.deg2rad(angle)
    for steps in _NEEDLE_STEPS:
        lengths = sorted({max(1, round(step * ratio)) for step in steps})
        reach = lengths[-1]
        around = materialize(jnp.pad(layer, reach))
        for far in lengths:
            down, right = (
                jnp.round(far * part).astype(jnp.int32) for part in (jnp.sin(turn), jnp.cos(turn))
            )
            faded = np.float32(np.exp(-far / (_NEEDLE_FADES * ratio)))
            for way in (-1, 1):
                start = reach + way * down, reach + way * right
                moved = jax.lax.dynamic_slice(around, start, layer.shape)
                layer = jnp.maximum(layer, faded * moved)
    return layer


def draw_snow(key: Array, shape: tuple[int, ...]) -> Snow:
    """Flakes and their direction, -135 to -45 degrees."""
    flakes, angle = jax.random.split(key)
    return Snow(
        jax.random.normal(flakes, shape[:2]), jax.random.uniform(angle, minval=-135, maxval=-45)
    )


def snow(image: Float[Array, "h w 3"], draws: Snow, severity: int) -> Float[Array, "h w 3"]:
    """Blurred flakes over a whitened image, and the same flakes once more, turned around."""
    mean, deviation, zoom, least, radius, sigma, weight = SNOW[severity - 1]
    ratio = size_ratio(image.shape)
    layer = clipped_zoom(mean + deviation * draws.flakes, max(1, zoom * ratio))
    layer = jnp.floor(jnp.clip(jnp.where(layer < least, 0, layer), 0, 1) * 255) / 255
    layer = materialize(blur_along(layer, draws.angle, radius * ratio, sigma * ratio))[..., None]
    grey = jnp.matmul(image, _GREY, precision="highest")[..., None]
    white = jnp.maximum(image, grey * 1.5 + 0.5)
    image = weight * image + (1 - weight) * white
    return jnp.clip(image + layer + layer[::-1, ::-1], 0, 1)


def draw_spatter(key: Array, shape: tuple[int, ...]) -> Float[Array, "h w"]:
    """Standard normal noise, one number a pixel."""
    return jax.random.normal(key, shape[:2])


def spatter(
    image: Float[Array, "h w 3"], noise: Float[Array, "h w"], severity: int
) -> Float[Array, "h w 3"]:
    """Drops of water, from severity 4 on of mud."""
    mean, deviation, sigma, least, last = SPATTER[severity - 1]
    ratio = size_ratio(image.shape)
    layer = gaussian_blur(mean + deviation * noise, sigma * ratio)
    if severity > _LAST_WATER:
        mask = gaussian_blur((layer > least).astype(jnp.float32), last * ratio)
        mask = jnp.where(mask < _MUD_LEAST, 0, mask)[..., None]
        return jnp.clip(image * (1 - mask) + mask * _MUD, 0, 1)
    layer = materialize(jnp.floor(jnp.clip(jnp.where(layer < least, 0, layer) * 255, 0, 255)))
    strength = layer * water_relief(layer, _FARTHEST * ratio)
    strength = last * strength / jnp.maximum(strength.max(), 1e-6)
    return jnp.clip(image + strength[..., None] * _WATER, 0, 1)


def water_relief(layer: Float[Array, "h w"], farthest: float) -> Float[Array, "h w"]:
    """How light is a drop, 0 to 255: an embossed distance to the nearest edge of a drop."""
    distance = chamfer(canny(layer, *_EDGES), farthest)
    level = materialize(equalise(jnp.floor(mean_filter(distance)), int(np.ceil(farthest))))
    around = jnp.pad(level, 1, mode="reflect")
    height, width = level.shape
    embossed = sum(
        int(weight) * around[row : row + height, column : column + width]
        for (row, column), weight in np.ndenumerate(_EMBOSS)
    )
    return jnp.round(mean_filter(materialize(jnp.clip(embossed, 0, 255))))
