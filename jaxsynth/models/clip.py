"""CLIP's text and image towers (Radford et al. 2021, arXiv 2103.00020).

The text tower conditions Stable Diffusion (OpenAI's L/14 in 1.x, OpenCLIP's H in 2.x, which ships
with its last layer cut off, L/14 and OpenCLIP's bigG in XL); both towers together are the
classifier that synthetic images train.
Modules carry Hugging Face's names, `pre_layrnorm` included, so weight paths map one to one.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models import layers
from jaxsynth.models.fields import TRANSFORMERS_NOTES, known_fields
from jaxsynth.models.repeat import run_layers
from jaxsynth.ops.attention import attention

# The value that transformers wrote into every CLIP config before its pull request 24773; it means
# "the highest id of the sequence", as OpenAI's end-of-text token is the last of the vocabulary.
LEGACY_EOS = 2

# Statistics of the images that OpenAI trained on, per channel of pixels in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of the text tower; field names and defaults are transformers'."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    eos_token_id: int = 49407

    def __post_init__(self):
        check_tower(self)
        if not isinstance(self.eos_token_id, int):
            raise ValueError(
                f"CLIPTextConfig.eos_token_id: expected an int, got {self.eos_token_id}"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a text encoder's config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, config, ignored=TRANSFORMERS_NOTES))


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of the image tower; field names and defaults are transformers'."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self):
        check_tower(self)
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"CLIPVisionConfig.{name}: expected an int (square), got {value!r}"
                )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"CLIPVisionConfig: patch_size {self.patch_size} is larger than "
                f"image_size {self.image_size}"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a vision tower's config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, config, ignored=TRANSFORMERS_NOTES))

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the dimension that they are projected to."""

    text_config: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a CLIP folder's config.json.

        Old files repeat a tower as `text_config_dict` / `vision_config_dict`; as in transformers
        those win, with defaults for the fields that they leave out.
        """
        config = dict(config)
        towers = {}
        for name, tower in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            override = config.pop(f"{name}_dict", None)
            source = override if override is not None else config.pop(name, None)
            config.pop(name, None)
            towers[name] = tower.from_dict(source or {})
        return cls(**known_fields(cls, config, ignored=TRANSFORMERS_NOTES), **towers)


class TowerConfig(Protocol):
    """What the blocks of a tower read of its config: CLIP's here, SigLIP's in `models.siglip`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def attention_dropout(self) -> float: ...


