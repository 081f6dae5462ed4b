"""Room on a disk: what is free, what a folder holds, and whether something more fits."""

import contextlib
import shutil
from pathlib import Path

from jaxsynth.core.console import file_size
from jaxsynth.core.errors import UserError


def free_bytes(folder: Path) -> int:
    """What is free for this user on the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, in which another process may be at work."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def check_space(name: str, folder: Path, needs: int) -> None:
    """UserError where the disk of `folder` has not the room that `name` needs, in bytes."""
    free = free_bytes(folder)
    if needs > free:
        raise UserError(
            f"{folder}: {name} needs {file_size(needs)} of disk at the most, and {file_size(free)} "
            "are free there; free some, or choose another --workdir. The same command goes on"
        )
