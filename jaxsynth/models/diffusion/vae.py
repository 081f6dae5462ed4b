"""The autoencoder between pixels and latents of latent diffusion (Rombach et al. 2022).

Diffusion runs on latents an eighth as wide as the image, so images are encoded once and cached and
only sampled latents are decoded. Structure and weight names are those of diffusers'
`AutoencoderKL` (arXiv 2112.10752), in NHWC.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from jaxsynth.models import fields, layers
from jaxsynth.models.diffusion.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from jaxsynth.ops.attention import attention

_NORM_EPSILON = 1e-6
# Statistics of latents that the autoencoders of Stable Diffusion 3, FLUX and video have.
ONLY: dict[str, tuple[Any, ...]] = {
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0.0),
}


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape of the autoencoder; field names and defaults are diffusers'.

    Latents are multiplied by `scaling_factor` before they are noised, by the caller:
    `AutoencoderKL` itself never scales. With `force_upcast` the computation is in float32, whatever
    type the other networks compute in. `sample_size` is a note of the training's image size.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        name, levels = "AutoencoderKLConfig", len(self.block_out_channels)
        types = {"down_block_types": self.down_block_types, "up_block_types": self.up_block_types}
        fields.check_blocks(name, types, levels)
        fields.check_groups(name, self.norm_num_groups, self.block_out_channels)
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"{name}.scaling_factor: {self.scaling_factor}, expected above 0")
        for field, supported in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            for block in types[field]:
                if block != supported:
                    raise ValueError(f"{name}.{field}: expected {supported!r}, got {block!r}")
        layers.activation(self.act_fn)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a vae folder's config.json; an unknown field or value is a ValueError naming it."""
        return cls(**fields.known_fields(cls, config, only=ONLY, ignored=fields.EMA_NOTES))

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents, as the encoder returns it."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]

    @property
    def std(self) -> Float[Array, "b h w c"]:
        return jnp.exp(0.5 * self.logvar)

    def sample(self, key: Array) -> Float[Array, "b h w c"]:
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Float[Array, "b h w c"]:
        return self.mean


class AutoencoderKL(nnx.Module):
    """Images in [-1, 1] to a Gaussian over latents, and latents back to images."""

    def __init__(
        self, config: AutoencoderKLConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        """`dtype` is that of the computation unless the configuration forces float32.

        Parameters are created in float32.
        """
        self.config = config
        dtype = jnp.promote_types(dtype, jnp.float32) if config.force_upcast else dtype
        latent = config.latent_channels
        make = {"dtype": dtype, "rngs": layers.InitKeys(rngs)}
        self.encoder = Encoder(config, **make)
        self.decoder = Decoder(config, **make)
        if config.use_quant_conv:
            self.quant_conv = layers.conv2d(2 * latent, 2 * latent, 1, **make)
        if config.use_post_quant_conv:
            self.post_quant_conv = layers.conv2d(latent, latent, 1, **make)

    def encode(self, images: Float[Array, "b h w c"]) -> Gaussian:
        """The posterior of `images` in [-1, 1], in float32 and not scaled.

        Height and width must be multiples of `config.downscale`.
        """
        factor = self.config.downscale
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"AutoencoderKL.encode: height and width must be multiples of {factor}, "
                f"got {images.shape[1]}x{images.shape[2]}"
            )
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        """Images of unscaled `latents`: about [-1, 1], not clipped."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def encode_images(
    vae: AutoencoderKL, images: Float[np.ndarray, "n h w 3"], batch_size: int = 8
) -> tuple[Float[np.ndarray, "n h2 w2 c"], Float[np.ndarray, "n h2 w2 c"]]:
    """Mean and standard deviation of the latents of images in [-1, 1], times the scaling factor."""
    means, stds = [], []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        # One compiled shape: the last batch is filled up.
        padded = np.concatenate([chunk, np.zeros((batch_size - len(chunk), *chunk.shape[1:]))])
        mean, std = _scaled_posterior(vae, padded.astype(np.float32))
        means.append(np.asarray(mean, np.float32)[: len(chunk)])
        stds.append(np.asarray(std, np.float32)[: len(chunk)])
    return np.concatenate(means), np.concatenate(stds)


@jax.jit
def _scaled_posterior(vae: AutoencoderKL, images: Array) -> tuple[Array, Array]:
    posterior = vae.encode(images)
    factor = vae.config.scaling_factor
    return posterior.mean * factor, posterior.std * factor


def decode_latents(
    vae: AutoencoderKL, latents: Float[np.ndarray, "n h w c"], batch_size: int = 8
) -> UInt8[np.ndarray, "n height width 3"]:
    """The images of latents that are scaled as `encode_images` scales them."""
    images = []
    for start in range(0, len(latents), batch_size):
        chunk = latents[start : start + batch_size]
        padded = np.concatenate([chunk, np.zeros((batch_size - len(chunk), *chunk.shape[1:]))])
        images.append(np.asarray(_decode_scaled(vae, padded.astype(np.float32)))[: len(chunk)])
    return np.concatenate(images)


def decode_scaled(
    vae: AutoencoderKL, latents: Float[Array, "b h w c"]
) -> UInt8[Array, "b h2 w2 o"]:
    """The pixels of one batch of scaled latents, for use inside a compiled program."""
    return to_uint8(vae.decode(latents / vae.config.scaling_factor))


_decode_scaled = jax.jit(decode_scaled)


def from_uint8(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Images in [-1, 1] of pixels 0 to 255, as the encoder reads them."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Pixels 0 to 255 of images in [-1, 1], rounded to the nearest; values outside are clipped."""
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


