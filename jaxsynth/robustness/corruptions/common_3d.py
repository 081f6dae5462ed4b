"""3D Common Corruptions of one image in [0, 1], from a depth map.

Kar et al. 2022, arXiv 2203.01441. Parameters and formulas are of the generator (create_3dcc in
EPFL-VILAB/3DCommonCorruptions). What differs, each for a reason:

- `fog_3d`: fog is as light as the image's mean, not its batch's, on which a picture would depend.
- `flash` needs how light falls on surfaces: without a `shading` (a reshading network's) it is the
  cosine between surface and camera, of the depth.
- `xy_motion_blur`, `z_motion_blur`: the generator moves a camera through a point cloud, whose gaps
  a network paints (3D Ken Burns). Here each frame samples the image where a few steps of fixed
  point iteration find the source: gaps show their surroundings, stretched.
- `bit_error`: the generator damages an H.264 file. Here a JPEG is damaged: see there.

The two of H.265 are in `corruption_codec`. Lengths in pixels are for 224 pixels, those of
the motions for 512, which the generator's camera is made for; both in proportion at other sizes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsynth.robustness.corruptions.filters import along_height, along_width, sample, size_ratio
from jaxsynth.robustness.corruptions.jpeg import (
    from_coefficients,
    from_planes,
    quantisation_tables,
    to_coefficients,
    to_planes,
)
from jaxsynth.robustness.corruptions.noise import photons

_LAYERS = 8
# Apertures are the severity plus these; which of the layers' edges is in focus.
NEAR_APERTURE, FAR_APERTURE = 2.0, 0.5
_NEAR_EDGE, _FAR_EDGE = 0, 7
_LEAST_RADIUS = 0.1
FOG = (4, 8, 12, 16, 20)
FLASH = (2.4, 1.4, 0.9, 0.6, 0.4)
LOW_LIGHT = (0.6, 0.5, 0.4, 0.3, 0.2)
# Low light's noise has one strength: photons and deviation of IN-C's severity 3, times 10 and 0.1.
_LOW_LIGHT_PHOTONS, _LOW_LIGHT_SCALE = 120, 0.018
_ISO_PHOTONS = 25
ISO_SCALES = tuple(0.7 * scale for scale in (0.08, 0.12, 0.18, 0.26, 0.38))
COLOUR_BITS = (5, 4, 3, 2, 1)
# Of a move of 60 frames so many count.
FRAMES = 60
XY_FRAMES = (20, 30, 40, 50, 60)
Z_FRAMES = (20, 25, 30, 35, 38)
_MOTION_SIZE = 512
# Bytes per damaged byte.
BIT_ERROR = (100000, 50000, 30000, 20000, 10000)
# The generator's film goes forth and back, less the frame they share; its last frame is kept.
_FILM = 2 * FRAMES - 1
_BIT_ERROR_QUALITY = 85


class Noise(NamedTuple):
    """Uniform noise for the photons, normal noise for the electronics."""

    photons: Float[Array, "h w 3"]
    electrons: Float[Array, "h w 3"]


class Move(NamedTuple):
    """How far the camera goes right and down, in pixels of 512 at the nearest depth, and nearer."""

    right: Float[Array, ""]
    down: Float[Array, ""]
    crop: Float[Array, ""]


class Damage(NamedTuple):
    """For the blocks of each of the three planes: uniform noise, and which bit flips."""

    hits: tuple[Float[Array, "rows columns"], ...]
    bits: tuple[Int[Array, "rows columns"], ...]


def depth_from_inverse(inverse: Float[Array, "n h w"]) -> Float[Array, "n h w"]:
    """Depth from a MiDaS network's inverse depth, as the generator scales it for ImageNet."""
    return jnp.clip(1 / (inverse / 512 + 1e-6), 0, 0.5)


