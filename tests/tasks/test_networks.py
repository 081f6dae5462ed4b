"""Networks of studies: batch norm as torch's, starts from checkpoints, refusals by field."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.errors import UserError
from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.tasks.contrastive import backbone_start
from jaxsynth.tasks.networks import (
    NetworkConfig,
    in_training,
    logits_of,
    settled,
    started,
    statistics_of,
    with_statistics,
)
from jaxsynth.tasks.supervised import Pool, SupervisedConfig, View, supervised_tasks, train_tasks
from jaxsynth.weights.networks.classifiers import Classifier, load_classifier, save_classifier
from jaxsynth.weights.preprocessing import Preprocessing

VIT = NetworkConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2)
RESNET = NetworkConfig(family="resnet", image_size=32, width=4, depths=(1, 1))
PIXELS = np.random.default_rng(0).normal(0, 1, (6, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def resnet() -> nnx.Module:
    return RESNET.make(3, jax.random.key(0))


@pytest.fixture(scope="module")
def folder(resnet, tmp_path_factory):
    """The network as transformers and `backbone` read it."""
    found = tmp_path_factory.mktemp("resnet")
    save_classifier(Classifier(resnet, preprocessing(RESNET)), found)
    return found


def preprocessing(network: NetworkConfig) -> Preprocessing:
    side = network.image_size
    return Preprocessing(side, side, False, "bicubic", network.mean, network.std, "floor")


def test_batch_norm_trains_and_settles_as_torchs(resnet, folder):
    from transformers import ResNetForImageClassification

    peer = ResNetForImageClassification.from_pretrained(folder).train()
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the batch's own statistics are stored
    given = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = peer(given).logits.numpy()

    def forward(state):
        model = nnx.merge(graphdef, state)
        return model(jnp.asarray(PIXELS))

    graphdef, state = nnx.split(in_training(resnet))
    np.testing.assert_allclose(jax.jit(forward)(state), wanted, atol=2e-5)
    # Of one batch the statistics are its own: used afterwards, it gives what training gave. torch
    # divides the variance that it stores by n - 1.
    after = settled(in_training(resnet), [jnp.asarray(PIXELS)])
    np.testing.assert_allclose(jax.jit(lambda m: m(jnp.asarray(PIXELS)))(after), wanted, atol=2e-5)
    theirs = dict(peer.named_buffers())
    mean = "resnet.embedder.embedder.normalization.running_mean"
    np.testing.assert_allclose(statistics_of(after)[mean], theirs[mean].numpy(), atol=1e-6)
    variance = mean.replace("mean", "var")
    count = 6 * 16 * 16
    np.testing.assert_allclose(
        statistics_of(after)[variance], theirs[variance].numpy() * (count - 1) / count, rtol=1e-4
    )


def test_statistics_of_several_batches_are_those_of_all_their_images(resnet):
    halves = [jnp.asarray(PIXELS[:3]), jnp.asarray(PIXELS[3:])]
    both = statistics_of(settled(in_training(resnet), halves))
    whole = statistics_of(settled(in_training(resnet), [jnp.asarray(PIXELS)]))
    # The first norm, whose inputs do not depend on how the batch is cut.
    for name in ("running_mean", "running_var"):
        key = f"resnet.embedder.embedder.normalization.{name}"
        np.testing.assert_allclose(both[key], whole[key], rtol=1e-4, atol=1e-6)
    back = with_statistics(resnet, both)
    assert all(map(np.array_equal, statistics_of(back).values(), both.values()))


@pytest.mark.heavy
def test_a_residual_network_trains_in_a_stack_and_is_used_settled(tmp_path):
    labels = np.arange(16) % 2
    images = np.random.default_rng(0).integers(0, 60, (16, 32, 32, 3))
    pool = Pool((images + 150 * labels[:, None, None, None]).astype(np.uint8), labels)
    config = SupervisedConfig(
        steps=12, batch_size=8, learning_rate=1e-2, augment=RECIPES["none"], log_every=6
    )
    view = View(np.arange(16), np.ones(16))
    tasks = supervised_tasks(pool, [view] * 2, RESNET, config, seeds=(0, 1), num_classes=2)
    models = train_tasks(tasks, config, tmp_path).models
    for model in models.values():
        assert (logits_of(model, RESNET, pool.images).argmax(-1) == labels).all()
    first, second = map(statistics_of, models.values())
    assert first and any(not np.allclose(first[name], second[name]) for name in first)


@pytest.mark.parametrize("network", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_network_begins_with_a_checkpoint_but_for_its_head(network, tmp_path):
    theirs = network.make(5, jax.random.key(1))
    save_classifier(Classifier(theirs, preprocessing(network)), tmp_path)
    loaded = load_classifier(tmp_path)
    start = mark_trainable(network.make(3, jax.random.key(2)))
    found = dict(nnx.to_flat_state(nnx.state(started(start, network, loaded))))
    wanted = dict(nnx.to_flat_state(nnx.state(theirs)))
    own = dict(nnx.to_flat_state(nnx.state(start)))
    assert found.keys() == own.keys()
    for path, leaf in found.items():
        other = own if "classifier" in path else wanted
        np.testing.assert_array_equal(leaf.get_value(), other[path].get_value())
        assert type(leaf) is type(own[path])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (replace(RESNET, depths=(1, 2)), r"depths \(1, 1\), but that of `network` is \(1, 2\)"),
        (replace(RESNET, width=8), "embedding_size 4, but that of `network` is 8"),
        (replace(RESNET, mean=(0.4, 0.5, 0.5)), r"mean \(0.5, 0.5, 0.5\), but network.mean is"),
        (VIT, "is a resnet, but network.family is 'vit'"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_its_field(network, message, folder):
    with pytest.raises(UserError, match=message):
        started(network.make(3, jax.random.key(0)), network, load_classifier(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "vgg"}, "family"),
        ({"family": "resnet"}, "depths: \\(\\), expected"),
        ({"family": "resnet", "depths": (1,), "heads": 2}, "heads: 2, but the family is 'resnet'"),
        ({"depths": (1,)}, "depths: \\(1,\\), but the family is 'vit'"),
        ({"image_size": 30}, "patch_size 8 does not divide"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**fields)
    with pytest.raises(ValueError, match="family: 'resnet', but clones compare tokens"):
        backbone_start(RESNET, 0)


@pytest.mark.parametrize("network", [VIT, RESNET], ids=["vit", "resnet"])
def test_bfloat16_stays_near_float32(network):
    images = np.random.default_rng(0).integers(0, 256, (4, *[network.image_size] * 2, 3))
    images = images.astype(np.uint8)
    model, low = (
        replace(network, dtype=dtype).make(3, jax.random.key(0))
        for dtype in ("float32", "bfloat16")
    )
    wanted = logits_of(model, network, images)
    found = logits_of(low, replace(network, dtype="bfloat16"), images)
    assert np.abs(found - wanted).max() < 0.05 * max(np.abs(wanted).max(), 1)
