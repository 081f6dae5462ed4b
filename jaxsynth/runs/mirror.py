"""A copy of a run in a bucket, kept while it goes on: a machine that is lost takes no work with it.

The run works on a file system, where it has locks and files that take another's place; the copy
follows it (`jaxsynth run --mirror=gs://BUCKET/runs/NAME`). It holds the run's files under their own
names, so that a page can be read there, and an index. The index is written after the files that it
lists and only of files that all were there at once, manifests included, so that what it lists is
what a run leaves that is killed at that moment: fetched into an empty folder, the run goes on.

Stores are reached by fsspec: gs:// by gcsfs (the extra `gcs`), s3:// by s3fs, file:// by itself.
"""

import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import fsspec
import jax
from fsspec.implementations.local import LocalFileSystem
from rich.text import Text

from jaxsynth.core.console import console
from jaxsynth.core.documents import parse_json, read_json
from jaxsynth.core.errors import UsageError, UserError
from jaxsynth.core.io import TEMPORARY, replacing, write_json
from jaxsynth.core.records import to_json
from jaxsynth.runs.agreement import agree_value
from jaxsynth.runs.artifact import MANIFEST
from jaxsynth.runs.folder import LOCK

# In the copy what it holds, in the run's folder what has been copied.
INDEX = ".mirror.json"
# Seconds between two looks at what has changed.
EVERY = 60.0
# Looks for a moment at which no file is gone before it is copied.
_TRIES = 5
# In names of folders that Orbax renames once they are whole.
_UNFINISHED = "orbax-checkpoint-tmp"


class MirrorError(UserError):
    """The copy could not be read or written; the message names it."""


@dataclass(frozen=True)
class _Index:
    """What the copy holds: the run's random name, and its files."""

    id: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class _Own:
    """What a folder knows of its copy: size and time of each file when it was copied."""

    address: str = ""
    id: str = ""
    copied: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    # Whether the copy was being fetched, which a kill may have ended.
    fetching: bool = False


