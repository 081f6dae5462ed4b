"""A run is a row of stages; each leaves a folder with a manifest that says what made it.

Methods here take hours (adapters, thousands of images, classifiers) and are killed and restarted.
So a stage whose manifest matches is skipped, one that began is called again in its own folder and
resumes, and one whose configuration changed is refused by name rather than mixed with old files.
The manifest is written last and atomically: where it lies, the files beside it are whole.
"""

import dataclasses
import fcntl
import fnmatch
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxsynth.core.console import stage_line

MANIFEST = "manifest.json"
STARTED = ".started.json"
LOCK = ".lock"
# Files that help a run along but are not what the stage is for: neither listed nor digested.
UNLISTED = ("checkpoints/*", "metrics.jsonl", "events.out.*")
PACKAGES = ("jaxsynth", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class StageError(RuntimeError):
    """A stage cannot run as asked; the message names the folder, the field and both values."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder and the manifest that lies there."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the stage's name, configuration, inputs and files."""
        return self.manifest["digest"]

    @property
    def counts(self) -> dict[str, Any]:
        """What the stage's build returned."""
        return self.manifest["counts"]

    def verify(self) -> None:
        """Read every file again.

        Raises:
            StageError: a file is missing or differs from the digest in the manifest; it is named.
        """
        for name, entry in self.manifest["files"].items():
            found = _file_entry(self._existing(name))
            if found != entry:
                raise StageError(f"{self.path / name}: found {found}, the manifest says {entry}")

    def _existing(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise StageError(
                f"{file} is in the manifest of stage {self.manifest['stage']!r} but is missing; "
                f"remove {self.path} to make the stage again"
            )
        return file


def load_artifact(folder: str | Path) -> Artifact:
    """Read a finished stage's folder.

    Raises:
        StageError: the folder holds no manifest, or a file that the manifest lists is not there
            or has another size (`Artifact.verify` also compares the contents).
    """
    folder = Path(folder)
    manifest = _read_json(folder / MANIFEST)
    if manifest is None:
        raise StageError(f"{folder} holds no finished stage: {MANIFEST} is missing")
    artifact = Artifact(folder, manifest)
    for name, entry in manifest["files"].items():
        size = artifact._existing(name).stat().st_size
        if size != entry["bytes"]:
            raise StageError(
                f"{folder / name} has {size} bytes, the manifest says {entry['bytes']}"
            )
    return artifact


def run_stage(
    name: str,
    folder: str | Path,
    config: Any,
    inputs: Mapping[str, Artifact],
    build: Callable[[Path], dict[str, Any] | None],
    *,
    unlisted: Sequence[str] = UNLISTED,
    console: Console | None = None,
) -> Artifact:
    """Make the stage in `folder`, or find that it is made.

    Args:
        name: what the printed line and the manifest call the stage.
        folder: where its files go; created when missing.
        config: a dataclass or mapping of JSON-like values: all that decides what the stage makes.
        inputs: the artifacts that the stage reads; their digests stand in the manifest.
        build: writes the files into the folder and returns counts (JSON) for the manifest. Called
            in the same folder again after a kill, so it should resume from what it finds.
        unlisted: glob patterns, relative to `folder`, of files that are no part of the result.
        console: where the line goes; the shared console by default.

    Raises:
        StageError: the folder was made or begun with another configuration or input, each
            difference named; or another process is at work in it.
    """
    folder = Path(folder)
    began = time.monotonic()
    wanted = {
        "stage": name,
        "config": to_json(config, f"{name}.config"),
        "inputs": {key: artifact.digest for key, artifact in inputs.items()},
    }
    if (done := _read_json(folder / MANIFEST)) is not None:
        _refuse_changes(folder, done, wanted)
        artifact = load_artifact(folder)
        stage_line(name, 0.0, "unchanged, skipped", out=console)
        return artifact

    first = jax.process_index() == 0
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder) if first else _nothing():
        resumed = (begun := _read_json(folder / STARTED)) is not None
        if resumed:
            _refuse_changes(folder, begun, wanted)
        elif first:
            write_json(folder / STARTED, wanted)
        counts = build(folder)
        _barrier(f"{name} built")
        if first:
            files = _list_files(folder, unlisted)
            manifest = {
                "format": 1,
                **wanted,
                "digest": _digest({**wanted, "files": files}),
                "counts": to_json(counts or {}, f"{name}.counts"),
                "seconds": round(time.monotonic() - began, 3),
                "versions": versions(),
                "files": files,
            }
            write_json(folder / MANIFEST, manifest)
            (folder / STARTED).unlink(missing_ok=True)
        _barrier(f"{name} written")
    note = ", ".join(f"{key} {_short(value)}" for key, value in (counts or {}).items())
    stage_line(name, time.monotonic() - began, ("resumed  " if resumed else "") + note, out=console)
    return load_artifact(folder)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process while the block runs.

    The kernel drops the lock with the process that held it, however that ended, so a killed run
    never blocks the next one; the process id in the file is there for the message only.

    Raises:
        StageError: another process holds the folder.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StageError(
                f"{folder} is in use by another process (pid {holder}); wait for it, or give this "
                "run a folder of its own"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(value: Any, where: str = "config") -> Any:
    """`value` as JSON holds it: dataclasses as dicts, tuples as lists, paths as strings.

    Raises:
        TypeError: a value has no JSON form; the message names its dotted field.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return to_json(np.asarray(value).tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where}: {type(value).__name__} has no JSON form")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The dotted fields in which two JSON values differ, each as "field: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            path = f"{where}.{key}" if where else key
            if key not in new:
                lines.append(f"{path}: {json.dumps(old[key])} -> (absent)")
            elif key not in old:
                lines.append(f"{path}: (absent) -> {json.dumps(new[key])}")
            else:
                lines += differences(old[key], new[key], path)
        return lines
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_changes(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        line
        for part in ("stage", "config", "inputs")
        for line in differences(old[part], new[part], part)
    ]
    if changed:
        raise StageError(
            f"{folder} was made with other settings (old -> new):\n  "
            + "\n  ".join(changed)
            + "\nRemove that folder, or choose another one."
        )


def _list_files(folder: Path, unlisted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every file below `folder` but the machinery's own and those matching `unlisted`, sorted."""
    own = {MANIFEST, STARTED, LOCK}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") and part.endswith(".tmp") for part in Path(name).parts)
        if name not in own and not hidden and not any(fnmatch.fnmatch(name, u) for u in unlisted):
            files[name] = _file_entry(path)
    return files


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StageError(f"{path} is not valid JSON: {error}") from error


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _barrier(name: str) -> None:
    """Wait for every process of a multi-process run; nothing to wait for in a single one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
