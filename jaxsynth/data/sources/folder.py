"""Folders of photos, in the layouts that people have.

- A folder for each class, directly in the root or below train/ and test/ (also Train/,
  training_set/ and the like, val/ for test/); the test images may lie elsewhere (`test_path`).
- Images side by side with a table of their labels (`labels`, or labels.csv, metadata.csv or
  metadata.jsonl beside them).
- What `data.export` and Hugging Face write: class folders with metadata.jsonl, WebDataset's .tar
  files with classnames.txt, Parquet files with an image and a label column.

Folder names are class names; those that `safe_name` wrote are decoded. Classes are numbered in
plain sorted order, as torchvision, Keras and Hugging Face number them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxsynth.core.words import counted
from jaxsynth.data.dataset import DataConfig, ImageSource, SourceError
from jaxsynth.data.names import class_of_folder, natural_key
from jaxsynth.data.sources.files import (
    FileSource,
    check_images,
    hidden_images,
    images_in,
    is_image,
    refuse,
    visible,
)
from jaxsynth.data.sources.labels import exported_classes, find_table, read_table, split_kind
from jaxsynth.data.sources.shards import is_shards, read_shards
from jaxsynth.data.views import held_out

# Texts and tables that lie beside class folders.
BESIDE = (".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html",
          ".pdf", ".mat", ".rst")  # fmt: skip
ARCHIVES = (".zip", ".rar", ".7z", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")
BESIDE_NAMES = ("readme", "license", "licence", "copying")
# What test images are taken from, the best first.
TESTS = ("test", "validation")
# `test_split`: hold test images out of the training ones whatever folders there are.
NO_TEST = "none"

Loaded = tuple[tuple[str, ...], ImageSource, ImageSource, str]


def is_beside(path: Path) -> bool:
    """Whether a file is a text or table that may lie beside class folders."""
    return path.suffix.lower() in BESIDE or path.name.lower() in BESIDE_NAMES


def class_folders(root: Path) -> dict[str, Path]:
    """The class folders below `root` by class name, in sorted order."""
    if not root.is_dir():
        raise SourceError(f"{root}: {'not a' if root.exists() else 'no such'} folder")
    found: dict[str, Path] = {}
    problems = dict.fromkeys(
        hidden_images(root), "a hidden folder with images: is it a class, rename it without the dot"
    )
    known = exported_classes(root)
    for path in visible(root):
        if path.is_dir():
            name = known.get(path.name) or class_of_folder(path.name)
            if name in found:
                raise SourceError(
                    f"{root}: {found[name].name!r} and {path.name!r} are both class {name!r}; "
                    "rename or merge them"
                )
            found[name] = path
        elif not is_beside(path):
            problems[path] = "a file beside the class folders"
    if not found:
        raise SourceError(_no_classes(root))
    refuse(root, problems)
    return dict(sorted(found.items()))


def _no_classes(root: Path) -> str:
    images = sum(is_image(path) for path in visible(root))
    if not images:
        packed = [path.name for path in visible(root) if path.name.lower().endswith(ARCHIVES)]
        hint = f"; unpack {packed[0]} there" if packed else ""
        return f"{root}: no class folders found; expected a folder of images for each class{hint}"
    return (
        f"{root}: {counted(images, 'image')} side by side and no class folders. Move them into a "
        "folder for "
        "each class, or say what they are in labels.csv (file,label) or metadata.jsonl beside them "
        "(another place: --config.data.labels=). A folder of one class: give its parent as path"
    )


def folder_source(
    root: Path, class_names: Sequence[str] | None = None, image_size: int = 0
) -> tuple[FileSource, tuple[str, ...]]:
    """A source of every image below `root`, and its class names.

    With `class_names` given, the folder must have exactly these classes. SourceError naming all
    files that are no images or cannot be read.
    """
    folders = class_folders(root)
    if class_names is not None and sorted(folders) != sorted(class_names):
        extra, missing = set(folders) - set(class_names), set(class_names) - set(folders)
        raise SourceError(
            f"{root}: its classes differ from those of the training images: unexpected "
            f"{sorted(extra)}, missing {sorted(missing)}"
        )
    names = list(folders) if class_names is None else list(class_names)
    ids: list[str] = []
    labels: list[int] = []
    problems: dict[Path, str] = {}
    for label, name in enumerate(names):
        images = images_in(folders[name], problems)
        if not images and not any(path.parent == folders[name] for path in problems):
            problems[folders[name]] = f"class {name!r} has no images"
        members = [f"{folders[name].name}/{path.name}" for path in images]
        ids += sorted(members, key=natural_key)
        labels += [label] * len(members)
    check_images([root / id_ for id_ in ids], problems)
    refuse(root, problems)
    return FileSource(root, tuple(ids), np.asarray(labels, np.int32), image_size), tuple(names)


def load_folder(config: DataConfig) -> Loaded:
    """Class names, train, test, and where test comes from."""
    if not config.path:
        raise SourceError('path: source "folder" needs the folder of the images')
    root = Path(config.path).expanduser()
    if not root.is_dir():
        reason = "a file, expected the folder of the images" if root.exists() else "no such folder"
        raise SourceError(f"path: {root}: {reason}")
    splits = _splits(root, config)
    train_root = root if splits is None else root / splits[0]
    source, names, own_test = _part(train_root, None, config)
    below = [] if splits is None else splits[1]
    if config.test_path:
        _refuse_unread(config, "the test images are those of test_path")
        apart = Path(config.test_path).expanduser()
        if not apart.is_dir():
            raise SourceError(f"test_path: {apart}: no such folder")
        return names, source, _part(apart, names, config)[0], "the folder of test_path"
    if config.test_split == NO_TEST and NO_TEST not in below:
        below, own_test = [], None
    if own_test is not None:
        _refuse_unread(config, "the files have test images of their own")
        return names, source, own_test, "the files' own test images"
    if not below:
        train, test = held_out(source, names, config.test_fraction, config.split_seed)
        note = f"{config.test_fraction:g} of each class held out, seed {config.split_seed}"
        return names, train, test, note
    _refuse_unread(config, f"the test images are those of {below[0]}/")
    try:
        test, _, _ = _part(root / below[0], names, config)
    except SourceError as error:
        raise SourceError(
            f"{error}. To hold test images out of {train_root.name}/ instead: "
            f"--config.data.test_split={NO_TEST}"
        ) from None
    unused = ", ".join(f"{name}/" for name in below[1:])
    return names, source, test, f"the folder {below[0]}/" + (f"; not used: {unused}" * bool(unused))


def _refuse_unread(config: DataConfig, why: str) -> None:
    defaults = DataConfig()
    for field in ("test_fraction", "split_seed"):
        if getattr(config, field) != getattr(defaults, field):
            raise SourceError(f"{field}: not used, {why}; leave it out")


def _splits(root: Path, config: DataConfig) -> tuple[str, list[str]] | None:
    """The folder of the training images and those for tests, best first; None without splits.

    A folder called train that holds images is a class.
    """
    folders = [path for path in visible(root) if path.is_dir()]
    below = [path.name for path in folders]
    chosen = config.train_split != DataConfig().train_split
    if chosen and config.train_split not in below:
        raise SourceError(f"{root}: no folder {config.train_split}/ (train_split); found {below}")
    if chosen:
        trains = [config.train_split]
    else:
        trains = [
            path.name for path in folders if split_kind(path.name) == "train" and _has_parts(path)
        ]
    wanted = config.test_split if config.test_split != NO_TEST or NO_TEST in below else ""
    if not trains:
        if wanted:
            raise SourceError(
                f"{root}: test_split {wanted!r} needs the training images in a folder of their "
                f"own (train_split), found {below}; a test folder elsewhere is test_path"
            )
        return None
    if len(trains) > 1:
        raise SourceError(f"{root}: {trains} may all hold training images; choose by train_split")
    if wanted and wanted not in below:
        raise SourceError(f"{root}: no folder {wanted}/ (test_split); found {below}")
    others = [name for name in below if name != trains[0]]
    tests = [name for kind in TESTS for name in others if split_kind(name) == kind]
    if strange := [name for name in others if name not in (*tests, wanted)]:
        raise SourceError(
            f"{root}: found {strange} beside {trains[0]}/: expected either class folders or splits "
            "(train/ and test/); name yours by train_split and test_split, or move them"
        )
    problems = {
        path: f"a file beside {trains[0]}/"
        for path in visible(root)
        if not path.is_dir() and not is_beside(path)
    }
    refuse(root, problems)
    return trains[0], [wanted, *(x for x in tests if x != wanted)] if wanted else tests


def _has_parts(folder: Path) -> bool:
    """Whether a folder holds class folders, or images with a table of their labels."""
    paths = visible(folder)
    if is_shards(folder) or find_table(folder) is not None:
        return True
    return any(path.is_dir() for path in paths) and not any(map(is_image, paths))


def _part(
    root: Path, names: tuple[str, ...] | None, config: DataConfig
) -> tuple[ImageSource, tuple[str, ...], ImageSource | None]:
    """The images of one place, their class names, and test images that packed files may have."""
    if is_shards(root):
        sources, found = read_shards(root, config.image_size, names)
        tests = [sources[kind] for kind in ("test", "validation", "val") if kind in sources]
        if "train" not in sources:
            return tests[0], found, None
        return sources["train"], found, tests[0] if tests else None
    table = Path(config.labels).expanduser() if config.labels else None
    if table is None and sum(path.is_dir() for path in visible(root)) < 2:
        table = find_table(root)
    if table is None:
        return *folder_source(root, names, config.image_size), None
    if not table.is_absolute() and not table.is_file() and (root / table).is_file():
        table = root / table
    rows, splits = read_table(table, root)
    problems: dict[Path, str] = {}
    check_images([root / id_ for id_ in rows], problems)
    refuse(root, problems)
    found = tuple(sorted(set(rows.values()))) if names is None else names
    if unknown := sorted(set(rows.values()) - set(found)):
        raise SourceError(f"{table}: classes {unknown} are none of the training images' {found}")

    def source(kind: str) -> FileSource:
        ids = [id_ for id_ in rows if not kind or splits[id_] == kind]
        ids.sort(key=lambda id_: (found.index(rows[id_]), natural_key(id_)))
        labels = np.asarray([found.index(rows[id_]) for id_ in ids], np.int32)
        return FileSource(root, tuple(ids), labels, config.image_size)

    tests = [kind for kind in TESTS if kind in splits.values()]
    if names is not None or not tests or "train" not in splits.values():
        return source(""), found, None
    return source("train"), found, source(tests[0])
