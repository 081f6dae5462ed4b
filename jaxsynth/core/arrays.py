"""Arrays from numpy's files (.npy, .npz) that somebody else may have written.

numpy believes an array's header before it reads the array, and its zip archives may unpack to any
size. Here an array has the bytes that its header says, pickled objects are refused, and all that is
wrong is a `UserError` that names the file and the array.
"""

import math
import os
import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np

from jaxsynth.core.errors import UserError, quoted

# An archive of this many bytes or more must not unpack to more than `_PACKING` times its size.
_SMALL, _PACKING = 1 << 28, 64
# A zip file's header of one entry; its last two numbers are the lengths of what follows it.
_LOCAL = struct.Struct("<4s5H3L2H")


def read_arrays(
    path: str | os.PathLike,
    keys: Iterable[str] = (),
    *,
    optional: Iterable[str] | None = None,
    mapped: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays of an .npz: `keys`, and those of `optional` that it has; without keys, all.

    With `mapped`, numbers that are not packed stay in the file until they are looked at, and are
    not compared with the archive's checksums. UserError naming the file and the array for a key
    that is missing or for one that is neither, for a file that is cut short or damaged, and for
    pickled objects.
    """
    path, keys = Path(path), list(keys)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise UserError(f"{path}: a single array, expected an .npz (numpy.savez)")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {x.filename.removesuffix(".npy"): x for x in archive.infolist()}
            for key in keys:
                if key not in entries:
                    raise UserError(f"{path}: key {key!r} missing, found {_listed(list(entries))}")
            whole = sum(entry.file_size for entry in entries.values())
            if whole > max(_SMALL, _PACKING * path.stat().st_size):
                raise UserError(f"{path}: unpacks to {whole} bytes, more than such a file needs")
            wanted = [*keys, *(name for name in optional or () if name in entries)]
            found = {}
            for name in wanted or entries:
                entry, where = entries[name], f"{path}: {_named(name)}"
                if mapped and entry.compress_type == zipfile.ZIP_STORED and entry.file_size:
                    found[name] = _map(path, entry, where)
                    continue
                with archive.open(entry) as file:
                    found[name] = _read(file, entry.file_size, where)
            return found
    except UserError:
        raise
    except Exception as error:  # zipfile and zlib raise many types for damaged archives
        _refuse(path, "an .npz", error)


def read_array(path: str | os.PathLike, *, mapped: bool = False) -> np.ndarray:
    """The array of an .npy; UserError naming the file where it is damaged or no such file.

    With `mapped` its numbers stay in the file until they are looked at.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not mapped:
                return _read(file, path.stat().st_size, path)
            shape, order, dtype = _header(file, path.stat().st_size, path)
            return np.memmap(path, dtype, "r", file.tell(), shape, order)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # of an empty map
        _refuse(path, "an array", error)


def _map(path: Path, entry: zipfile.ZipInfo, where: str) -> np.ndarray:
    """An array of an archive, where it lies in the file unpacked."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        start = file.read(_LOCAL.size)
        if len(start) < _LOCAL.size or start[:4] != b"PK\x03\x04":
            raise UserError(f"{where}: cut short")
        name, more = _LOCAL.unpack(start)[-2:]
        begin = entry.header_offset + _LOCAL.size + name + more
        if begin + entry.file_size > path.stat().st_size:
            raise UserError(f"{where}: cut short")
        file.seek(begin)
        shape, order, dtype = _header(file, begin + entry.file_size, where)
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", file.tell(), shape, order)


def _read(file: Any, size: int, where: str | Path) -> np.ndarray:
    """One array of `size` bytes with its header."""
    shape, order, dtype = _header(file, size, where)
    try:
        values = np.empty(math.prod(shape), dtype)
        if values.nbytes:
            left = memoryview(values.view(np.uint8))
            while left:
                count = file.readinto(left)
                if not count:
                    raise UserError(f"{where}: cut short")
                left = left[count:]
        return values.reshape(shape, order=order)
    except (UserError, OSError):
        raise
    except Exception as error:  # zlib's, zipfile's of a wrong checksum
        _refuse(where, "an array", error)


def _header(
    file: IO[bytes], size: int, where: str | Path
) -> tuple[tuple[int, ...], Literal["F", "C"], np.dtype]:
    """Shape, order and type, of which the file has as many bytes."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(file)
        if dtype.hasobject:
            raise UserError(f"{where}: pickled objects, expected numbers or texts")
        count = math.prod(shape)
        if min(shape, default=0) < 0 or count * dtype.itemsize != size - file.tell():
            raise UserError(
                f"{where}: {size - file.tell()} bytes, expected {quoted(count * dtype.itemsize)}"
            )
        return shape, "F" if by_column else "C", dtype
    except (UserError, OSError):
        raise
    except Exception as error:  # numpy raises many types for damaged headers, zlib its own
        _refuse(where, "an array", error)


def _refuse(where: str | Path, kind: str, error: Exception) -> NoReturn:
    raise UserError(f"{where}: cannot be read as {kind} ({type(error).__name__})") from None


def _named(name: str) -> str:
    return quoted(name)[1:-1]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_named, names[:8])) or "nothing"
