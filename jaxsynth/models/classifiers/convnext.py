"""ConvNeXt as a classifier (Liu et al. 2022, arXiv 2201.03545).

Blocks of a 7x7 depthwise convolution, LayerNorm, and a perceptron over channels, with layer scale;
a strided convolution after a norm between stages. Modules carry the names of transformers' files.
Inference only: no stochastic depth.
"""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers
from jaxsynth.models.fields import known_fields, square_sizes, unused_fields

_UNUSED = unused_fields("image_size num_stages")
# transformers fixes it for all norms but the last, whose epsilon is in the config.
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
    """Shape of a ConvNeXt; field names and defaults are transformers'.

    layer_scale_init_value 0 means that there is no layer scale. num_labels 0 leaves the head out.
    """

    model_type: str = "convnext"
    num_channels: int = 3
    patch_size: int = 4
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    layer_scale_init_value: float = 1e-6
    num_labels: int = 0

    def __post_init__(self):
        layers.activation(self.hidden_act)
        if len(self.depths) != len(self.hidden_sizes):
            raise ValueError(
                f"ConvNextConfig: {len(self.depths)} depths for {len(self.hidden_sizes)} "
                "hidden_sizes"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, square_sizes(config), ignored=_UNUSED))


class ConvNextEmbeddings(nnx.Module):
    """Patches, normalised."""

    def __init__(self, config: ConvNextConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_sizes[0]
        make = {"dtype": dtype, "rngs": rngs}
        self.patch_embeddings = layers.patch_conv(
            config.num_channels, width, config.patch_size, **make
        )
        self.layernorm = layers.layer_norm(width, epsilon=_EPSILON, **make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.layernorm(self.patch_embeddings(x))


class ConvNextLayer(nnx.Module):
    """A residual block."""

    def __init__(self, config: ConvNextConfig, width: int, *, dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.activation = layers.activation(config.hidden_act)
        self.dwconv = layers.conv2d(width, width, 7, groups=width, **make)
        self.layernorm = layers.layer_norm(width, epsilon=_EPSILON, **make)
        self.pwconv1 = layers.Linear(width, 4 * width, **make)
        self.pwconv2 = layers.Linear(4 * width, width, **make)
        self.has_scale = config.layer_scale_init_value > 0
        if self.has_scale:
            self.layer_scale_parameter = nnx.Param(
                jnp.full(width, config.layer_scale_init_value, jnp.float32)
            )

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        inner = self.activation(self.pwconv1(self.layernorm(self.dwconv(x))))
        inner = self.pwconv2(inner)
        if self.has_scale:
            inner = inner * self.layer_scale_parameter[...].astype(inner.dtype)
        return x + inner


class ConvNextStage(nnx.Module):
    """Blocks of one resolution, after a norm and a 2x2 convolution that halve it if not first."""

    def __init__(
        self, config: ConvNextConfig, inputs: int, outputs: int, depth: int, *, first: bool, **make
    ):
        self.downsampling_layer = nnx.List(
            []
            if first
            else [
                layers.layer_norm(inputs, epsilon=_EPSILON, **make),
                layers.patch_conv(inputs, outputs, 2, **make),
            ]
        )
        self.layers = nnx.List([ConvNextLayer(config, outputs, **make) for _ in range(depth)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.downsampling_layer, *self.layers):
            x = layer(x)
        return x


class ConvNextEncoder(nnx.Module):
    """The stages."""

    def __init__(self, config: ConvNextConfig, **make):
        widths = config.hidden_sizes
        inputs = (widths[0], *widths)
        self.stages = nnx.List(
            ConvNextStage(config, inputs[i], widths[i], depth, first=i == 0, **make)
            for i, depth in enumerate(config.depths)
        )

    def __call__(self, x: Array) -> Array:
        for stage in self.stages:
            x = stage(x)
        return x


class ConvNextModel(nnx.Module):
    """Embeddings, stages, and a norm of the mean over pixels."""

    def __init__(self, config: ConvNextConfig, **make):
        self.embeddings = ConvNextEmbeddings(config, **make)
        self.encoder = ConvNextEncoder(config, **make)
        self.layernorm = layers.layer_norm(
            config.hidden_sizes[-1], epsilon=config.layer_norm_eps, **make
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        return self.layernorm(self.encoder(self.embeddings(x)).mean((1, 2)))


class ConvNextForImageClassification(nnx.Module):
    """A ConvNeXt with a linear head; images of any size that leaves a pixel."""

    def __init__(self, config: ConvNextConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        make = {"dtype": dtype, "rngs": rngs}
        self.convnext = ConvNextModel(config, **make)
        if config.num_labels:
            self.classifier = layers.Linear(config.hidden_sizes[-1], config.num_labels, **make)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits of normalised images."""
        return self.classifier(self.convnext(pixels))
