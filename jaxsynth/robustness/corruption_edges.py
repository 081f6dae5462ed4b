"""Edges, distances and histograms of one layer of 8-bit numbers, as OpenCV computes them.

Spatter's drops are shaded by them. All are written for a device: no queue of pixels, no pass from
pixel to pixel.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsynth.robustness.cpu import settled

# tan(22.5 degrees) in units of 2^-15, as OpenCV's Canny rounds it.
_TAN_22 = round(np.tan(np.pi / 8) * 2**15)
# Costs of a step to the side, a diagonal, a knight's move: OpenCV's for 5 x 5 (Borgefors 1986).
_STEPS = (1.0, 1.4, 2.1969)
_SIGNS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


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
    padded = jnp.pad(size, 1)

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

    A shortest path is so many steps one way and so many a neighbouring way. Two rounds of steps of
    1, 2, 4, ... times each way, each round with one of them or none, make every such path of up to
    `farthest` pixels.
    """
    side, diagonal, knight = _STEPS
    moves = ((0, 1, side), (1, 0, side), (1, 1, diagonal), (1, 2, knight), (2, 1, knight))
    ways = sorted({(y * up, x * left, cost) for y, x, cost in moves for up, left in _SIGNS})
    powers = int(np.log2(max(farthest, 1))) + 1
    reach = 2 * 2 ** (powers - 1)

    def take(number, distance):
        length = 1 << number // 2
        around = settled(jnp.pad(distance, reach, constant_values=farthest))
        for y, x, cost in ways:
            start = reach + length * y, reach + length * x
            beside = jax.lax.dynamic_slice(around, start, distance.shape)
            distance = jnp.minimum(distance, beside + length * np.float32(cost))
        return distance

    start = jnp.where(edges, 0, jnp.float32(farthest))
    return jax.lax.fori_loop(0, 2 * powers, take, start)


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
