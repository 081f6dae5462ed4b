"""Images of several aspect ratios are learned in their shapes: restarts, devices, SDXL's sizes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsynth.adapters.inject import extract
from jaxsynth.data.pipeline.buckets import Bucket, BucketConfig, buckets_of
from jaxsynth.data.sources.arrays import Cached
from jaxsynth.methods.customize.techniques import bucket_shapes, prepared
from jaxsynth.tasks.customize import CaptionConfig, DreamBoothConfig, customize_task
from jaxsynth.tasks.told import encode_buckets, encode_told, places_of
from jaxsynth.training import trainer
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import load_pipeline

ON = BucketConfig(enabled=True)
# A large eps: Adam would divide the smallest gradients, which are rounding, by themselves.
COMMON = {
    "steps": 8, "batch_size": 2, "learning_rate": 1e-2, "eps": 1e-2, "warmup_steps": 0, "rank": 2,
    "unet_targets": ("to_q",), "text_targets": (), "steps_per_call": 2, "checkpoint_every": 4,
    "buckets": ON,
}  # fmt: skip
CONFIGS = {
    "lora": CaptionConfig(**COMMON, caption_dropout=0.3, unmasked_weight=0.5),
    "dreambooth": DreamBoothConfig(**COMMON, prior_weight=0.5),
}
SIDES = [(10, 10), (8, 32), (9, 9)]
TEXTS = [("one",), ("two", "a photo of two"), ("three",)]


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


def photos(sides):
    """Random images of these (height, width)."""
    rng = np.random.default_rng(0)
    shapes = np.asarray(sides, np.int32)
    pixels = rng.integers(0, 256, 3 * int(shapes.prod(1).sum()), dtype=np.uint8)
    names = tuple(map(str, range(len(sides))))
    return Cached(pixels, shapes, np.zeros(len(sides), np.int32), names)


def task_of(pipeline, name):
    config, source = CONFIGS[name], photos(SIDES)
    base, model = prepared(config, "three", pipeline, jax.random.key(1))
    buckets = buckets_of(source, bucket_shapes(config, pipeline))
    assert [str(one) for one in buckets] == ["8x8", "16x4"]
    images, others = encode_buckets(base, source, TEXTS, buckets), None
    if name == "dreambooth":
        every = [Bucket(*one.shape, np.arange(3)) for one in buckets]
        others = encode_buckets(base, photos([(8, 8)] * 3), [("a photo",)] * 3, every)
    else:
        down, rng = base.vae.config.downscale, np.random.default_rng(1)
        masks = [rng.random((len(one.rows), *one.shape, 1), np.float32) for one in buckets]
        images = [
            replace(told, places=places_of(own, down, 0.5))
            for told, own in zip(images, masks, strict=True)
        ]
    return config, customize_task(base, model, images, config, seed=3, others=others)


@pytest.mark.heavy
def test_squares_are_learned_as_without_buckets(pipeline):
    """The same program and the same numbers, so the same training to the bit."""
    config, source = CONFIGS["lora"], photos([(8, 8), (10, 10), (20, 20)])
    base, model = prepared(config, "three", pipeline, jax.random.key(1))
    buckets = buckets_of(source, bucket_shapes(config, pipeline))
    (images,) = encode_buckets(base, source, TEXTS, buckets)
    squares = encode_told(base, source, TEXTS, crops=4, seed=0)
    one, other = (
        customize_task(base, model, found, config, seed=3) for found in ([images], squares)
    )
    assert one.batches.buckets is None and one.batches.next_batch == other.batches.next_batch
    assert one.batches.sharded == other.batches.sharded and one.loss == other.loss
    data = [jax.tree.flatten(task.batches.data) for task in (one, other)]
    assert data[0][1] == data[1][1]
    for found, expected in zip(data[0][0], data[1][0], strict=True):
        if jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key):
            found, expected = jax.random.key_data(found), jax.random.key_data(expected)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.heavy
def test_a_bucketed_task_is_no_plan_and_is_not_stacked(pipeline, tmp_path):
    config, task = task_of(pipeline, "lora")
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="buckets: expected one training of them"):
        trainer.plan("lora", task, config, mesh)
    with pytest.raises(ValueError, match="buckets: expected one training of them"):
        trainer.train_stacked([task, task], config, tmp_path)
    with pytest.raises(ValueError, match="Steps: batches of the host or of buckets"):
        trainer.Steps(task, config)


class Killed(Exception):
    pass


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["lora", pytest.param("dreambooth", marks=pytest.mark.slow)])
def test_buckets_are_learned_resumed_and_cut_over_devices(pipeline, tmp_path, monkeypatch, name):
    """Cut and on two devices a training ends as in one go, with two steps of a shape a call."""
    config, task = task_of(pipeline, name)
    start = extract(task.model).arrays
    learned = extract(trainer.train(task, config, tmp_path / "whole")).arrays
    change = max(float(np.abs(learned[path] - start[path]).max()) for path in start)
    assert change > 1e-3

    save = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            trainer.train(task, config, tmp_path / "cut")
    resumed = extract(trainer.train(task, config, tmp_path / "cut")).arrays
    mesh = make_mesh(fsdp=2, data=1, devices=jax.devices()[:2])
    many = extract(trainer.train(task, config, tmp_path / "many", mesh=mesh)).arrays
    for path, value in learned.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
        np.testing.assert_allclose(many[path], value, atol=2e-4 * change, err_msg=path)


@pytest.mark.heavy
def test_sdxl_is_told_the_true_sizes(sdxl_folder):
    """Of the photo, of the corner that was cut in it, and of the shape that it is learned in."""
    base = load_pipeline(sdxl_folder)
    source, side = photos([(12, 30), (40, 16), (20, 20)]), base.image_size
    shapes = [(side, side), (side // 2, 2 * side)]
    buckets = buckets_of(source, shapes)
    square, wide = encode_buckets(base, source, [("zero",)] * 3, buckets)
    # 40x16 is high: it covers the square and loses rows above and below.
    top = (round(side * 40 / 16) - side) // 2
    np.testing.assert_array_equal(
        square.sizes[:, 0], [(40, 16, top, 0, side, side), (20, 20, 0, 0, side, side)]
    )
    top = (round(2 * side * 12 / 30) - side // 2) // 2
    np.testing.assert_array_equal(wide.sizes[:, 0], [(12, 30, top, 0, side // 2, 2 * side)])
    down = base.vae.config.downscale
    assert wide.mean.shape[2:4] == (side // 2 // down, 2 * side // down)
