"""Buckets of aspect ratios: their shapes, which image is in which, and where an image is cut."""

import math

import numpy as np
import pytest
from PIL import Image

from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import source_conditions
from jaxsynth.data.pipeline.augment import DiffusionTransform
from jaxsynth.data.pipeline.buckets import BucketConfig, buckets_of, cut
from jaxsynth.data.sources.arrays import ArraySource, Cached
from jaxsynth.data.views import Subset

ON = BucketConfig(enabled=True)


def photos(sides, seed=0):
    """Random images of these (height, width)."""
    rng = np.random.default_rng(seed)
    shapes = np.asarray(sides, np.int32)
    pixels = rng.integers(0, 256, 3 * int(shapes.prod(1).sum()), dtype=np.uint8)
    names = tuple(f"{i}.jpg" for i in range(len(sides)))
    return Cached(pixels, shapes, np.zeros(len(sides), np.int32), names)


@pytest.mark.parametrize(
    ("size", "factor", "step", "ends"),
    [(512, 64, 64, (256, 1024)), (1024, 32, 64, (512, 2048)), (32, 8, 8, (16, 64))],
)
def test_shapes_are_steps_and_never_larger_than_the_square(size, factor, step, ends):
    shapes = ON.shapes(size, factor)
    assert shapes[0] == (size, size) and len(set(shapes)) == len(shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    sides = [side for shape in shapes for side in shape]
    assert (min(sides), max(sides)) == ends and not any(side % step for side in sides)
    for height, width in shapes:
        assert height * width <= size**2
        # No more fits beside the shorter side.
        long, short = max(height, width), min(height, width)
        assert long == size == short or (short + step) * long > size**2 or short == ends[1]


def test_each_image_is_in_the_nearest_shape_and_none_is_lost():
    """Against a reference that looks at one image after the other."""
    rng = np.random.default_rng(1)
    source = photos(rng.integers(4, 40, (60, 2)))
    shapes = ON.shapes(512, 64)
    buckets = buckets_of(source, shapes)
    rows = np.concatenate([one.rows for one in buckets])
    assert sorted(rows) == list(range(60)) and all(len(one.rows) for one in buckets)
    for one in buckets:
        for row in one.rows:
            height, width = source[row].image.shape[:2]
            found = [abs(math.log(width / height) - math.log(w / h)) for h, w in shapes]
            assert found[shapes.index(one.shape)] == pytest.approx(min(found), abs=1e-8)
    # As wide as one shape is high: as near to the square from either side.
    mirrored = buckets_of(photos([(20, 10), (10, 20), (10, 10)]), shapes)
    assert [one.shape for one in mirrored[:1]] == [(512, 512)]
    assert mirrored[1].shape == mirrored[2].shape[::-1]


def test_the_rarest_shapes_give_their_images_to_the_nearest_others():
    sides = [(8, 8)] * 4 + [(8, 16)] * 3 + [(8, 12)] * 2 + [(16, 8)]
    shapes = [(32, 32), (24, 40), (40, 24), (16, 32), (32, 16)]
    found = buckets_of(photos(sides), shapes, most=2)
    assert [one.shape for one in found] == [(32, 32), (16, 32)]
    np.testing.assert_array_equal(found[0].rows, [0, 1, 2, 3, 9])
    np.testing.assert_array_equal(found[1].rows, [4, 5, 6, 7, 8])
    (only,) = buckets_of(photos(sides), shapes, most=1)
    assert only.shape == (32, 32) and len(only.rows) == 10


def test_a_square_image_is_cut_as_without_buckets():
    for image in (photos([(20, 20)])[0].image, photos([(8, 8)])[0].image):
        pixels, corner = cut(image, 8, 8)
        expected, own = DiffusionTransform(8, random_crop=False).cut(image)
        np.testing.assert_array_equal(pixels, expected)
        assert corner == own == (0, 0)


def test_an_image_covers_its_shape_and_masks_follow():
    """A frame twice as wide as high in a shape of 3:2: its sides are cut, as much left as right."""
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 255
    pixels, corner = cut(image, 16, 24)
    assert pixels.shape == (16, 24, 3) and corner == (0, 4)
    resized = Image.fromarray(image).resize((32, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels, np.asarray(resized, np.float32)[:, 4:28] / 127.5 - 1)
    source = ArraySource(image[None], np.zeros(1, np.int32), ["a"], {"mask": image[None, ..., 0]})
    masks = source_conditions(Subset(source, [0]), "mask", (16, 24))
    assert masks.shape == (1, 16, 24, 1)
    np.testing.assert_allclose(masks[0], (pixels[..., :1] + 1) / 2, atol=1 / 255)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"step": 12}, "step: 12, expected a multiple of 8 for this base, such as 16"),
        ({"step": 64}, "step: 64, expected at most image_size = 32"),
        ({"min_side": 20}, "min_side: 20, expected a multiple of step = 8, such as 24"),
        ({"max_side": 60}, "max_side: 60, expected a multiple of step = 8, such as 64"),
        ({"min_side": 40}, "min_side: 40, expected at most image_size = 32"),
        ({"max_side": 24}, "max_side: 24, expected at least image_size = 32"),
    ],
)
def test_sides_that_do_not_suit_the_base_are_named(fields, words):
    with pytest.raises(UserError) as error:
        BucketConfig(enabled=True, **fields).shapes(32, 8)
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enabled": True, "min_side": 64, "max_side": 32}, "min_side: 64 is above max_side = 32"),
        ({"step": 8}, "step: 8, but images are cut to squares; set enabled=true"),
        ({"enabled": True, "most": 0}, "most"),
    ],
)
def test_fields_that_do_not_go_together_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        BucketConfig(**fields)
