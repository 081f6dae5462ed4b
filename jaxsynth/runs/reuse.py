"""Finished stages of other runs, taken instead of made again.

The points of a sweep share their early stages: the same shots, the same adapters, the same images
under another classifier. A stage's identity is its content, so a finished one of the same identity
below one of these folders is the stage: its files are linked, or copied from another file system.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsynth.core.errors import UsageError
from jaxsynth.core.io import TEMPORARY
from jaxsynth.runs.artifact import MANIFEST, StageError, load_artifact, read_manifest

# What a finished stage has no more use for.
LEFT = ("checkpoints",)
_folders: tuple[Path, ...] = ()


def look_in(folders: Sequence[Path]) -> None:
    """Take finished stages from below these folders, from now on.

    Raises:
        UsageError: one of them is not a folder.
    """
    global _folders
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"--reuse={folder}: there is no such folder")
    _folders = tuple(folder.resolve() for folder in folders)


def take(folder: Path, wanted: Mapping[str, Any], own: Sequence[str]) -> Path | None:
    """Put a stage of the identity `wanted` into `folder`, and say where it was found.

    Args:
        own: names of a stage's own files that stay where they are, such as its lock.

    Returns:
        None where no folder holds such a stage undamaged.
    """
    for root in _folders:
        for path in sorted(root.rglob(MANIFEST)):
            if path.parent.resolve() != folder.resolve() and _matches(path, wanted):
                _copy(path.parent, folder, own)
                return path.parent
    return None


def _matches(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a manifest is of this identity and its files are as it says.

    A run that is at work beside this one may take its folders away; one that is damaged is that
    run's to report.
    """
    try:
        found = read_manifest(path)
        if found is None or any(found.get(part) != value for part, value in wanted.items()):
            return False
        load_artifact(path.parent).verify()
    except StageError:
        return False
    return True


def _copy(source: Path, target: Path, own: Sequence[str]) -> None:
    """Every file of a stage, its manifest last, so that where it lies the others are whole."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path == source / MANIFEST):
        name = path.relative_to(source)
        if name.as_posix() in own or name.name.endswith(TEMPORARY) or set(LEFT) & {*name.parts}:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).unlink(missing_ok=True)
        try:
            os.link(path, target / name)
        except OSError:
            shutil.copy2(path, target / name)
