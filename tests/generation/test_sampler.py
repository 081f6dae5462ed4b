"""The one sampler: every kind of adapter on a mesh, strengths by image, values that are not finite,
and what a base whose scheduler is unusual says.
"""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import Constant, extract, load_state
from jaxsynth.core.errors import UserError
from jaxsynth.data.store import ImageStore
from jaxsynth.diffusion.samplers import initial_noise
from jaxsynth.generation.conditioners import Text
from jaxsynth.generation.generate import GenerateConfig, Generator, fill_store, sample_images
from jaxsynth.generation.sampler import (
    ImageSampler,
    Networks,
    image_keys,
    latent_shape,
    sampler_of,
)
from jaxsynth.models.diffusion.text_to_image import TextToImage, encode_texts
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import load_pipeline
from tests.adapters.nets import randomised

CONFIG = GenerateConfig(num_inference_steps=2, batch_size=4)
PROMPTS = ("a photo of the digit one", "zero")
NEEDED = {
    "locon": {"targets": ("conv1",)},
    "delta_lora": {"ratio": 0.5},
    "oft": {"block_size": 4},
    "boft": {"block_size": 2},
}


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def tables(pipeline):
    texts = encode_texts(pipeline.networks, pipeline.tokenizer([*PROMPTS, ""]))
    return texts.take(np.array([0, 1])), texts.take(np.array([2, 2]))


def adapted(pipeline, kind: str, seed: int) -> TextToImage:
    """The base with an adapter of a kind, every factor of it random."""
    settings = NEEDED.get(kind, {})
    if not registry.kind_of(kind).has_places:
        settings = {"targets": ("attn2.to_q", "attn2.to_v"), **settings}
    config = registry.make_config(kind, **settings)
    unet = registry.add(pipeline.unet, config, rngs=jax.random.key(7))
    unet = load_state(unet, randomised(extract(unet), seed))
    return TextToImage(unet, pipeline.text_encoder)


def latents(pipeline, models, tables, mesh=None, **more) -> np.ndarray:
    networks = Networks.of(models, mesh=mesh, table=Text.table, **more)
    sampler = ImageSampler(
        networks,
        pipeline.vae,
        Text(2.0),
        sampler_of(pipeline, "", 2),
        latent_shape(pipeline),
        batch_size=4,
        tables=tables,
        mesh=mesh,
    )
    prompt = np.array([0, 1, 1, 0])
    keys = image_keys(3, prompt, np.arange(4))
    return sampler.latents(keys, {"prompt": prompt}, prompt, describe=str)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_kind_of_adapter_samples_on_a_mesh(pipeline, tables, kind):
    """Two adapters in one batch, unmerged, over two devices that cut frozen arrays and batch."""
    models = [adapted(pipeline, kind, seed) for seed in (0, 1)]
    one = latents(pipeline, models, tables)
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    two = latents(pipeline, models, tables, mesh)
    assert np.abs(one - two).max() < 1e-4 * np.abs(one).max()
    assert not np.allclose(one, latents(pipeline, models[::-1], tables), atol=1e-3)
    buffers = nnx.state(models[0], Constant)
    assert bool(jax.tree.leaves(buffers)) == (kind in ("vera", "pissa", "olora"))


@pytest.mark.heavy
def test_each_adapter_has_a_strength(pipeline, tables):
    models = [adapted(pipeline, "lora", seed) for seed in (0, 1)]
    base = latents(pipeline, [TextToImage(pipeline.unet, pipeline.text_encoder)], tables)
    full = latents(pipeline, models, tables)
    mixed = latents(pipeline, models, tables, weights=(1.0, 0.0))
    first = np.array([True, False, False, True])
    np.testing.assert_allclose(mixed[first], full[first], atol=1e-4)
    np.testing.assert_allclose(mixed[~first], base[~first], atol=1e-4)
    assert np.abs(full[~first] - base[~first]).max() > 1e-2


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_stops_with_its_name(pipeline, tmp_path, part, value):
    """Nothing is written: black images would pass for a class's look."""
    model = getattr(pipeline, part)
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    path, variable = next((p, v) for p, v in flat if p[-1] in ("kernel", "embedding"))
    broken = jnp.full_like(variable.get_value(), value)
    rest = [(p, v.replace(broken) if p == path else v) for p, v in flat]
    damaged = nnx.merge(graphdef, nnx.from_flat_state(rest))
    generator = Generator(dataclasses.replace(pipeline, **{part: damaged}), PROMPTS, CONFIG, seed=3)
    with pytest.raises(UserError, match=r"image 0 of 'a photo of the digit one'.*not finite"):
        fill_store(
            generator,
            tmp_path,
            ("one", "two"),
            PROMPTS,
            dataclasses.replace(CONFIG, images_per_class=2),
            seed=3,
        )
    with pytest.raises(UserError):
        ImageStore(tmp_path)


