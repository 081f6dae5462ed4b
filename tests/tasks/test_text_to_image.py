"""Fine-tuning: one adapter, many at once, on a mesh, resumed, and in diffusers."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import extract
from jaxsynth.adapters.registry import attach
from jaxsynth.core.errors import UserError
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.diffusion.samplers import initial_noise, make_sampler
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import GenerateConfig, Generator, image_keys
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.tasks import text_to_image
from jaxsynth.tasks.text_to_image import (
    FinetuneConfig,
    encode_examples,
    finetune,
    finetune_each,
)
from jaxsynth.training import loop, sharding, trainer
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import load_pipeline
from tests.models.torch_parity import nchw, relative_error

PROMPTS = ("a photo of the digit one", "a photo of the digit two", "a photo of the digit three")
# A large eps: Adam would divide the smallest gradients, which are rounding, by themselves.
CONFIG = FinetuneConfig(
    steps=6,
    batch_size=8,
    learning_rate=1e-2,
    warmup_steps=0,
    rank=2,
    alpha=3.0,
    eps=0.1,
    unet_targets=("to_q", "to_v", "to_out.0"),
    text_targets=("q_proj", "out_proj"),
)


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def examples(pipeline):
    """Eight images of each of three classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 8)
    coarse = rng.integers(0, 256, (3, 4, 4, 3))[labels] + rng.integers(-20, 20, (24, 4, 4, 3))
    images = np.clip(coarse, 0, 255).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    source = ArraySource(images, labels, [f"{i}" for i in range(24)])
    return encode_examples(pipeline, source, PROMPTS, crops=3, seed=0)


@pytest.fixture(scope="module")
def by_class(examples):
    return [examples.select(np.arange(8 * c, 8 * c + 8)) for c in range(3)]


def losses(folder):
    return np.array([line["loss"] for line in read_metrics(folder / "metrics.jsonl")])


def close(found, expected, tolerance=1e-5):
    """Largest difference over the largest value, of all lora_A and of all lora_B."""
    assert found.arrays.keys() == expected.arrays.keys()
    for factor in ("lora_A", "lora_B"):
        both = [
            np.concatenate([np.ravel(v) for k, v in sorted(s.arrays.items()) if k.endswith(factor)])
            for s in (found, expected)
        ]
        assert relative_error(*both) < tolerance, factor


def same(found, expected):
    assert set(found.config.targets) == set(expected.config.targets)
    assert dataclasses.replace(found.config, targets=expected.config.targets) == expected.config
    assert found.arrays.keys() == expected.arrays.keys()
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)


def test_square_images_have_one_crop_and_others_several(pipeline):
    rng = np.random.default_rng(0)
    wide = ArraySource(
        rng.integers(0, 256, (3, 8, 20, 3), dtype=np.uint8), np.zeros(3, np.int32), list("abc")
    )
    found = encode_examples(pipeline, wide, PROMPTS, crops=4, seed=0, batch_size=2)
    assert found.mean.shape == found.std.shape == (3, 4, 4, 4, 4)
    assert len(np.unique(found.mean.reshape(12, -1), axis=0)) > 6
    again = encode_examples(pipeline, wide, PROMPTS, crops=4, seed=0, batch_size=3)
    np.testing.assert_allclose(found.mean, again.mean, atol=1e-5)
    square = ArraySource(wide.images[:, :, :8], wide.labels, wide.ids)
    assert encode_examples(pipeline, square, PROMPTS, crops=4, seed=0).mean.shape[1] == 1


def test_latents_are_the_scaled_posterior_of_the_right_image(pipeline, examples):
    assert examples.mean.shape == (24, 1, 4, 4, 4)
    image = np.linspace(-1, 1, 8 * 8 * 3, dtype=np.float32).reshape(1, 8, 8, 3)
    mean, std = encode_images(pipeline.vae, image)
    posterior = pipeline.vae.encode(image)
    np.testing.assert_allclose(mean, posterior.mean * 0.5, atol=1e-5)
    np.testing.assert_allclose(std, np.exp(posterior.logvar / 2) * 0.5, atol=1e-5)
    np.testing.assert_array_equal(examples.ids[8], pipeline.tokenizer([PROMPTS[1]])[0])