class Encoder(nnx.Module):
    """Down to (mean, log variance), side by side in the channels."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        widths = config.block_out_channels
        self.conv_in = layers.conv2d(config.in_channels, widths[0], **make)
        inputs = (widths[0], *widths)
        self.down_blocks = nnx.List(
            DownEncoderBlock2D(
                config, inputs[level], width, downsample=level < len(widths) - 1, **make
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock2D(config, widths[-1], **make)
        self.conv_norm_out = layers.group_norm(
            config.norm_num_groups, widths[-1], epsilon=_NORM_EPSILON, **make
        )
        self.conv_out = layers.conv2d(widths[-1], 2 * config.latent_channels, **make)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """The encoder mirrored, with one more residual block per level."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        widths = config.block_out_channels[::-1]
        self.conv_in = layers.conv2d(config.latent_channels, widths[0], **make)
        self.mid_block = MidBlock2D(config, widths[0], **make)
        inputs = (widths[0], *widths)
        self.up_blocks = nnx.List(
            UpDecoderBlock2D(config, inputs[level], width, upsample=level < len(widths) - 1, **make)
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = layers.group_norm(
            config.norm_num_groups, widths[-1], epsilon=_NORM_EPSILON, **make
        )
        self.conv_out = layers.conv2d(widths[-1], config.out_channels, **make)

    def __call__(self, latents: Float[Array, "b h w l"]) -> Float[Array, "b h2 w2 o"]:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class DownEncoderBlock2D(nnx.Module):
    def __init__(
        self,
        config: AutoencoderKLConfig,
        in_channels: int,
        out_channels: int,
        *,
        downsample: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.resnets = _resnets(config, config.layers_per_block, in_channels, out_channels, **make)
        self.downsamplers = nnx.List(
            [Downsample2D(out_channels, padding=0, **make)] if downsample else []
        )

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(nnx.Module):
    def __init__(
        self,
        config: AutoencoderKLConfig,
        in_channels: int,
        out_channels: int,
        *,
        upsample: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        count = config.layers_per_block + 1
        self.resnets = _resnets(config, count, in_channels, out_channels, **make)
        self.upsamplers = nnx.List([Upsample2D(out_channels, **make)] if upsample else [])

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock2D(nnx.Module):
    """Residual block, self-attention over all positions, residual block."""

    def __init__(
        self, config: AutoencoderKLConfig, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        make = {"dtype": dtype, "rngs": rngs}
        attends = config.mid_block_add_attention
        self.resnets = _resnets(config, 2, channels, channels, **make)
        self.attentions = nnx.List(
            [SpatialAttention(config.norm_num_groups, channels, **make)] if attends else []
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class SpatialAttention(nnx.Module):
    """Self-attention with one head over the positions of a feature map, added to its input."""

    def __init__(self, groups: int, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.group_norm = layers.group_norm(groups, channels, epsilon=_NORM_EPSILON, **make)
        self.to_q = layers.Linear(channels, channels, **make)
        self.to_k = layers.Linear(channels, channels, **make)
        self.to_v = layers.Linear(channels, channels, **make)
        self.to_out = nnx.List([layers.Linear(channels, channels, **make)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, channels)
        heads = (layer(tokens)[:, :, None] for layer in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](attention(*heads)[:, :, 0])
        return x + out.reshape(x.shape)


def _resnets(
    config: AutoencoderKLConfig,
    count: int,
    in_channels: int,
    out_channels: int,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.List:
    return nnx.List(
        ResnetBlock2D(
            in_channels if index == 0 else out_channels,
            out_channels,
            groups=config.norm_num_groups,
            epsilon=_NORM_EPSILON,
            act_fn=config.act_fn,
            dtype=dtype,
            rngs=rngs,
        )
        for index in range(count)
    )
