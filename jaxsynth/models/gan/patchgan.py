"""PatchGAN: a discriminator that judges every patch of a pair of images (Isola et al. 2017).

Strided convolutions see an image beside the one that it was made from, and say for each patch
whether the pair is real (arXiv 1611.07004, section 3.2.2). Structure as in the authors' PyTorch
code: the defaults judge patches of 70 x 70 pixels.

With `text_dim` it also knows which edit was asked for, and one discriminator serves many: the last
features' product with a projection of the text is added to every patch's logit (the projection
discriminator, Miyato and Koyama 2018, arXiv 1802.05637).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.core.limits import Count, Natural
from jaxsynth.models import fields, layers
from jaxsynth.models.norms import OVER, ChannelNorm, Over

# The initialisation of pix2pix: normal with this standard deviation.
INIT = nnx.initializers.normal(0.02)
SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class PatchGANConfig:
    """Shape of the discriminator.

    `n_layers` convolutions halve the image and one more does not; widths start at `ndf` and double
    up to eight times that. `in_channels` are those of the pair. `text_dim` 0 takes no text.
    """

    in_channels: Count = 6
    ndf: Count = 64
    n_layers: Count = 3
    norm: Over = "batch"
    text_dim: Natural = 0

    def __post_init__(self):
        for name in ("in_channels", "ndf", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"PatchGANConfig.{name} is {getattr(self, name)}, expected >= 1")
        if self.norm not in OVER:
            raise ValueError(f"PatchGANConfig.norm is {self.norm!r}, expected one of {OVER}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        return cls(**fields.known_fields(cls, config))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each convolution but the last."""
        return tuple(self.ndf * min(2**n, 8) for n in range(self.n_layers + 1))


class PatchGAN(nnx.Module):
    """Logits of patches: `PatchGAN(source, image[, text]) -> (b, h2, w2, 1)`, positive for real."""

    def __init__(self, config: PatchGANConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        """`dtype` is that of the computation; parameters are created in float32."""
        self.config = config
        make = {"dtype": dtype, "rngs": layers.InitKeys(rngs), "kernel_init": INIT}
        widths, affine = config.widths, config.norm == "batch"
        inputs = (config.in_channels, *widths)
        self.convs = nnx.List(
            layers.conv2d(
                inputs[n],
                width,
                4,
                stride=2 if n < config.n_layers else 1,
                padding=1,
                # A norm without a shift of its own follows, or none at all.
                use_bias=n == 0 or not affine,
                **make,
            )
            for n, width in enumerate(widths)
        )
        self.norms = nnx.List(
            ChannelNorm(width, over=config.norm, affine=affine, dtype=dtype) for width in widths[1:]
        )
        self.conv_out = layers.conv2d(widths[-1], 1, 4, padding=1, **make)
        if config.text_dim:
            self.text = layers.Linear(config.text_dim, widths[-1], **make)

    def __call__(
        self,
        source: Float[Array, "b h w i"],
        image: Float[Array, "b h w j"],
        text: Float[Array, "b t"] | None = None,
    ) -> Float[Array, "b h2 w2 1"]:
        """`text` is one vector a pair. ValueError if it is missing or was not expected."""
        if (text is None) == bool(self.config.text_dim):
            raise ValueError(
                f"PatchGAN: text_dim is {self.config.text_dim}, and text is "
                f"{'missing' if text is None else 'given'}"
            )
        x = jnp.concatenate([source, image], axis=-1)
        for n, conv in enumerate(self.convs):
            x = conv(x)
            if n:
                x = self.norms[n - 1](x)
            x = jax.nn.leaky_relu(x, SLOPE)
        logits = self.conv_out(x)
        if text is None:
            return logits
        asked = self.text(text).astype(x.dtype)
        match = jnp.einsum("bhwc,bc->bhw", x, asked)[..., None]
        if match.shape != logits.shape:  # the last convolution's patches are one pixel fewer
            match = match[:, : logits.shape[1], : logits.shape[2]]
        return logits + match
