"""Training on latents: one set or many at once, on a mesh, planned, resumed, with retention."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters.inject import Trainable, mark_trainable
from jaxsynth.core.errors import UserError
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.diffusion.learned_range import learned_range_loss
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.methods.diffscaler.recipes import adapted, first_label
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.quality.errors import held_out_error
from jaxsynth.tasks.class_conditional import (
    AdaptConfig,
    LabelledDenoising,
    Retention,
    adapt,
    adapt_each,
    adapt_tasks,
    sample_times,
)
from jaxsynth.tasks.latents import Latents, write_latents
from jaxsynth.training import sharding, trainer
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.networks.dit import SCHEDULER
from tests.methods.small_base import random_network
from tests.training.programs import memory_of_programs

SCHEDULE = NoiseSchedule.from_config(SCHEDULER)
# The noise and the variance of a latent of 2 x 2 patches.
DIT = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    out_channels=8,
    sample_size=4,
    num_embeds_ada_norm=3,
)
CONFIG = AdaptConfig(steps=6, batch_size=8, learning_rate=1e-2)
# A large eps: Adam would divide the smallest gradients, which are rounding, by themselves.
GENTLE = dataclasses.replace(CONFIG, eps=1e-2)


@jax.jit
def apply(model: DiT, *rows):
    return model(*rows)


@pytest.fixture(scope="module")
def base() -> DiT:
    return random_network(DiT, DIT, 0)


def affined(base: DiT, seed: int = 0, recipe: str = "affiner_all", classes: int = 2) -> DiT:
    return adapted(base, recipe, classes, rank=2, lora_rank=2, seed=seed)


def drawn(seed: int, count: int, views: int = 1, first: int = 4) -> Latents:
    """Two classes, each around a mean of its own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    means = rng.normal(size=(2, 1, 4, 4, 4))[labels]
    mean = means + 0.1 * rng.normal(size=(count, views, 4, 4, 4))
    std = np.full(mean.shape, 0.05)
    return Latents(*(x.astype(np.float32) for x in (mean, std)), (labels + first).astype(np.int32))


