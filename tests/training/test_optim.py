"""Schedules at their corners, decay masks, and the errors of a wrong configuration."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsynth.training.optim import NAMES, OptimConfig, make_optimizer, make_schedule


def test_cosine_rises_falls_and_ends_at_the_minimum():
    rate = make_schedule(
        OptimConfig(learning_rate=1.0, warmup_steps=10, total_steps=110, min_lr=0.1)
    )
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rate(60), rate(110), rate(500)], [0.55, 0.1, 0.1], rtol=1e-6)


def test_linear_and_constant():
    linear = make_schedule(OptimConfig(learning_rate=1.0, schedule="linear", total_steps=10))
    np.testing.assert_allclose([linear(0), linear(5), linear(10)], [1.0, 0.5, 0.0])
    constant = make_schedule(OptimConfig(learning_rate=0.3, schedule="constant"))
    np.testing.assert_allclose(constant(1000), 0.3, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_parabola(name):
    config = OptimConfig(name=name, learning_rate=0.05, schedule="constant", weight_decay=1e-3)
    tx = make_optimizer(config)
    params = {"w": jnp.array([[1.0, -2.0]])}
    opt_state = tx.init(params)
    for _ in range(50):
        updates, opt_state = tx.update({"w": 2 * params["w"]}, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert float((params["w"] ** 2).sum()) < 1.0


def test_decay_can_spare_vectors():
    config = OptimConfig(
        learning_rate=0.1, schedule="constant", weight_decay=0.5, decay_on="matrices", clip_norm=0
    )
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}
    tx = make_optimizer(config)
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros((2,))}
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], 0.0)


def test_clipping_bounds_the_gradient():
    config = OptimConfig(
        name="sgd", learning_rate=1.0, schedule="constant", b1=0, weight_decay=0, clip_norm=1.0
    )
    tx = make_optimizer(config)
    params = {"w": jnp.zeros((2,))}
    updates, _ = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adamm"}, "OptimConfig.name is 'adamm'"),
        ({"schedule": "cos"}, "OptimConfig.schedule is 'cos'"),
        ({"decay_on": "none"}, "OptimConfig.decay_on is 'none'"),
        ({"warmup_steps": 20, "total_steps": 10}, "OptimConfig.warmup_steps is 20"),
    ],
)
def test_wrong_fields_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)


def test_a_falling_schedule_needs_its_end():
    with pytest.raises(ValueError, match=r"OptimConfig\.total_steps is 0"):
        make_schedule(OptimConfig())
