"""From texts to adapters: by heart, on top of plain predictors, guarded, saved and loaded."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters.flatten import Layout
from jaxsynth.adapters.inject import AdapterState, extract, load_state
from jaxsynth.adapters.kinds.affiner import AffinerConfig, add_affiner
from jaxsynth.core.errors import UserError
from jaxsynth.methods.weightgen.collection import WeightCollection
from jaxsynth.methods.weightgen.generator import (
    PRIORS,
    Baselines,
    GeneratorConfig,
    TextReader,
    group_norms,
    load_generator,
    save_generator,
    train_generator,
)
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.models.diffusion.weight_unet import WeightUNetConfig
from jaxsynth.tasks.weight_diffusion import WeightTrainConfig
from jaxsynth.weights.hf import load_pipeline
from tests.adapters.nets import randomised
from tests.methods.small_base import random_network

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
TEXTS = tuple((f"a photo of the digit {name}", f"digit {name}") for name in DIGITS)
STATE = AdapterState(
    {
        "down.lora_A": jnp.zeros((9, 2)),
        "down.lora_B": jnp.zeros((2, 16)),
        "up.lora_A": jnp.zeros((16, 2)),
        "up.lora_B": jnp.zeros((2, 12)),
    }
)
LAYOUT = Layout.of(STATE, 32)
CONFIG = GeneratorConfig(
    network=WeightUNetConfig(
        sample_size=32, patch_size=8, block_out_channels=(32, 32), attention_head_dim=16,
        cross_attention_dim=16, norm_num_groups=4,
    ),
    train=WeightTrainConfig(
        steps=400, batch_size=48, learning_rate=4e-3, steps_per_call=100, ema_decay=0.98
    ),
    per="array",
)  # fmt: skip
DIT = DiTConfig(
    num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=4, num_embeds_ada_norm=3
)
UNTRAINED = dataclasses.replace(
    CONFIG, train=dataclasses.replace(CONFIG.train, steps=1, steps_per_call=1, learning_rate=1e-12)
)


@pytest.fixture(scope="module")
def read(base_folder) -> TextReader:
    pipeline = load_pipeline(base_folder)
    return TextReader(pipeline.text_encoder, pipeline.tokenizer)


def scaled(arrays: dict, by: float) -> AdapterState:
    return AdapterState({name: jnp.asarray(by * x, jnp.float32) for name, x in arrays.items()})


@pytest.fixture(scope="module")
def collection() -> WeightCollection:
    """Arrays of unlike sizes and means, a concept's two checkpoints close together."""
    rng = np.random.default_rng(0)
    states = []
    for _ in TEXTS:
        own = {
            name: 0.1**number * (3 + rng.normal(size=value.shape))
            for number, (name, value) in enumerate(STATE.arrays.items())
        }
        states.append([scaled(own, 1 + 1e-3 * k) for k in range(2)])
    return WeightCollection.of(states, TEXTS, ["digits"] * 8, LAYOUT, "the-base")


@pytest.fixture(scope="module")
def baselines(collection, read) -> Baselines:
    return Baselines(collection, read)


