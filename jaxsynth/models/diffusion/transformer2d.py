"""Attention over the positions of a feature map, with text as context (diffusers' names, NHWC).

This is where the denoiser reads the prompt (Rombach et al. 2022, arXiv 2112.10752, section 3.3):
self-attention, cross-attention to the text encoder's states and a gated feed-forward network.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers
from jaxsynth.ops.attention import attention


class Transformer2DModel(nnx.Module):
    """Norm, projection, transformer blocks over all positions, projection back, residual.

    Stable Diffusion 1.x projects with 1x1 convolutions and 2.x with linear layers: the same product
    under a kernel of another shape, so only the parameters tell.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        context_dim: int,
        groups: int,
        linear_projection: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.norm = layers.group_norm(groups, channels, epsilon=1e-6, **make)
        self.linear_projection = linear_projection
        self.proj_in = _projection(channels, linear_projection, **make)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(channels, heads=heads, context_dim=context_dim, **make)
            for _ in range(depth)
        )
        self.proj_out = _projection(channels, linear_projection, **make)

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.reshape(x.shape))


def _projection(channels: int, linear: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    if linear:
        return layers.Linear(channels, channels, dtype=dtype, rngs=rngs)
    return layers.conv2d(channels, channels, 1, dtype=dtype, rngs=rngs)


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward: each after a norm, each a residual."""

    def __init__(
        self, channels: int, *, heads: int, context_dim: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.layer_norm(channels, **make)
        self.attn1 = Attention(channels, heads=heads, context_dim=channels, **make)
        self.norm2 = layers.layer_norm(channels, **make)
        self.attn2 = Attention(channels, heads=heads, context_dim=context_dim, **make)
        self.norm3 = layers.layer_norm(channels, **make)
        self.ff = FeedForward(channels, **make)

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b n c"]:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Attention(nnx.Module):
    """Multi-head attention of `x` to `context`; the query, key and value layers have no bias."""

    def __init__(
        self, channels: int, *, heads: int, context_dim: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.heads = heads
        self.to_q = layers.Linear(channels, channels, use_bias=False, **make)
        self.to_k = layers.Linear(context_dim, channels, use_bias=False, **make)
        self.to_v = layers.Linear(context_dim, channels, use_bias=False, **make)
        self.to_out = nnx.List([layers.Linear(channels, channels, **make)])

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b n c"]:
        def split(values: Array) -> Array:
            return values.reshape(*values.shape[:2], self.heads, -1)

        out = attention(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        return self.to_out[0](out.reshape(x.shape))


class FeedForward(nnx.Module):
    """GEGLU, then back to the input's width; `net.1` is the reference's dropout, off here."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.net = nnx.List(
            [
                GEGLU(channels, 4 * channels, **make),
                nnx.Dropout(0.0),
                layers.Linear(4 * channels, channels, **make),
            ]
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.net[2](self.net[0](x))


class GEGLU(nnx.Module):
    """One half of a projection, gated by the GELU of the other (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, channels: int, inner: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = layers.Linear(channels, 2 * inner, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n i"]:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * layers.gelu(gate)