class TextConfig(TowerConfig, Protocol):
    """What the embeddings of a text read besides."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


def check_tower(config: TowerConfig) -> None:
    """ValueError for sizes that do not fit each other, or dropout, which no tower here has."""
    layers.check_transformer(config)
    if config.attention_dropout:
        raise ValueError(
            f"{type(config).__name__}.attention_dropout: {config.attention_dropout}, "
            "only 0 is supported"
        )


class CLIPTextOutput(NamedTuple):
    """What the text tower gives.

    `last_hidden_state` (b, t, d) is after the final layer norm; `pooled` (b, d) is its value at the
    end-of-text token; `hidden_states` are the embeddings and each layer's output, not normalised.
    """

    last_hidden_state: Array
    pooled: Array
    hidden_states: tuple[Array, ...]


class ProjectedText(NamedTuple):
    """What the text tower with its projection gives.

    `text_embeds` (b, p) is the projected `pooled`; the rest as in `CLIPTextOutput`.
    """

    text_embeds: Array
    last_hidden_state: Array
    pooled: Array
    hidden_states: tuple[Array, ...]


class CLIPVisionOutput(NamedTuple):
    """What the image tower gives.

    `last_hidden_state` (b, 1 + patches, d) is without the last norm, as in transformers; `pooled`
    (b, d) is the class token after it; `hidden_states` start after `pre_layrnorm`.
    """

    last_hidden_state: Array
    pooled: Array
    hidden_states: tuple[Array, ...]


class CLIPAttention(nnx.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self, config: TowerConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        inner = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
        for name, std in (("q", inner), ("k", inner), ("v", inner), ("out", width**-0.5)):
            setattr(self, f"{name}_proj", linear(width, width, std=std, dtype=dtype, rngs=rngs))

    def __call__(self, x: Array, mask: Array | None, causal: bool) -> Array:
        split = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        query, key, value = (proj(x).reshape(split) for proj in self.projections())
        return self.out_proj(
            attention(query, key, value, mask=mask, causal=causal).reshape(x.shape)
        )

    def projections(self):
        return self.q_proj, self.k_proj, self.v_proj


class CLIPMLP(nnx.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, config: TowerConfig, *, dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = layers.activation(config.hidden_act)
        self.fc1 = linear(width, inner, std=(2 * width) ** -0.5, dtype=dtype, rngs=rngs)
        std = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
        self.fc2 = linear(inner, width, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TowerConfig, *, dtype, rngs: nnx.Rngs):
        self.layer_norm1 = norm(config, dtype, rngs)
        self.self_attn = CLIPAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = norm(config, dtype, rngs)
        self.mlp = CLIPMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None, causal: bool) -> Array:
        x = x + self.self_attn(self.layer_norm1(x), mask, causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """A stack of blocks; a python list because Hugging Face numbers the layers in their names."""

    def __init__(self, config: TowerConfig, *, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(
            CLIPEncoderLayer(config, dtype=dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )

    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        causal: bool = False,
        *,
        remat: str | None = None,
    ):
        """The embeddings and every layer's output, a tuple of layers + 1 arrays (b, t, d).

        `remat` names what of each layer the backward pass computes again (`models.remat`).
        """
        run = run_layers(self.layers, x, lambda layer, x: layer(x, mask, causal), remat=remat)
        return (x, *run)


class CLIPTextEmbeddings(nnx.Module):
    """Token plus position embeddings."""

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.token_embedding = embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embedding = embed(
            config.max_position_embeddings, width, dtype=dtype, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "b t"]) -> Array:
        longest = self.position_embedding.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"text tower: {input_ids.shape[1]} tokens, but max_position_embeddings is {longest}"
            )
        positions = jnp.arange(input_ids.shape[1])
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class CLIPVisionEmbeddings(nnx.Module):
    """Class token, patch embeddings and positions."""

    def __init__(self, config: CLIPVisionConfig, *, dtype, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.shape = (config.image_size, config.image_size, config.num_channels)
        self.class_embedding = nnx.Param(
            jax.random.normal(rngs.params(), (width,), jnp.float32) * width**-0.5
        )
        self.patch_embedding = layers.patch_conv(
            config.num_channels,
            width,
            patch,
            use_bias=False,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = embed(config.num_patches + 1, width, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Array:
        if pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            raise ValueError(
                f"CLIP vision: images are {pixels.shape}, expected (batch, *{self.shape})"
            )
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = self.class_embedding[...].astype(patches.dtype)
        first = jnp.broadcast_to(first, (patches.shape[0], 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPTextTransformer(nnx.Module):
    """The text tower proper (`text_model` of the checkpoints)."""

    def __init__(self, config: CLIPTextConfig, *, dtype, rngs: nnx.Rngs):
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = CLIPEncoder(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = norm(config, dtype, rngs)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        remat: str | None = None,
    ) -> CLIPTextOutput:
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        states = self.encoder(self.embeddings(input_ids), mask, causal=True, remat=remat)
        last = self.final_layer_norm(states[-1])
        legacy = self.eos_token_id == LEGACY_EOS
        scores = input_ids if legacy else input_ids == self.eos_token_id
        pooled = last[jnp.arange(last.shape[0]), jnp.argmax(scores, axis=-1)]
        return CLIPTextOutput(last, pooled, states)


class CLIPVisionTransformer(nnx.Module):
    """The image tower proper (`vision_model` of the checkpoints)."""

    def __init__(self, config: CLIPVisionConfig, *, dtype, rngs: nnx.Rngs):
        self.embeddings = CLIPVisionEmbeddings(config, dtype=dtype, rngs=rngs)
        self.pre_layrnorm = norm(config, dtype, rngs)
        self.encoder = CLIPEncoder(config, dtype=dtype, rngs=rngs)
        self.post_layernorm = norm(config, dtype, rngs)

    def __call__(self, pixels: Array, *, remat: str | None = None) -> CLIPVisionOutput:
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), remat=remat)
        return CLIPVisionOutput(states[-1], self.post_layernorm(states[-1][:, 0]), states)


class CLIPTextModel(nnx.Module):
    """A text encoder on its own, as Stable Diffusion ships it; computes in `dtype`."""

    def __init__(self, config: CLIPTextConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Array | None = None
    ) -> CLIPTextOutput:
        """Encode token ids; `attention_mask` (b, t), if given, is non-zero where a token counts."""
        return self.text_model(input_ids, attention_mask)


class CLIPTextModelWithProjection(nnx.Module):
    """A text encoder with its projection, as SDXL ships its second; computes in `dtype`."""

    def __init__(self, config: CLIPTextConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, dtype=dtype, rngs=rngs)
        self.text_projection = linear(
            config.hidden_size,
            config.projection_dim,
            std=config.hidden_size**-0.5,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Array | None = None
    ) -> ProjectedText:
        """Encode token ids, as `CLIPTextModel` does; the embeddings are not normalised."""
        found = self.text_model(input_ids, attention_mask)
        return ProjectedText(self.text_projection(found.pooled), *found)


class CLIPVisionModel(nnx.Module):
    """An image encoder on its own, without the projection."""

    def __init__(self, config: CLIPVisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = CLIPVisionTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> CLIPVisionOutput:
        """Encode images normalised with CLIP's mean and standard deviation."""
        return self.vision_model(pixels)


