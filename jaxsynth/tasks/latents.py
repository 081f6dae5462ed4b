"""A labelled data set as an autoencoder's latents, encoded once."""

import itertools
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.documents import checked
from jaxsynth.core.io import replacing
from jaxsynth.data.conditions import as_bytes, as_fractions
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.batches import ahead
from jaxsynth.models.diffusion.vae import AutoencoderKL, encode_images
from jaxsynth.ops.space_to_depth import space_to_depth
from jaxsynth.training.task import Streamed


@dataclass(frozen=True)
class Latents:
    """A labelled data set as the VAE's posteriors, scaled as the transformer wants them.

    `mean` and `std` have an axis of `k` views of each image (itself, and mirrored). `condition`, if
    any, is that of each view at the latents' size: fractions, or uint8 in 255ths (`conditioned`).
    """

    mean: Float[np.ndarray, "n k h w c"]
    std: Float[np.ndarray, "n k h w c"]
    labels: Int[np.ndarray, " n"]
    condition: Shaped[np.ndarray, "n k h w m"] | None = None

    def __post_init__(self):
        if self.condition is not None and self.condition.shape[:-1] != self.mean.shape[:-1]:
            raise ValueError(
                f"Latents: a condition of {self.condition.shape} for latents of {self.mean.shape}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def conditioned(self, pixels: Shaped[np.ndarray, "n height width m"]) -> "Latents":
        """The same with condition images, of the images' size and mirrored where they are.

        `pixels` are fractions or uint8 in 255ths; stored as the latter, at the latents' size with
        nothing lost (`ops.space_to_depth`). ValueError where sizes do not fit.
        """
        values = pixels if pixels.dtype == np.uint8 else as_bytes(pixels)
        views = [values, values[:, :, ::-1]][: self.mean.shape[1]]
        factor = max(values.shape[1] // self.mean.shape[2], 1)
        condition = np.stack([space_to_depth(view, factor) for view in views], axis=1)
        return replace(self, condition=condition)

    def inputs(self, rows: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        """What the transformer is told about the first view of these images."""
        given = {"labels": self.labels[rows]}
        if self.condition is not None:
            given["condition"] = as_fractions(self.condition[rows, 0])
        return given

    @classmethod
    def load(cls, path: Path, *, mapped: bool = False) -> "Latents":
        """Read what `write_latents` wrote; `mapped` leaves it in the file until used."""
        names = ("mean", "std", "labels")
        found = read_arrays(path, names, optional=("condition",), mapped=mapped)
        return checked(path, cls, **found)


def write_latents(
    path: Path, vae: AutoencoderKL, source: ImageSource, *, mirror: bool, batch_size: int = 64
) -> int:
    """Write the images of `source`, of one square size, as an .npz of `Latents`; how many they are.

    With `mirror` also mirrored. A batch is in memory at a time, of images and of latents; until the
    file is whole, half of it more lies on the disk beside it.
    """
    parts = _encoded(vae, source, mirror, batch_size)
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        tempfile.TemporaryFile(dir=path.parent) as spare,
    ):

        @contextmanager
        def member(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[IO[bytes]]:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                described = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(file, described)
                yield file

        first = next(parts)
        shape, dtype = (len(source), *first[0].shape[1:]), first[0].dtype
        with member("mean", shape, dtype) as file:
            for mean, std in itertools.chain([first], parts):
                file.write(mean.tobytes())
                spare.write(std.tobytes())
        spare.seek(0)
        with member("std", shape, dtype) as file:
            shutil.copyfileobj(spare, file, 1 << 20)
        labels = np.asarray(source.labels, np.int32)
        with member("labels", labels.shape, labels.dtype) as file:
            file.write(labels.tobytes())
    return len(source)


def _encoded(
    vae: AutoencoderKL, source: ImageSource, mirror: bool, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mean and deviation (b, k, h, w, c) of each batch of images."""
    for start in range(0, len(source), batch_size):
        rows = range(start, min(start + batch_size, len(source)))
        images = np.stack([source[i].image for i in rows]).astype(np.float32) / 127.5 - 1
        views = [images, images[:, :, ::-1]] if mirror else [images]
        encoded = [encode_images(vae, view, batch_size=batch_size) for view in views]
        mean, std = (np.stack(part, axis=1) for part in zip(*encoded, strict=True))
        yield mean, std


@dataclass(frozen=True)
class RandomBatches:
    """Batches drawn with replacement: "mean" and "std" (b, h, w, c), "labels", "condition".

    The data has "mean" and "std" (n, k, h, w, c), "labels" (n,), of which the first "count" images
    and "views" views are drawn, "key", and where there are conditions "condition" (n, k, h, w, m).
    """

    batch_size: int

    def places(self, step: Array, data: Mapping[str, Any]) -> dict[str, Int[Array, " b"]]:
        """Of a step's batch: which images, and which view of each."""
        keys = _batch_keys(step, data)
        return {
            "rows": jax.random.randint(keys[0], (self.batch_size,), 0, data["count"]),
            "view": jax.random.randint(keys[1], (self.batch_size,), 0, data["views"]),
        }

    def read(self, places: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """What lies there."""
        rows, view = places["rows"], places["view"]
        viewed = [name for name in ("mean", "std", "condition") if name in data]
        batch = {name: data[name][rows, view] for name in viewed}
        return batch | {"labels": data["labels"][rows]}

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        return self.read(self.places(step, data), data)


@dataclass(frozen=True)
class RetainingBatches:
    """Batches of `target` with `rows` of the data's first `count` latents in "kept" beside them."""

    target: RandomBatches
    rows: int
    count: int

    def places(self, step: Array, data: Mapping[str, Any]) -> dict[str, Int[Array, " b"]]:
        """Those of the target, and which of the kept."""
        rows = jax.random.randint(_batch_keys(step, data)[2], (self.rows,), 0, self.count)
        return self.target.places(step, data) | {"kept": rows}

    def read(self, places: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """What lies there."""
        return self.target.read(places, data) | {"kept": data["kept"][places["kept"]]}

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        return self.read(self.places(step, data), data)


def _batch_keys(step: Array, data: Mapping[str, Any]) -> Key[Array, "3"]:
    return jax.random.split(jax.random.fold_in(data["key"], step), 3)


def stream_latents(
    latents: Latents,
    batches: RandomBatches | RetainingBatches,
    key: Key[Array, ""],
    steps: int,
    kept: Float[np.ndarray, "m h w c"] | None = None,
) -> Streamed:
    """The batches that `batches` draws by `key`, read by the host; of shapes alone, for a plan."""
    data = {name: getattr(latents, name) for name in ("mean", "std", "labels", "condition")}
    data = {name: values for name, values in data.items() if values is not None}
    if kept is not None:
        data["kept"] = kept
    if isinstance(latents.mean, jax.ShapeDtypeStruct):
        sized = {"count": len(latents), "views": latents.mean.shape[1], "key": key}
        shapes = jax.eval_shape(lambda held: batches(jnp.int32(0), {**held, **sized}), data)
        return Streamed(None, shapes)
    numbers = {"count": np.int32(len(latents)), "views": np.int32(latents.mean.shape[1])}
    return Streamed(lambda: ahead(_Drawn(batches, data, {**numbers, "key": key}, steps)))


class _Drawn:
    """This process's rows of each batch, by its number."""

    # Places of so many batches are drawn at once.
    _AT_ONCE = 256

    def __init__(
        self,
        batches: RandomBatches | RetainingBatches,
        data: Mapping[str, np.ndarray],
        numbers: Mapping[str, Any],
        steps: int,
    ):
        self.batches, self.data, self.steps = batches, data, steps
        self._draw = jax.jit(jax.vmap(lambda step: batches.places(step, numbers)))
        self._places = lru_cache(4)(self._drawn)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:  # Grain logs it
        return f"latents ({len(self)} batches)"

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        part, place = divmod(int(step), self._AT_ONCE)
        with self._lock:
            places = self._places(part)
        found = {name: _own_rows(rows[place]) for name, rows in places.items()}
        return self.batches.read(found, self.data)

    def _drawn(self, part: int) -> dict[str, np.ndarray]:
        steps = np.arange(part * self._AT_ONCE, (part + 1) * self._AT_ONCE, dtype=np.int32)
        return jax.tree.map(np.asarray, self._draw(steps))


def _own_rows(rows: np.ndarray) -> np.ndarray:
    """Those of this process, which are neighbors in the whole batch; ValueError if unequal."""
    return np.split(rows, jax.process_count())[jax.process_index()]
