"""The step against optax by hand, and each form it is run in against the plain one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_net

from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.step import (
    averaged,
    init_stacked,
    init_state,
    make_train_step,
    scan_steps,
    stacked,
)


def _setup(noise=0.0, seed=0):
    graphdef, params = small_net.make(seed)
    return small_net.make_loss(graphdef, noise), params


def _batch(seed=0):
    return jax.tree.map(jnp.asarray, small_net.batch(seed))


def _close(a, b, tolerance=1e-6):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_step_is_one_optax_update(key):
    loss_fn, params = _setup()
    tx = optax.adam(1e-2, eps=1e-3)
    state, metrics = jax.jit(make_train_step(loss_fn, tx))(
        init_state(params, tx, key), None, _batch()
    )
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, aux), grads = grad_fn(params, None, _batch(), key)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    _close(state.trainable, optax.apply_updates(params, updates))
    _close(metrics["loss"], loss)
    _close(metrics["mae"], aux["mae"])
    _close(metrics["grad_norm"], optax.tree.norm(grads))
    assert int(state.step) == 1


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(key, parts):
    loss_fn, params = _setup()
    config = TrainingConfig(learning_rate=1e-3)
    tx, rate = make_optimizer(config), Rate.of(config)

    def start():
        return init_state(params, tx, key, rate)

    whole, m1 = jax.jit(make_train_step(loss_fn, tx))(start(), None, _batch())
    cut, m2 = jax.jit(make_train_step(loss_fn, tx, accumulate=parts))(start(), None, _batch())
    # The first moment is linear in the gradient; Adam's first update is its sign, which is not.
    _close(whole.opt_state[0].mu, cut.opt_state[0].mu)
    _close(m1, m2)


def test_accumulation_names_a_leaf_that_does_not_divide(key):
    loss_fn, params = _setup()
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"batch\['x'\] has 8 rows.*accumulate=3"):
        make_train_step(loss_fn, tx, accumulate=3)(init_state(params, tx, key), None, _batch())


def test_the_average_follows_the_parameters(key):
    loss_fn, params = _setup()
    tx = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn, tx, ema_decay=0.75))
    state = init_state(params, tx, key, ema=True)
    _close(averaged(state, 0.75), params)
    expected = jax.tree.map(np.zeros_like, params)
    for i in range(3):
        state, _ = step(state, None, _batch(i))
        expected = jax.tree.map(
            lambda m, p: 0.75 * m + 0.25 * np.asarray(p), expected, state.trainable
        )
    debiased = jax.tree.map(lambda m: m / (1 - 0.75**3), expected)
    _close(averaged(state, 0.75), debiased)
    with pytest.raises(ValueError, match=r"ema_decay is 0\.0 but"):
        make_train_step(loss_fn, tx)(state, None, _batch())


def test_scanned_steps_equal_single_ones(key):
    loss_fn, params = _setup(noise=0.1)
    tx = optax.adam(1e-2, eps=1e-3)
    data = jnp.stack([_batch(i)["x"] for i in range(4)])

    def batch_fn(step, data):
        return {"x": data[step % 4], "y": data[(step + 1) % 4]}

    step = make_train_step(loss_fn, tx)
    one, single = init_state(params, tx, key), []
    for i in range(4):
        one, metrics = jax.jit(step)(one, None, batch_fn(i, data))
        single.append(metrics["loss"])
    many, metrics = jax.jit(scan_steps(step, batch_fn, 4))(init_state(params, tx, key), None, data)
    _close(one.trainable, many.trainable, 1e-5)
    _close(metrics["loss"], jnp.mean(jnp.stack(single)), 1e-5)
    assert int(many.step) == 4


@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_equals_separate_runs(key, shared):
    graphdef, _ = small_net.make()
    frozen = {"shift": jnp.ones((3,))}

    def loss_fn(trainable, frozen, batch, key):
        moved = {**batch, "y": batch["y"] + frozen["shift"]}
        return small_net.make_loss(graphdef, 0.1)(trainable, None, moved, key)

    config = TrainingConfig(learning_rate=1e-2, eps=1e-3)
    tx, rate = make_optimizer(config), Rate.of(config)
    rates = jax.tree.map(lambda x: np.stack([x] * 3), rate)
    step = make_train_step(loss_fn, tx, ema_decay=0.9)
    members = [small_net.make(i)[1] for i in range(3)]
    keys = jax.random.split(key, 3)
    batches = [_batch(0 if shared else i) for i in range(3)]
    pile = jax.tree.map(lambda *x: jnp.stack(x), *members)
    state = init_stacked(pile, tx, keys, rates, ema=True)
    run = jax.jit(stacked(step, batch_axis=None if shared else 0), donate_argnums=0)
    inputs = batches[0] if shared else jax.tree.map(lambda *x: jnp.stack(x), *batches)
    for _ in range(2):
        state, metrics = run(state, frozen, inputs)
    assert metrics["loss"].shape == (3,)
    alone = jax.jit(step)
    for i in range(3):
        own = init_state(members[i], tx, keys[i], rate, ema=True)
        for _ in range(2):
            own, own_metrics = alone(own, frozen, batches[i])
        mine = jax.tree.map(lambda x, i=i: x[i], state)
        _close(mine.ema.ema, own.ema.ema, 2e-5)
        _close(metrics["loss"][i], own_metrics["loss"], 1e-5)
    # Donation must not have reached the arrays that the caller stacked.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pile))


def test_each_step_has_its_own_key(key):
    loss_fn, params = _setup(noise=1.0)
    tx = optax.sgd(0.0)
    step = jax.jit(make_train_step(loss_fn, tx))
    state, first = step(init_state(params, tx, key), None, _batch())
    _, second = step(state, None, _batch())
    assert float(first["loss"]) != float(second["loss"])


def test_the_state_owns_its_arrays_and_trains_in_float32(key):
    tx = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.ones((3,), jnp.bfloat16), "v": jnp.ones((2,))}

    def loss_fn(trainable, frozen, batch, key):
        return (trainable["w"].astype(jnp.bfloat16) ** 2).sum() + (trainable["v"] ** 2).sum(), {}

    state = init_state(params, tx, key, ema=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.trainable, state.ema.ema))} == {
        jnp.dtype(jnp.float32)
    }
    step = jax.jit(make_train_step(loss_fn, tx, ema_decay=0.9), donate_argnums=0)
    _, metrics = step(state, None, jnp.zeros(()))
    assert metrics["loss"].dtype == jnp.float32
    assert float(params["v"].sum()) == 2.0
    assert jax.random.key_data(key).size  # the caller's key was not donated either


def test_integers_cannot_be_trained(key):
    with pytest.raises(TypeError, match=r"trainable\['count'\] is int32"):
        init_state({"count": jnp.zeros((), jnp.int32)}, optax.sgd(0.1), key)


def test_an_average_of_a_short_training_is_of_what_it_saw(key):
    """Not of the initial values, at any decay."""
    params = {"w": jnp.zeros((2,))}
    tx = optax.sgd(1.0)

    def loss_fn(trainable, frozen, batch, key):
        return -trainable["w"].sum(), {}

    step = jax.jit(make_train_step(loss_fn, tx, ema_decay=0.9999))
    state = init_state(params, tx, key, ema=True)
    for _ in range(10):
        state, _ = step(state, None, jnp.zeros(()))
    np.testing.assert_allclose(averaged(state, 0.9999)["w"], 5.5, rtol=1e-3)


def test_phases_move_their_part_and_see_what_earlier_ones_moved(key):
    """A discriminator moves first; the generator's loss is taken against the new one."""
    params = {"generator": {"g": jnp.ones(())}, "discriminator": {"d": jnp.ones(())}}
    config = TrainingConfig(
        optimizer="sgd", b1=0.0, learning_rate=1.0, rates=(("discriminator", 0.5),)
    )
    tx = make_optimizer(config)

    def of_discriminator(trainable, frozen, batch, key):
        return trainable["discriminator"]["d"] * trainable["generator"]["g"], {"fooled": batch}

    def of_generator(trainable, frozen, batch, key):
        return trainable["generator"]["g"] * trainable["discriminator"]["d"], {}

    losses = {"discriminator": of_discriminator, "generator": of_generator}
    step = make_train_step(losses, tx)
    state = init_state(params, tx, key, Rate.of(config), parts=tuple(losses))
    state, metrics = jax.jit(step)(state, None, jnp.ones(()))
    # d = 1 - 0.5 * 1; then g = 1 - 1 * 0.5 with the new d.
    assert float(state.trainable["discriminator"]["d"]) == 0.5
    assert float(state.trainable["generator"]["g"]) == 0.5
    assert float(metrics["loss"]) == 0.5 and float(metrics["fooled"]) == 1.0