class CLIPVisionModelWithProjection(nnx.Module):
    """An image encoder on its own, with the projection."""

    def __init__(self, config: CLIPVisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = CLIPVisionTransformer(config, dtype=dtype, rngs=rngs)
        self.visual_projection = linear(
            config.hidden_size,
            config.projection_dim,
            std=config.hidden_size**-0.5,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )


class CLIPModel(nnx.Module):
    """Both towers, their projections and the log of the inverse temperature."""

    def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        text, vision = config.text_config, config.vision_config
        self.text_model = CLIPTextTransformer(text, dtype=dtype, rngs=rngs)
        self.vision_model = CLIPVisionTransformer(vision, dtype=dtype, rngs=rngs)
        for name, width in (("text", text.hidden_size), ("visual", vision.hidden_size)):
            projection = linear(
                width,
                config.projection_dim,
                std=width**-0.5,
                use_bias=False,
                dtype=dtype,
                rngs=rngs,
            )
            setattr(self, f"{name}_projection", projection)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def project_image(self, pooled: Float[Array, "b d"]) -> Float[Array, "b p"]:
        """What the image tower gives, in the space of texts."""
        return self.visual_projection(pooled)

    def encode_image(
        self, pixels: Float[Array, "b h w c"], *, remat: str | None = None
    ) -> Float[Array, "b p"]:
        """Projected image features, not normalised; pixels normalised with CLIP's mean and std."""
        return self.project_image(self.vision_model(pixels, remat=remat).pooled)

    def encode_text(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Array | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "b p"]:
        """Projected text features, not normalised."""
        return self.text_projection(self.text_model(input_ids, attention_mask, remat=remat).pooled)


def linear(d_in: int, d_out: int, *, std: float, dtype, rngs, use_bias: bool = True) -> nnx.Linear:
    """A Linear with CLIP's initialisation (Radford et al., section 2.5, and OpenAI's code)."""
    return layers.Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )


def embed(count: int, width: int, *, dtype, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(0.02)
    return nnx.Embed(count, width, dtype=dtype, embedding_init=init, rngs=rngs)


def norm(config: TowerConfig, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layers.layer_norm(
        config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs
    )
