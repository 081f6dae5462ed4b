"""Edits of photos that follow from a text alone: tints, textures, outlines, blur, in any region.

They give pairs of images (a photo, and the photo edited) for any number of concepts without a
diffusion editor, so that image-to-image networks can be trained and compared anywhere. An edit is
an operation, a colour and a region, and its name says so: "red stripes on the top". Nothing is
random, and everything is in fractions of the image's size: a small image of a photo gets the small
image of the photo's edit, as far as its pixels go.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from scipy import ndimage

from jaxsynth.core.errors import UserError, shown
from jaxsynth.data.procedural.shapes import COLOURS

Images = Float32[np.ndarray, "n h w 3"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Lengths, in fractions of the image's shorter side.
_PERIOD = 1 / 6
_SOFT = 1 / 16
_BLUR = 1 / 16
_MEDIAN = 1 / 10
_BLOCKS = 8


@dataclass(frozen=True)
class Edit:
    """One change of a picture. `colour` "" is the operation's own; `region` says where.

    ValueError for an operation, colour or region that is not known.
    """

    operation: str
    colour: str = ""
    region: str = "all"

    def __post_init__(self):
        for field, known in (
            ("operation", OPERATIONS),
            ("colour", ("", *COLOURS)),
            ("region", REGIONS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"Edit.{field}: {shown(getattr(self, field))}, expected one of {sorted(known)}"
                )

    def __str__(self) -> str:
        where = "" if self.region == "all" else f" on the {self.region}"
        return f"{self.colour} {self.operation}{where}".strip()


def edit(
    images: UInt8[np.ndarray, "n h w 3"], what: str | Edit | Sequence[Edit]
) -> UInt8[np.ndarray, "n h w 3"]:
    """The images after `what`: a text that `parse` reads, or edits, done one after the other.

    Image i depends on image i alone. UserError for a text that names no edit, or images of another
    type.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"edit: expected uint8 images (n, h, w, 3), found {images.dtype} {images.shape}"
        )
    edits = parse(what) if isinstance(what, str) else [what] if isinstance(what, Edit) else what
    values = images.astype(np.float32) / 255
    for one in edits:
        made = OPERATIONS[one.operation](values, one.colour)
        mask = REGIONS[one.region](values)
        values = values + mask[..., None] * (np.clip(made, 0, 1) - values)
    return np.round(values * 255).astype(np.uint8)


def parse(text: str) -> tuple[Edit, ...]:
    """The edits that a text names: clauses joined by "and", "then" or commas, in their order.

    A clause names an operation, or a colour alone (then it is a tint); a clause without a region is
    about the whole picture. UserError for a clause that names neither.
    """
    edits = []
    for clause in re.split(r",|;|\band\b|\bthen\b", text.lower()):
        words = re.findall(r"[a-z]+", clause)
        if not words:
            continue
        operation = _first(words, _OPERATION_WORDS)
        colour = _first(words, {name: name for name in COLOURS} | {"gray": "grey"})
        if not operation and not colour:
            raise UserError(
                f"edit {shown(text)}: {shown(clause.strip())} names no edit; known are "
                f"{', '.join(OPERATIONS)}, the colours {', '.join(COLOURS)} and the regions "
                f"{', '.join(REGIONS)}"
            )
        region = _first(words, _REGION_WORDS)
        edits.append(Edit(operation or "tint", colour, region or "all"))
    if not edits:
        raise UserError(f"edit {text!r}: the text is empty")
    return tuple(edits)


def _first(words: Sequence[str], known: dict[str, str]) -> str:
    return next((known[word] for word in words if word in known), "")


def _colour(name: str, default: str) -> Float32[np.ndarray, " 3"]:
    return np.array(COLOURS[name or default], np.float32) / 255


def _luma(images: Images) -> Float32[np.ndarray, "n h w 1"]:
    return (images @ _LUMA)[..., None]


def _side(images: Images) -> int:
    return min(images.shape[1:3])


