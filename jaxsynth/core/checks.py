"""What can be told of a config before anything is made: where photos and runs lie.

It takes a config's skeleton, too (`core.schema`), which is there before JAX is.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxsynth.core.errors import UsageError

FOLDERS = ("path", "test_path")
# The sources that read a folder, and nothing without it.
OF_FOLDERS = ("folder", "captions")


def check_config(config: Any, workdir: Path) -> None:
    """UsageError for a workdir that is a file, and photos that are not there or inside the workdir.

    A run's files among photos would be taken for photos, and the run's folder may be removed.
    Data directories of TFDS may be anywhere: they are read by their own index.
    """
    there = next((place for place in (workdir, *workdir.parents) if place.exists()), Path())
    if not there.is_dir():
        raise UsageError(f"--workdir {workdir}: {there} is a file, expected a folder")
    for where, holder, value in _leaves(config, "config"):
        name, source = where.rpartition(".")[2], getattr(holder, "source", "none")
        if name not in FOLDERS or not isinstance(value, str) or source == "tfds":
            continue
        if not value:
            if name == "path" and source in OF_FOLDERS:
                raise UsageError(f"{where}: source {source!r} needs the folder of the images")
            continue
        photos = Path(value).expanduser()
        if source in ("", *OF_FOLDERS) and not photos.is_dir():
            found = "a file, expected the folder of the images" if photos.exists() else ""
            raise UsageError(f"{where}: {photos}: {found or 'no such folder'}")
        _check_apart(where, photos, workdir)


def _check_apart(where: str, photos: Path, workdir: Path) -> None:
    if not photos.is_dir():
        return
    inner, outer = workdir.expanduser().resolve(), photos.resolve()
    if inner == outer:
        what = "are the same folder"
    elif inner.is_relative_to(outer):
        what = f"lie in each other: --workdir {workdir} is inside the folder of the images"
    elif outer.is_relative_to(inner):
        what = f"lie in each other: the images are inside --workdir {workdir}"
    else:
        return
    raise UsageError(
        f"{where}: {photos} and the workdir {what}; give the run a folder elsewhere by --workdir"
    )


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, holder and value of each field of nested dataclasses and mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        items = list(value.items())
    else:
        return
    for name, item in items:
        path = f"{where}.{name}"
        yield path, value, item
        yield from _leaves(item, path)
