"""Image files to uint8 RGB arrays and back.

Every source, the image store and the exports share these few functions, so that a picture means the
same array wherever it is read. Photos come in all kinds: grey, palette, CMYK, 16-bit, with an alpha
channel, with an EXIF rotation, from phones (MPO, HEIC) and scanners (hundreds of megapixels). All
become upright 8-bit RGB here; what cannot be is an error that names the file.
"""

from __future__ import annotations

import io
import logging
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxsynth.core import signatures
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.rows import has_all_rows
from jaxsynth.ops.resize import CropRounding, crop_start

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".gif", ".heic", ".heif",
    ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
)  # fmt: skip
# Pillow's decoders that may see a file; JPEG's reads MPO, too. Others, which run programs (EPS) or
# are hardly ever fuzzed, never do.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM")
# The brands of HEIF's family that hold HEVC pictures, as telephones write them.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif")
# How files begin of which Pillow gives up some.
_STARTS = {
    b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP",
    b"II*\0": "TIFF", b"MM\0*": "TIFF",
}  # fmt: skip
# Where a file may hold further pictures (the second eye, bursts, thumbnails), the first one counts.
_FIRST_OF_MANY = ("MPO", "HEIF")
# Of a picture with more pixels (a scan), one that is 2, 4 or 8 times smaller is made.
LARGE = 2**26
# A header that promises more is refused before anything is decoded. Pillow's own limit would refuse
# a scan of an A3 page at 1200 dots an inch.
MAX_PIXELS = 2**29
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)
_TOO_LARGE = f"expected at most {MAX_PIXELS:,} pixels; make it smaller, or remove it"
# The most pixels a byte of a picture that is larger than LARGE. Scans have a few, one of a single
# colour, which takes memory and time for nothing, up to any number.
_MOST_PACKED = 4096
# Raised when a file's pixels come out otherwise than before.
DECODING = 2

logger = logging.getLogger(__name__)


class ImageError(UserError, ValueError):
    """An image that cannot be turned into RGB; the message names it."""


def open_image(file: IO[bytes], name: str) -> Image.Image:
    """The picture behind a file's header; pixels are not decoded yet.

    ImageError for a kind that is not read, several frames, or too many pixels.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if not head:
        raise ImageError(f"{name}: the file is empty")
    file.seek(0)
    heif = head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS
    try:
        image = _open_heif(file, name) if heif else Image.open(file, formats=_known())
    except UnidentifiedImageError:
        kinds = ", ".join(kind for kind in FORMATS if kind != "DIB")
        begun = next((kind for start, kind in _STARTS.items() if head.startswith(start)), "")
        found = f"none of {kinds} and HEIC"
        if heif:
            found = "a damaged HEIC photo"
        elif begun:
            found = f"a {begun} that is damaged, or whose pixels are of a kind that is not read"
        elif other := signatures.named(head):
            found = f"{other}, none of {kinds} and HEIC"
        raise ImageError(f"{name}: cannot be decoded as an image: it is {found}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name}: {_TOO_LARGE}") from None
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types for damaged files
        raise _undecodable(name, error) from error
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageError(f"{name}: {image.width}x{image.height} pixels, {_TOO_LARGE}")
    if pixels > max(LARGE, _MOST_PACKED * size):
        raise ImageError(
            f"{name}: {image.width}x{image.height} pixels in a file of {size} bytes, expected at "
            f"most {_MOST_PACKED} a byte"
        )
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # the other frames are looked for
        raise _undecodable(name, error) from error
    if frames > 1 and image.format not in _FIRST_OF_MANY:
        raise ImageError(f"{name}: holds {frames} frames, expected a single image")
    return image


@cache
def _known() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _open_heif(file: IO[bytes], name: str) -> Image.Image:
    try:
        import pillow_heif  # pyrefly: ignore[missing-import]
    except ImportError:
        raise ImageError(
            f"{name}: a HEIC photo, as iPhones take them; pip install 'jaxsynth[heic]' to read "
            "such photos, or convert them to JPEG"
        ) from None
    pillow_heif.register_heif_opener()
    return Image.open(file, formats=("HEIF",))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright 8-bit RGB. Transparency is laid over white; 16-bit grey keeps its top 8 bits.

    Grey values of a 16-bit file none of which needs more than 12 bits (as cameras write them) are
    taken for 12-bit ones, of which the top 8 stay.
    """
    factor = 1
    while image.width * image.height > LARGE * factor**2:
        factor *= 2
    if factor > 1:  # JPEG decodes to a smaller size by itself
        wanted = (-(-image.width // factor), -(-image.height // factor))
        image.draft(None, wanted)
        factor = max(1, round(image.width / wanted[0]))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError(f"{name}: holds floating point pixels, expected integer ones")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image), name))
    alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if factor > 1:
        mode = {"1": "L", "P": "RGBA" if alpha else "RGB", "PA": "RGBA"}.get(image.mode)
        image = (image if mode is None else image.convert(mode)).reduce(factor)
    if alpha:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ImageError(f"{name}: pixels from {low} to {high}, expected at most 16 bits")
    twelve = 255 < high < 4096
    if twelve:
        logger.warning("%s: no value above %d in 16 bits: read as 12-bit values", name, high)
    return (values >> (4 if twelve else 8)).astype(np.uint8)


def decode_image(data: bytes | Path, name: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of encoded bytes or of a file. `name` is what an error calls it."""
    name = name or (str(data) if isinstance(data, Path) else "image")
    try:
        content = data if isinstance(data, bytes) else data.read_bytes()
    except OSError as error:  # a link to nowhere, a folder, no permission
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from error
    try:
        with open_image(io.BytesIO(content), name) as image:
            pixels = np.array(to_rgb(image, name))
            if not has_all_rows(image, content):
                raise ImageError(f"{name}: cut short: rows of the picture are missing")
            return pixels
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name}: {_TOO_LARGE}") from None
    except Exception as error:  # decoders raise many types for damaged files
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> ImageError:
    text = quoted(str(error) or type(error).__name__, 200)[1:-1]
    return ImageError(f"{name}: cannot be decoded as an image ({text})")


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


def covered(
    image: Image.Image, height: int, width: int, resample: Image.Resampling
) -> tuple[Image.Image, tuple[int, int]]:
    """The middle of an image that is just large enough for so many pixels, and its top and left."""
    scale = max(height / image.height, width / image.width)
    sides = (round(image.height * scale), round(image.width * scale))
    size = (max(sides[1], width), max(sides[0], height))
    fitted = image if image.size == (width, height) else image.resize(size, resample)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return fitted.crop((left, top, left + width, top + height)), (top, left)


def covering(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """The middle of an image that is just large enough for so many pixels (bicubic)."""
    return np.array(covered(Image.fromarray(image), height, width, Image.Resampling.BICUBIC)[0])


def square(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Short side to `size` (bicubic), then the centre; `size` 0 leaves the image as it is."""
    if not size or image.shape[:2] == (size, size):
        return image
    return np.array(center_crop(resize_short(Image.fromarray(image), size), size))


def squares(source: ImageSource, size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """Every image of a source, cut and resized to a square."""
    return np.stack([square(source[i].image, size) for i in range(len(source))])


def check_square(source: ImageSource, what: str) -> list[int]:
    """The sides of square images; UserError naming one that is none, as its crops move `what`."""
    sides = []
    for i, id_ in enumerate(source.ids):
        height, width = source[i].image.shape[:2]
        if height != width:
            raise UserError(
                f"{id_}: {width}x{height} pixels, and {what} go with square images alone: they "
                "would not follow the random crops of others"
            )
        sides.append(width)
    return sides
