"""Views over sources: some of a source's records, several sources as one, held-out parts.

A view holds positions, never pixels.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from jaxsynth.core.words import counted
from jaxsynth.data import prompts
from jaxsynth.data.dataset import Dataset, ImageSource, Indices, Record, SourceError
from jaxsynth.data.names import natural_key


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

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        own = self.indices if indices is None else self.indices[np.asarray(indices, np.int64)]
        return self.source.record_digests(own)


def origin(source: ImageSource, index: int) -> tuple[ImageSource, int]:
    """What a record of a view is a record of: the source below all subsets, and its place there."""
    while isinstance(source, Subset):
        source, index = source.source, int(source.indices[index])
    return source, index


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

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        digests = [digest for source in self.sources for digest in source.record_digests()]
        return digests if indices is None else [digests[i] for i in indices]


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
                f"class {name!r} has {counted(len(members), 'image')}: two or more are needed to "
                "hold out a test part"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        order = np.random.default_rng([seed, label]).permutation(len(members))
        test += [members[i] for i in order[:count]]
        train += [members[i] for i in order[count:]]
    return Subset(source, sorted(train)), Subset(source, sorted(test))


def first_of_each(
    source: ImageSource, class_names: Sequence[str], count: int, what: str = "the set"
) -> Subset:
    """The first `count` images of each class, classes one after the other.

    A larger count adds images and swaps none. SourceError where a class has fewer.
    """
    labels, rows = np.asarray(source.labels), []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise SourceError(
                f"{what}: class {name!r} has {counted(len(members), 'image')}, {count} are asked "
                "for"
            )
        rows.append(members[:count])
    return Subset(source, np.concatenate(rows) if rows else [])


def shared(sources: Mapping[str, ImageSource], shares: Mapping[str, float]) -> Joined:
    """Sources as one that is as long as all of them, each with its share of the places.

    A source whose share is more than its images comes several times over, from its start again; of
    one whose share is less the first images are taken. SourceError where one has no images.
    """
    if empty := [name for name, source in sources.items() if not len(source)]:
        raise SourceError(f"{empty[0]}: a set without images")
    total, whole = sum(map(len, sources.values())), sum(shares[name] for name in sources)
    parts = {}
    for name, source in sources.items():
        count = max(round(total * shares[name] / whole), 1)
        parts[name] = Subset(source, np.arange(count) % len(source))
    labels = np.concatenate([part.labels for part in parts.values()])
    ids = [f"{name}/{i}/{id_}" for name, x in parts.items() for i, id_ in enumerate(x.ids)]
    return Joined(list(parts.values()), labels, ids)


def real_share(total: int, fraction: float) -> int:
    """Real images among `total`; SourceError for a fraction that is none."""
    if not 0 <= fraction <= 1:
        raise SourceError(f"fractions: {fraction} of {counted(total, 'image')}, expected 0 to 1")
    return round(total * fraction)


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
