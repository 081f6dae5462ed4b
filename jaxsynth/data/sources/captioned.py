"""Folders of images with a text each, in the two layouts that trainers of LoRA read.

- metadata.jsonl beside the images, a line {"file_name": "1.jpg", "text": "a photo of ..."} for each
  (Hugging Face's; the text may also be called caption or prompt);
- a text file of the image's name beside it (kohya's): 1.jpg and 1.txt or 1.caption.

All images are of one class, which is called as the folder is; a part of them is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsynth.core.documents import parse_json, read_text
from jaxsynth.core.errors import shown
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
    texts = _of_table(root, ids, what) if (root / TABLE).is_file() else _of_files(root, ids)
    missing = [id_ for id_ in ids if not texts.get(id_)]
    if missing:
        raise SourceError(
            f"{root}: {len(missing)} of {counted(len(ids), what)} have no text, the first is "
            f"{shown(missing[0])}; write it into {TABLE} (file_name, text) or into "
            f"{_stem(root / missing[0])}.txt beside it"
        )
    return [texts[id_] for id_ in ids]


def captions(data: Dataset, source: ImageSource) -> list[str]:
    """The text of each image of a part of `data`: its own, or else its class's prompt."""
    of_classes = prompts(data)
    return [_own(source, i) or of_classes[label] for i, label in enumerate(source.labels)]


def _own(source: ImageSource, index: int) -> str:
    source, index = origin(source, index)
    texts: Sequence[str] = getattr(source, "captions", ())
    return texts[index] if texts else ""


def _of_table(root: Path, ids: Sequence[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(root / TABLE).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{root / TABLE}, line {number}"
        row = parse_json(line, where)
        name = row.get("file_name")
        text = next((row[key] for key in COLUMNS if isinstance(row.get(key), str)), None)
        if not isinstance(name, str) or text is None:
            raise SourceError(
                f"{where}: expected file_name and {' or '.join(COLUMNS)}, found {shown(list(row))}"
            )
        if name not in ids:
            raise SourceError(f"{where}: no {what} {shown(name)} in {root}")
        if found.setdefault(name, _plain(text)) != _plain(text):
            raise SourceError(f"{where}: {shown(name)} has another text in a row above")
    return found


def _of_files(root: Path, ids: Sequence[str]) -> dict[str, str]:
    """The texts beside files or folders, by the names of these."""
    found = {}
    for id_ in ids:
        beside = (root / f"{_stem(root / id_)}{suffix}" for suffix in SUFFIXES)
        text = next((file for file in beside if file.is_file()), None)
        if text is not None:
            found[id_] = _plain(read_text(text))
    return found


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _plain(text: str) -> str:
    return " ".join(text.split())
