"""SDXL against diffusers' pipeline on one folder: texts, images, files, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)

from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.samplers import initial_noise, make_sampler, noised
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.controls import Control
from jaxsynth.generation.edited import EditConfig, edit_images
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.generation.image_prompts import ImagePrompt
from jaxsynth.generation.pictures import Pictures
from jaxsynth.generation.sampler import image_keys, sampler_of
from jaxsynth.models.diffusion.controlnet import ControlNet, ControlNetConfig, embedding_channels
from jaxsynth.models.diffusion.image_prompt import (
    ImageAdapter,
    ImageProjection,
    ProjectionConfig,
    attention_places,
)
from jaxsynth.models.diffusion.text_to_image import encode_texts
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.weights.adapters.image_prompts import write_image_adapter
from jaxsynth.weights.hf import (
    EDITING,
    INPAINTING,
    KINDS,
    PIPELINES,
    TEXT_TO_IMAGE,
    describe_pipeline,
    load_pipeline,
    pipeline_configs,
    save_pipeline,
)
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.models import save_model
from tests.methods.small_base import XL_UNET, random_network
from tests.models.torch_parity import relative_error

CONFIG = GenerateConfig(
    num_inference_steps=3, batch_size=2, guidance_scale=4.0, guidance_rescale=0.7
)
# One that nothing is said against, whose negative prompt is zeros, and one with a negative prompt.
PROMPTS, NEGATIVE = ["a photo of the digit two!", "zero"], ["", "one"]
SIZE = (16, 24)
FEATURES = 6
CONTROLNET = ControlNetConfig.from_dict(
    {key: x for key, x in XL_UNET.items() if key not in ("sample_size", "up_block_types")}
    | {"conditioning_embedding_out_channels": embedding_channels(2)}
)


def random_adapter(unet) -> ImageAdapter:
    """An IP-Adapter of random weights for this denoiser."""
    rng = np.random.default_rng(0)

    def kernel(layer):
        shape = layer.kernel.get_value().shape
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    places = attention_places(unet)
    kernels = {path: (kernel(x.to_k), kernel(x.to_v)) for path, x in places.items()}
    config = ProjectionConfig(FEATURES, unet.config.cross_attention_dim)
    return ImageAdapter(random_network(ImageProjection, config, 1), kernels)


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return load_pipeline(sdxl_folder)


@pytest.fixture(scope="module")
def oracle(sdxl_folder):
    found = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    found.set_progress_bar_config(disable=True)
    return found


def test_texts_are_those_of_diffusers(pipeline, oracle):
    found = encode_texts(pipeline.networks, pipeline.tokenizer(PROMPTS))
    with torch.no_grad():
        states, _, pooled, _ = oracle.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert relative_error(found.states, states.numpy()) < 1e-4
    assert relative_error(found.pooled, pooled.numpy()) < 1e-4
    # The tokenizers differ in what follows a text.
    first, second = pipeline.tokenizer(PROMPTS)[1]
    assert (first != second).sum() == len(first) - 3 and second[-1] == 0


@pytest.mark.heavy
def test_images_are_those_of_diffusers(pipeline, oracle):
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=5, negative_prompts=NEGATIVE, size=SIZE)
    labels, numbers = np.arange(2), np.zeros(2, np.int32)
    found = generator(labels, numbers)
    assert found.shape == (2, *SIZE, 3)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    sampler = make_sampler(pipeline.scheduler_config, schedule, CONFIG.num_inference_steps)
    down = pipeline.vae.config.downscale
    noise = initial_noise(
        image_keys(5, labels, numbers), (SIZE[0] // down, SIZE[1] // down, 4), sampler
    )
    for i, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVE, strict=True)):
        latents = np.moveaxis(np.asarray(noise[i : i + 1]), -1, 1).copy()
        expected = oracle(
            prompt,
            negative_prompt=negative or None,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=CONFIG.num_inference_steps,
            guidance_scale=CONFIG.guidance_scale,
            guidance_rescale=CONFIG.guidance_rescale,
            latents=torch.from_numpy(latents),
            output_type="np",
        ).images[0]
        assert np.abs(found[i] / 255 - expected).max() < 1.5 / 255
        assert expected.std() > 0.02
    plain = dataclasses.replace(pipeline, zeroes_empty=False)
    other = Generator(plain, PROMPTS, CONFIG, seed=5, negative_prompts=NEGATIVE, size=SIZE)
    images = other(labels, numbers)
    assert not np.array_equal(images[0], found[0]) and np.array_equal(images[1], found[1])


@pytest.mark.heavy
def test_a_picture_a_controlnet_and_an_image_prompt_are_those_of_diffusers(
    pipeline, sdxl_folder, tmp_path, monkeypatch
):
    """All of them in one program; the ControlNet reads pooled text and sizes, and no image."""
    cls = StableDiffusionXLControlNetImg2ImgPipeline
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    conditions = rng.random((2, 8, 8, 3)).astype(np.float32)
    # diffusers takes one image to prompt by for all prompts.
    features = np.repeat(rng.standard_normal((1, 1, FEATURES)), 2, axis=0).astype(np.float32)
    adapter, strength = random_adapter(pipeline.unet), 0.7
    controlnet = random_network(ControlNet, CONTROLNET, 8)
    generator = Generator(
        pipeline, PROMPTS, dataclasses.replace(CONFIG, guidance_rescale=0.0), seed=5,
        pictures=Pictures([images[:1], images[1:]], strength=strength),
        image_prompts=[ImagePrompt(adapter, features, np.zeros(FEATURES, np.float32), 0.6)],
        controls=[Control(controlnet, conditions, 0.7)],
    )  # fmt: skip
    labels, numbers = np.arange(2), np.zeros(2, np.int32)
    found = generator(labels, numbers)

    save_model(controlnet, None, tmp_path / "controlnet")
    file = write_image_adapter(tmp_path / "ip-adapter.safetensors", adapter)
    oracle = cls.from_pretrained(
        sdxl_folder, controlnet=ControlNetModel.from_pretrained(tmp_path / "controlnet"),
        add_watermarker=False,
    )  # fmt: skip
    oracle.set_progress_bar_config(disable=True)
    oracle.load_ip_adapter(str(tmp_path), "", file.name, image_encoder_folder=None)
    oracle.set_ip_adapter_scale(0.6)
    sampler = sampler_of(pipeline, "", CONFIG.num_inference_steps, strength)
    keys = image_keys(5, labels, numbers)
    mean, std = encode_images(pipeline.vae, images / np.float32(127.5) - 1)
    noise = initial_noise(keys, mean.shape[1:], sampler)
    unit = noised(keys, 0 * mean, std, dataclasses.replace(sampler, levels=np.eye(2)[:1]))
    latents, noise = (
        torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy()) for x in (mean + unit, noise)
    )
    monkeypatch.setattr(f"{cls.__module__}.randn_tensor", lambda *_, **__: noise)
    expected = oracle(
        PROMPTS,
        image=latents,
        control_image=torch.from_numpy(np.moveaxis(conditions, -1, 1).copy()),
        strength=strength,
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=CONFIG.guidance_scale,
        controlnet_conditioning_scale=0.7,
        ip_adapter_image_embeds=[
            torch.from_numpy(np.stack([np.zeros_like(features[0]), features[0]]))
        ],
        output_type="np",
    ).images
    assert np.abs(found / 255 - expected).max() < 1.5 / 255
    assert expected.std() > 0.02
    assert np.abs(found / 255 - images / 255).max() > 0.05


def reading_more(pipeline, folder, channels):
    """The folder of the base with a denoiser of so many input channels, as it loads."""
    config = UNet2DConditionConfig.from_dict(XL_UNET | {"in_channels": channels})
    unet = random_network(UNet2DCondition, config, 5)
    save_pipeline(dataclasses.replace(pipeline, unet=unet), folder)
    return load_pipeline(folder, kinds=EDITING if channels == 8 else INPAINTING)


def to_torch(array):
    return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


@pytest.mark.heavy
def test_painted_parts_are_those_of_diffusers(pipeline, images, tmp_path, monkeypatch):
    base, strength = reading_more(pipeline, tmp_path / "base", 9), 0.7
    mask = np.zeros((2, 8, 8), bool)
    mask[:, 2:, :5] = True
    pictures = Pictures([images[:1], images[1:]], [mask[:1], mask[1:]], strength=strength)
    generator = Generator(base, PROMPTS, CONFIG, seed=5, pictures=pictures)
    labels, numbers = np.arange(2), np.zeros(2, np.int32)
    found = generator(labels, numbers) / 255

    cls = StableDiffusionXLInpaintPipeline
    oracle = cls.from_pretrained(tmp_path / "base", add_watermarker=False)
    oracle.set_progress_bar_config(disable=True)
    sampler = sampler_of(base, "", CONFIG.num_inference_steps, strength)
    keys = image_keys(5, labels, numbers)
    mean, std = encode_images(base.vae, images / np.float32(127.5) - 1)
    noise = to_torch(initial_noise(keys, mean.shape[1:], sampler))
    unit = noised(keys, 0 * mean, std, dataclasses.replace(sampler, levels=np.eye(2)[:1]))
    around = (images / np.float32(127.5) - 1) * ~mask[..., None]
    seen = np.asarray(base.vae.encode(jnp.asarray(around)).mean) * base.vae.config.scaling_factor
    monkeypatch.setattr(f"{cls.__module__}.randn_tensor", lambda *_, **__: noise)
    latents = to_torch(mean + np.asarray(unit))
    monkeypatch.setattr(cls, "_encode_vae_image", lambda *_, **__: latents)
    expected = oracle(
        PROMPTS,
        image=to_torch(images / np.float32(255)),
        mask_image=torch.from_numpy(mask[:, None].astype(np.float32)),
        masked_image_latents=to_torch(seen),
        height=8,
        width=8,
        strength=strength,
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=CONFIG.guidance_scale,
        guidance_rescale=CONFIG.guidance_rescale,
        output_type="np",
    ).images
    assert np.abs(found - expected).max() < 2.5 / 255
    assert expected.std() > 0.02
    assert np.abs(found - images / 255).max() > 0.05


@pytest.mark.heavy
@pytest.mark.parametrize("negative", ["", "one"])
def test_edits_are_those_of_diffusers(pipeline, images, tmp_path, negative):
    base = reading_more(pipeline, tmp_path / "base", 8)
    config = EditConfig(3, 1.5, 3, batch_size=2, negative_prompt=negative)
    found = edit_images(base, images, PROMPTS, config, seed=5)
    oracle = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(
        tmp_path / "base", add_watermarker=False
    )
    oracle.set_progress_bar_config(disable=True)
    sampler = sampler_of(base, "", config.num_inference_steps)
    keys = image_keys(5, np.zeros(2, np.int32), np.arange(2))
    expected = oracle(
        PROMPTS,
        image=to_torch(images / np.float32(255)),
        height=8,
        width=8,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        image_guidance_scale=config.image_guidance_scale,
        negative_prompt=[negative] * 2 if negative else None,
        latents=to_torch(initial_noise(keys, (4, 4, 4), sampler)),
        output_type="np",
    ).images
    assert np.abs(found / 255 - expected).max() < 2.5 / 255
    assert expected.std() > 0.02
    pictures = Pictures([images[:1], images[1:]])
    drawn = Generator(
        base, PROMPTS, dataclasses.replace(CONFIG, guidance_rescale=0.0, guidance_scale=3.0),
        seed=5, negative_prompts=[negative] * 2, pictures=pictures,
    )  # fmt: skip
    again = drawn.draw(keys, np.arange(2), np.arange(2))
    assert np.abs(again.astype(int) - found).max() <= 1


def test_a_controlnet_of_another_family_is_refused(pipeline):
    config = dataclasses.replace(CONTROLNET, addition_embed_type=None)
    control = Control(random_network(ControlNet, config, 0), np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="addition_embed_type is None, and the base's text_time"):
        Generator(pipeline, PROMPTS, CONFIG, seed=0, controls=[control])


def test_folders_go_to_diffusers_and_back(pipeline, oracle, tmp_path):
    oracle.save_pretrained(tmp_path / "theirs")
    read = load_pipeline(tmp_path / "theirs")
    assert read.zeroes_empty and read.tokenizer.shape == (2, pipeline.tokenizer.shape[1])
    save_pipeline(dataclasses.replace(read, zeroes_empty=False), tmp_path / "ours")
    assert not load_pipeline(tmp_path / "ours").zeroes_empty
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "ours", add_watermarker=False)
    for part, network in pipeline.adaptable.items():
        own = to_file(network)
        for other in (to_file(getattr(read, part)), getattr(again, part).state_dict()):
            assert {k.removeprefix("text_model.") for k in own} == {
                k.removeprefix("text_model.") for k in other
            }
            for key, value in own.items():
                theirs = other[key] if key in other else other[key.removeprefix("text_model.")]
                np.testing.assert_array_equal(value, np.asarray(theirs))
    for texts in (PROMPTS, NEGATIVE):
        np.testing.assert_array_equal(read.tokenizer(texts), pipeline.tokenizer(texts))
    shapes = describe_pipeline(tmp_path / "ours")
    assert [x.shape for x in jax.tree.leaves(shapes.networks)] == [
        x.shape for x in jax.tree.leaves(pipeline.networks)
    ]


def edited(folder, target, part, **changes):
    """A copy of a folder with other values in one of its configs."""
    shutil.copytree(folder, target)
    path = target / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "model_index.json",
            {"text_encoder": [None, None], "requires_aesthetics_score": True},
            "model_index.json: is SDXL's refiner, .* expected a base",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLInpaintPipeline"},
            "'StableDiffusionXLInpaintPipeline', expected one of",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLInstructPix2PixPipeline", "is_cosxl_edit": True},
            "is_cosxl_edit is true, of a network that was trained with the noise of EDM",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline"},
            "addition_embed_type is 'text_time', as SDXL's, but there is one text encoder",
        ),
        (
            "model_index.json",
            {"force_zeros_for_empty_prompt": 1},
            "model_index.json: force_zeros_for_empty_prompt",
        ),
        (
            "tokenizer_2/tokenizer_config.json",
            {"model_max_length": 11},
            "tokenizer_2: max_length is 11, expected that of the first tokenizer, 12",
        ),
    ],
)
def test_other_folders_are_refused(sdxl_folder, tmp_path, part, changes, message):
    folder = edited(sdxl_folder, tmp_path / "edited", part, **changes)
    kinds = KINDS if "is_cosxl_edit" in changes else TEXT_TO_IMAGE
    with pytest.raises(UserError, match=message):
        load_pipeline(folder, kinds=kinds)


def test_parts_that_do_not_fit_are_refused(pipeline, base_folder, tmp_path):
    plain = load_pipeline(base_folder)
    for changes, message in (
        ({"unet": plain.unet}, "unet addition_embed_type is None, expected 'text_time'"),
        ({"text_encoder_2": None, "tokenizer": plain.tokenizer}, "there is one text encoder"),
    ):
        with pytest.raises(UserError, match=message):
            save_pipeline(dataclasses.replace(pipeline, **changes), tmp_path)


def test_what_has_no_use_for_two_text_encoders_refuses_them(sdxl_folder):
    for load in (load_pipeline, describe_pipeline, pipeline_configs):
        with pytest.raises(UserError, match="is SDXL, with two text encoders; expected a base"):
            load(sdxl_folder, kinds=PIPELINES)
