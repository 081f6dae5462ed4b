"""Accuracy under each corruption, R_cc, mCE and relative mCE, from which images were right.

- R_cc (Singh et al. 2024, arXiv 2405.20469): the mean over corruptions of their accuracies, each a
  mean over severities, over the clean accuracy.
- mCE (Hendrycks and Dietterich 2019, arXiv 1903.12261): the mean over corruptions of the error over
  a baseline's; relative mCE: the same of how far each error rises above the clean one.
"""

from collections.abc import Collection, Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool

from jaxsynth.robustness.corruptions.registry import CORRUPTIONS, TEST_CORRUPTIONS
from jaxsynth.robustness.metrics.bootstrap import (
    Figure,
    Weights,
    bounded,
    mean,
    ratio,
    weighted_sum,
)
from jaxsynth.robustness.metrics.limits import Limits, share_limits
from jaxsynth.robustness.predictors import Answers

# The synthetic-clone study's, in the order of its two scripts, whose meters are one each.
PAPER_CORRUPTIONS = ("shot_noise", "motion_blur", "snow", "pixelate", "jpeg_compression")
PAPER_CORRUPTIONS_3D = ("near_focus", "far_focus", "fog_3d", "xy_motion_blur", "z_motion_blur")
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

Baseline = Answers | Literal["alexnet"]


def corruption_figures(
    answers: Answers, clean: Bool[np.ndarray, " n"], *, paper: bool, baseline: Baseline | None
) -> dict[str, Figure]:
    """Accuracy under each corruption (mean over severities), R_cc, mCE and relative mCE.

    R_cc is the mean over corruptions of those accuracies over the clean accuracy; where there are
    both, also of ImageNet-C's and of the 3D ones alone. mCE is over those of the fifteen test
    corruptions that were asked about. `paper` has the ten of the synthetic-clone study (what was
    asked of them), each accuracy being what its scripts' meter said, which is never reset.
    """
    cells = _cells(answers)
    if not cells:
        return {}
    of_2d = {name: rows for name, rows in cells.items() if name in CORRUPTIONS}
    of_3d = {name: rows for name, rows in cells.items() if name not in CORRUPTIONS}
    if paper:
        scripts = [
            {name: cells[name] for name in names if name in cells}
            for names in (PAPER_CORRUPTIONS, PAPER_CORRUPTIONS_3D)
        ]
        of_2d, of_3d = (_as_metered(script) for script in scripts)
    means = {name: rows.mean(0) for name, rows in (of_2d | of_3d).items()}
    found = {f"corrupted {name}": mean(right) for name, right in means.items()}
    if means:
        found["R_cc"] = _robustness(means, means, clean)
    if of_2d and of_3d:
        found["R_cc IN-C"] = _robustness(means, of_2d, clean)
        found["R_cc 3DCC"] = _robustness(means, of_3d, clean)
    if baseline is not None:
        found |= _errors(cells, clean, baseline)
    return found


def _robustness(means: Mapping[str, np.ndarray], names, clean: np.ndarray) -> Figure:
    return ratio(np.mean([means[name] for name in names], axis=0), clean)


def check_alexnet(names: Collection[str]) -> None:
    """ValueError where `names` lack some corruption of those that AlexNet's errors are means of."""
    missing = [name for name in TEST_CORRUPTIONS if name not in names]
    if missing:
        raise ValueError(
            f"mCE: AlexNet's errors are for all of ImageNet-C, missing {', '.join(missing)}; ask "
            "about imagenet_c, or name a model as the baseline"
        )


def _errors(
    cells: dict[str, np.ndarray], clean: np.ndarray, baseline: Baseline
) -> dict[str, Figure]:
    """mCE and its relative form, fractions of the baseline's."""
    names = [name for name in TEST_CORRUPTIONS if name in cells]
    if baseline == "alexnet":
        check_alexnet(cells)
    if not names:
        return {}
    if baseline == "alexnet":
        errors = np.array([ALEXNET_ERRORS[name] for name in names]) / 100
        rises = errors - ALEXNET_CLEAN_ERROR / 100
        below, rising = (np.repeat(x[:, None], len(clean), axis=1) for x in (errors, rises))
    else:
        theirs = _cells(baseline)
        for name in names:
            if name not in theirs or theirs[name].shape != cells[name].shape:
                raise ValueError(f"mCE: the baseline was not asked about the same {name}")
        base = baseline["clean/logits"].argmax(1) == baseline["clean/labels"]
        below = np.stack([1 - theirs[name].mean(0) for name in names])
        rising = below - (1 - base)
    above = np.stack([1 - cells[name].mean(0) for name in names])
    return {
        "mCE": _mean_quotient(above, below, above),
        "relative mCE": _mean_quotient(above - (1 - clean), rising, above),
    }


def _mean_quotient(above, below, errors) -> Figure:
    """Of sums over the images; `errors` are the model's own (corruptions, images)."""
    parts = (jnp.asarray(values, jnp.float32) for values in (above, below))
    limits = Partial(_error_limits, np.asarray(above), np.asarray(below), np.asarray(errors))
    return bounded(Partial(_quotients, *parts), limits)


def _error_limits(above: np.ndarray, below: np.ndarray, errors: np.ndarray, level: float) -> Limits:
    """What the number of images that are wrong leaves open, for the mean over corruptions."""
    wrong, count = float(errors.mean(0).sum()), errors.shape[1]
    found = share_limits(wrong, count, level)
    under = below.sum(1)
    value, each = float((above.sum(1) / under).mean()), float((count / under).mean())
    share = wrong / count
    return found._replace(
        low=value - (share - found.low) * each, high=value + (found.high - share) * each
    )


def _quotients(above: Array, below: Array, weights: Weights) -> Array:
    """Mean over corruptions of one sum over the images over the other; NaN where one is not > 0."""
    under = weighted_sum(below, weights)
    # A resample's rounding must not turn a sum of nothing into something.
    safe = jnp.where(under > 1e-4, under, jnp.nan)
    return (weighted_sum(above, weights) / safe).mean()


def _as_metered(cells: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each image, the running mean over all cells of a script up to each."""
    if not cells:
        return {}
    sizes = np.cumsum([len(rows) for rows in cells.values()])
    rows = np.concatenate(list(cells.values())).astype(np.float64)
    metered = np.cumsum(rows, axis=0) / np.arange(1, len(rows) + 1)[:, None]
    return dict(zip(cells, np.split(metered, sizes[:-1]), strict=True))


def by_severity(answers: Answers) -> dict[str, dict[int, float]]:
    """Accuracy (a fraction) under each corruption at each severity that was asked about."""
    found = {}
    for name, rows in _cells(answers).items():
        severities = answers[f"corruption/{name}/severities"].tolist()
        found[name] = dict(zip(severities, rows.mean(1).tolist(), strict=True))
    return found


def _cells(answers: Answers) -> dict[str, np.ndarray]:
    return {
        name.split("/")[1]: rows
        for name, rows in answers.items()
        if name.startswith("corruption/") and name.endswith("/correct")
    }
