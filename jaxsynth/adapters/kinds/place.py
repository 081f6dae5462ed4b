"""The kernel of a wrapped layer: where it lies, its axes, and how to shape values for it."""

import math
from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array

from jaxsynth.adapters.kinds.convolution import check_conv


@dataclass(frozen=True)
class Place:
    """The kernel of a wrapped layer: (*lead, *size, in, out) in the parameter `name`.

    `lead` are the axes of layers stacked for a scan, which are gone within it; `size` is a
    convolution's window, () elsewhere. A table of embeddings is a kernel for one-hot inputs.
    """

    name: str
    lead: tuple[int, ...]
    size: tuple[int, ...]
    c_in: int
    c_out: int

    @classmethod
    def of(cls, layer: nnx.Module, kind: str, path: str) -> "Place":
        """Raises TypeError for a layer without a kernel, ValueError for a convolution too unusual.

        Exact types: a subclass may compute something that an update would not follow.
        """
        axes, name = 0, "kernel"
        if type(layer) is nnx.Conv:
            check_conv(kind, path, layer)
            axes = len(layer.kernel_size)
        elif type(layer) is nnx.Embed:
            name = "embedding"
        elif type(layer) is not nnx.Linear:
            raise TypeError(
                f"{path}: {kind} adapts nnx.Linear, nnx.Conv and nnx.Embed, found "
                f"{type(layer).__name__}"
            )
        *outer, c_in, c_out = getattr(layer, name).get_value().shape
        cut = len(outer) - axes
        return cls(name, tuple(outer[:cut]), tuple(outer[cut:]), c_in, c_out)

    @property
    def is_table(self) -> bool:
        return self.name == "embedding"

    @property
    def ones(self) -> tuple[int, ...]:
        """A window of one tap."""
        return (1,) * len(self.size)

    @property
    def rows(self) -> int:
        """How many inputs one output sums."""
        return math.prod(self.size) * self.c_in

    def flat(self, kernel: Array) -> Array:
        """(*lead, *size, in, n) as a matrix (*lead, rows, n)."""
        return kernel.reshape(*self._lead(kernel), -1, kernel.shape[-1])

    def tall(self, kernel: Array) -> Array:
        """A kernel of one tap, (*lead, *1, n, out) as a matrix (*lead, n, out)."""
        return kernel.reshape(*self._lead(kernel), *kernel.shape[-2:])

    def wide(self, matrix: Array) -> Array:
        """The inverse of `tall`."""
        return matrix.reshape(*matrix.shape[:-2], *self.ones, *matrix.shape[-2:])

    def inputs(self, rows: Array) -> Array:
        """Values of the rows of a matrix, (*lead, rows), summed for each input: (*lead, in)."""
        return rows.reshape(*rows.shape[:-1], -1, self.c_in).sum(-2)

    def spread(self, values: Array, side: str) -> Array:
        """Values of inputs or outputs, (*lead, n), shaped to multiply a kernel."""
        ends = (values.shape[-1], 1) if side == "input" else (1, values.shape[-1])
        return values.reshape(*values.shape[:-1], *self.ones, *ends)

    def _lead(self, kernel: Array) -> tuple[int, ...]:
        return kernel.shape[: kernel.ndim - 2 - len(self.size)]
