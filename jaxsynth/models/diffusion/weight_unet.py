"""The UNet over one block of weights: from noise, a block's number and a text to its values.

Gong et al. 2024 (Efficient Training with Denoised Neural Weights, arXiv 2407.11966): residual and
transformer blocks at three resolutions, the lowest one residual - transformer - residual, skips at
each. The sum of the embeddings of the time and of the block's number enters every residual block;
the text enters every transformer block by cross-attention. Blocks are made independently of each
other: all of a concept's go through as one batch.

The paper gives no widths. Two things are added that it does not tell of. `patch_size` neighbouring
values enter as one position, as in DiT, because at one value a position most of the work would go
into positions. And a table of positions is added, because a weight's place in a layer matters, and
convolutions and attention alone would treat all places alike.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.core.limits import Count, Some
from jaxsynth.models import fields, layers
from jaxsynth.models.diffusion.transformer2d import Transformer2DModel
from jaxsynth.ops.backend import backend


@dataclass(frozen=True)
class WeightUNetConfig:
    """`sample_size` is the number of values in a block; `cross_attention_dim` is the text's."""

    sample_size: Count = 256
    patch_size: Count = 1
    block_out_channels: Annotated[tuple[Count, ...], Some()] = (128, 256, 512)
    attention_head_dim: Count = 64
    transformer_layers_per_block: Count = 1
    cross_attention_dim: Count = 768
    norm_num_groups: Count = 32

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        levels = len(self.block_out_channels)
        if levels < 2:
            raise ValueError(
                f"WeightUNetConfig.block_out_channels: {list(self.block_out_channels)}, expected "
                "at least two levels"
            )
        step = self.patch_size * 2 ** (levels - 1)
        if self.patch_size < 1 or self.sample_size % step:
            raise ValueError(
                f"WeightUNetConfig: sample_size {self.sample_size} is not divisible by {step}, "
                f"which is patch_size {self.patch_size} halved at {levels} levels"
            )
        fields.check_groups("WeightUNetConfig", self.norm_num_groups, self.block_out_channels)
        for channels in self.block_out_channels:
            if channels % self.attention_head_dim:
                raise ValueError(
                    f"WeightUNetConfig.attention_head_dim: {self.attention_head_dim} does not "
                    f"divide {channels} of block_out_channels"
                )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "WeightUNetConfig":
        """From a config.json; ValueError naming a field that is unknown or does not fit."""
        return cls(**fields.known_fields(cls, config))

    @property
    def positions(self) -> int:
        """The positions of the highest resolution."""
        return self.sample_size // self.patch_size

    @property
    def embedding_channels(self) -> int:
        return 4 * self.block_out_channels[0]


