"""Corruptions in the suite: answers that no batch and no choice changes, and figures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image

from jaxsynth.data.dataset import SourceError
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.views import Subset
from jaxsynth.robustness import bias_sets, suite
from jaxsynth.robustness.corruptions.predictions import Corruptions, corrupted_batch
from jaxsynth.robustness.corruptions.registry import CORRUPTIONS, CORRUPTIONS_3D, TEST_CORRUPTIONS
from jaxsynth.robustness.metrics import table as figures
from jaxsynth.robustness.metrics.bootstrap import evaluate
from jaxsynth.robustness.metrics.corruption import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    PAPER_CORRUPTIONS,
    PAPER_CORRUPTIONS_3D,
    by_severity,
)
from jaxsynth.robustness.predictors import Asker

SIZE, CLASSES = 32, len(SHAPES)
# Cheap to compile, one of each family.
ASKED = ("gaussian_noise", "snow", "brightness", "contrast", "pixelate", "fog_3d")


def linear(weights, images):
    return (images.reshape(len(images), -1) - 0.5) @ weights


@pytest.fixture(scope="module")
def clean():
    return bias_sets.drawn_backgrounds(24, SIZE, 0).mixed_rand


@pytest.fixture(scope="module")
def predict(clean):
    """A classifier that knows these pictures by heart, to the pixel: the least-norm linear map."""
    pixels = clean.images.reshape(len(clean), -1).astype(np.float64) / 255 - 0.5
    wanted = np.eye(CLASSES)[clean.labels]
    weights = pixels.T @ np.linalg.solve(pixels @ pixels.T + 1e-2 * np.eye(len(pixels)), wanted)
    return Partial(linear, jnp.asarray(weights, jnp.float32))


def ask(predict, sets, **options):
    return suite.answer(predict, sets, jax.random.key(0), attacks={}, batch_size=96, **options)


@pytest.fixture(scope="module")
def answers(predict, clean):
    return ask(predict, suite.Sets(clean=clean), corruptions=Corruptions(ASKED))


def table(answers):
    """Accuracies at each severity."""
    return {name: np.array(list(row.values())) for name, row in by_severity(answers).items()}


def robustness(accuracies, clean):
    """R_cc of a table."""
    return np.mean([np.mean(row) for row in accuracies.values()]) / clean


def error(errors, baseline, clean=0.0, baseline_clean=0.0):
    """mCE, or with errors on clean images relative mCE, of tables of errors."""
    return np.mean(
        [(np.mean(errors[k]) - clean) / (baseline[k] - baseline_clean) for k in baseline]
    )


def values(found):
    return {name: float(evaluate(x.figure, x.count)) for name, x in found.items()}


@pytest.mark.heavy
def test_accuracy_falls_with_severity(answers):
    found = by_severity(answers)
    assert tuple(found) == ASKED
    for name, curve in found.items():
        assert list(curve) == [1, 2, 3, 4, 5]
        row = list(curve.values())
        assert row[0] > row[-1], (name, row)
        # Snow has a dip of its own at severity 2 in ImageNet-C.
        rises = np.flatnonzero(np.diff(row) > 0)
        assert not len(rises) or name == "snow", (name, row)
    assert (answers["clean/logits"].argmax(1) == answers["clean/labels"]).all()


def test_neither_the_batch_nor_the_choice_changes_a_picture(answers, predict, clean):
    """A part of the images, one corruption of many, at one severity of five, in other batches."""
    some = Subset(clean, np.arange(100))
    alone = suite.answer(
        predict, suite.Sets(clean=some), jax.random.key(0), attacks={}, batch_size=16,
        corruptions=Corruptions(("gaussian_noise",), severities=(5,)),
    )  # fmt: skip
    name = "corruption/gaussian_noise/correct"
    np.testing.assert_array_equal(alone[name], answers[name][4:, :100])
    assert by_severity(alone)["gaussian_noise"] == {5: alone[name].mean()}
    assert 0 < alone[name].mean() < 1


def test_depth_comes_from_the_source_or_a_folder(answers, predict, clean, tmp_path):
    some = ArraySource(clean.images[:4], clean.labels[:4], tuple("abcd"))
    sets = suite.Sets(clean=some)
    fog = Corruptions(("fog_3d",))
    with pytest.raises(SourceError, match="a: nothing is known of its depth, which 3D corruptions"):
        ask(predict, sets, corruptions=fog)
    for name, nearness in zip("abcd", clean.maps["depth"], strict=False):
        Image.fromarray(nearness).save(tmp_path / f"{name}.png")
    asker = Asker(predict, None, 4)
    np.testing.assert_allclose(
        asker.nearness(some, range(4), tmp_path), asker.nearness(clean, range(4), None)
    )
    # A preprocess cuts maps where it cuts images.
    cut = Asker(predict, lambda image: image[8:, :24], 4).nearness(some, range(4), tmp_path)
    np.testing.assert_allclose(cut, clean.maps["depth"][:4, 8:, :24] / 255, atol=1e-6)


def test_r_cc_and_mce_are_the_tables(answers):
    """Figures with weights of 1 are those of tables of accuracies."""
    other = dict(answers)
    for name in ASKED:
        rows = answers[f"corruption/{name}/correct"]
        other[f"corruption/{name}/correct"] = rows & (np.arange(rows.shape[1]) % 4 > 0)
    clean_other = np.array(other["clean/logits"])
    clean_other[::10] *= -1
    other["clean/logits"] = clean_other
    found = values(figures.figures(other, baseline=answers))
    accuracies = table(other)
    clean = (clean_other.argmax(1) == other["clean/labels"]).mean()
    assert clean < 1 and found["corrupted snow"] == pytest.approx(accuracies["snow"].mean())
    assert found["R_cc"] == pytest.approx(robustness(accuracies, clean), rel=1e-5)
    flat = {name: row for name, row in accuracies.items() if name in CORRUPTIONS}
    assert found["R_cc IN-C"] == pytest.approx(robustness(flat, clean), rel=1e-5)
    deep = robustness({"fog_3d": accuracies["fog_3d"]}, clean)
    assert found["R_cc 3DCC"] == pytest.approx(deep, rel=1e-5)
    errors = {name: 100 * (1 - row) for name, row in flat.items()}
    base = {k: 100 * (1 - row.mean()) for k, row in table(answers).items() if k in flat}
    assert found["mCE"] == pytest.approx(error(errors, base), rel=1e-5)
    relative = error(errors, base, 100 * (1 - clean), 0.0)
    assert found["relative mCE"] == pytest.approx(relative, rel=1e-5)
    # Against itself both are 1 by definition and not measured; the difference is paired.
    own = figures.measure(answers, jax.random.key(1), baseline=answers, resamples=200)
    assert "R_cc" in own and {"mCE", "relative mCE"}.isdisjoint(own)
    moved = figures.compare(other, answers, jax.random.key(1), baseline=answers, resamples=200)[
        "mCE"
    ]
    assert moved.low < moved.value < moved.high
    assert moved.value == pytest.approx(found["mCE"] - 1, rel=1e-4)


def drawn(names, *, count=40, accuracy=0.7):
    """Answers of a model that is right at random."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    found = {"clean/logits": np.eye(2, dtype=np.float32)[labels], "clean/labels": labels}
    for name in names:
        found[f"corruption/{name}/correct"] = rng.random((5, count)) < accuracy
        found[f"corruption/{name}/severities"] = np.arange(1, 6)
    return found


