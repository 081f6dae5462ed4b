"""New words for a text encoder: rows after its table of token embeddings (Textual Inversion).

Textual Inversion (Gal et al. 2022, arXiv:2208.01618) learns the embedding of a new word, or of
several tokens that it stands for, and nothing else. The rows are the only `Trainable` ones, so that
no optimizer, weight decay or average can move a bit of any other; implementations that train the
whole table have to put the other rows back after every step.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.surgery.class_rows import ExtendedTable, extend_table

# Where text encoders have their table, in the names of Hugging Face.
TABLE = "token_embedding"


def add_rows(text_encoder: inject.T, count: int, *, start: int) -> inject.T:
    """A copy with `count` trainable rows after the table, all of which start as row `start`.

    Raises ValueError as `extend_table`.
    """
    return extend_table(text_encoder, TABLE, count, start=start)


def new_rows(model: nnx.Module) -> Float[Array, "n d"]:
    """What the rows of `add_rows` have become; ValueError where the network has none."""
    for path, layer in inject.layers(model).items():
        if isinstance(layer, ExtendedTable) and inject.matches(TABLE, path):
            return layer.rows[...]
    raise ValueError(f"new_rows: no {TABLE} here has new rows")


def with_rows(text_encoder: inject.T, rows: Float[Array, "n d"]) -> inject.T:
    """A copy whose table has these rows after its own, frozen; ValueError for another width."""
    found = []

    def lengthen(path: str, layer: Any) -> Any:
        if not inject.matches(TABLE, path):
            return layer
        table = layer.embedding[...]
        if rows.shape[-1] != table.shape[-1]:
            raise ValueError(f"{path}: rows of width {rows.shape[-1]}, expected {table.shape[-1]}")
        found.append(path)
        longer = jnp.concatenate([table, jnp.asarray(rows, table.dtype)])
        return inject.with_params(layer, {"embedding": longer})

    longer = inject.map_layers(lengthen, text_encoder)
    if not found:
        raise ValueError(f"with_rows: no {TABLE} in this network")
    return longer
