"""Image files to uint8 RGB arrays and back.

Every source, the image store and the exports share these few functions, so that a picture means the
same array wherever it is read. Photos come in all kinds: grey, palette, CMYK, 16-bit, with an alpha
channel, with an EXIF rotation. All become upright 8-bit RGB here; what cannot be is an error that
names the file.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxsynth.ops.resize import CropRounding, crop_start

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
)  # fmt: skip


# Raised when a file's pixels come out otherwise than before.
DECODING = 1


class ImageError(ValueError):
    """An image that cannot be turned into RGB; the message names it."""


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright 8-bit RGB. Transparency is laid over white; 16-bit grey keeps its top 8 bits."""
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{name}: holds {image.n_frames} frames, expected a single image")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError(f"{name}: holds floating point pixels, expected integer ones")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name}: pixels from {values.min()} to {values.max()}, expected at most 16 bits"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def decode_image(data: bytes | Path, name: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of encoded bytes or of a file. `name` is what an error calls it."""
    name = name or (str(data) if isinstance(data, Path) else "image")
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return np.array(to_rgb(image, name))
    except ImageError:
        raise
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name}: cannot be decoded as an image ({error})") from error


def decoded_digest(file_digest: str, image_size: int) -> str:
    """Stands for the pixels that come of a file's bytes at an `image_size` (0: as stored)."""
    return f"{file_digest} decoding {DECODING}" + (f" size {image_size}" if image_size else "")


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """PNG bytes without metadata: the same pixels give the same bytes."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ImageError(f"expected a uint8 image (h, w, 3), found {image.dtype} {image.shape}")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def resize_short(image: Image.Image, size: int, resample=Image.Resampling.BICUBIC) -> Image.Image:
    """The short side becomes `size` pixels, the aspect ratio stays."""
    width, height = image.size
    if min(width, height) == size:
        return image
    if width <= height:
        return image.resize((size, max(size, int(size * height / width))), resample)
    return image.resize((max(size, int(size * width / height)), size), resample)


def center_crop(image: Image.Image, size: int, rounding: CropRounding = "round") -> Image.Image:
    """The middle `size` x `size` pixels of an image at least that large."""
    left, top = (crop_start(side, size, rounding) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def square(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Short side to `size` (bicubic), then the centre; `size` 0 leaves the image as it is."""
    if not size or image.shape[:2] == (size, size):
        return image
    return np.array(center_crop(resize_short(Image.fromarray(image), size), size))
