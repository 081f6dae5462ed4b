"""3D Common Corruptions against their formulas, and where geometry tells the answer."""

import sys

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import ndimage

from jaxsynth.core.errors import UserError
from jaxsynth.robustness.corruptions import common_3d as three_d
from jaxsynth.robustness.corruptions.codec import CODEC_CORRUPTIONS, corrupt_by_codec
from jaxsynth.robustness.corruptions.registry import CORRUPTIONS_3D, corrupt_3d
from tests.robustness import corruption_reference as reference

SIZE = 96
RATIO = SIZE / 224


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE, 3)), (2, 2, 0))
    image = (image - image.min()) / (image.max() - image.min())
    return np.round(image * 255).astype(np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def depth() -> np.ndarray:
    """A wall that recedes to the right, and something before it."""
    x = np.linspace(0.1, 0.45, SIZE, dtype=np.float32)
    depth = np.tile(x, (SIZE, 1)) + np.linspace(0, 0.01, SIZE, dtype=np.float32)[:, None]
    depth[30:60, 20:50] = 0.06
    return depth


def test_fog_takes_light_with_distance(image, depth):
    for severity, amount in enumerate((4, 8, 12, 16, 20), 1):
        through = np.exp(-amount * depth)[..., None]
        expected = through * image + (1 - through) * image.mean()
        np.testing.assert_allclose(
            three_d.fog_3d(image, depth, None, severity), expected, atol=1e-5
        )


def test_flash_adds_reshaded_light(image, depth):
    shading = np.random.default_rng(1).random((SIZE, SIZE)).astype(np.float32)
    for severity, divisor in enumerate((2.4, 1.4, 0.9, 0.6, 0.4), 1):
        expected = np.clip(image + image * shading[..., None] / divisor, 0, 1)
        found = three_d.flash(image, depth, None, severity, shading)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_shading_is_the_cosine_to_the_camera():
    # A wall across the view: the cosine of each ray with the axis, 1 in the middle.
    flat = np.asarray(three_d.shading_from_depth(np.full((31, 31), 0.2, np.float32)))
    y, x = (np.mgrid[:31, :31] - 15) / 31
    np.testing.assert_allclose(flat, 1 / np.sqrt(1 + x**2 + y**2), atol=1e-4)
    # Turned by 45 degrees, z = 1 + X: in the middle cos 45.
    turned = (1 / (1 - x)).astype(np.float32)
    middle = np.asarray(three_d.shading_from_depth(turned))[15, 15]
    assert middle == pytest.approx(np.sqrt(0.5), abs=0.01)


def test_colours_are_posterised(image, depth):
    picture = Image.fromarray(np.uint8(np.round(image * 255)))
    for severity in range(1, 6):
        expected = np.asarray(ImageOps.posterize(picture, 6 - severity)) / 255
        found = three_d.color_quant(image, depth, None, severity)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_camera_noises(image, depth):
    """A uniform number on a step of the cumulative probability gives the next count: 1 in 1000."""
    noise = three_d.draw_noise(jax.random.key(0), image.shape)
    uniform, normal = (np.asarray(part, np.float64) for part in noise)
    stretched = (image - image.min()) / (image.max() - image.min())
    for severity, least in ((2, 0.5), (5, 0.2)):
        seen = reference.poisson(least * stretched.astype(np.float64) ** 2, uniform, 120)
        found = three_d.low_light(image, depth, noise, severity)
        beyond = np.abs(found - np.clip(seen + 0.018 * normal, 0, 1)) > 1e-5
        assert beyond.mean() < 1e-3
    for severity, scale in ((1, 0.056), (5, 0.266)):
        seen = reference.poisson(image.astype(np.float64), uniform, 25)
        found = three_d.iso_noise(image, depth, noise, severity)
        beyond = np.abs(found - np.clip(seen + scale * normal, 0, 1)) > 1e-5
        assert beyond.mean() < 1e-3


@pytest.mark.parametrize(("name", "severity"), [("near_focus", 5), ("far_focus", 1)])
def test_focus_blends_blurs_by_depth(name, severity, image, depth):
    edges = np.quantile(depth.astype(np.float64), np.arange(9) / 8)
    edges += np.array([-1e-4, *[0] * 7, 1e-4])
    near = name == "near_focus"
    aperture = (severity + 2 if near else severity + 2 - 1.5) * RATIO
    focus = edges[0 if near else 7]
    total, weights = np.zeros(image.shape), np.zeros((SIZE, SIZE))
    right = np.clip(np.searchsorted(edges, depth), 1, 8)
    for number, edge in enumerate(edges):
        sigma = aperture * abs(edge - focus) / edge
        blurred = image.astype(np.float64)
        if sigma >= 0.1:
            width = int(3 * sigma)
            reach = (width + 1 - width % 2) // 2
            taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
            for axis in (0, 1):
                blurred = ndimage.correlate1d(blurred, taps / taps.sum(), axis, mode="nearest")
        for mine, other in ((right - 1, right), (right, right - 1)):
            thickness = np.abs(edges[other] - edges[mine])
            weight = np.where(mine == number, 1 - ((depth - edges[mine]) / thickness) ** 2, 0)
            total += weight[..., None] * blurred
            weights += weight
    found = np.asarray(CORRUPTIONS_3D[name].apply(image, depth, None, severity))
    beyond = np.abs(found - total / weights[..., None]) > 1e-3
    # Pixels as deep as an edge are of either layer.
    assert beyond.mean() < 5e-3
    sharp = depth < edges[1] if near else (depth > edges[6]) & (depth < edges[8])
    change = np.abs(found - image).mean(-1)
    assert change[sharp].mean() < 0.5 * change[~sharp].mean()


def test_camera_that_moves_before_a_wall(image):
    wall = np.full((SIZE, SIZE), 0.3, np.float32)
    inside = np.s_[20:-20, 20:-20]
    # 512 pixels of the generator's are 96 here: whole pixels.
    move = three_d.Move(*np.float32([512 / SIZE * 8, 512 / SIZE * -5, 1]))
    # The picture moves left by 8, down by 5.
    found = np.asarray(three_d.camera_frame(image, wall, move, np.float32(1)))
    np.testing.assert_allclose(found[inside], np.roll(image, (5, -8), (0, 1))[inside], atol=1e-4)
    # Half of the width seen: enlarged twice about the middle.
    move = three_d.Move(*np.float32([0, 0, 0.5]))
    found = np.asarray(three_d.camera_frame(image, wall, move, np.float32(1)))
    middle = (SIZE - 1) / 2
    expected = ndimage.affine_transform(
        image, [0.5, 0.5, 1], [middle / 2, middle / 2, 0], order=1, mode="nearest"
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_near_things_move_farther(image):
    """Behind it twice as deep, a wall moves by half."""
    depth = np.full((SIZE, SIZE), 0.4, np.float32)
    depth[24:72, :] = 0.2
    move = three_d.Move(*np.float32([512 / SIZE * 8, 0, 1]))
    found = np.asarray(three_d.camera_frame(image, depth, move, np.float32(1)))
    np.testing.assert_allclose(found[30:66, :80], image[30:66, 8:88], atol=1e-4)
    np.testing.assert_allclose(found[80:, :80], image[80:, 4:84], atol=1e-4)


def test_damage_reaches_to_the_end_of_its_row(image, depth):
    damage = three_d.draw_bit_error(jax.random.key(0), image.shape)
    whole = reference.jpeg(image, 85)
    none = damage._replace(hits=tuple(np.ones(part.shape, np.float32) for part in damage.hits))
    np.testing.assert_allclose(three_d.bit_error(image, depth, none, 5), whole, atol=1e-6)
    hits = [np.array(part) for part in none.hits]
    hits[0][3, 5] = 0
    bits = tuple(np.full(part.shape, 3, np.int32) for part in damage.bits)
    found = np.asarray(three_d.bit_error(image, depth, three_d.Damage(tuple(hits), bits), 1))
    change = np.abs(found - whole).max(-1)
    assert (change[24:32, 40:] > 0.01).mean() > 0.9
    change[24:32, 40:] = 0
    assert change.max() < 1e-6


@pytest.mark.parametrize("name", CORRUPTIONS_3D)
def test_keys_make_the_pictures_and_batches_do_not(name, image, depth):
    images = np.stack([image[24:64, 4:44], image[50:90, 30:70], image[:40, :40]])
    depths = np.stack([depth[24:64, 4:44], depth[50:90, 30:70], depth[:40, :40]])
    key = jax.random.key(3)
    first = np.asarray(corrupt_3d(name, images[:2], depths[:2], 5, key))
    assert first.min() >= 0 and first.max() <= 1
    assert np.abs(first - images[:2]).mean() > 1e-3
    beside = corrupt_3d(name, images[[2, 1]], depths[[2, 1]], 5, key)
    later = corrupt_3d(name, images[[1, 0]], depths[[1, 0]], 5, key, first=1)
    for same in (beside[1], later[0]):
        assert np.abs(first[1] - same).mean() < 1e-5
    other = np.asarray(corrupt_3d(name, images[:2], depths[:2], 5, jax.random.key(4)))
    random = CORRUPTIONS_3D[name].draw is not None
    assert (np.abs(first - other).mean() > 1e-3) == random


def test_inverse_depth():
    found = three_d.depth_from_inverse(np.float32([[[512, 1024, 5120]]]))
    np.testing.assert_allclose(found, [[[0.5, 0.5, 0.1]]], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "fog"}, "corruption 'fog': expected one of near_focus, far_focus"),
        ({"depth": np.ones((1, 20, 20))}, r"depth: expected shape \(1, 32, 32\), found \(1, 20"),
        ({"depth": np.zeros((1, 32, 32))}, "depth: expected finite numbers from 1e-06 to inf"),
        ({"shading": np.ones((1, 32, 32))}, "shading: given for fog_3d, used by flash only"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"name": "fog_3d", "depth": np.ones((1, 32, 32), np.float32)} | change
    images = np.full((1, 32, 32, 3), 0.5, np.float32)
    name, depth = given.pop("name"), given.pop("depth")
    with pytest.raises(ValueError, match=message):
        corrupt_3d(name, images, depth, 1, jax.random.key(0), **given)


@pytest.mark.parametrize("name", CODEC_CORRUPTIONS)
def test_a_codec_loses_more_at_a_higher_severity(image, depth, name):
    """And keeps the size, odd ones too, and the place: the camera is back where it was."""
    key, sides = jax.random.key(0), (65, 64)
    images = np.stack([image[: sides[0], : sides[1]]] * 2)
    deep = np.stack([depth[: sides[0], : sides[1]]] * 2)
    lost = []
    for severity in (1, 5):
        found = corrupt_by_codec(name, images, deep, severity, key)
        assert found.shape == images.shape and found.dtype == np.float32
        lost.append(np.abs(found - images).mean())
    assert lost[0] < 0.05 and lost[1] > 1.3 * lost[0]
    alone = corrupt_by_codec(name, images[1:], deep[1:], 5, key, first=1)
    np.testing.assert_array_equal(alone[0], found[1])


def test_a_codec_that_is_missing_is_named(image, depth, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="h265_abr and h265_crf need a video codec: pip install av"):
        corrupt_by_codec("h265_crf", image[None], depth[None], 1, jax.random.key(0))
    with pytest.raises(ValueError, match="'h264': expected one of h265_abr, h265_crf"):
        corrupt_by_codec("h264", image[None], depth[None], 1, jax.random.key(0))
