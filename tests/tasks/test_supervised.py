"""Classifiers on views over one pool: stacked is alone, weights count, devices agree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.tasks.supervised import (
    NetworkConfig,
    Pool,
    SupervisedConfig,
    View,
    cross_entropy,
    logits_of,
    of_pixels,
    planned_task,
    supervised_tasks,
)
from jaxsynth.training import trainer
from jaxsynth.training.sharding import make_mesh
from jaxsynth.training.trainer import train, train_stacked

NETWORK = NetworkConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2)
CONFIG = SupervisedConfig(
    steps=4, batch_size=8, learning_rate=1e-2, augment=RECIPES["none"], log_every=4
)


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Dark images of class 0 and bright ones of class 1."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    images = rng.integers(0, 100, (24, 8, 8, 3)) + 150 * labels[:, None, None, None]
    return Pool(images.astype(np.uint8), labels.astype(np.int32))


def view(rows, weight: float = 1.0) -> View:
    return View(np.asarray(rows), np.full(len(rows), weight))


def test_the_loss_is_torchs():
    rng = np.random.default_rng(1)
    logits, labels = rng.standard_normal((12, 5)).astype(np.float32), rng.integers(0, 5, 12)
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 5, 0.1)
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=0.1, reduction="none"
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_points_of_several_sizes_train_together_as_they_do_alone(pool, tmp_path):
    views = [view(range(4)), view(range(24)), view(range(0, 24, 2), 2.0)]
    tasks = supervised_tasks(pool, views, NETWORK, CONFIG, seeds=(0, 0, 1), num_classes=2)
    together = train_stacked(tasks, CONFIG, tmp_path / "together")
    for i, task in enumerate(tasks):
        alone = train(task, CONFIG, tmp_path / str(i))
        wanted = logits_of(alone, pool.images)
        np.testing.assert_allclose(logits_of(together[i], pool.images), wanted, atol=2e-4)
    # Equal seeds have equal starts, other images other ends.
    first = [jax.tree.leaves(nnx.state(task.model)) for task in tasks]
    assert all(map(np.array_equal, first[0], first[1]))
    assert not all(map(np.array_equal, first[0], first[2]))
    assert not np.allclose(logits_of(together[0], pool.images), logits_of(together[1], pool.images))


def test_a_view_sees_its_own_rows_alone_and_weights_scale_nothing_but_shares(pool):
    views = [view(range(4)), view(range(4, 24), 3.0)]
    tasks = supervised_tasks(pool, views, NETWORK, CONFIG, seeds=(0, 0), num_classes=2)
    for task, rows in zip(tasks, ({*range(4)}, {*range(4, 24)}), strict=True):
        data = jax.tree.map(jnp.asarray, task.batches.data)
        seen = {int(r) for s in range(40) for r in task.batches.next_batch(s, data)["row"]}
        assert seen == rows
    loss, constants, key = tasks[0].loss, tasks[0].constants, jax.random.key(0)
    rows = jnp.arange(8)

    def value(weights) -> float:
        batch = {"row": rows, "weight": jnp.asarray(weights, jnp.float32)}
        return float(loss(tasks[0].model, constants, batch, key)[0])

    np.testing.assert_allclose(value([1.0] * 8), value([5.0] * 8), rtol=1e-6)
    halves = [value([1.0] * 4 + [0.0] * 4), value([0.0] * 4 + [1.0] * 4)]
    np.testing.assert_allclose(
        value([3.0] * 4 + [1.0] * 4), np.dot([0.75, 0.25], halves), rtol=1e-5
    )


def test_it_learns_and_pixels_predict(pool, tmp_path):
    config = replace(CONFIG, steps=60)
    (task,) = supervised_tasks(pool, [view(range(24))], NETWORK, config, seeds=(0,), num_classes=2)
    model = train(task, config, tmp_path)
    assert (logits_of(model, pool.images).argmax(-1) == pool.labels).all()
    given = jnp.asarray(pool.images, jnp.float32) / 255
    np.testing.assert_allclose(of_pixels(model)(given), logits_of(model, pool.images), atol=1e-5)


def test_the_plan_is_of_the_program_that_runs():
    task = planned_task(NETWORK, CONFIG, images=24, longest=24, num_classes=2)
    plan = trainer.plan("points", task, CONFIG, make_mesh(devices=jax.devices()[:2]), count=4)
    assert plan.flops > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NetworkConfig(image_size=30, patch_size=8), "patch_size 8 does not divide"),
        (lambda: SupervisedConfig(label_smoothing=1.0, augment=RECIPES["none"]), "label_smoothing"),
        (lambda: SupervisedConfig(augment=RECIPES["small"]), "randaugment_ops: 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
