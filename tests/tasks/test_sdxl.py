"""SDXL learns: its loss is diffusers', and what each technique learns is in both text encoders."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from flax import nnx

from jaxsynth.adapters.inject import (
    AdapterState,
    extract,
    load_state,
    merge,
    trainable_variables,
)
from jaxsynth.data.faces import Faces
from jaxsynth.data.sources.arrays import Cached
from jaxsynth.data.sources.clips import ClipArrays
from jaxsynth.diffusion.noising import drawn_crops, sample_noise
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.generation.generate import GenerateConfig, sample_images
from jaxsynth.methods.customize.config import TECHNIQUES
from jaxsynth.methods.customize.motion import learned_modules, load_motion
from jaxsynth.methods.customize.techniques import load, prepared, save
from jaxsynth.models.diffusion.image_prompt import adapter_of
from jaxsynth.models.diffusion.motion import MotionConfig, MotionModules
from jaxsynth.models.diffusion.text_to_image import encode_texts
from jaxsynth.tasks.customize import CaptionConfig, customize_task
from jaxsynth.tasks.motion import ClipConfig
from jaxsynth.tasks.text_to_image import (
    FinetuneConfig,
    adapted,
    encode_examples,
    finetune_tasks,
    planned_task,
)
from jaxsynth.tasks.told import ToldBatches, encode_told
from jaxsynth.training import trainer
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.adapters.identities import read_identity
from jaxsynth.weights.adapters.image_prompts import read_image_adapter
from jaxsynth.weights.hf import describe_pipeline, load_pipeline
from jaxsynth.weights.image_encoder import load_image_encoder
from tests.adapters.nets import randomised
from tests.methods.small_base import random_network
from tests.models.torch_parity import relative_error

CONFIG = FinetuneConfig(epochs=0, steps=2, batch_size=2, rank=2, warmup_steps=0)
PROMPTS = ["a photo of the digit one", "zero!"]


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return load_pipeline(sdxl_folder)


@pytest.fixture(scope="module")
def images():
    """Two photos, one wide and one high, of other sizes than the base's."""
    rng = np.random.default_rng(0)
    shapes = np.array([(12, 30), (40, 16)])
    pixels = rng.integers(0, 256, 3 * shapes.prod(1).sum(), dtype=np.uint8)
    return Cached(pixels, shapes, np.array([0, 1]), ("wide", "high"))


@pytest.fixture(scope="module")
def examples(pipeline, images):
    return encode_examples(pipeline, images, PROMPTS, crops=3, seed=0)


def test_sizes_are_those_of_the_crops(pipeline, examples, images):
    side = pipeline.image_size
    assert examples.sizes.shape == (2, 3, 6) and examples.ids.shape == (2, 2, 12)
    original, corner, target = np.split(examples.sizes, 3, axis=-1)
    assert (original[0] == (12, 30)).all() and (original[1] == (40, 16)).all()
    assert (target == side).all()
    # The short side becomes the base's, so that only the long one is cut.
    assert (corner[0, :, 0] == 0).all() and (corner[1, :, 1] == 0).all()
    assert (corner[0, :, 1] <= side * 30 / 12 - side).all() and np.ptp(corner[0, :, 1]) > 0
    other = encode_examples(pipeline.sized(16), images, PROMPTS, crops=3, seed=0)
    assert other.mean.shape[2:4] == (8, 8) and (other.sizes[..., 4:] == 16).all()


@pytest.mark.heavy
def test_loss_is_that_of_diffusers(pipeline, examples, sdxl_folder):
    oracle = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    (task,) = finetune_tasks(pipeline, [examples], CONFIG, seed=0)
    batch = task.batches.next_batch(jnp.asarray(0), task.batches.data)
    key = jax.random.key(5)
    found, _ = jax.jit(task.loss)(task.model, schedule, batch, key)
    x0, noise, t = sample_noise(batch["mean"], batch["std"], key, schedule)
    noisy = np.moveaxis(np.asarray(add_noise(schedule, x0, noise, t)), -1, 1)
    sizes = np.asarray(drawn_crops(batch["sizes"], key))
    at = [int((examples.ids == ids).all((1, 2)).argmax()) for ids in np.asarray(batch["ids"])]
    with torch.no_grad():
        texts = [PROMPTS[i] for i in at]
        states, _, pooled, _ = oracle.encode_prompt(texts, do_classifier_free_guidance=False)
        output = oracle.unet(
            torch.tensor(noisy),
            torch.tensor(np.asarray(t)),
            states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor(sizes)},
        ).sample.numpy()
    errors = np.square(np.moveaxis(output, 1, -1) - np.asarray(noise))
    assert float(found) == pytest.approx(errors.mean(), rel=1e-4)


