"""Animations of prompts: frames that one program draws together, and their files.

Motion modules (`models.diffusion.motion`) stand in the denoiser, and everything else takes frames
for images: frame t of an animation has the key `fold_in(key of the animation, t)`, and all have its
prompt, adapters and conditions. Bases then draw on the linear schedule of noise that the published
modules were trained with (Guo et al. 2023, arXiv 2307.04725).
"""

import dataclasses
import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt8
from PIL import Image

from jaxsynth.adapters.inject import with_attributes
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_bytes
from jaxsynth.models.diffusion.motion import MotionModules, with_motion
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.weights.hf import StableDiffusion


@dataclasses.dataclass(frozen=True)
class Motion:
    """Motion modules, the `frames` of each animation, and how many times what they add counts.

    `joint_norm` takes their norms over all frames, as diffusers does, instead of over each.
    More frames than the modules have places for are drawn in windows (`with_motion`).
    """

    modules: MotionModules
    frames: int = 16
    scale: float = 1.0
    joint_norm: bool = False

    def moving(self, model: TextToImage) -> TextToImage:
        """The networks with the modules in the denoiser; ValueError for modules of another base."""
        unet = with_motion(
            model.unet,
            self.modules,
            frames=self.frames,
            scale=self.scale,
            joint_norm=self.joint_norm,
        )
        return with_attributes(model, unet=unet)


def at_once(images: int, frames: int, mesh: Mesh | None) -> int:
    """Animations in a batch of so many images: at least one, and such that devices share it."""
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    step = parts // math.gcd(parts, frames)
    return -(-max(1, images // frames) // step) * step


def on_linear_schedule(pipeline: StableDiffusion) -> StableDiffusion:
    """The pipeline with betas that grow linearly between the same ends."""
    config = {**pipeline.scheduler_config, "beta_schedule": "linear"}
    return dataclasses.replace(pipeline, scheduler_config=config)


def frame_keys(keys: Key[Array, " b"], frames: int) -> Key[Array, " n"]:
    """The keys of the frames of each animation, one animation after another."""
    return _frame_keys(keys, np.arange(frames)).reshape(-1)


@jax.jit
def _frame_keys(keys: Array, numbers: Array) -> Array:
    return jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers))(keys)


def to_strips(clips: UInt8[np.ndarray, "n f h w 3"]) -> UInt8[np.ndarray, "n h fw 3"]:
    """The frames of each animation side by side in one picture."""
    count, frames, height, width, channels = clips.shape
    return clips.swapaxes(1, 2).reshape(count, height, frames * width, channels)


def from_strips(
    strips: UInt8[np.ndarray, "n h fw 3"], frames: int
) -> UInt8[np.ndarray, "n f h w 3"]:
    """The animations of so many frames whose `to_strips` these are."""
    count, height, width, channels = strips.shape
    return strips.reshape(count, height, frames, width // frames, channels).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Film:
    """How animations are written: frames a second, and whether there is an MP4 beside the GIF."""

    fps: int = 8
    mp4: bool = False

    def check(self) -> None:
        """UserError where an MP4 is asked for and what writes it is not installed."""
        if self.mp4:
            _library()

    def write(self, path: Path, frames: UInt8[np.ndarray, "f h w 3"], note: str) -> None:
        """Writes `path`, a GIF with the note as its comment, after the MP4 beside it."""
        if self.mp4:
            write_bytes(path.with_suffix(".mp4"), _mp4(frames, self.fps))
        buffer = io.BytesIO()
        first, *others = (Image.fromarray(frame) for frame in frames)
        first.save(
            buffer,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=round(1000 / self.fps),
            loop=0,
            comment=note.encode(),
        )
        write_bytes(path, buffer.getvalue())


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"--mp4 needs a video codec: pip install 'jaxsynth[video]' ({error})"
        ) from error
    return av


def _mp4(frames: UInt8[np.ndarray, "f h w 3"], fps: int) -> bytes:
    """The frames as an MP4 file: H.264 where there is an encoder of it, else MPEG-4."""
    av, file = _library(), io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
