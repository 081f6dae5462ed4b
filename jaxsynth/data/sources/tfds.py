"""TensorFlow Datasets as a source, without TensorFlow.

TFDS reads its ArrayRecord files at random access without importing TensorFlow. Images are taken as
they are encoded and decoded here like every other image, so that grey and odd ones come out alike.
A data set prepared in another file format must be prepared again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxsynth.core.io import cache_folder, write_bytes
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import DataConfig, ImageSource, Indices, Record, SourceError
from jaxsynth.data.decode import decode_image, decoded_digest, square
from jaxsynth.data.views import held_out

TESTS = ("test", "validation", "val")
# Seconds to wait for a host before a download is given up.
_PATIENCE = 5.0


class TfdsSource:
    """One split. Ids are "<split>/<position>"; TFDS's order is fixed for a version of a data set.

    Labels are stored with the images. The first use of `labels` reads (but does not decode) the
    whole split and remembers them in the user's cache folder, for as long as its files stay as they
    are.
    """

    def __init__(self, builder, split: str, image_size: int = 0):
        import tensorflow_datasets as tfds

        self.name, self.split, self.image_size = builder.info.name, split, image_size
        self._names = tuple(builder.info.features["label"].names)
        info = builder.info.splits[split]
        self._files = [Path(path) for path in info.filepaths]
        self._described = [builder.info.full_name, split, info.shard_lengths, self._names]
        self._records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}
        )

    @cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self._files]
        name = hashlib.sha256(repr((self.digest, stamps)).encode()).hexdigest()
        path = cache_folder() / "labels" / f"{name}.npy"
        try:
            found = np.load(path, allow_pickle=False)
            if found.shape == (len(self),) and found.dtype == np.int32:
                return found
        except (OSError, ValueError, EOFError):
            found = None  # not remembered yet, or not whole
        labels = np.asarray([self._records[i]["label"] for i in range(len(self))], np.int32)
        buffer = io.BytesIO()
        np.save(buffer, labels)
        # A cache folder that cannot be written costs the next start its time, and nothing else.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, buffer.getvalue())
        return labels

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the data set's version, the split, its classes, shards and their sizes.

        A prepared version of a TFDS data set does not change, so its files are not read.
        """
        sizes = [path.stat().st_size for path in self._files]
        return hashlib.sha256(json.dumps([*self._described, sizes]).encode()).hexdigest()

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        return [
            decoded_digest(f"{self.digest} {i}", self.image_size)
            for i in (range(len(self)) if indices is None else map(int, indices))
        ]

    @cached_property
    def ids(self) -> Sequence[str]:
        return tuple(f"{self.split}/{i:08d}" for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        id_ = self.ids[index]
        image = decode_image(record["image"], f"{self.name} {id_}")
        return Record(square(image, self.image_size), int(record["label"]), id_)


def _prepared_builder(config: DataConfig):
    """The builder of a data set, downloaded and prepared as ArrayRecord if it is not there yet."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SourceError("source tfds: the package tensorflow-datasets is missing") from error
    if not config.name:
        raise SourceError('name: source "tfds" needs the name of a data set')
    options = {"data_dir": config.path} if config.path else {}
    try:
        builder = tfds.builder(config.name, **options)
    except tfds.core.registered.DatasetNotFoundError as error:
        where = config.path or "TFDS's default data directory"
        raise SourceError(
            f"name: TFDS has no data set {config.name!r}, and none is prepared under {where}"
        ) from error
    if builder.is_prepared():
        return builder
    # The downloader would try again for minutes and fill the screen with its attempts.
    if host := _unreachable(builder.url_infos or ()):
        raise SourceError(
            f"{config.name}: not prepared under {builder.data_dir}, and {host} cannot be reached "
            f"from here. {_advice(config)}"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    # Whatever goes wrong while downloading (network, disk, checksums, a builder that itself needs
    # TensorFlow), the user needs the same advice with the cause after it.
    except Exception as error:
        raise SourceError(
            f"{config.name}: not prepared under {builder.data_dir}, and preparing it here failed "
            f"({type(error).__name__}: {error}). {_advice(config)}"
        ) from error
    return builder


def _advice(config: DataConfig) -> str:
    return (
        "Where there is a network (and, for some sets, TensorFlow), run "
        f"tfds.builder({config.name!r}, data_dir=...)"
        '.download_and_prepare(file_format="array_record"), then give that folder as path'
    )


def _unreachable(urls: Iterable[str]) -> str:
    """The first host of `urls` if no connection to it can be made within seconds, else ""."""
    if urllib.request.getproxies():  # then the proxy resolves names and connects
        return ""
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname or parts.scheme not in ("http", "https"):
            continue
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        # A resolver without a network may take longer than a connection's own time limit.
        pool = ThreadPoolExecutor(1)
        attempt = pool.submit(socket.create_connection, (parts.hostname, port), _PATIENCE)
        try:
            attempt.result(_PATIENCE).close()
        except (OSError, TimeoutError):
            return parts.hostname
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return ""
    return ""


def _check(builder) -> tuple[str, ...]:
    """The class names of a data set that has an image and a label."""
    features = builder.info.features
    missing = [key for key in ("image", "label") if key not in features]
    if missing:
        raise SourceError(
            f"{builder.info.name}: has no feature {missing}; found {sorted(features)}"
        )
    names = getattr(features["label"], "names", None)
    if not names:
        raise SourceError(f"{builder.info.name}: its feature label has no class names")
    found = getattr(builder.info.file_format, "value", builder.info.file_format)
    if found != "array_record":
        raise SourceError(
            f"{builder.info.name}: {builder.data_dir} holds {counted(found, 'file')}, which need "
            "TensorFlow; "
            'prepare it again with download_and_prepare(file_format="array_record")'
        )
    return tuple(names)


def load_split(config: DataConfig, split: str) -> tuple[ImageSource, tuple[str, ...]]:
    """One split of a data set, labelled, and its class names."""
    builder = _prepared_builder(config)
    names = _check(builder)
    _check_split(builder, config.name, "split", split)
    source = TfdsSource(builder, split, config.image_size)
    if (source.labels < 0).any():
        raise SourceError(f"split: the labels of {config.name} {split} are not public")
    return source, names


def _check_split(builder, name: str, field: str, split: str) -> None:
    splits = sorted(builder.info.splits)
    # A slice such as train[:80%] is TFDS's to check.
    if split.split("[")[0] not in splits:
        raise SourceError(f"{field}: {name} has no split {split!r}; found {splits}")


def load_tfds(config: DataConfig) -> tuple[tuple[str, ...], ImageSource, ImageSource, str]:
    """Class names, train, test, and where test comes from."""
    builder = _prepared_builder(config)
    names = _check(builder)
    splits = sorted(builder.info.splits)
    for field in ("train_split", "test_split"):
        wanted = getattr(config, field)
        if wanted:
            _check_split(builder, config.name, field, wanted)
    train = TfdsSource(builder, config.train_split, config.image_size)
    tests = (config.test_split,) if config.test_split else [t for t in TESTS if t in splits]
    if tests:
        test = TfdsSource(builder, tests[0], config.image_size)
        if (test.labels < 0).any():
            raise SourceError(f"test_split: the labels of {config.name} {tests[0]} are not public")
        return names, train, test, f"the split {tests[0]}"
    kept, out = held_out(train, names, config.test_fraction, config.split_seed)
    note = f"{config.test_fraction:g} of each class held out of train, seed {config.split_seed}"
    return names, kept, out, note
