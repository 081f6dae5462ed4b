"""The layers against torch's, and the two routes of a convolution against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.models import layers
from jaxsynth.models.diffusion.blocks import enlarge
from tests.models.torch_parity import nchw, nhwc, relative_error


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "product"),
    [
        ((2, 2, 2, 6), (3, 3, 6, 5), 1, ((1, 1), (1, 1)), True),
        ((2, 4, 4, 3), (3, 3, 3, 32), 1, ((1, 1), (1, 1)), True),
        ((2, 7, 5, 3), (3, 3, 3, 32), 2, ((1, 1), (1, 1)), True),
        ((1, 8, 8, 4), (3, 3, 4, 16), 2, ((0, 1), (0, 1)), True),
        ((2, 9, 8, 6), (1, 1, 6, 5), 1, ((0, 0), (0, 0)), True),
        ((2, 9, 8, 6), (1, 1, 6, 5), 2, ((1, 0), (0, 1)), True),
        ((2, 8, 8, 6), (3, 3, 6, 5), 1, ((1, 1), (1, 1)), False),
    ],
)
def test_convolution_routes_agree(shape, kernel, stride, padding, product):
    strides = (stride, stride)
    assert layers._prefers_product(shape, kernel, strides, padding) == product
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, kernel))
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def loss(function):
        return lambda lhs, rhs: jnp.square(function(lhs, rhs, strides, padding, **numbers)).sum()

    expected = jax.value_and_grad(loss(jax.lax.conv_general_dilated), (0, 1))(lhs, rhs)
    actual = jax.value_and_grad(loss(layers.convolve), (0, 1))(lhs, rhs)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(("shape", "kernel"), [((2, 5, 9, 4), (7, 7)), ((1, 6, 6, 3), (3, 5))])
def test_a_channels_own_convolution_is_a_sum_of_shifts(shape, kernel, monkeypatch):
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.normal(size=shape), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(*kernel, 1, shape[-1])), jnp.float32)
    padding = tuple((k // 2, k // 2) for k in kernel)
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": shape[-1]}

    def loss(function):
        return lambda lhs, rhs: jnp.square(function(lhs, rhs, (1, 1), padding, **numbers)).sum()

    expected = jax.value_and_grad(loss(jax.lax.conv_general_dilated), (0, 1))(lhs, rhs)
    taken = []
    shifts = layers._depthwise
    monkeypatch.setattr(layers, "_depthwise", lambda *args: taken.append(1) or shifts(*args))
    actual = jax.value_and_grad(loss(layers.convolve), (0, 1))(lhs, rhs)
    assert taken
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_round_as_nnx_does(dtype):
    x = 5 + jax.random.normal(jax.random.key(0), (2, 4, 3, 12)).astype(dtype)
    layer = layers.layer_norm(12, dtype=dtype, rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = jnp.linspace(0.5, 2, 12), jnp.linspace(-1, 1, 12)
    expected = jax.jit(lambda x: nnx.LayerNorm.__call__(layer, x))(x)
    assert expected.dtype == dtype
    np.testing.assert_array_equal(jax.jit(lambda x: layer(x))(x), expected)


def test_norms_keep_their_precision_far_from_zero():
    """The fast variance E[x^2] - E[x]^2 is off by percents here."""
    x = (50 + 0.1 * np.random.default_rng(0).normal(size=(2, 4, 4, 16))).astype(np.float32)
    group = layers.group_norm(4, 16, epsilon=1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = layers.layer_norm(16, dtype=jnp.float32, rngs=nnx.Rngs(0))
    expected = torch.nn.functional.group_norm(nchw(x), 4, eps=1e-5)
    assert relative_error(group(x), nhwc(expected)) < 1e-4
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (16,), eps=1e-5)
    assert relative_error(layer(x), expected.numpy()) < 1e-4


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", torch.nn.functional.gelu),
        ("gelu_new", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("silu", torch.nn.functional.silu),
        ("mish", torch.nn.functional.mish),
    ],
)
def test_activations(name, function):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = function(torch.from_numpy(x)).numpy()
    assert relative_error(layers.activation(name)(x), expected) < 1e-6


@pytest.mark.parametrize("size", [(6, 10), (5, 9), (3, 5), (7, 11)])
def test_enlarge_is_torch_nearest(size):
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    expected = torch.nn.functional.interpolate(nchw(x), size=size, mode="nearest")
    np.testing.assert_array_equal(enlarge(jnp.asarray(x), size), nhwc(expected))
