"""Captioned pictures made from nothing: digits in printed fonts and coloured shapes.

They are the half of the tiny base's training set that needs no download. The fonts are those that
matplotlib ships, so that every machine renders the same digits; handwriting is deliberately not
among them, which leaves the handwritten digits of the demo as an honest target.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "white": (244, 244, 244),
    "grey": (128, 128, 128),
    "red": (210, 40, 40),
    "green": (50, 160, 60),
    "blue": (45, 80, 200),
    "yellow": (235, 210, 50),
    "orange": (240, 140, 40),
    "purple": (130, 60, 170),
    "pink": (240, 150, 190),
    "brown": (120, 75, 40),
}
# Drawn this many times larger and averaged down: smooth edges at 32 pixels.
OVERSAMPLE = 4
# Symbol and extension fonts have no digits, or have them in other places.
_FONTS_WITHOUT_DIGITS = (
    "cmex10",
    "cmsy10",
    "cmmi10",
    "stixsiz",
    "stixnonuni",
    "lastresort",
    "dejavusansdisplay",
    "dejavuserifdisplay",
)


@dataclass(frozen=True)
class Captioned:
    """`images` uint8 (n, size, size, 3), each with a caption and a class among the names drawn."""

    images: np.ndarray
    captions: list[str]
    labels: np.ndarray


def fonts() -> list[Path]:
    """The TrueType fonts with digits that matplotlib ships, in a fixed order."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = sorted(
        path
        for path in folder.glob("*.ttf")
        if not path.stem.lower().startswith(_FONTS_WITHOUT_DIGITS)
    )
    if not found:
        raise FileNotFoundError(f"{folder}: no TrueType fonts, expected those matplotlib ships")
    return found


def render_digits(count: int, size: int, seed: int) -> Captioned:
    """`count` printed digits with random font, weight, slant, place and colours."""
    rng = np.random.default_rng([seed, 0])
    faces = fonts()
    images, labels = np.empty((count, size, size, 3), np.uint8), np.empty(count, np.int32)
    captions = []
    for i in range(count):
        digit = labels[i] = int(rng.integers(10))
        ink, paper = two_colours(rng, plain=0.4)
        face = faces[rng.integers(len(faces))]
        images[i] = _draw_digit(digit, face, size, COLOURS[ink], COLOURS[paper], rng)
        name = DIGITS[digit]
        captions.append(
            (
                f"a photo of the digit {name}",
                f"a photo of the digit {name}",
                f"a {ink} digit {name} on a {paper} background",
                f"the digit {name}",
            )[rng.integers(4)]
        )
    return Captioned(images, captions, labels)


def render_shapes(count: int, size: int, seed: int) -> Captioned:
    """`count` filled shapes with random place, size, turn and colours."""
    rng = np.random.default_rng([seed, 1])
    images, labels = np.empty((count, size, size, 3), np.uint8), np.empty(count, np.int32)
    captions = []
    for i in range(count):
        labels[i] = rng.integers(len(SHAPES))
        shape = SHAPES[labels[i]]
        ink, paper = two_colours(rng, plain=0.0)
        images[i] = _draw_shape(shape, size, COLOURS[ink], COLOURS[paper], rng)
        captions.append(
            (f"a photo of a {ink} {shape}", f"a {ink} {shape} on a {paper} background")[
                rng.integers(2)
            ]
        )
    return Captioned(images, captions, labels)


def two_colours(rng: np.random.Generator, plain: float) -> tuple[str, str]:
    """Ink and paper that can be told apart; with probability `plain`, white and black."""
    if rng.random() < plain:
        return ("white", "black") if rng.random() < 0.5 else ("black", "white")
    names = list(COLOURS)
    while True:
        ink, paper = (names[k] for k in rng.choice(len(names), 2, replace=False))
        if distinct(ink, paper):
            return ink, paper


def distinct(one: str, other: str) -> bool:
    """Whether two of `COLOURS` can be told apart."""
    return int(np.abs(np.subtract(COLOURS[one], COLOURS[other])).sum()) > 200


