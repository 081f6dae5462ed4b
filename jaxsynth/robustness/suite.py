"""A model's answers to everything it is asked about, kept so that figures need no model.

`answer` asks a model about every set once and gives arrays to save (`save_answers`). Figures are
made of them in `figures`, in either mode: answers are the same in both, as far as they can be (its
`PAPER_FAULTS_LEFT` says where they are not).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxsynth.core.arrays import read_arrays
from jaxsynth.data.dataset import ImageSource
from jaxsynth.robustness.attacks.autoattack import autoattack
from jaxsynth.robustness.attacks.common import Predict, image_keys
from jaxsynth.robustness.attacks.evaluate import Attack, attacked, correct, eps_sweep
from jaxsynth.robustness.attacks.gradient import (
    PAPER_EPS,
    PAPER_STEP_SIZE,
    PAPER_STEPS,
    fgsm,
    pgd,
)
from jaxsynth.robustness.attacks.masking import check_model
from jaxsynth.robustness.bias_sets import VARIANTS, Backgrounds, Contexts, CueConflict
from jaxsynth.robustness.corruptions.predictions import (
    DEEP,
    Corruptions,
    answer_corrupted,
    answer_corruptions,
    corrupted_batch,
)
from jaxsynth.robustness.metrics.bias import (
    ClassMap,
    context_partition,
    decide_by_class,
    decide_by_group,
)
from jaxsynth.robustness.metrics.details import feature_scores
from jaxsynth.robustness.metrics.table import PAPER_SUFFIX
from jaxsynth.robustness.predictors import (
    Answers,
    Asker,
    Features,
    HostFunction,
    Preprocess,
    as_predictor,
    labels_of,
)

# So many batches are attacked at once: their clean and moved images are in memory.
_CHUNK = 16
# Of the clean images, evenly spread: those that accuracy against eps is measured on.
_SWEPT = 128
# Accuracy is measured at these multiples of eps, and at 0.5, which no image can withstand.
EPS_MULTIPLES = (0.5, 1, 2, 4, 8)
LARGE_EPS = 0.5


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
    features: Features | None = None,
    batch_size: int = 256,
) -> Answers:
    """A model's answers to all sets, by name; see the module's docstring.

    `predict` takes pixels in [0, 1]; `preprocess` makes one uint8 image of a set one of the model's
    size (uint8, or in [0, 1]), None where they have it. `attacks` (`gradient_attacks` if None) and
    `corruptions` are made of the clean images, attacks with one radius for all. With `features`
    there are scores of OOD images by them too.
    """
    asker = Asker(HostFunction(predict), preprocess, batch_size)
    asker = replace(asker, predict=as_predictor(predict, asker.read(sets.clean, [0])[0]))
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
    if features is not None:
        found |= _feature_scores(asker, sets, features, found)
    found |= _under_attack(asker, sets.clean, key, attacks, eps, with_autoattack)
    if attacks:
        found |= _signs_and_curve(asker, sets.clean, key, eps)
    # Beyond the numbers that attacks draw by.
    drawn = jax.random.fold_in(key, 2**16)
    found |= answer_corruptions(
        asker, sets.clean, drawn, corruptions, depth_folder=sets.depth_folder
    )
    if attacks or corruptions.asked:
        found |= _examples(asker, sets.clean, key, attacks, eps, corruptions, sets.depth_folder)
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


def _feature_scores(asker: Asker, sets: Sets, features: Features, found: Answers) -> Answers:
    function = as_predictor(features.function, asker.read(sets.clean, [0])[0])
    network = replace(asker, predict=function, name="features")
    parts = {"clean": sets.clean, **{f"ood/{name}": each for name, each in sets.ood.items()}}
    last = None
    if features.kernel is not None:
        bias = np.zeros(features.kernel.shape[1]) if features.bias is None else features.bias
        last = features.kernel, bias
    return feature_scores(
        (network.logits(features.training, "training"), labels_of(features.training)),
        {part: network.logits(source, part) for part, source in parts.items()},
        {part: found[f"{part}/logits"] for part in parts},
        last,
    )


def _signs_and_curve(asker: Asker, clean: ImageSource, key, eps: float) -> Answers:
    """Signs of masked gradients on a batch, and PGD's accuracy at many radii."""
    rows = np.unique(np.linspace(0, len(clean) - 1, min(len(clean), _SWEPT)).astype(int))
    images, labels = asker.read(clean, rows), labels_of(clean)[rows]
    few = slice(0, asker.batch_size)
    signs = check_model(asker.predict, images[few], labels[few])
    epsilons = sorted({*(eps * times for times in EPS_MULTIPLES if eps * times < 0.5), LARGE_EPS})
    right, keys = [], image_keys(key, len(rows))
    for start in range(0, len(rows), asker.batch_size):
        part = slice(start, start + asker.batch_size)
        attack = partial(pgd, steps=PAPER_STEPS)
        right.append(
            eps_sweep(
                attack, asker.predict, images[part], labels[part], keys[part], np.array(epsilons)
            )
        )
    return {
        "signs": np.array([f"{found.sign}: {found.text}" for found in signs], np.str_),
        "sweep/epsilons": np.array(epsilons),
        "sweep/correct": np.concatenate([np.asarray(x) for x in right], axis=1),
        "sweep/clean": correct(asker.predict, images, labels, batch_size=asker.batch_size),
    }


def _examples(
    asker: Asker, clean: ImageSource, key, attacks: Mapping[str, Attack], eps, corruptions, depths
) -> Answers:
    """What each attack and corruption (at its highest severity) makes of the first image."""
    images, labels = asker.read(clean, [0]), labels_of(clean)[:1]
    made = {"clean": images}
    for number, (name, attack) in enumerate(attacks.items()):
        if not name.endswith(PAPER_SUFFIX):
            keys = image_keys(jax.random.fold_in(key, number), len(clean))[:1]
            made[name] = attacked(attack, asker.predict, images, labels, keys, eps=eps)
    severity = max(corruptions.severities)
    drawn = jax.random.fold_in(key, 2**16)
    deep = any(name in DEEP for name in corruptions.asked)
    nearness = asker.nearness(clean, [0], depths) if deep else None
    for name in corruptions.asked:
        made[name] = corrupted_batch(
            name, jnp.asarray(images), severity, drawn, nearness=nearness,
            released=corruptions.released,
        )  # fmt: skip
    return {
        f"example/{name}": np.round(255 * np.clip(np.asarray(image)[0], 0, 1)).astype(np.uint8)
        for name, image in made.items()
    }


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
    return read_arrays(path)


def _class_map(sets: Sets, name: str, classes: Sequence[str]) -> ClassMap:
    if name in sets.class_maps:
        return sets.class_maps[name]
    return {group: (index,) for index, group in enumerate(classes)}
