"""DINOv2 with a linear head (Oquab et al. 2023, arXiv 2304.07193; registers: arXiv 2309.16588).

The backbone is a vision transformer with layer scale and other names. What its heads read differs:
the class token alone; that and the mean of the patches, as transformers' classifier and the
authors' one-layer heads do; or the class tokens of the last four layers and the last one's mean
patch, the authors' default. Images of another size than the positions were trained for get them
resized. Modules carry the names of transformers' files.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers
from jaxsynth.models.classifiers import vit
from jaxsynth.models.fields import known_fields, square_sizes, unused_fields
from jaxsynth.ops.resize import resize_matrix, torch_cubic_matrix

_UNUSED = unused_fields(
    """
    apply_layernorm interpolate_antialias interpolate_offset layerscale_value reshape_hidden_states
    use_mask_token
    """
)
_TYPES = ("dinov2", "dinov2_with_registers")
# Class tokens that a head reads, by how many hidden sizes wide it is.
HEAD_LAYERS = {1: 0, 2: 1, 5: 4}


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Shape of a DINOv2; field names and defaults are transformers'.

    head_layers: how many layers' class tokens the head reads beside the last mean patch; 0 is the
    class token alone. image_size is what the positions were trained for. num_labels 0 leaves the
    head out.
    """

    model_type: str = "dinov2"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    num_labels: int = 0
    head_layers: int = 1

    def __post_init__(self):
        layers.check_transformer(self)
        if self.model_type not in _TYPES:
            raise ValueError(f"Dinov2Config.model_type: {self.model_type!r}, expected {_TYPES}")
        if self.head_layers not in HEAD_LAYERS.values():
            raise ValueError(
                f"Dinov2Config.head_layers: {self.head_layers}, expected one of "
                f"{sorted(HEAD_LAYERS.values())}"
            )
        if self.head_layers > self.num_hidden_layers:
            raise ValueError(
                f"Dinov2Config: head_layers {self.head_layers} of {self.num_hidden_layers} layers"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        # The registers' own config defaults to another patch and to four of them.
        own = {} if config.get("model_type") != _TYPES[1] else _REGISTER_DEFAULTS
        return cls(**known_fields(cls, {**own, **square_sizes(config)}, ignored=_UNUSED))

    @property
    def head_width(self) -> int:
        return self.hidden_size * (self.head_layers + 1)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


_REGISTER_DEFAULTS = {"patch_size": 16, "num_register_tokens": 4}


class MLP(nnx.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
        inner = int(config.hidden_size * config.mlp_ratio)
        self.activation = layers.activation(config.hidden_act)
        self.fc1 = layers.Linear(config.hidden_size, inner, dtype=dtype, rngs=rngs)
        self.fc2 = layers.Linear(inner, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nnx.Module):
    """The gated perceptron of the giant model; gate and value are one matrix."""

    def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
        # Two thirds of the perceptron's width, to a multiple of 8.
        inner = (int(int(config.hidden_size * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        self.weights_in = layers.Linear(config.hidden_size, 2 * inner, dtype=dtype, rngs=rngs)
        self.weights_out = layers.Linear(inner, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, value = jnp.split(self.weights_in(x), 2, axis=-1)
        return self.weights_out(jax.nn.silu(gate) * value)


class Dinov2Embeddings(nnx.Module):
    """Class token and patches with their positions, and registers, which have none."""

    def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.patch, self.grid = config.patch_size, config.grid
        self.antialias = config.model_type == "dinov2_with_registers"
        self.cls_token = vit.token(rngs, 1, width)
        self.has_registers = config.num_register_tokens > 0
        if self.has_registers:
            self.register_tokens = vit.token(rngs, config.num_register_tokens, width)
        self.patch_embeddings = vit.PatchEmbeddings(
            config.num_channels, width, config.patch_size, dtype=dtype, rngs=rngs
        )
        self.position_embeddings = vit.token(rngs, self.grid**2 + 1, width)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        if pixels.ndim != 4 or min(pixels.shape[1:3]) < self.patch:
            raise ValueError(
                f"DINOv2: images are {pixels.shape}, expected (batch, height, width, 3) of at "
                f"least {self.patch} pixels a side"
            )
        rows, columns = (size // self.patch for size in pixels.shape[1:3])
        patches = self.patch_embeddings(pixels)
        positions = self.position_embeddings[...].astype(patches.dtype)
        tokens = vit.prepend([self.cls_token], patches)
        tokens = tokens + self._resized(positions, rows, columns)
        if not self.has_registers:
            return tokens
        first, rest = tokens[:, :1], tokens[:, 1:]
        return jnp.concatenate([first, vit.prepend([self.register_tokens], rest)], axis=1)

    def _resized(self, positions: Array, rows: int, columns: int) -> Array:
        if (rows, columns) == (self.grid, self.grid):
            return positions
        grid = positions[0, 1:].reshape(self.grid, self.grid, -1)
        # transformers resizes the positions of the two models in these two ways.
        down, across = (
            resize_matrix(self.grid, size, "bicubic")
            if self.antialias
            else torch_cubic_matrix(self.grid, size)
            for size in (rows, columns)
        )
        grid = jnp.einsum("rh,cw,hwd->rcd", down, across, grid)
        return jnp.concatenate([positions[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)


class Dinov2Layer(nnx.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        make = {"dtype": dtype, "rngs": rngs}
        norm = {"epsilon": config.layer_norm_eps, **make}
        self.norm1 = layers.layer_norm(width, **norm)
        self.attention = vit.Attention(
            width, config.num_attention_heads, qkv_bias=config.qkv_bias, **make
        )
        self.layer_scale1 = vit.LayerScale(width)
        self.norm2 = layers.layer_norm(width, **norm)
        self.mlp = (SwiGLU if config.use_swiglu_ffn else MLP)(config, **make)
        self.layer_scale2 = vit.LayerScale(width)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Dinov2Model(nnx.Module):
    """The transformer without a head."""

    def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.embeddings = Dinov2Embeddings(config, **make)
        blocks = [Dinov2Layer(config, **make) for _ in range(config.num_hidden_layers)]
        self.encoder = vit.Encoder(blocks)
        self.layernorm = layers.layer_norm(
            config.hidden_size, epsilon=config.layer_norm_eps, **make
        )

    def __call__(self, pixels: Float[Array, "b h w c"], last: int) -> list[Array]:
        """All tokens of the `last` layers, each after the last norm."""
        return [self.layernorm(x) for x in self.encoder(self.embeddings(pixels))[-last:]]


class Dinov2ForImageClassification(nnx.Module):
    """DINOv2 with a linear head on what `head_layers` says."""

    def __init__(self, config: Dinov2Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        setattr(self, config.model_type, Dinov2Model(config, dtype=dtype, rngs=rngs))
        if config.num_labels:
            self.classifier = layers.Linear(
                config.head_width, config.num_labels, dtype=dtype, rngs=rngs
            )

    def features(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b f"]:
        """What the head reads."""
        config = self.config
        states = getattr(self, config.model_type)(pixels, max(config.head_layers, 1))
        parts = [x[:, 0] for x in states]
        if config.head_layers:
            parts.append(states[-1][:, 1 + config.num_register_tokens :].mean(1))
        return jnp.concatenate(parts, axis=-1)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits of normalised images."""
        return self.classifier(self.features(pixels))
