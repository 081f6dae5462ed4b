"""Figures from answers alone, of models of which it is known what they go by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxsynth.data.cues import hue_of
from jaxsynth.data.rendered import SHAPES
from jaxsynth.data.sources import ArraySource, DataConfig, load_dataset
from jaxsynth.robustness import bias_sets, suite
from jaxsynth.robustness.bootstrap import evaluate
from jaxsynth.robustness.calibration import expected_calibration_error
from jaxsynth.robustness.detection import detection
from jaxsynth.robustness.ood import max_softmax, negative_entropy

SIZE, CLASSES = 16, len(SHAPES)
EPS = 0.3


def by_hue(hues, images):
    """Logits of the class whose hue the pixels add up to: a classifier of textures, or of the
    background where the shape is grey."""
    total = images.sum((1, 2))
    return (total - total.mean(1, keepdims=True)) @ hues.T / 100


def blind(hues, images):
    """The same of every image."""
    return jnp.zeros((len(images), CLASSES)).at[:, 3].set(1.0) + 0 * images.sum((1, 2, 3))[:, None]


@pytest.fixture(scope="module")
def sets():
    background = bias_sets.drawn_backgrounds(3, SIZE, 0)
    textures = load_dataset(
        DataConfig(source="builtin", name="textures", images_per_class=5, image_size=SIZE)
    )
    return suite.Sets(
        clean=background.original,
        shifted={"rand": background.mixed_rand},
        ood={"textures": textures.train},
        context=bias_sets.drawn_contexts(1, SIZE, 0),
        conflict=bias_sets.drawn_conflicts(1, SIZE, 0),
        background=background,
    )


@pytest.fixture(scope="module")
def hues():
    found = np.stack([hue_of(i, CLASSES) for i in range(CLASSES)]) / 255
    found = found - found.mean(1, keepdims=True)
    return jnp.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def answers(sets, hues):
    key = jax.random.key(0)
    return {
        "hue": suite.answer(Partial(by_hue, hues), sets, key, eps=EPS),
        "blind": suite.answer(Partial(blind, hues), sets, key, attacks={}),
    }


def some(answers, *parts):
    """The answers to some of the sets."""
    return {name: x for name, x in answers.items() if name.split("/")[0] in parts}


def test_a_table_needs_the_answers_only(answers, sets, key, tmp_path):
    suite.save_answers(tmp_path / "hue.npz", answers["hue"])
    stored = suite.load_answers(tmp_path / "hue.npz")
    found = suite.measure(stored, key, resamples=100)
    assert list(found) == [
        "accuracy", "ECE", "accuracy rand", "ECE rand", "AUROC textures", "FPR95 textures",
        "R_adv FGSM", "R_adv PGD", "CB_1", "CB_2", "CB_3", "shape bias", "IN-9", "BG-Gap",
    ]  # fmt: skip
    values = {name: interval.value for name, interval in found.items()}
    # It goes by colour alone, which is the class's in the clean set and another's in the mixed one.
    assert values["accuracy"] == values["IN-9"] == values["BG-Gap"] == 1
    assert values["accuracy rand"] == values["shape bias"] == 0
    cb = [values[f"CB_{k}"] for k in (1, 2, 3)]
    np.testing.assert_allclose(cb, [2 / 3, 1 / 3, 0], atol=1e-6)
    logits, labels = stored["clean/logits"], stored["clean/labels"]
    assert values["ECE"] == pytest.approx(expected_calibration_error(logits, labels), abs=1e-6)
    expected = detection(max_softmax(logits), max_softmax(stored["ood/textures/logits"]))
    assert values["AUROC textures"] == pytest.approx(expected["auroc"], abs=1e-6)
    assert values["FPR95 textures"] == pytest.approx(expected["fpr95_id"], abs=1e-6)
    assert values["R_adv PGD"] <= values["R_adv FGSM"] < 1
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())


def test_paper_mode_follows_the_published_code(answers):
    found = suite.figures(answers["hue"], "paper")
    logits, labels = (answers["hue"][f"clean/{name}"] for name in ("logits", "labels"))

    def value(name):
        return evaluate(found[name].figure, found[name].count)

    expected = expected_calibration_error(logits, labels, bins=20)
    assert value("ECE") == pytest.approx(expected, abs=1e-6)
    other = negative_entropy(answers["hue"]["ood/textures/logits"])
    entropy = detection(negative_entropy(logits), other)
    assert value("AUROC textures") == pytest.approx(entropy["auroc"], abs=1e-6)
    assert value("FPR95 textures") == pytest.approx(entropy["fpr95_nearest"], abs=1e-6)
    assert suite.gradient_attacks("paper")["PGD"].keywords == {"steps": 20, "step_size": 2 / 225}
    with pytest.raises(ValueError, match="mode: expected 'corrected' or 'paper', found 'exact'"):
        suite.figures(answers["hue"], "exact")


def test_models_compare_on_the_same_images(answers, key):
    one, other = (some(answers[name], "clean", "background") for name in ("hue", "blind"))
    found = suite.compare(one, other, key, resamples=200)
    assert found["accuracy"].value == pytest.approx(1 - 1 / CLASSES)
    assert found["BG-Gap"].value == 1
    same = suite.compare(one, one, key, resamples=100)
    assert all(x.low == x.value == x.high == 0 for x in same.values())
    moved = {**other, "clean/labels": other["clean/labels"][::-1]}
    with pytest.raises(ValueError, match="clean/labels: differs between the models"):
        suite.compare(one, moved, key)
    with pytest.raises(ValueError, match=r"background/mixed_rand/correct: not answered by both"):
        suite.compare(one, some(other, "clean"), key)


def test_a_share_of_nothing_is_none(answers, key):
    wrong = some(answers["blind"], "clean")
    wrong["clean/labels"] = np.zeros_like(wrong["clean/labels"])
    wrong["attack/FGSM/correct"] = np.zeros(len(wrong["clean/labels"]), bool)
    found = suite.measure(wrong, key, resamples=100)
    assert found["R_adv FGSM"] is None and found["accuracy"].value == 0


def test_nan_logits_are_named(sets):
    source = sets.clean
    broken = ArraySource(source.images[:4], source.labels[:4], source.ids[:4])

    def predict(images):
        return jnp.zeros((len(images), CLASSES)).at[2].set(jnp.nan)

    with pytest.raises(ValueError, match=rf"predict: NaN .* for image {source.ids[2]}"):
        suite.answer(predict, suite.Sets(clean=broken), jax.random.key(0))
