"""Fine-tuning on condition images: by a ControlNet, and by adapters alone."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.adapters.inject import extract, load_state
from jaxsynth.adapters.kinds.affiner import AffinerConfig, affiner
from jaxsynth.adapters.kinds.lora import LoRAConfig, lora
from jaxsynth.data.conditions import make_condition
from jaxsynth.data.procedural.scenes import render_scenes
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.controlled import draw_controlled
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.models.diffusion.controlnet import ControlNet, ControlNetConfig
from jaxsynth.ops.space_to_depth import space_to_depth
from jaxsynth.quality.errors import held_out_error
from jaxsynth.tasks.controlled import (
    ControlBatches,
    ControlConfig,
    Triples,
    control_task,
    encode_triples,
    finetune_controlled,
    merged,
    num_trainable,
    with_adapters,
    with_controlnet,
)
from jaxsynth.training import sharding, trainer
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.metrics import read_metrics
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.models import load_model, save_model
from tests.models.torch_parity import nchw, nhwc, relative_error
from tests.training.programs import memory_of_programs

SIZE = 8
TARGETS = ("to_q", "to_v")
CONFIG = ControlConfig(
    steps=60, batch_size=8, learning_rate=1e-2, steps_per_call=20, checkpoint_every=20
)


@pytest.fixture(scope="module")
def pipeline(deeper_folder):
    return load_pipeline(deeper_folder)


@pytest.fixture(scope="module")
def schedule(pipeline):
    return NoiseSchedule.from_config(pipeline.scheduler_config)


@pytest.fixture(scope="module")
def scenes():
    return render_scenes(16, SIZE, 0, shapes=1)


@pytest.fixture(scope="module")
def masks(scenes):
    return np.stack(
        [
            make_condition("mask", image, partner=mask)
            for image, mask in zip(scenes.images, scenes.masks, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def triples(pipeline, scenes, masks):
    return encode_triples(pipeline, scenes.images, scenes.captions, masks)


def by_controlnet(pipeline):
    return with_controlnet(pipeline.unet, 2, 1, rngs=nnx.Rngs(0))


def by_adapters(pipeline, make=lora(LoRAConfig(rank=2, targets=TARGETS)), targets=TARGETS):
    return with_adapters(pipeline.unet, 2, 1, make, targets, rngs=nnx.Rngs(0))


WAYS = pytest.mark.parametrize("way", [by_controlnet, by_adapters])


@jax.jit
def predict(model, *arguments):
    return model(*arguments)


def arguments(triples, rows=slice(0, 4)):
    text = triples.text[triples.prompt[rows]]
    return triples.mean[rows], np.array([3, 250, 600, 999]), text, triples.condition[rows]


def test_triples_are_what_they_were_made_of(pipeline, scenes, masks, triples):
    assert triples.mean.shape == (16, 4, 4, 4) and triples.condition.shape == (16, 8, 8, 1)
    encode = jax.jit(lambda model, ids: model(ids).last_hidden_state)
    for prompt, states in (
        ("", triples.text[0]),
        (scenes.captions[5], triples.text[triples.prompt[5]]),
    ):
        expected = encode(pipeline.text_encoder, pipeline.tokenizer([prompt]))[0]
        np.testing.assert_allclose(states, expected, atol=1e-5)
    with pytest.raises(ValueError, match="16 images, 15 prompts, 16 conditions"):
        encode_triples(pipeline, scenes.images, scenes.captions[1:], masks)
    with pytest.raises(ValueError, match=r"conditions of \(4, 4\) pixels, expected \(8, 8\)"):
        encode_triples(pipeline, scenes.images, scenes.captions, masks[:, ::2, ::2])


@WAYS
def test_before_training_it_is_the_base(pipeline, triples, way):
    *inputs, condition = arguments(triples)
    expected = predict(pipeline.unet, *inputs)
    assert relative_error(predict(way(pipeline), *inputs, condition), expected) < 1e-5


def test_parameters_are_counted(pipeline):
    net = by_controlnet(pipeline)
    leaves = jax.tree.leaves(nnx.state(net.controlnet))
    assert num_trainable(net) == sum(leaf.size for leaf in leaves)
    alone = with_adapters(pipeline.unet, 2, 1, None, (), rngs=nnx.Rngs(0))
    # 3x3 pixels, 2x2 places of one channel of condition, 8 outputs.
    assert num_trainable(alone) == 3 * 3 * 4 * 8
    low = by_adapters(pipeline)
    assert num_trainable(alone) < num_trainable(low) < num_trainable(net) / 5
    gated = with_adapters(pipeline.unet, 2, 1, None, (), gate=True, rngs=nnx.Rngs(0))
    assert num_trainable(gated) == num_trainable(alone) + 1
    make = affiner(AffinerConfig(rank=2, targets=TARGETS))
    assert num_trainable(by_adapters(pipeline, make)) != num_trainable(low)
    with pytest.raises(ValueError, match="conv_in: already wrapped"):
        by_adapters(pipeline, make, ("conv_in",))


@pytest.fixture(scope="module")
def trained(pipeline, triples, schedule, tmp_path_factory):
    """Both ways after 60 steps, and their folders."""
    found = {}
    for way in (by_controlnet, by_adapters):
        folder = tmp_path_factory.mktemp(way.__name__)
        model = finetune_controlled(way(pipeline), triples, schedule, CONFIG, folder, seed=0)
        found[way] = model, folder
    return found


@pytest.mark.heavy
@WAYS
def test_training_changes_what_is_trainable_and_lowers_the_error(
    pipeline, triples, schedule, trained, way
):
    model, folder = trained[way]
    start = way(pipeline)
    before, after = (dict(nnx.to_flat_state(nnx.state(one))) for one in (start, model))
    assert before.keys() == after.keys()
    for path, variable in after.items():
        learns = path[0] == "controlnet" or path[-1] in ("lora_A", "lora_B") or "side" in path
        assert np.array_equal(variable[...], before[path][...]) != learns, path
    errors = [
        held_out_error(
            one, schedule, triples.mean, triples.inputs, seed=1, repeats=4, batch_size=48
        )
        for one in (start, model)
    ]
    assert errors[1] < 0.9 * errors[0], errors
    assert read_metrics(folder / "metrics.jsonl")[-1]["loss"] > 0


@WAYS
def test_the_condition_is_used(pipeline, triples, trained, way):
    model, _ = trained[way]
    *inputs, condition = arguments(triples)
    told = predict(model, *inputs, condition)
    assert relative_error(predict(model, *inputs, 1 - condition), told) > 0.01


def test_both_ways_see_the_same_batches(pipeline, triples, schedule):
    net, task = (
        control_task(way(pipeline), triples, schedule, CONFIG, seed=3)
        for way in (by_controlnet, by_adapters)
    )
    assert net.batches.next_batch == task.batches.next_batch and net.key == task.key
    assert net.batches.data["order"] == task.batches.data["order"]
    data = jax.tree.map(jax.numpy.asarray, task.batches.data)
    batches = [jax.jit(task.batches.next_batch)(step, data) for step in range(4)]
    means = np.concatenate([batch["mean"] for batch in batches[:2]])
    assert len(np.unique(means.reshape(16, -1), axis=0)) == 16, "an epoch shows each image once"
    empties = prompted = 0
    for batch in batches:
        for mean, text, condition in zip(
            batch["mean"][:, 0], batch["text"], batch["condition"], strict=True
        ):
            (row,) = np.flatnonzero((triples.mean == mean).all((1, 2, 3)))
            np.testing.assert_array_equal(condition, triples.condition[row])
            empty = np.array_equal(text, triples.text[0])
            if not empty:
                np.testing.assert_array_equal(text, triples.text[triples.prompt[row]])
            empties, prompted = empties + empty, prompted + (not empty)
    assert empties > 5 and prompted > 5


def test_which_prompts_are_emptied_does_not_follow_from_the_order():
    count = 8
    rows = jax.numpy.arange(count)
    data = dict.fromkeys(("mean", "std", "condition"), rows)
    # Text 0 is the empty prompt.
    data |= {"text": jax.numpy.arange(count + 1), "prompt": rows + 1, "order": jax.random.key(0)}
    batches = ControlBatches(count, count, 0.5)
    steps = jax.vmap(lambda step: batches(step, data))(jax.numpy.arange(200))
    order, empty = np.asarray(steps["mean"]), np.asarray(steps["text"]) == 0
    assert (np.sort(order) == np.arange(count)).all() and 0.45 < empty.mean() < 0.55
    early = np.argsort(order) < count // 2
    assert 0.45 < (early == empty).mean() < 0.55


class Killed(Exception):
    pass


def test_a_resumed_training_is_bit_identical(
    pipeline, triples, schedule, trained, tmp_path, monkeypatch
):
    def train():
        model = by_adapters(pipeline)
        return finetune_controlled(model, triples, schedule, CONFIG, tmp_path, seed=0)

    save = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            train()
    whole, resumed = extract(trained[by_adapters][0]).arrays, extract(train()).arrays
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


@pytest.mark.slow
@WAYS
def test_devices_train_what_one_does_and_what_was_planned(
    pipeline, triples, schedule, tmp_path, monkeypatch, way
):
    monkeypatch.setattr(sharding.shardings_for, "__kwdefaults__", {"min_size": 16})
    # A large eps: Adam would divide the smallest gradients, which are rounding, by themselves.
    config = dataclasses.replace(CONFIG, steps=1, steps_per_call=1, eps=1e-2)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    measured, train = memory_of_programs(monkeypatch), finetune_controlled
    many = train(way(pipeline), triples, schedule, config, tmp_path / "many", seed=4, mesh=mesh)
    one = train(way(pipeline), triples, schedule, config, tmp_path / "one", seed=4)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "many")]
    for name in ("loss", "grad_norm"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-5)
    start, expected = extract(way(pipeline)).arrays, extract(one).arrays
    change = max(np.abs(value - start[name]).max() for name, value in expected.items())
    for name, value in extract(many).arrays.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4 * change, err_msg=name)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in vars(triples).items()}
    model = nnx.eval_shape(lambda: way(pipeline))
    task = control_task(model, Triples(**shapes), schedule, config, seed=4)
    plan = trainer.plan("control", task, config, mesh)
    assert plan.arguments == measured[0].argument_size_in_bytes
    assert plan.temporaries == measured[0].temp_size_in_bytes


def test_both_ways_go_to_diffusers(pipeline, triples, trained, tmp_path):
    x, t, text, condition = arguments(triples)
    net, _ = trained[by_controlnet]
    save_model(net.controlnet, None, tmp_path / "controlnet")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "controlnet").eval()
    save_model(pipeline.unet, None, tmp_path / "unet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    adapters, _ = trained[by_adapters]
    save_model(merged(adapters), None, tmp_path / "wide")
    wide = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "wide").eval()
    assert wide.config.in_channels == 8
    steps, states = torch.from_numpy(t), torch.from_numpy(text)
    with torch.no_grad():
        found = theirs(nchw(x), steps, states, nchw(condition), return_dict=False)
        expected = unet(
            nchw(x),
            steps,
            states,
            down_block_additional_residuals=found[0],
            mid_block_additional_residual=found[1],
        ).sample
        both = np.concatenate([x, space_to_depth(condition, 2)], axis=-1)
        beside = wide(nchw(both), steps, states).sample
    assert relative_error(predict(net, x, t, text, condition), nhwc(expected)) < 1e-4
    assert relative_error(predict(adapters, x, t, text, condition), nhwc(beside)) < 1e-4
    again = load_model(ControlNet, ControlNetConfig, tmp_path / "controlnet")
    assert again.config == net.controlnet.config
    refilled = load_state(by_adapters(pipeline), extract(adapters))
    np.testing.assert_array_equal(
        predict(refilled, x, t, text, condition), predict(adapters, x, t, text, condition)
    )


@pytest.mark.heavy
def test_drawing_follows_the_condition_and_not_the_batch(pipeline, scenes, masks, trained):
    model, _ = trained[by_adapters]
    config = GenerateConfig(num_inference_steps=3, batch_size=4, guidance_scale=2.0)
    prompts = scenes.captions[:5]
    images = draw_controlled(pipeline, model, prompts, masks[:5], config, seed=0)
    assert images.shape == (5, SIZE, SIZE, 3) and images.dtype == np.uint8
    alone = draw_controlled(pipeline, model, prompts[:2], masks[:2], config, seed=0)
    np.testing.assert_allclose(images[:2].astype(int), alone, atol=1)
    other = draw_controlled(pipeline, model, prompts[:2], 1 - masks[:2], config, seed=0)
    assert np.abs(other.astype(int) - alone).max() > 2
    with pytest.raises(ValueError, match="5 prompts, 4 conditions"):
        draw_controlled(pipeline, model, prompts, masks[:4], config, seed=0)
