"""Small labelled data sets that need no download, beside scikit-learn's digits.

- "printed": ten digits in printed fonts and eight coloured shapes (`rendered`);
- "textures": stripes, checks, dots and waves of random colours, sizes and directions;
- "scenes": two shapes, one in front of the other (`scenes`), of which depth, labels and mask of
  every pixel are known; the class is the front one's shape;
- "patches": squares cut from the two photos that come with scikit-learn, a palace in China and a
  dahlia. Test squares come from the right third of each photo, which no training square touches.
"""

import numpy as np
from PIL import Image

from jaxsynth.data.load import ArraySource, DataConfig, SourceError
from jaxsynth.data.procedural.scenes import render_scenes
from jaxsynth.data.procedural.shapes import (
    COLOURS,
    DIGITS,
    SHAPES,
    Captioned,
    render_digits,
    render_shapes,
)

NAMES = ("printed", "textures", "scenes", "patches")
TEXTURES = ("stripes", "checks", "dots", "waves")
_PHOTOS = {"palace": "china.jpg", "dahlia": "flower.jpg"}
# Drawn this many times larger and averaged down.
OVERSAMPLE = 2


def load_builtin(config: DataConfig) -> tuple[tuple[str, ...], ArraySource, ArraySource, str]:
    """(class names, train, test, how they were split) of the data set that `config.name` names.

    About `images_per_class` training images a class, and a share `test_fraction` more for the test.
    Raises SourceError for another name or no images.
    """
    if config.name not in NAMES:
        raise SourceError(f"name: {config.name!r}, expected one of {', '.join(NAMES)}")
    if config.images_per_class < 1:
        raise SourceError(f"images_per_class: {config.images_per_class}, expected at least 1")
    size = config.image_size or 32
    test_count = max(1, round(config.images_per_class * config.test_fraction))
    build, names = {
        "printed": (_printed, (*DIGITS, *SHAPES)),
        "textures": (_textures, TEXTURES),
        "scenes": (_scenes, SHAPES),
        "patches": (_patches, tuple(_PHOTOS)),
    }[config.name]
    parts = []
    for part, count in (("train", config.images_per_class), ("test", test_count)):
        seed = config.split_seed + 1_000_003 * (part == "test")
        images, labels, *maps = build(count, size, seed, part)
        ids = tuple(f"{part}/{names[label]}/{i:05d}" for i, label in enumerate(labels))
        parts.append(ArraySource(images, labels.astype(np.int32), ids, *maps))
    return names, *parts, "drawn anew, from other random numbers than the training part"


def _printed(count: int, size: int, seed: int, _: str) -> tuple[np.ndarray, np.ndarray]:
    digits: Captioned = render_digits(count * len(DIGITS), size, seed)
    shapes: Captioned = render_shapes(count * len(SHAPES), size, seed)
    labels = np.concatenate([digits.labels, shapes.labels + len(DIGITS)])
    return np.concatenate([digits.images, shapes.images]), labels


def _textures(count: int, size: int, seed: int, _: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 2])
    labels = np.repeat(np.arange(len(TEXTURES)), count)
    return np.stack([_texture(TEXTURES[label], size, rng) for label in labels]), labels


def texture_pattern(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """How much ink (0 to 1) a texture has at each of `OVERSAMPLE` times `size` pixels a side.

    Its period, direction and phase are drawn.
    """
    side = size * OVERSAMPLE
    period = size * rng.uniform(0.15, 0.4)
    turn = rng.uniform(0, np.pi)
    y, x = np.mgrid[:side, :side] / OVERSAMPLE
    phase = rng.uniform(0, 2 * np.pi, 2)
    u = 2 * np.pi * (x * np.cos(turn) + y * np.sin(turn)) / period + phase[0]
    v = 2 * np.pi * (y * np.cos(turn) - x * np.sin(turn)) / period + phase[1]
    if kind == "stripes":
        level = np.sin(u)
    elif kind == "checks":
        level = np.sin(u) * np.sin(v)
    elif kind == "dots":
        level = np.cos(u) + np.cos(v) - 0.9
    else:
        level = np.sin(u + 1.2 * np.sin(v * 0.7))
    # An edge a pixel wide, for all but the waves.
    return (level + 1) / 2 if kind == "waves" else 1 / (1 + np.exp(-level * 12))


def average_down(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) from `OVERSAMPLE` times as many pixels a side."""
    side = len(picture) // OVERSAMPLE
    return picture.reshape(side, OVERSAMPLE, side, OVERSAMPLE, 3).mean((1, 3))


def _texture(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    weight = texture_pattern(kind, size, rng)
    names = list(COLOURS)
    while True:
        ink, paper = (np.array(COLOURS[names[k]]) for k in rng.choice(len(names), 2, replace=False))
        if np.abs(ink - paper).sum() > 150:
            break
    picture = average_down(weight[..., None] * ink + (1 - weight[..., None]) * paper)
    picture = picture + rng.normal(0, 3, picture.shape)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _scenes(
    count: int, size: int, seed: int, _: str
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    scenes = render_scenes(count * len(SHAPES), size, seed)
    # Nothing covers the nearest shape: its depth is the largest that is left.
    nearest = scenes.depths.reshape(len(scenes), -1).argmax(1)
    front = scenes.labels.reshape(len(scenes), -1)[np.arange(len(scenes)), nearest]
    maps = {"depth": scenes.depths, "segmentation": scenes.labels, "mask": scenes.masks}
    return scenes.images, front.astype(np.int32) - 1, maps


def _patches(count: int, size: int, seed: int, part: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_sample_image  # slow to import, only this set needs it

    rng = np.random.default_rng([seed, 3])
    images = []
    for file in _PHOTOS.values():
        photo = Image.fromarray(load_sample_image(file))
        width, height = photo.size
        border = 2 * width // 3
        left, right = (0, border) if part == "train" else (border, width)
        for _ in range(count):
            side = int(rng.integers(size, min(4 * size, right - left, height) + 1))
            x = int(rng.integers(left, right - side + 1))
            y = int(rng.integers(0, height - side + 1))
            square = photo.crop((x, y, x + side, y + side))
            images.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(images), np.repeat(np.arange(len(_PHOTOS)), count)
