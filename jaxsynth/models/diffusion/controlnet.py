"""ControlNet: a trainable copy of the denoiser's encoder that reads a condition image.

The copy sees the same noisy sample, timestep and text, and the condition through a small
convolutional network; each of its outputs passes a 1x1 convolution and is added to a skip
connection of the frozen denoiser (Zhang, Rao and Agrawala 2023, arXiv 2302.05543, section 3). These
convolutions start at zero, so that training starts from the denoiser as it was. Structure and
weight names are those of diffusers' `ControlNetModel`, in NHWC.

    control = controlnet(sample, timesteps, text, condition, conditioning_scale=0.8)
    unet(
        sample,
        timesteps,
        text,
        down_block_additional_residuals=control.down_block_res_samples,
        mid_block_additional_residual=control.mid_block_res_sample,
    )
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models import fields, layers
from jaxsynth.models.diffusion.unet import (
    IGNORED,
    ONLY,
    AddedEmbedding,
    DownBlock,
    EncoderConfig,
    MidBlock,
    TimestepEmbedding,
    UNet2DCondition,
    embed_time,
    encode,
)

# As for the denoiser, what diffusers' class can do and this one does not.
_ONLY = {
    **ONLY,
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}
# Stable Diffusion's embedding; each entry after the first halves the condition's height and width.
EMBEDDING_CHANNELS = (16, 32, 96, 256)
# What is a copy of the denoiser's.
_COPIED = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """Shape of a ControlNet; field names and defaults are diffusers'.

    `conditioning_embedding_out_channels` of length n make the condition smaller by 2^(n - 1), which
    must be the autoencoder's factor: Stable Diffusion's four entries belong to a factor of 8.
    """

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = EMBEDDING_CHANNELS

    def __post_init__(self):
        super().__post_init__()
        # diffusers' class knows one number for all levels, so no other could be exported.
        if not isinstance(self.layers_per_block, int):
            raise ValueError(
                f"ControlNetConfig.layers_per_block: expected an int, got {self.layers_per_block}"
            )
        if not self.conditioning_embedding_out_channels:
            raise ValueError("ControlNetConfig.conditioning_embedding_out_channels: is empty")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a ControlNet's config.json; an unknown field or value is a ValueError naming it."""
        return cls(**fields.known_fields(cls, config, only=_ONLY, ignored=IGNORED))

    @property
    def downscale(self) -> int:
        """Pixels of the condition per latent along one side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


def embedding_channels(downscale: int) -> tuple[int, ...]:
    """The first entries of Stable Diffusion's embedding, as many as give a factor of 1 to 8.

    Raises ValueError for a factor that they cannot give.
    """
    count = downscale.bit_length()
    if downscale != 2 ** (count - 1) or count > len(EMBEDDING_CHANNELS):
        raise ValueError(f"embedding_channels: a factor of {downscale}, expected 1, 2, 4 or 8")
    return EMBEDDING_CHANNELS[:count]


class ControlNetOutput(NamedTuple):
    """What to add to the denoiser's skip connections, in the order they are made, and middle."""

    down_block_res_samples: list[Float[Array, "b _h _w _c"]]
    mid_block_res_sample: Float[Array, "b h w c"]


