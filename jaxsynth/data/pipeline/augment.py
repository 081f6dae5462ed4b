"""Augmentation on the host: what happens to an image between its file and a batch.

`Augment` with its defaults is the classifier recipe of DataDream (arXiv 2407.10910), which is
DISEF's: RandAugment, random resized crop, flip, colour jitter, grey, blur, solarize. An operation
means what it means in torchvision on PIL images, and a probability of 0 turns it off. A recipe is
plain data, so it goes into a run's config.

All randomness comes from the generator passed in. Mixing of whole batches is in data/mixing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from jaxsynth.core.limits import Natural, Range, Share, check_limits
from jaxsynth.data.decode import center_crop, resize_short
from jaxsynth.ops.resize import Filter

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# RandAugment's magnitudes run from 0 to this, its 31st bin.
MAX_MAGNITUDE = 30
# PIL's filters by their names here.
RESAMPLING: dict[Filter, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# The image width for which the recipe's blur radius is meant.
BLUR_WIDTH = 224


@dataclass(frozen=True)
class Augment:
    """A recipe. Each `*_p` is a probability; 0 turns the operation off.

    randaugment_ops, magnitude: RandAugment's number of operations (0 for none) and strength 0..30.
    crop_scale, crop_ratio: area and aspect range of the random resized crop; crop False resizes the
        short side and crops the centre instead.
    jitter: strengths of brightness, contrast, saturation and hue.
    blur_radius: range of the Gaussian's standard deviation in pixels of a 224 pixel wide image;
        relative_blur scales it to the width at hand, as small images need.
    """

    randaugment_ops: Natural = 2
    magnitude: Annotated[int, Range(0, MAX_MAGNITUDE)] = 9
    crop: bool = True
    crop_scale: tuple[float, float] = (0.25, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: Share = 0.5
    jitter_p: Share = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    gray_p: Share = 0.2
    blur_p: Share = 0.2
    blur_radius: tuple[float, float] = (0.1, 2.0)
    relative_blur: bool = False
    solarize_p: Share = 0.2

    def __post_init__(self):
        check_limits(self)
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: expected 0 < low <= high <= 1, found {self.crop_scale}")


# Recipes by name. "small" is the paper's with blur in proportion, for images far below 224 pixels.
# "digits" keeps what a digit is: no mirror image, no crop that cuts it in two, no inversion.
RECIPES = {
    "paper": Augment(),
    "small": Augment(relative_blur=True),
    "digits": Augment(
        flip_p=0.0, crop_scale=(0.6, 1.0), gray_p=0.0, solarize_p=0.0, relative_blur=True
    ),
    "none": Augment(
        randaugment_ops=0,
        crop=False,
        flip_p=0.0,
        jitter_p=0.0,
        gray_p=0.0,
        blur_p=0.0,
        solarize_p=0.0,
    ),
}


def _affine(image: Image.Image, a, b, c, d, e, f) -> Image.Image:
    """Output (x, y) takes input (ax + by + c, dx + ey + f), nearest pixel, black outside."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST
    )


def _enhance(kind) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, m: kind(image).enhance(1 + 0.9 * m)


def _posterize(image: Image.Image, m: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * m))


def _solarize(image: Image.Image, m: float) -> Image.Image:
    # The threshold need not be whole in torchvision; PIL compares it with integer pixels.
    return ImageOps.solarize(image, math.ceil(255 * (1 - m)))


# RandAugment's operations: name -> (image, magnitude in 0..1, negative for signed ones half the
# time) and whether it is signed. Strengths are torchvision's at its last bin.
RANDAUGMENT: dict[str, tuple[Callable[[Image.Image, float], Image.Image], bool]] = {
    "Identity": (lambda image, m: image, False),
    "ShearX": (lambda image, m: _affine(image, 1, 0.3 * m, 0, 0, 1, 0), True),
    "ShearY": (lambda image, m: _affine(image, 1, 0, 0, 0.3 * m, 1, 0), True),
    "TranslateX": (
        lambda image, m: _affine(image, 1, 0, -int(150 / 331 * image.width * m), 0, 1, 0),
        True,
    ),
    "TranslateY": (
        lambda image, m: _affine(image, 1, 0, 0, 0, 1, -int(150 / 331 * image.height * m)),
        True,
    ),
    "Rotate": (lambda image, m: image.rotate(30 * m, Image.Resampling.NEAREST), True),
    "Brightness": (_enhance(ImageEnhance.Brightness), True),
    "Color": (_enhance(ImageEnhance.Color), True),
    "Contrast": (_enhance(ImageEnhance.Contrast), True),
    "Sharpness": (_enhance(ImageEnhance.Sharpness), True),
    "Posterize": (_posterize, False),
    "Solarize": (_solarize, False),
    "AutoContrast": (lambda image, m: ImageOps.autocontrast(image), False),
    "Equalize": (lambda image, m: ImageOps.equalize(image), False),
}


