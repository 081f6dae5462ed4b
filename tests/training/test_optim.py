"""Schedules against optax, decay masks, patterns, and the errors of a wrong configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsynth.training.config import OPTIMIZERS, TrainingConfig
from jaxsynth.training.optim import Rate, make_optimizer, rate_at


def _update(config, grads, params):
    tx = make_optimizer(config)
    return tx.update(grads, tx.init(params), params, rate=jnp.float32(config.learning_rate))[0]


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_schedules_are_optax_ones(schedule, warmup):
    config = TrainingConfig(
        learning_rate=3e-4, schedule=schedule, warmup_steps=warmup, steps=110, min_lr=1e-6
    )
    after = {
        "constant": optax.constant_schedule(3e-4),
        "cosine": optax.cosine_decay_schedule(3e-4, 110 - warmup, alpha=1e-6 / 3e-4),
        "linear": optax.linear_schedule(3e-4, 1e-6, 110 - warmup),
    }[schedule]
    rising = optax.linear_schedule(0.0, 3e-4, warmup)
    expected = optax.join_schedules([rising, after], [warmup]) if warmup else after
    rate = Rate.of(config)
    for step in (0, 1, 5, 9, 10, 11, 60, 109, 110, 500):
        found = rate_at(schedule, rate, jnp.int32(step))
        np.testing.assert_allclose(found, expected(jnp.int32(step)), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_parabola(name):
    config = TrainingConfig(optimizer=name, learning_rate=0.05, weight_decay=1e-3)
    tx = make_optimizer(config)
    params = {"w": jnp.array([[1.0, -2.0]])}
    opt_state = tx.init(params)
    for _ in range(50):
        grads = {"w": 2 * params["w"]}
        updates, opt_state = tx.update(grads, opt_state, params, rate=jnp.float32(0.05))
        params = optax.apply_updates(params, updates)
    assert float((params["w"] ** 2).sum()) < 1.0


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_an_update_is_that_of_optax(name):
    """With torch's decay for Adam and SGD: added to the gradient."""
    config = TrainingConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5, b1=0.8, b2=0.95)
    peer = {
        "adamw": optax.adamw(0.1, b1=0.8, b2=0.95, weight_decay=0.5),
        "adam": optax.chain(optax.add_decayed_weights(0.5), optax.adam(0.1, b1=0.8, b2=0.95)),
        "sgd": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, momentum=0.8)),
        "lion": optax.lion(0.1, b1=0.8, b2=0.95, weight_decay=0.5),
    }[name]
    params, ours = {"w": jnp.array([1.0, -2.0, 0.5])}, make_optimizer(config)
    states = ours.init(params), peer.init(params)
    for i in range(3):
        grads = {"w": jnp.array([0.3, -1.0, 2.0]) * (i + 1)}
        found, first = ours.update(grads, states[0], params, rate=jnp.float32(0.1))
        expected, second = peer.update(grads, states[1], params)
        states = first, second
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
        params = optax.apply_updates(params, expected)


def test_decay_can_spare_vectors_and_patterns():
    config = TrainingConfig(
        learning_rate=0.1,
        weight_decay=0.5,
        decay_on="matrices",
        decays=((r"^embed", 0.0), (r"kernel$", 2.0)),
    )
    params = {
        "kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,)), "embed": {"kernel": jnp.ones((2, 2))},
        "other": jnp.ones((2, 2)),
    }  # fmt: skip
    updates = _update(config, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["other"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], 0.0)
    np.testing.assert_allclose(updates["embed"]["kernel"], 0.0)


def test_rates_by_pattern_are_lora_plus():
    """Hayou et al. 2024: B at 16 times the rate of A."""
    config = TrainingConfig(optimizer="sgd", b1=0.0, learning_rate=0.1, rates=(("lora_B", 16.0),))
    params = {"to_q": {"lora_A": jnp.ones(2), "lora_B": jnp.ones(2)}}
    updates = _update(config, params, params)["to_q"]
    np.testing.assert_allclose(updates["lora_A"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["lora_B"], -1.6, rtol=1e-6)


def test_clipping_bounds_the_gradient():
    config = TrainingConfig(optimizer="sgd", learning_rate=1.0, b1=0, clip_norm=1.0)
    params = {"w": jnp.zeros((2,))}
    updates = _update(config, {"w": jnp.array([30.0, 40.0])}, params)
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adamm"}, "optimizer: 'adamm', expected one of adamw"),
        ({"schedule": "cos"}, "schedule: 'cos'"),
        ({"decay_on": "none"}, "decay_on: 'none'"),
        ({"remat": "all"}, "remat: 'all', expected one of None, block, dots"),
        ({"precision": "bf16"}, "precision: 'bf16'"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size: 8 is not divisible by accumulate = 3"),
        ({"steps": 10, "steps_per_call": 4}, "steps: 10 is not divisible by steps_per_call = 4"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0, expected 0 or more and below 1"),
        ({"rates": (("(", 1.0),)}, r"rates: '\(' is no regular expression"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0, expected 0 or more"),
    ],
)
def test_wrong_fields_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)


def test_a_falling_schedule_needs_its_end():
    with pytest.raises(ValueError, match="steps: 0, but schedule 'cosine' needs them"):
        Rate.of(TrainingConfig(schedule="cosine"))


def test_lengths_in_steps():
    config = TrainingConfig(epochs=3, batch_size=8, warmup_epochs=1, steps_per_call=2)
    sized = config.sized(20)
    assert (sized.steps, sized.warmup_steps, sized.epochs) == (10, 3, 0)
    assert TrainingConfig(epochs=1, min_steps=50).sized(8).steps == 50
    assert TrainingConfig(steps=4, warmup_steps=9).sized(8).warmup_steps == 4