def near_focus(image, depth, noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Sharp at the smallest depth, a lens's blur elsewhere."""
    return _refocus(image, depth, severity + NEAR_APERTURE, _NEAR_EDGE)


def far_focus(image, depth, noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Sharp at the far eighth of the image."""
    return _refocus(image, depth, severity + FAR_APERTURE, _FAR_EDGE)


def _refocus(
    image: Float[Array, "h w 3"], depth: Float[Array, "h w"], aperture: float, focus: int
) -> Float[Array, "h w 3"]:
    """Blends Gaussian blurs for the edges between layers of equally many pixels.

    An edge at depth q has sigma aperture |q - f| / q, the circle of confusion; a pixel between two
    edges weighs each by 1 - (distance / thickness)^2.
    """
    edges = jnp.quantile(depth, np.arange(_LAYERS + 1) / _LAYERS)
    edges = edges.at[0].add(-1e-4).at[-1].add(1e-4)
    right = jnp.searchsorted(edges, depth.ravel()).reshape(depth.shape)
    ends = edges[right - 1], edges[right]
    near, far = ((jnp.abs(depth - end) / (ends[1] - ends[0])) ** 2 for end in ends)
    sigmas = aperture * size_ratio(image.shape) * jnp.abs(edges - edges[focus]) / edges
    total = (1 - near) + (1 - far)

    def add(blended, edge):
        number, sigma = edge
        weight = jnp.where(right - 1 == number, 1 - near, jnp.where(right == number, 1 - far, 0))
        rows, columns = (_lens_matrix(length, sigma) for length in depth.shape)
        blurred = along_width(columns, along_height(rows, image))
        return blended + (weight / total)[..., None] * blurred, None

    start = jnp.zeros_like(image)
    return jnp.clip(jax.lax.scan(add, start, (jnp.arange(_LAYERS + 1), sigmas))[0], 0, 1)


def _lens_matrix(length: int, sigma: Float[Array, ""]) -> Float[Array, "length length"]:
    """A Gaussian of 3 sigma width in all (made odd), the edge repeated; none below sigma 0.1.

    At most as wide as reaches over the whole axis.
    """
    step = jnp.arange(1 - length, length)
    width = jnp.floor(3 * sigma)
    reach = jnp.where(sigma < _LEAST_RADIUS, 0, (width - width % 2) / 2)
    safe = jnp.maximum(sigma, _LEAST_RADIUS)
    taps = jnp.where(jnp.abs(step) <= reach, jnp.exp(-0.5 * jnp.square(step / safe)), 0)
    taps = taps / taps.sum()
    places = np.subtract.outer(np.arange(length), np.arange(length)) * -1 + length - 1
    matrix = taps[places]
    # What lies beyond an end reads the pixel there.
    up_to = jnp.cumsum(taps)
    matrix = matrix.at[:, 0].set(up_to[places[:, 0]])
    return matrix.at[:, -1].set(1 - up_to[places[:, -1]] + taps[places[:, -1]])


def fog_3d(image, depth, noise: None, severity: int) -> Float[Array, "h w 3"]:
    """Light is lost with exp(-a depth); what is lost comes from fog as light as the image."""
    through = jnp.exp(-FOG[severity - 1] * depth)[..., None]
    return jnp.clip(through * image + (1 - through) * image.mean(), 0, 1)


def flash(image, depth, noise: None, severity: int, shading=None) -> Float[Array, "h w 3"]:
    """Adds light where a surface faces the camera."""
    shading = shading_from_depth(depth) if shading is None else shading
    return jnp.clip(image + image * shading[..., None] / FLASH[severity - 1], 0, 1)


def shading_from_depth(depth: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Cosine between each surface and its direction to the camera, in [0, 1].

    The camera's focal length is the image's width, as the generator's motions have it.
    """
    height, width = depth.shape
    y, x = np.indices((height, width))
    rays = np.stack([(x - (width - 1) / 2) / width, (y - (height - 1) / 2) / width], -1)
    rays = np.concatenate([rays, np.ones((height, width, 1))], -1).astype(np.float32)
    points = depth[..., None] * rays
    normal = jnp.cross(jnp.gradient(points, axis=1), jnp.gradient(points, axis=0))
    size = jnp.linalg.norm(normal, axis=-1) * np.linalg.norm(rays, axis=-1)
    return jnp.abs((normal * rays).sum(-1)) / jnp.maximum(size, 1e-12)


def draw_noise(key: Array, shape: tuple[int, ...]) -> Noise:
    """Noise of a camera."""
    first, second = jax.random.split(key)
    return Noise(jax.random.uniform(first, shape), jax.random.normal(second, shape))


def low_light(image, depth, noise: Noise, severity: int) -> Float[Array, "h w 3"]:
    """Darkened with gamma 2, the range stretched to [0, c] before, and a camera's noise."""
    least, most = image.min(), image.max()
    stretched = (image - least) / jnp.maximum(most - least, 1e-6)
    dark = LOW_LIGHT[severity - 1] * jnp.square(stretched)
    seen = photons(dark, noise.photons, _LOW_LIGHT_PHOTONS)
    return jnp.clip(seen + _LOW_LIGHT_SCALE * noise.electrons, 0, 1)


def iso_noise(image, depth, noise: Noise, severity: int) -> Float[Array, "h w 3"]:
    """Photons at one rate, electronic noise that grows with the severity."""
    seen = photons(image, noise.photons, _ISO_PHOTONS)
    return jnp.clip(seen + ISO_SCALES[severity - 1] * noise.electrons, 0, 1)


def color_quant(image, depth, noise: None, severity: int) -> Float[Array, "h w 3"]:
    """The 5 to 1 highest bits of 8."""
    step = 2 ** (8 - COLOUR_BITS[severity - 1])
    return jnp.floor(jnp.round(image * 255) / step) * (step / 255)


def draw_xy_motion_blur(key: Array, shape: tuple[int, ...]) -> Move:
    """Whole pixels: 50 to 74 right (or -75 to -51 the other way), -75 to 74 down."""
    keys = jax.random.split(key, 3)
    right = jax.random.randint(keys[0], (), 50, 75)
    right = jnp.where(jax.random.bernoulli(keys[1]), right - 125, right)
    down = jax.random.randint(keys[2], (), -75, 75)
    return Move(right.astype(jnp.float32), down.astype(jnp.float32), jnp.float32(1))


def draw_z_motion_blur(key: Array, shape: tuple[int, ...]) -> Move:
    """-30 to 29 pixels right and down, and so near that 0.5 to 0.6 of the width is seen."""
    keys = jax.random.split(key, 3)
    right, down = (jax.random.randint(one, (), -30, 30).astype(jnp.float32) for one in keys[:2])
    return Move(right, down, jax.random.uniform(keys[2], minval=0.5, maxval=0.6))


def xy_motion_blur(image, depth, move: Move, severity: int) -> Float[Array, "h w 3"]:
    """Mean of the frames of a camera that moves sideways."""
    return _mean_frame(image, depth, move, XY_FRAMES[severity - 1])


def z_motion_blur(image, depth, move: Move, severity: int) -> Float[Array, "h w 3"]:
    """Mean of the frames of a camera that moves forward."""
    return _mean_frame(image, depth, move, Z_FRAMES[severity - 1])


def _mean_frame(image, depth, move: Move, frames: int) -> Float[Array, "h w 3"]:
    def add(total, part):
        return total + camera_frame(image, depth, move, part), None

    parts = jnp.linspace(0, 1, FRAMES)[:frames]
    return jax.lax.scan(add, jnp.zeros_like(image), parts)[0] / frames


def camera_frame(
    image: Float[Array, "h w 3"], depth: Float[Array, "h w"], move: Move, part: Float[Array, ""]
) -> Float[Array, "h w 3"]:
    """What the camera sees after a `part` of its move.

    With n the nearest depth in the middle of the image, the camera is n (1 - crop) nearer, and a
    point at depth n, then c = n crop, has moved by the shift s. So a point at p from the middle and
    depth z is seen at (p z - s c) / (z - n + c). The other way around, a pixel at q is of
    p = (q (z - n + c) + s c) / z, where z is the depth at p: guessed at q, then read at the last p.
    """
    height, width = depth.shape
    scale = min(height, width) / _MOTION_SIZE
    crop = 1 - part * (1 - move.crop)
    nearest = depth[height // 4 : -(height // 4), width // 4 : -(width // 4)].min()
    after = nearest * crop
    shift = part * scale * jnp.stack([move.down, move.right])
    middle = (height - 1) / 2, (width - 1) / 2
    rows, columns = np.indices((height, width))
    seen = jnp.stack([rows - middle[0], columns - middle[1]]).astype(jnp.float32)

    def source(at_source: Float[Array, "h w"]) -> Float[Array, "2 h w"]:
        # Nothing comes nearer than a twentieth of the nearest depth, or goes behind the camera.
        at_camera = jnp.maximum(at_source - nearest + after, 0.05 * nearest)
        return (seen * at_camera + shift[:, None, None] * after) / at_source

    place = source(depth)
    for _ in range(2):
        y = jnp.round(place[0] + middle[0]).astype(jnp.int32).clip(0, height - 1)
        x = jnp.round(place[1] + middle[1]).astype(jnp.int32).clip(0, width - 1)
        place = source(depth.ravel()[y * width + x])
    return sample(image, place[0] + middle[0], place[1] + middle[1], "nearest")


def draw_bit_error(key: Array, shape: tuple[int, ...]) -> Damage:
    """Draws for each block of 8 x 8 of each plane, chroma of half the size."""
    height, width = (-(-length // 16) for length in shape[:2])
    luma = (-(-(shape[0] + shape[0] % 2) // 8), 2 * width)
    sizes = (luma, (height, width), (height, width))
    keys = jax.random.split(key, 6)
    hits = tuple(jax.random.uniform(keys[i], size) for i, size in enumerate(sizes))
    bits = tuple(jax.random.randint(keys[3 + i], size, 0, 8) for i, size in enumerate(sizes))
    return Damage(hits, bits)


def bit_error(image, depth, damage: Damage, severity: int) -> Float[Array, "h w 3"]:
    """Flipped bits in a compressed image.

    A model of ours of what the generator does to an H.264 film with ffmpeg, one byte in 100,000 to
    10,000, keeping the last of 119 frames, into which damage of all before goes. Here a block of
    8 x 8 counts as a byte a frame, and a hit flips a bit of its mean. Compression stores the
    difference to the block before, so that the rest of the row of blocks is off too, as in the film
    the rest of a slice is.
    """
    share = _FILM / BIT_ERROR[severity - 1]
    of_luma, of_chroma = quantisation_tables(_BIT_ERROR_QUALITY)
    planes = to_planes(jnp.round(image * 255).astype(jnp.int32))
    damaged = []
    for plane, table, hits, bits in zip(
        planes, (of_luma, of_chroma, of_chroma), damage.hits, damage.bits, strict=True
    ):
        coefficients = to_coefficients(plane, table)
        means = coefficients[0, 0]
        steps = jnp.diff(means, axis=1, prepend=0)
        steps = jnp.where(hits < share, steps ^ (1 << bits), steps)
        coefficients = coefficients.at[0, 0].set(jnp.cumsum(steps, axis=1))
        damaged.append(from_coefficients(coefficients, table))
    return from_planes(*damaged, image.shape[:2])
