"""SigLIP's text and image towers (Zhai et al. 2023, arXiv 2303.15343), and SigLIP 2's.

A two-tower network like CLIP, trained with a sigmoid for each pair of image and text in the place
of a softmax over pairs. Its towers are CLIP's blocks with another beginning and end: images have no
class token and are pooled by attention, texts look both ways and are pooled on their last position,
which is padding in nearly all of them. SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786) has the
same networks at fixed resolutions, with a larger vocabulary. Modules carry Hugging Face's names.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models import layers
from jaxsynth.models.clip import (
    CLIPMLP,
    CLIPEncoder,
    CLIPModel,
    CLIPTextEmbeddings,
    check_tower,
    embed,
    linear,
    norm,
)
from jaxsynth.models.fields import TRANSFORMERS_NOTES, known_fields, square_sizes
from jaxsynth.ops.attention import attention

# The text's end is not looked for, so that its id decides nothing.
_NOTES = TRANSFORMERS_NOTES | {"eos_token_id"}


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig:
    """Shape of the text tower; field names and defaults are transformers'.

    projection_size None is hidden_size.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    projection_size: int | None = None

    def __post_init__(self):
        check_tower(self)
        if self.projection_size is None:
            object.__setattr__(self, "projection_size", self.hidden_size)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a text tower's config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, config, ignored=_NOTES))


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """Shape of the image tower; field names and defaults are transformers'.

    vision_use_head: whether patches are pooled by attention.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    vision_use_head: bool = True

    def __post_init__(self):
        check_tower(self)
        if self.patch_size > self.image_size:
            raise ValueError(
                f"{type(self).__name__}: patch_size {self.patch_size} is larger than "
                f"image_size {self.image_size}"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From an image tower's config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, square_sizes(config), ignored=_NOTES))

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Both towers."""

    text_config: SiglipTextConfig = dataclasses.field(default_factory=SiglipTextConfig)
    vision_config: SiglipVisionConfig = dataclasses.field(default_factory=SiglipVisionConfig)

    def __post_init__(self):
        text, image = self.text_config.projection_size, self.vision_config.hidden_size
        if text != image:
            raise ValueError(
                f"SiglipConfig: text_config.projection_size is {text}, but "
                f"vision_config.hidden_size {image}; expected one width of both towers' features"
            )
        if not self.vision_config.vision_use_head:
            raise ValueError(
                "SiglipConfig: vision_config.vision_use_head is false, expected true: images are "
                "compared with texts by what the pooling head gives"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a SigLIP folder's config.json; an unknown field is a ValueError naming it."""
        config = dict(config)
        text = SiglipTextConfig.from_dict(config.pop("text_config", None) or {})
        vision = SiglipVisionConfig.from_dict(config.pop("vision_config", None) or {})
        return cls(text, vision, **known_fields(cls, config, ignored=_NOTES))

    @property
    def projection_dim(self) -> int:
        """Numbers of an image's or a text's features."""
        return self.vision_config.hidden_size


class SiglipOutput(NamedTuple):
    """What a tower gives.

    `last_hidden_state` (b, t, d) is after the last layer norm; `pooled` (b, p) is one feature of
    the whole; `hidden_states` are the embeddings and each layer's output, not normalised.
    """

    last_hidden_state: Array
    pooled: Array
    hidden_states: tuple[Array, ...]


class SiglipVisionEmbeddings(nnx.Module):
    """Patches and their positions."""

    def __init__(self, config: SiglipVisionConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.shape = (config.image_size, config.image_size, config.num_channels)
        self.patch_embedding = layers.patch_conv(
            config.num_channels, width, config.patch_size, dtype=dtype, rngs=rngs
        )
        self.position_embedding = embed(config.num_patches, width, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        if pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            raise ValueError(
                f"SigLIP vision: images are {pixels.shape}, expected (batch, *{self.shape})"
            )
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        return patches + self.position_embedding(jnp.arange(patches.shape[1]))


class ProbeAttention(nnx.Module):
    """torch's `MultiheadAttention`, in whose files the three projections are one matrix."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
        self.heads = heads
        init = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=-1, out_axis=-2)
        # (out, in), as torch keeps it: the leaf is no `kernel`, which files transpose.
        self.in_proj_weight = nnx.Param(init(rngs.params(), (3 * width, width), jnp.float32))
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * width))
        self.out_proj = linear(width, width, std=width**-0.5, dtype=dtype, rngs=rngs)

    def __call__(
        self, probe: Float[Array, "b q d"], tokens: Float[Array, "b t d"]
    ) -> Float[Array, "b q d"]:
        weights = jnp.split(self.in_proj_weight[...].astype(tokens.dtype), 3)
        biases = jnp.split(self.in_proj_bias[...].astype(tokens.dtype), 3)
        query, key, value = (
            (x @ weight.T + bias).reshape(*x.shape[:2], self.heads, -1)
            for x, weight, bias in zip((probe, tokens, tokens), weights, biases, strict=True)
        )
        return self.out_proj(attention(query, key, value).reshape(probe.shape))


class AttentionPooling(nnx.Module):
    """A learnt query that looks at all patches, and a perceptron (`head` of the checkpoints).

    Zhai et al. 2022, "Scaling Vision Transformers" (arXiv 2106.04560), section 3.3.
    """

    def __init__(self, config: SiglipVisionConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.probe = nnx.Param(
            nnx.initializers.xavier_uniform()(rngs.params(), (1, 1, width), jnp.float32)
        )
        self.attention = ProbeAttention(width, config.num_attention_heads, dtype=dtype, rngs=rngs)
        self.layernorm = norm(config, dtype, rngs)
        self.mlp = CLIPMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        probe = self.probe[...].astype(tokens.dtype)
        probe = jnp.broadcast_to(probe, (tokens.shape[0], 1, tokens.shape[-1]))
        pooled = self.attention(probe, tokens)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipTextTransformer(nnx.Module):
    """The text tower proper (`text_model` of the checkpoints)."""

    def __init__(self, config: SiglipTextConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.embeddings = CLIPTextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = CLIPEncoder(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = norm(config, dtype, rngs)
        self.head = linear(
            width, config.projection_size or width, std=width**-0.5, dtype=dtype, rngs=rngs
        )

    def __call__(self, input_ids: Array, *, remat: str | None = None) -> SiglipOutput:
        states = self.encoder(self.embeddings(input_ids), remat=remat)
        last = self.final_layer_norm(states[-1])
        return SiglipOutput(last, self.head(last[:, -1]), states)


class SiglipVisionTransformer(nnx.Module):
    """The image tower proper (`vision_model` of the checkpoints).

    Without a pooling head `pooled` is the mean of the patches.
    """

    def __init__(self, config: SiglipVisionConfig, *, dtype, rngs: nnx.Rngs):
        self.embeddings = SiglipVisionEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = CLIPEncoder(config, dtype=dtype, rngs=rngs)
        self.post_layernorm = norm(config, dtype, rngs)
        self.has_head = config.vision_use_head
        if self.has_head:
            self.head = AttentionPooling(config, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Array, *, remat: str | None = None) -> SiglipOutput:
        states = self.encoder(self.embeddings(pixels), remat=remat)
        last = self.post_layernorm(states[-1])
        return SiglipOutput(last, self.head(last) if self.has_head else last.mean(1), states)


class SiglipTextModel(nnx.Module):
    """A text tower on its own; computes in `dtype`."""

    def __init__(self, config: SiglipTextConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.text_model = SiglipTextTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "b t"]) -> SiglipOutput:
        """Encode token ids, padded to the length of training: padding is looked at as well."""
        return self.text_model(input_ids)


class SiglipVisionModel(nnx.Module):
    """An image tower on its own; computes in `dtype`."""

    def __init__(self, config: SiglipVisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = SiglipVisionTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> SiglipOutput:
        """Encode images of pixels in [-1, 1]."""
        return self.vision_model(pixels)


class SiglipModel(nnx.Module):
    """Both towers, the log of the inverse temperature and the bias of a pair's logit.

    A pair's logit is `exp(logit_scale) * cosine + logit_bias`, its sigmoid the probability that the
    two belong together (Zhai et al., section 3.2, where both parameters begin at log 10 and -10).
    """

    def __init__(self, config: SiglipConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.text_model = SiglipTextTransformer(config.text_config, dtype=dtype, rngs=rngs)
        self.vision_model = SiglipVisionTransformer(config.vision_config, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.full(1, math.log(10.0), jnp.float32))
        self.logit_bias = nnx.Param(jnp.full(1, -10.0, jnp.float32))

    def project_image(self, pooled: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """What the image tower gives is in the space of texts already."""
        return pooled

    def encode_image(
        self, pixels: Float[Array, "b h w c"], *, remat: str | None = None
    ) -> Float[Array, "b p"]:
        """Image features, not normalised; pixels in [-1, 1]."""
        return self.vision_model(pixels, remat=remat).pooled

    def encode_text(
        self, input_ids: Int[Array, "b t"], *, remat: str | None = None
    ) -> Float[Array, "b p"]:
        """Text features, not normalised; ids padded to the length of training."""
        return self.text_model(input_ids, remat=remat).pooled


# What classifies images by the texts of their classes.
TwoTowers = CLIPModel | SiglipModel
