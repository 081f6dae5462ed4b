"""What the techniques that learn motion do: where their modules stand, and their files."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import (
    AdapterState,
    extract,
    freeze,
    mark_trainable,
    with_attributes,
)
from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.sources.clips import check_lengths
from jaxsynth.generation.animations import Motion
from jaxsynth.models.diffusion.motion import MotionModules, OfClips, check_base, modules_of
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.shapes import transform
from jaxsynth.tasks.motion import AnimateDiffConfig, ClipConfig, MotionLoRAConfig
from jaxsynth.weights.adapters.diffusers import DIFFUSERS_WEIGHTS
from jaxsynth.weights.adapters.motion import (
    read_motion,
    with_motion_lora,
    write_motion,
    write_motion_lora,
)
from jaxsynth.weights.hf import StableDiffusion
from jaxsynth.weights.hub import DIFFUSERS_WEIGHTS as WEIGHTS
from jaxsynth.weights.models import describe

# Beside diffusers' files, in the authors' names.
MODULES, LORA = "motion_modules.safetensors", "motion_lora.safetensors"


def moving(
    training: ClipConfig,
    base: StableDiffusion,
    key: jax.Array,
    modules: MotionModules | None = None,
) -> TextToImage:
    """The networks with what learns in them, whose denoiser takes clips.

    New modules learn themselves and add nothing at first; of given `modules` a LoRA does.
    """
    if isinstance(training, AnimateDiffConfig):
        config = training.modules_config(base.unet.config)
        learning = MotionModules(config, dtype=base.unet.dtype, rngs=nnx.Rngs(key))
        learning = mark_trainable(learning)
    else:
        assert isinstance(training, MotionLoRAConfig) and modules is not None
        learning = registry.add(modules, training.adapter, rngs=key)
    model = motion_of(training, learning).moving(base.networks)
    return with_attributes(model, unet=OfClips(model.unet))


def with_domain(base: StableDiffusion, adapter: AdapterState) -> StableDiffusion:
    """The base with an adapter in it that does not learn."""

    def add(model: TextToImage) -> TextToImage:
        return freeze(registry.attach(model, adapter), [".*"])

    return base.with_networks(transform(add, base.networks))


def motion_of(training: ClipConfig, modules: MotionModules) -> Motion:
    """The modules as the technique uses them."""
    return Motion(modules, training.frames, joint_norm=training.norm == "all")


def learned_modules(
    training: ClipConfig,
    base: StableDiffusion,
    model: TextToImage,
    modules: MotionModules | None = None,
) -> MotionModules:
    """The modules in the networks of `moving`, with what learns in them."""
    form: Any = modules
    if isinstance(training, AnimateDiffConfig):
        form = describe(MotionModules, training.modules_config(base.unet.config))
    return modules_of(model.unet.base, form)


def save_motion(
    folder: Path,
    training: ClipConfig,
    base: StableDiffusion,
    model: TextToImage,
    modules: MotionModules | None = None,
) -> Path:
    """Writes what was learned in diffusers' names, and beside it in the authors'.

    Returns diffusers' file: that of a `MotionAdapter`'s folder, or of a LoRA.
    """
    found = learned_modules(training, base, model, modules)
    if isinstance(training, AnimateDiffConfig):
        write_motion(folder / MODULES, found, "comfyui")
        return write_motion(folder, found) / WEIGHTS
    state = extract(found)
    write_motion_lora(folder / LORA, state, "comfyui")
    return write_motion_lora(folder / DIFFUSERS_WEIGHTS, state)


def load_motion(
    folder: Path, base: StableDiffusion, modules: MotionModules | None = None
) -> MotionModules:
    """The modules of a folder of `save_motion`; a LoRA is in the weights of `modules`."""
    if modules is None:
        return read_motion(folder, base.unet.config, dtype=base.unet.dtype)
    return with_motion_lora(modules, folder)


def check_clips(
    training: ClipConfig,
    data: Dataset,
    base: StableDiffusion,
    modules: MotionModules | None = None,
) -> None:
    """UserError for data without clips, or with clips that are too short, and for modules of
    another base or of fewer frames."""
    check_lengths((data.train, data.test), training.frames, training.stride)
    try:
        if modules is None:
            assert isinstance(training, AnimateDiffConfig)
            config = training.modules_config(base.unet.config)
        else:
            config = modules.config
        check_base(config, base.unet.config)
    except ValueError as error:
        raise UserError(f"motion modules for this base: {error}") from None
    if training.frames > config.motion_max_seq_length:
        raise UserError(
            f"motion_lora.frames: {training.frames}, and the motion modules have positions for "
            f"{config.motion_max_seq_length}"
        )
