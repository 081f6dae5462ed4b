"""Edges, distances and histograms of one layer of 8-bit numbers, as OpenCV computes them.

Spatter's drops are shaded by them. All are written for a device: no queue of pixels, no pass from
pixel to pixel.
"""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsynth.ops.materialize import materialize

# tan(22.5 degrees) in units of 2^-15, as OpenCV's Canny rounds it.
_TAN_22 = round(np.tan(np.pi / 8) * 2**15)
# Costs of a step to the side, a diagonal, a knight's move: OpenCV's for 5 x 5 (Borgefors 1986).
_STEPS = (1.0, 1.4, 2.1969)


def canny(layer: Float[Array, "h w"], low: int, high: int) -> Bool[Array, "h w"]:
    """Canny's edges of whole numbers 0 to 255: Sobel slopes, |x| + |y|, thinned, hysteresis.

    Weak edges spread from strong ones, to all eight neighbours, until nothing changes.
    """
    around = jnp.pad(layer.astype(jnp.int32), 1, mode="edge")
    columns = around[:, 2:] - around[:, :-2]
    rows = around[2:] - around[:-2]
    right = columns[:-2] + 2 * columns[1:-1] + columns[2:]
    down = rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]
    steep, flat = jnp.abs(down), jnp.abs(right)
    size = steep + flat
    padded = materialize(jnp.pad(size, 1))

    def beside(y: int, x: int) -> Array:
        return padded[1 + y : 1 + y + size.shape[0], 1 + x : 1 + x + size.shape[1]]

    scaled, least = steep << 15, flat * _TAN_22
    across = scaled < least
    upright = scaled > least + (flat << 16)
    same = (right < 0) == (down < 0)
    diagonal = jnp.where(
        same,
        (size > beside(-1, -1)) & (size > beside(1, 1)),
        (size > beside(-1, 1)) & (size > beside(1, -1)),
    )
    thin = jnp.where(
        across,
        (size > beside(0, -1)) & (size >= beside(0, 1)),
        jnp.where(upright, (size > beside(-1, 0)) & (size >= beside(1, 0)), diagonal),
    )
    weak = thin & (size > low)

    def spread(state):
        edges, _ = state
        wider = weak & _grown(edges)
        return wider, (wider != edges).any()

    strong = thin & (size > high)
    return jax.lax.while_loop(lambda state: state[1], spread, (strong, jnp.array(True)))[0]


def _grown(mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    around = jnp.pad(mask, 1)
    rows = around[:-2] | around[1:-1] | around[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def chamfer(edges: Bool[Array, "h w"], farthest: float) -> Float[Array, "h w"]:
    """Distance to the nearest edge pixel in steps of 5 x 5, at most `farthest`.

    The shortest path that goes a up or down and b to the side is the largest of four sums of both:
    its steps' costs are a norm whose unit ball has 16 corners. It grows with b, so of each row only
    the edge pixel that is nearest to the side matters.
    """
    side, diagonal, knight = _STEPS
    corners = ((side, knight - 2 * side), (knight - diagonal, 2 * diagonal - knight))
    slopes = (*corners, *(corner[::-1] for corner in corners))
    beside = jnp.where(edges, 0, jnp.float32(farthest))
    for power in range(int(np.ceil(np.log2(max(farthest, 2))))):
        far = 2**power
        around = materialize(jnp.pad(beside, ((0, 0), (far, far)), constant_values=farthest))
        moved = jnp.minimum(around[:, : -2 * far], around[:, 2 * far :])
        beside = jnp.minimum(beside, moved + side * far)
    reach = int(np.ceil(farthest))
    around = materialize(jnp.pad(beside, ((reach, reach), (0, 0)), constant_values=farthest))

    def closer(number, distance):
        up = jnp.abs(number - reach).astype(jnp.float32)
        row = jax.lax.dynamic_slice_in_dim(around, number, len(edges))
        costs = (up * of_up + row * of_side for of_up, of_side in slopes)
        return jnp.minimum(distance, reduce(jnp.maximum, costs))

    start = jnp.full(edges.shape, farthest, jnp.float32)
    return jax.lax.fori_loop(0, 2 * reach + 1, closer, start)


def equalise(level: Float[Array, "h w"], most: int) -> Float[Array, "h w"]:
    """Histogram equalisation of whole numbers 0 to `most` to 0 to 255; the lowest becomes 0."""
    # In one sum for all of them the sums' last axis would be short, and each a plain loop.
    below = jax.lax.map(lambda number: (level <= number).sum(), jnp.arange(most + 1))
    lowest = jnp.take(below, level.min().astype(jnp.int32))
    rest = level.size - lowest
    table = jnp.round((below - lowest) * (255 / jnp.maximum(rest, 1)).astype(jnp.float32))
    # A layer of a single level stays as it is.
    table = jnp.where(rest > 0, table, jnp.arange(most + 1))
    return jnp.take(table, level.astype(jnp.int32))
