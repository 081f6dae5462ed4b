"""Published test sets for robustness, in the folders they come in.

- ImageNet's validation set, -R, -A, -Sketch: a folder for each class, named by its WordNet id
  ("n01440764"), of all 1000 classes or some; -V2: folders named by the class's number. The
  validation set as it is downloaded, images side by side, needs a file of labels.
- SUN397, Places365, iNaturalist, Textures, NINCO: images of no class of the model, at any depth.
- ImageNet-C and 3DCC's ImageNet: `snow/3/n01440764/ILSVRC2012_val_00000293.JPEG`, a folder for each
  corruption and severity; CIFAR-10-C: `snow.npy` with the test set at severities 1 to 5 one after
  the other, and `labels.npy`.
- CIFAR-10: `test_batch.bin` of the version for C programs, whose order is that of CIFAR-10-C.

The classes of a model are a `LabelSpace`: sets name some of them, and each label is a place in it.
Sets for biases are in `robustness.bias_sets`.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxsynth.core.arrays import read_array
from jaxsynth.core.documents import read_json, read_text
from jaxsynth.core.errors import shown
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import ImageSource, SourceError
from jaxsynth.data.decode import IMAGE_SUFFIXES
from jaxsynth.data.names import natural_key
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.files import RUBBISH, FileSource, is_image
from jaxsynth.data.sources.folder import folder_source, is_beside
from jaxsynth.data.views import Subset

SEVERITIES = (1, 2, 3, 4, 5)
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_WORDNET = re.compile(r"n\d{8}")
# Bytes of one image in test_batch.bin: its label and three planes of 32 x 32.
_CIFAR_BYTES = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class LabelSpace:
    """A model's classes in the order of its logits: as sets call them, and in words."""

    names: tuple[str, ...]
    words: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.names)) < len(self.names) or len(self.names) != len(self.words):
            raise SourceError(
                f"label space: {counted(len(self.names), 'name')}, {len(set(self.names))} of them "
                f"different, and {len(self.words)} in words; expected as many of each"
            )

    def places(self, names: Sequence[str], where: Path | str) -> Int[np.ndarray, " k"]:
        """The classes' places. SourceError naming those it does not have."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            some = ", ".join(repr(name) for name in unknown[:3])
            raise SourceError(
                f"{where}: {len(unknown)} of {len(names)} classes are none of the model's "
                f"{len(self.names)} ({shown(self.names[0])}, ...): {some}"
            )
        numbers = {name: place for place, name in enumerate(self.names)}
        return np.array([numbers[name] for name in names], np.int32)


def read_label_space(path: Path) -> LabelSpace:
    """Classes in their order from a file.

    JSON: as Keras's `imagenet_class_index.json`, {"0": ["n01440764", "tench"], ...}. Text: a name a
    line; a WordNet id may be followed by its words.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file; expected the model's classes")
    if path.suffix == ".json":
        found = read_json(path)
        keys = [str(place) for place in range(len(found))]
        if not found or set(found) != set(keys) or not all(map(_pair, found.values())):
            raise SourceError(f'{path}: expected {{"0": [id, words], ...}} with every number once')
        names, words = zip(*(found[key] for key in keys), strict=True)
        return LabelSpace(tuple(names), _in_words(words, names))
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise SourceError(f"{path}: holds no class")
    if all(_WORDNET.match(line) for line in lines):
        names = tuple(line.split()[0] for line in lines)
        return LabelSpace(names, _in_words([line.partition(" ")[2] for line in lines], names))
    return LabelSpace(tuple(lines), tuple(lines))


def _pair(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)


