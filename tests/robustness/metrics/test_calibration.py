"""The figures against the formulas, one bin, class or image at a time, in float64."""

import itertools

import numpy as np
import pytest
from scipy import optimize
from scipy.special import log_softmax, softmax

from jaxsynth.robustness.metrics import calibration
from jaxsynth.robustness.metrics.calibration import (
    PAPER_BINS,
    adaptive_calibration_error,
    binned_error,
    brier_score,
    classwise_calibration_error,
    debiased_calibration_error,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    restrict,
    summary,
)

COUNT, CLASSES = 400, 5


def drawn(seed=0, temperature=1.0):
    """Logits, and labels drawn from the probabilities at a temperature: calibrated at that one."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (COUNT, CLASSES)).astype(np.float32)
    chances = softmax(logits / temperature, axis=1)
    labels = (chances.cumsum(1) < rng.random((COUNT, 1))).sum(1).clip(max=CLASSES - 1)
    return logits, labels.astype(np.int32)


def loop(values, right, edges):
    """(count, mean value, share right) of each bin (low, high]; the first holds its low edge."""
    rows = []
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (values > low) & (values <= high)
        if number == 0:
            inside |= values <= low
        if number == len(edges) - 2:
            inside |= values > high
        count = int(inside.sum())
        rows.append((count, *((values[inside].mean(), right[inside].mean()) if count else (0, 0))))
    return np.array(rows)


def gap(values, right, edges):
    rows = loop(values, right, edges)
    return (rows[:, 0] * np.abs(rows[:, 1] - rows[:, 2])).sum() / len(values)


def top(logits, labels):
    chances = softmax(logits.astype(np.float64), axis=1)
    return chances.max(1), (chances.argmax(1) == labels).astype(float)


def quantiles(values, bins):
    return np.interp(np.linspace(0, len(values), bins + 1), np.arange(len(values)), np.sort(values))


@pytest.mark.parametrize("bins", [PAPER_BINS, 15])
def test_errors_are_the_formulas(bins):
    logits, labels = drawn(temperature=2.0)
    confidence, right = top(logits, labels)
    chances = softmax(logits.astype(np.float64), axis=1)
    edges = np.linspace(0, 1, bins + 1)
    found = expected_calibration_error(logits, labels, bins=bins)
    assert found == pytest.approx(gap(confidence, right, edges), abs=1e-6)
    found = adaptive_calibration_error(logits, labels, bins=bins)
    assert found == pytest.approx(gap(confidence, right, quantiles(confidence, bins)), abs=1e-6)
    each = [gap(chances[:, c], (labels == c).astype(float), edges) for c in range(CLASSES)]
    found = classwise_calibration_error(logits, labels, bins=bins)
    assert found == pytest.approx(np.mean(each), abs=1e-6)


def test_debiased_is_the_formula():
    logits, labels = drawn(temperature=2.0)
    confidence, right = top(logits, labels)
    rows = loop(confidence, right, quantiles(confidence, 10))
    noise = rows[:, 2] * (1 - rows[:, 2]) / (rows[:, 0] - 1)
    squared = (rows[:, 0] * ((rows[:, 1] - rows[:, 2]) ** 2 - noise)).sum() / COUNT
    found = debiased_calibration_error(logits, labels, bins=10)
    assert found == pytest.approx(np.sqrt(squared), rel=1e-4)


def test_debiasing_removes_what_chance_adds():
    """Of calibrated logits the plain figure is far above 0, its debiased square is about 0."""
    plain, left = [], []
    for seed in range(8):
        logits, labels = drawn(seed)
        plain.append(expected_calibration_error(logits, labels))
        left.append(debiased_calibration_error(logits, labels))
    assert np.mean(plain) > 0.04
    assert np.median(left) < 0.02


def test_likelihood_and_brier_are_the_formulas():
    logits, labels = drawn()
    logs = log_softmax(logits.astype(np.float64), axis=1)
    at_label = logs[np.arange(COUNT), labels]
    assert negative_log_likelihood(logits, labels) == pytest.approx(-at_label.mean(), rel=1e-6)
    squares = (np.exp(logs) - np.eye(CLASSES)[labels]) ** 2
    assert brier_score(logits, labels) == pytest.approx(squares.sum(1).mean(), rel=1e-5)


def test_confidences_on_edges_and_at_the_ends():
    """A bin holds its upper edge, the first also 0, and 1.0 is in the last."""
    edges = calibration.width_edges(4)
    confidence = np.array([0, 0.25, 0.5, 0.75, 1], np.float32)
    correct = np.array([0, 1, 0, 1, 0], np.float32)
    # {0, .25}, {.5}, {.75}, {1}: gaps .25 / 2 * 2, .5, .25, 1 over 5 images.
    assert float(binned_error(confidence, correct, edges)) == pytest.approx(
        (0.75 + 0.5 + 0.25 + 1) / 5
    )


def test_weights_are_repetitions():
    logits, labels = drawn()
    weights = np.random.default_rng(1).integers(0, 4, COUNT)
    confidence, right = (x.astype(np.float32) for x in top(logits, labels))
    edges = calibration.width_edges(15)
    found = binned_error(confidence, right, edges, weights.astype(np.float32))
    repeated = expected_calibration_error(logits.repeat(weights, 0), labels.repeat(weights))
    assert float(found) == pytest.approx(repeated, abs=1e-6)


@pytest.mark.parametrize("equal_mass", [False, True])
def test_a_diagram_holds_every_image(equal_mass):
    logits, labels = drawn(temperature=2.0)
    confidence, right = top(logits, labels)
    found = reliability(logits, labels, bins=7, equal_mass=equal_mass)
    edges = quantiles(confidence, 7) if equal_mass else np.linspace(0, 1, 8)
    rows = loop(confidence, right, edges)
    assert found.count.sum() == COUNT
    np.testing.assert_array_equal(found.count, rows[:, 0])
    filled = found.count > 0
    # Of five classes none has a largest probability below a fifth.
    assert equal_mass == filled.all()
    np.testing.assert_allclose(found.confidence[filled], rows[filled, 1], rtol=1e-5)
    np.testing.assert_allclose(found.accuracy[filled], rows[filled, 2], rtol=1e-5)
    assert np.isnan(found.accuracy[~filled]).all()


def test_temperature_is_the_likeliest():
    logits, labels = drawn(temperature=2.5)

    def loss(temperature):
        logs = log_softmax(logits.astype(np.float64) / temperature, axis=1)
        return -logs[np.arange(COUNT), labels].mean()

    best = optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(best, rel=1e-4)
    assert found == pytest.approx(2.5, rel=0.2)
    figures = summary(logits, labels, temperature=found)
    assert figures["ece_scaled"] < figures["ece"] and figures["nll_scaled"] < figures["nll"]
    scaled = expected_calibration_error(logits / np.float32(found), labels)
    assert figures["ece_scaled"] == pytest.approx(scaled, abs=1e-6)


def test_no_temperature_makes_what_is_right_certain_enough():
    logits = 3 * np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="the likelihood has no maximum"):
        fit_temperature(logits, np.arange(4))


def test_restricted_logits_are_those_of_a_smaller_model():
    logits, labels = drawn()
    kept = np.flatnonzero((labels == 3) | (labels == 1))
    cut, places = restrict(logits[kept], labels[kept], [3, 1])
    np.testing.assert_array_equal(cut, logits[kept][:, [3, 1]])
    np.testing.assert_array_equal(places, (labels[kept] == 1).astype(int))


def test_bad_input_is_named():
    logits, labels = drawn()
    broken = logits.copy()
    broken[7, 2] = np.nan
    for bad_logits, bad_labels, message in (
        (broken, labels, "logits: 1 of 400 rows hold NaN or infinity, the first is row 7"),
        (logits, labels + 1, r"labels: \d+ of 400 outside 0 to 4, the first is 5 at \d+"),
        (logits, labels[:-1], r"labels: expected shape \(400,\), found \(399,\)"),
        (logits, labels.astype(float), "labels: expected integers, found float64"),
        (logits[0], labels, r"logits: expected \(images, classes\), found shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(bad_logits, bad_labels)
    with pytest.raises(ValueError, match="bins: expected a whole number, 1 to 10000, found 0"):
        expected_calibration_error(logits, labels, bins=0)
    with pytest.raises(ValueError, match=r"labels: \d+ of 400 are none of the 2 classes"):
        restrict(logits, labels, [0, 1])
    with pytest.raises(ValueError, match="classes: 5 is outside 0 to 4"):
        restrict(logits, labels, [0, 5])
    with pytest.raises(ValueError, match="classes: class 1 is given more than once"):
        restrict(logits, labels, [1, 1])
