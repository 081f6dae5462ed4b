"""Linear heads in files of their own, as self-supervised networks' classifiers are published.

DINOv2's are a linear layer's weight and bias. MAE's and SynCLR's put a batch norm without factors
before it, which at inference is part of the linear layer.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsynth.core.errors import UserError, shown
from jaxsynth.weights.tensors import Tensors, expect_floats

# A linear layer alone, or in MAE's and SynCLR's heads after a batch norm without factors.
_KEY = re.compile(
    r"(module\.)?((head|linear|fc|classifier)\.)?([01]\.)?"
    r"(?P<name>weight|bias|running_mean|running_var|num_batches_tracked)"
)
_EPSILON = 1e-6


@dataclass(frozen=True)
class LinearHead:
    """A linear layer: `weight` (classes, features) and `bias` (classes,)."""

    path: Path
    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "LinearHead":
        """From a file of `tensors.SUFFIXES`; UserError naming it for anything else in it."""
        found: dict[str, np.ndarray] = {}
        for file, key, read in Tensors([path]).items():
            match = _KEY.fullmatch(key)
            if match is None or match["name"] in found:
                raise UserError(
                    f"{path}: key {shown(key)}: expected a linear layer's weight and bias, and "
                    "at most a batch norm's running_mean and running_var"
                )
            # How many batches torch's batch norm has seen: an integer, and not needed.
            if match["name"] == "num_batches_tracked":
                continue
            found[match["name"]] = expect_floats(file, key, read()).astype(np.float32)
        weight, bias = found.get("weight"), found.get("bias")
        if weight is None or weight.ndim != 2:
            shape = None if weight is None else weight.shape
            raise UserError(f"{path}: weight: {shape}, expected (classes, features)")
        classes, width = weight.shape
        bias = np.zeros(classes, np.float32) if bias is None else bias
        mean, variance = found.get("running_mean"), found.get("running_var")
        if (mean is None) != (variance is None):
            raise UserError(f"{path}: expected running_mean and running_var, or none of them")
        for name, value, size in (
            ("bias", bias, classes),
            ("running_mean", mean, width),
            ("running_var", variance, width),
        ):
            if value is not None and value.shape != (size,):
                raise UserError(f"{path}: {name}: {value.shape}, expected ({size},)")
        if mean is not None and variance is not None:
            weight = weight / np.sqrt(variance + _EPSILON)
            bias = bias - weight @ mean
        return cls(path, weight, bias)

    @property
    def classes(self) -> int:
        return self.weight.shape[0]
