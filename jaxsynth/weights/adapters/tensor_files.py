"""The door for tensors of adapter files: whatever a file holds comes in as float32, or is named.

Files are safetensors, or PyTorch's own (`pytorch_lora_weights.bin`, `adapter_model.bin`), which are
read without PyTorch and without running what they say. Half precision, bfloat16 and both float8
become float32; an `alpha` is one number, whatever its type and shape.
"""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsynth.core.errors import UserError
from jaxsynth.weights.safetensors import FLOATS, INTEGERS, opened
from jaxsynth.weights.tensors import PICKLED, plain_keys
from jaxsynth.weights.torch_files.reader import STATE_DICTS, read_nested, read_state_dict

# Single numbers of a layer, which tools store in many types and shapes.
_NUMBERS = (".alpha", ".on_input")
# What has axes in every file.
_FACTOR = re.compile(
    r"\.(?:(?:lora|hada|lokr)_\w+|[ab][12]|diff(?:_b)?|dora_scale|[wb]_norm)(?:\.\w+)*$"
)


def load(source: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A file's tensors by key, sorted, in float32, and its metadata.

    UserError naming the file for one that cannot be read, and the key for a tensor that is no
    float, or an alpha that is no single number.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if source.suffix in PICKLED:
        tensors = plain_keys(read_state_dict(source))
        kinds = {key: value.dtype.name for key, value in tensors.items()}
        return {key: _plain(tensors[key], kinds[key], key, source) for key in sorted(tensors)}, {}
    with opened(source) as file:
        kinds = {key: file.dtype(key) for key in sorted(file.keys)}
        for key, kind in kinds.items():
            if kind not in FLOATS and not (kind in INTEGERS and key.endswith(_NUMBERS)):
                raise _not_a_float(key, kind, source)
        tensors = {key: file.read_any(key) for key in kinds}
        metadata = file.metadata
    return {key: _plain(value, kinds[key], key, source) for key, value in tensors.items()}, metadata


def keys(source: Path) -> list[str]:
    """The keys of a file's tensors, sorted."""
    if source.suffix in PICKLED:
        return sorted(plain_keys(read_state_dict(source)))
    with opened(source) as file:
        return sorted(file.keys)


def metadata_of(source: Path) -> dict[str, str]:
    """The metadata of a file, none where it is PyTorch's."""
    if source.suffix in PICKLED:
        return {}
    with opened(source) as file:
        return file.metadata


def nested(source: Path) -> dict[Any, Any]:
    """What a PyTorch file holds beside or instead of tensors by key; {} where `load` reads those.

    It does where they lie below another name, as in a training checkpoint (`STATE_DICTS`).
    """
    if source.suffix not in PICKLED:
        return {}
    try:
        found = read_nested(source)
    except UserError:
        # `load` reads the older format too, and says what is wrong with the file.
        return {}
    return {} if any(isinstance(found.get(name), dict) for name in STATE_DICTS) else found


def _plain(value: np.ndarray, kind: str, key: str, source: Path) -> np.ndarray:
    if key.endswith(_NUMBERS):
        if value.size != 1:
            raise UserError(f"{source}: {key} has shape {value.shape}, expected one number")
        return _single(value, key, source).reshape(())
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise _not_a_float(key, kind, source)
    if not value.ndim and _FACTOR.search(key):
        raise UserError(f"{source}: {key} is a single number, expected a vector or a matrix")
    return _single(value, key, source)


def _single(value: np.ndarray, key: str, source: Path) -> np.ndarray:
    """In float32; UserError for a number that is too large for it."""
    with np.errstate(over="ignore"):
        found = np.asarray(value, np.float32)
    if not np.isfinite(found).all():
        raise UserError(f"{source}: {key} holds numbers that are too large for float32")
    return found


def _not_a_float(key: str, kind: str, source: Path) -> UserError:
    return UserError(
        f"{source}: {key} holds numbers of type {kind}, expected floats "
        f"({', '.join(sorted(FLOATS))}); an adapter of whole numbers is quantized, and must be "
        "saved as floats first"
    )
