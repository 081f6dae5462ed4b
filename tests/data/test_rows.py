"""Files whose header promises more rows than their data hold."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxsynth.data import decode
from jaxsynth.data.decode import ImageError, decode_image

SIDE = 41


def picture(kind: str, channels: int) -> np.ndarray:
    """Noise, or a picture that is grey, as what is missing from a JPEG is, in a corner or whole."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, 67, channels), dtype=np.uint8)
    if kind == "noise":
        return pixels
    pixels[0 if kind == "grey" else 20 :, 40 if kind == "corner" else 0 :] = 128
    return pixels


def taller(content: bytes, rows: int) -> bytes:
    """A JPEG whose header claims so many rows more."""
    changed, place = bytearray(content), 2
    while changed[place + 1] not in (0xC0, 0xC2):
        place += 2 + struct.unpack(">H", changed[place + 2 : place + 4])[0]
    changed[place + 5 : place + 7] = struct.pack(">H", SIDE + rows)
    return bytes(changed)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[pixels.shape[-1]]
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(buffer, "JPEG", quality=80, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_jpeg_of_fewer_rows_than_its_header_says(progressive, channels):
    kinds = itertools.product(("noise", "grey", "corner"), (0, 2), (0, 3))
    for kind, subsampling, restarts in kinds:
        options = {"restart_marker_blocks": restarts} if restarts else {}
        content = jpeg(
            picture(kind, channels), progressive=progressive, subsampling=subsampling, **options
        )
        assert decode_image(content).shape == (SIDE, 67, 3), (kind, subsampling, restarts)
        for rows in (16, 100):
            with pytest.raises(ImageError, match=r"a\.jpg: cut short: rows of the picture are"):
                decode_image(taller(content, rows), "a.jpg")


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_a_large_jpeg_of_fewer_rows_than_its_header_says(monkeypatch):
    monkeypatch.setattr(decode, "LARGE", 500)
    for kind in ("noise", "corner"):
        content = jpeg(picture(kind, 3))
        decode_image(content)
        with pytest.raises(ImageError, match="cut short"):
            decode_image(taller(content, 100), "a.jpg")


def other(kind: str, rows: int) -> bytes:
    """A file of another kind with 8 rows, of which its header claims `rows`."""
    image, buffer = Image.fromarray(picture("noise", 3)[:8, :8]), io.BytesIO()
    image.save(buffer, kind)
    content = bytearray(buffer.getvalue())
    if kind == "PNG":
        content[20:24] = struct.pack(">I", rows)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "BMP":
        content[22:26] = struct.pack("<i", rows)
    elif kind == "PPM":
        content = content.replace(b"P6\n8 8\n", b"P6\n8 %d\n" % rows)
    elif kind == "GIF":
        content[8:10] = struct.pack("<H", rows)
        place = content.index(b",\0\0\0\0\x08\0\x08\0")
        content[place + 7 : place + 9] = struct.pack("<H", rows)
    elif kind == "WEBP":
        place = content.index(b"\x9d\x01\x2a") + 5
        content[place : place + 2] = struct.pack("<H", rows)
    else:
        place = content.index(struct.pack("<HHI", 257, 4, 1)) if kind == "TIFF" else 0
        content[place + 8 : place + 12] = struct.pack("<I", rows)
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "GIF", "WEBP", "TIFF"])
def test_files_of_other_kinds_with_fewer_rows_than_their_header_says(kind):
    assert decode_image(other(kind, 8)).shape == (8, 8, 3)
    with pytest.raises(ImageError, match=r"a: "):
        decode_image(other(kind, 64), "a")
