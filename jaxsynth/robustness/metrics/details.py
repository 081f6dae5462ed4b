"""What a page shows of a model beyond the table: curves, reliability, scores, and warnings."""

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxsynth.robustness.attacks.masking import check_results
from jaxsynth.robustness.metrics import ood
from jaxsynth.robustness.metrics.bootstrap import Interval, Measured, TooFewError, mean
from jaxsynth.robustness.metrics.calibration import fit_temperature, reliability, restrict, summary
from jaxsynth.robustness.metrics.table import detection_figures
from jaxsynth.robustness.predictors import Answers

# Scores of logits by what the page calls them.
LOGIT_SCORES = {
    "maximum softmax": ood.max_softmax,
    "maximum logit": ood.max_logit,
    "energy": ood.energy,
    "negative entropy": ood.negative_entropy,
    "generalised entropy": ood.gen,
}
# Those that need features of training images.
FEATURE_SCORES = ("nearest neighbours", "ViM", "Mahalanobis", "relative Mahalanobis")
_BINS = 15


def describe(
    answers: Answers, key: Key[Array, ""], *, resamples: int = 2000
) -> dict[str, dict[str, Any] | list]:
    """For JSON: "calibration" and "reliability" by set, "ood" by set and score, the "sweep" of
    accuracy against eps, and "signs" of attacks that overstate robustness."""
    found: dict[str, Any] = {"calibration": {}, "reliability": {}, "ood": {}, "signs": []}
    temperature = _temperature(answers)
    if temperature is not None:
        found["temperature"] = temperature
    for name, logits, labels in _labelled(answers):
        # Of the clean images, on which the temperature was fitted, nothing is told by it.
        scaled = None if name == "clean" else temperature
        found["calibration"][name] = summary(logits, labels, bins=_BINS, temperature=scaled)
        diagram = reliability(logits, labels, bins=_BINS)
        found["reliability"][name] = {
            field: [None if np.isnan(x) else x for x in values.tolist()]
            for field, values in diagram._asdict().items()
        }
    for name, scores in ood_figures(answers).items():
        drawn = jax.random.fold_in(key, crc32(name.encode()))
        found["ood"][name] = {
            score: {
                figure: _json(measured, drawn, resamples)
                for figure, measured in zip(("AUROC", "FPR95"), both, strict=True)
            }
            for score, both in scores.items()
        }
    if "sweep/epsilons" in answers:
        found["sweep"] = _sweep(answers, key, resamples)
        found["signs"] = [str(text) for text in answers["signs"]] + _result_signs(answers)
    return found


def _temperature(answers: Answers) -> float | None:
    """Fitted on the clean images; None where they have none (all right, say)."""
    try:
        return fit_temperature(answers["clean/logits"], answers["clean/labels"])
    except ValueError:
        return None


def _labelled(answers: Answers):
    for part in ("clean", *(f"shifted/{name}" for name in _parts(answers, "shifted"))):
        logits, labels = answers[f"{part}/logits"], answers[f"{part}/labels"]
        if f"{part}/classes" in answers:
            logits, labels = restrict(logits, labels, answers[f"{part}/classes"])
        yield part.removeprefix("shifted/"), logits, labels


def ood_figures(answers: Answers) -> dict[str, dict[str, list[Measured]]]:
    """AUROC and FPR95 of each set of no class, by the name of the score."""
    found: dict[str, dict[str, list[Measured]]] = {}
    for name in _parts(answers, "ood"):
        one, other = (answers[f"{part}/logits"] for part in ("clean", f"ood/{name}"))
        found[name] = {
            score: detection_figures(make(one), make(other)) for score, make in LOGIT_SCORES.items()
        }
        for score in FEATURE_SCORES:
            if f"score/{score}/clean" in answers:
                both = (answers[f"score/{score}/{part}"] for part in ("clean", f"ood/{name}"))
                found[name][score] = detection_figures(*both)
    return found


def feature_scores(
    training: tuple[np.ndarray, np.ndarray],
    features: Mapping[str, np.ndarray],
    logits: Mapping[str, np.ndarray],
    last_layer: tuple[np.ndarray, np.ndarray] | None,
) -> Answers:
    """Scores of features (n, d) by set, fitted on those of training images and their labels.

    ViM needs the last layer (kernel, bias) and the sets' logits; without it, it is left out.
    """
    bank, labels = training
    neighbours = ood.fit_knn(bank)
    gaussians = ood.fit_mahalanobis(bank, labels, classes=int(labels.max()) + 1)
    principal = None if last_layer is None else ood.fit_vim(bank, *last_layer)
    found = {}
    for part, rows in features.items():
        near = ood.knn(neighbours, rows, k=min(50, len(bank)))
        found[f"score/nearest neighbours/{part}"] = np.asarray(near)
        for name, score in (
            ("Mahalanobis", ood.mahalanobis),
            ("relative Mahalanobis", ood.relative_mahalanobis),
        ):
            found[f"score/{name}/{part}"] = np.asarray(score(gaussians, rows))
        if principal is not None:
            found[f"score/ViM/{part}"] = np.asarray(ood.vim(principal, rows, logits[part]))
    return found


def _sweep(answers: Answers, key, resamples: int) -> dict[str, Any]:
    rows = [answers["sweep/clean"], *answers["sweep/correct"]]
    drawn = jax.random.fold_in(key, 1)
    return {
        "epsilons": [0.0, *answers["sweep/epsilons"].tolist()],
        "accuracy": [_json(Measured(mean(x), len(x)), drawn, resamples) for x in rows],
        "images": len(rows[0]),
    }


def _result_signs(answers: Answers) -> list[str]:
    accuracy = {
        name: float(answers[f"attack/{name}/correct"].mean())
        for name in ("FGSM", "PGD", "AutoAttack")
        if f"attack/{name}/correct" in answers
    }
    accuracy["PGD at eps 0.5"] = float(answers["sweep/correct"][-1].mean())
    found = check_results(
        accuracy, one_step="FGSM", many_steps="PGD", black_box="Square", large="PGD at eps 0.5"
    )
    return [f"{each.sign}: {each.text}" for each in found]


def _json(measured: Measured, key, resamples: int) -> dict[str, Any] | None:
    try:
        found: Interval = measured.interval(key, resamples=resamples)
    except TooFewError:
        return None
    return {"value": found.value, "low": found.low, "high": found.high, "text": found.text()}


def _parts(answers: Answers, kind: str) -> list[str]:
    return list(
        dict.fromkeys(name.split("/")[1] for name in answers if name.startswith(f"{kind}/"))
    )
