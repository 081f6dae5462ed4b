"""IP-Adapter and Plus: diffusers' attention and projections, both files, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.samplers import initial_noise
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.generation.image_prompts import ImagePrompt, prompt_of, prompted, with_tokens
from jaxsynth.generation.sampler import image_keys, sampler_of
from jaxsynth.models.diffusion.image_prompt import (
    ImageAdapter,
    ImageProjection,
    ProjectionConfig,
    Resampler,
    ResamplerConfig,
    attention_places,
    initial_adapter,
    with_image_prompts,
)
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters import tensor_files
from jaxsynth.weights.adapters.image_prompts import (
    find_image_adapter,
    read_image_adapter,
    write_image_adapter,
)
from jaxsynth.weights.adapters.io import Networks, read
from jaxsynth.weights.hf import load_clip, load_pipeline
from jaxsynth.weights.image_encoder import encoder_of, load_image_encoder
from jaxsynth.weights.models import save_model
from jaxsynth.weights.safetensors import opened
from tests.methods.small_base import WIDTH, random_network

FEATURES, TOKENS = 24, 5
KINDS = {
    "ip_adapter": (ImageProjection, ProjectionConfig(FEATURES, WIDTH), (FEATURES,)),
    "plus": (
        Resampler, ResamplerConfig(FEATURES, WIDTH, tokens=6, hidden=64), (TOKENS, FEATURES),
    ),
}  # fmt: skip
SCALES = {
    "one": (0.7, 0.7),
    "by block": (
        {"up_blocks.1.attentions.0": 0.3, "up_blocks.1.attentions.1": 0.8},
        {"up": {"block_1": [0.3, 0.8]}},
    ),
}
call = jax.jit(lambda unet, *inputs: unet(*inputs))


def random_adapter(unet, kind: str, seed: int = 0) -> ImageAdapter:
    cls, config, _ = KINDS[kind]
    rng = np.random.default_rng(seed)

    def kernel(layer):
        shape = layer.kernel.get_value().shape
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    kernels = {
        path: (kernel(layer.to_k), kernel(layer.to_v))
        for path, layer in attention_places(unet).items()
    }
    return ImageAdapter(random_network(cls, config, seed + 1), kernels)


@pytest.fixture(scope="module")
def pipeline(deeper_folder):
    return load_pipeline(deeper_folder)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(3)
    x, text = rng.standard_normal((2, 4, 4, 4)), rng.standard_normal((2, 7, WIDTH))
    return x.astype(np.float32), np.array([10, 500]), text.astype(np.float32)


def features_of(kind: str) -> np.ndarray:
    shape = (2, 1, *KINDS[kind][2])
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def theirs(deeper_folder, file, scale):
    from diffusers import StableDiffusionPipeline

    oracle = StableDiffusionPipeline.from_pretrained(deeper_folder, safety_checker=None)
    oracle.set_progress_bar_config(disable=True)
    oracle.load_ip_adapter(
        str(file.parent.parent), file.parent.name, file.name, image_encoder_folder=None
    )
    oracle.set_ip_adapter_scale(scale)
    return oracle


def outputs(pipeline, adapter, features, inputs, scale, mask=None) -> np.ndarray:
    absent = np.zeros(features.shape[2:], np.float32)
    prompt = ImagePrompt(adapter, features, absent, scale, mask)
    masks = None if mask is None else [jnp.asarray(mask)]
    plain = TextToImage(pipeline.unet, pipeline.text_encoder)
    model = with_image_prompts(plain, [adapter], scales=[prompt.scale_at], masks=masks)
    x, t, text = inputs
    told, _ = with_tokens((TextCondition(jnp.asarray(text)),) * 2, [prompt])
    return np.asarray(call(model.unet, x, t, told.states))


def torch_outputs(oracle, features, inputs, **more) -> np.ndarray:
    x, t, text = inputs
    with torch.no_grad():
        out = oracle.unet(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
            torch.from_numpy(t),
            torch.from_numpy(text),
            added_cond_kwargs={"image_embeds": [torch.from_numpy(features)]},
            **more,
        ).sample
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_diffusers(
    pipeline, deeper_folder, inputs, tmp_path, kind, ending, scale
):
    """Our file read by diffusers, and by us; a swapped order of its numbers would show."""
    ours, their = SCALES[scale]
    adapter, features = random_adapter(pipeline.unet, kind), features_of(kind)
    file = write_image_adapter(tmp_path / "models" / f"ip-adapter_x.{ending}", adapter)
    expected = torch_outputs(theirs(deeper_folder, file, their), features, inputs)
    again = read_image_adapter(tmp_path, pipeline.unet)
    for path, pair in adapter.kernels.items():
        np.testing.assert_array_equal(again.kernels[path], pair)
    found = outputs(pipeline, adapter, features, inputs, ours)
    bound = 1e-4 * np.abs(expected).max()
    assert np.abs(found - expected).max() < bound
    if ending == "safetensors":
        first, _, third, _ = adapter.kernels
        pair = {first: adapter.kernels[third], third: adapter.kernels[first]}
        swapped = {**adapter.kernels, **pair}
        wrong = dataclasses.replace(adapter, kernels=swapped)
        assert (
            np.abs(outputs(pipeline, wrong, features, inputs, ours) - expected).max() > 20 * bound
        )
        with opened(file) as content:
            names = {key for key in content.keys if key.startswith("ip_adapter")}
        assert names == {f"ip_adapter.{i}.to_{x}_ip.weight" for i in (1, 3, 5, 7) for x in "kv"}


def test_a_scale_of_no_place_is_refused(pipeline):
    plain = TextToImage(pipeline.unet, pipeline.text_encoder)
    adapter, features = random_adapter(pipeline.unet, "plus"), features_of("plus")
    prompt = ImagePrompt(
        adapter, features, np.zeros(features.shape[2:]), {"up_blocks.1": 0.5, "up_blocks.7": 1.0}
    )
    with pytest.raises(UserError, match=r"scale: 'up_blocks\.7' is no part .* down_blocks\.0"):
        prompted(plain, [prompt])
    prompted(plain, [dataclasses.replace(prompt, scale={"up_blocks": 0.5})])


def test_a_mask_says_where_an_image_counts(pipeline, deeper_folder, inputs, tmp_path):
    mask = np.zeros((8, 8), np.float32)
    mask[:, 3:] = 1
    adapter, features = random_adapter(pipeline.unet, "ip_adapter"), features_of("ip_adapter")
    file = write_image_adapter(tmp_path / "models" / "ip-adapter.bin", adapter)
    masks = [torch.from_numpy(mask)[None, None]]
    more = {"cross_attention_kwargs": {"ip_adapter_masks": masks}}
    expected = torch_outputs(theirs(deeper_folder, file, 1.0), features, inputs, **more)
    found = outputs(pipeline, adapter, features, inputs, 1.0, mask)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(ValueError, match="a mask of 5x8 pixels, expected the form of the image"):
        outputs(pipeline, adapter, features, inputs, 1.0, mask[:, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_the_base_to_the_bit(pipeline, inputs, kind):
    found = outputs(
        pipeline, random_adapter(pipeline.unet, kind), features_of(kind), inputs, scale=0.0
    )
    np.testing.assert_array_equal(found, call(pipeline.unet, *inputs))


def test_an_untrained_adapter_starts_from_the_text_s_kernels(pipeline):
    adapter = initial_adapter(pipeline.unet, random_adapter(pipeline.unet, "plus").projection)
    for path, layer in attention_places(pipeline.unet).items():
        np.testing.assert_array_equal(adapter.kernels[path][0], layer.to_k.kernel[...])
        np.testing.assert_array_equal(adapter.kernels[path][1], layer.to_v.kernel[...])


@pytest.mark.heavy
def test_images_are_those_of_diffusers(pipeline, deeper_folder, tmp_path):
    """Guided away from the tokens of no image; on two devices the same."""
    adapter = random_adapter(pipeline.unet, "ip_adapter")
    file = write_image_adapter(tmp_path / "models" / "ip-adapter.safetensors", adapter)
    # diffusers takes one image for all prompts.
    features = np.repeat(features_of("ip_adapter")[:1], 2, axis=0)
    prompts, config = ["a photo", "the digit two"], GenerateConfig(num_inference_steps=3)
    config = dataclasses.replace(config, guidance_scale=3.0, batch_size=2)
    prompt = ImagePrompt(adapter, features, np.zeros(FEATURES, np.float32), 0.6)
    found, two = (
        Generator(pipeline, prompts, config, seed=7, image_prompts=[prompt], mesh=mesh)(
            np.array([0, 1]), np.array([0, 0])
        )
        for mesh in (None, make_mesh(data=1, fsdp=2, devices=jax.devices()[:2]))
    )
    assert np.abs(found.astype(int) - two).max() <= 1
    keys = image_keys(7, np.arange(2), np.zeros(2, np.int32))
    noise = np.asarray(initial_noise(keys, (4, 4, 4), sampler_of(pipeline, "", 3)))
    embeds = np.stack([np.zeros_like(features[0]), features[0]])
    expected = theirs(deeper_folder, file, 0.6)(
        prompts,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
        ip_adapter_image_embeds=[torch.from_numpy(embeds)],
        output_type="np",
    ).images
    assert np.abs(found / 255 - expected).max() < 2.5 / 255


def test_an_image_encoder_is_transformers_s(deeper_folder, pipeline, tmp_path):
    """A CLIP's tower, and a folder of the tower alone; no image is zeros, or an image of them."""
    from transformers import CLIPVisionModelWithProjection

    clip = load_clip(deeper_folder / "clip")
    model = clip.model
    tower = CLIPVisionModelWithProjection.from_pretrained(
        deeper_folder / "clip", projection_dim=WIDTH
    )
    tower.save_pretrained(tmp_path / "image_encoder")
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    pixels = (images / 255 - clip.mean) / clip.std
    pixels = np.concatenate([np.zeros_like(pixels[:1]), pixels]).astype(np.float32)
    with torch.no_grad():
        out = tower(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), output_hidden_states=True)
    embeds, states = out.image_embeds.numpy().copy(), out.hidden_states[-2].numpy()
    embeds[0] = 0
    for encoder in (encoder_of(clip), load_image_encoder(str(tmp_path))):
        for expected, of_patches in ((embeds, False), (states, True)):
            found = encoder(list(images), of_patches=of_patches)
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
            assert encoder.features(of_patches) == expected.shape[-1]
    adapter = random_adapter(pipeline.unet, "plus")
    with pytest.raises(UserError, match="x: reads states of patches of 24 numbers, and the image"):
        prompt_of(adapter, encoder_of(clip), [[images[0]]], name="x")
    save_model(pipeline.vae, None, tmp_path / "other")
    with pytest.raises(UserError, match="expected clip or clip_vision_model"):
        load_image_encoder(str(tmp_path / "other"))
    assert model is clip.model


