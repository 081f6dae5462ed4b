"""A run is a row of stages; each leaves a folder with a manifest that says what made it.

Methods here take hours (adapters, thousands of images, classifiers) and are killed and restarted.
So a stage whose manifest matches is skipped, one that began is called again in its own folder and
resumes, and one whose settings changed is refused by name rather than mixed with old files. The
manifest is written last and atomically: where it lies, the files beside it are whole.

A stage is a function that sees only what it declares:

    @dataclass(frozen=True)
    class Training:
        train: TrainingConfig
        seed: int = 0

    @stage(format=1)
    def train_adapter(work: Work, config: Training, *, shots: Artifact, base: DiT) -> dict:
        ...
        return {"steps": config.train.steps}

    train_adapter(folder, Training(config.train, seed), label="adapter", shots=shots, base=base)

Its identity is its slice of the config (a frozen dataclass), the digests of its inputs (finished
stages, and `Source`s: weights, data and files, identified by content) and a format number. The
function is module-level and closes over nothing, so a setting that it uses cannot be missing from
its identity. `work` holds what may differ without changing the result: the folder, the mesh.
"""

import dataclasses
import fcntl
import importlib.metadata
import inspect
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxsynth.core import preemption
from jaxsynth.core.console import stage_line
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import json_digest, write_json
from jaxsynth.core.records import differences, to_json, with_defaults
from jaxsynth.core.space import size_of
from jaxsynth.runs import rehearsal, reuse
from jaxsynth.runs.agreement import agree, barrier, compute_first
from jaxsynth.runs.artifact import (
    MANIFEST,
    Artifact,
    Source,
    StageError,
    checksum,
    load_artifact,
    read_manifest,
)
from jaxsynth.runs.folder import (
    LISTINGS,
    LOCK,
    MACHINERY,
    STARTED,
    list_files,
    remove_temporaries,
)

