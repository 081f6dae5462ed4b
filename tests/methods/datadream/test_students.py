"""Students: any checkpoint, with a head for the run's classes, trained on shots and images."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters.inject import Trainable
from jaxsynth.core.config import to_dataclass
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.datadream.config import Recipe, StudentConfig
from jaxsynth.methods.datadream.stages import SET, Drawing, draw_shots
from jaxsynth.methods.datadream.students import Teaching, _weighted, train_student
from jaxsynth.methods.image_sets import Retrieving, retrieve_images
from jaxsynth.runs.sources import clip_source, data_source
from jaxsynth.runs.stage import Source
from jaxsynth.tasks.networks import CheckpointNetwork, started
from jaxsynth.tasks.supervised import Pool, SupervisedConfig, View, supervised_tasks
from jaxsynth.weights.networks.classifiers import load_classifier
from tests.methods.small_base import write_classifier
from tests.models.torch_parity import randomise
from tests.weights.networks.test_classifiers import (
    CASES,
    VIT,
    peer,
    transformers,
    write_preprocessing,
)


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_every_family_begins_with_its_checkpoint_and_a_new_head(name, tmp_path):
    module, size = peer(name)
    module.save_pretrained(tmp_path)
    write_preprocessing(tmp_path, size)
    loaded = load_classifier(tmp_path)
    network = CheckpointNetwork.of(loaded)
    assert network.image_size == size
    pool = Pool(np.zeros((3, size, size, 3), np.uint8), np.arange(3))
    view, config = View(np.arange(3), np.ones(3, np.float32)), SupervisedConfig(steps=1)
    (task,) = supervised_tasks(
        pool, [view], network, config, seeds=[0], num_classes=3, backbone=loaded
    )
    found = dict(nnx.to_flat_state(nnx.state(task.model)))
    wanted = dict(nnx.to_flat_state(nnx.state(loaded.model)))
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        if "classifier" in str(path[0]):
            assert leaf.get_value().shape[-1] == 3
        else:
            np.testing.assert_array_equal(leaf.get_value(), wanted[path].get_value())
        assert isinstance(leaf, Trainable) == isinstance(wanted[path], nnx.Param)
    logits = jax.eval_shape(lambda model, x: model(x), task.model, np.zeros((2, size, size, 3)))
    assert logits.shape == (2, 3)


def test_a_checkpoint_without_a_head_begins_as_one_with_it(tmp_path):
    """As most of SigLIP's and DINOv2's are published."""
    vision = transformers.SiglipVisionConfig(**VIT, intermediate_size=20)
    randomise(transformers.SiglipVisionModel(vision)).save_pretrained(tmp_path)
    write_preprocessing(tmp_path, 16)
    loaded = load_classifier(tmp_path, headless=True)
    network = CheckpointNetwork.of(loaded)
    model = network.make(3, jax.random.key(0))
    found = dict(nnx.to_flat_state(nnx.state(started(model, network, loaded))))
    wanted = dict(nnx.to_flat_state(nnx.state(loaded.model)))
    new = {("classifier", "kernel"), ("classifier", "bias")}
    assert found.keys() - wanted.keys() == new and not wanted.keys() - found.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path].get_value(), leaf.get_value())
    assert found["classifier", "kernel"].shape == (12, 3)


@pytest.mark.heavy
@pytest.mark.parametrize("streamed", [False, True])
def test_a_student_learns_from_shots_and_images(streamed, base_folder, tmp_path):
    student = write_classifier(tmp_path / "student")
    data = data_source(to_dataclass(DataConfig, {"source": "digits", "class_names": ("0", "1")}))
    clip = clip_source(str(base_folder / "clip"))
    shots = draw_shots(tmp_path / "shots", Drawing(4, 0, 0.0), label="shots", data=data)
    images = retrieve_images(
        tmp_path / "images",
        Retrieving("shots", GenerateConfig(images_per_class=4, batch_size=8), 16),
        label="images", data=data, clip=clip, shots=shots,
    )  # fmt: skip
    train = SupervisedConfig(
        steps=60, batch_size=8, learning_rate=5e-3, streamed=streamed, log_every=20
    )
    made = train_student(
        tmp_path / "made",
        Teaching(train, 0.8, 8, 0, {"rest": 1.0}),
        label="student",
        data=data,
        student=Source(lambda: load_classifier(student), lambda found: found.digest),
        shots=shots,
        **{SET + "rest": images},
    )
    assert np.load(made.path / "logits.npy").shape == (len(data.value.test), 2)
    scores = json.loads((made.path / "scores.json").read_text())
    assert made.counts["top1"] == scores["top1"] > 0.9


def test_shots_and_images_come_as_often_and_count_by_their_weights():
    few, many = (
        ArraySource(np.zeros((n, 4, 4, 3), np.uint8), np.zeros(n, int), list(map(str, range(n))))
        for n in (2, 10)
    )
    source, weights = _weighted(few, many, 0.8)
    assert len(source) == 12 and [len(part) for part in source.sources] == [6, 6]
    np.testing.assert_allclose(weights, [0.8] * 6 + [0.2] * 6)
    source, weights = _weighted(few, None, 0.8)
    assert source is few and (weights == 1).all()


def test_a_students_settings_are_not_clips():
    with pytest.raises(ValueError, match="classify: given, but the student is 'b', whose settings"):
        Recipe(student="b", classify={"learns": "norms"})
    with pytest.raises(ValueError, match="checkpoint: empty, expected a folder, hub id or file"):
        StudentConfig()
