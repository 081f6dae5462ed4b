"""Motion that is trained: nothing at first, diffusers' output from our files, what is refused."""

import jax
import numpy as np
import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import AdapterState, extract, load_state
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.sources.clips import ClipArrays
from jaxsynth.generation.animations import Motion, from_strips, to_strips
from jaxsynth.methods.customize.motion import (
    check_clips,
    learned_modules,
    load_motion,
    save_motion,
    with_domain,
)
from jaxsynth.methods.customize.techniques import prepared
from jaxsynth.models.diffusion.motion import MotionConfig, MotionModules
from jaxsynth.models.diffusion.text_to_image import TextCondition
from jaxsynth.tasks.motion import AnimateDiffConfig, MotionLoRAConfig, encode_clips, starts
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.layout import to_file
from tests.methods.small_base import WIDTH, random_network

FRAMES = 3
# diffusers' norms are over all frames.
MODULES = AnimateDiffConfig(frames=FRAMES, stride=1, version="v2", norm="all")
LORA = MotionLoRAConfig(frames=FRAMES, stride=1, rank=2, norm="all")


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    clips = rng.standard_normal((2, FRAMES, 4, 4, 4)).astype("f4")
    states = rng.standard_normal((2, 5, WIDTH)).astype("f4")
    return clips, np.array([10, 700], np.int32), TextCondition(states)


@pytest.fixture(scope="module")
def denoise():
    return jax.jit(lambda model, *told: model.denoise(*told))


def learned(model, seed):
    """As after a training: every value that learns is another one."""
    state, rng = extract(model), np.random.default_rng(seed)
    arrays = {
        path: value + 0.2 * rng.standard_normal(value.shape).astype("f4")
        for path, value in state.arrays.items()
    }
    return load_state(model, AdapterState(arrays, state.config))


def of_diffusers(unet, inputs):
    """The output of a `UNetMotionModel` for clips."""
    clips, t, text = inputs
    x = torch.from_numpy(clips).permute(0, 4, 1, 2, 3)
    states = torch.from_numpy(text.states).repeat_interleave(FRAMES, 0)
    with torch.no_grad():
        found = unet(x, torch.from_numpy(t), states).sample
    return found.permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.heavy
def test_untrained_modules_are_the_base_exactly(pipeline, inputs, denoise):
    _, model = prepared(MODULES, "", pipeline, jax.random.key(0))
    clips, t, text = inputs
    found = denoise(model, *inputs)
    rows = np.repeat(np.arange(2), FRAMES)
    flat = clips.reshape(-1, *clips.shape[2:])
    alone = denoise(pipeline.networks, flat, t[rows], text.take(rows))
    np.testing.assert_array_equal(np.asarray(found).reshape(alone.shape), alone)
    assert np.abs(np.asarray(denoise(learned(model, 1), *inputs)) - found).max() > 0.01


@pytest.mark.heavy
def test_trained_files_give_the_same_output_in_diffusers(
    pipeline, base_folder, inputs, denoise, tmp_path
):
    """Modules, then a LoRA on them; and both are read again as they were."""
    _, model = prepared(MODULES, "", pipeline, jax.random.key(0))
    model = learned(model, 1)
    file = save_motion(tmp_path / "modules", MODULES, pipeline, model)
    assert file == tmp_path / "modules" / "diffusion_pytorch_model.safetensors"
    base = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    adapter = MotionAdapter.from_pretrained(tmp_path / "modules")
    unet = UNetMotionModel.from_unet2d(base, adapter)
    np.testing.assert_allclose(denoise(model, *inputs), of_diffusers(unet, inputs), atol=1e-4)

    modules = load_motion(tmp_path / "modules", pipeline)
    _, fresh = prepared(LORA, "", pipeline, jax.random.key(0), modules=modules)
    before = np.asarray(denoise(fresh, *inputs))
    np.testing.assert_allclose(before, denoise(model, *inputs), atol=1e-6)
    moved = learned(fresh, 2)
    save_motion(tmp_path / "lora", LORA, pipeline, moved, modules)
    after = np.asarray(denoise(moved, *inputs))
    assert np.abs(after - before).max() > 0.01
    name = "pytorch_lora_weights.safetensors"
    unet.load_lora_adapter(tmp_path / "lora", prefix="unet", weight_name=name)
    np.testing.assert_allclose(after, of_diffusers(unet, inputs), atol=1e-4)
    for folder in (tmp_path / "lora", tmp_path / "lora" / "motion_lora.safetensors"):
        again = load_motion(folder, pipeline, modules)
        moving = Motion(again, FRAMES, joint_norm=True).moving(pipeline.networks)
        clips, t, text = inputs
        rows = np.repeat(np.arange(2), FRAMES)
        flat = clips.reshape(-1, *clips.shape[2:])
        found = denoise(moving, flat, t[rows], text.take(rows))
        np.testing.assert_allclose(np.asarray(found).reshape(after.shape), after, atol=1e-5)


