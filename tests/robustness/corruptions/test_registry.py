"""ImageNet-C's corruptions against NumPy, SciPy and Pillow, fed the same noise; keys, batches."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from jaxsynth.robustness.corruptions import digital, weather
from jaxsynth.robustness.corruptions.jpeg import jpeg, jpeg_by_pillow, quantisation_tables
from jaxsynth.robustness.corruptions.registry import CORRUPTIONS, SEVERITIES, corrupt, to_released
from tests.robustness import corruption_reference as reference

SIZE = reference.SIZE
# (bound, share of the values that may lie beyond it). Float32 against float64 unless said.
CLOSE = (2e-5, 0)
TOLERANCE = {
    # A uniform number on a step of the cumulative probability: the next count.
    "shot_noise": (1e-5, 1e-4),
    # A value on a step of 8 bits, before another blur or a sum.
    "glass_blur": (1e-5, 2e-3),
    "snow": (1e-5, 1e-3),
    # A slope or a distance on a step: a neighbour of an edge.
    "spatter": (1e-4, 2e-2),
    # Positions in float32 at 224 pixels.
    "elastic_transform": (2e-3, 0),
}
# Those that run loops compile for each severity: few. The others share their operations.
LEVELS = {
    "shot_noise": (0, 3),
    "glass_blur": (0, 3),
    "spatter": (0, 2, 4),
    "motion_blur": (0, 4),
    "snow": (0, 3),
}
# Saturation is taken away first and added then; AlexNet's published errors do not
# rise with the elastic one's severity either.
NOT_MONOTONE = {"elastic_transform", "saturate"}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Waves, a few sharp edges, black, white and grey, and a little noise, in 8 bits."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    image = 0.5 + 0.4 * np.stack([np.sin(9 * y), np.cos(7 * x * y), np.sin(5 * x + 2)], -1)
    image[40:90, 60:130] = 0.2, 0.7, 0.3
    image[150:180, 20:60] = 0
    image[150:180, 100:140] = 1
    image[150:180, 160:200] = 0.4
    image[:140] += 0.03 * rng.normal(size=(140, SIZE, 3))
    return np.round(np.clip(image, 0, 1) * 255).astype(np.float32) / np.float32(255)


def drawn(name: str, seed: int):
    """The library's own draws, as NumPy's numbers."""
    draw = CORRUPTIONS[name].draw
    if draw is None:
        return None
    return jax.tree.map(np.asarray, draw(jax.random.key(seed), (SIZE, SIZE, 3)))


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "frost"])
def test_corruption_is_its_formula(name, image):
    bound, share = TOLERANCE.get(name, CLOSE)
    exact = np.round(image.astype(np.float64) * 255) / 255
    # As users run it: one program.
    apply = jax.jit(CORRUPTIONS[name].apply, static_argnums=2)
    distances = []
    for level in LEVELS.get(name, range(5)):
        noise = drawn(name, 0)
        found = np.asarray(apply(image, noise, level + 1))
        expected = getattr(reference, name)(exact, noise, level)
        assert np.abs(expected - image).mean() > 3e-3
        beyond = np.abs(found - expected) > bound
        assert beyond.mean() <= share, (level + 1, np.abs(found - expected).max(), beyond.mean())
        distances.append(np.abs(found - image).mean())
    if name not in NOT_MONOTONE:
        assert distances[0] < distances[-1]
    if name.endswith(("noise", "focus_blur", "contrast", "brightness", "jpeg_compression")):
        assert (np.diff(distances) > 0).all(), distances


def test_frost_is_a_piece_of_one_texture(image):
    textures = np.random.default_rng(1).random((3, 240, 260, 3)).astype(np.float32)
    draws = drawn("frost", 0)._replace(which=np.int32(5), corner=np.int32([20, 100]))
    weights = [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)]
    piece = textures[2, 4 : 4 + SIZE, 28 : 28 + SIZE]
    for severity, (of_image, of_frost) in zip(SEVERITIES, weights, strict=True):
        found = weather.frost(image, draws, severity, textures)
        expected = np.clip(of_image * image + of_frost * piece, 0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_procedural_frost_is_ice(image):
    texture = np.asarray(weather.frost_texture(drawn("frost", 3)))
    assert texture.shape == image.shape and texture.min() >= 0 and texture.max() <= 1
    # Blue above red everywhere, some of it bright, and not the same all over.
    assert (texture[..., 2] >= texture[..., 0]).all()
    assert texture.std() > 0.05 and np.quantile(texture, 0.99) > 0.5
    other = np.asarray(weather.frost_texture(drawn("frost", 4)))
    assert np.abs(texture - other).mean() > 0.03


@pytest.mark.parametrize("quality", [10, 50, 85])
@pytest.mark.parametrize("size", [(224, 224), (61, 90)])
def test_jpeg_is_pillows(quality, size, image):
    """Every value, at sizes with and without cut blocks."""
    part = image[: size[0], 30 : 30 + size[1]]
    expected = reference.jpeg(part, quality)
    found = np.asarray(jax.jit(jpeg, static_argnums=1)(part, quality))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(jpeg_by_pillow(part[None], quality)[0], found)
    assert np.abs(expected - part).mean() > 3e-3


def test_quantisation_tables_are_pillows():
    for quality in (7, 25, 50, 85, 95):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
        tables = Image.open(file).quantization
        for number, table in enumerate(quantisation_tables(quality)):
            assert sorted(table.ravel()) == sorted(tables[number]), quality


def test_released_cuts_and_saves(image):
    between = np.clip(image + np.float32(0.6 / 255), 0, 1)
    expected = reference.jpeg(np.floor(between * 255 + 1e-3) / 255, 85)
    np.testing.assert_allclose(to_released(between), expected, atol=1e-6)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", ["jpeg_compression", "contrast"])
def test_pillow_and_the_device_save_the_same(name, released, small):
    """Called on a CPU's images JPEG is Pillow's, within a program and on sharded ones ours."""
    ask = partial(corrupt, name, severity=3, key=jax.random.key(0), released=released)
    found = ask(jnp.asarray(small))
    traced = jax.jit(lambda images: ask(images))(small)
    np.testing.assert_array_equal(found, traced)
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = ask(jax.device_put(small, rows))
    np.testing.assert_array_equal(sharded, found)
    assert name == "contrast" or sharded.sharding == rows


@pytest.fixture(scope="module")
def small(image) -> np.ndarray:
    return np.stack([image[20:52, 50:82], image[145:177, 90:122], image[60:92, 110:142]])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_keys_make_the_pictures_and_batches_do_not(name, small):
    """One program each, at a size that nothing was made for."""
    key = jax.random.key(7)
    first = np.asarray(corrupt(name, small[:2], 4, key))
    assert first.shape == small[:2].shape and first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, corrupt(name, small[:2], 4, key))
    # Image 1 in other company, and as the first of a later batch.
    beside = corrupt(name, small[[2, 1]], 4, key)
    later = corrupt(name, small[[1, 0]], 4, key, first=1)
    for same in (beside[1], later[0]):
        assert np.abs(first[1] - same).mean() < 1e-5
    other = np.asarray(corrupt(name, small[:2], 4, jax.random.key(8)))
    random = CORRUPTIONS[name].draw is not None
    assert (np.abs(first - other).mean() > 1e-3) == random


def test_wide_images_work(small):
    wide = np.concatenate(list(small), 1)[None, :20]
    for name in ("zoom_blur", "fog", "elastic_transform", "jpeg_compression"):
        found = np.asarray(corrupt(name, wide, 3, jax.random.key(0)))
        assert found.shape == wide.shape and np.isfinite(found).all()


def test_brightness_of_black_is_grey():
    black = np.zeros((16, 16, 3), np.float32)
    np.testing.assert_allclose(digital.brightness(black, None, 2), 0.2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "more", "message"),
    [
        ("blur", {}, {}, "corruption 'blur': expected one of gaussian_noise, shot_noise"),
        ("fog", {"severity": 0}, {}, "severity: expected a whole number, 1 to 5, found 0"),
        ("fog", {"severity": 6}, {}, "severity: expected a whole number, 1 to 5, found 6"),
        ("fog", {"scale": 255}, {}, r"values from 0 to 255, expected \[0, 1\]"),
        ("fog", {"cut": np.s_[:, :9]}, {}, r"sides of 16 pixels or more.*\(2, 9, 32, 3\)"),
        ("fog", {"cut": np.s_[..., :1]}, {}, r"expected three channels.*\(2, 32, 32, 1\)"),
        ("fog", {"cut": np.s_[0]}, {}, r"found shape \(32, 32, 3\)"),
        ("fog", {}, {"textures": np.zeros((1, 64, 64, 3))}, "given for fog, used by frost only"),
        (
            "frost",
            {},
            {"textures": np.zeros((1, 32, 64, 3), np.float32)},
            r"textures: expected .* larger than \(32, 32\), found shape \(1, 32, 64, 3\)",
        ),
    ],
)
def test_bad_input_is_named(name, change, more, message):
    images = np.zeros((2, 32, 32, 3), np.float32)
    images[0, 0] = 1
    images = (images * np.float32(change.get("scale", 1)))[change.get("cut", ...)]
    with pytest.raises(ValueError, match=message):
        corrupt(name, images, change.get("severity", 1), jax.random.key(0), **more)
