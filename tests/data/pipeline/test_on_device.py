"""Augmentation on the device: what each operation does to a picture, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsynth.data.pipeline.augment import RECIPES, Augment
from jaxsynth.data.pipeline.on_device import augmented, check_on_device

NONE = RECIPES["none"]


def pictures(count: int = 8, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def recipe(**fields) -> Augment:
    return Augment(**{name: getattr(NONE, name) for name in NONE.__dataclass_fields__} | fields)


def test_without_operations_images_stay_and_other_sizes_are_resized(key):
    images = pictures()
    found = augmented(jnp.asarray(images), key, NONE, 16)
    np.testing.assert_allclose(found, images / 255, atol=1e-6)
    smaller = np.asarray(augmented(jnp.asarray(images), key, NONE, 8))
    wanted = np.asarray(Image.fromarray(images[0]).resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(255 * smaller[0], wanted, atol=1.0)


def test_a_crop_is_pillows_of_its_box(key):
    """A ramp tells the box of a crop, which Pillow then resizes to the same pixels."""
    ramp = np.repeat(np.linspace(0, 255, 32).round().astype(np.uint8)[None], 32, 0)
    image = np.stack([ramp, ramp.T, ramp], -1)
    found = np.asarray(
        augmented(jnp.asarray(image[None]), key, recipe(crop=True, crop_scale=(0.2, 0.4)), 16)
    )[0]
    # Inside the box the ramp is a ramp: its ends tell where it began and how far it reached.
    columns, rows = found[8, :, 0], found[:, 8, 1]
    for line in (columns, rows):
        steps = np.diff(line)
        assert (steps > 0).all() and np.ptp(steps) < 0.01
    width, height = (np.ptp(line) * 31 * 16 / 15 for line in (columns, rows))
    assert 0.2 - 0.03 < width * height / 32**2 < 0.4 + 0.03
    assert 3 / 4 - 0.05 < width / height < 4 / 3 + 0.05


def test_flip_grey_and_solarize(key):
    images = jnp.asarray(pictures())
    plain = np.asarray(images) / 255
    flipped = augmented(images, key, recipe(flip_p=1.0), 16)
    np.testing.assert_allclose(flipped, plain[:, :, ::-1], atol=1e-6)
    grey = np.asarray(augmented(images, key, recipe(gray_p=1.0), 16))
    luma = np.asarray([Image.fromarray(x).convert("L") for x in np.asarray(images)])
    np.testing.assert_allclose(255 * grey, np.repeat(luma[..., None], 3, -1), atol=1.0)
    solarized = augmented(images, key, recipe(solarize_p=1.0), 16)
    wanted = np.where(np.asarray(images) >= 128, 255 - np.asarray(images), images) / 255
    np.testing.assert_allclose(solarized, wanted, atol=1e-6)


def test_jitter_moves_each_image_by_its_own_factors_and_follows_from_the_key():
    images = jnp.asarray(np.full((6, 4, 4, 3), 100, np.uint8))
    bright = recipe(jitter_p=1.0, jitter=(0.5, 0.0, 0.0, 0.0))
    found = np.asarray(augmented(images, jax.random.key(1), bright, 4))
    factors = found[:, 0, 0, 0] * 255 / 100
    assert len(set(factors.round(4))) == 6 and factors.min() >= 0.5 and factors.max() <= 1.5
    np.testing.assert_array_equal(found, augmented(images, jax.random.key(1), bright, 4))
    # An image's randomness does not depend on how many there are.
    np.testing.assert_allclose(augmented(images[:2], jax.random.key(1), bright, 4), found[:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"randaugment_ops": 2}, r"augment\.randaugment_ops: 2"),
        ({"blur_p": 0.1}, r"augment\.blur_p: 0.1"),
        ({"jitter_p": 0.5}, r"augment\.jitter \(hue\)"),
    ],
)
def test_what_the_host_alone_does_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_on_device(recipe(**fields))
