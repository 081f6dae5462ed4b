"""All figures of a model: its answers are kept, and figures are made from them alone.

`answer` asks a model about every set once and gives arrays to save (`save_answers`). `measure`
turns them into figures with intervals, `compare` two models' answers to the same images into paired
differences: neither needs the model. The figures are the columns of the synthetic-clone study
(Singh et al. 2024, arXiv 2405.20469), without its common corruptions.

`mode` "corrected" is the default. "paper" follows what that study's code computes where it differs
from what its text says, as far as a figure depends on it; `PAPER_FAULTS` names each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from jaxsynth.data.sources import ImageSource
from jaxsynth.robustness.attacks.autoattack import autoattack
from jaxsynth.robustness.attacks.common import Predict
from jaxsynth.robustness.attacks.evaluate import Attack, attacked, batches, correct
from jaxsynth.robustness.attacks.gradient import (
    PAPER_EPS,
    PAPER_STEP_SIZE,
    PAPER_STEPS,
    fgsm,
    pgd,
)
from jaxsynth.robustness.bias_sets import VARIANTS, Backgrounds, Contexts, CueConflict
from jaxsynth.robustness.biases import (
    ClassMap,
    background_gap,
    context_partition,
    decide_by_class,
    decide_by_group,
)
from jaxsynth.robustness.bootstrap import (
    Figure,
    Interval,
    difference,
    evaluate,
    interval,
    mean,
    quotient,
    ratio,
)
from jaxsynth.robustness.calibration import PAPER_BINS, binned_error, width_edges
from jaxsynth.robustness.detection import weighted_detection
from jaxsynth.robustness.ood import max_softmax, negative_entropy

Answers = dict[str, np.ndarray]
Mode = Literal["corrected", "paper"]

PAPER_FAULTS = {
    "AUROC": "scores by the negative entropy; the text says maximum softmax probability",
    "FPR95": "at the recall nearest to 95 %, which may be below it",
    "R_adv PGD": "a step of 2/225, larger than the ball of 1/255: every iterate is a corner of it",
}


@dataclass(frozen=True)
class Sets:
    """What a model is asked about. Labels of `clean` and `shifted` are its classes.

    `ood` are images of no class. The bias sets' classes are groups of the model's, by
    `class_maps` ("context", "conflict", "background"), or else its first classes in their order.
    """

    clean: ImageSource
    shifted: Mapping[str, ImageSource] = field(default_factory=dict)
    ood: Mapping[str, ImageSource] = field(default_factory=dict)
    context: Contexts | None = None
    conflict: CueConflict | None = None
    background: Backgrounds | None = None
    class_maps: Mapping[str, ClassMap] = field(default_factory=dict)


class Measured(NamedTuple):
    """A figure of `count` images; `groups` of them keep their sizes when it is resampled."""

    figure: Figure
    count: int
    groups: np.ndarray | None = None


def gradient_attacks(mode: Mode = "corrected") -> dict[str, Attack]:
    """FGSM and PGD of 20 steps, as each mode has them."""
    step_size = PAPER_STEP_SIZE if mode == "paper" else None
    return {"FGSM": fgsm, "PGD": partial(pgd, steps=PAPER_STEPS, step_size=step_size)}


def answer(
    predict: Predict,
    sets: Sets,
    key: Key[Array, ""],
    *,
    attacks: Mapping[str, Attack] | None = None,
    eps: float = PAPER_EPS,
    with_autoattack: bool = False,
    batch_size: int = 256,
) -> Answers:
    """A model's answers to all sets, by name; see the module's docstring.

    `attacks` (FGSM and PGD if None) are made on the clean images, one radius for all.
    """
    predict = predict if isinstance(predict, Partial) else Partial(predict)
    attacks = gradient_attacks() if attacks is None else attacks

    def ask(source: ImageSource) -> np.ndarray:
        return _logits(predict, source, batch_size)

    found: Answers = {"clean/logits": ask(sets.clean), "clean/labels": _labels(sets.clean)}
    for name, source in sets.shifted.items():
        found[f"shifted/{name}/logits"] = ask(source)
        found[f"shifted/{name}/labels"] = _labels(source)
    for name, source in sets.ood.items():
        found[f"ood/{name}/logits"] = ask(source)
    if attacks or with_autoattack:
        images, labels = _pixels(sets.clean, range(len(sets.clean))), found["clean/labels"]
        for number, (name, attack) in enumerate(attacks.items()):
            drawn = jax.random.fold_in(key, number)
            moved = attacked(attack, predict, images, labels, drawn, eps=eps, batch_size=batch_size)
            found[f"attack/{name}/correct"] = correct(predict, moved, labels, batch_size=batch_size)
        if with_autoattack:
            drawn = jax.random.fold_in(key, len(attacks))
            withstood = autoattack(predict, images, labels, drawn, eps=eps, batch_size=batch_size)
            found["attack/AutoAttack/correct"] = withstood.correct
    if sets.context is not None:
        contexts = sets.context
        decided = decide_by_class(
            ask(contexts.source), _class_map(sets, "context", contexts.names), contexts.names
        )
        found["context/correct"] = decided == _labels(contexts.source)
        found["context/partition"] = context_partition(contexts.uncommon)
    if sets.conflict is not None:
        conflict = sets.conflict
        found["conflict/decisions"] = decide_by_group(
            ask(conflict.source), _class_map(sets, "conflict", conflict.names), conflict.names
        )
        found["conflict/shapes"] = _labels(conflict.source)
        found["conflict/textures"] = np.asarray(conflict.textures)
    if sets.background is not None:
        behind = sets.background
        groups = _class_map(sets, "background", behind.names)
        for variant in VARIANTS:
            source = getattr(behind, variant)
            decided = decide_by_class(ask(source), groups, behind.names)
            found[f"background/{variant}/correct"] = decided == _labels(source)
        found["background/paired"] = np.array(behind.paired)
    return found


def save_answers(path: Path, answers: Answers) -> None:
    """One .npz file."""
    np.savez(path, allow_pickle=False, **answers)


def load_answers(path: Path) -> Answers:
    """What `save_answers` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def figures(answers: Answers, mode: Mode = "corrected") -> dict[str, Measured]:
    """Every figure that the answers allow, by its column's name, in the paper's order."""
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
        one, other = (score(answers[f"{part}/logits"]) for part in ("clean", f"ood/{name}"))
        groups = np.repeat([0, 1], [len(one), len(other)])
        for column, figure in (
            ("AUROC", "auroc"),
            ("FPR95", "fpr95_nearest" if mode == "paper" else "fpr95_id"),
        ):
            measured = Partial(_DETECTION[figure], one, other)
            found[f"{column} {name}"] = Measured(measured, len(groups), groups)
    for name in _names(answers, "attack"):
        under = answers[f"attack/{name}/correct"]
        found[f"R_adv {name}"] = Measured(ratio(under & clean, clean), count)
    if "context/correct" in answers:
        right, partition = answers["context/correct"], answers["context/partition"]
        for k in np.unique(partition[partition > 0]).tolist():
            figure = quotient(mean(right, partition == k), mean(right, partition == 0))
            found[f"CB_{k}"] = Measured(figure, len(right), partition)
    if "conflict/decisions" in answers:
        decisions, shapes, textures = (
            answers[f"conflict/{name}"] for name in ("decisions", "shapes", "textures")
        )
        conflict = shapes != textures
        by_shape = conflict & (decisions == shapes)
        either = by_shape | (conflict & (decisions == textures))
        found["shape bias"] = Measured(ratio(by_shape, either), len(shapes))
    if "background/paired" in answers:
        right = {v: answers[f"background/{v}/correct"] for v in VARIANTS}
        found["IN-9"] = Measured(mean(right["original"]), len(right["original"]))
        gap = background_gap(
            right["mixed_same"], right["mixed_rand"], paired=bool(answers["background/paired"])
        )
        found["BG-Gap"] = Measured(*gap)
    return found