def test_an_epoch_shows_every_image_once_in_a_fresh_order():
    rows = [np.asarray(epoch_rows(jax.random.key(0), s, 6, 4)) for s in range(4)]
    epochs = [np.concatenate(rows[i : i + 2]) for i in (0, 2)]
    for epoch in epochs:
        assert sorted(set(epoch)) == list(range(6))
        np.testing.assert_array_equal(epoch[6:], epoch[:2])
    assert not np.array_equal(*epochs)
    small = [np.asarray(epoch_rows(jax.random.key(0), s, 3, 8)) for s in range(2)]
    assert all(np.bincount(x).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3]) for x in small)


@pytest.mark.heavy
def test_only_the_adapter_changes_and_the_loss_falls(pipeline, examples, tmp_path):
    before = jax.tree.map(np.asarray, nnx.state((pipeline.unet, pipeline.text_encoder)))
    one = examples.select(np.zeros(8, int))
    targets = ("to_v", "to_out.0", "conv_in", "conv_out")
    config = dataclasses.replace(CONFIG, steps=200, rank=4, eps=1e-8, unet_targets=targets)
    config = dataclasses.replace(config, log_every=25)
    state = finetune(pipeline, one, config, tmp_path, seed=0)
    found = losses(tmp_path)
    assert len(found) == 8 and found[-1] < 0.75 * found[0], found
    after = nnx.state((pipeline.unet, pipeline.text_encoder))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    components = {name.split(".")[0] for name in state.arrays}
    assert components == {"unet", "text_encoder"}
    assert all(np.abs(v).max() > 0 for k, v in state.arrays.items() if k.endswith("lora_B"))


@pytest.fixture(scope="module")
def together(pipeline, by_class, tmp_path_factory):
    """All three classes' adapters at once."""
    folder = tmp_path_factory.mktemp("together")
    return finetune_each(pipeline, by_class, CONFIG, folder, seed=5), folder


@pytest.mark.heavy
def test_adapters_trained_together_equal_those_trained_apart(
    pipeline, by_class, together, tmp_path
):
    states, folder = together
    line = read_metrics(folder / "metrics.jsonl")[-1]
    for index, state in enumerate(states):
        apart = tmp_path / str(index)
        alone = finetune(pipeline, by_class[index], CONFIG, apart, seed=5, index=index)
        close(state, alone)
        assert line["loss"][index] == pytest.approx(losses(apart)[-1], rel=1e-5)
    (last,) = finetune_each(pipeline, by_class[2:], CONFIG, tmp_path / "last", seed=5, first=2)
    close(last, states[2])
    assert relative_error(*(s.arrays[max(s.arrays)] for s in states[:2])) > 0.1


@pytest.fixture
def sharded_smalls(monkeypatch):
    """Weights this small would otherwise stay whole on every device."""
    monkeypatch.setattr(sharding.shardings_for, "__kwdefaults__", {"min_size": 16})


@pytest.mark.heavy
def test_devices_train_what_one_does(pipeline, by_class, together, tmp_path, sharded_smalls):
    mesh = make_mesh(data=2, fsdp=4)
    many = finetune(pipeline, by_class[0], CONFIG, tmp_path, seed=5, mesh=mesh)
    line = read_metrics(together[1] / "metrics.jsonl")[-1]
    assert losses(tmp_path)[-1] == pytest.approx(line["loss"][0], rel=1e-5)
    close(many, together[0][0])


@pytest.mark.heavy
def test_devices_train_many_adapters(pipeline, by_class, together, tmp_path, sharded_smalls):
    """Three adapters on eight devices: the stack is filled up."""
    found = finetune_each(
        pipeline, by_class, CONFIG, tmp_path, seed=5, mesh=make_mesh(data=4, fsdp=2)
    )
    assert len(found) == 3
    for state, expected in zip(found, together[0], strict=True):
        close(state, expected)


