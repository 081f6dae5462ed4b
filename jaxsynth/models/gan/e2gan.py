"""The image editor of E2GAN (Gong et al. 2024, arXiv 2401.06127): small, and told what to do.

Down-sampling, two residual blocks, once more down, one transformer block with self-attention and
cross-attention to the text, up, a residual block, and up to the image again. One network is trained
on several edits; a new edit is then LoRA on all but the residual blocks. Neither paper publishes
code or widths; with the defaults and a text of 768 channels (CLIP ViT-L's) there are 7.06 M
parameters, where "denoised neural weights" (arXiv 2407.11966) says the same.

Norms are per image (`norms.ChannelNorm`), so what an image becomes does not depend on its batch,
and only in the residual branches: a norm on the way itself takes each image's brightness and hue
from it. With norms everywhere a generator of 32-pixel images had a held-out L1 of 0.113 after 300
steps, so with 0.065, without any 0.077. Up-sampling repeats pixels before a convolution, which
leaves no checkerboards, and which adapters of convolutions can follow, as they cannot a transposed
one.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.core.limits import Count, Some
from jaxsynth.models import fields, layers
from jaxsynth.models.diffusion.blocks import enlarge
from jaxsynth.models.diffusion.transformer2d import BasicTransformerBlock
from jaxsynth.models.norms import ChannelNorm


@dataclasses.dataclass(frozen=True)
class E2GANConfig:
    """Shape of the generator.

    `widths` are those of the full image and of each halving before the residual blocks, which the
    transformer shares one halving deeper. `kernel_size` is that of the first and last convolution.
    `cross_attention_dim` is the width of the text's states.
    """

    widths: Annotated[tuple[Count, ...], Some()] = (64, 128, 256)
    kernel_size: Count = 7
    num_attention_heads: Count = 8
    cross_attention_dim: Count = 768
    in_channels: Count = 3
    out_channels: Count = 3

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"E2GANConfig.widths is {self.widths}, expected one or more widths")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"E2GANConfig.kernel_size is {self.kernel_size}, expected an odd size")
        if self.widths[-1] % self.num_attention_heads:
            raise ValueError(
                f"E2GANConfig.num_attention_heads: {self.num_attention_heads} heads do not divide "
                f"{self.widths[-1]} channels"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        return cls(**fields.known_fields(cls, config))

    @property
    def downscale(self) -> int:
        """Images' sides must be multiples of this."""
        return 2 ** len(self.widths)


class E2GAN(nnx.Module):
    """Edits images as a text says: `E2GAN(images, text states) -> images`."""

    def __init__(self, config: E2GANConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        """`dtype` is that of the computation; parameters are created in float32."""
        self.config = config
        make = {"dtype": dtype, "rngs": layers.InitKeys(rngs)}
        widths, deep = config.widths, config.widths[-1]
        pairs = list(itertools.pairwise(widths))
        self.conv_in = ConvBlock(config.in_channels, widths[0], config.kernel_size, **make)
        self.down = nnx.List(ConvBlock(a, b, stride=2, **make) for a, b in pairs)
        self.resnets = nnx.List(ResidualBlock(deep, **make) for _ in range(3))
        self.downsample = ConvBlock(deep, deep, stride=2, **make)
        self.transformer = BasicTransformerBlock(
            deep,
            heads=config.num_attention_heads,
            context_dim=config.cross_attention_dim,
            **make,
        )
        self.upsample = ConvBlock(deep, deep, **make)
        self.up = nnx.List(ConvBlock(b, a, **make) for a, b in reversed(pairs))
        self.conv_out = layers.conv2d(widths[0], config.out_channels, config.kernel_size, **make)

    def __call__(
        self, images: Float[Array, "b h w i"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b h w o"]:
        """Edited images in [-1, 1], from images in [-1, 1] and the states of the edits' texts.

        ValueError unless height and width are multiples of `config.downscale`.
        """
        multiple = self.config.downscale
        if images.shape[1] % multiple or images.shape[2] % multiple:
            raise ValueError(
                f"E2GAN: images of {images.shape[1:3]}, expected multiples of {multiple}"
            )
        x = self.conv_in(images)
        for block in self.down:
            x = block(x)
        x = self.resnets[1](self.resnets[0](x))
        low = self.downsample(x)
        tokens = low.reshape(low.shape[0], -1, low.shape[-1])
        low = self.transformer(tokens, context.astype(low.dtype)).reshape(low.shape)
        x = self.resnets[2](self.upsample(enlarge(low)))
        for block in self.up:
            x = block(enlarge(x))
        return jnp.tanh(self.conv_out(x))


class ConvBlock(nnx.Module):
    """Convolution, ReLU, and with `norm` a norm between them instead of the bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        norm: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = layers.conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            use_bias=not norm,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = ChannelNorm(out_channels, dtype=dtype) if norm else None

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        x = self.conv(x)
        return jax.nn.relu(x if self.norm is None else self.norm(x))


class ResidualBlock(nnx.Module):
    """The input and what two convolutions make of it (Johnson et al. 2016, arXiv 1603.08155)."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.block = ConvBlock(channels, channels, norm=True, dtype=dtype, rngs=rngs)
        self.conv = layers.conv2d(channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = ChannelNorm(channels, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x + self.norm(self.conv(self.block(x)))
