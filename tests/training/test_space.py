"""The disk that a training and a store of images need is known, and compared with what is free."""

import shutil

import jax
import linear
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.errors import UserError
from jaxsynth.core.space import size_of
from jaxsynth.generation.generate import GenerateConfig, drawn_bytes, fill_store
from jaxsynth.training import trainer
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.space import training_bytes
from jaxsynth.training.trainer import Resident, Task


def task() -> Task:
    layer = nnx.Linear(linear.WIDTH, linear.WIDTH, rngs=nnx.Rngs(jax.random.key(0)))
    data = {"x": jax.random.normal(jax.random.key(1), (linear.EXAMPLES, linear.WIDTH))}
    return Task(
        model=mark_trainable(layer),
        loss=linear.SquaredError(),
        batches=Resident(data, linear.Rows(4), sharded=("x",)),
        table=((r"(kernel|bias)$", PartitionSpec()),),
        key=jax.random.key(0),
    )


@pytest.fixture
def small(monkeypatch):
    """Has every disk be almost full."""
    found = shutil.disk_usage("/")._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: found)


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "sgd"}, {"ema_decay": 0.9}], ids=["adam", "sgd", "average"]
)
def test_a_training_takes_at_most_what_is_said(tmp_path, options):
    config = TrainingConfig(steps=2, batch_size=4, **options)
    found = training_bytes(task().model, config)
    trainer.train(task(), config, tmp_path)
    written = size_of(tmp_path)
    weights = 4 * linear.WIDTH * (linear.WIDTH + 1)
    # One checkpoint is left of the two that there are for a moment, and the weights are to come.
    assert 2 * written + weights < found < 1.5 * (2 * written + weights)


def test_a_training_that_does_not_fit_is_not_begun(tmp_path, small):
    config = TrainingConfig(steps=2, batch_size=4)
    with pytest.raises(
        UserError, match=r"the layer needs 1\.\d+ MB of disk at the most, and 20 kB"
    ):
        trainer.train(task(), config, tmp_path / "run", description="the layer")
    assert not (tmp_path / "run").exists()


CONFIG = GenerateConfig(images_per_class=20, batch_size=4, batches_per_shard=2)


def noise(labels, indices):
    return np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)


def test_a_store_takes_at_most_what_is_said(tmp_path):
    fill_store(noise, tmp_path, "ab", ["a", "b"], CONFIG, seed=0)
    assert size_of(tmp_path) < drawn_bytes(2, CONFIG, 32) < 1.3 * size_of(tmp_path)


def test_a_store_that_does_not_fit_is_not_begun(tmp_path, small):
    with pytest.raises(
        UserError, match=r"draw needs \d+ kB of disk at the most, and [\d.]+ kB are"
    ):
        fill_store(noise, tmp_path, "ab", ["a", "b"], CONFIG, seed=0, description="draw")
    assert not list(tmp_path.glob("*.seal"))