def test_alexnets_denominators_are_for_all_of_imagenet_c():
    answers = drawn(TEST_CORRUPTIONS)
    found = values(figures.figures(answers, baseline="alexnet"))
    errors = {name: 100 * (1 - row) for name, row in table(answers).items()}
    assert found["mCE"] == pytest.approx(error(errors, ALEXNET_ERRORS), rel=1e-5)
    relative = error(errors, ALEXNET_ERRORS, 0.0, ALEXNET_CLEAN_ERROR)
    assert found["relative mCE"] == pytest.approx(relative, rel=1e-5)
    del answers["corruption/fog/correct"]
    with pytest.raises(ValueError, match="AlexNet's errors are for all of ImageNet-C, missing fog"):
        figures.figures(answers, baseline="alexnet")
    with pytest.raises(ValueError, match="the baseline was not asked about the same gaussian_noi"):
        figures.figures(answers, baseline=drawn(("fog",)))
    # A baseline that is never wrong divides by nothing.
    perfect = drawn(("snow",), accuracy=1.1)
    found = figures.measure(drawn(("snow",)), jax.random.key(0), baseline=perfect, resamples=100)
    assert found["mCE"] is None and found["R_cc"] is not None


def test_paper_mode_has_the_meter_that_is_never_reset():
    """What it says is undone by the inverse that recovers the published table."""
    names = (*PAPER_CORRUPTIONS, *PAPER_CORRUPTIONS_3D)
    answers = drawn((*names, "fog", "flash"))
    for place, name in enumerate(PAPER_CORRUPTIONS):
        # Early corruptions are the easy ones, as in the study, so that R_cc comes out too high.
        rows = answers[f"corruption/{name}/correct"]
        answers[f"corruption/{name}/correct"] = rows & (np.arange(40) > 6 * place)
    found = values(figures.figures(answers, "paper"))
    assert [name for name in found if name.startswith("corrupted ")] == [
        f"corrupted {name}" for name in names
    ]
    accuracies, metered = table(answers), {}
    for script in (PAPER_CORRUPTIONS, PAPER_CORRUPTIONS_3D):
        cells = np.concatenate([accuracies[name] for name in script])
        means = np.cumsum(cells) / np.arange(1, 26)
        metered |= dict(zip(script, means.reshape(5, 5), strict=True))
    for name in names:
        assert found[f"corrupted {name}"] == pytest.approx(metered[name].mean(), rel=1e-5)
    assert found["R_cc"] == pytest.approx(robustness(metered, 1.0), rel=1e-5)
    # All twelve that were asked about, each on its own, and lower.
    corrected = values(figures.figures(answers))
    assert corrected["R_cc"] == pytest.approx(robustness(accuracies, 1.0), rel=1e-5)
    assert corrected["R_cc IN-C"] + 0.05 < found["R_cc IN-C"]
    assert {"corrupted fog", "corrupted flash"} <= corrected.keys()


