"""Common corruptions on the device: all 19 of ImageNet-C, and 3D Common Corruptions.

ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) is 15 corruptions to test on and 4 more
to tune on, at severities 1 to 5. Its generator makes 224 x 224 pictures one by one with five
libraries and no seed. Here a batch of images of any size is one program, keyed: image i depends on
fold_in(key, i) and on itself, not on the batch. At 224 pixels the parameters are the published
ones; lengths in pixels scale with the shorter side.

The released pictures were cut to 8 bits and saved as JPEG of quality 85, which lowers accuracy on
some corruptions markedly: `released=True` does both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsynth.robustness.checks import check_images, check_key, check_whole
from jaxsynth.robustness.corruptions import blur as blurs
from jaxsynth.robustness.corruptions import common_3d as three_d
from jaxsynth.robustness.corruptions import digital, weather
from jaxsynth.robustness.corruptions import noise as noises
from jaxsynth.robustness.corruptions.filters import draw_plasma
from jaxsynth.robustness.corruptions.jpeg import jpeg, jpeg_by_pillow

SEVERITIES = (1, 2, 3, 4, 5)
# Below it a glass blur has no pixel to move, and zooms nothing to enlarge.
LEAST_SIZE = 16
_RELEASED_QUALITY = 85
# Depths divide.
_LEAST_DEPTH = 1e-6


class Corruption(NamedTuple):
    """`draw(key, shape)` makes the randomness, if any; `apply` uses it on one image."""

    draw: Callable[..., Any] | None
    apply: Callable[..., Any]


# The 15 of the test set, in its order.
TEST_CORRUPTIONS = {
    "gaussian_noise": Corruption(noises.draw_normal, noises.gaussian_noise),
    "shot_noise": Corruption(noises.draw_uniform, noises.shot_noise),
    "impulse_noise": Corruption(noises.draw_uniform, noises.impulse_noise),
    "defocus_blur": Corruption(None, blurs.defocus_blur),
    "glass_blur": Corruption(blurs.draw_glass_blur, blurs.glass_blur),
    "motion_blur": Corruption(blurs.draw_motion_blur, blurs.motion_blur),
    "zoom_blur": Corruption(None, blurs.zoom_blur),
    "snow": Corruption(weather.draw_snow, weather.snow),
    "frost": Corruption(weather.draw_frost, weather.frost),
    "fog": Corruption(draw_plasma, weather.fog),
    "brightness": Corruption(None, digital.brightness),
    "contrast": Corruption(None, digital.contrast),
    "elastic_transform": Corruption(digital.draw_elastic_transform, digital.elastic_transform),
    "pixelate": Corruption(None, digital.pixelate),
    "jpeg_compression": Corruption(None, digital.jpeg_compression),
}
# The 4 that validation may use.
EXTRA_CORRUPTIONS = {
    "speckle_noise": Corruption(noises.draw_normal, noises.speckle_noise),
    "gaussian_blur": Corruption(None, blurs.blur),
    "spatter": Corruption(weather.draw_spatter, weather.spatter),
    "saturate": Corruption(None, digital.saturate),
}
CORRUPTIONS = TEST_CORRUPTIONS | EXTRA_CORRUPTIONS
# Those of 3D Common Corruptions, less the two of a video codec (`corruption_codec`).
CORRUPTIONS_3D = {
    "near_focus": Corruption(None, three_d.near_focus),
    "far_focus": Corruption(None, three_d.far_focus),
    "fog_3d": Corruption(None, three_d.fog_3d),
    "flash": Corruption(None, three_d.flash),
    "color_quant": Corruption(None, three_d.color_quant),
    "low_light": Corruption(three_d.draw_noise, three_d.low_light),
    "xy_motion_blur": Corruption(three_d.draw_xy_motion_blur, three_d.xy_motion_blur),
    "z_motion_blur": Corruption(three_d.draw_z_motion_blur, three_d.z_motion_blur),
    "iso_noise": Corruption(three_d.draw_noise, three_d.iso_noise),
    "bit_error": Corruption(three_d.draw_bit_error, three_d.bit_error),
}


def corrupt(
    name: str,
    images: Float[Array, "n h w 3"],
    severity: int,
    key: Array,
    *,
    first: int = 0,
    textures: Float[Array, "k a b 3"] | None = None,
    released: bool = False,
) -> Float[Array, "n h w 3"]:
    """Images in [0, 1] under one of the 19 `CORRUPTIONS`, at a severity of 1 to 5.

    Image i is made with fold_in(key, `first` + i): with `first` the number of images before a
    batch, a set does not depend on how it is cut into batches. `textures` are photographs for
    "frost", in [0, 1] and larger than the images; without them ice is made up (`frost_texture`).
    `released` cuts to 8 bits and saves as JPEG of quality 85 as the released set is. ValueError for
    an unknown name, a severity that is not 1 to 5, other images, or textures that do not fit.
    """
    images, severity = _checked(name, CORRUPTIONS, images, severity, key)
    if textures is not None:
        textures = _checked_textures(name, textures, images.shape)
    first = check_whole(first, "first", 0)
    if not _on_host(images):
        draws = _draws(key, first, CORRUPTIONS[name].draw, images.shape)
        return _corrupt(images, draws, textures, name, severity, released)
    if name == "jpeg_compression":
        moved = jpeg_by_pillow(np.asarray(images), digital.QUALITY[severity - 1])
    else:
        draws = _draws(key, first, CORRUPTIONS[name].draw, images.shape)
        moved = _corrupt(images, draws, textures, name, severity, False)
    moved = jax.device_put(moved, images.sharding)
    return all_released(moved) if released else moved


def corrupt_3d(
    name: str,
    images: Float[Array, "n h w 3"],
    depth: Float[Array, "n h w"],
    severity: int,
    key: Array,
    *,
    first: int = 0,
    shading: Float[Array, "n h w"] | None = None,
    released: bool = False,
) -> Float[Array, "n h w 3"]:
    """Images in [0, 1] under one of the `CORRUPTIONS_3D`, given how deep each pixel lies.

    `depth` is 1e-6 or more, in the generator's units, where 0.5 is far: `depth_from_inverse` makes
    it of a MiDaS network's output. `shading` in [0, 1] is for "flash". The rest as in `corrupt`.
    """
    images, severity = _checked(name, CORRUPTIONS_3D, images, severity, key)
    depth = _checked_map(depth, "depth", images.shape, (_LEAST_DEPTH, np.inf))
    if shading is not None:
        if name != "flash":
            raise ValueError(f"shading: given for {name}, used by flash only")
        shading = _checked_map(shading, "shading", images.shape, (0, 1))
    first = check_whole(first, "first", 0)
    draws = _draws(key, first, CORRUPTIONS_3D[name].draw, images.shape)
    if not released or not _on_host(images):
        return _corrupt_3d(images, depth, draws, shading, name, severity, released)
    return all_released(_corrupt_3d(images, depth, draws, shading, name, severity, False))


def program_memory(name: str, shape: tuple[int, ...], severity: int) -> int:
    """Bytes that one of the 19 takes for images of a `shape` besides them and its randomness."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    draws = jax.eval_shape(
        lambda key: _draws(key, 0, CORRUPTIONS[name].draw, shape), jax.random.key(0)
    )
    found = _corrupt.lower(images, draws, None, name, severity, False).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def to_released(image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """An image in [0, 1] cut to 8 bits and saved as JPEG, as the released set is."""
    # Cutting what was 8 bits before must not lose a level to rounding.
    return jpeg(jnp.floor(image * 255 + 1e-3) / 255, _RELEASED_QUALITY)


def all_released(images: Float[Array, "n h w 3"]) -> Float[Array, "n h w 3"]:
    """`to_released` of each image, on a CPU by libjpeg."""
    if not _on_host(images):
        return jax.vmap(to_released)(images)
    cut = np.floor(np.asarray(images) * np.float32(255) + np.float32(1e-3)) / np.float32(255)
    return jax.device_put(jpeg_by_pillow(cut, _RELEASED_QUALITY), images.sharding)


def _on_host(images: Array) -> bool:
    """Whether Pillow can have the images without a copy to it: not while a program is traced."""
    if isinstance(images, jax.core.Tracer) or not images.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in images.devices())


