"""ControlNets, image prompts, adapters and words in one generation, against diffusers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.samplers import initial_noise
from jaxsynth.generation.controls import Control
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
from jaxsynth.weights.adapters.diffusers import write_diffusers
from jaxsynth.weights.adapters.embeddings import Embedding, write_embedding
from jaxsynth.weights.adapters.image_prompts import write_image_adapter
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.models import save_model
from tests.adapters.nets import randomised
from tests.cli.test_generate import generate, pictures
from tests.methods.small_base import UNET, WIDTH, random_network

PROMPTS = ["a photo", "the digit two"]
CONFIG = GenerateConfig(num_inference_steps=3, guidance_scale=3.0, batch_size=2)


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def controlnet():
    own = {
        key: value for key, value in UNET.items() if key not in ("sample_size", "up_block_types")
    }
    config = ControlNetConfig.from_dict(
        own | {"conditioning_embedding_out_channels": embedding_channels(2)}
    )
    return random_network(ControlNet, config, 8)


def image_adapter(unet):
    """An IP-Adapter of the features that the small CLIP makes."""
    rng = np.random.default_rng(0)

    def kernel(layer):
        shape = layer.kernel.get_value().shape
        return jax.numpy.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), np.float32)

    places = attention_places(unet)
    kernels = {path: (kernel(x.to_k), kernel(x.to_v)) for path, x in places.items()}
    projection = random_network(ImageProjection, ProjectionConfig(WIDTH, WIDTH), 1)
    return ImageAdapter(projection, kernels)


@pytest.fixture(scope="module")
def adapter(pipeline):
    return image_adapter(pipeline.unet)


@pytest.mark.heavy
@pytest.mark.parametrize("guess", [False, True])
def test_a_controlnet_and_an_image_prompt_are_those_of_diffusers(
    pipeline, base_folder, controlnet, adapter, tmp_path, guess
):
    """The ControlNet sees the text alone; in guess mode the branch without one gets nothing."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    rng = np.random.default_rng(1)
    conditions = rng.random((2, 8, 8, 3)).astype(np.float32)
    # diffusers takes one image for all prompts.
    features = np.repeat(rng.standard_normal((1, 1, WIDTH)), 2, axis=0).astype(np.float32)
    control = Control(controlnet, conditions, 0.7, guess_mode=guess)
    prompt = ImagePrompt(adapter, features, np.zeros(WIDTH, np.float32), 0.6)
    generator = Generator(
        pipeline, PROMPTS, CONFIG, seed=7, image_prompts=[prompt], controls=[control]
    )
    found = generator(np.array([0, 1]), np.array([0, 0]))

    save_model(controlnet, None, tmp_path / "controlnet")
    file = write_image_adapter(tmp_path / "ip-adapter.safetensors", adapter)
    oracle = StableDiffusionControlNetPipeline.from_pretrained(
        base_folder,
        controlnet=ControlNetModel.from_pretrained(tmp_path / "controlnet"),
        safety_checker=None,
    )
    oracle.set_progress_bar_config(disable=True)
    oracle.load_ip_adapter(str(tmp_path), "", file.name, image_encoder_folder=None)
    oracle.set_ip_adapter_scale(0.6)
    keys = image_keys(7, np.arange(2), np.zeros(2, np.int32))
    noise = np.asarray(initial_noise(keys, (4, 4, 4), sampler_of(pipeline, "", 3)))
    embeds = np.stack([np.zeros_like(features[0]), features[0]])
    expected = oracle(
        PROMPTS,
        image=torch.from_numpy(np.moveaxis(conditions, -1, 1).copy()),
        num_inference_steps=3,
        guidance_scale=3.0,
        controlnet_conditioning_scale=0.7,
        guess_mode=guess,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
        ip_adapter_image_embeds=[torch.from_numpy(embeds)],
        output_type="np",
    ).images
    assert np.abs(found / 255 - expected).max() < 2.5 / 255
    assert expected.std() > 0.02