class WeightUNet(nnx.Module):
    """The network of the module's description; computes in `dtype`."""

    def __init__(self, config: WeightUNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(dtype)
        make = {"dtype": self.dtype, "rngs": layers.InitKeys(rngs)}
        widths = config.block_out_channels
        self.time_embedding = _Embedding(config, **make)
        self.index_embedding = _Embedding(config, **make)
        self.conv_in = _conv(config.patch_size, widths[0], **make)
        position = 0.02 * jax.random.normal(
            make["rngs"].params(), (config.positions, widths[0]), jnp.float32
        )
        self.position = nnx.Param(position)
        entries = (widths[0], *widths[:-2])
        self.down_blocks = nnx.List(
            _Level(config, before, width, down=True, **make)
            for before, width in zip(entries, widths[:-1], strict=True)
        )
        self.mid_block = _Lowest(config, widths[-2], widths[-1], **make)
        self.up_blocks = nnx.List(
            _Level(config, above + width, width, up=above, **make)
            for above, width in reversed(list(zip(widths[1:], widths[:-1], strict=True)))
        )
        self.conv_norm_out = _norm(config, widths[0], **make)
        # Of zeros: an untrained network predicts the mean of what it learns.
        self.conv_out = _conv(widths[0], config.patch_size, init=nnx.initializers.zeros, **make)

    def __call__(
        self,
        blocks: Float[Array, "b v"],
        t: Int[Array, " b"],
        index: Int[Array, " b"],
        context: Float[Array, "b tokens d"],
    ) -> Float[Array, "b v"]:
        """The prediction for noisy blocks at times `t`, block `index[i]` of the text `context[i]`.

        float32, whatever the network computes in.
        """
        width = self.config.block_out_channels[0]
        times, places = (layers.timestep_embedding(x, width).astype(self.dtype) for x in (t, index))
        emb = self.time_embedding(times) + self.index_embedding(places)
        context = context.astype(self.dtype)
        x = blocks.astype(self.dtype).reshape(len(blocks), -1, self.config.patch_size)
        x = self.conv_in(x) + self.position[...].astype(self.dtype)
        skips = []
        for block in self.down_blocks:
            skip, x = block(x, emb, context)
            skips.append(skip)
        x = self.mid_block(x, emb, context)
        for block in self.up_blocks:
            x = block.upsample(x)
            x, _ = block(jnp.concatenate([x, skips.pop()], axis=-1), emb, context)
        x = self.conv_out(jax.nn.silu(_normed(self.conv_norm_out, x)))
        return x.reshape(blocks.shape).astype(jnp.float32)


class _Embedding(nnx.Module):
    """Two linear layers over sinusoidal features."""

    def __init__(self, config: WeightUNetConfig, **make):
        width, channels = config.block_out_channels[0], config.embedding_channels
        self.linear_1 = layers.Linear(width, channels, **make)
        self.linear_2 = layers.Linear(channels, channels, **make)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b e"]:
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class _ResBlock(nnx.Module):
    """Norm, activation and convolution twice, the embedding added in between; a residual."""

    def __init__(self, config: WeightUNetConfig, in_channels: int, out_channels: int, **make):
        self.norm1 = _norm(config, in_channels, **make)
        self.conv1 = _conv(in_channels, out_channels, **make)
        self.time_emb_proj = layers.Linear(config.embedding_channels, out_channels, **make)
        self.norm2 = _norm(config, out_channels, **make)
        self.conv2 = _conv(out_channels, out_channels, **make)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = layers.Linear(in_channels, out_channels, **make)

    def __call__(self, x: Float[Array, "b p i"], emb: Float[Array, "b e"]) -> Float[Array, "b p o"]:
        hidden = self.conv1(jax.nn.silu(_normed(self.norm1, x)))
        hidden = hidden + self.time_emb_proj(jax.nn.silu(emb))[:, None]
        hidden = self.conv2(jax.nn.silu(_normed(self.norm2, hidden)))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + hidden


class _Level(nnx.Module):
    """A residual and a transformer block, and the way to the next lower or from it.

    `up` is the number of channels of the lower level, where there is one to come from.
    """

    def __init__(
        self,
        config: WeightUNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        down: bool = False,
        up: int = 0,
        **make,
    ):
        self.resnet = _ResBlock(config, in_channels, out_channels, **make)
        self.attention = _transformer(config, out_channels, **make)
        self.down = down
        if down:
            self.downsampler = _conv(out_channels, out_channels, stride=2, **make)
        if up:
            self.upsampler = _conv(up, up, **make)

    def __call__(
        self, x: Float[Array, "b p i"], emb: Array, context: Array
    ) -> tuple[Float[Array, "b p o"], Array]:
        """What the level gives, and that halved where the way leads down."""
        x = self.resnet(x, emb)
        x = self.attention(x[:, None], context)[:, 0]
        return x, self.downsampler(x) if self.down else x

    def upsample(self, x: Float[Array, "b p c"]) -> Float[Array, "b p2 c"]:
        return self.upsampler(jnp.repeat(x, 2, axis=1))


class _Lowest(nnx.Module):
    """Residual, transformer, residual; the first one's result skips the transformer."""

    def __init__(self, config: WeightUNetConfig, in_channels: int, out_channels: int, **make):
        self.resnets = nnx.List(
            [
                _ResBlock(config, in_channels, out_channels, **make),
                _ResBlock(config, 2 * out_channels, out_channels, **make),
            ]
        )
        self.attention = _transformer(config, out_channels, **make)

    def __call__(self, x: Float[Array, "b p i"], emb: Array, context: Array) -> Array:
        skip = self.resnets[0](x, emb)
        x = self.attention(skip[:, None], context)[:, 0]
        return self.resnets[1](jnp.concatenate([x, skip], axis=-1), emb)


def _transformer(config: WeightUNetConfig, channels: int, **make) -> Transformer2DModel:
    """The denoiser's, over maps of one row."""
    return Transformer2DModel(
        channels,
        heads=channels // config.attention_head_dim,
        depth=config.transformer_layers_per_block,
        context_dim=config.cross_attention_dim,
        groups=config.norm_num_groups,
        linear_projection=True,
        **make,
    )


def _norm(config: WeightUNetConfig, channels: int, **make) -> nnx.GroupNorm:
    return layers.group_norm(config.norm_num_groups, channels, epsilon=1e-5, **make)


def _normed(norm: nnx.GroupNorm, x: Float[Array, "b p c"]) -> Float[Array, "b p c"]:
    return norm(x[:, None])[:, 0]


def _conv(
    in_channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    init: nnx.Initializer | None = None,
    dtype: jnp.dtype,
    rngs: Any,
) -> nnx.Conv:
    """Three taps, zeros around."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (3,),
        strides=stride,
        padding=((1, 1),),
        kernel_init=init or nnx.initializers.lecun_normal(),
        dtype=dtype,
        conv_general_dilated=_convolve,
        rngs=rngs,
    )


def _convolve(lhs: Array, rhs: Array, window_strides, padding, **kwargs) -> Array:
    """A convolution over (b, p, c) as one matrix product on CPU, where XLA's is slow."""
    if backend() != "cpu":
        return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    (stride,), taps = window_strides, rhs.shape[0]
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    length = (padded.shape[1] - taps) // stride + 1
    windows = [padded[:, i : i + (length - 1) * stride + 1 : stride] for i in range(taps)]
    return jnp.concatenate(windows, axis=-1) @ rhs.reshape(-1, rhs.shape[-1])
