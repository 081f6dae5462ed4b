"""Ways round what XLA's CPU compiler does slowly; elsewhere they are what they stand for.

`uniform` and `normal` are `jax.random`'s, the same numbers. JAX runs the twenty rounds of its
generator (Threefry-2x32: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") as a
loop over whole arrays on a CPU, so that it compiles quickly. Written out they take a tenth of that.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def settled(x: Array) -> Array:
    """x, computed in whole before anything reads it.

    XLA's CPU compiler merges what makes an array into what reads it, even where each element is
    read many times, or where a loop of the two no longer does 16 elements at once. It drops an
    `optimization_barrier` before that; what a loop reads stays apart.
    """
    if jax.default_backend() != "cpu" or not isinstance(x, jax.core.Tracer):
        return x
    return jax.lax.fori_loop(
        0, 2, lambda number, value: jnp.where(number < 1, x, value), jnp.zeros_like(x)
    )


def uniform(
    key: Array, shape: tuple[int, ...], *, minval: float = 0, maxval: float = 1
) -> Float[Array, "..."]:
    """`jax.random.uniform`."""
    if not _is_slow(key):
        return jax.random.uniform(key, shape, minval=minval, maxval=maxval)
    # 23 bits of a number in [1, 2).
    bits = (_bits(key, shape) >> 9) | np.float32(1).view(np.uint32)
    share = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1
    low, high = np.float32(minval), np.float32(maxval)
    return jnp.maximum(share * (high - low) + low, low)


def normal(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`jax.random.normal`."""
    if not _is_slow(key):
        return jax.random.normal(key, shape)
    least = np.nextafter(np.float32(-1), np.float32(0))
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(settled(uniform(key, shape, minval=least)))


def _is_slow(key: Array) -> bool:
    return jax.default_backend() == "cpu" and jax.random.key_impl(key) == "threefry2x32"


def _bits(key: Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """`jax.random.bits`: the two words of each number's place, encrypted with the key, combined."""
    first, second = jax.random.key_data(key)
    keys = first, second, first ^ second ^ _PARITY
    place = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32)
    # The high word of a place is 0: there are fewer than 2^32 numbers.
    high, low = jnp.broadcast_to(keys[0], place.shape), place + keys[1]
    for number in range(5):
        for turn in _ROTATIONS[number % 2]:
            high = high + low
            low = high ^ ((low << turn) | (low >> (32 - turn)))
        high = high + keys[(number + 1) % 3]
        low = low + keys[(number + 2) % 3] + np.uint32(number + 1)
    return (high ^ low).reshape(shape)
