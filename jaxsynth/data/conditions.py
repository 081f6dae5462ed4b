"""Condition images: what a controlled generator is told about a picture besides its prompt.

A condition is float32 (height, width, channels) in [0, 1], aligned with its image pixel by pixel,
as ControlNet takes it (Zhang et al. 2023, arXiv 2302.05543). Kinds and their channels:

- `edges` (1): Canny's edges, 0 or 1 (Canny 1986, IEEE PAMI 8(6));
- `low_resolution` (3): the picture without its details, for super-resolution;
- `segmentation` (3): a colour for each label, from a file beside the image;
- `depth` (1), `mask` (1): grey values from a file beside the image.

Files lie in a folder of their own under the image's name: `photos/cat/1.jpg` and `depth/cat/1.png`.
Drawn images may bring theirs along (`ArraySource.maps`). Nothing here is random. Published
ControlNets want three channels; `np.repeat(edges, 3, axis=-1)` gives a grey condition three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Array, Float32, Integer, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from jaxsynth.core.errors import UserError
from jaxsynth.core.io import file_digests_cached
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.decode import IMAGE_SUFFIXES, center_crop, covered, resize_short
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.views import Subset

CHANNELS = {"edges": 1, "low_resolution": 3, "segmentation": 3, "depth": 1, "mask": 1}
# The kinds that an image alone does not tell.
WITH_PARTNER = ("segmentation", "depth", "mask")

# Below this slope an angle is nearer to the axis than to the diagonal.
_TAN_22_5 = math.sqrt(2) - 1

Partner = Path | np.ndarray
# In pixels: the side of a square, or (height, width).
Size = int | tuple[int, int]
Values = TypeVar("Values", np.ndarray, Array)


def make_condition(
    kind: str, image: UInt8[np.ndarray, "h w 3"], *, partner: Partner | None = None, **options: Any
) -> Float32[np.ndarray, "h w k"]:
    """The condition of `image`, with `CHANNELS[kind]` channels.

    `partner` is what `segmentation`, `depth` and `mask` are read from: a file, or its pixels where
    they are known exactly. `options` are those of the function named like the kind. UserError for
    an unknown kind, or a partner that is missing, superfluous, unreadable or of another size.
    """
    if kind not in CHANNELS:
        raise UserError(f"condition {kind!r}: expected one of {sorted(CHANNELS)}")
    if (partner is None) == (kind in WITH_PARTNER):
        needs = "needs a file aligned with the image" if partner is None else "takes no file"
        raise UserError(f"condition {kind!r} {needs}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(
            f"condition {kind!r}: expected a uint8 image (h, w, 3), found {image.dtype} "
            f"{image.shape}"
        )
    make: Callable[..., np.ndarray] = _KINDS[kind]
    if partner is None:
        return make(image, **options)
    return make(partner, image.shape[:2], **options)


def edges(
    image: UInt8[np.ndarray, "h w 3"], *, sigma: float = 1.0, low: float = 0.1, high: float = 0.2
) -> Float32[np.ndarray, "h w 1"]:
    """Thin lines where the colour changes: 1 on an edge, 0 elsewhere.

    Gaussian blur of `sigma` pixels, Sobel slopes of the channel that is steepest at each pixel,
    thinning across the line, then hysteresis: what is as steep as `high`, and what is as steep as
    `low` and connected with it. Slope 1 is a step from 0 to 255 in an image that was not blurred;
    the defaults are about the thresholds 100 and 200 that OpenCV's Canny is mostly used with.
    """
    if sigma < 0 or not 0 <= low <= high:
        raise UserError(
            f"edges: sigma {sigma}, low {low}, high {high}: expected sigma >= 0 and "
            "0 <= low <= high"
        )
    smooth = ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest")
    slopes = np.stack(
        [
            [ndimage.sobel(channel, axis=axis, mode="nearest") / 4 for axis in (0, 1)]
            for channel in np.moveaxis(smooth, -1, 0)
        ]
    )
    # Rounded, so that slopes that differ by the last bit only are equal on every machine.
    sizes = np.round(np.hypot(slopes[:, 0], slopes[:, 1]), 6)
    steepest = sizes.argmax(0)[None]
    down, right = (np.take_along_axis(slopes[:, axis], steepest, 0)[0] for axis in (0, 1))
    slope = sizes.max(0)
    weak = _thin(slope, down, right) & (slope >= low) & (slope > 0)
    lines, _ = ndimage.label(weak, structure=np.ones((3, 3)))
    kept = np.isin(lines, np.unique(lines[weak & (slope >= high)])) & weak
    return kept[..., None].astype(np.float32)


def _thin(slope: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where a slope is the largest of the three along its own direction, to the nearest 45 degrees.

    Of two equal ones beside each other, as at a clean step, that further right or down stays. On
    an exact diagonal the pixels on both sides of the step do, as stairs.
    """
    height, width = slope.shape
    around = np.pad(slope, 1)
    flat = np.abs(down) <= _TAN_22_5 * np.abs(right)
    steep = np.abs(right) <= _TAN_22_5 * np.abs(down)
    falling = (down > 0) == (right > 0)
    thin = np.zeros(slope.shape, bool)
    for where, (y, x) in (
        (flat, (0, 1)),
        (steep & ~flat, (1, 0)),
        (falling & ~flat & ~steep, (1, 1)),
        (~falling & ~flat & ~steep, (1, -1)),
    ):
        ahead = around[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = around[1 - y : 1 - y + height, 1 - x : 1 - x + width]
        thin |= where & (slope > ahead) & (slope >= behind)
    return thin


def low_resolution(
    image: UInt8[np.ndarray, "h w 3"], *, factor: int = 4
) -> Float32[np.ndarray, "h w 3"]:
    """The image made `factor` times smaller (means over squares) and enlarged again (bicubic).

    Both steps round to 8 bits, as a small image in a file would be.
    """
    height, width = image.shape[:2]
    if not 1 <= factor <= min(height, width):
        raise UserError(
            f"low_resolution: factor {factor}, expected 1 to {min(height, width)} for an image of "
            f"{width}x{height} pixels"
        )
    size = max(1, round(width / factor)), max(1, round(height / factor))
    small = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    large = small.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large, np.float32) / 255


