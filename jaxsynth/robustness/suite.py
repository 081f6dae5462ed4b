"""A model's answers to everything it is asked about, kept so that figures need no model.

`answer` asks a model about every set once and gives arrays to save (`save_answers`). Figures are
made of them in `figures`, in either mode: answers are the same in both, as far as they can be (its
`PAPER_FAULTS_LEFT` says where they are not).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Key

from jaxsynth.data.dataset import ImageSource
from jaxsynth.robustness.attacks.autoattack import autoattack
from jaxsynth.robustness.attacks.common import Predict, image_keys
from jaxsynth.robustness.attacks.evaluate import Attack, attacked, correct
from jaxsynth.robustness.attacks.gradient import (
    PAPER_EPS,
    PAPER_STEP_SIZE,
    PAPER_STEPS,
    fgsm,
    pgd,
)
from jaxsynth.robustness.bias_sets import VARIANTS, Backgrounds, Contexts, CueConflict
from jaxsynth.robustness.corruptions.predictions import (
    Corruptions,
    answer_corrupted,
    answer_corruptions,
)
from jaxsynth.robustness.metrics.bias import (
    ClassMap,
    context_partition,
    decide_by_class,
    decide_by_group,
)
from jaxsynth.robustness.predictors import Answers, Asker, Preprocess, labels_of

# So many batches are attacked at once: their clean and moved images are in memory.
_CHUNK = 16
# The attack of each name that paper mode shows for the one that is so called without it.
PAPER_SUFFIX = " as published"


@dataclass(frozen=True)
class Sets:
    """What a model is asked about. Labels of `clean` and `shifted` are its classes.

    `subsets` names shifted sets of some classes only: the model chooses among these. `ood` are
    images of no class. The bias sets' classes are groups of the model's, by `class_maps`
    ("context", "conflict", "background"), or else its first classes in their order. `depth_folder`
    holds maps of how near each clean image's pixels are, which 3D corruptions need where the source
    does not know it. `corrupted` are sets that come corrupted: for each corruption a source a
    severity, its image i being the i-th clean one.
    """

    clean: ImageSource
    shifted: Mapping[str, ImageSource] = field(default_factory=dict)
    ood: Mapping[str, ImageSource] = field(default_factory=dict)
    context: Contexts | None = None
    conflict: CueConflict | None = None
    background: Backgrounds | None = None
    class_maps: Mapping[str, ClassMap] = field(default_factory=dict)
    subsets: Mapping[str, Sequence[int]] = field(default_factory=dict)
    depth_folder: Path | None = None
    corrupted: Mapping[str, Sequence[ImageSource]] = field(default_factory=dict)

    def __post_init__(self):
        for name in self.subsets:
            if name not in self.shifted:
                raise ValueError(f"subsets: {name!r} is none of the shifted sets")


def gradient_attacks() -> dict[str, Attack]:
    """FGSM and PGD of 20 steps; PGD with the published step too, for figures in paper mode."""
    return {
        "FGSM": fgsm,
        "PGD": partial(pgd, steps=PAPER_STEPS),
        f"PGD{PAPER_SUFFIX}": partial(pgd, steps=PAPER_STEPS, step_size=PAPER_STEP_SIZE),
    }


def answer(
    predict: Predict,
    sets: Sets,
    key: Key[Array, ""],
    *,
    preprocess: Preprocess | None = None,
    attacks: Mapping[str, Attack] | None = None,
    eps: float = PAPER_EPS,
    with_autoattack: bool = False,
    corruptions: Corruptions | None = None,
    batch_size: int = 256,
) -> Answers:
    """A model's answers to all sets, by name; see the module's docstring.

    `predict` takes pixels in [0, 1]; `preprocess` makes one uint8 image of a set one of the model's
    size (uint8, or in [0, 1]), None where they have it. `attacks` (`gradient_attacks` if None) and
    `corruptions` are made of the clean images, attacks with one radius for all.
    """
    predict = predict if isinstance(predict, Partial) else Partial(predict)
    asker = Asker(predict, preprocess, batch_size)
    attacks = gradient_attacks() if attacks is None else attacks
    corruptions = corruptions or Corruptions()
    twice = sorted({*sets.corrupted} & {*corruptions.asked})
    if twice:
        raise ValueError(f"corruptions: {', '.join(twice)}: to be made, but the sets have them too")

    found: Answers = {}
    found["clean/logits"], found["clean/labels"] = asker.labelled(sets.clean, "clean")
    for name, source in sets.shifted.items():
        part = f"shifted/{name}"
        found[f"{part}/logits"], found[f"{part}/labels"] = asker.labelled(source, name)
        if name in sets.subsets:
            found[f"{part}/classes"] = np.asarray(sets.subsets[name], np.int32)
    for name, source in sets.ood.items():
        found[f"ood/{name}/logits"] = asker.logits(source, name)
    found |= _under_attack(asker, sets.clean, key, attacks, eps, with_autoattack)
    # Beyond the numbers that attacks draw by.
    drawn = jax.random.fold_in(key, 2**16)
    found |= answer_corruptions(
        asker, sets.clean, drawn, corruptions, depth_folder=sets.depth_folder
    )
    found |= answer_corrupted(asker, sets.clean, sets.corrupted)
    return found | _biases(asker, sets)


def _under_attack(
    asker: Asker, clean: ImageSource, key, attacks: Mapping[str, Attack], eps, with_autoattack: bool
) -> Answers:
    """Which clean images withstand each attack. Each has its own key, however they are cut."""
    names = [*attacks, *(["AutoAttack"] if with_autoattack else [])]
    found = {name: np.empty(len(clean), bool) for name in names}
    all_labels, size = labels_of(clean), asker.batch_size
    for start in range(0, len(clean), _CHUNK * size) if names else ():
        rows = np.arange(start, min(start + _CHUNK * size, len(clean)))
        images, labels = asker.read(clean, rows), all_labels[rows]
        for number, name in enumerate(names):
            keys = image_keys(jax.random.fold_in(key, number), len(clean))[rows]
            if name in attacks:
                moved = attacked(
                    attacks[name], asker.predict, images, labels, keys, eps=eps, batch_size=size
                )
                right = correct(asker.predict, moved, labels, batch_size=size)
            else:
                right = autoattack(
                    asker.predict, images, labels, keys, eps=eps, batch_size=size
                ).correct
            found[name][rows] = right
    return {f"attack/{name}/correct": right for name, right in found.items()}


def _biases(asker: Asker, sets: Sets) -> Answers:
    found: Answers = {}
    if sets.context is not None:
        contexts = sets.context
        partition = context_partition(contexts.uncommon)
        if not (partition == 0).any():
            raise ValueError("context: no image in P0, whose accuracy the others' are a share of")
        decided = decide_by_class(
            asker.logits(contexts.source, "context"),
            _class_map(sets, "context", contexts.names),
            contexts.names,
        )
        found["context/correct"] = decided == labels_of(contexts.source)
        found["context/partition"] = partition
    if sets.conflict is not None:
        conflict = sets.conflict
        found["conflict/decisions"] = decide_by_group(
            asker.logits(conflict.source, "conflict"),
            _class_map(sets, "conflict", conflict.names),
            conflict.names,
        )
        found["conflict/shapes"] = labels_of(conflict.source)
        found["conflict/textures"] = np.asarray(conflict.textures)
    if sets.background is not None:
        behind = sets.background
        groups = _class_map(sets, "background", behind.names)
        for variant in VARIANTS:
            source = getattr(behind, variant)
            decided = decide_by_class(asker.logits(source, variant), groups, behind.names)
            found[f"background/{variant}/correct"] = decided == labels_of(source)
        found["background/paired"] = np.array(behind.paired)
    return found


def save_answers(path: Path, answers: Answers) -> None:
    """One .npz file."""
    np.savez(path, allow_pickle=False, **answers)


def load_answers(path: Path) -> Answers:
    """What `save_answers` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _class_map(sets: Sets, name: str, classes: Sequence[str]) -> ClassMap:
    if name in sets.class_maps:
        return sets.class_maps[name]
    return {group: (index,) for index, group in enumerate(classes)}
