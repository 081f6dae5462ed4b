"""Generation: an image depends on its class, number, seed and adapter, and on nothing else."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from jaxsynth.adapters.inject import AdapterState, extract, merge
from jaxsynth.adapters.registry import attach
from jaxsynth.core import preemption
from jaxsynth.data.store import ImageStore
from jaxsynth.generation import generate
from jaxsynth.generation.generate import GenerateConfig, Generator, fill_store, image_keys
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.tasks.text_to_image import FinetuneConfig, adapted
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import load_pipeline

NAMES = ("one", "two", "three")
PROMPTS = tuple(f"a photo of the digit {name}" for name in NAMES)
CONFIG = GenerateConfig(
    images_per_class=4, num_inference_steps=3, batch_size=4, batches_per_shard=1
)
LORA = FinetuneConfig(rank=2, unet_targets=("to_q", "to_out.0"), text_targets=("q_proj",))
LABELS, INDICES = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def adapters(pipeline):
    """One adapter per class, each of a visible effect."""
    plain = extract(adapted(pipeline, LORA, jax.random.key(0)))
    states = []
    for c in range(3):
        key = jax.random.key(c)
        arrays = {
            name: 0.3 * jax.random.normal(jax.random.fold_in(key, i), value.shape)
            for i, (name, value) in enumerate(plain.arrays.items())
        }
        states.append(AdapterState(arrays, plain.config))
    return states


def draw(generator, labels=LABELS, indices=INDICES) -> np.ndarray:
    """All images, however many fit in a batch."""
    size = generator.batch_size
    parts = range(0, len(labels), size)
    return np.concatenate([generator(labels[i : i + size], indices[i : i + size]) for i in parts])


@pytest.fixture(scope="module")
def own(pipeline, adapters):
    """The images of every class, each with its own adapter."""
    images = draw(Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters))
    assert images.shape == (12, 8, 8, 3) and images.std() > 20
    return images


def same_images(found, expected) -> None:
    """Equal, but for one level where a value lay on the edge between two: in 1 % of the pixels."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1, difference.max()
    assert (difference > 0).mean() < 0.01, (difference > 0).mean()


def test_every_key_is_another():
    labels, indices = np.repeat(np.arange(3), 5), np.tile(np.arange(5), 3)
    data = np.asarray(jax.random.key_data(image_keys(0, labels, indices)))
    other = np.asarray(jax.random.key_data(image_keys(1, labels, indices)))
    assert len(np.unique(np.concatenate([data, other]), axis=0)) == 30


@pytest.mark.heavy
def test_the_batch_does_not_matter(pipeline, adapters, own):
    config = dataclasses.replace(CONFIG, batch_size=5)
    generator = Generator(pipeline, PROMPTS, config, seed=3, adapters=adapters)
    order = np.random.default_rng(0).permutation(12)
    same_images(draw(generator, LABELS[order], INDICES[order]), own[order])
    # A batch of its own, filled up.
    same_images(generator(LABELS[7:8], INDICES[7:8]), own[7:8])


@pytest.mark.heavy
def test_adapters_in_one_batch_equal_each_alone(pipeline, adapters, own):
    base = draw(Generator(pipeline, PROMPTS, CONFIG, seed=3))
    for c in range(3):
        rows = c == LABELS
        alone = Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters[c])
        same_images(draw(alone, LABELS[rows], INDICES[rows]), own[rows])
        assert np.abs(base[rows].astype(int) - own[rows]).mean() > 3
    # Which adapter an image has does matter.
    turned = Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters[1:] + adapters[:1])
    assert np.abs(draw(turned).astype(int) - own).mean() > 3


def test_classes_numbers_and_seeds_have_their_own_noise(pipeline):
    prompts = (PROMPTS[0],) * 3
    images = draw(Generator(pipeline, prompts, CONFIG, seed=3))
    other = draw(Generator(pipeline, prompts, CONFIG, seed=4))
    assert len(np.unique(np.concatenate([images, other]).reshape(24, -1), axis=0)) == 24


@pytest.mark.heavy
@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_devices_do_not_matter(pipeline, adapters, own, shape):
    generator = Generator(
        pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters, mesh=make_mesh(**shape)
    )
    same_images(draw(generator), own)


