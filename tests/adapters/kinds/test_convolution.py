"""The narrow convolution beside a layer: the same as a convolution, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters.kinds.convolution import narrow_convolve


def layer(size, strides, padding, dilation, channels=5):
    return nnx.Conv(
        channels,
        7,
        size,
        strides=strides,
        padding=padding,
        kernel_dilation=dilation,
        use_bias=False,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize(
    ("size", "strides", "padding", "dilation"),
    [
        ((3, 3), 1, 1, 1),
        ((3, 3), 2, ((1, 1), (0, 1)), 1),
        ((4, 4), 2, "SAME", 1),
        ((3, 5), (3, 2), "VALID", 1),
        ((3, 3), (1, 2), ((2, 3), (0, 4)), (2, 3)),
        ((2, 2), 3, 0, 1),
        ((4,), 2, 1, 1),
        ((3, 1, 2), (2, 1, 2), "SAME", 1),
    ],
)
def test_values_and_gradients_are_those_of_a_convolution(size, strides, padding, dilation):
    wide = layer(size, strides, padding, dilation)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *(11, 8, 9)[: len(size)], 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((*size, 5, 2)), jnp.float32)

    def plain(x, kernel):
        whole = layer(size, strides, padding, dilation)
        whole.kernel = nnx.Param(kernel)
        return whole(x)

    def loss(convolve):
        return lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel)))

    def narrow(x, kernel):
        return narrow_convolve(x, kernel, wide)

    expected = plain(x, kernel)
    np.testing.assert_allclose(narrow(x, kernel), expected, atol=2e-5)
    found = jax.grad(loss(narrow), argnums=(0, 1))(x, kernel)
    for value, wanted in zip(found, jax.grad(loss(plain), argnums=(0, 1))(x, kernel), strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-4)


def test_kernels_can_be_mapped_and_stacked_images_have_any_leading_axes():
    wide = layer((3, 3), 2, 1, 1)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((3, 2, 6, 6, 5)), jnp.float32)
    kernels = jnp.asarray(rng.standard_normal((3, 3, 3, 5, 2)), jnp.float32)

    def loss(x, kernel):
        return jnp.sum(narrow_convolve(x, kernel, wide) ** 2)

    mapped = jax.vmap(jax.grad(loss, argnums=(0, 1)))(x, kernels)
    for n in range(3):
        single = jax.grad(loss, argnums=(0, 1))(x[n], kernels[n])
        # One more leading axis, as video has, changes nothing.
        axis = jax.grad(loss, argnums=(0, 1))(x[n][:, None], kernels[n])
        for whole, one, more in zip(mapped, single, axis, strict=True):
            np.testing.assert_allclose(whole[n], one, atol=1e-4)
            np.testing.assert_allclose(more.reshape(one.shape), one, atol=1e-4)


def test_a_single_tap_stands_at_its_place():
    wide = layer((3, 3), 1, 1, 1)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
    point = jax.random.normal(jax.random.key(1), (1, 1, 5, 2))
    padded = jnp.zeros((3, 3, 5, 2)).at[1, 2].set(point[0, 0])

    def one(x, point):
        return narrow_convolve(x, point, wide, tap=(1, 2))

    np.testing.assert_allclose(
        one(x, point), narrow_convolve(x, padded, wide), rtol=1e-5, atol=1e-5
    )
    found = jax.grad(lambda x, p: jnp.sum(one(x, p) ** 2), argnums=(0, 1))(x, point)
    wanted = jax.grad(lambda x, k: jnp.sum(narrow_convolve(x, k, wide) ** 2), argnums=(0, 1))(
        x, padded
    )
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4)
    np.testing.assert_allclose(found[1][0, 0], wanted[1][1, 2], atol=1e-4)
