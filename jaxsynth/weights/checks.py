"""What a file of weights must be before it is used: finite, and large enough for its config."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.words import counted

# Of the types of 16 bits: all ones in the exponent is an infinity or no number. numpy's own test is
# slow for them.
_EXPONENTS = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
_PIECE = 1 << 20
# Fields that count modules, each of which has at least one tensor in a file.
_MODULES = ("layers", "depths", "blocks", "downs", "num_stages")
# Sizes that no tensor has (of images, of vocabularies with reserved ids) are below this.
_FREE = 1 << 16


def finite(array: np.ndarray) -> bool:
    """Whether all values are numbers; integers always are."""
    exponent = _EXPONENTS.get(array.dtype)
    if exponent is None and not np.issubdtype(array.dtype, np.floating):
        return True
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if exponent is None:
            if not np.isfinite(piece).all():
                return False
        elif ((piece.view(np.uint16) & exponent) == exponent).any():
            return False
    return True


def check_finite(path: Path, key: str, array: np.ndarray) -> np.ndarray:
    """`array`, or a UserError that names its file and key."""
    if not finite(array):
        raise UserError(
            f"{path}: {quoted(key)[1:-1]}: holds NaN or infinity: the file is damaged, or what "
            "wrote it had diverged"
        )
    return array


def check_counts(path: Path, config: Any, tensors: int, numbers: int) -> None:
    """UserError naming `path` and a field of a network's config that its weights are too small for.

    The weights have so many `tensors` with so many `numbers` in all. A network is only built, even
    without values, when they may be enough.
    """
    for name, value in _counts(config):
        modules = any(word in name for word in _MODULES)
        if value > (tensors if modules else max(numbers, _FREE)):
            raise UserError(
                f"{path}: {name} is {quoted(value)}, but the weights have "
                f"{counted(tensors, 'tensor')} of {numbers} numbers"
            )


def _counts(config: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The integers of a config by their field's name, and the lengths of its lists."""
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from _counts(getattr(config, field.name), field.name)
    elif isinstance(config, (tuple, list)):
        yield f"the number of layers in {name}", len(config)
        for value in config:
            yield from _counts(value, name)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield name, config
