"""Animations against diffusers' pipeline, on devices, through the command, and what is refused."""

import json
import sys

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.diffusion.samplers import initial_noise
from jaxsynth.generation.animations import Motion, frame_keys, on_linear_schedule
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.generation.image_prompts import ImagePrompt
from jaxsynth.generation.pictures import Pictures
from jaxsynth.generation.sampler import image_keys, sampler_of
from jaxsynth.models.diffusion.controlnet import ControlNet, ControlNetConfig, embedding_channels
from jaxsynth.models.diffusion.motion import MotionConfig, MotionModules
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters.diffusers import write_diffusers
from jaxsynth.weights.adapters.motion import write_motion
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.models import save_model
from tests.adapters.nets import randomised
from tests.cli.test_generate import generate
from tests.generation.test_combined import image_adapter
from tests.generation.test_generate import same_images
from tests.methods.small_base import UNET, WIDTH, random_network
from tests.weights.adapters.test_motion import lora_of

FRAMES = 3
PROMPTS = ["a photo", "the digit two"]
CONFIG = GenerateConfig(num_inference_steps=2, guidance_scale=3.0, batch_size=FRAMES)


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def modules():
    return random_network(MotionModules, MotionConfig((8,), 1, 8, 4, 4), 1)


@pytest.fixture(scope="module")
def drawn(pipeline, modules):
    """Animation 0 of the first prompt, drawn alone."""
    motion = Motion(modules, FRAMES, joint_norm=True)
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=7, motion=motion)
    assert generator.batch_size == 1
    return generator(np.array([0]), np.array([0]))


@pytest.mark.heavy
def test_an_animation_is_that_of_diffusers(pipeline, base_folder, modules, drawn, tmp_path):
    """On the linear schedule, from the noise of each frame's own key."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    adapter = MotionAdapter.from_pretrained(write_motion(tmp_path, modules))
    oracle = AnimateDiffPipeline.from_pretrained(base_folder, motion_adapter=adapter)
    oracle.set_progress_bar_config(disable=True)
    oracle.scheduler = DDIMScheduler.from_config(oracle.scheduler.config, beta_schedule="linear")
    keys = frame_keys(image_keys(7, np.zeros(1, int), np.zeros(1, int)), FRAMES)
    noise = np.asarray(initial_noise(keys, (4, 4, 4), sampler_of(pipeline, "", 2)))
    expected = oracle(
        PROMPTS[:1],
        num_frames=FRAMES,
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy()),
        output_type="np",
    ).frames
    assert drawn.shape == expected.shape == (1, FRAMES, 8, 8, 3)
    assert np.abs(drawn / 255 - expected).max() < 2.5 / 255
    assert np.abs(expected[0, 0] - expected[0, 1]).max() > 0.02


@pytest.mark.heavy
def test_two_devices_draw_what_one_does(pipeline, modules, drawn):
    """Three frames are no two devices' share, so that two animations are drawn at a time."""
    generator = Generator(
        pipeline, PROMPTS, CONFIG, seed=7, motion=Motion(modules, FRAMES, joint_norm=True),
        mesh=make_mesh(devices=jax.devices()[:2]),
    )  # fmt: skip
    assert generator.batch_size == 2
    found = generator(np.array([1, 0]), np.array([0, 0]))
    same_images(found[1], drawn[0])
    assert np.abs(found[0].astype(int) - found[1]).max() > 10


@pytest.mark.heavy
def test_weight_0_is_the_base_frame_by_frame(pipeline, modules):
    """Prompted by images and begun with a picture, too; at another weight it is not."""
    rng = np.random.default_rng(0)
    prompt = ImagePrompt(
        image_adapter(pipeline.unet), rng.normal(size=(2, 1, WIDTH)), np.zeros(WIDTH)
    )
    begins = Pictures([rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)] * 2, strength=0.9)
    more = {"seed": 7, "image_prompts": [prompt], "pictures": begins}
    still, moving = (
        Generator(pipeline, PROMPTS, CONFIG, motion=Motion(modules, FRAMES, weight), **more)
        for weight in (0.0, 1.0)
    )
    found, other = (each(np.array([1]), np.array([2])) for each in (still, moving))
    assert np.abs(found.astype(int) - other).max() > 5
    plain = Generator(on_linear_schedule(pipeline), PROMPTS, CONFIG, **more)
    keys = frame_keys(image_keys(7, np.array([1]), np.array([2])), FRAMES)
    alone = plain.draw(keys, np.full(FRAMES, 1), np.arange(FRAMES))
    np.testing.assert_array_equal(found[0], alone)


