"""The points of a study: which images each training sees, as lists of ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxsynth.data.dataset import Dataset, ImageSource, SourceError
from jaxsynth.data.decode import square
from jaxsynth.data.names import safe_name
from jaxsynth.data.splits import Shots
from jaxsynth.data.views import Joined, Subset, first_of_each, real_share
from jaxsynth.methods.scaling.config import REAL, Config
from jaxsynth.tasks.supervised import Pool, View

PRACTICED = ", practiced"

Views = tuple[Subset | None, Subset | None]


@dataclass(frozen=True)
class Point:
    """One training: so many `real` and `synthetic` images of each class, with a seed."""

    setting: str
    seed: int
    real: int
    synthetic: int

    @property
    def name(self) -> str:
        return f"{self.real} real, {self.synthetic} synthetic, seed {self.seed}"

    @property
    def size(self) -> int:
        """Images of each class of the kind that the setting's curve is drawn over."""
        return self.synthetic or self.real


def settings(config: Config) -> dict[str, list[Point]]:
    """The points of every setting, by its name."""
    found = {REAL: [(k, 0) for k in config.real_sizes]}
    for name in config.sources:
        found[name] = [(0, n) for n in config.sizes]
        if config.added_real:
            found[f"{name} + real"] = [(config.added_real, n) for n in config.sizes]
        if name in config.practice:
            found[f"{name}{PRACTICED}"] = [(0, n) for n in sorted(config.sizes)]
        shares = [real_share(config.mixed_size, f) for f in config.fractions]
        if shares:
            found[f"{name}, mixed"] = [(k, config.mixed_size - k) for k in shares]
    return {
        setting: [Point(setting, seed, *pair) for seed in config.seeds for pair in pairs]
        for setting, pairs in found.items()
    }


def source_of(setting: str) -> str:
    """The source of a setting's synthetic images."""
    for end in (" + real", ", mixed", PRACTICED):
        setting = setting.removesuffix(end)
    return setting


def trainings(config: Config, setting: str) -> dict[Path, list[Point]]:
    """The points of each training of a setting, by its folder below the run's.

    All of a setting train together, but for deliberate practice, where a size waits for the one
    before it.
    """
    points, folder = settings(config)[setting], Path(safe_name(setting))
    if not setting.endswith(PRACTICED):
        return {folder / "training": points}
    return {
        folder / f"round{i}" / "training": [point for point in points if point.size == size]
        for i, size in enumerate(sorted(config.sizes))
    }


def views_of(
    points: Sequence[Point],
    data: Dataset,
    shots: Mapping[int, Shots],
    synthetic: Mapping[int, ImageSource],
) -> tuple[dict[Point, Views], dict[Point, str]]:
    """The real and the synthetic images of each point, None for none; and why others have none.

    The real images of a seed are the first of its shots, the synthetic ones the first of its
    store. A point of which a class has too few is left out, with the class in the reason.
    """
    found, failed = {}, {}
    for point in points:
        try:
            real = drawn = None
            if point.real:
                own = shots[point.seed].train_source(data)
                real = first_of_each(own, data.class_names, point.real, "real images")
            if point.synthetic:
                kept, name = synthetic[point.seed], source_of(point.setting)
                drawn = first_of_each(kept, data.class_names, point.synthetic, name)
            found[point] = (real, drawn)
        except SourceError as error:
            failed[point] = str(error)
    return found, failed


def pooled(views: Sequence[Views], size: int, real_weight: float) -> tuple[Pool, list[View]]:
    """One pool of all images that views see, each once, and the views over it.

    A synthetic image weighs 1, a real one `real_weight`.
    """
    places: dict[tuple[int, int], int] = {}
    images, labels = [], []

    def rows(view: Subset) -> list[int]:
        base, indices = _root(view)
        found = []
        for index, label in zip(indices, view.labels, strict=True):
            key = id(base), int(index)
            if key not in places:
                places[key] = len(places)
                images.append(square(base[int(index)].image, size))
                labels.append(int(label))
            found.append(places[key])
        return found

    out = []
    for real, drawn in views:
        parts = [(rows(view), weight) for view, weight in ((real, real_weight), (drawn, 1.0))
                 if view is not None]  # fmt: skip
        out.append(
            View(
                np.concatenate([own for own, _ in parts]),
                np.concatenate([np.full(len(own), weight) for own, weight in parts]),
            )
        )
    return Pool(np.stack(images), np.asarray(labels, np.int32)), out


def streamed(view: Views, real_weight: float) -> tuple[ImageSource, Float[np.ndarray, " n"]]:
    """A view as one source, and the weights of its images; nothing is read."""
    parts = [(own, weight) for own, weight in zip(view, (real_weight, 1.0), strict=True) if own]
    sources = [own for own, _ in parts]
    joined = Joined(
        sources,
        np.concatenate([own.labels for own in sources]),
        [id_ for own in sources for id_ in own.ids],
    )
    return joined, np.concatenate([np.full(len(own), weight) for own, weight in parts])


def ids_of(view: Views) -> dict[str, list[str]]:
    """What a view saw, by the ids of its images."""
    names = ("real_ids", "synthetic_ids")
    return {k: [] if own is None else list(own.ids) for k, own in zip(names, view, strict=True)}


def _root(view: ImageSource) -> tuple[ImageSource, np.ndarray]:
    """What a view of views looks at in the end, and where."""
    indices = np.arange(len(view))
    while isinstance(view, Subset):
        indices, view = view.indices[indices], view.source
    return view, indices
