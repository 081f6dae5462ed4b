"""The two of 3D Common Corruptions that a video codec makes: H.265 of low quality or low rate.

Kar et al. 2022, arXiv 2203.01441; the generator's parameters (create_3dcc in
EPFL-VILAB/3DCommonCorruptions). A film of the camera's move, sideways or forward, goes forth and
back, is compressed, and its last frame is kept, in which the camera is where it started. `h265_crf`
sets the quality, `h265_abr` a share of the bit rate that the film has in H.264. The frames are
`corruption_3d.camera_frame`'s. The generator cuts sides of odd length; here they are continued by a
pixel, and cut again, so that no picture changes its size. So are those of small pictures, up to 96
pixels: what x265 (4.2, in PyAV 18.1) makes of smaller frames differs from call to call.

On the host, through PyAV (`pip install "jaxsynth[video]"`), one image at a time: seconds each.
"""

import io
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.robustness.corruptions.common_3d import (
    FRAMES,
    Move,
    camera_frame,
    draw_xy_motion_blur,
    draw_z_motion_blur,
)

CODEC_CORRUPTIONS = ("h265_abr", "h265_crf")
# Constant rate factors, and by what the bit rate is divided, of severities 1 to 5.
CRF = (24, 26, 32, 39, 41)
ABR = (2, 4, 8, 16, 32)
_FPS = 25
_LEAST_SIZE = 96
# One thread: with more, what is decided depends on how many cores there are.
_H265 = {"x265-params": "log-level=none:pools=none:frame-threads=1:wpp=0"}
_H264 = {"threads": "1"}


def corrupt_by_codec(
    name: str,
    images: Float[Array, "n h w 3"],
    depth: Float[Array, "n h w"],
    severity: int,
    key: Key[Array, ""],
    *,
    first: int = 0,
) -> Float[np.ndarray, "n h w 3"]:
    """Images in [0, 1] under one of `CODEC_CORRUPTIONS`, given how deep each pixel lies.

    As `corruptions.corrupt_3d` otherwise: image i is made with fold_in(key, `first` + i). UserError
    without PyAV, ValueError for another name.
    """
    if name not in CODEC_CORRUPTIONS:
        raise ValueError(f"corruption {name!r}: expected one of {', '.join(CODEC_CORRUPTIONS)}")
    av = _library()
    made = []
    for number, (image, far) in enumerate(zip(images, depth, strict=True), first):
        frames = np.asarray(_film(image, far, jax.random.fold_in(key, number)))
        height, width = frames.shape[1:3]
        more = [(0, max(side + side % 2, _LEAST_SIZE) - side) for side in (height, width)]
        even = np.pad(frames, [(0, 0), *more, (0, 0)], mode="edge")
        if name == "h265_crf":
            coded = _encoded(av, even, "libx265", {**_H265, "crf": str(CRF[severity - 1])})
        else:
            size = len(_encoded(av, even, "libx264", _H264))
            rate = int(size * 8 * _FPS / len(even) / ABR[severity - 1])
            limits = {"maxrate": str(rate), "bufsize": str(rate)}
            coded = _encoded(av, even, "libx265", _H265 | limits, rate)
        made.append(_last_frame(av, coded)[:height, :width])
    return np.stack(made).astype(np.float32) / 255


@jax.jit
def _film(
    image: Float[Array, "h w 3"], depth: Float[Array, "h w"], key: Key[Array, ""]
) -> UInt8[Array, "f h w 3"]:
    """A move forth and back, sideways or forward by chance, in 8 bits."""
    which, drawn = jax.random.split(key)
    sideways, forward = (
        draw(drawn, image.shape) for draw in (draw_xy_motion_blur, draw_z_motion_blur)
    )
    chosen = jax.random.bernoulli(which)
    move = Move(*(jnp.where(chosen, a, b) for a, b in zip(sideways, forward, strict=True)))
    parts = jnp.linspace(0, 1, FRAMES)
    forth = jax.lax.map(lambda part: camera_frame(image, depth, move, part), parts)
    forth = jnp.round(jnp.clip(forth, 0, 1) * 255).astype(jnp.uint8)
    return jnp.concatenate([forth, forth[-2::-1]])


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{' and '.join(CODEC_CORRUPTIONS)} need a video codec: pip install av ({error})"
        ) from error
    if "libx265" not in av.codecs_available:
        raise UserError(f"PyAV {av.__version__} has no libx265, which H.265 is written with")
    return av


def _encoded(
    av: Any, frames: UInt8[np.ndarray, "f h w 3"], codec: str, options: dict, rate: int = 0
) -> bytes:
    """The frames as an MP4 file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(_FPS), options=dict(options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if rate:
            stream.bit_rate = rate
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _last_frame(av: Any, coded: bytes) -> UInt8[np.ndarray, "h w 3"]:
    with av.open(io.BytesIO(coded)) as container:
        *_, last = container.decode(video=0)
        return last.to_ndarray(format="rgb24")
