"""A case: a file or folder that this package made, its files that are changed, and its reader."""

import dataclasses
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import mutate


@dataclasses.dataclass(frozen=True)
class Case:
    """`root` is what `read` is given; `files` are those below it that are changed, by name."""

    name: str
    root: Path
    read: Callable[[Path], Any]
    files: Sequence[str] = ("",)
    # Called with the random numbers, the root and the changed file, after the change.
    after: Callable[[Random, Path, Path], None] | None = None


def make(random: Random, case: Case, folder: Path) -> Path:
    """A copy of a case below `folder` with one of its files changed; what is to be read."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    target = folder / case.root.name
    if case.root.is_dir():
        shutil.copytree(case.root, target)
    name = random.choice(case.files)
    source, path = (case.root / name, target / name) if name else (case.root, target)
    if path.suffix in mutate.TORCH and zipfile.is_zipfile(source):
        mutate.archive(random, source, path)
    elif path.suffix == ".npz" and random.random() < 0.6:
        mutate.arrays(random, source, path)
    else:
        path.write_bytes(mutate.changed(random, path, source.read_bytes()))
    if case.after is not None:
        case.after(random, target, path)
    return target


def below(folder: Path) -> list[str]:
    """The names of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def touch(found: Any) -> None:
    """Reads every number of nested data."""
    if isinstance(found, np.ndarray):
        found.tobytes()
    elif isinstance(found, Mapping):
        touch(found.values())
    elif isinstance(found, Iterable) and not isinstance(found, (str, bytes)):
        for item in found:
            touch(item)
