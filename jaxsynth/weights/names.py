"""Between the paths of NNX parameters and the keys and layouts of Hugging Face checkpoints.

The networks here keep Hugging Face's module names, so only leaves differ: what NNX calls kernel,
scale and embedding torch calls weight, and kernels are (in, out) and (height, width, in, out) here,
(out, in) and (out, in, height, width) there. Older key spellings are listed here too.
"""

import re
from collections.abc import Collection, Iterable

import numpy as np

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# By number of axes: dense, 1-D and 2-D convolution.
_TO_HF = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}
_FROM_HF = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}

# The names of diffusers before 0.15 in the autoencoder's attention.
_OLD_ATTENTION = re.compile(r"^(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# transformers from 5.6 on leaves these out of a lone tower's keys.
_TOWERS = ("text_model.", "vision_model.")

# Buffers of older files: the numbers 0, 1, 2, ...
_BUFFER = re.compile(r"(^|\.)position_ids$")


def hf_name(path: Iterable[str | int]) -> str:
    """The Hugging Face key of a parameter's path, e.g. ("a", 0, "kernel") -> "a.0.weight"."""
    *modules, leaf = (str(part) for part in path)
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def hf_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a Hugging Face file of a parameter named `leaf` of this shape."""
    axes = _axes(leaf, len(shape), _TO_HF)
    return tuple(shape) if axes is None else tuple(shape[axis] for axis in axes)


def to_hf(leaf: str, array: np.ndarray) -> np.ndarray:
    """A parameter's value in torch's layout: (in, out) -> (out, in), HWIO -> OIHW; others as is."""
    axes = _axes(leaf, array.ndim, _TO_HF)
    return array if axes is None else np.ascontiguousarray(array.transpose(axes))


def from_hf(leaf: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_hf`: (out, in) -> (in, out), OIHW -> HWIO; others as is."""
    axes = _axes(leaf, array.ndim, _FROM_HF)
    return array if axes is None else np.ascontiguousarray(array.transpose(axes))


def canonical(key: str, expected: Collection[str]) -> str | None:
    """The key among `expected` that a file's `key` means; None for a buffer to leave out.

    A key that means nothing expected is returned as it is, for the caller to refuse.
    """
    if key in expected:
        return key
    if _BUFFER.search(key):
        return None
    old = _OLD_ATTENTION.match(key)
    if old:
        return f"{old[1]}.{_NEW_ATTENTION[old[2]]}.{old[3]}"
    found = [tower + key for tower in _TOWERS if tower + key in expected]
    return found[0] if len(found) == 1 else key


def _axes(leaf: str, ndim: int, table: dict[int, tuple[int, ...]]) -> tuple[int, ...] | None:
    if leaf != "kernel":
        return None
    if ndim not in table:
        raise ValueError(
            f"kernel with {ndim} axes: expected a dense or convolution kernel (2 to 4)"
        )
    return table[ndim]
