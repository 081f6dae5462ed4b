"""How a checkpoint wants its images: size, crop, interpolation and statistics, from its own files.

A classifier that is given other statistics or another crop than it was trained with loses points,
and published comparisons have done so. So nothing is guessed here: transformers'
preprocessor_config.json or timm's pretrained_cfg must say it all, and what is missing is an error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UserError, quoted, shown
from jaxsynth.data.pipeline.augment import RESAMPLING
from jaxsynth.ops.resize import (
    CROP_ROUNDINGS,
    CropRounding,
    Filter,
    crop_start,
    resize_matrix,
)

PREPROCESSOR = "preprocessor_config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The numbers that transformers writes are PIL's.
_BY_NUMBER: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
# What a plain number as `size` means, by what the class's name starts with: both sides, or the
# short one.
_SQUARE = ("ViT", "DeiT")
# Fields that may be left out; what each needs is said where it is read.
_TYPES = {
    "image_mean": tuple[float, float, float] | None,
    "image_std": tuple[float, float, float] | None,
    "resample": int | None,
    "crop_pct": float | None,
    "image_processor_type": str | None,
    "feature_extractor_type": str | None,
}
# Pixels a side.
_LARGEST = 1 << 14
_SHORT = ("Bit", "CLIP", "ConvNext")
# A field of our own in preprocessor_config.json.
_ROUNDING = "crop_rounding"
# transformers' ConvNextImageProcessor crops only below this size.
_CONVNEXT_CROPS_BELOW = 384


@dataclass(frozen=True)
class Preprocessing:
    """What comes between an image file and a network.

    The image is resized to `resize` pixels (its short side, or with `squash` both, whatever its
    shape), the middle `image_size` x `image_size` is cut out, and pixels in [0, 1] are normalised
    by `mean` and `std`, which `Classifier.predict` does itself. `crop_rounding` is where the crop
    begins if as many pixels cannot be left on both sides: "floor" in transformers, "round" in
    torchvision and timm.
    """

    image_size: int
    resize: int
    squash: bool
    interpolation: Filter
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_rounding: CropRounding

    def __post_init__(self):
        if not 0 < self.image_size <= self.resize <= _LARGEST:
            raise ValueError(
                f"Preprocessing: image_size {self.image_size} of resize {self.resize}, expected "
                f"0 < image_size <= resize <= {_LARGEST}"
            )
        if self.interpolation not in RESAMPLING:
            raise ValueError(
                f"Preprocessing.interpolation: {shown(self.interpolation)}, expected one of "
                f"{', '.join(RESAMPLING)}"
            )
        if self.crop_rounding not in CROP_ROUNDINGS:
            raise ValueError(
                f"Preprocessing.crop_rounding: {shown(self.crop_rounding)}, expected one of "
                f"{', '.join(CROP_ROUNDINGS)}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"Preprocessing.{name}: {getattr(self, name)}, expected 3 numbers")
        if min(self.std) <= 0:
            raise ValueError(f"Preprocessing.std: {self.std}, expected more than 0")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before the crop."""
        if self.squash:
            return self.resize, self.resize
        short = min(height, width)
        return int(self.resize * height / short), int(self.resize * width / short)

    def host(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """Resized and cropped by PIL: what the checkpoint saw in evaluation, before normalising."""
        height, width = self.resized(*image.shape[:2])
        picture = Image.fromarray(image).resize((width, height), RESAMPLING[self.interpolation])
        top, left = self._corner(height), self._corner(width)
        size = self.image_size
        return np.asarray(picture.crop((left, top, left + size, top + size)))

    def device(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """The same for a batch in [0, 1], as two matrix products: differentiable, not rounded."""
        before = images.shape[1:3]
        down, across = (
            resize_matrix(old, new, self.interpolation)[
                self._corner(new) : self._corner(new) + self.image_size
            ]
            for old, new in zip(before, self.resized(*before), strict=True)
        )
        # PIL resizes rows first, and what overshoots is cut off before the columns.
        rows = jnp.clip(jnp.einsum("cw,bhwk->bhck", across, images), 0, 1)
        return jnp.clip(jnp.einsum("rh,bhck->brck", down, rows), 0, 1)

    def _corner(self, size: int) -> int:
        return crop_start(size, self.image_size, self.crop_rounding)


# torchvision's original evaluation, which its ResNets of 2016 to 2021 and most others' use.
IMAGENET = Preprocessing(224, 256, False, "bilinear", IMAGENET_MEAN, IMAGENET_STD, "round")
NAMED = {"imagenet": IMAGENET}


def named_preprocessing(name: str) -> Preprocessing:
    """One of `NAMED`, or what a preprocessor_config.json (a file, or a folder with one) says."""
    if name in NAMED:
        return NAMED[name]
    path = Path(name).expanduser()
    return from_transformers(path / PREPROCESSOR if path.is_dir() else path)


def from_transformers(path: Path) -> Preprocessing:
    """From a preprocessor_config.json; UserError naming the file and what it lacks."""
    config = read_json(path)
    missing = [
        name for name in ("size", "resample", "image_mean", "image_std") if config.get(name) is None
    ]
    if missing:
        raise UserError(
            f"{path}: no {', '.join(missing)}: the file must say it, preprocessing is not guessed"
        )
    for name, kind in _TYPES.items():
        take(config, name, kind, path, None)
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(name, True) is not True:
            raise UserError(f"{path}: {name}: expected true, found {quoted(config[name])}")
    factor = take(config, "rescale_factor", float, path, 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{path}: rescale_factor: expected 1/255, found {factor}")
    if config["resample"] not in _BY_NUMBER:
        raise UserError(
            f"{path}: resample: {config['resample']}, expected one of {sorted(_BY_NUMBER)}"
        )
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    resize, squash = _size(path, config["size"], kind)
    image_size = resize
    if kind.startswith("ConvNext"):
        squash = resize >= _CONVNEXT_CROPS_BELOW
        if not squash:
            if not config.get("crop_pct"):
                raise UserError(f"{path}: no crop_pct: preprocessing is not guessed")
            resize = int(image_size / _fraction(path, config))
    elif config.get("do_center_crop"):
        image_size, _ = _size(path, config.get("crop_size"), "ViT")
    elif not squash:
        raise UserError(
            f"{path}: the short side is resized to {resize} and do_center_crop is not true: images "
            "would have different shapes"
        )
    return _made(
        path,
        image_size=image_size,
        resize=resize,
        squash=squash,
        interpolation=_BY_NUMBER[config["resample"]],
        mean=config["image_mean"],
        std=config["image_std"],
        crop_rounding=config.get(_ROUNDING, "floor"),
    )


def from_timm(path: Path, config: Mapping[str, Any]) -> Preprocessing:
    """From a timm config.json's pretrained_cfg (`config`); UserError naming what it lacks."""
    needed = ("input_size", "crop_pct", "interpolation", "mean", "std")
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise UserError(
            f"{path}: pretrained_cfg has no {', '.join(missing)}: the file must say it, "
            "preprocessing is not guessed"
        )
    for name in ("mean", "std"):
        take(config, name, tuple[float, float, float], path)
    mode = take(config, "crop_mode", str | None, path, None) or "center"
    if mode not in ("center", "squash"):
        raise UserError(f"{path}: crop_mode: {quoted(mode)}, expected 'center' or 'squash'")
    size = take(config, "input_size", tuple[int, int, int], path)
    if size[0] != 3 or size[1] != size[2]:
        raise UserError(f"{path}: input_size: {size}, expected [3, side, side]")
    return _made(
        path,
        image_size=size[1],
        resize=math.floor(size[1] / _fraction(path, config)),
        squash=mode == "squash",
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_rounding="round",
    )


def to_transformers(preprocessing: Preprocessing) -> dict[str, Any]:
    """A preprocessor_config.json for transformers and `from_transformers`.

    transformers has one rounding of crops, "floor"; another is noted in a field of our own, which
    transformers passes over: there the crop of every fourth size begins one pixel earlier.
    """
    size, crop = preprocessing.resize, preprocessing.image_size
    squash = preprocessing.squash
    return {
        "crop_size": {"height": crop, "width": crop},
        **({} if preprocessing.crop_rounding == "floor" else {_ROUNDING: "round"}),
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocessing.mean),
        # The one whose size may be either form.
        "image_processor_type": "DeiTImageProcessor"
        if preprocessing.squash
        else "BitImageProcessor",
        "image_std": list(preprocessing.std),
        "resample": next(n for n, f in _BY_NUMBER.items() if f == preprocessing.interpolation),
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
    }


def _fraction(path: Path, config: Mapping[str, Any]) -> float:
    found = take(config, "crop_pct", float, path)
    if not 0.01 <= found <= 100:
        raise UserError(f"{path}: crop_pct: {found:g}, expected a fraction")
    return found


def _made(path: Path, *, mean: Any, std: Any, **values: Any) -> Preprocessing:
    try:
        return Preprocessing(mean=tuple(mean), std=tuple(std), **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _size(path: Path, size: Any, kind: str) -> tuple[int, bool]:
    """The side that images are resized to, and whether both are."""
    if isinstance(size, Mapping):
        if set(size) == {"shortest_edge"}:
            return take(size, "shortest_edge", int, path), False
        sides = {take(size, name, int | None, path, None) for name in ("height", "width")}
        if len(sides) == 1 and None not in sides:
            return sides.pop(), True
    elif isinstance(size, int) and kind.startswith((*_SQUARE, *_SHORT)):
        return size, kind.startswith(_SQUARE)
    raise UserError(
        f"{path}: size {quoted(size)} of {kind or 'an unnamed processor'}: expected "
        '{"shortest_edge": n} or {"height": n, "width": n} of a square'
    )