@pytest.fixture(scope="module")
def generator(collection, read, baselines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    return train_generator(collection, read, CONFIG, folder, seed=0, baselines=baselines)


PROMPTS = [texts[0] for texts in TEXTS]


def missed(blocks, truth) -> float:
    """The share of the variance over concepts, array by array, that was not found."""
    parts = LAYOUT.parts("array")
    shares = [
        np.square(blocks - truth)[:, parts == part].sum()
        / np.square(truth - truth.mean(0))[:, parts == part].sum()
        for part in range(parts.max() + 1)
    ]
    return float(np.mean(shares))


@pytest.mark.heavy
@pytest.mark.parametrize("how", [{}, {"steps": 3}])
def test_eight_concepts_become_their_adapters(generator, baselines, how):
    found = generator(PROMPTS, seed=5, **how)
    assert missed(found.blocks, baselines.blocks) < 0.05 and not found.replaced.any()
    np.testing.assert_allclose(found.ratios.mean(), 1, atol=0.02)
    state = generator.states(found)[3]
    assert state.arrays.keys() == STATE.arrays.keys()
    # The paraphrases are learnt as well.
    other = generator([texts[1] for texts in TEXTS], seed=6, **how)
    assert missed(other.blocks, baselines.blocks) < 0.1


def test_shuffled_texts_give_the_wrong_adapters(generator, baselines):
    shuffled = generator(PROMPTS[1:] + PROMPTS[:1], seed=5)
    assert missed(shuffled.blocks, baselines.blocks) > 1


def test_plain_predictors(baselines, collection, read):
    mean = collection.blocks.mean((0, 1))
    np.testing.assert_allclose(baselines.predict("mean", PROMPTS[:2]), [mean, mean], rtol=1e-5)
    np.testing.assert_array_equal(baselines.nearest(PROMPTS), np.arange(8))
    np.testing.assert_array_equal(baselines.predict("nearest", PROMPTS), baselines.blocks)
    np.testing.assert_array_equal(baselines.predict("none", PROMPTS[:1]), 0 * mean[None])
    assert baselines.predict("ridge", ["the digit nine"]).shape == (1, *mean.shape)
    # Nothing of a concept itself is in what the others say of it.
    assert (np.abs(baselines.left_out("nearest") - baselines.blocks).max((1, 2)) > 0.1).all()
    assert baselines.features in ("pooled", "tokens", "words")
    assert not baselines.left_out("ridge")[:, ~LAYOUT.mask].any()


@pytest.mark.heavy
@pytest.mark.parametrize("kind", PRIORS)
def test_a_generator_adds_to_its_prior(collection, read, baselines, tmp_path, kind):
    config = dataclasses.replace(UNTRAINED, residual=kind, guard=0.0)
    made = train_generator(collection, read, config, tmp_path, seed=0, baselines=baselines)
    rest = (baselines.blocks - baselines.left_out(kind))[:, LAYOUT.mask]
    parts = LAYOUT.parts("array")[LAYOUT.mask]
    shift = np.array([rest[:, parts == part].mean() for part in range(4)])[parts]
    found = made(["the digit nine"], seed=1).blocks[0, LAYOUT.mask]
    # An untrained network predicts the mean of what is left.
    expected = baselines.predict(kind, ["the digit nine"])[0, LAYOUT.mask] + shift
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_weights_out_of_range_are_replaced(generator, baselines):
    far = dataclasses.replace(generator.statistics, std=100 * generator.statistics.std)
    wild = dataclasses.replace(generator, statistics=far)
    found = wild(PROMPTS, seed=5)
    assert found.replaced.all() and found.ratios.max() > 2
    np.testing.assert_allclose(found.blocks, baselines.predict("mean", PROMPTS), rtol=1e-5)
    own = 7 * np.ones_like(baselines.mean)
    np.testing.assert_array_equal(wild(PROMPTS, seed=5, fallback=own).blocks[2], own)
    free = dataclasses.replace(wild, config=dataclasses.replace(CONFIG, guard=0.0))
    assert not free(PROMPTS, seed=5).replaced.any()
    lost = dataclasses.replace(free, statistics=dataclasses.replace(far, std=np.nan * far.std))
    found = lost(PROMPTS, seed=5)
    assert found.replaced.all() and np.isfinite(found.blocks).all()


def test_norms_are_of_layer_groups(baselines):
    norms = group_norms(baselines.blocks, LAYOUT)
    state = LAYOUT.from_blocks(jnp.asarray(baselines.blocks[4]))
    up = [state.arrays["up.lora_A"], state.arrays["up.lora_B"]]
    assert norms[4, 1] == pytest.approx(np.sqrt(sum(np.square(x).sum() for x in up)), rel=1e-4)


def test_a_generator_comes_back(generator, collection, read, baselines, tmp_path):
    save_generator(generator, tmp_path)
    found = load_generator(tmp_path, collection, read, baselines=baselines)
    assert found.config == generator.config
    expected = generator(PROMPTS[:2], seed=3, t=800)
    np.testing.assert_allclose(found(PROMPTS[:2], seed=3, t=800).blocks, expected.blocks, atol=1e-6)


def test_a_collection_of_another_base_or_layout_is_refused(
    generator, collection, read, baselines, tmp_path
):
    save_generator(generator, tmp_path)
    with pytest.raises(UserError, match=r"adapters of base the-base, the collection's are of oth"):
        load_generator(
            tmp_path, dataclasses.replace(collection, base="other"), read, baselines=baselines
        )
    layout = Layout.of(STATE, 16)
    blocks = np.stack(
        [
            [layout.to_blocks(LAYOUT.from_blocks(jnp.asarray(k))) for k in own]
            for own in collection.blocks
        ]
    )
    other = dataclasses.replace(collection, blocks=blocks, layout=layout)
    with pytest.raises(UserError, match="another layout than the collection's"):
        load_generator(tmp_path, other, read, baselines=baselines)
    path = tmp_path / "generator.json"
    values = json.loads(path.read_text())
    del values["config"]["network"]["patch_size"]
    values["config"]["network"]["patches"] = 2
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"generator.json: config.network.*patches"):
        load_generator(tmp_path, collection, read, baselines=baselines)


def test_settings_that_cannot_be_are_refused(generator):
    with pytest.raises(ValueError, match="per is 'layer', expected one of group, array, value"):
        dataclasses.replace(CONFIG, per="layer")
    with pytest.raises(ValueError, match="residual is 'median'"):
        dataclasses.replace(CONFIG, residual="median")
    with pytest.raises(ValueError, match=r"guard is 0\.5"):
        dataclasses.replace(CONFIG, guard=0.5)
    with pytest.raises(ValueError, match="t is 1000, expected 0 to 999"):
        generator(PROMPTS[:1], seed=0, t=1000)


@pytest.mark.slow
def test_another_kind_of_adapter_from_another_kind_of_name(read, tmp_path):
    """Affiners of a diffusion transformer, from the names of the data sets that they stand for."""
    base = random_network(DiT, DIT, 0)
    empty = add_affiner(base, AffinerConfig(rank=2, targets=("to_q",)), rngs=nnx.Rngs(0))
    names = ["digits", "textures", "scenes", "patches"]
    states = [randomised(extract(empty), seed) for seed in range(len(names))]
    layout = Layout.of(states[0], 32)
    known = WeightCollection.of(
        [[state] for state in states], [[name] for name in names], ["sets"] * 4, layout, "dit"
    )
    made = train_generator(known, read, CONFIG, tmp_path, seed=0)
    (found,) = made.states(made(["scenes"], seed=1))
    assert found.config == states[2].config

    @jax.jit
    def apply(model):
        x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
        return model(x, jnp.array([3, 700]), jnp.array([1, 2]))

    right, wrong, out = (apply(load_state(empty, state)) for state in (states[2], states[1], found))
    assert jnp.abs(out - right).mean() < 0.3 * jnp.abs(wrong - right).mean()
