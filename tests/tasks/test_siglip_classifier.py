"""A SigLIP in CLIP's place as the classifier: the same training, on its own towers."""

import dataclasses

import numpy as np
import pytest

from jaxsynth.adapters.inject import trainable_variables
from jaxsynth.models.siglip import SiglipModel
from jaxsynth.tasks.clip_classifier import ClassifyConfig, classifier_task
from jaxsynth.tasks.clip_predictions import predict, scores
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import describe_clip, load_clip
from tests.tasks.test_clip_classifier import CONFIG, PROMPTS, factors, source, trained
from tests.weights.test_siglip import write_siglip

LORA = dataclasses.replace(CONFIG, targets=ClassifyConfig().targets, dropout=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    # Long enough for the words in which the prompts differ.
    write_siglip(folder, 32)
    return folder


def learning(folder, **changes) -> list[str]:
    """What learns, of a plan's shapes."""
    clip, config = describe_clip(folder), dataclasses.replace(LORA, steps=2, **changes)
    return sorted(
        trainable_variables(classifier_task(clip, PROMPTS, config, seed=0, both=True).model)
    )


def test_adapters_norms_and_heads_are_put_on_its_towers(folder):
    places = {path.partition(".lora_")[0] for path in learning(folder)}
    assert places == {
        f"{tower}_model.encoder.layers.{i}.self_attn.{name}_proj"
        for tower in ("text", "vision") for i in range(2) for name in "qv"
    }  # fmt: skip
    norms = learning(folder, learns="norms", rank=None, targets=LORA.targets, dropout=None)
    assert "vision_model.head.layernorm.scale" in norms and len(norms) == 2 * (2 * 2 * 2 + 3)
    assert "visual_head.kernel" in learning(folder, visual_head=True)


@pytest.mark.heavy
def test_it_learns_its_images_on_a_mesh_too(folder, tmp_path):
    clip = load_clip(folder)
    assert isinstance(clip.model, SiglipModel)
    config = dataclasses.replace(LORA, learning_rate=3e-2, epochs=1)
    model = trained(clip, tmp_path / "long", config, steps=40, real=source(0))
    before, after = (
        scores(predict(clip, m, PROMPTS, source(7)), source(7).labels, "abc")["top1"]
        for m in (clip.model, model)
    )
    assert after > max(before, 0.6), (before, after)
    one, many = (
        trained(clip, tmp_path / name, config, steps=1, real=source(0), mesh=mesh)
        for name, mesh in (("one", None), ("many", make_mesh(2, 2, 2)))
    )
    lines = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "many")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)
    # Adam's first step is the sign of the gradient: only values near zero may differ.
    found, expected = factors(many), factors(one)
    off = [np.abs(found[k] - expected[k]) > 1e-5 for k in expected]
    assert sum(x.sum() for x in off) <= 0.01 * sum(x.size for x in off)
