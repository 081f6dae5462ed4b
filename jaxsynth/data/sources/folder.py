"""Folders of photos: one folder per class, below train/ and test/ or directly in the root.

Folder names are class names; those that `safe_name` wrote (percent-encoded) are decoded. Classes
are numbered in plain sorted order, as torchvision, Keras and Hugging Face number them. Hidden files
and a root's README, LICENSE and metadata.jsonl are passed over; anything else that is not an image
of a class is an error that names it, so that nothing is skipped unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxsynth.core.io import file_digests_cached
from jaxsynth.data.dataset import DataConfig, ImageSource, Indices, Record, SourceError
from jaxsynth.data.decode import IMAGE_SUFFIXES, decode_image, decoded_digest, square
from jaxsynth.data.names import class_of_folder, natural_key
from jaxsynth.data.views import held_out

VALIDATION = ("val", "valid", "validation")
# What an export of ours (and Hugging Face's imagefolder) puts beside the class folders.
BESIDE = ("metadata.jsonl", "metadata.csv", "readme", "readme.md", "readme.txt", "license")


@dataclass(frozen=True)
class FileSource:
    """Image files; ids are their paths below `root`, with "/" between the parts."""

    root: Path
    ids: Sequence[str]
    labels: Int[np.ndarray, " n"]
    image_size: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        image = decode_image(self.root / self.ids[index])
        return Record(square(image, self.image_size), int(self.labels[index]), self.ids[index])

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        ids = self.ids if indices is None else [self.ids[i] for i in indices]
        digests = file_digests_cached([self.root / id_ for id_ in ids])
        return [decoded_digest(digest, self.image_size) for digest in digests]


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def class_folders(root: Path) -> dict[str, Path]:
    """The class folders below `root` by class name, in sorted order."""
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    found: dict[str, Path] = {}
    for path in _visible(root):
        if path.is_dir():
            name = class_of_folder(path.name)
            if name in found:
                raise SourceError(
                    f"{root}: {found[name].name!r} and {path.name!r} are both class {name!r}"
                )
            found[name] = path
        elif path.name.lower() not in BESIDE:
            raise SourceError(f"{path}: expected only class folders in {root}, found a file")
    if not found:
        raise SourceError(f"{root}: no class folders found")
    return dict(sorted(found.items()))


def folder_source(root: Path, class_names: list[str] | None = None, image_size: int = 0):
    """A source of every image below `root`, and its class names.

    With `class_names` given, the folder must have exactly these classes.
    """
    folders = class_folders(root)
    if class_names is not None and sorted(folders) != sorted(class_names):
        extra, missing = set(folders) - set(class_names), set(class_names) - set(folders)
        raise SourceError(
            f"{root}: its classes differ: unexpected {sorted(extra)}, missing {sorted(missing)}"
        )
    names = list(folders) if class_names is None else class_names
    ids, labels = [], []
    for label, name in enumerate(names):
        members = []
        for path in _visible(folders[name]):
            if path.is_dir():
                raise SourceError(f"{path}: a folder inside the folder of class {name!r}")
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise SourceError(
                    f"{path}: not an image file ({', '.join(IMAGE_SUFFIXES)} are read)"
                )
            members.append(f"{folders[name].name}/{path.name}")
        if not members:
            raise SourceError(f"{folders[name]}: class {name!r} has no images")
        ids += sorted(members, key=natural_key)
        labels += [label] * len(members)
    return FileSource(root, tuple(ids), np.asarray(labels, np.int32), image_size), tuple(names)


def load_folder(config: DataConfig) -> tuple[tuple[str, ...], ImageSource, ImageSource, str]:
    """Class names, train, test, and where test comes from."""
    if not config.path:
        raise SourceError('path: source "folder" needs the folder of the images')
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise SourceError(f"path: {root}: no such folder")
    below = [p.name for p in _visible(root) if p.is_dir()]
    if config.train_split not in below:
        if config.test_split:
            raise SourceError(
                f"{root}: test_split {config.test_split!r} needs {config.train_split}/ too; "
                f"found {below}"
            )
        source, names = folder_source(root, None, config.image_size)
    else:
        wanted = (config.test_split,) if config.test_split else ("test", *VALIDATION)
        allowed = {config.train_split, config.test_split, "test", *VALIDATION}
        strange = [name for name in below if name not in allowed]
        if strange:
            raise SourceError(
                f"{root}: found {strange} beside {config.train_split}/: expected either class "
                "folders or splits"
            )
        for path in _visible(root):
            if not path.is_dir() and path.name.lower() not in BESIDE:
                raise SourceError(f"{path}: expected only splits in {root}, found a file")
        tests = [name for name in wanted if name in below]
        if config.test_split and not tests:
            raise SourceError(f"{root}: no folder {config.test_split}/ (test_split); found {below}")
        source, names = folder_source(root / config.train_split, None, config.image_size)
        if tests:
            test, _ = folder_source(root / tests[0], list(names), config.image_size)
            unused = [f"{name}/" for name in below if name not in (config.train_split, tests[0])]
            note = f"; not used: {', '.join(unused)}" if unused else ""
            return names, source, test, f"the folder {tests[0]}/{note}"
    train, test = held_out(source, names, config.test_fraction, config.split_seed)
    note = f"{config.test_fraction:g} of each class held out, seed {config.split_seed}"
    return names, train, test, note
