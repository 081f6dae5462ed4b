"""Safetensors files, read one tensor at a time and strictly.

The library checks where tensors lie. It takes the last of two tensors of one name, knows types that
numpy has not, and has no objection to weights that are no numbers; here these are errors that name
the tensor. The eight-bit floats of adapters are read as float32, which holds all their values.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxsynth.core import signatures
from jaxsynth.core.documents import parse_json
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.weights.checks import check_finite

_EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
FLOATS = ("F64", "F32", "F16", "BF16", *_EIGHT_BITS)
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
# The largest files have some ten thousand tensors, of about 150 bytes each in the header.
_MOST_HEADER = 16 << 20
# An array without elements has no bytes that bound its sizes, and numpy cannot hold any.
_MOST_EMPTY = 1 << 48


class Safetensors:
    """An open file: `keys` in its order, `metadata`, and the shapes and values of tensors."""

    def __init__(self, path: Path, handle: Any, header: dict[str, Any], start: int):
        self.path = path
        self.keys: list[str] = list(handle.keys())
        self.metadata: dict[str, str] = handle.metadata() or {}
        self._handle, self._header, self._start = handle, header, start

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._header[key]["shape"])

    def dtype(self, key: str) -> str:
        """The type of a tensor in the format's own word."""
        return self._header[key]["dtype"]

    @property
    def numbers(self) -> int:
        """The elements of all tensors."""
        return sum(math.prod(self.shape(key)) for key in self.keys)

    def read(self, key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """The floats of one tensor; UserError naming it for another type or another shape."""
        self._refuse(key, FLOATS, shape)
        return self.read_any(key)

    def read_any(self, key: str) -> np.ndarray:
        """One tensor of floats or integers; UserError naming it for another type, or for NaN."""
        self._refuse(key, (*FLOATS, *INTEGERS), None)
        dtype = self._header[key]["dtype"]
        if dtype not in _EIGHT_BITS:
            return check_finite(self.path, key, self._handle.get_tensor(key))
        begin, end = self._header[key]["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            data = file.read(end - begin)
        values = np.frombuffer(data, _EIGHT_BITS[dtype]).astype(np.float32)
        return check_finite(self.path, key, values.reshape(self.shape(key)))

    def _refuse(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> None:
        if key not in self._header:
            raise UserError(f"{self.path}: key {quoted(key)} is missing")
        name, dtype, found = quoted(key)[1:-1], self._header[key]["dtype"], self.shape(key)
        if dtype not in dtypes:
            raise UserError(
                f"{self.path}: {name}: dtype {dtype}, expected one of {', '.join(dtypes)}"
            )
        if 0 in found and math.prod(size or 1 for size in found) > _MOST_EMPTY:
            raise UserError(f"{self.path}: {name}: impossible shape")
        if shape is not None and found != tuple(shape):
            raise UserError(f"{self.path}: {name}: shape {found}, expected {tuple(shape)}")


@contextmanager
def opened(path: Path) -> Iterator[Safetensors]:
    """A safetensors file, opened lazily; UserError if it is cut short or no safetensors at all."""
    try:
        with path.open("rb") as file:
            head = file.read(signatures.LONGEST)
            size = int.from_bytes(head[:8], "little")
            if size > _MOST_HEADER:
                if what := signatures.named(head):
                    raise UserError(f"{path}: is {what}, not a safetensors file")
                raise UserError(
                    f"{path}: a header of {size} bytes, expected {_MOST_HEADER} at most; it is "
                    "no safetensors file, or is damaged"
                )
            file.seek(8)
            text = file.read(size)
        # Before ours, whose words for a damaged header are about JSON alone.
        with safe_open(path, framework="numpy") as handle:
            header = parse_json(text, f"{path}: header")
            header.pop("__metadata__", None)
            yield Safetensors(path, handle, header, 8 + size)
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file: {_short(error)}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or _short(error)}") from None


def _short(error: Exception) -> str:
    """The library's text, which may hold a name of any length from the file."""
    return quoted(str(error), 200)[1:-1]