def _grid(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel's centre, in fractions of the shorter side."""
    rows, columns = np.indices(images.shape[1:3]).astype(np.float32) + np.float32(0.5)
    return rows / _side(images), columns / _side(images)


def _step(values: np.ndarray, softness: float) -> np.ndarray:
    """0 below zero, 1 above, and a ramp as wide as `softness` between."""
    return np.clip(values / max(softness, 1e-6) + 0.5, 0, 1).astype(np.float32)


def _tint(images: Images, colour: str) -> Images:
    """One hue for all: black stays black, white white, and the middle becomes the colour."""
    luma, middle = _luma(images), _colour(colour, "orange")
    low, high = np.minimum(2 * luma, 1), np.maximum(2 * luma - 1, 0)
    return 0.15 * images + 0.85 * (low * middle + high * (1 - middle))


def _overlay(images: Images, pattern: np.ndarray, colour: str, default: str) -> Images:
    """The colour where the pattern (h, w) is 1, with some of the picture shining through."""
    ink = 0.75 * _colour(colour, default) + 0.25 * images
    return images + pattern[..., None] * (ink - images)


def _stripes(images: Images, colour: str) -> Images:
    rows, columns = _grid(images)
    wave = np.sin(2 * np.pi * (rows + columns) / _PERIOD)
    return _overlay(images, _step(wave, 1.0), colour, "black")


def _dots(images: Images, colour: str) -> Images:
    rows, columns = (np.sin(np.pi * x / _PERIOD) ** 2 for x in _grid(images))
    return _overlay(images, _step(rows * columns - 0.5, 0.5), colour, "white")


def _checks(images: Images, colour: str) -> Images:
    rows, columns = (np.sin(np.pi * x / _PERIOD) for x in _grid(images))
    return _overlay(images, _step(rows * columns, 0.5), colour, "black")


def _slope(images: Images) -> np.ndarray:
    """How steep the brightness is (n, h, w): 1 for a step from black to white."""
    luma = _luma(images)[..., 0]

    def along(axis: int) -> np.ndarray:
        """Sobel's filter; scipy's own would smooth over the images as well."""
        smooth = ndimage.correlate1d(luma, [0.25, 0.5, 0.25], 3 - axis, mode="nearest")
        return ndimage.correlate1d(smooth, [-1, 0, 1], axis, mode="nearest")

    return np.hypot(along(1), along(2))


def _lines(images: Images) -> np.ndarray:
    return np.clip(4 * _slope(images) - 0.2, 0, 1)[..., None]


def _outlines(images: Images, colour: str) -> Images:
    lines = _lines(images)
    return images + lines * (_colour(colour, "black") - images)


def _sketch(images: Images, colour: str) -> Images:
    lines = np.maximum(_lines(images), 0.5 * (1 - _luma(images)) ** 2)
    return 1 - lines * (1 - _colour(colour, "black"))


def _relief(images: Images, colour: str) -> Images:
    luma = _luma(images)
    lit = luma - np.roll(luma, (1, 1), (1, 2))
    lit[:, 0] = lit[:, :, 0] = 0
    return _colour(colour, "grey") + 1.5 * lit


def _blurred(images: Images, colour: str) -> Images:
    sigma = _BLUR * _side(images)
    blurred = ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")
    return _washed(blurred, colour)


def _painted(images: Images, colour: str) -> Images:
    """Each channel's median around a pixel: flat strokes with hard edges."""
    size = max(3, round(_MEDIAN * _side(images)))
    return _washed(ndimage.median_filter(images, size=(1, size, size, 1), mode="nearest"), colour)


def _mosaic(images: Images, colour: str) -> Images:
    """Means over a grid of tiles."""
    for axis in (1, 2):
        length = images.shape[axis]
        tiles = min(_BLOCKS * length // _side(images), length)
        tile = np.arange(length) * tiles // length
        means = [images.take(np.flatnonzero(tile == i), axis).mean(axis) for i in range(tiles)]
        images = np.stack(means, axis).take(tile, axis)
    return _washed(images, colour)


def _poster(images: Images, colour: str) -> Images:
    return _washed(np.round(images * 2) / 2, colour)


def _negative(images: Images, colour: str) -> Images:
    return _washed(1 - images, colour)


def _washed(images: Images, colour: str) -> Images:
    """Half of a tint, where a colour is named."""
    return images if not colour else (images + _tint(images, colour)) / 2


OPERATIONS: dict[str, Callable[[Images, str], np.ndarray]] = {
    "tint": _tint,
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "outlines": _outlines,
    "sketch": _sketch,
    "relief": _relief,
    "blur": _blurred,
    "painting": _painted,
    "mosaic": _mosaic,
    "poster": _poster,
    "negative": _negative,
}
_OPERATION_WORDS = {name: name for name in OPERATIONS} | {
    "tinted": "tint",
    "stripe": "stripes",
    "striped": "stripes",
    "hatching": "stripes",
    "dot": "dots",
    "dotted": "dots",
    "halftone": "dots",
    "checked": "checks",
    "chequered": "checks",
    "outline": "outlines",
    "outlined": "outlines",
    "contours": "outlines",
    "drawing": "sketch",
    "sketched": "sketch",
    "emboss": "relief",
    "embossed": "relief",
    "blurred": "blur",
    "painted": "painting",
    "tiles": "mosaic",
    "pixelated": "mosaic",
    "posterized": "poster",
    "inverted": "negative",
}


def _below(place: float) -> Callable[[Images], np.ndarray]:
    return lambda images: _step(_height(images) - place, _SOFT)


def _above(place: float) -> Callable[[Images], np.ndarray]:
    return lambda images: 1 - _below(place)(images)


def _between(first: float, last: float) -> Callable[[Images], np.ndarray]:
    return lambda images: _below(first)(images) * _above(last)(images)


def _height(images: Images) -> np.ndarray:
    """How far down each pixel is, 0 to 1."""
    return _grid(images)[0] * _side(images) / images.shape[1]


def _width(images: Images) -> np.ndarray:
    return _grid(images)[1] * _side(images) / images.shape[2]


def _centre(images: Images) -> np.ndarray:
    """An ellipse of two thirds of the height and width."""
    radius = np.hypot(_height(images) - 0.5, _width(images) - 0.5)
    return _step(1 / 3 - radius, _SOFT)


# A mask (h, w) or (n, h, w) of the images: 1 where an edit shows.
REGIONS: dict[str, Callable[[Images], np.ndarray]] = {
    "all": lambda images: np.ones(images.shape[1:3], np.float32),
    "top": _above(0.4),
    "middle": _between(0.35, 0.6),
    "bottom": _below(0.6),
    "left": lambda images: _step(0.5 - _width(images), _SOFT),
    "right": lambda images: _step(_width(images) - 0.5, _SOFT),
    "centre": _centre,
    "border": lambda images: 1 - _centre(images),
    "shadows": lambda images: _step(0.45 - _luma(images)[..., 0], 0.2),
    "lights": lambda images: _step(_luma(images)[..., 0] - 0.55, 0.2),
}
_REGION_WORDS = {name: name for name in REGIONS if name != "all"} | {
    "upper": "top",
    "sky": "top",
    "lower": "bottom",
    "ground": "bottom",
    "center": "centre",
    "object": "centre",
    "background": "border",
    "frame": "border",
    "dark": "shadows",
    "bright": "lights",
}
