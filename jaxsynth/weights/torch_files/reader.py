"""Tensors out of PyTorch's own files (.pt, .pth, .bin), without PyTorch and without running code.

Such a file is a zip archive of a pickle, which describes the tensors, and one plain file of numbers
for each storage; before version 1.6 (2020) it was a row of pickles with the numbers after them, as
the weights are that FIDs are measured with. A pickle may name any function and have it called, so
this reader knows the few names that a state dict needs and refuses a file that asks for anything
else; what it puts in their place are inert records, made anew for every file.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxsynth.core.errors import UserError

_DTYPES = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}
_ZIP = b"PK\x03\x04"
# What a file before PyTorch 1.6 begins with (pickled), and the only version there was of it.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_PICKLED_MAGIC = pickle.dumps(_MAGIC, 2)


@dataclass(frozen=True)
class _Storage:
    """A storage's class in the pickle, and with key and length (elements) a storage."""

    dtype: type
    key: str = ""
    length: int = 0


@dataclass(frozen=True)
class _Tensor:
    """A tensor before its storage is read; strides and offset are in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(
    path: str | os.PathLike, *, nested: Sequence[str] = ("ema", "model", "state_dict")
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
    if not start.startswith(_ZIP):
        raise UserError(f"{path}: no PyTorch file (a zip archive with a data.pkl)")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).read(nested)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{path}: cut short or damaged: {error}") from None


def read_nested(path: str | os.PathLike) -> dict[Any, Any]:
    """The dict of a file with all that is in it: dicts, lists, numbers, texts, and arrays.

    Of the archives that PyTorch writes since 1.6. UserError as for `read_state_dict`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).read_nested()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{path}: cut short, damaged or no PyTorch file: {error}") from None


