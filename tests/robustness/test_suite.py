"""Figures from answers alone, of models of which it is known what they go by."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxsynth.data.dataset import DataConfig, Record
from jaxsynth.data.decode import square
from jaxsynth.data.load import load_dataset
from jaxsynth.data.procedural.cues import hue_of
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.views import Subset
from jaxsynth.robustness import bias_sets, suite
from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.bootstrap import evaluate
from jaxsynth.robustness.metrics.calibration import expected_calibration_error
from jaxsynth.robustness.metrics.detection import detection
from jaxsynth.robustness.metrics.ood import max_softmax, negative_entropy

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


@pytest.mark.heavy
def test_a_table_needs_the_answers_only(answers, sets, key, tmp_path):
    suite.save_answers(tmp_path / "hue.npz", answers["hue"])
    stored = suite.load_answers(tmp_path / "hue.npz")
    found = table.measure(stored, key, resamples=100)
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
    found = table.figures(answers["hue"], "paper")
    logits, labels = (answers["hue"][f"clean/{name}"] for name in ("logits", "labels"))

    def value(name):
        return evaluate(found[name].figure, found[name].count)

    expected = expected_calibration_error(logits, labels, bins=20)
    assert value("ECE") == pytest.approx(expected, abs=1e-6)
    other = negative_entropy(answers["hue"]["ood/textures/logits"])
    entropy = detection(negative_entropy(logits), other)
    assert value("AUROC textures") == pytest.approx(entropy["auroc"], abs=1e-6)
    assert value("FPR95 textures") == pytest.approx(entropy["fpr95_nearest"], abs=1e-6)
    # The attack was made with both steps.
    published = suite.gradient_attacks()["PGD as published"]
    assert published.keywords == {"steps": 20, "step_size": 2 / 225}
    clean = logits.argmax(1) == labels
    for mode, name in (("paper", "PGD as published"), ("corrected", "PGD")):
        under = answers["hue"][f"attack/{name}/correct"]
        found = table.figures(answers["hue"], mode)
        assert value("R_adv PGD") == pytest.approx((under & clean).sum() / clean.sum())
        assert "R_adv PGD as published" not in found
    with pytest.raises(ValueError, match="mode: expected 'corrected' or 'paper', found 'exact'"):
        table.figures(answers["hue"], "exact")


def test_models_compare_on_the_same_images(answers, key):
    one, other = (some(answers[name], "clean", "background") for name in ("hue", "blind"))
    found = table.compare(one, other, key, resamples=200)
    assert found["accuracy"].value == pytest.approx(1 - 1 / CLASSES)
    assert found["BG-Gap"].value == 1
    same = table.compare(one, one, key, resamples=100)
    # The same model again: no difference, and how large one could be is told by the images.
    assert all(x.low < x.value == 0 < x.high for x in same.values())
    told = {"signs": np.array(["stochastic: a", "few classes: b"]), "example/PGD": np.zeros(3)}
    assert table.compare({**one, **told}, other, key, resamples=100).keys() == found.keys()
    moved = {**other, "clean/labels": other["clean/labels"][::-1]}
    with pytest.raises(ValueError, match="clean/labels: differs between the models"):
        table.compare(one, moved, key)
    with pytest.raises(ValueError, match=r"background/mixed_rand/correct: not answered by both"):
        table.compare(one, some(other, "clean"), key)


def test_a_share_of_nothing_is_none(answers, key):
    wrong = some(answers["blind"], "clean")
    wrong["clean/labels"] = np.zeros_like(wrong["clean/labels"])
    wrong["attack/FGSM/correct"] = np.zeros(len(wrong["clean/labels"]), bool)
    found = table.measure(wrong, key, resamples=100)
    assert found["R_adv FGSM"] is None and found["accuracy"].value == 0


def test_nan_logits_are_named(sets):
    source = sets.clean
    broken = ArraySource(source.images[:4], source.labels[:4], source.ids[:4])

    def predict(images):
        return jnp.zeros((len(images), CLASSES)).at[2].set(jnp.nan)

    with pytest.raises(ValueError, match=rf"predict: NaN .* for image {source.ids[2]} of clean"):
        suite.answer(predict, suite.Sets(clean=broken), jax.random.key(0))


def test_labels_of_other_classes_are_named(sets, hues, key):
    source = sets.clean
    other = ArraySource(source.images[:4], np.array([0, 1, 9, 2]), source.ids[:4])
    predict = Partial(by_hue, hues)
    with pytest.raises(ValueError, match="labels of clean: 1 of 4 outside 0 to 7, the first is 9"):
        suite.answer(predict, suite.Sets(clean=other), key, attacks={})
    with pytest.raises(ValueError, match="labels of R: 1 of 4 outside 0 to 7"):
        suite.answer(predict, suite.Sets(clean=source, shifted={"R": other}), key, attacks={})
    with pytest.raises(ValueError, match="subsets: 'A' is none of the shifted sets"):
        suite.Sets(clean=source, subsets={"A": [0, 1]})


def test_a_missing_partition_or_a_map_of_other_classes_is_named(sets, hues, key):
    predict = Partial(by_hue, hues)

    def ask(**changes):
        return suite.answer(predict, suite.Sets(clean=sets.clean, **changes), key, attacks={})

    moved = np.ones_like(sets.context.uncommon)
    with pytest.raises(ValueError, match="context: no image in P0"):
        ask(context=replace(sets.context, uncommon=moved))
    groups = {name: (i,) for i, name in enumerate(SHAPES)}
    maps = {**groups, "circle": (8,)}
    with pytest.raises(ValueError, match="class map, 'circle': 8 is outside 0 to 7"):
        ask(conflict=sets.conflict, class_maps={"conflict": maps})
    del groups["star"]
    with pytest.raises(ValueError, match=r"class map: missing \['star'\], unexpected \[\]"):
        ask(background=sets.background, class_maps={"background": groups})


def test_a_set_of_some_classes_is_asked_among_these(sets, hues, key):
    """Of the mixed backgrounds' images those of two shapes: by hue never right among all classes,
    but sometimes of the two, and the confidence is that of two classes."""
    few = np.flatnonzero(np.isin(sets.shifted["rand"].labels, (2, 5)))
    part = Subset(sets.shifted["rand"], few)
    predict = Partial(by_hue, hues)
    asked = suite.Sets(clean=sets.clean, shifted={"R": part}, subsets={"R": [2, 5]})
    found = suite.answer(predict, asked, key, attacks={})
    logits = found["shifted/R/logits"]
    assert logits.shape == (len(few), CLASSES)
    chosen = np.array([2, 5])[logits[:, [2, 5]].argmax(1)]
    values = {
        name: evaluate(x.figure, x.count) for name, x in table.figures(found, "paper").items()
    }
    assert values["accuracy R"] == pytest.approx((chosen == part.labels).mean())
    expected = expected_calibration_error(
        logits[:, [2, 5]], np.searchsorted([2, 5], part.labels), bins=20
    )
    assert values["ECE R"] == pytest.approx(expected, abs=1e-6)


def test_images_of_any_size_are_made_the_models(hues, key):
    """Each set is read at the model's size; what is not of one size, or range, is named."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 18, 3)).astype(np.uint8) for i in range(3)]

    class Photos:
        labels, ids = np.arange(3), ("a", "b", "c")

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Record(images[index], int(self.labels[index]), self.ids[index])

    predict, photos = Partial(by_hue, hues), suite.Sets(clean=Photos())
    found = suite.answer(predict, photos, key, preprocess=lambda x: square(x, SIZE), attacks={})
    pixels = np.stack([square(x, SIZE) for x in images]).astype(np.float32) / 255
    np.testing.assert_allclose(found["clean/logits"], by_hue(hues, pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"b: 18x21 pixels, a has 18x20; a model takes images of"):
        suite.answer(predict, photos, key, attacks={})
    with pytest.raises(ValueError, match=r"preprocess: a: made float32 values from .* to 25\d"):
        suite.answer(predict, photos, key, preprocess=lambda x: x.astype(np.float32), attacks={})


def test_attacks_do_not_depend_on_how_images_are_cut(answers, sets, hues):
    """Of batches of one image, 16 are in memory at once: the 24 are attacked in two parts."""
    one = suite.answer(
        Partial(by_hue, hues), suite.Sets(clean=sets.clean), jax.random.key(0), eps=EPS,
        batch_size=1, with_autoattack=True,
    )  # fmt: skip
    for name in suite.gradient_attacks():
        expected = answers["hue"][f"attack/{name}/correct"]
        np.testing.assert_array_equal(one[f"attack/{name}/correct"], expected)
    # The worst case over attacks of which each is stronger than PGD.
    assert not (one["attack/AutoAttack/correct"] & ~one["attack/PGD/correct"]).any()


def test_partitions_of_few_images_print_their_intervals(key):
    """FOCUS's P3 has 21 images: 15 right of them says little, and the figure says so."""
    partition = np.repeat([0, 1, 3], [600, 300, 21])
    right = np.ones(len(partition), bool)
    right[:60] = right[600:660] = right[-6:] = False
    answers = {
        "clean/logits": np.eye(2, dtype=np.float32), "clean/labels": np.arange(2),
        "context/correct": right, "context/partition": partition,
    }  # fmt: skip
    found = table.measure(answers, key, resamples=500)
    assert found["CB_3"].value == pytest.approx(15 / 21 / 0.9)
    assert found["CB_3"].text().startswith("79.4 [") and "CB_2" not in found
    widths = {k: found[k].high - found[k].low for k in ("CB_1", "CB_3")}
    assert widths["CB_3"] > 0.3 > 0.2 > widths["CB_1"] > 0
    assert table.counts(answers) == {
        "clean": 2, "context P0": 600, "context P1": 300, "context P3": 21
    }  # fmt: skip