@pytest.mark.heavy
def test_a_domain_adapter_is_in_the_base_and_does_not_learn(pipeline, inputs, denoise):
    config = LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v"))
    networks = registry.add(pipeline.networks, config, rngs=jax.random.key(0))
    state = extract(learned(networks, 3))
    _, plain = prepared(MODULES, "", pipeline, jax.random.key(0))
    _, model = prepared(MODULES, "", with_domain(pipeline, state), jax.random.key(0))
    assert extract(model).arrays.keys() == extract(plain).arrays.keys()
    change = np.asarray(denoise(model, *inputs)) - np.asarray(denoise(plain, *inputs))
    assert np.abs(change).max() > 0.01
    found, expected = (learned_modules(MODULES, pipeline, learned(x, 1)) for x in (model, plain))
    assert to_file(found).keys() == to_file(expected).keys()
    for key, value in to_file(expected).items():
        np.testing.assert_array_equal(to_file(found)[key], value)


def clips_of(count, frames):
    values = np.random.default_rng(0).integers(0, 256, (count, frames, 8, 8, 3), dtype=np.uint8)
    ids = [f"clip {i}" for i in range(count)]
    return ClipArrays(values, np.zeros(count, np.int32), ids, ["one"] * count)


def test_windows_of_a_clip_are_its_frames(pipeline):
    source = clips_of(1, 6)
    config = AnimateDiffConfig(frames=2, stride=2, windows_per_clip=2)
    found = encode_clips(pipeline, source, config, seed=0)
    assert found.mean.shape == found.std.shape == (1, 2, 2, 4, 4, 4)
    single = encode_clips(
        pipeline, source, AnimateDiffConfig(frames=6, stride=1, windows_per_clip=1), seed=0
    )
    assert starts(3, 2) == [0, 3] and starts(5, 1) == [2]
    np.testing.assert_allclose(found.mean[0], single.mean[0, 0][[[0, 2], [3, 5]]], atol=1e-6)
    np.testing.assert_array_equal(found.sizes, np.full((1, 2, 6), [8, 8, 0, 0, 8, 8]))


def test_strips_are_undone():
    clips = clips_of(2, 3).clips
    strips = to_strips(clips)
    assert strips.shape == (2, 8, 24, 3)
    np.testing.assert_array_equal(strips[1, :, 8:16], clips[1, 1])
    np.testing.assert_array_equal(from_strips(strips, 3), clips)


def test_modules_and_clips_that_do_not_fit_are_refused(pipeline):
    source = clips_of(2, 4)
    data = Dataset("x", ("x",), ("x",), "a {}", source, source)
    with pytest.raises(ValueError, match="frames: 25, and motion modules v1 have positions for 24"):
        AnimateDiffConfig(frames=25, version="v1")
    with pytest.raises(UserError, match="4 clips shorter than the 5 frames"):
        check_clips(AnimateDiffConfig(frames=3, stride=2), data, pipeline)
    short = random_network(MotionModules, MotionConfig((8,), 1, 8, 4, 2), 1)
    with pytest.raises(UserError, match=r"motion_lora\.frames: 3, and the motion modules have"):
        check_clips(LORA, data, pipeline, short)
    other = random_network(MotionModules, MotionConfig((8, 16, 16), 1, 8, 4), 1)
    with pytest.raises(UserError, match="motion modules SDXL beta for a base whose block_out"):
        check_clips(LORA, data, pipeline, other)
