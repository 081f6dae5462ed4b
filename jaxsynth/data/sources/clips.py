"""Clips with a text each: files and folders of frames on disk, or arrays of them.

A folder holds animated GIF or WebP, MP4 and its kin, or folders of numbered frames, side by side,
each with a text as captioned images have it (`captioned`): in metadata.jsonl, or in a file of the
clip's name beside it. A clip is a record like an image's, whose image is its middle frame, so that
everything that takes images takes clips; what learns motion asks for `frames`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from jaxsynth.core.io import file_digests_cached
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import DataConfig, ImageSource, Indices, Record, SourceError
from jaxsynth.data.decode import ImageError, decoded_digest
from jaxsynth.data.films import ANIMATED, VIDEOS, count_frames, frame_files, is_film, read_frames
from jaxsynth.data.names import class_of_folder, natural_key
from jaxsynth.data.sources.captioned import SUFFIXES, TABLE, read_texts
from jaxsynth.data.sources.files import visible
from jaxsynth.data.sources.folder import Loaded
from jaxsynth.data.views import held_out, origin

_SHOWN = 20
_WAY_OUT = (
    f"Clips are {', '.join((*ANIMATED, *VIDEOS))} files or folders of numbered frames, side by "
    "side; move or remove anything else"
)
# Frames of what was read once, by path, size and time of its files.
_counted: dict[tuple, int] = {}


@runtime_checkable
class Clips(Protocol):
    """A source whose records are clips."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def frames(self, index: int, rows: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]: ...


@dataclass(frozen=True)
class ClipFiles:
    """Films below `root`, each of `lengths` frames and with a text."""

    root: Path
    ids: Sequence[str]
    labels: Int[np.ndarray, " n"]
    captions: Sequence[str]
    lengths: Sequence[int]
    image_size: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        (image,) = self.frames(index, [self.lengths[index] // 2])
        return Record(image, int(self.labels[index]), self.ids[index])

    def frames(self, index: int, rows: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        return read_frames(self.root / self.ids[index], rows, self.image_size)

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        found = []
        for i in range(len(self)) if indices is None else indices:
            digests = file_digests_cached(_files(self.root / self.ids[i]))
            whole = hashlib.sha256("\n".join([self.captions[i], *digests]).encode()).hexdigest()
            found.append(decoded_digest(whole, self.image_size))
        return found


@dataclass(frozen=True)
class ClipArrays:
    """Clips in memory, of one size and length, with a text each."""

    clips: UInt8[np.ndarray, "n f h w 3"]
    labels: Int[np.ndarray, " n"]
    ids: Sequence[str]
    captions: Sequence[str]

    @property
    def lengths(self) -> Sequence[int]:
        return [self.clips.shape[1]] * len(self.clips)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Record:
        middle = self.clips[index][self.clips.shape[1] // 2]
        return Record(middle, int(self.labels[index]), self.ids[index])

    def frames(self, index: int, rows: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        return self.clips[index][np.asarray(rows)]

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        rows = range(len(self)) if indices is None else indices
        return [
            hashlib.sha256(self.captions[i].encode() + self.clips[i].tobytes()).hexdigest()
            for i in rows
        ]


def load_clips(config: DataConfig) -> Loaded:
    """Class name, train, test, and where test comes from.

    SourceError naming a clip without a text, and all that is no clip or cannot be read.
    """
    if not config.path:
        raise SourceError('path: source "clips" needs the folder of the clips')
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise SourceError(f"path: {root}: {'not a' if root.exists() else 'no such'} folder")
    paths = visible(root)
    films = [path for path in paths if path.is_dir() or is_film(path)]
    if not films:
        raise SourceError(f"{root}: no clips. {_WAY_OUT}")
    stems = {path.name if path.is_dir() else path.stem for path in films}
    problems = [
        f"{path.name}: no clip"
        for path in paths
        if path not in films
        and path.name != TABLE
        and not (path.suffix.lower() in SUFFIXES and path.stem in stems)
    ]
    with ThreadPoolExecutor(4) as pool:
        lengths = dict(zip(films, pool.map(_length, films), strict=True))
    problems += [f"{x.name}: {why}" for x, why in lengths.items() if isinstance(why, str)]
    if problems:
        raise SourceError(f"{root}: {_listed(problems)}. {_WAY_OUT}")
    ids = sorted((path.name for path in films), key=natural_key)
    source = ClipFiles(
        root,
        tuple(ids),
        np.zeros(len(ids), np.int32),
        read_texts(root, ids, "clip"),
        [int(lengths[root / id_]) for id_ in ids],
        config.image_size,
    )
    names = (class_of_folder(root.resolve().name),)
    train, test = held_out(source, names, config.test_fraction, config.split_seed)
    return names, train, test, f"{config.test_fraction:g} held out, seed {config.split_seed}"


def clip_at(source: ImageSource, index: int) -> tuple[Clips, int]:
    """The clip of a record; SourceError where records are images."""
    found, place = origin(source, index)
    if not isinstance(found, Clips):
        raise SourceError(
            "data: images, and clips are needed; a folder of them is read by "
            "--config.data.source=clips --config.data.path=FOLDER"
        )
    return found, place


def window(start: int, frames: int, stride: int) -> range:
    """The rows of a window: `frames` of them, each `stride` after the one before."""
    return range(start, start + (frames - 1) * stride + 1, stride)


def check_lengths(sources: Iterable[ImageSource], frames: int, stride: int) -> None:
    """SourceError naming every clip that is shorter than a window of so many frames."""
    needed, short = window(0, frames, stride)[-1] + 1, []
    for source in sources:
        for i, id_ in enumerate(source.ids):
            clip, place = clip_at(source, i)
            if clip.lengths[place] < needed:
                short.append(f"{id_} has {clip.lengths[place]}")
    if short:
        raise SourceError(
            f"{counted(len(short), 'clip')} shorter than the {needed} frames that frames={frames}, "
            f"stride={stride} need: {_listed(short)}. Take fewer frames or a smaller stride, or "
            "remove them"
        )


def _listed(texts: list[str]) -> str:
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return "; ".join([*texts[:_SHOWN], *more])


def _files(path: Path) -> list[Path]:
    return frame_files(path) if path.is_dir() else [path]


def _length(path: Path) -> int | str:
    """The number of frames, or why they cannot be read."""
    try:
        key = tuple((str(x), *_stamp(x)) for x in _files(path))
        if key not in _counted:
            _counted[key] = count_frames(path)
        return _counted[key]
    except (ImageError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