@pytest.mark.heavy
def test_scale_one_asks_the_prompt_alone(pipeline, adapters):
    config = dataclasses.replace(CONFIG, guidance_scale=1.0)
    one = draw(Generator(pipeline, PROMPTS, config, seed=3, adapters=adapters))
    negative = dataclasses.replace(config, negative_prompt="something else")
    again = draw(Generator(pipeline, PROMPTS, negative, seed=3, adapters=adapters))
    np.testing.assert_array_equal(one, again)
    nearly = dataclasses.replace(negative, guidance_scale=1.0 + 1e-6)
    same_images(draw(Generator(pipeline, PROMPTS, nearly, seed=3, adapters=adapters)), one)


@pytest.mark.heavy
def test_sixteen_bit_weights_keep_their_adapter_apart(base_folder, adapters):
    """Merged into bfloat16, an update far below the weights would vanish."""
    pipeline = load_pipeline(base_folder, "bfloat16", compute_dtype="bfloat16")
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters[0])
    assert draw(generator).std() > 20
    assert len(jax.tree.leaves(generator.networks.factors)) == len(adapters[0].arrays)


def test_mistakes_are_refused(pipeline, adapters):
    with pytest.raises(ValueError, match="2 adapters for 3 prompts"):
        Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters[:2])
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=3)
    with pytest.raises(ValueError, match="12 images, but batch_size is 4"):
        generator(LABELS, INDICES)


def test_merging_is_what_one_adapter_gets(pipeline, adapters):
    """The float32 generator holds no adapter any more, and the base is as it was."""
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters[0])
    assert jax.tree.leaves(generator.networks.factors) == []
    merged = merge(attach(TextToImage(pipeline.unet, pipeline.text_encoder), adapters[0]))
    assert merged.unet.conv_in.kernel is pipeline.unet.conv_in.kernel


def fill(generator, folder) -> ImageStore:
    count = fill_store(
        generator, folder, NAMES, PROMPTS, CONFIG, seed=3, adapter_digests=["a", "b", "c"]
    )
    assert count == 12
    return ImageStore(folder)


def test_a_store_and_its_restart(pipeline, adapters, own, tmp_path):
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters)
    store = fill(generator, tmp_path)
    assert np.bincount(store.labels).tolist() == [4, 4, 4]
    for i, entry in enumerate(store.entries):
        assert entry.class_name == NAMES[entry.label] and entry.prompt == PROMPTS[entry.label]
        assert entry.adapter == "abc"[entry.label]
        assert (entry.seed, entry.guidance) == (3, 2.0)
        same_images(store[i].image, own[4 * entry.label + entry.index])
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len([name for name in written if name.endswith(".seal")]) == 3
    (tmp_path / "00001.seal").unlink()
    (tmp_path / "00001.array_record").write_bytes(b"half")
    (tmp_path / "00002.seal").unlink()
    fill(generator, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


@pytest.mark.parametrize(("soon", "kept"), [(0.0, 0), (60.0, 12)])
def test_a_long_shard_is_not_waited_for(tmp_path, monkeypatch, soon, kept):
    """Asked to stop in its first batch, a shard is finished where that is soon, or left."""
    asked = threading.Event()
    monkeypatch.setattr(preemption, "_asked", asked)
    monkeypatch.setattr(generate, "_SOON", soon)
    config = dataclasses.replace(CONFIG, images_per_class=8, batches_per_shard=3)

    def told_to_stop(labels, indices):
        asked.set()
        return np.zeros((len(labels), 8, 8, 3), np.uint8)

    words = f"with {kept} of 24 images {'drawn' if kept else 'kept'}"
    with pytest.raises(preemption.Preempted, match=words):
        fill_store(told_to_stop, tmp_path, NAMES, PROMPTS, config, seed=3)
    assert len(list(tmp_path.glob("*.seal"))) == kept // 12


def test_a_request_to_stop_is_heard_between_shards(pipeline, adapters, tmp_path, monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(preemption, "_asked", asked)
    generator = Generator(pipeline, PROMPTS, CONFIG, seed=3, adapters=adapters)

    def told_to_stop(labels, indices):
        asked.set()
        return generator(labels, indices)

    with pytest.raises(preemption.Preempted, match="SIGTERM with 4 of 12 images drawn"):
        fill(told_to_stop, tmp_path)
    assert [path.name for path in tmp_path.glob("*.seal")] == ["00000.seal"]
    asked.clear()
    fill(generator, tmp_path)
