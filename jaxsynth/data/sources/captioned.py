"""Folders of images with a text each, in the two layouts that trainers of LoRA read.

- metadata.jsonl beside the images, a line {"file_name": "1.jpg", "text": "a photo of ..."} for each
  (Hugging Face's; the text may also be called caption or prompt);
- a text file of the image's name beside it (kohya's): 1.jpg and 1.txt or 1.caption.

All images are of one class, which is called as the folder is; a part of them is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsynth.core.documents import parse_json, read_text
from jaxsynth.core.errors import UserError, shown
from jaxsynth.core.io import json_digest
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import DataConfig, Dataset, ImageSource, Indices, SourceError
from jaxsynth.data.names import class_of_folder, natural_key
from jaxsynth.data.prompts import prompts
from jaxsynth.data.sources.files import FileSource, check_images, images_in, refuse
from jaxsynth.data.sources.folder import Loaded
from jaxsynth.data.views import held_out, origin

TABLE = "metadata.jsonl"
COLUMNS = ("text", "caption", "prompt")
SUFFIXES = (".txt", ".caption")


@dataclass(frozen=True)
class CaptionedSource(FileSource):
    """Image files with a text each, which is part of what identifies an image."""

    captions: Sequence[str] = ()

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        rows = range(len(self)) if indices is None else indices
        texts = [hashlib.sha256(self.captions[i].encode()).hexdigest()[:16] for i in rows]
        digests = super().record_digests(indices)
        return [f"{digest} {text}" for digest, text in zip(digests, texts, strict=True)]


def load_captioned(config: DataConfig) -> Loaded:
    """Class name, train, test, and where test comes from.

    SourceError naming an image without a text, a line of the table without an image, and all files
    that are no images or cannot be read.
    """
    if not config.path:
        raise SourceError('path: source "captions" needs the folder of the images')
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise SourceError(f"path: {root}: {'not a' if root.exists() else 'no such'} folder")
    problems: dict[Path, str] = {}
    images = images_in(root, problems)
    problems.pop(root / TABLE, None)
    check_images(images, problems)
    refuse(root, problems)
    if not images:
        raise SourceError(f"{root}: no images; expected them side by side, each with a text")
    ids = sorted((path.name for path in images), key=natural_key)
    captions = read_texts(root, ids, "image")
    labels = np.zeros(len(ids), np.int32)
    source = CaptionedSource(root, tuple(ids), labels, config.image_size, captions)
    names = (class_of_folder(root.resolve().name),)
    train, test = held_out(source, names, config.test_fraction, config.split_seed)
    return names, train, test, f"{config.test_fraction:g} held out, seed {config.split_seed}"


def read_texts(root: Path, ids: Sequence[str], what: str) -> list[str]:
    """The text of each file or folder in `root`, of the table or of a file beside it.

    SourceError naming the first of those without one; `what` is what they are called.
    """
    table = root / TABLE
    texts = _of_table(table, set(ids), what) if table.is_file() else _beside(root, ids)
    missing = [id_ for id_ in ids if not texts.get(id_)]
    if missing:
        raise SourceError(
            f"{root}: {len(missing)} of {counted(len(ids), what)} have no text, the first is "
            f"{shown(missing[0])}; write it into {TABLE} (file_name, text) or into "
            f"{_stem(root / missing[0])}.txt beside it"
        )
    return [texts[id_] for id_ in ids]


@dataclass(frozen=True)
class Captions:
    """A text for each of a data set's images that has one, by the images' ids."""

    path: Path
    texts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        return json_digest(dict(self.texts))

    def of(self, source: ImageSource) -> list[str]:
        """Those of a source's images, in its order; UserError naming an image without one."""
        missing = [id_ for id_ in source.ids if id_ not in self.texts]
        if missing:
            raise UserError(
                f"captions: {self.path}: no text of {counted(len(missing), 'image')} of "
                f"{len(source.ids)}, the first is {shown(missing[0])}; write a line with file_name "
                f"and text, or a file {Path(missing[0]).with_suffix(SUFFIXES[0])} in the folder"
            )
        return [self.texts[id_] for id_ in source.ids]


def read_captions(path: str | Path, data: Dataset) -> Captions:
    """The texts of a data set's training images.

    Args:
        path: a .jsonl with a line {"file_name": id, "text": ...} for each, or a folder with texts
            named as the images are: cat/1.txt for cat/1.jpg.

    Raises:
        UserError: no such path, a line without both, or of an image that is not in the data set.
    """
    found, ids = Path(path).expanduser(), data.train.ids
    if found.is_dir():
        return Captions(found, _beside(found, ids))
    if not found.is_file():
        raise UserError(f"captions: {found}: no such file or folder")
    return Captions(found, _of_table(found, set(ids), "image"))


def captions(data: Dataset, source: ImageSource) -> list[str]:
    """The text of each image of a part of `data`: its own, or else its class's prompt."""
    of_classes = prompts(data)
    return [_own(source, i) or of_classes[label] for i, label in enumerate(source.labels)]


def _own(source: ImageSource, index: int) -> str:
    source, index = origin(source, index)
    texts: Sequence[str] = getattr(source, "captions", ())
    return texts[index] if texts else ""


def _of_table(table: Path, ids: Set[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(table).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        row = parse_json(line, where)
        name = row.get("file_name")
        text = next((row[key] for key in COLUMNS if isinstance(row.get(key), str)), None)
        if not isinstance(name, str) or text is None:
            raise SourceError(
                f"{where}: expected file_name and {' or '.join(COLUMNS)}, found {shown(list(row))}"
            )
        if name not in ids:
            raise SourceError(f"{where}: no {what} {shown(name)} in {table.parent}")
        if found.setdefault(name, _plain(text)) != _plain(text):
            raise SourceError(f"{where}: {shown(name)} has another text in a row above")
    return found


def _beside(root: Path, ids: Iterable[str]) -> dict[str, str]:
    """The texts beside files or folders below `root`, by the names of these."""
    found = {}
    for id_ in ids:
        own = root / id_
        files = (own.parent / f"{_stem(own)}{suffix}" for suffix in SUFFIXES)
        text = next((file for file in files if file.is_file()), None)
        if text is not None:
            found[id_] = _plain(read_text(text))
    return found


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _plain(text: str) -> str:
    return " ".join(text.split())