def measure(
    answers: Answers, key: Key[Array, ""], *, mode: Mode = "corrected", resamples: int = 2000
) -> dict[str, Interval | None]:
    """Every figure with its interval; None where it is undefined (nothing right to divide by)."""
    return {
        name: _interval(found, jax.random.fold_in(key, number), resamples)
        for number, (name, found) in enumerate(figures(answers, mode).items())
    }


def compare(
    one: Answers,
    other: Answers,
    key: Key[Array, ""],
    *,
    mode: Mode = "corrected",
    resamples: int = 2000,
) -> dict[str, Interval | None]:
    """`one`'s figures less `other`'s, with the interval of the paired difference.

    ValueError where they are not answers to the same images: other labels, groups or counts.
    """
    for name in sorted({*one, *other}):
        asked = name.endswith(("/labels", "/partition", "/shapes", "/textures", "/paired"))
        if name not in one or name not in other or one[name].shape[:1] != other[name].shape[:1]:
            raise ValueError(f"{name}: not answered by both models, or for other images")
        if asked and not np.array_equal(one[name], other[name]):
            raise ValueError(f"{name}: differs between the models: they were asked other images")
    first, second = figures(one, mode), figures(other, mode)
    return {
        name: _interval(
            Measured(difference(found.figure, second[name].figure), found.count, found.groups),
            jax.random.fold_in(key, number),
            resamples,
        )
        for number, (name, found) in enumerate(first.items())
    }


