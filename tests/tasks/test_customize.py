"""Customisation: what learns, the loss of two terms, texts and captions, restarts, devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters.inject import AdapterState, Trainable, extract, load_state
from jaxsynth.data.faces import Faces
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.clips import ClipArrays
from jaxsynth.diffusion.noising import sample_noise
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise, snr
from jaxsynth.generation.animations import on_linear_schedule
from jaxsynth.methods.customize.techniques import load, prepared, reordered, save
from jaxsynth.models.diffusion.image_prompt import ImagePrompted
from jaxsynth.models.diffusion.motion import MotionConfig, MotionModules
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.tasks.customize import (
    CaptionConfig,
    DreamBoothConfig,
    ImagePromptConfig,
    InstantIDConfig,
    InversionConfig,
    customize_task,
)
from jaxsynth.tasks.motion import AnimateDiffConfig, ClipConfig, MotionLoRAConfig
from jaxsynth.tasks.text_to_image import Denoising
from jaxsynth.tasks.told import ToldBatches, encode_told, places_of, planned_images
from jaxsynth.training import sharding, trainer
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.sharding import make_mesh
from jaxsynth.training.trainer import train
from jaxsynth.weights.hf import describe_pipeline, load_pipeline
from jaxsynth.weights.image_encoder import load_image_encoder
from tests.methods.small_base import random_network

# A large eps: Adam would divide the smallest gradients, which are rounding, by themselves.
COMMON = {
    "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "eps": 1e-2, "weight_decay": 0.1,
    "steps_per_call": 2, "checkpoint_every": 2, "snr_gamma": 5.0,
}  # fmt: skip
CLIPS = {"frames": 3, "stride": 2, "windows_per_clip": 2, "caption_dropout": 0.5}
ADAPTER = {"rank": 2, "unet_targets": ("to_q", "to_v"), "warmup_steps": 0}
TECHNIQUES = {
    "textual_inversion": InversionConfig(**COMMON, token="<x>", vectors=2, initializer="three"),
    "dreambooth": DreamBoothConfig(**COMMON, **ADAPTER, prior_weight=0.5),
    "lora": CaptionConfig(
        **COMMON, **ADAPTER, text_targets=("q_proj",), caption_dropout=0.5, noise_offset=0.1,
        ema_decay=0.5, unmasked_weight=0.1,
    ),
    "pivotal": DreamBoothConfig(
        **COMMON, **ADAPTER, prior_weight=0, class_images=0, identifier="<x>", vectors=2
    ),
    "ip_adapter": ImagePromptConfig(**COMMON, drop_image=0.3, drop_text=0.3),
    "instantid": InstantIDConfig(
        **COMMON, queries=2, depth=1, hidden=64, drop_image=0.3, drop_text=0.3
    ),
    "plus": ImagePromptConfig(**COMMON, projection="resampler", queries=2, depth=1, hidden=64),
    "animatediff": AnimateDiffConfig(**COMMON, **CLIPS, version="v2", ema_decay=0.5),
    "motion_lora": MotionLoRAConfig(**COMMON, **CLIPS, rank=2, noise_offset=0.1),
}  # fmt: skip
IMAGES = {"unet", "image_projections"}
PARTS = {
    "textual_inversion": {"text_encoder"}, "dreambooth": {"unet"}, "ip_adapter": IMAGES,
    "plus": IMAGES, "instantid": IMAGES | {"identity_net"}, "animatediff": {"unet"},
    "motion_lora": {"unet"},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def encoder(base_folder):
    return load_image_encoder(str(base_folder / "clip"))


def told(pipeline, count, texts, seed, encoder=None):
    """Random images with their texts."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    source = ArraySource(images, np.zeros(count, np.int32), [str(i) for i in range(count)])
    return encode_told(pipeline, source, texts, crops=1, seed=0, encoder=encoder)


FACES = Faces(
    ("0", "1", "2"),
    np.random.default_rng(4).standard_normal((3, 6)).astype(np.float32),
    np.zeros((3, 5, 2), np.float32),
)


def seen_by(config, encoder):
    """What tells the technique how wide what it sees is."""
    return FACES if isinstance(config, InstantIDConfig) else encoder


@pytest.fixture(scope="module")
def modules():
    return random_network(MotionModules, MotionConfig((8,), 1, 8, 4, 4), 1)


def told_clips(pipeline, config, texts):
    """Random clips of six frames with their texts."""
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (len(texts), 6, 8, 8, 3), dtype=np.uint8)
    ids = [str(i) for i in range(len(texts))]
    source = ClipArrays(clips, np.zeros(len(texts), np.int32), ids, [""] * len(texts))
    return encode_told(pipeline, source, texts, crops=1, seed=0, clips=config)


