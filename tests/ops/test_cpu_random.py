"""Ways round slow programs give what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsynth.ops.cpu_random import normal, settled, uniform


@pytest.mark.parametrize("shape", [(), (3,), (5, 7, 3)])
def test_numbers_are_those_of_jax(shape):
    for seed in (0, 3):
        key = jax.random.fold_in(jax.random.key(seed), 2**31 + 5)
        np.testing.assert_array_equal(uniform(key, shape), jax.random.uniform(key, shape))
        np.testing.assert_array_equal(normal(key, shape), jax.random.normal(key, shape))
        within = uniform(key, shape, minval=-1, maxval=3)
        expected = jax.random.uniform(key, shape, minval=-1, maxval=3)
        np.testing.assert_allclose(within, expected, atol=1e-6)


def test_keys_of_other_generators_work():
    for key in (jax.random.key(1, impl="rbg"), jax.random.PRNGKey(1)):
        np.testing.assert_array_equal(normal(key, (4,)), jax.random.normal(key, (4,)))


def test_what_is_settled_is_the_same():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(jax.vmap(settled))(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: (settled(x) ** 2).sum())(x), 2 * x)
