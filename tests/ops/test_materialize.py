import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.ops.materialize import materialize


def test_values_and_gradients_stay():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(jax.vmap(materialize))(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: (materialize(x) ** 2).sum())(x), 2 * x)


def test_what_is_materialized_is_computed_in_a_loop_of_its_own():
    program = jax.jit(lambda x: materialize(jnp.sin(x)) + 1).lower(jnp.ones(4)).as_text()
    assert "while" in program