def segmentation(partner: Partner, shape: tuple[int, int]) -> Float32[np.ndarray, "h w 3"]:
    """The colours of a label map: a palette's own, `label_colours` of grey values, or as they are.

    A file is a palette image, a grey image of label numbers, or an RGB image of colours; pixels are
    integers (h, w), or uint8 colours (h, w, 3).
    """
    pixels, name = _pixels(partner, palette=True)
    if pixels.ndim == 2:
        if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0:
            raise UserError(f"{name}: expected label numbers from 0, found {_described(pixels)}")
        pixels = label_colours(pixels)
    elif pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise UserError(f"{name}: expected labels or RGB colours, found {_described(pixels)}")
    _check_size(pixels, shape, name)
    return pixels.astype(np.float32) / 255


def label_colours(labels: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """PASCAL VOC's colours: bits 0, 3, 6, ... of a label are red's from the highest down.

    Green takes bits 1, 4, 7, ... and blue 2, 5, 8, ...; label 0 is black. All labels below 2^24
    differ.
    """
    labels = labels.astype(np.int64)
    channels = [
        sum(((labels >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1).astype(np.uint8)


def depth(
    partner: Partner,
    shape: tuple[int, int],
    *,
    depth_range: tuple[float, float] | Literal["image"] | None = None,
) -> Float32[np.ndarray, "h w 1"]:
    """Grey values of 8 or 16 bits as fractions of the largest their format can hold.

    `depth_range` (a, b) maps the stored value a to 0 and b to 1 instead, and cuts what lies beyond;
    a may be the larger, to turn distance into nearness. "image" takes each image's own least and
    largest value, as ControlNet's relative depth has it (a constant image is 0). Floating point
    pixels need a range.
    """
    pixels, name = _pixels(partner)
    pixels = _grey(pixels, name)
    _check_size(pixels, shape, name)
    values = pixels.astype(np.float64)
    if depth_range == "image":
        first, last = values.min(), values.max()
    elif depth_range is not None:
        first, last = map(float, depth_range)
        if first == last:
            raise UserError(f"depth_range: {depth_range} is empty")
    elif pixels.dtype in (np.uint8, np.uint16):
        first, last = 0, np.iinfo(pixels.dtype).max
    else:
        raise UserError(f"{name}: {pixels.dtype} pixels have no largest value; give a depth_range")
    scaled = (values - first) / (last - first) if first != last else np.zeros_like(values)
    return np.clip(scaled, 0, 1)[..., None].astype(np.float32)


def mask(partner: Partner, shape: tuple[int, int]) -> Float32[np.ndarray, "h w 1"]:
    """How much of each pixel belongs to the object: grey values as fractions of the largest."""
    return depth(partner, shape)


_KINDS = {
    "edges": edges,
    "low_resolution": low_resolution,
    "segmentation": segmentation,
    "depth": depth,
    "mask": mask,
}


def partner_file(folder: str | Path, name: str) -> Path:
    """The file of image `name` ("cat/1.jpg", an `ImageSource`'s id) in a folder of conditions.

    It may have any suffix of an image. UserError if there is none, or more than one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of condition images")
    stem = (folder / name).with_suffix("")
    suffixes = [form for suffix in IMAGE_SUFFIXES for form in (suffix, suffix.upper())]
    found = [path for path in (Path(f"{stem}{suffix}") for suffix in suffixes) if path.is_file()]
    if len(found) != 1:
        what = f"found {[path.name for path in found]}" if found else "there is none"
        raise UserError(f"{stem}.*: expected one condition image for {name!r}, {what}")
    return found[0]


def partner_digests(source: ImageSource, folder: str | Path) -> dict[str, str]:
    """SHA-256 (hex) of each image's condition file, by the image's id. Errors: `partner_file`."""
    return dict(
        zip(
            source.ids,
            file_digests_cached([partner_file(folder, id_) for id_ in source.ids]),
            strict=True,
        )
    )


def source_conditions(
    source: ImageSource, kind: str, size: Size, *, folder: str | Path | None = None, **options: Any
) -> Float32[np.ndarray, "n h w k"]:
    """The `source_condition` of every image of a source."""
    found = [source_condition(source, i, kind, size, folder, **options) for i in range(len(source))]
    return np.stack(found)


def source_condition(
    source: ImageSource,
    index: int,
    kind: str,
    size: Size,
    folder: str | Path | None = None,
    **options: Any,
) -> Float32[np.ndarray, "h w k"]:
    """The condition of an image of a source, of `size`, as `fitted_condition` cuts it.

    Kinds that an image tells are made of the image at that size. Others are read from `folder`, or
    taken from the source where it knows them, and made smaller themselves, labels without mixing
    them. UserError where there is no such file or map, or a folder that nothing is read from.
    """
    known = known_map(source, index, kind)
    if folder is not None and kind not in WITH_PARTNER:
        raise UserError(f"condition {kind!r} takes no folder")
    if folder is None and known is None and kind in WITH_PARTNER:
        raise UserError(f"condition {kind!r} needs the folder of its files")
    record = source[index]
    if kind not in WITH_PARTNER:
        image = _middle(Image.fromarray(record.image), size, Image.Resampling.BILINEAR)
        return make_condition(kind, np.array(image), **options)
    partner = known if folder is None else partner_file(folder, record.id)
    whole = make_condition(kind, record.image, partner=partner, **options)
    return fitted_condition(whole, size, mix=kind != "segmentation")


def known_map(source: ImageSource, index: int, kind: str) -> UInt8[np.ndarray, "h w"] | None:
    """What a source of drawn images knows of the pixels of one of them; None where it does not."""
    if isinstance(source, Subset):
        return known_map(source.source, int(source.indices[index]), kind)
    if not isinstance(source, ArraySource) or kind not in source.maps:
        return None
    return source.maps[kind][index]


def fitted_condition(
    condition: Float32[np.ndarray, "h w k"], size: Size, *, mix: bool
) -> Float32[np.ndarray, "height width k"]:
    """The middle: of a square where `DiffusionTransform` has the image, else where `buckets.cut`.

    `mix` interpolates; otherwise each pixel takes the nearest one's value.
    """
    resample = Image.Resampling.BILINEAR if mix else Image.Resampling.NEAREST
    channels = [
        np.asarray(_middle(Image.fromarray(channel), size, resample))
        for channel in np.moveaxis(condition, -1, 0)
    ]
    return np.clip(np.stack(channels, axis=-1), 0, 1)


def _middle(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    if isinstance(size, tuple):
        return covered(image, *size, resample)[0]
    return center_crop(resize_short(image, size, resample), size)


def as_bytes(condition: Float32[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """A condition in 255ths, a quarter of the memory; exact for what came of 8-bit pixels."""
    return np.round(255 * condition).astype(np.uint8)


def as_fractions(condition: Values) -> Values:
    """A condition that is stored in 255ths (uint8) in [0, 1] again; any other one as float32."""
    values = condition.astype(np.float32)
    return values / 255 if condition.dtype == np.uint8 else values


def _pixels(partner: Partner, *, palette: bool = False) -> tuple[np.ndarray, str]:
    """The stored values, and what an error calls them; with `palette` its colours, not indices."""
    if isinstance(partner, np.ndarray):
        return partner, "condition pixels"
    name = str(partner)
    try:
        with Image.open(partner) as opened:
            image = ImageOps.exif_transpose(opened)
            if palette and image.mode == "P":
                image = image.convert("RGB")
            if image.mode == "1":
                image = image.convert("L")
            pixels, mode = np.array(image), image.mode
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as an image ({error})") from error
    if mode.startswith("I") and pixels.min() >= 0 and pixels.max() <= 65535:
        pixels = pixels.astype(np.uint16)
    elif mode not in ("L", "I", "F", "RGB"):
        raise UserError(f"{name}: an image of mode {mode}, expected grey or RGB")
    return pixels, name


def _grey(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.ndim == 3 and pixels.shape[-1] == 3 and not np.ptp(pixels, axis=-1).any():
        return pixels[..., 0]
    if pixels.ndim != 2:
        raise UserError(f"{name}: expected grey values, found {_described(pixels)}")
    return pixels


def _described(pixels: np.ndarray) -> str:
    return f"{pixels.dtype} {pixels.shape} from {pixels.min()} to {pixels.max()}"


def _check_size(pixels: np.ndarray, shape: tuple[int, int], name: str) -> None:
    if pixels.shape[:2] != shape:
        (height, width), (rows, columns) = shape, pixels.shape[:2]
        raise UserError(
            f"{name}: {columns}x{rows} pixels, expected {width}x{height} as its image has"
        )
