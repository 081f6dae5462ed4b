"""Condition images beside the latents: the start, learning, mixing in a batch, merging, drawing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters.inject import extract, load_state, merge, with_scale
from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import as_fractions
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.classes import ClassGenerator, ClassOf
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.diffscaler.recipes import RECIPES, adapted, with_condition
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.ops.space_to_depth import space_to_depth
from jaxsynth.quality.errors import held_out_error
from jaxsynth.tasks.class_conditional import (
    AdaptConfig,
    RetainingDenoising,
    adapt,
    adapt_tasks,
)
from jaxsynth.tasks.latents import Latents
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.networks.dit import SCHEDULER, DiTPipeline, load_dit, save_dit
from tests.adapters.nets import randomised
from tests.methods.small_base import random_network

SCHEDULE = NoiseSchedule.from_config(SCHEDULER)
DIT = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    out_channels=8,
    sample_size=4,
    num_embeds_ada_norm=3,
)
# A condition of 8 x 8 pixels over latents of 4 x 4.
CHANNELS = 4


@pytest.fixture(scope="module")
def base() -> DiT:
    return random_network(DiT, DIT, 0)


@jax.jit
def apply(model: DiT, *rows, **more):
    return model(*rows, **more)


def inputs(count=6):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (count, 4, 4, 4))
    t = jax.random.randint(keys[1], (count,), 0, 1000)
    return x, t, jnp.arange(count) % 4, jax.random.uniform(keys[2], (count, 4, 4, CHANNELS))


def conditional(base: DiT, seed: int = 0, recipe: str = "affiner_all", **more) -> DiT:
    channels = {"condition_channels": CHANNELS} | more
    return adapted(base, recipe, 2, rank=8, lora_rank=2, seed=seed, **channels)


def visible(model: DiT, seed: int) -> DiT:
    """Every factor random and none zero."""
    return load_state(model, randomised(extract(model), seed))


def steered(count: int, seed: int, views: int = 1) -> Latents:
    """Latents that their condition alone decides, up to a little noise."""
    pixels = np.random.default_rng(seed).integers(0, 2, (count, 8, 8, 1)).astype(np.float32)
    both = [pixels, pixels[:, :, ::-1]][:views]
    mean = np.stack([2 * space_to_depth(view, 2) - 1 for view in both], axis=1)
    latents = Latents(mean, np.full_like(mean, 0.05), np.full(count, 4, np.int32))
    return latents.conditioned(pixels)


@pytest.mark.parametrize("recipe", ["affiner_all", "lora_all"])
def test_the_untrained_network_is_its_base_whatever_the_condition(base, recipe):
    x, t, labels, condition = inputs()
    model = conditional(base, recipe=recipe)
    assert model.config.condition_channels == CHANNELS and base.config.condition_channels == 0
    assert "pos_embed.proj.gate" in extract(model).arrays
    expected = apply(base, x, t, labels)
    found = apply(model, x, t, labels, condition=condition)
    # Another program, whose sums are rounded in another order.
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"condition has shape None, expected \(6, 4, 4, 4\)"):
        model(x, t, labels)


def test_switched_off_it_is_the_base_again(base):
    x, t, labels, condition = inputs()
    model = visible(conditional(base), 1)
    expected = apply(base, x, t, labels)
    on = apply(model, x, t, labels, condition=condition)
    assert np.abs(on - expected).max() > 0.1
    assert np.abs(on - apply(model, x, t, labels, condition=condition[::-1])).max() > 0.02
    off = apply(with_scale(model, 0.0), x, t, labels, condition=condition)
    np.testing.assert_array_equal(off, expected)


@pytest.mark.parametrize("gate", [True, False])
def test_merged_it_is_a_plain_network_that_files_hold(base, gate, tmp_path):
    x, t, labels, condition = inputs()
    model = visible(with_condition(base, CHANNELS, rngs=nnx.Rngs(0), gate=gate), 2)
    merged = merge(model)
    assert type(merged.pos_embed.proj) is nnx.Conv and merged.config.condition_channels == CHANNELS
    expected = apply(model, x, t, labels, condition=condition)
    assert np.abs(expected - apply(base, x, t, labels)).max() > 0.01
    found = apply(merged, x, t, labels, condition=condition)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    save_dit(DiTPipeline(merged), tmp_path)
    read = load_dit(tmp_path).transformer
    assert read.config == merged.config
    np.testing.assert_array_equal(apply(read, x, t, labels, condition=condition), found)
    # Another condition beside the first: its input comes after the first one's.
    more = with_condition(read, 2, rngs=nnx.Rngs(0))
    both = jnp.concatenate([condition, condition[..., :2]], axis=-1)
    assert more.config.condition_channels == CHANNELS + 2
    np.testing.assert_array_equal(apply(more, x, t, labels, condition=both), found)


def test_every_recipe_takes_a_condition(base):
    """Shapes alone: what is learnt changes with the recipe, the network's interface does not."""
    x, t, labels, condition = inputs(2)
    for recipe in RECIPES:
        model = conditional(base, recipe=recipe)
        out = jax.eval_shape(apply, model, x, t, labels, condition=condition)
        assert out.shape == (2, 4, 4, 8)
        learnt = extract(model).arrays
        assert "pos_embed.proj.kernel" in learnt or "pos_embed.proj.side.kernel" in learnt


