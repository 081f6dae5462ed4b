"""What a data set is: records, sources of them, a labeled data set, and the config that names one.

These types lie below everything that makes them (`data.sources`) or reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8


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
