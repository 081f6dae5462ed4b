"""Norms of each channel over the pixels of an image, or of a batch of images (NHWC).

Image-to-image networks take their statistics from the images at hand, in training and after it:
pix2pix runs its batch norm with the test batch's own statistics (Isola et al. 2017, arXiv
1611.07004, section 3.3), which for one image is instance norm (Ulyanov et al. 2016, arXiv
1607.08022). So `ChannelNorm` keeps no running averages, and is the same in training and in use. The
classifiers' `BatchNorm` applies stored statistics, and in training those of the batch at hand.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Statistics = Literal["stored", "batch", "recorded"]
Over = Literal["batch", "instance"]
OVER: tuple[Over, ...] = ("batch", "instance")


class ChannelNorm(nnx.Module):
    """Each channel to mean 0 and variance 1 over `over`, then (if `affine`) scaled and shifted.

    "instance" takes each image's own statistics, "batch" those of all images that are given
    together. Statistics in float32; the variance divides by the count, as torch's norms do.
    """

    def __init__(
        self,
        channels: int,
        *,
        over: Over = "instance",
        affine: bool = True,
        epsilon: float = 1e-5,
        dtype: jnp.dtype,
    ):
        if over not in OVER:
            raise ValueError(f"ChannelNorm: over {over!r}, expected one of {', '.join(OVER)}")
        self.axes = (0, 1, 2) if over == "batch" else (1, 2)
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones(channels)) if affine else None
        self.bias = nnx.Param(jnp.zeros(channels)) if affine else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(self.axes, keepdims=True)
        variance = jnp.square(centred).mean(self.axes, keepdims=True)
        factor = jax.lax.rsqrt(variance + self.epsilon)
        if self.scale is None or self.bias is None:
            return (centred * factor).astype(self.dtype)
        return (centred * (factor * self.scale[...]) + self.bias[...]).astype(self.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation by stored statistics, or in training by those of the batch.

    `statistics`: "stored" ones, those of the "batch", or those of the batch "recorded" in the place
    of the stored ones. Training keeps no running average: which statistics a trained network is
    used with is decided afterwards, from as many batches as one likes (`tasks.networks.settled`). A
    batch that is cut over devices has one mean all the same.
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.statistics: Statistics = "stored"
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.running_mean = nnx.BatchStat(jnp.zeros(channels))
        self.running_var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        mean, variance = self.running_mean[...], self.running_var[...]
        if self.statistics != "stored":
            wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            variance = jnp.square(wide - mean).mean(axes)
        if self.statistics == "recorded":
            self.running_mean[...], self.running_var[...] = mean, variance
        factor = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        shift = self.bias[...] - mean * factor
        return x * factor.astype(x.dtype) + shift.astype(x.dtype)
