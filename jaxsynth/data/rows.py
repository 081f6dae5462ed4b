"""Whether an image file holds all the rows that its header promises.

Decoders fill rows up that are not there, PNG's and TIFF's with black, JPEG's with grey, and say
nothing. A picture that was cut short, or whose header was changed, must not become training data.
"""

import io
import re
import zlib
from random import Random

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile


def has_all_rows(image: Image.Image, content: bytes) -> bool:
    """False for a PNG, TIFF or JPEG whose data end before the last row; `image` is loaded.

    A PNG with a last row that is not black, and a JPEG with a last pixel that is not grey, are not
    looked at again. JPEGs of arithmetic coding, which may leave out the end of their data, pass.
    """
    if image.format in ("JPEG", "MPO"):
        return _jpeg_has_all_rows(image, content)
    if image.format == "TIFF":
        tags = image.tag_v2  # pyrefly: ignore[missing-attribute]
        strips, rows = tags.get(_STRIPS), tags.get(_ROWS_OF_STRIP)
        # The height as it lies in the file: Pillow has turned the picture upright.
        height = tags.get(_HEIGHT, image.height)
        return not strips or not isinstance(rows, int) or len(strips) * rows >= height
    if image.format != "PNG":
        return True
    last = image.crop((0, image.height - 1, image.width, image.height))
    bits, channels, interlaced = content[24], _CHANNELS.get(content[25], 1), content[28]
    if not interlaced and np.asarray(last).any():
        return True
    wanted = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        width, height = -(-(image.width - left) // across), -(-(image.height - top) // down)
        if width > 0 and height > 0:
            wanted += height * (1 + -(-width * channels * bits // 8))
    return _unpacked(content, wanted)


def _unpacked(content: bytes, wanted: int) -> bool:
    """Whether the image data of a PNG is so many bytes."""
    place, unpack, found = 8, zlib.decompressobj(), 0
    while place + 12 <= len(content) and found < wanted:
        size = int.from_bytes(content[place : place + 4], "big")
        data = content[place + 8 : place + 8 + size] * (content[place + 4 : place + 8] == b"IDAT")
        while data and found < wanted and not unpack.eof:
            found += len(unpack.decompress(data, _PIECE))
            data = unpack.unconsumed_tail
        place += 12 + size
    return found >= wanted


# Samples a pixel by a PNG's type of colours, and where the pixels of its interlaced passes are.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip
_PIECE = 1 << 20
# Tags of a TIFF.
_HEIGHT, _STRIPS, _ROWS_OF_STRIP = 257, 273, 278


def _jpeg_has_all_rows(image: Image.Image, content: bytes) -> bool:
    """Whether the picture stays what it is when its data go on for longer.

    Blocks without data are grey. Where the last pixel is, the picture is decoded again with noise
    after the data of each scan: a decoder passes over it if it has all blocks, and else takes it
    for the next ones.
    """
    last = np.asarray(image.crop((image.width - 1, image.height - 1, image.width, image.height)))
    if ((last < 127) | (last > 128)).any():
        return True
    longer = _lengthened(content)
    if longer is None:
        return True
    with JpegImageFile(io.BytesIO(longer)) as again:
        scale = max(round(again.width / image.width), 1)
        again.draft(None, (again.width // scale, again.height // scale))
        again.load()
        return np.array_equal(np.asarray(again), np.asarray(image))


def _lengthened(content: bytes) -> bytes | None:
    """A JPEG with noise after the data of each scan; None where its data are not Huffman codes."""
    parts, place, restarts = [content[:2]], 2, False
    while (found := _SEGMENT.match(content, place)) is not None:
        kind, start = found[1][0], found.end()
        if kind in _ARITHMETIC:
            return None
        if kind == _END or start + 2 > len(content):
            break
        end = start + int.from_bytes(content[start : start + 2], "big")
        if kind == _INTERVAL:
            restarts = any(content[start + 2 : end])
        if kind != _SCAN:
            parts.append(content[place:end])
            place = end
            continue
        after = _MARKER.search(content, end)
        if after is None:
            break
        data = content[end : after.start()]
        parts += [content[place:end], data, _NOISE]
        if restarts:
            numbers = _RESTART.findall(data)
            first = numbers[-1][0] - 0xD0 + 1 if numbers else 0
            parts += [bytes((0xFF, 0xD0 + (first + i) % 8)) + _NOISE for i in range(8)]
        place = after.start()
    return b"".join([*parts, content[place:]])


# A segment's marker; one that ends a scan's data; one inside of them.
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)
_RESTART = re.compile(rb"\xff([\xd0-\xd7])", re.DOTALL)
_SCAN, _END, _INTERVAL = 0xDA, 0xD9, 0xDD
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_NOISE = bytes(Random(0).choices(range(255), k=256))
