"""New rows for a frozen embedding table: new classes of a class-conditional model, new words.

DiffScaler (arXiv:2404.09976) appends a row for each new class and starts all of them at the
unconditional one, so that the untrained model already denoises the new data; the old rows stay as
they are, to the bit. The same layer gives a text encoder the new words of Textual Inversion.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.adapters import inject


def extend_table(model: inject.T, path: str, count: int, *, start: int) -> inject.T:
    """A copy of `model` whose table at the dotted `path` has `count` more, trainable, rows.

    All start as row `start` of the table; the first new id is the table's old length.

    Raises ValueError for a path that holds no layer, a `count` below 1 or a `start` that is no row,
    and TypeError if the layer is no `nnx.Embed`.
    """

    def make(name: str, layer: nnx.Module, _: Any) -> inject.AdapterLayer:
        if type(layer) is not nnx.Embed:
            raise TypeError(f"{name}: only nnx.Embed gets rows, found {type(layer).__name__}")
        return ExtendedTable(layer, count, start, name)

    return inject.inject(model, make, targets=(path,), rngs=nnx.Rngs(0))


class ExtendedTable(inject.AdapterLayer):
    """A table with more rows: `rows` (count, dim), the ids from `base.num_embeddings` on.

    Strength interpolates between the row that they started as (0) and the learnt ones (1).
    """

    kind = "extended table"

    def __init__(self, layer: nnx.Embed, count: int, start: int, path: str = "table"):
        super().__init__(layer, None)
        old = layer.num_embeddings
        if count < 1:
            raise ValueError(f"{path}: {count} new rows, expected at least 1")
        if not 0 <= start < old:
            raise ValueError(f"{path}: rows cannot start as row {start} of {old}")
        self.start = start
        row = layer.embedding.get_value()[start].astype(jnp.float32)
        self.rows = inject.Trainable(jnp.tile(row, (count, 1)))

    def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        old = self.base.num_embeddings
        known = self.base(jnp.minimum(ids, old - 1))
        # Two lookups: one in a joined table would copy it for every sample that has its own rows.
        new = jnp.take(self._strengthened(), jnp.maximum(ids - old, 0), axis=0, mode="clip")
        return jnp.where((ids < old)[..., None], known, new.astype(known.dtype))

    def merged(self) -> dict[str, Array]:
        table = self.base.embedding[...]
        return {"embedding": jnp.concatenate([table, self._strengthened().astype(table.dtype)])}

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        return {"embedding": merged["embedding"][: self.base.num_embeddings]}

    def _strengthened(self) -> Array:
        rows = self.rows[...]
        if isinstance(self.strength, float) and self.strength == 1:
            return rows
        start = self.base.embedding[...][self.start].astype(jnp.float32)
        return start + self.strength * (rows - start)