def test_sets_that_come_corrupted_count_as_those_made_here(answers, predict, clean):
    """The same pictures, in 8 bits: taken as they are where they have the model's size already."""
    some = Subset(clean, np.arange(48))
    images = jnp.asarray(clean.images[:48] / np.float32(255))
    key = jax.random.fold_in(jax.random.key(0), 2**16)
    sources = [
        ArraySource(
            np.asarray(jnp.round(255 * corrupted_batch("contrast", images, s, key)), np.uint8),
            clean.labels[:48],
            clean.ids[:48],
        )
        for s in (1, 2, 3, 4, 5)
    ]
    sets = suite.Sets(clean=some, corrupted={"contrast": sources})

    # A preprocess that would spoil every picture but the clean ones, which it is made for.
    def preprocess(image):
        return image if any(np.array_equal(image, x) for x in clean.images[:48]) else 0 * image

    found = ask(predict, sets, preprocess=preprocess)
    expected = answers["corruption/contrast/correct"][:, :48]
    agree = found["corruption/contrast/correct"] == expected
    assert agree.mean() > 0.95 and 0 < expected[4].mean() < 1
    with pytest.raises(ValueError, match="contrast: to be made, but the sets have them too"):
        ask(predict, sets, corruptions=Corruptions(("contrast",)))
    turned = ArraySource(sources[0].images, clean.labels[:48][::-1], clean.ids[:48])
    for corrupted, message in (
        ({"contrast": [turned] * 5}, "contrast, severity 1: labels differ from the clean set's"),
        ({"contrast": sources[:4]}, "corrupted: contrast: 4 sets, expected one a severity"),
        ({"hail": sources}, "corrupted: 'hail': expected one of gaussian_noise"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(predict, suite.Sets(clean=some, corrupted=corrupted))


def test_choices_are_names_and_groups():
    assert Corruptions(("snow", "paper")).asked[:3] == ("snow", "shot_noise", "motion_blur")
    assert len(Corruptions(("paper",)).asked) == 10
    assert Corruptions(("all",)).asked == (*CORRUPTIONS, *CORRUPTIONS_3D)
    with pytest.raises(ValueError, match="names: 'hail': expected all, paper, imagenet_c, extra"):
        Corruptions(("hail",))
    for severities in ((0, 1), (1, 1), ()):
        with pytest.raises(ValueError, match=r"severities: expected .* 1 to 5, found"):
            Corruptions(("snow",), severities=severities)


def test_nan_logits_under_a_corruption_are_named(clean):
    def nan_in_the_dark(images):
        logits = jnp.zeros((len(images), CLASSES))
        return jnp.where(images.max((1, 2, 3))[:, None] < 0.9, jnp.nan, logits)

    some = Subset(clean, np.flatnonzero(clean.images.max((1, 2, 3)) > 240)[:8])
    with pytest.raises(ValueError, match="NaN or infinite logits for images under contrast of sev"):
        ask(nan_in_the_dark, suite.Sets(clean=some), corruptions=Corruptions(("contrast",)))