def test_a_batch_that_does_not_divide_is_refused(pipeline, examples, tmp_path):
    config = dataclasses.replace(CONFIG, batch_size=6)
    with pytest.raises(UserError, match=r"batch_size: 6 .* = 8 devices.* is: 8"):
        finetune(pipeline, examples, config, tmp_path, seed=0, mesh=make_mesh())


class Killed(Exception):
    pass


@pytest.mark.heavy
@pytest.mark.parametrize("each", [False, True])
def test_a_resumed_training_is_bit_identical(pipeline, by_class, tmp_path, monkeypatch, each):
    config = dataclasses.replace(CONFIG, checkpoint_every=2)

    def train(name):
        if each:
            return finetune_each(pipeline, by_class, config, tmp_path / name, seed=1)
        return [finetune(pipeline, by_class[0], config, tmp_path / name, seed=1)]

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
        same(found, expected)
    # Once finished, the same call gives the same adapter without a step.
    for found, expected in zip(train("cut"), whole, strict=True):
        same(found, expected)


@pytest.mark.heavy
def test_without_text_targets_the_text_states_are_cached(pipeline, examples, tmp_path):
    """The cached states give what encoding them in every step does."""
    config = dataclasses.replace(CONFIG, text_targets=(), steps=3)
    cached = finetune(pipeline, examples, config, tmp_path / "cached", seed=0)
    assert all(name.startswith("unet.") for name in cached.arrays)
    texts = text_to_image._texts
    text_to_image._texts = lambda *args, cache: texts(*args, cache=False)
    try:
        plain = finetune(pipeline, examples, config, tmp_path / "plain", seed=0)
    finally:
        text_to_image._texts = texts
    # Both round differently, and Adam divides by the gradient.
    close(cached, plain, 5e-5)


def test_sets_of_different_sizes_are_refused(pipeline, examples, tmp_path):
    sets = [examples.select(np.arange(2)), examples.select(np.arange(3))]
    with pytest.raises(ValueError, match=r"sets of \[2, 3\] images"):
        finetune_each(pipeline, sets, CONFIG, tmp_path, seed=0)


@pytest.fixture(scope="module")
def strong(pipeline):
    """An adapter with a visible effect."""
    plain = extract(text_to_image.adapted(pipeline, CONFIG, jax.random.key(0)))
    arrays = {
        name: 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(9), i), value.shape)
        for i, (name, value) in enumerate(plain.arrays.items())
    }
    return dataclasses.replace(plain, arrays=arrays)


@pytest.fixture(scope="module")
def peer(base_folder, strong, tmp_path_factory):
    """diffusers' pipeline with the adapter, as written to a file, loaded."""
    folder = tmp_path_factory.mktemp("adapter")
    adapter_io.save(strong, folder)
    same(adapter_io.load(folder / "pytorch_lora_weights.safetensors"), strong)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder)
    return pipe


@pytest.mark.heavy
def test_diffusers_computes_the_same_with_the_adapter(pipeline, strong, peer):
    model = TextToImage(pipeline.unet, pipeline.text_encoder)
    ids = pipeline.tokenizer(list(PROMPTS[:2]))
    latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    times = jnp.array([3, 700])

    @jax.jit
    def run(model):
        text = model.text_encoder(ids).last_hidden_state
        return text, model.unet(latents, times, text)

    adapted = attach(model, strong)
    same(extract(adapted), strong)
    text, output = run(adapted)
    with torch.no_grad():
        other = peer.text_encoder(torch.tensor(np.array(ids, np.int64)))[0]
        steps = torch.tensor(np.array(times))
        noise = peer.unet(nchw(latents), steps, other).sample.permute(0, 2, 3, 1)
    assert relative_error(text, other.numpy()) < 1e-4
    assert relative_error(output, noise.numpy()) < 1e-4
    plain, plain_output = run(model)
    assert relative_error(plain, text) > 1e-2 and relative_error(plain_output, output) > 1e-2


