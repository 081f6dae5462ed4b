"""Each method's clone trains: one step on a mesh is that of one device, bfloat16 stays finite."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.core.errors import UserError
from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.tasks.clone_network import HeadsConfig
from jaxsynth.tasks.contrastive import (
    METHODS,
    CaptionRows,
    CloneConfig,
    backbone_of,
    backbone_start,
    caption_members,
    clone_network,
    clone_task,
)
from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.tasks.supervised import Pool
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.training.trainer import train

NETWORK = NetworkConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2)
CONFIG = CloneConfig(
    captions=4, per_caption=4, batch_size=16, local_crops=1, local_size=4, text_layers=1,
    heads=HeadsConfig(16, 8, 12), augment=RECIPES["none"], steps=2, log_every=1,
    # A large eps: Adam would divide the smallest gradients, which are rounding, by themselves.
    eps=0.1, learning_rate=0.1,
)  # fmt: skip
CAPTIONS = np.arange(40) % 5
TOKENS = np.array([[1, i + 2, 9] for i in range(5)])


@pytest.fixture(scope="module")
def pool() -> Pool:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    return Pool(images, CAPTIONS.astype(np.int32))


def of(method: str, **more) -> CloneConfig:
    return replace(CONFIG, method=method, ema_decay=0.9 if method == "synclr" else 0.0, **more)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["synclr", "synclip"])
def test_eight_devices_train_as_one_does_and_measure_collapse(method, pool, tmp_path):
    # Adam would make steps of the rounding of gradients that are 0, such as those of keys' biases.
    config = of(method, optimizer="sgd", learning_rate=0.1)
    task = clone_task(pool, CAPTIONS, TOKENS, NETWORK, config, seed=0)
    models = {
        name: train(task, config, tmp_path / name, mesh=mesh)
        for name, mesh in (("one", None), ("eight", make_mesh(fsdp=2)))
    }
    one, eight = (jax.tree.leaves(nnx.state(backbone_of(model))) for model in models.values())
    start = jax.tree.leaves(nnx.state(backbone_start(NETWORK, 0)))
    for wanted, found in zip(one, eight, strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-5)
    assert not all(map(np.allclose, one, start))
    for line in read_metrics(tmp_path / "one" / "metrics.jsonl"):
        assert np.isfinite(line["loss"])
        assert 0 < line["feature_std"] < 1.5 and 1 <= line["effective_rank"] <= 8


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_finite_in_bfloat16(method, pool):
    task = clone_task(pool, CAPTIONS, TOKENS, NETWORK, of(method), seed=0)
    graphdef, state = nnx.split(task.model)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    batch = task.batches.next_batch(0, jax.tree.map(jnp.asarray, task.batches.data))

    def value(state):
        constants = {**task.constants, "teacher": task.model}
        return task.loss(nnx.merge(graphdef, state), constants, batch, jax.random.key(0))[0]

    loss, gradients = jax.jit(jax.value_and_grad(value))(state)
    assert np.isfinite(loss)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(gradients))


def test_a_batch_has_its_captions_with_their_own_images():
    members, counts = caption_members(CAPTIONS)
    rule = CaptionRows(5, 4, 6)
    data = {"members": members, "counts": counts, "key": jax.random.key(0)}
    data = jax.tree.map(jnp.asarray, data)
    seen = set()
    for step in range(30):
        batch = rule(step, data)
        rows, captions = np.asarray(batch["row"]), np.asarray(batch["caption"])
        np.testing.assert_array_equal(CAPTIONS[rows], captions)
        assert len(set(captions[::6])) == 4 and len(set(rows)) == len(rows)
        seen |= set(rows.tolist())
    assert seen == set(range(40))


def test_small_crops_and_hidden_patches():
    model = clone_network(NETWORK, of("synclr"), TOKENS, 0)
    pixels = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    whole = model.tokens(pixels)
    np.testing.assert_allclose(whole, model.vit.tokens(pixels), atol=1e-6)
    assert model.tokens(pixels[:, :4, :4]).shape == (2, 2, 8)
    hidden = jnp.zeros((2, 4), bool).at[0, 1].set(True)
    changed = model.tokens(pixels, hidden)
    assert not np.allclose(changed[0], whole[0], atol=1e-4)
    np.testing.assert_allclose(changed[1], whole[1], atol=1e-6)


def test_a_teacher_needs_an_average(pool, tmp_path):
    with pytest.raises(ValueError, match="ema_decay: 0"):
        replace(CONFIG, method="synclr")
    task = clone_task(pool, CAPTIONS, TOKENS, NETWORK, of("synclr"), seed=0)
    with pytest.raises(UserError, match="ema_decay: 0"):
        train(task, of("stablerep"), tmp_path)


@pytest.mark.heavy
def test_the_teacher_is_the_debiased_average(pool, tmp_path):
    """With a decay near 0 the teacher is the student one update before."""
    config = of("synclr", steps=1)
    task = clone_task(pool, CAPTIONS, TOKENS, NETWORK, config, seed=0)
    train(task, config, tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    batch = task.batches.next_batch(0, jax.tree.map(jnp.asarray, task.batches.data))
    key = jax.random.fold_in(task.key, 0)
    # Before the first update the average is the start itself.
    constants = {**task.constants, "teacher": task.model}
    wanted, _ = jax.jit(task.loss)(task.model, constants, batch, key)
    np.testing.assert_allclose(line["loss"], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "moco"}, "'moco', expected"),
        ({"batch_size": 15}, "captions x per_caption = 16"),
        ({"per_caption": 1, "batch_size": 4}, "per_caption: 1"),
        ({"accumulate": 2}, "whole batches"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)