def test_what_is_no_adapter_for_this_base_is_named(pipeline, tmp_path):
    adapter = random_adapter(pipeline.unet, "ip_adapter")
    good = write_image_adapter(tmp_path / "good.bin", adapter)
    content = tensor_files.nested(good)
    kernels, projection = content["ip_adapter"], content["image_proj"]
    of_mid_first = {
        key.replace("3.", "x.").replace("7.", "3.").replace("x.", "7."): value
        for key, value in kernels.items()
    }
    wider = {"proj.weight": np.ones((96, 24)), "proj.bias": np.ones(96), "norm.weight": np.ones(24)}
    many = {f"{2 * i + 1}.to_{x}_ip.weight": np.ones((4, 4)) for i in range(70) for x in "kv"}
    faces = {"proj.0.weight": np.ones((4, 4)), "norm.weight": np.ones(4)}
    from jaxsynth.weights.torch_files.writer import write_pickled

    for name, image_proj, ip_adapter, words in (
        ("order", projection, of_mid_first, r"ip_adapter\.3\.to_k_ip\.weight \(up_blocks"),
        ("sdxl", projection, many, "is for 70 cross-attentions .*another base, SDXL"),
        ("width", wider, kernels, "makes tokens of 24 numbers, and the base attends to 16"),
        ("face", faces, kernels, "is an IP-Adapter FaceID, which needs a face encoder"),
        ("full", {"proj.3.weight": np.ones(4)}, kernels, "is an IP-Adapter Full Face"),
        ("nothing", {"x": np.ones(4)}, kernels, "image_proj has keys such as"),
    ):
        file = tmp_path / f"{name}.bin"
        parts = {"image_proj": image_proj, "ip_adapter": ip_adapter}
        parts = {
            part: {k: np.asarray(v, np.float32) for k, v in own.items()}
            for part, own in parts.items()
        }
        write_pickled(file, parts)
        with pytest.raises(UserError, match=words):
            read_image_adapter(file, pipeline.unet)
    for file in (good, write_image_adapter(tmp_path / "good.safetensors", adapter)):
        with pytest.raises(UserError, match="is an IP-Adapter, not an adapter of layers"):
            read(file, Networks())
    with pytest.raises(UserError, match="no IP-Adapter here"):
        find_image_adapter(tmp_path)
    for name in ("ip-adapter_a.bin", "ip-adapter_b.bin"):
        (tmp_path / name).write_bytes(good.read_bytes())
    with pytest.raises(UserError, match=r"holds ip-adapter_a.bin, ip-adapter_b.bin; say which"):
        find_image_adapter(tmp_path)
