"""The networks that studies train from scratch or from a checkpoint, and how they see images.

A vision transformer or a residual network of any size, of square uint8 images. Batch norm is used
with statistics of the training images that are computed once after training ("precise" batch norm,
Wu and Johnson 2021, arXiv 2105.07576, section 3): running averages would be one more thing to carry
through a compiled step, and lag behind the parameters.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Count, OneOf, Positive, check_limits
from jaxsynth.models.classifiers.resnet import ResNetConfig, ResNetForImageClassification
from jaxsynth.models.classifiers.vit import ViTConfig, ViTForImageClassification
from jaxsynth.models.norms import BatchNorm, Statistics
from jaxsynth.weights.networks.classifiers import Classifier

FAMILIES = ("vit", "resnet")
# Fields that one family alone has.
_OWN = {"vit": ("patch_size", "layers", "heads"), "resnet": ("depths",)}
# A checkpoint may have another head.
_HEAD = ("num_labels", "head_bias")
# A batch norm's statistics settle on so many batches.
SETTLING = 16


@dataclass(frozen=True)
class NetworkConfig:
    """A network for square images of `image_size` pixels.

    "vit": a vision transformer on patches of `patch_size`, `layers` blocks of `width` channels with
    `heads` heads. ViT-S/16 has width 384, 12 layers and 6 heads, ViT-B/16 768, 12 and 12. "resnet":
    a residual network of bottleneck blocks, `depths` of them in each stage, whose stem has `width`
    channels and whose stages have 4, 8, 16, ... times as many. ResNet-50 has width 64 and depths
    (3, 4, 6, 3). Pixels in [0, 1] are normalized by `mean` and `std`. `epsilon` is that of layer
    norms; batch norms have 1e-5. Products are computed in `dtype`, parameters are float32.
    """

    family: Annotated[str, OneOf(*FAMILIES)] = "vit"
    image_size: Count = 32
    patch_size: Count = 8
    width: Count = 64
    layers: Count = 4
    heads: Count = 4
    depths: tuple[Count, ...] = ()
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    epsilon: Positive = 1e-6
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"

    def __post_init__(self):
        check_limits(self)
        if min(self.std) <= 0:
            raise ValueError(f"std: {self.std}, expected values above 0")
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        other = next(name for name in FAMILIES if name != self.family)
        for name in (*_OWN[other], *(["epsilon"] if self.family == "resnet" else [])):
            if getattr(self, name) != plain[name]:
                raise ValueError(
                    f"{name}: {getattr(self, name)}, but the family is {self.family!r}, which has "
                    f"none; leave it out"
                )
        if self.family == "resnet" and not self.depths:
            raise ValueError("depths: (), expected the blocks of each stage of family 'resnet'")
        self.described(0)

    def described(self, num_labels: int) -> ViTConfig | ResNetConfig:
        """The network's own configuration; ValueError where the sizes do not fit each other."""
        if self.family == "resnet":
            return ResNetConfig(
                embedding_size=self.width,
                hidden_sizes=tuple(4 * self.width * 2**i for i in range(len(self.depths))),
                depths=self.depths,
                num_labels=num_labels,
            )
        return ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            layer_norm_eps=self.epsilon,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_labels=num_labels,
        )

    def make(self, num_labels: int, key: Array) -> nnx.Module:
        """The network at its random start; 0 labels leave the head out."""
        kinds = {"vit": ViTForImageClassification, "resnet": ResNetForImageClassification}
        config, kind = self.described(num_labels), kinds[self.family]
        return kind(config, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(params=key))

    def normalized(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """What the network is given of images in [0, 1]."""
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        return ((images - mean) / std).astype(self.dtype)


class Network(Protocol):
    """What a training knows of its network; compared by value, as programs are kept by it."""

    @property
    def image_size(self) -> int: ...

    def make(self, num_labels: int, key: Array) -> nnx.Module: ...

    def normalized(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]: ...


@dataclass(frozen=True)
class CheckpointNetwork:
    """The network of a checkpoint, whatever it is, with a head for other classes."""

    kind: Callable[..., nnx.Module]
    config: Any
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, found: Classifier) -> "CheckpointNetwork":
        seen = found.preprocessing
        mean, std = (tuple(map(float, values)) for values in (seen.mean, seen.std))
        return cls(type(found.model), found.model.config, found.image_size, mean, std)

    def make(self, num_labels: int, key: Array) -> nnx.Module:
        """The network at a random start."""
        config = dataclasses.replace(self.config, num_labels=num_labels)
        return self.kind(config, rngs=nnx.Rngs(params=key))

    def normalized(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """What the network is given of images in [0, 1]."""
        return (images - np.float32(self.mean)) / np.float32(self.std)


def started(model: nnx.Module, network: Network, backbone: Classifier) -> nnx.Module:
    """`model` with the weights of a checkpoint of the same network; the head keeps its start.

    UserError naming a field of the checkpoint that `network` does not agree with.
    """
    if isinstance(network, NetworkConfig):
        _check_fits(network, backbone)
    graphdef, state = nnx.split(model)
    arrays = dict(nnx.to_flat_state(nnx.state(backbone.model)))
    filled = [
        (path, leaf if _of_head(path) else leaf.replace(arrays[path].get_value()))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _of_head(path: tuple) -> bool:
    """The classifier, or one of a distilled network's two."""
    return "classifier" in str(path[0])


def _check_fits(network: NetworkConfig, backbone: Classifier) -> None:
    folder = backbone.folder or Path("backbone")
    own = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    for name in ("mean", "std"):
        found = tuple(map(float, getattr(backbone.preprocessing, name)))
        if not np.allclose(found, own[name], atol=1e-6):
            raise UserError(
                f"backbone: {folder}: {name} {found}, but network.{name} is {own[name]}"
            )
    found, wanted = backbone.model.config, network.described(0)
    if type(found) is not type(wanted):
        raise UserError(
            f"backbone: {folder} is a {found.model_type}, but network.family is {network.family!r}"
        )
    for field in dataclasses.fields(wanted):
        values = getattr(found, field.name), getattr(wanted, field.name)
        # MAE's encoder is a ViT.
        if field.name in _HEAD or set(values) == {"vit", "vit_mae"} or values[0] == values[1]:
            continue
        raise UserError(
            f"backbone: {folder}: {field.name} {values[0]}, but that of `network` is {values[1]}; "
            "set network's fields to the checkpoint's"
        )


def in_training(model: nnx.Module) -> nnx.Module:
    """A copy whose batch norms take the statistics of the batch."""
    return _normalized_by(model, "batch")


def _normalized_by(model: nnx.Module, statistics: Statistics) -> nnx.Module:
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.statistics = statistics
    return model


def settled(model: nnx.Module, batches: Iterable[Float[Array, "b h w 3"]]) -> nnx.Module:
    """A trained network with the statistics of these batches of pixels, ready for use.

    E[mean] and E[var + mean^2] - E[mean]^2 over the batches of each batch norm; a network without
    any is returned as it is, and no batch is looked at.
    """
    graphdef, stats, rest = nnx.split(_normalized_by(model, "recorded"), nnx.BatchStat, ...)
    if not jax.tree.leaves(stats):
        return model
    found = [_statistics(graphdef, stats, rest, pixels) for pixels in batches]
    moments = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    flat = dict(nnx.to_flat_state(moments))
    merged = []
    for path, leaf in flat.items():
        value = leaf.get_value()
        mean = flat[(*path[:-1], "running_mean")].get_value()
        if path[-1] == "running_var":
            value = value + jnp.square(mean - mean.mean(0))
        merged.append((path, leaf.replace(value.mean(0))))
    return _normalized_by(nnx.merge(graphdef, nnx.from_flat_state(merged), rest), "stored")


@partial(jax.jit, static_argnums=0)
def _statistics(graphdef, stats, rest, pixels):
    model = nnx.merge(graphdef, stats, rest)
    model(pixels)
    return nnx.state(model, nnx.BatchStat)


def statistics_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """The statistics of a network's batch norms by their dotted paths; {} where it has none."""
    state = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in state}


def with_statistics(model: nnx.Module, arrays: dict[str, np.ndarray]) -> nnx.Module:
    """`model` with the statistics that `statistics_of` gave."""
    graphdef, stats, rest = nnx.split(model, nnx.BatchStat, ...)
    flat = nnx.to_flat_state(stats)
    filled = [(p, x.replace(jax.device_put(arrays[".".join(map(str, p))]))) for p, x in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled), rest)