# A program of its own, which severities and corruptions of the same randomness share.
@partial(jax.jit, static_argnames=("draw", "shape"))
def _draws(key, first, draw, shape):
    if draw is None:
        return None
    numbers = first + jnp.arange(shape[0])
    return jax.vmap(lambda number: draw(jax.random.fold_in(key, number), shape[1:]))(numbers)


@partial(jax.jit, static_argnames=("name", "severity", "released"))
def _corrupt(images, draws, textures, name, severity, released):
    more = {} if textures is None else {"textures": textures}

    def one(image, draws):
        found = CORRUPTIONS[name].apply(jnp.clip(image, 0, 1), draws, severity, **more)
        return to_released(found) if released else found

    if jax.default_backend() == "cpu":
        # One after the other, so that what is between an image's operations stays in the cache.
        return jax.lax.map(lambda parts: one(*parts), (images, draws))
    return jax.vmap(one)(images, draws)


@partial(jax.jit, static_argnames=("name", "severity", "released"))
def _corrupt_3d(images, depth, draws, shading, name, severity, released):
    def one(image, depth, draws, shading):
        more = {} if shading is None else {"shading": shading}
        image = jnp.clip(image, 0, 1)
        found = CORRUPTIONS_3D[name].apply(image, depth, draws, severity, **more)
        return to_released(found) if released else found

    return jax.vmap(one)(images, depth, draws, shading)


def _checked(
    name: str, known: dict[str, Corruption], images: Any, severity: Any, key: Any
) -> tuple[Array, int]:
    if name not in known:
        raise ValueError(f"corruption {name!r}: expected one of {', '.join(known)}")
    severity = check_whole(severity, "severity", SEVERITIES[0], SEVERITIES[-1])
    check_key(key, single=True)
    images = check_images(images)
    if images.shape[-1] != 3 or min(images.shape[1:3]) < LEAST_SIZE:
        raise ValueError(
            f"images: expected three channels and sides of {LEAST_SIZE} pixels or more, found "
            f"shape {images.shape}"
        )
    return images, severity


def _checked_textures(name: str, textures: Any, shape: tuple[int, ...]) -> Array:
    if name != "frost":
        raise ValueError(f"textures: given for {name}, used by frost only")
    textures = check_images(textures, "textures")
    if textures.shape[-1] != 3 or any(
        have <= need for have, need in zip(textures.shape[1:3], shape[1:3], strict=True)
    ):
        raise ValueError(
            f"textures: expected (count, height, width, 3) larger than {shape[1:3]}, found shape "
            f"{textures.shape}"
        )
    return textures


def _checked_map(
    values: Any, name: str, shape: tuple[int, ...], bounds: tuple[float, float]
) -> Array:
    if np.shape(values) != shape[:3]:
        raise ValueError(f"{name}: expected shape {shape[:3]}, found {np.shape(values)}")
    if not isinstance(values, jax.core.Tracer):
        found = np.asarray(values)
        low, high = bounds
        if not (np.isfinite(found).all() and low <= found.min() and found.max() <= high):
            raise ValueError(
                f"{name}: expected finite numbers from {low:g} to {high:g}, found {found.min():g} "
                f"to {found.max():g}"
            )
    return jnp.asarray(values, jnp.float32)
