"""An adapter of each image: heads on shared down projections, and images drawn with their sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsynth.adapters.combine import combine
from jaxsynth.adapters.inject import AdapterState, extract, load_state
from jaxsynth.adapters.registry import attach
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.generation.mixtures import MixtureGenerator, Mixtures, dirichlet_of, pair_of
from jaxsynth.generation.sampler import image_keys
from jaxsynth.tasks.image_heads import HeadDenoising, finetune_heads, heads_of, with_heads
from jaxsynth.tasks.text_to_image import Denoising, FinetuneConfig, adapted, finetune_tasks
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters import io as adapter_io
from tests.tasks.test_text_to_image import CONFIG, PROMPTS, by_class, examples, pipeline  # noqa: F401

SMALL = FinetuneConfig(
    steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=0, rank=2, alpha=3.0, eps=1e-2,
    unet_targets=("to_v", "conv_in"), text_targets=("q_proj",), rates=(("lora_B", 10.0),),
)  # fmt: skip
DRAWN = GenerateConfig(num_inference_steps=2, batch_size=4)


def randomised(state: AdapterState, seed: int) -> AdapterState:
    key = jax.random.key(seed)
    arrays = {
        name: 0.3 * jax.random.normal(jax.random.fold_in(key, i), value.shape)
        for i, (name, value) in enumerate(sorted(state.arrays.items()))
    }
    return AdapterState(arrays, state.config)


@pytest.mark.heavy
def test_each_example_is_seen_by_its_own_head(pipeline, by_class):  # noqa: F811
    """The loss is the mean of what each example's adapter alone gives it."""
    (task,) = finetune_tasks(pipeline, by_class[:1], SMALL, seed=0)
    model = with_heads(task.model, 8)
    state = randomised(extract(model), 1)
    model = load_state(model, state)
    rows = np.array([5, 0, 5])
    batch = {
        name: jnp.asarray(getattr(by_class[0], name)[rows])
        for name in ("mean", "std", "sizes", "ids")
    }
    schedule, key = NoiseSchedule.from_config(pipeline.scheduler_config), jax.random.key(3)
    loss = HeadDenoising(Denoising())
    found, _ = loss(model, schedule, batch | {"head": jnp.asarray(rows)}, key)
    alone = []
    for row, own in enumerate(jax.random.split(key, 3)):
        one = attach(pipeline.networks, heads_of(state)[rows[row]])
        example = {name: value[row : row + 1] for name, value in batch.items()}
        alone.append(Denoising()(one, schedule, example, own)[0])
    np.testing.assert_allclose(found, np.mean(alone), rtol=1e-5)


@pytest.mark.heavy
def test_heads_share_what_they_learn_on(pipeline, by_class, tmp_path):  # noqa: F811
    """Two classes at once, on one device and on two."""
    sets = by_class[:2]
    one = finetune_heads(pipeline, sets, SMALL, tmp_path / "one", seed=0)
    mesh = make_mesh(devices=jax.devices()[:2])
    two = finetune_heads(pipeline, sets, SMALL, tmp_path / "two", seed=0, mesh=mesh)
    start = extract(adapted(pipeline, SMALL, jax.random.key(0)))
    assert [len(own) for own in one] == [8, 8]
    for own, again in zip(one, two, strict=True):
        assert all(state.config == start.config for state in own)
        for name in start.arrays:
            values = np.stack([np.asarray(state.arrays[name]) for state in own])
            np.testing.assert_allclose(
                values, np.stack([state.arrays[name] for state in again]), atol=1e-5
            )
            assert values.shape[1:] == start.arrays[name].shape
            # Every head has moved from 0, and in its own way.
            spread = np.abs(values - values[0]).max(axis=tuple(range(1, values.ndim)))
            assert (spread[1:] > 0).all() if name.endswith("lora_B") else not spread.any()
    assert not np.array_equal(*(own[0].arrays["unet.conv_in.lora_A"] for own in one))


@pytest.mark.heavy
@pytest.mark.parametrize("choose", [pair_of, dirichlet_of])
def test_each_image_is_drawn_with_its_own_sum(pipeline, tmp_path, choose):  # noqa: F811
    """As by the network into which the sum is merged, on one device and on two."""
    plain = extract(adapted(pipeline, CONFIG, jax.random.key(0)))
    files = [[tmp_path / f"{c}" / f"{i:04d}" for i in range(3)] for c in range(2)]
    states = [[randomised(plain, 10 * c + i) for i in range(3)] for c in range(2)]
    for own, places in zip(states, files, strict=True):
        for state, place in zip(own, places, strict=True):
            adapter_io.save(state, place)

    def pick(label: int, index: int, count: int):
        return choose(7, label, index, count)

    labels, indices = np.array([0, 1, 1], np.int32), np.array([0, 0, 4], np.int32)
    keys = image_keys(5, labels, indices)
    found = {}
    for devices in (1, 2):
        generator = MixtureGenerator(
            pipeline, PROMPTS[:2], DRAWN, Mixtures(files, pick), seed=5,
            mesh=make_mesh(devices=jax.devices()[:devices]),
        )  # fmt: skip
        found[devices] = generator.draw(keys, labels, indices).astype(int)
    assert np.abs(found[1] - found[2]).max() <= 1
    for i, (label, index) in enumerate(zip(labels, indices, strict=True)):
        which, weights = pick(int(label), int(index), 3)
        parts = [attach(pipeline.networks, states[label][k]) for k in which]
        model = combine(pipeline.networks, parts, list(weights))
        alone = Generator(pipeline, PROMPTS[:2], DRAWN, seed=5, model=model)
        expected = alone.draw(keys[i : i + 1], labels[i : i + 1], indices[i : i + 1]).astype(int)
        assert np.abs(found[1][i] - expected[0]).max() <= 1, (label, index)
    assert np.abs(found[1][1] - found[1][2]).max() > 10
