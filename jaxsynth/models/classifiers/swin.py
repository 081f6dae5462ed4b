"""Swin transformers as classifiers (Liu et al. 2021, arXiv 2103.14030).

Attention within windows, every other block's shifted by half a window around the torus, with a
learnt bias for each relative position; 2x2 patches merge between stages. Modules carry the names of
transformers' files. Inference only: no dropout, no stochastic depth.
"""

import dataclasses
from functools import lru_cache
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models import layers
from jaxsynth.models.classifiers.vit import Dense
from jaxsynth.models.fields import known_fields, square_sizes, unused_fields
from jaxsynth.ops.attention import attention

_UNUSED = unused_fields("encoder_stride hidden_size num_layers path_norm")
# The norms outside of the blocks, whose epsilon no config names.
_EPSILON = 1e-5
# Added to the scores of tokens that the shift brought into one window from opposite edges.
_APART = -100.0


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Shape of a Swin transformer; field names and defaults are transformers'.

    num_labels 0 leaves the head out.
    """

    model_type: str = "swin"
    image_size: int = 224
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    layer_norm_eps: float = 1e-5
    num_labels: int = 0

    def __post_init__(self):
        layers.activation(self.hidden_act)
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"SwinConfig: {len(self.depths)} depths for {len(self.num_heads)} num_heads"
            )
        if self.use_absolute_embeddings:
            raise ValueError("SwinConfig.use_absolute_embeddings: expected False")
        for i, (width, heads) in enumerate(zip(self.widths, self.num_heads, strict=True)):
            if width % heads:
                raise ValueError(f"SwinConfig: num_heads {heads} does not divide {width} channels")
            if self.side(i) < self.window_size:
                raise ValueError(
                    f"SwinConfig: images of {self.image_size} pixels leave {self.side(i)} tokens a "
                    f"side in stage {i}, fewer than window_size {self.window_size}"
                )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, square_sizes(config), ignored=_UNUSED))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))

    def side(self, stage: int) -> int:
        """Tokens a side in a stage."""
        tokens = -(-self.image_size // self.patch_size)
        for _ in range(stage):
            tokens = -(-tokens // 2)
        return tokens


class SwinPatchEmbeddings(nnx.Module):
    """Patches; images are filled with zeros to whole ones."""

    def __init__(self, config: SwinConfig, *, dtype, rngs: nnx.Rngs):
        self.patch = config.patch_size
        self.projection = layers.patch_conv(
            config.num_channels, config.embed_dim, config.patch_size, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.projection(fill(x, self.patch))


class SwinEmbeddings(nnx.Module):
    """Patches, normalised."""

    def __init__(self, config: SwinConfig, **make):
        self.shape = (config.image_size, config.image_size, config.num_channels)
        self.patch_embeddings = SwinPatchEmbeddings(config, **make)
        self.norm = layers.layer_norm(config.embed_dim, epsilon=_EPSILON, **make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        if x.ndim != 4 or x.shape[1:] != self.shape:
            raise ValueError(f"Swin: images are {x.shape}, expected (batch, *{self.shape})")
        return self.norm(self.patch_embeddings(x))


class SwinSelfAttention(nnx.Module):
    """Attention within windows, with a bias for each head and relative position."""

    def __init__(self, config: SwinConfig, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
        self.heads, self.window = heads, config.window_size
        for name in ("query", "key", "value"):
            projection = layers.Linear(
                width, width, use_bias=config.qkv_bias, dtype=dtype, rngs=rngs
            )
            setattr(self, name, projection)
        offsets = (2 * config.window_size - 1) ** 2
        self.relative_position_bias_table = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (offsets, heads))
        )

    def __call__(
        self, x: Float[Array, "b w t d"], apart: Float[np.ndarray, "w t t"] | None
    ) -> Float[Array, "b w t d"]:
        split = (*x.shape[:3], self.heads, x.shape[-1] // self.heads)
        query, key, value = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        table = self.relative_position_bias_table[...].astype(jnp.float32)
        bias = jnp.moveaxis(table[relative_positions(self.window)], -1, 0)[None]
        if apart is not None:
            bias = bias + apart[:, None]

        def windows(query, key, value):
            return attention(query, key, value, bias=bias)

        # Images share the bias of each window.
        return jax.vmap(windows)(query, key, value).reshape(x.shape)


class SwinAttention(nnx.Module):
    """Attention within windows and its output projection, nested as in transformers' files."""

    def __init__(self, config: SwinConfig, width: int, heads: int, **make):
        # The files call it so.
        self.self = SwinSelfAttention(config, width, heads, **make)
        self.output = Dense(width, width, **make)

    def __call__(self, x: Array, apart: np.ndarray | None) -> Array:
        return self.output(self.self(x, apart))


