"""GANs on tiny networks: one step against its formula, stacked against alone, learning, curves."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsynth.adapters.inject import Trainable, load_state, mark_trainable
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.errors import UserError
from jaxsynth.data.procedural.concepts import concept_of
from jaxsynth.models.gan.e2gan import E2GAN, E2GANConfig
from jaxsynth.models.gan.patchgan import PatchGAN, PatchGANConfig
from jaxsynth.models.gan.pix2pix import Pix2Pix, Pix2PixConfig
from jaxsynth.tasks.gan import (
    E2GAN_TARGETS,
    GANConfig,
    PairBatches,
    Pairs,
    adapted,
    edit_images,
    encode_texts,
    gan_error,
    gan_task,
    l1_error,
    mixed,
    train_base,
    training_data,
)
from jaxsynth.tasks.gan_finetune import Curve, fine_tune
from jaxsynth.tasks.gan_together import mixture, stacked_parts, train_together
from jaxsynth.training import trainer
from jaxsynth.training.sharding import make_mesh
from jaxsynth.training.trainer import Steps
from jaxsynth.weights.hf import load_pipeline

SIZE, TEXT = 8, 4
CONFIG = GANConfig(steps=80, batch_size=4, learning_rate=1e-2, loss="lsgan")
LORA = LoRAConfig(rank=2, targets=E2GAN_TARGETS)
PROMPTS = ("red tint", "negative", "blue tint on the top")


@pytest.fixture(scope="module")
def networks():
    generator = E2GANConfig(
        widths=(4,), kernel_size=3, num_attention_heads=2, cross_attention_dim=TEXT
    )
    judge = PatchGANConfig(ndf=4, n_layers=1, norm="instance", text_dim=TEXT)
    return E2GAN(generator, rngs=nnx.Rngs(0)), PatchGAN(judge, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 256, (24, 2, 2, 3))
    photos = np.repeat(np.repeat(corners, 4, 1), 4, 2).astype(np.uint8)
    states = rng.standard_normal((3, 2, 3, TEXT)).astype(np.float32)
    concepts = [concept_of(prompt, "artistic") for prompt in PROMPTS]
    edited = np.stack([concept.apply(photos) for concept in concepts])
    return Pairs(photos, edited, states, states.mean(2))


def test_errors_of_logits_are_the_published_ones():
    logits = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(gan_error(logits, True, "lsgan"), (logits - 1) ** 2)
    np.testing.assert_allclose(gan_error(logits, False, "lsgan"), logits**2)
    probability = jax.nn.sigmoid(logits)
    np.testing.assert_allclose(gan_error(logits, True, "vanilla"), -jnp.log(probability), rtol=1e-5)
    np.testing.assert_allclose(
        gan_error(logits, False, "vanilla"), -jnp.log(1 - probability), rtol=1e-5
    )


def one_start(networks) -> E2GAN:
    """A start at which every factor has a gradient."""
    model = adapted(networks[0], LORA, jax.random.key(3), also=("conv_out.bias",))
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.1, trainable), frozen)


def learned(model) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.state(model, Trainable))])


@pytest.mark.heavy
def test_a_step_moves_both_networks_by_their_losses(networks, pairs):
    """The second network is judged by the first one's new values, as in the authors' code."""
    config = replace(CONFIG, loss="vanilla", discriminator_rate=0.05, batch_size=3)
    start, judge = one_start(networks), mark_trainable(networks[1])
    graph_g, trainable, frozen = nnx.split(start, Trainable, ...)
    graph_d, values_d = nnx.split(judge)
    data = training_data(pairs.select([1]))
    steps = Steps(gan_task(start, judge, data, config, seed=0, batches="one"), config.sized(24))
    steps.advance(1)

    key = jax.random.key(0)
    arrays = jax.tree.map(jnp.asarray, data)
    batch = PairBatches("one", 3)(jnp.int32(0), {**arrays, "order": key})

    def fakes(values):
        states = jnp.broadcast_to(batch["states"], (3, *batch["states"].shape))
        return nnx.merge(graph_g, values, frozen)(batch["source"], states)

    def logits(values, image):
        return nnx.merge(graph_d, values)(batch["source"], image, batch["pooled"])

    def loss_d(values):
        real, fake = logits(values, batch["target"]), logits(values, fakes(trainable))
        return (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()) / 2

    def loss_g(values):
        image = fakes(values)
        error = jnp.abs(image - batch["target"]).mean()
        return jax.nn.softplus(-logits(moved_d, image)).mean() + 100 * error

    def moved(loss, values, rate):
        tx = optax.adam(rate, b1=0.5, b2=0.999)
        updates, _ = tx.update(jax.grad(loss)(values), tx.init(values), values)
        return optax.apply_updates(values, updates)

    # Adam's first step is the sign of the gradient: only where that is clear can it be compared.
    moved_d = jax.jit(partial(moved, loss_d, rate=0.05))(values_d)
    moved_g = jax.jit(partial(moved, loss_g, rate=0.01))(trainable)
    for found, expected in ((steps.model.discriminator, moved_d), (steps.model.generator, moved_g)):
        values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)])
        assert np.mean(np.abs(learned(found) - values) < 1e-4) > 0.98


@pytest.mark.heavy
def test_concepts_together_learn_what_each_learns_alone(networks, pairs):
    config = replace(CONFIG, discriminator_rate=0.0, batch_size=2)
    start, judge = one_start(networks), networks[1]
    stacked = stacked_parts(start, 3, shared=False)
    task = gan_task(stacked, judge, training_data(pairs), config, seed=0, batches="each")
    together = Steps(task, config.sized(24))
    one = training_data(pairs.select([2]))
    alone = Steps(gan_task(start, judge, one, config, seed=0, batches="one"), config.sized(24))
    for steps in (together, alone):
        steps.advance(2)
    values = nnx.state(together.model.generator, Trainable)
    third = np.concatenate([np.ravel(x[2]) for x in jax.tree.leaves(values)])
    # Adam's first steps are the gradients' signs, which rounding turns where they are nearly 0.
    assert np.mean(np.abs(third - learned(alone.model.generator)) < 1e-4) > 0.97
    assert np.abs(third - learned(start)).max() > 1e-3


@pytest.mark.heavy
@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 2, 2)], ids=["data", "all"])
@pytest.mark.parametrize("batches", ["mixed", "each"])
def test_a_mesh_gives_what_one_device_gives(networks, pairs, batches, data, fsdp, tensor):
    """One update by plain gradients; concepts that train together lie along "data"."""
    config = replace(CONFIG, optimizer="sgd", b1=0.0, batch_size=8, learning_rate=1e-3)
    start, judge, own = one_start(networks), networks[1], pairs
    if batches == "each":
        own = pairs.select([0, 1, 2, 2, 2, 2, 2, 2])
        start = stacked_parts(start, 8, shared=False)
    task = gan_task(start, judge, training_data(own), config, seed=0, batches=batches)
    alone, spread = (
        Steps(task, config.sized(24)),
        Steps(task, config.sized(24), mesh=make_mesh(data, fsdp, tensor)),
    )
    for steps in (alone, spread):
        steps.advance(1)
    for name in ("generator", "discriminator"):
        found = [learned(getattr(steps.model, name)) for steps in (alone, spread)]
        np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    moved = np.abs(learned(alone.model.generator) - learned(start)).max()
    assert moved > 1e-4


@pytest.mark.heavy
def test_the_plan_is_of_the_program_that_runs(networks, pairs):
    mesh = make_mesh(2, devices=jax.devices()[:2])
    whole = training_data(pairs.select([0, 1]))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in whole.items()}

    def stacked():
        generator = E2GAN(networks[0].config, rngs=nnx.Rngs(0))
        return stacked_parts(adapted(generator, LORA, jax.random.key(0)), 2, shared=False)

    judge = nnx.eval_shape(lambda: PatchGAN(networks[1].config, rngs=nnx.Rngs(0)))
    planned, real = (
        trainer.plan(
            "x",
            gan_task(model, other, data, CONFIG, seed=0, batches="each"),
            CONFIG.sized(24),
            mesh,
        )
        for model, other, data in (
            (nnx.eval_shape(stacked), judge, shapes),
            (stacked(), networks[1], whole),
        )
    )
    assert planned == real and planned.bytes > 0


@pytest.mark.heavy
def test_shared_parts_make_weights_follow_from_texts(networks, pairs, tmp_path):
    """Concepts with one feature in common and one each without: parts add up, and are learnt."""
    features = np.array([[1, 0], [1, 1], [0, 1]], np.float32)
    mix = mixture(features, 3, 0.5, multiple=4)
    assert mix.shape == (3, 8) and not mix[:, 6:].any()
    np.testing.assert_allclose(mix[1, :6], [1, 1, 1, 0, 0.5, 0])
    parts = {"w": jnp.arange(16.0).reshape(8, 2)}
    np.testing.assert_allclose(mixed(jnp.asarray(mix), parts)["w"][1], [2 + 4 + 4, 1 + 3 + 5 + 4.5])

    generator, discriminator = networks
    model = adapted(generator, LORA, jax.random.key(3))
    run = partial(train_together, model, discriminator, pairs, seed=0)
    # Without parts of their own, concepts of the same features stay the same, however their edits
    # differ; what their features do not tell apart is not learnt.
    same = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    short = replace(CONFIG, steps=4)
    found = [states[0].arrays for states in run(short, tmp_path, shared=same, own=0.0)]
    gaps = [
        max(float(jnp.abs(found[0][name] - other[name]).max()) for name in other)
        for other in found[1:]
    ]
    assert gaps[0] < 1e-6 and gaps[1] > 1e-3


@pytest.fixture(scope="module")
def base(networks, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return train_base(*networks, pairs.select([0, 1]), CONFIG, folder, seed=0)


def errors(model, pairs):
    return [
        l1_error(edit_images(model, pairs.source, pairs.states[c, 0]), pairs.target[c])
        for c in range(len(pairs))
    ]


def test_the_base_learns_its_concepts_by_their_texts(networks, base, pairs):
    before, after = errors(networks[0], pairs), errors(base[0], pairs)
    assert max(after[:2]) < 0.75 * min(before[:2])
    swapped = replace(pairs, states=pairs.states[[1, 0, 2]])
    assert np.mean(errors(base[0], swapped)[:2]) > 1.3 * np.mean(after[:2])
    assert not jax.tree.leaves(nnx.state(base[0], Trainable))


@pytest.mark.heavy
def test_adapters_of_many_concepts_and_their_late_checkpoints(base, pairs, tmp_path):
    model = adapted(base[0], LORA, jax.random.key(7))
    make = partial(train_together, model, base[1], pairs, CONFIG, tmp_path, seed=0)
    found = make(checkpoints=2, every=20)
    assert [len(states) for states in found] == [2, 2, 2]
    before = errors(base[0], pairs)
    for c, states in enumerate(found):
        one = pairs.select([c])
        (late,) = errors(load_state(model, states[-1]), one)
        assert late < before[c] + 0.01
        changed = [
            float(jnp.abs(a - b).max())
            for a, b in zip(states[0].arrays.values(), states[1].arrays.values(), strict=True)
        ]
        assert 0 < max(changed) < 1
    (new,) = errors(load_state(model, found[2][-1]), pairs.select([2]))
    assert new < 0.8 * before[2], "a concept that the base has not seen"
    again = make(checkpoints=2, every=20)
    for name, value in found[1][0].arrays.items():
        np.testing.assert_array_equal(value, again[1][0].arrays[name])
    with pytest.raises(ValueError, match="5 checkpoints every 20 steps, of a training of 80"):
        make(checkpoints=5, every=20)


@pytest.mark.heavy
def test_concepts_over_devices_learn_the_same(base, pairs, tmp_path):
    """Three concepts on two devices: the last one is trained twice, and given once."""
    model = adapted(base[0], LORA, jax.random.key(7))
    config = replace(CONFIG, steps=2, discriminator_rate=0.0)
    run = partial(train_together, model, base[1], pairs, config, seed=0)
    alone = run(tmp_path / "one")
    found = run(tmp_path / "two", mesh=make_mesh(2, devices=jax.devices()[:2]))
    assert [len(states) for states in found] == [1, 1, 1]
    for (one,), (other,) in zip(alone, found, strict=True):
        for name, value in one.arrays.items():
            # Adam's first steps are the gradients' signs, which rounding turns where they are 0.
            assert np.mean(np.abs(value - other.arrays[name]) < 1e-4) > 0.95, name


def test_a_good_start_is_ahead_and_a_curve_says_by_how_much(base, pairs):
    one = pairs.select([2])
    model = adapted(base[0], LORA, jax.random.key(7))
    curve, learnt = fine_tune(model, base[1], one, one, CONFIG, at=(0, 20, 80), seed=0)
    assert curve.l1[2] < curve.l1[0] and curve.seconds[0] == 0 < curve.seconds[1]
    assert errors(load_state(model, learnt), one)[0] == pytest.approx(curve.l1[2])

    def features(images):
        return images.reshape(len(images), -1)[:, ::50].astype(np.float64)

    better, _ = fine_tune(
        load_state(model, learnt), base[1], one, one, CONFIG, at=(0,), seed=0, features=features
    )
    assert better.l1 == (curve.l1[2],) and better.seconds[0] < 0.1 and len(better.fd) == 1
    assert better.reached(curve.l1[2]) == (0.0, better.seconds[0])


def test_pix2pix_learns_from_nothing(pairs):
    one = pairs.select([1])
    generator = mark_trainable(
        Pix2Pix(Pix2PixConfig(num_downs=2, ngf=8, norm="instance"), rngs=nnx.Rngs(0))
    )
    judge = PatchGAN(PatchGANConfig(ndf=4, n_layers=1, norm="instance"), rngs=nnx.Rngs(1))
    config = replace(CONFIG, learning_rate=2e-3)
    curve, _ = fine_tune(generator, judge, one, one, config, at=(0, 80), seed=0)
    assert curve.l1[1] < 0.7 * curve.l1[0]


def test_a_curve_is_read_between_its_points():
    curve = Curve((0, 10, 30), (0.0, 1.0, 3.0), (0.4, 0.2, 0.1))
    assert curve.reached(0.5) == (0.0, 0.0)
    assert curve.reached(0.3) == pytest.approx((5, 0.5))
    assert curve.reached(0.15) == pytest.approx((20, 2.0))
    assert curve.reached(0.05) is None


def test_texts_have_states_for_every_wording(base_folder):
    pipeline = load_pipeline(base_folder)
    wordings = [("red", "make it red"), ("a mosaic", "tiles")]
    states, pooled = encode_texts(pipeline.text_encoder, pipeline.tokenizer, wordings)
    width = pipeline.text_encoder.config.hidden_size
    assert states.shape == (2, 2, pipeline.tokenizer.max_length, width)
    assert pooled.shape == (2, 2, width)
    alone, _ = encode_texts(pipeline.text_encoder, pipeline.tokenizer, [("tiles",)])
    np.testing.assert_allclose(alone[0, 0], states[1, 1], atol=1e-5)
    with pytest.raises(UserError, match=r"concepts of \[1, 2\] wordings"):
        encode_texts(pipeline.text_encoder, pipeline.tokenizer, [("a",), ("b", "c")])


def test_what_does_not_fit_is_refused(base, pairs):
    with pytest.raises(ValueError, match=r"targets \(3, 24, 8, 8, 3\) of photos \(23, 8, 8, 3\)"):
        replace(pairs, source=pairs.source[1:])
    with pytest.raises(ValueError, match="loss: 'wgan', expected one of lsgan, vanilla"):
        GANConfig(loss="wgan")
    with pytest.raises(ValueError, match=r"discriminator_rate: .* with learning_rate"):
        GANConfig(learning_rate=0.0, discriminator_rate=0.1)
    with pytest.raises(ValueError, match="remat: 'block'"):
        GANConfig(remat="block")
    parts = replace(CONFIG, accumulate=2)
    with pytest.raises(UserError, match="accumulate: 2, but"):
        gan_task(*base, training_data(pairs), parts, seed=0, batches="each")
    tune = partial(fine_tune, *base)
    with pytest.raises(ValueError, match="3 and 3 concepts, expected one"):
        tune(pairs, pairs, CONFIG, at=(0,), seed=0)
    one = pairs.select([0])
    with pytest.raises(ValueError, match=r"steps \[5, 0\], expected them to increase"):
        tune(one, one, CONFIG, at=(5, 0), seed=0)
