"""Asking a model about sets of images: read a batch at a time, at the size it takes.

A model comes with a `preprocess` (one uint8 image to one of its size; normalisation is `predict`'s
own), which every set goes through alike, so that no figure tells sets apart by how they were cut.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.data.conditions import depth, known_map, partner_file
from jaxsynth.data.dataset import ImageSource, SourceError
from jaxsynth.robustness.attacks.evaluate import batches
from jaxsynth.robustness.checks import as_array, check_function, check_labels

Answers = dict[str, np.ndarray]
Preprocess = Callable[[UInt8[np.ndarray, "h w 3"]], np.ndarray]


@dataclass(frozen=True)
class HostFunction:
    """A model that is no function of JAX operations: it gets numpy arrays, on the host."""

    function: Callable

    def __call__(self, images) -> np.ndarray:
        # A copy, for torch warns of arrays that it must not write to.
        return np.asarray(as_array(self.function(np.array(images)), "predict"))


@dataclass(frozen=True)
class Features:
    """What OOD scores of features need: a network's, and the images that it was trained on.

    `function` takes what `predict` does and gives (n, d). ViM needs the last layer too: logits =
    features @ `kernel` + `bias`.
    """

    function: Callable
    training: ImageSource
    kernel: Float[np.ndarray, "d c"] | None = None
    bias: Float[np.ndarray, " c"] | None = None


@dataclass(frozen=True)
class Asker:
    """A model with how it takes images: pixels in [0, 1], `batch_size` of them at once."""

    predict: Partial | HostFunction
    preprocess: Preprocess | None
    batch_size: int
    name: str = "predict"

    def read(
        self, source: ImageSource, rows: Iterable[int], *, ready: tuple[int, ...] | None = None
    ) -> Float[np.ndarray, "n h w 3"]:
        """Images in [0, 1]. Those of shape `ready` are taken as they are, not preprocessed."""
        rows = [int(row) for row in rows]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda row: self._read(source, row, ready), rows))
        for row, image in zip(rows, found, strict=True):
            if image.shape != found[0].shape:
                raise SourceError(
                    f"{source.ids[row]}: {_size(image)} pixels, {source.ids[rows[0]]} has "
                    f"{_size(found[0])}; a model takes images of one size: give a preprocess, or "
                    "the set an image_size"
                )
        return np.stack(found)

    def _read(self, source: ImageSource, row: int, ready) -> np.ndarray:
        record = source[row]
        if self.preprocess is None or record.image.shape == ready:
            return record.image.astype(np.float32) / 255
        return _fractions(self.preprocess(record.image), record.id)

    def nearness(
        self, source: ImageSource, rows: Iterable[int], folder: Path | None
    ) -> Float[np.ndarray, "n h w"]:
        """How near each pixel is, 1 being nearest, cut as the images are.

        From grey files below `folder` under the images' names, or from the source where it knows.
        """

        def one(row: int) -> np.ndarray:
            record = source[row]
            known = known_map(source, row, "depth") if folder is None else None
            if folder is None and known is None:
                raise SourceError(
                    f"{record.id}: nothing is known of its depth, which 3D corruptions need: give "
                    "a folder of depth maps"
                )
            partner = known if folder is None else partner_file(folder, record.id)
            grey = depth(partner, record.image.shape[:2])
            if self.preprocess is None:
                return grey[..., 0]
            # As an image of 8 bits: what cuts and resizes images takes nothing else.
            whole = np.repeat(np.round(255 * grey).astype(np.uint8), 3, axis=-1)
            return _fractions(self.preprocess(whole), record.id)[..., 0]

        return np.stack([one(int(row)) for row in rows])

    def logits(self, source: ImageSource, name: str) -> Float[np.ndarray, "n c"]:
        """ValueError for NaN or infinite ones, and for labels that are none of their classes."""
        parts = []
        for rows, batch in batches(len(source), self.batch_size):
            found = np.asarray(ask(self.predict, self.read(source, batch), self.name), np.float32)
            parts.append(found[: rows.stop - rows.start])
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            row = int(np.argmin(np.isfinite(found).all(1)))
            raise ValueError(
                f"{self.name}: NaN or infinite values, the first for image {source.ids[row]} of "
                f"{name}"
            )
        return found

    def labelled(self, source: ImageSource, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(logits, labels). ValueError for a label that is not one of the model's classes."""
        found, labels = self.logits(source, name), labels_of(source)
        check_labels(labels, *found.shape, name=f"labels of {name}")
        return found, labels


def as_predictor(predict: Callable, image: Float[np.ndarray, "h w 3"]) -> Partial | HostFunction:
    """A function of images, as a Partial where JAX can trace it. ValueError where it is none."""
    if isinstance(predict, Partial | HostFunction):
        return predict
    check_function(predict)
    try:
        jax.eval_shape(predict, image[None])
    except Exception:
        return HostFunction(predict)
    return Partial(predict)


def ask(
    predict: Partial | HostFunction, images: Float[Array, "n h w 3"], name: str = "predict"
) -> np.ndarray:
    """Logits (n, c). ValueError for another shape, or for what is no real number."""
    if isinstance(predict, HostFunction):
        found = predict(images)
    else:
        found = np.asarray(_ask(predict, images))
    if found.ndim != 2 or len(found) != len(images) or found.shape[1] < 2:
        what = "logits" if name == "predict" else "features"
        kinds = "classes" if name == "predict" else "dimensions"
        raise ValueError(
            f"{name}: expected {what} ({len(images)}, {kinds}) of 2 or more {kinds}, found "
            f"{found.shape}"
        )
    if not any(jnp.issubdtype(found.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"{name}: expected numbers, found {found.dtype}")
    return found


@jax.jit
def _ask(predict, images):
    return predict(images)


def labels_of(source: ImageSource) -> Int[np.ndarray, " n"]:
    return np.asarray(source.labels, np.int32)


def _fractions(image: np.ndarray, name: str) -> Float[np.ndarray, "h w 3"]:
    """What a preprocess made, in [0, 1]: of 8 bits, or in that range already."""
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"preprocess: {name}: expected (h, w, 3), made {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"preprocess: {name}: made {image.dtype} values from {low:g} to {high:g}, expected "
            "uint8, or [0, 1]; normalisation belongs into predict"
        )
    return image.astype(np.float32)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