class SwinLayer(nnx.Module):
    """Pre-norm transformer block; `shift` moves its windows down and right."""

    def __init__(self, config: SwinConfig, width: int, heads: int, shift: int, **make):
        self.window, self.shift = config.window_size, shift
        inner = int(config.mlp_ratio * width)
        self.activation = layers.activation(config.hidden_act)
        norm = {"epsilon": config.layer_norm_eps, **make}
        self.layernorm_before = layers.layer_norm(width, **norm)
        self.attention = SwinAttention(config, width, heads, **make)
        self.layernorm_after = layers.layer_norm(width, **norm)
        self.intermediate = Dense(width, inner, **make)
        self.output = Dense(inner, width, **make)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        x = x + self._attend(self.layernorm_before(x))
        return x + self.output(self.activation(self.intermediate(self.layernorm_after(x))))

    def _attend(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        window = self.window
        # A side of one window needs no shift: all tokens see each other already.
        shift = self.shift if min(height, width) > window else 0
        x = fill(x, window)
        rows, columns = x.shape[1] // window, x.shape[2] // window
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = x.reshape(batch, rows, window, columns, window, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * columns, window**2, channels)
        x = self.attention(x, shifted_apart(rows, columns, window, shift) if shift else None)
        x = x.reshape(batch, rows, columns, window, window, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * window, columns * window, channels)
        if shift:
            x = jnp.roll(x, (shift, shift), (1, 2))
        return x[:, :height, :width]


class SwinPatchMerging(nnx.Module):
    """2x2 tokens to one of twice the channels."""

    def __init__(self, width: int, **make):
        self.norm = layers.layer_norm(4 * width, epsilon=_EPSILON, **make)
        self.reduction = layers.Linear(4 * width, 2 * width, use_bias=False, **make)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 d2"]:
        x = fill(x, 2)
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))


class SwinStage(nnx.Module):
    """Blocks of one resolution, then patches merge unless it is the last."""

    def __init__(self, config: SwinConfig, number: int, **make):
        width, heads = config.widths[number], config.num_heads[number]
        shifts = (0, config.window_size // 2)
        self.blocks = nnx.List(
            SwinLayer(config, width, heads, shifts[i % 2], **make)
            for i in range(config.depths[number])
        )
        self.merges = number + 1 < len(config.depths)
        if self.merges:
            self.downsample = SwinPatchMerging(width, **make)

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if self.merges else x


class SwinEncoder(nnx.Module):
    """The stages."""

    def __init__(self, config: SwinConfig, **make):
        self.layers = nnx.List(SwinStage(config, i, **make) for i in range(len(config.depths)))

    def __call__(self, x: Array) -> Array:
        for stage in self.layers:
            x = stage(x)
        return x


class SwinModel(nnx.Module):
    """Embeddings, stages, the last norm, and the mean over tokens."""

    def __init__(self, config: SwinConfig, **make):
        self.embeddings = SwinEmbeddings(config, **make)
        self.encoder = SwinEncoder(config, **make)
        self.layernorm = layers.layer_norm(config.widths[-1], epsilon=config.layer_norm_eps, **make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        return self.layernorm(self.encoder(self.embeddings(x))).mean((1, 2))


class SwinForImageClassification(nnx.Module):
    """A Swin transformer with a linear head."""

    def __init__(self, config: SwinConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        make = {"dtype": dtype, "rngs": rngs}
        self.swin = SwinModel(config, **make)
        if config.num_labels:
            self.classifier = layers.Linear(config.widths[-1], config.num_labels, **make)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits of normalised images."""
        return self.classifier(self.swin(pixels))


def fill(x: Float[Array, "b h w c"], multiple: int) -> Array:
    """Zeros below and to the right, up to a multiple of `multiple`."""
    below, right = (-size % multiple for size in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


@lru_cache(maxsize=8)
def relative_positions(window: int) -> Int[np.ndarray, "t t"]:
    """The row of the bias table for each pair of tokens of a window."""
    rows, columns = np.divmod(np.arange(window**2), window)
    down, across = (x[:, None] - x[None] + window - 1 for x in (rows, columns))
    return down * (2 * window - 1) + across


@lru_cache(maxsize=32)
def shifted_apart(rows: int, columns: int, window: int, shift: int) -> Float[np.ndarray, "w t t"]:
    """What keeps tokens of one shifted window apart that are not neighbours in the image.

    For each window and each pair of its tokens: -100 if they come from different regions.
    """

    def regions(count: int) -> np.ndarray:
        position = np.arange(count * window)
        return (position >= count * window - window).astype(int) + (
            position >= count * window - shift
        )

    region = 3 * regions(rows)[:, None] + regions(columns)[None]
    region = region.reshape(rows, window, columns, window).swapaxes(1, 2)
    region = region.reshape(rows * columns, window**2)
    return np.where(region[:, :, None] != region[:, None], _APART, 0.0).astype(np.float32)