def values(model: DiT, *which) -> dict[str, np.ndarray]:
    """The network's arrays by path, those of a type only where one is given."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, *which))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def distance(found: DiT, expected: DiT, start: DiT) -> float:
    """The largest difference of what was learnt, over the largest change that training made."""
    found, expected, start = (values(model, Trainable) for model in (found, expected, start))
    assert found.keys() == expected.keys() == start.keys()
    change = max(np.abs(value - start[name]).max() for name, value in expected.items())
    assert change > 1e-3
    return max(np.abs(found[name] - value).max() for name, value in expected.items()) / change


def error(model: DiT, latents: Latents) -> float:
    return held_out_error(model, SCHEDULE, latents.mean[:, 0], latents.inputs, seed=0)


@pytest.mark.parametrize("power", [0, 1, 2.5])
def test_times_have_their_density(key, power):
    found = np.bincount(sample_times(key, 100_000, 5, power), minlength=5) / 100_000
    edges = np.arange(6.0) ** (power + 1) / 5 ** (power + 1)
    np.testing.assert_allclose(found, np.diff(edges), atol=6e-3)


def test_latents_of_images_and_of_their_mirror_images(base_folder, tmp_path):
    vae = load_pipeline(base_folder).vae
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    source = ArraySource(images, np.array([0, 1, 0, 1, 2]), list("abcde"))
    path = tmp_path / "x.npz"
    assert write_latents(path, vae, source, mirror=True, batch_size=2) == 5
    found = Latents.load(path)
    assert found.mean.shape == found.std.shape == (5, 2, 4, 4, 4) and len(found) == 5
    for view, pixels in enumerate((images, images[:, :, ::-1])):
        mean, std = encode_images(vae, pixels.astype(np.float32) / 127.5 - 1)
        np.testing.assert_allclose(found.mean[:, view], mean, atol=1e-5)
        np.testing.assert_allclose(found.std[:, view], std, atol=1e-5)
    write_latents(tmp_path / "plain.npz", vae, source, mirror=False)
    plain = Latents.load(tmp_path / "plain.npz")
    np.testing.assert_allclose(plain.mean, found.mean[:, :1], atol=1e-5)
    # The file is numpy's to the byte, and what is mapped is what is read.
    arrays = {name: getattr(found, name) for name in ("mean", "std", "labels")}
    assert arrays["labels"].dtype == np.int32 and arrays["labels"].tolist() == [0, 1, 0, 1, 2]
    np.savez(tmp_path / "y.npz", **arrays)
    assert path.read_bytes() == (tmp_path / "y.npz").read_bytes()
    mapped = Latents.load(path, mapped=True)
    for name, expected in arrays.items():
        assert isinstance(getattr(mapped, name), np.memmap)
        np.testing.assert_array_equal(getattr(mapped, name), expected)


@pytest.mark.heavy
def test_training_lowers_the_error_and_leaves_the_base_alone(base, tmp_path):
    start, latents = affined(base), drawn(1, 12, views=2)
    before, frozen = values(base), values(start, nnx.Not(Trainable))
    config = dataclasses.replace(CONFIG, steps=200, steps_per_call=50)
    trained = adapt(start, latents, SCHEDULE, config, tmp_path, seed=0)
    assert error(trained, latents) < 0.5 * error(start, latents)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    same(values(trained, nnx.Not(Trainable)), frozen)
    same(values(base), before)
    learnt = values(trained, Trainable)
    assert all((learnt[name] != value).any() for name, value in values(start, Trainable).items())
    # What the base knew is untouched, to the bit, where nothing but new rows were learnt.
    rows = affined(base, recipe="embeddings")
    rows = adapt(rows, latents, SCHEDULE, CONFIG, tmp_path / "rows", seed=0)
    old = drawn(2, 6, first=0)
    assert error(rows, old) == error(base, old)


def test_a_whole_network_trained_in_place_leaves_its_start_alone(base, tmp_path):
    before = values(base)
    start = mark_trainable(base)
    trained = adapt(start, drawn(0, 6, first=0), SCHEDULE, CONFIG, tmp_path, seed=0)
    same(values(base), before)
    learnt = values(trained, Trainable)
    assert learnt.keys() == before.keys() and not values(trained, nnx.Not(Trainable))
    # All but the rows that no image has: of an unused class.
    changed = {name for name, value in before.items() if (learnt[name] != value).any()}
    assert changed == before.keys()


@pytest.mark.heavy
def test_the_average_is_what_training_returns(base, tmp_path):
    """Of the parameters after each step, without a share of the start."""
    start, latents = affined(base), drawn(1, 6)
    config = dataclasses.replace(GENTLE, steps=3, ema_decay=0.5)
    averaged = adapt(start, latents, SCHEDULE, config, tmp_path / "averaged", seed=0)
    after = []
    for steps in (1, 2, 3):
        plain = dataclasses.replace(config, steps=steps, ema_decay=0.0)
        model = adapt(start, latents, SCHEDULE, plain, tmp_path / f"{steps}", seed=0)
        after.append(values(model, Trainable))
    for name, found in values(averaged, Trainable).items():
        expected = (after[0][name] + 2 * after[1][name] + 4 * after[2][name]) / 7
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=name)


SIZES = ((5, 1), (9, 2), (3, 3))


@pytest.fixture(scope="module")
def sets() -> list[Latents]:
    """Three sets of different sizes and numbers of views."""
    return [drawn(seed, count, views) for seed, (count, views) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def starts(base) -> list[DiT]:
    return [affined(base, seed) for seed in range(3)]


@pytest.mark.heavy
def test_sets_trained_together_equal_those_trained_apart(starts, sets, tmp_path):
    folder = tmp_path / "together"
    together = adapt_each(starts, sets, SCHEDULE, GENTLE, folder, seed=5)
    line = read_metrics(folder / "metrics.jsonl")[-1]
    for i, found in enumerate(together):
        apart = tmp_path / f"apart{i}"
        alone = adapt(starts[i], sets[i], SCHEDULE, GENTLE, apart, seed=5)
        assert distance(found, alone, starts[i]) < 1e-5
        same(values(found, nnx.Not(Trainable)), values(starts[i], nnx.Not(Trainable)))
        loss = read_metrics(apart / "metrics.jsonl")[-1]["loss"]
        assert line["loss"][i] == pytest.approx(loss, rel=1e-5)
    # A set more leaves the others what they are, up to the rounding of another program.
    two = adapt_each(starts[:2], sets[:2], SCHEDULE, GENTLE, tmp_path / "two", seed=5)
    for i, found in enumerate(two):
        assert distance(found, together[i], starts[i]) < 1e-6
    assert distance(together[0], together[1], starts[0]) > 0.1


class Killed(Exception):
    pass


@pytest.mark.heavy
@pytest.mark.parametrize(("each", "streamed"), [(False, False), (True, False), (False, True)])
def test_a_resumed_training_is_bit_identical(starts, sets, tmp_path, monkeypatch, each, streamed):
    config = dataclasses.replace(
        CONFIG, steps=8, steps_per_call=2, checkpoint_every=2, ema_decay=0.5, streamed=streamed
    )

    def train(name):
        if each:
            return adapt_each(starts, sets, SCHEDULE, config, tmp_path / name, seed=1)
        return [adapt(starts[1], sets[1], SCHEDULE, config, tmp_path / name, seed=1)]

    whole = train("whole")
    save = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == 4:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        train("cut")
    monkeypatch.setattr(Checkpoints, "save", save)
    for found, expected in zip(train("cut"), whole, strict=True):
        same(values(found), values(expected))
    # Once finished, the same call gives the same network without a step.
    for found, expected in zip(train("cut"), whole, strict=True):
        same(values(found), values(expected))


RETAINING = dataclasses.replace(CONFIG, retention=Retention(share=0.25, weight=0.1))


def loss_of(model: DiT, **options):
    """The compiled loss over (model, batch, key)."""
    denoising = LabelledDenoising(model.config.null_label, **options)
    return jax.jit(lambda model, batch, key: denoising(model, SCHEDULE, batch, key)[0])


def test_retention_is_a_share_of_the_batch_with_a_weight(base, key):
    latents, model = drawn(0, 5), affined(base)
    latents = dataclasses.replace(latents, std=np.zeros_like(latents.std))
    kept = np.asarray(jax.random.normal(key, (4, 4, 4, 4)))
    config = dataclasses.replace(RETAINING, label_dropout=0.0)
    (task,) = adapt_tasks([model], [latents], SCHEDULE, config, seed=0, kept=kept)
    data = jax.tree.map(jnp.asarray, task.batches.data)
    batch = task.batches.next_batch(jnp.array(0), data)
    assert {name: x.shape for name, x in batch.items()} == {
        "mean": (6, 4, 4, 4),
        "std": (6, 4, 4, 4),
        "labels": (6,),
        "kept": (2, 4, 4, 4),
    }
    assert all((kept == one).all(axis=(1, 2, 3)).any() for one in np.asarray(batch["kept"]))
    # By the definition: each part's own mean, the base's images without a label.
    keys = [jax.random.fold_in(key, i) for i in range(6)]
    x0 = jnp.concatenate([batch["mean"], batch["kept"]])
    labels = jnp.concatenate([batch["labels"], jnp.full(2, base.config.null_label)])
    late = 999 - sample_times(keys[3], 2, 1000, 1.0)
    t = jnp.concatenate([sample_times(keys[2], 6, 1000, 1.0), late])
    noise = jax.random.normal(keys[4], x0.shape)
    signal = jnp.asarray(SCHEDULE.alphas_cumprod)[t][:, None, None, None]
    x_t = jnp.sqrt(signal) * x0 + jnp.sqrt(1 - signal) * noise
    errors = jax.jit(partial(learned_range_loss, per_sample=True))(
        SCHEDULE, apply(model, x_t, t, labels), x0, x_t, noise, t
    )
    expected = errors[:6].mean() + 0.1 * errors[6:].mean()
    loss = jax.jit(lambda model, batch: task.loss(model, SCHEDULE, batch, key)[0])
    assert loss(model, batch) == pytest.approx(float(expected), rel=1e-4)


def test_images_that_fill_up_are_never_drawn(base):
    """On a mesh arrays are filled up to a multiple of its devices, and sets to the longest one."""
    short, long = drawn(0, 3), drawn(1, 7, views=2)
    kept = np.ones((5, 4, 4, 4), np.float32)
    config = dataclasses.replace(RETAINING, batch_size=64)
    models = [affined(base)] * 2
    for task, own in zip(
        adapt_tasks(models, [short, long], SCHEDULE, config, seed=0, kept=kept),
        (short, long),
        strict=True,
    ):
        data = {
            name: np.concatenate([x, np.full_like(x[:3], 99)])
            if name in task.batches.sharded
            else x
            for name, x in task.batches.data.items()
        }
        batch = task.batches.next_batch(jnp.array(0), jax.tree.map(jnp.asarray, data))
        rows = {row.tobytes() for row in own.mean.reshape(-1, 64)}
        found = {row.tobytes() for row in np.asarray(batch["mean"]).reshape(-1, 64)}
        assert found <= rows and len(found) == len(rows)
        assert (np.asarray(batch["kept"]) == 1).all()


def test_retention_keeps_the_last_steps_and_learns_the_first(key):
    """The base's images are noised little, the target's much."""
    target = sample_times(key, 4000, 1000, Retention().power)
    kept = 999 - sample_times(key, 4000, 1000, Retention().power)
    assert np.mean(target) == pytest.approx(2000 / 3, rel=0.03)
    assert np.mean(kept) == pytest.approx(1000 / 3, rel=0.05)


def test_retention_trains_and_needs_images_of_the_base(base, tmp_path):
    model, latents = affined(base), drawn(0, 6)
    with pytest.raises(UserError, match="retention needs `kept`"):
        adapt(model, latents, SCHEDULE, RETAINING, tmp_path / "none", seed=0)
    rng = np.random.default_rng(0)
    first, second = (
        adapt(
            model, latents, SCHEDULE, RETAINING, tmp_path / str(i), seed=0,
            kept=rng.normal(size=(3, 4, 4, 4)).astype(np.float32),
        )
        for i in range(2)
    )  # fmt: skip
    assert distance(first, second, model) > 0.01


def test_labels_are_dropped_for_guidance(base, key):
    model, latents = affined(base), drawn(0, 8)
    batch = {name: jnp.asarray(getattr(latents, name)[:, 0]) for name in ("mean", "std")}
    batch["labels"] = jnp.asarray(latents.labels)
    nothing = {**batch, "labels": jnp.full(8, base.config.null_label)}
    always, never = loss_of(model, label_dropout=1.0), loss_of(model, label_dropout=0.0)
    assert always(model, batch, key) == never(model, nothing, key)
    # New rows start as no label's row: another one shows the difference.
    moved = {**batch, "labels": batch["labels"] % 2}
    assert always(model, moved, key) != never(model, moved, key)


@pytest.fixture
def sharded_smalls(monkeypatch):
    """Weights this small would otherwise stay whole on every device."""
    monkeypatch.setattr(sharding.shardings_for, "__kwdefaults__", {"min_size": 16})


@pytest.mark.heavy
def test_devices_train_what_one_does(starts, sets, tmp_path, sharded_smalls):
    config = dataclasses.replace(GENTLE, steps=3, ema_decay=0.5)
    one = adapt(starts[1], sets[1], SCHEDULE, config, tmp_path / "one", seed=5)
    mesh = make_mesh(data=2, fsdp=4)
    many = adapt(starts[1], sets[1], SCHEDULE, config, tmp_path / "many", seed=5, mesh=mesh)
    assert distance(many, one, starts[1]) < 1e-5
    same(values(many, nnx.Not(Trainable)), values(one, nnx.Not(Trainable)))


@pytest.mark.heavy
def test_devices_train_many_sets(starts, sets, tmp_path, sharded_smalls):
    """Three sets on two parts of the data axis: the stack is filled up."""
    config = dataclasses.replace(GENTLE, steps=3)
    one = adapt_each(starts, sets, SCHEDULE, config, tmp_path / "one", seed=5)
    mesh = make_mesh(data=2, fsdp=4)
    many = adapt_each(starts, sets, SCHEDULE, config, tmp_path / "many", seed=5, mesh=mesh)
    assert len(many) == 3
    for found, expected, start in zip(many, one, starts, strict=True):
        assert distance(found, expected, start) < 1e-5


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["plain", "retaining", "mesh", "each"])
def test_latents_on_disk_train_what_resident_ones_do(starts, sets, tmp_path, how):
    config = RETAINING if how == "retaining" else GENTLE
    config = dataclasses.replace(config, steps=3, ema_decay=0.5)
    streamed = dataclasses.replace(config, streamed=True)
    kept = np.random.default_rng(0).normal(size=(9, 4, 4, 4)).astype(np.float32)
    options = {"seed": 5, "kept": kept if how == "retaining" else None}
    if how == "each":  # apart, since what is streamed trains in turn
        found = adapt_each(starts, sets, SCHEDULE, streamed, tmp_path / "found", **options)
        for i, model in enumerate(found):
            alone = adapt(starts[i], sets[i], SCHEDULE, config, tmp_path / f"{i}", **options)
            assert distance(model, alone, starts[i]) < 1e-5
        return
    options |= {"mesh": make_mesh(data=2, fsdp=4)} if how == "mesh" else {}
    arrays = {name: x for name, x in vars(sets[1]).items() if x is not None}
    np.savez(tmp_path / "set.npz", **arrays)
    mapped = Latents.load(tmp_path / "set.npz", mapped=True)
    found = adapt(starts[1], mapped, SCHEDULE, streamed, tmp_path / "found", **options)
    held = adapt(starts[1], sets[1], SCHEDULE, config, tmp_path / "held", **options)
    assert distance(found, held, starts[1]) < 1e-5


@pytest.mark.heavy
@pytest.mark.parametrize("streamed", [False, True])
def test_a_plan_needs_what_training_needs(starts, sets, tmp_path, monkeypatch, streamed):
    """Compiled from shapes alone, the program is that of the run: its bytes are the same."""
    mesh = make_mesh(data=2, fsdp=4)
    config = dataclasses.replace(GENTLE, steps=1, ema_decay=0.5, streamed=streamed)
    measured = memory_of_programs(monkeypatch)
    adapt(starts[1], sets[1], SCHEDULE, config, tmp_path, seed=0, mesh=mesh)
    (memory,) = measured
    model = nnx.eval_shape(lambda: starts[1])
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in vars(sets[1]).items()
        if x is not None
    }
    (task,) = adapt_tasks([model], [Latents(**shapes)], SCHEDULE, config, seed=0)
    plan = trainer.plan("adapt", task, config, mesh)
    assert plan.arguments == memory.argument_size_in_bytes
    assert plan.temporaries == memory.temp_size_in_bytes
    assert 0 < plan.frozen < plan.arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, r"batch_size: 12 is not divisible over data x fsdp = 8 devices"),
        ({"accumulate": 2}, r"batch_size: 8 in 2 parts \(accumulate\) is not divisible"),
        ({"batch_size": 32, "retention": Retention(1 / 8)}, "4 rows are 'kept', not divisible"),
    ],
)
def test_batches_that_do_not_divide_over_devices_are_refused(
    starts, sets, tmp_path, change, message
):
    mesh, config = make_mesh(data=2, fsdp=4), dataclasses.replace(CONFIG, **change)
    kept = np.zeros((1, 4, 4, 4), np.float32)
    with pytest.raises(UserError, match=message):
        adapt(starts[0], sets[0], SCHEDULE, config, tmp_path, seed=0, kept=kept, mesh=mesh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_dropout": 1.5}, "label_dropout: 1.5, expected 0 to 1"),
        ({"retention": Retention(share=0.05)}, "has 0 kept images"),
        ({"retention": Retention(share=0.95)}, "has 0 target images"),
        (
            {"retention": Retention(share=0.125), "accumulate": 2},
            "has 7 target images, expected a multiple of accumulate = 2",
        ),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("change", [{"share": 0.0}, {"share": 1.0}, {"power": -1.0}, {"images": 0}])
def test_retention_that_cannot_be(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: .*, expected"):
        Retention(**change)


def test_new_labels_begin_after_no_label(base):
    assert first_label(base) == 4 and base.config.null_label == 3
