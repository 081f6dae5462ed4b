"""The tensors of a checkpoint's files, whether safetensors or PyTorch's own, under their keys.

Number types mean the same in all of them: 8-bit floats of both kinds become float32, because numpy
computes with neither, and all other types that numpy and ml_dtypes know are read as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsynth.core.errors import UserError
from jaxsynth.weights.checks import check_finite
from jaxsynth.weights.safetensors import opened
from jaxsynth.weights.torch_files.reader import read_state_dict

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
_HALF = {
    "F16": jnp.float16,
    "float16": jnp.float16,
    "BF16": jnp.bfloat16,
    "bfloat16": jnp.bfloat16,
}


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
        self._loaded = {p: plain_keys(read_state_dict(p)) for p in paths if p.suffix in PICKLED}

    @cached_property
    def keys(self) -> list[str]:
        return [key for _, key, _ in self.items()]

    def items(self) -> Iterator[tuple[Path, str, Callable[[], np.ndarray]]]:
        """File, key, and a function that reads the tensor, which lasts until the next one."""
        for path in self.paths:
            if path in self._loaded:
                for key, value in self._loaded[path].items():
                    yield path, key, partial(check_finite, path, key, value)
                continue
            with opened(path) as file:
                for key in file.keys:
                    yield path, key, partial(file.read_any, key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its key."""
        found = {key: x.shape for values in self._loaded.values() for key, x in values.items()}
        for path in self.paths:
            if path not in self._loaded:
                with opened(path) as file:
                    found |= {key: file.shape(key) for key in file.keys}
        return found

    def dtype(self) -> Any:
        """The type of all matrices and kernels of floats, float32 where they have several."""
        kinds = {x.dtype.name for v in self._loaded.values() for x in v.values() if x.ndim > 1}
        for path in self.paths:
            if path not in self._loaded:
                with opened(path) as file:
                    kinds |= {file.dtype(key) for key in file.keys if len(file.shape(key)) > 1}
        floats = [kind for kind in kinds if not kind.lower().startswith(("i", "u", "bool"))]
        return _HALF.get(floats[0], jnp.float32) if len(floats) == 1 else jnp.float32

    def counts(self) -> tuple[int, int]:
        """How many tensors there are, and how many numbers in all of them."""
        tensors = numbers = 0
        for path in self.paths:
            if path in self._loaded:
                values = self._loaded[path].values()
                tensors, numbers = tensors + len(values), numbers + sum(x.size for x in values)
                continue
            with opened(path) as file:
                tensors, numbers = tensors + len(file.keys), numbers + file.numbers
        return tensors, numbers

    @property
    def where(self) -> Path:
        """What an error about all of them names."""
        return self.paths[0] if len(self.paths) == 1 else self.paths[0].parent


def plain_keys(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the "module." that torch's data parallelism puts before every key."""
    wrapped = all(key.startswith("module.") for key in tensors)
    return {key.removeprefix("module.") if wrapped else key: x for key, x in tensors.items()}