class Mirror:
    """The copy of the run in `folder` that lies at `address`.

    UsageError for an address that no installed package reads, or that lies in the folder.
    """

    def __init__(self, folder: Path, address: str):
        self.folder, self.address = folder, address.rstrip("/")
        protocol = address.partition("://")[0]
        try:
            self._store, root = fsspec.core.url_to_fs(self.address)
        except ImportError as error:
            extra = " (pip install 'jaxsynth[gcs]')" if protocol in ("gs", "gcs") else ""
            raise UsageError(f"--mirror={address}: {error}{extra}") from None
        except ValueError as error:
            raise UsageError(f"--mirror={address}: {error}") from None
        except Exception as error:  # each store has errors of its own, such as for credentials
            raise UsageError(f"--mirror={address}: {_said(error)}") from None
        self._root = root.rstrip("/")
        if isinstance(self._store, LocalFileSystem):
            self._store.auto_mkdir = True
            there, here = Path(self._root).resolve(), folder.resolve()
            if there.is_relative_to(here) or here.is_relative_to(there):
                raise UsageError(f"--mirror={address}: lies in --workdir={folder}, or that in it")
        # Size and time of each file when it was copied.
        self._copied: dict[str, tuple[int, int]] = {}
        # What the index lists.
        self._listed: set[str] = set()
        self._id = ""
        self._wait = threading.Event()
        self._warned = ""

    def begin(self) -> int:
        """Fetch the copy into an empty folder, or go on with one's own; the files fetched.

        MirrorError where the copy is of another run than the folder, or cannot be reached.
        """
        listed = self._index()
        known = self.folder / INDEX
        own = read_json(known, _Own) if known.is_file() else _Own()
        holds = any(self.folder.iterdir()) if self.folder.is_dir() else False
        if holds and not own.fetching:
            self._id = own.id or uuid.uuid4().hex
            if listed is not None and listed.id != self._id:
                raise MirrorError(
                    f"{self.address} holds the copy of another run than {self.folder}: give this "
                    "one another address, or an empty folder to go on with that one in"
                )
            # What another address has is not what this one has.
            if listed is not None and own.address == self.address:
                copied = {name: own.copied[name] for name in listed.files if name in own.copied}
                self._copied = {name: (size, time) for name, (size, time) in copied.items()}
                self._listed = set(listed.files)
            return 0
        if listed is None:
            self._id = uuid.uuid4().hex
            return 0
        self._id = listed.id
        # So that one that is killed meanwhile begins again.
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_own(_Own(self.address, self._id, fetching=True))
        # A manifest says that the files beside it are whole.
        for name in sorted(listed.files, key=lambda name: PurePosixPath(name).name == MANIFEST):
            self._fetch(name)
        return len(listed.files)

    def copy(self) -> int:
        """Bring the copy to what the folder holds; the number of files copied."""
        count = 0
        for _ in range(_TRIES):
            found = self._files()
            changed = [name for name, stamp in found.items() if self._copied.get(name) != stamp]
            gone = [name for name in self._copied if name not in found]
            if not changed and not gone and self._listed == found.keys():
                return count
            whole = True
            for name in changed:
                try:
                    with self._reached():
                        self._store.put_file(str(self.folder / name), f"{self._root}/{name}")
                except FileNotFoundError as error:
                    if (self.folder / name).exists():
                        raise MirrorError(
                            f"{self.address}: {_said(error)}; is there such a bucket?"
                        ) from None
                    whole = False
                    continue
                self._copied[name] = found[name]
                count += 1
            if whole:
                self._write_index(found)
                for name in gone:
                    with suppress(FileNotFoundError), self._reached():
                        self._store.rm_file(f"{self._root}/{name}")
                    del self._copied[name]
                return count
        return count

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep the copy while the block runs, and complete it at its end, however that comes."""
        thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._end(thread)
            try:
                self.copy()
            except MirrorError as error:  # the error of the run is the one to be told
                console.print(Text(f"{error}; the copy is older than {self.folder}", "yellow"))
            raise
        self._end(thread)
        try:
            self.copy()
        except MirrorError as error:
            raise MirrorError(
                f"{error}; {self.folder} is whole, and the same command completes the copy"
            ) from None

    def _end(self, thread: threading.Thread) -> None:
        self._wait.set()
        thread.join()

    def _follow(self) -> None:
        while not self._wait.wait(EVERY):
            try:
                self.copy()
                self._warned = ""
            except MirrorError as error:
                # A store that is away for a while is asked again; it is told once.
                if str(error) != self._warned:
                    console.print(Text(f"{error}; tried again in {EVERY:.0f} s", "yellow"))
                self._warned = str(error)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of each file of the run that is whole."""
        found = {}
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if _UNFINISHED not in name]
            for name in names:
                path = Path(parent, name)
                relative = path.relative_to(self.folder).as_posix()
                if name == LOCK or relative == INDEX or name.endswith(TEMPORARY):
                    continue
                try:
                    stamp = path.stat()
                except FileNotFoundError:
                    continue
                found[relative] = stamp.st_size, stamp.st_mtime_ns
        return found

    def _index(self) -> "_Index | None":
        """What the copy holds, None where there is none."""
        where = f"{self.address}/{INDEX}"
        try:
            with self._reached():
                data = self._store.cat_file(f"{self._root}/{INDEX}")
        except FileNotFoundError:
            return None
        found = parse_json(data, where, _Index)
        for name in found.files:
            if (
                not name
                or name.startswith("/")
                or "\\" in name
                or ".." in PurePosixPath(name).parts
            ):
                raise MirrorError(f"{where}: a file outside of the run's folder")
        return found

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._reached(), replacing(path) as temporary:
                self._store.get_file(f"{self._root}/{name}", str(temporary))
        except FileNotFoundError:
            raise MirrorError(
                f"{self.address}: {name} is listed in {INDEX} and is not there"
            ) from None
        stamp = path.stat()
        self._copied[name] = stamp.st_size, stamp.st_mtime_ns

    def _write_index(self, found: dict[str, tuple[int, int]]) -> None:
        data = json.dumps(to_json(_Index(self._id, tuple(found)))).encode()
        with self._reached():
            self._store.pipe_file(f"{self._root}/{INDEX}", data)
        self._listed = set(found)
        self._write_own(_Own(self.address, self._id, found))

    def _write_own(self, own: "_Own") -> None:
        write_json(self.folder / INDEX, to_json(own), indent=None)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, MirrorError):
            raise
        except Exception as error:  # each store has errors of its own
            raise MirrorError(f"{self.address}: {_said(error)}") from None


@contextmanager
def mirrored(folder: Path, address: str | None) -> Iterator[None]:
    """Have the run in `folder` copied to `address` while the block runs; nothing without one.

    Of several processes, whose folder is on storage that all share, the first does so.
    """
    if not address:
        yield
        return
    mirror = None

    def begin() -> int:
        nonlocal mirror
        mirror = Mirror(folder, address)
        count = mirror.begin()
        folder.mkdir(parents=True, exist_ok=True)
        mirror.copy()
        return count

    first = jax.process_index() == 0
    count = begin() if jax.process_count() == 1 else agree_value(begin if first else None)
    if count:
        console.print(f"{count} files of {address} fetched into {folder}", markup=False)
    if mirror is None:
        yield
        return
    with mirror.following():
        yield


def _said(error: Exception) -> str:
    """The first line of an error of a store."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
