"""What is known of the faces in a data set's images: whose they are, keypoints, embeddings."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.errors import UserError, shown
from jaxsynth.core.io import replacing
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import check_square
from jaxsynth.data.keypoints import draw_keypoints
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.views import Subset

FILE = "faces.npz"
# What drawn images know, by the names of `ArraySource.facts`.
PEOPLE, KEYPOINTS = "people", "keypoints"


@dataclass(frozen=True)
class Faces:
    """Embeddings and keypoints of the faces in images, by the images' ids.

    Keypoints are (x, y) in pixels of the image as the data set has it.
    """

    ids: tuple[str, ...]
    embeddings: Float32[np.ndarray, "n d"]
    keypoints: Float32[np.ndarray, "n 5 2"]

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.embeddings.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        whole = hashlib.sha256("\n".join(self.ids).encode())
        for array in (self.embeddings, self.keypoints):
            whole.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def of(self, source: ImageSource, where: object = FILE) -> "Faces":
        """Those of a source's images, in its order; UserError naming an image without one."""
        rows = {id_: row for row, id_ in enumerate(self.ids)}
        missing = [id_ for id_ in source.ids if id_ not in rows]
        if missing:
            raise UserError(
                f"{where}: no face of {counted(len(missing), 'image')}, the first is "
                f"{shown(missing[0])}; found {counted(len(rows), 'face')}"
            )
        chosen = [rows[id_] for id_ in source.ids]
        ids = tuple(source.ids)
        return Faces(ids, self.embeddings[chosen], self.keypoints[chosen])


def read_faces(path: str | Path) -> Faces:
    """The faces of an .npz: "ids" (n,), "embeddings" (n, width) and "keypoints" (n, 5, 2).

    UserError naming the file and the array that is not so.
    """
    path = Path(path)
    names = ("ids", "embeddings", "keypoints")
    ids, embeddings, keypoints = (read_arrays(path, names)[name] for name in names)
    for name, array, good in (
        ("ids", ids, ids.ndim == 1 and ids.dtype.kind == "U"),
        ("embeddings", embeddings, embeddings.ndim == 2 and embeddings.dtype.kind == "f"),
        ("keypoints", keypoints, keypoints.shape[1:] == (5, 2) and keypoints.dtype.kind in "fiu"),
    ):
        if not good or len(array) != len(ids):
            raise UserError(
                f"{path}: {name} of {array.dtype} {array.shape}, expected ids (n,) of texts, "
                "embeddings (n, width) of floats and keypoints (n, 5, 2)"
            )
        if name != "ids" and not np.isfinite(array).all():
            raise UserError(f"{path}: {name} are not finite")
    names = tuple(map(str, ids))
    if len(set(names)) < len(names):
        raise UserError(f"{path}: ids: the same is there twice")
    return Faces(names, embeddings.astype(np.float32), keypoints.astype(np.float32))


def write_faces(path: Path, faces: Faces) -> Path:
    """Writes what `read_faces` reads."""
    with replacing(path) as target, target.open("wb") as file:
        np.savez(
            file,
            ids=np.array(faces.ids),
            embeddings=faces.embeddings,
            keypoints=faces.keypoints,
        )
    return path


def known_people(data: Dataset) -> bool:
    """Whether the data know whose face each image shows, and where its keypoints are."""
    sources = (data.train, data.test)
    return all(_fact(x, name) is not None for x in sources for name in (PEOPLE, KEYPOINTS))


def people_of(source: ImageSource) -> Int[np.ndarray, " n"]:
    """Whose face each image shows; UserError where the data do not know."""
    return _needed(source, PEOPLE)


def keypoints_of(source: ImageSource) -> Float[np.ndarray, "n 5 2"]:
    """The keypoints of each image; UserError where the data do not know."""
    return _needed(source, KEYPOINTS)


def keypoint_pictures(
    source: ImageSource, keypoints: Float[np.ndarray, "n 5 2"], size: int
) -> UInt8[np.ndarray, "n size size 3"]:
    """The pictures of the keypoints of square images, at `size` pixels."""
    sides = check_square(source, "keypoints")
    return np.stack(
        [
            draw_keypoints((points + 0.5) * size / side - 0.5, (size, size))
            for points, side in zip(keypoints, sides, strict=True)
        ]
    )


def _needed(source: ImageSource, name: str) -> np.ndarray:
    found = _fact(source, name)
    if found is None:
        raise UserError(f"{name}: not known of these images")
    return found


def _fact(source: ImageSource, name: str) -> np.ndarray | None:
    if isinstance(source, Subset):
        found = _fact(source.source, name)
        return None if found is None else found[source.indices]
    return source.facts.get(name) if isinstance(source, ArraySource) else None
