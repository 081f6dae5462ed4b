"""Every figure of a model, from its answers alone: the columns of the synthetic-clone study.

`measure` turns the answers of `suite.answer` into figures with intervals, `compare` two models'
answers to the same images into paired differences (Singh et al. 2024, arXiv 2405.20469, whose
columns these are).

`mode` "corrected" is the default. "paper" follows what that study's code computes where it differs
from what its text says; `PAPER_FAULTS` names each difference, `PAPER_FAULTS_LEFT` those that are
not followed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from jaxsynth.robustness.bias_sets import VARIANTS
from jaxsynth.robustness.metrics.bias import background_gap, context_figures, shape_figure
from jaxsynth.robustness.metrics.bootstrap import (
    Figure,
    Interval,
    Measured,
    TooFewError,
    bounded,
    difference,
    evaluate,
    mean,
    ratio,
)
from jaxsynth.robustness.metrics.calibration import PAPER_BINS, binned_error, restrict, width_edges
from jaxsynth.robustness.metrics.corruption import Baseline, corruption_figures
from jaxsynth.robustness.metrics.detection import detection, ranks, weighted_detection
from jaxsynth.robustness.metrics.limits import Limits, auroc_limits, calibration_limits, fpr_limits
from jaxsynth.robustness.metrics.ood import max_softmax, negative_entropy
from jaxsynth.robustness.predictors import Answers

Mode = Literal["corrected", "paper"]
# The attack of each name that paper mode shows for the one that is so called without it.
PAPER_SUFFIX = " as published"

PAPER_FAULTS = {
    "ECE": "over 20 bins; here the usual 15",
    "AUROC": "scores by the negative entropy; the text says maximum softmax probability",
    "FPR95": "at the recall nearest to 95 %, which may be below it",
    "R_adv PGD": "a step of 2/225, larger than the ball of 1/255: every iterate is a corner of it",
    "corrupted, R_cc": "of the study's ten corruptions, each accuracy is the running mean over all "
    "corruptions and severities so far of a script, whose meter is never reset: early corruptions "
    "count most; the study's R_cc came out 3 to 8 points too high",
}
PAPER_FAULTS_LEFT = (
    "the published IN-9 figures are of inputs that were not normalised",
    "some published models got other inputs than they were trained on: CLIPs under corruption and "
    "ViT-B everywhere were given ImageNet's mean and deviation",
    "the published corrupted images, which are 224 pixels wide already, were enlarged to 256 and "
    "cut again",
    "the published OOD images were resized to 224 pixels (bicubic), the others to 256 and cut; "
    "here all sets of a model are cut alike",
    "the published plots of CB_k leave out P3 and the last two images",
)


def figures(
    answers: Answers, mode: Mode = "corrected", *, baseline: Baseline | None = None
) -> dict[str, Measured]:
    """Every figure that the answers allow, by its column's name, in the paper's order.

    `baseline` is what mCE divides by: another model's answers to the same images, or "alexnet"
    (ImageNet-C's own, for all of its fifteen corruptions); without one there is no mCE.
    """
    if mode not in ("corrected", "paper"):
        raise ValueError(f"mode: expected 'corrected' or 'paper', found {mode!r}")
    bins = PAPER_BINS if mode == "paper" else 15
    clean = _right(answers, "clean")
    count = len(clean)
    found = {
        "accuracy": Measured(mean(clean), count),
        "ECE": Measured(_calibration(answers, "clean", bins), count),
    }
    for name in _names(answers, "shifted"):
        part = f"shifted/{name}"
        right = _right(answers, part)
        found[f"accuracy {name}"] = Measured(mean(right), len(right))
        found[f"ECE {name}"] = Measured(_calibration(answers, part, bins), len(right))
    score = negative_entropy if mode == "paper" else max_softmax
    for name in _names(answers, "ood"):
        scores = (score(answers[f"{part}/logits"]) for part in ("clean", f"ood/{name}"))
        nearest = "fpr95_nearest" if mode == "paper" else "fpr95_id"
        auroc, fpr95 = detection_figures(*scores, ("auroc", nearest))
        found |= {f"AUROC {name}": auroc, f"FPR95 {name}": fpr95}
    attacks = _names(answers, "attack")
    for name in attacks:
        if name.endswith(PAPER_SUFFIX):
            continue
        published = f"{name}{PAPER_SUFFIX}"
        made = published if mode == "paper" and published in attacks else name
        under = answers[f"attack/{made}/correct"]
        found[f"R_adv {name}"] = Measured(ratio(under & clean, clean), count)
    corrupted = corruption_figures(answers, clean, paper=mode == "paper", baseline=baseline)
    found |= {name: Measured(figure, count) for name, figure in corrupted.items()}
    if "context/correct" in answers:
        right, partition = answers["context/correct"], answers["context/partition"]
        found |= {f"CB_{k}": figure for k, figure in context_figures(right, partition).items()}
    if "conflict/decisions" in answers:
        decisions, shapes, textures = (
            answers[f"conflict/{name}"] for name in ("decisions", "shapes", "textures")
        )
        found["shape bias"] = shape_figure(decisions, shapes, textures)
    if "background/paired" in answers:
        right = {v: answers[f"background/{v}/correct"] for v in VARIANTS}
        found["IN-9"] = Measured(mean(right["original"]), len(right["original"]))
        found["BG-Gap"] = background_gap(
            right["mixed_same"], right["mixed_rand"], paired=bool(answers["background/paired"])
        )
    return found


def measure(
    answers: Answers,
    key: Key[Array, ""],
    *,
    mode: Mode = "corrected",
    baseline: Baseline | None = None,
    resamples: int = 2000,
) -> dict[str, Interval | None]:
    """Every figure with its interval; None where it is undefined (nothing right to divide by).

    The baseline's own mCE is 1 by definition, and left out.
    """
    by_definition = ("mCE", "relative mCE") if baseline is answers else ()
    return {
        name: interval_of(found, key, name, resamples)
        for name, found in figures(answers, mode, baseline=baseline).items()
        if name not in by_definition
    }


def compare(
    one: Answers,
    other: Answers,
    key: Key[Array, ""],
    *,
    mode: Mode = "corrected",
    baseline: Baseline | None = None,
    resamples: int = 2000,
) -> dict[str, Interval | None]:
    """`one`'s figures less `other`'s, with the interval of the paired difference.

    ValueError where they are not answers to the same images: other labels, groups or counts.
    """
    for name in sorted({*one, *other}):
        # What is told of a model alone, and in no figure.
        if name == "signs" or name.startswith("example/"):
            continue
        asked = name.endswith(
            ("/labels", "/classes", "/severities", "/partition", "/shapes", "/textures", "/paired")
        )
        if name not in one or name not in other or _images(name, one) != _images(name, other):
            raise ValueError(f"{name}: not answered by both models, or for other images")
        if asked and not np.array_equal(one[name], other[name]):
            raise ValueError(f"{name}: differs between the models: they were asked other images")
    first, second = (figures(x, mode, baseline=baseline) for x in (one, other))
    return {
        name: interval_of(
            Measured(difference(found.figure, second[name].figure), found.count, found.groups),
            key,
            name,
            resamples,
        )
        for name, found in first.items()
    }


def counts(answers: Answers) -> dict[str, int]:
    """How many images each set has, and each partition of contexts."""
    found = {
        name.removesuffix("/logits"): len(logits)
        for name, logits in answers.items()
        if name.endswith("/logits")
    }
    if "context/partition" in answers:
        values, numbers = np.unique(answers["context/partition"], return_counts=True)
        found |= {f"context P{k}": int(n) for k, n in zip(values, numbers, strict=True)}
    if "conflict/shapes" in answers:
        conflict = answers["conflict/shapes"] != answers["conflict/textures"]
        found["conflict"] = int(conflict.sum())
    for variant in VARIANTS:
        name = f"background/{variant}/correct"
        if name in answers:
            found[f"background/{variant}"] = len(answers[name])
    return found


def _images(name: str, answers: Answers) -> tuple[int, ...]:
    """What is the same of answers to the same images: models may differ in their classes."""
    shape = answers[name].shape
    return shape[:1] if name.endswith("/logits") else shape


def interval_of(found: Measured, key: Key[Array, ""], name: str, resamples: int) -> Interval | None:
    """A figure's interval; None where it is undefined. Whatever other figures there are, resamples
    of one name are the same."""
    key = jax.random.fold_in(key, crc32(name.encode()))
    # Without a clean image that is right there is no share of them.
    if not np.isfinite(evaluate(found.figure, found.count)):
        return None
    try:
        return found.interval(key, resamples=resamples)
    except TooFewError:
        return None


def _names(answers: Answers, part: str) -> list[str]:
    """The sets of a kind, in the order they were asked in."""
    return list(
        dict.fromkeys(name.split("/")[1] for name in answers if name.startswith(f"{part}/"))
    )


def _logits_and_labels(answers: Answers, part: str) -> tuple[Array, Array]:
    """Of the set's classes alone where it has some of the model's only."""
    logits, labels = answers[f"{part}/logits"], answers[f"{part}/labels"]
    if f"{part}/classes" in answers:
        return restrict(logits, labels, answers[f"{part}/classes"])
    return jnp.asarray(logits), jnp.asarray(labels)


def _right(answers: Answers, part: str) -> np.ndarray:
    logits, labels = _logits_and_labels(answers, part)
    return np.asarray(logits.argmax(1) == labels)


def _calibration(answers: Answers, part: str, bins: int) -> Figure:
    confidence = jax.nn.softmax(_logits_and_labels(answers, part)[0]).max(1)
    right = jnp.asarray(_right(answers, part), jnp.float32)
    parts = confidence, right, jnp.asarray(width_edges(bins))
    host = (np.asarray(x) for x in parts)
    return bounded(Partial(binned_error, *parts), Partial(calibration_limits, *host))


def detection_figures(
    id_scores: Float[Array, " n"],
    ood_scores: Float[Array, " m"],
    names: Sequence[str] = ("auroc", "fpr95_id"),
) -> list[Measured]:
    """Figures of `detection` by their names; resamples keep the sizes of both sets."""
    one, other = ranks(id_scores, ood_scores)
    groups = np.repeat([0, 1], [len(one), len(other)])
    found = []
    for name in names:
        figure = Partial(_DETECTION[name], jnp.asarray(one), jnp.asarray(other))
        limits = Partial(_auroc_limits if name == "auroc" else fpr_limits, one, other)
        found.append(Measured(bounded(figure, limits), len(groups), groups))
    return found


def _detected(figure: str, one: Array, other: Array, weights: Float[Array, " n"]) -> Array:
    parts = weights[: len(one)], weights[len(one) :]
    return getattr(weighted_detection(one, other, *parts), figure)


# One function object for each, so that its program is compiled once.
_DETECTION = {name: partial(_detected, name) for name in ("auroc", "fpr95_id", "fpr95_nearest")}


def _auroc_limits(one: np.ndarray, other: np.ndarray, level: float) -> Limits:
    area = detection(one, other)["auroc"]
    return auroc_limits(area, len(one), len(other), level)