@pytest.mark.slow
def test_all_combine_in_one_command(base_folder, controlnet, adapter, tmp_path, capfd):
    """At weight 0 each leaves the others' picture as it is, to the bit; at 1 it changes it."""
    pipeline = load_pipeline(base_folder)
    table = pipeline.text_encoder.text_model.embeddings.token_embedding.embedding[...]
    vectors = np.asarray(table)[pipeline.tokenizer(["one two"])[0, 1:3]]
    word = write_embedding(tmp_path / "word.safetensors", Embedding("<new>", vectors))
    unet = registry.add(
        pipeline.unet, LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v")),
        rngs=jax.random.key(0),
    )  # fmt: skip
    lora = tmp_path / "lora.safetensors"
    write_diffusers(lora, {"unet": randomised(inject.extract(unet), 1)})
    save_model(controlnet, None, tmp_path / "net")
    face = write_image_adapter(tmp_path / "ip-adapter.safetensors", adapter)
    rng = np.random.default_rng(2)
    for name in ("condition", "like"):
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image.save(tmp_path / f"{name}.png")
    given = (
        "--prompt=a photo of <new>", f"--embedding={word}", "--count=1", "--steps=2",
        "--guidance=3", f"--condition={tmp_path / 'condition.png'}",
        f"--image-prompt={tmp_path / 'like.png'}", f"--image-encoder={base_folder / 'clip'}",
    )  # fmt: skip

    def drawn(**weights) -> np.ndarray:
        out = tmp_path / "-".join(map(str, weights.values()))
        flags = {"lora": ("adapter", lora), "net": ("controlnet", tmp_path / "net")}
        flags["face"] = ("image-adapter", face)
        own = (f"--{flags[x][0]}={flags[x][1]}:{weight}" for x, weight in weights.items())
        assert generate(base_folder, out, *given, *own) == 0
        return pictures(out)["00000-000.png"]

    plain = drawn(lora=0, net=0, face=0)
    base = tmp_path / "base"
    assert generate(base_folder, base, *given[:5]) == 0
    np.testing.assert_array_equal(plain, pictures(base)["00000-000.png"])
    whole = drawn(lora=1, net=1, face=1).astype(int)
    for name in ("lora", "net", "face"):
        without = drawn(**{other: int(other != name) for other in ("lora", "net", "face")})
        assert np.abs(whole - without).mean() > 0.5, name
    line = json.loads((tmp_path / "1-1-1" / "metadata.jsonl").read_text())
    assert line["controlnets"][0]["weight"] == 1 and line["conditions"][0]["digest"]
    assert (
        line["image_adapters"][0]["file"] == str(face) and line["adapters"] and line["embeddings"]
    )
    capfd.readouterr()
    for flags, words in (
        (("--controlnet=nowhere",), "1 --controlnet, expected one for each"),
        ((f"--image-adapter={face}",), "--image-prompt: 0 given for 1 --image-adapter"),
        (("--guess-mode",), "--guess-mode is for --controlnet, and none is given"),
        ((f"--image-encoder={base_folder}",), "--image-encoder is for --image-adapter"),
    ):
        assert generate(base_folder, tmp_path / "x", "--prompt=zero", *flags) == 2
        assert words in capfd.readouterr().err
    flags = (f"--image-adapter={face}", f"--image-prompt={tmp_path / 'like.png'}")
    assert generate(base_folder, tmp_path / "x", "--prompt=zero", *flags) == 2
    assert "no image_encoder beside it" in capfd.readouterr().err


def test_what_does_not_go_together_is_refused(pipeline, controlnet):
    conditions = np.zeros((2, 8, 8, 3), np.uint8)
    other = dataclasses.replace(controlnet.config, cross_attention_dim=24)
    wrong = random_network(ControlNet, other, 0)
    for control, words in (
        (Control(controlnet, conditions[:, :4]), r"shape \(4, 8, 3\), expected \(8, 8, 3\)"),
        (Control(wrong, conditions), "cross_attention_dim is 24, and the base's 16"),
    ):
        with pytest.raises(UserError, match=words):
            Generator(pipeline, PROMPTS, CONFIG, seed=0, controls=[control])
    images = [np.zeros((1, 8, 8, 3), np.uint8)] * 2
    masks = [np.ones((1, 8, 8), bool)] * 2
    config = dataclasses.replace(pipeline.unet.config, in_channels=9)
    unet = random_network(type(pipeline.unet), config, 0)
    with pytest.raises(UserError, match="a ControlNet goes with a base of texts"):
        Generator(
            dataclasses.replace(pipeline, unet=unet), PROMPTS, CONFIG, seed=0,
            pictures=Pictures(images, masks), controls=[Control(controlnet, conditions)],
        )  # fmt: skip
