"""The layers below every network: NNX's own, with the conventions of the torch checkpoints.

NNX's defaults differ from torch's in ways that parity tests catch late: the fast variance of
`nnx.GroupNorm` and `nnx.LayerNorm` is off by percents where the mean is large, the epsilon is 1e-6
instead of 1e-5, and GELU is the tanh form. These constructors fix each once.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Linear = nnx.Linear


def group_norm(
    groups: int, channels: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    """GroupNorm over (batch, height, width, channel), statistics in float32."""
    return nnx.GroupNorm(
        channels,
        num_groups=groups,
        epsilon=epsilon,
        dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def layer_norm(
    channels: int, *, epsilon: float = 1e-5, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """LayerNorm over the last axis, statistics in float32."""
    return nnx.LayerNorm(channels, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None,
    use_bias: bool = True,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A 2-D convolution over NHWC with torch's explicit padding ("SAME" differs at stride 2).

    `padding` None means `kernel_size // 2` on every side.
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
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=convolve,
        rngs=rngs,
    )


def convolve(lhs: Array, rhs: Array, window_strides, padding, **kwargs) -> Array:
    """`lax.conv_general_dilated` for NHWC, as a sum of matrix products where that is faster.

    On CPU, XLA's gradient to a convolution's kernel is several times slower than its matrix
    product, so small feature maps are gathered into (pixels, 9 * channels) and multiplied.
    """
    plain = jax.default_backend() == "cpu" and _is_plain(lhs, rhs, kwargs)
    if not plain:
        return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    return _matmul_convolve(lhs, rhs, tuple(window_strides), tuple(padding))


def _is_plain(lhs: Array, rhs: Array, kwargs: dict) -> bool:
    dilated = any(
        d != 1 for d in (*kwargs.get("lhs_dilation", ()), *kwargs.get("rhs_dilation", ()))
    )
    small = lhs.ndim == 4 and lhs.shape[1] * lhs.shape[2] <= 32 * 32
    return small and not dilated and kwargs.get("feature_group_count", 1) == 1


def _matmul_convolve(lhs: Array, rhs: Array, strides: tuple, padding: tuple) -> Array:
    kh, kw, c_in, c_out = rhs.shape
    if (kh, kw) == (1, 1) and strides == (1, 1) and not any(p for pair in padding for p in pair):
        return lhs @ rhs[0, 0]
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    out_h = (padded.shape[1] - kh) // strides[0] + 1
    out_w = (padded.shape[2] - kw) // strides[1] + 1
    windows = [
        padded[
            :,
            i : i + (out_h - 1) * strides[0] + 1 : strides[0],
            j : j + (out_w - 1) * strides[1] + 1 : strides[1],
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(windows, axis=-1) @ rhs.reshape(kh * kw * c_in, c_out)


def timestep_embedding(
    timesteps: Float[Array, " b"],
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


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
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