def task_of(base, name, encoder, modules):
    """The task of a technique, and the pipeline's networks before it."""
    config, see = TECHNIQUES[name], None
    if isinstance(config, ImagePromptConfig):
        see = partial(encoder, of_patches=config.of_patches)
    seen = seen_by(config, encoder)
    pipeline, model = prepared(config, "three", base, jax.random.key(1), seen, modules)
    texts = [("a photo of a <x>", "one <x>")] * 3
    others = None
    if isinstance(config, ClipConfig):
        images = told_clips(pipeline, config, [("one",), ("two",), ("a photo of one",)])
        return config, customize_task(pipeline, model, images, config, seed=3)
    if name == "dreambooth":
        texts = [("a photo of a sks three",)] * 3
        others = told(pipeline, 5, [("a photo of a three",)] * 5, 1)
    elif name in ("lora", "ip_adapter", "plus", "instantid"):
        texts = [("one",), ("two",), ("a photo of one",)]
    images = told(pipeline, 3, texts, 0, see)
    if name == "instantid":
        rng = np.random.default_rng(5)
        images = dataclasses.replace(
            images,
            images=FACES.embeddings[:, None],
            absent=np.zeros((1, FACES.width), np.float32),
            condition=rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
        )
    if getattr(config, "unmasked_weight", 1) < 1:
        masks = np.zeros((3, 8, 8, 1), np.float32)
        masks[:, :4] = 1
        places = places_of(masks, pipeline.vae.config.downscale, config.unmasked_weight)
        images = dataclasses.replace(images, places=places)
    return config, customize_task(pipeline, model, images, config, seed=3, others=others)


def leaves(model, kind):
    return jax.tree.map(np.asarray, nnx.state(model, kind))


class Killed(Exception):
    pass


# All of the table is in the slow tests, the plainest of it in the quick ones too.
QUICK = ("textual_inversion", "lora", "ip_adapter", "animatediff")
TABLE = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TECHNIQUES
]


