"""Augmentation inside a compiled training step, for images that lie on the devices.

The same recipe (`augment.Augment`) as on the host, of the operations that are cheap as array
arithmetic: random resized crop, flip, brightness, contrast, saturation, grey and solarize. A crop
is two small matrix products an image, bilinear with antialiasing where it shrinks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxsynth.data.pipeline.augment import Augment

# Luma of ITU-R BT.601, which PIL's grey images are made by.
_GREY = (0.299, 0.587, 0.114)


# The host's defaults as far as they are done here.
ON_DEVICE = Augment(randaugment_ops=0, jitter=(0.4, 0.4, 0.2, 0.0), blur_p=0.0)


def check_on_device(recipe: Augment) -> Augment:
    """The recipe itself; ValueError naming an operation that is done on the host only."""
    for name, value in (
        ("randaugment_ops", recipe.randaugment_ops),
        ("blur_p", recipe.blur_p),
        ("jitter (hue)", recipe.jitter_p and recipe.jitter[3]),
    ):
        if value:
            raise ValueError(
                f"augment.{name}: {value}, but images on the device are augmented without it; "
                "expected 0"
            )
    return recipe


def augmented(
    images: UInt8[Array, "b h w 3"],
    key: PRNGKeyArray,
    recipe: Augment,
    size: int,
) -> Float[Array, "b size size 3"]:
    """A random version of each image, `size` pixels wide, float32 in [0, 1].

    The randomness of image i follows from `key` and i alone.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    return jax.vmap(lambda image, own: _one(image, own, recipe, size))(images, keys)


def _one(image: Array, key: Array, recipe: Augment, size: int) -> Array:
    crop_key, flip_key, jitter_key, grey_key, solarize_key = jax.random.split(key, 5)
    pixels = image.astype(jnp.float32) / 255
    height, width = image.shape[:2]
    if recipe.crop:
        top, left, tall, wide = _box(crop_key, height, width, recipe)
        mirror = jax.random.bernoulli(flip_key, recipe.flip_p)
        rows = _resizing(top, tall, height, size)
        columns = _resizing(left, wide, width, size)
        columns = jnp.where(mirror, columns[::-1], columns)
        pixels = jnp.einsum("ih,hwc->iwc", rows, pixels)
        pixels = jnp.einsum("jw,iwc->ijc", columns, pixels)
    else:
        if (height, width) != (size, size):
            rows, columns = (_resizing(0.0, side, side, size) for side in (height, width))
            pixels = jnp.einsum("ih,jw,hwc->ijc", rows, columns, pixels)
        mirror = jax.random.bernoulli(flip_key, recipe.flip_p)
        pixels = jnp.where(mirror, pixels[:, ::-1], pixels)
    if recipe.jitter_p:
        jittered = _jittered(pixels, jitter_key, recipe.jitter[:3])
        gate = jax.random.bernoulli(jax.random.fold_in(jitter_key, 3), recipe.jitter_p)
        pixels = jnp.where(gate, jittered, pixels)
    if recipe.gray_p:
        gate = jax.random.bernoulli(grey_key, recipe.gray_p)
        pixels = jnp.where(gate, _grey(pixels), pixels)
    if recipe.solarize_p:
        gate = jax.random.bernoulli(solarize_key, recipe.solarize_p)
        pixels = jnp.where(gate & (pixels >= 128 / 255), 1 - pixels, pixels)
    return jnp.clip(pixels, 0, 1)


def _box(key: Array, height: int, width: int, recipe: Augment) -> tuple[Array, ...]:
    """(top, left, height, width) in pixels, fractions of them too.

    Where torchvision draws again a box that does not fit, its longer side is cut here.
    """
    area_key, shape_key, y_key, x_key = jax.random.split(key, 4)
    low, high = recipe.crop_scale
    area = height * width * jax.random.uniform(area_key, minval=low, maxval=high)
    low, high = (jnp.log(value) for value in recipe.crop_ratio)
    aspect = jnp.exp(jax.random.uniform(shape_key, minval=low, maxval=high))
    wide = jnp.minimum(jnp.sqrt(area * aspect), width)
    tall = jnp.minimum(jnp.sqrt(area / aspect), height)
    top = (height - tall) * jax.random.uniform(y_key)
    left = (width - wide) * jax.random.uniform(x_key)
    return top, left, tall, wide


def _resizing(start, length, full: int, size: int) -> Float[Array, "size full"]:
    """The weights of the pixels from `start` on in each of `size` new ones (triangle filter)."""
    step = length / size
    centres = start + (jnp.arange(size) + 0.5) * step - 0.5
    reach = jnp.maximum(step, 1.0)
    weights = jax.nn.relu(1 - jnp.abs(centres[:, None] - jnp.arange(full)[None]) / reach)
    return weights / weights.sum(1, keepdims=True)


def _jittered(pixels: Array, key: Array, strengths) -> Array:
    """Brightness, contrast and saturation by random factors, in this order."""
    brightness, contrast, saturation = (
        jax.random.uniform(jax.random.fold_in(key, i), minval=max(0.0, 1 - s), maxval=1 + s)
        for i, s in enumerate(strengths)
    )
    pixels = jnp.clip(pixels * brightness, 0, 1)
    mean = _grey(pixels).mean()
    pixels = jnp.clip(mean + contrast * (pixels - mean), 0, 1)
    grey = _grey(pixels)
    return jnp.clip(grey + saturation * (pixels - grey), 0, 1)


def _grey(pixels: Array) -> Array:
    return (pixels @ jnp.asarray(_GREY))[..., None] * jnp.ones(3)
