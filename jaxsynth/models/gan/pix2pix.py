"""The generator of pix2pix (Isola et al. 2017, arXiv 1611.07004): a U-Net from image to image.

Halved by strided convolutions down to one pixel and doubled back by transposed ones, every level
joined to its mirror by a skip connection. Structure and initialisation as in the authors' PyTorch
code; its noise is dropout, in some of the levels on the way up. Here it is the baseline that learns
each edit from nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxsynth.core.limits import BelowOne, Count
from jaxsynth.models import fields, layers
from jaxsynth.models.gan.patchgan import INIT, SLOPE
from jaxsynth.models.norms import OVER, ChannelNorm, Over

# Levels near the image, of growing width; dropout is between them and the innermost level.
_OUTER = 4


@dataclasses.dataclass(frozen=True)
class Pix2PixConfig:
    """Shape of the generator: `num_downs` halvings, widths from `ngf` doubling up to eight times.

    The defaults are for images of 256 pixels, U-Net-256 of the paper. `dropout` is off unless the
    call has a key.
    """

    num_downs: Count = 8
    ngf: Count = 64
    norm: Over = "batch"
    dropout: BelowOne = 0.5
    in_channels: Count = 3
    out_channels: Count = 3

    def __post_init__(self):
        if self.num_downs < 2:
            raise ValueError(f"Pix2PixConfig.num_downs is {self.num_downs}, expected at least 2")
        if self.norm not in OVER:
            raise ValueError(f"Pix2PixConfig.norm is {self.norm!r}, expected one of {OVER}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Pix2PixConfig.dropout is {self.dropout}, expected 0 <= dropout < 1")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        return cls(**fields.known_fields(cls, config))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each halving."""
        return tuple(self.ngf * min(2**n, 8) for n in range(self.num_downs))


class Pix2Pix(nnx.Module):
    """`Pix2Pix(images) -> images`, both in [-1, 1]."""

    def __init__(self, config: Pix2PixConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        """`dtype` is that of the computation; parameters are created in float32."""
        self.config = config
        rngs = layers.InitKeys(rngs)
        widths, affine = config.widths, config.norm == "batch"
        last = config.num_downs - 1
        self.down = nnx.List(
            layers.conv2d(
                config.in_channels if n == 0 else widths[n - 1],
                width,
                4,
                stride=2,
                padding=1,
                use_bias=not affine,
                kernel_init=INIT,
                dtype=dtype,
                rngs=rngs,
            )
            for n, width in enumerate(widths)
        )
        # From the innermost level out; each but the innermost also reads a skip connection.
        self.up = nnx.List(
            nnx.ConvTranspose(
                widths[n] * (1 if n == last else 2),
                config.out_channels if n == 0 else widths[n - 1],
                (4, 4),
                strides=2,
                padding="SAME",
                use_bias=n == 0 or not affine,
                kernel_init=INIT,
                dtype=dtype,
                rngs=rngs,
            )
            for n in reversed(range(config.num_downs))
        )
        # The first convolution has no norm, and the innermost one has a single pixel to its name.
        norm = {"over": config.norm, "affine": affine, "dtype": dtype}
        self.down_norms = nnx.List(ChannelNorm(width, **norm) for width in widths[1:-1])
        self.up_norms = nnx.List(ChannelNorm(width, **norm) for width in reversed(widths[:-1]))

    def __call__(
        self, images: Float[Array, "b h w i"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w o"]:
        """The images' counterparts; `key` draws the dropout, without it there is none.

        ValueError unless height and width are multiples of 2**num_downs.
        """
        count = self.config.num_downs
        if images.shape[1] % 2**count or images.shape[2] % 2**count:
            raise ValueError(
                f"Pix2Pix: images of {images.shape[1:3]}, expected multiples of {2**count}"
            )
        x, skips = images, []
        for n, conv in enumerate(self.down):
            x = conv(x if n == 0 else jax.nn.leaky_relu(x, SLOPE))
            if 0 < n < count - 1:
                x = self.down_norms[n - 1](x)
            skips.append(x)
        x = skips.pop()
        for n, norm in enumerate(self.up_norms):
            x = norm(self.up[n](jax.nn.relu(x)))
            if key is not None and 0 < n < count - _OUTER:
                x = self._drop(x, jax.random.fold_in(key, n))
            x = jnp.concatenate([skips.pop(), x], axis=-1)
        return jnp.tanh(self.up[-1](jax.nn.relu(x)))

    def _drop(self, x: Array, key: Array) -> Array:
        if self.config.dropout == 0:
            return x
        keep = 1 - self.config.dropout
        return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0).astype(x.dtype)
