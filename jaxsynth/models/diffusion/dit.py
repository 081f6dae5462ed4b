"""The class-conditional diffusion transformer of latents (DiT), in diffusers' names, NHWC.

Tokens are patches of the noisy latent; timestep and label modulate every layer norm and gate every
branch (adaLN-zero). All blocks have one shape, so they are one module of stacked parameters under
`lax.scan`: the program does not grow with the depth, and an adapter wraps all layers at once.

Source: Peebles and Xie 2022, arXiv 2212.09748, and the authors' released models for the
initialisation. diffusers' `DiTTransformer2DModel` differs in two details that `DiTConfig` names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models import fields, layers
from jaxsynth.models.repeat import scan_stacked
from jaxsynth.ops.attention import attention

# What a block keeps for the backward pass besides its input.
_TIME_FEATURES = 256
# Of every norm but the one before the feed-forward, in both implementations.
_EPSILON = 1e-6

# What diffusers' class (or the one that it replaced) can do and this one does not.
_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_type": ("default",),
    "caption_channels": (None,),
    "cross_attention_dim": (None,),
    "double_self_attention": (False,),
    "dropout": (0.0,),
    "interpolation_scale": (None,),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_zero",),
    "num_vector_embeds": (None,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
}
# Scores are always float32 here, and there is no group norm.
_IGNORED = (
    "norm_num_groups",
    "upcast_attention",
    "use_additional_conditions",
    *fields.EMA_NOTES,
)

# Depth, width and heads (arXiv 2212.09748, table 1).
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_PATCHES = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of the transformer; field names and defaults are diffusers', but for the last two.

    `num_embeds_ada_norm` is the number of classes; the label table has one row more, for no label.
    `norm_eps` reaches only the norm before the feed-forward, as in diffusers; the others have 1e-6.
    `freq_shift` is that of the timestep's frequencies: 1 in diffusers, but 0 in the authors' code
    that trained the published weights. With 0 in its config.json, a folder converted from those
    gets the features that it was trained with (at t = 999 the second frequency is half a radian
    off otherwise), and no longer agrees with diffusers. `condition_channels` are the channels of
    an image that is concatenated to the latent (`condition` of the call).
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    freq_shift: int = 1
    condition_channels: int = 0

    def __post_init__(self):
        for field, least in (
            ("num_attention_heads", 1),
            ("attention_head_dim", 1),
            ("in_channels", 1),
            ("num_layers", 1),
            ("sample_size", 1),
            ("patch_size", 1),
            ("num_embeds_ada_norm", 1),
            ("condition_channels", 0),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"DiTConfig.{field}: expected an int >= {least}, got {value!r}")
        if self.hidden_size % 4:
            raise ValueError(
                f"DiTConfig.attention_head_dim: {self.num_attention_heads} heads of "
                f"{self.attention_head_dim} make {self.hidden_size} channels, expected a multiple "
                "of 4 (sine and cosine of two coordinates)"
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"DiTConfig.patch_size: {self.patch_size} does not divide sample_size "
                f"{self.sample_size}"
            )
        if self.freq_shift not in (0, 1):
            raise ValueError(f"DiTConfig.freq_shift: expected 0 or 1, got {self.freq_shift!r}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a transformer folder's config.json; ValueError naming an unknown field or value."""
        return cls(**fields.known_fields(cls, config, only=_ONLY, ignored=_IGNORED))

    @classmethod
    def preset(cls, name: str, *, sample_size: int = 32, **changes: Any) -> Self:
        """A published size, "DiT-S/2" to "DiT-XL/8", as the authors train it.

        `sample_size` is the side of the latent: 32 for 256 pixels, 64 for 512. The output holds the
        noise and the variance. `changes` replace other fields.
        """
        size, _, patch = name.removeprefix("DiT-").partition("/")
        if not name.startswith("DiT-") or size not in _SIZES or patch not in map(str, _PATCHES):
            raise ValueError(
                f"DiTConfig.preset: {name!r}, expected DiT-<{'|'.join(_SIZES)}>/"
                f"<{'|'.join(map(str, _PATCHES))}>"
            )
        depth, width, heads = _SIZES[size]
        values = {
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "num_layers": depth,
            "patch_size": int(patch),
            "sample_size": sample_size,
            "out_channels": 2 * changes.get("in_channels", 4),
            "norm_eps": _EPSILON,
            "freq_shift": 0,
        }
        return cls(**{**values, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields for a config.json, without those that diffusers lacks and that change nothing.

        diffusers warns about any other: such a network is not the one that it would compute.
        """
        written = dataclasses.asdict(self)
        for name, default in (("freq_shift", 1), ("condition_channels", 0)):
            if written[name] == default:
                del written[name]
        return written

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels_out(self) -> int:
        """Channels of the prediction: `out_channels`, or as many as the input has."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def null_label(self) -> int:
        """The label that stands for none, of classifier-free guidance."""
        return self.num_embeds_ada_norm


class DiT(nnx.Module):
    """Predicts noise, and where there are channels for it the variance, of a noisy latent."""

    # How files hold it: every block under a number of its own, with copies of both embedders.
    stacked: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    copied: ClassVar[dict[str, str]] = {
        "time_embedder": "transformer_blocks.{}.norm1.emb.timestep_embedder",
        "class_embedder": "transformer_blocks.{}.norm1.emb.class_embedder",
    }

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        """`dtype` is that of the computation; parameters are created in float32."""
        self.config = config
        self.dtype = dtype
        make = {"dtype": dtype, "rngs": layers.InitKeys(rngs)}
        width = config.hidden_size
        self.pos_embed = PatchEmbed(config, **make)
        self.time_embedder = TimestepEmbedder(width, **make)
        self.class_embedder = LabelEmbedding(config.num_embeds_ada_norm + 1, width, **make)
        self.transformer_blocks = DiTBlock(config, **make)
        self.proj_out_1 = _zero_linear(width, 2 * width, **make)
        self.proj_out_2 = _zero_linear(width, config.patch_size**2 * config.channels_out, **make)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"] | Float[Array, " b"],
        labels: Int[Array, " b"],
        *,
        condition: Float[Array, "b h w k"] | None = None,
        remat: str | None = None,
    ) -> Float[Array, "b h w o"]:
        """The prediction for latents `x` (height and width any multiples of the patch) at `t`.

        `labels` are 0 to `config.null_label`; others give NaN. `condition` is required exactly
        where the network has `condition_channels`. `remat` names what the backward pass computes
        again: None nothing, "block" everything but the blocks' inputs (least memory), "dots" all
        but the linear layers' outputs, so mainly attention. Raises ValueError where shapes or names
        do not fit.
        """
        config, patch = self.config, self.config.patch_size
        _check_inputs(config, x, condition)
        if condition is not None:
            x = jnp.concatenate([x, condition.astype(x.dtype)], axis=-1)
        rows, columns = x.shape[1] // patch, x.shape[2] // patch
        tokens = self.pos_embed(x)
        time = layers.timestep_embedding(t, _TIME_FEATURES, freq_shift=config.freq_shift)
        embedded = self.time_embedder(time.astype(self.dtype)) + self.class_embedder(labels)
        embedded = jax.nn.silu(embedded)
        tokens = scan_stacked(
            self.transformer_blocks,
            config.num_layers,
            tokens,
            lambda block, tokens: block(tokens, embedded),
            remat=remat,
        )
        shift, scale = jnp.split(self.proj_out_1(embedded)[:, None], 2, axis=-1)
        tokens = self.proj_out_2(_modulated_norm(tokens, shift, scale, _EPSILON))
        patches = tokens.reshape(x.shape[0], rows, columns, patch, patch, config.channels_out)
        # (b, row, column, y, x, c) -> (b, row, y, column, x, c)
        return patches.swapaxes(2, 3).reshape(*x.shape[:3], config.channels_out)


class PatchEmbed(nnx.Module):
    """Patches as tokens, with fixed sines and cosines of their positions added."""

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.side = config.sample_size // config.patch_size
        self.proj = nnx.Conv(
            config.in_channels + config.condition_channels,
            config.hidden_size,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding=((0, 0), (0, 0)),
            dtype=dtype,
            kernel_init=_flat_xavier,
            conv_general_dilated=_patch_product,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        tokens = self.proj(x)
        rows, columns, width = tokens.shape[1:]
        positions = position_embedding(rows, columns, width, self.side)
        tokens = tokens.reshape(x.shape[0], rows * columns, width)
        return (tokens.astype(jnp.float32) + positions).astype(tokens.dtype)


class TimestepEmbedder(nnx.Module):
    """Two linear layers over the sinusoidal features of the timestep."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"kernel_init": nnx.initializers.normal(0.02), "dtype": dtype, "rngs": rngs}
        self.linear_1 = layers.Linear(_TIME_FEATURES, width, **make)
        self.linear_2 = layers.Linear(width, width, **make)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class LabelEmbedding(nnx.Module):
    """A row for every class, and a last one for no label."""

    def __init__(self, rows: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embedding_table = nnx.Embed(
            rows, width, embedding_init=nnx.initializers.normal(0.02), dtype=dtype, rngs=rngs
        )

    def __call__(self, labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        return self.embedding_table(labels)


class DiTBlock(nnx.Module):
    """Self-attention and feed-forward, modulated and gated by the embedding (adaLN-zero).

    It holds the parameters of all layers on a leading axis; `scan_stacked` calls it with those of
    one.
    """

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.norm_eps = config.norm_eps
        self.norm1 = AdaLayerNormZero(config, **make)
        self.attn1 = SelfAttention(config, **make)
        self.ff = FeedForward(config, **make)

    def __call__(
        self, x: Float[Array, "b n d"], embedded: Float[Array, "b d"]
    ) -> Float[Array, "b n d"]:
        parts = jnp.split(self.norm1.linear(embedded)[:, None], 6, axis=-1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts
        x = x + gate * self.attn1(_modulated_norm(x, shift, scale, _EPSILON))
        return x + ff_gate * self.ff(_modulated_norm(x, ff_shift, ff_scale, self.norm_eps))


class AdaLayerNormZero(nnx.Module):
    """Shift, scale and gate of both branches from the embedding, all zero in a new network."""

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, depth = config.hidden_size, config.num_layers
        self.linear = _zero_linear(width, 6 * width, depth=depth, dtype=dtype, rngs=rngs)


class SelfAttention(nnx.Module):
    """Multi-head attention of the tokens to each other."""

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        width, depth = config.hidden_size, config.num_layers
        self.heads = config.num_attention_heads
        # The authors draw the three kernels as one (width, 3 width): Xavier's variance is halved.
        qkv = {**make, "scale": 0.5, "use_bias": config.attention_bias}
        self.to_q = _stacked_linear(width, width, depth, **qkv)
        self.to_k = _stacked_linear(width, width, depth, **qkv)
        self.to_v = _stacked_linear(width, width, depth, **qkv)
        self.to_out = nnx.List([_stacked_linear(width, width, depth, **make)])

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        def split(values: Array) -> Array:
            return values.reshape(*values.shape[:2], self.heads, -1)

        out = attention(split(self.to_q(x)), split(self.to_k(x)), split(self.to_v(x)))
        return self.to_out[0](out.reshape(x.shape))


class FeedForward(nnx.Module):
    """Four times the width and back; `net.1` is the reference's dropout, off here."""

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        width, depth = config.hidden_size, config.num_layers
        self.net = nnx.List(
            [
                GELU(width, 4 * width, depth, **make),
                nnx.Dropout(0.0),
                _stacked_linear(4 * width, width, depth, **make),
            ]
        )

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.net[2](self.net[0](x))


class GELU(nnx.Module):
    """A projection and the tanh form of GELU."""

    def __init__(self, channels: int, inner: int, depth: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = _stacked_linear(channels, inner, depth, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n i"]:
        return jax.nn.gelu(self.proj(x), approximate=True)


def position_embedding(
    rows: int, columns: int, width: int, side: int
) -> Float[np.ndarray, "n width"]:
    """Sines and cosines of column, then of row, for patches in reading order.

    `side` is the patches along an edge in training: another number of them is spread over the same
    range of positions, as diffusers does.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))

    def features(positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row = np.repeat(np.arange(rows) * side / rows, columns)
    column = np.tile(np.arange(columns) * side / columns, rows)
    return np.concatenate([features(column), features(row)], axis=1).astype(np.float32)


def _modulated_norm(
    x: Float[Array, "b n d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"], eps: float
) -> Float[Array, "b n d"]:
    """LayerNorm without parameters, then scale and shift; float32 inside."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (normed * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


def _check_inputs(config: DiTConfig, x: Array, condition: Array | None) -> None:
    height, width, channels = x.shape[1:]
    if height % config.patch_size or width % config.patch_size or channels != config.in_channels:
        raise ValueError(
            f"DiT: x has shape {x.shape}, expected (b, h, w, {config.in_channels}) with h and w "
            f"multiples of patch_size {config.patch_size}"
        )
    expected = (*x.shape[:3], config.condition_channels) if config.condition_channels else None
    found = None if condition is None else condition.shape
    if found != expected:
        raise ValueError(f"DiT: condition has shape {found}, expected {expected}")


def _patch_product(lhs: Array, rhs: Array, window_strides, padding, **kwargs) -> Array:
    """A convolution of stride equal to its kernel and no padding, as one matrix product.

    Mapped over kernels (one adapter a sample) a convolution would become a grouped one, slow on
    CPU; this becomes a batched product.
    """
    batch, height, width, channels = lhs.shape
    patch, _, _, out = rhs.shape
    grid = lhs.reshape(batch, height // patch, patch, width // patch, patch, channels)
    flat = grid.swapaxes(2, 3).reshape(batch, height // patch, width // patch, -1)
    return jnp.matmul(flat, rhs.reshape(-1, out), precision=kwargs.get("precision"))


def _flat_xavier(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Xavier-uniform for a patch kernel (p, p, in, out) seen as a matrix (p p in, out)."""
    flat = (int(np.prod(shape[:-1])), shape[-1])
    return nnx.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)


def _stacked_linear(
    c_in: int, c_out: int, depth: int, *, scale: float = 1.0, use_bias: bool = True, **make: Any
) -> nnx.Linear:
    """A linear layer of each block: kernel (depth, in, out) Xavier-uniform, bias (depth, out) 0."""
    draw = nnx.initializers.variance_scaling(scale, "fan_avg", "uniform", batch_axis=0)
    return layers.Linear(
        c_in,
        c_out,
        use_bias=use_bias,
        kernel_init=lambda key, shape, dtype: draw(key, (depth, *shape), dtype),
        bias_init=lambda _, shape, dtype: jnp.zeros((depth, *shape), dtype),
        **make,
    )


def _zero_linear(c_in: int, c_out: int, *, depth: int | None = None, **make: Any) -> nnx.Linear:
    """A linear layer (or one of each block) that starts at zero."""
    lead = () if depth is None else (depth,)

    def zeros(_: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros((*lead, *shape), dtype)

    return layers.Linear(c_in, c_out, kernel_init=zeros, bias_init=zeros, **make)
