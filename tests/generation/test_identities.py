"""InstantID in generation: diffusers' classes put together, what reads the face, the command."""

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
from jaxsynth.generation.conditioners import Text
from jaxsynth.generation.controls import WithControlNets, controlled
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.generation.identities import identity_parts
from jaxsynth.generation.image_prompts import prompted, with_tokens
from jaxsynth.generation.sampler import image_keys, sampler_of
from jaxsynth.models.diffusion.text_to_image import encode_texts, whole_image
from jaxsynth.weights.adapters.diffusers import write_diffusers
from jaxsynth.weights.adapters.embeddings import Embedding, write_embedding
from jaxsynth.weights.adapters.identities import NET, write_identity
from jaxsynth.weights.adapters.image_prompts import write_image_adapter
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.models import save_model
from tests.adapters.nets import randomised
from tests.cli.test_generate import generate, pictures
from tests.generation.identities import FACE, random_identity
from tests.generation.test_combined import image_adapter

CONFIG = GenerateConfig(num_inference_steps=2, guidance_scale=3.0, batch_size=1)
PROMPT = "a photo"


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request, base_folder, sdxl_folder):
    return {"sd": base_folder, "sdxl": sdxl_folder}[request.param]


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def identity(pipeline):
    return random_identity(pipeline.unet)


def embeddings(seed: int = 0) -> np.ndarray:
    """Of two photos of one face."""
    return np.random.default_rng(seed).standard_normal((2, FACE)).astype(np.float32)


def keypoints(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)


def parts(identity, **more):
    return identity_parts(identity, [embeddings()], keypoints(), **more)


def theirs(folder, identity, tmp_path, scale, net_scale, noise):
    """diffusers' pipeline with a ControlNet that is told the tokens of the face and no text."""
    import diffusers

    tokens = {}

    class IdentityNet(diffusers.ControlNetModel):
        def forward(self, sample, timestep, encoder_hidden_states, *args, **kwargs):
            return super().forward(sample, timestep, tokens["face"], *args, **kwargs)

    write_identity(tmp_path, identity)
    name = "StableDiffusionControlNetPipeline"
    more = {"safety_checker": None}
    if (folder / "text_encoder_2").is_dir():
        name, more = "StableDiffusionXLControlNetPipeline", {"add_watermarker": False}
    oracle = getattr(diffusers, name).from_pretrained(
        folder, controlnet=IdentityNet.from_pretrained(tmp_path / NET), **more
    )
    oracle.set_progress_bar_config(disable=True)
    oracle.load_ip_adapter(str(tmp_path), "", "ip-adapter.bin", image_encoder_folder=None)
    oracle.set_ip_adapter_scale(scale)
    embeds = torch.from_numpy(np.stack([np.zeros_like(embeddings()), embeddings()]))
    with torch.no_grad():
        layer = oracle.unet.encoder_hid_proj.image_projection_layers[0]
        tokens["face"] = layer(embeds)
    condition = np.moveaxis(keypoints() / np.float32(255), -1, 1)
    return oracle(
        [PROMPT],
        image=torch.from_numpy(condition.astype(np.float32)),
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=CONFIG.guidance_scale,
        controlnet_conditioning_scale=net_scale,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
        ip_adapter_image_embeds=[embeds[:, None]],
        output_type="latent",
    ).images.numpy()


def drawn_latents(pipeline, image_prompts, controls) -> np.ndarray:
    generator = Generator(
        pipeline, [PROMPT], CONFIG, seed=7, image_prompts=image_prompts, controls=controls
    )
    one = np.zeros(1, np.int32)
    rows = {"prompt": one} | {f"control{i}": c.conditions for i, c in enumerate(controls)}
    return generator.sampler.latents(image_keys(7, one, one), rows, describe=str)


@pytest.mark.heavy
def test_latents_are_those_of_diffusers_with_identity_tokens(folder, pipeline, identity, tmp_path):
    """Both scales, guided away from the tokens of an embedding of zeros; a swapped order shows."""
    prompt, control = parts(identity, scale=0.7, net_scale=0.6)
    noise = initial_noise(
        image_keys(7, np.zeros(1, np.int32), np.zeros(1, np.int32)), (4, 4, 4),
        sampler_of(pipeline, "", CONFIG.num_inference_steps),
    )  # fmt: skip
    expected = np.moveaxis(theirs(folder, identity, tmp_path, 0.7, 0.6, np.asarray(noise)), 1, -1)
    found = drawn_latents(pipeline, [prompt], [control])
    bound = 1e-4 * np.abs(expected).max()
    assert np.abs(found - expected).max() < bound
    first, *_, last = identity.adapter.kernels
    swap = {first: identity.adapter.kernels[last], last: identity.adapter.kernels[first]}
    if identity.adapter.kernels[first][0].shape == identity.adapter.kernels[last][0].shape:
        wrong = dataclasses.replace(prompt.adapter, kernels={**prompt.adapter.kernels, **swap})
        other = drawn_latents(pipeline, [dataclasses.replace(prompt, adapter=wrong)], [control])
        assert np.abs(other - expected).max() > 20 * bound


class Recorded(WithControlNets):
    """Gives what it is told besides, and draws nothing."""

    def denoise(self, x, t, text, **residuals):
        return residuals


