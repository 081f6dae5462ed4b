"""The points of a study: which images each training sees, as lists of ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import square
from jaxsynth.data.splits import Shots
from jaxsynth.data.views import Subset, first_of_each, real_share
from jaxsynth.methods.scaling.config import REAL, Config
from jaxsynth.tasks.supervised import Pool, View


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
        shares = [real_share(config.mixed_size, f) for f in config.fractions]
        if shares:
            found[f"{name}, mixed"] = [(k, config.mixed_size - k) for k in shares]
    return {
        setting: [Point(setting, seed, *pair) for seed in config.seeds for pair in pairs]
        for setting, pairs in found.items()
    }


def source_of(setting: str) -> str:
    """The source of a setting's synthetic images."""
    return setting.removesuffix(" + real").removesuffix(", mixed")


def views_of(
    points: Sequence[Point],
    data: Dataset,
    shots: Mapping[int, Shots],
    synthetic: Mapping[int, ImageSource],
) -> list[tuple[Subset | None, Subset | None]]:
    """The real and the synthetic images of each point; None for none.

    The real images of a seed are the first of its shots, the synthetic ones the first of its
    store. SourceError where a class has too few.
    """
    found = []
    for point in points:
        real = None
        if point.real:
            own = shots[point.seed].train_source(data)
            real = first_of_each(own, data.class_names, point.real, f"real images ({point.name})")
        drawn = None
        if point.synthetic:
            drawn = first_of_each(
                synthetic[point.seed], data.class_names, point.synthetic,
                f"{point.setting} ({point.name})",
            )  # fmt: skip
        found.append((real, drawn))
    return found


def pooled(
    views: Sequence[tuple[Subset | None, Subset | None]], size: int, real_weight: float
) -> tuple[Pool, list[View], list[dict[str, list[str]]]]:
    """One pool of all images that views see, each once, and the views over it.

    Also each view's ids. A synthetic image weighs 1, a real one `real_weight`.
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

    out, ids = [], []
    for real, drawn in views:
        parts = [(rows(view), weight) for view, weight in ((real, real_weight), (drawn, 1.0))
                 if view is not None]  # fmt: skip
        out.append(
            View(
                np.concatenate([own for own, _ in parts]),
                np.concatenate([np.full(len(own), weight) for own, weight in parts]),
            )
        )
        ids.append(
            {
                name: [] if view is None else list(view.ids)
                for name, view in (("real_ids", real), ("synthetic_ids", drawn))
            }
        )
    return Pool(np.stack(images), np.asarray(labels, np.int32)), out, ids


def pixels_of(source: ImageSource, size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """Every image, cut and resized to a square."""
    return np.stack([square(source[i].image, size) for i in range(len(source))])


def _root(view: ImageSource) -> tuple[ImageSource, np.ndarray]:
    """What a view of views looks at in the end, and where."""
    indices = np.arange(len(view))
    while isinstance(view, Subset):
        indices, view = view.indices[indices], view.source
    return view, indices