def _interval(found: Measured, key: Key[Array, ""], resamples: int) -> Interval | None:
    # Without a clean image that is right there is no share of them.
    if not np.isfinite(evaluate(found.figure, found.count)):
        return None
    return interval(found.figure, found.count, key, groups=found.groups, resamples=resamples)


def _names(answers: Answers, part: str) -> list[str]:
    """The sets of a kind, in the order they were asked in."""
    return list(
        dict.fromkeys(name.split("/")[1] for name in answers if name.startswith(f"{part}/"))
    )


def _right(answers: Answers, part: str) -> np.ndarray:
    return answers[f"{part}/logits"].argmax(1) == answers[f"{part}/labels"]


def _calibration(answers: Answers, part: str, bins: int) -> Figure:
    confidence = jax.nn.softmax(jnp.asarray(answers[f"{part}/logits"])).max(1)
    right = jnp.asarray(_right(answers, part), jnp.float32)
    return Partial(binned_error, confidence, right, jnp.asarray(width_edges(bins)))


def _detected(figure: str, one: Array, other: Array, weights: Float[Array, " n"]) -> Array:
    parts = weights[: len(one)], weights[len(one) :]
    return getattr(weighted_detection(one, other, *parts), figure)


# One function object for each, so that its program is compiled once.
_DETECTION = {name: partial(_detected, name) for name in ("auroc", "fpr95_id", "fpr95_nearest")}


def _class_map(sets: Sets, name: str, classes: Sequence[str]) -> ClassMap:
    if name in sets.class_maps:
        return sets.class_maps[name]
    return {group: (index,) for index, group in enumerate(classes)}


def _labels(source: ImageSource) -> np.ndarray:
    return np.asarray(source.labels, np.int32)


def _pixels(source: ImageSource, rows) -> np.ndarray:
    return np.stack([source[int(row)].image for row in rows]).astype(np.float32) / 255


def _logits(predict: Partial, source: ImageSource, batch_size: int) -> np.ndarray:
    parts = []
    for rows, batch in batches(len(source), batch_size):
        logits = np.asarray(_ask(predict, _pixels(source, batch)), np.float32)
        parts.append(logits[: rows.stop - rows.start])
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        row = int(np.argmin(np.isfinite(logits).all(1)))
        raise ValueError(f"predict: NaN or infinite logits, the first for image {source.ids[row]}")
    return logits


@jax.jit
def _ask(predict, images):
    return predict(images)
