"""Intervals near the ends of a range: never of no width, and as often right as they say."""

import jax
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.bias import background_gap, context_figures
from jaxsynth.robustness.metrics.bootstrap import (
    Measured,
    TooFewError,
    bounded,
    difference,
    mean,
    ratio,
)
from jaxsynth.robustness.metrics.corruption import corruption_figures
from jaxsynth.robustness.metrics.limits import (
    Limits,
    auroc_limits,
    difference_limits,
    fpr_limits,
    paired_limits,
    quotient_limits,
    share_limits,
)

SAMPLES = 60


def context(rng):
    """CB_1 of 40 common and 20 uncommon images."""
    partition = np.repeat([0, 1], [40, 20])
    right = rng.random(60) < np.where(partition, 0.95, 0.98)
    return context_figures(right, partition)[1], 0.95 / 0.98


def attack(rng):
    """R_adv where nothing withstands, or nearly."""
    clean = rng.random(60) < 0.8
    return Measured(ratio(clean & (rng.random(60) < 0.03), clean), 60), 0.03


def corrupted(rng):
    """R_cc of images that are right under all corruptions but for a few."""
    rows = rng.random((5, 60)) < np.where(rng.random(60) < 0.03, 0.5, 1.0)
    answers = {"corruption/snow/correct": rows, "corruption/snow/severities": np.arange(1, 6)}
    clean = np.ones(60, bool)
    found = corruption_figures(answers, clean, paper=False, baseline=None)
    return Measured(found["R_cc"], 60), 1 - 0.03 * 0.5


def mean_error(rng):
    """mCE of a model that is hardly ever wrong, over a baseline that is at half."""
    rows = rng.random((2, 60)) < 0.98
    base = np.tile(np.arange(60) % 2 > 0, (2, 1))
    labels = np.zeros(60, int)
    logits = np.tile(np.float32([1, 0]), (60, 1))
    made = [
        {
            "clean/logits": logits, "clean/labels": labels, "corruption/fog/correct": right,
            "corruption/fog/severities": np.arange(1, 3),
        }
        for right in (rows, base)
    ]  # fmt: skip
    clean = np.ones(60, bool)
    found = corruption_figures(made[0], clean, paper=False, baseline=made[1])
    return Measured(found["mCE"], 60), 0.02 / 0.5


def backgrounds(rng):
    """BG-Gap of two sets of 30, nearly all right in both."""
    return background_gap(rng.random(30) < 0.99, rng.random(30) < 0.96, paired=False), 0.03


def models(rng):
    """The difference of two models that are right on nearly the same images."""
    one = rng.random(60) < 0.7
    other = np.where(rng.random(60) < 0.02, ~one, one)
    # Of the images on which they differ seven tenths are those that the first is right on.
    return Measured(difference(mean(one), mean(other)), 60), 0.02 * (0.7 - 0.3)


def auroc(rng):
    """Sorted perfectly, but for one positive image in forty."""
    one = np.where(rng.random(35) < 0.025, -9, 3) + rng.normal(size=35) * 0.1
    found = table.detection_figures(one, rng.normal(size=25) * 0.1)
    return found[0], 0.975


def fpr95(rng):
    one = rng.normal(size=35) * 0.1
    other = np.where(rng.random(25) < 0.03, 9, -9) + rng.normal(size=25) * 0.1
    return table.detection_figures(one, other)[1], 0.03


def _calibration(confidence, right):
    logits = np.stack([np.log(confidence / (1 - confidence)), np.zeros(len(confidence))], 1)
    labels = np.where(right, 0, 1)
    answers = {"clean/logits": logits.astype(np.float32), "clean/labels": labels}
    return table.figures(answers)["ECE"]


def calibrated(rng):
    confidence = rng.uniform(0.55, 0.99, 60)
    return _calibration(confidence, rng.random(60) < confidence), 0.0


