"""Tensors out of PyTorch's own files (.pt, .pth, .bin), without PyTorch and without running code.

Such a file is a zip archive of a pickle, which describes the tensors, and one plain file of numbers
for each storage; before version 1.6 (2020) it was a row of pickles with the numbers after them, as
the weights are that FIDs are measured with. A pickle may name any function and have it called, so
the pickles are read by a machine that calls none (`pickles`), and what they say of sizes and places
is compared with what the file has before memory is asked for or looked at.
"""

import io
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxsynth.core import signatures
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.weights.torch_files.pickles import Machine, Namespace, Storage, Tensor

_ZIP = b"PK\x03\x04"
# Bytes of the head of each file in an archive, beside its name.
_ZIP_HEAD = 30
# What a file before PyTorch 1.6 begins with (pickled), and the only version there was of it.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_PICKLED_MAGIC = pickle.dumps(_MAGIC, 2)


# All tensors together may have this many times the bytes of their file: weights that are tied or
# expanded are kept once, and a file of nothing else could fill any memory.
_SHARING = 4
# Values that plain data in a file may come to, and how deep they may lie in one another.
_MOST_VALUES, _MOST_LEVELS = 200_000, 64
# Where training checkpoints have their state dict, in the order in which one is taken.
STATE_DICTS = ("ema", "model", "state_dict")
# What AnimateDiff's code keeps among tensors: how they were made.
_SETTINGS = ("animatediff_config",)
# Letters of each part of a name in an error.
_MOST_SHOWN = 40
# What `zipfile` raises for a damaged archive, also for one that wants a password or another method.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, OverflowError, RuntimeError,
)  # fmt: skip


def read_state_dict(
    path: str | os.PathLike, *, nested: Sequence[str] = STATE_DICTS
) -> dict[str, np.ndarray]:
    """The tensors of a state dict by key: read-only arrays in its layout and its dtypes.

    The file holds a dict of tensors, or one under the first of the `nested` names that it has (a
    training checkpoint; only that one is read). UserError naming the file for a pickle that asks
    for any other function or class than tensors need (naming it), a file cut short or damaged, or
    contents that are no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as handle:
        start = handle.read(len(_PICKLED_MAGIC))
        if start == _PICKLED_MAGIC:
            handle.seek(0)
            return _Stream(path, handle).read(nested)
    with _opened(path) as archive:
        return archive.read(nested)


def read_nested(path: str | os.PathLike) -> dict[Any, Any]:
    """The dict of a file with all that is in it: dicts, lists, numbers, texts, and arrays.

    Of the archives that PyTorch writes since 1.6. UserError as for `read_state_dict`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with _opened(path) as archive:
        return archive.read_nested()


@contextmanager
def _opened(path: Path) -> Iterator["_Archive"]:
    with path.open("rb") as handle:
        head = handle.read(signatures.LONGEST)
        if not head.startswith(_ZIP):
            found = signatures.named(head)
            raise UserError(
                f"{path}: no PyTorch file (a zip archive with a data.pkl)"
                + (f", but {found}" if found else "")
            )
    try:
        with zipfile.ZipFile(path) as archive:
            yield _Archive(path, archive)
    except _DAMAGED as error:
        # Of the archive's own errors the text names files in it.
        detail = f": {quoted(str(error))[1:-1]}" if isinstance(error, zipfile.BadZipFile) else ""
        raise UserError(f"{path}: cut short or damaged{detail}") from None


