"""Classifiers on views over one pool: stacked is alone, weights count, devices agree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.tasks import networks
from jaxsynth.tasks.networks import NetworkConfig, of_pixels
from jaxsynth.tasks.supervised import (
    Pool,
    SupervisedConfig,
    View,
    cross_entropy,
    planned_task,
    streamed_tasks,
    supervised_tasks,
    train_tasks,
)
from jaxsynth.training import trainer
from jaxsynth.training.sharding import make_mesh
from jaxsynth.training.trainer import train, train_stacked

NETWORK = NetworkConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2)
CONFIG = SupervisedConfig(
    steps=4, batch_size=8, learning_rate=1e-2, augment=RECIPES["none"], log_every=4
)


def logits_of(model, images) -> np.ndarray:
    return networks.logits_of(model, NETWORK, images)


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


@pytest.mark.heavy
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


@pytest.mark.heavy
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
    np.testing.assert_allclose(
        of_pixels(model, NETWORK)(given), logits_of(model, pool.images), atol=1e-5
    )


@pytest.mark.heavy
def test_a_point_that_is_not_finite_is_left_out_and_the_others_are_as_if_it_never_was(
    pool, tmp_path
):
    views = [view(range(4)), view(range(8), np.inf), view(range(24))]
    tasks = supervised_tasks(pool, views, NETWORK, CONFIG, seeds=(0, 0, 1), num_classes=2)
    found = train_tasks(tasks, CONFIG, tmp_path / "three")
    assert found.failed.keys() == {1} and "not finite at step" in found.failed[1]
    wanted = train_tasks([tasks[0], tasks[2]], CONFIG, tmp_path / "two")
    for number, other in ((0, 0), (2, 1)):
        logits = logits_of(found.models[number], pool.images)
        np.testing.assert_array_equal(logits, logits_of(wanted.models[other], pool.images))
    none = train_tasks([tasks[1]], CONFIG, tmp_path / "one")
    assert not none.models and none.failed.keys() == {0}


def test_streamed_images_train_with_their_weights(pool, tmp_path):
    config = replace(CONFIG, steps=40, streamed=True)
    # Images of weight 0 have wrong labels, which would be learned otherwise.
    labels = np.concatenate([pool.labels, 1 - pool.labels])
    source = ArraySource(np.concatenate([pool.images] * 2), labels, [str(i) for i in range(48)])
    weights = np.repeat([1.0, 0.0], 24)
    tasks = streamed_tasks([(source, weights)], NETWORK, config, seeds=(0,), num_classes=2)
    found = train_tasks(tasks, config, tmp_path)
    assert (logits_of(found.models[0], pool.images).argmax(-1) == pool.labels).all()


@pytest.mark.parametrize("streamed", [False, True])
def test_the_plan_is_of_the_program_that_runs(streamed):
    config = replace(CONFIG, streamed=streamed)
    task = planned_task(NETWORK, config, images=24, longest=24, num_classes=2)
    mesh = make_mesh(devices=jax.devices()[:2])
    plan = trainer.plan("points", task, config, mesh, count=0 if streamed else 4)
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
