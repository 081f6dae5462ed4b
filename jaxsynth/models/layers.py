"""The layers below every network: NNX's own, with the conventions of the torch checkpoints.

NNX's defaults differ from torch's in ways that parity tests catch late: the fast variance of
`nnx.GroupNorm` and `nnx.LayerNorm` is off by percents where the mean is large, the epsilon is 1e-6
instead of 1e-5, and GELU is the tanh form. These constructors fix each once.

What a network has dozens of is jitted by itself: it is traced and differentiated once for each
shape, and XLA inlines it into the program.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxsynth.ops.backend import backend

Linear = nnx.Linear
# NNX's own default, by name.
_LECUN = nnx.initializers.lecun_normal()


class InitKeys:
    """Initialisation keys drawn from `rngs` once and then counted in Python.

    It stands in for `nnx.Rngs` inside the constructors. Under a trace every draw from `nnx.Rngs`
    asks a traced counter for its sharding, whose (discarded) error message walks all equations so
    far: quadratic in the number of layers, and most of the time of an abstract build.
    """

    def __init__(self, rngs: nnx.Rngs):
        self._key = rngs.params()
        self._count = 0

    def params(self) -> Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm` of a feature map, its sums taken per channel before they are grouped.

    NNX's splits the channels into (group, channel of the group) first, and loops over so short a
    last axis are slow on CPU: forward and backward take 1.7 times as long.
    """

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        fixed = (self.num_groups, self.epsilon, self.dtype)
        return _normalize_groups(x, self.scale[...], self.bias[...], *fixed)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _normalize_groups(
    x: Array, scale: Array, bias: Array, groups: int, epsilon: float, dtype: Any
) -> Array:
    batch, height, width, channels = x.shape
    size = channels // groups

    def group_mean(values: Array) -> Array:
        sums = values.sum((1, 2)).reshape(batch, groups, size).sum(-1)
        means = sums / (height * width * size)
        return jnp.repeat(means, size, axis=-1)[:, None, None]

    wide = x.astype(jnp.float32)
    centred = wide - group_mean(wide)
    inverse = jax.lax.rsqrt(group_mean(jnp.square(centred)) + epsilon)
    return (centred * (inverse * scale) + bias).astype(dtype)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, to its bits, as one jitted function."""

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return _normalize_rows(x, self.scale[...], self.bias[...], self.epsilon, self.dtype)


@partial(jax.jit, static_argnums=(3, 4))
def _normalize_rows(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Any) -> Array:
    x, scale, bias = (value.astype(dtype) for value in (x, scale, bias))
    wide = x.astype(jnp.promote_types(dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((x - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + bias).astype(dtype)


def group_norm(
    groups: int, channels: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    """GroupNorm over (batch, height, width, channel), statistics in float32."""
    return GroupNorm(
        channels,
        num_groups=groups,
        epsilon=epsilon,
        dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def layer_norm(
    channels: int, *, epsilon: float = 1e-5, dtype: jnp.dtype, rngs: nnx.Rngs
) -> LayerNorm:
    """LayerNorm over the last axis, statistics in float32."""
    return LayerNorm(channels, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = _LECUN,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A 2-D convolution over NHWC with torch's explicit padding ("SAME" differs at stride 2).

    `padding` None means `kernel_size // 2` on every side. The bias starts at zero.
    """
    if padding is None:
        padding = kernel_size // 2
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=dtype,
        conv_general_dilated=convolve,
        rngs=rngs,
    )


