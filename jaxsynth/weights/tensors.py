"""The tensors of a checkpoint's files, whether safetensors or PyTorch's own, under their keys.

All readers take tensors from here, so that number types mean the same everywhere: 8-bit floats of
both kinds become float32, because numpy computes with neither, and all other types that numpy and
ml_dtypes know are read as they are.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxsynth.core.errors import UserError
from jaxsynth.weights import hub
from jaxsynth.weights.torch_files.reader import read_state_dict

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)

_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# What safetensors' numpy reader gives.
_READ = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64")


def read_tensor(handle: Any, path: Path, key: str) -> np.ndarray:
    """One tensor of an open safetensors file (`hub.opened`).

    UserError naming file and key for a number type that is not read.
    """
    dtype = handle.get_slice(key).get_dtype()
    if dtype in _FLOAT8:
        return _read_float8(path, key, _FLOAT8[dtype])
    if dtype not in _READ:
        known = ", ".join((*_READ, *_FLOAT8))
        raise UserError(f"{path}: {key}: dtype {dtype}, expected one of {known}")
    return np.asarray(handle.get_tensor(key))


def _read_float8(path: Path, key: str, dtype: type) -> np.ndarray:
    """As float32. The library's numpy reader fails on it; it has checked the header's offsets."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[key]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        values = np.frombuffer(file.read(end - start), dtype)
    return values.reshape(entry["shape"]).astype(np.float32)


def expect_floats(
    path: Path, key: str, value: np.ndarray, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """`value`; UserError naming file and key if it holds no floats or its shape is not `shape`."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{path}: {key}: {value.dtype}, expected floats")
    if shape is not None and value.shape != tuple(shape):
        raise UserError(f"{path}: {key}: shape {value.shape}, expected {tuple(shape)}")
    return value


class Tensors:
    """The tensors of some files; PyTorch's are read whole, safetensors one by one."""

    def __init__(self, paths: list[Path]):
        """UserError for a file that is of neither kind, or that does not exist."""
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: no such file")
            if path.suffix not in SUFFIXES:
                raise UserError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        self.paths = paths
        self._loaded = {p: _plain_keys(read_state_dict(p)) for p in paths if p.suffix in PICKLED}

    @cached_property
    def keys(self) -> list[str]:
        return [key for _, key, _ in self.items()]

    def items(self) -> Iterator[tuple[Path, str, Callable[[], np.ndarray]]]:
        """File, key, and a function that reads the tensor, which lasts until the next one."""
        for path in self.paths:
            if path in self._loaded:
                for key, value in self._loaded[path].items():
                    yield path, key, lambda value=value: value
                continue
            with hub.opened(path) as handle:
                for key in handle.keys():  # noqa: SIM118, a safetensors handle is no mapping
                    yield path, key, lambda key=key, h=handle, p=path: read_tensor(h, p, key)

    @property
    def where(self) -> Path:
        """What an error about all of them names."""
        return self.paths[0] if len(self.paths) == 1 else self.paths[0].parent


def _plain_keys(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the "module." that torch's data parallelism puts before every key."""
    wrapped = all(key.startswith("module.") for key in tensors)
    return {key.removeprefix("module.") if wrapped else key: x for key, x in tensors.items()}
