"""Motion modules against diffusers' UNetMotionModel; at zero the base; and what they mix."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.models.diffusion.motion import (
    MotionConfig,
    MotionModules,
    positions,
    windows,
    with_motion,
)
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.weights.adapters.motion import read_motion
from tests.methods.small_base import DEEPER, WIDTH, random_network
from tests.models.torch_parity import copy_weights, nchw, nhwc, randomise, relative_error

MOTION = {
    "block_out_channels": (8, 16),
    "motion_layers_per_block": 1,
    "motion_num_attention_heads": 2,
    "motion_norm_num_groups": 4,
    "motion_max_seq_length": 6,
}
FRAMES, CLIPS = 5, 2
call = jax.jit(lambda unet, *inputs: unet(*inputs))


@pytest.fixture(scope="module")
def unets():
    """The same in torch and here."""
    theirs = randomise(diffusers.UNet2DConditionModel(**DEEPER))
    config = UNet2DConditionConfig.from_dict(dict(theirs.config))
    ours = random_network(UNet2DCondition, config, 0)
    copy_weights(theirs, ours)
    return theirs, ours


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(3)
    # Frames of different size, or the two norms would not differ.
    x = (
        rng.standard_normal((CLIPS, FRAMES, 4, 4, 4))
        * np.linspace(0.3, 2, FRAMES)[:, None, None, None]
    )
    text = np.repeat(rng.standard_normal((CLIPS, 7, WIDTH)), FRAMES, axis=0)
    rows = CLIPS * FRAMES
    return x.reshape(rows, 4, 4, 4).astype("f4"), np.full(rows, 10), text.astype("f4")


class PerFrame(torch.nn.Module):
    """A norm of (b, c, f, h, w) whose statistics are those of each frame, as in AnimateDiff."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        batch, channels, frames, *size = x.shape
        apart = x.transpose(1, 2).reshape(batch * frames, channels, *size)
        return self.norm(apart).reshape(batch, frames, channels, *size).transpose(1, 2)


@pytest.mark.heavy
@pytest.mark.parametrize(("middle", "joint"), [(True, True), (False, False)])
def test_the_denoiser_is_that_of_diffusers(unets, inputs, tmp_path, middle, joint):
    adapter = randomise(diffusers.MotionAdapter(**MOTION, use_motion_mid_block=middle), 1)
    adapter.save_pretrained(tmp_path)
    modules = read_motion(tmp_path, unets[1].config)
    theirs = diffusers.UNetMotionModel.from_unet2d(unets[0], adapter).eval()
    for name, module in list(theirs.named_modules()):
        if name.endswith(".norm") and "motion_modules" in name and not joint:
            parent = theirs.get_submodule(name.removesuffix(".norm"))
            parent.norm = PerFrame(module)
    x, _, text = inputs
    clips = nchw(x).reshape(CLIPS, FRAMES, 4, 4, 4).transpose(1, 2)
    with torch.no_grad():
        out = theirs(clips, torch.full((CLIPS,), 10), torch.from_numpy(text)).sample
    expected = nhwc(out.transpose(1, 2).reshape(-1, 4, 4, 4))
    found = call(with_motion(unets[1], modules, frames=FRAMES, joint_norm=joint), *inputs)
    assert relative_error(found, expected) < 1e-4
    other = call(with_motion(unets[1], modules, frames=FRAMES, joint_norm=not joint), *inputs)
    assert relative_error(other, expected) > 1e-3
    assert relative_error(call(unets[1], *inputs), expected) > 1e-2


@pytest.mark.heavy
def test_fresh_modules_and_scale_0_are_the_base(unets, inputs):
    base, config = call(unets[1], *inputs), MotionConfig.from_dict(MOTION)
    fresh = MotionModules(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(call(with_motion(unets[1], fresh, frames=FRAMES), *inputs), base)
    modules = random_network(MotionModules, config, 1)
    off = with_motion(unets[1], modules, frames=FRAMES, scale=0.0)
    np.testing.assert_array_equal(call(off, *inputs), base)
    half = call(with_motion(unets[1], modules, frames=FRAMES, scale=0.5), *inputs)
    assert relative_error(half, base) > 1e-2


def test_frames_see_the_others_of_their_animation_alone(unets, inputs):
    modules = random_network(MotionModules, MotionConfig.from_dict(MOTION), 1)
    moving = with_motion(unets[1], modules, frames=FRAMES)
    x, *rest = inputs
    changed = x.copy()
    changed[1] += 1
    difference = np.abs(np.asarray(call(moving, changed, *rest) - call(moving, x, *rest)))
    by_frame = difference.max(axis=(1, 2, 3))
    assert (by_frame[:FRAMES] > 1e-3).all() and (by_frame[FRAMES:] == 0).all()
    alone = call(unets[1], changed, *rest) - call(unets[1], x, *rest)
    assert (np.abs(np.asarray(alone)).max(axis=(1, 2, 3)) > 0).tolist() == [
        row == 1 for row in range(len(x))
    ]
    # Frames know their places: in another order they are not the same frames.
    order = np.concatenate([np.arange(FRAMES)[::-1], np.arange(FRAMES, 2 * FRAMES)])
    assert relative_error(call(moving, x[order], *rest)[order], call(moving, x, *rest)) > 1e-3


@pytest.mark.heavy
def test_more_frames_than_places_are_drawn_in_windows(unets, inputs):
    """Each window by itself, and the mean of what they say of a frame that they share."""
    assert windows(28, 16).tolist() == [list(range(16)), list(range(12, 28))]
    assert windows(17, 16)[:, 0].tolist() == [0, 1]
    modules = random_network(MotionModules, MotionConfig.from_dict(MOTION), 1)
    moving, shorter = (with_motion(unets[1], modules, frames=n) for n in (10, 6))
    found = call(moving, *inputs)
    places = windows(10, 6)
    assert places[:, 0].tolist() == [0, 4]
    total, times = np.zeros(found.shape), np.zeros(10)
    for place in places:
        total[place] += np.asarray(call(shorter, *(x[place] for x in inputs)))
        times[place] += 1
    assert set(times) == {1, 2}
    assert relative_error(found, total / times[:, None, None, None]) < 1e-5


def test_positions_are_those_of_diffusers():
    adapter = diffusers.MotionAdapter(**MOTION)
    for key, value in adapter.state_dict().items():
        if key.endswith("pos_embed.pe"):
            np.testing.assert_allclose(positions(6, value.shape[2]), value[0], atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_out_channels": (8, 32)}, r"v2 for a base whose block_out_channels is \(8, 32\)"),
        (
            {"motion_layers_per_block": 2, "use_motion_mid_block": False},
            "v1 for a base whose layers",
        ),
        ({"block_out_channels": (8, 16, 16)}, "modules SDXL beta for a base"),
    ],
)
def test_modules_of_another_base_are_refused(unets, changed, message):
    modules = random_network(MotionModules, MotionConfig.from_dict(MOTION | changed), 1)
    with pytest.raises(ValueError, match=message):
        with_motion(unets[1], modules, frames=FRAMES)


def test_configs_that_no_module_has():
    for changed, message in (
        ({"motion_transformer_layers_per_block": 2}, "transformer_layers_per_block: expected 1"),
        ({"conv_in_channels": 9}, "conv_in_channels: expected None"),
        ({"motion_num_attention_heads": 3}, "3 heads do not divide 8"),
        ({"motion_layers_per_block": (1, 2, 3)}, "motion_layers_per_block: expected an int or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            MotionConfig.from_dict(MOTION | changed)