def test_conditions_are_stored_at_the_size_of_latents(tmp_path):
    latents = steered(5, 0, views=2)
    assert latents.condition.shape == (5, 2, 4, 4, CHANNELS)
    assert latents.condition.dtype == np.uint8
    np.testing.assert_allclose(2 * as_fractions(latents.condition) - 1, latents.mean, atol=1e-6)
    np.savez(tmp_path / "with.npz", **vars(latents))
    np.testing.assert_array_equal(Latents.load(tmp_path / "with.npz").condition, latents.condition)
    plain = dataclasses.replace(latents, condition=None)
    known = {name: x for name, x in vars(plain).items() if x is not None}
    np.savez(tmp_path / "without.npz", **known)
    assert Latents.load(tmp_path / "without.npz").condition is None
    with pytest.raises(ValueError, match=r"condition of \(4, 2, 4, 4, 4\) for latents of \(5, 2"):
        plain.conditioned(np.zeros((4, 8, 8, 1)))
    with pytest.raises(ValueError, match="18x18 pixels, expected multiples of 4"):
        plain.conditioned(np.zeros((5, 18, 18, 1)))


def test_a_batch_has_the_condition_of_each_view(base):
    sets = [steered(5, 0, views=2), steered(3, 1, views=2)]
    config = AdaptConfig(steps=1, batch_size=64)
    models = [conditional(base)] * 2
    _, task = adapt_tasks(models, sets, SCHEDULE, config, seed=0)
    data = jax.tree.map(jnp.asarray, task.batches.data)
    batch = task.batches.next_batch(jnp.array(0), data)
    found = 2 * as_fractions(batch["condition"]) - 1
    np.testing.assert_allclose(found, batch["mean"], atol=1e-6)
    assert len(np.unique(np.asarray(batch["mean"]), axis=0)) == 6, "both views of three images"
    plain = dataclasses.replace(sets[1], condition=None)
    with pytest.raises(UserError, match=r"conditions of \[0, 4\] channels"):
        adapt_tasks(models, [sets[0], plain], SCHEDULE, config, seed=0)


def test_images_of_the_base_have_no_condition():
    """Retention's part of a batch: the network sees zeros beside it."""
    seen = []

    class Seeing(nnx.Module):
        def __call__(self, x, t, labels, *, condition, remat=None):
            jax.debug.callback(lambda found: seen.append(np.asarray(found)), condition)
            return jnp.concatenate([x, x], axis=-1)

    latents, kept = steered(2, 0), jnp.ones((2, 4, 4, 4))
    batch = {name: jnp.asarray(getattr(latents, name)[:, 0]) for name in ("mean", "std")}
    batch |= {"condition": jnp.asarray(latents.condition[:, 0]), "labels": jnp.zeros(2, int)}
    denoising = RetainingDenoising(null_label=3, power=1.0)
    loss = jax.jit(lambda batch: denoising(Seeing(), SCHEDULE, batch, jax.random.key(0))[0])
    loss(batch | {"kept": kept}).block_until_ready()
    jax.effects_barrier()
    assert seen[0].shape == (4, 4, 4, CHANNELS) and not seen[0][2:].any()
    np.testing.assert_array_equal(seen[0][:2], as_fractions(latents.condition[:, 0]))