def test_diffusers_draws_the_same_image_with_the_adapter(pipeline, strong, peer):
    config = GenerateConfig(
        guidance_scale=3.0, num_inference_steps=5, batch_size=2, negative_prompt="two"
    )
    ours = Generator(pipeline, PROMPTS, config, seed=7, adapters=strong)(
        np.array([1, 2]), np.array([0, 4])
    )
    sampler = make_sampler(
        pipeline.scheduler_config, NoiseSchedule.from_config(pipeline.scheduler_config), 5
    )
    noise = initial_noise(image_keys(7, jnp.array([1, 2]), jnp.array([0, 4])), (4, 4, 4), sampler)
    with torch.no_grad():
        theirs = peer(
            [PROMPTS[1], PROMPTS[2]],
            negative_prompt=["two", "two"],
            latents=nchw(noise),
            guidance_scale=3.0,
            num_inference_steps=5,
            height=8,
            width=8,
            output_type="np",
        ).images
    theirs = np.round(255 * theirs).astype(int)
    assert theirs.std() > 20
    assert np.abs(theirs - ours).max() <= 1
    plain = Generator(pipeline, PROMPTS, config, seed=7)(np.array([1, 2]), np.array([0, 4]))
    assert np.abs(theirs - plain).max() > 20


SETTINGS = {
    "adalora": {"target_rank": 1, "warmup": 1, "final": 1},
    "delta_lora": {"ratio": 0.5},
    "oft": {"block_size": 4},
    "boft": {"block_size": 2},
    "ia3": {"targets": ("to_v", "to_out.0"), "feedforward": ("to_out.0",)},
}


@pytest.mark.parametrize("kind", registry.KINDS)
def test_any_kind_is_made_written_and_attached_again(pipeline, tmp_path, kind):
    choice = registry.AdapterChoice(kind, SETTINGS.get(kind, {}))
    targets = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_v",)
    known = registry.KINDS[kind].fields
    sizes = {name: getattr(CONFIG, name) if name in known else None for name in ("rank", "alpha")}
    config = dataclasses.replace(
        CONFIG, adapter=choice, unet_targets=targets, text_targets=(), **sizes
    )
    state = extract(text_to_image.adapted(pipeline, config, jax.random.key(0)))
    adapter_io.save(state, tmp_path)
    (path,) = adapter_io.find(tmp_path, ("a", "b"))
    assert path.name.startswith("pytorch") == (kind in ("lora", "dora", "rslora"))
    found = adapter_io.load(path)
    model = TextToImage(pipeline.unet, pipeline.text_encoder)
    same(extract(attach(model, found)), state)


def test_a_second_training_of_one_shape_compiles_nothing(pipeline, by_class, tmp_path):
    """Rates, lengths, seeds and data are arguments of the program."""
    finetune(pipeline, by_class[0], CONFIG, tmp_path / "first", seed=0)
    built = loop._program.cache_info().misses
    longer = dataclasses.replace(CONFIG, steps=CONFIG.steps + 2, learning_rate=3e-3, warmup_steps=1)
    finetune(pipeline, by_class[1], longer, tmp_path / "second", seed=1)
    assert loop._program.cache_info().misses == built


@pytest.mark.heavy
def test_rates_by_pattern(pipeline, by_class, tmp_path):
    """A factor of 0 leaves a network as it was; a pattern that matches nothing is refused."""
    still = dataclasses.replace(CONFIG, rates=(("text_encoder", 0.0),), weight_decay=0.0)
    state = finetune(pipeline, by_class[0], still, tmp_path / "still", seed=0)
    for name, value in state.arrays.items():
        if name.endswith("lora_B"):
            assert (np.abs(value).max() > 0) == name.startswith("unet"), name
    wrong = dataclasses.replace(CONFIG, rates=(("vae", 0.5),))
    with pytest.raises(UserError, match="rates: 'vae' matches no parameter"):
        finetune(pipeline, by_class[0], wrong, tmp_path / "wrong", seed=0)


