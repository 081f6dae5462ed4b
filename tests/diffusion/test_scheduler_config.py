"""Old and unusual scheduler configs: what diffusers' own pipeline makes of the same folder."""

import json

import diffusers
import numpy as np
import pytest

from jaxsynth.diffusion.samplers import make_sampler
from jaxsynth.diffusion.scheduler_config import corrected
from jaxsynth.diffusion.schedules import NoiseSchedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# diffusers hands torch tensors to np.array, whose __array__ predates NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

# (the class in model_index.json, the file, words of what is said)
CASES = {
    "ddim of an old release": ("DDIMScheduler", BETAS, ["steps_offset", "clip_sample"]),
    "ddim that clips": (
        "DDIMScheduler",
        {**BETAS, "clip_sample": True, "steps_offset": 1},
        ["clip_sample"],
    ),
    "ddim as it should be": (
        "DDIMScheduler",
        {**BETAS, "clip_sample": False, "steps_offset": 1},
        [],
    ),
    "saved defaults": (
        "DDIMScheduler",
        {**BETAS, "steps_offset": 0, "clip_sample": True, "_use_default_values": ["clip_sample"]},
        ["steps_offset", "clip_sample"],
    ),
    "another class in the file": (
        "EulerDiscreteScheduler",
        {**BETAS, "_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1},
        ["EulerDiscreteScheduler"],
    ),
    "no effect on linspace": ("EulerAncestralDiscreteScheduler", BETAS, []),
    "leading ancestral": (
        "EulerAncestralDiscreteScheduler",
        {**BETAS, "timestep_spacing": "leading"},
        ["steps_offset"],
    ),
    "ddpm": ("DDPMScheduler", BETAS, ["steps_offset", "clip_sample"]),
    "lcm": ("LCMScheduler", {"clip_sample": True}, ["steps_offset", "clip_sample"]),
}


def theirs_of(name, config, tmp_path):
    """The scheduler of a pipeline that diffusers loads from such a folder."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    scheduler = getattr(diffusers, name).from_pretrained(tmp_path)
    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    )
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, scheduler=scheduler, requires_safety_checker=False
    )
    return pipeline.scheduler


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_decides(case, tmp_path):
    name, config, words = CASES[case]
    theirs = theirs_of(name, config, tmp_path)
    theirs.set_timesteps(6)
    found, notes = corrected(config, name)
    sampler = make_sampler(found, NoiseSchedule.from_config(found), 6)
    np.testing.assert_array_equal(sampler.timesteps, theirs.timesteps.numpy())
    clips = theirs.config.get("clip_sample", False)
    assert (getattr(sampler, "clip", None) is not None) == clips
    assert len(notes) == len(words) and all(map(str.__contains__, notes, words)), notes


def test_prk_steps_are_skipped_and_the_rest_is_left_alone():
    config = {**BETAS, "_class_name": "PNDMScheduler", "steps_offset": 1, "tensor_format": "pt"}
    found, notes = corrected(config, "PNDMScheduler")
    assert found == {**config, "skip_prk_steps": True} and len(notes) == 1
    assert "skip_prk_steps is True, not False (the default)" in notes[0]
    make_sampler(found, NoiseSchedule.from_config(found), 6)
    unknown = {**BETAS, "_class_name": "UniPCMultistepScheduler", "solver_type": "bh2"}
    assert corrected(unknown, "UniPCMultistepScheduler") == (unknown, [])


def test_a_pipeline_for_editing_corrects_the_class_alone():
    config = {**BETAS, "_class_name": "DDIMScheduler"}
    found, notes = corrected(config, "EulerDiscreteScheduler", text_to_image=False)
    assert found == {**config, "_class_name": "EulerDiscreteScheduler"} and len(notes) == 1
    assert config["_class_name"] == "DDIMScheduler", "the input is left as it was"
