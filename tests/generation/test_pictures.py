"""Images that start from images: every sampler and all three kinds of base against diffusers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import schedulers

from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.samplers import NAMES, initial_noise, make_sampler, noised, sample
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.generation.pictures import Pictures
from jaxsynth.generation.sampler import image_keys, sampler_of
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.weights.hf import EDITING, INPAINTING, KINDS, load_pipeline, save_pipeline
from tests.methods.small_base import UNET, random_network

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OWN = {"ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}
STEPS, STRENGTH = 7, 0.6
CONFIG = GenerateConfig(num_inference_steps=STEPS, batch_size=2, guidance_scale=4.0)
PROMPTS = ["a photo", "the digit two"]
BASES = {"text": 4, EDITING: 8, INPAINTING: 9}


def denoise(x, t):
    """A stand-in for a network that has the same values in torch and in JAX."""
    sin = torch.sin if isinstance(x, torch.Tensor) else jnp.sin
    return 0.9 * x + 0.3 * sin(2 * x + t.reshape(-1, 1, 1, 1) / 90)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_steps_are_those_of_diffusers(name, monkeypatch):
    """The rule of its image-to-image pipeline: t_start of the timesteps, and noise to the first."""
    cls = getattr(schedulers, NAMES[name])
    theirs = cls(**SD, **OWN.get(name, {}))
    schedule = NoiseSchedule.from_config({**theirs.config, "_class_name": cls.__name__})
    ours = make_sampler(name, schedule, STEPS, strength=STRENGTH)
    mean = np.random.default_rng(0).standard_normal((2, 3, 3, 2)).astype(np.float32)
    keys = image_keys(3, np.zeros(2, np.int32), np.arange(2))
    noise = np.asarray(initial_noise(keys, mean.shape[1:], ours)) / ours.init_noise_sigma
    start = noised(keys, mean, np.zeros_like(mean), ours)
    found = np.asarray(sample(denoise, start, ours, keys=keys))

    theirs.set_timesteps(STEPS)
    first = STEPS - int(STEPS * STRENGTH)
    if name == "pndm":
        # diffusers cuts the list with the double visit, and so is a step behind: here the visits
        # without the first ones are listed as the scheduler lists them.
        visited = np.unique(theirs.timesteps.numpy())[::-1][first:]
        visited = np.concatenate([visited[:2], visited[1:]])
        theirs.timesteps, first = torch.tensor(visited.copy()), 0
    timesteps = theirs.timesteps[first:]
    np.testing.assert_allclose(ours.timesteps, timesteps.numpy(), rtol=1e-6)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(first)
    x = theirs.add_noise(torch.tensor(mean), torch.tensor(noise), timesteps[:1])
    np.testing.assert_allclose(start, x, rtol=1e-5, atol=1e-5)
    drawn = iter(
        np.asarray(initial_noise_of_step(keys, i, mean.shape[1:])) for i in range(len(timesteps))
    )
    module = cls.__module__
    if ours.stochastic:
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.tensor(next(drawn)))
    for t in timesteps:
        if name == "ddpm" and t == 0:
            next(drawn)  # of the last step diffusers draws none
        x = theirs.step(denoise(theirs.scale_model_input(x, t), t), t, x).prev_sample
    np.testing.assert_allclose(found, x, atol=2e-5 * np.abs(x.numpy()).max())


def initial_noise_of_step(keys, step, shape):
    """The noise that step `step` adds, in the stream that `sample` documents."""
    from jaxsynth.diffusion.samplers import _noise

    return _noise(keys, step + 1, shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_strength_of_one_is_every_step(name):
    schedule = NoiseSchedule.from_config({**SD, **OWN.get(name, {})})
    whole, ours = (make_sampler(name, schedule, 5, strength=s) for s in (None, 1.0))
    np.testing.assert_array_equal(whole.timesteps, ours.timesteps)
    np.testing.assert_array_equal(whole.table, ours.table)
    for wrong, words in ((0.0, "above 0"), (1.5, "at most 1"), (0.1, "leaves none to take")):
        with pytest.raises(ValueError, match=words):
            make_sampler(name, schedule, 5, strength=wrong)


@pytest.fixture(scope="module")
def folders(base_folder, tmp_path_factory):
    """The small pipeline, and the same with denoisers of eight and of nine input channels."""
    made, pipeline = {"text": base_folder}, load_pipeline(base_folder)
    for kind in (EDITING, INPAINTING):
        config = UNet2DConditionConfig.from_dict(UNET | {"in_channels": BASES[kind]})
        unet = random_network(UNet2DCondition, config, 5)
        made[kind] = tmp_path_factory.mktemp("base")
        save_pipeline(dataclasses.replace(pipeline, unet=unet), made[kind])
    return made


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


def torch_images(images):
    return torch.from_numpy(np.moveaxis(images, -1, 1) / np.float32(255))


def to_torch(latents):
    return torch.from_numpy(np.moveaxis(np.asarray(latents), -1, 1).copy())


def drawn(pipeline, images, **more) -> np.ndarray:
    pictures = Pictures([images[:1], images[1:]], **more)
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=7, pictures=pictures)
    return generator(np.array([0, 1]), np.array([0, 5])) / 255


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["text", INPAINTING])
def test_images_are_those_of_diffusers(folders, images, kind, monkeypatch):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    pipeline = load_pipeline(folders[kind], kinds=KINDS)
    cls = StableDiffusionImg2ImgPipeline if kind == "text" else StableDiffusionInpaintPipeline
    oracle = cls.from_pretrained(folders[kind], safety_checker=None)
    oracle.set_progress_bar_config(disable=True)
    mask = np.zeros((2, 8, 8), bool)
    mask[:, 2:, :5] = True
    found = drawn(
        pipeline, images, strength=STRENGTH, masks=None if kind == "text" else [mask[:1], mask[1:]]
    )

    sampler = sampler_of(pipeline, "", STEPS, STRENGTH)
    keys = image_keys(7, np.arange(2), np.array([0, 5]))
    mean, std = encode_images(pipeline.vae, images / np.float32(127.5) - 1)
    noise = to_torch(initial_noise(keys, mean.shape[1:], sampler))
    unit = noised(keys, 0 * mean, std, dataclasses.replace(sampler, levels=np.eye(2)[:1]))
    latents = to_torch(mean + np.asarray(unit))
    module = cls.__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise)
    more = {"image": latents}
    if kind == INPAINTING:
        around = (images / np.float32(127.5) - 1) * ~mask[..., None]
        scale = pipeline.vae.config.scaling_factor
        seen = np.asarray(pipeline.vae.encode(jnp.asarray(around)).mean) * scale
        masked = torch.from_numpy(mask[:, None].astype(np.float32))
        more |= {"mask_image": masked, "masked_image_latents": to_torch(seen)}
        more |= {"image": torch_images(images), "height": 8, "width": 8}
        monkeypatch.setattr(cls, "_encode_vae_image", lambda *_, **__: latents)
    expected = oracle(
        PROMPTS,
        strength=STRENGTH,
        num_inference_steps=STEPS,
        guidance_scale=CONFIG.guidance_scale,
        output_type="np",
        **more,
    ).images
    assert np.abs(found - expected).max() < 2.5 / 255
    assert expected.std() > 0.02
    assert np.abs(found - images / 255).max() > 0.05


def test_what_a_base_has_no_use_for_is_refused(folders, images):
    bases = {kind: load_pipeline(folder, kinds=KINDS) for kind, folder in folders.items()}
    mask = [np.ones((1, 8, 8), bool)] * 2
    for kind, more, words in (
        ("text", {"masks": mask}, "draws texts, and has no use for a mask"),
        ("text", {"image_guidance_scale": 2.0}, "draws texts, and has no use for a guidance of"),
        (EDITING, {"strength": 0.5}, "edits images, and has no use for a strength"),
        (EDITING, {"masks": mask}, "edits images, and has no use for a mask"),
        (INPAINTING, {}, "paints parts of images and is given no mask"),
        (INPAINTING, {"masks": mask, "image_guidance_scale": 2.0}, "no use for a guidance of"),
    ):
        with pytest.raises(UserError, match=words):
            drawn(bases[kind], images, **more)
    rescaled = dataclasses.replace(CONFIG, guidance_rescale=0.7)
    with pytest.raises(UserError, match="edits images, and has no use for a rescaled guidance"):
        Generator(
            bases[EDITING], PROMPTS, rescaled, seed=7, pictures=Pictures([images[:1], images[1:]])
        )
    for kind, words in ((EDITING, "edits images and is given none"), (INPAINTING, "paints parts")):
        with pytest.raises(UserError, match=words):
            Generator(bases[kind], PROMPTS, CONFIG, seed=0)
    with pytest.raises(UserError, match=r"shape .1, 4, 8, 3., expected some of 8x8 pixels"):
        drawn(bases["text"], images[:, :4])
    with pytest.raises(UserError, match="'StableDiffusionInpaintPipeline', expected one of"):
        load_pipeline(folders[INPAINTING])
