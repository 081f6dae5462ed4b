"""Nearest neighbours between two feature sets, block by block.

Precision, recall, density and coverage need every pairwise distance of up to 50,000 by 50,000
features, 10 GB in float32, but only a few numbers of each row or column. So a block of rows meets
the columns a block at a time, and what is kept is a running minimum, count or k smallest.

Squared distances come from one matrix product, |x|^2 + |y|^2 - 2 x.y in float32, which rounds by
about 1e-7 of the squared norms: callers subtract a common mean first. One compiled program makes
them all, so that radii and distances of identical sets agree to the bit and their ties stay ties.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

ROWS, COLUMNS = 1024, 4096


class Neighbourhoods(NamedTuple):
    """How the balls around n `reference` and m `query` features hold the other set.

    `covered`: per query, whether a reference ball holds it. `inside`: per query, how many balls of
    the second radius do. `reached`: per reference, whether a query's ball holds it. `nearest`: per
    reference, the squared distance to the nearest query.
    """

    covered: Bool[np.ndarray, " m"]
    inside: Int[np.ndarray, " m"]
    reached: Bool[np.ndarray, " n"]
    nearest: Float[np.ndarray, " n"]


def neighbour_radii(x: Float[np.ndarray, "n d"], largest: int) -> Float[np.ndarray, "n largest"]:
    """Squared distances from each row to its 1st, 2nd, ... `largest`-th nearest other row.

    Another row that is equal counts, at distance 0. Needs n > largest.
    """
    if not 0 < largest < len(x):
        raise ValueError(f"neighbour_radii: the {largest}-th nearest of {len(x)} features")
    radii, blocks = [], list(_blocks(x, COLUMNS))
    for row, rows in _blocks(x, ROWS):
        best = jnp.full((len(rows), largest), jnp.inf)
        for column, columns in blocks:
            best = _keep_smallest(best, _squared(rows, columns), row, column, len(x))
        radii.append(np.asarray(best))
    return np.concatenate(radii)[: len(x)]


def neighbourhoods(
    reference: Float[np.ndarray, "n d"],
    query: Float[np.ndarray, "m d"],
    *,
    closed: Float[np.ndarray, " n"],
    opened: Float[np.ndarray, " n"],
    query_closed: Float[np.ndarray, " m"],
) -> Neighbourhoods:
    """Who lies in whose ball; radii are squared.

    `closed` balls (distance <= radius) decide `covered`, `opened` ones (<) `inside`, and the
    queries' `query_closed` ones `reached`.
    """
    # Rows and columns that fill a block up have negative radii: their balls are empty.
    radii = np.stack([closed, opened], axis=1)
    own = dict(_blocks(radii, ROWS, fill=-1.0))
    theirs = dict(_blocks(query_closed[:, None], COLUMNS, fill=-1.0))
    covered, inside = np.zeros(len(query), bool), np.zeros(len(query), np.int64)
    reached, nearest, blocks = [], [], list(_blocks(query, COLUMNS))
    for row, rows in _blocks(reference, ROWS):
        found = jnp.zeros(len(rows), bool), jnp.full(len(rows), jnp.inf)
        for column, columns in blocks:
            here = slice(column, min(column + len(columns), len(query)))
            found, held, counts = _meet(
                found, _squared(rows, columns), own[row], theirs[column], here.stop - column
            )
            covered[here] |= np.asarray(held)[: here.stop - column]
            inside[here] += np.asarray(counts)[: here.stop - column]
        reached.append(np.asarray(found[0]))
        nearest.append(np.asarray(found[1]))
    count = len(reference)
    return Neighbourhoods(
        covered, inside, np.concatenate(reached)[:count], np.concatenate(nearest)[:count]
    )


def _blocks(x: np.ndarray, limit: int, fill: float = 0.0) -> Iterator[tuple[int, Array]]:
    """(first row, block) in float32, all blocks of one size: the last is filled up.

    The size is the power of two that holds all rows, up to `limit`: few shapes to compile.
    """
    size = min(limit, 1 << max(len(x) - 1, 1).bit_length())
    for start in range(0, len(x), size):
        rows = np.asarray(x[start : start + size], np.float32)
        missing = size - len(rows)
        yield start, jnp.asarray(np.pad(rows, ((0, missing), (0, 0)), constant_values=fill))


@jax.jit
def _squared(a: Float[Array, "r d"], b: Float[Array, "c d"]) -> Float[Array, "r c"]:
    product = jnp.matmul(a, b.T, precision="highest")
    lengths = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None]
    return jnp.maximum(lengths - 2 * product, 0)


@jax.jit
def _keep_smallest(best: Array, distances: Array, row: int, column: int, count: int) -> Array:
    """The smallest of each row, ascending, without the row itself and what fills a block up."""
    rows, columns = row + jnp.arange(len(distances)), column + jnp.arange(distances.shape[1])
    excluded = (rows[:, None] == columns[None]) | (columns >= count)[None]
    both = jnp.concatenate([best, jnp.where(excluded, jnp.inf, distances)], axis=1)
    return -jax.lax.top_k(-both, best.shape[1])[0]


@jax.jit
def _meet(found, distances: Array, radii: Array, column_radii: Array, count: int):
    """((reached, nearest) of the rows so far, covered and inside of the columns by these rows)."""
    reached = found[0] | (distances <= column_radii[None, :, 0]).any(1)
    valid = jnp.arange(distances.shape[1]) < count
    nearest = jnp.minimum(found[1], jnp.where(valid[None], distances, jnp.inf).min(1))
    covered = (distances <= radii[:, :1]).any(0)
    inside = (distances < radii[:, 1:]).sum(0)
    return (reached, nearest), covered, inside
