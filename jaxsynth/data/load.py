"""Labelled images at random access, wherever they come from.

Four sources of data sets stand behind `load_dataset`: scikit-learn's digits and pictures that are
drawn or cut here (so that everything runs without a download), folders of photos, and TensorFlow
Datasets. All give the
same `Dataset`; labels are known without decoding a single image.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jaxsynth.data import prompts
from jaxsynth.data.decode import decode_image, natural_key, square


class Record(NamedTuple):
    """One labelled image; `id` is unique within its source and stable between runs."""

    image: UInt8[np.ndarray, "h w 3"]
    label: int
    id: str


class SourceError(ValueError):
    """Data that is not as expected; the message names what and where."""


@runtime_checkable
class ImageSource(Protocol):
    """Random access to records. `labels` and `ids` do not decode images."""

    @property
    def labels(self) -> Int[np.ndarray, " n"]: ...

    @property
    def ids(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory.

    `maps` are what is known of every pixel of drawn images, by the kind of condition that it makes
    ("depth", "segmentation", "mask").
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]
    ids: Sequence[str]
    maps: Mapping[str, UInt8[np.ndarray, "n h w"]] = field(default_factory=dict)

    def __post_init__(self):
        if not len(self.images) == len(self.labels) == len(self.ids):
            raise SourceError(
                f"{len(self.images)} images, {len(self.labels)} labels, {len(self.ids)} ids"
            )
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise SourceError(
                f"expected uint8 images (n, h, w, 3), found {self.images.dtype} {self.images.shape}"
            )
        for kind, pixels in self.maps.items():
            if pixels.shape != self.images.shape[:3]:
                raise SourceError(
                    f"{kind}: a map of {pixels.shape} for images of {self.images.shape}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], int(self.labels[index]), self.ids[index])


@dataclass(frozen=True)
class FileSource:
    """Image files; ids are their paths below `root`, with "/" between the parts."""

    root: Path
    ids: Sequence[str]
    labels: Int[np.ndarray, " n"]
    image_size: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        image = decode_image(self.root / self.ids[index])
        return Record(square(image, self.image_size), int(self.labels[index]), self.ids[index])


class Subset:
    """Some records of a source, in the order given, optionally with other labels."""

    def __init__(self, source: ImageSource, indices: Sequence[int], labels=None):
        self.source = source
        self.indices = np.asarray(indices, np.int64).reshape(-1)
        self._labels = None if labels is None else np.asarray(labels, np.int32)

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        return self.source.labels[self.indices] if self._labels is None else self._labels

    @property
    def ids(self) -> Sequence[str]:
        ids = self.source.ids
        return [ids[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        record = self.source[int(self.indices[index])]
        return record if self._labels is None else record._replace(label=int(self._labels[index]))


class Joined:
    """Sources one after the other; labels and ids are given, as theirs may meet."""

    def __init__(self, sources: Sequence[ImageSource], labels, ids: Sequence[str]):
        self.sources = tuple(sources)
        self.labels, self.ids = np.asarray(labels, np.int32), tuple(ids)
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = self._ends[number] - len(self.sources[number])
        image = self.sources[number][int(index - start)].image
        return Record(image, int(self.labels[index]), self.ids[index])


class Cached:
    """A source decoded once, in one flat uint8 array; images may differ in size. See `cached`."""

    def __init__(self, pixels, shapes, labels, ids):
        self.pixels, self.shapes, self.labels, self.ids = pixels, shapes, labels, ids
        sizes = shapes.astype(np.int64).prod(axis=1) * 3
        self.starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        height, width = self.shapes[index]
        start = self.starts[index]
        flat = self.pixels[start : start + int(height) * int(width) * 3]
        return Record(flat.reshape(height, width, 3), int(self.labels[index]), self.ids[index])


def cached(source: ImageSource, limit_bytes: int = 2**30) -> ImageSource:
    """The source decoded into memory, or the source itself where that takes more than the limit."""
    if isinstance(source, ArraySource | Cached) or not len(source):
        return source
    if isinstance(source, Subset) and isinstance(source.source, ArraySource | Cached):
        return source
    pieces, shapes, total = [], [], 0
    for index in range(len(source)):
        image = source[index].image
        total += image.nbytes
        # The first image tells in time that a large source will not fit.
        if total > limit_bytes or (index == 0 and total * len(source) > 4 * limit_bytes):
            return source
        pieces.append(image.reshape(-1))
        shapes.append(image.shape[:2])
    labels, ids = np.asarray(source.labels), tuple(source.ids)
    return Cached(np.concatenate(pieces), np.asarray(shapes, np.int32), labels, ids)


@dataclass(frozen=True)
class Dataset:
    """A data set with its classes. `class_names` are as in the data, `display_names` for prompts.

    `split` says in words where the test part comes from.
    """

    name: str
    class_names: tuple[str, ...]
    display_names: tuple[str, ...]
    template: str
    train: ImageSource
    test: ImageSource
    split: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class DataConfig:
    """Which data set, and how to name its classes.

    source: "digits", "builtin", "folder" or "tfds".
    name: the data set's name (decides the default template); for "tfds" its TFDS name, for
        "builtin" one of `builtin.NAMES`.
    path: the folder of "folder"; the data directory of "tfds" ("" for TFDS's own default).
    image_size: 0 keeps images as stored (digits: 32); else short side to it, then the centre.
    template: "" takes the data set's own. Exactly one {} stands for the class.
    class_names: a subset, in the order its labels take; () takes all.
    display_names: names for prompts by class name; others come from `prompts.display_name`.
    raw_names: use class names in prompts as they are.
    test_fraction, split_seed: the held-out part of a source without a test split of its own.
    images_per_class: how many images of a class "builtin" draws.
    train_split, test_split: split names of "tfds" and "folder"; "" for test takes the first of
        test, validation (or val) there is, else a held-out part of train.
    """

    source: str = "digits"
    name: str = ""
    path: str = ""
    image_size: int = 0
    template: str = ""
    class_names: tuple[str, ...] = ()
    display_names: Mapping[str, str] = field(default_factory=dict)
    raw_names: bool = False
    test_fraction: float = 0.2
    split_seed: int = 0
    images_per_class: int = 500
    train_split: str = "train"
    test_split: str = ""


def held_out(
    source: ImageSource, class_names: Sequence[str], fraction: float, seed: int
) -> tuple[Subset, Subset]:
    """A train and a test part, `fraction` of each class held out (at least one of two or more)."""
    if not 0 < fraction < 1:
        raise SourceError(f"test_fraction: expected a value between 0 and 1, found {fraction}")
    labels, ids = np.asarray(source.labels), source.ids
    train, test = [], []
    for label, name in enumerate(class_names):
        members = sorted(np.flatnonzero(labels == label), key=lambda i: natural_key(ids[i]))
        if len(members) < 2:
            raise SourceError(
                f"class {name!r} has {len(members)} images: two or more are needed to hold out "
                "a test part"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        order = np.random.default_rng([seed, label]).permutation(len(members))
        test += [members[i] for i in order[:count]]
        train += [members[i] for i in order[count:]]
    return Subset(source, sorted(train)), Subset(source, sorted(test))


def digits_source(image_size: int = 0) -> ArraySource:
    """scikit-learn's 1797 handwritten digits: 8 x 8 grey, enlarged (bicubic), white on black."""
    from sklearn.datasets import load_digits  # slow to import, only this source needs it

    size = image_size or 32
    data = load_digits()
    small = np.round(data.images * (255 / 16)).astype(np.uint8)
    grey = [
        np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in small
    ]
    images = np.repeat(np.stack(grey)[..., None], 3, axis=-1)
    ids = tuple(f"{label}/{i:04d}" for i, label in enumerate(data.target))
    return ArraySource(images, data.target.astype(np.int32), ids)


def select_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """The data set with these classes only; labels follow the order given."""
    names = tuple(class_names)
    if len(set(names)) != len(names):
        raise SourceError(f"class_names: some names are given twice in {list(names)}")
    for name in names:
        if name not in dataset.class_names:
            close = difflib.get_close_matches(name, dataset.class_names, n=3)
            hint = f"; close: {close}" if close else f"; found {list(dataset.class_names)}"
            raise SourceError(f"class_names: {name!r} is not a class of {dataset.name}{hint}")
    old = [dataset.class_names.index(name) for name in names]
    renumbered = np.full(len(dataset.class_names), -1, np.int32)
    renumbered[old] = np.arange(len(old))

    def part(source: ImageSource) -> Subset:
        labels = renumbered[np.asarray(source.labels)]
        indices = np.flatnonzero(labels >= 0)
        return Subset(source, indices, labels[indices])

    return replace(
        dataset,
        class_names=names,
        display_names=tuple(dataset.display_names[i] for i in old),
        train=part(dataset.train),
        test=part(dataset.test),
    )


def joined(datasets: Mapping[str, Dataset]) -> Dataset:
    """Data sets as one, by their names: the classes of each follow those of the one before."""

    def part(name: str) -> Joined:
        sources = [getattr(dataset, name) for dataset in datasets.values()]
        counts = [dataset.num_classes for dataset in datasets.values()]
        starts = np.cumsum([0, *counts[:-1]])
        labels = [np.asarray(x.labels) + start for x, start in zip(sources, starts, strict=True)]
        ids = [f"{k}/{i}" for k, source in zip(datasets, sources, strict=True) for i in source.ids]
        return Joined(sources, np.concatenate(labels), ids)

    def names(field: str) -> tuple[str, ...]:
        return tuple(f"{key} {name}" for key, x in datasets.items() for name in getattr(x, field))

    return Dataset(
        name=" + ".join(datasets),
        class_names=names("class_names"),
        display_names=names("display_names"),
        template=prompts.default_template(""),
        train=part("train"),
        test=part("test"),
        split="; ".join(f"{key}: {dataset.split}" for key, dataset in datasets.items()),
    )


def load_dataset(config: DataConfig) -> Dataset:
    """The data set a config names. Raises `SourceError` where the data is not as expected."""
    given = dict(config.display_names)
    if config.source == "digits":
        name = config.name or "digits"
        class_names = tuple(str(i) for i in range(10))
        if not config.raw_names:
            given = dict(zip(class_names, prompts.DIGIT_NAMES, strict=True)) | given
        train, test = held_out(digits_source(config.image_size), class_names, 0.5, 0)
        split = "half of each class held out, the same always"
    elif config.source == "folder":
        from jaxsynth.data.sources.folder import load_folder

        name = config.name or Path(config.path).name
        class_names, train, test, split = load_folder(config)
    elif config.source == "builtin":
        from jaxsynth.data.sources.builtin import load_builtin

        name = config.name
        class_names, train, test, split = load_builtin(config)
    elif config.source == "tfds":
        from jaxsynth.data.sources.tfds import load_tfds

        name = config.name
        class_names, train, test, split = load_tfds(config)
    else:
        raise SourceError(
            f"source: expected digits, builtin, folder or tfds, found {config.source!r}"
        )
    template = config.template or prompts.default_template("digits" if name == "digits" else name)
    dataset = Dataset(
        name=name,
        class_names=class_names,
        display_names=prompts.display_names(class_names, given, raw=config.raw_names),
        template=prompts.check_template(template),
        train=train,
        test=test,
        split=split,
    )
    return select_classes(dataset, config.class_names) if config.class_names else dataset