@pytest.mark.slow
def test_the_command_writes_animations(base_folder, pipeline, modules, tmp_path, capfd):
    """With a LoRA, a LoRA of motion and a ControlNet, of more frames than the modules have places.

    GIF, MP4 and frames; the command goes on where it stopped.
    """
    import av

    motion = write_motion(tmp_path / "motion", modules)
    save_file(lora_of(modules, True), tmp_path / "zoom.safetensors")
    config = LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v"))
    unet = registry.add(pipeline.unet, config, rngs=jax.random.key(0))
    write_diffusers(tmp_path / "lora.safetensors", {"unet": randomised(inject.extract(unet), 1)})
    own = {k: x for k, x in UNET.items() if k not in ("sample_size", "up_block_types")}
    own |= {"conditioning_embedding_out_channels": embedding_channels(2)}
    net = random_network(ControlNet, ControlNetConfig.from_dict(own), 8)
    save_model(net, None, tmp_path / "net")
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "edges.png")
    out = tmp_path / "out"
    asked = (
        "--prompt=one", "--count=2", "--steps=2", f"--motion={motion}", "--frames=5", "--fps=10",
        "--mp4", f"--motion-lora={tmp_path / 'zoom.safetensors'}:0.5",
        f"--adapter={tmp_path / 'lora.safetensors'}", f"--controlnet={tmp_path / 'net'}",
        f"--condition={tmp_path / 'edges.png'}",
    )  # fmt: skip
    assert generate(base_folder, out, *asked) == 0
    assert f"2 animations to {out}" in capfd.readouterr().out
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [line.pop("file_name") for line in lines] == ["00000-000.gif", "00000-001.gif"]
    assert lines[0]["frames"] == 5 and lines[0]["motion"]["weight"] == 1
    with Image.open(out / "00000-001.gif") as gif:
        assert gif.n_frames == 5 and gif.info["duration"] == 100
        assert json.loads(gif.info["comment"]) == lines[1]
    with av.open(out / "00000-001.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == 5
    frames = sorted((out / "00000-001").iterdir())
    assert [path.name for path in frames] == [f"{i:03d}.png" for i in range(5)]
    assert json.loads(Image.open(frames[2]).text["jaxsynth"]) == lines[1] | {"frame": 2}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "metadata.jsonl").unlink()
    assert generate(base_folder, out, *asked) == 0
    assert "2 of them there already" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert generate(base_folder, out, *asked, "--frames=4") == 2
    assert "another request: frames was 5, now 4" in capfd.readouterr().err


def test_what_the_command_refuses(base_folder, modules, tmp_path, capfd, monkeypatch):
    motion = f"--motion={write_motion(tmp_path / 'motion', modules)}"
    file = write_motion(tmp_path / "mm.ckpt", modules, "comfyui")
    lora = tmp_path / "zoom.safetensors"
    save_file(lora_of(modules, False), lora)
    monkeypatch.setitem(sys.modules, "av", None)
    for argv, message in (
        (["--frames=4"], "--frames is for --motion, and none is given"),
        (["--mp4"], "--mp4 is for --motion"),
        ([motion, "--frames=0"], "--frames=0: expected 1 to 1000"),
        ([motion, "--fps=0"], "--fps=0: expected 1 to 100"),
        ([motion, "--store"], "--store: an image store holds no animations"),
        ([motion, "--mp4"], "--mp4 needs a video codec: pip install 'jaxsynth[video]'"),
        (["--motion=nowhere"], "--motion=nowhere: nowhere does not exist"),
        ([f"--motion={base_folder / 'unet'}"], "expected motion modules of AnimateDiff"),
        ([motion, f"--motion-lora={file}"], "holds motion modules (AnimateDiff)"),
        ([f"--adapter={lora}"], "is a LoRA of motion modules (AnimateDiff), not of the base"),
        ([f"--adapter={file}"], "they are given by --motion=PATH"),
    ):
        assert generate(base_folder, tmp_path / "out", "--prompt=one", *argv) in (1, 2), argv
        found = capfd.readouterr().err
        assert message in found and "Traceback" not in found, (argv, found)


def test_an_adapter_for_each_prompt_does_not_move(pipeline, modules):
    config = LoRAConfig(rank=2, alpha=3.0, targets=("to_q",))
    state = inject.extract(registry.add(pipeline.unet, config, rngs=jax.random.key(0)))
    with pytest.raises(ValueError, match="motion with an adapter for each prompt"):
        Generator(
            pipeline, PROMPTS, CONFIG, seed=0, adapters=[state, state], motion=Motion(modules, 3)
        )
