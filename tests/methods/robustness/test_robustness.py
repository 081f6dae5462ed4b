"""The suite as a run: a classifier trained, asked and put on one page."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxsynth.core.config import ConfigError, load_config, to_dataclass
from jaxsynth.core.errors import UserError
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.methods.robustness.config import Config
from jaxsynth.methods.robustness.run import report, run
from jaxsynth.methods.robustness.sets import load_sets
from jaxsynth.models.classifiers.resnet import ResNetConfig, ResNetForImageClassification
from jaxsynth.robustness.metrics.table import PAPER_FAULTS
from jaxsynth.weights.networks.classifiers import Classifier, load_classifier, save_classifier
from jaxsynth.weights.preprocessing import Preprocessing
from tests.methods.robustness.published_sets import every, write_sets

CONFIG = Path(__file__).parents[3] / "configs" / "robustness.py"


def smoke(**changes) -> Config:
    values = load_config(f"{CONFIG}:smoke")
    return to_dataclass(Config, {**values, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    return run(smoke(), tmp_path_factory.mktemp("run")).parent


@pytest.mark.slow
def test_a_run_ends_with_a_page_and_does_nothing_twice(made, capsys):
    page = made / "report.html"
    found = json.loads((made / "figures" / "figures.json").read_text())
    figures = found["models"]["corrected"]["original"]
    assert {"accuracy", "ECE", "AUROC textures", "R_adv PGD", "CB_3", "shape bias", "BG-Gap"} <= (
        figures.keys()
    )
    assert figures["accuracy"]["low"] <= figures["accuracy"]["value"] <= figures["accuracy"]["high"]
    # Both protocols made something of the same answers, and they are not the same.
    paper = found["models"]["paper"]["original"]
    assert paper.keys() < figures.keys() and paper["ECE"] != figures["ECE"]
    text = page.read_text()
    assert figures["BG-Gap"]["text"] in text and "negative entropy" in text
    capsys.readouterr()
    assert run(smoke(), made) == page == report(made)
    assert capsys.readouterr().out.count("unchanged, skipped") == 3


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter and train_on: expected one of them at most"):
        smoke(models={"both": {"adapter": "a", "train_on": "original"}})
    with pytest.raises(ConfigError, match=r"config\.eps=8 .*expected a number, 0 to 1"):
        smoke(eps=8)
    with pytest.raises(ConfigError, match="models: expected at least one"):
        smoke(models={})
    with pytest.raises(ConfigError, match="templates: of a CLIP, but this model is a checkpoint"):
        smoke(models={"mine": {"checkpoint": "a", "templates": "imagenet7"}}, baseline="")
    with pytest.raises(ConfigError, match="head and preprocessing: of a checkpoint"):
        smoke(models={"mine": {"head": "a.pth"}}, baseline="")
    with pytest.raises(ConfigError, match=r"baseline: expected alexnet or one of .*, found 'mine'"):
        smoke(baseline="mine")
    with pytest.raises(
        ConfigError, match=r"models\.original\.train_on: trains on drawn shapes, but"
    ):
        smoke(sets={"clean": {"source": "folder"}})
    with pytest.raises(ConfigError, match="corruptions: names: 'hail': expected all, paper"):
        smoke(corruptions={"names": ("hail",)})
    with pytest.raises(
        ValueError, match="AlexNet's errors are for all of ImageNet-C, missing gaus"
    ):
        run(smoke(models={"clip": {}}, baseline="alexnet"), tmp_path)
    with pytest.raises(UserError, match=r"models\.original: tiny/clip takes 32 pixels, config"):
        run(smoke(image_size=48), tmp_path)


def test_a_checkpoint_is_one_more_model(tmp_path):
    """A residual network on drawn shapes, named by its folder; its classes must be the shapes."""
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=(8,), depths=(1,), layer_type="basic", num_labels=len(SHAPES)
    )
    given = Preprocessing(32, 36, False, "bicubic", (0.5,) * 3, (0.25,) * 3, "round")
    folder = tmp_path / "resnet"
    asked = smoke(models={"mine": {"checkpoint": str(folder)}}, baseline="")

    def save(names) -> ResNetForImageClassification:
        made = dataclasses.replace(config, num_labels=len(names))
        network = ResNetForImageClassification(made, rngs=nnx.Rngs(0))
        save_classifier(Classifier(network, given, names), folder)
        return network

    network = save(SHAPES)
    loaded = load_classifier(folder)
    predict, preprocess = loaded.predict, loaded.preprocessing.host
    sets = load_sets(asked.sets, size=asked.image_size, per_class=asked.per_class, seed=asked.seed)
    image = preprocess(sets.sets.clean[0].image)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    pixels = image[None].astype(np.float32) / 255
    np.testing.assert_allclose(predict(pixels), network((pixels - 0.5) / 0.25), atol=1e-5)
    for names, message in (
        (("a", "b"), r"models.mine: .*resnet tells 2 classes apart \(a, b, \.\.\.\), but the sets"),
        (SHAPES[::-1], "has the sets' classes in another order: class 0 is"),
    ):
        save(names)
        with pytest.raises(UserError, match=message):
            run(asked, tmp_path / "run")


@pytest.mark.slow
def test_published_sets_are_asked_about(made, tmp_path):
    """Of other sizes than the model's, some of its classes, corrupted already; all on one page."""
    root = write_sets(tmp_path / "sets")
    # With the adapter that was trained: what was compiled for it serves again.
    models = {"clip": {"adapter": str(made / "original" / "training" / "adapter")}}
    config = smoke(models=models, sets=every(root), baseline="clip")
    page = run(config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "figures" / "figures.json").read_text())
    figures = found["models"]["corrected"]["clip"]
    assert {
        "accuracy", "accuracy sketch", "AUROC strange", "corrupted contrast", "corrupted fog_3d",
        "corrupted snow", "R_cc", "shape bias", "BG-Gap",
    } <= figures.keys()  # fmt: skip
    # The baseline's own is 1 by definition.
    assert "mCE" not in figures
    assert len(found["by_severity"]["clip"]["snow"]) == 5
    assert found["images"]["clean"] == 16 and found["images"]["ood/strange"] == 2
    assert "sketch" in page.read_text()


@pytest.mark.slow
def test_both_modes_are_beside_each_other(made):
    """On the page: every figure that is not the same in both, and why."""
    found = json.loads((made / "figures" / "figures.json").read_text())
    corrected, paper = (found["models"][mode]["original"] for mode in ("corrected", "paper"))
    text = (made / "report.html").read_text()
    shown = text[text.index("both modes of the same answers") :]
    shown = shown[: shown.index("</table>")]
    for name, figure in corrected.items():
        texts = [x and x["text"] for x in (figure, paper.get(name))]
        assert (f">{name}<" in shown) == (texts[0] != texts[1]), name
    # Of the study's corruptions only fog was asked about, and there is one script's meter.
    expected = paper["corrupted fog_3d"]["value"] / paper["accuracy"]["value"]
    assert paper["R_cc"]["value"] == pytest.approx(expected)
    assert "corrupted contrast" not in paper and ">corrupted contrast<" in shown
    assert all(name in text for name in PAPER_FAULTS)