def test_one_broken_image_of_a_batch_is_the_one_that_is_named(pipeline):
    """A damaged word harms the prompts that hold it and no others."""
    ids = np.asarray(pipeline.tokenizer(["zero", "one"]))
    word = next(int(token) for token in ids[0] if token not in ids[1])
    graphdef, state = nnx.split(pipeline.text_encoder)
    flat = nnx.to_flat_state(state)
    rest = [
        (p, v.replace(v.get_value().at[word].set(jnp.nan)) if "token_embedding" in p else v)
        for p, v in flat
    ]
    damaged = nnx.merge(graphdef, nnx.from_flat_state(rest))
    generator = Generator(
        dataclasses.replace(pipeline, text_encoder=damaged), ["one", "zero"], CONFIG, seed=3
    )
    assert generator(np.array([0, 0]), np.array([0, 1])).std() > 0
    with pytest.raises(UserError, match="image 5 of 'zero' and 1 more of its batch"):
        generator(np.array([0, 1, 1]), np.array([0, 5, 6]))


def test_pictures_of_a_training_are_the_generators(pipeline):
    """And of networks with adapters in them, without compiling again."""
    pictures = sample_images(pipeline, PROMPTS, CONFIG, seed=3, count=3)
    assert pictures.shape == (2, 3, 8, 8, 3) and pictures.dtype == np.uint8
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=3)
    again = generator(np.array([0, 1, 1]), np.array([2, 0, 1]))
    np.testing.assert_array_equal(again[0], pictures[0, 2])
    np.testing.assert_array_equal(again[1:], pictures[1, :2])
    models = [adapted(pipeline, "vera", seed) for seed in (0, 1)]
    first, second = (
        sample_images(pipeline, PROMPTS, CONFIG, seed=3, model=model) for model in models
    )
    assert np.abs(first.astype(int) - second).mean() > 1


def test_sizes(deeper_folder):
    pipeline = load_pipeline(deeper_folder)
    wide = Generator(pipeline, PROMPTS, CONFIG, seed=3, size=(8, 16))
    assert wide(np.array([0, 1]), np.array([0, 0])).shape == (2, 8, 16, 3)
    with pytest.raises(UserError, match=r"size: 10x8 pixels.*multiples of 4"):
        Generator(pipeline, PROMPTS, CONFIG, seed=3, size=(8, 10))


def test_an_unusual_scheduler_names_its_file_and_the_way_out(pipeline):
    config = {**pipeline.scheduler_config, "_class_name": "UniPCMultistepScheduler"}
    unusual = dataclasses.replace(pipeline, scheduler_config=config)
    with pytest.raises(UserError, match=r"scheduler_config\.json.*UniPC.*generate\.sampler=ddim"):
        sampler_of(unusual, "", 4)
    assert len(sampler_of(unusual, "euler_ancestral", 4).timesteps) == 4
    with pytest.raises(UserError, match=r"sampler=heun .*no sampler 'heun'"):
        sampler_of(unusual, "heun", 4)


@pytest.mark.heavy
def test_zero_terminal_snr_draws_what_diffusers_draws(pipeline, base_folder):
    """Velocities on a schedule that ends in noise alone, and guidance rescaled."""
    settings = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    scheduler = {**pipeline.scheduler_config, **settings}
    config = dataclasses.replace(CONFIG, guidance_scale=7.5, guidance_rescale=0.7)
    prompts = list(PROMPTS)
    generator = Generator(
        dataclasses.replace(pipeline, scheduler_config=scheduler), prompts, config, seed=3
    )
    labels, numbers = np.arange(2), np.zeros(2, np.int32)
    found = generator(labels, numbers)
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(base_folder, safety_checker=None)
    oracle.scheduler = diffusers.DDIMScheduler.from_config(scheduler)
    oracle.set_progress_bar_config(disable=True)
    noise = initial_noise(
        image_keys(3, labels, numbers), latent_shape(pipeline), sampler_of(pipeline, "", 2)
    )
    expected = oracle(
        prompts,
        negative_prompt=[""] * 2,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        latents=torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 1).copy()),
        output_type="np",
    ).images
    assert expected.std() > 0.02
    assert np.abs(found / 255 - expected).max() < 1.5 / 255
