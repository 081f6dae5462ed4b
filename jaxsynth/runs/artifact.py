"""What stages leave and read: artifacts, and sources that no stage made.

An artifact is a stage's folder with its manifest, a source stands for weights, data or a file; each
has a digest of its content.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Generic, TypeVar

from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UserError, quoted, shown
from jaxsynth.core.io import file_digests_cached, json_digest

MANIFEST = "manifest.json"
# Of a data set with more files, a changed one is noticed but not named.
MOST_LISTED = 20_000

T = TypeVar("T")


class StageError(UserError):
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
        """What the stage's function returned."""
        return self.manifest["counts"]

    def verify(self) -> None:
        """Compare every file with the manifest; digests of unchanged files are remembered.

        Raises:
            StageError: a file is missing or differs from the digest in the manifest; it is named.
        """
        paths = [self._existing(name) for name in self.manifest["files"]]
        found = file_digests_cached(paths)
        for path, digest, entry in zip(paths, found, self.manifest["files"].values(), strict=True):
            if digest != entry["sha256"]:
                raise StageError(
                    f"{path} is damaged or was changed: its SHA-256 is {digest[:16]}..., the "
                    f"manifest says {entry['sha256'][:16]}...; {self._way_out(path)}"
                )

    def _existing(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise StageError(
                f"{file} is in the manifest of stage {self.manifest['stage']!r} but is missing; "
                f"{self._way_out()}"
            )
        return file

    def _way_out(self, *files: Path) -> str:
        """What of a stage is undamaged is found there again, as after a kill."""
        gone = " and ".join(map(str, (*files, self.path / MANIFEST)))
        return f"remove {gone}, and the same command makes what is missing again"


class Source(Generic[T]):
    """An input that no stage made: weights, a data set, a file. Loaded once, when first needed.

    Args:
        load: returns the value; called at most once.
        digest: identifies the content: a string, or a function of the loaded value.
        listing: digests of its parts by name, from which a refusal names the changed ones.
    """

    def __init__(
        self,
        load: Callable[[], T],
        digest: str | Callable[[T], str],
        listing: Callable[[T], Mapping[str, str]] | None = None,
    ):
        self._load, self._digest, self._listing = load, digest, listing

    @cached_property
    def value(self) -> T:
        """What the stage's function receives."""
        return self._load()

    @cached_property
    def digest(self) -> str:
        """Hex digits that stand for the content."""
        return self._digest if isinstance(self._digest, str) else self._digest(self.value)

    @cached_property
    def listing(self) -> dict[str, str] | None:
        """Digests by name, or None where there are none, or too many to keep."""
        found = None if self._listing is None else dict(self._listing(self.value))
        return found if found is not None and len(found) <= MOST_LISTED else None


def load_artifact(folder: str | Path) -> Artifact:
    """Read a finished stage's folder.

    Raises:
        StageError: the folder holds no manifest, or a file that the manifest lists is not there
            or has another size (`Artifact.verify` also compares the contents).
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    if manifest is None or "files" not in manifest:
        raise StageError(f"{folder} holds no finished stage: {MANIFEST} is missing")
    artifact = Artifact(folder, manifest)
    for name, entry in manifest["files"].items():
        size = artifact._existing(name).stat().st_size
        if size != entry["bytes"]:
            raise StageError(
                f"{folder / name} has {size} bytes, the manifest says {entry['bytes']}; "
                f"{artifact._way_out(folder / name)}"
            )
    return artifact


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest, or None where there is none. StageError for one that is damaged."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        for name, kind in _FIELDS.items():
            take(found, name, kind, path, None)
        finished = "files" in found
        for name in _ALWAYS + (_FINISHED if finished else ()):
            if name not in found:
                raise UserError(f"{path}: {name} is missing")
        if not isinstance(found["config"], (dict, list)):
            raise UserError(f"{path}: config: {shown(found['config'])}, expected an object")
        for name, entry in found.get("files", {}).items():
            where = f"{path}: file {quoted(name)}"
            if not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise UserError(f"{where} is not below the stage's folder")
            take(entry, "bytes", int, where), take(entry, "sha256", str, where)
        if finished and found.get("checksum", checksum(found)) != checksum(found):
            raise UserError(f"{path} is damaged or was changed: its checksum is another one")
    except UserError as error:
        raise StageError(
            f"{error}; remove {path}, and the same command makes it from the files beside it"
        ) from error
    return found


def checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a manifest but for how long the stage took."""
    kept = {key: x for key, x in manifest.items() if key not in ("checksum", "seconds")}
    return json_digest(kept)


_FIELDS: dict[str, Any] = {
    "manifest": int, "stage": str, "format": int, "inputs": dict[str, str], "label": str,
    "digest": str, "counts": dict, "seconds": float, "versions": dict[str, str],
    "files": dict[str, dict], "checksum": str,
}  # fmt: skip
_ALWAYS = ("stage", "config", "inputs")
_FINISHED = ("label", "digest", "counts", "seconds")
