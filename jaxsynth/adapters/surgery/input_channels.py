"""New input channels for a frozen convolution: a condition beside what it was trained on.

The layer adds what a second convolution of the same form (`side`) makes of the new channels, so
that, merged, it is a plain convolution of more inputs. The old part stays as it is, to the bit. The
untrained layer must ignore the new channels, and there are two ways:

- a kernel of zeros, as InstructPix2Pix (arXiv:2211.09800) starts the channels of the image that it
  edits, and as the zero convolutions of ControlNet start. The default.
- `gate`: a Kaiming-normal kernel times a trained scalar that starts at zero. This is DiffScaler's
  way without zero convolutions (arXiv:2404.09976): the scalar of the Affiner's low-rank path is
  zero in its place. How the paper lets a condition image in is not known.

With a gate the first step moves the scalar alone, because the kernel's gradient is zero with it;
from then on random features of the condition are there to be turned into useful ones.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxsynth.adapters import inject


def extend_input(
    model: inject.T,
    path: str,
    channels: int,
    *,
    gate: bool = False,
    rngs: nnx.Rngs | Key[Array, ""] | None = None,
) -> inject.T:
    """A copy of `model` whose convolution at the dotted `path` reads `channels` more channels.

    They come last. `gate` starts from a random kernel behind a scalar of zero, drawn from `rngs`,
    instead of from a kernel of zeros. Raises ValueError for a path that holds no layer, `channels`
    below 1 or a gate without `rngs`, and TypeError if the layer is no `nnx.Conv`.
    """
    if gate and rngs is None:
        raise ValueError(f"{path}: a gated kernel is random, and needs `rngs`")

    def make(name: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        if type(layer) is not nnx.Conv:
            raise TypeError(f"{name}: only nnx.Conv gets channels, found {type(layer).__name__}")
        return ExtendedInput(layer, channels, name, key if gate else None)

    return inject.inject(model, make, targets=(path,), rngs=nnx.Rngs(0) if rngs is None else rngs)


class ExtendedInput(inject.AdapterLayer):
    """A convolution and, for the channels after its own, another one of the same form (`side`).

    With a `key` the new kernel is Kaiming-normal and `gate` () multiplies it; else it is zero.
    """

    kind = "extended input"

    def __init__(
        self,
        layer: nnx.Conv,
        channels: int,
        path: str = "convolution",
        key: Key[Array, ""] | None = None,
    ):
        super().__init__(layer, None)
        if channels < 1:
            raise ValueError(f"{path}: {channels} new channels, expected at least 1")
        if layer.feature_group_count != 1 or layer.mask is not None:
            raise ValueError(f"{path}: a convolution in groups or with a mask gets no channels")
        zero = key is None
        # He et al. 2015, arXiv:1502.01852: normal with variance 2 / fan_in.
        kaiming = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
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
            kernel_init=nnx.initializers.zeros if zero else kaiming,
            rngs=nnx.Rngs(0 if zero else key),
        )
        self.side.kernel = inject.Trainable(self.side.kernel.get_value())
        self.gate = nnx.data(None) if zero else inject.Trainable(jnp.zeros(()))

    def __call__(self, inputs: Float[Array, "*b h w i"]) -> Float[Array, "*b h2 w2 o"]:
        expected = self.base.in_features + self.side.in_features
        if inputs.shape[-1] != expected:
            raise ValueError(f"expected {expected} input channels, found {inputs.shape[-1]}")
        known, new = jnp.split(inputs, [self.base.in_features], axis=-1)
        out = self.base(known)
        if self.is_off:
            return out
        return out + (self.side(new) * self._factor()).astype(out.dtype)

    def merged(self) -> dict[str, Array]:
        kernel = self.base.kernel[...]
        new = (self._factor() * self.side.kernel[...]).astype(kernel.dtype)
        return {"kernel": jnp.concatenate([kernel, new], axis=-2)}

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        return {"kernel": merged["kernel"][..., : self.base.in_features, :]}

    def _factor(self) -> Array | float:
        return self.strength if self.gate is None else self.strength * self.gate[...]
