"""What a data set is: records, sources of them, a labeled data set, and the config that names one.

These types lie below everything that makes them (`data.sources`) or reads them.

Data is identified by content: `Dataset.digest` and `source_digest` stand for the names of classes,
the ids and labels of records and the bytes that their pixels come from. Where the files lie is no
part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Count, Natural, OneOf, Range

Indices = Sequence[int] | np.ndarray
SOURCES = ("digits", "builtin", "folder", "captions", "clips", "tfds")


class Record(NamedTuple):
    """One labelled image; `id` is unique within its source and stable between runs."""

    image: UInt8[np.ndarray, "h w 3"]
    label: int
    id: str


class SourceError(UserError, ValueError):
    """Data that is not as expected; the message names what and where."""


@runtime_checkable
class ImageSource(Protocol):
    """Random access to records. `labels`, `ids` and `record_digests` do not decode images."""

    @property
    def labels(self) -> Int[np.ndarray, " n"]: ...

    @property
    def ids(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        """For each record (of `indices`) a text that is another one where its pixels differ."""
        ...


def source_listing(source: ImageSource) -> dict[str, str]:
    """For each record's id a text of its label and content; ids that meet are numbered."""
    listing: dict[str, str] = {}
    labels = np.asarray(source.labels)
    for id_, label, digest in zip(source.ids, labels, source.record_digests(), strict=True):
        name, again = id_, 1
        while name in listing:
            again += 1
            name = f"{id_} ({again})"
        listing[name] = f"{label} {digest}"
    return listing


def source_digest(source: ImageSource) -> str:
    """SHA-256 (hex) of a source's ids, labels and contents, in order."""
    return _digest([list(item) for item in source_listing(source).items()])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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

    @cached_property
    def listing(self) -> dict[str, str]:
        """What the data set holds, by name: its classes in order, its template, every record."""
        found = {
            f"class {label}": json.dumps(names)
            for label, names in enumerate(zip(self.class_names, self.display_names, strict=True))
        }
        found["template"] = self.template
        for part, source in (("train", self.train), ("test", self.test)):
            found |= {f"{part}: {key}": text for key, text in source_listing(source).items()}
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the classes, the template, and both parts' ids, labels and contents."""
        return _digest([list(item) for item in self.listing.items()])


@dataclass(frozen=True)
class DataConfig:
    """Which data set, and how to name its classes.

    source: "digits", "builtin", "folder", "captions", "clips" or "tfds". "" takes what the others
        say: a path is a folder, a name of `builtin.NAMES` is drawn, another name is TFDS's, and
        nothing is digits. "captions" are images with a text each (`sources.captioned`), "clips"
        films with a text each (`sources.clips`).
    name: the data set's name (decides the default template); for "tfds" its TFDS name, for
        "builtin" one of `builtin.NAMES`.
    path: the folder of "folder", "captions" or "clips"; the data directory of "tfds" ("" for
        TFDS's own).
    image_size: 0 keeps images as stored (digits: 32); else short side to it, then the centre.
    template: "" takes the data set's own. Exactly one {} stands for the class.
    class_names: a subset, in the order its labels take; () takes all.
    display_names: names for prompts by class name; others come from `prompts.display_name`.
    raw_names: use class names in prompts as they are.
    test_fraction, split_seed: the held-out part of a source without a test split of its own.
    images_per_class: how many images of a class "builtin" draws.
    train_split, test_split: split names of "tfds" and "folder"; "" for test takes the first of
        test, validation (or val) there is, else a held-out part of train. "none" for the test of a
        "folder" holds it out of train whatever other folders there are. "validation" for the test
        of "digits" takes half of their training images, to choose settings by.
    test_path: another folder, of the test images of "folder".
    labels: the table (CSV or JSON lines) of the classes of images that lie side by side.
    """

    source: Annotated[str, OneOf("", *SOURCES)] = ""
    name: str = ""
    path: str = ""
    image_size: Natural = 0
    template: str = ""
    class_names: tuple[str, ...] = ()
    display_names: Mapping[str, str] = field(default_factory=dict)
    raw_names: bool = False
    test_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    split_seed: Natural = 0
    images_per_class: Count = 500
    train_split: str = "train"
    test_split: str = ""
    test_path: str = ""
    labels: str = ""