@pytest.mark.heavy
@pytest.mark.parametrize("name", TABLE)
def test_techniques_learn_resume_and_use_devices(
    pipeline, encoder, modules, tmp_path, monkeypatch, name
):
    """Only what the technique learns changes; cut and on two devices it ends as in one go."""
    config, task = task_of(pipeline, name, encoder, modules)
    start, frozen = extract(task.model).arrays, leaves(task.model, nnx.Not(Trainable))
    assert {path.split(".")[0] for path in start} == PARTS.get(name, {"unet", "text_encoder"})
    whole = train(task, config, tmp_path / "whole")
    for one, other in zip(
        jax.tree.leaves(frozen), jax.tree.leaves(leaves(whole, nnx.Not(Trainable))), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    learned = extract(whole).arrays
    change = max(float(np.abs(learned[path] - start[path]).max()) for path in start)
    assert change > 1e-3

    save = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            train(task, config, tmp_path / "cut")
    resumed = extract(train(task, config, tmp_path / "cut")).arrays
    # Weights this small would otherwise stay whole on every device.
    monkeypatch.setattr(sharding.shardings_for, "__kwdefaults__", {"min_size": 16})
    mesh = make_mesh(fsdp=2, data=1, devices=jax.devices()[:2])
    many = extract(train(task, config, tmp_path / "many", mesh=mesh)).arrays
    for path, value in learned.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
        np.testing.assert_allclose(many[path], value, atol=2e-4 * change, err_msg=path)


@pytest.mark.heavy
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("weight", [0.7, 0.0])
def test_dreambooth_loss_is_the_sum_of_two_terms(pipeline, gamma, weight):
    """Each term a mean over its own two images, weighted by its own times (min-SNR)."""
    model = TextToImage(pipeline.unet, pipeline.text_encoder)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    images = told(pipeline, 2, [("sks",)] * 2, 0)
    others = told(pipeline, 3, [("a photo",)] * 3, 1)
    config = DreamBoothConfig(batch_size=2, prior_weight=weight, snr_gamma=gamma)
    task = customize_task(pipeline, model, images, config, seed=0, others=others)
    batch = task.batches.next_batch(jnp.asarray(1), task.batches.data)
    key = jax.random.key(7)
    found, _ = task.loss(model, schedule, batch, key)

    x0, noise, t = sample_noise(batch["mean"], batch["std"], key, schedule)
    output = model.unet(add_noise(schedule, x0, noise, t), t, batch["text"].states)
    errors = np.square(np.asarray(output, np.float64) - np.asarray(noise, np.float64))
    losses = errors.reshape(4, -1).mean(1)
    if gamma is not None:
        ratio = np.asarray(snr(schedule, t), np.float64)
        losses *= np.minimum(ratio, gamma) / ratio
    assert float(found) == pytest.approx(losses[:2].mean() + weight * losses[2:].mean(), rel=1e-5)
    # The images come first, the others after them, each told by its own text.
    rows = [np.abs(np.asarray(images.mean) - x).sum((1, 2, 3, 4)).argmin() for x in batch["mean"]]
    assert sorted(rows[:2]) == [0, 1]
    texts = np.asarray(batch["text"].states)
    assert np.array_equal(texts[0], texts[1]) and np.array_equal(texts[2], texts[3])
    assert not np.array_equal(texts[0], texts[2])
    if weight == 0:
        alone = {name: batch[name][:2] for name in ("mean", "std")}
        alone["text"] = batch["text"].take(np.arange(2))
        without, _ = Denoising(gamma)(model, schedule, alone, key)
        assert float(without) == pytest.approx(float(found), rel=1e-6)


def test_images_are_told_by_their_own_texts_and_some_by_none():
    """Of 3 images with 1, 2 and 4 texts, counted over many steps."""
    data = {
        "order": jax.random.key(0),
        "mean": jnp.arange(3.0).reshape(3, 1, 1, 1, 1),
        "std": jnp.zeros((3, 1, 1, 1, 1)),
        "sizes": jnp.zeros((3, 1, 6)),
        "first": jnp.asarray([1, 2, 4]),
        "choices": jnp.asarray([1, 2, 4]),
        "ids": jnp.arange(8)[:, None],
    }
    batches = ToldBatches(batch_size=3, dropout=0.25)
    drawn = jax.vmap(lambda step: batches(step, data))(jnp.arange(400))
    image, text = (np.asarray(drawn[name]).reshape(-1).astype(int) for name in ("mean", "ids"))
    assert np.mean(text == 0) == pytest.approx(0.25, abs=0.04)
    for row, own in enumerate(([1], [2, 3], [4, 5, 6, 7])):
        counts = np.bincount(text[(image == row) & (text > 0)], minlength=8)
        assert set(np.flatnonzero(counts)) == set(own)
        assert counts[own].min() > 0.7 * counts.sum() / len(own)


def test_images_texts_and_both_are_dropped_at_their_rates():
    """Counted over many steps; no image is that of none, no text the empty one."""
    data = {
        "order": jax.random.key(0),
        "mean": jnp.zeros((2, 1, 1, 1, 1)),
        "std": jnp.zeros((2, 1, 1, 1, 1)),
        "first": jnp.asarray([1, 2]),
        "choices": jnp.asarray([1, 1]),
        "ids": jnp.arange(3)[:, None],
        "images": jnp.asarray([[1.0], [2.0]]),
        "absent": jnp.asarray([-1.0]),
    }
    batches = ToldBatches(batch_size=2, drops=(0.3, 0.2, 0.1))
    drawn = jax.vmap(lambda step: batches(step, data))(jnp.arange(1500))
    image, text = (np.asarray(drawn[name]).reshape(-1).astype(int) for name in ("image", "ids"))
    np.testing.assert_array_equal(image[(image > 0) & (text > 0)], text[(image > 0) & (text > 0)])
    found = [
        np.mean((image < 0) & (text > 0)),
        np.mean((image > 0) & (text == 0)),
        np.mean((image < 0) & (text == 0)),
    ]
    np.testing.assert_allclose(found, batches.drops, atol=0.03)


def test_an_untrained_instantid_s_loss_is_its_adapter_s(pipeline, encoder):
    """IdentityNet starts as nothing, and is then told of the face alone, or of zeros."""
    _, task = task_of(pipeline, "instantid", encoder, None)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    batch = task.batches.next_batch(jnp.asarray(1), jax.device_put(task.batches.data))
    key = jax.random.key(7)
    found, _ = jax.jit(task.loss)(task.model, schedule, batch, key)
    model = task.model
    plain = ImagePrompted(model.unet, model.text_encoder, None, model.image_projections)
    alone = {name: value for name, value in batch.items() if name != "condition"}
    assert float(jax.jit(task.loss)(plain, schedule, alone, key)[0]) == float(found)
    embeddings = np.asarray(batch["image"])
    assert embeddings.shape == (2, 1, 6) and batch["condition"].shape == (2, 8, 8, 3)

    net = model.identity_net
    net.controlnet_mid_block.kernel.set_value(net.controlnet_mid_block.kernel[...] + 0.3)
    moved, _ = jax.jit(task.loss)(model, schedule, batch, key)
    assert abs(float(moved) - float(found)) > 1e-4
    batch["condition"] = 255 - batch["condition"]
    net.controlnet_cond_embedding.conv_out.kernel.set_value(
        net.controlnet_cond_embedding.conv_out.kernel[...] + 0.3
    )
    followed, _ = jax.jit(task.loss)(model, schedule, batch, key)
    assert abs(float(followed) - float(moved)) > 1e-4


def test_positions_outside_of_a_mask_count_less(pipeline):
    """The loss is the mean of the errors by the places' weights; without masks the plain mean."""
    model = TextToImage(pipeline.unet, pipeline.text_encoder)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    images = told(pipeline, 2, [("one",)] * 2, 0)
    masks = np.zeros((2, 8, 8, 1), np.float32)
    masks[:, :3] = 1
    places = places_of(masks, 2, 0.2)
    np.testing.assert_allclose(places[0, :, 0, 0], [1, 0.6, 0.2, 0.2], rtol=1e-6)
    config = CaptionConfig(batch_size=2, unmasked_weight=0.2)
    task = customize_task(
        pipeline, model, dataclasses.replace(images, places=places), config, seed=0
    )
    batch = task.batches.next_batch(jnp.asarray(0), task.batches.data)
    key = jax.random.key(7)
    found, _ = task.loss(model, schedule, batch, key)
    x0, noise, t = sample_noise(batch["mean"], batch["std"], key, schedule)
    output = model.unet(add_noise(schedule, x0, noise, t), t, batch["text"].states)
    errors = np.square(np.asarray(output, np.float64) - np.asarray(noise, np.float64)).mean(-1)
    weights = np.asarray(batch["places"], np.float64)[..., 0]
    expected = (errors * weights).sum((1, 2)) / weights.sum((1, 2))
    assert float(found) == pytest.approx(expected.mean(), rel=1e-5)
    assert float(found) != pytest.approx(errors.mean(), rel=1e-3)


def test_parts_of_a_caption_come_in_several_orders():
    found = reordered("a dog, red, small,in snow", 20, [0, 1])
    assert len(found) == 20 and found[0] == "a dog, red, small,in snow" and len(set(found)) > 4
    assert all(text.split(", ")[0] == "a dog" for text in found[1:])
    assert all(sorted(text.split(", ")[1:]) == ["in snow", "red", "small"] for text in found[1:])
    assert found == reordered("a dog, red, small,in snow", 20, [0, 1])
    assert found != reordered("a dog, red, small,in snow", 20, [0, 2])


def test_a_word_and_its_adapter_are_kept_and_read_together(pipeline, tmp_path):
    config = TECHNIQUES["pivotal"]
    base, model = prepared(config, "three", pipeline, jax.random.key(1))
    shifted = {path: value + 0.5 for path, value in extract(model).arrays.items()}
    model = load_state(model, AdapterState(shifted, extract(model).config))
    file = save(tmp_path, config, base, model)
    assert file.name == "pytorch_lora_weights.safetensors"
    again, adapter = load(tmp_path, pipeline)
    assert again.tokenizer(["a <x>"]).tolist() == base.tokenizer(["a <x>"]).tolist()
    table = again.text_encoder.text_model.embeddings.token_embedding.embedding[...]
    rows = next(value for path, value in shifted.items() if path.endswith(".rows"))
    np.testing.assert_array_equal(table[-2:], rows)
    assert adapter.arrays.keys() == {path for path in shifted if not path.endswith(".rows")}
    for path, value in adapter.arrays.items():
        np.testing.assert_array_equal(value, shifted[path])


@pytest.mark.heavy
@pytest.mark.parametrize("name", TABLE)
def test_a_plan_is_the_program_that_runs(base_folder, pipeline, encoder, modules, name):
    config, task = task_of(pipeline, name, encoder, modules)
    base = describe_pipeline(base_folder)

    def model(networks):
        own = base.with_networks(networks)
        seen = seen_by(config, encoder)
        return prepared(config, "three", own, jax.random.key(1), seen, modules)[1]

    shapes = nnx.eval_shape(model, base.networks)
    data = task.batches.data
    texts = (data["ids"] if "ids" in data else data["texts"].states).shape[0]
    others = planned_images(base, 5, 1) if name == "dreambooth" else None
    seen = task.batches.data.get("absent")
    features = None if seen is None else seen.shape
    clips = config if isinstance(config, ClipConfig) else None
    if clips is not None:
        base = on_linear_schedule(base)
    images = planned_images(
        base, 3, texts - (3 if others else 1), features=features, masked=name == "lora",
        followed=name == "instantid",
        clips=clips,
    )  # fmt: skip
    planned = customize_task(base, shapes, images, config, seed=3, others=others)
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    plans = [trainer.plan(name, one, config, mesh) for one in (task, planned)]
    assert plans[0] == plans[1]
