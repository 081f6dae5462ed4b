"""Convolutional blocks that the autoencoder and the denoiser share (diffusers' names, NHWC).

The residual block is the one of DDPM (Ho et al. 2020, arXiv 2006.11239): norm, activation and
convolution twice, with the timestep's embedding added in between where there is one.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers


class ResnetBlock2D(nnx.Module):
    """Residual block; a 1x1 `conv_shortcut` carries the input where the channel count changes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        act_fn: str,
        time_channels: int | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        norm = {"epsilon": epsilon, "dtype": dtype, "rngs": rngs}
        conv = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.group_norm(groups, in_channels, **norm)
        self.conv1 = layers.conv2d(in_channels, out_channels, **conv)
        self.norm2 = layers.group_norm(groups, out_channels, **norm)
        self.conv2 = layers.conv2d(out_channels, out_channels, **conv)
        self.has_time = time_channels is not None
        if time_channels is not None:
            self.time_emb_proj = layers.Linear(time_channels, out_channels, **conv)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = layers.conv2d(in_channels, out_channels, 1, **conv)
        self.act = layers.activation(act_fn)

    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w o"]:
        hidden = self.conv1(self.act(self.norm1(x)))
        if self.has_time:
            hidden = hidden + self.time_emb_proj(self.act(time))[:, None, None]
        hidden = self.conv2(self.act(self.norm2(hidden)))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + hidden


class Downsample2D(nnx.Module):
    """Halves height and width with a strided convolution.

    `padding` 0 is the autoencoder's convention: one row and one column of zeros after the last
    only. The denoiser pads by `padding` on every side.
    """

    def __init__(self, channels: int, *, padding: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        pad = ((0, 1), (0, 1)) if padding == 0 else padding
        self.conv = layers.conv2d(channels, channels, stride=2, padding=pad, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour enlargement to `size` (twice the input by default), then a convolution."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = layers.conv2d(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 c"]:
        return self.conv(enlarge(x, size))


def enlarge(
    x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbour resize to `size`, or to twice the height and width."""
    batch, height, width, channels = x.shape
    if size is None or size == (2 * height, 2 * width):
        # A broadcast instead of a gather: its gradient is a plain sum.
        wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return wide.reshape(batch, 2 * height, 2 * width, channels)
    rows = np.arange(size[0]) * height // size[0]
    columns = np.arange(size[1]) * width // size[1]
    return x[:, rows][:, :, columns]