def rand_augment(
    image: Image.Image, num_ops: int, magnitude: int, rng: np.random.Generator
) -> Image.Image:
    """`num_ops` operations drawn evenly, each at `magnitude` of 30 (arXiv 1909.13719)."""
    names = tuple(RANDAUGMENT)
    for _ in range(num_ops):
        apply, signed = RANDAUGMENT[names[rng.integers(len(names))]]
        strength = magnitude / MAX_MAGNITUDE
        image = apply(image, -strength if signed and rng.random() < 0.5 else strength)
    return image


def crop_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random resized crop; a central one after ten misses."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, round(height * aspect))
    h = min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.array(int(turn * 255) % 256, np.uint8)  # wraps around
    hsv = Image.merge("HSV", (Image.fromarray(shifted), saturation, value))
    return hsv.convert("RGB")


def color_jitter(
    image: Image.Image, strengths: Sequence[float], rng: np.random.Generator
) -> Image.Image:
    """Brightness, contrast, saturation and hue by random factors, in random order."""
    brightness, contrast, saturation, hue = strengths
    factors = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    turn = rng.uniform(-hue, hue)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in rng.permutation(4):
        if which == 3:
            image = _shift_hue(image, turn)
        else:
            image = kinds[which](image).enhance(factors[which])
    return image


def augment(
    image: Image.Image, recipe: Augment, size: int, rng: np.random.Generator
) -> Image.Image:
    """A random version of the image, `size` x `size`."""
    image = rand_augment(image, recipe.randaugment_ops, recipe.magnitude, rng)
    if recipe.crop:
        box = crop_box(*image.size, recipe.crop_scale, recipe.crop_ratio, rng)
        image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = center_crop(resize_short(image, size), size)
    if rng.random() < recipe.flip_p:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < recipe.jitter_p:
        image = color_jitter(image, recipe.jitter, rng)
    if rng.random() < recipe.gray_p:
        image = image.convert("L").convert("RGB")
    if rng.random() < recipe.blur_p:
        radius = rng.uniform(*recipe.blur_radius)
        if recipe.relative_blur:
            radius *= size / BLUR_WIDTH
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if rng.random() < recipe.solarize_p:
        image = ImageOps.solarize(image, 128)
    return image


def normalize(
    image: Image.Image | np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> Float32[np.ndarray, "h w 3"]:
    """uint8 pixels to (pixels / 255 - mean) / std."""
    mean, std = (np.asarray(values, np.float32) * 255 for values in (mean, std))
    return (np.asarray(image, np.float32) - mean) / std


@dataclass(frozen=True)
class TrainTransform:
    """uint8 (h, w, 3), generator -> augmented uint8 (size, size, 3); the device normalizes it."""

    size: int
    recipe: Augment = Augment()

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator | None
    ) -> UInt8[np.ndarray, "size size 3"]:
        if rng is None:
            raise ValueError("a training transform needs a random generator")
        return np.array(augment(Image.fromarray(image), self.recipe, self.size, rng))


@dataclass(frozen=True)
class EvalTransform:
    """uint8 (h, w, 3) -> short side to size, centre, normalised float32 (size, size, 3).

    As transformers' CLIPImageProcessor does it, odd rests of the crop included. With `squash` both
    sides are resized to size, whatever the image's shape, and nothing is cut off, as its
    SiglipImageProcessor does.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    squash: bool = False
    interpolation: Filter = "bicubic"

    def square(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """Before the normalisation."""
        picture, method = Image.fromarray(image), RESAMPLING[self.interpolation]
        if self.squash:
            return np.asarray(picture.resize((self.size, self.size), method))
        return np.asarray(center_crop(resize_short(picture, self.size, method), self.size, "floor"))

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator | None = None
    ) -> Float32[np.ndarray, "size size 3"]:
        return normalize(self.square(image), self.mean, self.std)


@dataclass(frozen=True)
class DiffusionTransform:
    """uint8 (h, w, 3) -> short side to size (bilinear), random or central square, in [-1, 1]."""

    size: int
    random_crop: bool = True
    flip_p: float = 0.0

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator | None = None
    ) -> Float32[np.ndarray, "size size 3"]:
        return self.cut(image, rng)[0]

    def cut(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator | None = None
    ) -> tuple[Float32[np.ndarray, "size size 3"], tuple[int, int]]:
        """The square, and the top and left of its corner in the resized image."""
        out = resize_short(Image.fromarray(image), self.size, Image.Resampling.BILINEAR)
        if self.random_crop and rng is not None:
            left = int(rng.integers(out.width - self.size + 1))
            top = int(rng.integers(out.height - self.size + 1))
            square = out.crop((left, top, left + self.size, top + self.size))
        else:
            # As `center_crop` rounds.
            left, top = (round((side - self.size) / 2) for side in out.size)
            square = center_crop(out, self.size)
        if rng is not None and rng.random() < self.flip_p:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = out.width - self.size - left
        return np.asarray(square, np.float32) / 127.5 - 1.0, (top, left)