def certain(rng):
    """Surer than right: few errors, each of which moves the figure."""
    return _calibration(np.full(60, 0.999), rng.random(60) < 0.97), 0.999 - 0.97


CASES = (
    context, attack, corrupted, mean_error, backgrounds, models, auroc, fpr95, calibrated, certain,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_intervals_near_the_ends_hold_the_truth(case, key):
    held = 0
    for seed in range(SAMPLES):
        measured, truth = case(np.random.default_rng(seed))
        found = measured.interval(jax.random.fold_in(key, seed), resamples=100)
        assert found.low <= found.value <= found.high and found.low < found.high
        held += found.low - 1e-6 <= truth <= found.high + 1e-6
    # Of 60 with a coverage of 95 % fewer than 52 come once in 100.
    assert held >= 52


@pytest.mark.parametrize("right", [0, 1])
def test_unanimous_parts_leave_no_figure_certain(right, key):
    """All images alike, of the figure and of what it is compared with."""
    alike = np.full(60, right, bool)
    partition = np.repeat([0, 1], [40, 20])
    scores = np.full(35, 2.0 * right), np.ones(25)
    figures = {
        "gap": background_gap(alike[:30], alike[:30], paired=False),
        "paired gap": background_gap(alike, alike, paired=True),
        "auroc": table.detection_figures(*scores)[0],
        "fpr95": table.detection_figures(*scores)[1],
        "ECE": _calibration(np.full(60, 0.98), alike),
    }
    if right:
        figures["CB_1"] = context_figures(alike, partition)[1]
    for name, measured in figures.items():
        found = measured.interval(key, resamples=100)
        assert found.low <= found.value <= found.high, name
        assert found.high - found.low > 0.05, name


def test_limits_are_the_published_ones():
    for hits, count in ((0, 21), (3, 21), (21, 21), (40, 100)):
        exact = stats.binomtest(hits, count).proportion_ci(0.95, "exact")
        found = share_limits(hits, count, 0.95)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
        assert found.few == (min(hits, count - hits) < 5)
    # Newcombe 1998 (Statistics in Medicine 17), table II, example 56/70 - 48/80, by Wilson's.
    wilson = [stats.binomtest(*x).proportion_ci(0.95, "wilson") for x in ((56, 70), (48, 80))]
    limits = [Limits(x.low, x.high, False) for x in wilson]
    found = difference_limits(0.8, 0.6, *limits)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # A quotient's limits solve |one - r other| = the reach of its parts.
    found = quotient_limits(0.8, 0.6, *limits)
    for r, mine, theirs in (
        (found.low, 0.8 - limits[0].low, limits[1].high - 0.6),
        (found.high, limits[0].high - 0.8, 0.6 - limits[1].low),
    ):
        assert (0.8 - 0.6 * r) ** 2 == pytest.approx(mine**2 + (r * theirs) ** 2)
    assert quotient_limits(0.5, 0.0, limits[0], Limits(0, 0.1, True)).high == np.inf


def test_limits_at_the_ends_by_hand():
    low, high, few = paired_limits(0, 0, 40, 0.95)
    assert few and high == -low == pytest.approx(1 - 0.025 ** (1 / 40))
    assert auroc_limits(1.0, 30, 900, 0.95).low == pytest.approx(0.025 ** (1 / 30))
    found = fpr_limits(np.arange(100.0), np.full(50, -1.0), 0.95)
    assert found.low == 0 and found.high == pytest.approx(1 - 0.0125 ** (1 / 50))


def test_a_figure_of_which_nothing_is_known_is_not_called_certain(key):
    constant = Measured(Partial(lambda weights: 0 * weights.sum() + 2.0), 20)
    with pytest.raises(TooFewError, match="all resamples give 2"):
        constant.interval(key, resamples=100)
    known = bounded(constant.figure, Partial(lambda level: Limits(1.0, 3.0, few=False)))
    found = Measured(known, 20).interval(key, resamples=100)
    assert (found.low, found.high) == (1, 3)
