"""What stages read that no stage made, each identified by its content."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.console import console
from jaxsynth.core.io import file_digests_cached
from jaxsynth.data.conditions import partner_digests
from jaxsynth.data.dataset import DataConfig, Dataset, source_digest
from jaxsynth.data.faces import Faces, read_faces
from jaxsynth.data.load import load_dataset, source_of
from jaxsynth.data.repeats import repeats
from jaxsynth.data.views import joined
from jaxsynth.models.diffusion.motion import MotionModules
from jaxsynth.runs.stage import Source
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.adapters.motion import read_motion
from jaxsynth.weights.hf import TEXT_TO_IMAGE, Clip, StableDiffusion, load_clip, load_pipeline
from jaxsynth.weights.hub import weight_files
from jaxsynth.weights.image_encoder import ImageEncoder, load_image_encoder

# Of a data set that is not here: about that of the sets that networks are usually transferred to.
ASSUMED_CLASSES, ASSUMED_IMAGES = 100, 10_000


def data_source(config: DataConfig) -> Source[Dataset]:
    """The data set that a config names; of a folder it is told which images it has twice."""

    def load() -> Dataset:
        dataset = load_dataset(config)
        for line in repeats(dataset) if source_of(config) == "folder" else ():
            console.print(line, markup=False)
        return dataset

    return Source(load, lambda data: data.digest, lambda data: data.listing)


def pipeline_source(
    name: str, dtype: str = "float32", *, kinds: Sequence[str] = TEXT_TO_IMAGE
) -> Source[StableDiffusion]:
    """The Stable Diffusion that a config names, kept and computed in `dtype`.

    `kinds` as in `load_pipeline`: `PIPELINES` for one with a single text encoder, not SDXL.
    """
    return Source(
        lambda: load_pipeline(name, dtype, compute_dtype=dtype, kinds=kinds),
        lambda found: found.digest,
    )


def clip_source(name: str, dtype: str = "float32") -> Source[Clip]:
    """The CLIP that a config names, kept and computed in `dtype`."""
    return Source(lambda: load_clip(name, dtype, compute_dtype=dtype), lambda found: found.digest)


def image_encoder_source(name: str) -> Source[ImageEncoder]:
    """The image encoder that a config names."""
    return Source(lambda: load_image_encoder(name), lambda found: found.digest)


def face_source(path: str) -> Source[Faces]:
    """The faces of a file."""
    return Source(lambda: read_faces(path), lambda found: found.digest)


def motion_source(
    path: str, base: Source[StableDiffusion], dtype: str = "float32"
) -> Source[MotionModules]:
    """The motion modules at a path, for a base, kept and computed in `dtype`."""

    def load() -> MotionModules:
        return read_motion(path, base.value.unet.config, dtype=jnp.dtype(dtype))

    def digest(_: MotionModules) -> str:
        return files_digest(weight_files(Path(path)) if Path(path).is_dir() else [Path(path)])

    return Source(load, digest)


def adapter_source(path: str, base: str) -> Source[AdapterState]:
    """The adapter at a path, over the networks of a base, a folder or a hub id."""

    def digest(_: AdapterState) -> str:
        place = Path(path)
        inside = sorted(file for file in place.rglob("*") if file.is_file())
        return files_digest([place] if place.is_file() else inside)

    return Source(lambda: adapter_io.load(path, adapter_io.Networks.of(base)), digest)


def joined_source(configs: Mapping[str, DataConfig]) -> Source[Dataset]:
    """Several data sets as one (`data.views.joined`)."""

    def load() -> Dataset:
        return joined({name: load_dataset(config) for name, config in configs.items()})

    return Source(load, lambda data: data.digest, lambda data: data.listing)


def condition_files(data: Source[Dataset], folder: str) -> Source[Path] | None:
    """The folder of a data set's condition images, identified by those files; None for "".

    Its digest raises UserError where the file of an image is missing.
    """
    if not folder:
        return None

    def listing(path: Path) -> dict[str, str]:
        parts = {"train": data.value.train, "test": data.value.test}
        return {
            f"{part}: {id_}": digest
            for part, source in parts.items()
            for id_, digest in partner_digests(source, path).items()
        }

    def digest(path: Path) -> str:
        return hashlib.sha256(json.dumps(list(listing(path).items())).encode()).hexdigest()

    return Source(lambda: Path(folder), digest, listing)


def count_data(config: DataConfig) -> tuple[int, int, str]:
    """Classes and training images, for a plan; those of data that is not here are assumed.

    The last value says so in words, and is "" where they were counted.
    """
    by_path = config.source in ("folder", "captions", "clips")
    if config.source == "tfds" or (by_path and not config.path):
        named = config.name or "no data set named"
        note = f"{named}: {ASSUMED_CLASSES} classes and {ASSUMED_IMAGES} images are assumed"
        return ASSUMED_CLASSES, ASSUMED_IMAGES, note
    dataset = load_dataset(config)
    return dataset.num_classes, len(dataset.train), ""


def files_digest(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) of files' names and contents."""
    digests = file_digests_cached(paths)
    found = [[path.name, digest] for path, digest in zip(paths, digests, strict=True)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def content_digest(value: Any) -> str:
    """SHA-256 (hex) of what a value holds: sources of images by theirs, folders by their files.

    TypeError for a value that has no such form.
    """
    return hashlib.sha256(json.dumps(_content(value)).encode()).hexdigest()


def _content(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "record_digests"):
        return source_digest(value)
    if isinstance(value, Path):
        files = sorted(path for path in value.rglob("*") if path.is_file())
        names = [path.relative_to(value).as_posix() for path in files]
        return [names, file_digests_cached(files)]
    if isinstance(value, (np.ndarray, np.generic)):
        data = np.ascontiguousarray(value)
        return [str(data.dtype), data.shape, hashlib.sha256(data.tobytes()).hexdigest()]
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return [type(value).__name__, _content(fields)]
    if isinstance(value, Mapping):
        return [[str(key), _content(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no content digest")