def test_latents_lie_apart_on_the_devices(pipeline, by_class):
    """Each device holds its share of the examples, and no program gathers them."""
    mesh = make_mesh(data=4, fsdp=2)
    (task,) = text_to_image.finetune_tasks(pipeline, by_class[:1], CONFIG, seed=0)
    built = trainer._assemble([task], CONFIG.sized(8), mesh, together=False)
    mean = built.data["mean"]
    assert mean.addressable_shards[0].data.shape[0] == len(mean) // 8
    many = 4096

    def longer(leaf):
        shape = leaf.shape if leaf.ndim < 2 else (many, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    rows = text_to_image.EpochBatches(many, 8)
    memory = jax.jit(rows).lower(0, jax.tree.map(longer, built.data)).compile().memory_analysis()
    share = many * mean[0].size * mean.dtype.itemsize // 8
    assert memory.argument_size_in_bytes > 2 * share > memory.temp_size_in_bytes


def test_images_of_a_training_are_written_on_a_schedule(pipeline, by_class, tmp_path):
    config = dataclasses.replace(CONFIG, sample_every=2)
    seen = []

    def sample(model):
        seen.append(extract(model))
        return np.zeros((2, 8, 8, 3), np.uint8)

    finetune(pipeline, by_class[0], config, tmp_path, seed=0, sample=sample)
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files[0] == "0000002.png" and len(files) == len(seen) == -(-CONFIG.steps // 2)


@pytest.mark.heavy
def test_a_plan_is_the_program_that_runs(pipeline, by_class):
    """The planned memory is what the compiler says of the program with its arrays in place."""
    mesh = make_mesh(data=4, fsdp=2)
    config = CONFIG.sized(8)
    (task,) = text_to_image.finetune_tasks(pipeline, by_class[:1], config, seed=0)
    planned = trainer.plan("dset", task, config, mesh)
    built = trainer._assemble([task], config, mesh, together=False)
    leaves, structure = jax.tree.flatten(built.state)
    frozen, frozen_structure = jax.tree.flatten(built.frozen)
    program = loop._program(built.step, structure, frozen_structure, loop._pinned(leaves))
    memory = program.lower(leaves, frozen, built.data).compile().memory_analysis()
    assert planned.temporaries == memory.temp_size_in_bytes
    assert planned.arguments == memory.argument_size_in_bytes
    many = trainer.plan("cls", task, config, mesh, count=3)
    assert many.arguments > planned.arguments


@pytest.mark.slow
@pytest.mark.parametrize("kind", registry.KINDS)
def test_any_kind_trains_on_a_mesh_as_on_one_device(pipeline, by_class, tmp_path, kind):
    """With what it brings frozen (VeRA's projections, PiSSA's start) on every device."""
    choice = registry.AdapterChoice(kind, SETTINGS.get(kind, {}))
    known = registry.KINDS[kind].fields
    sizes = {name: getattr(CONFIG, name) if name in known else None for name in ("rank", "alpha")}
    targets = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_v",)
    config = dataclasses.replace(
        CONFIG, adapter=choice, unet_targets=targets, text_targets=(), dropout=None, steps=4,
        warmup_steps=0, **sizes,
    )  # fmt: skip
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    one, many = (
        finetune(pipeline, by_class[0], config, tmp_path / name, seed=5, mesh=place)
        for name, place in (("one", None), ("many", mesh))
    )
    assert losses(tmp_path / "many")[-1] == pytest.approx(losses(tmp_path / "one")[-1], rel=1e-5)
    assert one.arrays.keys() == many.arrays.keys()
    for name, value in one.arrays.items():
        assert np.abs(many.arrays[name] - value).max() <= 1e-4 * max(np.abs(value).max(), 1), name