@dataclass(frozen=True)
class _Logits:
    """Compared by value, so that all networks of one shape share a compiled program."""

    network: Network

    def __call__(self, model: nnx.Module, images: Array) -> Array:
        return model(self.network.normalized(images)).astype(jnp.float32)


@dataclass(frozen=True)
class _ClassTokens:
    network: NetworkConfig

    def __call__(self, model: nnx.Module, images: Array) -> Array:
        return model.tokens(self.network.normalized(images))[:, 0].astype(jnp.float32)


def of_pixels(model: nnx.Module, network: NetworkConfig) -> Partial:
    """A function of images (b, h, w, 3) in [0, 1] to float32 logits; the weights are arguments."""
    return Partial(_Logits(network), model)


def logits_of(
    model: nnx.Module,
    network: Network,
    images: UInt8[np.ndarray, "n h w 3"],
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, "n c"]:
    """Logits of all images, in order."""
    return _by_batches(_Logits(network), model, images, batch_size)


def features_of(
    backbone: nnx.Module,
    network: NetworkConfig,
    images: UInt8[np.ndarray, "n h w 3"],
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, "n d"]:
    """A vision transformer's class token of every image, in order."""
    return _by_batches(_ClassTokens(network), backbone, images, batch_size)


@partial(jax.jit, static_argnums=0)
def _apply(function, model: nnx.Module, images: Array) -> Array:
    return function(model, images)


def _by_batches(
    function: Callable[[nnx.Module, Array], Array], model: nnx.Module, images: Any, batch_size: int
) -> np.ndarray:
    """`function(model, images in [0, 1])` of all images, in order; one program for all models."""
    found = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        filled = np.resize(part, (min(batch_size, len(images)), *part.shape[1:]))
        given = jnp.asarray(filled, jnp.float32) / 255
        found.append(np.asarray(_apply(function, model, given))[: len(part)])
    return np.concatenate(found)
