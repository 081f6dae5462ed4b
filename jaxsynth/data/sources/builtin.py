"""Small labelled data sets that need no download, beside scikit-learn's digits.

- "printed": ten digits in printed fonts and eight coloured shapes (`rendered`);
- "textures": stripes, checks, dots and waves of random colours, sizes and directions;
- "scenes": two shapes, one in front of the other (`scenes`), of which depth, labels and mask of
  every pixel are known; the class is the front one's shape;
- "faces": people (`procedural.faces`), ten pictures of each; the class is the background's color.
  The people of the test part are others;
- "moving": clips of printed digits that glide left, right, up or down (`moving`), each with a text;
- "patches": squares cut from the two photos that come with scikit-learn, a palace in China and a
  dahlia. Test squares come from the right third of each photo, which no training square touches.
"""

import numpy as np
from PIL import Image

from jaxsynth.data.dataset import DataConfig, SourceError
from jaxsynth.data.procedural.faces import PAPERS, render_faces
from jaxsynth.data.procedural.moving import DIRECTIONS, Moving, render_moving
from jaxsynth.data.procedural.scenes import render_scenes
from jaxsynth.data.procedural.shapes import (
    DIGITS,
    SHAPES,
    Captioned,
    render_digits,
    render_shapes,
)
from jaxsynth.data.procedural.textures import TEXTURES, render_texture
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.clips import ClipArrays
from jaxsynth.data.sources.folder import Loaded

NAMES = ("printed", "textures", "scenes", "faces", "moving", "patches")
_PHOTOS = {"palace": "china.jpg", "dahlia": "flower.jpg"}


def load_builtin(config: DataConfig) -> Loaded:
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
        "faces": (_faces, tuple(f"face on a {paper} background" for paper in PAPERS)),
        "moving": (_moving, tuple(DIRECTIONS)),
        "patches": (_patches, tuple(_PHOTOS)),
    }[config.name]
    parts = []
    for part, count in (("train", config.images_per_class), ("test", test_count)):
        seed = config.split_seed + 1_000_003 * (part == "test")
        images, labels, *more = build(count, size, seed, part)
        ids = tuple(f"{part}/{names[label]}/{i:05d}" for i, label in enumerate(labels))
        kind = ClipArrays if images.ndim == 5 else ArraySource
        parts.append(kind(images, labels.astype(np.int32), ids, *more))
    return names, *parts, "drawn anew, from other random numbers than the training part"


def _printed(count: int, size: int, seed: int, _: str) -> tuple[np.ndarray, np.ndarray]:
    digits: Captioned = render_digits(count * len(DIGITS), size, seed)
    shapes: Captioned = render_shapes(count * len(SHAPES), size, seed)
    labels = np.concatenate([digits.labels, shapes.labels + len(DIGITS)])
    return np.concatenate([digits.images, shapes.images]), labels


def _textures(count: int, size: int, seed: int, _: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 2])
    labels = np.repeat(np.arange(len(TEXTURES)), count)
    return np.stack([render_texture(TEXTURES[label], size, rng) for label in labels]), labels


def _scenes(
    count: int, size: int, seed: int, _: str
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    scenes = render_scenes(count * len(SHAPES), size, seed)
    # Nothing covers the nearest shape: its depth is the largest that is left.
    nearest = scenes.depths.reshape(len(scenes), -1).argmax(1)
    front = scenes.labels.reshape(len(scenes), -1)[np.arange(len(scenes)), nearest]
    maps = {"depth": scenes.depths, "segmentation": scenes.labels, "mask": scenes.masks}
    return scenes.images, front.astype(np.int32) - 1, maps


def _faces(
    count: int, size: int, seed: int, _: str
) -> tuple[np.ndarray, np.ndarray, dict, dict[str, np.ndarray]]:
    faces = render_faces(count * len(PAPERS), size, seed)
    return faces.images, faces.papers, {}, {"people": faces.people, "keypoints": faces.keypoints}


def _moving(count: int, size: int, seed: int, _: str) -> Moving:
    return render_moving(count, size, seed)


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