@pytest.mark.heavy
def test_a_learnt_condition_is_used(base, tmp_path):
    """The error with an image's own condition is far below that with another's, or with none."""
    train, test = steered(64, 0), steered(32, 1)
    config = AdaptConfig(
        steps=400, batch_size=32, learning_rate=1e-2, steps_per_call=100, schedule="cosine"
    )
    model = adapt(conditional(base), train, SCHEDULE, config, tmp_path, seed=0)
    assert abs(extract(model).arrays["pos_embed.proj.gate"]) > 0.05

    def error(condition):
        held = dataclasses.replace(test, condition=condition)
        return held_out_error(model, SCHEDULE, held.mean[:, 0], held.inputs, seed=0, repeats=4)

    own, others = error(test.condition), error(np.roll(test.condition, 1, axis=0))
    assert own < 0.75 * others and own < 0.75 * error(np.zeros_like(test.condition))


@pytest.fixture(scope="module")
def vae(base_folder):
    return load_pipeline(base_folder).vae


NUMBERS, INDICES = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])


def conditions(numbers, indices):
    """Another one for each class and image."""
    seeds = 10 * numbers + indices
    return np.stack([steered(1, int(seed)).condition[0, 0] for seed in seeds])


def generator(models, vae, classes, given=conditions, scale=2.0):
    config = GenerateConfig(
        guidance_scale=scale, num_inference_steps=2, batch_size=4, sampler="ddim"
    )
    return ClassGenerator(models, vae, SCHEDULER, classes, config, seed=0, conditions=given)


def test_a_batch_mixes_condition_tasks_of_equal_channels(base, vae):
    models = [visible(conditional(base, seed), seed) for seed in (0, 1)]
    swapped = []

    def given(numbers, indices):
        return conditions(1 - numbers if swapped else numbers, indices)

    routed = generator(models, vae, [ClassOf(0, 4), ClassOf(1, 4)], given)
    mixed = routed.latents(NUMBERS, INDICES)
    alone = generator(models[1:], vae, [ClassOf(0, 4)] * 2).latents(NUMBERS, INDICES)
    np.testing.assert_allclose(mixed[1::2], alone[1::2], rtol=1e-4, atol=1e-4)
    assert np.abs(mixed[::2] - alone[::2]).max() > 0.1
    swapped.append(True)
    assert np.abs(routed.latents(NUMBERS, INDICES) - mixed).min(axis=0).max() > 0.01


@pytest.mark.heavy
def test_guidance_leaves_the_condition_to_both_branches(base, vae):
    """A new class is like none at the start, so only another condition could tell them apart."""
    model = conditional(base)
    state = extract(model)
    opened = state.arrays | {"pos_embed.proj.gate": jnp.ones(())}
    model = load_state(model, dataclasses.replace(state, arrays=opened))
    classes = [ClassOf(0, 4), ClassOf(0, 5)]
    one, three = (
        generator([model], vae, classes, scale=scale)(NUMBERS[:3], INDICES[:3])
        for scale in (1.0, 3.0)
    )
    assert one.shape == (3, 8, 8, 3) and one.dtype == np.uint8 and one.std() > 10
    assert np.abs(three.astype(int) - one).max() <= 1
    with pytest.raises(ValueError, match="has 4 condition channels, and `conditions` are not"):
        generator([model], vae, classes, given=None)
    with pytest.raises(ValueError, match="has 0 condition channels, and `conditions` are given"):
        generator([base], vae, [ClassOf(0, 0)])
