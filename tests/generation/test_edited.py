"""Editing by instruction: diffusers' InstructPix2Pix on the same folder, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.procedural.concepts import Concept, concept_of
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.diffusion.guidance import classifier_free, nested
from jaxsynth.diffusion.samplers import initial_noise, make_sampler
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.edited import EditConfig, edit_images
from jaxsynth.generation.generate import image_keys
from jaxsynth.methods.weightgen.edits import (
    Edits,
    EditsConfig,
    Scene,
    draw_photos,
    write_edits,
)
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.weights.hf import EDITING, load_pipeline, save_pipeline
from tests.methods.small_base import UNET, random_network

CONFIG = EditConfig(num_inference_steps=3, batch_size=2, guidance_scale=4.0, negative_prompt="one")
PROMPTS = ["a photo", "the digit two", "zero"]


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory):
    """The small pipeline with a denoiser of eight input channels."""
    pipeline = load_pipeline(base_folder)
    config = UNet2DConditionConfig.from_dict(UNET | {"in_channels": 8})
    unet = random_network(UNet2DCondition, config, 5)
    path = tmp_path_factory.mktemp("editor")
    save_pipeline(dataclasses.replace(pipeline, unet=unet), path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 8, 3), dtype=np.uint8)


@pytest.mark.heavy
def test_edits_are_those_of_diffusers(folder, images):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = load_pipeline(folder, kinds=EDITING)
    found = edit_images(pipeline, images, PROMPTS, CONFIG, seed=7)
    assert found.shape == images.shape and found.dtype == np.uint8

    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    sampler = make_sampler(pipeline.scheduler_config, schedule, CONFIG.num_inference_steps)
    down = pipeline.vae.config.downscale
    keys = image_keys(7, np.zeros(3, np.int32), np.arange(3))
    noise = initial_noise(keys, (16 // down, 8 // down, 4), sampler)
    oracle = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(
        PROMPTS,
        image=torch.from_numpy(np.moveaxis(images, -1, 1) / np.float32(255)),
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=CONFIG.guidance_scale,
        image_guidance_scale=CONFIG.image_guidance_scale,
        negative_prompt=[CONFIG.negative_prompt] * 3,
        latents=torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 1).copy()),
        output_type="np",
    ).images
    assert np.abs(found / 255 - expected).max() < 2.5 / 255
    assert expected.std() > 0.02


def data_of(images) -> Dataset:
    """The images to learn from, and to measure on."""
    source = ArraySource(images, np.zeros(len(images), int), [str(i) for i in range(len(images))])
    return Dataset("photos", ("a",), ("a",), "{}", source, source)


def scene_of(*concepts) -> Scene:
    return Scene(concepts, 5, photos=3, held_out=2, seed=7)


def test_pairs_of_a_run_may_come_from_a_diffusion_model(folder, images, tmp_path):
    """Here because the program is compiled above; what a stopped run has edited is kept."""
    scene, data = scene_of(Concept("artistic", "the digit two")), data_of(images)
    pipeline = load_pipeline(folder, kinds=EDITING)
    write_edits(tmp_path, scene, data, pipeline, CONFIG)
    edits = Edits(scene, data, tmp_path)
    for name, photos in draw_photos(data, scene).items():
        np.testing.assert_array_equal(edits.photos[name], photos)
        prompts = ["the digit two"] * len(photos)
        expected = edit_images(pipeline, photos, prompts, CONFIG, seed=7)
        np.testing.assert_array_equal(edits([5], name)[0], expected)
    first, _ = sorted(tmp_path.iterdir())
    np.save(first, np.zeros_like(images[:2]))
    write_edits(tmp_path, scene, data, pipeline, CONFIG)
    assert not np.load(first).any(), "kept, not made again"


def test_procedural_edits_need_no_model(images):
    scene = scene_of(concept_of("negative", "artistic"), Concept("artistic", "a castle"))
    edits = Edits(scene, data_of(images))
    np.testing.assert_array_equal(edits([5], "photos")[0], 255 - edits.photos["photos"])
    assert sorted(map(bytes, edits.photos["photos"])) == sorted(map(bytes, images))
    with pytest.raises(UserError, match="'a castle' has no procedural edits"):
        edits([6], "held_out")
    with pytest.raises(ValueError, match="held_out: 4 asked for, the data set has 3"):
        Edits(dataclasses.replace(scene, held_out=4), data_of(images))
    with pytest.raises(ValueError, match=r"edits\.model is '': expected a folder or hub id"):
        EditsConfig("diffusion")
    with pytest.raises(ValueError, match=r"edits\.kind is 'video', expected one of proc"):
        EditsConfig("video")
    with pytest.raises(ValueError, match=r"edits\.how: procedural edits have no settings"):
        EditsConfig(how=CONFIG)


def test_nested_guidance_is_a_chain_of_differences():
    def denoise(x, t, given):
        return x * given

    x, t = jax.numpy.ones((2, 3)), jax.numpy.zeros(2)
    levels = [jax.numpy.full((batch, 3), value) for batch, value in ((1, 1.0), (2, 3.0), (2, 10.0))]
    np.testing.assert_allclose(
        nested(denoise, (1.5, 4.0), levels)(x, t), 1 + 1.5 * (3 - 1) + 4 * (10 - 3)
    )
    np.testing.assert_allclose(nested(denoise, (1.0, 1.0), levels)(x, t), 10)
    one = nested(denoise, (2.5,), levels[:2])(x, t)
    np.testing.assert_allclose(one, classifier_free(denoise, 2.5, levels[1], levels[0])(x, t))
    with pytest.raises(ValueError, match="2 conditions for 2 scales"):
        nested(denoise, (1.0, 2.0), levels[:2])


def test_what_does_not_fit_is_refused(folder, base_folder, images):
    plain = load_pipeline(base_folder)
    with pytest.raises(UserError, match="the denoiser has 4 input channels, expected 8"):
        edit_images(plain, images, PROMPTS, CONFIG, seed=0)
    pipeline = load_pipeline(folder, kinds=EDITING)
    with pytest.raises(UserError, match="2 prompts for 3 images"):
        edit_images(pipeline, images, PROMPTS[:2], CONFIG, seed=0)
    with pytest.raises(UserError, match="images of 7x16 pixels, expected multiples of 2"):
        edit_images(pipeline, images[:, :, :7], PROMPTS, CONFIG, seed=0)
    with pytest.raises(UserError, match="'StableDiffusionInstructPix2PixPipeline', expected one"):
        load_pipeline(folder)
    with pytest.raises(UserError, match="'StableDiffusionPipeline', expected one"):
        load_pipeline(base_folder, kinds=EDITING)
