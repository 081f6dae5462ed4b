"""Faces drawn from a few numbers: people, each in many pictures, whose keypoints are known.

A person has a skin, hair of a color and a cut, eyes, a width of the face, and may have glasses and
a beard. A picture of one differs in the background, the place, the size and the turn of the head,
the mouth's openness and the light. The five keypoints (`data.keypoints`) follow from place, size
and turn alone, so that they tell nothing about who it is.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from jaxsynth.data.procedural.shapes import COLOURS, OVERSAMPLE

PAPERS = ("red", "green", "blue", "white")
_SKINS = (
    (255, 224, 200), (240, 190, 150), (210, 150, 105), (165, 105, 65), (110, 70, 45), (70, 45, 30),
)  # fmt: skip
_HAIRS = ((25, 20, 20), (95, 55, 25), (220, 180, 70), (190, 80, 30), (165, 165, 170))
_CUTS = ("short", "long", "high", "none")
_EYES = ((40, 25, 15), (40, 110, 190), (60, 140, 70))
# The keypoints of a face upright in the middle, whose half height is 1.
POINTS = np.array([[-0.38, -0.15], [0.38, -0.15], [0.0, 0.18], [-0.28, 0.52], [0.28, 0.52]])


@dataclass(frozen=True)
class Person:
    """Who it is."""

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    cut: str
    eyes: tuple[int, int, int]
    width: float
    glasses: bool
    beard: bool


@dataclass(frozen=True)
class Faces:
    """Pictures uint8 (n, size, size, 3), whose each is, and where its keypoints are, in pixels.

    `papers` are the numbers of the backgrounds among `PAPERS`.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    people: Int[np.ndarray, " n"]
    papers: Int[np.ndarray, " n"]
    keypoints: Float[np.ndarray, "n 5 2"]


def draw_person(rng: np.random.Generator) -> Person:
    """Somebody."""
    return Person(
        skin=_SKINS[rng.integers(len(_SKINS))],
        hair=_HAIRS[rng.integers(len(_HAIRS))],
        cut=_CUTS[rng.integers(len(_CUTS))],
        eyes=_EYES[rng.integers(len(_EYES))],
        width=float(rng.uniform(0.68, 0.95)),
        glasses=bool(rng.random() < 0.3),
        beard=bool(rng.random() < 0.3),
    )


def render_faces(count: int, size: int, seed: int, *, each: int = 10) -> Faces:
    """`count` pictures, `each` of a person one after the other, the backgrounds in turns."""
    rng = np.random.default_rng([seed, 4])
    images = np.empty((count, size, size, 3), np.uint8)
    keypoints = np.empty((count, 5, 2), np.float32)
    people, papers = np.arange(count) // each, np.arange(count) % len(PAPERS)
    person = None
    for i in range(count):
        if i % each == 0:
            person = draw_person(rng)
        images[i], keypoints[i] = render_face(person, PAPERS[papers[i]], size, rng)
    return Faces(images, people.astype(np.int32), papers.astype(np.int32), keypoints)


def render_face(
    person: Person, paper: str, size: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "s s 3"], Float[np.ndarray, "5 2"]]:
    """A picture of a person, and the keypoints in it."""
    side = size * OVERSAMPLE
    half = side * rng.uniform(0.26, 0.36)
    centre = side * (0.5 + rng.uniform(-0.1, 0.1, 2)) + np.array([0, 0.04 * side])
    turn = rng.normal(0, 0.18)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    openness, light = rng.uniform(0.02, 0.12), rng.uniform(0.85, 1.1)
    picture = Image.new("RGB", (side, side), COLOURS[paper])
    draw = ImageDraw.Draw(picture)

    def place(points) -> np.ndarray:
        return centre + half * (np.asarray(points) @ rotation.T)

    def polygon(points, color) -> None:
        draw.polygon([tuple(point) for point in place(points)], fill=color)

    def ellipse(middle, radii, color, start: float = 0.0, stop: float = 2 * np.pi) -> None:
        angles = np.linspace(start, stop, 40)
        ring = np.stack([np.cos(angles) * radii[0], np.sin(angles) * radii[1]], axis=1)
        polygon(ring + np.asarray(middle), color)

    wide = person.width
    if person.cut == "long":
        ellipse((0, -0.05), (wide + 0.22, 1.15), person.hair)
    ellipse((0, 0), (wide, 1), person.skin)
    if person.beard:
        ellipse((0, 0.1), (wide * 0.97, 0.9), person.hair, 0.12 * np.pi, 0.88 * np.pi)
    if person.cut != "none":
        top = 1.35 if person.cut == "high" else 1.06
        ellipse((0, -0.08), (wide + 0.06, top), person.hair, 1.12 * np.pi, 1.88 * np.pi)
    for x in (-0.38, 0.38):
        if person.glasses:
            ellipse((x, -0.15), (0.29, 0.25), (15, 15, 15))
            ellipse((x, -0.15), (0.2, 0.17), (235, 240, 245))
        else:
            ellipse((x, -0.15), (0.17, 0.12), (245, 245, 245))
        ellipse((x, -0.15), (0.1, 0.1), person.eyes)
    if person.glasses:
        polygon([(-0.14, -0.2), (0.14, -0.2), (0.14, -0.1), (-0.14, -0.1)], (15, 15, 15))
    shade = tuple(int(c * 0.72) for c in person.skin)
    polygon([(0, -0.05), (0.11, 0.22), (-0.11, 0.22)], shade)
    ellipse((0, 0.52), (0.28, 0.05 + openness), (165, 40, 50))
    small = picture.resize((size, size), Image.Resampling.BOX)
    values = np.asarray(small, np.float32) * light + rng.normal(0, 2, (size, size, 3))
    # A pixel's number is that of its middle.
    points = place(POINTS) / OVERSAMPLE - 0.5
    return np.clip(np.round(values), 0, 255).astype(np.uint8), points.astype(np.float32)