@pytest.mark.slow
def test_a_plan_is_the_program_that_runs(pipeline, sdxl_folder, examples):
    (task,) = finetune_tasks(pipeline, [examples], CONFIG, seed=0)
    one = dataclasses.replace(examples, **{
        name: getattr(examples, name)[:, :1] for name in ("mean", "std", "sizes")
    })  # fmt: skip
    (task,) = finetune_tasks(pipeline, [one], CONFIG, seed=0)
    planned = planned_task(describe_pipeline(sdxl_folder), CONFIG, images=2)
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    plans = [trainer.plan("one", each, CONFIG, mesh) for each in (task, planned)]
    assert plans[0] == plans[1]


@pytest.mark.heavy
def test_diffusers_draws_the_same_with_a_lora_of_all_networks(pipeline, sdxl_folder, tmp_path):
    model = adapted(pipeline, CONFIG, jax.random.key(0))
    state = randomised(extract(model), 1)
    assert {name.split(".")[0] for name in state.arrays} == set(pipeline.adaptable)
    adapter_io.save(state, tmp_path)
    strong = load_state(model, adapter_io.load(tmp_path / "pytorch_lora_weights.safetensors"))
    oracle = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    plain, _, _, _ = oracle.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    oracle.load_lora_weights(tmp_path)
    x = np.random.default_rng(3).normal(size=(2, 4, 4, 4)).astype(np.float32)
    sizes = np.asarray([[12, 30, 0, 4, 8, 8], [8, 8, 0, 0, 8, 8]], np.float32)
    t = np.asarray([3, 700])
    texts = encode_texts(strong, pipeline.tokenizer(PROMPTS)).sized(sizes)
    found = jax.jit(lambda model, text: model.denoise(x, t, text))(strong, texts)
    with torch.no_grad():
        states, _, pooled, _ = oracle.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        expected = oracle.unet(
            torch.tensor(np.moveaxis(x, -1, 1)),
            torch.tensor(t),
            states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor(sizes)},
        ).sample.numpy()
    assert relative_error(texts.states, states.numpy()) < 1e-4
    assert relative_error(texts.pooled, pooled.numpy()) < 1e-4
    assert relative_error(plain.detach().numpy(), states.numpy()) > 1e-2
    assert relative_error(found, np.moveaxis(expected, 1, -1)) < 1e-4


FACES = Faces(
    ("wide", "high"),
    np.random.default_rng(4).standard_normal((2, 6)).astype(np.float32),
    np.zeros((2, 5, 2), np.float32),
)
SETTINGS = {
    "textual_inversion": {"token": "<sks>", "vectors": 2, "templates": ""},
    # A new word beside the adapter (pivotal tuning).
    "dreambooth": {
        "text_targets": FinetuneConfig.text_targets, "rank": 2, "identifier": "<sks>", "vectors": 2,
    },
    "lora": {"caption_dropout": 0.5, "text_targets": (), "rank": 2},
    "ip_adapter": {"drop_text": 0.5},
    "instantid": {"drop_text": 0.5, "queries": 2, "depth": 1, "hidden": 64},
    "animatediff": {"frames": 3, "stride": 1, "version": "v1"},
    "motion_lora": {"frames": 3, "stride": 1, "rank": 2},
}  # fmt: skip
ENCODERS = {"text_encoder", "text_encoder_2"}
MOVED = {
    "textual_inversion": ENCODERS, "dreambooth": {"unet", *ENCODERS}, "lora": {"unet"},
    "ip_adapter": {"unet", "image_projections"},
    "instantid": {"unet", "image_projections", "identity_net"}, "animatediff": {"unet"},
    "motion_lora": {"unet"},
}  # fmt: skip


# All of the table is in the slow tests, the plainest of it in the quick ones too.
TABLE = [
    name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in TECHNIQUES
]


