"""Narrow convolutions beside a base layer: the low-rank path of every adapter on `nnx.Conv`.

One, two and three spatial axes, channels last. Written as matrix products, because mapped over
kernels (adapters trained or routed side by side) a convolution becomes a grouped one, which is very
slow on CPU, while these stay batched products.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def check_conv(kind: str, path: str, layer: nnx.Conv) -> None:
    """Raises ValueError naming what an adapter of `kind` cannot follow in a convolution."""
    axes = len(layer.kernel_size)
    for name, found, allowed in (
        ("number of spatial axes", axes, (1, 2, 3)),
        ("feature_group_count", layer.feature_group_count, (1,)),
        ("input_dilation", per_axis(layer.input_dilation, axes), ((1,) * axes,)),
        ("mask", layer.mask, (None,)),
    ):
        if found not in allowed:
            expected = allowed[0] if len(allowed) == 1 else f"one of {allowed}"
            raise ValueError(
                f"{path}: {kind} on a convolution needs {name} {expected}, found {found}"
            )
    if isinstance(layer.padding, str) and layer.padding not in ("SAME", "VALID"):
        raise ValueError(f"{path}: {kind} on a convolution with padding {layer.padding!r}")


def centre(kernel_size: Sequence[int]) -> tuple[int, ...] | None:
    """The middle tap of a kernel; None where a side is even and there is none."""
    return tuple(k // 2 for k in kernel_size) if all(k % 2 for k in kernel_size) else None


def narrow_convolve(
    inputs: Float[Array, "... i"],
    kernel: Float[Array, "*k i r"],
    layer: nnx.Conv,
    *,
    tap: Sequence[int] | None = None,
) -> Float[Array, "... r"]:
    """The convolution of `layer` with another kernel, as one matrix product and shifted sums.

    With `tap`, `kernel` has one tap, which stands at that place of the layer's kernel.

    The inputs are first projected by all slices of the kernel and the results then shifted, rather
    than gathering a copy of the inputs for each slice, because the rank is smaller than the number
    of channels.
    """
    *sizes, c_in, rank = kernel.shape
    axes = len(sizes)
    taps = list(itertools.product(*map(range, sizes)))
    places = taps if tap is None else [tuple(tap)]
    strides, dilation = per_axis(layer.strides, axes), per_axis(layer.kernel_dilation, axes)
    pads = padding_of(layer, inputs)
    slices = inputs @ jnp.moveaxis(kernel, -2, 0).reshape(c_in, math.prod(sizes) * rank)
    if layer.kernel_size == (1,) * axes == strides and not any(map(any, pads)):
        return slices
    found = slices.shape[-axes - 1 : -1]
    windows = tuple(
        _Windows(
            size=size,
            pad=pad,
            starts=tuple(place[axis] * dilation[axis] for place in places),
            stride=strides[axis],
            count=(size + sum(pad) - dilation[axis] * (length - 1) - 1) // strides[axis] + 1,
        )
        for axis, (size, pad, length) in enumerate(zip(found, pads, layer.kernel_size, strict=True))
    )
    return _shifted_sum(slices, windows)


class _Windows(NamedTuple):
    """Where on one axis of `size` pixels, padded by `pad` zeros, each slice is read.

    Slice n from `starts[n]` on, `count` pixels that are `stride` apart.
    """

    size: int
    pad: tuple[int, int]
    starts: tuple[int, ...]
    stride: int
    count: int


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shifted_sum(slices: Float[Array, "*b s"], windows: tuple[_Windows, ...]) -> Array:
    """The sum over n of the n-th group of channels, read where `windows` say.

    Its gradient is written down: each slice's is a shifted copy of the sum's. JAX's own adds up a
    padded copy for each slice. (There is no forward-mode derivative.)
    """
    count = len(windows[0].starts)
    rank = slices.shape[-1] // count
    lead = [(0, 0)] * (slices.ndim - len(windows) - 1)
    padded = jnp.pad(slices, [*lead, *[axis.pad for axis in windows], (0, 0)])

    def at(number: int) -> Array:
        window = [
            slice(
                axis.starts[number],
                axis.starts[number] + (axis.count - 1) * axis.stride + 1,
                axis.stride,
            )
            for axis in windows
        ]
        return padded[(..., *window, slice(number * rank, (number + 1) * rank))]

    return sum(at(number) for number in range(count))


def _shifted_sum_forward(slices, windows):
    return _shifted_sum(slices, windows), None


def _shifted_sum_backward(windows, _, gradient):
    """Pixel p of slice n was read for pixel o of the sum where o * stride = p + pad - start."""
    spans = [max(axis.starts) for axis in windows]
    # Zeros between pixels where the sum has strides, and around so that all reads lie inside.
    pads = [(0, 0, 0)] * (gradient.ndim - len(windows) - 1)
    for axis, span in zip(windows, spans, strict=True):
        before = span - axis.pad[0]
        after = axis.size + span - before - (axis.count - 1) * axis.stride - 1
        pads.append((before, after, axis.stride - 1))
    zero = jnp.zeros((), gradient.dtype)
    padded = jax.lax.pad(gradient, zero, [*pads, (0, 0, 0)])

    def at(number: int) -> Array:
        starts = [span - axis.starts[number] for axis, span in zip(windows, spans, strict=True)]
        window = [
            slice(start, start + axis.size) for axis, start in zip(windows, starts, strict=True)
        ]
        return padded[(..., *window, slice(None))]

    count = len(windows[0].starts)
    return (jnp.concatenate([at(number) for number in range(count)], axis=-1),)


_shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)


def padding_of(layer: nnx.Conv, inputs: Array) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis."""
    axes = len(layer.kernel_size)
    if isinstance(layer.padding, str):
        dilated = [
            (k - 1) * d + 1
            for k, d in zip(layer.kernel_size, per_axis(layer.kernel_dilation, axes), strict=True)
        ]
        sizes, strides = inputs.shape[-axes - 1 : -1], per_axis(layer.strides, axes)
        return list(jax.lax.padtype_to_pads(sizes, dilated, strides, layer.padding))
    if isinstance(layer.padding, int):
        return [(layer.padding, layer.padding)] * axes
    return [(pad, pad) if isinstance(pad, int) else tuple(pad) for pad in layer.padding]


def per_axis(value: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    """One number per spatial axis, from nnx.Conv's shorter spellings."""
    if value is None or isinstance(value, int):
        return (value or 1,) * axes
    return tuple(value)