class _Reader:
    """One opened file; how it is laid out is for `_unpickled` and `_bytes` to know."""

    def __init__(self, path: Path):
        self._path = path
        self._arrays: dict[str, np.ndarray] = {}

    def read(self, nested: Sequence[str]) -> dict[str, np.ndarray]:
        tensors = self._state_dict(self._unpickled(), nested)
        return {key: self._array(key, tensor) for key, tensor in tensors.items()}

    def read_nested(self) -> dict[Any, Any]:
        content = self._unpickled()
        if not isinstance(content, dict):
            raise UserError(f"{self._path}: holds a {type(content).__name__}, expected a dict")
        return self._filled(content, "")

    def _filled(self, value: Any, where: str) -> Any:
        """`value` with the tensors in it read."""
        if isinstance(value, _Tensor):
            return self._array(where, value)
        if isinstance(value, dict):
            return {key: self._filled(item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._filled(x, f"{where}.{i}") for i, x in enumerate(value))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise UserError(f"{self._path}: {where[1:]} is a {type(value).__name__}, no plain data")

    def _unpickled(self) -> Any:
        raise NotImplementedError

    def _bytes(self, key: str) -> bytes:
        raise NotImplementedError

    def _load(self, unpickler: "_Unpickler", name: str) -> Any:
        try:
            return unpickler.load()
        except UserError:
            raise
        except Exception as error:  # whatever the opcodes of a malformed pickle run into
            raise UserError(f"{self._path}: {name} is damaged: {error!r}") from None

    def _state_dict(self, content: Any, nested: Sequence[str]) -> dict[str, _Tensor]:
        if not isinstance(content, dict):
            raise UserError(
                f"{self._path}: holds a {type(content).__name__}, expected a dict of tensors"
            )
        inside = next((name for name in nested if isinstance(content.get(name), dict)), None)
        found = content if inside is None else content[inside]
        for key, value in found.items():
            if not isinstance(key, str) or not isinstance(value, _Tensor):
                where = "" if inside is None else f" under {inside!r}"
                raise UserError(
                    f"{self._path}: key {key!r}{where} holds no tensor; expected a dict of tensors "
                    f"by name, or one under {' or '.join(map(repr, nested))}"
                )
        return found

    def _array(self, key: str, tensor: _Tensor) -> np.ndarray:
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        if storage.key not in self._arrays:
            self._arrays[storage.key] = self._numbers(storage)
        flat = self._arrays[storage.key]
        last = tensor.offset + sum(
            (n - 1) * stride for n, stride in zip(shape, strides, strict=True)
        )
        empty = 0 in shape
        if flat.dtype != storage.dtype or (not empty and last >= flat.size):
            raise UserError(f"{self._path}: {key}: reaches beyond its storage {storage.key!r}")
        try:
            if empty:
                return np.zeros(shape, storage.dtype)
            steps = [stride * flat.itemsize for stride in strides]
            start = flat[tensor.offset :]
            return np.lib.stride_tricks.as_strided(start, shape, steps, writeable=False)
        except (ValueError, OverflowError):
            raise UserError(f"{self._path}: {key}: impossible shape {shape}") from None

    def _numbers(self, storage: _Storage) -> np.ndarray:
        content = self._bytes(storage.key)
        expected = storage.length * np.dtype(storage.dtype).itemsize
        if len(content) != expected:
            raise UserError(
                f"{self._path}: storage {storage.key!r} has {len(content)} bytes, expected "
                f"{expected}"
            )
        return np.frombuffer(content, storage.dtype)


class _Archive(_Reader):
    """The format since PyTorch 1.6."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        super().__init__(path)
        self._archive = archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path}: expected one data.pkl in the archive, found {len(pickles)}")
        self._root = pickles[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in archive.namelist() and self._entry("byteorder") != b"little":
            raise UserError(f"{path}: byte order {self._entry('byteorder')!r}, expected little")

    def _unpickled(self) -> Any:
        content = io.BytesIO(self._entry("data.pkl"))
        return self._load(_Unpickler(self._path, content), "data.pkl")

    def _bytes(self, key: str) -> bytes:
        return self._entry(f"data/{key}")

    def _entry(self, name: str) -> bytes:
        """A file of the archive. PyTorch compresses none, and unpacking one could fill memory."""
        try:
            entry = self._archive.getinfo(self._root + name)
        except KeyError:
            raise UserError(f"{self._path}: {name} is missing in the archive") from None
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self._path}: {name} is compressed, as PyTorch never does")
        return self._archive.read(entry)


class _Stream(_Reader):
    """The format before: pickles of magic, version, system, contents and the storages' keys; then
    of each storage, in that order, the number of elements (8 bytes) and the elements."""

    def __init__(self, path: Path, handle: BinaryIO):
        super().__init__(path)
        self._handle = handle
        self._spans: dict[str, tuple[int, int]] = {}

    def _unpickled(self) -> Any:
        def following(name: str) -> tuple[Any, dict[str, _Storage]]:
            unpickler = _Unpickler(self._path, self._handle)
            return self._load(unpickler, name), unpickler.storages

        head = [following(name)[0] for name in ("magic number", "version", "system")]
        little = isinstance(head[2], dict) and head[2].get("little_endian")
        if head[:2] != [_MAGIC, _VERSION] or little is not True:
            raise UserError(
                f"{self._path}: version {head[1]!r} with little_endian {little!r}, "
                f"expected {_VERSION} and True"
            )
        content, storages = following("contents")
        keys, _ = following("list of storages")
        if not isinstance(keys, list) or sorted(map(repr, keys)) != sorted(map(repr, storages)):
            raise UserError(f"{self._path}: the list of storages is damaged: {keys!r:.80}")
        place, end = self._handle.tell(), self._path.stat().st_size
        for key in keys:
            self._handle.seek(place)
            count = int.from_bytes(self._handle.read(8), "little")
            size = count * np.dtype(storages[key].dtype).itemsize
            if place + 8 + size > end:
                raise UserError(f"{self._path}: cut short or damaged: storage {key!r}")
            self._spans[key] = place + 8, size
            place += 8 + size
        return content

    def _bytes(self, key: str) -> bytes:
        start, size = self._spans[key]
        self._handle.seek(start)
        return self._handle.read(size)


class _Unpickler(pickle.Unpickler):
    """An unpickler to which only the names of a state dict mean something."""

    def __init__(self, path: Path, content: BinaryIO):
        super().__init__(content, encoding="utf-8")
        self._path = path
        self.storages: dict[str, _Storage] = {}
        # `args` of a training checkpoint: what it was is of no interest here.
        namespace = type("Namespace", (), {"__setstate__": lambda self, state: None})
        self._known = {
            ("argparse", "Namespace"): namespace,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilder(),
            **{("torch", name): _Storage(dtype) for name, dtype in _DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise UserError(
                f"{self._path}: refused, because it asks for {module}.{name}, and only what "
                "tensors need is allowed"
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, length, *view = pid
        valid = isinstance(storage, _Storage) and isinstance(key, str) and type(length) is int
        # A sixth, of the old format, is a part of another storage: not written since PyTorch 0.4.
        if kind != "storage" or not valid or length < 0 or view not in ([], [None]):
            raise ValueError(f"persistent id {pid!r}")
        return self.storages.setdefault(key, _Storage(storage.dtype, key, length))


def _rebuilder() -> Any:
    """A function of this file's own, so that nothing a pickle sets on it outlives the reading."""

    def rebuild(storage, offset, shape, strides, *_) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"tensor of storage {storage!r}, {numbers}")
        if len(shape) != len(strides):
            raise ValueError(f"tensor of shape {shape!r} with strides {strides!r}")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    return rebuild
