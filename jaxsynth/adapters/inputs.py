"""New input channels for a frozen convolution: a condition beside what it was trained on.

The channels' part of the kernel is trained and starts at zero, so that the untrained layer ignores
them, as InstructPix2Pix (arXiv:2211.09800) starts the channels of the image it edits. The old part
stays as it is, to the bit. Merged, it is a plain convolution of more inputs.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import base


def extend_input(model: base.T, path: str, channels: int) -> base.T:
    """A copy of `model` whose convolution at the dotted `path` reads `channels` more channels.

    They come last. Raises ValueError for a path that holds no layer or `channels` below 1, and
    TypeError if the layer is no `nnx.Conv`.
    """

    def make(name: str, layer: nnx.Module, _: Any) -> base.AdapterLayer:
        if type(layer) is not nnx.Conv:
            raise TypeError(f"{name}: only nnx.Conv gets channels, found {type(layer).__name__}")
        return ExtendedInput(layer, channels, name)

    return base.inject(model, make, targets=(path,), rngs=nnx.Rngs(0))


class ExtendedInput(base.AdapterLayer):
    """A convolution and, for the channels after its own, another one of the same form (`side`)."""

    kind = "extended input"

    def __init__(self, layer: nnx.Conv, channels: int, path: str = "convolution"):
        super().__init__(layer, None)
        if channels < 1:
            raise ValueError(f"{path}: {channels} new channels, expected at least 1")
        if layer.feature_group_count != 1 or layer.mask is not None:
            raise ValueError(f"{path}: a convolution in groups or with a mask gets no channels")
        self.side = nnx.Conv(
            channels,
            layer.out_features,
            layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            kernel_dilation=layer.kernel_dilation,
            use_bias=False,
            dtype=layer.dtype,
            conv_general_dilated=layer.conv_general_dilated,
            kernel_init=nnx.initializers.zeros,
            rngs=nnx.Rngs(0),
        )
        self.side.kernel = base.Trainable(self.side.kernel.get_value())

    def __call__(self, inputs: Float[Array, "*b h w i"]) -> Float[Array, "*b h2 w2 o"]:
        expected = self.base.in_features + self.side.in_features
        if inputs.shape[-1] != expected:
            raise ValueError(f"expected {expected} input channels, found {inputs.shape[-1]}")
        known, new = jnp.split(inputs, [self.base.in_features], axis=-1)
        out = self.base(known)
        if self.is_off:
            return out
        return out + (self.side(new) * self.strength).astype(out.dtype)

    def merged(self) -> dict[str, Array]:
        kernel = self.base.kernel[...]
        new = (self.strength * self.side.kernel[...]).astype(kernel.dtype)
        return {"kernel": jnp.concatenate([kernel, new], axis=-2)}

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        return {"kernel": merged["kernel"][..., : self.base.in_features, :]}
