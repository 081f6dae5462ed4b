"""A network of a few thousand parameters with a convolution, a group norm and attention.

The layers have diffusers' names, so the UNet's sharding table applies to it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.models import layers
from jaxsynth.ops.attention import attention

CHANNELS = 16
HEADS = 4


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.to_q, self.to_k, self.to_v = (
            layers.Linear(CHANNELS, CHANNELS, use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.to_out = nnx.List([layers.Linear(CHANNELS, CHANNELS, rngs=rngs)])

    def __call__(self, x):
        b, t, c = x.shape
        q, k, v = (f(x).reshape(b, t, HEADS, c // HEADS) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](attention(q, k, v).reshape(b, t, c))


class SmallNet(nnx.Module):
    """(b, 4, 4, 3) images to (b, 4, 4, 3)."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv_in = layers.conv2d(3, CHANNELS, dtype=jnp.float32, rngs=rngs)
        self.norm = layers.group_norm(4, CHANNELS, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.attn = Attention(rngs)
        self.conv_out = layers.conv2d(CHANNELS, 3, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x):
        h = nnx.silu(self.norm(self.conv_in(x)))
        tokens = h.reshape(h.shape[0], -1, CHANNELS)
        return self.conv_out(h + self.attn(tokens).reshape(h.shape))


@jax.jit
def _parameters(key):
    return nnx.state(SmallNet(nnx.Rngs(key)))


def make(seed: int = 0):
    """(graphdef, parameters) of a network."""
    return nnx.graphdef(nnx.eval_shape(lambda: SmallNet(nnx.Rngs(0)))), _parameters(
        jax.random.key(seed)
    )


def make_loss(graphdef, noise: float = 0.0):
    """A loss over all parameters; `noise` makes it depend on the step's key."""

    def loss_fn(trainable, frozen, batch, key):
        x = batch["x"] + noise * jax.random.normal(key, batch["x"].shape)
        error = nnx.merge(graphdef, trainable)(x) - batch["y"]
        return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}

    return loss_fn


def batch(seed: int, rows: int = 8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal((2, rows, 4, 4, 3)).astype(np.float32)
    return {"x": draw[0], "y": draw[1]}


class Batches:
    """A different batch each step, with a place that can be saved; `end` limits their number."""

    def __init__(self, rows: int = 8, end: int | None = None):
        self.rows, self.end, self.index = rows, end, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.index == self.end:
            raise StopIteration
        self.index += 1
        return batch(self.index, self.rows)

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]
