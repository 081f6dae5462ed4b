"""Regions of the training images, and the two terms that compare what a classifier says in them.

ProtoAug (ICML 2025, arXiv 2505.24190) bounds the error on real images by how far a classifier's
answers to synthetic images are from those to real ones of the same region (discrepancy), and by how
far its answers to synthetic images of one region are from each other (robustness). Regions are the
cells of k-means over all training images. With G_i and R_i the synthetic and the real images of
region i in a batch, g the synthetic images of the whole set and f the logits of c classes,

    discrepancy = 1/g sum_i 1/|R_i| sum_{u in G_i, v in R_i} |f(u) - f(v)|^2 / c
    robustness  = 1/g sum_i 1/|G_i| sum_{u < w in G_i} |f(u) - f(w)|^2 / c

The published code clusters raw pixels. Here images are shrunk first: those of 224 pixels have
150,000 numbers each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.io import replacing
from jaxsynth.core.limits import Count, Natural, NotNegative, OneOf, check_limits
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.decode import square

# The side to which images are shrunk before their pixels are compared.
PIXELS = 32
REGIONS_FILE = "regions.npz"


@dataclass(frozen=True)
class RegionConfig:
    """ProtoAug's terms: the weights `discrepancy` and `robustness`, 0 for none of it.

    The published weights are 20 and 200 for 500 images of each of 100 classes. `clusters` are the
    regions, 0 for two of each class; `space` is where images are near each other, their "pixels" or
    the untrained image tower's "features"; `iterations` bounds those of k-means.
    """

    discrepancy: NotNegative = 0.0
    robustness: NotNegative = 0.0
    clusters: Natural = 0
    space: Annotated[str, OneOf("pixels", "features")] = "pixels"
    iterations: Count = 300

    def __post_init__(self):
        check_limits(self)
        plain = type(self).__dataclass_fields__
        for name in ("clusters", "space", "iterations"):
            if not self and getattr(self, name) != plain[name].default:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}, but discrepancy and robustness are 0, so "
                    "that there are no regions; give one of them a weight"
                )

    def __bool__(self) -> bool:
        return bool(self.discrepancy or self.robustness)


def region_terms(
    logits: Float[Array, "b c"], regions: Int[Array, " b"], num_real: int, total: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(discrepancy, robustness) of a batch whose first `num_real` images are real.

    `total` is g, the synthetic images of the whole set. Without real images the first is 0.
    """
    # Not by |x|^2 + |y|^2 - 2 x.y: logits are large and their differences small.
    apart = jnp.square(logits[:, None] - logits[None]).mean(-1)
    same = regions[:, None] == regions[None]
    real = jnp.arange(len(logits)) < num_real
    from_synthetic = same & ~real[:, None]

    def term(others: Array) -> Array:
        counts = jnp.maximum((same & others[None]).sum(1, keepdims=True), 1)
        return jnp.where(from_synthetic & others[None], apart / counts, 0.0).sum() / total

    return term(real), term(~real) / 2


def find_regions(
    features: Sequence[Float[np.ndarray, "n d"]],
    config: RegionConfig,
    *,
    num_classes: int,
    seed: int,
    folder: Path,
) -> list[Int[np.ndarray, " n"]]:
    """The region of every image of each set, by k-means over all of them.

    Kept in `folder`, so that a resumed training has the same: k-means rounds differently on another
    number of threads. Process 0's are those of every process.
    """
    counts = [len(own) for own in features]
    path = folder / REGIONS_FILE
    if path.is_file():
        found = read_arrays(path, ("regions",))["regions"]
    else:
        from sklearn.cluster import KMeans  # slow to import, and few trainings have regions

        rows = np.concatenate(features).astype(np.float32)
        clusters = min(config.clusters or 2 * num_classes, len(np.unique(rows, axis=0)))
        means = KMeans(clusters, max_iter=config.iterations, n_init=1, random_state=seed)
        found = means.fit_predict(rows).astype(np.int32)
    if jax.process_count() > 1:
        found = np.asarray(multihost_utils.broadcast_one_to_all(found))
    if not path.is_file() and jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, regions=found)
    return np.split(found, np.cumsum(counts)[:-1])


def pixel_rows(source: ImageSource, size: int) -> Float[np.ndarray, "n d"]:
    """The pixels of every image, a row each, of at most `PIXELS` a side, in [0, 1]."""
    side = min(size, PIXELS)
    rows = [square(source[i].image, side).reshape(-1) for i in range(len(source))]
    return np.stack(rows).astype(np.float32) / 255