class ControlNet(nnx.Module):
    """The residuals by which a condition image steers a denoiser."""

    def __init__(self, config: ControlNetConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        """`dtype` is that of the computation; parameters are created in float32."""
        self.config = config
        self.dtype = dtype
        make = {"dtype": dtype, "rngs": layers.InitKeys(rngs)}
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = layers.conv2d(config.in_channels, widths[0], **make)
        self.time_embedding = TimestepEmbedding(config, **make)
        if config.addition_embed_type:
            self.add_embedding = AddedEmbedding(config, **make)
        self.down_blocks = nnx.List(
            DownBlock(config, level, downsample=level < last, **make) for level in range(last + 1)
        )
        self.mid_block = MidBlock(config, **make)
        self.controlnet_cond_embedding = ConditioningEmbedding(config, **make)
        self.controlnet_down_blocks, self.controlnet_mid_block = _zero_convs(config, **make)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DCondition,
        *,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: Sequence[int] = EMBEDDING_CHANNELS,
        rngs: nnx.Rngs,
    ) -> Self:
        """A ControlNet with the denoiser's encoder, zero convolutions and a fresh embedding.

        It shares arrays but no variable with `unet`; what is new is float32. Raises ValueError if
        the first convolution is not 3x3, as every ControlNet's is, if levels have different numbers
        of layers, or if the encoder has adapter layers: merge those first.
        """
        if unet.config.conv_in_kernel != 3:
            raise ValueError(
                f"from_unet: conv_in_kernel is {unet.config.conv_in_kernel}, a ControlNet's is 3"
            )
        shared = {
            field.name: getattr(unet.config, field.name)
            for field in dataclasses.fields(EncoderConfig)
        }
        config = ControlNetConfig(
            **shared,
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels),
        )
        # Abstract, so that the large copied part is not drawn at random first.
        model = nnx.eval_shape(lambda: cls(config, dtype=unet.dtype, rngs=nnx.Rngs(0)))
        encoder = nnx.state(unet, lambda path, _: path[0] in _COPIED)
        expected = nnx.state(model, lambda path, _: path[0] in _COPIED)
        if jax.tree.structure(encoder) != jax.tree.structure(expected):
            raise ValueError("from_unet: the encoder has adapter layers; merge them first")
        nnx.update(model, encoder)
        make = {"dtype": unet.dtype, "rngs": layers.InitKeys(rngs)}
        model.controlnet_cond_embedding = ConditioningEmbedding(config, **make)
        model.controlnet_down_blocks, model.controlnet_mid_block = _zero_convs(config, **make)
        return model

    def __call__(
        self,
        sample: Float[Array, "b h w i"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        encoder_hidden_states: Float[Array, "b t d"],
        controlnet_cond: Float[Array, "b h2 w2 k"],
        *,
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b s"] | None = None,
        conditioning_scale: float | Float[Array, ""] = 1.0,
        guess_mode: bool = False,
        remat: str | None = None,
    ) -> ControlNetOutput:
        """Residuals for the denoiser at `sample`, times `conditioning_scale`.

        `controlnet_cond` is a condition in [0, 1], `config.downscale` times as high and wide as the
        sample; ValueError if it is not. `guess_mode` lets the residuals grow from a tenth at the
        widest feature map to their full size in the middle, for use without prompts.
        `text_embeds`, `time_ids` and `remat` as in the denoiser.
        """
        time = embed_time(self, timesteps, text_embeds, time_ids)
        context = encoder_hidden_states.astype(self.dtype)
        x = self.conv_in(sample)
        condition = self.controlnet_cond_embedding(controlnet_cond)
        if condition.shape != x.shape:
            factor, (_, height, width, _) = self.config.downscale, sample.shape
            raise ValueError(
                f"controlnet_cond has shape {controlnet_cond.shape}, expected "
                f"{(len(x), height * factor, width * factor, self.config.conditioning_channels)} "
                f"for a sample of shape {sample.shape}"
            )
        x, skips = encode(self, x + condition, time, context, remat=remat)
        convs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        residuals = [conv(made) for conv, made in zip(convs, [*skips, x], strict=True)]
        scales = np.logspace(-1, 0, len(residuals)) if guess_mode else np.ones(len(residuals))
        *down, mid = [
            residual * jnp.asarray(conditioning_scale * scale, residual.dtype)
            for residual, scale in zip(residuals, scales, strict=True)
        ]
        return ControlNetOutput(down, mid)


class ConditioningEmbedding(nnx.Module):
    """From the pixels of a condition to the denoiser's first feature map; zero at the start.

    A pair of convolutions per entry of `conditioning_embedding_out_channels` after the first, the
    second of stride 2, with SiLU between all (diffusers' `ControlNetConditioningEmbedding`).
    """

    def __init__(self, config: ControlNetConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        widths = config.conditioning_embedding_out_channels
        self.conv_in = layers.conv2d(config.conditioning_channels, widths[0], **make)
        self.blocks = nnx.List(
            conv
            for narrow, wide in itertools.pairwise(widths)
            for conv in (
                layers.conv2d(narrow, narrow, **make),
                layers.conv2d(narrow, wide, stride=2, **make),
            )
        )
        self.conv_out = zero_conv(widths[-1], config.block_out_channels[0], 3, **make)

    def __call__(self, condition: Float[Array, "b h w k"]) -> Float[Array, "b h2 w2 c"]:
        x = jax.nn.silu(self.conv_in(condition))
        for conv in self.blocks:
            x = jax.nn.silu(conv(x))
        return self.conv_out(x)


def zero_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Conv:
    """A convolution whose kernel and bias start at zero."""
    zeros = nnx.initializers.zeros
    make = {"kernel_init": zeros, "dtype": dtype, "rngs": rngs}
    return layers.conv2d(in_channels, out_channels, kernel_size, **make)


def _zero_convs(
    config: ControlNetConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> tuple[nnx.List, nnx.Conv]:
    """One for each skip connection, in the order they are made, and the middle's."""
    widths = config.block_out_channels
    skips = [widths[0]]
    for level, width in enumerate(widths):
        # The level's layers, and its downsampler unless it is the last.
        skips += [width] * (config.layers_per_block + (level < len(widths) - 1))
    make = {"dtype": dtype, "rngs": rngs}
    down = nnx.List(zero_conv(width, width, 1, **make) for width in skips)
    return down, zero_conv(widths[-1], widths[-1], 1, **make)
