"""What accuracies under corruptions add up to: R_cc, mCE, relative mCE; pure functions of tables.

A table maps a corruption to its values at severities 1, 2, ...; all in the same unit, fractions or
percent.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxsynth.robustness.corruptions.registry import TEST_CORRUPTIONS

# Mean over severities of AlexNet's error in percent, by which mCE divides (torchvision's AlexNet on
# the released set; hendrycks/robustness).
ALEXNET_ERRORS = dict(
    zip(
        TEST_CORRUPTIONS,
        (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.6),
        strict=True,
    )
)
# Its error on the clean validation set: torchvision states 56.522 % accuracy for those weights.
ALEXNET_CLEAN_ERROR = 43.478


def corruption_robustness(accuracies: Mapping[str, Sequence[float]], clean: float) -> float:
    """R_cc: mean over corruptions of the mean over severities of accuracy, over clean accuracy.

    ValueError for an empty table, values outside of 0 to 100, or a clean accuracy that is not
    positive.
    """
    means = _means(accuracies, "accuracies")
    if not clean > 0:
        raise ValueError(f"clean accuracy: expected more than 0, found {clean}")
    return float(np.mean(list(means.values())) / clean)


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float] | None = None
) -> float:
    """mCE, in percent: mean over corruptions of 100 times the error over the baseline's.

    `errors` in percent. `baseline` is one mean error in percent a corruption, by default AlexNet's
    on the 15 of the test set. ValueError where the two name different corruptions.
    """
    means, baseline = _paired(errors, baseline)
    return float(np.mean([100 * means[name] / baseline[name] for name in baseline]))


def relative_mean_corruption_error(
    errors: Mapping[str, Sequence[float]],
    clean_error: float,
    baseline: Mapping[str, float] | None = None,
    baseline_clean_error: float = ALEXNET_CLEAN_ERROR,
) -> float:
    """Relative mCE, in percent: as mCE, of how far errors rise above the clean one."""
    means, baseline = _paired(errors, baseline)
    rises = {name: baseline[name] - baseline_clean_error for name in baseline}
    for name, rise in rises.items():
        if rise <= 0:
            raise ValueError(f"{name}: the baseline's error does not rise above its clean error")
    return float(np.mean([100 * (means[name] - clean_error) / rises[name] for name in rises]))


def running_means(values: Sequence[float]) -> Float[np.ndarray, " k"]:
    """What a meter that is never reset reports after each of equally many images."""
    values = np.asarray(values, np.float64)
    return np.cumsum(values) / np.arange(1, len(values) + 1)


def undo_running_means(means: Sequence[float]) -> Float[np.ndarray, " k"]:
    """The values of `running_means`: k r_k - (k - 1) r_(k-1).

    The synthetic-clone study (arXiv 2405.20469) committed such means over all cells so far of a
    script. An error of the k-th mean is up to 2 k times as large in the value.
    """
    means = np.asarray(means, np.float64)
    return np.diff(means * np.arange(1, len(means) + 1), prepend=0.0)


def _paired(errors, baseline):
    baseline = ALEXNET_ERRORS if baseline is None else dict(baseline)
    if set(errors) != set(baseline):
        missing, more = set(baseline) - set(errors), set(errors) - set(baseline)
        raise ValueError(
            f"errors: missing {sorted(missing)}, without a baseline {sorted(more)}; expected those "
            "of the baseline"
        )
    means = _means(errors, "errors")
    if max(means.values()) <= 1:
        raise ValueError("errors: expected percent, found no mean above 1")
    return means, baseline


def _means(table: Mapping[str, Sequence[float]], what: str) -> dict[str, float]:
    if not table:
        raise ValueError(f"{what}: expected a row for each corruption, found none")
    means = {}
    for name, row in table.items():
        values = np.asarray(row, np.float64)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{what} of {name}: expected a number for each severity, found {row}")
        if not ((values >= 0) & (values <= 100)).all():
            raise ValueError(f"{what} of {name}: expected 0 to 100, found {row}")
        means[name] = float(values.mean())
    return means