def convolve(lhs: Array, rhs: Array, window_strides, padding, **kwargs) -> Array:
    """`lax.conv_general_dilated` for NHWC, as one matrix product where that is faster.

    On CPU only, by shape; see `_prefers_product`. A convolution of each channel on its own is a sum
    of shifted images there. Everything else is XLA's convolution.
    """
    if backend() == "cpu" and _is_plain(lhs, kwargs):
        strides, pads = tuple(window_strides), tuple(padding)
        groups = kwargs.get("feature_group_count", 1)
        if groups == 1 and _prefers_product(lhs.shape, rhs.shape, strides, pads):
            return _product_convolve(lhs, rhs, strides, pads)
        # Padded so that the size stays, as gradients are such convolutions too.
        same = all(pad == (k // 2, k // 2) for pad, k in zip(pads, rhs.shape[:2], strict=True))
        odd = all(k % 2 for k in rhs.shape[:2])
        channels = lhs.shape[-1] == rhs.shape[-1]
        if groups == lhs.shape[-1] > 1 and channels and same and odd and strides == (1, 1):
            return _depthwise(lhs, rhs)
    return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)


def _is_plain(lhs: Array, kwargs: dict) -> bool:
    """Whether this is a 2-D convolution without dilation or a chosen precision."""
    dilations = (*(kwargs.get("lhs_dilation") or ()), *(kwargs.get("rhs_dilation") or ()))
    return lhs.ndim == 4 and all(d == 1 for d in dilations) and kwargs.get("precision") is None


def _output_size(size: int, kernel: int, stride: int, pad: tuple[int, int]) -> int:
    return (size + sum(pad) - kernel) // stride + 1


def _prefers_product(lhs_shape, rhs_shape, strides, padding) -> bool:
    """Whether gathering the windows and multiplying beats XLA's CPU convolution.

    Measured in CPU milliseconds, float32, forward with both gradients, XLA against product:
    - 1x1: 5.5 / 4.2 for (64, 8, 8, 96) to 192: its kernel gradient is a convolution to XLA;
    - no more output pixels than output channels, so that the kernel outweighs the windows, which
      XLA transposes for the input gradient: 62 / 30 for (2, 8, 8, 1280) to 640, and 40 / 21
      without the kernel gradient;
    - at most 2x2 output pixels, where XLA falls back to a plain loop: 40 / 3.3 for (64, 2, 2, 192);
    - otherwise windows nine times the input cost more than they save: 41 / 76 for
      (64, 8, 8, 288) to 96, a tie around (64, 4, 4, 192).
    """
    kh, kw, _, out_channels = rhs_shape
    if (kh, kw) == (1, 1):
        return True
    height = _output_size(lhs_shape[1], kh, strides[0], padding[0])
    width = _output_size(lhs_shape[2], kw, strides[1], padding[1])
    return lhs_shape[0] * height * width <= out_channels or height * width <= 4


@partial(jax.jit, static_argnums=(2, 3))
def _product_convolve(lhs: Array, rhs: Array, strides: tuple, padding: tuple) -> Array:
    kh, kw, in_channels, out_channels = rhs.shape
    height = _output_size(lhs.shape[1], kh, strides[0], padding[0])
    width = _output_size(lhs.shape[2], kw, strides[1], padding[1])
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0))) if any(map(sum, padding)) else lhs
    windows = [
        padded[
            :,
            i : i + (height - 1) * strides[0] + 1 : strides[0],
            j : j + (width - 1) * strides[1] + 1 : strides[1],
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    gathered = jnp.concatenate(windows, axis=-1) if len(windows) > 1 else windows[0]
    return gathered @ rhs.reshape(kh * kw * in_channels, out_channels)


@jax.custom_vjp
def _depthwise(lhs: Array, rhs: Array) -> Array:
    """Each channel's own convolution of the same size, as a sum of shifted images.

    XLA's on CPU is a plain loop. Milliseconds on CPU for 7x7 over (4, 56, 56, 128), XLA against
    this: forward 160 / 4, with the input's gradient 328 / 61, with both 613 / 296. The input's
    gradient is the same sum with the kernel turned around; the derivative of the sum itself would
    pad an image for every shift.
    """
    return sum(shifted * rhs[i, j, 0] for i, j, shifted in _shifts(lhs, rhs))


def _depthwise_forward(lhs: Array, rhs: Array):
    return _depthwise(lhs, rhs), (lhs, rhs)


def _depthwise_backward(residuals, gradient: Array):
    lhs, rhs = residuals
    kernel = [(shifted * gradient).sum((0, 1, 2)) for _, _, shifted in _shifts(lhs, rhs)]
    return _depthwise(gradient, rhs[::-1, ::-1]), jnp.stack(kernel).reshape(rhs.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _shifts(lhs: Array, rhs: Array) -> Iterator[tuple[int, int, Array]]:
    """(row, column, the part of `lhs` that this place of the kernel multiplies)."""
    rows, columns = rhs.shape[:2]
    padded = jnp.pad(lhs, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    for i in range(rows):
        for j in range(columns):
            yield i, j, padded[:, i : i + lhs.shape[1], j : j + lhs.shape[2]]


def patch_conv(
    in_channels: int,
    out_channels: int,
    patch: int,
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = _LECUN,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution whose stride is its kernel's side; rows and columns left over are cut off."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (patch, patch),
        strides=patch,
        padding="VALID",
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=dtype,
        conv_general_dilated=_patchify,
        rngs=rngs,
    )


def _patchify(lhs: Array, rhs: Array, window_strides, padding, **_) -> Array:
    """A convolution whose stride is its kernel: one matrix product over the flattened patches."""
    patch, _, channels, width = rhs.shape
    rows, cols = lhs.shape[1] // patch, lhs.shape[2] // patch
    cut = lhs[:, : rows * patch, : cols * patch]
    blocks = cut.reshape(lhs.shape[0], rows, patch, cols, patch, channels)
    blocks = jnp.swapaxes(blocks, 2, 3).reshape(lhs.shape[0], rows, cols, -1)
    return blocks @ rhs.reshape(patch * patch * channels, width)


def timestep_embedding(
    timesteps: Num[Array, " b"],
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10000.0,
) -> Float[Array, "b dim"]:
    """Sinusoidal timestep features in float32 (DDPM; diffusers' `get_timestep_embedding`)."""
    half = dim // 2
    exponent = -jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    features = jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)
    return jnp.pad(features, ((0, 0), (0, dim % 2)))


@jax.jit
def gelu(x: Array) -> Array:
    """The exact GELU through erf, as torch has it; `jax.nn.gelu` takes the costlier erfc."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function that a Hugging Face config calls `name`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}: expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_transformer(config: Any) -> None:
    """ValueError for a width that the heads do not divide, or an unknown activation."""
    name = type(config).__name__
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{name}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"{name}.hidden_act: {config.hidden_act!r}, expected one of {sorted(ACTIVATIONS)}"
        )
