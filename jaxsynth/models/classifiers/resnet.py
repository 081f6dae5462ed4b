"""Residual networks as classifiers (He et al. 2015, arXiv 1512.03385).

The form of torchvision ("v1.5": the 3x3 convolution of a bottleneck has the stride), which timm's
resnet18 to resnet152 and transformers' share. Modules carry the names of transformers' files.
Batch norm applies its stored statistics, or in training the batch's (`norms.BatchNorm`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers
from jaxsynth.models.fields import known_fields, unused_fields
from jaxsynth.models.norms import BatchNorm

_UNUSED = unused_fields("")
# A bottleneck's inner channels are a quarter of its outer ones.
REDUCTION = 4


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Shape of a residual network; field names and defaults are transformers'.

    head_bias: whether the linear head has one (that of ImageNet-SD, arXiv 2212.08420, has none).
    num_labels 0 leaves the head out.
    """

    model_type: str = "resnet"
    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    num_labels: int = 0
    head_bias: bool = True

    def __post_init__(self):
        layers.activation(self.hidden_act)
        if self.layer_type not in ("basic", "bottleneck"):
            raise ValueError(
                f"ResNetConfig.layer_type: {self.layer_type!r}, expected 'basic' or 'bottleneck'"
            )
        if len(self.depths) != len(self.hidden_sizes):
            raise ValueError(
                f"ResNetConfig: {len(self.depths)} depths for {len(self.hidden_sizes)} hidden_sizes"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        return cls(**known_fields(cls, config, ignored=_UNUSED))


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm, and an activation if given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        activation: Callable[[Array], Array] | None = None,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.convolution = layers.conv2d(
            inputs, outputs, kernel, stride=stride, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.normalization = BatchNorm(outputs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        x = self.normalization(self.convolution(x))
        return x if self.activation is None else self.activation(x)


class ResNetEmbeddings(nnx.Module):
    """The stem: a 7x7 convolution and a maximum over 3x3, each at stride 2."""

    def __init__(self, config: ResNetConfig, **make):
        self.embedder = ConvNorm(
            config.num_channels,
            config.embedding_size,
            7,
            stride=2,
            activation=layers.activation(config.hidden_act),
            **make,
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h4 w4 o"]:
        return nnx.max_pool(self.embedder(x), (3, 3), (2, 2), ((1, 1), (1, 1)))


class ResNetLayer(nnx.Module):
    """A basic (two 3x3) or bottleneck (1x1, 3x3, 1x1) residual block."""

    def __init__(self, config: ResNetConfig, inputs: int, outputs: int, stride: int, **make):
        self.activation = layers.activation(config.hidden_act)
        make["activation"] = self.activation
        self.has_shortcut = inputs != outputs or stride != 1
        if self.has_shortcut:
            self.shortcut = ConvNorm(
                inputs, outputs, 1, stride=stride, **{**make, "activation": None}
            )
        last = {**make, "activation": None}
        if config.layer_type == "basic":
            parts = [
                ConvNorm(inputs, outputs, stride=stride, **make),
                ConvNorm(outputs, outputs, **last),
            ]
        else:
            inner = outputs // REDUCTION
            early = config.downsample_in_bottleneck
            parts = [
                ConvNorm(inputs, inner, 1, stride=stride if early else 1, **make),
                ConvNorm(inner, inner, stride=1 if early else stride, **make),
                ConvNorm(inner, outputs, 1, **last),
            ]
        self.layer = nnx.List(parts)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        residual = self.shortcut(x) if self.has_shortcut else x
        for part in self.layer:
            x = part(x)
        return self.activation(x + residual)


class ResNetStage(nnx.Module):
    """Blocks of one resolution; the first may halve it."""

    def __init__(self, blocks: list[ResNetLayer]):
        self.layers = nnx.List(blocks)

    def __call__(self, x: Array) -> Array:
        for block in self.layers:
            x = block(x)
        return x


class ResNetEncoder(nnx.Module):
    """The stages."""

    def __init__(self, config: ResNetConfig, **make):
        stages, inputs = [], config.embedding_size
        for number, (outputs, depth) in enumerate(
            zip(config.hidden_sizes, config.depths, strict=True)
        ):
            stride = 2 if number or config.downsample_in_first_stage else 1
            blocks = [ResNetLayer(config, inputs, outputs, stride, **make)]
            blocks += [ResNetLayer(config, outputs, outputs, 1, **make) for _ in range(1, depth)]
            stages.append(ResNetStage(blocks))
            inputs = outputs
        self.stages = nnx.List(stages)

    def __call__(self, x: Array) -> Array:
        for stage in self.stages:
            x = stage(x)
        return x


class ResNetModel(nnx.Module):
    """Stem and stages."""

    def __init__(self, config: ResNetConfig, **make):
        self.embedder = ResNetEmbeddings(config, **make)
        self.encoder = ResNetEncoder(config, **make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The last stage's mean over pixels."""
        return self.encoder(self.embedder(x)).mean((1, 2))


class Flatten(nnx.Module):
    """Takes the first place of the head, as in the files, whose linear layer is number 1."""

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1)


class ResNetForImageClassification(nnx.Module):
    """A residual network with a linear head; images of any size from 32 pixels on."""

    def __init__(self, config: ResNetConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        make = {"dtype": dtype, "rngs": rngs}
        self.resnet = ResNetModel(config, **make)
        if config.num_labels:
            head = layers.Linear(
                config.hidden_sizes[-1], config.num_labels, use_bias=config.head_bias, **make
            )
            self.classifier = nnx.List([Flatten(), head])

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits of normalised images."""
        x = self.resnet(pixels)
        for layer in self.classifier:
            x = layer(x)
        return x
