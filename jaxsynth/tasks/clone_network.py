"""A vision transformer with what contrastive training adds: heads, a mask token, prototypes.

The heads are those of MoCo v3 and SynCLR: layers of a linear map, batch norm and ReLU, the last
layer's norm without scale. Batch norm takes the statistics of the batch (on a mesh of the whole
batch) and keeps none, because heads are thrown away after training.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxsynth.core.limits import Count, check_limits
from jaxsynth.models import layers
from jaxsynth.models.classifiers.vit import ViTForImageClassification, prepend, token


class BatchNorm(nnx.Module):
    """Normalization by the statistics of the batch alone."""

    def __init__(self, width: int, *, affine: bool = True):
        self.affine = affine
        if affine:
            self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        values = x.astype(jnp.float32)
        mean = values.mean(0)
        values = (values - mean) * jax.lax.rsqrt(jnp.square(values - mean).mean(0) + 1e-5)
        if self.affine:
            values = values * self.scale[...] + self.bias[...]
        return values.astype(x.dtype)


class Head(nnx.Module):
    """`depth` linear layers, batch norm after each, ReLU between."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, depth: int, *, dtype, rngs: nnx.Rngs
    ):
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        make = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.layer = nnx.List([layers.Linear(sizes[i], sizes[i + 1], **make) for i in range(depth)])
        self.norm = nnx.List([BatchNorm(sizes[i + 1], affine=i < depth - 1) for i in range(depth)])

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n e"]:
        for i, (layer, norm) in enumerate(zip(self.layer, self.norm, strict=True)):
            x = norm(layer(x))
            x = jax.nn.relu(x) if i < len(self.layer) - 1 else x
        return x


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Sizes of the heads: `hidden` and `outputs`, and iBOT's `prototypes`."""

    hidden: Count = 4096
    outputs: Count = 256
    prototypes: Count = 65_536

    def __post_init__(self):
        check_limits(self)


class CloneNetwork(nnx.Module):
    """A backbone `vit` without a head of classes, and the heads of one method.

    `projector`: three layers before the contrastive loss. `predictor`: two layers after the
    projection (SynCLR's student). `patches`: a mask token and prototypes of patch tokens (iBOT).
    """

    def __init__(
        self,
        vit: ViTForImageClassification,
        config: HeadsConfig,
        *,
        projector: bool = True,
        predictor: bool = False,
        patches: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.vit = vit
        self.has_predictor, self.has_patches = predictor, patches
        width, make = vit.config.hidden_size, {"dtype": dtype, "rngs": rngs}
        if projector:
            self.projector = Head(width, config.hidden, config.outputs, 3, **make)
        if predictor:
            self.predictor = Head(config.outputs, config.hidden, config.outputs, 2, **make)
        if patches:
            self.mask_token = token(rngs, 1, width)
            self.prototypes = layers.Linear(width, config.prototypes, use_bias=False, **make)

    def tokens(
        self, pixels: Float[Array, "b h w c"], masked: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t1 d"]:
        """All tokens after the last norm, the class token first; `masked` patches are hidden.

        Smaller pictures take the positions of the larger grid, interpolated.
        """
        model = getattr(self.vit, self.vit.config.prefix)
        embeddings = model.embeddings
        patches = embeddings.patch_embeddings(pixels)
        if masked is not None:
            hidden = self.mask_token[...].astype(patches.dtype)
            patches = jnp.where(masked[..., None], hidden, patches)
        positions = embeddings.position_embeddings[...]
        side = round(patches.shape[1] ** 0.5)
        whole = round((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].reshape(1, whole, whole, -1)
        if side != whole:
            grid = jax.image.resize(grid, (1, side, side, grid.shape[-1]), "bicubic")
        positions = jnp.concatenate([positions[:, :1], grid.reshape(1, side * side, -1)], 1)
        x = prepend([embeddings.cls_token], patches) + positions.astype(patches.dtype)
        return model.layernorm(model.encoder(x)[-1])

    def project(self, cls: Float[Array, "b d"]) -> Float[Array, "b e"]:
        """What the contrastive loss compares."""
        return self.projector(cls)

    def predict(self, cls: Float[Array, "b d"]) -> Float[Array, "b e"]:
        """The student's side of it."""
        return self.predictor(self.projector(cls))