class _Reader:
    """One opened file; how it is laid out is for `_unpickled` and `_bytes` to know."""

    def __init__(self, path: Path):
        self._path = path
        self._size = path.stat().st_size
        self._contents: dict[str, bytes] = {}
        self._taken = 0

    def read(self, nested: Sequence[str]) -> dict[str, np.ndarray]:
        tensors = self._state_dict(self._unpickled(), nested)
        return {key: self._array(key, tensor) for key, tensor in tensors.items()}

    def read_nested(self) -> dict[Any, Any]:
        content = self._unpickled()
        if type(content) is not dict:
            raise UserError(f"{self._path}: holds a {type(content).__name__}, expected a dict")
        return self._filled(content)

    def _filled(self, content: dict[Any, Any]) -> dict[Any, Any]:
        """A copy of `content` with the tensors in it read.

        A file may name one part many times, and name the parts of that many times, so the values of
        the copy are counted.
        """
        top: dict[Any, Any] = {}
        open_ = [_Level(None, iter(content.items()), top)]
        count = 0
        while open_:
            level = open_[-1]
            for key, value in level.items:
                count += 1
                if count > _MOST_VALUES or len(open_) > _MOST_LEVELS:
                    raise UserError(
                        f"{self._path}: more than {_MOST_VALUES} values, or more than "
                        f"{_MOST_LEVELS} levels of them"
                    )
                if type(value) in (dict, list, tuple):
                    items = value.items() if type(value) is dict else enumerate(value)
                    open_.append(_Level(key, iter(items), {}, type(value)))
                    break
                if value is not None and type(value) not in (bool, int, float, str):
                    value = self._read_value(value, [*(part.key for part in open_[1:]), key])
                level.found[key] = value
            else:
                open_.pop()
                if open_:
                    open_[-1].found[level.key] = level.finished()
        return top

    def _read_value(self, value: Any, where: Sequence[Any]) -> np.ndarray:
        name = ".".join(str(part)[:_MOST_SHOWN] for part in where)
        if type(value) is Tensor:
            return self._array(name, value)
        kind = "Namespace" if type(value) is Namespace else "name of code"
        raise UserError(f"{self._path}: {quoted(name)[1:-1]} is a {kind}, no plain data")

    def _unpickled(self) -> Any:
        raise NotImplementedError

    def _bytes(self, key: str) -> bytes:
        raise NotImplementedError

    def _state_dict(self, content: Any, nested: Sequence[str]) -> dict[str, Tensor]:
        if type(content) is not dict:
            raise UserError(
                f"{self._path}: holds a {type(content).__name__}, expected a dict of tensors"
            )
        inside = next((name for name in nested if type(content.get(name)) is dict), None)
        found = content if inside is None else content[inside]
        found = {key: value for key, value in found.items() if key not in _SETTINGS}
        for key, value in found.items():
            if type(key) is not str or type(value) is not Tensor:
                where = "" if inside is None else f" under {inside!r}"
                raise UserError(
                    f"{self._path}: key {quoted(key)}{where} holds no tensor; expected a dict of "
                    f"tensors by name, or one under {' or '.join(map(repr, nested))}"
                )
        return found

    def _array(self, key: str, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor; each that it is described by is compared with the file's."""
        name = quoted(key)[1:-1]
        storage, offset, shape, strides = tensor
        width = np.dtype(storage.dtype).itemsize
        count = math.prod(shape)
        size = count * width
        self._taken += size
        if size > self._size or self._taken > _SHARING * self._size:
            raise UserError(
                f"{self._path}: {name}: {quoted(count)} elements, or all tensors up to it, are "
                f"more than a file of {self._size} bytes can hold"
            )
        content = self._storage(storage)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (size and last >= storage.length):
            raise UserError(
                f"{self._path}: {name}: reaches beyond its storage {quoted(storage.key)}"
            )
        try:
            if not size:
                return np.zeros(shape, storage.dtype)
            steps = [stride * width for stride in strides]
            # numpy compares with the buffer's ends once more.
            return np.ndarray(shape, storage.dtype, content, offset * width, steps)
        except (ValueError, OverflowError):
            raise UserError(f"{self._path}: {name}: impossible shape") from None

    def _storage(self, storage: Storage) -> bytes:
        if storage.key in self._contents:
            return self._contents[storage.key]
        content = self._bytes(storage.key)
        expected = storage.length * np.dtype(storage.dtype).itemsize
        name = quoted(storage.key)
        if len(content) != expected:
            raise UserError(
                f"{self._path}: storage {name} has {len(content)} bytes, expected {expected}"
            )
        if storage.dtype is np.bool_ and content.strip(b"\0\1"):
            raise UserError(f"{self._path}: storage {name} holds no booleans")
        self._contents[storage.key] = content
        return content


class _Level(NamedTuple):
    """A container that is being copied: what is left of it and the copies made."""

    key: Any
    items: Iterator[tuple[Any, Any]]
    found: dict[Any, Any]
    kind: type = dict

    def finished(self) -> Any:
        return self.found if self.kind is dict else self.kind(self.found.values())


class _Archive(_Reader):
    """The format since PyTorch 1.6."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        super().__init__(path)
        self._archive = archive
        self._entries = _entries(path, archive, self._size)
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path}: expected one data.pkl in the archive, found {len(pickles)}")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in self._entries:
            order = self._entry("byteorder")
            if order != b"little":
                found = quoted(order.decode("latin-1"))
                raise UserError(f"{path}: byte order {found}, expected 'little'")

    def _unpickled(self) -> Any:
        return Machine(self._path, "data.pkl").run(io.BytesIO(self._entry("data.pkl")))

    def _bytes(self, key: str) -> bytes:
        return self._entry(f"data/{key}")

    def _entry(self, name: str) -> bytes:
        shown = quoted(name)[1:-1]
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise UserError(f"{self._path}: {shown} is missing in the archive")
        # PyTorch compresses none, and unpacking one could fill memory.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(f"{self._path}: {shown} is compressed, as PyTorch never does")
        return self._archive.read(entry)


def _entries(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive; UserError where two share a name or bytes."""
    found: dict[str, zipfile.ZipInfo] = {}
    place = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        name = quoted(entry.filename)
        if entry.filename in found:
            raise UserError(f"{path}: two files in the archive are called {name}")
        if entry.header_offset < place:
            raise UserError(f"{path}: {name} lies upon another file of the archive")
        place = entry.header_offset + _ZIP_HEAD + entry.compress_size
        if place > size:
            raise UserError(f"{path}: cut short or damaged: {name} reaches beyond the end")
        found[entry.filename] = entry
    return found


class _Stream(_Reader):
    """The format before: pickles of magic, version, system, contents and the storages' keys; then
    of each storage, in that order, the number of elements (8 bytes) and the elements."""

    def __init__(self, path: Path, handle: BinaryIO):
        super().__init__(path)
        self._handle = handle
        self._spans: dict[str, tuple[int, int]] = {}

    def _unpickled(self) -> Any:
        def following(name: str) -> tuple[Any, dict[str, Storage]]:
            machine = Machine(self._path, name)
            return machine.run(self._handle), machine.storages

        head = [following(name)[0] for name in ("magic number", "version", "system")]
        little = head[2].get("little_endian") if type(head[2]) is dict else None
        if head[0] != _MAGIC or head[1] != _VERSION or little is not True:
            raise UserError(
                f"{self._path}: version {quoted(head[1])} with little_endian {quoted(little)}, "
                f"expected {_VERSION} and True"
            )
        content, storages = following("contents")
        keys, _ = following("list of storages")
        texts = type(keys) is list and all(type(key) is str for key in keys)
        if not texts or sorted(keys) != sorted(storages):
            raise UserError(f"{self._path}: the list of storages is damaged")
        place = self._handle.tell()
        for key in keys:
            self._handle.seek(place)
            count = int.from_bytes(self._handle.read(8), "little")
            size = count * np.dtype(storages[key].dtype).itemsize
            if place + 8 + size > self._size:
                raise UserError(f"{self._path}: cut short or damaged: storage {quoted(key)}")
            self._spans[key] = place + 8, size
            place += 8 + size
        return content

    def _bytes(self, key: str) -> bytes:
        start, size = self._spans[key]
        self._handle.seek(start)
        return self._handle.read(size)