def test_identity_tokens_alone_reach_identity_net(pipeline, identity):
    """Other words change no residual of it, another face does; beside a prompt it finds its own."""
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((1, 4, 4, 4)).astype(np.float32), np.array([500])
    beside, _ = identity_parts(random_identity(pipeline.unet, 9), [embeddings(3)], keypoints())

    @jax.jit(static_argnums=0)
    def run(conditioner, model, told):
        condition = (told, (keypoints() / np.float32(255),), np.ones(1, np.float32))
        return conditioner.denoise(model, x, t, condition)

    def residuals(text: str, face: int, extra: int = 0) -> list[np.ndarray]:
        told = encode_texts(pipeline.networks, pipeline.tokenizer([text]))
        if told.pooled is not None:
            # SDXL's pooled text is no part of what cross-attentions see.
            told = told._replace(pooled=0 * told.pooled)
        prompt, control = identity_parts(identity, [embeddings(face)], keypoints(), number=extra)
        prompts = [*[beside] * extra, prompt]
        positive, _ = with_tokens((told.sized(whole_image((8, 8))),) * 2, prompts)
        conditioner = controlled(
            Text(1.0), [control], tokens=[p.tokens for p in prompts], pixels=(8, 8),
            unet=pipeline.unet,
        )  # fmt: skip
        model = Recorded(prompted(pipeline.networks, prompts), [identity.net])
        return jax.tree.leaves(run(conditioner, model, positive))

    seen = residuals("a photo", 0)
    for other in (residuals("the digit two", 0), residuals("a photo", 0, extra=1)):
        for one, two in zip(seen, other, strict=True):
            np.testing.assert_array_equal(one, two)
    face = [
        np.array_equal(one, two) for one, two in zip(seen, residuals("a photo", 1), strict=True)
    ]
    # Of these networks the first outputs come before any cross-attention.
    assert not all(face) and not face[-1]


def test_embeddings_of_another_width_are_refused(identity):
    with pytest.raises(UserError, match="x: reads embeddings of 12 numbers, and these have 7"):
        identity_parts(identity, [np.ones((2, 7))], keypoints(), name="x")


@pytest.mark.slow
def test_a_face_combines_in_one_command(base_folder, tmp_path, capfd):
    """At both weights 0 the picture is the base's to the bit; each alone changes it."""
    pipeline = load_pipeline(base_folder)
    identity = random_identity(pipeline.unet)
    write_identity(tmp_path / "id", identity)
    save_model(identity.net, None, tmp_path / "net")
    write_image_adapter(tmp_path / "ip.safetensors", image_adapter(pipeline.unet))
    np.save(tmp_path / "face.npy", embeddings())
    points = [[2, 2], [5, 2], [4, 4], [2, 6], [5, 6]]
    (tmp_path / "points.json").write_text(json.dumps(points))
    Image.fromarray(keypoints(3)[0]).save(tmp_path / "condition.png")
    table = pipeline.text_encoder.text_model.embeddings.token_embedding.embedding[...]
    vectors = np.asarray(table)[pipeline.tokenizer(["one two"])[0, 1:3]]
    word = write_embedding(tmp_path / "word.safetensors", Embedding("<new>", vectors))
    lora = tmp_path / "lora.safetensors"
    unet = registry.add(
        pipeline.unet, LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v")),
        rngs=jax.random.key(0),
    )  # fmt: skip
    write_diffusers(lora, {"unet": randomised(inject.extract(unet), 1)})
    given = (
        "--prompt=a photo of <new>", f"--embedding={word}", "--count=1", "--steps=2",
        "--guidance=3",
    )  # fmt: skip
    face = (f"--face={tmp_path / 'face.npy'}",)

    def drawn(scale, net, *more) -> np.ndarray:
        out = tmp_path / f"{scale}-{net}-{len(more)}"
        own = (f"--identity={tmp_path / 'id'}:{scale}", f"--keypoints={tmp_path}/points.json:{net}")
        assert generate(base_folder, out, *given, *face, *own, *more) == 0
        return pictures(out)["00000-000.png"].astype(int)

    assert generate(base_folder, tmp_path / "base", *given) == 0
    plain = pictures(tmp_path / "base")["00000-000.png"]
    np.testing.assert_array_equal(drawn(0, 0), plain)
    both, tokens, net = drawn(1, 1), drawn(1, 0), drawn(0, 1)
    for one, other in ((both, plain), (both, tokens), (both, net), (tokens, net)):
        assert np.abs(one - other).mean() > 0.5
    more = (
        f"--controlnet={tmp_path / 'net'}:0.5", f"--condition={tmp_path / 'condition.png'}",
        f"--image-adapter={tmp_path / 'ip.safetensors'}:0.5",
        f"--image-prompt={tmp_path / 'condition.png'}", f"--image-encoder={base_folder / 'clip'}",
    )  # fmt: skip
    together = drawn(1, 1, *more)
    assert np.abs(together - both).mean() > 0.5
    styled = drawn(1, 1, *more, f"--adapter={lora}")
    assert np.abs(together - styled).mean() > 0.5
    line = json.loads((tmp_path / "1-1-0" / "metadata.jsonl").read_text())
    assert line["identity"]["weight"] == 1 and line["face"]["digest"] and line["keypoints"]
    capfd.readouterr()
    for flags, words in (
        (face, "--face is for --identity, and none is given"),
        ((f"--identity={tmp_path / 'id'}",), "--identity needs --face=FILE beside it"),
        ((f"--identity={tmp_path / 'id'}", *face), "--identity needs --keypoints=FILE beside it"),
        (
            (
                f"--identity={tmp_path / 'id'}", f"--face={tmp_path / 'condition.png'}",
                f"--keypoints={tmp_path}/points.json",
            ),
            "a photo needs --face-keypoints=FILE beside it",
        ),
        (
            (
                f"--image-adapter={tmp_path / 'id' / 'ip-adapter.bin'}",
                f"--image-prompt={tmp_path / 'condition.png'}",
            ),
            "is an InstantID, with its ControlNetModel beside it; it is given by --identity",
        ),
    ):  # fmt: skip
        assert generate(base_folder, tmp_path / "x", *given, *flags) == 2
        assert words in capfd.readouterr().err
