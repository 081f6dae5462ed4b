"""The augmentation recipe, the transforms, and mixing of batches."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsynth.data.pipeline import mixing
from jaxsynth.data.pipeline.augment import (
    CLIP_MEAN,
    CLIP_STD,
    RANDAUGMENT,
    RECIPES,
    Augment,
    DiffusionTransform,
    EvalTransform,
    TrainTransform,
    color_jitter,
    crop_box,
    normalize,
    rand_augment,
)
from jaxsynth.data.pipeline.normalize import normalize_pixels


def picture(height=40, width=48, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_train_transform(recipe):
    transform = pickle.loads(pickle.dumps(TrainTransform(24, RECIPES[recipe])))
    a, b, c = (transform(picture(), np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert a.shape == (24, 24, 3) and a.dtype == np.uint8
    np.testing.assert_array_equal(a, b)
    assert (recipe == "none") == np.array_equal(a, c)
    if recipe == "none":
        expected = EvalTransform(24)(picture())
        np.testing.assert_array_equal(normalize(a, CLIP_MEAN, CLIP_STD), expected)


def test_the_device_normalizes_as_the_host_does():
    pixels = np.stack([np.arange(256, dtype=np.uint8)] * 3, axis=-1)[None]
    for mean, std in ((CLIP_MEAN, CLIP_STD), ((0.5, 0.4, 0.3), (0.2, 0.7, 1.0))):
        found = jax.jit(lambda x, mean=mean, std=std: normalize_pixels(x, mean, std))(pixels)
        assert found.dtype == np.float32
        # XLA may divide by multiplying with the reciprocal: one rounding more.
        np.testing.assert_allclose(found, normalize(pixels, mean, std), rtol=3e-7, atol=3e-7)


def test_evaluation_is_transformers():
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    for height, width in ((24, 27), (24, 28), (31, 24), (40, 47), (99, 50)):
        image = picture(height, width)
        peer = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        mine = EvalTransform(24)(image)
        np.testing.assert_allclose(mine, np.moveaxis(peer, 0, -1), atol=1e-5)


def test_normalisation_is_clips():
    white = np.full((8, 8, 3), 255, np.uint8)
    expected = (1 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(EvalTransform(8)(white)[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(RANDAUGMENT))
def test_every_operation_works_at_every_strength(name):
    apply, signed = RANDAUGMENT[name]
    image = Image.fromarray(picture() // 2 + 40)
    for strength in (0.0, 0.3, 1.0, *((-0.3, -1.0) if signed else ())):
        out = apply(image, strength)
        assert out.size == image.size and out.mode == "RGB"
        if strength == 0.0 and name not in ("AutoContrast", "Equalize", "Solarize"):
            np.testing.assert_array_equal(np.asarray(out), np.asarray(image))
    if name != "Identity":
        assert not np.array_equal(np.asarray(apply(image, 1.0)), np.asarray(image))


def test_magnitudes_are_torchvisions():
    image = Image.fromarray(picture(331, 331))
    moved = np.asarray(RANDAUGMENT["TranslateX"][0](image, 0.3))
    np.testing.assert_array_equal(moved[:, 45:], np.asarray(image)[:, :-45])
    assert not moved[:, :45].any()
    sheared = np.asarray(RANDAUGMENT["ShearX"][0](image, 1.0))
    np.testing.assert_array_equal(sheared[0], np.asarray(image)[0])
    np.testing.assert_array_equal(sheared[100, :300], np.asarray(image)[100, 30:330])
    levels = np.unique(np.asarray(RANDAUGMENT["Posterize"][0](image, 1.0)))
    assert set(levels) <= set(range(0, 256, 16)), "four bits at full strength"
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    bright = np.asarray(RANDAUGMENT["Solarize"][0](ramp, 0.3))[0, :, 0]
    assert bright[178] == 178 and bright[179] == 255 - 179, "threshold 178.5"
    assert np.asarray(RANDAUGMENT["Brightness"][0](ramp, 0.3))[0, 100, 0] == 127


def test_randaugment_draws_all_operations_evenly(monkeypatch):
    drawn = []
    for name in list(RANDAUGMENT):
        record = (
            lambda image, m, name=name: drawn.append((name, m)) or image,
            RANDAUGMENT[name][1],
        )
        monkeypatch.setitem(RANDAUGMENT, name, record)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        rand_augment(None, 2, 9, rng)
    counts = {name: sum(n == name for n, _ in drawn) for name in RANDAUGMENT}
    assert sum(counts.values()) == 2000 and min(counts.values()) > 100
    assert {m for _, m in drawn} == {0.3, -0.3}
    assert {m for n, m in drawn if n == "Solarize"} == {0.3}


def test_crops_stay_inside_and_keep_their_area():
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(300):
        left, top, right, bottom = crop_box(60, 40, (0.25, 1.0), (3 / 4, 4 / 3), rng)
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40
        areas.append((right - left) * (bottom - top) / 2400)
        ratios.append((right - left) / (bottom - top))
    assert 0.23 < min(areas) < 0.3 and max(areas) > 0.8
    assert min(ratios) > 0.7 and max(ratios) < 1.5
    left, top, right, bottom = crop_box(100, 4, (1.0, 1.0), (3 / 4, 4 / 3), rng)
    assert (bottom - top, right - left) == (4, 5), "the central crop of a strip"


def test_hue_turns_and_jitter_of_nothing_changes_nothing():
    image = Image.fromarray(picture())
    still = np.asarray(color_jitter(image, (0, 0, 0, 0), np.random.default_rng(0)), int)
    assert np.abs(still - np.asarray(image, int)).max() <= 8, "only HSV's rounding"
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    turned = {
        np.asarray(color_jitter(red, (0, 0, 0, 0.5), np.random.default_rng(s)))[0, 0].tobytes()
        for s in range(8)
    }
    assert len(turned) == 8


def test_digits_are_never_mirrored():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    transform = TrainTransform(32, RECIPES["digits"])
    for seed in range(40):
        out = transform(image, np.random.default_rng(seed))
        assert out[12:20, 26:].mean() > out[12:20, :6].mean() - 0.2


def test_recipe_refuses_nonsense():
    with pytest.raises(ValueError, match="flip_p"):
        Augment(flip_p=2.0)
    with pytest.raises(ValueError, match="magnitude"):
        Augment(magnitude=31)
    with pytest.raises(ValueError, match="crop_scale"):
        Augment(crop_scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="random generator"):
        TrainTransform(8)(picture(), None)


def test_diffusion_transform():
    transform = DiffusionTransform(16)
    a, b = (transform(picture(20, 60), np.random.default_rng(s)) for s in (0, 1))
    assert a.shape == (16, 16, 3) and -1 <= a.min() < a.max() <= 1 and not np.array_equal(a, b)
    centre = transform(picture(20, 60))
    np.testing.assert_array_equal(
        centre, DiffusionTransform(16, random_crop=False)(picture(20, 60))
    )
    assert transform(np.full((16, 16, 3), 255, np.uint8)).max() == 1.0


def test_mix_blends_images_as_labels():
    # Image i is filled with i, so a pixel tells how much of which image it holds.
    values = jnp.arange(6, dtype=jnp.float32)
    images = jnp.broadcast_to(values[:, None, None, None], (6, 16, 16, 1))
    labels = mixing.one_hot(jnp.arange(6), 6)
    run = jax.jit(mixing.mix)
    kinds = set()
    for seed in range(12):
        mixed, soft = run(jax.random.key(seed), images, labels)
        np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), soft @ values, atol=1e-4)
        kinds.add("mixup" if jnp.ptp(mixed[3]) == 0 else "cutmix")
    assert kinds == {"mixup", "cutmix"}
    same, soft = run(jax.random.key(0), images, labels, enabled=False)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(soft, labels)


def test_parts_do_not_mix_with_each_other():
    values = jnp.array([0.0, 0, 0, 100, 101])
    images = jnp.broadcast_to(values[:, None, None, None], (5, 8, 8, 3))
    labels = mixing.one_hot(jnp.array([0, 1, 0, 2, 3]), 4)
    run = jax.jit(lambda key: mixing.mix_batch(key, images, labels, num_real=3, probability=1.0))
    for seed in range(4):
        mixed, soft = run(jax.random.key(seed))
        assert float(jnp.abs(mixed[:3]).max()) == 0 and float(mixed[3:].min()) >= 99.99
        assert not soft[:3, 2:].any() and not soft[3:, :2].any()


def test_mix_happens_with_its_probability():
    images = jax.random.normal(jax.random.key(0), (4, 4, 4, 3))
    labels = mixing.one_hot(jnp.arange(4), 4)
    keys = jax.random.split(jax.random.key(1), 400)
    run = jax.jit(jax.vmap(lambda key: mixing.mix_batch(key, images, labels, num_real=2)[0]))
    mixed = run(keys)
    changed = (mixed != images).any(axis=(1, 2, 3, 4)).mean()
    # A CutMix box may be empty, so slightly fewer than a fifth change.
    assert 0.12 < float(changed) < 0.26


def test_label_smoothing_and_refusals():
    soft = mixing.one_hot(jnp.array([1]), 4, smoothing=0.2)
    np.testing.assert_allclose(soft, [[0.05, 0.85, 0.05, 0.05]], atol=1e-6)
    with pytest.raises(ValueError, match="num_real 3"):
        mixing.mix_batch(jax.random.key(0), jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 2)), num_real=3)
    with pytest.raises(ValueError, match="alpha"):
        args = (jax.random.key(0), jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 2)))
        mixing.mix(*args, mixup_alpha=0.0, cutmix_alpha=0.0)


@pytest.mark.slow
def test_other_alphas_draw_from_their_beta():
    images = jnp.broadcast_to(jnp.array([0.0, 1.0])[:, None, None, None], (2, 4, 4, 1))
    labels = mixing.one_hot(jnp.arange(2), 2)
    keys = jax.random.split(jax.random.key(2), 300)
    run = jax.vmap(lambda k: mixing.mix(k, images, labels, mixup_alpha=0.2, cutmix_alpha=0.0)[1])
    kept = np.asarray(jax.jit(run)(keys)[:, 0, 0])
    assert abs(kept.mean() - 0.5) < 0.1
    # Beta(0.2, 0.2) has a variance of 0.25 / 1.4.
    assert abs(kept.var() - 0.25 / 1.4) < 0.03