@pytest.mark.heavy
@pytest.mark.parametrize("name", TABLE)
def test_techniques_learn_and_keep_what_they_learned(pipeline, base_folder, images, tmp_path, name):
    config = TECHNIQUES[name](steps=2, batch_size=2, learning_rate=1e-2, **SETTINGS[name])
    encoder = None
    if name == "ip_adapter":
        encoder = load_image_encoder(str(base_folder / "clip"))
    elif name == "instantid":
        encoder = FACES
    clips = config if isinstance(config, ClipConfig) else None
    modules = None
    if name == "motion_lora":
        modules = random_network(MotionModules, MotionConfig((8, 16), 1, 8, 4, 4), 1)
    own, model = prepared(config, "three", pipeline, jax.random.key(0), encoder, modules)
    named = name in ("textual_inversion", "dreambooth")
    texts = [("<sks>" if named else "zero",)] * 2
    see = partial(encoder, of_patches=False) if name == "ip_adapter" else None
    if clips is not None:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3), dtype=np.uint8)
        images = ClipArrays(pixels, np.zeros(2, np.int32), ["0", "1"], ["", ""])
    told = encode_told(own, images, texts, crops=1, seed=0, encoder=see, clips=clips)
    if name == "instantid":
        told = dataclasses.replace(
            told, images=FACES.embeddings[:, None], absent=np.zeros((1, 6), np.float32),
            condition=np.ones((2, 8, 8, 3), np.uint8),
        )  # fmt: skip
    others = told if name == "dreambooth" else None
    task = customize_task(own, model, told, config, seed=0, others=others)
    before = {k: np.asarray(v.get_value()) for k, v in trainable_variables(model).items()}
    trained = trainer.train(task, config, tmp_path / "training")
    after = {k: np.asarray(v.get_value()) for k, v in trainable_variables(trained).items()}
    moved = {k.split(".")[0] for k, value in after.items() if not np.array_equal(value, before[k])}
    assert moved == MOVED[name]
    save(tmp_path / "kept", config, own, trained, modules)
    if clips is not None:
        again = load_motion(tmp_path / "kept", own, modules)
        learned = learned_modules(config, own, trained, modules)
        if modules is not None:
            learned = merge(learned)
        for one, other in zip(
            *(jax.tree.leaves(nnx.state(x)) for x in (again, learned)), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6)
        return
    if name in ("ip_adapter", "instantid"):
        again, learned = read_image_adapter(tmp_path / "kept", pipeline.unet), adapter_of(trained)
        if name == "instantid":
            net = read_identity(tmp_path / "kept", pipeline.unet).net
            for (path, one), (_, other) in zip(
                nnx.to_flat_state(nnx.state(net)),
                nnx.to_flat_state(nnx.state(trained.identity_net)),
                strict=True,
            ):
                np.testing.assert_array_equal(one.get_value(), other.get_value(), err_msg=path)
        for path, pair in learned.kernels.items():
            np.testing.assert_array_equal(again.kernels[path], pair)
        return
    base, adapters = load(tmp_path / "kept", pipeline)
    prompts = ["a <sks>", "zero"]
    if named:
        ids = base.tokenizer(prompts)
        np.testing.assert_array_equal(ids, own.tokenizer(prompts))
        assert (ids[0] >= pipeline.tokenizer.vocab_size).sum() == 4
    if name == "textual_inversion":
        kept, learned = (encode_texts(x, ids) for x in (base.networks, trained))
        for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(learned), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        return
    assert isinstance(adapters, AdapterState)
    kept = {k: x for k, x in extract(trained).arrays.items() if not k.endswith(".rows")}
    assert kept.keys() == adapters.arrays.keys()
    for key, value in kept.items():
        np.testing.assert_array_equal(adapters.arrays[key], value)
    if name == "lora":
        small = GenerateConfig(num_inference_steps=1)
        found = sample_images(base, prompts, small, seed=0, adapters=adapters)
        assert found.shape == (2, 1, 8, 8, 3)


@pytest.mark.heavy
def test_captions_left_out_are_zeros_where_generation_has_zeros(pipeline, images):
    config = CaptionConfig(steps=2, batch_size=2, caption_dropout=0.5, text_targets=(), rank=2)
    told = encode_told(pipeline, images, [("zero",), ("one",)], crops=1, seed=0)
    model = adapted(pipeline, config, jax.random.key(0))
    given = []
    for zeroes in (True, False):
        base = dataclasses.replace(pipeline, zeroes_empty=zeroes)
        task = customize_task(base, model, told, config, seed=0)
        batches = task.batches.next_batch
        assert isinstance(batches, ToldBatches)
        data = jax.device_put(task.batches.data)
        drawn = jax.vmap(lambda step, b=batches, d=data: b(step, d))(jnp.arange(50))
        given.append(drawn.get("given"))
    assert given[1] is None and 0.3 < np.mean(given[0]) < 0.7
    text = encode_texts(pipeline.networks, pipeline.tokenizer(["", "zero"])).where(
        np.array([False, True])
    )
    assert not text.states[0].any() and not text.pooled[0].any() and text.states[1].any()
