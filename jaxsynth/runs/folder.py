"""A stage's folder: which files are its result, and which are the machinery's or a leftover."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsynth.core.io import TEMPORARY, file_digests_cached
from jaxsynth.runs.artifact import MANIFEST

STARTED = ".started.json"
LOCK = ".lock"
LISTINGS = ".inputs.json"
MACHINERY = {STARTED, LOCK, LISTINGS}


def list_files(folder: Path, unlisted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every file below `folder` but the machinery's own and those matching `unlisted`, sorted."""
    own = {MANIFEST, *MACHINERY}
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in own or _is_temporary(path.relative_to(folder)):
            continue
        if not any(fnmatch.fnmatch(name, pattern) for pattern in unlisted):
            found.append((name, path))
    digests = file_digests_cached([path for _, path in found])
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(found, digests, strict=True)
    }


def _is_temporary(path: Path) -> bool:
    return any(part.startswith(".") and part.endswith(TEMPORARY) for part in path.parts)


def remove_temporaries(folder: Path) -> None:
    """Files that a killed writer left behind: no other process is at work in a locked folder."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        if path.is_file():
            path.unlink()
