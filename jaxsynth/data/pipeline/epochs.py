"""The order in which a compiled training loop goes through data that lies on the devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def epoch_rows(
    key: Key[Array, ""], step: Int[Array, ""], count: int, batch_size: int
) -> Int[Array, " b"]:
    """The rows of one batch: every epoch is a fresh order, its last batch filled from its start."""
    per_epoch = -(-count // batch_size)
    order = jax.random.permutation(jax.random.fold_in(key, step // per_epoch), count)
    order = jnp.resize(order, per_epoch * batch_size)
    return jax.lax.dynamic_slice(order, ((step % per_epoch) * batch_size,), (batch_size,))
