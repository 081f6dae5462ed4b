"""The denoiser of weights: learns by heart, follows number and text, resumes, lies on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.schedules import PREDICTION_TYPES, NoiseSchedule
from jaxsynth.models.diffusion.weight_unet import WeightUNet, WeightUNetConfig
from jaxsynth.tasks.weight_diffusion import (
    BlockBatches,
    BlockDenoising,
    WeightData,
    WeightTrainConfig,
    denoise,
    few_steps,
    recover,
    train,
    weight_task,
)
from jaxsynth.training import loop, trainer
from jaxsynth.training.sharding import make_mesh
from tests.methods.small_base import random_network

CONCEPTS, BLOCKS, VALUES, TOKENS, WIDTH = 8, 6, 32, 5, 12
NETWORK = WeightUNetConfig(
    sample_size=VALUES,
    patch_size=8,
    block_out_channels=(32, 32),
    attention_head_dim=16,
    cross_attention_dim=WIDTH,
    norm_num_groups=4,
)
CONFIG = WeightTrainConfig(
    steps=400, batch_size=48, learning_rate=4e-3, steps_per_call=100, ema_decay=0.98
)
LAST = jnp.int32(999)


@jax.jit
def apply(model, *rows):
    return model(*rows)


def drawn(checkpoints: int = 2, texts: int = 2) -> WeightData:
    """Weights without any rule to them; a concept's checkpoints and texts are close together."""
    rng = np.random.default_rng(0)
    mask = np.ones((BLOCKS, VALUES), bool)
    mask[-1, 20:] = False
    blocks = rng.normal(size=(CONCEPTS, 1, BLOCKS, VALUES))
    blocks = (blocks + 0.02 * rng.normal(size=(CONCEPTS, checkpoints, BLOCKS, VALUES))) * mask
    context = rng.normal(size=(CONCEPTS, 1, TOKENS, WIDTH))
    context = context + 0.02 * rng.normal(size=(CONCEPTS, texts, TOKENS, WIDTH))
    counts = np.full(CONCEPTS, texts)
    return WeightData(blocks.astype(np.float32), context.astype(np.float32), counts, mask)


def batch_of(data: WeightData, step: int, count: int, key) -> dict:
    arrays = jax.tree.map(jnp.asarray, data.arrays())
    return BlockBatches(len(data.blocks), count)(jnp.int32(step), {**arrays, "order": key})


def wrong(found, data: WeightData) -> float:
    """The share of the weights' variance that was not found."""
    truth = data.blocks.mean(1)
    return float((np.square(found - truth) * data.mask).sum() / np.square(truth).sum())


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> WeightUNet:
    model = WeightUNet(NETWORK, rngs=nnx.Rngs(0))
    return train(model, drawn(), CONFIG, tmp_path_factory.mktemp("heart"), seed=0)


@pytest.mark.heavy
def test_eight_concepts_are_learnt_by_heart(learnt, key):
    data, schedule = drawn(), CONFIG.noise_schedule()
    context = jnp.asarray(data.context[:, 0])
    at_once = recover(learnt, schedule, context, LAST, key, count=BLOCKS)
    assert at_once.shape == (CONCEPTS, BLOCKS, VALUES)
    assert wrong(at_once, data) < 0.02
    stepwise = denoise(learnt, few_steps(CONFIG, 4), context, key, count=BLOCKS)
    assert wrong(stepwise, data) < 0.02
    # Of texts that were not among those drawn, and other noise.
    assert wrong(
        recover(learnt, schedule, jnp.asarray(data.context.mean(1)), LAST, jax.random.key(9),
                count=BLOCKS), data,
    ) < 0.02  # fmt: skip


def test_another_text_gives_other_weights(learnt, key):
    data, schedule = drawn(), CONFIG.noise_schedule()
    order = np.roll(np.arange(CONCEPTS), 1)
    context = jnp.asarray(data.context[order, 0])
    found = recover(learnt, schedule, context, LAST, key, count=BLOCKS)
    assert wrong(found, data) > 1
    np.testing.assert_allclose(wrong(found[np.argsort(order)], data), 0, atol=0.02)


