"""Vision transformers as classifiers: ViT, DeiT and the encoder of MAE.

ViT (Dosovitskiy et al. 2020, arXiv 2010.11929), DeiT with its distillation token (Touvron et al.
2020, arXiv 2012.12877), the layer scale of DeiT III (arXiv 2204.07118), CLIP's image tower with a
head of classes (Radford et al. 2021, arXiv 2103.00020), and MAE's encoder without masking (He et
al. 2021, arXiv 2111.06377) differ in tokens, heads, norms and a few names only. Modules carry the
names of transformers' files. Inference only: no dropout, no stochastic depth.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers
from jaxsynth.models.fields import known_fields, square_sizes, unused_fields
from jaxsynth.models.repeat import run_layers
from jaxsynth.ops.attention import attention

# The base model's name in the files, which is all that tells the three apart there.
PREFIXES = {"vit": "vit", "deit": "deit", "vit_mae": "vit"}
_UNUSED = unused_fields(
    """
    decoder_hidden_size decoder_intermediate_size decoder_num_attention_heads
    decoder_num_hidden_layers encoder_stride mask_ratio norm_pix_loss pooler_act pooler_output_size
    """
)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer; field names and defaults are transformers'.

    distilled: a second head on the distillation token (`DeiTForImageClassificationWithTeacher`);
    logits are the mean of both. layer_scale: a factor for each channel after attention and MLP.
    pre_norm: a norm before the first block, and patches without a bias, as in CLIP's image tower.
    num_labels 0 leaves the head out.
    """

    model_type: str = "vit"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    num_labels: int = 0
    distilled: bool = False
    layer_scale: bool = False
    pre_norm: bool = False

    def __post_init__(self):
        if self.model_type not in PREFIXES:
            raise ValueError(
                f"ViTConfig.model_type: {self.model_type!r}, expected one of {sorted(PREFIXES)}"
            )
        layers.check_transformer(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ViTConfig: patch_size {self.patch_size} does not divide image_size "
                f"{self.image_size}"
            )
        if self.distilled and self.model_type != "deit":
            raise ValueError("ViTConfig.distilled: only model_type 'deit' has the second head")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, square_sizes(config), ignored=_UNUSED))

    @property
    def prefix(self) -> str:
        return PREFIXES[self.model_type]

    @property
    def num_positions(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1 + (self.model_type == "deit")


class Dense(nnx.Module):
    """A linear layer under the name `dense`."""

    def __init__(self, inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs):
        self.dense = layers.Linear(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.dense(x)


class SelfAttention(nnx.Module):
    """Multi-head self-attention before its output projection."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, dtype, rngs: nnx.Rngs):
        self.heads = heads
        for name in ("query", "key", "value"):
            projection = layers.Linear(width, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
            setattr(self, name, projection)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        split = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        query, key, value = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        return attention(query, key, value).reshape(x.shape)


class Attention(nnx.Module):
    """Self-attention with its output projection, nested as in transformers' files."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, dtype, rngs: nnx.Rngs):
        self.attention = SelfAttention(width, heads, qkv_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.output = Dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.output(self.attention(x))


class LayerScale(nnx.Module):
    """A learnt factor for each channel (CaiT; Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, width: int):
        self.lambda1 = nnx.Param(jnp.ones(width))

    def __call__(self, x: Array) -> Array:
        return x * self.lambda1[...].astype(x.dtype)


class PatchEmbeddings(nnx.Module):
    """Patches to tokens, row by row."""

    def __init__(
        self, channels: int, width: int, patch: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs
    ):
        self.projection = layers.patch_conv(
            channels, width, patch, use_bias=use_bias, dtype=dtype, rngs=rngs
        )

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        patches = self.projection(pixels)
        return patches.reshape(patches.shape[0], -1, patches.shape[-1])


class ViTEmbeddings(nnx.Module):
    """Class token, distillation token if any, patches, and positions for all of them."""

    def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.shape = (config.image_size, config.image_size, config.num_channels)
        self.cls_token = token(rngs, 1, width)
        self.has_distillation = config.model_type == "deit"
        if self.has_distillation:
            self.distillation_token = token(rngs, 1, width)
        self.patch_embeddings = PatchEmbeddings(
            config.num_channels,
            width,
            config.patch_size,
            use_bias=not config.pre_norm,
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embeddings = token(rngs, config.num_positions, width)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        if pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            raise ValueError(f"ViT: images are {pixels.shape}, expected (batch, *{self.shape})")
        patches = self.patch_embeddings(pixels)
        first = [self.cls_token]
        if self.has_distillation:
            first.append(self.distillation_token)
        return prepend(first, patches) + self.position_embeddings[...].astype(patches.dtype)


class ViTLayer(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        make = {"dtype": dtype, "rngs": rngs}
        norm = {"epsilon": config.layer_norm_eps, **make}
        self.activation = layers.activation(config.hidden_act)
        self.has_scale = config.layer_scale
        self.layernorm_before = layers.layer_norm(width, **norm)
        self.attention = Attention(
            width, config.num_attention_heads, qkv_bias=config.qkv_bias, **make
        )
        self.layernorm_after = layers.layer_norm(width, **norm)
        self.intermediate = Dense(width, inner, **make)
        self.output = Dense(inner, width, **make)
        if self.has_scale:
            self.layer_scale1 = LayerScale(width)
            self.layer_scale2 = LayerScale(width)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        attended = self.attention(self.layernorm_before(x))
        x = x + (self.layer_scale1(attended) if self.has_scale else attended)
        inner = self.activation(self.intermediate(self.layernorm_after(x)))
        inner = self.output(inner)
        return x + (self.layer_scale2(inner) if self.has_scale else inner)


class Encoder(nnx.Module):
    """A stack of blocks under the name `layer`, as the files number them."""

    def __init__(self, blocks: list[nnx.Module]):
        self.layer = nnx.List(blocks)

    def __call__(self, x: Float[Array, "b t d"]) -> list[Float[Array, "b t d"]]:
        """Every block's output."""
        return run_layers(self.layer, x, lambda block, x: block(x))


class ViTModel(nnx.Module):
    """The transformer without a head."""

    def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.embeddings = ViTEmbeddings(config, **make)
        norm = {"epsilon": config.layer_norm_eps, **make}
        self.has_pre_norm = config.pre_norm
        if self.has_pre_norm:
            self.pre_layernorm = layers.layer_norm(config.hidden_size, **norm)
        self.encoder = Encoder([ViTLayer(config, **make) for _ in range(config.num_hidden_layers)])
        self.layernorm = layers.layer_norm(config.hidden_size, **norm)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """All tokens after the last norm."""
        tokens = self.embeddings(pixels)
        if self.has_pre_norm:
            tokens = self.pre_layernorm(tokens)
        return self.layernorm(self.encoder(tokens)[-1])


class ViTForImageClassification(nnx.Module):
    """A vision transformer with a linear head on its class token, or two heads if distilled."""

    def __init__(self, config: ViTConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        make = {"dtype": dtype, "rngs": rngs}
        setattr(self, config.prefix, ViTModel(config, **make))
        names = ("cls_classifier", "distillation_classifier")
        for name in (names if config.distilled else ("classifier",)) if config.num_labels else ():
            setattr(self, name, layers.Linear(config.hidden_size, config.num_labels, **make))

    def tokens(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """All tokens after the last norm; the class token is the first."""
        return getattr(self, self.config.prefix)(pixels)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits of normalised images."""
        tokens = self.tokens(pixels)
        if not self.config.distilled:
            return self.classifier(tokens[:, 0])
        logits = self.cls_classifier(tokens[:, 0]) + self.distillation_classifier(tokens[:, 1])
        return logits / 2


def token(rngs: nnx.Rngs, count: int, width: int) -> nnx.Param:
    """Learnt tokens (1, count, width)."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, count, width)))


def prepend(tokens: list[nnx.Param], patches: Float[Array, "b t d"]) -> Array:
    """Tokens that are the same for every image, before its patches."""
    shape = (patches.shape[0], 1, patches.shape[-1])
    first = [
        jnp.broadcast_to(each[...].astype(patches.dtype), (shape[0], *each.shape[1:]))
        for each in tokens
    ]
    return jnp.concatenate([*first, patches], axis=1)