# Files that help a run along but are not what the stage is for: neither listed nor digested.
TRAINING = ".training"
# How long what took, where a stage measures it.
TIMES = "times.json"
UNLISTED = (f"{TRAINING}/*", "checkpoints/*", "*.jsonl", "events.out.*", TIMES)
PACKAGES = ("jaxsynth", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Work:
    """Where a stage works: what is at hand but does not decide the result.

    `mesh` spans the devices of every process that runs the function, None for a single device.
    """

    folder: Path
    mesh: Mesh | None = None

    @property
    def training(self) -> Path:
        """The folder of checkpoints and metrics; not part of the artifact."""
        return self.folder / TRAINING

    @property
    def writes(self) -> bool:
        """Whether this process writes the files: one of all that run the function."""
        return jax.process_index() == 0


StageFunction = Callable[..., dict[str, Any] | None]
# Of a stage's config and inputs: the most bytes that it writes.
Space = Callable[..., int]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage function with its format number; call it to have the stage made, or found made."""

    function: StageFunction
    format: int
    processes: Literal["all", "first"]
    space: Space | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    def __call__(
        self,
        folder: str | Path,
        config: Any,
        *,
        label: str = "",
        mesh: Mesh | None = None,
        console: Console | None = None,
        **inputs: "Artifact | Source | None",
    ) -> Artifact:
        """Make the stage in `folder`, or find that it is made.

        Args:
            config: the slice of the configuration: a frozen dataclass.
            label: what the printed line calls the stage.
            inputs: by the names of the function's keyword arguments; None for one left out.

        Raises:
            StageError: as `run_stage`.
        """
        if not (dataclasses.is_dataclass(config) and type(config).__dataclass_params__.frozen):
            raise TypeError(f"stage {self.name}: its config must be a frozen dataclass")
        given = {key: value for key, value in inputs.items() if value is not None}

        def build(path: Path) -> dict[str, Any] | None:
            values = {key: _value_of(inputs[key]) for key in inputs}
            return self.function(Work(path, mesh), config, **values)

        def needs() -> int:
            if self.space is None:
                return 0
            return self.space(config, **{key: _value_of(inputs[key]) for key in inputs})

        return run_stage(
            label or self.name,
            folder,
            config,
            given,
            build,
            stage=self.name,
            format=self.format,
            processes=self.processes,
            needs=needs,
            console=console,
        )


def stage(
    *,
    format: int = 1,
    processes: Literal["all", "first"] = "first",
    space: Space | None = None,
) -> Callable[[StageFunction], Stage]:
    """Declare a stage: `function(work, config, *, inputs...) -> counts for the manifest`.

    Args:
        format: raised when the function's result changes for the same config and inputs.
        processes: "first": of a multi-process run only process 0 computes, on its own devices, and
            the others wait. "all": every process runs the function, which shares the work through
            `work.mesh` and writes where `work.writes`.
        space: `(config, **inputs) -> bytes`, the most that the stage's folder holds at once, from
            what the function gets but `work`, for a rehearsal. A stage of lists and scores needs
            none.
    """

    def declare(function: StageFunction) -> Stage:
        code = inspect.unwrap(function)
        if code.__closure__ or "<locals>" in code.__qualname__:
            raise TypeError(
                f"stage {code.__qualname__}: a stage is a function of a module, so that it sees "
                "its config and inputs alone"
            )
        return Stage(function, format, processes, space)

    return declare


def run_stage(
    name: str,
    folder: str | Path,
    config: Any,
    inputs: Mapping[str, Artifact | Source],
    build: Callable[[Path], dict[str, Any] | None],
    *,
    stage: str = "",
    format: int = 1,
    processes: Literal["all", "first"] = "all",
    unlisted: Sequence[str] = UNLISTED,
    needs: Callable[[], int] = lambda: 0,
    console: Console | None = None,
) -> Artifact:
    """Make a stage in `folder` by `build`, or find that it is made. `Stage` calls this.

    Args:
        name: what the printed line calls the stage.
        folder: where its files go; created when missing.
        config: a dataclass or mapping of JSON-like values: all that decides what the stage makes.
        inputs: what the stage reads; their digests stand in the manifest. Artifacts are compared
            with their manifests before `build` is called.
        build: writes the files into the folder and returns counts (JSON) for the manifest. Called
            in the same folder again after a kill, so it should resume from what it finds.
        stage: the stage's name in the manifest; `name` by default.
        processes: as for `stage`.
        unlisted: glob patterns, relative to `folder`, of files that are no part of the result.
        needs: the most bytes that the folder holds at once, for a rehearsal.
        console: where the line goes; the shared console by default.

    Raises:
        StageError: the folder was made or begun with another configuration or input, each
            difference named; another process is at work in it; or a file of an input is damaged.
            In a multi-process run every process raises what process 0 found.
        Preempted: a single process was asked to stop before the stage began its work.
    """
    folder = Path(folder)
    began = time.monotonic()
    stage = stage or name
    wanted = {
        "stage": stage,
        "format": format,
        "config": to_json(config, f"{stage}.config", identity=True),
        "inputs": {key: given.digest for key, given in inputs.items()},
    }
    listings = {key: x.listing for key, x in inputs.items() if isinstance(x, Source) and x.listing}
    first = jax.process_index() == 0
    with _Holder(folder, config, wanted, listings) as holder:
        if (steps := rehearsal.rehearsing()) is not None:
            return _rehearsed(name, holder, needs, steps)
        state = agree(holder.take) if first else agree(None)
        if state in ("done", "taken"):
            artifact = load_artifact(folder)
            note = f"taken from {holder.origin}" if state == "taken" else "unchanged, skipped"
            stage_line(name, 0.0, note, out=console)
            return artifact
        for given in inputs.values():
            if isinstance(given, Artifact):
                given.verify()
        preemption.stop_if_requested(f"before {name}")
        counts = _build(build, folder, processes)
        if first:
            files = list_files(folder, unlisted)
            manifest = {
                "manifest": FORMAT,
                **wanted,
                "label": name,
                "digest": json_digest({**wanted, "files": files}),
                "counts": to_json(counts or {}, f"{stage}.counts"),
                "seconds": round(time.monotonic() - began, 3),
                "versions": versions(),
                "files": files,
            }
            write_json(folder / MANIFEST, manifest | {"checksum": checksum(manifest)})
            (folder / STARTED).unlink(missing_ok=True)
            remove_temporaries(folder)
        barrier(f"{name} written")
    artifact = load_artifact(folder)
    note = ", ".join(f"{key} {_short(value)}" for key, value in artifact.counts.items())
    resumed = "resumed  " if state == "resumed" else ""
    stage_line(name, time.monotonic() - began, resumed + note, out=console)
    return artifact


class _Holder:
    """A stage's folder in the hands of process 0: its lock, and what its manifests say."""

    def __init__(
        self,
        folder: Path,
        config: Any,
        wanted: dict[str, Any],
        listings: dict[str, dict[str, str]],
    ):
        self.folder, self.config = folder, config
        self.wanted, self.listings = wanted, listings
        self._lock: Any = None
        # Where a stage of the same identity was found, if it was.
        self.origin: Path | None = None

    def __enter__(self) -> "_Holder":
        return self

    def __exit__(self, *error) -> None:
        if self._lock is not None:
            self._lock.__exit__(*error)
            self._lock = None
            self._tidy()

    def take(self) -> Literal["done", "taken", "resumed", "new"]:
        """Find the stage finished, here or in another run, or lock its folder to make it.

        The manifest is read again under the lock: another process may have finished in between.
        """
        if self.finished():
            return "done"
        made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = made
        self._lock = lock_folder(self.folder)
        try:
            self._lock.__enter__()
        except BaseException:
            self._lock = None
            raise
        if self.finished():
            return "done"
        if self.begun():
            remove_temporaries(self.folder)
            return "resumed"
        self.origin = reuse.take(self.folder, self.wanted, (LOCK, STARTED))
        if self.origin is not None:
            return "taken"
        write_json(self.folder / STARTED, self.wanted)
        if self.listings:
            write_json(self.folder / LISTINGS, self.listings, indent=None)
        return "new"

    def finished(self) -> bool:
        """Whether the stage is made as wanted; StageError where it was made otherwise."""
        return self._is_there(MANIFEST)

    def begun(self) -> bool:
        """Whether the stage was begun as wanted; StageError where it was begun otherwise."""
        return self._is_there(STARTED)

    def _is_there(self, name: str) -> bool:
        found = read_manifest(self.folder / name)
        if found is not None:
            self._refuse_changes(found)
        return found is not None

    def _tidy(self) -> None:
        """Leave no trace of a stage that failed before it made anything."""
        if (self.folder / MANIFEST).exists():
            return
        if {path.name for path in self.folder.rglob("*")} <= MACHINERY:
            for name in MACHINERY:
                (self.folder / name).unlink(missing_ok=True)
            if self._made:
                self.folder.rmdir()

    def _refuse_changes(self, old: dict[str, Any]) -> None:
        before = {part: old.get(part) for part in self.wanted}
        # What a rehearsal has not made is taken to be as it was.
        for key, digest in self.wanted["inputs"].items():
            if rehearsal.is_unknown(digest) and key in (before["inputs"] or {}):
                before["inputs"] = {**before["inputs"], key: digest}
        before["config"] = with_defaults(old.get("config"), self.config)
        changed = [
            line
            for part in self.wanted
            for line in differences(before[part], self.wanted[part], part)
        ]
        if not changed:
            return
        detail = self._changed_files(before["inputs"] or {})
        raise StageError(
            f"{self.folder} was made with other settings (old -> new):\n  "
            + "\n  ".join(changed + detail)
            + "\nRemove that folder, or choose another one."
        )

    def _changed_files(self, before: Mapping[str, str]) -> list[str]:
        """Which files of a changed input are new, gone or other ones."""
        path = self.folder / LISTINGS
        known = read_json(path, dict[str, dict[str, str]], optional=True)
        lines = []
        for key, new in self.listings.items():
            old = known.get(key)
            if old is None or before.get(key) == self.wanted["inputs"][key]:
                continue
            for what, names in (
                ("added", [x for x in new if x not in old]),
                ("removed", [x for x in old if x not in new]),
                ("changed", [x for x in new if x in old and new[x] != old[x]]),
            ):
                if names:
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    lines.append(f"{key}: {what} {', '.join(names[:3])}{more}")
        return lines


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


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _rehearsed(
    name: str, holder: _Holder, needs: Callable[[], int], steps: list[rehearsal.Step]
) -> Artifact:
    """The stage as it lies there, or a stand-in; what is noted of it goes to `steps`."""
    folder = holder.folder
    if holder.finished():
        artifact = load_artifact(folder)
        steps.append(rehearsal.Step(name, folder, "finished", artifact.manifest["seconds"]))
        return artifact
    begun = holder.begun()
    try:
        most = max(needs() - size_of(folder), 0)
    except rehearsal.NotMade:
        most = None
    steps.append(rehearsal.Step(name, folder, "begun" if begun else "to do", bytes=most))
    return rehearsal.Unmade(name, folder)


def _value_of(given: "Artifact | Source | None") -> Any:
    return given.value if isinstance(given, Source) else given


def _build(
    build: Callable[[Path], dict[str, Any] | None], folder: Path, processes: str
) -> dict[str, Any] | None:
    if processes == "first" and jax.process_count() > 1:
        counts = compute_first(lambda: build(folder), folder)
        barrier(f"{folder} built")
        return counts
    counts = build(folder)
    barrier(f"{folder} built")
    return counts


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
