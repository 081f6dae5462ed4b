"""Adapters' factors in the layouts of peft and LyCORIS.

Here a factor is laid out like a kernel of NNX, (*window, in, out); there like a weight of torch,
(out, in, *window). Low-rank parts that meet a window are flattened there, and with Tucker factors
the outputs' part is transposed.
"""

import math

import numpy as np

# Parts that a window makes matrices (rank, in * window) of.
_FLAT = {"hada_w1_b", "hada_w2_b", "lokr_w2_b"}
# The outputs' parts, (rank, out) beside the middle kernel of the same name.
_MIDDLE = {"hada_w1_a": "hada_t1", "hada_w2_a": "hada_t2", "lokr_w2_a": "lokr_t2"}
# Angles, in the same order there.
_SAME = {"oft_R", "boft_R"}


def to_torch(factor: str, value: np.ndarray, *, tucker: bool = False) -> np.ndarray:
    """A factor of one layer as peft and LyCORIS have it; `tucker`: it has a middle kernel."""
    value = np.asarray(value)
    if value.ndim < 2 or factor in _SAME or (tucker and factor in _MIDDLE):
        return value
    axes = (value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
    turned = np.ascontiguousarray(value.transpose(axes))
    return turned.reshape(len(turned), -1) if factor in _FLAT else turned


def from_torch(
    factor: str, value: np.ndarray, *, window: tuple[int, ...] = (), tucker: bool = False
) -> np.ndarray:
    """The inverse of `to_torch`, on a layer of this window (() where it is none)."""
    value = np.asarray(value)
    if value.ndim < 2 or factor in _SAME or (tucker and factor in _MIDDLE):
        return value
    if factor in _FLAT and window and not tucker:
        value = value.reshape(len(value), -1, *window)
    return np.ascontiguousarray(value.transpose((*range(2, value.ndim), 1, 0)))


def torch_shape(factor: str, shape: tuple[int, ...], *, tucker: bool = False) -> tuple[int, ...]:
    """The shape that a factor of this shape has in a file."""
    return to_torch(factor, np.broadcast_to(np.float32(0), shape), tucker=tucker).shape


def upper_blocks(upper: np.ndarray) -> np.ndarray:
    """Matrices (..., b, b) with these values (..., b (b - 1) / 2) above the diagonal, else zero."""
    upper = np.asarray(upper)
    size = round((1 + math.sqrt(1 + 8 * upper.shape[-1])) / 2)
    blocks = np.zeros((*upper.shape[:-1], size, size), upper.dtype)
    blocks[(..., *np.triu_indices(size, 1))] = upper
    return blocks


def upper_values(blocks: np.ndarray) -> np.ndarray:
    """What matrices (..., b, b) have above the diagonal: (..., b (b - 1) / 2)."""
    blocks = np.asarray(blocks)
    return blocks[(..., *np.triu_indices(blocks.shape[-1], 1))]
