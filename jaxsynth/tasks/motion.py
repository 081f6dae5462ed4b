"""Motion modules learn from clips, and LoRA learns on them: what the trainings are told, the data.

AnimateDiff (Guo et al. 2023, arXiv 2307.04725, section 4): the modules stand in a frozen denoiser
of single images and learn to denoise all frames of a clip together, at one time and with one text.
MotionLoRA (section 4.3) adapts the attention of given modules to a kind of motion by a few clips.
The loss, the batches and the trainer are those of images (`tasks.customize`), of which a clip is
one with an axis more.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float

from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.limits import (
    BelowOne,
    Count,
    Natural,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Share,
)
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.augment import DiffusionTransform
from jaxsynth.data.sources.clips import clip_at, window
from jaxsynth.models.diffusion.motion import MotionConfig
from jaxsynth.models.diffusion.unet import UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.tasks.text_to_image import Encoded
from jaxsynth.training.config import TrainingConfig
from jaxsynth.weights.hf import StableDiffusion

# Frames that have a position, and whether the middle block has a module.
VERSIONS = {"v1": (24, False), "v2": (32, True), "v3": (32, False)}
NORMS = ("frame", "all")
# All attentions of the modules, which attend over frames.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ClipConfig(TrainingConfig):
    """How clips are seen; rate, frames, stride and dropout are those of AnimateDiff's code.

    Of each clip `windows_per_clip` windows, spread evenly, of `frames` frames, each `stride` after
    the one before, are encoded beforehand and one drawn each time. The modules' `norm` has the
    statistics of each "frame", or of "all" frames together as diffusers has them. A share
    `caption_dropout` of the texts is emptied. `noise_offset` adds noise to whole channels,
    `snr_gamma` weighs times (min-SNR).
    """

    batch_size: Count = 4
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    frames: Annotated[int, Range(2)] = 16
    stride: Count = 4
    windows_per_clip: Count = 4
    norm: Annotated[str, OneOf(*NORMS)] = "frame"
    caption_dropout: Share = 0.1
    noise_offset: NotNegative = 0.0
    snr_gamma: Positive | None = None


@dataclass(frozen=True)
class AnimateDiffConfig(ClipConfig):
    """How motion modules of a `version` are learned from nothing.

    "v1" has positions for 24 frames; "v2" for 32, and a module in the middle block; "v3" for 32.
    """

    steps: Natural = 100_000
    version: Annotated[str, OneOf(*VERSIONS)] = "v3"

    def __post_init__(self):
        super().__post_init__()
        most, _ = VERSIONS[self.version]
        if self.frames > most:
            raise ValueError(
                f"frames: {self.frames}, and motion modules {self.version} have positions for "
                f"{most}"
            )

    def modules_config(self, base: UNet2DConditionConfig) -> MotionConfig:
        """The form of the modules for a base. ValueError for a base that none fit."""
        most, middle = VERSIONS[self.version]
        return MotionConfig(
            block_out_channels=base.block_out_channels,
            motion_layers_per_block=base.per_level("layers_per_block"),
            motion_norm_num_groups=base.norm_num_groups,
            motion_max_seq_length=most,
            use_motion_mid_block=middle,
        )


@dataclass(frozen=True)
class MotionLoRAConfig(ClipConfig):
    """How LoRA of a `rank` is learned on all attentions of given motion modules.

    The rank is that of the published ones, going by the size of their files. Files have no scale,
    so that alpha is the rank.
    """

    steps: Natural = 2000
    rank: Count = 64
    dropout: BelowOne = 0.0

    @property
    def adapter(self) -> LoRAConfig:
        """The adapter's configuration."""
        return LoRAConfig(
            rank=self.rank, alpha=self.rank, dropout=self.dropout, targets=TARGETS, init="gaussian"
        )


def encode_clips(
    pipeline: StableDiffusion,
    source: ImageSource,
    config: ClipConfig,
    *,
    seed: int,
    batch_size: int = 8,
) -> Encoded:
    """The latents of the windows of all clips, with the sizes of their crops.

    Mean and standard deviation are (n, k, f, h, w, c). A window of frames that are not square is
    cut from a place of its own. SourceError where records are no clips.
    """
    size = pipeline.image_size
    means, stds, sizes = [], [], []
    for i in range(len(source)):
        clip, place = clip_at(source, i)
        last = clip.lengths[place] - window(0, config.frames, config.stride)[-1] - 1
        pixels = []
        for k, start in enumerate(starts(last, config.windows_per_clip)):
            frames = clip.frames(place, window(start, config.frames, config.stride))
            height, width = frames.shape[1:3]
            cut = DiffusionTransform(size, random_crop=height != width)
            cuts = [cut.cut(frame, np.random.default_rng([seed, i, k])) for frame in frames]
            pixels += [image for image, _ in cuts]
            sizes.append((height, width, *cuts[0][1], size, size))
        for found, values in zip(
            (means, stds), encode_images(pipeline.vae, np.stack(pixels), batch_size), strict=True
        ):
            found.append(_windowed(values, config))
    rows = np.asarray(sizes, np.float32).reshape(-1, config.windows_per_clip, 6)
    return Encoded(np.stack(means), np.stack(stds), rows)


def starts(last: int, count: int) -> list[int]:
    """The first frames of so many windows, the last of which begins at `last`."""
    if count == 1:
        return [last // 2]
    return [round(last * k / (count - 1)) for k in range(count)]


def _windowed(
    values: Float[np.ndarray, "n h w c"], config: ClipConfig
) -> Float[np.ndarray, "k f h w c"]:
    return values.reshape(config.windows_per_clip, config.frames, *values.shape[1:])