def test_another_number_gives_another_block(learnt, key):
    data = drawn()
    noise = jax.random.normal(key, (BLOCKS, VALUES))
    context = jnp.asarray(data.context[:1, 0].repeat(BLOCKS, axis=0))
    order = jnp.roll(jnp.arange(BLOCKS), 1)
    truth = data.blocks[0].mean(0)
    times = jnp.full(BLOCKS, LAST)
    own, other = (apply(learnt, noise, times, n, context) for n in (jnp.arange(BLOCKS), order))
    for found, expected in ((own, truth), (other, truth[np.asarray(order)])):
        there = expected != 0
        assert np.square(found - expected)[there].mean() < 0.03 * np.square(truth).mean()
    assert (jnp.abs(own - other).max(1) > 0.5).all()


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_the_loss_is_zero_where_the_prediction_is_right(prediction, key):
    schedule = dataclasses.replace(CONFIG, prediction_type=prediction).noise_schedule()
    data = drawn()
    batch = batch_of(data, 3, 64, key)

    class Knowing(nnx.Module):
        """Knows x0, and adds an error where nothing lies."""

        def __init__(self, off: float):
            self.off = off

        def __call__(self, x, t, index, context):
            a = jnp.asarray(schedule.alphas_cumprod)[t][:, None]
            noise = (x - jnp.sqrt(a) * batch["x0"]) / jnp.sqrt(1 - a)
            found = {
                "sample": batch["x0"],
                "epsilon": noise,
                "v_prediction": jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * batch["x0"],
            }[prediction]
            return found + jnp.where(batch["mask"], self.off, 100.0)

    for off, expected in ((0.0, 0.0), (0.5, 0.25)):
        loss, _ = BlockDenoising()(Knowing(off), schedule, batch, key)
        assert loss == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("bias", "expected"), [(0.0, 1 / 3), (3.0, 2 / 3)])
def test_late_times_are_drawn_more_often(bias, expected, key):
    """Errors of t / 1000: their mean square is that of the times, u ** (1 / (1 + bias))."""
    data = drawn()
    batch = batch_of(data, 3, 20_000, key)

    class Late(nnx.Module):
        def __call__(self, x, t, index, context):
            return batch["x0"] + t[:, None] / 1000

    loss, _ = BlockDenoising(bias)(Late(), CONFIG.noise_schedule(), batch, key)
    assert loss == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_one_step_inverts_the_noising(prediction, key):
    config = dataclasses.replace(CONFIG, prediction_type=prediction)
    model = random_network(WeightUNet, NETWORK, 0)
    schedule, context = config.noise_schedule(), jnp.ones((2, TOKENS, WIDTH))
    t = jnp.int32(600)
    found = recover(model, schedule, context, t, key, count=3)
    noise = jax.random.normal(key, (3, VALUES))
    output = apply(model, noise, jnp.full(3, 600), jnp.arange(3), context[:1].repeat(3, axis=0))
    signal = np.sqrt(schedule.alphas_cumprod[600])
    sigma = np.sqrt(1 - schedule.alphas_cumprod[600])
    expected = {
        "sample": output,
        "epsilon": (noise - sigma * output) / signal,
        "v_prediction": signal * noise - sigma * output,
    }[prediction]
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    np.testing.assert_allclose(found[1], expected, atol=1e-4)  # one noise for all texts


def test_why_noise_predictions_fail_late():
    config = dataclasses.replace(CONFIG, prediction_type="epsilon")
    a = config.noise_schedule().alphas_cumprod[[500, 999]]
    np.testing.assert_allclose(np.sqrt((1 - a) / a), [3.4, 157], rtol=0.02)


