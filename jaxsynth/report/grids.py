"""Grids of sample images as one PNG: a labelled row per class or method.

Small images (32x32) are enlarged by a whole factor with nearest-neighbour, so that a viewer sees
the pixels the model made, and large ones are reduced. The background is transparent and the labels
mid-grey, so that one file reads well on a light and on a dark page.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxsynth.core.words import counted
from jaxsynth.report.fonts import drawable, font_file

# Contrast 4:1 or better against both #ffffff and #16181d.
LABEL_COLOUR = (120, 126, 134, 255)
_GAP, _ROW_GAP, _LABEL_GAP, _FONT_SIZE, _MAX_LABEL = 4, 4, 14, 15, 320


Images = Sequence[UInt8[np.ndarray, "h w 3"] | None] | UInt8[np.ndarray, "n h w 3"]


def write_grid(
    path: Path,
    rows: Sequence[Images],
    labels: Sequence[str] = (),
    *,
    tile: int = 64,
    headings: Sequence[str] = (),
) -> Path:
    """Writes `image_grid` of the same arguments as a PNG and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, labels, tile=tile, headings=headings).save(path, "PNG", optimize=True)
    return path


def image_grid(
    rows: Sequence[Images],
    labels: Sequence[str] = (),
    *,
    tile: int = 64,
    headings: Sequence[str] = (),
) -> Image.Image:
    """Rows of uint8 images, (h, w, 3) or (h, w) and of any number, as one RGBA picture.

    None in a row leaves a place empty. A heading stands over the middle of its column and of those
    after it whose heading is "".

    `tile` is the size in pixels at which the longer side of an image is shown; an image smaller
    than it is enlarged by the largest whole factor that fits (at least 1). `labels` are written to
    the left of the rows and `headings` above the columns. Raises `ValueError` naming the row of an
    image that is not uint8 RGB or grey.
    """
    if labels and len(labels) != len(rows):
        raise ValueError(
            f"image grid: {counted(len(labels), 'label')} for {counted(len(rows), 'row')}"
        )
    names = list(labels) or [""] * len(rows)
    if not any(image is not None for row in rows for image in row):
        raise ValueError(f"image grid: no images in {counted(len(rows), 'row')}")
    tiles = [
        [None if x is None else _tile(x, tile, name or str(number)) for x in row]
        for number, (name, row) in enumerate(zip(names, rows, strict=True))
    ]
    cell_w = max(image.width for row in tiles for image in row if image)
    heights = [max((image.height for image in row if image), default=tile) for row in tiles]
    columns = max(len(row) for row in tiles)

    fonts = [_font(name) for name in names]
    names = [_shorten(drawable(name), font) for name, font in zip(names, fonts, strict=True)]
    label_w = max(round(font.getlength(name)) for name, font in zip(names, fonts, strict=True))
    left = label_w + _LABEL_GAP if label_w else 0
    top = _FONT_SIZE + 10 if headings else 0
    width = left + columns * cell_w + (columns - 1) * _GAP
    height = top + sum(heights) + (len(heights) - 1) * _ROW_GAP
    canvas = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for first, last, heading in _groups(headings[:columns]):
        x = left + (first + last) / 2 * (cell_w + _GAP) + cell_w / 2
        room = (last - first + 1) * (cell_w + _GAP)
        font = _font(heading)
        heading = _shorten(drawable(heading), font, room)
        draw.text((x, 0), heading, LABEL_COLOUR, font=font, anchor="ma")
    y = top
    for name, font, images, row_h in zip(names, fonts, tiles, heights, strict=True):
        draw.text((label_w, y + row_h / 2), name, LABEL_COLOUR, font=font, anchor="rm")
        for column, image in enumerate(images):
            if image is not None:
                canvas.paste(image, (left + column * (cell_w + _GAP), y))
        y += row_h + _ROW_GAP
    return canvas


def _groups(headings: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first column, last column, heading) of each heading with those after it that are ""."""
    starts = [i for i, heading in enumerate(headings) if heading]
    ends = [*(start - 1 for start in starts[1:]), len(headings) - 1]
    return [(a, b, headings[a]) for a, b in zip(starts, ends[: len(starts)], strict=True)]


def _font(text: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file(text)), _FONT_SIZE)


def _tile(image: np.ndarray, tile: int, label: str) -> Image.Image:
    array = np.asarray(image)
    grey, rgb = array.ndim == 2, array.ndim == 3 and array.shape[-1] == 3
    if array.dtype != np.uint8 or not (grey or rgb):
        raise ValueError(
            f"image grid row {label!r}: expected uint8 images of shape (h, w, 3) or (h, w), "
            f"found {array.dtype} {array.shape}"
        )
    picture = Image.fromarray(array).convert("RGB")
    longer = max(picture.size)
    if longer > tile:
        size = tuple(max(1, round(side * tile / longer)) for side in picture.size)
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = tile // longer
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _shorten(label: str, font: ImageFont.FreeTypeFont, room: float = _MAX_LABEL) -> str:
    """Cuts a label in its middle until it fits the room."""
    if font.getlength(label) <= room:
        return label
    keep = len(label)
    while keep > 2:
        keep -= 1
        short = label[: (keep + 1) // 2] + "…" + label[len(label) - keep // 2 :]
        if font.getlength(short) <= room:
            return short
    return "…"
