"""New rows beside a frozen table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.surgery.class_rows import extend_table


@pytest.fixture
def model():
    return nnx.Sequential(nnx.Embed(5, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))


def test_new_rows_start_as_the_given_row(model):
    extended = extend_table(model, "layers.0", 2, start=4)
    table = model.layers[0]
    np.testing.assert_array_equal(extended.layers[0](jnp.arange(5)), table(jnp.arange(5)))
    np.testing.assert_array_equal(extended.layers[0](jnp.array([5, 6])), table(jnp.array([4, 4])))
    assert inject.extract(extended).arrays["layers.0.rows"].shape == (2, 3)


def test_training_leaves_old_rows_and_the_base_alone(model):
    extended = extend_table(model, "layers.0", 2, start=4)
    graphdef, trainable, frozen = nnx.split(extended, inject.Trainable, ...)
    ids = jnp.array([0, 5, 6, 4])

    def loss(trainable):
        return ((nnx.merge(graphdef, trainable, frozen)(ids) - 1) ** 2).mean()

    tx = optax.sgd(0.5)
    for _ in range(3):
        updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable))
        trainable = optax.apply_updates(trainable, updates)
    trained = nnx.merge(graphdef, trainable, frozen)
    np.testing.assert_array_equal(trained(jnp.arange(5)), model(jnp.arange(5)))
    assert np.abs(trained(ids)[1:3] - extended(ids)[1:3]).min() > 0


def test_strength_merge_and_unmerge(model):
    extended = extend_table(model, "layers.0", 2, start=1)
    rows = jax.random.normal(jax.random.key(0), (2, 3))
    extended = inject.load_state(extended, inject.AdapterState({"layers.0.rows": rows}))
    ids = jnp.arange(7)
    merged = inject.merge(extended)
    assert type(merged.layers[0]) is nnx.Embed
    np.testing.assert_array_equal(merged(ids), extended(ids))
    back = inject.unmerge(merged, extended)
    np.testing.assert_array_equal(back(ids), extended(ids))
    off = inject.with_scale(extended, 0.0).layers[0](ids)
    np.testing.assert_array_equal(off[5:], model.layers[0](jnp.array([1, 1])))
    half = inject.with_scale(extended, jnp.float32(0.5)).layers[0](ids)
    np.testing.assert_allclose(half[5:], (off[5:] + rows) / 2, atol=1e-6)


def test_each_sample_may_have_rows_of_its_own(model):
    states = [
        inject.load_state(
            extend_table(model, "layers.0", 2, start=1),
            inject.AdapterState({"layers.0.rows": jax.random.normal(jax.random.key(i), (2, 3))}),
        )
        for i in range(3)
    ]
    graphdef, _, frozen = nnx.split(states[0], inject.Trainable, ...)
    stacked = inject.stack([nnx.state(state, inject.Trainable) for state in states])
    ids, which = jnp.array([5, 6, 0, 6]), jnp.array([2, 0, 1, 1])

    def one(trainable, frozen, i):
        return nnx.merge(graphdef, trainable, frozen)(i)

    found = jax.vmap(one, in_axes=(0, None, 0))(inject.route(stacked, which), frozen, ids)
    expected = [states[k](i) for k, i in zip(which, ids, strict=True)]
    np.testing.assert_allclose(found, jnp.stack(expected), atol=1e-6)


def test_what_cannot_be_extended_is_named(model):
    with pytest.raises(TypeError, match=r"layers.1: only nnx.Embed gets rows, found Linear"):
        extend_table(model, "layers.1", 1, start=0)
    with pytest.raises(ValueError, match=r"layers.0: rows cannot start as row 5 of 5"):
        extend_table(model, "layers.0", 1, start=5)
    with pytest.raises(ValueError, match=r"layers.0: 0 new rows"):
        extend_table(model, "layers.0", 0, start=0)