def test_a_batch_is_of_what_belongs_together(key):
    data = drawn(checkpoints=3)
    data = dataclasses.replace(data, counts=np.array([1, 2] * 4))
    batch = batch_of(data, 0, 500, key)
    seen = set()
    for row in range(500):
        x0, context = np.asarray(batch["x0"][row]), np.asarray(batch["context"][row])
        c, k, n = np.argwhere((data.blocks == x0).all(-1))[0]
        (p,) = np.flatnonzero((data.context[c] == context).all((1, 2)))
        assert n == batch["index"][row] and p < data.counts[c]
        np.testing.assert_array_equal(batch["mask"][row], data.mask[n])
        seen.add((c, k))
    assert len(seen) == CONCEPTS * 3


SHORT = dataclasses.replace(
    CONFIG, steps=6, steps_per_call=2, batch_size=16, learning_rate=1e-3, checkpoint_every=4
)


def values(model) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.state(model))])


@pytest.mark.heavy
def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    start = WeightUNet(NETWORK, rngs=nnx.Rngs(1))
    whole = train(start, drawn(), SHORT, tmp_path / "whole", seed=3)
    fit = loop.fit
    # A run of the same learning rates that ends early.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", lambda *a, **more: fit(*a, **more | {"steps": 4}))
        part = train(start, drawn(), SHORT, tmp_path / "part", seed=3)
    resumed = train(start, drawn(), SHORT, tmp_path / "part", seed=3)
    assert np.abs(values(part) - values(whole)).max() > 1e-4
    np.testing.assert_array_equal(values(resumed), values(whole))


@pytest.mark.heavy
def test_a_mesh_gives_what_one_device_gives(tmp_path):
    """Five concepts, so that those over the devices are filled up."""
    start, own = WeightUNet(NETWORK, rngs=nnx.Rngs(1)), drawn()
    own = WeightData(own.blocks[:5], own.context[:5], own.counts[:5], own.mask)
    config = dataclasses.replace(SHORT, steps=2)
    alone = train(start, own, config, tmp_path / "alone", seed=3)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = train(start, own, config, tmp_path / "mesh", seed=3, mesh=mesh)
    # Adam's first steps are the gradients' signs, which rounding turns where they are nearly 0.
    assert np.mean(np.abs(values(spread) - values(alone)) < 1e-5) > 0.99


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    start = WeightUNet(NETWORK, rngs=nnx.Rngs(1))
    config = dataclasses.replace(SHORT, batch_size=17)
    with pytest.raises(UserError, match="batch_size: 17 is not divisible over data x fsdp = 8"):
        train(start, drawn(), config, tmp_path, seed=3, mesh=make_mesh())


@pytest.mark.heavy
def test_the_plan_is_of_the_program_that_runs():
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    data, model = drawn().arrays(), WeightUNet(NETWORK, rngs=nnx.Rngs(1))
    sized = SHORT.sized(96)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in data.items()}
    abstract = nnx.eval_shape(lambda: WeightUNet(NETWORK, rngs=nnx.Rngs(0)))
    planned = trainer.plan("x", weight_task(abstract, shapes, SHORT, seed=3), sized, mesh)
    whole = trainer.plan("x", weight_task(model, data, SHORT, seed=3), sized, mesh)
    assert planned == whole and planned.bytes > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"steps": 7, "steps_per_call": 2}, "steps: 7 is not divisible by steps_per_call = 2"),
        ({"noise_bias": -1.0}, "noise_bias: -1.0, expected 0 or more"),
        ({"remat": "block"}, "remat: 'block', but"),
        ({"prediction_type": "x0"}, "prediction_type: 'x0', expected one of"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_data_that_do_not_belong_together_are_refused():
    data = drawn()
    with pytest.raises(ValueError, match="do not belong together"):
        dataclasses.replace(data, counts=data.counts[1:])
    assert isinstance(CONFIG.noise_schedule(), NoiseSchedule)