def _compose(mask: Image.Image, size: int, ink, paper, rng: np.random.Generator) -> np.ndarray:
    """Ink over paper through a large mask, averaged down, with a little colour and pixel noise."""
    small = mask.resize((size, size), Image.Resampling.BOX)
    weight = np.asarray(small, np.float32)[..., None] / 255
    ink = np.asarray(ink, np.float32) + rng.normal(0, 10, 3)
    paper = np.asarray(paper, np.float32) + rng.normal(0, 10, 3)
    picture = weight * ink + (1 - weight) * paper
    picture = picture + rng.normal(0, rng.uniform(0, 5), picture.shape)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _draw_digit(digit: int, face: Path, size: int, ink, paper, rng) -> np.ndarray:
    # The digit's own box is fitted to 60-95 % of the picture's height, as digit data sets are.
    mask = digit_mask(digit, face, size * OVERSAMPLE, (0.6, 0.95), rng)
    return _compose(mask, size, ink, paper, rng)


def digit_mask(
    digit: int, face: Path, side: int, heights: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """255 inside of a printed digit and 0 outside, in the middle of a square.

    Its height is a share of the square's between `heights`; weight, slant and blur are random.
    """
    font = ImageFont.truetype(str(face), int(side * 0.9))
    mask = Image.new("L", (2 * side, 2 * side), 0)
    draw = ImageDraw.Draw(mask)
    stroke = int(rng.integers(0, max(side // 32, 1) + 1))
    draw.text((side, side), str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke)
    left, top, right, bottom = mask.getbbox() or (0, 0, 2 * side, 2 * side)
    scale = (bottom - top) / (side * rng.uniform(*heights))
    angle = math.radians(rng.normal(0, 7))
    shear = rng.normal(0, 0.15)
    stretch = rng.uniform(0.85, 1.25)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = scale * cos / stretch, scale * (sin + shear)
    d, e = -scale * sin / stretch, scale * cos
    centre_x = (left + right) / 2 + rng.normal(0, side * 0.03) * scale
    centre_y = (top + bottom) / 2 + rng.normal(0, side * 0.03) * scale
    shift_x = centre_x - a * side / 2 - b * side / 2
    shift_y = centre_y - d * side / 2 - e * side / 2
    mask = mask.transform(
        (side, side),
        Image.Transform.AFFINE,
        (a, b, shift_x, d, e, shift_y),
        Image.Resampling.BILINEAR,
    )
    if rng.random() < 0.3:
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.0) * OVERSAMPLE))
    return mask


def _draw_shape(shape: str, size: int, ink, paper, rng) -> np.ndarray:
    side = size * OVERSAMPLE
    mask = shape_mask(shape, side, side * rng.uniform(0.25, 0.45), rng)
    return _compose(mask, size, ink, paper, rng)


def shape_mask(shape: str, side: int, radius: float, rng: np.random.Generator) -> Image.Image:
    """255 inside of a shape and 0 outside, in a square: at a random place and slightly turned."""
    centre = side / 2 + rng.uniform(-1, 1, 2) * (side / 2 - radius)
    turn = rng.normal(0, 0.25)
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)

    def polygon(points) -> None:
        rotated = [
            (
                centre[0] + radius * (x * math.cos(turn) - y * math.sin(turn)),
                centre[1] + radius * (x * math.sin(turn) + y * math.cos(turn)),
            )
            for x, y in points
        ]
        draw.polygon(rotated, fill=255)

    def ring_of(n: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        step = 2 * math.pi / n
        return [
            (
                radii[k % len(radii)] * math.sin(k * step),
                -radii[k % len(radii)] * math.cos(k * step),
            )
            for k in range(n)
        ]

    box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=int(radius * 0.35))
    elif shape == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "diamond":
        polygon([(0, -1), (0.65, 0), (0, 1), (-0.65, 0)])
    elif shape == "triangle":
        polygon(ring_of(3, (1.0,)))
    elif shape == "star":
        polygon(ring_of(10, (1.0, 0.42)))
    elif shape == "cross":
        w = 0.3
        polygon([(-w, -1), (w, -1), (w, 1), (-w, 1)])
        polygon([(-1, -w), (1, -w), (1, w), (-1, w)])
    else:
        t = np.linspace(0, 2 * math.pi, 40)
        x = 16 * np.sin(t) ** 3 / 17
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
        polygon(list(zip(x, y, strict=True)))
    return mask