def _in_words(words: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Of several words for a class the first; the name where there is none."""
    first = (word.split(",")[0].strip().replace("_", " ") for word in words)
    return tuple(word or name for word, name in zip(first, names, strict=True))


def read_labelled(
    root: Path, space: LabelSpace | None = None, *, labels: Path | None = None, image_size: int = 0
) -> tuple[ImageSource, LabelSpace]:
    """Images of a model's classes, labels being places in `space`, and that space.

    From class folders (names, or numbers from 0), or from images side by side with a file of
    `labels` (`read_flat`). Without a space the folders' names in sorted order are one.
    """
    if labels is not None:
        if space is None:
            raise SourceError(f"{labels}: labels of images side by side need the model's classes")
        return read_flat(root, labels, space, image_size), space
    source, names = folder_source(root, None, image_size)
    if all(name.isdecimal() for name in names) and (space is None or names[0] not in space.names):
        # In sorted order "10" comes before "2".
        if space is None:
            raise SourceError(
                f"{root}: class folders are numbers, which need the model's classes in their order"
            )
        places = np.array([int(name) for name in names], np.int32)
        if places.max() >= len(space.names):
            raise SourceError(
                f"{root}: class folder {places.max()}, expected 0 to {len(space.names) - 1}"
            )
    elif space is None:
        space = LabelSpace(names, names)
        places = np.arange(len(names), dtype=np.int32)
    else:
        places = space.places(names, root)
    return dataclasses.replace(source, labels=places[source.labels]), space


def read_flat(root: Path, labels: Path, space: LabelSpace, image_size: int = 0) -> FileSource:
    """Images side by side in a folder, with a text file of their classes.

    A line holds a class (line i for the i-th image by name), or an image's name with or without its
    suffix and then a class, parted by a comma or a space; what follows is not read, nor a first
    line "ImageId,PredictionString". So ImageNet's `imagenet_2012_validation_synset_labels.txt` and
    `LOC_val_solution.csv` do. SourceError for images without a label or labels without an image.
    """
    names = sorted((p.name for p in _files(root, below=False)), key=natural_key)
    if not labels.is_file():
        raise SourceError(f"{labels}: no such file; expected the classes of the images in {root}")
    rows = [re.split(r"[,\s]+", line.strip()) for line in read_text(labels).splitlines()]
    rows = [row for row in rows if row != [""]]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(names):
            raise SourceError(
                f"{labels}: {counted(len(rows), 'label')} for {counted(len(names), 'image')} in "
                f"{root}"
            )
        found = [row[0] for row in rows]
    else:
        by_stem = {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}
        missing = [name for name in names if Path(name).stem not in by_stem]
        if missing or len(by_stem) != len(names) or len(rows) != len(names):
            raise SourceError(
                f"{labels}: {counted(len(rows), 'label')} for {counted(len(names), 'image')} in "
                f"{root}, {len(missing)} of them without one {missing[:1]}"
            )
        found = [by_stem[Path(name).stem] for name in names]
    kinds = sorted(set(found))
    places = dict(zip(kinds, space.places(kinds, labels), strict=True))
    numbers = np.array([places[name] for name in found], np.int32)
    return FileSource(root, tuple(names), numbers, image_size)


def read_images(root: Path, *, files: Path | None = None, image_size: int = 0) -> FileSource:
    """Images of no class, at any depth below `root`; their labels are -1.

    `files` lists those to take, a path below `root` a line (what follows a space is not read, as in
    OpenOOD's lists). SourceError for anything that is neither an image nor a list.
    """
    if files is None:
        ids = [path.relative_to(root).as_posix() for path in _files(root, below=True)]
    else:
        if not files.is_file():
            raise SourceError(f"{files}: no such file; expected paths below {root}")
        lines = read_text(files).splitlines()
        ids = [line.split()[0] for line in lines if line.strip()]
        missing = [name for name in ids if not (root / name).is_file()]
        if missing:
            raise SourceError(f"{root / missing[0]}: no such file, but {files} lists it")
        if not ids:
            raise SourceError(f"{files}: lists no image")
    ids = sorted(ids, key=natural_key)
    return FileSource(root, tuple(ids), np.full(len(ids), -1, np.int32), image_size)


def read_imagenet_c(
    root: Path, clean: ImageSource, space: LabelSpace, names: Sequence[str] = ()
) -> dict[str, list[ImageSource]]:
    """For each corruption (all there are, or `names`) a source a severity, in the clean order.

    Images are found by their class's folder and by their name without its suffix. SourceError for a
    severity or an image that is missing.
    """
    folders = _visible_folders(root)
    found = {}
    for name in names or sorted(folders):
        if name not in folders:
            raise SourceError(f"{root}: no corruption {name!r}; found {sorted(folders)}")
        found[name] = [
            _as_clean(root / name / str(severity), clean, space) for severity in SEVERITIES
        ]
    return found


def _as_clean(root: Path, clean: ImageSource, space: LabelSpace) -> FileSource:
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder; expected severities 1 to 5")
    ids, listed = [], {}
    labels = np.asarray(clean.labels)
    for image, label in zip(clean.ids, labels, strict=True):
        folder = space.names[label]
        if folder not in listed:
            if not (root / folder).is_dir():
                raise SourceError(f"{root / folder}: no such folder of a class of the clean images")
            listed[folder] = {Path(name).stem: name for name in os.listdir(root / folder)}
        stem = Path(image).stem
        if stem not in listed[folder]:
            raise SourceError(f"{root / folder / stem}: no such image, but {image} is a clean one")
        ids.append(f"{folder}/{listed[folder][stem]}")
    return FileSource(root, tuple(ids), labels)


def read_cifar10(root: Path) -> tuple[ArraySource, LabelSpace]:
    """The 10,000 test images, in their order, from `test_batch.bin`."""
    path = root / "cifar-10-batches-bin" / "test_batch.bin"
    path = path if path.is_file() else root / "test_batch.bin"
    if not path.is_file():
        raise SourceError(
            f"{path}: no such file; expected that of CIFAR-10's binary version (for C programs)"
        )
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % _CIFAR_BYTES:
        raise SourceError(f"{path}: {len(data)} bytes, expected a multiple of {_CIFAR_BYTES}")
    rows = data.reshape(-1, _CIFAR_BYTES)
    labels = rows[:, 0].astype(np.int32)
    if labels.max() >= len(CIFAR10_CLASSES):
        raise SourceError(f"{path}: label {labels.max()}, expected 0 to 9")
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    ids = tuple(f"test/{number:05d}" for number in range(len(rows)))
    space = LabelSpace(CIFAR10_CLASSES, CIFAR10_CLASSES)
    return ArraySource(np.ascontiguousarray(images), labels, ids), space


def read_cifar10_c(
    root: Path, clean: ImageSource, space: LabelSpace, names: Sequence[str] = ()
) -> dict[str, list[ImageSource]]:
    """For each corruption (all there are, or `names`) a source a severity, in the clean order.

    The clean images are `read_cifar10`'s or some of them: their ids say which. SourceError where
    an array is of another kind or size, or `labels.npy` says otherwise than the clean labels.
    """
    places = space.places(CIFAR10_CLASSES, root)
    labels = _array(root / "labels.npy")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) % len(SEVERITIES):
        raise SourceError(
            f"{root / 'labels.npy'}: {labels.dtype} {labels.shape}, expected integers, the same "
            "number for each of five severities"
        )
    if not 0 <= labels.min() <= labels.max() < len(CIFAR10_CLASSES):
        raise SourceError(
            f"{root / 'labels.npy'}: from {labels.min()} to {labels.max()}, expected 0 to 9"
        )
    labels = places[labels]
    count = len(labels) // len(SEVERITIES)
    ends = [re.search(r"(\d+)$", name) for name in clean.ids]
    rows = np.array([int(end[1]) if end else count for end in ends])
    if rows.max() >= count or not np.array_equal(labels[rows], clean.labels):
        raise SourceError(
            f"{root / 'labels.npy'}: not the labels of the clean images, whose order must be that "
            "of CIFAR-10's test_batch.bin"
        )
    there = sorted(path.stem for path in root.glob("*.npy") if path.stem != "labels")
    found = {}
    for name in names or there:
        if name not in there:
            raise SourceError(f"{root}: no corruption {name!r}; found {there}")
        images = _array(root / f"{name}.npy")
        if images.dtype != np.uint8 or images.shape != (len(labels), *images.shape[1:3], 3):
            raise SourceError(
                f"{root / name}.npy: {images.dtype} {images.shape}, expected uint8 "
                f"({len(labels)}, height, width, 3)"
            )
        found[name] = [
            _part(images, labels, name, severity, count, rows) for severity in SEVERITIES
        ]
    if not found:
        raise SourceError(f"{root}: no corruption: expected files as snow.npy")
    return found


def _part(images, labels, name: str, severity: int, count: int, rows: np.ndarray) -> Subset:
    part = slice((severity - 1) * count, severity * count)
    ids = [f"{name}/{severity}/{number:05d}" for number in range(count)]
    return Subset(ArraySource(images[part], labels[part], ids), rows)


def evenly(source: ImageSource, count: int) -> ImageSource:
    """`count` images evenly spread over a source, or all of it for 0 or where it has fewer."""
    if count < 0:
        raise SourceError(f"count: expected 0 (all) or more, found {count}")
    if not count or len(source) <= count:
        return source
    return Subset(source, np.arange(count) * len(source) // count)


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise SourceError(f"{path}: no such file; expected it as in CIFAR-10-C")
    return read_array(path, mapped=True)


def _visible_folders(root: Path) -> set[str]:
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    found = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if not found:
        raise SourceError(f"{root}: no folders of corruptions found")
    return found


def _files(root: Path, *, below: bool) -> list[Path]:
    """The images of a folder, and of those `below` it. SourceError for what is none."""
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    found = []
    for path in root.rglob("*") if below else root.iterdir():
        parts = path.relative_to(root).parts
        if any(part.startswith(".") or part.lower() in RUBBISH for part in parts):
            continue
        if path.is_dir():
            if not below:
                raise SourceError(f"{path}: a folder, expected images side by side in {root}")
        elif is_image(path):
            found.append(path)
        elif not is_beside(path):
            raise SourceError(f"{path}: not an image file ({', '.join(IMAGE_SUFFIXES)} are read)")
    if not found:
        raise SourceError(f"{root}: no images found")
    return found
