"""R_cc, mCE and relative mCE by hand, and the committed results of the synthetic-clone study."""

import numpy as np
import pytest

from jaxsynth.robustness.metrics.corruption import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    corruption_robustness,
    mean_corruption_error,
    relative_mean_corruption_error,
    running_means,
    undo_running_means,
)

# "acc" of corruptions/results/2DCC and 3DCC in visinf/benchmarking-synthetic-clones: five
# corruptions a file, in the order of `NAMES`, severities 1 to 5 of each.
NAMES = (
    ("shot_noise", "motion_blur", "snow", "pixelate", "jpeg_compression"),
    ("near_focus", "far_focus", "fog_3d", "xy_motion_blur", "z_motion_blur"),
)
COMMITTED = {
    "resnet50": (
        "66.836 62.466 57.3747 50.524 44.3452 48.3327 49.9323 49.0907 46.6089 43.7868 45.2175"
        " 44.9048 44.7575 43.8979 42.8052 44.4132 45.6804 46.1879 45.6672 44.6369 45.7417 46.63"
        " 47.3465 47.7242 47.7123",
        "68.042 66.293 64.4953 62.7865 61.134 62.3893 62.2886 61.374 60.0707 58.598 59.7256"
        " 60.0033 59.3843 58.2037 56.6871 56.5941 55.8107 54.5757 53.0791 51.4647 51.5003 51.184"
        " 50.607 49.8403 49.0193",
    ),
    "SynCLIP": (
        "27.78 23.025 19.2453 15.869 13.3396 16.9177 17.9829 17.4185 16.148 14.884 16.468 16.7062"
        " 16.9358 16.7564 16.3544 17.4138 17.8121 17.6576 17.0534 16.344 16.7542 16.7459 16.5592"
        " 16.0954 15.5379",
        "37.718 36.041 34.4873 33.0975 31.8468 33.0527 32.9743 32.315 31.4189 30.4468 31.5325"
        " 31.7043 31.244 30.4349 29.4677 28.9841 28.1116 27.0917 26.0426 25.0166 24.702 24.2301"
        " 23.6781 23.0813 22.4938",
    ),
}
# Means over the severities, R_cc as committed and as recovered, and clean accuracy.
EXPECTED = {
    "resnet50": (
        (44.3, 43.2, 40.8, 50.1, 60.0, 61.1, 56.1, 52.9, 35.8, 39.2),
        66.1,
        60.4,
        80.12,
    ),
    "SynCLIP": ((13.3, 16.4, 19.3, 16.3, 12.3, 31.8, 29.0, 27.5, 11.7, 12.4), 42.6, 34.5, 55.11),
}


@pytest.mark.parametrize("model", COMMITTED)
def test_published_running_means_are_undone(model):
    committed, recovered = {}, {}
    for names, numbers in zip(NAMES, COMMITTED[model], strict=True):
        cells = np.array(numbers.split(), float)
        values = undo_running_means(cells)
        np.testing.assert_allclose(running_means(values), cells, rtol=1e-12)
        committed |= dict(zip(names, cells.reshape(5, 5), strict=True))
        recovered |= dict(zip(names, values.reshape(5, 5), strict=True))
    means, as_committed, as_recovered, clean = EXPECTED[model]
    np.testing.assert_allclose([row.mean() for row in recovered.values()], means, atol=0.051)
    # What confirms the fault: every curve falls with the severity, but for snow's known dip.
    for name, row in recovered.items():
        rises = np.flatnonzero(np.diff(row) >= 0)
        assert list(rises) == ([1] * (name == "snow")), (name, row)
    inflated, right = (100 * corruption_robustness(t, clean) for t in (committed, recovered))
    assert inflated == pytest.approx(as_committed, abs=0.051)
    assert right == pytest.approx(as_recovered, abs=0.051)
    inflation = {"resnet50": 5.7, "SynCLIP": 8.1}[model]
    assert inflated - right == pytest.approx(inflation, abs=0.1)


def test_scores_by_hand():
    accuracies = {"a": [0.6, 0.4], "b": [0.3, 0.1]}
    assert corruption_robustness(accuracies, 0.7) == pytest.approx(0.5)
    errors = {"a": [30, 50], "b": [60, 80]}
    baseline = {"a": 80.0, "b": 70.0}
    assert mean_corruption_error(errors, baseline) == pytest.approx((50 + 100) / 2)
    relative = relative_mean_corruption_error(errors, 20, baseline, 50)
    assert relative == pytest.approx(100 * (20 / 30 + 50 / 20) / 2)


def test_alexnet_is_100():
    errors = {name: [error - 5, error + 5] for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(errors) == pytest.approx(100)
    relative = relative_mean_corruption_error(errors, ALEXNET_CLEAN_ERROR)
    assert relative == pytest.approx(100)
    half = {name: [error / 2] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(half) == pytest.approx(50)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: corruption_robustness({}, 0.5), "accuracies: expected a row for each corruption"),
        (lambda: corruption_robustness({"a": [0.5]}, 0), "clean accuracy: expected more than 0"),
        (lambda: corruption_robustness({"a": []}, 1), "accuracies of a: expected a number for"),
        (lambda: corruption_robustness({"a": [np.nan]}, 1), "accuracies of a: expected 0 to 100"),
        (lambda: mean_corruption_error({"fog": [50]}), "missing .*'snow'.*without a baseline"),
        (lambda: mean_corruption_error({"a": [0.5]}, {"a": 50}), "errors: expected percent"),
        (
            lambda: relative_mean_corruption_error({"a": [50]}, 20, {"a": 40}, 50),
            "a: the baseline's error does not rise",
        ),
    ],
)
def test_bad_tables_are_named(score, message):
    with pytest.raises(ValueError, match=message):
        score()
