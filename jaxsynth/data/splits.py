"""Few-shot splits: which images of each class may be seen at all.

A split is drawn from the train part alone; validation images are some of the shots, never test
images. Each class is drawn on its own, from its name and the seed, so that a class keeps its shots
whatever other classes are chosen; the shots of k are the first k of the shots of k + 1, so that a
study of more shots adds images and never swaps them. The lists are saved as JSON: they are part of
a result.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxsynth.core.io import read_json, write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, ImageSource, SourceError
from jaxsynth.data.names import natural_key
from jaxsynth.data.views import Subset


@dataclass(frozen=True)
class Shots:
    """Ids per class, in label order. `train` and `val` do not overlap; `val` may be empty."""

    dataset: str
    class_names: tuple[str, ...]
    shots: int
    seed: int
    train: tuple[tuple[str, ...], ...]
    val: tuple[tuple[str, ...], ...]

    def __post_init__(self):
        if not len(self.train) == len(self.val) == len(self.class_names):
            raise SourceError(
                f"Shots: train and val have {len(self.train)} and {len(self.val)} lists of ids, "
                f"expected one for each of {counted(len(self.class_names), 'class')}"
            )

    @property
    def has_validation(self) -> bool:
        return any(self.val)

    def save(self, path: str | Path) -> None:
        """One JSON file, written whole or not at all."""
        write_json(path, asdict(self))

    def train_source(self, dataset: Dataset) -> Subset:
        return self._source(dataset, self.train)

    def val_source(self, dataset: Dataset) -> Subset:
        return self._source(dataset, self.val)

    def _source(self, dataset: Dataset, lists: tuple[tuple[str, ...], ...]) -> Subset:
        if dataset.class_names != self.class_names:
            raise SourceError(
                f"the shots were drawn for classes {list(self.class_names)}, the data set has "
                f"{list(dataset.class_names)}"
            )
        return select_ids(dataset.train, [id_ for ids in lists for id_ in ids])


def select_ids(source: ImageSource, ids: list[str]) -> Subset:
    """The records with these ids, in this order."""
    where = {id_: index for index, id_ in enumerate(source.ids)}
    missing = [id_ for id_ in ids if id_ not in where]
    if missing:
        raise SourceError(f"{len(missing)} ids are not in the data, the first is {missing[0]!r}")
    return Subset(source, [where[id_] for id_ in ids])


def load_shots(path: str | Path) -> Shots:
    """What `Shots.save` wrote; UserError naming the file and the field for anything else."""
    return read_json(path, Shots)


def few_shot(
    dataset: Dataset,
    shots: int,
    seed: int,
    *,
    val_fraction: float = 0.0,
    val_shots: int | None = None,
) -> Shots:
    """Draw `shots` images of each class from `dataset.train`.

    Of these, the last `val_shots` (by default floor(shots * val_fraction)) are for validation and
    the others for training. One shot leaves none for validation: `Shots.has_validation` is False.
    """
    if shots < 1:
        raise SourceError(f"shots: expected 1 or more, found {shots}")
    if not 0 <= val_fraction < 1:
        raise SourceError(f"val_fraction: expected 0 or more and below 1, found {val_fraction}")
    kept_out = int(shots * val_fraction) if val_shots is None else val_shots
    if not 0 <= kept_out < shots:
        raise SourceError(
            f"val_shots: expected 0 to {shots - 1} of {counted(shots, 'shot')}, got {kept_out}"
        )
    labels, ids = np.asarray(dataset.train.labels), dataset.train.ids
    members: list[list[str]] = [[] for _ in dataset.class_names]
    for label, id_ in zip(labels, ids, strict=True):
        members[label].append(id_)
    short = {
        name: len(own)
        for name, own in zip(dataset.class_names, members, strict=True)
        if len(own) < shots
    }
    if short:
        counts = ", ".join(f"{name!r} has {count}" for name, count in list(short.items())[:10])
        raise SourceError(
            f"{dataset.name}: {counted(shots, 'shot')} asked for, but {counts} train images"
        )
    train, val = [], []
    for name, own in zip(dataset.class_names, members, strict=True):
        own = sorted(own, key=natural_key)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = [own[i] for i in rng.permutation(len(own))[:shots]]
        train.append(tuple(drawn[: shots - kept_out]))
        val.append(tuple(drawn[shots - kept_out :]))
    return Shots(
        dataset=dataset.name,
        class_names=dataset.class_names,
        shots=shots,
        seed=seed,
        train=tuple(train),
        val=tuple(val),
    )
